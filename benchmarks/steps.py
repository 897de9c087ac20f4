"""Commands that need one another's results, each in a process of its own, several at once on each GPU. What is done is not done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    command: list[str]
    needs: tuple[str, ...] = ()


class Runner:
    """Runs steps, `at_once` on each GPU. WORK/done/NAME has the seconds of a step that ended well, WORK/logs/NAME what it printed."""

    def __init__(self, work: Path, gpus: list[str], at_once: int) -> None:
        self.work, self.at_once = work, at_once
        self.busy = dict.fromkeys(gpus, 0)
        self.changed = threading.Condition()
        self.failed: list[str] = []
        self.started = time.monotonic()

    def run(self, wanted: list[Step]) -> list[str]:
        """Returns the names of steps that failed, or that could not be run because of them."""
        waiting = [step for step in wanted if not self._done(step.name)]
        threads = []
        with self.changed:
            while waiting:
                lost = [step for step in waiting if any(name in self.failed for name in step.needs)]
                self.failed += [step.name for step in lost]
                waiting = [step for step in waiting if step not in lost]
                ready = next((step for step in waiting if all(self._done(name) for name in step.needs)), None)
                gpu = min(self.busy, key=lambda name: self.busy[name])
                if ready is None or self.busy[gpu] >= self.at_once:
                    if waiting:
                        self.changed.wait()
                    continue
                waiting.remove(ready)
                self.busy[gpu] += 1
                threads.append(threading.Thread(target=self._run, args=(ready, gpu)))
                threads[-1].start()
        for thread in threads:
            thread.join()
        return self.failed

    def _done(self, name: str) -> bool:
        return (self.work / "done" / name).exists()

    def _run(self, step: Step, gpu: str) -> None:
        environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        started = time.monotonic()
        for suffix in ("", ".job"):  # of a run that was killed
            shutil.rmtree(self.work / "models" / f"{step.name}{suffix}", ignore_errors=True)
        (self.work / "results" / f"{step.name}.json").unlink(missing_ok=True)
        log = self.work / "logs" / step.name
        with log.open("w") as file:
            code = subprocess.run(step.command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        took = time.monotonic() - started
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        with self.changed:
            if code == 0:
                (self.work / "done" / step.name).write_text(json.dumps({"seconds": round(took, 1)}))
            else:
                self.failed.append(step.name)
            self.busy[gpu] -= 1
            print(f"[{time.monotonic() - self.started:.0f} s] {step.name}: {took:.0f} s, exit {code}: {lines[-1][:200]}", flush=True)
            self.changed.notify_all()
