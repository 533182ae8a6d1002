"""Track 1: GPT-2 on FineWeb to a validation loss of 3.28, as record 92 does it.

These are the defaults; copy it to change something.

torchrun --standalone --nproc_per_node=8 modded_nanogpt/train_gpt.py record
"""

recipe = "record"
dataset = "fineweb10B"
out_dir = "out/speedrun"
