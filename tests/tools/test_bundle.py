"""The support bundle: what is in it, and that no secret is."""

import shutil
import subprocess
import tarfile

import pytest

from nanogpt.common.errors import UserError
from tools.place import fetch_line
from tools.site import bundle
from tools.site.doctor import Finding

CANARY = "c4n4ry"
SECRETS = [
    f"HF_TOKEN=hf_{CANARY}0123456789", f"wandb: api_key: '{CANARY}abcdef'", f"https://me:{CANARY}@host/x",
    f"Authorization: Bearer {CANARY}xyz", f'{{"password": "{CANARY}"}}', f"sk-{CANARY}0123456789abcdef",
    f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----", f"ghp_{CANARY}01234567890123456789",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_secret_is_removed(text):
    assert CANARY not in bundle.scrub(f"before\n{text}\nafter", []) and "[removed]" in bundle.scrub(text, [])


def test_figures_and_commits_stay():
    text = (
        "1,003,854 tokens: loss 1.47, commit 47f07a2b47f07a2b47f07a2b47f07a2b47f07a2b, tokens_per_step=524288"
    )
    assert bundle.scrub(text, []) == text


def test_the_bundle_has_logs_scripts_and_findings_and_none_of_the_users_secrets(
    tmp_path, monkeypatch, capsys
):
    root, home = tmp_path / "clone", tmp_path / "home"
    (root / "logs").mkdir(parents=True)
    (root / "logs" / "first-7.out").write_text(f"line\nRuntimeError: boom, key was {CANARY}-netrc\n")
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {CANARY}-netrc\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-variable")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 5000 10.0.0.2 22")
    monkeypatch.setattr(
        bundle, "COMMANDS", {"said": ["echo", f"it was {CANARY}-variable"], "none": ["no-such-program"]}
    )
    path = tmp_path / "support.tar.gz"
    bundle.write(root, path, [Finding("gpu", "fail", "none here", "buy one")])
    said = capsys.readouterr().out
    assert str(path) in said and "scp " in said
    with tarfile.open(path) as archive:
        texts = {member.name: archive.extractfile(member).read().decode() for member in archive.getmembers()}
    assert CANARY not in "".join(texts.values())
    assert "RuntimeError: boom" in texts["engaging-support/logs/first-7.out"]
    assert "buy one" in texts["engaging-support/findings.txt"]
    assert "no-such-program" in texts["engaging-support/commands/none.txt"]
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="is there already"):
        bundle.write(root, path, [])


def test_a_bundle_does_not_travel_with_the_code_of_a_launch(root, tmp_path):
    shutil.copy(root / ".gitignore", tmp_path)
    (tmp_path / "engaging-support-1130-150448.tar.gz").touch()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    listed = ["git", "-C", tmp_path, "ls-files", "--others", "--exclude-standard"]
    assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ".gitignore\n"


def test_the_line_that_fetches_a_file(tmp_path, monkeypatch):
    for name in ("SSH_CONNECTION", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert fetch_line(tmp_path / "a.png") == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "orcd-login001")
    line = fetch_line(tmp_path / "a b.png")
    assert "@orcd-login001:" in line and line.endswith("a b.png' .")
