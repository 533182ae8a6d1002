"""The published weights: from a real server on this machine that speaks the hub's protocol, tiny and random."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from nanogpt import pretrained
from nanogpt.common.errors import CommandError, UserError
from nanogpt.model import GPT, Shape

SHAPE = Shape(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=8, bias=True)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def published(shape: Shape = SHAPE, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names, in the published layout, with the masks those files carry."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    C = shape.n_embd
    tensors = {"wte.weight": draw(shape.vocab_size, C), "wpe.weight": draw(shape.block_size, C)}
    for layer in range(shape.n_layer):
        h = f"h.{layer}."
        for norm in ("ln_1", "ln_2"):
            tensors |= {f"{h}{norm}.weight": draw(C), f"{h}{norm}.bias": draw(C)}
        for name, size in {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C),
                           "mlp.c_proj": (4 * C, C)}.items():  # fmt: skip
            tensors |= {f"{h}{name}.weight": draw(*size), f"{h}{name}.bias": draw(size[1])}
        tensors[f"{h}attn.bias"] = torch.ones(1, 1, shape.block_size, shape.block_size).tril()
    return tensors | {"ln_f.weight": draw(C), "ln_f.bias": draw(C)}


def plain_logits(tensors: dict[str, torch.Tensor], tokens: torch.Tensor, n_head: int) -> torch.Tensor:
    """GPT-2 written down once more, from the published layout: (T,) -> (T, V)."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(-1, keepdim=True)) / spread * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    T = len(tokens)
    x = tensors["wte.weight"][tokens] + tensors["wpe.weight"][:T]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in range(SHAPE.n_layer):
        h = f"h.{layer}"
        parts = conv(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, -1)
        q, k, v = (part.view(T, n_head, -1).transpose(0, 1) for part in parts)
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        x = x + conv((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1), f"{h}.attn.c_proj")
        inner = conv(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        gelu = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        x = x + conv(gelu, f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ tensors["wte.weight"].T


class Hub:
    """Answers for openai-community/gpt2/model.safetensors as the hub does, and counts what it sent."""

    def __init__(self, data: bytes, truth: bytes | None = None) -> None:
        self.data, self.etag, self.bodies = data, hashlib.sha256(truth or data).hexdigest(), 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                known = self.path in (
                    f"/openai-community/gpt2/resolve/{ref}/model.safetensors" for ref in ("main", COMMIT)
                )
                self.send_response(200 if known else 404)
                body = hub.data if known else b""
                if known:
                    self.send_header("ETag", f'"{hub.etag}"')
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("X-Linked-Etag", f'"{hub.etag}"')
                    self.send_header("X-Linked-Size", str(len(body)))
                else:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
                    hub.bodies += known

            do_GET = do_HEAD = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub():
    hubs = []

    def start(*args: bytes) -> Hub:
        hubs.append(Hub(*args))
        return hubs[-1]

    yield start
    for one in hubs:
        one.close()


@pytest.fixture
def load(zygote, tmp_path):
    """`load(endpoint, name)`: `load_published` in a process of its own, as the hub's library reads its settings at
    import."""

    def run(endpoint: str, name: str = "gpt2", **env: str):
        unset = {key: None for key in os.environ if key.startswith("HF_")}
        full = {**unset, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **env}  # fmt: skip
        shape = json.dumps({**vars(SHAPE), "block_size": 12})
        return zygote.run([shape, name], module="tests.faults.published", env=full)

    return run


def test_the_loaded_model_computes_what_the_published_layout_says(tmp_path):
    tensors = published()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    model = GPT(SHAPE)
    pretrained.fill(model, path)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    ours = model.logits(model.hidden(tokens[None]))[0]
    torch.testing.assert_close(ours, plain_logits(tensors, tokens, SHAPE.n_head), rtol=1e-4, atol=1e-4)


def test_positions_are_cropped_and_a_prefix_of_the_names_is_known(tmp_path):
    tensors = published()
    path = tmp_path / "model.safetensors"
    save_file(
        {f"transformer.{name}": value for name, value in tensors.items()}
        | {"lm_head.weight": torch.ones(50, 8)},
        path,
    )
    model = GPT(Shape(**{**vars(SHAPE), "block_size": 5}))
    pretrained.fill(model, path)
    assert torch.equal(model.transformer.wpe.weight, tensors["wpe.weight"][:5])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
        (lambda t: t.update({"h.2.ln_1.weight": torch.ones(8)}), "h.2.ln_1.weight"),
        (lambda t: t.update({"wte.weight": torch.ones(51, 8)}), "(51, 8)"),
        (lambda t: t.update({"h.0.attn.c_attn.weight": torch.ones(24, 8)}), "(8, 24)"),
        (lambda t: t.update({"wpe.weight": torch.ones(9, 8)}), "(9, 8)"),
        (lambda t: t.update({"ln_f.bias": torch.ones(8, dtype=torch.int64)}), "int64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, named):
    tensors = published()
    change(tensors)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError) as failure:
        pretrained.fill(GPT(SHAPE), path)
    assert str(path) in str(failure.value)
    assert named in str(failure.value)


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="safetensors"):
        pretrained.fill(GPT(SHAPE), path)


def test_download_once_then_without_a_network(hub, load):
    tensors = published()
    server = hub(save(tensors))
    first = load(server.url)
    assert first.status == 0, first.stderr
    kept = {name: value for name, value in tensors.items() if not name.endswith(".attn.bias")}
    kept["wpe.weight"] = kept["wpe.weight"][:12]
    assert float(first.stdout) == pytest.approx(
        sum(value.double().sum().item() for value in kept.values()), abs=1e-4
    )
    offline = load("http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline.status == 0, offline.stderr
    assert offline.stdout == first.stdout
    assert server.bodies == 1


def test_a_corrupted_download_is_refused_and_a_repaired_cache_works(hub, load):
    good = save(published())
    bad = bytearray(good)
    bad[-3] ^= 1
    refused = load(hub(bytes(bad), good).url)
    assert refused.status == 2
    lines = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "SHA-256" in lines[0]
    blob = Path(lines[0].removeprefix("error: ").split(": ")[0])
    assert blob.is_file()
    blob.unlink()  # what the message says
    repaired = load(hub(good).url)
    assert repaired.status == 0, repaired.stderr


def test_without_a_network_and_a_cache_one_line_says_what_to_do(load):
    done = load("http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.status == 69
    assert done.stderr.splitlines()[-1].startswith("error: openai-community/gpt2/model.safetensors")
    assert "Traceback" not in done.stderr
    assert "copy" in done.stderr


def test_a_name_the_hub_does_not_have(hub, load):
    done = load(hub(save(published())).url, name="gpt2-tiny")
    assert done.status == 69
    assert "Traceback" not in done.stderr


def test_every_rank_learns_of_a_failure(tmp_path, monkeypatch):
    """Rank 0 shares what went wrong; a rank that waits raises the same instead of waiting for ever."""
    with pytest.raises(UserError, match="disk on fire"):
        pretrained.load_published(
            GPT(SHAPE), "gpt2", print, is_main=False, share=lambda value: {"error": "disk on fire"}
        )
    told = []

    def fail(*_: object) -> Path:
        raise CommandError("no such luck")

    monkeypatch.setattr(pretrained, "fetch", fail)
    with pytest.raises(CommandError, match="no such luck"):
        pretrained.load_published(
            GPT(SHAPE), "gpt2", print, is_main=True, share=lambda value: told.append(value) or value
        )
    assert told == [{"error": "no such luck"}]


def test_published_weights_can_be_finetuned(tmp_path):
    """Loaded, prepared as training prepares them, and trained: the loss on a batch falls."""
    from nanogpt import setup
    from nanogpt.bench import one_step
    from nanogpt.common.ranks import Ranks
    from nanogpt.config import Config, resolve

    path = tmp_path / "model.safetensors"
    save_file({name: 0.1 * value if value.ndim == 2 else value for name, value in published().items()}, path)
    model = GPT(Shape(**{**vars(SHAPE), "block_size": 8}))
    pretrained.fill(model, path)
    config = Config(
        batch_size=4, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=True, device="cpu", learning_rate=3e-3,
        min_lr=3e-3, decay_lr=False,
    )  # fmt: skip
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    state = setup.prepare(config, model, ranks, torch.float32)
    tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses = [
        one_step(config, resolve(config, 1), ranks, state, lambda *_: batch, step) for step in range(30)
    ]
    assert losses[-1] < 0.9 * losses[0]
