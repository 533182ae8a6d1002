"""`python -m tools`: the same as `engaging`."""

from tools.cli import entry

entry()
