"""The command line: one declaration a knob, in all the spellings that nanoGPT's users know."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.common.errors import UserError
from nanogpt.common.flags import knob, parse, parse_values, read_preset, to_argv


@dataclass(frozen=True)
class Example:
    """Every kind of knob."""

    steps: int = knob(5, "a whole number", low=0, high=10**9)
    rate: float = knob(0.5, "a number", low=0.0, high=1.0)
    name: str = knob("x", "a name")
    text: str = knob("", "any text", any_text=True)
    check: bool = knob(False, "a switch")
    mode: str = knob("auto", "one of several", choices=("auto", "True", "False"))
    limit: int | None = knob(None, "a number or none")


def ask(*argv: str, presets: Path | None = None) -> Example:
    """Parse a command line."""
    return parse(Example, argv, prog="example", description="An example.", presets=presets)


@pytest.mark.parametrize(("argv", "name", "value"), [
    (["--steps=7"], "steps", 7),
    (["--steps", "7"], "steps", 7),
    (["--steps=5e3"], "steps", 5000),
    (["--steps=5_000"], "steps", 5000),
    (["--steps=5.0"], "steps", 5),
    (["--steps=1", "--steps=2"], "steps", 2),
    (["--rate=1"], "rate", 1.0),
    (["--rate=1e-4"], "rate", 1e-4),
    (["--rate", ".5"], "rate", 0.5),
    (["--name=a=b"], "name", "a=b"),
    (["--name="], "name", ""),
    (["--name", "with space"], "name", "with space"),
    (["--name=--steps=3"], "name", "--steps=3"),
    (["--text=a\nb"], "text", "a\nb"),
    (["--check"], "check", True),
    (["--check=true"], "check", True),
    (["--check=True"], "check", True),
    (["--check=1"], "check", True),
    (["--check=no"], "check", False),
    (["--check", "--steps=3"], "check", True),
    (["--mode=False"], "mode", "False"),
    (["--limit=3"], "limit", 3),
    (["--limit=none"], "limit", None),
])  # fmt: skip
def test_spellings(argv, name, value):
    found = getattr(ask(*argv), name)
    assert found == value
    assert type(found) is type(value)


def test_hyphens_are_underscores_in_names_only():
    @dataclass(frozen=True)
    class Two:
        batch_size: int = knob(1, "a number")
        out_dir: str = knob("", "a folder")

    found = parse(Two, ["--batch-size=3", "--out-dir=a-b"], prog="two", description="")
    assert (found.batch_size, found.out_dir) == (3, "a-b")


def test_only_what_was_given_is_returned():
    values = parse_values(Example, ["--steps=5", "--check"], prog="example", description="")
    assert values == {"steps": 5, "check": True}


def test_flags_override_presets_wherever_they_stand(tmp_path):
    (tmp_path / "one.py").write_text('"""Doc."""\nsteps = 10\nrate = 0.25\nname = "one"\n')
    (tmp_path / "two.py").write_text("rate = 0.75  # later presets override earlier ones\n")
    assert ask("one", "--steps=1", "two", presets=tmp_path) == Example(steps=1, rate=0.75, name="one")
    assert ask("--steps=1", "config/one.py", "two.py", presets=tmp_path) == Example(
        steps=1, rate=0.75, name="one"
    )
    assert ask(str(tmp_path / "one.py"), presets=tmp_path).steps == 10


def test_a_preset_may_calculate_and_refer_to_itself(tmp_path):
    path = tmp_path / "preset.py"
    path.write_text(
        "steps = 5 * 8 + 2\nlimit = steps // 2\nrate = 1 / 4\nname = 'a'\ncheck = True\nmode = False\n"
    )
    values = read_preset(path, {field.name: field for field in fields(Example)})
    assert values == {"steps": 42, "limit": 21, "rate": 0.25, "name": "a", "check": True, "mode": "False"}


def test_nothing_in_a_preset_runs(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "preset.py"
    for text in (f"open({str(canary)!r}, 'w')", f"name = str(open({str(canary)!r}, 'w'))",
                 f"import os; os.mkdir({str(canary)!r})", f"name = f'{{open({str(canary)!r}, \"w\")}}'"):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=r"preset\.py:1: "):
            read_preset(path, {field.name: field for field in fields(Example)})
    assert not canary.exists()


NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30)
EXAMPLES = st.builds(
    Example, steps=st.integers(0, 10**9), rate=st.floats(0, 1), name=NAMES, check=st.booleans(),
    text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30),
    mode=st.sampled_from(["auto", "True", "False"]), limit=st.none() | st.integers(-9, 9),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(EXAMPLES)
def test_to_argv_and_back(example):
    assert ask(*to_argv(example)) == example


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.text(max_size=40) | st.sampled_from(["--steps=", "--", "-", "--check", "--rate=1e999", "=", "--="])
    )
)
def test_whatever_is_typed_there_is_an_answer(argv):
    """A value, help, or one line: nothing else comes out."""
    try:
        assert isinstance(ask(*argv), Example)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 400
    except SystemExit as leaving:
        assert leaving.code == 0
        assert any(word.startswith(("-h", "--h")) for word in argv)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: f"steps = {text}".encode(errors="replace"))
)
def test_whatever_is_in_a_preset_there_is_an_answer(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_bytes(data)
    try:
        values = read_preset(path, {field.name: field for field in fields(Example)})
        assert set(values) <= {field.name for field in fields(Example)}
    except UserError as error:
        assert str(error).startswith(f"{path}:")


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as leaving:
        ask("--help")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Example):
        assert f"--{field.name}" in text
        assert field.metadata["help"] in text
    assert "(default 5)" in text
