"""Validation loss of OpenAI's gpt2-xl (1,558M parameters) on OpenWebText's whole validation set; nothing is trained.

python -m nanogpt.train eval_gpt2_xl
"""

out_dir = "out/eval-gpt2-xl"
overwrite = True  # of an earlier evaluation, which is moved aside
dataset = "openwebtext"
init_from = "gpt2-xl"

eval_only = True
eval_tokens = 0
batch_size = 8
