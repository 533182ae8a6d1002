"""The speedrun's data."""
