"""`engaging selfcheck speedrun`, for real with the tiny preset in the place of record89."""

import pytest

from nanogpt.common.machine import has_nvidia_driver
from tests.modded.test_train_gpt import FLAGS, data  # noqa: F401 (a fixture)
from tools import cli, selfcheck

HIGHEST = 6.4
OUT = "selfcheck"


@pytest.fixture
def small(data, tmp_path_factory, monkeypatch):  # noqa: F811
    """The run directory of the check, which trains the tiny preset; `low` of the band is the test's."""
    monkeypatch.setenv("DATA_ROOT", str(data))
    monkeypatch.setattr(selfcheck, "TRAINER", ("-m", "modded_nanogpt.train_gpt", *FLAGS))
    monkeypatch.setattr(selfcheck, "LOOK_SECONDS", 0.02)
    return tmp_path_factory.getbasetemp() / OUT


@pytest.mark.parametrize(
    ("low", "status", "verdict"), [(0.0, 0, "as it should be"), (6.3, 1, "NOT as it should be")]
)
def test_a_run_beside_the_band(low, status, verdict, small, monkeypatch, capfd):
    monkeypatch.setattr(selfcheck, "BAND", {3: (low, HIGHEST)})
    if (small / selfcheck.FILE_NAME).exists():  # the same run beside another band
        monkeypatch.setattr(selfcheck, "train", lambda folder: None)
    assert cli.main(["selfcheck", "speedrun", f"--out_dir={small}"]) == status
    said = capfd.readouterr().out
    text = (small / selfcheck.FILE_NAME).read_text()
    assert text in said and text.splitlines()[-1].startswith(verdict)
    assert "step 3: val loss " in text and "torch " in text and "tokens in" in text


@pytest.mark.skipif(has_nvidia_driver(), reason="this machine has a GPU, so nothing is refused")
def test_without_a_gpu_the_trainer_says_so(tmp_path, capfd):
    with pytest.raises(SystemExit) as left:
        cli.main(["selfcheck", "speedrun", f"--out_dir={tmp_path}/out"])
    assert left.value.code == 2
    errors = capfd.readouterr().err.strip()
    assert errors.startswith("error: --device=auto: this machine has no NVIDIA GPU") and "\n" not in errors
