"""doctor's checks of the machine: environment, folders, disk, quotas, caches, network."""

import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from nanogpt.common.errors import CommandError
from nanogpt.common.storage import atomic_write_bytes
from tools.args import counted
from tools.launch.environment import environment_python, need_log_folder
from tools.site.doctor import Finding
from tools.site.settings import scratch_folder

SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "wekafs", "fuse.sshfs", "cifs", "afs", "panfs", "ceph")
WANTED_GB = 20  # checkpoints, logs and the small data sets
WANTED_INODES = 50_000
OLD_DAYS = 60  # scratch is purged after 6 months without a login; another page says 90 days
PACKAGES = ("torch", "numpy", "safetensors", "tiktoken", "datasets", "huggingface_hub", "submitit", "rich")


def environment(root: Path) -> list[Finding]:
    """The trainer's Python, its packages, and torch against the driver."""
    python = environment_python()
    if python is None:
        where = os.environ.get("ENV_PATH") or "~/conda_envs/nanogpt_env"
        return [Finding("python", "fail", f"no Python with torch in {where}", "bash setup_env.sh")]
    probe = (
        "import importlib.metadata as m, json, sys, torch\n"
        "have = {}\n"
        f"for name in {PACKAGES!r}:\n"
        "    try: have[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: have[name] = None\n"
        "print(json.dumps({'python': sys.version.split()[0], 'cuda': torch.version.cuda, 'have': have}))\n"
    )
    done = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, timeout=120, cwd="/")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Finding("python", "fail", f"{python} cannot import torch: {last[:120]}", "bash setup_env.sh")]
    import json

    facts = json.loads(done.stdout.splitlines()[-1])
    missing = [name for name, version in facts["have"].items() if version is None]
    text = f"{python}: Python {facts['python']}, torch {facts['have']['torch']}"
    found = [Finding("python", "ok", text)]
    if missing:
        found = [Finding("python", "fail", f"{text}; missing: {', '.join(missing)}", "bash setup_env.sh")]
    return found + _driver(facts["cuda"])


def _driver(cuda: str | None) -> list[Finding]:
    driver = driver_version()
    if driver is None:
        return [Finding("driver", "skip", "no NVIDIA driver on this machine (login nodes have none)")]
    if cuda is None:
        return [
            Finding("driver", "fail", f"driver {driver}, but this torch is for the CPU only",
                    "bash setup_env.sh --cuda")
        ]  # fmt: skip
    need = minimum_driver(cuda)
    if int(driver.split(".")[0]) < need:
        return [
            Finding("driver", "fail", f"driver {driver} is too old for torch's CUDA {cuda} (needs {need})",
                    "bash setup_env.sh on this machine: it takes an older CUDA")
        ]  # fmt: skip
    return [Finding("driver", "ok", f"driver {driver} serves CUDA {cuda}")]


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"[0-9]+(\.[0-9]+)+", done.stdout)
    return match[0] if done.returncode == 0 and match else None


def minimum_driver(cuda: str) -> int:
    """The driver branch a CUDA release needs on Linux (CUDA 12.x and later are compatible within a major)."""
    major = int(cuda.split(".")[0])
    return {11: 450, 12: 525, 13: 580}.get(major, 580 if major > 13 else 450)


def folders(root: Path) -> list[Finding]:
    """The checkout itself, and logs/ (SLURM starts no job whose log it cannot open)."""
    from tools.launch.snapshot import list_files

    found = []
    names, how = list_files(root)
    found.append(Finding("checkout", "ok", f"{root}: {len(names)} files of code ({how})"))
    try:
        need_log_folder(root)
        found.append(Finding("logs", "ok", "logs/ is there and can be written"))
    except CommandError as error:
        found.append(Finding("logs", "fail", str(error), "mkdir -p logs, in a folder that you may write to"))
    return found


def disk(root: Path) -> list[Finding]:
    """Free bytes and inodes where the checkout and the data lie."""
    found = []
    data = Path(os.environ.get("DATA_ROOT") or root / "data")
    while not data.exists() and data != data.parent:
        data = data.parent
    for name, folder in {"checkout": root, "data": data}.items():
        stat = os.statvfs(folder)
        free, inodes = stat.f_bavail * stat.f_frsize / 1e9, stat.f_favail
        text = f"{name} ({folder}): {free:.0f} GB free"
        if stat.f_files and inodes < WANTED_INODES:
            found.append(
                Finding(
                    "disk",
                    "warn",
                    f"{text}, only {inodes} files more",
                    "delete old environments (conda clean -a)",
                )
            )
        elif free < WANTED_GB:
            found.append(Finding("disk", "warn", text, "free space, or: engaging config scratch"))
        else:
            found.append(Finding("disk", "ok", text))
    return found


def quota(root: Path) -> list[Finding]:
    """Your quotas: the site's report file, `quota`, and a trial write (the only proof there is)."""
    found = []
    probe = root / f".doctor-{os.getpid()}"
    try:
        atomic_write_bytes(probe, b"\0" * (1 << 20))
        found.append(Finding("quota", "ok", "a trial write of 1 MB succeeded"))
    except CommandError as error:
        found.append(Finding("quota", "fail", str(error), "delete something: du -sh * | sort -h"))
    finally:
        probe.unlink(missing_ok=True)
    report = Path.home() / "orcd" / ".quota"
    if report.is_file():
        for line in report.read_text(errors="replace").splitlines()[:12]:
            share = quota_share(line)
            if share is not None and share > 0.9:
                found.append(
                    Finding(
                        "quota",
                        "warn",
                        f"{share:.0%} used: {line.strip()[:90]}",
                        "delete, or move to scratch",
                    )
                )
    if shutil.which("quota"):
        done = subprocess.run(["quota", "-w", "-p"], capture_output=True, text=True, timeout=20)
        for line in done.stdout.splitlines():
            for what, share in quota_row(line):
                if share > 0.9:
                    text = f"{share:.0%} of your {what} on {line.split()[0]} are used"
                    found.append(
                        Finding("quota", "fail" if share >= 1 else "warn", text, "delete something there")
                    )
    return found


def quota_share(line: str) -> float | None:
    """The used share in a line such as `home 180G 200G` or `180.2 GB / 200 GB`; None when there is no such pair."""
    units = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    pairs = re.findall(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)i?B?(?![A-Za-z0-9])", line)
    values = [float(number) * units[unit] for number, unit in pairs]
    return (
        values[0] / values[1] if len(values) >= 2 and values[1] > 0 and values[0] <= 2 * values[1] else None
    )


def quota_row(line: str) -> list[tuple[str, float]]:
    """`quota -w -p` rows: device blocks quota limit grace files quota limit grace -> shares of blocks and inodes."""
    parts = [part.rstrip("*") for part in line.split()]
    if len(parts) < 8 or not all(part.isdigit() for part in (*parts[1:4], *parts[5:8])):
        return []
    numbers = [int(part) for part in parts[1:4] + parts[5:8]]
    pairs = [
        ("blocks", numbers[0], numbers[1] or numbers[2]),
        ("inodes", numbers[3], numbers[4] or numbers[5]),
    ]
    return [(what, used / limit) for what, used, limit in pairs if limit]


def scratch(root: Path) -> list[Finding]:
    """How long ago anything on scratch was touched: such places are purged."""
    folder = scratch_folder()
    if folder is None:
        return [Finding("scratch", "skip", "no scratch folder here ($SCRATCH, ~/orcd/scratch)")]
    newest = max((entry.stat().st_mtime for entry in os.scandir(folder)), default=folder.stat().st_mtime)
    days = (time.time() - newest) / 86400
    text = f"{folder}: last change {counted(int(days), 'day') + ' ago' if days >= 1 else 'today'}"
    if days > OLD_DAYS:
        return [Finding("scratch", "warn", text, "copy what you need: scratch is purged when it is not used")]
    return [Finding("scratch", "ok", text)]


def caches(root: Path) -> list[Finding]:
    """Compile caches must lie on the node's own disk: on a shared one they break (stale handles) and are slow."""
    found = []
    for name, default in (("TRITON_CACHE_DIR", "~/.triton"), ("TORCHINDUCTOR_CACHE_DIR", "/tmp")):
        folder = Path(os.environ.get(name) or default).expanduser()
        kind = file_system(folder)
        if kind in SHARED and os.environ.get(name):
            fix = f"unset {name}: the jobs put it on the node's own disk"
            found.append(Finding("caches", "fail", f"{name}={folder} is on {kind}", fix))
        elif kind in SHARED:
            text = f"{name} is not set, and {folder} is on {kind}; jobs of slurm/ use the node's own disk"
            found.append(Finding("caches", "ok", text))
    return found or [Finding("caches", "ok", "compile caches are on a local disk")]


def file_system(folder: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds a folder (which need not exist), from /proc/mounts."""
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(errors="replace")
        except OSError:
            return ""
    best, kind = "", ""
    path = str(folder.resolve()) if folder.exists() else str(folder)
    for line in mounts.splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        point = parts[1].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, parts[2]
    return kind


def hub(root: Path) -> list[Finding]:
    """Whether the Hugging Face hub answers."""
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return [Finding("hub", "skip", f"{address} is not asked: HF_HUB_OFFLINE is set")]
    try:
        request = urllib.request.Request(f"{address}/robots.txt", method="HEAD")
        with urllib.request.urlopen(request, timeout=8):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        fix = "prepare the data where there is a network (login node), or set DATA_MIRROR"
        return [Finding("hub", "warn", f"{address} does not answer ({reason})", fix)]
    return [Finding("hub", "ok", f"{address} answers")]
