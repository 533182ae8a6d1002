"""Runs the kernels' comparisons through Triton's interpreter, and repairs the interpreter's arithmetic.

    TRITON_INTERPRET=1 python -m tests.modded.kernels.interpreter_kit [everything]

One process does it for all files (`test_interpreted`), as each start of torch takes seconds. As it is, the interpreter
truncates where GPUs round to nearest even, loses the carry of a mantissa that rounds up to the next power of two, and
multiplies the bit patterns of bfloat16 numbers as if they were integers; Triton 3.6's cannot count a loop beside a
recent NumPy. A third of its time goes to finding its own functions for every call. The kernels are what is tested.
"""

import importlib
import inspect
import sys
import time

import numpy as np
import torch

FILES = (
    "attention",
    "cross_entropy",
    "dynamic_composition",
    "embedding",
    "fp8",
    "linear",
    "mlp",
    "pointer",
    "row_table",
    "symmetric_matmul",
)
DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
}  # fmt: skip
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def repair() -> None:
    """Let torch do the interpreter's conversions between floating-point formats, and widen bfloat16 before products."""
    from triton import language as tl
    from triton.runtime import interpreter

    def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, _: object) -> np.ndarray:
        old, new = DTYPES[source.name], DTYPES[target.name]
        bits = torch.from_numpy(
            np.ascontiguousarray(values).view(getattr(np, f"int{8 * old.itemsize}")).copy()
        )
        converted = bits.view(old).to(new).view(INTEGERS[new.itemsize]).numpy()
        return converted.view(getattr(np, f"uint{8 * new.itemsize}")).reshape(np.shape(values))

    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder: object, a: object, b: object, *others: object) -> object:
        wide = [builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return product(builder, *wide, *others)

    patch_tensors = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: object) -> None:
        patch_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builtins: dict[object, list[str]] = {}

    def patch_builtins(package: object, builder: object, scope: object) -> None:
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in builtins[package]:
            if tl.core.is_builtin(member := getattr(package, name)):  # not where a caller has patched it
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot


def main(everything: bool) -> None:
    """Each file's `interpreted`, with the seconds of processor time it took."""
    repair()
    for name in FILES:
        print(name, end=" ", flush=True)  # the last one named is the one that failed
        before = time.process_time()
        importlib.import_module(f"tests.modded.kernels.test_{name}").interpreted(everything)
        print(f"{time.process_time() - before:.1f} s")
    print("equal")


if __name__ == "__main__":
    main("everything" in sys.argv[1:])
