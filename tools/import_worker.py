"""Reads one nanoGPT checkpoint in a process of its own, and writes its tensors as safetensors.

    python -m tools.import_worker CKPT.pt WEIGHTS.safetensors

The only place where a pickle is opened, with torch's weights_only: it makes tensors, numbers, texts, lists and
dicts, and refuses everything else. What the checkpoint says besides comes out as one JSON line.
"""

import json
import pickle
from pathlib import Path

from nanogpt.common.errors import UserError, run_command

COMPILED = "_orig_mod."  # what torch.compile puts before each name


def main(argv: list[str]) -> int:
    """Convert; UserError for what is no nanoGPT checkpoint."""
    source, target = map(Path, argv)
    import torch
    from safetensors.torch import save_file

    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{source}: holds more than tensors, numbers and texts, or is no checkpoint; it was not loaded, because a "
            "pickle can run any code"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{source}: cannot be read as a checkpoint ({reason[0][:120]}); copy it again"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), dict) for key in ("model", "model_args")
    ):
        raise UserError(
            f'{source}: has no "model" and "model_args"; it is no checkpoint of nanoGPT\'s train.py'
        )
    tensors = {}
    for name, value in found["model"].items():
        name = str(name).removeprefix(COMPILED)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise UserError(f"{source}: {name}: is no floating-point tensor; it is no checkpoint of nanoGPT")
        tensors[name] = value.float().contiguous()
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("transformer.wte.weight")
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise UserError(f"{source}: lm_head.weight is not transformer.wte.weight; GPT-2 ties them")
    bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad:
        raise UserError(f"{source}: {bad}: holds numbers that are not finite; take an earlier checkpoint")
    save_file({name: value.clone() for name, value in tensors.items()}, target)
    print(json.dumps({
        "model_args": plain(found["model_args"]), "config": plain(found.get("config")),
        "iter_num": number(found.get("iter_num")), "best_val_loss": number(found.get("best_val_loss")),
    }))  # fmt: skip
    return 0


def plain(values: object) -> dict:
    """The numbers, texts and truth values of a dict."""
    values = values if isinstance(values, dict) else {}
    return {
        str(key): value for key, value in values.items() if isinstance(value, bool | int | float | str | None)
    }


def number(value: object) -> float | None:
    """A number, which nanoGPT may have kept as a tensor of one element; None for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


if __name__ == "__main__":
    run_command(main)
