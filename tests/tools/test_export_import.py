"""Export against the real transformers, and import of checkpoints as nanoGPT's train.py writes them."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from nanogpt import sample
from nanogpt.common import checkpoints
from nanogpt.common.errors import UserError
from nanogpt.model import GPT, Shape
from nanogpt.pretrained import fill
from tools import export, import_checkpoint, import_worker

SIZES = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 8}
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "chars": None}
CHARS = {"tokenizer": "char", "vocab_size": 5, "eot": None, "chars": "\nabcd"}


def model_of(vocab_size: int, bias: bool, seed: int = 1) -> GPT:
    """A model whose every weight counts: also those that are 0 or 1 at the start of a training."""
    model = GPT(Shape(vocab_size=vocab_size, bias=bias, **SIZES)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.2, 0.5, generator=generator))
    return model


def make_run(folder: Path, model: GPT, tokens: dict, steps: dict[int, float]) -> Path:
    """A run directory with a checkpoint at each step; the weights of step n are those of `model` plus n / 1,000."""
    for step, loss in steps.items():
        tensors = {name: value.detach() + step / 1000 for name, value in model.named_parameters()}
        state = {"shape": vars(model.shape), "val_step": step, "val_loss": loss}
        checkpoints.save(folder / "checkpoints", step, {"model": tensors}, state)
    (folder / "config.json").write_text(json.dumps({"config": {}, "tokens": tokens}))
    return folder


@pytest.mark.parametrize(
    ("rows", "bias", "tokens"), [(50304, False, GPT2), (50257, True, GPT2), (5, False, CHARS)]
)
def test_transformers_computes_the_same_logits(tmp_path, monkeypatch, capsys, rows, bias, tokens) -> None:
    transformers = pytest.importorskip("transformers")
    cache = tmp_path / "cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    run = make_run(tmp_path / "run", model_of(rows, bias), tokens, {3: 2.0, 7: 1.5, 9: 1.6})
    assert export.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/run-hf: step 7" in said
    assert ("openai-community/gpt2" if tokens is GPT2 else "a token a character") in said
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "run-hf").eval()
    ours = model_of(rows, bias)
    ours.load_state_dict(checkpoints.load(run / "checkpoints" / "step_00000007").tensors("model"))
    ids = torch.tensor([[1, 4, 0, 3, 2, 2, 4, 1, 0, 0, 3, 1, 2, 4, 4, 0]])
    with torch.no_grad():
        expected, found = ours.logits(ours.hidden(ids)), theirs(ids).logits
    assert found.shape[-1] == tokens["vocab_size"]
    torch.testing.assert_close(found, expected[..., : tokens["vocab_size"]], rtol=1e-5, atol=1e-4)
    again = GPT(Shape(**{**vars(ours.shape), "bias": True, "vocab_size": tokens["vocab_size"]}))
    fill(again, tmp_path / "run-hf" / "model.safetensors")  # as --init_from=gpt2 reads the published file
    assert torch.equal(again.transformer.h[1].mlp.c_fc.weight, ours.transformer.h[1].mlp.c_fc.weight)


def test_with_gpt2s_vocabulary_in_the_cache_the_tokenizer_comes_along(
    tmp_path, mirror, monkeypatch, capsys
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(mirror / "tiktoken_cache"))
    run = make_run(tmp_path / "run", model_of(50304, False), GPT2, {1: 2.0})
    assert export.main([str(run), "--to", str(tmp_path / "out"), "--checkpoint", "last"]) == 0
    assert "with its tokenizer" in capsys.readouterr().out
    import tiktoken

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Hello, world\n\n  été 漢字 don't", " a<|endoftext|>b"):
        wanted = tiktoken.get_encoding("gpt2").encode(text, allowed_special="all")
        assert tokenizer.encode(text) == wanted
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_is_not_exported(tmp_path) -> None:
    run = make_run(tmp_path / "run", model_of(5, False), CHARS, {1: 2.0})

    def refused(*argv: str) -> str:
        with pytest.raises(UserError) as refusal:
            export.main(list(argv))
        return str(refusal.value)

    assert "holds no run" in refused(str(tmp_path))
    assert "expected best, last or one of 1" in refused(str(run), "--checkpoint=2")
    assert "is there already" in refused(str(run), "--to", str(tmp_path))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    assert "no checkpoint yet" in refused(str(tmp_path / "none"))
    (run / "config.json").write_text("{}")
    assert "no run of the baseline trainer" in refused(str(run))
    (run / "config.json").write_text(json.dumps({"tokens": CHARS}))
    checkpoints.save(
        run / "checkpoints", 2, {"model": {"x": torch.ones(1)}}, {"shape": vars(model_of(5, True).shape)}
    )
    assert "is missing" in refused(str(run), "--checkpoint=2") or "belongs to no GPT-2" in refused(str(run))
    assert not (tmp_path / "run-hf").exists()


def checkpoint_of_nanogpt(path: Path, model: GPT, /, **changes: object) -> Path:
    """ckpt.pt as nanoGPT's train.py saves it after compiling: prefixed names, the tied head, the optimizer's state."""
    weights = {f"_orig_mod.{name}": value.detach() for name, value in model.named_parameters()}
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    args = {**vars(model.shape), "dropout": 0.0}
    saved = {
        "model": weights, "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": args, "iter_num": 250, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x", "lr": 1e-3},
    }  # fmt: skip
    torch.save({**saved, **changes}, path)
    return path


def test_an_imported_checkpoint_samples_and_exports(tmp_path, capsys) -> None:
    model = model_of(5, False)
    source = checkpoint_of_nanogpt(tmp_path / "ckpt.pt", model)
    (tmp_path / "input.txt").write_text("abcd\ndcba\n")
    run = tmp_path / "run"
    assert import_checkpoint.main([str(source), f"--to={run}", f"--text={tmp_path}/input.txt"]) == 0
    assert "checkpoint of step 250" in capsys.readouterr().out
    kept = checkpoints.choose(run / "checkpoints", "best", print)
    for name, value in model.named_parameters():
        assert torch.equal(kept.tensors("model")[name], value), name
    assert sample.main([f"--out_dir={run}", "--device=cpu", "--max_new_tokens=9", "--num_samples=1"]) == 0
    assert set(capsys.readouterr().out) <= set("\nabcd-")
    assert export.main([str(run)]) == 0
    with pytest.raises(UserError, match="is there already"):
        import_checkpoint.main([str(source), f"--to={run}"])


class Opens:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_a_checkpoint_that_is_none_is_refused_and_runs_nothing(tmp_path) -> None:
    model, trace = model_of(5, False), tmp_path / "trace"
    path = tmp_path / "ckpt.pt"

    def refused() -> str:
        with pytest.raises(UserError) as refusal:
            import_worker.main([str(path), str(tmp_path / "w.safetensors")])
        return str(refusal.value)

    checkpoint_of_nanogpt(path, model, config=Opens(trace))
    assert "can run any code" in refused()
    path.write_bytes(pickle.dumps(Opens(trace), 2))
    assert str(path) in refused()
    assert not trace.exists()
    path.write_bytes(checkpoint_of_nanogpt(path, model).read_bytes()[:5000])
    assert str(path) in refused()
    torch.save({"state_dict": {}}, path)
    assert 'has no "model" and "model_args"' in refused()
    checkpoint_of_nanogpt(path, model, model={"a": 3})
    assert "a: is no floating-point tensor" in refused()
    checkpoint_of_nanogpt(path, model, model={"x": torch.tensor([1.0, float("nan")])})
    assert "x: holds numbers that are not finite" in refused()
    weights = {"transformer.wte.weight": torch.ones(5, 8), "lm_head.weight": torch.zeros(5, 8)}
    checkpoint_of_nanogpt(path, model, model=weights)
    assert "GPT-2 ties them" in refused()
    assert not (tmp_path / "w.safetensors").exists()


def test_what_does_not_fit_is_not_imported(tmp_path, monkeypatch) -> None:
    model = model_of(5, False)
    source = checkpoint_of_nanogpt(tmp_path / "ckpt.pt", model)
    text = tmp_path / "input.txt"
    text.write_text("abc\n")

    def in_this_process(source: Path, weights: Path) -> dict:
        from contextlib import redirect_stdout
        from io import StringIO

        with redirect_stdout(StringIO()) as out:
            import_worker.main([str(source), str(weights)])
        return json.loads(out.getvalue())

    monkeypatch.setattr(import_checkpoint, "unpickle", in_this_process)

    def refused(*argv: str) -> str:
        with pytest.raises(UserError) as refusal:
            import_checkpoint.main([*argv, f"--to={tmp_path}/run"])
        assert not (tmp_path / "run").exists()
        return str(refusal.value)

    assert "no such file" in refused(str(tmp_path / "x.pt"))
    assert "is a folder" in refused(str(tmp_path))
    assert "--text=input.txt" in refused(str(source))
    assert "4 different characters, the model 5" in refused(str(source), f"--text={text}")
    assert "cannot be read as UTF-8" in refused(str(source), f"--text={tmp_path}/none")
    for change, said in (
        ({"n_layer": 3}, "is missing"),
        ({"n_embd": "8"}, "n_embd"),
        ({"n_head": 3}, "describe no"),
    ):
        checkpoint_of_nanogpt(source, model, model_args={**vars(model.shape), **change})
        assert said in refused(str(source))
