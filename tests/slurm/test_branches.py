"""Branches that a healthy cluster cannot reach, with stand-ins: old bash, no module command, broken conda, no nvcc."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.slurm.branch_kit import ROOT, bash, program


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

    def test_the_check_needs_a_gpu_and_says_so(self, zygote):
        words = [ROOT / "slurm/lib/check_flash_attn.py", "fa2"]
        child = zygote.run(words, module="tests.faults.forked_python")  # where no GPU is visible
        assert child.status == 2
        assert "not checked" in child.stderr
