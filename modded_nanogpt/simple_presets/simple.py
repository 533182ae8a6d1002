"""GPT-2's size on FineWeb to 3.28 in about 3,250 steps of 524,288 tokens: for studies of optimizers and variants.

torchrun --standalone --nproc_per_node=8 -m modded_nanogpt.train_gpt_simple simple --variant=palm_parallel
"""

out_dir = "out/simple"
dataset = "fineweb10B"
num_iterations = 3250
batch_size = 512
device_batch_size = 64
sequence_length = 1024
