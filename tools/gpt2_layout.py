"""The names and sizes of a GPT-2's tensors: as our checkpoints and nanoGPT's have them, and as they are published."""

import numpy as np

LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SHAPE = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")  # what state.json says of a model


def sizes(shape: dict) -> dict[str, tuple[int, ...]]:
    """Name -> size of every weight of a model with this shape; linear weights are (out, in)."""
    C, bias = shape["n_embd"], shape["bias"]
    found = {
        "transformer.wte.weight": (shape["vocab_size"], C),
        "transformer.wpe.weight": (shape["block_size"], C),
    }
    outputs = {
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    layers = {f"transformer.h.{number}." for number in range(shape["n_layer"])}
    for place in layers:
        for norm in ("ln_1", "ln_2"):
            found[f"{place}{norm}.weight"] = (C,)
        found |= {f"{place}{name}.weight": size for name, size in outputs.items()}
        if bias:
            found |= {f"{place}{norm}.bias": (C,) for norm in ("ln_1", "ln_2")}
            found |= {f"{place}{name}.bias": size[:1] for name, size in outputs.items()}
    found["transformer.ln_f.weight"] = (C,)
    if bias:
        found["transformer.ln_f.bias"] = (C,)
    return found


def misfit(tensors: dict[str, np.ndarray], shape: dict) -> str:
    """The first tensor that is missing, left over or of another size, in words; "" when the model is whole."""
    wanted = sizes(shape)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        return f"{name} {'is missing' if name in wanted else 'belongs to no GPT-2 of its size'}"
    for name, size in sorted(wanted.items()):
        if tuple(tensors[name].shape) != size:
            return f"{name} has {tuple(tensors[name].shape)} where {size} was expected"
    return ""


def published(tensors: dict[str, np.ndarray], shape: dict, vocabulary: int) -> dict[str, np.ndarray]:
    """Our weights in the published layout: linear weights (in, out), every bias there (0), `vocabulary` embeddings.

    The rows past the vocabulary only pad our matrix to a size that GPUs like; no token has those numbers.
    """
    result = {}
    for name, size in sizes({**shape, "bias": True}).items():
        value = tensors.get(name)
        if value is None:
            value = np.zeros(size, np.float32)
        elif name.removesuffix(".weight").endswith(LINEAR):
            value = value.T
        elif name == "transformer.wte.weight":
            value = value[:vocabulary]
        result[name] = np.ascontiguousarray(value, np.float32)
    return result
