"""Triton kernels of the speedrun. Each has a plain twin of the same name in `reference/`, and tests compare the two."""
