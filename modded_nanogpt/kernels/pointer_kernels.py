"""The Triton kernels of `kernels/pointer.py`, and the mixture of `kernels/pointer_loss.py`.

Query i sees the keys low(i) .. i - 1, low(i) = max(doc_start[i], (i // block - 1) block), and the sink. That bound
never falls as i grows, so the keys of a tile of queries are one interval, and so are the queries of a tile of keys:
tiles outside of the document or the band are never visited. Logarithms are to base 2, as in `attention_kernels`.
"""

import triton
import triton.language as tl

from modded_nanogpt.kernels.attention_kernels import LOG2_E, MASKED, load_rows, store_rows


@triton.jit
def _first_key(doc_start, place, block, T):
    return tl.maximum(tl.load(doc_start + place, mask=place < T, other=T), (place // block - 1) * block)


@triton.jit
def _keys_of(doc_start, first, rows, block, T, ROWS: tl.constexpr):
    """(first key of each of ROWS queries, the least and the greatest of those, the last query)."""
    last = tl.minimum(first + ROWS, T) - 1
    low, lowest = _first_key(doc_start, rows, block, T), _first_key(doc_start, first, block, T)
    return low, lowest, _first_key(doc_start, last, block, T), last


@triton.jit
def _seen(step, start, low, rows):
    """(rows, keys): which keys from `start` on each query sees."""
    return (step[None, :] >= (low - start)[:, None]) & (step[None, :] < (rows - start)[:, None])


@triton.jit
def _last_query(doc_end, place, block, T):
    return tl.minimum(tl.load(doc_end + place, mask=place < T, other=0), (place // block + 2) * block) - 1


@triton.jit
def shares_kernel(
    q, k, sink, tokens, targets, doc_start, copied, of_sink, lse, block, T, q_row, k_row,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries. The sink is met first, so that no row is ever empty."""
    first = tl.program_id(0) * ROWS
    rows, step = first + tl.arange(0, ROWS), tl.arange(0, STEP)
    queries = load_rows(q, first, q_row, T, ROWS, D, WIDTH, EVEN)
    target = tl.load(targets + rows, mask=rows < T, other=-1).to(tl.int32)
    low, lowest, highest, last = _keys_of(doc_start, first, rows, block, T, ROWS)
    sink_score = tl.load(sink + rows, mask=rows < T, other=0.0) * LOG2_E
    top, total = sink_score, tl.full((ROWS,), 1.0, tl.float32)
    found = tl.zeros((ROWS,), tl.float32)
    for start in range(lowest // STEP * STEP, last, STEP):
        scores = tl.dot(queries, tl.trans(load_rows(k, start, k_row, T, STEP, D, WIDTH, EVEN)))
        if (start < highest) | (start + STEP > first):
            seen = _seen(step, start, low, rows)
            scores = tl.where(seen, scores, MASKED)
        token = tl.load(tokens + start + step, mask=start + step < T, other=-2)
        new_top = tl.maximum(top, tl.max(scores, 1) * LOG2_E)
        p = tl.exp2(tl.fma(scores, LOG2_E, -new_top[:, None]))
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        found = found * shrink + tl.sum(tl.where(token[None, :] == target[:, None], p, 0.0), 1)
        top = new_top
    tl.store(copied + rows, found / total, mask=rows < T)
    tl.store(of_sink + rows, tl.exp2(sink_score - top) / total, mask=rows < T)
    tl.store(lse + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def shares_query_kernel(
    q, k, tokens, targets, doc_start, lse, d_copied, delta, dq, block, T, q_row, k_row,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries, contiguous."""
    first = tl.program_id(0) * ROWS
    rows, step = first + tl.arange(0, ROWS), tl.arange(0, STEP)
    queries = load_rows(q, first, q_row, T, ROWS, D, WIDTH, EVEN)
    target = tl.load(targets + rows, mask=rows < T, other=-1).to(tl.int32)
    low, lowest, highest, last = _keys_of(doc_start, first, rows, block, T, ROWS)
    log_total = tl.load(lse + rows, mask=rows < T, other=0.0)
    gain = tl.load(d_copied + rows, mask=rows < T, other=0.0)
    mean = tl.load(delta + rows, mask=rows < T, other=0.0)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(lowest // STEP * STEP, last, STEP):
        keys = load_rows(k, start, k_row, T, STEP, D, WIDTH, EVEN)
        token = tl.load(tokens + start + step, mask=start + step < T, other=-2)
        p = tl.exp2(tl.fma(tl.dot(queries, tl.trans(keys)), LOG2_E, -log_total[:, None]))
        if (start < highest) | (start + STEP > first):
            seen = _seen(step, start, low, rows)
            p = tl.where(seen, p, 0.0)
        ds = p * (tl.where(token[None, :] == target[:, None], gain[:, None], 0.0) - mean[:, None])
        sums = tl.dot(ds.to(keys.dtype), keys, sums)
    store_rows(dq, sums, first, D, T, ROWS, D, WIDTH)


@triton.jit
def shares_key_kernel(
    q, k, tokens, targets, doc_end, lse, d_copied, delta, dk, block, T, q_row, k_row,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dk of ROWS keys, contiguous. Key j is seen by j + 1 .. min(doc_end[j], (j // block + 2) block) - 1."""
    first = tl.program_id(0) * ROWS
    rows, step = first + tl.arange(0, ROWS), tl.arange(0, STEP)
    keys = load_rows(k, first, k_row, T, ROWS, D, WIDTH, EVEN)
    token = tl.load(tokens + rows, mask=rows < T, other=-2)
    last = tl.minimum(first + ROWS, T) - 1
    high, lowest = _last_query(doc_end, rows, block, T), _last_query(doc_end, first, block, T)
    highest = _last_query(doc_end, last, block, T)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range((first + 1) // STEP * STEP, highest + 1, STEP):
        queries = load_rows(q, start, q_row, T, STEP, D, WIDTH, EVEN)
        inside = start + step < T
        target = tl.load(targets + start + step, mask=inside, other=-1).to(tl.int32)
        log_total = tl.load(lse + start + step, mask=inside, other=0.0)
        gain = tl.load(d_copied + start + step, mask=inside, other=0.0)
        mean = tl.load(delta + start + step, mask=inside, other=0.0)
        # Keys down and queries across, so that ds feeds its product as it is.
        p = tl.exp2(tl.fma(tl.dot(keys, tl.trans(queries)), LOG2_E, -log_total[None, :]))
        if (start <= first + ROWS - 1) | (start + STEP - 1 > lowest):
            seen = (step[None, :] > (rows - start)[:, None]) & (step[None, :] <= (high - start)[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (tl.where(token[:, None] == target[None, :], gain[None, :], 0.0) - mean[None, :])
        sums = tl.dot(ds.to(queries.dtype), queries, sums)
    store_rows(dk, sums, first, D, T, ROWS, D, WIDTH)


@triton.jit
def mixture(p, weight, slot_share, total, copied, sink):
    """The term -weight ln(mixed + 1e-9), mixed = real (1 - alpha (1 - sink)) + alpha copied.

    p: the target's share of the softmax; alpha: the slot's; real: the target's share of the softmax without it.
    Returns the logarithm, the sum of exponentials without the slot, and of the term: what the gradient by any logit is
    times its share of that sum, what is taken off at the target, the gradients by the slot's logit (of which no part
    may be a difference of larger ones: alpha can be next to 1), by `copied` and by `sink`.
    """
    rest = tl.maximum(total - slot_share, 1e-30)
    alpha, left = slot_share / total, rest / total
    real = p / left
    kept = real * (1.0 - alpha * (1.0 - sink))
    mixed = kept + alpha * copied + 1e-9
    factor = weight / mixed
    gained = factor * alpha * left * (copied - real * (1.0 - sink))
    of_next = factor * kept
    return tl.log(mixed), rest, of_next + gained, of_next, -gained, -factor * alpha, -factor * alpha * real
