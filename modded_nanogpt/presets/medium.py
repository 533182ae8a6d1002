"""Track 2: the 350M class on FineWeb to a validation loss of 2.92, as record 18 of that track trains it.

torchrun --standalone --nproc_per_node=8 modded_nanogpt/train_gpt_medium.py

With --recipe=tiny_medium the same model in a size for CPUs.
"""

recipe = "medium"
out_dir = "out/speedrun-medium"

muon_lr = 0.015
adam_lr = 0.004
normuon_beta2 = 0.95
muon_wd = 1.2
cooldown = 0.70
lr_floor = 0.1

# What this track's record has not taken over from track 1. Its float32 weights are bfloat16 ones with a mantissa here.
paired_heads = False
bigram = False
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
fp8_head = False
fp8_up = False
fp8_down = False
