"""What quantize and sparsify keep in the job's folder, to resume after the last finished block.

    calibration.safetensors     the token ids, and which of them count; the text is not needed again
    token_weights.safetensors   the weights of these tokens in the Hessians, where the recipe wants any
    staged/                     a shard for each finished block; they are merged when all are there (checkpoint/shards.py)
    staged.masks                the masks of the finished blocks, where there are any
    states/00012.safetensors    the hidden states that enter block 12; the last two that were kept
    orders/00012.safetensors    the orders of rows and columns in block 12, where the run chose any

    journal    begun (─► token weights) ─► block 0 ─► block 1 ─► ... ─► head

A block is finished when its shard and its masks are on the disk, and the hidden states behind it where they are kept; then its line is
written. What no line names is made again. Blocks behind the last states are replayed: run once more with the weights that are stored. On a
CPU a resumed run computes what the one before would have computed, bit for bit: hidden states are kept in the dtype in which they are
passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from marlinctl.checkpoint.contents import Contents
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.checkpoint.formats.registry import INTERCHANGE, read_linear
from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.orders import Orders, read_orders
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.rotated import Rotation, read_rotation
from marlinctl.checkpoint.safetensors_header import TensorInfo, read_header
from marlinctl.checkpoint.writer import StagedCheckpoint
from marlinctl.data.calibration import CalibrationSet
from marlinctl.data.tokens import Tokens
from marlinctl.errors import UsageError
from marlinctl.jobs.journal import JOURNAL, JobFolder
from marlinctl.models.architectures import Block
from marlinctl.oneshot.layers import Finished, LayerRecord
from marlinctl.oneshot.reading import Reader
from marlinctl.quantize.scheme import INT4
from marlinctl.quantize.types import Hessian
from marlinctl.system.atomic import disk_problems, make_folder, write_tensors
from marlinctl.system.console import Console
from marlinctl.system.digests import sha256_of, sha256_of_part

_CALIBRATION = "calibration.safetensors"
_TOKEN_WEIGHTS = "token_weights.safetensors"
_WEIGHTED = "token weights"  # step of the journal
_STATES_KEPT = 2


class RunJob(JobFolder):
    @property
    def staged(self) -> Path:
        return self.path / "staged"

    # Calibration

    def begin_blocks(self, fingerprint: Mapping[str, Any], calibration: CalibrationSet, model: Contents) -> None:
        tokens = calibration.tokens
        write_tensors(self.path / _CALIBRATION, {"ids": tokens.ids, "counted": tokens.counted})
        noted = {"facts": dict(calibration.facts), "file": self._described(_CALIBRATION)}
        self.begin(fingerprint, inputs={"model": model.document()}, calibration=noted)

    def calibration(self) -> CalibrationSet | None:
        """The text that the job was begun with; None where it was killed before it had any, or where the file is damaged."""
        if not self.begun:
            return None
        noted = self.lines[0].get("calibration")
        if not isinstance(noted, dict) or not _describes_file(noted.get("file")) or "sha256" not in (noted.get("facts") or ()):
            raise self.damaged("its first line does not say which text the job was begun with", self.path / JOURNAL)
        if not self._is_as_noted(noted["file"]):
            self.drop_from(0)
            return None
        found = self._tensors(_CALIBRATION)
        return CalibrationSet(Tokens(found["ids"], found["counted"]), noted["facts"])

    # Token weights

    def keep_token_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Before the first block is solved."""
        write_tensors(self.path / _TOKEN_WEIGHTS, weights)
        self.require_inputs_unchanged()
        self.append({"step": _WEIGHTED, "file": self._described(_TOKEN_WEIGHTS)})

    def token_weights(self) -> dict[str, Tensor] | None:
        """After `take_up`. None where none are kept."""
        return self._tensors(_TOKEN_WEIGHTS) if self._weighted else None

    @property
    def _weighted(self) -> bool:
        return len(self.lines) > 1 and self.lines[1]["step"] == _WEIGHTED

    @property
    def _weights_are_whole(self) -> bool:
        noted = self.lines[1].get("file") if self._weighted else None
        return _describes_file(noted) and noted["name"] == _TOKEN_WEIGHTS and self._is_as_noted(noted)

    # Blocks

    @property
    def _before_blocks(self) -> int:
        """How many lines stand before those of blocks."""
        return 2 if self._weighted else 1

    @property
    def _of_blocks(self) -> list[dict[str, Any]]:
        """The lines of finished blocks, and what follows them."""
        return self.lines[self._before_blocks :]

    def commit(self, step: str, index: int, finished: Finished, staged: StagedCheckpoint, states: Mapping[str, Tensor]) -> None:
        """Write and note a finished block, or the head. states: the hidden states behind it, {} where they are not kept.

        BadInput E306 where the model has changed: the block may be of the weights of before or of those of now.
        """
        shard = staged.write_shard(finished.tensors) if finished.tensors else None
        self.require_inputs_unchanged()
        masked = sum(line["masks"]["bytes"] for line in self.lines if line["step"] in ("block", "head"))
        noted: dict[str, Any] = {"step": step, "index": index, "records": [asdict(record) for record in finished.records]}
        noted["shard"] = self._described(f"staged/{shard}") if shard is not None else None
        size = staged.sync() - masked
        noted["masks"] = {"bytes": size, "sha256": sha256_of_part(staged.spool, masked, size) if size else None}
        noted["orders"] = self._write_orders(index, finished.orders)
        if finished.tuning is not None:
            noted["tuning"] = dict(finished.tuning)
        if states:
            with disk_problems(self.path):
                make_folder(self.path / "states")
            self._forget_states(index + 1)
            write_tensors(self.path / _state_name(index + 1), states)
            noted["state"] = self._described(_state_name(index + 1))
        self.append(noted)

    def take_up(
        self, staged: StagedCheckpoint, console: Console, *, redo_from: int | None, pieces: int, weighted: bool = False
    ) -> list[LayerRecord]:
        """Put `staged` where the last finished block left it; returns the records so far. Lines whose files are damaged are dropped.

        redo_from: blocks from this one on are dropped too. pieces: blocks, and the head if it is solved. weighted: blocks are solved with
        token weights, without which none of them stays.
        """
        if redo_from is not None and redo_from >= pieces:
            what = f"--from-block {redo_from}: the blocks of this model are 0 to {pieces - 1}"
            raise UsageError("E288", what, where="--from-block", fix="name one of them, or leave it out")
        found = len(self.lines)
        before = self._before_blocks
        good = before + self._whole()
        if weighted and found > 1 and not self._weights_are_whole:
            console.warn("the token weights of the job are damaged or missing: they are computed again, and all blocks solved again")
            good = 1
        elif redo_from is not None:
            good = min(good, before + redo_from)
        elif good < found:
            console.warn(f"files of the job are damaged or missing after block {good - before - 1}; those blocks are solved again")
        self.drop_from(good)
        done = self._of_blocks
        records = [LayerRecord(**{**record, "shape": tuple(record["shape"])}) for line in done for record in line["records"]]
        shards = [Path(line["shard"]["name"]).name for line in done if line["shard"] is not None]
        layers = [(record.name, *record.shape) for record in records if record.pattern is not None]
        staged.restore(shards, layers)
        if done:
            console.say(f"resuming: {len(done)} of {pieces} blocks finished")
        return records

    def _write_orders(self, index: int, orders: Orders) -> dict[str, Any] | None:
        if not orders:
            return None
        name = f"orders/{index:05d}.safetensors"
        with disk_problems(self.path):
            make_folder(self.path / "orders")
        write_tensors(self.path / name, {key: order.to(torch.int32) for key, order in orders.items()})
        return self._described(name)

    def tuning(self) -> list[dict[str, Any]]:
        """Of the blocks that were tuned: their error on held-out samples, before and after."""
        return [{"block": line["index"], **line["tuning"]} for line in self._of_blocks if isinstance(line.get("tuning"), dict)]

    def orders(self) -> dict[int, Orders]:
        """Of the finished blocks that have any."""
        noted = {line["index"]: line.get("orders") for line in self._of_blocks}
        return {index: self._tensors(file["name"]) for index, file in noted.items() if file is not None}

    def write_orders(self, staged: StagedCheckpoint, source: Path, rotation: Rotation | None) -> None:
        """Put those of all blocks into the finished folder, beside the rotation and those that the model came with."""
        found = {name: order for orders in self.orders().values() for name, order in orders.items()}
        found |= {} if rotation is None else rotation.tensors()
        if found:
            found |= {name: order.to(torch.int32) for name, order in read_orders(source).items()}
            found |= {} if (earlier := read_rotation(source)) is None else earlier.tensors()
            with disk_problems(staged.path):
                make_folder((staged.path / ORDER_FILE).parent)
            write_tensors(staged.path / ORDER_FILE, found)

    def last_states(self) -> tuple[int, dict[str, Tensor]]:
        """The last finished block behind which hidden states are kept and whole: the number of the next one, and the states.

        0 and {} where there is none.
        """
        for index in range(self.finished, 0, -1):
            state = self._of_blocks[index - 1].get("state")
            if _describes_file(state) and self._is_as_noted(state):
                return index, self._tensors(state["name"])
        return 0, {}

    def stored_weights(self, records: Sequence[LayerRecord], reader: Reader, device: torch.device) -> StoredWeights:
        """Of the finished blocks, read onto `device`."""
        infos: dict[str, TensorInfo] = {}
        for line in self._of_blocks:
            if line["shard"] is not None:
                shard, problems = read_header(self.staged, Path(line["shard"]["name"]).name)
                if problems:
                    raise self.damaged(problems[0].what, problems[0].where)
                infos |= shard
        files = tuple(dict.fromkeys(info.file for info in infos.values()))
        return StoredWeights(Checkpoint(self.staged, {}, infos, files, device=device), {record.name: record for record in records}, reader)

    @property
    def finished(self) -> int:
        """How many blocks are finished; one more than there are blocks when the head is, too."""
        return sum(line["step"] in ("block", "head") for line in self.lines)

    # Files

    def _whole(self) -> int:
        """How many lines behind the first are followed by files that are as they say."""
        count, masked = 0, 0
        for line in self._of_blocks:
            if not _is_whole_line(line, count) or (line["shard"] is not None and not self._is_as_noted(line["shard"])):
                break
            size, spool = line["masks"]["bytes"], self.staged.with_name(self.staged.name + ".masks")
            if size and (not spool.is_file() or sha256_of_part(spool, masked, size) != line["masks"]["sha256"]):
                break
            if line.get("orders") is not None and not self._is_as_noted(line["orders"]):
                break
            masked += size
            count += 1
        return count

    def _forget_states(self, index: int) -> None:
        """Before those that enter block `index` are written, so that the disk never holds more. Later ones are of a former run."""
        kept = sorted((self.path / "states").glob("*.safetensors"))
        earlier = [path for path in kept if int(path.stem) < index]
        for path in {*kept} - {*earlier[len(earlier) + 1 - _STATES_KEPT :]}:
            path.unlink()

    def _described(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return {"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}

    def _is_as_noted(self, noted: Mapping[str, Any]) -> bool:
        path = self.path / noted["name"]
        return path.is_file() and not path.is_symlink() and path.stat().st_size == noted["bytes"] and sha256_of(path) == noted["sha256"]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        infos, problems = read_header(self.path, name)
        if problems:
            raise self.damaged(problems[0].what, problems[0].where)
        with Checkpoint(self.path, {}, infos, (self.path / name,)) as found:
            return {key: found.read(key) for key in infos}


class StoredWeights:
    """The weights of finished blocks, for a replay. `stage` is a SolveStage."""

    def __init__(self, written: Checkpoint, records: Mapping[str, LayerRecord], reader: Reader) -> None:
        sizes = {name: record.group_size for name, record in records.items()}
        grids = {name: record.grid for name, record in records.items() if record.group_size is not None and record.grid != INT4}
        self._info = FormatInfo(INTERCHANGE, {name: size for name, size in sizes.items() if size is not None}, grids=grids)
        self._written, self._records, self._reader = written, records, reader

    def stage(self, names: tuple[str, ...], _hessian: Hessian | None, _remark: str) -> dict[str, Tensor]:
        return {name: self._weight(name) for name in names}

    def _weight(self, name: str) -> Tensor:
        if name not in self._records:
            return self._reader.read(f"{name}.weight").float()
        if name in self._info.layers:
            return read_linear(self._written, self._info, name).dequantize()
        return self._written.read(f"{name}.weight").float()

    def others(self, block: Block) -> dict[str, Tensor]:
        """Norms and biases of a finished block that were written with it."""
        return {name: self._written.read(name) for name in block.others if name in self._written.tensors}

    def close(self) -> None:
        self._written.close()


def _is_whole_line(line: Mapping[str, Any], index: int) -> bool:
    """Whether a line says all that `commit` writes of finished block `index`; one that was changed counts as torn."""
    masks, shard = line.get("masks"), line.get("shard", "")
    try:
        TypeAdapter(list[LayerRecord]).validate_python(line.get("records"))
    except ValidationError:
        return False
    return (
        line["step"] in ("block", "head")
        and line.get("index") == index
        and isinstance(masks, dict)
        and type(masks.get("bytes")) is int
        and masks["bytes"] >= 0
        and "sha256" in masks
        and (shard is None or _describes_file(shard))
        and all(line.get(key) is None or _describes_file(line[key]) for key in ("state", "orders"))
    )


def _describes_file(noted: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(noted, dict) and isinstance(noted.get("name"), str) and {"bytes", "sha256"} <= noted.keys()


def _state_name(index: int) -> str:
    return f"states/{index:05d}.safetensors"
