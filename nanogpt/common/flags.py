"""A frozen dataclass is the command line: one declaration a knob, `--name=value` as nanoGPT's users know it.

    @dataclass(frozen=True)
    class Config:
        batch_size: int = knob(12, "sequences in one micro-step on one GPU", low=1)

    config = parse(Config, argv, prog="train.py", description=__doc__)

Standard library only, so that `--help` costs milliseconds and every mistake is reported before torch is
imported. argparse carries it rather than tyro, because a mistake must come out as one line that names the
nearest flag.
"""

import argparse
import ast
import dataclasses
import difflib
import math
import operator
import os
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from nanogpt.common.errors import UserError

TRUE_WORDS, FALSE_WORDS = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
LARGEST_PRESET_NUMBER = 1e30  # a preset cannot ask for 9**9**9 either
LARGEST_PRESET_BYTES = 1 << 16


def knob(
    default: object,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    any_text: bool = False,
) -> typing.Any:
    """A dataclass field with its help text and legal values: `low <= value <= high`, or one of `choices`.

    `any_text` allows line breaks and other control characters, for text that names nothing.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "any_text": any_text}
    return dataclasses.field(default=default, metadata=metadata)


def words(help: str, metavar: str) -> typing.Any:
    """A dataclass field, `tuple[str, ...]`, for the arguments that are no flags; for commands without presets."""
    return dataclasses.field(default=(), metadata={"help": help, "words": metavar})


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def convert(field: dataclasses.Field, value: object, spelled: str) -> object:
    """`value` (text of a flag, or a literal of a preset) as the field's type; UserError names it as `spelled`."""
    kind, optional = _kind(field)
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if isinstance(value, bool) and str(value) in (field.metadata.get("choices") or ()):
        value = str(value)  # nanoGPT's presets say compile = False, a knob that also takes "auto" here
    try:
        converted = _CONVERTERS[kind](value)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{spelled}={_shown(value)}: expected {_EXPECTED[kind]}") from None
    meta = field.metadata
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UserError(f"{spelled}={_shown(value)}: expected a finite number")
    if meta.get("low") is not None and converted < meta["low"]:
        raise UserError(f"{spelled}={_shown(value)}: must be at least {meta['low']}")
    if meta.get("high") is not None and converted > meta["high"]:
        raise UserError(f"{spelled}={_shown(value)}: must be at most {meta['high']}")
    if meta.get("choices") and converted not in meta["choices"]:
        raise UserError(
            f"{spelled}={_shown(value)}: expected one of {', '.join(meta['choices'])}"
            f"{nearest(str(value), meta['choices'])}"
        )
    names_something = isinstance(converted, str) and not meta.get("any_text")
    if names_something and any(ord(char) < 32 or ord(char) == 127 for char in converted):
        raise UserError(f"{spelled}={_shown(value)}: control characters are not allowed here")
    return converted


def parse(
    cls: type,
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    presets: Path | None = None,
) -> typing.Any:
    """An instance of the dataclass `cls` from `argv`; see `parse_values`."""
    return cls(**parse_values(cls, argv, prog=prog, description=description, presets=presets))


def parse_values(
    cls: type, argv: Sequence[str], *, prog: str, description: str, presets: Path | None = None
) -> dict[str, object]:
    """The fields of the dataclass `cls` that `argv` sets, the others left out.

    Positional arguments are presets (files of `name = literal` lines), looked for as given, then in `presets`.
    Later presets override earlier ones, and flags override presets wherever they stand.
    Raises UserError with one line for whatever it cannot take.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    parser = _parser(fields, prog, description, presets)
    known, unknown = parser.parse_known_intermixed_args([_underscored(word) for word in argv])
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            hint = "" if presets else " (this command takes flags only)"
            raise UserError(f"unexpected argument {word!r}{hint}: flags are written --name=value")
        names = [f"--{name}" for name in fields] + ["--help"]
        raise UserError(f"unknown flag {word}{nearest(word, names)} (all flags: {prog} --help)")
    values = {}
    for preset in getattr(known, "preset", []) or []:
        values.update(read_preset(find_preset(preset, presets), fields))
    for name, field in fields.items():
        text = getattr(known, name)
        if "words" in field.metadata:
            values[name] = tuple(_word(word, field.metadata["words"]) for word in text)
            continue
        if text == []:
            text = "--"  # which argparse takes out of --name=--
        if text is not None:
            values[name] = convert(field, text, f"--{name}")
    return values


def flag_given(argv: Sequence[str], name: str) -> bool:
    """Whether the command line itself sets the knob, rather than a preset."""
    return any(
        word.partition("=")[0].lstrip("-").replace("-", "_") == name for word in argv if word[:2] == "--"
    )


def to_argv(config: object) -> list[str]:
    """The flags that make `config` again: what `repro` and a resumed run are started with."""
    return [f"--{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)]


def find_preset(name: str, folder: Path | None) -> Path:
    """The file a preset name means: the path, or `<folder>/<name>`, with or without `config/` and `.py`."""
    candidates = [Path(name)]
    if folder is not None:
        bare = name.removeprefix("./").removeprefix("config/")
        candidates += [folder / bare, folder / f"{bare}.py"]
    for path in candidates:
        if os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises for a name that is too long)
            return path
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__") if folder else []
    raise UserError(
        f"preset {_shown(name)!r} does not exist{nearest(name.removeprefix('config/').removesuffix('.py'), known)}"
        + (f" (there are: {', '.join(known)})" if known else "")
    )


def read_preset(path: Path, fields: dict[str, dataclasses.Field]) -> dict[str, object]:
    """The values a preset sets. The file is read as data, never run: `name = literal` lines and arithmetic.

    nanoGPT's own config files read as they are, but for `finetune_shakespeare.py`, which imports a module.
    """
    try:
        if path.stat().st_size > LARGEST_PRESET_BYTES:
            raise UserError(f"{path}: larger than {LARGEST_PRESET_BYTES} bytes; a preset is a few lines")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about escapes in strings
            tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (RecursionError, MemoryError):
        raise UserError(f"{path}: not a preset: nested too deeply") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{path}:{getattr(error, 'lineno', 1)}: not a preset: {getattr(error, 'msg', error)}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    values: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        where = f"{path}:{node.lineno}"
        if not (
            isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ):
            raise UserError(
                f"{where}: a preset holds only lines of the form name = value; it is read, never run"
            )
        name = node.targets[0].id
        if name not in fields:
            raise UserError(f"{where}: unknown setting {_shown(name)!r}{nearest(name, list(fields))}")
        try:
            literal = _literal(node.value, values, where)
        except RecursionError:
            raise UserError(f"{where}: {name}: nested too deeply") from None
        values[name] = convert(fields[name], literal, f"{where}: {name}")
    return values


_ARITHMETIC: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def _literal(node: ast.expr, values: dict[str, object], where: str) -> object:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | bool | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _literal(node.operand, values, where)
        if isinstance(operand, int | float):
            return -operand
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _literal(node.left, values, where), _literal(node.right, values, where)
        if isinstance(left, int | float) and isinstance(right, int | float):
            try:
                result = _ARITHMETIC[type(node.op)](left, right)
            except ZeroDivisionError:
                raise UserError(f"{where}: division by zero") from None
            except OverflowError:
                raise UserError(f"{where}: a number is too large") from None
            if abs(result) <= LARGEST_PRESET_NUMBER:
                return result
    try:
        text = ast.unparse(node)[:60]
    except (RecursionError, ValueError):  # ValueError: an integer of more digits than Python prints
        text = type(node).__name__
    raise UserError(f"{where}: {text!r} is not a number, a string, True, False, None or + - * / of those")


def _kind(field: dataclasses.Field) -> tuple[type, bool]:
    """The field's type without `| None`, and whether None is allowed."""
    if isinstance(field.type, types.UnionType):
        inner = [kind for kind in typing.get_args(field.type) if kind is not types.NoneType]
        return inner[0], True
    return field.type, False


def _as_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError


def _as_int(value: object) -> int:
    """Whole numbers however they are written: 5000, 5_000, 5e3."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if not (isinstance(value, float) and math.isfinite(value) and value == int(value)):
        raise ValueError
    return int(value)


def _as_float(value: object) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _as_str(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    value.encode()  # UnicodeEncodeError, a ValueError, for bytes that are not UTF-8: no log could hold them
    return value


def _word(word: str, what: str) -> str:
    try:
        return _as_str(word)
    except ValueError:
        raise UserError(f"{what} {_shown(word)}: expected text") from None


_CONVERTERS = {bool: _as_bool, int: _as_int, float: _as_float, str: _as_str}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _shown(value: object) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    return (repr(text) if not text or not text.isprintable() else text)[:80]


def _underscored(word: str) -> str:
    """`--batch-size` is accepted for `--batch_size`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix("argument "))


def _parser(
    fields: dict[str, dataclasses.Field], prog: str, description: str, presets: Path | None
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if presets is not None:
        known = ", ".join(sorted(path.stem for path in presets.glob("*.py") if path.stem != "__init__"))
        parser.add_argument("preset", nargs="*", help=f"preset files, or their names: {known}")
    for name, field in fields.items():
        if "words" in field.metadata:
            parser.add_argument(name, nargs="*", metavar=field.metadata["words"], help=field.metadata["help"])
            continue
        kind, _ = _kind(field)
        default = "" if field.default in (None, "") else f" (default {field.default})"
        choices = f" [{', '.join(field.metadata['choices'])}]" if field.metadata.get("choices") else ""
        parser.add_argument(
            f"--{name}",
            nargs="?" if kind is bool else None,
            const="true" if kind is bool else None,
            metavar={bool: "BOOL", int: "INT", float: "NUM", str: "TEXT"}[kind],
            help=(field.metadata.get("help", "") + choices + default).replace("%", "%%"),
        )
    return parser
