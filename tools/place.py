"""Where things are: the checkout these tools act on."""

from pathlib import Path

from nanogpt.common.errors import UserError

MARKS = ("slurm/lib", "nanogpt/common", "pyproject.toml")


def checkout() -> Path:
    """The root of the checkout: the one around the current folder, else the one these tools are in.

    Raises UserError when neither is one.
    """
    try:
        here = Path.cwd()
    except OSError:
        raise UserError(
            "the current folder no longer exists; cd into the checkout of engaging-nanogpt"
        ) from None
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if all((folder / mark).exists() for mark in MARKS):
            return folder
    raise UserError(
        f"{here}: not inside a checkout of engaging-nanogpt; cd into your clone of the repository"
    )
