"""One model type of transformers: a tiny random model of it is quantized and loaded again."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.data.tokens import Tokens
from marlinctl.errors import CheckFailed, MarlinctlError
from marlinctl.models.architectures import Architecture
from marlinctl.models.families import FAMILIES
from marlinctl.models.meta_model import build as build_meta
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.quantize.types import Hessian
from marlinctl.system.console import Console
from marlinctl.system.offload import Scratch
from marlinctl.verify.run import verify
from tests import runs, zoo

SECONDS, BUILDING = 60, 15
SAMPLES, LENGTH = 3, 24


@dataclass(frozen=True, slots=True)
class Outcome:
    model_type: str
    how: str  # "table", "derived", "refused" or "wrong"
    reason: str = ""

    @property
    def line(self) -> str:
        return f"{self.model_type:<28} {self.how:<8} {self.reason}"


def outcome(model_type: str) -> Outcome:
    """What `quantize` makes of it. "wrong": it took the model, and something does not agree."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with _limit(BUILDING):
                folder = zoo.build(model_type, Path(name) / "model")
        except Exception as error:  # noqa: BLE001 - transformers does not build every type from a few sizes
            return Outcome(model_type, "refused", f"not tried: no tiny model ({_first_line(error)})")
        try:
            with _limit(SECONDS):
                wrong = disagreement(folder, Path(name))
        except MarlinctlError as error:
            return Outcome(model_type, "refused", error.problems[0].what)
        except TimeoutError as error:
            return Outcome(model_type, "refused", f"not tried: {error}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the table says it
            return Outcome(model_type, "wrong", _first_line(error))
    if wrong:
        return Outcome(model_type, "wrong", wrong)
    return Outcome(model_type, "table" if model_type in FAMILIES else "derived")


def disagreement(folder: Path, scratch: Path) -> str:
    """Where the pipeline, or the result of `quantize`, computes something else than transformers; empty: nowhere."""
    with open_folder(folder, structure="needed") as examined:
        known = examined.architecture
        assert known is not None
        walked = _walked(known, examined.checkpoint, scratch)
    model = load_dense(folder, dtype=torch.float32)
    entered: list[Tensor] = []
    handle = model.get_submodule(known.module(known.norm)).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        model(_tokens().ids, use_cache=False)
    handle.remove()
    if (off := _distance(walked, entered[0])) > 1e-3:
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
    wanted = {known.module(name) for name in known.linears if ".experts." not in name}
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
    ids = torch.randint(3, zoo.VOCAB_SIZE, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
