"""An experiment's configuration: a JSON file that says what is trained, how often, and against what it is held.

    config = load(Path("tools/experiments/configs/stage_a_screening/palm_screening.json"))
    config.experiment_name, config.seeds(2)

Everything a person can write wrongly is one line with the file, the field, its value and the remedy: no JSON, keys
twice, NaN, 1e400, a word where a number should be, a key that does not exist (the nearest one is named).
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest

LARGEST_FILE = 1 << 20  # bytes
DEFAULT_RUNS = {"A": 2, "B": 3, "C": 5}  # by stage
RUNS_WITHOUT_STAGE = 5
BASELINE_TYPES = ("none", "baseline")
# What the runner says to the trainer itself: a configuration that says it too would be two answers to one question.
RESERVED = ("out_dir", "seed", "auto_resume", "overwrite", "check", "plan", "init_from")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=48)]
Line = Annotated[str, Field(max_length=2000)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Loss = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Value = Annotated[bool | int | float | str, Field(union_mode="left_to_right")]


class Strict(BaseModel):
    """No key that is not declared, no text for a number, nothing changed afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StageConfig(Strict):
    """What a stage changes: the trainer gets it as STAGE_NUM_ITERATIONS and so on."""

    num_iterations: Steps | None = None
    warmdown_iters: Annotated[int, Field(ge=0, le=10**9)] | None = None
    batch_size: Steps | None = None
    device_batch_size: Steps | None = None
    val_loss_every: Annotated[int, Field(ge=0, le=10**9)] | None = None


class ExperimentConfig(Strict):
    """One variant at one stage."""

    experiment_name: Name
    description: Line = ""
    script: Annotated[str, Field(min_length=1, max_length=300)]
    stage: Annotated[str, Field(pattern=r"^[ABC](_[A-Za-z0-9_]*)?$", max_length=40)] | None = None
    n_gpus: Annotated[int, Field(ge=0, le=1024)] = 1
    n_runs: Annotated[int, Field(ge=1, le=1000)] | None = None
    base_seed: Annotated[int, Field(ge=0, le=2**31 - 2001)] = 42
    target_val_loss: Loss | None = None
    baseline_val_loss: Loss | None = None
    baseline_std: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    modification_type: Annotated[str, Field(max_length=100)] = "none"
    modification_details: Line = ""
    hyperparameters: dict[str, Value] = Field(default_factory=dict)
    stage_config: StageConfig = Field(default_factory=StageConfig)

    @field_validator("description", "script", "modification_type", "modification_details")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if not text.isprintable():
            raise ValueError("holds a line break or a character that cannot be seen; write plain text")
        return text

    @field_validator("hyperparameters")
    @classmethod
    def _flags(cls, values: dict[str, Value]) -> dict[str, Value]:
        for name, value in values.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
                raise ValueError(f"{_shown(name)} is not a flag's name: letters, digits and _")
            if name in RESERVED:
                raise ValueError(f"{name!r} is set by the runner; leave it out")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name!r} is not a finite number")
            if isinstance(value, str) and (len(value) > 2000 or not value.isprintable()):
                raise ValueError(f"{name!r} holds a line break or a character that cannot be seen")
        return values

    @property
    def letter(self) -> str:
        """A, B, C, or "" without a stage."""
        return (self.stage or "")[:1]

    @property
    def is_baseline(self) -> bool:
        """Whether this is what the variants are held against."""
        plain = self.hyperparameters.get("variant", "baseline") == "baseline"
        return plain and self.modification_type.lower() in BASELINE_TYPES

    @property
    def variant(self) -> str:
        """What tells this experiment from others of its stage: equal for the same variant at every stage."""
        flags = {key: value for key, value in self.hyperparameters.items() if key != "notes"}
        return json.dumps([Path(self.script).name, flags], sort_keys=True)

    @property
    def label(self) -> str:
        """The variant in a word, for tables."""
        if self.is_baseline:
            return "baseline"
        bare = re.sub(r"^nanogpt_|_(screening|validation|full|[abc])$", "", self.experiment_name)
        return str(self.hyperparameters.get("variant", bare)).removesuffix(".py").rpartition("/")[2]

    def runs(self, asked: int | None = None) -> int:
        """How many seeds: as asked, as the file says, else what the stage is made for."""
        return asked or self.n_runs or DEFAULT_RUNS.get(self.letter, RUNS_WITHOUT_STAGE)

    def seeds(self, asked: int | None = None) -> list[int]:
        """The seed of each run: base_seed + run."""
        return [self.base_seed + run for run in range(self.runs(asked))]

    def as_json(self) -> dict[str, Any]:
        """What is written down: the keys as people know them, without those that were not given."""
        return self.model_dump(exclude_none=True)


def load(path: Path) -> ExperimentConfig:
    """The configuration in `path`, or UserError with one line."""
    try:
        if not path.is_file():
            raise UserError(
                f"{path}: there is no such configuration; tools/experiments/configs holds thirteen"
            )
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{_shown(str(path))}: cannot be read: {getattr(error, 'strerror', error)}") from None
    return parse(data, path)


def parse(data: bytes, path: Path) -> ExperimentConfig:
    """The configuration in `data`; `path` is for the messages."""
    value = read_json(data, path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object of settings ({{...}}), found {_kind(value)}")
    try:
        return ExperimentConfig.model_validate(value)
    except ValidationError as error:
        _explain(error, path)


def read_json(data: bytes, path: Path) -> object:
    """Strict JSON: no NaN, no Infinity, no number beyond a float, no key twice, at most 1 MB. UserError else."""
    if len(data) > LARGEST_FILE:
        raise UserError(f"{path}: larger than {LARGEST_FILE} bytes; a configuration is a few lines")
    if not data.strip():
        raise UserError(f"{path}: is empty; tools/experiments/configs holds configurations to copy")
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_no_key_twice,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a configuration has two levels") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{_shown(key)}: stands there twice; keep one")
        found[key] = value
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}: is not JSON and not a number to train with; write a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{_shown(text)}: is beyond the largest number; write a finite number")
    return number


def _short(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{_shown(text)}: is too large a number")
    return int(text)


def _explain(error: ValidationError, path: Path) -> NoReturn:
    """The first mistake as one line."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"] if part not in ("bool", "int", "float", "str")]
    name = ".".join(place)
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        inside = place[0] == "stage_config" and len(place) > 1
        known = list((StageConfig if inside else ExperimentConfig).model_fields)
        raise UserError(
            f"{path}: {_shown(name)}: unknown key{nearest(place[-1], known)} (there are: {', '.join(known)})"
        )
    if kind == "missing":
        raise UserError(f"{path}: {name}: is missing; it has no default, so add it")
    raise UserError(f"{path}: {_shown(name)}: {_shown(value)}: {_problem(first)}")


def _problem(first: Any) -> str:
    """pydantic's finding in this project's words."""
    words = {
        "int_type": "expected a whole number",
        "float_type": "expected a number",
        "string_type": "expected text",
        "bool_type": "expected true, false, a number or text",
        "dict_type": "expected an object ({...})",
        "model_type": "expected an object ({...})",
        "model_attributes_type": "expected an object ({...})",
        "string_too_long": f"longer than {first.get('ctx', {}).get('max_length')} characters",
        "string_too_short": "is empty; write it out",
        "finite_number": "expected a finite number",
    }
    kind = first["type"]
    if kind == "string_pattern_mismatch":
        stage = "stage" in first["loc"]
        return (
            "expected A, B or C, or such as A_screening"
            if stage
            else "only letters, digits and . _ - are allowed, the first a letter or digit"
        )
    if kind in words:
        return words[kind]
    text = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(value: object) -> str:
    """A value in a message: printable, on one line, at most 60 characters."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    text = text if text and text.isprintable() else ascii(text)
    return text if len(text) <= 60 else text[:57] + "..."
