"""`engaging experiment` on a real SLURM: arrays under the user's own limits, afterok between stages, what is missing.

The trainer is the stand-in of tests/tools/experiments: its runs take a second, and its losses are known.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "tools" / "experiments"), str(TESTS / "tools")]

import browser_kit
import kit
import run_kit
from test_real_trainer import TINY

VARIANTS = {"base": {}, "palm": {"variant": "palm_parallel"}, "depth": {"variant": "depth_warm"}}
SMALL = ("--cpus", 1, "--mem", "1G", "--time", "5m")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A checkout with the stand-in trainer; SLURM's daemons run as root and may read it."""
    root = kit.make_clone(tmp_path_factory.mktemp("experiments") / "my check'out")
    (root / "logs").mkdir()
    return root


@pytest.fixture
def engaging(cluster, clone):
    """Runs `engaging experiment ARGS` in the clone against the cluster."""

    def run(*args: object, check: bool = True, **more):
        env = {"ENV_PATH": sys.prefix, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        return cluster.run(
            sys.executable,
            "-m",
            "tools",
            "experiment",
            *args,
            check=check,
            env=env,
            cwd=clone,
            timeout=600,
            **more,
        )

    return run


def write(folder: Path, prefix: str, stage: str, **more: object) -> Path:
    """Three variants of one stage; `more` are flags of the stand-in trainer."""
    for name, flags in VARIANTS.items():
        kit.configuration(
            folder, experiment_name=f"{prefix}_{name}", stage=stage, n_gpus=1, n_runs=2,
            modification_type="architecture" if flags else "none", hyperparameters={**flags, **more},
        )  # fmt: skip
    return folder


def standings(engaging, *study: str) -> dict[str, list[str]]:
    """State by experiment, without the time in its name."""
    found: dict[str, list[str]] = {}
    for row in json.loads(engaging("status", *study, "--json").stdout):
        found.setdefault(row["experiment"].rsplit("_", 2)[0], []).append(row["state"])
    return found


def wait(engaging, study: str, states: set[str], timeout: float = 600) -> dict[str, list[str]]:
    """Until every run of the study is in one of the states."""
    end = time.monotonic() + timeout
    while True:
        found = standings(engaging, study)
        if {state for row in found.values() for state in row} <= states:
            return found
        assert time.monotonic() < end, engaging("status", study).stdout
        time.sleep(0.5)


def test_stages_follow_each_other_by_afterok_and_only_the_promoted_train(cluster, engaging, clone, tmp_path):
    write(tmp_path / "a", "sa", "A_screening")
    write(tmp_path / "b", "sb", "B_validation")
    said = engaging("run", "--config", tmp_path, "--study", "chain", "--gpu-type", "l40s", *SMALL).stdout
    jobs = [line.split("job ")[1].split(",")[0] for line in said.splitlines() if ": job " in line]
    assert len(jobs) == 2 and f"after {jobs[0]}" in said
    script = next((clone / "out" / ".launch").glob("chain-B*/001/submit.sh")).read_text()
    assert f"--dependency=afterok:{jobs[0]}" in script and "--array=0-5%" in script
    cluster.wait_until(
        lambda: not cluster.squeue("--jobs", ",".join(jobs)).strip()
    )  # a status costs a second
    found = wait(engaging, "chain", {"finished", "skipped"})
    done, skipped = ["finished"] * 2, ["skipped"] * 2
    assert found == {
        "sa_base": done, "sa_palm": done, "sa_depth": done,
        "sb_base": done, "sb_palm": done, "sb_depth": skipped,
    }  # fmt: skip
    for folder in kit.experiments(clone, "s"):
        rows = kit.lines(folder / "results.jsonl")
        assert sorted(row["run_id"] for row in rows) == ([] if "sb_depth" in folder.name else [0, 1])
    assert "not below the baseline" in engaging("status", "chain").stdout
    assert "goes on to stage C" in engaging("promote", "chain").stdout


@pytest.mark.campaign
def test_cancelled_half_way_resume_queues_exactly_the_missing(cluster, engaging, clone, tmp_path):
    gate = tmp_path / "gate"
    gate.mkdir()
    write(tmp_path / "a", "cut", "A_screening", gate=str(gate))  # one run ends; the others are cut
    said = engaging(
        "run", "--config", tmp_path, "--study", "cut", "--gpu-type", "l40s", "--throttle", 2, *SMALL
    ).stdout
    job = said.partition(": job ")[2].partition(",")[0]
    cluster.wait_until(
        lambda: [path for path in kit.experiments(clone, "cut") if kit.lines(path / "results.jsonl")]
    )
    queued = engaging("status", "cut").stdout
    assert (
        "the array's own throttle is reached" in queued or "queued: job" in queued or "running: job" in queued
    )
    nothing = engaging("resume", "cut", "--dry-run").stdout
    assert "nothing was started" in nothing and "to start" not in nothing
    cluster.cancel(job)
    cluster.wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, check=False).stdout.strip())
    engaging("status", "cut")  # a run that ended as its job was cancelled gets its line here
    before = {path.name: kit.lines(path / "results.jsonl") for path in kit.experiments(clone, "cut")}
    missing = 6 - sum(map(len, before.values()))
    said = engaging("resume", "cut").stdout
    assert missing == 5 and said.count("to start:") == missing and "somebody cancelled it" in said
    (gate / "open").touch()
    found = wait(engaging, "cut", {"finished"})
    assert all(states == ["finished"] * 2 for states in found.values())
    for path in kit.experiments(clone, "cut"):
        rows = kit.lines(path / "results.jsonl")
        assert rows[: len(before[path.name])] == before[path.name]
        assert sorted(row["run_id"] for row in rows) == [0, 1]
    assert "nothing is missing" in engaging("resume", "cut").stdout


def test_plan_waves_under_the_users_own_limit_and_a_refusal(engaging, tmp_path):
    write(tmp_path / "a", "waves", "A_screening")
    words = (
        "--partition",
        "mit_normal_gpu",
        "--gpu-type",
        "l40s",
        "--minutes",
        "30m",
        "--price",
        "l40s=1.5",
        *SMALL,
    )
    (row,) = json.loads(engaging("plan", tmp_path, *words, "--json").stdout)
    assert (row["runs"], row["at_once"], row["waves"], row["cost"]) == (6, 2, 3, 4.5)
    assert row["minutes"] == 90 and row["end"] > row["start"]
    refused = engaging("plan", tmp_path, *words, "--n-gpus", 8, check=False)
    assert refused.returncode == 1 and "cannot start" in refused.stdout
    before = engaging("run", "--config", tmp_path, *words[:4], "--n-gpus", 8, "--dry-run", check=False)
    assert before.returncode == 2 and before.stderr.startswith("error: ") and before.stderr.count("\n") == 1


@pytest.mark.campaign
def test_told_to_save_the_task_requeues_and_goes_on(cluster, engaging, clone, tmp_path):
    """What SLURM does two minutes before the time limit: USR1 to the batch shell, which is the runner's task here."""
    path = kit.configuration(
        tmp_path, experiment_name="told", n_gpus=1, n_runs=1, hyperparameters={"pause": 0.5}, base_seed=7
    )
    said = engaging("run", "--config", path, "--gpu-type", "l40s", *SMALL).stdout
    job = said.partition(": job ")[2].partition(",")[0]
    (folder,) = kit.experiments(clone, "told")
    metrics = folder / "runs" / "run_0_seed_7" / "metrics.jsonl"
    cluster.wait_until(lambda: metrics.is_file() and '"train"' in metrics.read_text())
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_until(lambda: '"interrupted"' in metrics.read_text())
    assert standings(engaging, "told")["told"] in (["queued"], ["running"])
    assert "nothing was started" in engaging("resume", "told").stdout
    assert wait(engaging, "told", {"finished"}) == {"told": ["finished"]}
    events = [row["event"] for row in kit.lines(metrics)]
    assert events.count("start") == 1 and events.count("resume") == 1
    assert [row["seed"] for row in kit.lines(folder / "results.jsonl")] == [7]


# ---- a whole study with the small trainer itself ------------------------------------------------------------

STUDY = {"palm": "palm_parallel", "curriculum": "curriculum", "depth": "depth_warm"}


@pytest.fixture
def whole(cluster, clone, tmp_path, monkeypatch):
    """`engaging WORDS...` in a clone with the real trainer, data, and configurations of two stages in tmp_path."""
    monkeypatch.setitem(cluster.env, "DATA_ROOT", str(clone / "data"))
    shutil.rmtree(clone / "modded_nanogpt")
    shutil.copytree(
        kit.ROOT / "modded_nanogpt", clone / "modded_nanogpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    run_kit.make_data(clone / "data", "letters")
    for stage, steps in (("A_screening", 700), ("B_validation", 300)):
        for name, variant in {"baseline": "", **STUDY}.items():
            flags = {"variant": variant} if variant else {"head_lr": 1e-4}  # a baseline that is easy to beat
            kit.configuration(
                tmp_path / stage[0], experiment_name=f"{stage[0].lower()}_{name}", stage=stage, n_runs=2,
                modification_type="architecture" if variant else "none", target_val_loss=4.6,
                hyperparameters={**TINY, **flags},
                stage_config={"num_iterations": steps, "val_loss_every": 100},
            )  # fmt: skip
    env = {"ENV_PATH": sys.prefix, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}

    def run(*words: object) -> str:
        return cluster.run(sys.executable, "-m", "tools", *words, env=env, cwd=clone, timeout=600).stdout

    return run


def results(clone: Path) -> dict[str, list[dict]]:
    return {path.name: kit.lines(path / "results.jsonl") for path in kit.experiments(clone, "a_")}


def killed_and_resumed(cluster, engaging, clone: Path, job: str) -> None:
    """Stage A: told to save, and requeued; killed half-way; resumed: exactly what is missing."""

    def wait_for(run: str) -> None:
        path = f"experiment_logs/{run}/metrics.jsonl"
        cluster.wait_until(lambda: [p for p in clone.glob(path) if '"train"' in p.read_text()])

    wait_for("a_curriculum*/runs/run_0_seed_42")  # the second
    states = [state for row in standings(engaging, "whole").values() for state in row]
    assert "running" in states and states.count("queued") >= 3  # their turn comes
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for("a_baseline*/runs/run_1_seed_43")  # the fifth
    cluster.cancel(job)
    cluster.wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, check=False).stdout.strip())
    engaging("status", "whole")
    before = results(clone)
    missing = 8 - sum(map(len, before.values()))
    said = engaging("resume", "whole").stdout
    assert 0 < missing <= 4 and said.count("to start:") == missing and f", {missing} runs" in said
    found = wait(engaging, "whole", {"finished"})
    assert found == {f"a_{name}": ["finished"] * 2 for name in ("baseline", *STUDY)}
    after = results(clone)
    assert all(after[name][: len(rows)] == rows for name, rows in before.items())
    runs = [kit.lines(path) for path in clone.glob("experiment_logs/a_*/runs/*/metrics.jsonl")]
    events = [row["event"] for rows in runs for row in rows]
    assert events.count("start") == 8 and 1 <= events.count("resume") <= 2
    assert all(rows[-1]["event"] == "end" for rows in runs)
    assert len({row["final_val_loss"] for rows in after.values() for row in rows}) == 8


@pytest.mark.campaign  # minutes; its parts are tested above and in tests/tools
def test_a_whole_study_from_its_first_run_to_the_board(cluster, engaging, whole, clone, tmp_path):
    """Four variants of two seeds with train_gpt_simple.py: queued, killed, resumed, promoted, reported, published."""
    where = ("--one-job", *SMALL)
    said = whole("experiment", "run", "--config", tmp_path / "A", "--study", "whole", *where)
    assert said.count(": job ") == 1 and "8 runs" in said and "on the CPU" in said
    killed_and_resumed(cluster, engaging, clone, said.partition(": job ")[2].partition(",")[0])
    said = whole("experiment", "promote", "whole", "--run", *where)
    assert "goes on to stage B" in said and "4 runs" in said and "hours of a CPU" in said
    found = wait(engaging, "whole", {"finished"})
    (winner,) = {name for name in found if name.startswith("b_")} - {"b_baseline"}
    paths = {path.name.rsplit("_", 2)[0]: path for path in kit.experiments(clone, "")}
    assert winner in whole("analyze", "whole", "--no-plots")
    assert f"{winner} against b_baseline" in whole("compare", paths["b_baseline"], paths[winner])
    page = tmp_path / "report.html"
    whole("report", *(path for name, path in paths.items() if name[:2] in ("a_", "b_")), f"--out={page}")
    assert str(clone) not in page.read_text().partition("<footer>")[0]

    board, run = tmp_path / "board", paths["b_baseline"] / "runs" / "run_0_seed_42"
    whole("leaderboard", "track", board, run, "--name=tiny", "--title=Letters", "--target=4.6")
    said = whole("leaderboard", "submit", board, paths[winner], "--description", "the winner of stage B")
    assert "accepted: " in said and "REFUSED" not in said
    assert "1 record checked" in whole("leaderboard", "verify", board)
    assert "1 record on" in whole("leaderboard", "build", board)
    if not browser_kit.obstacle():
        look_at([page, board / "site" / "index.html", *board.glob("site/records/*.html")])


def look_at(pages: list[Path]) -> None:
    """Every page in a browser, as wide as a phone and as a desk: nothing sticks out, is fetched, or complains."""
    with browser_kit.Browser() as browser:
        for path in pages:
            for width in (390, 1280):
                page = browser.open(path, width=width, dark=width == 390)
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert (wide, len(page.requests), page.complaints) == (width, 1, []), path
                assert (
                    page.evaluate("document.querySelectorAll('svg').length") > 0 or path.name == "index.html"
                )
                page.close()
