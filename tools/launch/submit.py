"""The batch script, and handing it to SLURM exactly once.

What is used of submitit, and what is not. Its `SlurmExecutor` holds the options, checks their names against
sbatch's and renders the `#SBATCH` lines; its reader takes the job id from sbatch's answer. Its pickles are
not used: submitit stores the function to run as a cloudpickle in the log folder and executes whatever it
finds there later, on storage that others may write to. Nor is its local executor (the same pickles), its
signal handler (it ignores SIGTERM, so a preempted job starts at step 0 unless the administrator set a flag)
and its habit of writing a job's name into the script as it comes (a newline in it runs). Our jobs run
slurm/lib/run.sh, as every other script here does.

Values never become script text: the name and the options are of strict forms, all else is in a file the job
reads.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import submitit
from submitit.core.utils import FailedSubmissionError

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_bytes
from tools.args import NAME
from tools.launch.book import COMMENT, SHELF, Launch
from tools.launch.environment import job_environment
from tools.site import slurm
from tools.site.limits import Request
from tools.site.slurm import Answer, SlurmUnreachable

OPTION_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:,=%/@+-]*")
PASSED_ON_VALUE = re.compile(r"[A-Za-z0-9._:,=%/@+&|()\[\]*!~^-]+")  # --constraint has a language of its own
SAVE_LEAD_S = 120  # how long before the time limit the job is told to save
ATTEMPTS = 3
LOOKUPS = (0.5, 2.0, 5.0, 10.0)  # seconds between questions about a submission that got no answer


class RunExecutor(submitit.SlurmExecutor):
    """submitit's SLURM executor as a writer of batch scripts: it pickles nothing and submits nothing."""

    @classmethod
    def affinity(cls) -> int:
        """Usable without SLURM too: `--dry-run` prints the script on a laptop."""
        return 2

    def submit(self, *_: object, **__: object) -> None:  # type: ignore[override]
        """Refused: a function would travel as a pickle."""
        raise NotImplementedError("closures are not submitted here; see tools/launch/submit.py")

    def script(self, command: str) -> str:
        """The batch script that runs `command` with the options set so far."""
        return self._make_submission_file_text(command, "unused")

    @staticmethod
    def job_id(text: str) -> str:
        """The job id in sbatch's answer, "" when there is none. A site's filter may greet with numbers before it."""
        lines = [line for line in text.splitlines() if line.startswith("Submitted batch job ")]
        try:
            return submitit.SlurmExecutor._get_job_id_from_submission_command(lines[-1] if lines else "")
        except FailedSubmissionError:
            return ""


def batch_script(
    launch: Launch,
    request: Request,
    *,
    partition: str,
    tasks: int,
    throttle: int,
    reservation: str | None = None,
    after: str = "",
    command: str = "",
    passed_on: Mapping[str, str | bool] | None = None,
) -> str:
    """The exact text for sbatch. Raises UserError for a value that must not stand in a script.

    `after`: job ids joined by `:`; it starts when all have ended well, and is cancelled when one has not. `command`
    replaces `job_command`: fixed text but for strict names. `passed_on`: options of sbatch as the user gave them.
    """
    executor = RunExecutor(SHELF)
    further = {
        "output": launch.log,
        "comment": COMMENT + launch.token,
        "signal": f"B:USR1@{SAVE_LEAD_S}",
        "requeue": True,
        "reservation": reservation,
        "dependency": f"afterok:{after}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    if tasks > 1:
        further["array"] = f"0-{tasks - 1}%{throttle}"
    options = {
        "job_name": launch.name,
        "partition": partition,
        "time": request.minutes,
        "nodes": request.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": request.cpus,
        "mem": f"{request.memory_mb}M" if request.memory_mb else None,
        "gres": f"gpu:{request.gpu_type}:{request.gpus}" if request.gpu_type else f"gpu:{request.gpus}",
        "account": request.account,
        "qos": request.qos,
    }
    if not request.gpus:
        del options["gres"]
    options = {key: value for key, value in options.items() if value is not None}
    further = {key: value for key, value in further.items() if value is not None}
    for key, value in (*options.items(), *further.items()):
        if not OPTION_VALUE.fullmatch(str(value)):
            raise UserError(f"--{key.replace('_', '-')}={value!r}: not a value for a batch script")
    for key, value in (passed_on or {}).items():
        if not PASSED_ON_VALUE.fullmatch(str(value)):
            raise UserError(f"--sbatch={key}={value!r}: not a value for a batch script")
    further.update(passed_on or {})
    executor.update_parameters(
        **options, additional_parameters=further, stderr_to_stdout=True, use_srun=False, wckey=None
    )
    return executor.script(command or job_command(launch))


def job_command(launch: Launch) -> str:
    """The last lines of the script: fixed but for the launch's own folder (a strict name and a number)."""
    if not NAME.fullmatch(launch.name):
        raise UserError(f"--name={launch.name!r}: not a name")
    folder = f"{SHELF}/{launch.name}/{launch.number:03}"
    return (
        f'launch="$SLURM_SUBMIT_DIR/{folder}"\n'
        'exec bash "$launch/code/slurm/lib/run.sh" --args-file "$launch/args/${SLURM_ARRAY_TASK_ID:-0}"'
    )


def write_args(launch: Launch, root: Path, tasks: list[list[str]]) -> None:
    """One NUL-separated file of arguments a task, readable by the owner only."""
    folder = launch.folder(root) / "args"
    folder.mkdir(mode=0o700)
    for index, words in enumerate(tasks):
        data = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
        path = folder / str(index)
        path.touch(mode=0o600)
        path.write_bytes(data)


def submit(
    launch: Launch, root: Path, script: str, environment: dict[str, str], say: Callable[[str], None] = print
) -> str:
    """Hand the script to sbatch; returns the job id. Exactly one job comes of it, or none.

    When SLURM does not answer, the job may have been taken all the same: its token is looked up before
    another try. Raises UserError for a refusal, SlurmUnreachable when nothing can be known; the launch's
    record says which.
    """
    path = launch.folder(root) / "submit.sh"
    atomic_write_bytes(path, script.encode())
    for attempt in range(1, ATTEMPTS + 1):
        answer = slurm.ask(
            ["sbatch", str(path.relative_to(root))], cwd=root, env=job_environment(environment), timeout=60
        )
        job_id = RunExecutor.job_id(answer.out)
        if not job_id and (answer.unreachable or answer.rc == 0):
            say("SLURM did not answer; looking whether it took the job all the same ...")
            job_id = find_by_token(launch.token)
        if job_id:
            launch.job_id, launch.state = job_id, "submitted"
            launch.save(root)
            return job_id
        # The request was checked: a GPU that SLURM does not know now is on a node that has yet to report.
        later = "generic resource" in answer.err.lower() and attempt < ATTEMPTS
        if not answer.unreachable and answer.rc != 0 and not later:
            raise UserError(explain_refusal(answer, launch))
        if attempt < ATTEMPTS:
            time.sleep(2**attempt)
    raise SlurmUnreachable(
        f"sbatch: {slurm.refusal(answer)}; nothing was submitted, try again in a few minutes"
    )


def find_by_token(token: str) -> str:
    """The job that carries this token, "" if SLURM says there is none.

    Raises SlurmUnreachable when SLURM never answers: then nobody knows, and another sbatch would be a
    second job.
    """
    for wait in LOOKUPS:
        time.sleep(wait)
        answer = slurm.ask(["squeue", "-h", "--me", "--states=all", "-o", "%F|%k"])
        if answer.rc != 0:
            continue
        for line in answer.out.splitlines():
            job_id, _, comment = line.strip().partition("|")
            if comment == COMMENT + token and job_id.isdigit():
                return job_id
        return ""
    raise SlurmUnreachable(
        "SLURM does not answer, so it is not known whether it took the job; once it is back, "
        "engaging status NAME finds it, and launching again will not make a second one"
    )


def test_only(root: Path, script: str, environment: dict[str, str] | None = None) -> Answer:
    """Ask the scheduler about a script without queueing it."""
    return slurm.ask(["sbatch", "--test-only"], cwd=root, env=job_environment(environment), script=script)


def explain_refusal(answer: Answer, launch: Launch) -> str:
    """sbatch's refusal as one line with a remedy."""
    text = slurm.refusal(answer)
    for words, remedy in REMEDIES.items():
        if words in text.lower():
            return f"sbatch: {text}; {remedy}"
    return f"sbatch: {text}; engaging plan {launch.preset} shows what this cluster takes"


REMEDIES = {
    "invalid account": "engaging doctor lists your accounts (a new one takes about 15 minutes); "
    "name --account and --qos together",
    "invalid qos": "engaging doctor lists the QOS open to you",
    "node configuration is not available": "no node has that: engaging plan shows what the nodes have",
    "time limit is invalid": "ask for less with --time; the run goes on by itself in a further job",
    "invalid partition": "sinfo lists the partitions",
    "job violates accounting/qos policy": "it is over one of your own limits: engaging plan names it",
    "maxsubmit": "you have as many jobs in the queue as you may: wait, or cancel some",
    "invalid reservation": "scontrol show reservation lists them",
}
