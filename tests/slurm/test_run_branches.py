"""Branches of run.sh that a healthy cluster cannot reach, with stand-ins for srun, torchrun and the other node."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.branch_kit import ROOT, bash, program

STANDIN = str(Path(__file__).with_name("standin.py"))
RUN = "slurm/lib/run.sh"


def test_local_runs_here_without_slurm(tmp_path):
    out = tmp_path / "a run"
    done = bash(
        RUN,
        STANDIN,
        f"--out_dir={out}",
        "--steps=2",
        "--note=$(touch pwned) 'x'",
        cwd=tmp_path_with_lib(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "words").read_text())[-1] == "--note=$(touch pwned) 'x'"
    assert not list(tmp_path.rglob("pwned"))


def tmp_path_with_lib(tmp_path: Path) -> Path:
    """A folder that holds the launch path and nothing else of the repository."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "activate_env.sh", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("status", "reported"), [("3", 3), ("2", 2), ("75", 75)])
def test_the_trainers_status_is_the_commands(tmp_path, status, reported):
    trainer = program(tmp_path, "trainer.py", f"raise SystemExit({status})\n")
    assert bash(RUN, trainer).returncode == reported


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to run"),
        (["nanogpt.nope"], "nanogpt/nope.py: there is no such trainer"),
        (["--fast"], "unknown flag --fast"),
        (["--args-file", "/nonexistent"], "--args-file=/nonexistent: cannot be read"),
        (["--gpus=many", STANDIN], "NUM_GPUS=many"),
    ],
)
def test_run_sh_refuses_in_one_line(words, message):
    done = bash(RUN, *words)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_signals_reach_a_local_trainer(tmp_path, name):
    out = tmp_path / "run"
    env = {**os.environ, "ENV_PATH": sys.prefix}
    process = subprocess.Popen(
        ["bash", str(ROOT / RUN), STANDIN, f"--out_dir={out}", "--steps=999"],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in iter(lambda: (out / "metrics.jsonl").exists(), True):
        assert line is False
        assert process.poll() is None
    process.send_signal(getattr(signal, f"SIG{name}"))
    stdout, _ = process.communicate(timeout=600)
    assert process.returncode == 75
    assert "stopped by" in stdout


@pytest.fixture
def job_of_standins(tmp_path):
    """Starts a batch job whose srun refuses `refusals` times; `scontrol` says that the job is interactive."""
    refusal = "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification"
    step = "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_NODELIST=here"

    def start(refusals: int, *words: str) -> subprocess.Popen:
        program(
            tmp_path / "bin",
            "srun",
            f"""#!/bin/bash
echo x >>{tmp_path}/asked
if [ "$(wc -l <{tmp_path}/asked)" -le {refusals} ]; then echo '{refusal}' >&2; exit 1; fi
while [[ $1 == --* ]]; do shift; done
{step} exec "$@"
""",
        )
        program(tmp_path / "bin", "scontrol", "#!/bin/bash\necho ' BatchFlag=0'\n")
        program(tmp_path / "bin", "sleep", f"#!/bin/bash\nexec {shutil.which('sleep')} 0.1\n")
        env = {
            **os.environ, "ENV_PATH": sys.prefix, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here",
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(ROOT / RUN), STANDIN, f"--out_dir={tmp_path}/run", *words],
            env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def test_a_step_that_slurm_cannot_start_yet_is_waited_for(job_of_standins):
    """Right after a restart of the controller; it is no failure of the trainer, three times in a row or more."""
    process = job_of_standins(3, "--steps=2")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert said.startswith("--- job 7 attempt 1 on here at ")
    assert said.count("SLURM could not start the trainer") == 3 and "the trainer broke" not in said


def test_a_signal_while_the_step_cannot_start_loses_nothing(job_of_standins):
    process = job_of_standins(99, "--steps=2")
    for line in iter(process.stdout.readline, ""):
        if "could not start" in line:
            break
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 75, said
    assert "ended before it could save; job 7 is interactive" in said


def test_no_rank_listens_to_the_outside(tmp_path):
    """Two ranks on one node: everything they open is on the loopback, and the port was theirs from the start."""
    trainer = program(
        tmp_path,
        "trainer.py",
        """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
if os.environ["RANK"] == "0":
    own = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.environ["RUN_MARK"] in open(f"/proc/{pid}/environ").read():
                own |= {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        except OSError:
            pass
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in open(file).read().splitlines()[1:]:
            words = row.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                print("LISTENS", words[1], flush=True)
    print("SUM", total.item(), flush=True)
dist.barrier()
dist.destroy_process_group()
""",
    )
    done = bash(RUN, "--gpus=2", trainer, env={"RUN_MARK": f"mark-of-{os.getpid()}"}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "SUM 2.0" in done.stdout
    listeners = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("LISTENS")]
    assert listeners, "the store must have been seen"
    assert all(address.startswith("0100007F:") for address in listeners), listeners


MACHINE = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize(
    ("node", "store", "status", "said"),
    [
        (1, f"127.0.1.1 9 not-{MACHINE}", 2, "error: node1: gives 127.0.1.1 as its address, which "),
        (1, f"127.0.0.1 1 {MACHINE}", 2, "cannot reach node1 at 127.0.0.1 port 1 (Connection refused)"),
        (1, "", 1, "error: node1: has opened no meeting point within 1 s"),
        (
            0,
            f"192.0.2.7 9 {MACHINE}",
            1,
            "error: node2: not heard of within 1 s; node1 waited at 192.0.2.7 port 9",
        ),
    ],
)
def test_nodes_that_do_not_meet_say_who_is_missing(tmp_path, node, store, status, said):
    """Case F2: one node of two, each time the one whose word it is; it neither hangs nor shows a traceback."""
    run = tmp_path_with_lib(tmp_path) / RUN
    run.write_text(run.read_text().replace("MEETING_SECONDS=120", "MEETING_SECONDS=1"))
    names = program(tmp_path / "bin", "scontrol", "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n").parent
    (tmp_path / "sitecustomize.py").write_text(  # names that this machine does not know
        "import socket\nasked = socket.getaddrinfo\nsocket.getaddrinfo = lambda host, *a, **k: asked("
        "'127.0.0.1' if host.startswith('node') else host, *a, **k)\n"
    )
    folder = tmp_path / "meeting"
    folder.mkdir()
    (folder / "store").write_text(store)
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(node), "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(node), "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[1-2]",
            "RUN_FOLDER": str(folder), "PYTHONPATH": str(tmp_path)}  # fmt: skip
    if node == 0:
        run.write_text(run.read_text().replace('serve "$folder/store"', 'serve "$folder/elsewhere"'))
    done = bash(run, STANDIN, "--out_dir=x", env=step, cwd=tmp_path, path=str(names))
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert (done.returncode, len(errors)) == (status, 1) and said in errors[0], done
    assert (folder / f"failed-{node}").exists()


@pytest.mark.parametrize(("ranks_that_finished", "status"), [(2, 0), (1, 138)])
def test_a_signal_after_the_last_step_does_not_undo_a_finished_run(tmp_path, ranks_that_finished, status):
    """torchrun dies of it while its ranks end well: such a job was requeued, to find that it had nothing to do."""
    source = tmp_path / "site" / "torch" / "distributed"
    source.mkdir(parents=True)
    (source.parent / "__init__.py").touch()
    (source / "run.py").write_text(f"""
import pathlib, sys
class SignalException(Exception):
    sigval = 10
folder = pathlib.Path(sys.argv[next(n for n, word in enumerate(sys.argv) if word.endswith("rank.py")) + 1])
for rank in range({ranks_that_finished}):
    (folder / f"rank-{{rank}}").write_text("0\\n")
raise SignalException
""")
    (source / "__init__.py").write_text("import time\nTCPStore = lambda *a, **k: time.sleep(99)\n")
    done = bash(RUN, "--gpus=2", STANDIN, env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("torch_has_flags", [True, False])
def test_torchruns_flags_are_used_where_it_has_them(tmp_path, torch_has_flags):
    """torch 2.11 knows neither --shutdown-timeout nor --signals-to-handle: a stand-in for its source says so."""
    source = tmp_path / "site" / "torch" / "distributed"
    source.mkdir(parents=True)
    (source.parent / "__init__.py").touch()
    flags = "--signals-to-handle --shutdown-timeout" if torch_has_flags else ""
    (source / "run.py").write_text(f"# {flags}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (source / "__init__.py").write_text("import time\nTCPStore = lambda *a, **k: time.sleep(99)\n")
    done = bash(RUN, "--gpus=2", STANDIN, env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout.splitlines()[-1])
    assert ("--shutdown-timeout=600" in words) == torch_has_flags
    assert any(word.startswith("--signals-to-handle=") for word in words) == torch_has_flags
    assert "--nproc-per-node=2" in words
    assert any(word.startswith("--rdzv-endpoint=127.0.0.1:") for word in words)
