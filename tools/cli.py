"""`engaging <command>`: one door to the tools around a run.

Each command is one module with `main(argv) -> exit status`, imported only when it is called, so that
`--help` costs milliseconds and a missing optional package breaks the command that needs it and no other.
"""

import importlib

from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import nearest

# name: (module, one line for --help). The groups are in the order in which a newcomer meets them.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "before a job": {
        "next": ("tools.site.ladder", "what is done, and the one next command; --lab: how far your group is"),
        "doctor": (
            "tools.site.doctor",
            "check this machine, this account and this environment; each finding has its fix",
        ),
        "plan": (
            "tools.site.plan",
            "what can I have: partitions, limits, expected start, GPU-hours, waves of seeds",
        ),
        "config": (
            "tools.site.settings",
            "your account, paths, board, mail: each value and where it comes from",
        ),
        "site": ("tools.site.profile", "which cluster this is, and `site init` for a new one"),
    },
    "jobs": {
        "launch": (
            "tools.launch.command",
            "submit a run or an array of seeds (or start it here, without SLURM)",
        ),
        "shell": (
            "tools.launch.shell",
            "a shell on a compute node, in the repository, with the environment on",
        ),
        "status": (
            "tools.launch.manage:status",
            "the state of a run by its name, days later, from any shell",
        ),
        "logs": ("tools.launch.manage:logs", "a run's log, all attempts; -f follows it"),
        "cancel": ("tools.launch.manage:cancel", "stop a run by its name"),
        "watch": ("tools.site.watch", "one screen: state, step, loss, ETA, GPUs, the log's tail"),
        "why": ("tools.site.why", "why a job waits, whose limit it is, and the flag that would start it"),
        "usage": (
            "tools.site.usage",
            "what a finished job asked for, what it used, what to ask for next time",
        ),
    },
    "after a run": {
        "runs": ("tools.run_list", "the runs that are here: how they ended, what each changed, your note"),
        "plot": ("tools.plot", "the loss curves of one or more runs: a PNG, and drawn in the terminal"),
        "sample": ("tools.sample", "a text from a run's model, whichever trainer made it"),
        "export": ("tools.export", "a run's weights as a GPT-2 that transformers loads"),
        "import": (
            "tools.import_checkpoint",
            "nanoGPT's own ckpt.pt as a run directory, to sample and export",
        ),
        "wandb": ("tools.wandb_follow", "send a run's metrics to Weights & Biases, live or afterwards"),
        "repro": ("tools.repro", "rebuild a run's source from its log, run it again, and compare every loss"),
    },
    "experiments": {
        "experiment": (
            "tools.experiments.command",
            "a study: plan, run, status, resume, promote variants from stage to stage",
        ),
        "seeds": ("tools.analysis.seeds", "how many seeds a question needs, and when it may stop early"),
        "analyze": (
            "tools.analysis.analyze",
            "experiments and runs as a table: losses, intervals, p-values; and as plots",
        ),
        "compare": ("tools.analysis.compare", "did a change help? in words, with the numbers behind them"),
        "report": ("tools.analysis.report", "one self-contained HTML page about experiments or runs"),
        "leaderboard": (
            "tools.leaderboard.command",
            "the lab's board: hand in a result, check one without trusting it, build the page",
        ),
    },
    "to learn and to prove": {
        "selfcheck": (
            "tools.selfcheck",
            "`selfcheck speedrun`: five minutes on one GPU, beside public runs",
        ),
        "drill": (
            "tools.launch.drill",
            "a two-minute job that preempts itself, resumes and compares the losses",
        ),
        "practice": (
            "tools.practice.__main__",
            "a toy SLURM cluster on this machine (Debian or Ubuntu, root)",
        ),
    },
}
COMMANDS = {name: row for group in GROUPS.values() for name, row in group.items()}


def help_text() -> str:
    """What `engaging --help` prints."""
    lines = ["usage: engaging COMMAND [...]      engaging COMMAND --help", ""]
    for title, commands in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {name:11} {text}" for name, (_, text) in commands.items()]
        lines.append("")
    lines.append("First time here: engaging next says what to type.")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run one command. Raises CommandError for what the user can mend."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(
            f"engaging {name}: no such command{nearest(name, list(COMMANDS))} (all: engaging --help)"
        )
    if name != "config" and not {"-h", "--help"} & set(rest):
        importlib.import_module("tools.site.settings").apply()
    module_name, _, function = COMMANDS[name][0].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("tools", "nanogpt"):
            raise UserError(
                f"engaging {name}: this checkout has no {error.name}; update it: git pull"
            ) from None
        raise UserError(
            f"engaging {name}: the package {missing!r} is missing here; bash setup_env.sh, then "
            "source activate_env.sh"
        ) from None
    return getattr(module, function or "main")(rest) or 0


def entry() -> None:
    """What tools/bin/engaging and `python -m tools` call."""
    run_command(main)
