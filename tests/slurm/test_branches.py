"""Branches that a healthy cluster cannot reach, with stand-ins: old bash, no module command, broken conda, no nvcc."""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDIN = str(Path(__file__).with_name("standin.py"))
RUN = "slurm/lib/run.sh"


def bash(
    *words: object, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 600, path: str = ""
):
    """`bash WORDS...` outside of every job, with this environment's Python."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "CUDA"))}
    clean |= {"ENV_PATH": sys.prefix, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    return subprocess.run(
        ["bash", *map(str, words)],
        env={**clean, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def program(folder: Path, name: str, text: str) -> Path:
    """An executable stand-in."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def common(commands: str, **kwargs) -> subprocess.CompletedProcess:
    """Commands after common.sh, as a script has them."""
    return bash("-c", f"set -euo pipefail; . slurm/lib/common.sh; {commands}", **kwargs)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", "90"), ("1:30", "2"), ("01:30:00", "90"), ("1:00:01", "61"), ("2-00:00:00", "2880"), ("1-12", "2160"),
        ("6h", "360"), ("1d12h", "2160"), ("45m", "45"), ("08:09:00", "489"), ("infinite", ""), ("x", ""),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text, minutes):
    assert common(f"minutes_of {text}").stdout.strip() == minutes


def test_an_old_bash_is_refused_in_one_line(tmp_path):
    text = (ROOT / "slurm/lib/common.sh").read_text().replace("BASH_VERSINFO[0]", "3")
    (tmp_path / "slurm/lib").mkdir(parents=True)
    (tmp_path / "slurm/lib/common.sh").write_text(text)
    done = bash("-c", ". slurm/lib/common.sh; echo went on", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is too old" in done.stderr


def test_scripts_run_under_the_options_of_bash_42(tmp_path):
    """Empty arrays under `set -u` are errors before bash 4.4; the scripts expand none without a guard."""
    for path in (ROOT / "slurm").rglob("*.sh"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "env.sh" in path.name or line.lstrip().startswith("#"):
                continue
            for name in ("words", "more_options"):
                bare = line.replace(f'${{{name}[@]+"${{{name}[@]}}"}}', "")
                assert f'"${{{name}[@]}}"' not in bare, f"{path}:{number}: unguarded"


def test_without_sbatch_the_remedy_is_named(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "python3", "cat", "mkdir", "env"):
        (tools / name).symlink_to(shutil.which(name))
    done = bash("slurm/nanogpt/train_shakespeare.sh", env={"PATH": str(tools)})
    assert done.returncode == 2
    assert "sbatch: not found" in done.stderr
    assert "LOCAL=1 bash slurm/nanogpt/train_shakespeare.sh" in done.stderr


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("sinfo: fatal: Could not establish a configuration source", "no cluster is configured"),
        ("slurm_load_partitions: Unable to contact slurm controller", "try again in a few minutes"),
    ],
)
def test_no_cluster_and_a_controller_that_is_away_are_two_things(tmp_path, said, wanted):
    program(tmp_path, "sbatch", "#!/bin/sh\n")
    program(tmp_path, "sinfo", f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    done = bash("slurm/nanogpt/train_shakespeare.sh", path=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and wanted in done.stderr, done.stderr


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
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where tests run in the background
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


def test_a_job_that_came_without_its_users_variables_says_so():
    """Case G4: `sbatch --export=A=1` sets SLURM_EXPORT_ENV, and no ENV_PATH or DATA_ROOT comes along."""
    job = {"SLURM_JOB_ID": "7", "SLURM_EXPORT_ENV": "A", "ENV_PATH": "/none"}
    done = common("check_environment", env=job)
    assert done.returncode == 2 and done.stderr.endswith(
        "setup_env.sh (sbatch --export left your own settings behind: --export=ALL,...)\n"
    )
    assert "--export" not in common("check_environment", env={**job, "SLURM_EXPORT_ENV": "A,ALL"}).stderr


def test_a_site_file_that_windows_has_edited_is_read_as_before(tmp_path):
    """Case G3."""
    show = "site_partitions; site_value gpu_types.a100 cpus_per_gpu; site_value partitions.mit_normal_gpu gpu_types"
    texts = []
    for name, ends in (("unix", b"\n"), ("dos", b"\r\n")):
        file = tmp_path / name
        file.write_bytes((ROOT / "slurm/sites/engaging.toml").read_bytes().replace(b"\n", ends))
        done = bash("-c", f"set -euo pipefail; . slurm/lib/submit.sh; site={file}; {show}")
        texts.append((done.stdout, done.stderr))
    assert texts[0] == texts[1] and texts[0][0].startswith("mit_normal\nmit_quicktest\n"), texts
    assert texts[0][0].endswith("\n8\nl40s h200\n")


def test_compile_caches_are_each_jobs_own_on_the_nodes_disk(tmp_path, monkeypatch):
    """Case H1. A stand-in for df says that home is on NFS; squeue, that jobs 6 and 7 are not over."""
    for name in (
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
    ):  # torch sets the latter in processes that compile
        monkeypatch.delenv(name, raising=False)
    disk, home = tmp_path / "disk", tmp_path / "home"
    for folder in (disk, home / "tmp"):
        folder.mkdir(parents=True)
    tools = program(
        tmp_path / "bin",
        "df",
        f"#!/bin/sh\necho Type\ncase $2 in {home}*) echo nfs4 ;; *) echo ext4 ;; esac\n",
    ).parent
    program(tools, "squeue", "#!/bin/sh\nprintf '6\\n7\\n'\n")
    mine = disk / f"nanogpt-cache-{os.getuid()}"
    for left in ("job-5", "job-6_1"):  # of a job that was killed, and of an array's task
        (mine / left).mkdir(mode=0o700, parents=True)
    mine.chmod(0o700)
    show = 'set_caches; echo "$TRITON_CACHE_DIR"; echo "$TORCHINDUCTOR_CACHE_DIR"; '
    job = {"SLURM_JOB_ID": "7", "TMPDIR": str(disk), "HOME": str(home)}
    done = common(show, env=job, path=str(tools))
    assert done.stdout.split() == [f"{mine}/job-7/triton", f"{mine}/job-7/inductor"] and not done.stderr
    assert sorted(path.name for path in mine.iterdir()) == ["job-6_1", "job-7"]
    assert (mine / "job-7").stat().st_mode & 0o777 == 0o700
    common("drop_caches", env=job, path=str(tools))
    assert [path.name for path in mine.iterdir()] == ["job-6_1"]
    own = {"TRITON_CACHE_DIR": str(home / "no" / "triton")}
    done = common(
        show, env={**job, **own, "TMPDIR": str(home / "tmp"), "SLURM_TMPDIR": str(disk)}, path=str(tools)
    )
    assert done.stdout.split() == [own["TRITON_CACHE_DIR"], f"{mine}/job-7/inductor"]
    assert done.stderr.startswith(f"warning: TRITON_CACHE_DIR={home}/no/triton: on a network disk")
    outside = common(show, env={"TMPDIR": str(disk), "HOME": str(home)}, path=str(tools))
    assert (
        outside.stdout.split()[0] == f"{mine}/triton"
    )  # without a job: the user's, as the trainers themselves choose


def test_a_broken_conda_does_not_matter(tmp_path):
    """conda's start-up code fails and `module` does not exist: the environment's own Python is used, with a warning."""
    env_path = tmp_path / "env"
    program(env_path / "bin", "python", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (env_path / ".engaging-nanogpt").touch()
    (env_path / ".conda_sh").write_text(str(tmp_path / "conda.sh"))
    (tmp_path / "conda.sh").write_text("conda() { echo 'CondaError: run conda init' >&2; return 1; }\n")
    shown = common("activate_environment; command -v python", env={"ENV_PATH": str(env_path)})
    assert shown.stdout.strip() == f"{env_path}/bin/python", shown.stderr


class TestFlashAttention:
    """The build up to the compiler, which is a stand-in here, as are pip and the GPU."""

    @pytest.fixture
    def build(self, tmp_path: Path):
        archive = tmp_path / "site" / "flash_attn-2.8.3.post2.tar.gz"
        archive.parent.mkdir()
        (tmp_path / "tree" / "hopper").mkdir(parents=True)
        (tmp_path / "tree" / "setup.py").touch()
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "tree", "flash_attn-2.8.3.post2")
        env = tmp_path / "env" / "bin"
        program(
            env,
            "python",
            f"""#!/bin/bash
settings="MAX_JOBS=${{MAX_JOBS:-}}|ARCHS=${{FLASH_ATTN_CUDA_ARCHS:-}}|NO80=${{FLASH_ATTENTION_DISABLE_SM80:-}}"
echo "$PWD|$settings|$*" >>{tmp_path}/calls
case "$*" in
    *"import sys, torch"*) echo 2.13.0 ${{CUDA_OF_TORCH:-13.0}} cp312 ;;
    *"pip wheel"*) [ ! -e {tmp_path}/fails ] || exit 1
        for last; do :; done; mkdir -p "$last"; echo wheel >"$last/flash.whl" ;;
    *-r\\ *) cat "${{!#}}" >>{tmp_path}/calls ;;
esac
""",
        )
        program(
            tmp_path / "bin", "nvcc", "#!/bin/bash\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n"
        )

        (env.parent / ".engaging-nanogpt").touch()  # what a complete set-up leaves

        def run(*args: str, **more: str) -> subprocess.CompletedProcess:
            settings = {
                "LOCAL": "1", "ENV_PATH": str(tmp_path / "env"), "FLASH_ATTN_CACHE": str(tmp_path / "the cache"),
                "FLASH_ATTN_URL": archive.parent.as_uri(), "GPU_TYPE": "h100", "SLURM_MEM_PER_NODE": "40960",
                "FLASH_ATTN_SHA256": hashlib.sha256(archive.read_bytes()).hexdigest(), **more,
            }  # fmt: skip
            done = bash("slurm/modded/build_flash_attn.sh", *args, env=settings, path=str(tmp_path / "bin"))
            calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
            (tmp_path / "calls").unlink(missing_ok=True)
            done.calls = calls
            return done

        run.folder = tmp_path
        return run

    @pytest.mark.parametrize(
        ("gpu", "args", "kind", "archs"),
        [
            ("h100", (), "fa3-2.8.3.post2-torch2.13.0-cu13.0-cp312-sm90", "ARCHS=90|NO80=TRUE"),
            ("h200", ("--fa2",), "fa2-2.8.3.post2-torch2.13.0-cu13.0-cp312-sm90", "ARCHS=90|NO80=|"),
            ("a100", (), "fa2-2.8.3.post2-torch2.13.0-cu13.0-cp312-sm80", "ARCHS=80|NO80=|"),
            ("a100", ("--fa3",), "fa3-2.8.3.post2-torch2.13.0-cu13.0-cp312-sm80", "ARCHS=80|NO80=|"),
            ("l40s", (), "fa2-2.8.3.post2-torch2.13.0-cu13.0-cp312-sm80", "ARCHS=80|NO80=|"),
            ("rtx_pro_6000", (), "fa2-2.8.3.post2-torch2.13.0-cu13.0-cp312-sm120", "ARCHS=120|NO80=|"),
        ],
    )
    def test_each_gpu_gets_its_own_wheel_once(self, build, gpu, args, kind, archs):
        first = build(*args, GPU_TYPE=gpu)
        assert first.returncode == 0, first.stderr
        assert (build.folder / "the cache" / kind / "flash.whl").is_file()
        assert archs in first.calls
        assert "pip wheel . --no-deps --no-build-isolation" in first.calls
        assert f"check_flash_attn.py {kind[:3]}" in first.calls  # it ends with the numerical check
        second = build(*args, GPU_TYPE=gpu)
        assert second.returncode == 0
        assert "pip wheel" not in second.calls
        assert "pip install --no-deps --force-reinstall" in second.calls

    def test_compiler_processes_fit_cpus_and_memory(self, build):
        assert "MAX_JOBS=6|" in build(SLURM_CPUS_PER_TASK="64").calls  # 40 GB, 6 each
        shutil.rmtree(build.folder / "the cache")
        assert "MAX_JOBS=2|" in build(SLURM_CPUS_PER_TASK="4").calls

    def test_wrong_source_is_not_unpacked(self, build):
        done = build(FLASH_ATTN_SHA256="0" * 64)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "not the pinned content" in done.stderr
        assert not list(build.folder.glob("the cache/build-*"))

    def test_a_failed_build_goes_on_and_a_damaged_wheel_is_built_again(self, build):
        (build.folder / "fails").touch()
        assert "the build failed" in build().stderr
        (trees := list(build.folder.glob("the cache/build-*")))[0].joinpath("object.o").touch()
        (build.folder / "fails").unlink()
        assert build().returncode == 0
        assert (trees[0] / "object.o").exists(), "what was compiled is gone"
        next(build.folder.glob("the cache/fa3-*/flash.whl")).write_text("damaged")
        assert "pip wheel" in build().calls

    @pytest.mark.parametrize(
        ("args", "settings", "words"),
        [
            (("--fa3",), {"GPU_TYPE": "l40s"}, "FlashAttention 3 is for sm_80 and sm_90"),
            (("--fast",), {}, "expected --prebuilt, --fa2 or --fa3"),
            ((), {"GPU_TYPE": "tpu"}, "GPU_TYPE=tpu"),
            ((), {"FLASH_ATTN_URL": "file:///nonexistent"}, "could not be downloaded"),
        ],
    )
    def test_what_cannot_be_built_says_so(self, build, args, settings, words):
        done = build(*args, **settings)
        assert done.returncode == 2
        assert words in done.stderr

    def test_a_job_on_another_gpu_than_the_one_named_builds_nothing(self, build):
        """`GPU_TYPE=a100 sbatch ...`: the header's GPU is an H200."""
        program(build.folder / "bin", "nvidia-smi", "#!/bin/bash\necho 9.0\n")
        done = build(GPU_TYPE="a100")
        assert done.returncode == 2 and "pip" not in done.calls
        assert "GPU_TYPE=a100: is sm_80, and this job's GPU is sm_90" in done.stderr
        assert build(GPU_TYPE="h100").returncode == 0  # the same architecture: its wheel serves both

    def test_without_the_right_compiler_prebuilt_is_named(self, build):
        program(
            build.folder / "bin", "nvcc", "#!/bin/bash\necho 'Cuda compilation tools, release 12.4, V12.4'\n"
        )
        assert "is CUDA 12.4, but torch was built with 13.0" in build().stderr
        (build.folder / "bin" / "nvcc").unlink()
        if shutil.which("nvcc") is None:
            assert "--prebuilt" in build().stderr

    def test_prebuilt_is_pinned_by_hash(self, build):
        done = build("--prebuilt")
        assert done.returncode == 0, done.stderr
        assert "pip install --no-deps --require-hashes -r" in done.calls
        assert "xformers==0.0.34 --hash=sha256:381cc47f" in done.calls
        assert "nvidia-cuda-runtime-cu12==12.9.79 --hash=sha256:25bba2df" in done.calls
        assert "check_flash_attn.py prebuilt" in done.calls

    def test_a_torch_without_cuda_gets_nothing_installed(self, build):
        done = build("--prebuilt", CUDA_OF_TORCH="none")
        assert done.returncode == 2 and "bash setup_env.sh --cuda" in done.stderr and "pip" not in done.calls

    def test_the_check_needs_a_gpu_and_says_so(self):
        done = subprocess.run(
            [sys.executable, ROOT / "slurm/lib/check_flash_attn.py", "fa2"],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert "not checked" in done.stderr
