"""--runs: several seeds in one process are the same runs as each alone, and are judged together."""

import json
import shutil

import pytest
from scipy import stats

from modded_nanogpt import many_runs, train_gpt
from nanogpt.common.errors import UserError
from tests.modded.forked import finished, launch
from tests.modded.test_train_gpt import FLAGS, data, losses, records, run  # noqa: F401 (data is a fixture)

FEW = ("--runs=2", "--steps=4", "--extension_steps=0", "--target_loss=9", "--lanes=2", "--eval_interval=9")


def test_a_later_run_of_a_process_is_what_it_is_alone(data, zygote, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "several"
    said = run(data, out, *FEW)
    first, second = out / "seed-1337", out / "seed-1338"
    assert "2 runs: val loss " in said and "p = " in said and "a mean below it" in said
    for folder in (first, second):
        (end,) = records(folder, "end")
        assert end["status"] == "finished" and end["attempt"] == 1
        stored = json.loads((folder / "config.json").read_text())
        assert (stored["config"]["seed"], stored["config"]["runs"]) == (int(folder.name[5:]), 1)
        assert "unlike the record:" in (folder / "log.txt").read_text().rpartition("\nend of source\n")[2]
    assert losses(first) != losses(second)
    sources = [
        json.loads((folder / "config.json").read_text())["source_sha256"] for folder in (first, second)
    ]
    assert sources[0] == sources[1]

    together = losses(second), records(second, "end")[0]["val_loss"]
    shutil.rmtree(second)
    said, _ = finished(
        launch(zygote, "train_gpt", [*FLAGS, *FEW, f"--out_dir={out}"], data)
    )  # what is missing, alone
    assert (losses(second), records(second, "end")[0]["val_loss"]) == together
    assert "2 runs: val loss " in said and len(records(first, "end")) == 1

    monkeypatch.setenv("DATA_ROOT", str(data))
    assert train_gpt.main([*FLAGS, *FEW, f"--out_dir={out}"]) == 0
    said = capsys.readouterr().out
    assert "all 2 runs are finished" in said and "2 runs: val loss " in said


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--smoke",), "--smoke with --runs=2: try one run"),
        (("--init_from=resume",), "--init_from=resume with --runs=2: the same command again"),
        (("--runs=0",), "--runs=0"),
    ],
)
def test_contradictions(flags, why, tmp_path):
    with pytest.raises(UserError, match=why):
        train_gpt.main(["tiny", "--runs=2", f"--out_dir={tmp_path}/x", *flags])


def test_a_run_is_no_folder_of_runs(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is one run, and --runs=3 makes a folder of runs"):
        many_runs.runs_of({"runs": 3, "out_dir": str(tmp_path)})


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 39])
@pytest.mark.parametrize("t", [-40.0, -4.2, -1.0, 0.0, 0.3, 12.0])
def test_students_distribution(t, degrees):
    assert many_runs.student_below(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-9)


def test_the_verdict_of_track_one():
    losses = [3.2781, 3.2775, 3.2793, 3.2779, 3.2788]
    expected = stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    assert many_runs.chance(losses, 3.28) == pytest.approx(expected, rel=1e-6)
    assert many_runs.chance([3.0, 3.0], 3.28) == 0.0 and many_runs.chance([4.0, 4.0], 3.28) == 1.0
