"""OpenAI's GPT-2 weights from the hub: safetensors only, their digest checked, put under this model's names.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean everywhere. Once a file is in the hub's cache,
no network is needed.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt.common.download import DownloadError
from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.storage import sha256_of, storage_errors
from nanogpt.model import GPT

OWNER = "openai-community"
FILE = "model.safetensors"
# Stored as (in, out), because GPT-2 was written with 1x1 convolutions; a linear layer has (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# In the files but no weights: the causal mask, and the head, which is wte again.
NO_WEIGHTS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight")


def load_published(
    model: GPT, name: str, say: Callable[[str], None], *, is_main: bool = True,
    share: Callable[[object], object] = lambda value: value,
) -> None:  # fmt: skip
    """Fill `model` with the published weights `name` ("gpt2", ..., "gpt2-xl"); its block_size may be shorter.

    Every rank calls it: the main one downloads while the others wait in `share` (rank 0's value on all ranks), then
    they read the same revision from the cache. Raises DownloadError when the file cannot be had, StorageError when
    the cache cannot be written, UserError when the file is not what it should be.
    """
    repository, failure, found = f"{OWNER}/{name}", None, {}
    if is_main:
        say(f"weights: {repository}, from the hub or its cache")
        try:
            path = fetch(repository, None)
            check_digest(path)
            found = {"revision": path.parent.name}
        except CommandError as error:
            failure = error
            found = {"error": str(error)}
    found = share(found)
    if "error" in found:
        raise failure or UserError(found["error"])
    if not is_main:
        path = fetch(repository, found["revision"])
        check_digest(path)
    fill(model, path)


def fetch(repository: str, revision: str | None) -> Path:
    """The file in the hub's cache, downloaded when it is not there. Its folder is named after the revision."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(repository, FILE, revision=revision))
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # The hub's own errors are OSErrors too, without a number.
        if isinstance(error, OSError) and error.errno:
            with storage_errors(constants.HF_HUB_CACHE):
                raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        cached = f"{constants.HF_HUB_CACHE}/models--{repository.replace('/', '--')}"
        raise DownloadError(
            f"{repository}/{FILE}: cannot be had from {constants.ENDPOINT}: {reason[0][:200]}; run this once where "
            f"there is a network, or copy {cached} from another machine"
        ) from None


def check_digest(path: Path) -> None:
    """UserError unless the file has the SHA-256 that the hub gave for it: the name of the blob it is a link to."""
    expected = path.resolve().name
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise UserError(
            f"{path}: the hub's cache does not say which SHA-256 it must have; delete it and set HF_HOME to a folder "
            "on a file system that has symbolic links"
        )
    with path.open("rb") as file:
        digest = sha256_of(file)
    if digest != expected:
        raise UserError(
            f"{path.resolve()}: has SHA-256 {digest[:16]}..., the hub says {expected[:16]}...; delete it and try again"
        )


@torch.no_grad()
def fill(model: GPT, path: Path) -> None:
    """Copy every tensor of a safetensors file in GPT-2's published layout into `model`.

    UserError, naming the tensor, when one is missing, left over, or of another shape.
    """
    wanted = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            names = {key: "transformer." + key.removeprefix("transformer.") for key in file.keys()}  # noqa: SIM118
            names = {
                key: name
                for key, name in names.items()
                if not NO_WEIGHTS.fullmatch(name.removeprefix("transformer."))
            }
            for name in sorted(set(wanted) ^ set(names.values())):
                state = "misses" if name in wanted else "has, beyond this model,"
                raise UserError(
                    f"{path}: {state} the tensor {name}; it is not a {len(model.transformer.h)}-layer GPT-2"
                )
            for key, name in names.items():
                tensor = fitted(file.get_tensor(key), name, model.shape.block_size)
                if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
                    raise UserError(
                        f"{path}: {key}: {tensor.dtype} {tuple(tensor.shape)} where this model has "
                        f"{tuple(wanted[name].shape)}; it is not the model that --init_from names"
                    )
                wanted[name].copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); delete it and try again") from None


def fitted(tensor: Tensor, name: str, block_size: int) -> Tensor:
    """A published tensor as this model wants it: linear weights (out, in), and the first `block_size` positions."""
    if name.endswith(TRANSPOSED):
        return tensor.T
    if name == "transformer.wpe.weight":
        return tensor[:block_size]
    return tensor
