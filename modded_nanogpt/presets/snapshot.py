"""Track 1 as this repository's first guides describe it: record 68 of modded-nanogpt, 1,515 + 40 steps to 3.28.

torchrun --standalone --nproc_per_node=8 modded_nanogpt/train_gpt.py snapshot

With --recipe=tiny_snapshot the same model in a size for CPUs.
"""

recipe = "snapshot"
dataset = "fineweb10B"
out_dir = "out/speedrun-snapshot"

normuon_beta2 = 0.95
muon_wd = 1.2
cooldown = 0.55
lr_floor = 0.1

# What came later.
bigram_signs = False
cached_attention = False
input_gates = False
mudd = False
xsa = False
narrow_heads = False
depth_cut = False
second_mlp = False
grouped_mudd = False
attention_cap = False
averaging = False
two_momenta = False
sampled_softmax = False
prefix = False
qk_pairs = False
short_documents = False
fp8_up = False
fp8_down = False
