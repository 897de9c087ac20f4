"""What an evaluation needs of a model folder: who it is, where and in which dtype it runs, its tokenizer, its context.

`auto` runs on the GPU when there is one, in the dtype of the checkpoint. On a CPU it runs in bf16 where the processor multiplies bf16,
else in fp32, and never in fp16: a recent server CPU makes 225 GFLOP/s in bf16, 64 in fp32 and 0.9 in fp16 (2026-11).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.errors import BadInput, UsageError
from marlinctl.evaluation.settings import DTYPES
from marlinctl.models.config import positions
from marlinctl.models.tokenizer_files import stray_tokens
from marlinctl.quantize.scheme import RunWith
from marlinctl.system.devices import cpu_has_bf16

if TYPE_CHECKING:
    from marlinctl.checkpoint.contents import Contents
    from marlinctl.system.console import Console


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate."""

    folder: Path
    name: str
    config: dict[str, Any]
    notes: tuple[str, ...] = ()  # what the person should know of the folder
    quantized: int = 0  # linears
    activations: RunWith | None = None  # of these, whatever the folder says

    @property
    def longest(self) -> int | None:
        """The context the model was made for, in tokens."""
        return positions(self.config)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))


def open_subject(folder: Path, name: str | None = None) -> Subject:
    """The folder, after the look that every verb takes (checkpoint/folder.py), its tokenizer included."""
    from marlinctl.checkpoint.folder import open_folder

    with open_folder(folder, tokenizer=True) as examined:
        checkpoint = examined.checkpoint
        return Subject(folder, name or folder.name, checkpoint.config, examined.notes, len(examined.info.layers))


def refuse_idle_rounding(activations: RunWith | None, subject: Subject) -> None:
    """BadInput E313 where 8-bit activations are asked of a model without quantized linears."""
    if not subject.quantized and activations not in (None, "16-bit"):
        what = f"{subject.name} has no quantized linear, and {activations} activations are those of quantized ones"
        raise BadInput("E313", what, where=f"--activations {activations}", fix="leave it out, or name a quantized model")


def read_weights(subject: Subject, console: Console) -> Contents:
    """All weights once, for the identity: equal for two folders if weights, config and tokenizer are. Another calibration changes codes all
    over a file and no header, so a part of the file does not answer for the rest."""
    from marlinctl.checkpoint.contents import read_contents
    from marlinctl.checkpoint.reader import open_checkpoint

    with open_checkpoint(subject.folder, weight_files="auto") as checkpoint:
        return read_contents(checkpoint, console, scan=checkpoint.tensors, title=f"read all weights of {subject.name}")


def look_at_weights(subject: Subject, console: Console) -> Contents:
    """Are weights as recorded, and finite? BadInput E304, NumericalProblem E620.

    They are read for this before they are loaded, at 1 GB/s of a core: nothing against the forward passes that follow.
    """
    from marlinctl.checkpoint.reader import open_checkpoint
    from marlinctl.checkpoint.source_digests import check_known_digests

    contents = read_weights(subject, console)
    with open_checkpoint(subject.folder, weight_files="auto") as checkpoint:
        check_known_digests(checkpoint, contents)
    contents.require_finite()
    return contents


def choose_dtype(dtype: str, device: str, config: dict[str, Any]) -> str:
    """`auto` resolved to bfloat16, float16 or float32."""
    on_cpu = device.startswith("cpu")
    if dtype == "float16" and on_cpu:
        raise UsageError("E202", "fp16 is not used on a CPU: it is a hundred times slower", where="--dtype", fix="give float32 or bfloat16")
    if dtype != "auto":
        return dtype
    if on_cpu:
        return "bfloat16" if cpu_has_bf16() else "float32"
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return stored if stored in DTYPES else "bfloat16"


def load_tokenizer(subject: Subject) -> Any:
    from marlinctl.data import calibration

    tokenizer = calibration.load_tokenizer(subject.folder)
    strays = stray_tokens(subject.config)
    largest = max((number for token, number in tokenizer.get_vocab().items() if token not in strays), default=-1)
    words = subject.config.get("vocab_size")
    if isinstance(words, int) and largest >= words:
        raise BadInput(
            "E314",
            f"the tokenizer makes ids up to {largest}, the model knows {words} words",
            where=str(subject.folder),
            fix="use the tokenizer that belongs to this model",
        )
    return tokenizer


def load_model(subject: Subject, *, dtype: str, device: str) -> Any:
    import torch

    from marlinctl.checkpoint.transformers_model import load_dense

    return load_dense(subject.folder, dtype=getattr(torch, dtype), device=device, activations=subject.activations).eval()
