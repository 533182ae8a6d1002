"""The seeds' document as it is printed, typed after `cd tools/experiments`: its doors, loops and workflow."""

import json
import subprocess
import sys

import kit
import pytest

PREPARED = " --executor local --n_gpus 0"  # what this machine needs besides: no cluster, no GPU

# Word for word; the comments left out.
WORKFLOW = """
for variant in baseline palm curriculum depth_warm; do
    python run_nanogpt_experiment.py \\
        --config configs/stage_a_screening/${variant}_screening.json \\
        --n_runs 2
done
echo "Stage A Results Summary:"
for dir in experiment_logs/nanogpt_*_screening_*/; do
    variant=$(basename "$dir" | cut -d_ -f2)
    mean=$(jq -r '.statistics.val_loss.mean' "$dir/summary.json")
    std=$(jq -r '.statistics.val_loss.std' "$dir/summary.json")
    echo "$variant: $mean ± $std"
done
python run_nanogpt_experiment.py \\
    --config configs/stage_b_validation/palm_validation.json \\
    --n_runs 3 \\
    --n_gpus 4
cat experiment_logs/nanogpt_palm_validation_*/summary.json | jq '.statistics.val_loss'
python run_nanogpt_experiment.py \\
    --config configs/stage_c_full/palm_parallel.json \\
    --n_runs 5 \\
    --n_gpus 8
cat experiment_logs/nanogpt_palm_parallel_*/summary.json | jq '.statistics'
"""


def typed(clone, text, **options):
    """What a shell in tools/experiments says to these lines, `python` being the environment's."""
    env = kit.environment(PATH=f"{sys.prefix}/bin:{kit.os.environ['PATH']}")
    return subprocess.run(
        ["bash", "-ec", text], cwd=clone / "tools" / "experiments", env=env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=600, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(clone):
    if not kit.shutil.which("jq"):
        pytest.skip("jq is not installed here")
    for runs in (2, 3, 5):
        assert f"--n_runs {runs}" in WORKFLOW
    text = (
        WORKFLOW.replace(" --n_gpus 4", "")
        .replace(" --n_gpus 8", "")
        .replace("--n_runs 3 \\\n   ", "--n_runs 3")
    )
    text = text.replace("--n_runs 5 \\\n   ", "--n_runs 5")
    for runs in (2, 3, 5):
        text = text.replace(f"--n_runs {runs}", f"--n_runs {runs}{PREPARED}")
    done = typed(clone, text)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_workflow_pasted_whole(clone, whole):
    head, _, table = whole.partition("Stage A Results Summary:\n")
    assert head.count("Summary Statistics:\n  Runs: 2/2\n  Mean Validation Loss: 3.") == 4
    rows = table.splitlines()[:4]
    assert [row.split(":")[0] for row in rows] == ["baseline", "curriculum", "depth", "palm"]
    assert all(
        float(row.split()[1]) > 3 and row.split()[2] == "±" and float(row.split()[3]) > 0 for row in rows
    )
    assert '"ci_95": [' in table and '"successful_runs": 5' in table
    names = {folder.name.rsplit("_", 2)[0] for folder in kit.experiments(clone)}
    assert names == {
        *(f"nanogpt_{name}_screening" for name in ("baseline", "palm", "curriculum", "depth_warm")),
        "nanogpt_palm_validation", "nanogpt_palm_parallel",
    }  # fmt: skip
    assert (clone / "tools" / "experiments" / "experiment_logs").is_symlink()


def test_the_doors_to_what_comes_after(clone, whole):
    said = typed(clone, "python scripts/analyze_results.py --no-plots experiment_logs/nanogpt_*_screening_*/")
    assert said.returncode == 0 and "nanogpt_palm_screening" in said.stdout, said.stderr
    said = typed(
        clone, "python scripts/compare_experiments.py nanogpt_baseline_screening nanogpt_palm_screening"
    )
    assert said.returncode == 0 and "against" in said.stdout, said.stderr
    said = typed(clone, "python scripts/compare_experiments.py nanogpt_baseline_screening nowhere")
    assert said.returncode == 2 and said.stderr.count("\n") == 1


def test_dry_runs_and_the_logger(clone):
    said = typed(
        clone, f"python scripts/run_nanogpt_experiment.py --config configs/baseline.json --dry_run{PREPARED}"
    )
    assert said.returncode == 0 and said.stdout.count("modded_nanogpt/train_gpt_simple.py historical") == 5, (
        said.stderr
    )
    before = set(clone.rglob("*"))
    said = typed(
        clone,
        f"python run_nanogpt_experiment.py --config configs/baseline.json --dry_run --n_runs 1{PREPARED}",
    )
    assert said.stdout.count("--seed=42") == 1
    said = typed(clone, "python experiment_logger.py")
    assert said.returncode == 0 and "Mean Validation Loss: 3.279 ± 0.005" in said.stdout, said.stderr
    assert {
        path
        for path in set(clone.rglob("*")) - before
        if path.suffix != ".pyc" and path.name != "__pycache__"
    } == set()


def test_baseline_json_is_the_documents_and_no_part_of_the_stages(clone):
    config = json.loads((clone / "tools/experiments/configs/baseline.json").read_text())
    assert (config["experiment_name"], config["script"], config["n_gpus"]) == (
        "nanogpt_baseline",
        "train_gpt.py",
        8,
    )
    said = kit.engaging(
        clone, "run", "--config", "tools/experiments/configs", "--dry-run", *PREPARED.split()
    ).stdout
    assert said.count("# nanogpt_baseline:") == 1 and "# nanogpt_baseline: baseline, stage C_full" in said
