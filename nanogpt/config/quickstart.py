"""What `make quickstart` trains: a character-level GPT on Shakespeare, under a minute on two CPU cores.

    python -m nanogpt.train quickstart

Half the layers of nanoGPT's CPU recipe, two thirds of its batch and a larger learning rate: on this little text two
layers end as low as three and lower than four (1.83, 1.83, 1.85), in half the time of four.
On CPUs that multiply bfloat16, --dtype=bfloat16 is faster; `make quickstart` sees to that.
"""

out_dir = "out/quickstart"
dataset = "shakespeare_char"
n_layer = 2
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

eval_interval = 500
eval_tokens = 0
log_interval = 10
compile = "false"  # on a GPU, compiling takes longer than this training, and needs a C compiler
