"""`engaging doctor --bundle`: one file with what a help desk asks for, secrets removed.

What is in it: the doctor's findings, versions, your last jobs, the newest launches (the
exact scripts), the ends of the newest logs, disks, modules, and the variables that jobs get. No data, no checkpoints.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_bytes
from tools.args import counted
from tools.launch import book
from tools.launch.environment import is_secret, job_environment
from tools.place import print_fetch_line
from tools.runs import tail
from tools.site.doctor import Finding

LOGS, LOG_LINES, LAUNCHES, OUTPUT = 5, 400, 3, 200_000
SHORTEST_SECRET = 6
COMMANDS = {
    "version": ["git", "-C", ".", "log", "-1", "--format=%H %cd"],
    "changes": ["git", "-C", ".", "status", "--short"],
    "system": ["uname", "-a"],
    "disks": ["df", "-h", ".", "/tmp"],
    "gpus": ["nvidia-smi"],
    "partitions": ["sinfo", "-o", "%P %a %l %D %G %t"],
    "queue": ["squeue", "--me", "-o", "%i %j %P %T %r %M %l %D %b"],
    "accounting": [
        "sacct",
        "-S",
        "now-3days",
        "-o",
        "JobID,JobName%30,Partition,State,ExitCode,Elapsed,NodeList",
    ],
}
PATTERNS = (
    (re.compile(r"\b(hf_|gh[pousr]_|glpat-|sk-|xox[abp]-|AKIA)[A-Za-z0-9_-]{10,}"), "[removed]"),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]+\.[\w-]+"), "[removed]"),
    (re.compile(r"(://[^/\s:@]+:)[^/\s@]+@"), r"\1[removed]@"),
    (re.compile(r"(?i)(\b(?:authorization:\s*)?bearer\s+)\S+"), r"\1[removed]"),
    (
        re.compile(
            r"(?i)((?:api_?-?key|token|secret|password|passwd|credential)[\"']?\s*[=:]\s*[\"']?)[^\s\"',}]+"
        ),
        r"\1[removed]",
    ),
    (re.compile(r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"), "[removed]"),
)


def known_secrets() -> list[str]:
    """Values that must not travel: of secret variables, of ~/.netrc, of the hub's token file; longest first."""
    found = [value for name, value in os.environ.items() if is_secret(name)]
    with contextlib.suppress(OSError):
        text = (Path.home() / ".netrc").read_text(errors="replace")
        found += re.findall(r"\bpassword\s+(\S+)", text)
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    with contextlib.suppress(OSError):
        found.append((hub / "token").read_text(errors="replace").strip())
    return sorted({value for value in found if len(value) >= SHORTEST_SECRET}, key=len, reverse=True)


def scrub(text: str, secrets: Sequence[str]) -> str:
    """`text` without the known secrets, and without what looks like one."""
    for value in secrets:
        text = text.replace(value, "[removed]")
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    return text


def collect(root: Path, findings: list[Finding]) -> dict[str, str]:
    """File name to text, as it is, secrets and all."""
    files = {"findings.json": json.dumps([asdict(finding) for finding in findings], indent=1)}
    files["findings.txt"] = "\n".join(finding.line() for finding in findings)
    files["variables.txt"] = "\n".join(f"{name}={value}" for name, value in sorted(job_environment().items()))
    files["modules.txt"] = os.environ.get("LOADEDMODULES", "(none loaded)")
    for name, command in COMMANDS.items():
        try:
            done = subprocess.run(
                command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, timeout=20
            )
            text = (done.stdout + done.stderr).decode("utf-8", "replace")
        except (OSError, subprocess.TimeoutExpired) as error:
            text = f"{error}"
        files[f"commands/{name}.txt"] = f"$ {' '.join(command)}\n{text[:OUTPUT]}"
    for name in book.names(root)[:LAUNCHES]:
        launch = book.latest(root, name)
        for part in ("job.json", "submit.sh") if launch else ():
            with contextlib.suppress(OSError):
                files[f"launches/{name}/{part}"] = (launch.folder(root) / part).read_text(errors="replace")
    logs = sorted((root / "logs").glob("*.out"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in logs[:LOGS]:
        files[f"logs/{path.name}"] = "\n".join(tail(path, LOG_LINES))
    return files


def write(root: Path, path: Path, findings: list[Finding]) -> None:
    """Write the bundle and say what is in it."""
    if path.exists():
        raise UserError(f"--bundle={path}: is there already; give another name")
    secrets = known_secrets()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        files = collect(root, findings)
        for name, text in files.items():
            data = scrub(text, secrets).encode("utf-8", "replace")
            member = tarfile.TarInfo(f"engaging-support/{name}")
            member.size, member.mtime, member.mode = len(data), int(time.time()), 0o600
            archive.addfile(member, io.BytesIO(data))
    atomic_write_bytes(path, packed.getvalue())
    path.chmod(0o600)
    print(f"\nsupport bundle: {path}, {counted(len(files), 'file')}; what looked like a secret is removed")
    print(
        f"  look through it before you send it: tar xzf {path}; add the command that you typed, and the job's number"
    )
    print_fetch_line(path)
