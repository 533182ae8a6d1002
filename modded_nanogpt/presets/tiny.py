"""A model of the same make for a CPU: every technique, 11 layers of width 96, minutes of training.

python nanogpt/data/python_source/prepare.py
python modded_nanogpt/train_gpt.py tiny --dataset=python_source --vocab_size=128 --prefix=false
"""

recipe = "tiny"
sampled_softmax = False  # it is made for GPT-2's vocabulary
out_dir = "out/speedrun-tiny"
eval_interval = 16
eval_tokens = 8192
eval_slice = 4096
