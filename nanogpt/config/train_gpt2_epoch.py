"""GPT-2 124M, one epoch of OpenWebText: 17,234 steps of 524,288 tokens = 9 B tokens, warm-up 715 steps.

make ddp-train NGPUS=8
torchrun --standalone --nproc_per_node=8 -m nanogpt.train train_gpt2_epoch
"""

out_dir = "out/nanogpt-gpt2-epoch"
dataset = "openwebtext"
batch_size = (
    64  # 64 x 1,024 x 8 GPUs = 524,288 tokens; fewer GPUs accumulate. Less memory: --batch_size=32, 16
)
block_size = 1024
tokens_per_step = 524288

max_iters = 17234
lr_decay_iters = 17234
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 715
weight_decay = 0.1

eval_interval = 500
log_interval = 10
