"""Settings: which source wins, what is refused, the scratch folder, and that commands use them."""

import argparse
import os
import shutil
import subprocess

import pytest

from nanogpt.common.errors import UserError
from tools import cli
from tools.site import settings

VARIABLES = [name for setting in settings.SETTINGS.values() for name in setting.variables]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own, and an environment that says nothing."""
    for name in (*VARIABLES, "XDG_CONFIG_HOME", "SCRATCH", "ENGAGING_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path


def shown(capsys, *words):
    assert cli.main(["config", *words]) == 0
    return capsys.readouterr().out


def test_the_first_source_that_has_a_value_wins_and_is_named(home, monkeypatch, capsys):
    lab = home / "lab.toml"
    lab.write_text('account = "pi_lab"\nqos = "labs"\ndata_root = "/pool/data"\nboard = "/pool/board"\n')
    site = home / "site.toml"
    site.write_text('[settings]\npartition = "gpu"\nboard = "/site/board"\n')
    shown(capsys, "set", "lab", str(lab))
    shown(capsys, "set", "qos", "mine")
    monkeypatch.setenv("DATA_ROOT", "/from/environment")
    found = settings.resolve(site)
    own = str(home / ".config/engaging/config.toml")
    assert {key: (row.value, row.source) for key, row in found.items()} == {
        "lab": (str(lab), own),
        "qos": ("mine", own),
        "account": ("pi_lab", str(lab)),
        "board": ("/pool/board", str(lab)),
        "data_root": ("/from/environment", "$DATA_ROOT"),
        "partition": ("gpu", str(site)),
    }
    text = shown(capsys)
    assert f"from {own}" in text and "from $DATA_ROOT" in text and "of launch --mail" in text
    shown(capsys, "unset", "qos")
    assert settings.resolve()["qos"].value == "labs"


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh"])
def test_scripts_read_what_config_has_written(home, monkeypatch, capsys, root, shell):
    """slurm/lib/settings.sh against `resolve`: your file, the lab's, what neither has, what everybody may write to."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    lab = home / "lab.toml"
    lab.write_text('account = \'pi_lab\'  # ours\nqos = "labs"\nenv_path = "~/envs/it is"\n')
    for key, value in {"lab": str(lab), "qos": "mine", "data_root": "~/my data"}.items():
        shown(capsys, "set", key, value)

    def read(sites: object = "") -> tuple[dict[str, str], str]:
        keys = ("account", "qos", "partition", "env_path", "data_root")
        words = f"_engaging_sites='{sites}'; . ./settings.sh; " + "; ".join(
            f"engaging_setting {key}; echo" for key in keys
        )
        done = subprocess.run(
            [shell, "-c", words], cwd=root / "slurm/lib", capture_output=True, text=True, check=True
        )
        found = zip(keys, done.stdout.split("\n"), strict=False)
        return {key: value for key, value in found if value}, done.stderr

    found, said = read()
    assert said == "" and found == {key: row.value for key, row in settings.resolve().items() if key != "lab"}
    assert found["env_path"] == f"{home}/envs/it is" and "partition" not in found
    clone = home / "clone"
    for mark in ("nanogpt/common", "slurm/lib", "slurm/sites"):
        (clone / mark).mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    site = clone / "slurm/sites/mars.toml"
    site.write_text(
        'name = "mars"\ncluster_names = ["red"]\n[settings]\nqos = "site"\npartition = "dust"\n[defaults]\n'
    )
    (clone / "slurm/sites/generic.toml").write_text('[settings]\npartition = "other"\n')
    monkeypatch.chdir(clone)
    scontrol = home / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho 'ClusterName             = red'\n")
    scontrol.chmod(0o755)
    (home / "bin/sinfo").symlink_to(scontrol)
    (home / "bin/sbatch").symlink_to(scontrol)
    monkeypatch.setenv("PATH", f"{home}/bin:/usr/bin:/bin")
    for name, partition in (("", "dust"), ("generic", "other")):
        monkeypatch.setenv("ENGAGING_SITE", name)
        found, said = read(site.parent)
        assert said == "" and (found["qos"], found["partition"]) == ("mine", partition)
        assert found == {key: row.value for key, row in settings.resolve().items() if key != "lab"}
    monkeypatch.setattr(os, "environ", dict(os.environ))
    site.write_text('name = "mars"\ncluster_names = ["red"]\n[settings]\nboard = "/red/board"\n')
    settings.apply()
    assert "ENGAGING_BOARD" not in os.environ  # generic.toml was named
    os.environ["ENGAGING_SITE"] = ""
    settings.apply()
    assert os.environ["ENGAGING_BOARD"] == "/red/board"
    site.unlink()
    lab.chmod(0o666)
    found, said = read()
    assert found == {"qos": "mine", "data_root": f"{home}/my data"} and "everybody may write" in said


def test_commands_see_the_files_values_and_the_environment_stands_before_them(home, monkeypatch, capsys):
    for key, value in {"prices": "h200=3.5", "data_root": "~/data", "account": "mit_general"}.items():
        shown(capsys, "set", key, value)
    monkeypatch.setenv("ENGAGING_GPU_PRICES", "2")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    settings.apply()
    assert os.environ["ENGAGING_GPU_PRICES"] == "2" and os.environ["DATA_ROOT"] == str(home / "data")
    assert "ACCOUNT" not in os.environ  # a job asks for it by a flag


def test_a_flag_stands_before_the_files(home, capsys):
    for key in ("account", "qos"):
        shown(capsys, "set", key, f"my-{key}")
    args = argparse.Namespace(account=None, qos="flag", partition=None)
    settings.fill(args, None)
    assert vars(args) == {"account": "my-account", "qos": "flag", "partition": None}


def test_comments_of_the_file_stay(home, capsys):
    path = settings.user_file()
    path.parent.mkdir(parents=True)
    path.write_text('# my own\nqos = "a"\naccount = "b"\n')
    shown(capsys, "set", "qos", "c")
    assert path.read_text().splitlines() == ['qos = "c"', "# my own", 'account = "b"']


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('acount = "x"', "acount: no such setting; did you mean 'account'?"),
        ("account = 3", "account=3: expected text in quotes"),
        ('account = "a; rm"', "account='a; rm'"),
        ('env_path = "envs/x"', "expected a path that begins with /"),
        ('mail = "nobody"', "expected an address"),
        ("[launch]\nqos = 1", "launch: no such setting"),
        ("account = ", "not a file of settings"),
    ],
)
def test_a_bad_file_is_one_line_for_every_command(home, text, said):
    path = settings.user_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        cli.main(["status"])
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_a_lab_file_that_is_absent_or_open_to_all_is_refused(home, monkeypatch):
    monkeypatch.setenv("ENGAGING_LAB", str(home / "none.toml"))
    with pytest.raises(UserError, match="No such file"):
        settings.from_files()
    lab = home / "none.toml"
    lab.write_text('env_path = "/tmp/x"\n')
    lab.chmod(0o666)
    with pytest.raises(UserError, match="chmod o-w"):
        settings.from_files()
    monkeypatch.delenv("ENGAGING_LAB")
    assert cli.main(["config", "set", "lab", str(home / "gone")]) == 0
    with pytest.raises(UserError, match="unset it"):
        cli.main(["status"])
    assert cli.main(["config", "unset", "lab"]) == 0  # mends what keeps every other command from starting


@pytest.mark.parametrize(
    "words", [["set", "account"], ["unset"], ["show", "qos"], ["set", "acount", "x"], ["set", "qos", "a b"]]
)
def test_bad_words_are_one_line(home, words):
    with pytest.raises(UserError):
        cli.main(["config", *words])
    assert not settings.user_file().exists()


def test_scratch_is_offered_and_remembered(home, monkeypatch, capsys, tmp_path):
    checkout = home / "engaging-nanogpt"
    checkout.mkdir()
    scratch = home / "orcd" / "scratch"
    with pytest.raises(UserError, match="no scratch folder"):
        settings.use_scratch(checkout)
    scratch.mkdir(parents=True)
    assert "engaging config scratch" in shown(capsys)
    settings.use_scratch(checkout)
    settings.use_scratch(checkout)  # again changes nothing
    assert (checkout / "out").resolve() == scratch / "engaging-nanogpt" / "out-engaging-nanogpt"
    assert settings.resolve()["data_root"].value == str(scratch / "engaging-nanogpt" / "data")
    assert "engaging config scratch" not in shown(capsys)
    (checkout / "out").unlink()
    (checkout / "out").mkdir()
    with pytest.raises(UserError, match="holds runs already"):
        settings.use_scratch(checkout)
