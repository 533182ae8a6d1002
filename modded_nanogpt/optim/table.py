"""What each parameter gets: one row a name. Standard library only.

The multipliers and betas are those of modded-nanogpt's records 89 and 92. Low first betas on embeddings: a rare token
gets one large gradient in about a hundred updates, and a long memory would go on pushing it long after.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from modded_nanogpt.layer_plan import SIZES

if TYPE_CHECKING:
    from modded_nanogpt.config import Config


@dataclass(frozen=True)
class Row:
    """How one parameter is optimized and shared out.

    spread: "banks": stacks of matrices, each rank updates some of the matrices (Muon); "rows": each rank updates a
    range of the leading axis; "whole": small, every rank makes the same update.
    """

    spread: Literal["banks", "rows", "whole"]
    lr: float = 1.0  # multiplies the optimizer's base learning rate
    # Multiplies Adam's base weight decay; Muon's decay is the same for all of its matrices.
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)  # Adam
    epsilon: float = 1e-10  # Adam
    # Muon: learning-rate multipliers of consecutive matrices, repeated over the bank, on top of sqrt(rows / columns)
    # of tall ones.
    multipliers: tuple[float, ...] = (1.0,)
    # The gradient is a buffer that lives as long as the parameter: looked-up rows are added to it in place, and the
    # update clears it. Others are dropped after the update, and made anew by autograd.
    lasting_gradient: bool = False
    # From so many ranks on only the rows travel that a rank has touched, where the trainer names them (0: never). With
    # fewer ranks each touches a larger part of the table.
    sparse_from: int = 0


_TABLE = {
    "qk_bank": Row("banks"),
    "vo_bank": Row("banks"),
    "mlp_bank": Row("banks", multipliers=(1.0, 2.0)),  # up, down
    "scalars": Row("whole", lr=5.0),
    "smear_gate": Row("whole", lr=0.01),
    "ve_gates": Row("whole", decay=1.0),
    "head": Row("rows", decay=150.0, betas=(0.5, 0.95)),
    "bigram": Row("rows", lr=75.0, decay=5.0, betas=(0.75, 0.95), lasting_gradient=True, sparse_from=8),
    "post_lambdas": Row("whole", betas=(0.9, 0.95)),
    "residual_lambdas": Row("whole", lr=5.0, betas=(0.9, 0.95)),
    "value_embeds": Row("rows", lr=75.0, decay=5.0, betas=(0.75, 0.95), lasting_gradient=True),
    "embed": Row("rows", decay=150.0, betas=(0.5, 0.95)),
    "embed2": Row("rows", lr=75.0, decay=5.0, betas=(0.75, 0.95), lasting_gradient=True),
    "mudd_w1": Row("whole", lr=0.25, decay=1.0),
    "mudd_w2": Row("whole", lr=0.25, decay=1.0),
    "mudd_b2": Row("whole", lr=0.25),
    "mudd_groups": Row("whole", lr=0.25, decay=1.0),
    "gate_w1": Row("whole", lr=0.1, decay=1.0),
    "gate_w2": Row("whole", lr=0.1, decay=1.0),
    "gate_b2": Row("whole", lr=0.1),
    "gate_scale": Row("whole", lr=0.1),
    "static_gates": Row("whole", lr=0.1),
    "copy_scales": Row("whole", lr=5.0),
    "copy_embeds": Row("whole"),
    "pointer_qk": Row("whole", lr=0.25),
    "pointer_sink": Row("whole", lr=0.25),
    "pointer_gain": Row("whole"),
}

# The medium track's Adam has other betas on its tables, a larger epsilon, and a base rate half as large, of which its
# scalars take twice. Its gates are small matrices of NorMuon's.
_MEDIUM_TABLES = ("head", "embed", "embed2", "value_embeds")
_MEDIUM = {
    **{name: _TABLE[name] for name in ("qk_bank", "vo_bank", "mlp_bank")},
    **{name: Row("banks", lr=0.1) for name in ("attention_gates", "ve_gates", "skip_gates", "smear_gate")},
    **{name: Row("whole", lr=2.0, epsilon=1e-8) for name in ("scalars", "residual_lambdas", "input_lambdas")},
    **{name: replace(_TABLE[name], betas=(0.8, 0.95), epsilon=1e-8) for name in _MEDIUM_TABLES},
}

# The snapshot's: sigmoid gates and plain factors instead of the small networks'.
_SNAPSHOT = {
    **_TABLE,
    "attention_gates": Row("whole", decay=1.0),
    "skip_gates": Row("whole", lr=0.05),
    "residual_lambdas": Row("whole", lr=5.0),
    "bigram_lambdas": Row("whole", lr=5.0),
    "input_lambdas": Row("whole", lr=5.0, betas=(0.65, 0.95)),
}
# Record 92's value embeddings learn a little more slowly.
_RECORD = _TABLE | {"value_embeds": replace(_TABLE["value_embeds"], lr=70.0)}
_BY_MAKE = {"record": _RECORD, "record89": _TABLE, "medium": _MEDIUM, "snapshot": _SNAPSHOT}

# The order in which a step sends gradients off, and in which it then updates and sends weights back. "small" stands
# for all parameters that are kept whole: they travel in one message. Matrices go first and are worked on last, so that
# their arithmetic hides the gathers of the tables, the largest messages of an Adam step; the medium track's gates are
# too small to hide anything.
REDUCE_ORDER = (
    "qk_bank",
    "vo_bank",
    "mlp_bank",
    "attention_gates",
    "ve_gates",
    "skip_gates",
    "smear_gate",
    "small",
    "head",
    "bigram",
    "value_embeds",
    "embed2",
    "embed",
)
UPDATE_ORDER = (
    "small",
    "smear_gate",
    "skip_gates",
    "ve_gates",
    "attention_gates",
    "value_embeds",
    "bigram",
    "head",
    "embed2",
    "embed",
    "qk_bank",
    "vo_bank",
    "mlp_bank",
)


def table(config: "Config", names: Iterable[str]) -> dict[str, Row]:
    """The rows of the parameters `names`, in the table's order. ValueError for a name without a row."""
    rows = _BY_MAKE[SIZES[config.recipe].make]
    names = set(names)
    if names - rows.keys():
        unknown = ", ".join(sorted(names - rows.keys()))
        raise ValueError(f"parameters without a row in modded_nanogpt/optim/table.py: {unknown}")
    return {name: row for name, row in rows.items() if name in names}
