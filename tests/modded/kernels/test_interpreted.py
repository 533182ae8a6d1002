"""All kernels through Triton's interpreter against float64, in one process of its own."""

import pytest


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_the_kernels_interpreted(run_python, everything):
    pytest.importorskip("triton", reason="a torch without Triton has no kernels")
    arguments = ["everything"] if everything else []
    done = run_python("-m", "tests.modded.kernels.interpreter_kit", *arguments, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), (done.stdout, done.stderr[-3000:])
