"""Track 1 at record 89, 73.8 s on 8 H100: the model before depth and widths were cut, and its schedule.

torchrun --standalone --nproc_per_node=8 modded_nanogpt/train_gpt.py record89

With --recipe=tiny_record89 the same model in a size for CPUs.
"""

recipe = "record89"
dataset = "fineweb10B"
out_dir = "out/speedrun-record89"

muon_wd = 1.2
cooldown = 0.60
lr_floor = 0.15
dc = True

# What came later.
narrow_heads = False
depth_cut = False
second_mlp = False
grouped_mudd = False
attention_cap = False
averaging = False
two_momenta = False
sampled_softmax = False
fp8_backward = False
