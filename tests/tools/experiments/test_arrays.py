"""Arrays of runs: as large as the cluster takes, and what is in the queue when a later one is refused."""

from types import SimpleNamespace

import pytest

from nanogpt.common.errors import UserError
from tools.experiments import queue
from tools.site import slurm

ENOUGH = SimpleNamespace(partition="p", request=SimpleNamespace(gpu_type="h100"))


@pytest.mark.parametrize(("said", "size"), [("MaxArraySize            = 501\n", 500), ("MaxArraySize = 4000001", 1000),
                                            ("", 1000), ("MaxArraySize            = none\n", 1000)])  # fmt: skip
def test_the_largest_array_is_the_clusters(monkeypatch, said, size):
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: slurm.Answer(0, f"Configuration data\n{said}", ""))
    assert queue.largest_array() == size


def test_1200_runs_are_split_and_a_refusal_says_what_is_queued(monkeypatch, tmp_path, capsys):
    asked = []

    def submit(launch, *_):
        asked.append(launch.tasks)
        if len(asked) == 3:
            raise UserError("sbatch: refused")
        return str(100 + len(asked))

    def launch(root, name, tasks, *_):
        return SimpleNamespace(tasks=len(tasks), name=name, folder=lambda _: tmp_path, save=lambda _: None)

    quiet = {
        "need_environment": lambda: tmp_path,
        "need_log_folder": lambda _: None,
        "for_run": lambda *_: {},
    }
    for name, value in quiet.items():
        monkeypatch.setattr(queue.environment, name, value)
    for name, value in {
        "ask_cluster": lambda: None, "option_for": lambda *_: ENOUGH, "fitting_throttle": lambda *_: 4,
        "submit": submit,
        "arguments": lambda *_: SimpleNamespace(max_restarts=1), "_launch": launch, "script_for": lambda *_, **__: "",
        "_note": lambda *_: None, "largest_array": lambda: 500,
    }.items():  # fmt: skip
        monkeypatch.setattr(queue, name, value)
    monkeypatch.setattr(queue.snapshot, "remove", lambda _: None)
    experiment = SimpleNamespace(folder=tmp_path, gpus=1, log=lambda _: None)
    with pytest.raises(UserError, match="refused"):
        queue.submit_runs(tmp_path, "many", [(experiment, run) for run in range(1200)])
    assert asked == [500, 500, 200]
    assert "in the queue already: job 101, 102; to take them back: scancel 101 102" in capsys.readouterr().out
