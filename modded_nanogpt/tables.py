"""Lookups in the embedding tables, outside of the compiled graph, and the way back for their gradients.

`kernels.embedding` says why.
"""

import torch
from torch import Tensor

from modded_nanogpt import layer_plan
from modded_nanogpt.batches import Batch
from modded_nanogpt.kernels.embedding import add_rows_
from modded_nanogpt.model import Copied, Rows, SpeedrunModel
from modded_nanogpt.optim.row_table import RowTable


def look_up(model: SpeedrunModel, table: RowTable | None, batch: Batch, tied: bool, train: bool) -> Rows:
    """The rows of the batch's tokens, bigrams or n-grams; while `tied`, tokens are rows of the head.

    table: of n-grams, which has fetched what the batch needs; None where there is none, or nothing is computed.
    """
    tokens = batch.inputs
    second, value, bigram = None, None, None
    with torch.no_grad():
        embed = (model.head if tied else model.embed)[tokens]
        if hasattr(model, "embed2"):
            second = model.embed2[tokens]
        if hasattr(model, "value_embeds"):
            value = model.value_embeds.view(model.size.value_tables, model.size.padded_vocab, -1)[:, tokens]
        if hasattr(model, "bigram"):
            bigram = model.bigram[batch.bigram_rows]
        elif layer_plan.table_rows(model.config):
            bigram = torch.zeros_like(embed) if table is None else table.vectors(batch)
    found = Rows(embed, second, value, bigram)
    for rows in found:
        if rows is not None and train:
            rows.requires_grad_()
    return found


@torch.no_grad()
def look_up_copied(model: SpeedrunModel, batch: Batch, tied: bool) -> Copied | None:
    """The embeddings of what the batch's tokens may be about to repeat; None without `copy_input`."""
    if not model.config.copy_input:
        return None
    return Copied((model.head if tied else model.embed)[batch.copy_tokens], batch.copy_buckets)


@torch.no_grad()
def add_gradients(
    model: SpeedrunModel, table: RowTable | None, batch: Batch, gradients: Rows, of_head: Tensor | None, tied: bool
) -> None:  # fmt: skip
    """Add the gradients of looked-up rows, and of the rows of the head that were scored, to those of the tables.

    Those of n-grams wait in `table` for its next update.

    of_head: (P, d), of the rows `batch.candidates`; None where the whole head was scored.

    The optimizer keeps and clears the gradients of the tables; that of the head is autograd's.
    """
    if of_head is not None:
        _gradient(model.head).index_add_(0, batch.candidates, of_head)  # each row once: no order matters
    add_rows_(_gradient(model.head if tied else model.embed), gradients.embed, batch.token_runs)
    if gradients.second is not None:
        add_rows_(_gradient(model.embed2), gradients.second, batch.token_runs)
    if gradients.value is not None:
        tables = _gradient(model.value_embeds).view(model.size.value_tables, model.size.padded_vocab, -1)
        add_rows_(tables, gradients.value.contiguous(), batch.token_runs)
    if table is not None:
        table.keep(batch, gradients.bigram)
    elif gradients.bigram is not None:
        add_rows_(_gradient(model.bigram), gradients.bigram, batch.bigram_runs)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
