"""The small trainer as a user runs it, on the CPU: one run, several in one process, stopped, resumed, replayed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from modded_nanogpt import simple_launch
from tests.modded.forked import finished, launch
from tests.modded.refusals import refused
from tests.modded.simple_kit import (
    FLAGS,
    ROOT,
    STEPS,
    VOCAB,
    environment,
    losses,
    make_data,
    records,
    run,
    wait_for,
)

IDEA = '''"""An idea of mine: the MLP comes first."""

from modded_nanogpt.variants import baseline
from modded_nanogpt.variants.baseline import norm


class Variant(baseline.Variant):
    @staticmethod
    def layer(x, attention, mlp, gate):
        x = x + mlp(norm(x))
        return x + attention(norm(x))
'''
RUNS = {
    "muon": {"seed": 1},
    "adam": {"seed": 1, "optimizer": "adam"},
    "palm": {"seed": 1, "variant": "palm_parallel"},
    "curriculum": {"seed": 1, "variant": "curriculum"},
    "again": {"seed": 1, "flags": {"val_loss_every": "2"}},
    "depth": {"seed": 2, "variant": "depth_warm"},
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fork(zygote, data):
    """`fork(*flags)`: the children of a launch."""
    return lambda *flags: launch(zygote, "train_gpt_simple", [*FLAGS, *flags], data)


@pytest.fixture
def refuse(data, monkeypatch, capsys):
    """`refuse(*flags)`: the line that the trainer says then."""
    main = partial(simple_launch.launch, description="")
    return lambda *flags, **more: refused(main, [*FLAGS, *flags], monkeypatch, capsys, data, **more)


def write_plan(folder: Path, out: Path, idea: Path, **runs: dict) -> Path:
    """A plan whose last run is the user's own variant."""
    entries = [{"out_dir": str(out / name), **entry} for name, entry in runs.items()]
    entries.append({"out_dir": str(out / "idea"), "seed": 1, "variant": str(idea)})
    path = folder / "plan.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="session")
def planned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder of the runs, what was said) of a plan that nothing happens to; each run has its seed's name."""
    folder = tmp_path_factory.mktemp("planned")
    idea = folder / "my_idea.py"
    idea.write_text(IDEA)
    said = run(data, f"--plan={write_plan(folder, folder, idea, **RUNS)}", "--save_interval=4")
    return folder, said


def test_a_plan_trains_every_run_and_leaves_evidence(planned):
    folder, said = planned
    for name in (*RUNS, "idea"):
        steps = [line["step"] for line in records(folder / name, "train")]
        assert steps == list(range(STEPS))
        validations = [line["val_loss"] for line in records(folder / name, "val")]
        assert validations[0] == pytest.approx(np.log(256), abs=0.01)  # VOCAB rounded up to rows
        assert validations[-1] < validations[0] - 0.1
        (end,) = records(folder / name, "end")
        assert end["status"] == "finished" and end["val_tokens"] == 256 and end["world_size"] == 1
        log = (folder / name / "log.txt").read_text()
        assert "An idea of mine" in log and "modded_nanogpt/variants/palm_parallel.py" in log
    train = records(folder / "muon", "train")
    assert [line["tokens"] for line in train] == [128 * (step + 1) for step in range(STEPS)]
    assert sum(line["ms"] for line in train) == pytest.approx(train[-1]["train_ms"], rel=0.01)
    assert len(records(folder / "again", "val")) == 4 and len(records(folder / "muon", "val")) == 3
    assert said.count("with new weights") == 2 and said.count("is made anew") == 4


def test_the_same_run_again_in_one_process_is_the_same(planned):
    folder, _ = planned
    muon, again = losses(folder / "muon"), losses(folder / "again")
    assert {key: again[key] for key in muon if key in again} == {
        key: muon[key] for key in again if key in muon
    }
    finals = {name: losses(folder / name)["val", STEPS] for name in (*RUNS, "idea")}
    assert len(set(finals.values())) == len(finals) - 1, finals  # all others differ


def test_a_run_alone_equals_its_place_in_a_plan(fork, planned, tmp_path):
    finished(fork(f"--out_dir={tmp_path}/alone", "--seed=1"))
    assert losses(tmp_path / "alone") == losses(planned[0] / "muon")


def test_a_plan_is_killed_and_told_to_stop_and_goes_on_exactly(fork, planned, tmp_path):
    """SIGKILL in the first run, SIGTERM in the second, whose variant has a state: every loss is the undisturbed one."""
    idea = tmp_path / "my_idea.py"
    idea.write_text(IDEA)
    runs = {name: RUNS[name] for name in ("depth", "curriculum")}
    flags = (f"--plan={write_plan(tmp_path, tmp_path, idea, **runs)}", "--save_interval=1")
    first, second = tmp_path / "depth", tmp_path / "curriculum"
    (child,) = fork(*flags)
    wait_for(lambda: (first / "checkpoints" / "step_00000002").exists() or child.status is not None)
    os.kill(child.pid, signal.SIGKILL)
    finished([child], status=-signal.SIGKILL)
    (child,) = fork(*flags)
    wait_for(lambda: (second / "checkpoints" / "step_00000003").exists() or child.status is not None)
    os.kill(child.pid, signal.SIGTERM)
    said, _ = finished([child], status=75)
    assert "checkpoint saved; go on with" in said
    assert not (tmp_path / "idea").exists()
    said, _ = finished(fork(*flags))
    assert "1 of 3 runs are finished already" in said and "resumed from" in said
    for name in (*runs, "idea"):
        assert losses(tmp_path / name) == losses(planned[0] / name)
    assert records(second, "resume") and records(second, "end")[-1]["status"] == "finished"
    said, _ = finished(fork(*flags))
    assert said == "3 of 3 runs are finished already\n"


def test_two_ranks_train_the_same(zygote, data, planned, tmp_path):
    """A plan of two runs, the second of which decides things by its loss; the launcher is forked, its ranks are not."""
    names = ("muon", "curriculum")
    entries = [{"out_dir": str(tmp_path / name), **RUNS[name]} for name in names]
    (tmp_path / "plan.json").write_text(json.dumps(entries))
    words = ["--standalone", "--nproc_per_node=2", "-m", "modded_nanogpt.train_gpt_simple", *FLAGS]
    variables = {"DATA_ROOT": str(data), "PYTHONPATH": str(ROOT)}
    plan = f"--plan={tmp_path}/plan.json"
    finished([zygote.start([*words, plan], module="torch.distributed.run", cwd=ROOT, env=variables)])
    for name in names:
        alone, together = losses(planned[0] / name), losses(tmp_path / name)
        assert together.keys() == alone.keys()
        assert (
            max(abs(together[key] - alone[key]) for key in alone) < 1e-4
        )  # sums are rounded in another order


def test_a_run_is_replayed_from_its_log_alone(data, planned, tmp_path):
    """The user's variant is in the log, so the log is enough."""
    log = tmp_path / "log.txt"
    shutil.copy(planned[0] / "idea" / "log.txt", log)
    done = subprocess.run(
        [sys.executable, "-m", "tools", "repro", str(log), "--yes", f"--out_dir={tmp_path / 'again'}"],
        env=environment(data), cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == losses(planned[0] / "idea")


def test_a_plan_that_its_first_runs_source_cannot_serve_is_refused(fork, refuse, tmp_path):
    """The first run was begun alone, without the idea of the second."""
    idea, first = tmp_path / "my_idea.py", tmp_path / "first"
    idea.write_text(IDEA)
    first.mkdir()
    (first / "stop").touch()
    finished(fork(f"--out_dir={first}", "--seed=1"), status=75)
    entries = [
        {"out_dir": str(first), "seed": 1},
        {"out_dir": str(tmp_path / "second"), "variant": str(idea)},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(entries))
    assert "was begun without it" in refuse(f"--plan={tmp_path}/plan.json", notes=True)
    assert not (tmp_path / "second").exists() and len(records(first, "end")) == 1


def test_stop_file_and_a_resume_without_the_variants_file(data, fork, refuse, planned, tmp_path):
    idea, out = tmp_path / "my_idea.py", tmp_path / "out"
    idea.write_text(IDEA)
    out.mkdir()
    (out / "stop").touch()
    flags = (f"--out_dir={out}", f"--variant={idea}", "--seed=1")
    said, _ = finished(fork(*flags), status=75)
    assert f"rm {out}/stop" in said and records(out, "end")[-1]["status"] == "stopped"
    (out / "stop").unlink()
    idea.unlink()
    run(data, *flags, "--auto_resume=true")
    assert losses(out) == losses(planned[0] / "idea")
    (last,) = (out / "checkpoints").iterdir()  # a finished run keeps its weights, and nothing else
    assert sorted(path.stem for path in last.iterdir()) == ["manifest", "manifest", "model", "state"]
    more = (*flags, "--auto_resume=true", "--accept_changed=config")
    _, errors = finished(fork(*more, "--num_iterations=9"), status=2)
    assert "a finished run keeps no optimizer" in errors
    said, _ = finished(fork(*more, "--num_iterations=6"))
    assert "finished, val loss" in said and len(records(out, "end")) == 2


def test_a_loss_that_is_no_number_stops_the_run(fork, tmp_path):
    rates = ("--embed_lr=1e3", "--muon_lr=1e3", "--head_lr=1e3", "--muon_wd=1e3")
    _, errors = finished(fork(f"--out_dir={tmp_path}/nan", *rates), status=70)
    assert errors.count("error: ") == 1 and "lower --muon_lr" in errors and "Traceback" not in errors


@pytest.mark.gpu
def test_on_a_gpu_one_compilation_serves_several_runs(data, planned, tmp_path):
    """Losses near those of the CPU, in bfloat16; another seed or optimizer compiles nothing, another variant does."""
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("no NVIDIA driver on this machine")
    names = ("muon", "adam", "curriculum", "depth", "again")
    entries = [{"out_dir": str(tmp_path / name), **RUNS[name]} for name in names]
    (tmp_path / "plan.json").write_text(json.dumps(entries))
    said = run(data, f"--plan={tmp_path}/plan.json", "--device=cuda", timeout=900)
    assert said.count("compiled and warmed up") == 3 and said.count("nothing is compiled") == 2
    for name in names:
        there, here = losses(planned[0] / name), losses(tmp_path / name)
        assert here.keys() == there.keys()
        assert max(abs(here[key] - there[key]) for key in there) < 0.05


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--variant=palm_paralel"], "did you mean 'palm_parallel'"),
        (["--variant=nowhere/x.py"], "there is no such variant"),
        (["--variant=../../etc"], "expected a name"),
        (["--optimizer=sgd"], "--optimizer=sgd"),
        (["--batch_size=6", "--device_batch_size=4"], "--device_batch_size=3"),
        (["--warmdown_iters=7"], "--warmdown_iters=4 is 7 of 10"),
        (["--num_iterations=1000", "--repeat_data=false"], "tiny_train_000001.bin to tiny_train_000002.bin"),
        (["--val_tokens=1_000_000"], "--val_tokens=384"),
        (["--model_dim=30"], "--model_dim=24"),
        (["--muon_lr=nan"], "--muon_lr=nan"),
        (["--muonlr=1"], "did you mean '--muon_lr'"),
        (["--device=tpu"], "expected auto, cpu, cuda"),
        (["--dataset=nothing"], "nothing"),
        (["--overwrite=true", "--auto_resume=true"], "keep one"),
        (["--init_from=resume"], "holds no run"),
        (["--plan=none.json"], "none.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(refuse, tmp_path, flags, said):
    out = [] if "--plan=none.json" in flags else [f"--out_dir={tmp_path}/bad"]
    assert said in refuse(*out, *flags)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not JSON"),
        ("{}", "expected a list"),
        ("[]", "expected a list of 1"),
        ("[3]", "[0]: expected an object"),
        ('[{"seed": 1}]', "[0].out_dir: missing"),
        ('[{"out_dir": "OUT/a"}, {"out_dir": "OUT/a"}]', "the same as that of [0]"),
        ('[{"out_dir": "OUT/a", "sed": 1}]', "did you mean 'seed'"),
        ('[{"out_dir": "OUT/a", "seed": 1, "seed": 2}]', "twice"),
        ('[{"out_dir": "OUT/a", "seed": NaN}]', "[0].seed=nan"),
        ('[{"out_dir": "OUT/a", "flags": {"num_iterations": 1e400}}]', "[0].flags.num_iterations=inf"),
        ('[{"out_dir": "OUT/a", "flags": {"num_iteration": 2}}]', "did you mean 'num_iterations'"),
        ('[{"out_dir": "OUT/a", "flags": {"plan": "x"}}]', "cannot be said here"),
        ('[{"out_dir": "OUT/a"}, {"out_dir": "OUT/b", "flags": {"num_threads": 2}}]', "OUT/b: --num_threads=2"),
        ('[{"out_dir": "OUT/a"}, {"out_dir": "OUT/b", "variant": "nope"}]', "OUT/b: --variant=nope"),
        ('[{"out_dir": "OUT/a"}, {"out_dir": "OUT/b", "flags": {"warmdown_iters": 9}}]', "OUT/b: --warmdown_iters=9"),
    ],
)  # fmt: skip
def test_a_bad_plan_is_one_line_and_nothing_is_trained(refuse, tmp_path, text, said):
    path = tmp_path / "plan.json"
    path.write_text(text.replace("OUT", str(tmp_path)))
    assert said.replace("OUT", str(tmp_path)) in refuse(f"--plan={path}")
    assert not (tmp_path / "a").exists()


def test_a_bad_variant_is_one_line(fork, refuse, tmp_path):
    idea, flags = tmp_path / "wrong.py", (f"--out_dir={tmp_path}/bad", f"--variant={tmp_path}/wrong.py")
    for text, said in (("def f(:", "not Python"), ("x = 1", "has no class Variant")):
        idea.write_text(text)
        assert said in refuse(*flags)
    idea.write_text("class Variant:\n    pass")  # which only the run's own process can see
    _, errors = finished(fork(*flags), status=2)
    assert errors.count("\n") == 1 and "must be derived from" in errors, errors
    idea = tmp_path / "baseline.py"
    idea.write_text(IDEA)
    assert "give your copy a new one" in refuse(f"--out_dir={tmp_path}/x", f"--variant={idea}")


def test_flags_win_over_variables_and_variables_over_presets(data, monkeypatch, capsys):
    def check(*argv: str, **variables: str) -> str:
        with monkeypatch.context() as patched:
            for name, value in {"DATA_ROOT": str(data), **variables}.items():
                patched.setenv(name, value)
            assert simple_launch.launch([*argv, "--dataset=tiny", "--check=true", "--val_tokens=64"], "") == 0
        said = capsys.readouterr()
        assert "512" not in said.err
        return said.out

    stage = {
        "STAGE_NUM_ITERATIONS": "4",
        "STAGE_WARMDOWN_ITERS": "1",
        "STAGE_BATCH_SIZE": "8",
        "STAGE_DEVICE_BATCH_SIZE": "4",
    }
    said = check("tiny", "--batch_size=16", **stage)
    assert "4 steps, the last 1 of them" in said and "4 micro-steps x 4 sequences" in said, said
    argv = ["tiny", "--dataset=tiny", "--check=true"]
    main = partial(simple_launch.launch, description="")
    line = refused(main, argv, monkeypatch, capsys, data, STAGE_BATCH_SIZE="many")
    assert line.startswith("error: STAGE_BATCH_SIZE=many: expected a whole number")
    for name, expected in (
        ("historical", "5,100 steps, the last 1,450"),
        ("simple", "3,250 steps, the last 2,275"),
    ):
        assert expected in check(name, "--repeat_data=true", "--sequence_length=8")


def test_help_does_not_import_torch(data):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "modded_nanogpt.train_gpt_simple", "--help"],
        env=environment(data), cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "--variant" in done.stdout and "| torch" not in done.stderr
    assert "historical, simple, tiny" in done.stdout and VOCAB and FLAGS


def test_a_variant_brings_an_optimizer_of_its_own_and_resumes_exactly(fork, tmp_path):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    finished(fork(f"--out_dir={whole}", "--variant=adamw"))
    found = losses(whole)
    assert found["val", STEPS] < found["val", 0] - 0.1
    halved.mkdir()
    (halved / "stop").touch()
    finished(fork(f"--out_dir={halved}", "--variant=adamw"), status=75)
    (halved / "stop").unlink()
    finished(fork(f"--out_dir={halved}", "--variant=adamw", "--auto_resume=true"))
    assert losses(halved) == found and records(halved, "resume")


def test_a_run_stops_early_on_its_whole_schedule(fork, planned, tmp_path):
    out = tmp_path / "early"
    finished(fork(f"--out_dir={out}", "--seed=1", "--stop_step=4", "--val_steps=1,2", "--val_loss_every=0"))
    whole, found = losses(planned[0] / "muon"), losses(out)
    training = {key: loss for key, loss in found.items() if key[0] == "train"}
    assert len(training) == 4 and training.items() <= whole.items()
    assert [line["step"] for line in records(out, "val")] == [1, 2, 4]
    assert records(out, "end")[0]["step"] == 4 and records(out, "end")[0]["status"] == "finished"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--stop_step=7",), "--stop_step=7: more than --num_iterations=6"),
        (("--val_steps=1,x",), "--val_steps=1,x: 'x' is no step"),
        (("--val_steps=5", "--stop_step=4"), "--val_steps=5: the run ends after step 4, before 5"),
    ],
)
def test_steps_that_cannot_be(refuse, flags, why):
    assert why in refuse(*flags)
