"""One model type of transformers: a tiny random model of it is quantized and loaded again."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.data.tokens import Tokens
from marlinctl.errors import CheckFailed, MarlinctlError
from marlinctl.models.architectures import Architecture
from marlinctl.models.config import read_config, wraps
from marlinctl.models.families import FAMILIES
from marlinctl.models.meta_model import build as build_meta
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.quantize.types import Hessian
from marlinctl.system.console import Console
from marlinctl.system.offload import Scratch
from marlinctl.verify.run import verify
from tests import runs, zoo
from tests.models.shrink import FIRST_SPECIAL

SECONDS = 60  # for one type, with what transformers must import for it
WORKERS = 2
SAMPLES, LENGTH = 3, 24
NOT_TRIED = "not tried: "
_REFUSES = "not loaded with transformers, which refuses it: "


@dataclass(frozen=True, slots=True)
class Outcome:
    model_type: str
    how: str  # "table", "derived", "wrapper", "refused" or "wrong"
    reason: str = ""  # of one that works: why transformers does not load the result
    seconds: float = 0.0

    @property
    def line(self) -> str:
        return f"{self.model_type:<28} {self.seconds:5.1f} s  {self.how:<8} {self.reason}"


class NotTried(Exception):
    """There is nothing to compare with."""


def listed_types() -> list[str]:
    """Every language model type of the installed transformers, and every one with parts for images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def outcomes(types: Sequence[str], *, workers: int = WORKERS, seconds: float = SECONDS) -> Iterator[Outcome]:
    """Of each type, as they come: in a process each, so many at a time, each ended when its time is over."""
    fork = multiprocessing.get_context("fork")  # what is imported here is not imported for each
    waiting = list(types)
    running: dict[connection.Connection, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_report, args=(waiting[0], theirs))
            process.start()
            theirs.close()
            running[ours] = (waiting.pop(0), process, time.monotonic())
        ready = connection.wait(list(running), timeout=1)
        for ours, (model_type, process, started) in list(running.items()):
            spent = time.monotonic() - started
            if ours in ready:
                try:
                    found = Outcome(**json.loads(ours.recv_bytes()))
                except EOFError:
                    process.join()
                    found = Outcome(model_type, "wrong", f"its process ended with exit code {process.exitcode}")
            elif spent > seconds:
                process.kill()
                found = Outcome(model_type, "refused", f"{NOT_TRIED}more than {seconds:.0f} s")
            else:
                continue
            process.join()
            ours.close()
            del running[ours]
            yield replace(found, seconds=round(spent, 1))


def _report(model_type: str, to: connection.Connection) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        found = outcome(model_type)
    to.send_bytes(json.dumps(asdict(found)).encode())


def outcome(model_type: str) -> Outcome:
    """What `quantize` makes of it. "wrong": it took the model, and something does not agree."""
    with tempfile.TemporaryDirectory() as name:
        try:
            folder = zoo.build(model_type, Path(name) / "model")
        except Exception as error:  # noqa: BLE001 - transformers does not build every type from a few sizes
            return Outcome(model_type, "refused", f"{NOT_TRIED}no tiny model ({_first_line(error)})")
        try:
            wrong = disagreement(folder, Path(name))
            loaded = None if wrong else verify(Path(name) / "out", source=None, load=None, console=Console.quiet())
        except NotTried as error:
            return Outcome(model_type, "refused", f"{NOT_TRIED}{error}")
        except MarlinctlError as error:
            return Outcome(model_type, "wrong" if error.error_id.startswith("E1") else "refused", error.problems[0].what)
        except Exception as error:  # noqa: BLE001 - whatever it is, the table says it
            return Outcome(model_type, "wrong", _first_line(error))
        config = read_config(folder)
    if loaded is None:
        return Outcome(model_type, "wrong", wrong)
    how = "table" if model_type in FAMILIES else "wrapper" if wraps(config) else "derived"
    return Outcome(model_type, how, "; ".join(loaded.skipped).removeprefix(_REFUSES).removesuffix(" (--load insists)"))


def disagreement(folder: Path, scratch: Path) -> str:
    """Where the pipeline, or the result of `quantize`, computes something else than transformers; empty: nowhere."""
    with open_folder(folder, structure="needed") as examined:
        known = examined.architecture
        assert known is not None
        walked = _walked(known, examined.checkpoint, scratch)
    model = load_dense(folder, dtype=torch.float32)
    entered: list[Tensor] = []
    handle = model.get_submodule(known.module(known.norm)).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        with torch.no_grad():
            model(input_ids=_tokens().ids, use_cache=False)
    except (TypeError, ValueError) as error:
        raise NotTried(f"transformers does not run it on text alone ({_first_line(error)})") from error
    handle.remove()
    if (off := _distance(walked, entered[-1])) > 1e-3:
        return f"the pipeline's hidden states are {off:.2g} off"
    runs.quantize(folder, scratch / "out", runs.recipe(runs.write_text(scratch / "text.txt"), calibration__sequence_length=32))
    try:
        verify(
            scratch / "out", source=folder, load=None, console=Console.quiet()
        )  # with transformers, where the rules say that it loads it
    except CheckFailed as failed:
        return failed.problems[0].what
    packed = load_dense(scratch / "out", dtype=torch.float32)
    weights = packed.state_dict()
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])]
    experts = {f"{block.path}.{part.module}" for block in known.blocks for part in block.experts}  # fused in the model
    wanted = {known.module(known.renamed_modules.get(name, name)) for name in known.linears if ".experts." not in name}
    if {name.removesuffix(".weight") for name in changed if not name.startswith(tuple(experts))} != wanted:
        return f"of {len(wanted)} linears {len(changed)} tensors changed"
    own = model.state_dict()
    off = max(_distance(weights[name], own[name]) for name in changed)
    return "" if off < 0.25 else f"a weight of 4 bits is {off:.2g} off"


@torch.no_grad()
def _walked(known: Architecture, checkpoint: Checkpoint, scratch: Path) -> Tensor:
    def keep(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        return {name: checkpoint.read(f"{name}.weight").float() for name in names}

    cpu = torch.device("cpu")
    pipeline = SequentialPipeline(
        build_meta(checkpoint.config, torch.float32), known, checkpoint, _tokens(),
        device=cpu, dtype=torch.float32, scratch=Scratch(scratch, cpu), chunk_tokens=2 * LENGTH, corrects_drift=True,
    )  # fmt: skip
    for block in known.blocks:
        pipeline.run_block(block, keep)
    return pipeline.hidden


def _tokens() -> Tokens:
    ids = torch.randint(3, FIRST_SPECIAL, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
