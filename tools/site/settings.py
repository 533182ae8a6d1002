"""`engaging config`: what belongs to a person or a lab and not to a run, where each value comes from.

    engaging config                          every setting, its value and its source
    engaging config set account mit_general  into your own file, ~/.config/engaging/config.toml
    engaging config unset account
    engaging config scratch                  data and checkpoints on the scratch folder, from now on

A setting is looked up in this order: the command's flag, the environment, your file, the lab's file (named by `lab` in
yours or by $ENGAGING_LAB), the table [settings] of the site's file. The first that has it wins.
"""

import argparse
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from nanogpt.common.storage import atomic_write_text, make_folder
from tools.args import Parser, list_of_names, name_of
from tools.place import checkout
from tools.toml import tomllib

MAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,200}")
PRICES = re.compile(r"[A-Za-z0-9_=.,]{1,200}")


def _path(name: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        path = str(Path.home()) + text[1:] if text.startswith("~/") else text
        if not path.startswith("/") or not path.isprintable():
            raise UserError(f"{name}={text[:80]!r}: expected a path that begins with / or ~/")
        return path

    return check


def _matching(name: str, pattern: re.Pattern[str], what: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise UserError(f"{name}={text[:80]!r}: expected {what}")
        return text

    return check


@dataclass(frozen=True)
class Setting:
    """One setting: the variables that may hold it (the first is the one that tools set), its check, its meaning."""

    variables: tuple[str, ...]
    check: Callable[[str], str]
    help: str


SETTINGS = {
    "account": Setting(("ACCOUNT", "SBATCH_ACCOUNT"), name_of("account"), "whom SLURM charges"),
    "qos": Setting(("QOS", "SBATCH_QOS"), name_of("qos"), "name it together with the account"),
    "partition": Setting(
        ("PARTITION", "SBATCH_PARTITION"), list_of_names("partition"), "unset: what starts first"
    ),
    "env_path": Setting(("ENV_PATH",), _path("env_path"), "the Python environment"),
    "data_root": Setting(("DATA_ROOT",), _path("data_root"), "where token shards lie"),
    "board": Setting(("ENGAGING_BOARD",), _path("board"), "the lab's board"),
    "prices": Setting(
        ("ENGAGING_GPU_PRICES",),
        _matching("prices", PRICES, "a GPU-hour's price: 2.5, or by type: h100=2.99,l40s=0.80"),
        "of a GPU-hour, for estimates",
    ),
    "mail": Setting(
        ("ENGAGING_MAIL",), _matching("mail", MAIL, "an address such as you@mit.edu"), "of launch --mail"
    ),
    "lab": Setting(("ENGAGING_LAB",), _path("lab"), "the lab's file with these settings"),
}
FOR_SCHEDULER = (
    "account",
    "qos",
    "partition",
)  # asked for by flags; the rest reaches programs by the environment


@dataclass(frozen=True)
class Value:
    """A setting's value and where it comes from."""

    value: str
    source: str


def user_file() -> Path:
    """Your own file (it need not exist)."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "engaging" / "config.toml"


def read_settings(path: Path, table: str = "") -> dict[str, str]:
    """The settings of a file, checked. Raises UserError that names the file and the key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{path}: not a file of settings: {error}; engaging config --help shows them"
        ) from None
    rows = raw.get(table, {}) if table else raw
    if not isinstance(rows, dict):
        raise UserError(f"{path}: {table}: expected a table [{table}]")
    for key, value in rows.items():
        if key not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise UserError(
                f"{path}: {key}: no such setting{nearest(key, list(SETTINGS))} (there are: {known})"
            )
        if not isinstance(value, str):
            raise UserError(f'{path}: {key}={value!r}: expected text in quotes: {key} = "..."')
        try:
            rows[key] = SETTINGS[key].check(value)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return rows


def lab_file(own: dict[str, str]) -> Path | None:
    """The lab's file, or None. Raises UserError when it is not there or anybody may change it."""
    named = os.environ.get("ENGAGING_LAB") or own.get("lab")
    if not named:
        return None
    path = Path(SETTINGS["lab"].check(named))
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"lab={path}: {error.strerror}; engaging config set lab FILE, or unset it") from None
    if mode & stat.S_IWOTH:  # it names the Python that runs
        raise UserError(f"lab={path}: everybody may write to it; its owner: chmod o-w {path}")
    return path


def from_files(site_file: Path | None = None) -> dict[str, Value]:
    """What your file, the lab's and the site's say; without `site_file`, this cluster's."""
    path = user_file()
    own = read_settings(path) if path.exists() else {}
    found = {key: Value(value, str(path)) for key, value in own.items()}
    if (lab := lab_file(own)) is not None:
        for key, value in read_settings(lab).items():
            found.setdefault(key, Value(value, str(lab)))
    if (site := site_file or _site_with_settings()) is not None:
        for key, value in read_settings(site, "settings").items():
            found.setdefault(key, Value(value, str(site)))
    return found


def _site_with_settings() -> Path | None:
    """This cluster's site file, where one of them has the table [settings]; else SLURM is not even asked."""
    sites = sorted((checkout() / "slurm" / "sites").glob("*.toml"))
    if not any(re.search(r"^\[settings\]", path.read_text(errors="replace"), re.MULTILINE) for path in sites):
        return None
    from tools.site.profile import current_site

    return current_site(checkout()).path


def resolve(site_file: Path | None = None) -> dict[str, Value]:
    """Every setting that has a value, by name; flags, which stand before all this, are the caller's."""
    found = from_files(site_file)
    for key, setting in SETTINGS.items():
        for variable in setting.variables:
            if text := os.environ.get(variable):
                found[key] = Value(setting.check(text), f"${variable}")
                break
    return found


def fill(args: argparse.Namespace, site_file: Path | None, keys: tuple[str, ...] = FOR_SCHEDULER) -> None:
    """Give account, qos and partition the settings' values where no flag gave one."""
    found = resolve(site_file)
    for key in keys:
        if getattr(args, key) is None and key in found:
            setattr(args, key, found[key].value)


def apply() -> None:
    """Put what the files say into this process's environment, where the environment says nothing itself.

    For every command alike: what reads DATA_ROOT needs to know of no file.
    """
    for key, row in from_files().items():
        variables = SETTINGS[key].variables
        if key not in FOR_SCHEDULER and not any(os.environ.get(name) for name in variables):
            os.environ[variables[0]] = row.value


def change(key: str, value: str | None) -> Path:
    """Write one setting into your own file (None: take it out); other lines stay as they are."""
    path = user_file()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if not re.match(rf"\s*{key}\s*=", line)]
    if value is not None:
        if '"' in value or "\\" in value:
            raise UserError(f"{key}={value[:80]!r}: no quotes and no backslashes")
        lines.insert(0, f'{key} = "{value}"')
    text = "\n".join(lines) + "\n"
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}; mend it by hand first") from None
    make_folder(path.parent)
    atomic_write_text(path, text)
    return path


def scratch_folder() -> Path | None:
    """The user's scratch folder, where there is one: $SCRATCH, ~/orcd/scratch (Engaging)."""
    for folder in (os.environ.get("SCRATCH"), Path.home() / "orcd" / "scratch"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    return None


def use_scratch(root: Path) -> None:
    """Data and runs of this checkout on scratch: `data_root` is remembered, out/ becomes a link."""
    base = scratch_folder()
    if base is None:
        raise UserError("scratch: no scratch folder here ($SCRATCH, ~/orcd/scratch)")
    out = root / "out"
    if not out.is_symlink() and out.exists():
        raise UserError(
            f"{out}: holds runs already; move it there by hand: mv out {base}/, ln -s {base}/out out"
        )
    place = base / "engaging-nanogpt"
    target = place / f"out-{root.name}"
    for folder in (place / "data", target):
        make_folder(folder)
    if not out.is_symlink():
        out.symlink_to(target)
    change("data_root", str(place / "data"))
    print(f"data  {place / 'data'} (data_root in {user_file()})\nruns  out -> {out.readlink()}")
    print("scratch is not backed up, and is emptied when you do not log in for long: copy results home")


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("config", __doc__ or "")
    parser.add_argument("action", nargs="?", choices=["show", "set", "unset", "scratch"], default="show")
    parser.add_argument("key", nargs="?", metavar="KEY", help=", ".join(SETTINGS))
    parser.add_argument("value", nargs="?", metavar="VALUE")
    args = parser.read(argv)
    if (args.action in ("set", "unset")) != (args.key is not None) or (args.action == "set") != (
        args.value is not None
    ):
        raise UserError("engaging config: expected set KEY VALUE, unset KEY, scratch, or nothing")
    if args.key is not None and args.key not in SETTINGS:
        known = ", ".join(SETTINGS)
        raise UserError(
            f"{args.key}: no such setting{nearest(args.key, list(SETTINGS))} (there are: {known})"
        )
    if args.action == "scratch":
        use_scratch(checkout())
    elif args.key is not None:
        value = None if args.value is None else SETTINGS[args.key].check(args.value)
        path = change(args.key, value)
        print(f"{path}: {args.key} {'taken out' if value is None else f'= {value}'}")
    else:
        _show()
    return 0


def _show() -> None:
    from tools.site.profile import current_site

    found = resolve(current_site(checkout()).path)
    width = max((len(row.value) for row in found.values()), default=1)
    for key, setting in SETTINGS.items():
        row = found.get(key)
        text = f"{row.value:{width}}  from {row.source}" if row else f"{'-':{width}}  {setting.help}"
        print(f"{key:10} {text}".rstrip())
    scratch = scratch_folder()
    if scratch and "data_root" not in found:
        print(f"\n{scratch} is there: engaging config scratch puts data and checkpoints on it")
