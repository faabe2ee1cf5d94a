"""One worker of the stress test: stubs that write what a training writes, and some real runs.

As a program: `python stress_worker.py ROOT SKEW`: its clock is SKEW seconds wrong.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import fake_trainer

from prime_jax.config import run_id
from prime_jax.sweep import worker

STEPS, STEP_SECONDS = 12, 0.01
BEAT, TIMEOUT = 0.1, 1.2


class Trainer(fake_trainer.Trainer):
    """A state that depends on every step, saved at every third; attempt 1 of some runs fails."""

    def __init__(self, seconds: float = STEP_SECONDS):
        super().__init__()
        self.seconds = seconds

    def train(self, config, run_dir, *, earlier=(), donors=(), pinned=0, heartbeat=None, log=print):
        if config.data.fingerprint:  # prepared data: a real run
            return self._real(config, run_dir, earlier, heartbeat, log)
        run, saves = run_id(config), run_dir / "checkpoints"
        saves.mkdir(parents=True, exist_ok=True)
        step, state = newest([run_dir, *earlier])
        state = state or run
        fails = int(run, 16) % 20 == 0 and run_dir.name == "1"
        with (run_dir / "metrics.jsonl").open("a") as log:
            while step < STEPS:
                step, state = step + 1, hashlib.sha256(f"{state} {step}".encode()).hexdigest()
                row = {"step": step, "loss": 4.0, "pid": os.getpid(), "state": state}
                log.write(json.dumps(row) + "\n")
                log.flush()
                if step % 3 == 0:
                    temporary = saves / f".{step}"
                    temporary.write_text(json.dumps([step, state]))
                    temporary.rename(saves / str(step))
                if not heartbeat({"step": step, "loss": 4.0, "tokens_per_second": 100.0}):
                    raise self.Stopped
                if fails and step == STEPS // 2:
                    raise RuntimeError("bad luck")
                time.sleep(self.seconds)
        return fake_trainer.result(config) | {"state": state}

    def _real(self, config, run_dir, earlier, heartbeat, log):
        from prime_jax import train

        try:
            return train.train(config, run_dir, earlier=earlier, heartbeat=heartbeat, log=log)
        except train.Interrupted as error:
            raise self.Stopped from error


def newest(folders) -> tuple[int, str]:
    found = [
        tuple(json.loads(path.read_text()))
        for folder in folders
        for path in (folder / "checkpoints").glob("[0-9]*")
        if path.is_file()
    ]
    return max(found, default=(0, ""))


if __name__ == "__main__":
    skew, wall = float(sys.argv[2]), time.time
    time.time = lambda: wall() + skew
    code = worker.work(
        Path(sys.argv[1]), trainer=Trainer(), heartbeat_seconds=BEAT, timeout=TIMEOUT, backoff=0.3
    )
    raise SystemExit(code)
