"""How large each recipe's model is: layers, widths, vocabulary, rows of tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The sizes of a model; all counts."""

    layers: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    vocab: int = 50_257
    padded_vocab: int = 50_304
    bigram_rows: int = 0  # of the bigram hash table; the last one stands for "no previous token"
    table_rows: int = (
        0  # of the table of hashed n-grams, which takes its place; with --table_rows=auto at most
    )
    sign_rows: int = 0  # of the table of random signs
    value_tables: int = 5
    mudd_groups: int = 1  # of channels, whose sums at the end of the network have weights of their own
    # Channels that the sigmoid gates (smear, value embeddings; medium and snapshot: all of them) look at.
    gate_dims: int = 12
    # The recipe whose model this is in another size: its layers, forward pass and optimizer rows.
    make: str = "record"


# fmt: off
SIZES: dict[str, Size] = {
    "record": Size(11, 768, 6, 128, 2816, bigram_rows=377_280, table_rows=84_602_880, sign_rows=8192, value_tables=4,
                   mudd_groups=12),
    "record89": Size(11, 768, 6, 128, 3072, bigram_rows=377_280, sign_rows=8192, make="record89"),
    "snapshot": Size(11, 768, 6, 128, 3072, bigram_rows=251_520, make="snapshot"),
    "medium": Size(16, 1024, 8, 128, 4096, gate_dims=16, make="medium"),
    "tiny": Size(11, 96, 6, 16, 352, bigram_rows=4096, table_rows=8192, sign_rows=64, value_tables=4, mudd_groups=12),
    "tiny_record89": Size(11, 96, 6, 16, 384, bigram_rows=4096, sign_rows=64, make="record89"),
    "tiny_snapshot": Size(11, 96, 6, 16, 384, bigram_rows=4096, make="snapshot"),
    "tiny_medium": Size(16, 64, 4, 16, 256, gate_dims=16, make="medium"),
}
# fmt: on
