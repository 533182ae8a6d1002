"""The 5,100-iteration baseline of late 2024, which many studies were planned around: its length, its batch, its rate.

Its one learning_rate, 0.0036, was AdamW's of the head; Muon's was made of it, with updates of another scale than here.

STAGE_NUM_ITERATIONS=1000 STAGE_WARMDOWN_ITERS=284 python -m modded_nanogpt.train_gpt_simple historical
"""

out_dir = "out/simple-historical"
dataset = "fineweb10B"
num_iterations = 5100
warmdown_iters = 1450
batch_size = 512
device_batch_size = 64
sequence_length = 1024
head_lr = 0.0036
