"""The quantize job: from a model to a published 4-bit checkpoint.

    look at everything ─► calibration ─► walk the blocks, one shard each ─► copy the rest ─► verify from disk ─► publish
    (nothing written)                    (solve, pack, unpack == codes)

Everything that can be refused is refused in the first step. The linears come out in the interchange form (compressed-tensors); `pack` makes
the other formats from it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl import __version__
from marlinctl.calibration import load_calibration
from marlinctl.checkpoint.formats import detect, linear_tensors, quantization_config, read_linear, sixteen_bit_linears
from marlinctl.checkpoint.reader import fingerprint, open_checkpoint
from marlinctl.checkpoint.source import Source
from marlinctl.checkpoint.writer import StagedCheckpoint, check_output
from marlinctl.console import Console, Progress
from marlinctl.devices import threads
from marlinctl.errors import CheckFailed, NumericalProblem
from marlinctl.memory import peak_rss
from marlinctl.models import LinearSpec
from marlinctl.opening import Opened, Options, open_model
from marlinctl.quantize.gptq import Solved, SolveSettings, solve
from marlinctl.quantize.types import Hessian, QuantizedLinear
from marlinctl.recipe import Recipe, recipe_hash
from marlinctl.report import report_files
from marlinctl.scratch import Scratch
from marlinctl.skeleton import build
from marlinctl.walk import CHUNK_TOKENS, Walk

ALGORITHM_VERSION = 1  # goes up when the same recipe on the same input gives other codes
_DEVICE_SHARE = 0.5  # of free device memory that activations may take


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What happened to one linear. `seconds` goes to the report and not to the manifest."""

    name: str
    shape: tuple[int, int]
    group_size: int
    error: float  # share of the output energy that is lost: tr(δ H δᵀ) / tr(W H Wᵀ)
    damping: float
    tokens: int
    dead: int
    fallback: str | None
    remark: str
    digest: str  # SHA-256 of codes and scales
    bytes_in: int
    bytes_out: int
    seconds: float


def run_quantize(model: str, out: Path, recipe: Recipe, options: Options, console: Console) -> tuple[dict[str, Any], Source]:
    """Quantize `model` (folder, hub id or GGUF file) into `out`. Returns the report as a JSON document, and where the model was found."""
    started = time.monotonic()
    local = [Path(model)] if Path(model).exists() else []
    check_output(out, overwrite=options.overwrite, sources=local)
    console.log_to(out.with_name(out.name + ".log"))
    opened = open_model(model, out, recipe, options, console)
    device, dtype = opened.device, opened.dtype
    with threads(options.threads), torch.no_grad():
        calibration = load_calibration(
            recipe.calibration,
            opened.source.folder,
            opened.checkpoint.config,
            console=console,
            load_model=lambda: _whole_model(opened.source.folder, dtype, device),
        )
        with StagedCheckpoint(out, overwrite=options.overwrite, fmt="ct") as staged:
            job = _Job(opened, recipe, options, staged, console)
            job.walk(calibration.tokens, device, dtype)
            quantized = {f"{name}.weight" for name in opened.plan.group_sizes}
            staged.copy_tensors(opened.checkpoint, [n for n in opened.checkpoint.tensors if n not in quantized])
            staged.copy_companions(opened.source.folder)
            staged.write_file("recipe.yaml", recipe.to_yaml().encode())
            report = _report(opened, recipe, options, calibration.facts, job.records, device, dtype, time.monotonic() - started)
            staged.publish(
                _config(opened, recipe),
                manifest=_manifest(opened, recipe, calibration.facts, job.records, device, dtype),
                verify=lambda folder: _verify_written(folder, job.records, console),
                report_files=report_files(report, fmt="ct", layers=opened.plan.group_sizes, ignore=_ignore(opened)),
            )
    return report, opened.source


# ---- the work ------------------------------------------------------------------------------------------------------------------------


class _Job:
    """The walk's other half: solves what the walk hands over, writes a shard when a block is done."""

    def __init__(self, opened: Opened, recipe: Recipe, options: Options, staged: StagedCheckpoint, console: Console) -> None:
        self.opened, self.options, self.staged, self.console = opened, options, staged, console
        self.records: list[LayerRecord] = []
        self.specs: dict[str, LinearSpec] = dict(opened.architecture.linears)
        if opened.plan.head is not None:
            self.specs[opened.plan.head.name] = opened.plan.head
        source_is_bfloat16 = any(opened.checkpoint.tensors[f"{name}.weight"].dtype == "BF16" for name in opened.plan.group_sizes)
        q = recipe.quantize
        self.settings = {
            size: SolveSettings(
                group_size=size,
                both_signs=q.scale_sign == "both",
                bfloat16_exact=source_is_bfloat16,
                act_order=q.act_order,
                scale_search=q.scale_search,
                damping=q.damping,
                refine=q.refine,
            )
            for size in set(opened.plan.group_sizes.values())
        }
        self.pending: dict[str, Tensor] = {}
        self.progress: Progress | None = None

    def walk(self, tokens: Any, device: torch.device, dtype: torch.dtype) -> None:
        architecture = self.opened.architecture
        model = build(self.opened.checkpoint.config, dtype)
        budget = int(torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE) if device.type == "cuda" else 0
        with self.console.progress("quantize", len(self.specs)) as self.progress, _deterministic(self.options.deterministic):
            walk = Walk(
                model, architecture, self.opened.checkpoint, tokens,
                device=device, dtype=dtype, scratch=Scratch(self.staged.path, device, budget), chunk_tokens=CHUNK_TOKENS,
            )  # fmt: skip
            for block in architecture.blocks:
                walk.run_block(block, self.solve)
                self._flush()
            if self.opened.plan.head is not None:
                walk.run_head(self.opened.plan.head.name, self.solve)
                self._flush()

    def _flush(self) -> None:
        if self.pending:
            self.staged.write_shard(self.pending)
            self.pending = {}

    def solve(self, names: tuple[str, ...], hessian: Hessian, remark: str) -> dict[str, Tensor]:
        """Final weights of linears that share an input: one solve for each group size among them, skipped ones as they are."""
        device = hessian.matrix.device
        weights = {name: self.opened.checkpoint.read(f"{name}.weight").to(device, torch.float32) for name in names}
        sizes = self.opened.plan.group_sizes
        for name in names:
            if name not in sizes and self.progress is not None:
                self.progress.advance()
        for size in dict.fromkeys(sizes[name] for name in names if name in sizes):
            members = [name for name in names if sizes.get(name) == size]
            started = time.monotonic()
            solved = self._solve_stack(members, torch.cat([weights[name] for name in members]), hessian, self.settings[size])
            seconds = time.monotonic() - started
            first = 0
            for name in members:
                rows = slice(first, first + weights[name].shape[0])
                first = rows.stop
                linear = QuantizedLinear(solved.linear.codes[rows].cpu(), solved.linear.scales[rows].cpu(), solved.linear.group_size)
                share = seconds * weights[name].shape[0] / solved.linear.out_features
                self._keep(name, linear, solved, rows, hessian.tokens, remark, share)
                weights[name] = linear.dequantize().to(device)
        return weights

    def _solve_stack(self, members: list[str], stack: Tensor, hessian: Hessian, settings: SolveSettings) -> Solved:
        try:
            return solve(stack, hessian, settings)
        except ValueError as error:
            raise NumericalProblem(
                "E601", str(error), where=", ".join(members), fix="check the model with its own weights; try --dtype float32"
            ) from error

    def _keep(self, name: str, linear: QuantizedLinear, solved: Solved, rows: slice, tokens: int, remark: str, seconds: float) -> None:
        if solved.fallback and self.options.strict:
            raise NumericalProblem(
                "E602", f"the Hessian cannot be used as it is ({solved.fallback}), and --strict forbids a fallback", where=name,
                fix="more or other calibration text, a higher --damping, or no --strict",
            )  # fmt: skip
        tensors = linear_tensors("ct", name, linear)
        self.pending |= tensors
        energy = float(solved.energy[rows].sum())
        info = self.opened.checkpoint.tensors[f"{name}.weight"]
        record = LayerRecord(
            name=name,
            shape=(linear.out_features, linear.in_features),
            group_size=linear.group_size,
            error=float(solved.error[rows].sum()) / energy if energy > 0 else 0.0,
            damping=solved.damping,
            tokens=tokens,
            dead=solved.dead,
            fallback=solved.fallback,
            remark=remark,
            digest=_digest(linear),
            bytes_in=info.end - info.begin,
            bytes_out=sum(t.numel() * t.element_size() for t in tensors.values()),
            seconds=round(seconds, 4),
        )
        self.records.append(record)
        if solved.fallback:
            self.console.warn(f"{name}: {solved.fallback}")
        if self.progress is not None:
            extra = "".join(f"  {text}" for text in (f"{solved.dead} dead inputs" if solved.dead else "", remark) if text)
            self.progress.advance(1, f"{name:<44} error {record.error:.5f}  damping {solved.damping:g}  {seconds:6.2f} s{extra}")


def _digest(linear: QuantizedLinear) -> str:
    digest = hashlib.sha256(linear.codes.contiguous().numpy().tobytes())
    digest.update(linear.scales.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _verify_written(folder: Path, records: list[LayerRecord], console: Console) -> None:
    """Read the staged checkpoint back: every linear holds the codes and scales that were solved."""
    with open_checkpoint(folder) as written, console.progress("check from disk", len(records)) as progress:
        info = detect(written.config, written.tensors)
        for record in records:
            if _digest(read_linear(written, info, record.name)) != record.digest:
                raise CheckFailed(
                    "E110",
                    "codes or scales on disk differ from those that were solved",
                    where=record.name,
                    fix="check the disk, then run again",
                )
            progress.advance()


# ---- what is written about it --------------------------------------------------------------------------------------------------------


def _config(opened: Opened, recipe: Recipe) -> dict[str, Any]:
    config = {k: v for k, v in opened.checkpoint.config.items() if k != "auto_map"}
    layers = dict(opened.plan.group_sizes)
    config["quantization_config"] = quantization_config(
        "ct", layers, _ignore(opened), {"version": __version__, "recipe_sha256": recipe_hash(recipe)}
    )
    return config


def _ignore(opened: Opened) -> list[str]:
    quantized = set(opened.plan.group_sizes)
    shapes = {name: info.shape for name, info in opened.checkpoint.tensors.items() if name.removesuffix(".weight") not in quantized}
    return sixteen_bit_linears(shapes, quantized)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "tokenizers", "accelerate")
    return {"marlinctl": __version__, "algorithm": str(ALGORITHM_VERSION), **{name: version(name) for name in names}}


def _source_facts(opened: Opened) -> dict[str, Any]:
    source = opened.source
    return {"kind": source.kind, "name": Path(source.name).name if source.kind != "hub" else source.name, "revision": source.revision}


def _manifest(
    opened: Opened, recipe: Recipe, calibration: Mapping[str, Any], records: list[LayerRecord], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    layers = [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in records]
    source = {key: value for key, value in calibration.items() if key != "source"}
    return {
        "format": "ct",
        "recipe": {"sha256": recipe_hash(recipe)},
        "source": {**_source_facts(opened), "fingerprint": fingerprint(opened.checkpoint)},
        "calibration": source,
        "versions": versions(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "finished": True,
    }


def _report(
    opened: Opened, recipe: Recipe, options: Options, calibration: Mapping[str, Any], records: list[LayerRecord],
    device: torch.device, dtype: torch.dtype, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    tensors = opened.checkpoint.tensors
    dense = sum(info.end - info.begin for info in tensors.values())
    saved = sum(r.bytes_in - r.bytes_out for r in records)
    return {
        "kind": "quantize",
        "command": options.command,
        "source": {**_source_facts(opened), "note": opened.source.note},
        "recipe": {"sha256": recipe_hash(recipe), **recipe.model_dump(mode="json")},
        "calibration": dict(calibration),
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": {"source": dense, "result": dense - saved},
        "kept": [{"name": name, "reason": reason} for name, reason in opened.plan.kept.items()],
        "fallbacks": [{"name": r.name, "fallback": r.fallback} for r in records if r.fallback],
        "underfed": [{"name": r.name, "tokens": r.tokens, "remark": r.remark} for r in records if r.remark],
        "dead_inputs": [{"name": r.name, "count": r.dead} for r in records if r.dead],
        "error": {"mean": sum(r.error for r in records) / len(records), "worst": max(records, key=lambda r: r.error).name},
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_rss(),
        "layers": [asdict(record) for record in records],
    }


# ---- process settings ----------------------------------------------------------------------------------------------------------------


def _whole_model(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from marlinctl.load import load_dense

    return load_dense(folder, dtype=dtype, device=device).eval()


class _deterministic:
    """The same bytes on the same CUDA machine. The CPU path is deterministic without it."""

    def __init__(self, on: bool) -> None:
        self.on, self.before = on, torch.are_deterministic_algorithms_enabled()

    def __enter__(self) -> None:
        if self.on:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
            torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)
