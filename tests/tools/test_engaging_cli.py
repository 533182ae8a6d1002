"""`engaging` itself: quick help, nearest names, one line for every mistake."""

import pytest

from tools.cli import COMMANDS

OURS = [name for name, (module, _) in COMMANDS.items() if module.startswith(("tools.launch", "tools.site"))]
MISTAKES = [
    (["lanch"], "did you mean 'launch'"),
    (["launch"], "required: PRESET"),
    (["launch", "gpt3"], "did you mean 'gpt2'"),
    (["launch", "gpt2", "--gpu", "2"], "unknown flag --gpu; did you mean '--gpus'"),
    (["launch", "gpt2", "--gpus", "two"], "--gpus='two'"),
    (["launch", "gpt2", "--gpus", "-1"], "--gpus"),
    (["launch", "gpt2", "--gpus", "99999"], "from 0 to 1024"),
    (["launch", "gpt2", "--time", "soon"], "--time='soon'"),
    (["launch", "gpt2", "--time", "0"], "--time='0'"),
    (["launch", "gpt2", "--name", "../x"], "--name"),
    (["launch", "gpt2", "--seeds", "0"], "--seeds='0'"),
    (["launch", "gpt2", "--mem", "lots"], "--mem='lots'"),
    (["launch", "gpt2", "extra"], "unknown argument extra"),
    (["launch", "gpt2", "--", "learning_rate=1"], "only flags of the trainer"),
    (["launch", "gpt2", "--", "--out_dir=x"], "launch sets it itself"),
    (["launch", "gpt2", "--", "--wandb_api_key=x"], "a secret on a command line"),
    (["launch", "gpt2", "--", "--note=a\nb"], "control characters"),
    (["plan", "gpt2", "--seed", "3"], "did you mean '--seeds'"),
    (["status", "nobody-launched-this"], "nothing was launched under this name"),
    (["logs", "nobody-launched-this"], "nothing was launched under this name"),
    (["cancel", "../../etc"], "nothing was launched under this name"),
    (["site", "init", "a b"], "only letters"),
    (["usage"], "required: JOBID"),
]


@pytest.mark.parametrize(
    "words", [[], *[[name] for name in OURS]], ids=lambda words: " ".join(words) or "engaging"
)
def test_help_imports_nothing_heavy(run_python, words):
    code = (
        "import sys\nfrom tools.cli import main\n"
        f"try:\n    main([*{words!r}, '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('torch', 'scipy', 'pydantic', 'matplotlib') if name in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.returncode == 0 and "usage: engaging" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("[]"), done.stdout


def test_help_names_every_command(run_python):
    text = run_python("-m", "tools").stdout
    for name in COMMANDS:
        assert f"  {name} " in text


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_exit_2(run_python, words, said, tmp_path):
    done = run_python("-m", "tools", *words, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_outside_a_checkout_the_installed_one_is_used(run_python, root, tmp_path):
    done = run_python("-m", "tools", "status", cwd=tmp_path, env={"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_fault(run_python):
    script = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "tools", "--help"], stdout=subprocess.PIPE)
child.stdout.close()
sys.exit(child.wait())
"""
    done = run_python("-c", script)
    assert done.returncode == 0 and "Traceback" not in done.stderr
