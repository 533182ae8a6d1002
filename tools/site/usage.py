"""`engaging usage JOBID`: what a job asked for, what it used, and what to ask for next time."""

import re
from dataclasses import dataclass

from nanogpt.common.errors import UserError
from tools.args import Parser, clock, parse_minutes, words
from tools.site import slurm
from tools.site.why import _job_id

FIELDS = (
    "JobID,State,Partition,Elapsed,Timelimit,AllocTRES,ReqTRES,ReqMem,NNodes,NCPUS,TotalCPU,MaxRSS,"
    "TRESUsageInMax,JobName"
)
ROOM = 1.3  # what to ask for, over what was used
SHORTEST_S = 60


@dataclass(frozen=True)
class Usage:
    """One job: minutes, MB, cores. What accounting did not say is None."""

    job: str
    name: str
    state: str
    partition: str
    elapsed_s: int
    limit_minutes: int | None
    cpus: int
    cpu_s: float | None
    memory_mb: int | None
    peak_mb: int | None
    gpus: int
    gpu_util: float | None  # per cent, where the site's accounting gathers it
    nodes: int = 1

    @property
    def cpu_use(self) -> float | None:
        """The share of the cores' time that was used, 0 to 1."""
        if self.cpu_s is None or not self.elapsed_s or not self.cpus:
            return None
        return min(1.0, self.cpu_s / (self.elapsed_s * self.cpus))


def read_usage(text: str) -> list[Usage]:
    """`sacct --parsable2 -o FIELDS`, allocations and steps: one Usage a job (or array task)."""
    rows = slurm.table(text)
    found = []
    for row in rows:
        job = row.get("JobID", "")
        if not job or "." in job:
            continue
        steps = [other for other in rows if other.get("JobID", "").startswith(job + ".")]
        peaks = [value for step in steps if (value := slurm.memory_mb(step.get("MaxRSS", ""))) is not None]
        cpu = [value for step in [row, *steps] if (value := _seconds(step.get("TotalCPU", ""))) is not None]
        gpu = [
            float(m[1])
            for step in steps
            if (m := re.search(r"gres/gpuutil=([0-9.]{1,6})", step.get("TRESUsageInMax", "")))
        ]
        allocated = slurm.tres(row.get("AllocTRES") or row.get("ReqTRES"))
        found.append(
            Usage(
                job, row.get("JobName", ""), slurm.state_of(row.get("State", "")), row.get("Partition", ""),
                elapsed_s=int(_seconds(row.get("Elapsed", "")) or 0),
                limit_minutes=parse_minutes(row.get("Timelimit", "")),
                cpus=allocated.get("cpu", slurm._int(row.get("NCPUS")) or 0),
                cpu_s=max(cpu, default=None),
                memory_mb=allocated.get("mem"),
                peak_mb=max(peaks, default=None),
                gpus=allocated.get("gres/gpu", 0),
                gpu_util=max(gpu, default=None),
                nodes=max(1, slurm._int(row.get("NNodes")) or 1),
            )
        )  # fmt: skip
    return found


def advice(usage: Usage) -> list[str]:
    """What to ask for next time; empty when the job fitted well."""
    found = []
    if usage.state == "TIMEOUT":
        found.append("it hit --time: a longer one, or let it go on by itself (--max-restarts)")
    memory = (usage.memory_mb or 0) / usage.nodes  # --mem and --cpus count a node
    full = bool(memory and usage.peak_mb and usage.peak_mb > memory * 0.9)
    if usage.state == "OUT_OF_MEMORY" or (usage.state == "FAILED" and full):
        twice = f"--mem {slurm.amount(int(2 * memory))}" if memory else "--mem with twice of it"
        return [*found, f"{twice}: its memory was used up"]
    if usage.elapsed_s < SHORTEST_S:
        return found  # too short to tell
    if usage.limit_minutes and usage.state == "COMPLETED":
        need = max(5, int(usage.elapsed_s / 60 * ROOM) + 1)
        if need < usage.limit_minutes * 0.7:
            found.append(f"--time {clock(need)}: a shorter job starts sooner")
    if memory and usage.peak_mb and usage.peak_mb * ROOM < memory * 0.5:
        found.append(f"--mem {max(4, round(usage.peak_mb * ROOM / 1000))}G: the rest lay idle")
    if full:
        found.append(f"--mem {round(usage.peak_mb * ROOM / 1000)}G: it was close to its limit")
    if usage.cpu_use is not None and usage.cpus > 2:
        need = max(1, round(usage.cpu_use * usage.cpus * ROOM + 0.5))
        if need < usage.cpus * 0.6:
            flag = -(-max(need, usage.gpus) // usage.nodes)
            found.append(
                f"--cpus {flag} (sbatch: --cpus-per-task={flag}): {usage.cpu_use:.0%} of {usage.cpus} cores were used"
            )
    if usage.gpu_util is not None and usage.gpus and usage.gpu_util < 50:
        found.append(f"the GPUs were used to {usage.gpu_util:.0f} %: a larger --batch_size, or fewer --gpus")
    return found


def show(usage: Usage) -> list[str]:
    """The report of one job."""
    lines = [f"job {usage.job} ({usage.name}) in {usage.partition}: {usage.state}"]
    limit = f" of {words(usage.limit_minutes)}" if usage.limit_minutes else ""
    lines.append(f"  time    {words(usage.elapsed_s / 60)}{limit}")
    digits = 1 if (usage.memory_mb or usage.peak_mb or 0) >= 1000 else 2
    peak = f"{usage.peak_mb / 1000:.{digits}f}" if usage.peak_mb is not None else "unknown"
    each = " on each node" if usage.nodes > 1 else ""
    asked = f" of {usage.memory_mb / usage.nodes / 1000:.{digits}f} GB{each}" if usage.memory_mb else ""
    lines.append(f"  memory  {peak}{asked}")
    share = f"{usage.cpu_use:.0%}" if usage.cpu_use is not None else "unknown"
    lines.append(f"  cores   {share} of {usage.cpus}")
    if usage.gpus:
        util = (
            f"{usage.gpu_util:.0f} % used"
            if usage.gpu_util is not None
            else "use unknown (the run's MFU tells)"
        )
        lines.append(f"  GPUs    {usage.gpus}, {usage.gpus * usage.elapsed_s / 3600:.2f} GPU-hours, {util}")
    found = advice(usage)
    short = (
        "too short to say what it needs"
        if usage.elapsed_s < SHORTEST_S
        else "it fitted: ask for the same again"
    )
    lines += [f"  next time {line}" for line in found] or [f"  {short}"]
    return lines


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("usage", "What a job asked for, what it used, and what to ask for next time.")
    parser.add_argument("job", metavar="JOBID", help="a job id or the name of a launch")
    args = parser.read(argv)
    slurm.need_slurm("engaging usage")
    job = _job_id(args.job)
    answer = slurm.ask(["sacct", "--parsable2", "-j", job, "-o", FIELDS])
    found = read_usage(answer.out)
    if not found:
        why = (
            slurm.refusal(answer) if answer.rc else "accounting knows no such job (it may take a few seconds)"
        )
        raise UserError(f"job {job}: {why}; squeue --me lists what is in the queue")
    for usage in found[:50]:
        print("\n".join(show(usage)))
    return 0


def _seconds(text: str) -> float | None:
    """`1-02:03:04`, `02:03:04`, `03:04.500` in seconds."""
    match = re.fullmatch(
        r"(?:([0-9]{1,5})-)?(?:([0-9]{1,5}):)?([0-9]{1,5}):([0-9]{1,2}(?:\.[0-9]+)?)", text.strip()
    )
    if not match:
        return None
    days, hours, minutes, seconds = match.groups()
    return int(days or 0) * 86400 + int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
