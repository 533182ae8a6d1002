"""What makes a step fast without being part of the algorithm: imports nothing of it, what is needed is passed in."""
