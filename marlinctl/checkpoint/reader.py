"""A checkpoint folder, looked at as a whole before any work, then read tensor by tensor.

    folder/config.json                     an object
           model.safetensors               one file, or
           model-00001-of-00009.safetensors ... with model.safetensors.index.json   {"weight_map": {tensor: file}}

`open_checkpoint` reads headers only: no torch, no weights. Everything that is wrong with the folder is raised at once, as one
BadInput. What passes is consistent: every shard is a regular file inside the folder, every byte of it belongs to exactly one
tensor, the index and the headers name the same tensors in the same files. (Other loaders fill a missing tensor with random
numbers and continue.) Whether these are the right tensors for the model is asked by `check_expected`.

Weights are read with pread into memory of their own, not through a map: a file that shrinks while it is read is then an error
and not a SIGBUS, and no page of it stays in our resident memory. `raw` maps, for those who copy bytes from file to file.

Where both model.safetensors and an index exist, the index wins, as in transformers, and `notes` says so.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from marlinctl.checkpoint.formats.base import MODEL_FILES, STEMS
from marlinctl.checkpoint.model_files import MASK_FILE
from marlinctl.checkpoint.safetensors_header import TensorInfo, read_header
from marlinctl.errors import BadInput, Problem, number_of
from marlinctl.models.config import CONFIG, read_config
from marlinctl.system.files import FileRefused, exists, member, open_member, read_json, shown, special_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_Wrong = TypeVar("_Wrong")
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
_TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64",
}  # fmt: skip
MAX_PROBLEMS = 100
_MAX_SHARDS = 10_000  # a model of 700 GB has 163
_ADAPTER, _MAX_ADAPTER_BYTES = "adapter_config.json", 1_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "marlinctl reads safetensors only, because opening a pickle can run any program; on a machine you can afford to lose, run "
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER').save_pretrained('NEW')\""
)


class MadeTensor(Protocol):
    """A tensor that is computed from others of the checkpoint when it is read."""

    def __call__(self, checkpoint: Checkpoint, /) -> Tensor: ...

    def rows(self, checkpoint: Checkpoint, ids: Tensor, /) -> Tensor:
        """Those of a matrix, in host memory; ids: [n] int64."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed the preflight. Files are opened on first use and stay open until `close`."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]  # the shards
    notes: tuple[str, ...] = ()  # what the person should know, one line each
    device: torch.device | None = None  # where `read` puts tensors; None: in host memory
    parts: Mapping[str, TensorInfo] = field(default_factory=dict)  # tensors that lie in another one, by name -> that (fused_experts.py)
    made: Mapping[str, MadeTensor] = field(default_factory=dict)  # tensors that are computed (sixteen_bit.py, rotated.py)
    stored: Mapping[str, TensorInfo] | None = None  # what lies in the files, where some are
    precision: str = ""  # how it is stored, and what becomes of that, where some are
    _open: dict[Path, FileIO] = field(default_factory=dict, repr=False, compare=False)
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> Tensor:
        """A copy of the tensor."""
        import torch

        if name in self.made:
            return self.made[name](self)

        info, cut = self.tensors[name], self.tensors[name].cut
        on_gpu = self.device is not None and self.device.type == "cuda"
        shape = info.shape if cut is None else cut.matrix
        tensor = torch.empty(shape, dtype=torch_dtype(info), pin_memory=on_gpu)  # as system.page_locked.to_host, the other way
        if info.nbytes:
            self.read_into(info, info.begin, tensor.reshape(-1).view(torch.uint8).numpy().data)
        if on_gpu:
            tensor = tensor.to(self.device, non_blocking=True)
        if cut is not None:
            rows = (tensor.T if cut.transposed else tensor)[cut.first :: cut.step]
            tensor = rows[: info.shape[0]].contiguous()
        return tensor

    def rows(self, name: str, row_ids: Iterable[int] | Tensor) -> Tensor:
        """Rows of a matrix [rows, columns], in the order asked for; only those rows are read from disk."""
        import torch

        info = self.tensors[name]
        if len(info.shape) != 2:
            raise ValueError(f"{name} is not a matrix, its shape is {list(info.shape)}")
        ids = torch.as_tensor(row_ids if isinstance(row_ids, torch.Tensor) else list(row_ids), dtype=torch.int64).reshape(-1)
        if name in self.made:
            return self.made[name].rows(self, ids)
        wanted, place = torch.unique(ids, return_inverse=True)  # sorted: the disk is read in one direction
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < info.shape[0]:
            raise IndexError(f"{name} has {info.shape[0]} rows; rows {int(wanted[0])}..{int(wanted[-1])} were asked for")
        found = torch.empty(len(wanted), info.shape[1], dtype=torch_dtype(info))
        stride = info.nbytes // max(info.shape[0], 1)
        if stride:
            buffer = found.view(torch.uint8).numpy().reshape(-1).data
            for i, row in enumerate(wanted.tolist()):
                self.read_into(info, info.begin + row * stride, buffer[i * stride : (i + 1) * stride])
        return found[place]

    def raw(self, name: str) -> memoryview:
        """The bytes of the tensor, mapped read-only; of one that is computed or lies in another one, in memory."""
        info = self.tensors[name]
        if name in self.made or info.cut is not None:
            import torch

            return memoryview(self.read(name).cpu().reshape(-1).view(torch.uint8).numpy().data)
        if info.file not in self._maps:
            self._maps[info.file] = mmap.mmap(self._handle(info.file).fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[info.file])[info.begin : info.end]

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of the tensor's file (an absolute position)."""
        self.read_file_into(info.file, offset, buffer, f"{info.file}, tensor {shown(info.name)}")

    def read_file_into(self, file: Path, offset: int, buffer: memoryview, where: str) -> None:
        """Fill `buffer` from `offset` of a shard. BadInput E301 where the file has become shorter, or cannot be read."""
        descriptor = self._handle(file).fileno()
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise BadInput("E301", f"reading failed: {error.strerror}", where=where, fix="check the disk") from None
            if got == 0:
                raise BadInput(
                    "E301",
                    f"the file ends at byte {offset + done:,}; it was longer when it was checked",
                    where=where,
                    fix="something changes the checkpoint while it is read; make a copy and use that",
                )
            done += got

    def close(self) -> None:
        """Close all files. Views handed out by `raw` keep their map alive."""
        for handle in self._open.values():
            handle.close()
        self._open.clear()
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, file: Path) -> FileIO:
        """One handle for each shard. transformers reads from several threads: the first to open it wins, a later one must not replace it,
        because the replaced handle would be closed while its descriptor is in use."""
        handle = self._open.get(file)
        if handle is None:
            try:
                opened = open_member(self.folder, str(file.relative_to(self.folder)))
            except FileRefused as refused:
                raise BadInput.from_problems("E301", [refused.problem]) from None
            handle = self._open.setdefault(file, opened)
            if handle is not opened:
                opened.close()
        return handle


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The dtype a tensor is read as."""
    return dtype_called(info.dtype)


def dtype_called(name: str) -> torch.dtype:
    """The dtype that safetensors calls so."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[name])
    return dtype


def name_of_dtype(dtype: torch.dtype) -> str:
    """What safetensors calls it; torch's own name where it has none."""
    plain = str(dtype).removeprefix("torch.")
    return next((name for name, known in _TORCH_DTYPES.items() if known == plain), plain)


def require_folder(folder: Path) -> None:
    """BadInput E301 where it is not there, or is a file: what is missing in it would be named instead."""
    if not folder.is_dir():
        raise BadInput("E301", "there is no such folder", where=str(folder), fix="name a folder that holds config.json and *.safetensors")


def open_checkpoint(folder: Path, *, weight_files: str = MODEL_FILES, device: torch.device | None = None) -> Checkpoint:
    """Look at everything, read no weight. BadInput lists all problems.

    weight_files: a stem of formats/base.py or "auto". Where the model's own are asked for and config.json belongs to packed weights, native
    ones are read: whoever needs 16-bit weights then says so, and nothing is said to be missing. device: where `read` puts tensors.
    """
    folder = Path(folder)
    require_folder(folder)
    _refuse_adapter(folder)
    problems = special_files(folder)[:MAX_PROBLEMS]
    notes: list[str] = []
    config: dict[str, Any] = {}
    try:
        config = read_config(folder)
    except BadInput as error:
        problems += error.problems
    if weight_files == MODEL_FILES and config.get("quantization_config") and not _present(folder, MODEL_FILES):
        weight_files = "auto"
    shards, weight_map = _find_shards(folder, weight_files, problems, notes)
    tensors = _read_shards(folder, shards, problems)
    if weight_map is not None and not problems:
        _compare_with_index(weight_map, tensors, folder, problems)
    if problems:
        raise BadInput.from_problems("E301", problems)
    return Checkpoint(folder, config, tensors, tuple(folder / name for name in shards), tuple(notes), device)


def _refuse_adapter(folder: Path) -> None:
    """BadInput E390 for a folder that peft wrote. Beside a whole model too: transformers with peft applies such an adapter unasked."""
    if not exists(folder, _ADAPTER):
        return
    try:
        document = read_json(folder, _ADAPTER, limit=_MAX_ADAPTER_BYTES)
    except FileRefused as refused:
        raise BadInput.from_problems("E390", [refused.problem]) from None
    base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    what = f"this is an adapter (LoRA){of}, not a model"
    fix = "merge it into its model first, with peft: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(NEW)"
    if exists(folder, CONFIG):
        what = f"an adapter (LoRA){of} lies beside the model, and is not in its weights"
        fix += f"; or move {_ADAPTER} out of the folder to leave it out"
    raise BadInput("E390", what, where=str(folder / _ADAPTER), fix=fix)


def check_expected(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor the model needs is there, with its shape, as floating point; else one BadInput that lists all that is wrong."""

    def describe(item: tuple[str, tuple[int, ...]]) -> Problem:
        name, shape = item
        info = checkpoint.tensors.get(name)
        if info is None:
            fix = "the checkpoint is incomplete, or config.json belongs to another model"
            return Problem(f"the tensor {shown(name)} is missing", str(checkpoint.folder), fix)
        if info.shape != tuple(shape):
            what = f"{shown(name)} has shape {list(info.shape)}; config.json asks for {list(shape)}"
            return Problem(what, str(info.file), "config.json and the weights do not belong together; download both again")
        what = f"{shown(name)} holds {info.dtype}, not one of {', '.join(FLOAT_DTYPES)}"
        return Problem(what, str(info.file), "start from the original checkpoint, with floating-point weights")

    found = ((name, checkpoint.tensors.get(name), shape) for name, shape in expected.items())
    wrong = ((name, shape) for name, info, shape in found if info is None or info.shape != tuple(shape) or info.dtype not in FLOAT_DTYPES)
    problems = list(_first_problems(wrong, describe, checkpoint.folder))
    if problems:
        raise BadInput.from_problems("E302", problems)


def _first_problems(wrong: Iterable[_Wrong], describe: Callable[[_Wrong], Problem], folder: Path) -> Iterator[Problem]:
    """The first MAX_PROBLEMS of what is wrong in words, and how much more there is: a hostile index can name a million missing files."""
    left = iter(wrong)
    yield from map(describe, islice(left, MAX_PROBLEMS))
    more = sum(1 for _ in left)
    if more:
        yield Problem(f"and {number_of(more, 'more problem')}", str(folder), "fix the ones above first")


def _find_shards(folder: Path, weight_files: str, problems: list[Problem], notes: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """The names of the weight files, and the index's map from tensor to file where there is one."""
    if weight_files not in (*STEMS, "auto"):
        raise ValueError(f"weight_files is {', '.join(STEMS)} or auto, not {weight_files!r}")
    found = {stem: _present(folder, stem) for stem in STEMS}
    stems = [weight_files] if weight_files != "auto" else [stem for stem, names in found.items() if names] or [MODEL_FILES]
    if len(stems) > 1:
        what = f"the folder holds two sets of weights: {' and '.join(found[stem][0] for stem in stems)}"
        problems.append(Problem(what, str(folder), "move one set into a folder of its own"))
        return [], None
    stem = stems[0]
    index, single = f"{stem}.safetensors.index.json", f"{stem}.safetensors"
    if not found[stem]:
        problems.append(_no_weights(folder, stem, next((names[0] for names in found.values() if names), None)))
        return [], None
    if index not in found[stem]:
        _note_strangers(folder, {single}, f"{index}, which would name them, is missing", notes)
        return [single], None
    weight_map = _read_index(folder, index, problems, notes)
    shards = sorted(set(weight_map.values()))
    if single in found[stem] and single not in shards:
        notes.append(f"both {index} and {single} are there; the index is followed and {single} is not read")
    _note_strangers(folder, {single, *shards}, f"{index} does not name them", notes)
    return shards, weight_map


def _note_strangers(folder: Path, named: set[str], why: str, notes: list[str]) -> None:
    """Files of weights that are not read: what is left of an earlier model, or a part of this one that the index has lost."""

    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors" and path.name not in (*named, MASK_FILE))
    if found:
        shown_names = ", ".join(shown(name, 80) for name in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        notes.append(f"weights that are not read lie in the folder: {shown_names}; {why}")


def _present(folder: Path, stem: str) -> list[str]:
    return [name for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors") if exists(folder, name)]


def _no_weights(folder: Path, stem: str, other: str | None) -> Problem:
    """other: a file of another stem that is there."""
    if other is not None:
        what = f"the weights are called {other}, and config.json belongs to weights called {stem}"
        return Problem(what, str(folder), "config.json is another model's; fetch the checkpoint again")
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        index = f"{next((known for known in STEMS if shards[0].startswith(f'{known}-')), stem)}.safetensors.index.json"
        return Problem(f"there are weights ({shown(shards[0])}, ...) but no {index}", str(folder), "download the index file too")
    if pickles:
        return Problem(f"the weights are pickles ({shown(', '.join(pickles))})", str(folder), _CONVERT.replace("FOLDER", str(folder)))
    return Problem("there are no weights: no *.safetensors file", str(folder), "name the folder that holds the model's safetensors files")


def _read_index(folder: Path, index: str, problems: list[Problem], notes: list[str]) -> dict[str, str]:
    """{tensor: shard} from the index; only entries that may be followed."""
    again = "the index is damaged; download it again"
    try:
        document = read_json(folder, index)
    except FileRefused as refused:
        problems.append(refused.problem)
        return {}
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(Problem("the index has no weight_map that names a tensor", str(folder / index), again))
        return {}
    if not isinstance(document.get("metadata"), dict):
        notes.append(f"{index} has no metadata; the folder can be worked with, but transformers does not load it")
    names = dict.fromkeys(shard for shard in weight_map.values() if isinstance(shard, str))
    if len(names) > _MAX_SHARDS:
        what = f"the index names {len(names):,} files; no model has more than {_MAX_SHARDS:,}"
        problems.append(Problem(what, str(folder / index), again))
        return {}
    nameless = ((tensor, shard) for tensor, shard in weight_map.items() if not isinstance(shard, str))
    denied = {shard: problem for shard in names if (problem := _refusal(folder, index, shard)) is not None}
    problems += _first_problems(nameless, lambda entry: _nameless(folder / index, *entry), folder)
    problems += _first_problems(denied.values(), lambda problem: problem, folder)
    return {tensor: shard for tensor, shard in weight_map.items() if isinstance(shard, str) and shard not in denied}


def _nameless(index: Path, tensor: str, shard: object) -> Problem:
    what = f"weight_map gives no file name for {shown(tensor)}, but {shown(repr(shard), 60)}"
    return Problem(what, str(index), "the index is damaged; download it again")


def _refusal(folder: Path, index: str, shard: str) -> Problem | None:
    """Why a file that the index names is not followed."""
    try:
        member(folder, shard)
    except FileRefused as refused:
        return refused.problem
    if not shard.endswith(".safetensors"):
        what = f"the index names {shown(shard)}, which is not a safetensors file"
        return Problem(what, str(folder / index), _CONVERT.replace("FOLDER", str(folder)))
    return None


def _read_shards(folder: Path, shards: list[str], problems: list[Problem]) -> dict[str, TensorInfo]:
    """The tensors of all shards. It ends where enough is wrong: one file under a thousand names would be read a thousand times."""
    tensors: dict[str, TensorInfo] = {}
    for place, shard in enumerate(shards):
        if len(problems) > MAX_PROBLEMS:
            what = f"{number_of(len(shards) - place, 'more shard was', 'more shards were')} not looked at"
            problems.append(Problem(what, str(folder), "fix the ones above first"))
            break
        found, wrong = read_header(folder, shard)
        problems += wrong
        twice = ((tensors[name], info) for name, info in found.items() if name in tensors)
        problems += _first_problems(twice, _twice, folder)
        for name, info in found.items():
            tensors.setdefault(name, info)
    return tensors


def _twice(entries: tuple[TensorInfo, TensorInfo]) -> Problem:
    first, second = entries
    what = f"the tensor {shown(first.name)} lies in two shards, {shown(first.file.name)} and {shown(second.file.name)}"
    return Problem(what, str(second.file.parent), "two versions of the model are mixed in the folder; download it again")


def _compare_with_index(weight_map: dict[str, str], tensors: dict[str, TensorInfo], folder: Path, problems: list[Problem]) -> None:
    again = "the index and the shards do not belong together; download both again"

    def describe(name: str) -> Problem:
        info, shard = tensors.get(name), weight_map.get(name)
        if shard is None:
            return Problem(f"the tensor {shown(name)} is not in the index", str(tensors[name].file), again)
        if info is None:
            return Problem(f"the index promises the tensor {shown(name)}, the shard does not hold it", str(folder / shard), again)
        what = f"the tensor {shown(name)} lies in {shown(info.file.name)}, the index says {shown(shard)}"
        return Problem(what, str(folder / shard), again)

    places = {shard: folder / shard for shard in set(weight_map.values())}
    elsewhere = (name for name, shard in weight_map.items() if name not in tensors or tensors[name].file != places[shard])
    problems += _first_problems(chain(elsewhere, (name for name in tensors if name not in weight_map)), describe, folder)
