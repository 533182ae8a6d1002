"""Submitting runs and finding them again by name."""
