"""The public Python API: four functions, with the promise of stability that docs/api.md gives.

    from marlinctl.api import load, pack, quantize, sparsify

    quantize("Qwen/Qwen3-0.6B", "out/qwen3-int4", group_size=64)
    pack("out/qwen3-int4", "out/qwen3-marlin", format="marlin")
    model = load("out/qwen3-marlin")
    sparsify("Qwen/Qwen3-0.6B", "out/qwen3-2of4-int4", bits=4, drift_correction=0.5, refine=2)

They do what the verbs of the same name do, raise marlinctl.errors.MarlinctlError, and print nothing: progress messages go to the logger
`marlinctl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.system.console import Console

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["load", "pack", "quantize", "sparsify"]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "int4",
    revision: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
    **options: Any,
) -> Path:
    """Quantize a folder, hub id or GGUF file to int4 and publish it, in the interchange form, as the folder `out`.

    `options` are keys of the recipe (group_size=64, samples=256, source="mine.jsonl"); they win over the recipe. device: "auto" is a GPU
    where there is one. max_shard_size: of a weight file, "2GB" or a number of bytes; None: 5GB.
    """
    from marlinctl.checkpoint.shards import max_shard_bytes
    from marlinctl.oneshot.open import Options
    from marlinctl.oneshot.run import run_job
    from marlinctl.recipes.schema import load_recipe, resolve, with_sections

    resolved, _ = resolve(load_recipe(recipe), with_sections(options))
    most = max_shard_bytes(max_shard_size)
    settings = Options(revision=revision, device=device, overwrite=overwrite, command="marlinctl.api.quantize", max_shard_bytes=most)
    run_job(str(model), Path(out), resolved, settings, Console.quiet())
    return Path(out)


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    bits: int = 16,
    recipe: str | Path = "int4",
    revision: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
    **options: Any,
) -> Path:
    """Prune a folder, hub id or GGUF file to 2:4, at 16 bits or together with int4 (bits=4), and publish it as the folder `out`.

    `options` are keys of the recipe (method="wanda", drift_correction=0.5); they win over the recipe. Quality is not measured; see
    `marlinctl eval`.
    """
    from marlinctl.checkpoint.shards import max_shard_bytes
    from marlinctl.oneshot.open import Options
    from marlinctl.oneshot.run import run_job
    from marlinctl.recipes.schema import load_recipe, resolve, with_sections

    resolved, _ = resolve(load_recipe(recipe), with_sections({"pattern": "2:4", **options, "bits": bits}))
    most = max_shard_bytes(max_shard_size)
    settings = Options(revision=revision, device=device, overwrite=overwrite, command="marlinctl.api.sparsify", max_shard_bytes=most)
    run_job(str(model), Path(out), resolved, settings, Console.quiet())
    return Path(out)


def pack(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    also: Sequence[str] = (),
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
) -> list[Path]:
    """Write a 4-bit folder in another format (ct, gptq, marlin, marlin_24, dense), exactly. Returns `out` and each OUT-<format>."""
    from marlinctl.checkpoint.shards import max_shard_bytes
    from marlinctl.convert.repack import repack

    most = max_shard_bytes(max_shard_size)
    console = Console.quiet()
    written = repack(Path(source), Path(out), format=format, also=also, overwrite=overwrite, console=console, max_shard_bytes=most)
    return [Path(entry["folder"]) for entry in written["outputs"]]


def load(model: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", revision: str | None = None) -> PreTrainedModel:
    """A transformers model in eval mode: packed weights are dequantized on the way in. `dtype` defaults to float32."""
    import torch

    from marlinctl.checkpoint.folder import open_folder
    from marlinctl.checkpoint.source import resolve_model
    from marlinctl.checkpoint.transformers_model import load_dense

    source = resolve_model(str(model), revision=revision, cache_dir=None, offline=False, console=Console.quiet())
    with open_folder(source.folder):
        pass  # the look that every verb takes
    return load_dense(source.folder, dtype=dtype or torch.float32, device=device)
