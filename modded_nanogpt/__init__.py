"""The speedrun trainer: GPT-2 on FineWeb to a loss of 3.28 in as little time as possible."""
