"""Which kind of work the profile puts a kernel under, by its name."""

import re
from pathlib import Path

import pytest

from nanogpt.common import profiling

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_of_ours_has_a_kind():
    texts = [path.read_text() for path in ROOT.glob("*nanogpt/**/*kernel*/*.py")]
    texts += [path.read_text() for path in ROOT.glob("*nanogpt/**/*kernel*.py")]
    names = {name for text in texts for name in re.findall(r"^ *def (\w+_kernel)\(", text, re.MULTILINE)}
    assert len(names) > 8
    assert {name for name in names if profiling.kind_of(name) == "other"} == set()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("compose_query_kernel", "heads composed"),
        ("query_gradient_kernel", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("triton_poi_fused__to_copy_add_index_mul_transpose_3", "fused elementwise work"),
        ("triton_red_fused_mm_sum_symmetric_12", "fused elementwise work"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::mm", "matrix products"),
        ("something_else", "other"),
    ],
)
def test_names_of_others(name, kind):
    assert profiling.kind_of(name) == kind
