"""The sequential pipeline over several processes: what each does, and where they meet.

    process 0   samples 0..63     ─► Gram ─┐         ┌─► rows 0..2047    ─┐
    process 1   samples 64..127   ─► Gram ─┴─ sum ─► └─► rows 2048..4095 ─┴─ together: the weights that the next forward pass needs

Each has the hidden states of its own samples and reads the model from its own folder. Hessians are sums over all of them, so what depends
on a Hessian alone (factorisation, damping, dead inputs) is the same everywhere; rows are independent given it (rows.py). The main process
has the job's folder: it begins, commits, checks and publishes. Hidden states that are kept are those of all samples, in their order, so
another number of processes may resume the job.

Sums are formed in the order of the backend. With one process everything here is what it would be without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from marlinctl.checkpoint.contents import Contents
from marlinctl.data.calibration import CalibrationSet
from marlinctl.data.tokens import Tokens
from marlinctl.errors import CheckFailed, Problem
from marlinctl.oneshot.gram import SolveStage
from marlinctl.oneshot.open import RunInputs
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.quantize.types import Hessian
from marlinctl.system.processes import Processes

# ---- before the work -----------------------------------------------------------------------------------------------------------------


def open_on_all(processes: Processes, look: Callable[[Contents | None], RunInputs]) -> RunInputs:
    """The model, opened by each process; the main one first, which downloads it where it must be.

    look: opens the model; given what its files hold, it does not read them for that again. The first process of every further machine reads
    them too: CheckFailed E117 where they differ.
    """
    if processes.count == 1:
        return look(None)
    opened = look(None) if processes.main else None
    contents = processes.share(opened.contents if opened is not None else None)
    if opened is None:
        opened = look(None if processes.local_index == 0 else contents)
    identities = processes.gather(_weights(opened.contents))
    problems = [
        Problem(
            f"process {index} reads another model than process 0",
            f"{opened.source.folder}, on the machine of process {index}",
            "its config.json and weights must be equal on every machine (sha256sum)",
        )
        for index, identity in enumerate(identities)
        if identity != identities[0]
    ]
    if problems:
        processes.stop(CheckFailed.from_problems("E117", problems))
    return opened


def _weights(contents: Contents) -> tuple[tuple[str, str], ...]:
    """What decides the numbers; a note beside the weights does not."""
    return tuple(sorted((name, digest) for name, digest in contents.digests.items() if name == "config.json" or "safetensors" in name))


def share_calibration(processes: Processes, load: Callable[[], CalibrationSet]) -> CalibrationSet:
    """All samples, which the main process loads."""
    if processes.count == 1:
        return load()
    found = load() if processes.main else None
    ids, counted = (processes.share_tensor(getattr(found.tokens, name) if found is not None else None) for name in ("ids", "counted"))
    return CalibrationSet(Tokens(ids, counted), processes.share(found.facts if found is not None else {}))


def own_samples(tokens: Tokens, processes: Processes) -> Tokens:
    """The samples of this process."""
    mine = processes.part_of(len(tokens.ids))
    return Tokens(tokens.ids[mine], tokens.counted[mine])


def scratch_folder(job: Path) -> Path:
    """Where activations lie between two passes: in the job's folder, or, where another machine has that, in the folder for temporary files
    (TMPDIR)."""
    return job if job.is_dir() else Path(tempfile.gettempdir())


# ---- hidden states -------------------------------------------------------------------------------------------------------------------


def kept_states(pipeline: SequentialPipeline, samples: int, processes: Processes) -> dict[str, Tensor]:
    """The hidden states of all samples, for the main process to keep; {} in the others. Copies where the next block would change them."""
    states = pipeline.states()
    if processes.count == 1:
        return {name: tensor.clone() if pipeline.device.type == "cuda" else tensor for name, tensor in states.items()}
    found = {name: processes.collect(tensor, samples) for name, tensor in states.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def restore(pipeline: SequentialPipeline, states: dict[str, Tensor], samples: int, processes: Processes) -> None:
    """Continue with `kept_states`, which the main process has read."""
    own = pipeline.states()
    pipeline.restore({name: processes.hand_out(states.get(name), like, samples) for name, like in own.items()})


def stored_by_main(stage: SolveStage | None, processes: Processes) -> SolveStage:
    """The stored weights of finished blocks, which the main process reads (`stage`) and all need."""
    if processes.count == 1:
        assert stage is not None
        return stage

    def shared(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        found = {} if stage is None else stage(names, hessian, remark)
        return {name: processes.share_tensor(found.get(name)) for name in names}

    return shared
