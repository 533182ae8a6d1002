"""The flags that several of the commands take."""

import argparse

from nanogpt.common.errors import UserError
from tools.args import Parser, add_request, whole


def add_execution(parser: Parser) -> None:
    """Where and how the runs are started."""
    add = parser.add_argument
    add(
        "--executor",
        choices=("auto", "local", "slurm"),
        default="auto",
        help="auto: SLURM where a cluster is configured, else this machine",
    )
    add(
        "--one-job",
        action="store_true",
        help="all runs in one process and one compile, seeds of the variants in turn (the trainer's --plan)",
    )
    add_request(parser, without=("gpus", "nodes"), partition="default: the one whose last run ends first")
    add(
        "--throttle", type=whole("--throttle", 1, 10000), help="runs at once; default: what your limits allow"
    )
    add("--no-check", action="store_true", help="skip the trainer's own check of its flags and data")


def options(args: argparse.Namespace) -> dict[str, object]:
    """What of `add_execution` is kept with an experiment, for `resume`."""
    names = ("gpu_type", "time", "cpus", "mem", "partition", "account", "qos", "reservation", "throttle")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def price(text: str) -> dict[str, float]:
    """A type for prices of a GPU-hour: `2.5`, or `h100=2.99,l40s=0.80`. The key "" is any type."""
    found: dict[str, float] = {}
    for part in text.split(","):
        kind, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if (
            not 0 <= value <= 10_000
            or (kind and not kind.replace("_", "").isalnum())
            or kind.lower() in found
        ):
            raise UserError(
                f"--price={text[:60]!r}: expected a GPU-hour's price: 2.5, or by type: h100=2.99,l40s=0.80"
            )
        found[kind.lower()] = value
    return found


def price_of(prices: dict[str, float] | None, kind: str | None) -> float | None:
    """A GPU-hour's price for a type of GPU; None when the user has not said."""
    if not prices:
        return None
    return prices.get((kind or "").lower(), prices.get(""))
