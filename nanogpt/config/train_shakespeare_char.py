"""A small character-level GPT on Shakespeare, nanoGPT's recipe: about 3 minutes on one GPU, best val loss about 1.47.

python nanogpt/data/shakespeare_char/prepare.py
python -m nanogpt.train train_shakespeare_char
"""

out_dir = "out/nanogpt-shakespeare"
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2

max_iters = 5000
lr_decay_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # few tokens in a step: a longer memory

eval_interval = 250
eval_tokens = 0  # the whole validation set
log_interval = 10
always_save_checkpoint = False  # it overfits: keep the best
