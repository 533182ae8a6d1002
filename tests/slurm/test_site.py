"""`engaging site init` on a real SLURM: the file that it writes is the one that counts, or it says which does."""

import shutil
import sys

import pytest

SITES = "slurm/sites"


@pytest.fixture
def clone(root, tmp_path):
    """A clone that knows no cluster yet."""
    made = tmp_path / "clone"
    (made / SITES).mkdir(parents=True)
    shutil.copy(root / SITES / "generic.toml", made / SITES)
    shutil.copytree(root / "slurm" / "lib", made / "slurm" / "lib")
    (made / "pyproject.toml").write_text("")
    (made / "nanogpt" / "common").mkdir(parents=True)
    return made


def test_the_written_file_is_found_by_the_clusters_name(cluster, clone, root):
    def run(*words: str, **env: str) -> str:
        env = {"PYTHONPATH": str(root), "ENGAGING_SITE": "", **env}
        done = cluster.run(sys.executable, "-m", "tools", *words, cwd=clone, env=env)
        return done.stdout + done.stderr

    assert run("site") == "site generic (slurm/sites/generic.toml); cluster: practice\n"
    assert "note:" not in run("site", "init", "ours")
    assert run("site").startswith("site ours (slurm/sites/ours.toml)")
    tests = cluster.run(
        "bash", "slurm/lib/here_or_srun.sh", "--say", "make test", cwd=clone, check=False
    ).stderr
    assert "srun --partition=mit_quicktest " in tests and "--time=15 " in tests, tests
    assert "slurm/sites/ours.toml names this cluster too and comes first; export ENGAGING_SITE=second" in run(
        "site", "init", "second"
    )
    assert run("site", ENGAGING_SITE="second").startswith("site second")
