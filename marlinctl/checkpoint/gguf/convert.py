"""A GGUF file as a Hugging Face folder: turned once, kept in the cache, found again by the file's SHA-256.

    CACHE/gguf/1f0c...-v1/          config.json  generation_config.json  model*.safetensors (fp16)  tokenizer files
                                    gguf_source.json: digest of the GGUF file, and size and digest of every file in the folder
    CACHE/gguf/1f0c...-v1.lock      held while the folder is made

Weights stream: a tensor is read, dequantized and written some rows at a time, so memory is bounded by a chunk, and by one
fp16 matrix where rows must change places. The folder is made under another name and renamed, so a folder under its own name
is whole; whether it still is, the digests show on every use. A GGUF file holds the weights quantized: what comes out, and what
every later comparison calls the original, is their dequantized copy.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.gguf.architectures import PlannedTensor, plan_model
from marlinctl.checkpoint.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from marlinctl.checkpoint.gguf.tokenizer import tokenizer_files
from marlinctl.checkpoint.ownership import refuse_strangers, remove_tree, strangers_in_cache
from marlinctl.errors import BadInput, NumericalProblem, ResourceProblem
from marlinctl.system.atomic import safetensors_header, sync_folder
from marlinctl.system.digests import sha256_of
from marlinctl.system.files import FileRefused, read_plain_json, shown
from marlinctl.system.locks import lock

if TYPE_CHECKING:
    import numpy as np

    from marlinctl.system.console import Console, Progress

VERSION = 1  # of the conversion; a change of its result must change the name of the cache entry
MAX_SHARD_BYTES = 2_000_000_000
CHUNK_ELEMENTS = 1 << 21  # 8 MB as fp32
MANIFEST = "gguf_source.json"


def gguf_folder(path: Path, cache: Path, console: Console) -> tuple[Path, str]:
    """The Hugging Face folder of a GGUF file, made if it is not in the cache; and one line about what the file holds."""
    header = read_gguf_header(path)
    config, plan = plan_model(header)
    _refuse_unknown_kinds(header)
    digest = sha256_of(path)
    folder = cache / "gguf" / f"{digest[:32]}-v{VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f"{folder.name}.lock"), wait=True):
        damage = _damage(folder, digest)
        if damage:
            if os.path.lexists(folder):
                what = "the cache entry of this model holds what marlinctl did not write"
                refuse_strangers(what, folder, strangers_in_cache(folder, MANIFEST), "move it away, or name another --cache-dir")
                console.warn(f"the cached copy of {path.name} is damaged ({damage}); it is made again")
                remove_tree(folder)
            console.say(f"{path.name}: turning GGUF into safetensors (once; kept in {folder})")
            _build(header, config, plan, digest, folder, console)
    kinds = sorted({tensor.source.kind_name for tensor in plan if len(tensor.source.shape) > 1})
    return folder, f"the weights come from a GGUF file ({', '.join(kinds)}): the original is their dequantized copy"


def _build(header: GgufHeader, config: dict[str, Any], plan: list[PlannedTensor], digest: str, folder: Path, console: Console) -> None:
    """Make the folder under a name of its own, then rename it. Nothing stays behind if that fails."""
    staging = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        staging.mkdir()
        texts = tokenizer_files(header, config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        texts["generation_config.json"] = json.dumps(ids)
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
        with console.progress(f"reading {header.path.name}", len(plan)) as progress:
            _write_weights(header.path, plan, staging, progress)
        (staging / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2), encoding="utf-8")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(staging.iterdir())}
        (staging / MANIFEST).write_text(json.dumps({"version": VERSION, "gguf_sha256": digest, "files": files}, indent=2))
        for path in (staging, *staging.iterdir()):
            path.chmod(path.stat().st_mode & ~stat.S_IWOTH)  # whatever the umask: `_damage` takes no other
            sync_folder(path)
        staging.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ResourceProblem(
            "E500",
            f"the converted model cannot be written: {error.strerror or error}",
            where=str(folder),
            fix="free some space, or name another --cache-dir",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _damage(folder: Path, digest: str) -> str | None:
    """What is wrong with a cache entry; None if it is whole.

    Its manifest says what its files are, and whoever can write one can write the other. So what others wrote, or could have written, counts
    as damaged: the cache may be shared.
    """
    try:
        if folder.is_symlink():
            return "it is a link"
        inside = list(folder.iterdir())
        for path in (folder, *inside):
            if reason := _not_ours(path, folder=path is folder):
                return f"{path.name} {reason}"
        manifest = read_plain_json(folder / MANIFEST)
        files = {str(name): (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        if manifest["gguf_sha256"] != digest:
            return "it was made from another file"
    except (OSError, FileRefused, TypeError, KeyError, AttributeError):
        return "its manifest is missing or cannot be read"
    if {path.name for path in inside} != {*files, MANIFEST}:
        return "files are missing or were added"
    for name, (size, sha256) in files.items():
        if (folder / name).stat().st_size != size or sha256_of(folder / name) != sha256:
            return f"{name} has changed"
    return None


def _not_ours(path: Path, *, folder: bool) -> str | None:
    """Why an entry is not one that this user made; what the administrator made is as good."""
    status = path.lstat()
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode):
        return "is a link or no file"
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}"
    return "may be written by all users" if status.st_mode & stat.S_IWOTH else None


def _refuse_unknown_kinds(header: GgufHeader) -> None:
    """Ask for one block of every quantization type before any file is written."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for kind, name in {(tensor.kind, tensor.kind_name) for tensor in header.tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1]), dtype=np.uint8), GGMLQuantizationType(kind))
        except NotImplementedError:
            raise BadInput(
                "E320",
                f"the quantization type {name} cannot be dequantized",
                where=str(header.path),
                fix="use a GGUF file of another type, or the safetensors folder",
            ) from None


# ---- weights -------------------------------------------------------------------------------------------------------------------------


def _write_weights(path: Path, plan: list[PlannedTensor], folder: Path, progress: Progress) -> None:
    shards = _shards(plan)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with path.open("rb") as source, (folder / file).open("wb") as target:
            target.write(safetensors_header((t.name, "F16", t.source.shape, _fp16_bytes(t)) for t in shard))
            for tensor in shard:
                for part in _fp16(source, tensor, path):
                    target.write(part.astype("<f2", copy=False).data)
                weight_map[tensor.name] = file
                progress.advance()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_fp16_bytes, plan))}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(plan: list[PlannedTensor]) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + _fp16_bytes(tensor) > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _fp16_bytes(tensor)
    return shards


def _fp16_bytes(tensor: PlannedTensor) -> int:
    return 2 * math.prod(tensor.source.shape)


def _fp16(source: Any, tensor: PlannedTensor, path: Path) -> Iterator[np.ndarray]:
    """The tensor in fp16, some rows at a time; in one piece where rows of q and k go back to their places."""
    import numpy as np

    parts = _dequantized(source, tensor.source, path)
    halves = (_to_half(part - np.float32(1) if tensor.minus_one else part, tensor, path) for part in parts)
    if tensor.heads is None:
        yield from halves
    else:
        yield deinterleave(np.concatenate(list(halves)), tensor.heads)


def deinterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (first half 0, second half 0, first half 1, ...) of each head back to (first half, second half)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _dequantized(source: Any, tensor: GgufTensor, path: Path) -> Iterator[np.ndarray]:
    """fp32 rows [rows, columns], or a vector, in chunks."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape) // columns
    row_bytes = tensor.nbytes // rows
    step = max(1, CHUNK_ELEMENTS // columns)
    source.seek(tensor.offset)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = source.read(count * row_bytes)
        if len(raw) != count * row_bytes:
            raise BadInput(
                "E320", f"the file ends inside {shown(tensor.name)}", where=str(path), fix="it changed while it was read; try again"
            )
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(count, row_bytes)
        numbers = dequantize(blocks, GGMLQuantizationType(tensor.kind)).astype(np.float32, copy=False)
        yield numbers.reshape(count, columns) if len(tensor.shape) > 1 else numbers.reshape(-1)


def _to_half(numbers: np.ndarray, tensor: PlannedTensor, path: Path) -> np.ndarray:
    import numpy as np

    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    if not np.isfinite(half).all():
        raise NumericalProblem(
            "E604",
            f"{shown(tensor.source.name)} holds NaN, infinity or a number beyond fp16's 65504",
            where=str(path),
            fix="the file is damaged, or the model needs bf16: use its safetensors folder",
        )
    return half
