"""Batched products that are symmetric: X X^T, X^T X, and a I + b A + c A A. Half of their tiles are computed.

One program computes one square tile on or below the diagonal, and writes it and its mirror image: the two are equal to
the last bit. A A is computed as A A^T. X^T X is read along its rows as it lies in memory; nothing is
transposed before. Sums are float32. The optimizer calls these outside of any graph, so they are plain functions.

Without Triton, on a CPU, and for other dtypes than bfloat16 and float16 they are the plain twins, `torch.bmm` (cuBLAS).
"""

import torch
from torch import Tensor

from modded_nanogpt.kernels.launch import on_device_of, uses_kernels
from modded_nanogpt.kernels.reference import symmetric_matmul as reference

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

FULL_GPU = 264  # programs that keep a large GPU busy: twice the 132 multiprocessors of an H100
ROOM_FOR_FOUR_STAGES = 140_000  # bytes of shared memory: 4 stages of two 128 x 64 tiles take 131,072


def gram(x: Tensor, transposed: bool = False) -> Tensor:
    """(n, r, c) contiguous -> X X^T (n, r, r), or X^T X (n, c, c) when `transposed`; in x's dtype."""
    if not _runs(x):
        return reference.gram(x, transposed)
    return _launch(x, transposed, polynomial=False)


def polynomial(gram: Tensor, constant: float, linear: float, quadratic: float) -> Tensor:
    """constant I + linear A + quadratic A A, of symmetric matrices A (n, s, s) contiguous, in their dtype."""
    if not _runs(gram):
        return reference.polynomial(gram, constant, linear, quadratic)
    return _launch(gram, False, True, constant, linear, quadratic)


def _runs(x: Tensor) -> bool:
    # Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
    halves = (torch.float16, torch.bfloat16) if x.is_cuda else (torch.float16,)
    return triton is not None and uses_kernels(x) and x.dtype in halves


def _launch(
    x: Tensor, transposed: bool, polynomial: bool, constant: float = 0.0, linear: float = 0.0,
    quadratic: float = 1.0, block: int | None = None,
) -> Tensor:  # fmt: skip
    """`block` is the side of a tile: 128, or 64 where large tiles would leave most of the GPU without work."""
    if not x.is_contiguous():
        raise ValueError(f"symmetric products need contiguous matrices, not strides {x.stride()}")
    count, rows, columns = x.shape
    size, length = (columns, rows) if transposed else (rows, columns)
    block = block or (128 if size > 64 and count * _tiles(size, 128) >= FULL_GPU else 64)
    out = torch.empty(count, size, size, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        _symmetric_kernel[(_tiles(size, block), count)](
            x, out, size, length, constant, linear, quadratic,
            TRANSPOSED=transposed, POLYNOMIAL=polynomial, EVEN=size % block == 0 and length % 64 == 0,
            BLOCK=block, BLOCK_K=64, num_warps=8 if block == 128 else 4, num_stages=_stages(x),
        )  # fmt: skip
    return out


def _tiles(size: int, block: int) -> int:
    side = -(-size // block)
    return side * (side + 1) // 2


def _stages(x: Tensor) -> int:
    """Tiles in flight: as deep as the shared memory of the GPU allows."""
    if not x.is_cuda:
        return 1
    room = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return 4 if room >= ROOM_FOR_FOUR_STAGES else 3


if triton is not None:

    @triton.jit
    def _load(at, mask, EVEN: tl.constexpr):
        return tl.load(at) if EVEN else tl.load(at, mask=mask, other=0.0)

    @triton.jit
    def _symmetric_kernel(
        x, out, size, length, constant, linear, quadratic,
        TRANSPOSED: tl.constexpr, POLYNOMIAL: tl.constexpr, EVEN: tl.constexpr,
        BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        # Tiles (i, j) with j <= i in the order (0, 0), (1, 0), (1, 1), (2, 0) ...; the root may be off by one.
        tile = tl.program_id(0)
        i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        j = tile - i * (i + 1) // 2
        matrix = tl.program_id(1).to(tl.int64)
        x += matrix * size * length
        out += matrix * size * size
        row = i * BLOCK + tl.arange(0, BLOCK)
        column = j * BLOCK + tl.arange(0, BLOCK)
        step = tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, length, BLOCK_K):
            k = start + step
            if TRANSPOSED:  # X is (length, size)
                left_at, right_at = k[:, None] * size + row[None, :], k[:, None] * size + column[None, :]
                left = _load(x + left_at, (k[:, None] < length) & (row[None, :] < size), EVEN)
                right = _load(x + right_at, (k[:, None] < length) & (column[None, :] < size), EVEN)
                total = tl.dot(tl.trans(left), right, total)
            else:  # X is (size, length)
                left_at, right_at = row[:, None] * length + k[None, :], column[:, None] * length + k[None, :]
                left = _load(x + left_at, (row[:, None] < size) & (k[None, :] < length), EVEN)
                right = _load(x + right_at, (column[:, None] < size) & (k[None, :] < length), EVEN)
                total = tl.dot(left, tl.trans(right), total)
        at = row[:, None] * size + column[None, :]
        inside = (row[:, None] < size) & (column[None, :] < size)
        if POLYNOMIAL:
            total = quadratic * total + linear * _load(x + at, inside, EVEN).to(tl.float32)
            total += tl.where(row[:, None] == column[None, :], constant, 0.0)
        value = total.to(out.dtype.element_ty)
        tl.store(out + at, value, mask=inside)
        if i != j:
            mirrored = column[:, None] * size + row[None, :]
            tl.store(out + mirrored, tl.trans(value), mask=tl.trans(inside))
