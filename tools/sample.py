"""`engaging sample RUN`: a text from a run's model, by the sampler that the run kept with its source.

    engaging sample out/quickstart --start="ROMEO:"
    engaging sample out/speedrun --num_samples=1 --temperature=0

Flags behind RUN go to the sampler of the run's trainer, nanogpt/sample.py or modded_nanogpt/sample.py, whose own --help
names them: `engaging sample RUN --help`.
"""

import subprocess
import sys
from pathlib import Path

from nanogpt.common import rundir
from nanogpt.common.errors import UserError
from tools.place import checkout

SAMPLERS = {
    "nanogpt/train.py": "nanogpt/sample.py",
    "modded_nanogpt/train_gpt.py": "modded_nanogpt/sample.py",
}


def main(argv: list[str]) -> int:
    """Start the sampler; its exit status."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__.strip())
            return 0
        raise UserError("engaging sample: name a run first: engaging sample out/quickstart")
    folder = Path(argv[0]).expanduser().absolute()
    if not rundir.holds_run(folder):
        raise UserError(
            f"engaging sample {argv[0]}: holds no run; name a run directory, such as out/quickstart"
        )
    entry = rundir.read_json(folder / "config.json").get("entry")
    if entry not in SAMPLERS:
        raise UserError(
            f"engaging sample {argv[0]}: {str(entry)[:60]} has no sampler; runs of {', '.join(sorted(SAMPLERS))} do"
        )
    script = folder / "source" / SAMPLERS[entry]
    if not script.is_file():
        print(f"note: {folder}: keeps no sampler with its source; this repository's is used", file=sys.stderr)
        script = checkout() / SAMPLERS[entry]
    return subprocess.run([sys.executable, str(script), f"--out_dir={folder}", *argv[1:]]).returncode
