"""Studies: configurations in, runs out; `engaging experiment`."""
