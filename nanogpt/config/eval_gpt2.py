"""Validation loss of OpenAI's gpt2 (124M parameters) on OpenWebText's whole validation set; nothing is trained.

python -m nanogpt.train eval_gpt2
"""

out_dir = "out/eval-gpt2"
overwrite = True  # of an earlier evaluation, which is moved aside
dataset = "openwebtext"
init_from = "gpt2"

eval_only = True
eval_tokens = 0
batch_size = 8
