"""A study of several stages: promoted, pivoted, found by its name, planned with prices."""

import json

import kit
from kit import LOCAL, run, seeds, two_variants


def test_a_whole_study_in_three_stages(clone):
    words = (
        "--n-runs",
        2,
        "--n-gpus",
        0,
        "--study",
        "whole",
        "--",
        "--num_iterations=12",
        "--val_loss_every=2",
    )
    said = run(clone, "tools/experiments/configs", *words).stdout
    assert "palm_parallel goes on to stage B" in said and "palm_parallel goes on to stage C" in said
    finished = {
        folder.name.rsplit("_", 2)[0] for folder in kit.experiments(clone, "nanogpt") if seeds(folder)
    }
    assert finished == {
        *(f"nanogpt_{name}_screening" for name in ("baseline", "palm", "curriculum", "depth_warm")),
        "nanogpt_baseline_validation", "nanogpt_palm_validation", "nanogpt_baseline", "nanogpt_palm_parallel",
    }  # fmt: skip
    promoted = kit.engaging(clone, "promote", "whole", "--price", "2.5").stdout
    assert (
        "palm_parallel goes on to stage C" in promoted
        and "stage C has begun" in promoted
        and "saved:" in promoted
    )
    assert "not promoted from stage A" in kit.engaging(clone, "status", "whole").stdout
    rows = json.loads(kit.engaging(clone, "plan", "whole", *LOCAL, "--json").stdout)
    assert [(row["stage"], row["runs"], row["left"]) for row in rows] == [
        ("A", 8, 0),
        ("B", 8, 0),
        ("C", 8, 0),
    ]


def test_the_one_pivot_after_a_stage_b_that_does_not_confirm(clone, tmp_path):
    for stage, steps in (("A", 8), ("B", 12), ("C", 12)):
        for name, flags in {
            "base": {},
            "palm": {"variant": "palm_parallel"},
            "fades": {"variant": "fades"},
        }.items():
            kit.configuration(
                tmp_path, experiment_name=f"pivot_{stage.lower()}_{name}", stage=stage, hyperparameters=flags,
                modification_type="architecture" if flags else "none", stage_config={"num_iterations": steps},
            )  # fmt: skip
    said = run(clone, tmp_path, "--n-runs", 2, "--study", "pivot").stdout
    assert "fades goes on to stage B" in said and "palm_parallel goes on to stage C" in said
    states = {}
    for row in json.loads(kit.engaging(clone, "status", "pivot", "--json").stdout):
        states.setdefault(row["experiment"].rsplit("_", 2)[0].removeprefix("pivot_"), set()).add(row["state"])
    done, skipped = {"finished"}, {"skipped"}
    assert states == {
        "a_base": done, "a_palm": done, "a_fades": done, "b_base": done, "b_palm": done, "b_fades": done,
        "c_base": done, "c_palm": done, "c_fades": skipped,
    }  # fmt: skip


def test_stage_by_stage_with_promote_run(clone, tmp_path):
    for stage, folder in (("A", "stage_a"), ("B", "stage_b")):
        two_variants(tmp_path / folder, f"step_{stage.lower()}", stage=stage)
    run(clone, tmp_path / "stage_a", "--n-runs", 2, "--study", "steps")
    decision = json.loads(kit.engaging(clone, "promote", "steps", "--json").stdout)
    assert decision["advance"] == ["palm_parallel", "baseline"] and decision["to"] == "B"
    assert "next: engaging experiment promote steps" in kit.engaging(clone, "status", "steps").stdout
    kit.engaging(clone, "promote", "steps", "--run", "--n-runs", 2)
    assert [seeds(folder) for folder in kit.experiments(clone, "step_b")] == [
        [(0, 42, True), (1, 43, True)]
    ] * 2
    assert "goes on to stage C" in kit.engaging(clone, "promote", "steps").stdout


def test_the_baseline_that_stage_b_lacks_is_added_with_its_sum(clone, tmp_path):
    for stage, folder in (("A", "stage_a"), ("B", "stage_b"), ("C", "stage_c")):
        two_variants(tmp_path / folder, f"lone_{stage.lower()}", stage=stage)
    alone = tmp_path / "stage_b" / "lone_b_palm.json"
    run(clone, alone, "--n-runs", 2, "--study", "lone", "--", "--num_iterations=6")
    asked = kit.engaging(clone, "promote", "lone", check=False)
    assert asked.returncode == 1 and "stage B has no baseline" in asked.stdout
    assert "baseline: 2 runs on a CPU" in asked.stdout and "sum: " in asked.stdout
    assert (
        "not in turn" in asked.stdout and "start it: engaging experiment promote lone --run" in asked.stdout
    )
    cheap = kit.engaging(clone, "promote", "lone", "--typed-baseline", "9.0,0.1").stdout
    assert "typed numbers, not evidence" in cheap and "lone_c" not in cheap and "baseline: " not in cheap
    assert "start it: engaging experiment promote lone --typed-baseline 9.0,0.1 --run" in cheap
    kit.engaging(clone, "promote", "lone", "--run")
    (baseline,) = kit.experiments(clone, "lone_b_base")
    assert seeds(baseline) == [(0, 42, True), (1, 43, True)]  # as many runs, as long, as the variant's
    assert {row["final_step"] for row in kit.lines(baseline / "results.jsonl")} == {6}
    said = kit.engaging(clone, "promote", "lone", "--n-runs", 2, "--price", "2").stdout
    assert "palm_parallel goes on to stage C" in said and "in turn: run 0 of each, then run 1" in said
    kit.engaging(clone, "promote", "lone", "--run", "--n-runs", 2)
    logs = [log for f in kit.experiments(clone, "lone_c") for log in f.glob("runs/run_*/stdout.log")]
    in_turn = sorted(logs, key=lambda log: log.stat().st_mtime_ns)
    assert [log.parent.name for log in in_turn] == ["run_0_seed_42"] * 2 + ["run_1_seed_43"] * 2
    refused = run(clone, alone, "--config", tmp_path / "stage_c", check=False)
    assert refused.returncode == 2 and "lone_b_palm: stage B has no baseline" in refused.stderr


def test_experiments_that_were_run_by_their_names_are_promoted_once(clone, tmp_path):
    for stage, folder in (("A", "stage_a"), ("B", "stage_b")):
        two_variants(tmp_path / folder, f"own_{stage.lower()}", stage=stage)
    for name in ("own_a_base", "own_a_palm"):
        run(clone, tmp_path / "stage_a" / f"{name}.json", "--n-runs", 2)
    words = ("promote", "own_a_base", "own_a_palm", "--run", "--n-runs", 2)
    assert "goes on to stage B" in kit.engaging(clone, *words).stdout
    assert len(kit.experiments(clone, "own_b")) == 2
    again = kit.engaging(clone, *words, check=False)  # the same line looks at what it has started
    assert "goes on to stage C" in again.stdout and len(kit.experiments(clone, "own_b")) == 2


def test_a_study_is_found_by_its_name_though_a_folder_has_the_same(clone, tmp_path):
    (clone / "twin").mkdir()
    kit.configuration(clone / "twin", experiment_name="twin_base", n_runs=2)
    said = kit.engaging(clone, "run", "--config", "twin", "--study", "twin", *LOCAL).stdout
    assert "next: engaging analyze twin" in said
    assert "next: engaging analyze twin" in kit.engaging(clone, "status", "twin").stdout
    (row,) = json.loads(kit.engaging(clone, "plan", "twin", *LOCAL, "--json").stdout)
    assert (row["runs"], row["left"]) == (2, 0)  # of the study: nothing is left; of the configurations: two
    said = kit.tools(clone, "analyze", "twin", "--no-plots")
    assert "twin_base *   2/2" in said and said == kit.tools(clone, "analyze", "twin_base", "--no-plots")
    kit.tools(clone, "report", "twin")
    (folder,) = kit.experiments(clone, "twin_base")
    assert (folder / "report.html").is_file() and not (clone / "twin" / "report.html").exists()


def test_plan_of_configurations_with_prices(clone):
    words = ("tools/experiments/configs", *LOCAL, "--n-gpus", 0, "--minutes", "6m", "--json")
    rows = json.loads(kit.engaging(clone, "plan", *words).stdout)
    assert [(row["stage"], row["runs"], round(row["minutes"])) for row in rows] == [
        ("A", 8, 48),
        ("B", 12, 72),
        ("C", 20, 120),
    ]
    assert rows[0]["end"] <= rows[1]["start"]
    gpus = kit.engaging(clone, "plan", kit.STAGE_A, *LOCAL, "--minutes", "30m", "--price", "h100=9,l40s=1", check=False,
                        ENGAGING_GPU_PRICES="7")  # fmt: skip
    assert gpus.returncode == 1 and "needs 1 GPU, this machine has" in gpus.stdout
    dear = kit.engaging(clone, "plan", kit.STAGE_A, *LOCAL, "--price", "b200=9", check=False)
    assert "no price for these GPUs: --price h100=..." in dear.stdout
    priced = kit.engaging(
        clone, "plan", kit.STAGE_A, *LOCAL, "--minutes", "30m", "--price", "2", "--json", check=False
    )
    assert json.loads(priced.stdout)[0]["cost"] == 8 * 0.5 * 2


def test_a_study_on_the_cpu_stays_there(clone):
    """The shipped configurations of stage B ask for four GPUs each."""
    names = [f"{kit.STAGE_A}/{name}_screening.json" for name in ("baseline", "palm")]
    more = ("--config", names[1], "--n-runs", 2, "--n-gpus", 0, "--study", "here")
    run(clone, names[0], *more, "--", "--num_iterations=12", "--val_loss_every=2")
    said = kit.engaging(clone, "promote", "here").stdout
    assert "baseline: 3 runs on a CPU" in said and "GPU-hours" not in said
    assert "yes trend of the gain: " in said
    assert "3 runs on 2 GPUs" in kit.engaging(clone, "promote", "here", "--n-gpus", 2).stdout


def test_a_studys_name_takes_an_experiment_once(clone, tmp_path):
    first = kit.configuration(tmp_path, experiment_name="once_base")
    run(clone, first, "--n-runs", 1, "--study", "taken")
    for more in ((), ("--dry-run",)):
        done = run(clone, first, "--n-runs", 1, "--study", "taken", *more, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "--study=taken: has once_base already; engaging experiment resume taken" in done.stderr
    assert len(kit.experiments(clone, "once_base")) == 1
    run(clone, kit.configuration(tmp_path, experiment_name="once_idea"), "--n-runs", 1, "--study", "taken")
    run(clone, first, "--n-runs", 1)  # without a study it is an experiment of its own
    assert len(kit.experiments(clone, "once_base")) == 2
