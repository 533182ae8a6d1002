"""Validation loss of OpenAI's gpt2-medium (350M parameters) on OpenWebText's whole validation set; nothing is trained.

python -m nanogpt.train eval_gpt2_medium
"""

out_dir = "out/eval-gpt2-medium"
overwrite = True  # of an earlier evaluation, which is moved aside
dataset = "openwebtext"
init_from = "gpt2-medium"

eval_only = True
eval_tokens = 0
batch_size = 8
