"""One clone for the tests of a module, and a folder of its own for each test's configurations."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import kit


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A checkout with the stand-in trainer, in a folder with a space and a quote."""
    return kit.make_clone(tmp_path_factory.mktemp("clone") / "it's mine")
