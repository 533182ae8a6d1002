"""Which kind of work the profile puts a kernel under, by its name."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def profile() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "speedrun_profile", ROOT / "benchmarks" / "speedrun_profile.py"
    )
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_kernel_of_ours_has_a_kind(profile):
    texts = [path.read_text() for path in (ROOT / "modded_nanogpt" / "kernels").glob("*.py")]
    names = {name for text in texts for name in re.findall(r"^ *def (\w+_kernel)\(", text, re.MULTILINE)}
    assert len(names) > 8
    assert {name for name in names if profile.kind_of(name) == "other"} == set()


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
        ("something_else", "other"),
    ],
)
def test_names_of_others(profile, name, kind):
    assert profile.kind_of(name) == kind
