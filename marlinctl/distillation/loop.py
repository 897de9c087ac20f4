"""The training loop over the whole model, for modes full and scales.

    rows of a step ─► teacher (no gradient) ─► student ─► losses ─► gradients, added up over the parts of the step
                                               ▲                                  │
                             masks (masks.py) ◄── AdamW step, learning rate ◄─────┘

AdamW without weight decay, betas 0.9 and 0.999, on the trained parameters alone; the learning rate rises linearly and falls linearly to 0.
A step is worked off in parts of `micro_batch` rows, over all processes. Its losses are means over the tokens of the whole step, so that how
many processes share the parts decides nothing but rounding; SquareHead divides by the teacher's energy in a part.
A step does not wait for the device: losses are fetched every LOG_EVERY steps. The time of a step is taken from there to there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from marlinctl.distillation.distributed import Processes, local, whole
from marlinctl.distillation.losses import NAMES, Weights, loss_sums
from marlinctl.distillation.rows import Rows, rows_of_step
from marlinctl.distillation.state import DistillJob, State
from marlinctl.distillation.student import Student
from marlinctl.distillation.teacher import Teacher
from marlinctl.distillation.tracking import Track, untracked
from marlinctl.errors import NumericalProblem
from marlinctl.planning.training_settings import rows_per_step, steps_of
from marlinctl.recipes.schema import Distill
from marlinctl.system.console import Console, duration
from marlinctl.system.signals import Stopping

BETAS = (0.9, 0.999)
LOG_EVERY = 10  # steps
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Loop:
    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        rows: Rows,
        asked: Distill,
        *,
        dtype: torch.dtype,
        processes: Processes,
        job: DistillJob,
        console: Console,
        track: Track = untracked,
    ) -> None:
        self.track = track
        self.student, self.teacher, self.rows, self.asked = student, teacher, rows, asked
        self.dtype, self.processes, self.job, self.console = dtype, processes, job, console
        self.weights = Weights(asked.ce, asked.squarehead, asked.kl, asked.temperature)
        self.steps, self.per_step = steps_of(asked), rows_per_step(asked)
        self.called = processes.replicate(student.model)
        self.optimizer = make_optimizer(student.trained.values(), processes.device)
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0  # in training, over all runs of the job
        self._paces: list[float] = []  # seconds of a step, from one line of the log to the next, saving apart
        self._logged = (0, 0.0)  # the step after which the device was last waited for, and when that was
        self._sums = torch.zeros(3, device=processes.device)  # since the last log line
        self._counts = torch.zeros(3, dtype=torch.float64)

    def run(self, resumed: State | None) -> None:
        """All steps that are left. A signal ends it after the current step, with a state to resume from."""
        first = 0
        if resumed is not None:
            first = self._restore(resumed)
        started = time.monotonic()
        self._logged = (first, started)
        with Stopping() as stopping, self.console.progress("distill", self.steps) as progress:
            progress.advance(first)
            for step in range(first, self.steps):
                self.step(step)
                done = step + 1
                self.seconds, started = self.seconds + time.monotonic() - started, time.monotonic()
                stopping.asked = self.processes.largest(stopping.asked)
                # The last step too: what comes after it (rounding, writing, checking) may fail, and should not cost the training.
                save = done % self.asked.save_every == 0 or done == self.steps or bool(stopping.asked)
                progress.advance(1, self._log(done) if done % LOG_EVERY == 0 or save else "")
                if save:
                    self._save(done)
                    self._logged = (done, time.monotonic())
                if stopping.asked:
                    self.console.say(f"state after step {done} of {self.steps} is saved")
                    stopping.raise_again()
        if stopping.asked:  # came behind the last step, which is saved
            stopping.raise_again()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The losses on the held-out rows. The cross entropy is measured in any case: it shows how well the text is predicted."""
        weights = Weights(1.0, self.asked.squarehead, self.asked.kl, self.asked.temperature)
        held_out = torch.arange(self.rows.trained, self.rows.ids.shape[0])
        sums = torch.zeros(3, device=self.processes.device)
        for part in held_out.split(self.asked.micro_batch):
            sums += self._losses(self.student.model, part, weights)
        return self._named(sums.double().cpu() / _counts(self.rows.counted[held_out]))

    def facts(self) -> dict[str, Any]:
        """What the report says about the training."""
        facts = training_facts(self.steps, self.steps * self._tokens_per_step, self.seconds, self.curve)
        settled = self._paces[1:] or self._paces  # the first steps compile kernels and grow the allocator
        return facts | ({"seconds_per_step": round(statistics.median(settled), 4)} if settled else {})

    # One step

    def step(self, step: int) -> None:
        """Does not wait for the device."""
        rows = rows_of_step(step, self.per_step, self.rows.trained, self.asked.seed)
        counts = _counts(self.rows.counted[rows])
        share = self.per_step // self.processes.count
        mine = rows[self.processes.index * share : (self.processes.index + 1) * share]
        # Times the number of processes, because gradients are averaged over them.
        factors = torch.tensor(self.weights.of_sums()) / counts * self.processes.count
        factors = factors.to(self.processes.device, torch.float32, non_blocking=True)
        parts = mine.split(self.asked.micro_batch)
        for part in parts[:-1]:
            with self.processes.unsynchronised(self.called):
                self._backward(part, factors)
        self._backward(parts[-1], factors)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.asked)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.masks.constrain(step)
        self._counts += counts

    def _backward(self, part: Tensor, factors: Tensor) -> None:
        sums = self._losses(self.called, part, self.weights)
        self.processes.accelerator.backward((sums * factors).sum())
        self._sums += sums.detach()

    def _losses(self, model: torch.nn.Module, part: Tensor, weights: Weights) -> Tensor:
        rows = self.rows.counted[part]
        ids, counted = (self._on_device(tensor) for tensor in (self.rows.ids[part], rows))
        with torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32):
            signals = self.teacher(part, ids)
            out = model(input_ids=ids, use_cache=False, output_hidden_states=bool(weights.squarehead))
        hidden = out.hidden_states[1:] if weights.squarehead else ()
        return loss_sums(out.logits, hidden, ids, counted, signals, weights, padded=not bool(rows.all()))

    def _on_device(self, tensor: Tensor) -> Tensor:
        """From pinned memory: a copy from other memory would wait for the device."""
        device = self.processes.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    # Reports and saved states

    def _log(self, done: int) -> str:
        """A line of the loss curve, for the report and for the person who waits. Waits for the device."""
        means = self._named(self.processes.sum(self._sums).double().cpu() / self._counts)
        self._sums.zero_()
        self._counts.zero_()
        if not all(math.isfinite(value) for value in means.values()):
            raise not_finite(", ".join(f"{name} {value:g}" for name, value in means.items()), f"step {done} of {self.steps}", self.asked)
        before, now = self._logged, time.monotonic()
        self._paces.append((now - before[1]) / (done - before[0]))
        self._logged = (done, now)
        speed = self._tokens_per_step / self._paces[-1]
        rate = learning_rate(done - 1, self.steps, self.asked)
        means |= self.student.masks.progress()
        self.curve.append({"step": done, "tokens": done * self._tokens_per_step, "learning_rate": rate, **means})
        values = {**means, "learning_rate": rate, "tokens_per_second": speed}
        self.track({f"train/{name}": value for name, value in values.items()}, done)
        left = duration(self.seconds / done * (self.steps - done))
        losses = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        speed = done * self._tokens_per_step / self.seconds
        return f"{losses}, learning rate {rate:.1e}, {speed:,.0f} tokens/s, {left} left"

    @property
    def _tokens_per_step(self) -> int:
        return int(self.per_step * self.rows.ids.shape[1])

    def _named(self, means: Tensor) -> dict[str, float]:
        """The weighted loss and its parts; a part that is not trained on is left out, but for the cross entropy where it was measured."""
        values = means.tolist()
        loss = sum(weight * value for weight, value in zip(self.weights.of_sums(), values, strict=True))
        return {"loss": loss} | {name: value for name, value in zip(NAMES, values, strict=True) if value or getattr(self.weights, name)}

    def _save(self, done: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.student.trained.items():
            held = {"weight": parameter.detach(), **{key: self.optimizer.state[parameter][key] for key in _MOMENTS}}
            for key, tensor in held.items():
                full = whole(tensor)
                if self.processes.main:
                    tensors[f"{key}.{name}"] = full.cpu()
        tensors |= {name: mask.cpu() for name, mask in self.student.masks.state()}
        if self.processes.main:
            self.job.save(State(done, tensors, {"curve": self.curve, "seconds": self.seconds}))

    def _restore(self, state: State) -> int:
        """Weights, masks, optimizer state and loss curve as they were saved by the main process; returns the steps that are done."""
        with torch.no_grad():
            for name, parameter in self.student.trained.items():
                local(parameter).copy_(local(self.processes.spread(state.tensors.get(f"weight.{name}"), parameter)))
                moments = {key: self.processes.spread(state.tensors.get(f"{key}.{name}"), parameter) for key in _MOMENTS}
                self.optimizer.state[parameter] = {"step": self._step_count(state.step), **moments}
        self.student.masks.restore(state.tensors)
        self.curve, self.seconds = list(state.document["curve"]), float(state.document["seconds"])
        return state.step

    def _step_count(self, done: int) -> Tensor:
        """Adam's own counter, on the device where the fused step wants it."""
        fused = self.optimizer.param_groups[0]["fused"]
        return torch.tensor(float(done), device=self.processes.device if fused else "cpu")


def make_optimizer(parameters: Iterable[torch.nn.Parameter], device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=0.0, betas=BETAS, weight_decay=0.0, fused=device.type == "cuda")


def learning_rate(step: int, steps: int, asked: Distill) -> float:
    """Up linearly over the warm-up, down linearly to 0 after the last step."""
    rising = round(asked.warmup * steps)
    if step < rising:
        return asked.learning_rate * (step + 1) / rising
    return asked.learning_rate * (steps - step) / (steps - rising)


def training_facts(steps: int, tokens: int, seconds: float, curve: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    speed = round(tokens / seconds, 1) if seconds else None
    return {"steps": steps, "tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": speed, "curve": list(curve)}


def not_finite(what: str, where: str, asked: Distill) -> NumericalProblem:
    return NumericalProblem(
        "E620",
        f"the loss is not finite any more: {what}",
        where=where,
        fix=f"a lower --learning-rate (it was {asked.learning_rate:g}), or --dtype float32; the last saved state is kept",
    )


def _counts(counted: Tensor) -> Tensor:
    """[3] float64: how many tokens the sums of cross entropy, SquareHead and divergence run over."""
    predicted = max(int(counted[:, 1:].sum()), 1)  # a row of one token predicts nothing
    return torch.tensor([predicted, int(counted.sum()), predicted], dtype=torch.float64)
