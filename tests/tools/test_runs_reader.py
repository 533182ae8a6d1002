"""The reader of run directories: duplicates, half-written lines, and whatever else a disk may hold."""

import json
import random

from tools.runs import is_run, printable, read_run, runs_under, tail


def write(path, *lines, end="\n"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("\n".join(lines) + end)
    return path


def train(step, loss, **more):
    return json.dumps({"event": "train", "step": step, "loss": loss, "ms": 10.0, **more})


def test_a_run_as_it_should_be(tmp_path):
    run_dir = write(
        tmp_path / "run",
        '{"event": "start", "step": 0, "max_iters": 100}',
        train(0, 4.0, tokens=10, attempt=1, mfu=0.4),
        '{"event": "val", "step": 0, "val_loss": 4.1, "tokens": 10}',
        train(10, 3.0, tokens=110),
    )
    (run_dir / "config.json").write_text('{"config": {"max_iters": 100}}')
    run = read_run(run_dir)
    assert (run.step, run.loss, run.val_loss, run.max_steps, run.status) == (10, 3.0, 4.1, 100, "running")
    assert run.eta_s() == 90 * 10.0 / 1000
    assert run.train[0].mfu == 0.4 and run.train[1].mfu is None
    assert is_run(run_dir) and runs_under(tmp_path) == [run_dir]


def test_the_last_line_of_a_step_wins_and_steps_are_in_order(tmp_path):
    lines = [
        train(0, 4.0),
        train(10, 3.0),
        train(20, 2.5),
        '{"event": "resume", "step": 10}',
        train(10, 3.5),
        train(20, 2.0),
    ]
    run = read_run(write(tmp_path / "r", *lines))
    assert [(point.step, point.loss) for point in run.train] == [(0, 4.0), (10, 3.5), (20, 2.0)]
    assert run.attempts == 1


def test_a_half_written_last_line_is_no_fault(tmp_path):
    text = [train(0, 4.0), train(10, 3.0)]
    for cut in range(len(text[1])):
        run = read_run(write(tmp_path / "r", text[0], text[1][:cut], end=""))
        assert run.step == 0 and run.skipped_lines == 0


def test_the_end_decides_the_status_and_a_resume_undoes_it(tmp_path):
    end = '{"event": "end", "step": 10, "val_loss": 3.0, "status": "interrupted"}'
    assert read_run(write(tmp_path / "a", train(10, 3.0), end)).status == "interrupted"
    assert read_run(write(tmp_path / "a", train(10, 3.0), end, '{"event": "resume"}')).status == "running"
    finished = read_run(write(tmp_path / "b", train(10, 3.0), end.replace("interrupted", "finished")))
    assert finished.status == "finished" and finished.eta_s() == 0


def test_values_of_the_wrong_kind_are_skipped(tmp_path):
    lines = [
        '{"event": "train", "step": true, "loss": 1}',
        '{"event": "train", "step": 1, "loss": "x"}',
        '{"event": "train", "step": 1, "loss": NaN}',
        '{"event": "train", "step": 1, "loss": 1e999}',
        '{"event": "train", "step": -1, "loss": 1}',
        '{"event": "train", "step": 2}',
        "[1, 2]",
        "null",
        '{"event": 3}',
        '{"event": "train", "step": 1, "loss": ' + "9" * 400 + "}",
        "[" * 100_000,
        train(5, 1.0),
    ]
    run = read_run(write(tmp_path / "r", *lines))
    assert [point.step for point in run.train] == [5]
    assert run.skipped_lines == len(lines) - 1


def test_noise_never_raises(tmp_path):
    rng = random.Random(3)
    whole = "\n".join([train(step, 3.0) for step in range(20)]).encode()
    path = tmp_path / "r"
    path.mkdir()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (path / "metrics.jsonl").write_bytes(data[: rng.randrange(len(data))])
        (path / "config.json").write_bytes(bytes(rng.randrange(256) for _ in range(50)))
        run = read_run(path)
        assert run.config == {} or isinstance(run.config, dict)
        assert run.eta_s() is None or run.eta_s() >= 0


def test_an_absent_folder_reads_as_an_empty_run(tmp_path):
    run = read_run(tmp_path / "no")
    assert run.status == "empty" and run.step is None and run.checkpoints() == [] and run.log_tail() == []


def test_the_logs_tail_holds_no_source(tmp_path):
    opening = "engaging-nanogpt log 1\nsource 1 files sha256 0\nfile 3 0 a.py\nx=1\nend of source\n"
    for said, shown in (("", []), ("step 0: loss 3\n", ["step 0: loss 3"])):
        (tmp_path / "log.txt").write_text(opening + said)
        assert read_run(tmp_path).log_tail() == shown


def test_checkpoints_are_listed_by_step_and_half_ones_marked(tmp_path):
    for name in ("step-200", "step-000100", ".step-300.tmp", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-200" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-200" / "model.safetensors").write_bytes(b"x" * 10)
    found = read_run(tmp_path).checkpoints()
    assert [(c.step, c.complete, c.size) for c in found] == [(100, False, 0), (200, True, 12)]


def test_tail_reads_the_end_and_tames_the_terminal(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * 300_000 + b"\nfirst\n\x1b[31mred\x1b[0m\x07\ta\nlast")
    assert tail(path, 3) == ["first", "[31mred[0m a", "last"]
    assert tail(path, 0) == [] and tail(tmp_path / "no", 3) == []
    assert printable("a\x1b]0;title\x07b") == "a]0;titleb"
