"""What fits into a GPU: lanes, and the table of hashed n-grams; what the table costs, what a smaller one costs.

Standard library only. `--lanes=0` and `--table_rows=auto` become numbers once, from the memory of the GPUs, before a
run is opened; its config.json keeps them, so a resume trains the same lanes and table, on another GPU too.
"""

import os
from dataclasses import replace

from modded_nanogpt import layer_plan, schedule
from modded_nanogpt.config import LANES, Config, lane_count, lane_tokens
from nanogpt.common.errors import UserError

ROW_STATE = 8  # bytes beside each row: its second moment and its last event
ENTRY_STATE = (
    52  # bytes beside each row of gradients: rows and signs of two halves, sorted ones and their order
)
WHOLE_ROWS = 1_000_000  # `auto` takes a multiple of so many
CPU_ROWS = 65_536  # what `auto` takes where there is no GPU, of the record's table
# What a rank needs besides the table: whatever its lanes (with the processes that compile ahead), and for lanes as
# large as the record's. An H200 had 21.3 GiB of tensors at once besides the table, and 10 more in pieces and contexts.
OTHER_GIB, LANES_GIB = 9.0, 25.0
MOST_OTHERS = 0.6  # of the memory that may go to what is not the table before lanes are made smaller
LANE_COUNTS = (LANES, 2 * LANES, 4 * LANES)  # that `--lanes=0` chooses from
KEPT_BACK = 0.04  # of the memory: the driver's, and pieces too small to use
SAVED_ROWS = 2_000_000  # of a table that checkpoints hold without --save_table


def settle(config: Config, world_size: int, memory: int | None) -> Config:
    """`config` with numbers of lanes and of rows instead of 0 and `auto`. UserError for rows that do not fit.

    memory: bytes of the smallest GPU that a rank has; None where there is none.
    """
    if memory is not None and not config.lanes and config.recipe not in layer_plan.CPU_RECIPES:
        config = replace(config, lanes=_fewest_lanes(memory))
    if config.table_rows == "auto":
        return replace(config, table_rows=str(_most_rows(config, world_size, memory)))
    if memory is None:
        where, needed = "this machine", world_size * share_bytes(config, world_size, itemsize=4)
        memory = room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        most = CPU_ROWS
    else:
        where, needed = f"each of {world_size} GPUs", share_bytes(config, world_size)
        room = _room(config, world_size, memory)
        most = _most_rows(replace(config, table_rows="auto"), world_size, memory)
    if layer_plan.table_rows(config) and needed > room:
        raise UserError(
            f"--table_rows={config.table_rows}: its {needed / 2**30:,.1f} GiB on {where} do not fit beside the rest of "
            f"the run, which leaves {max(0.0, room) / 2**30:.1f} of {memory / 2**30:.1f} GiB; --table_rows={most} "
            "does, and so does auto"
        )
    return config


def _most_rows(config: Config, world_size: int, memory: int | None) -> int:
    """What `auto` takes: the recipe's own number, or as many as the GPUs have room for."""
    wanted = layer_plan.table_rows(config)
    if not wanted or config.recipe in layer_plan.CPU_RECIPES:
        return wanted
    if memory is None or config.device == "cpu" or config.smoke:
        return min(wanted, CPU_ROWS)
    fits = int(world_size * _room(config, world_size, memory) / (row_bytes(config, 2) + ROW_STATE))
    return min(wanted, max(WHOLE_ROWS, fits - fits % WHOLE_ROWS))


def _fewest_lanes(memory: int) -> int:
    """What `--lanes=0` takes: the record's eight, or more and smaller ones where those would leave no room."""
    fits = (lanes for lanes in LANE_COUNTS if _others_gib(lanes) * 2**30 <= MOST_OTHERS * memory)
    return next(fits, LANE_COUNTS[-1])


def _others_gib(lanes: int) -> float:
    """What a rank needs besides the table."""
    return OTHER_GIB + LANES_GIB * LANES / lanes


def _room(config: Config, world_size: int, memory: int) -> float:
    """Bytes of a GPU that rows of the table may have."""
    others = _others_gib(lane_count(config)) * 2**30
    return memory * (1 - KEPT_BACK) - others - cycle_bytes(config, world_size)


def row_bytes(config: Config, itemsize: int = 2) -> int:
    """Of one row; itemsize: of a number, 2 on a GPU and 4 on a CPU."""
    return layer_plan.size(config).width * itemsize


def share_bytes(config: Config, world_size: int, itemsize: int = 2) -> int:
    """Of one rank's rows and their state."""
    share = -(-layer_plan.table_rows(config) // world_size)
    return share * (row_bytes(config, itemsize) + ROW_STATE)


def cycle_tokens(config: Config, world_size: int) -> int:
    """The most tokens that a rank has between two events, whose gradients wait for the second one."""
    most = waiting = 0
    ends = 4 * config.adam_every  # at both ends of a stage are cycles of every kind that it has
    for stage in schedule.stages(config):
        steps = range(stage.start, stage.end)
        for step in steps if len(steps) <= 2 * ends else [*steps[:ends], *steps[-ends:]]:
            waiting += stage.batch_tokens
            if step == stage.end - ends:
                waiting = stage.batch_tokens  # what lies between is left out
            most = max(most, waiting)
            if schedule.table_event(config, step):
                waiting = 0
    return most // world_size


def fetched_tokens(config: Config) -> tuple[int, ...]:
    """Of everything whose rows come from other ranks at once: lanes, and a slice of the validation."""
    return (*lane_tokens(config), config.eval_slice)


def cycle_bytes(config: Config, world_size: int, itemsize: int = 2) -> int:
    """Of what a rank keeps and sends of a cycle's gradients."""
    if not layer_plan.table_rows(config):
        return 0
    tokens, row = cycle_tokens(config, world_size), row_bytes(config, itemsize)
    sent = 0 if world_size == 1 else 4 * tokens * row + 2 * max(fetched_tokens(config)) * row
    return tokens * (row + ENTRY_STATE) + sent


def describe(config: Config, world_size: int, itemsize: int) -> list[str]:
    """Lines for the log: why the run is longer than its recipe, the table and what it costs; none without a table."""
    rows = layer_plan.table_rows(config)
    if not rows:
        return []
    share, cycle = share_bytes(config, world_size, itemsize), cycle_bytes(config, world_size, itemsize)
    each = "" if world_size == 1 else f", {world_size} ranks have equal shares"
    line = (
        f"n-gram table: {rows:,} rows{each}; {share / 2**30:.2f} GiB of rows and state, {cycle / 2**30:.2f} GiB for "
        f"the gradients between two updates; checkpoints hold it: {str(is_saved(config)).lower()}"
    )
    return [*filter(None, [_longer(config)]), line]


def _longer(config: Config) -> str:
    """Why the run has more steps than its recipe; "" when it has not."""
    usual, steps = schedule.STAGES[config.recipe].steps, schedule.scheduled_steps(config)
    if config.steps or steps == usual:
        return ""
    total, rows = schedule.total_steps(config), layer_plan.table_rows(config)
    return (
        f"{total - steps + usual:,} -> {total:,} steps: the table has {rows / 1e6:.3g} M rows, the record's "
        f"{layer_plan.SIZES[config.recipe].table_rows / 1e6:.3g} M; --steps={usual} keeps the record's number"
    )


def is_saved(config: Config) -> bool:
    """Whether checkpoints in the middle of the run hold the table; without it they would be worth nothing."""
    return config.save_table or layer_plan.table_rows(config) <= SAVED_ROWS
