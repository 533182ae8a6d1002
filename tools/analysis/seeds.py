"""`engaging seeds`: how many seeds a question needs, before the first run; and when it is allowed to stop early.

    engaging seeds --want=0.002                      # losses that scatter by 0.0013 over seeds, as track 3 assumes
    engaging seeds --want=0.002 --sd=0.0016          # or as your own baseline scatters (engaging analyze says)
    engaging seeds --runs=5                          # what can five runs a side show?
    engaging seeds --want=0.002 --looks=4,8,12       # a plan with early looks

Every test is one-sided at p < 0.01. The number of runs is fixed before the first one; with --looks it may end early:
"""

from nanogpt.common.errors import UserError
from tools.analysis import compare, planning, statistics
from tools.args import Parser, whole

CHANCES = (0.5, 0.8, 0.9, 0.95)


def main(argv: list[str]) -> int:
    """The command."""
    rule = (planning.__doc__ or "").partition("\n\n")[2]
    parser = Parser("seeds", (__doc__ or "") + "\n" + rule)
    parser.add_argument(
        "--want", type=compare.positive("--want"), metavar="LOSS", help="the difference to see"
    )
    parser.add_argument(
        "--sd", type=compare.positive("--sd"), metavar="LOSS", default=statistics.TRACK3_SIGMA,
        help=f"deviation over seeds (default {statistics.TRACK3_SIGMA:g}, for losses near 3.28)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=whole("--runs", 2, 1000), metavar="N", help="runs a side: what do they show?"
    )
    parser.add_argument("--looks", type=compare.looks, default=(), metavar="N,N,...", help="planned looks")
    args = parser.read(argv)
    if args.want is None and args.runs is None and not args.looks:
        raise UserError("engaging seeds: nothing is asked; say --want=0.002, or --runs=5, or --looks=4,8,12")
    lines = [f"losses scatter by {args.sd:g} over seeds; one-sided tests at p < {statistics.ALPHA:g}"]
    if args.want is not None:
        lines += ["", *needed(args.want, args.sd)]
    if args.runs is not None:
        lines += ["", *shown(args.runs, args.sd)]
    if args.looks:
        lines += ["", *levels(args.looks)]
    print("\n".join(lines))
    return 0


def needed(want: float, sd: float) -> list[str]:
    """The numbers of runs that see a difference of `want`, by the chance to see it."""
    lines = [
        f"runs that see a difference of {want:g}, if it is there:",
        "  chance   two variants, a side   mean below a target",
    ]
    for chance in CHANCES:
        counts = [
            planning.runs_needed(kind, want, sd, wanted=chance) for kind in ("two-sample", "one-sample")
        ]
        words = [f"more than {planning.MOST_RUNS}" if count is None else str(count) for count in counts]
        lines.append(f"  {chance:6.0%}   {words[0]:>20}   {words[1]:>19}")
    return lines


def shown(runs: int, sd: float) -> list[str]:
    """The smallest differences that this many runs see."""
    lines = [f"what {runs} runs see:", "  chance   two variants, a side   mean below a target"]
    for chance in CHANCES:
        found = [
            planning.smallest_difference(kind, runs, sd, wanted=chance)
            for kind in ("two-sample", "one-sample")
        ]
        lines.append(f"  {chance:6.0%}   {found[0]:>20.4f}   {found[1]:>19.4f}")
    return lines


def levels(looks: tuple[int, ...]) -> list[str]:
    """The level of each planned look."""
    lines = [
        "looks that were planned before the first run (engaging compare ... --looks):",
        "  runs a side   claim when p <",
    ]
    lines += [f"  {look.runs:>11}   {look.level:>14.2g}" for look in planning.looks(looks)]
    return [
        *lines,
        "Looking at other times, or adding runs after the last look, makes the p-values worthless.",
    ]
