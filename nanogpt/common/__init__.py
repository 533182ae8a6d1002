"""The code that both trainers share: errors, flags, ranks, shards, checkpoints, the run directory."""
