"""`engaging experiment ab`: two versions of the code in turn, A B B A, with a ledger and a verdict."""

import json
import subprocess

import kit
import pytest

from tools.experiments import ab

STEPS = ("--", "--num_iterations=6", "--val_loss_every=2")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A clone in git with a branch whose trainer is better, and a third folder."""
    root = kit.make_clone(tmp_path_factory.mktemp("ab") / "it's mine")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    script = root / "modded_nanogpt" / "train_gpt_simple.py"
    for branch, old, new in (("main", "", ""), ("better", "return 3.3 + 4", "return 3.2 + 4")):
        if branch == "main":
            subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
        else:
            subprocess.run([*git, "checkout", "-q", "-b", branch], check=True)
            script.write_text(script.read_text().replace(old, new))
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", branch], check=True)
    subprocess.run([*git, "checkout", "-q", "main"], check=True)
    return root


def ledger(root, name):
    return kit.lines(root / "experiment_logs" / "ab" / name / "ledger.jsonl")


def test_two_refs_in_turn_and_more_runs_later(repository):
    done = kit.engaging(repository, "ab", "main", "better", "--runs", 2, *STEPS)
    assert "B against A: It helped." in done.stdout and "Welch, 2 and 2 runs" in " ".join(done.stdout.split())
    assert "did not take turns" not in done.stdout
    rows = ledger(repository, "main-better")
    assert [(row["side"], row["seed"], row["exit"]) for row in rows] == [
        ("A", 42, 0),
        ("B", 42, 0),
        ("B", 43, 0),
        ("A", 43, 0),
    ]
    assert all(row["started"] < row["ended"] and "gpus_before" in row for row in rows)
    before = (repository / "experiment_logs/ab/main-better/ledger.jsonl").read_text()
    done = kit.engaging(repository, "ab", "main", "better", "--runs", 3, *STEPS)
    after = (repository / "experiment_logs/ab/main-better/ledger.jsonl").read_text()
    assert after.startswith(before) and [row["side"] for row in ledger(repository, "main-better")[4:]] == [
        "A",
        "B",
    ]
    assert "3 and 3 runs" in " ".join(done.stdout.split())
    assert ab.order(4) == [(s, k) for k, pair in enumerate(("AB", "BA", "AB", "BA")) for s in pair]


def test_a_folder_against_a_run_and_one_that_breaks_is_kept(repository, tmp_path):
    run = tmp_path / "run"
    (run / "source" / "modded_nanogpt").mkdir(parents=True)
    text = (repository / "modded_nanogpt" / "train_gpt_simple.py").read_text()
    (run / "source" / "modded_nanogpt" / "train_gpt_simple.py").write_text(text)
    (run / "config.json").write_text("{}")
    words = ("ab", repository, run, "--runs", 2, "--name", "mixed", *STEPS, "--break_seed=43")
    done = kit.engaging(repository, *words)
    assert "2 runs did not end well" in done.stdout and "an observation, not evidence" in done.stdout
    assert [row["exit"] for row in ledger(repository, "mixed")] == [0, 0, 1, 1]
    kit.engaging(repository, *words)
    assert len(ledger(repository, "mixed")) == 4  # what broke is a result: it is not repeated


MISTAKES = [
    (("main", "nowhere"), "nowhere: is no git ref"),
    (("main", "main"), "name two different ones"),
    (("main", "better", "--script", "train_other.py", "--name", "new"), "has no train_other.py"),
    (("main", "better", "--", "--seed=3"), "ab sets it"),
    (("main", "better", "--name", "../x"), "only letters"),
    (("main", "better", "--output=/tmp/x"), "unknown flag"),
]


@pytest.mark.parametrize(("words", "told"), MISTAKES, ids=[told for _, told in MISTAKES])
def test_mistakes_are_one_line_and_leave_nothing(repository, words, told):
    before = sorted((repository / "experiment_logs").rglob("ab.json"))
    done = kit.engaging(repository, "ab", *words, check=False)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
    assert sorted((repository / "experiment_logs").rglob("ab.json")) == before


def test_a_name_stands_for_one_comparison(repository):
    kit.engaging(repository, "ab", "main", "better", "--name", "taken", "--runs", 1, *STEPS)
    other = kit.engaging(repository, "ab", "better", "main", "--name", "taken", *STEPS, check=False)
    assert other.returncode == 2 and "another comparison" in other.stderr
    plan = json.loads((repository / "experiment_logs/ab/taken/ab.json").read_text())
    assert len(plan["code"]["A"]) == 40
