"""A trainer of ten lines that keeps the real one's contract: checkpoints, metrics, status 75 when asked to stop.

    standin.py --out_dir=DIR --steps=N --pause=SECONDS [--break_at=STEP] [--gate=FILE] [--note=TEXT]

It costs no CPU time, so jobs of a minute can wait beside the tests. `loss` depends on every step before it.
While the file of --gate is not there, no second step begins.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FLAGS = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))


def main() -> int:
    folder = Path(FLAGS["out_dir"])
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    print(f"rank {rank} of {world}, {os.environ.get('OMP_NUM_THREADS')} threads", flush=True)
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.append(number))
    saved = sorted((folder / "checkpoints").iterdir())
    state = json.loads(saved[-1].read_text()) if saved else {"step": 0, "loss": 4.0}
    with (folder / "attempts").open("a") as file:
        file.write(f"{state['step']} {os.environ.get('SLURM_RESTART_COUNT', '0')}\n")
    (folder / "words").write_text(json.dumps(sys.argv[1:]))
    while state["step"] < int(FLAGS.get("steps", 3)) and not asked and not (folder / "stop").exists():
        if FLAGS.get("break_at") == str(state["step"]):
            print("this trainer broke", flush=True)
            return 1
        if state["step"] and "gate" in FLAGS and not Path(FLAGS["gate"]).exists():
            time.sleep(0.1)
            continue
        time.sleep(float(FLAGS.get("pause", "0.1")))
        state = {"step": state["step"] + 1, "loss": state["loss"] * 0.99 + state["step"] % 7 / 1000}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"event": "train", **state}) + "\n")
    done = state["step"] >= int(FLAGS.get("steps", 3))
    (folder / "checkpoints" / f"step_{state['step']:08}").write_text(json.dumps(state))
    print("finished" if done else f"stopped by {asked}", state, flush=True)
    return 0 if done else 75


if __name__ == "__main__":
    raise SystemExit(main())
