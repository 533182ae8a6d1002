"""What `make quickstart` trains: a character-level GPT on Shakespeare, under a minute on two CPU cores.

    python -m nanogpt.train quickstart

The model of nanoGPT's CPU recipe; a larger learning rate lets batches of 8 do, where nanoGPT takes 12.
On CPUs that multiply bfloat16, --dtype=bfloat16 halves the time; `make quickstart` sees to that.
"""

out_dir = "out/quickstart"
dataset = "shakespeare_char"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 8

max_iters = 2000
lr_decay_iters = 2000
learning_rate = 5e-3
min_lr = 1e-4
warmup_iters = 50
beta1 = 0.85
beta2 = 0.99

eval_interval = 400
eval_tokens = 0
log_interval = 10
compile = "false"  # on a GPU, compiling takes longer than this training, and needs a C compiler
