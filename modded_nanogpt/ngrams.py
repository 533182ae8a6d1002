"""Which rows of the n-gram table, and which rows of its random signs, each token looks up (records 90 to 92).

Two halves: pairs of tokens have the first, triples the second, each a hash of the tokens (hash embeddings, arXiv
1709.03933). N-grams that share a row multiply it with signs of their own (arXiv 1504.04788). Borders between documents
are not looked at. With --normalised_grams the classes of tokens take the place of tokens (`vocabulary.class_table`), so
that "The cat" and "the cat" are one. With t_0 the token, t_1 and t_2 the ones before it, M rows and P rows of signs,
all products int32 that wraps around, and remainders that are never negative:

    pair          (36313 t_0 ^ 27191 t_1) mod (M/2 - 1)
    its signs     (48271 t_0 ^ 30011 t_1) mod P
    triple        M/2 + (17351 t_0 ^ 60961 t_1 ^ 45259 t_2) mod (M/2 - 1)
    its signs     (58699 t_0 ^ 39779 t_1 ^ 26801 t_2) mod P

Where there are no tokens before, each half has its last row, with row 0 of the signs.
"""

import numpy as np

ROW_FACTORS = ((36_313, 27_191), (17_351, 60_961, 45_259))
SIGN_FACTORS = ((48_271, 30_011), (58_699, 39_779, 26_801))
HALVES = len(ROW_FACTORS)


def gram_rows(tokens: np.ndarray, rows: int) -> np.ndarray:
    """int32 (2, n): the row of a table of `rows` (even) for the pair and the triple that ends at each of n `tokens`."""
    half, found = rows // 2, np.empty((HALVES, len(tokens)), np.int32)
    for which, factors in enumerate(ROW_FACTORS):
        without = len(factors) - 1  # so many of the first tokens have not enough before them
        found[which, :without] = half - 1
        found[which, without:] = np.remainder(_mixed(tokens, factors), half - 1)
        found[which] += which * half
    return found


def gram_signs(tokens: np.ndarray, pool: int) -> np.ndarray:
    """int32 (2, n): the rows of signs, of which there are `pool`."""
    found = np.zeros((HALVES, len(tokens)), np.int32)
    for which, factors in enumerate(SIGN_FACTORS):
        found[which, len(factors) - 1 :] = np.remainder(_mixed(tokens, factors), pool)
    return found


def _mixed(tokens: np.ndarray, factors: tuple[int, ...]) -> np.ndarray:
    """int32 (n - k): the products of each token and the k before it, xor of all, from the first that has so many."""
    wide, k = tokens.astype(np.int32), len(factors) - 1
    mixed = np.zeros(max(0, len(wide) - k), np.int32)
    for back, factor in enumerate(factors):
        mixed ^= wide[k - back : max(k, len(wide)) - back] * np.int32(factor)
    return mixed
