"""Values never become script text: hostile names, options and overrides, and what bash makes of the script."""

import contextlib
import itertools
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from nanogpt.common.errors import UserError
from tools.args import NAME, list_of_names, name_of
from tools.launch import book, presets, snapshot
from tools.launch.book import Launch
from tools.launch.command import _parser
from tools.launch.environment import is_secret, job_environment
from tools.launch.passed_on import passed_on
from tools.launch.submit import RunExecutor, batch_script, write_args
from tools.site.limits import Request

CANARY = "canary-was-here"
PIECES = [
    "$(touch {c})", "`touch {c}`", "; touch {c}", "| touch {c}", "&& touch {c}", "\ntouch {c}", "\r\ntouch {c}",
    "' ; touch {c} ; '",
    '" ; touch {c} ; "', "$HOME", "${{IFS}}touch${{IFS}}{c}", "> {c}", "\\\ntouch {c}",
    "*", "~", "!!", "#", "\t", " ", "\x1b[31m",
    "é\u202e", "\U0001f600", "a" * 300, "%x", "-rf", "--wrap=touch {c}", "../../{c}",
    "$'\\ntouch {c}'", "{{a,b}}", "\n#SBATCH --wrap=x",
]  # fmt: skip
WRAPS = ["{}", "x{}", "{}y", "a{}b", "--note={}", "1{}", "={}"]
HOSTILE = [wrap.replace("{}", piece.format(c=CANARY)) for piece, wrap in itertools.product(PIECES, WRAPS)]
SAFE_NAME = "run-1"


def launch(name: str = SAFE_NAME, **more: object) -> Launch:
    values = {
        "token": "f" * 24,
        "preset": "gpt2",
        "trainer": "nanogpt.train",
        "runs": ["out/x"],
        "args": [],
        "log": "logs/%x-%j.out",
    }
    return Launch(name=name, number=1, **{**values, **more})


def script(target: Launch, request: Request, partition: str = "p", tasks: int = 1) -> str:
    return batch_script(target, request, partition=partition, tasks=tasks, throttle=2)


def test_there_are_enough_cases():
    assert len(set(HOSTILE)) >= 200


def test_hostile_values_are_refused_or_harmless_wherever_they_are_given():
    """As a name, account, partition, GPU type, or an option that is passed on."""
    request = Request(1, "h200", 60, 1, 8, 64_000)
    for value in HOSTILE:
        for check in (name_of("--name"), list_of_names("--partition")):
            try:
                accepted = check(value)
            except UserError as error:
                assert "\n" not in str(error), repr(value)
            else:
                assert accepted.replace(",", "").replace("-", "").replace("_", "").replace(".", "").isalnum()
        for ask in (
            lambda v: script(launch(), Request(1, v, 60, 1, 8, None)),
            lambda v: script(launch(), Request(1, "h200", 60, 1, 8, None, account=v)),
            lambda v: script(launch(), request, partition=v),
        ):
            with contextlib.suppress(UserError):
                _only_the_known_lines(ask(value))
        with contextlib.suppress(UserError):
            _only_the_known_lines(script(launch(name=value), request))
            assert NAME.fullmatch(value), repr(value)
        with contextlib.suppress(UserError):
            text = batch_script(
                launch(), request, partition="p", tasks=1, throttle=1, passed_on={"nice": value}
            )
            (line,) = [line for line in text.splitlines() if "--nice" in line]
            assert line.startswith("#SBATCH --nice=") and "exec bash" in text.splitlines()[-1], repr(value)


def test_overrides_arrive_byte_for_byte_and_run_nothing(tmp_path):
    words = [f"--note={value}" for value in HOSTILE]
    for word in words:
        try:
            presets.check_overrides([word])
        except UserError:  # the second wall, below, must hold without this first one
            assert any(ord(char) < 32 or ord(char) == 127 for char in word), repr(word)
    assert _argv_in_the_job(words, tmp_path) == words
    assert not list(tmp_path.rglob(f"*{CANARY}*"))


def test_the_script_is_exactly_this():
    text = script(launch(), Request(4, "h200", 360, 2, 32, 256_000, "acc", "fast"), tasks=9)
    assert text.splitlines() == [
        "#!/bin/bash",
        "",
        "# Parameters",
        "#SBATCH --account=acc",
        "#SBATCH --array=0-8%2",
        "#SBATCH --comment=engaging:" + "f" * 24,
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --gres=gpu:h200:4",
        "#SBATCH --job-name=run-1",
        "#SBATCH --mem=256000M",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=logs/%x-%j.out",
        "#SBATCH --partition=p",
        "#SBATCH --qos=fast",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --time=360",
        "",
        "# command",
        "export SUBMITIT_EXECUTOR=slurm",
        'launch="$SLURM_SUBMIT_DIR/out/.launch/run-1/001"',
        'exec bash "$launch/code/slurm/lib/run.sh" --args-file "$launch/args/${SLURM_ARRAY_TASK_ID:-0}"',
    ]


def test_nothing_is_pickled(tmp_path):
    from tools.launch.submit import RunExecutor

    with pytest.raises(NotImplementedError):
        RunExecutor(tmp_path).submit(print)
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_the_owners_alone(tmp_path):
    target = book.new_launch(
        tmp_path, SAFE_NAME, token="t", preset="gpt2", trainer="t", runs=["out/x"], args=[]
    )
    write_args(target, tmp_path, [["a"]])
    assert (target.folder(tmp_path) / "args" / "0").stat().st_mode & 0o777 == 0o600
    assert target.folder(tmp_path).stat().st_mode & 0o777 == 0o700


def test_the_job_sees_listed_variables_only(monkeypatch):
    for name in (
        "PYTHONPATH",
        "SBATCH_PARTITION",
        "SLURM_JOB_ID",
        "LD_PRELOAD",
        "AWS_SECRET_ACCESS_KEY",
        "NANOGPT_API_KEY",
    ):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    seen = job_environment({"DATA_ROOT": "/d"})
    assert seen["DATA_ROOT"] == "/d" and seen["NCCL_DEBUG"] == "INFO" and seen["WANDB_API_KEY"] == "secret"
    assert not {
        "PYTHONPATH",
        "SBATCH_PARTITION",
        "SLURM_JOB_ID",
        "LD_PRELOAD",
        "AWS_SECRET_ACCESS_KEY",
        "NANOGPT_API_KEY",
    } & set(seen)
    assert is_secret("HF_TOKEN") and is_secret("aws_secret_access_key") and not is_secret("NCCL_DEBUG")


@pytest.mark.parametrize(
    "flag", ["--wandb_api_key=x", "--hf_token=x", "--apikey=x", "--my-password=x", "--client_secret=x"]
)
def test_a_secret_as_a_flag_is_refused_and_not_repeated(flag):
    with pytest.raises(UserError) as caught:
        presets.check_overrides([flag.replace("=x", "=CANARYVALUE")])
    assert "CANARYVALUE" not in str(caught.value)
    assert presets.check_overrides(["--tokens_per_step=100", "--eval_tokens=1"]) != []


def test_the_snapshot_is_what_git_knows_and_later_edits_do_not_reach_it(tmp_path):
    root, target = tmp_path / "a checkout", tmp_path / "copy"
    root.mkdir()
    files = {"a.py": "1", "sub/b é.sh": "2", "new.py": "3", "data/big.bin": "4", "$(touch x).py": "5"}
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / ".gitignore").write_text("/data/\n")
    (root / "link").symlink_to("/etc/passwd")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "a.py", "sub", ".gitignore", "link"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    facts = snapshot.copy_code(root, target)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == {"a.py", "sub/b é.sh", "new.py", ".gitignore", "$(touch x).py"}
    assert facts["files"] == 5 and len(facts["commit"]) == 40 and facts["changed"] is True
    (root / "a.py").write_text("changed")
    assert (target / "a.py").read_text() == "1"
    assert snapshot.copy_code(root, tmp_path / "copy2")["digest"] != facts["digest"]


def test_without_git_the_folder_is_copied_less_what_is_generated(tmp_path):
    root = tmp_path / "plain"
    for name in ("a.py", "out/x.py", "data/y.py", ".hidden/z.py", "__pycache__/a.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")
    assert snapshot.list_files(root) == (["a.py"], "folder")


def test_a_launch_is_found_again_and_a_forged_record_is_not_believed(tmp_path):
    first = book.new_launch(tmp_path, "one", token="t", preset="gpt2", trainer="t", runs=["out/one"], args=[])
    second = book.new_launch(
        tmp_path, "one", token="u", preset="gpt2", trainer="t", runs=["out/one"], args=[]
    )
    assert (first.number, second.number) == (1, 2) and book.find(tmp_path, "one").token == "u"
    with pytest.raises(UserError, match="did you mean 'one'"):
        book.find(tmp_path, "onee")
    record = second.folder(tmp_path) / "job.json"
    for bad in ("{", "[]", '{"name": 3}', json.dumps({**vars(second), "name": "../x"}), "[" * 10_000):
        record.write_text(bad)
        assert book.find(tmp_path, "one").token == "t"


def _only_the_known_lines(text: str) -> None:
    """Every line is an #SBATCH option without shell characters, or one of the fixed lines."""
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            assert shlex.split(line[8:]) == [line[8:]] and not set(line) & set("$`;|&<>\"'\\ \t"[:-2]), line
        else:
            assert not line or line.startswith(
                ("#!/bin/bash", "# ", "export SUBMITIT", 'launch="', "exec bash")
            ), line


def _argv_in_the_job(words: list[str], folder: Path) -> list[str]:
    """Run the batch script with bash, as SLURM would, with a run.sh that notes the words of its file."""
    target = book.new_launch(
        folder, SAFE_NAME, token="t", preset="p", trainer="t", runs=["out/x"], args=[], log="logs/%x-%j.out"
    )
    write_args(target, folder, [words])
    library = target.folder(folder) / "code" / "slurm" / "lib"
    library.mkdir(parents=True)
    (library / "run.sh").write_text('cp "$2" seen\n')
    text = script(target, Request(1, "h200", 60, 1, 8, None))
    env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(folder)}
    subprocess.run(["bash"], input=text.encode(), env=env, cwd=folder, check=True)
    return [
        word.decode("utf-8", "surrogateescape") for word in (folder / "seen").read_bytes().split(b"\0")[:-1]
    ]


def options_of(*words: str) -> dict:
    return passed_on(_parser().read(["gpt2", *words]))


def test_any_option_of_sbatch_is_passed_on_and_mail_sets_the_useful_four(monkeypatch):
    monkeypatch.setenv("ENGAGING_MAIL", "lab@mit.edu")
    found = options_of(
        "--sbatch", "nice=100", "--sbatch", "exclusive", "--sbatch=constraint=[a|b]&c", "--mail"
    )
    text = batch_script(
        launch(), Request(1, "h200", 60, 1, 8, None), partition="p", tasks=1, throttle=1, passed_on=found
    )
    lines = text.splitlines()
    for line in ("nice=100", "exclusive", "mail-user=lab@mit.edu", "mail-type=BEGIN,END,FAIL,REQUEUE"):
        assert f"#SBATCH --{line}" in lines, text
    assert "'[a|b]&c'" in text or "[a|b]&c" in text
    assert options_of("--mail", "me@mit.edu")["mail-user"] == "me@mit.edu" and options_of() == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sbatch", "partition=x"], "a flag of its own"),
        (["--sbatch=--output=/tmp/x"], "logs/NAME-JOBID.out"),
        (["--sbatch", "wrap=touch x"], "launch sets it itself"),
        (["--sbatch", "-p x"], "by its long name"),
        (["--sbatch", "nice="], "by its long name"),
        (["--mail"], "engaging config set mail"),
        (["--mail", "nobody"], "expected an address"),
    ],
)
def test_options_that_launch_owns_are_refused(monkeypatch, words, said):
    monkeypatch.delenv("ENGAGING_MAIL", raising=False)
    with pytest.raises(UserError, match=said):
        options_of(*words)
    with pytest.raises(UserError, match="not a value"):
        batch_script(
            launch(), Request(0, None, 9), partition="p", tasks=1, throttle=1,
            passed_on={"nice": "1\ntouch x"},
        )  # fmt: skip


def test_a_greeting_with_numbers_is_not_taken_for_the_job():
    said = (
        "Welcome to Cluster3\ncheck 1: job 12 passed\ncheck 2 of 5\nSubmitted batch job 4711 on cluster c2\n"
    )
    assert RunExecutor.job_id(said) == "4711"
    assert RunExecutor.job_id("Welcome to Cluster3, job 12\n") == RunExecutor.job_id("") == ""
