"""The same trainer on a CPU in seconds, on any data set there is.

python nanogpt/data/shakespeare_char/prepare.py
python -m modded_nanogpt.train_gpt_simple tiny --variant=curriculum
"""

out_dir = "out/simple-tiny"
dataset = "shakespeare_char"
device = "cpu"
num_iterations = 40
batch_size = 16
device_batch_size = 4
sequence_length = 64
repeat_data = True
num_layers = 4
num_heads = 2
model_dim = 64
adam_warmup = 4
val_loss_every = 10
val_tokens = 8192
target_val_loss = 0.0
