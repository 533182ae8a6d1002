"""Validation loss of OpenAI's gpt2-large (774M parameters) on OpenWebText's whole validation set; nothing is trained.

python -m nanogpt.train eval_gpt2_large
"""

out_dir = "out/eval-gpt2-large"
overwrite = True  # of an earlier evaluation, which is moved aside
dataset = "openwebtext"
init_from = "gpt2-large"

eval_only = True
eval_tokens = 0
batch_size = 8
