"""The Triton kernels of `kernels/attention.py`: causal attention in a window over packed documents.

All documents lie one after another in one buffer of T tokens. Query i sees the keys max(doc_start[i], i - window) .. i.
That lower bound never falls as i grows, so the keys that a tile of queries needs are one interval, known from the
tile's first row, and a tile of keys needs no mask when it lies between the bound of the last row and the first row.
No program belongs to a document: short documents cost masked corners, not launches or empty tiles.

Written from FlashAttention-2 (Dao 2023, arXiv 2307.08691): online softmax forward; backward recomputes the
probabilities from the log-sum-exp. Logarithms are to base 2, because that is the exponential the hardware has.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# A masked score: so low that its exponential is 0 beside any real score, yet finite, so that a row that has met
# masked keys only still computes numbers; its first real score wipes them out, and each row ends at its own token.
MASKED = tl.constexpr(-1.0e30)


@triton.jit
def load_rows(
    base, first, stride, T,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS - 1 of one head, (ROWS, WIDTH), 0 outside 0 .. T and D. WIDTH: D's next power of 2.

    EVEN: T is a multiple of every tile and D a power of 2, so that nothing lies outside.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    origin = (tl.zeros((), tl.int64) + first) * stride  # the whole buffer can pass 2^31 bytes
    pointers = base + origin + rows[:, None] * stride + columns[None, :]
    if EVEN:
        tile = tl.load(pointers)
    else:
        inside = (first + rows >= 0) & (first + rows < T)
        tile = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(base, tile, first, stride, T, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of `load_rows`, in the dtype of `base`."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    origin = (tl.zeros((), tl.int64) + first) * stride  # the whole buffer can pass 2^31 bytes
    pointers = base + origin + rows[:, None] * stride + columns[None, :]
    inside = (first + rows < T)[:, None] & (columns < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _query_bounds(doc_start, first, window, T, ROWS: tl.constexpr):
    """Of a tile of queries: each row's first key (ROWS,), the first row's, the last row's, and the last row."""
    rows = first + tl.arange(0, ROWS)
    low = tl.maximum(tl.load(doc_start + rows, mask=rows < T, other=T), rows - window)
    last = tl.minimum(first + ROWS, T) - 1
    lowest = tl.maximum(tl.load(doc_start + first), first - window)
    highest = tl.maximum(tl.load(doc_start + last), last - window)
    return low, lowest, highest, last


@triton.jit(do_not_specialize=["window"])
def forward_kernel(
    q, k, v, out, lse, doc_start, window, T,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    D: tl.constexpr, V: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head. out: (T, H, V); lse: (H, T), log2 of each row's sum of exponentials."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    k += head * k_head
    v += head * v_head
    rows = first + tl.arange(0, ROWS)
    step = tl.arange(0, STEP)
    queries = load_rows(q + head * q_head, first, q_row, T, ROWS, D, D_WIDTH, EVEN)
    low, lowest, highest, last = _query_bounds(doc_start, first, window, T, ROWS)
    top = tl.full((ROWS,), MASKED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, V_WIDTH), tl.float32)
    for start in range(lowest // STEP * STEP, last + 1, STEP):
        scores = tl.dot(queries, tl.trans(load_rows(k, start, k_row, T, STEP, D, D_WIDTH, EVEN)))
        if (start < highest) | (start + STEP - 1 > first):
            seen = (step[None, :] >= (low - start)[:, None]) & (step[None, :] <= (rows - start)[:, None])
            scores = tl.where(seen, scores, MASKED)
        new_top = tl.maximum(top, tl.max(scores, 1) * LOG2_E)
        p = tl.exp2(tl.fma(scores, LOG2_E, -new_top[:, None]))
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v, start, v_row, T, STEP, V, V_WIDTH, EVEN)
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None])
        top = new_top
    store_rows(out + head * out_head, sums * (1.0 / total)[:, None], first, out_row, T, ROWS, V, V_WIDTH)
    tl.store(lse + head.to(tl.int64) * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit(do_not_specialize=["window"])
def query_gradient_kernel(
    q, k, v, out, grad, lse, delta, dq, doc_start, window, T,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, grad_row, grad_head, dq_row, dq_head,
    D: tl.constexpr, V: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries of one head, and delta (H, T) = sum over V of out * grad, which the next kernel reads."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    k += head * k_head
    v += head * v_head
    rows = first + tl.arange(0, ROWS)
    step = tl.arange(0, STEP)
    row_statistics = head.to(tl.int64) * T + rows
    queries = load_rows(q + head * q_head, first, q_row, T, ROWS, D, D_WIDTH, EVEN)
    grads = load_rows(grad + head * grad_head, first, grad_row, T, ROWS, V, V_WIDTH, EVEN)
    outputs = load_rows(out + head * out_head, first, out_row, T, ROWS, V, V_WIDTH, EVEN)
    dots = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + row_statistics, dots, mask=rows < T)
    log_total = tl.load(lse + row_statistics, mask=rows < T, other=0.0)
    low, lowest, highest, last = _query_bounds(doc_start, first, window, T, ROWS)
    sums = tl.zeros((ROWS, D_WIDTH), tl.float32)
    for start in range(lowest // STEP * STEP, last + 1, STEP):
        keys = load_rows(k, start, k_row, T, STEP, D, D_WIDTH, EVEN)
        values = load_rows(v, start, v_row, T, STEP, V, V_WIDTH, EVEN)
        scores = tl.dot(queries, tl.trans(keys))
        dp = tl.dot(grads, tl.trans(values))
        p = tl.exp2(tl.fma(scores, LOG2_E, -log_total[:, None]))
        if (start < highest) | (start + STEP - 1 > first):
            seen = (step[None, :] >= (low - start)[:, None]) & (step[None, :] <= (rows - start)[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - dots[:, None])
        sums = tl.dot(ds.to(keys.dtype), keys, sums)
    store_rows(dq + head * dq_head, sums, first, dq_row, T, ROWS, D, D_WIDTH)


@triton.jit(do_not_specialize=["window"])
def key_gradient_kernel(
    q, k, v, grad, lse, delta, dk, dv, doc_end, window, T,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head, dk_row, dk_head, dv_row, dv_head,
    D: tl.constexpr, V: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys of one head: key j is seen by the queries j .. min(doc_end[j] - 1, j + window)."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    q += head * q_head
    grad += head * grad_head
    lse += head.to(tl.int64) * T
    delta += head.to(tl.int64) * T
    rows = first + tl.arange(0, ROWS)
    step = tl.arange(0, STEP)
    keys = load_rows(k + head * k_head, first, k_row, T, ROWS, D, D_WIDTH, EVEN)
    values = load_rows(v + head * v_head, first, v_row, T, ROWS, V, V_WIDTH, EVEN)
    high = tl.minimum(tl.load(doc_end + rows, mask=rows < T, other=0) - 1, rows + window)
    last = tl.minimum(first + ROWS, T) - 1
    lowest = tl.minimum(tl.load(doc_end + first) - 1, first + window)
    highest = tl.minimum(tl.load(doc_end + last) - 1, last + window)
    dk_sums = tl.zeros((ROWS, D_WIDTH), tl.float32)
    dv_sums = tl.zeros((ROWS, V_WIDTH), tl.float32)
    for start in range(first // STEP * STEP, highest + 1, STEP):
        queries = load_rows(q, start, q_row, T, STEP, D, D_WIDTH, EVEN)
        grads = load_rows(grad, start, grad_row, T, STEP, V, V_WIDTH, EVEN)
        if EVEN:
            log_total = tl.load(lse + start + step)
            dots = tl.load(delta + start + step)
        else:
            log_total = tl.load(lse + start + step, mask=start + step < T, other=0.0)
            dots = tl.load(delta + start + step, mask=start + step < T, other=0.0)
        # All tiles are transposed, keys down and queries across, so that p and ds feed their products as they are.
        scores = tl.dot(keys, tl.trans(queries))
        p = tl.exp2(tl.fma(scores, LOG2_E, -log_total[None, :]))
        if (start < first + ROWS - 1) | (start + STEP - 1 > lowest):
            seen = (step[None, :] >= (rows - start)[:, None]) & (step[None, :] <= (high - start)[:, None])
            p = tl.where(seen, p, 0.0)
        dv_sums = tl.dot(p.to(grads.dtype), grads, dv_sums)
        dp = tl.dot(values, tl.trans(grads))
        ds = p * (dp - dots[None, :])
        dk_sums = tl.dot(ds.to(queries.dtype), queries, dk_sums)
    store_rows(dk + head * dk_head, dk_sums, first, dk_row, T, ROWS, D, D_WIDTH)
    store_rows(dv + head * dv_head, dv_sums, first, dv_row, T, ROWS, V, V_WIDTH)
