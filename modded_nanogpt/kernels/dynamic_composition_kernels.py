"""The Triton kernels of `kernels/dynamic_composition.py`.

A program holds ROWS queries. The window reaches back less than BACK keys, so all keys of a tile are two blocks of fixed
place: `far`, the BACK keys before the tile, and `near`, the tile itself. The whole softmax lies in registers; nothing
is online. The mixed probabilities A, which all heads share, are kept for backward as a band: row i of the band holds
A[i, j] at column j - (first row of i's tile) + BACK; dA, their gradient, likewise.
"""

import triton
import triton.language as tl

from modded_nanogpt.kernels.attention_kernels import LOG2_E, MASKED, load_rows, store_rows


@triton.jit
def _seen(doc_start, first, T, ROWS: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys each query of a tile sees: (ROWS, BACK) and (ROWS, ROWS) bool."""
    rows = first + tl.arange(0, ROWS)
    low = tl.maximum(tl.load(doc_start + rows, mask=rows < T, other=T), rows - (WINDOW - 1))
    far = first - BACK + tl.arange(0, BACK)
    return far[None, :] >= low[:, None], (rows[None, :] >= low[:, None]) & (rows[None, :] <= rows[:, None])


@triton.jit
def _column(table, first, head, T, H: tl.constexpr, ROWS: tl.constexpr):
    """One head's column of a (T, H) float32 table, (ROWS,), 0 past the end."""
    rows = first + tl.arange(0, ROWS)
    return tl.load(table + rows * H + head, mask=rows < T, other=0.0)


@triton.jit
def compose_kernel(
    y, q, k, v, w1, w2, out, band, lse, doc_start, T,
    y_row, y_head, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """out = y + w2 (A v) of ROWS queries and all heads. Also writes A into `band` and log2-sum-exp into lse (H, T)."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    see_far, see_near = _seen(doc_start, first, T, ROWS, BACK, WINDOW)
    a_far = tl.zeros((ROWS, BACK), tl.float32)
    a_near = tl.zeros((ROWS, ROWS), tl.float32)
    for head in range(H):
        queries = load_rows(q + head * q_head, first, q_row, T, ROWS, D, WIDTH, False)
        far = tl.dot(
            queries, tl.trans(load_rows(k + head * k_head, first - BACK, k_row, T, BACK, D, WIDTH, False))
        )
        near = tl.dot(queries, tl.trans(load_rows(k + head * k_head, first, k_row, T, ROWS, D, WIDTH, False)))
        far = tl.where(see_far, far, MASKED)
        near = tl.where(see_near, near, MASKED)
        top = tl.maximum(tl.max(far, 1), tl.max(near, 1)) * LOG2_E
        far = tl.exp2(tl.fma(far, LOG2_E, -top[:, None]))
        near = tl.exp2(tl.fma(near, LOG2_E, -top[:, None]))
        total = tl.sum(far, 1) + tl.sum(near, 1)
        tl.store(lse + head * T + rows, top + tl.log2(total), mask=rows < T)
        share = (_column(w1, first, head, T, H, ROWS) / total)[:, None]
        a_far += far * share
        a_near += near * share
    low_far = a_far.to(band.dtype.element_ty)
    low_near = a_near.to(band.dtype.element_ty)
    store_rows(band, low_far, first, BACK + ROWS, T, ROWS, BACK, BACK)
    store_rows(band + BACK, low_near, first, BACK + ROWS, T, ROWS, ROWS, ROWS)
    for head in range(H):
        values = load_rows(v + head * v_head, first - BACK, v_row, T, BACK, D, WIDTH, False)
        change = tl.dot(low_far, values)
        values = load_rows(v + head * v_head, first, v_row, T, ROWS, D, WIDTH, False)
        change = tl.dot(low_near, values, change)
        before = load_rows(y + head * y_head, first, y_row, T, ROWS, D, WIDTH, False).to(tl.float32)
        change = tl.fma(change, _column(w2, first, head, T, H, ROWS)[:, None], before)
        store_rows(out + head * out_head, change, first, out_row, T, ROWS, D, WIDTH)


@triton.jit
def mixed_gradient_kernel(
    grad, v, w2, band, d_band, dw2, T,
    grad_row, grad_head, v_row, v_head,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """dA of ROWS queries, the sum over heads of w2 (grad v^T), into `d_band`; and dw2 of each head."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    a_far = load_rows(band, first, BACK + ROWS, T, ROWS, BACK, BACK, False)
    a_near = load_rows(band + BACK, first, BACK + ROWS, T, ROWS, ROWS, ROWS, False)
    da_far = tl.zeros((ROWS, BACK), tl.float32)
    da_near = tl.zeros((ROWS, ROWS), tl.float32)
    for head in range(H):
        grads = load_rows(grad + head * grad_head, first, grad_row, T, ROWS, D, WIDTH, False)
        values = load_rows(v + head * v_head, first - BACK, v_row, T, BACK, D, WIDTH, False)
        far = tl.dot(grads, tl.trans(values))
        values = load_rows(v + head * v_head, first, v_row, T, ROWS, D, WIDTH, False)
        near = tl.dot(grads, tl.trans(values))
        second = _column(w2, first, head, T, H, ROWS)[:, None]
        da_far += far * second
        da_near += near * second
        d_second = tl.sum(a_far.to(tl.float32) * far, 1) + tl.sum(a_near.to(tl.float32) * near, 1)
        tl.store(dw2 + rows * H + head, d_second, mask=rows < T)
    store_rows(d_band, da_far, first, BACK + ROWS, T, ROWS, BACK, BACK)
    store_rows(d_band + BACK, da_near, first, BACK + ROWS, T, ROWS, ROWS, ROWS)


@triton.jit
def _query_block(
    k, d_band, queries, log_total, low, first, start, k_row, T,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The keys start .. start + ROWS - 1, the probabilities of the queries' tile over them, and dA."""
    rows = first + tl.arange(0, ROWS)
    places = start + tl.arange(0, ROWS)
    keys = load_rows(k, start, k_row, T, ROWS, D, WIDTH, False)
    columns = d_band + (start - first + BACK)
    d_mixed = load_rows(columns, first, BACK + ROWS, T, ROWS, ROWS, ROWS, False)
    p = tl.exp2(tl.fma(tl.dot(queries, tl.trans(keys)), LOG2_E, -log_total[:, None]))
    seen = (places[None, :] >= low[:, None]) & (places[None, :] <= rows[:, None])
    return keys, tl.where(seen, p, 0.0), d_mixed


@triton.jit
def compose_query_kernel(
    q, k, w1, lse, d_band, dq, dw1, doc_start, T,
    q_row, q_head, k_row, k_head, dq_row, dq_head,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """dw1 and dq of ROWS queries of one head, in two passes over the keys.

    dw1 is sum_j p dA, and that is also what the softmax subtracts: dscore = p w1 (dA - dw1).
    """
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    k += head * k_head
    rows = first + tl.arange(0, ROWS)
    low = tl.maximum(tl.load(doc_start + rows, mask=rows < T, other=T), rows - (WINDOW - 1))
    log_total = tl.load(lse + head * T + rows, mask=rows < T, other=0.0)
    queries = load_rows(q + head * q_head, first, q_row, T, ROWS, D, WIDTH, False)
    d_first = tl.zeros((ROWS,), tl.float32)
    for start in range(first - BACK, first + ROWS, ROWS):
        _, p, d_mixed = _query_block(
            k, d_band, queries, log_total, low, first, start, k_row, T, D, WIDTH, ROWS, BACK
        )
        d_first += tl.sum(p * d_mixed, 1)
    tl.store(dw1 + rows * H + head, d_first, mask=rows < T)
    weight = _column(w1, first, head, T, H, ROWS)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first - BACK, first + ROWS, ROWS):
        keys, p, d_mixed = _query_block(
            k, d_band, queries, log_total, low, first, start, k_row, T, D, WIDTH, ROWS, BACK
        )
        ds = p * weight[:, None] * (d_mixed - d_first[:, None])
        sums = tl.dot(ds.to(keys.dtype), keys, sums)
    store_rows(dq + head * dq_head, sums, first, dq_row, T, ROWS, D, WIDTH)


@triton.jit
def compose_key_kernel(
    grad, q, k, w1, w2, band, lse, d_band, dw1, dk, dv, doc_start, T,
    grad_row, grad_head, q_row, q_head, k_row, k_head, dk_row, dk_head, dv_row, dv_head,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys of one head, from the tile's own queries and the BACK after it; all tiles transposed."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    rows = first + tl.arange(0, ROWS)
    keys = load_rows(k + head * k_head, first, k_row, T, ROWS, D, WIDTH, False)
    dk_sums = tl.zeros((ROWS, WIDTH), tl.float32)
    dv_sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, first + ROWS + BACK, ROWS):
        others = start + tl.arange(0, ROWS)
        inside = others < T
        queries = load_rows(q + head * q_head, start, q_row, T, ROWS, D, WIDTH, False)
        grads = load_rows(grad + head * grad_head, start, grad_row, T, ROWS, D, WIDTH, False)
        places = others[None, :] * (BACK + ROWS) + (rows[:, None] - start + BACK)
        mixed = tl.load(band + places, mask=inside[None, :], other=0.0).to(tl.float32)
        d_mixed = tl.load(d_band + places, mask=inside[None, :], other=0.0)
        log_total = tl.load(lse + head * T + others, mask=inside, other=0.0)
        low = tl.maximum(tl.load(doc_start + others, mask=inside, other=T), others - (WINDOW - 1))
        seen = (rows[:, None] >= low[None, :]) & (rows[:, None] <= others[None, :])
        second = _column(w2, start, head, T, H, ROWS)
        dv_sums = tl.dot((mixed * second[None, :]).to(grads.dtype), grads, dv_sums)
        p = tl.exp2(tl.fma(tl.dot(keys, tl.trans(queries)), LOG2_E, -log_total[None, :]))
        weight = tl.where(seen, p, 0.0) * _column(w1, start, head, T, H, ROWS)[None, :]
        ds = weight * (d_mixed - _column(dw1, start, head, T, H, ROWS)[None, :])
        dk_sums = tl.dot(ds.to(queries.dtype), queries, dk_sums)
    store_rows(dk + head * dk_head, dk_sums, first, dk_row, T, ROWS, D, WIDTH)
    store_rows(dv + head * dv_head, dv_sums, first, dv_row, T, ROWS, D, WIDTH)
