"""The commands as the seeds' document types them, in a folder below the root: thin doors to `engaging`.

The results lie in the root's experiment_logs/, where every other command looks for them; so that the document's loops
over `experiment_logs/nanogpt_*` work where they are typed, a link to it is put there.
"""

import contextlib
import os
from pathlib import Path

from nanogpt.common.errors import run_command
from tools import cli
from tools.experiments.records import SHELF
from tools.place import checkout


def enter(*command: str) -> None:
    """`engaging COMMAND` with the words of this command line."""
    run_command(lambda words: _main([*command, *words]))


def _main(words: list[str]) -> int:
    if not {"-h", "--help", "--dry_run", "--dry-run"} & set(words):
        link_results(Path.cwd(), checkout())
    return cli.main(words)


def link_results(here: Path, root: Path) -> None:
    """Make `here`/experiment_logs lead to the root's, when `here` is below the root and holds nothing of that name."""
    if here == root or not here.is_relative_to(root) or (here / SHELF).exists():
        return
    with contextlib.suppress(
        OSError
    ):  # a folder that is not ours to write in: the results are in the root all the same
        if (here / SHELF).is_symlink():
            (here / SHELF).unlink()
        (here / SHELF).symlink_to(os.path.relpath(root / SHELF, here))
