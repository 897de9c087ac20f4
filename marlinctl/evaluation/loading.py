"""What an evaluation needs of a model folder: who it is, where and in which dtype it runs, its tokenizer, its context.

`auto` runs on the GPU when there is one, in the dtype of the checkpoint. On a CPU it runs in bf16 where the processor multiplies bf16,
else in fp32, and never in fp16: a recent server CPU makes 225 GFLOP/s in bf16, 64 in fp32 and 0.9 in fp16 (2026-11).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.config import positions
from marlinctl.devices import cpu_has_bf16
from marlinctl.errors import BadInput, UsageError
from marlinctl.evaluation.settings import DTYPES

if TYPE_CHECKING:
    from marlinctl.checkpoint.reader import Checkpoint

SLICES, SLICE_BYTES = 64, 65536  # of each shard, for the identity: 4 MiB


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate. `identity` is equal for two folders if weights, config and tokenizer are."""

    folder: Path
    name: str
    config: dict[str, Any]
    identity: str

    @property
    def longest(self) -> int | None:
        """The context the model was made for, in tokens."""
        return positions(self.config)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))


def open_subject(folder: Path, name: str | None = None) -> Subject:
    from marlinctl.checkpoint.reader import open_checkpoint

    with open_checkpoint(folder, weight_files="auto") as checkpoint:
        return Subject(folder, name or folder.name, checkpoint.config, _identity(checkpoint))


def _identity(checkpoint: Checkpoint) -> str:
    """Config, tokenizer, manifest and shard headers in full, and SLICES pieces of each shard: two results of the same job with other
    calibration have equal headers, and reading 140 GB to tell them apart would take longer than many an evaluation."""
    from marlinctl import manifest
    from marlinctl.checkpoint.reader import fingerprint

    facts = fingerprint(checkpoint)
    rewritable = manifest.OUTSIDE - {manifest.NAME}
    facts["files"] = {name: digest for name, digest in facts["files"].items() if name not in rewritable}
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in checkpoint.files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(SLICES):
                file.seek(size * place // SLICES)
                whole.update(file.read(SLICE_BYTES))
    return whole.hexdigest()


def choose_dtype(dtype: str, device: str, config: dict[str, Any]) -> str:
    """`auto` resolved to bfloat16, float16 or float32."""
    on_cpu = device.startswith("cpu")
    if dtype == "float16" and on_cpu:
        raise UsageError("E248", "fp16 is not used on a CPU: it is a hundred times slower", where="--dtype", fix="give float32 or bfloat16")
    if dtype != "auto":
        return dtype
    if on_cpu:
        return "bfloat16" if cpu_has_bf16() else "float32"
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return stored if stored in DTYPES else "bfloat16"


def load_tokenizer(subject: Subject) -> Any:
    from marlinctl import calibration

    tokenizer = calibration.load_tokenizer(subject.folder)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    words = subject.config.get("vocab_size")
    if isinstance(words, int) and largest >= words:
        raise BadInput(
            "E386",
            f"the tokenizer makes ids up to {largest}, the model knows {words} words",
            where=str(subject.folder),
            fix="use the tokenizer that belongs to this model",
        )
    return tokenizer


def load_model(subject: Subject, *, dtype: str, device: str) -> Any:
    import torch

    from marlinctl.load import load_dense

    return load_dense(subject.folder, dtype=getattr(torch, dtype), device=device).eval()
