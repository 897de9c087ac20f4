"""One block at a time, for a machine that cannot hold the model and its optimizer state.

    teacher   t ──► block i of the teacher ──► t'                   hidden states of all rows, in scratch files beside OUT
    student   s ──► block i of the student ──► s' ≈ t'              trained on  mean (s' - t')² / mean t'²
                                                                    then s ◄── s', t ◄── t', and the next block

A block learns to give the teacher's hidden states from those that the student's trained blocks give it, so it also corrects errors of
the blocks before it. Memory: one block of the teacher, one of the student with its gradients and optimizer state, and the activations of
one part of a step. The final norm is not trained: it belongs to no block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from marlinctl.checkpoint.reader import torch_dtype
from marlinctl.data.tokens import Tokens
from marlinctl.distillation.loop import LOG_EVERY, learning_rate, make_optimizer, not_finite, training_facts
from marlinctl.distillation.open import Model, TrainingInputs
from marlinctl.distillation.parameters import assemble, by_parameter, trained_places
from marlinctl.distillation.rows import Rows, rows_of_step
from marlinctl.distillation.state import DistillJob, State
from marlinctl.distillation.tracking import Track, untracked
from marlinctl.models.architectures import Block
from marlinctl.models.meta_model import build, drop_parameters, hidden_states, set_parameter
from marlinctl.models.places import Place, block_places
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.planning.training_settings import rows_per_step, steps_of
from marlinctl.recipes.schema import Distill
from marlinctl.system.console import Console, Progress, duration
from marlinctl.system.offload import Scratch, Slot
from marlinctl.system.signals import Stopping

EMBEDDED_TOGETHER = 64  # rows
_MOMENTS = ("exp_avg", "exp_avg_sq")


class BlockLoop:
    def __init__(
        self,
        opened: TrainingInputs,
        rows: Rows,
        asked: Distill,
        *,
        device: torch.device,
        dtype: torch.dtype,
        job: DistillJob,
        scratch: Scratch,
        console: Console,
        track: Track = untracked,
    ) -> None:
        self.track = track
        self.opened, self.rows, self.asked = opened, rows, asked
        self.device, self.dtype, self.job, self.console = device, dtype, job, console
        self.blocks = opened.student.architecture.blocks
        self.steps, self.per_step = steps_of(asked), rows_per_step(asked)
        self.trained = trained_places(opened.student.architecture)
        self.student = _Side(opened.student, rows, asked.micro_batch, device, dtype, scratch, "student")
        self.teacher = _Side(opened.teacher, rows, asked.micro_batch, device, dtype, scratch, "teacher")
        self.records: list[dict[str, Any]] = []  # one for each finished block
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    def run(self, resumed: State | None) -> None:
        if (self.job.path / "blocks.json").exists():
            finished = self.job.document("blocks.json")
            self.records, self.curve, self.seconds = finished["blocks"], finished["curve"], finished["seconds"]
        total = self.steps * len(self.blocks)
        with Stopping() as stopping, self.console.progress("distill", total) as progress:
            for block, original in zip(self.blocks, self.opened.teacher.architecture.blocks, strict=True):
                target_energy = self._run_teacher(original)
                if block.index < len(self.records):
                    layer = self.student.load(block, torch.float32, replaced=self._finished(block.index))
                    progress.advance(self.steps)
                else:
                    layer = self.student.load(block, torch.float32)
                    self._train(block, layer, target_energy, resumed, stopping, progress)
                self.student.advance(layer, block, self._autocast)
                drop_parameters(layer)
        if stopping.asked:  # came behind the last block, which is saved
            stopping.raise_again()

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that changes, by its name in the checkpoint."""
        for block in self.blocks:
            yield from self._finished(block.index).items()

    def facts(self) -> dict[str, Any]:
        tokens = self.steps * self.per_step * self.rows.ids.shape[1]
        speed = tokens * len(self.blocks) / self.seconds
        return training_facts(self.steps, tokens, self.seconds, self.curve) | {"tokens_per_second": round(speed, 1), "blocks": self.records}

    def measured(self) -> tuple[dict[str, float], dict[str, float]]:
        """Mean relative error of the blocks' outputs on the held-out rows, before and after."""
        before, after = (sum(record[key] for record in self.records) / len(self.records) for key in ("before", "after"))
        return {"block_error": before}, {"block_error": after}

    # One block

    def _run_teacher(self, block: Block) -> float:
        """Take the teacher's hidden states through one block; returns their mean square over the rows that are trained on."""
        layer = self.teacher.load(block, self.dtype)
        target_energy, counted = 0.0, 0
        self.teacher.advance(layer, block, self._autocast)
        drop_parameters(layer)
        for part in _parts(0, self.rows.trained, self.asked.micro_batch):
            mask = self.rows.counted[part]
            states = self.teacher.hidden[part].double().square_().cpu()
            target_energy += float(states[mask].sum())
            counted += int(mask.sum()) * states.shape[-1]
        return target_energy / counted

    def _train(
        self, block: Block, layer: nn.Module, target_energy: float, resumed: State | None, stopping: Stopping, progress: Progress
    ) -> None:
        places = {name: place for name, place in block_places(block).items() if name in self.trained}
        parameters = {name: layer.get_parameter(name[len(block.prefix) + 1 :]) for name in by_parameter(places)}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = make_optimizer(parameters.values(), self.device)
        pruned = self._pruned(places, parameters)
        before = self._held_out_error(layer, block, target_energy)
        base = block.index * self.steps
        first = 0
        if resumed is not None and base < resumed.step < base + self.steps:
            first = resumed.step - base
            self.curve, self.seconds = list(resumed.document["curve"]), float(resumed.document["seconds"])
            _restore(resumed, parameters, optimizer, first)
        progress.advance(first)
        started = time.monotonic()
        loss = torch.zeros((), device=self.device)
        for step in range(first, self.steps):
            loss += self.step(layer, block, step, target_energy)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self.steps, self.asked)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, mask in pruned.items():
                    parameters[name].masked_fill_(mask, 0.0)
            done, last = step + 1, step + 1 == self.steps
            self.seconds, started = self.seconds + time.monotonic() - started, time.monotonic()
            save = ((base + done) % self.asked.save_every == 0 or bool(stopping.asked)) and not last
            progress.advance(1, self._log(block, done, loss) if done % LOG_EVERY == 0 or save or last else "")
            if save:
                document = {"curve": self.curve, "seconds": self.seconds}
                self.job.save(State(base + done, _state(parameters, optimizer), document))
            if stopping.asked and not last:
                self.console.say(f"state after step {done} of {self.steps} of block {block.index} is saved")
                stopping.raise_again()
        self._finish(block, layer, places, parameters, before, target_energy)
        if stopping.asked:
            self.console.say(f"block {block.index} is finished and saved")
            stopping.raise_again()

    def step(self, layer: nn.Module, block: Block, step: int, target_energy: float) -> Tensor:
        rows = rows_of_step(step, self.per_step, self.rows.trained, self.asked.seed)
        scale = 1.0 / (target_energy * self.student.hidden.shape[-1] * int(self.rows.counted[rows].sum()))
        total = torch.zeros((), device=self.device)
        for part in rows.split(self.asked.micro_batch):
            loss = self._squared(layer, block, part) * scale
            loss.backward()
            total += loss.detach()
        return total

    def _squared(self, layer: nn.Module, block: Block, rows: Tensor) -> Tensor:
        """Sum of (s' - t')² over the counted tokens of these rows."""
        target = _gather(self.teacher.hidden, rows).to(self.device).float()
        padding = ~self.rows.counted[rows].to(self.device).unsqueeze(-1)
        with self._autocast():
            output = self.student.call(layer, block, _gather(self.student.hidden, rows))
        return (output.float() - target).square().masked_fill(padding, 0.0).sum()

    @torch.no_grad()
    def _held_out_error(self, layer: nn.Module, block: Block, target_energy: float) -> float:
        held_out = torch.arange(self.rows.trained, self.rows.ids.shape[0])
        counted = int(self.rows.counted[held_out].sum()) * self.student.hidden.shape[-1]
        total = sum(float(self._squared(layer, block, part)) for part in held_out.split(self.asked.micro_batch))
        return total / counted / target_energy

    def _log(self, block: Block, done: int, loss: Tensor) -> str:
        step = block.index * self.steps + done
        since = min(done, step - int(self.curve[-1]["step"]) if self.curve else done)
        mean = float(loss) / since
        loss.zero_()
        if not math.isfinite(mean):
            raise not_finite(f"block {block.index}: {mean:g}", f"step {done} of {self.steps}", self.asked)
        self.curve.append({"step": step, "block": block.index, "loss": mean})
        rate, speed = learning_rate(done - 1, self.steps, self.asked), step * self.per_step * self.rows.ids.shape[1] / self.seconds
        values = {"loss": mean, "block": block.index, "learning_rate": rate, "tokens_per_second": speed}
        self.track({f"train/{name}": value for name, value in values.items()}, step)
        left = duration(self.seconds / step * (self.steps * len(self.blocks) - step))
        return f"block {block.index}: error {mean:.5f}, {left} left"

    @torch.no_grad()
    def _finish(
        self,
        block: Block,
        layer: nn.Module,
        places: Mapping[str, Place],
        parameters: Mapping[str, nn.Parameter],
        before: float,
        target_energy: float,
    ) -> None:
        """Round to what the checkpoint can hold, measure, and put the block on the disk."""
        tensors: dict[str, Tensor] = {}
        for parameter, names in by_parameter(places).items():
            dtype = torch_dtype(self.opened.student.checkpoint.tensors[names[0]])
            parameters[parameter].copy_(parameters[parameter].to(dtype))
            tensors |= {name: places[name].of(parameters[parameter]).to(dtype).contiguous() for name in names}
        after = self._held_out_error(layer, block, target_energy)
        self.track({"held_out/block_error": after}, (block.index + 1) * self.steps)
        self.job.save_block(block.index, tensors)
        self.records.append({"block": block.index, "before": before, "after": after})
        self.job.save_document("blocks.json", {"blocks": self.records, "curve": self.curve, "seconds": self.seconds})
        self.console.say(f"block {block.index}: relative error of its output on the held-out rows {before:.5f} -> {after:.5f}")

    def _finished(self, index: int) -> dict[str, Tensor]:
        with self.job.tensors(f"block-{index:05d}.safetensors") as found:
            return {name: found.read(name) for name in found.tensors}

    def _pruned(self, places: Mapping[str, Place], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        pattern = self.opened.pattern
        masked = {name: place for name, place in places.items() if name.removesuffix(".weight") in pattern.shapes}
        return {
            parameter: assemble(
                ((places[name], ~pattern.mask(name.removesuffix(".weight"))) for name in names), parameters[parameter].shape, torch.bool
            ).to(self.device)
            for parameter, names in by_parameter(masked).items()
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class _Side:
    """One of the two models: its meta model, and its hidden states between two blocks, [R, L, H] in scratch."""

    hidden: Slot

    @torch.no_grad()
    def __init__(
        self, model: Model, rows: Rows, together: int, device: torch.device, dtype: torch.dtype, scratch: Scratch, slot: str
    ) -> None:
        self.source, self.rows, self.together = model, rows, together
        self.device, self.dtype, self.scratch = device, dtype, scratch
        self.model = build(model.checkpoint.config, dtype)
        self.calls: dict[int, list[dict[str, Any]]] = {}  # rows in a call -> keyword arguments of every block
        count, length = rows.ids.shape
        self.hidden = scratch.tensor(slot, (count, length, model.architecture.hidden_size), dtype)
        for part in _parts(0, count, EMBEDDED_TOGETHER):
            self.hidden[part] = self._embed(part).hidden

    def load(self, block: Block, dtype: torch.dtype, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A block with its weights, from the checkpoint or from `replaced`."""
        layer = self.model.get_submodule(block.path)
        places = block_places(block)
        known = replaced or {}
        for parameter, names in by_parameter(places).items():
            relative = parameter[len(block.prefix) + 1 :]
            pieces = ((places[name], known[name] if name in known else self.source.checkpoint.read(name)) for name in names)
            shape = (layer.get_buffer if block.buffers.issuperset(names) else layer.get_parameter)(relative).shape
            value = assemble(pieces, shape, dtype)
            set_parameter(layer, relative, value.to(self.device))
        return layer

    def call(self, layer: nn.Module, block: Block, hidden: Tensor) -> Tensor:
        return hidden_states(layer(hidden.to(self.device), **self._arguments(hidden.shape[0])[block.index]))

    @torch.no_grad()
    def advance(self, layer: nn.Module, block: Block, autocast: Callable[[], torch.autocast]) -> None:
        """Replace the hidden states by the block's output."""
        for part in _parts(0, self.rows.ids.shape[0], self.together):
            with autocast():
                self.hidden[part] = self.call(layer, block, self.hidden[part]).to(self.dtype)

    @torch.no_grad()
    def _arguments(self, count: int) -> list[dict[str, Any]]:
        """What the decoder gives to its blocks besides the hidden states; it depends on the number of rows, not on their content."""
        if count not in self.calls:
            self.calls |= self._embed(slice(0, count), together=count).calls
        return self.calls[count]

    def _embed(self, part: slice, together: int | None = None) -> SequentialPipeline:
        tokens = Tokens(self.rows.ids[part], self.rows.counted[part])
        return SequentialPipeline(
            self.model, self.source.architecture, self.source.checkpoint, tokens,
            device=self.device, dtype=self.dtype, scratch=self.scratch, chunk_tokens=(together or self.together) * tokens.ids.shape[1],
        )  # fmt: skip


def _parts(first: int, last: int, size: int) -> Iterator[slice]:
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


def _gather(hidden: Slot, rows: Tensor) -> Tensor:
    """Single rows, read one by one: an index would map the whole file."""
    return torch.cat([hidden[slice(row, row + 1)] for row in rows.tolist()])


def _state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found[f"weight.{name}"] = parameter.detach().cpu()
        found |= {f"{key}.{name}": optimizer.state[parameter][key].cpu() for key in _MOMENTS}
    return found


@torch.no_grad()
def _restore(state: State, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, done: int) -> None:
    fused = optimizer.param_groups[0]["fused"]
    for name, parameter in parameters.items():
        parameter.copy_(state.tensors[f"weight.{name}"])
        moments = {key: state.tensors[f"{key}.{name}"].to(parameter.device) for key in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(done), device=parameter.device if fused else "cpu"), **moments}
