"""What `engaging compare` shows first: the keys, the lines of source and the machines that differ."""

from collections.abc import Callable
from pathlib import Path

import study_kit

from tools.analysis import changes, compare


def write(folder: Path, source: str, **config: object) -> Path:
    run = study_kit.write_run(folder, 3.4, **config)
    (run / "source" / "nanogpt").mkdir(parents=True)
    (run / "source" / "nanogpt" / "model.py").write_text(source)
    return run


def test_keys_and_lines_and_a_warning(tmp_path: Path, engaging: Callable) -> None:
    one = write(tmp_path / "one", "a = 1\nb = 2\n", n_layer=4, learning_rate=1e-3)
    two = write(tmp_path / "two", "a = 1\nb = 3\nc = 4\n", n_layer=6, learning_rate=1e-3, seed=2)
    done = engaging("compare", one, two)
    assert done.out.startswith(
        "Changed:\n  n_layer: 4 -> 6\n  source nanogpt/model.py: 1 lines removed, 2 added\n    -b = 2\n    +b = 3\n"
    )
    assert "2 things changed at once (n_layer, source)" in " ".join(done.out.split())
    done = engaging(
        "compare", one, write(tmp_path / "three", "a = 1\nb = 2\n", n_layer=4, learning_rate=2e-3)
    )
    assert done.out.startswith("Changed:\n  learning_rate: 0.001 -> 0.002\n\n") and "at once" not in done.out


def test_other_machines_and_hostile_text(tmp_path: Path) -> None:
    gpu = {"gpus": ["NVIDIA A100"] * 8}
    one = study_kit.write_experiment(tmp_path, "one", [3.3, 3.31], config={"hyperparameters": {"lr": 1}})
    two = study_kit.write_experiment(
        tmp_path, "two", [3.3, 3.31], gpu=gpu, config={"hyperparameters": {"lr": "\u202e2\x1b[2J\n"}}
    )
    found = changes.find(compare.one_group(one), compare.one_group(two))
    assert [key for key, _, _ in found.config] == ["hyperparameters.lr"]
    assert found.surroundings == [("GPU", "NVIDIA H100 80GB HBM3", "NVIDIA A100")]
    assert all(line.isprintable() for line in changes.text(found))


def test_another_optimizer_brings_its_own_knobs_along(tmp_path: Path, engaging: Callable) -> None:
    rates = {"adam_lr": 0.0015, "muon_lr": 0.025, "n_layer": 4}
    one = write(tmp_path / "one", "a = 1\n", **{**rates, "optimizer": "adam", "adam_lr": 0.003})
    two = write(tmp_path / "two", "a = 1\n", **{**rates, "optimizer": "muon", "muon_lr": 0.05})
    done = engaging("compare", one, two).out
    assert done.startswith(
        "Changed:\n  optimizer: adam -> muon\n  with it, adam_lr: 0.003 -> 0.0015\n"
        "  with it, muon_lr: 0.025 -> 0.05\n\n"
    )
    assert "at once" not in done
    deeper = write(
        tmp_path / "deeper", "a = 1\n", **{**rates, "optimizer": "muon", "muon_lr": 0.05, "n_layer": 6}
    )
    said = " ".join(engaging("compare", one, deeper).out.split())
    assert "2 things changed at once (n_layer, optimizer)" in said
    said = " ".join(engaging("compare", two, write(tmp_path / "x", "a = 2\n", optimizer="muon")).out.split())
    assert "at once (adam_lr, muon_lr, n_layer, source)" in said
