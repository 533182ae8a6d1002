"""`engaging drill` for real: the trainer, run.sh and SLURM, two disturbances, equal losses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.launch.drill import judge
from tools.launch.snapshot import copy_code
from tools.runs import Run, TrainPoint, ValPoint

ROOT = Path(__file__).resolve().parents[2]
SENT = ["USR1", "TERM"]


@pytest.fixture(scope="session")
def drill(cluster, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, Path, Path]]:
    """(process, its output, the checkout) of a drill that runs beside other tests: most of it is waiting."""
    checkout = tmp_path_factory.mktemp("drill") / "a checkout"
    copy_code(ROOT, checkout)
    env = {"PYTHONPATH": "", "ENV_PATH": sys.prefix, "DATA_ROOT": str(checkout.parent / "data")}
    words = ["drill", "--steps", "100", "--wait", "5", "--partition", "mit_quicktest"]
    said = checkout.parent / "said"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools", *words],
            cwd=checkout, env={**cluster.env, **env}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    cluster.background.append(process)
    yield process, said, checkout
    process.terminate()
    process.wait(30)


@pytest.mark.campaign
def test_a_drill_begins(drill):
    assert drill[0].poll() is None


@pytest.mark.campaign
@pytest.mark.last
def test_a_disturbed_run_ends_where_an_undisturbed_one_ends(cluster, drill):
    process, path, checkout = drill
    status, said = process.wait(600), path.read_text()
    assert status == 0 and "drill passed" in said and "FAIL" not in said, said
    assert "100 training losses are equal" in said and "it was started 3 times" in said
    assert not list((checkout / "out").glob("drill-*")) and not cluster.squeue("--me", "--name=drill").strip()


def a_run(**changes) -> Run:
    run = Run(
        Path("x"),
        train=[TrainPoint(s, 4.0 - s / 10, attempt=1 + s // 4) for s in range(10)],
        val=[ValPoint(9, 3.0)],
    )
    run.events = [
        {"event": "start"},
        {"event": "resume"},
        {"event": "resume"},
        {"event": "end", "status": "finished"},
    ]
    for name, value in changes.items():
        setattr(run, name, value)
    return run


@pytest.mark.parametrize(
    ("disturbed", "sent", "failed"),
    [
        (a_run(), SENT, ""),
        (a_run(), SENT[:1], "disturbances"),
        (
            a_run(train=[TrainPoint(s, 4.0 - s / 10 + (s == 7) * 1e-7, attempt=3) for s in range(10)]),
            SENT,
            "differ from step 7",
        ),
        (a_run(train=a_run().train[:-1]), SENT, "differ from step 9"),
        (a_run(val=[ValPoint(9, 3.0000001)]), SENT, "validation losses differ"),
        (a_run(events=a_run().events[:-1]), SENT, "ended"),
        (a_run(events=[*a_run().events, {"event": "end", "status": "finished"}]), SENT, "it ended 2 times"),
    ],
)
def test_the_verdict(disturbed, sent, failed):
    texts = [verdict.text for verdict in judge(a_run(), disturbed, sent) if not verdict.passed]
    assert (texts == []) == (failed == ""), texts
    assert failed in " ".join(texts)
