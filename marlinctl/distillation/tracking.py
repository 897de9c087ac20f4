"""The curves of a training in TensorBoard or Weights & Biases, through accelerate's trackers: `--tracker`.

    train/loss, train/kl, ...                          every LOG_EVERY steps, means since the point before
    train/learning_rate, train/tokens_per_second
    held_out/loss, held_out/kl, ...                    before the first step, and of the published weights after the last

TensorBoard's files lie in OUT.tensorboard/RUN, wandb's in a folder `wandb` beside OUT. The job keeps the name of its run, so a resumed job
continues it. TensorBoard forgets what a killed run had logged behind the state that is resumed; wandb keeps it and ignores the repetition.
Only the main process logs.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from marlinctl.distillation.state import DistillJob
from marlinctl.errors import EnvironmentProblem
from marlinctl.system.console import Console

Track = Callable[[Mapping[str, float], int], None]  # values by name, at a step
PROJECT = "marlinctl"
_RUN = "tracker.json"
_FIX = {
    "tensorboard": "make the folder of OUT writable, or leave --tracker out",
    "wandb": "`wandb login`; or --offline now and `wandb sync` later; or leave --tracker out",
}


def untracked(values: Mapping[str, float], step: int) -> None:
    """Of a run without a tracker."""


def require_tracker(name: str | None) -> None:
    """EnvironmentProblem E402 where its package is missing. A folder `wandb` that wandb left here does not count as one."""
    if name is None:
        return
    found = find_spec(name)
    if found is None or found.origin is None:
        what = f"--tracker {name} needs the package {name}, which is not installed"
        raise EnvironmentProblem("E402", what, where="--tracker", fix=f"pip install 'marlinctl[{name}]'")


@contextmanager
def tracking(
    name: str | None, out: Path, job: DistillJob, config: Mapping[str, Any], *, offline: bool, console: Console
) -> Iterator[Track]:
    """What logs values, until the run ends. config: settings of a new run.

    EnvironmentProblem E406 where the tracker does not start: no login, no connection, a folder that cannot be written.
    """
    if name is None:
        yield untracked
        return
    known = (job.path / _RUN).exists()
    if not known:
        job.save_document(_RUN, {"run": f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"})
    run = str(job.document(_RUN)["run"])
    newest = job.newest_step() if known else None
    try:
        tracker, where = _tensorboard(run, out, newest) if name == "tensorboard" else _wandb(run, out, offline)
        tracker.start()
        if not known:
            tracker.store_init_configuration({key: value for key, value in config.items() if value is not None})
    except Exception as error:  # the packages raise what they like: no login, no connection, no permission
        raise EnvironmentProblem("E406", f"{name} does not start: {error}", where="--tracker", fix=_FIX[name]) from error
    console.say(f"the training's curves: {where}")
    try:
        yield lambda values, step: tracker.log(dict(values), step=step)
    finally:
        tracker.finish()


def _tensorboard(run: str, out: Path, newest: int | None) -> tuple[Any, str]:
    from accelerate.tracking import TensorBoardTracker

    folder = out.absolute().with_name(f"{out.name}.tensorboard")
    purge = {} if newest is None else {"purge_step": newest + 1}
    return TensorBoardTracker(run, folder, **purge), f"tensorboard --logdir {folder}"


def _wandb(run: str, out: Path, offline: bool) -> tuple[Any, str]:
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", PROJECT)  # wandb's own variable, which it reads only where no project is given
    mode = {"mode": "offline"} if offline else {}
    return WandBTracker(
        project, id=run, name=out.name, resume="allow", dir=str(out.absolute().parent), **mode
    ), f"wandb, run {run} of {project}"
