"""Fine-tune the published GPT-2 weights on Shakespeare; they come from the hub as safetensors.

python nanogpt/data/shakespeare/prepare.py
python -m nanogpt.train finetune_shakespeare --init_from=gpt2-medium
"""

out_dir = "out/nanogpt-finetune-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

batch_size = 1
gradient_accumulation_steps = 32  # 32 x 1024 tokens a step: the 0.3 M tokens of the text last 9 steps
max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_tokens = 0
always_save_checkpoint = False
