"""Runs a kernel's test through Triton's interpreter, in a process of its own, and repairs the interpreter's arithmetic.

As it is, it truncates where GPUs round to nearest even, loses the carry of a mantissa that rounds up to the next power
of two, and multiplies the bit patterns of bfloat16 numbers as if they were integers; Triton 3.6's cannot count a loop
beside a recent NumPy. The kernels are what is tested.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
}  # fmt: skip
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run_interpreted(file: str, timeout: float = 600) -> None:
    """Run `python FILE`, which must print `equal` at its end."""
    done = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]


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

    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot
