"""GPT-2 124M on OpenWebText, nanoGPT's schedule: 0.5 M tokens a step, validation loss about 2.85 after 300 B tokens.

torchrun --standalone --nproc_per_node=8 -m nanogpt.train train_gpt2
"""

out_dir = "out/nanogpt-gpt2"
dataset = "openwebtext"
batch_size = 20  # sequences on one GPU; 30 or 60 is faster where the memory allows it
block_size = 1024
tokens_per_step = 480 * 1024  # 0.5 M; with 20 sequences it divides over 1, 2, 3, 4, 6, 8 GPUs

max_iters = 600000
lr_decay_iters = 600000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1

eval_interval = 1000
log_interval = 10
