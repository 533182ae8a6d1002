"""argparse as these tools use it: a mistake is one line that names the nearest flag, and exit status 2."""

import argparse
import re
import shutil
import sys
import textwrap
import typing

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_MINUTES = 365 * 24 * 60
_TIME_UNITS = {"d": 1440, "h": 60, "m": 1, "s": 1 / 60}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, suggests the nearest flag and never abbreviates."""

    def __init__(self, prog: str, description: str, **options: typing.Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=f"engaging {prog}", description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}")

    def read(self, argv: list[str]) -> argparse.Namespace:
        """The parsed arguments, or UserError."""
        known, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].split("=")[0]
            flags = [text for action in self._actions for text in action.option_strings]
            kind = "flag" if word.startswith("-") else "argument"
            raise UserError(
                f"{self.prog}: unknown {kind} {_shown(word)}{nearest(word, flags)} (all: {self.prog} --help)"
            )
        return known


def _shown(text: str) -> str:
    return (text if text.isprintable() else repr(text))[:80]


def name_of(flag: str) -> typing.Callable[[str], str]:
    """A type for values that become part of file names and of the batch script: `[A-Za-z0-9._-]{1,64}`."""

    def check(text: str) -> str:
        if not NAME.fullmatch(text):
            raise UserError(
                f"{flag}={_shown(text)!r}: only letters, digits and . _ - are allowed, "
                "at most 64, the first a letter or digit"
            )
        return text

    return check


def list_of_names(flag: str) -> typing.Callable[[str], str]:
    """Names separated by commas (`--partition=mit_normal_gpu,mit_preemptable`)."""
    one = name_of(flag)
    return lambda text: ",".join(one(part) for part in text.split(","))


def whole(flag: str, low: int, high: int) -> typing.Callable[[str], int]:
    """A type for whole numbers in a range."""

    def check(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise UserError(f"{flag}={_shown(text)!r}: expected a whole number from {low} to {high}")
        return int(text)

    return check


def minutes(flag: str) -> typing.Callable[[str], int]:
    """A type for durations: 90 (minutes, as SLURM reads it), 6h, 1d12h, 45m, 06:00:00, 2-00:00:00.

    Returns whole minutes, rounded up.
    """

    def check(text: str) -> int:
        value = parse_minutes(text)
        if value is None or not 0 < value <= MAX_MINUTES:
            raise UserError(
                f"{flag}={_shown(text)!r}: expected a duration such as 6h, 90m, 1d12h, 06:00:00 or 2-00:00:00"
            )
        return value

    return check


def memory(text: str) -> str:
    """A type for amounts of memory as SLURM writes them."""
    from tools.site.slurm import memory_mb

    if not memory_mb(text):
        raise UserError(f"--mem={text[:40]!r}: expected an amount such as 64G or 500000M")
    return text


def add_request(parser: Parser, without: tuple[str, ...] = (), **helps: str) -> None:
    """What a job asks for, as options: the same for every command that plans, starts or queues one.

    `without`: names that this command does not take. `helps`: other words for an option's help, by its name.
    """
    for name, kind, default, text in (
        ("gpus", whole("--gpus", 0, 1024), 1, "GPUs on each node (default 1)"),
        ("gpu-type", name_of("--gpu-type"), None, "h200, h100, l40s ...; default: what starts first"),
        ("time", minutes("--time"), None, "time limit of one job: 6h, 90m, 2-00:00:00"),
        ("nodes", whole("--nodes", 1, 1024), 1, "nodes (default 1)"),
        ("cpus", whole("--cpus", 1, 4096), None, "CPUs on each node; default: the site's figure"),
        ("mem", memory, None, "memory on each node, such as 64G; default: the site's figure"),
        ("partition", list_of_names("--partition"), None, "default: the one that starts first"),
        ("account", name_of("--account"), None, "whom SLURM charges"),
        ("qos", name_of("--qos"), None, "name it together with --account"),
        ("reservation", name_of("--reservation"), None, "a reservation of yours"),
    ):
        if name not in without:
            parser.add_argument(
                f"--{name}", type=kind, default=default, help=helps.get(name.replace("-", "_"), text)
            )


def parse_minutes(text: str) -> int | None:
    """A duration as minutes, rounded up; None for UNLIMITED, empty or unreadable text.

    SLURM's own forms and 6h/90m/1d12h.
    """
    text = text.strip().lower()
    if re.fullmatch(r"([0-9]{1,6}(\.[0-9]{1,3})?[dhms])+", text):
        total = sum(float(n) * _TIME_UNITS[u] for n, _, u in re.findall(r"([0-9]+(\.[0-9]+)?)([dhms])", text))
        return int(-(-total // 1))
    match = re.fullmatch(
        r"(?:([0-9]{1,6})-)?([0-9]{1,6})(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?(?:\.[0-9]+)?", text
    )
    if not match:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:  # D-H[:M[:S]]
        hours, mins, secs = (*numbers, 0, 0)[:3]
        return int(days) * 1440 + hours * 60 + mins + (secs > 0)
    if len(numbers) == 3:  # H:M:S
        return numbers[0] * 60 + numbers[1] + (numbers[2] > 0)
    return numbers[0] + (len(numbers) == 2 and numbers[1] > 0)  # M[:S]


def folded(text: str, hang: int = 0) -> str:
    """Text for this terminal: broken between words, further lines `hang` columns to the right; as it is in a file."""
    if not sys.stdout.isatty():
        return text
    width = max(20, shutil.get_terminal_size().columns)
    return textwrap.fill(
        text,
        width,
        subsequent_indent=" " * min(hang, width // 3),
        break_long_words=False,
        break_on_hyphens=False,
    )


def counted(count: int, noun: str) -> str:
    """`1 GPU`, `2 GPUs`, `no GPU`."""
    return f"{count or 'no'} {noun}{'s' * (count > 1)}"


def clock(minutes: float) -> str:
    """Minutes as SLURM writes a time limit: 06:00:00, 2-00:00:00."""
    total = int(minutes)
    days, rest = divmod(total, 1440)
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00" if days else f"{rest // 60:02}:{rest % 60:02}:00"


def spoken(minutes: int) -> str:
    """Minutes as nobody mistakes them: `4 minutes`, `4 h`."""
    return counted(minutes, "minute") if minutes < 60 else words(minutes)


def words(minutes: float) -> str:
    """Minutes for people: `6 h`, `45 min`, `1 d 12 h`, `< 1 min`."""
    total = round(minutes)
    if total < 1:
        return "< 1 min"
    if total < 60:
        return f"{total} min"
    days, rest = divmod(total, 1440)
    parts = [f"{days} d"] if days else []
    parts += [f"{rest // 60} h"] if rest >= 60 else []
    parts += [f"{rest % 60} min"] if rest % 60 and not days else []
    return " ".join(parts)
