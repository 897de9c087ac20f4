"""The loop over decoder blocks: every linear runs once, with the final weights of all linears before it.

    hidden states x ─► norm ─► h ─► Gram of h ─► solve q k v ─► attention up to o ─► a ─► Gram of a ─► solve o ─► its output ─┐
         ▲                     (h is kept in scratch)                           (a is kept in scratch)                       │
         └── next block ◄── the block once more, both outputs replayed ◄── solve down ◄── m ◄── solve gate up ◄── norm ◄──────┘

The block's own code, from transformers, runs everything between the linears. It is stopped where a branch (attention, MLP) begins, the
branch is run by itself in two steps, and its output is replayed when the block continues. So no forward of any model is written again
here, and what one linear sees is what the compressed model will compute.

A chain has no such short way: for each of its stages the block is run from its beginning until it calls the first linear of the stage, with
the final weights of the stages before.

Memory: the hidden states are held once; the inputs of the current branch and of its last linear lie in scratch files that are mapped, not
read; activations in flight are one chunk wide. A block's weights are read when it is its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from marlinctl.data.tokens import Tokens
from marlinctl.models.architectures import Architecture, Block, Branch, Chain, Experts, Part
from marlinctl.models.meta_model import (
    Replay,
    bound,
    call_through,
    call_until,
    drop_parameters,
    hidden_states,
    inputs_of,
    set_parameter,
)
from marlinctl.oneshot.embedding import FIRST_SAMPLE, Tensors, embed
from marlinctl.oneshot.equalization import Equalization
from marlinctl.oneshot.experts import ExpertsPipeline
from marlinctl.oneshot.gram import Gram, SolveStage, SolveStages, StageInput
from marlinctl.oneshot.input_rounding import Rows
from marlinctl.oneshot.of_tokens import COMPRESSED, REFERENCE, TokenArguments, for_samples
from marlinctl.oneshot.one_expert import routed
from marlinctl.oneshot.permutation import ChannelOrders
from marlinctl.oneshot.reference_stream import ReferenceModel, scaled
from marlinctl.system.offload import Scratch, Slot
from marlinctl.system.processes import ALONE, Processes

NOTHING: Mapping[str, Tensor] = {}

# The output of a branch on a range of samples, [B, L, hidden] on the device.
Output = Callable[[slice], Tensor]

# Samples, and the arguments with which a block calls a branch for them.
Calls = Iterable[tuple[slice, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """What a block computes with once it is tuned: a SolveStage that knows its linears, and its norms and biases."""

    stage: SolveStage
    others: Mapping[str, Tensor]


# Called with a block, its module and the pipeline; None: nothing was changed.
TuneBlock = Callable[[Block, nn.Module, "SequentialPipeline"], TunedBlock | None]


class SequentialPipeline:
    """One pass of the calibration tokens through a model, block by block."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        checkpoint: Tensors,
        tokens: Tokens,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Scratch,
        chunk_tokens: int,
        corrects_drift: bool = False,  # run the reference model alongside, so that Hessians hold the drift
        resident: bool = False,  # hidden states may stay on the device
        processes: Processes = ALONE,  # tokens are those of this one; Hessians are of all
        experts_together: int = 1,  # experts of a block that `solve_experts` is given at a time
        solve_experts: SolveStages | None = None,  # solves them; without it, that of `run_block` one after another
        equalization: Equalization | None = None,  # of a block's norms; the checkpoint reads what it and `orders` fold into the weights
        orders: ChannelOrders | None = None,  # chooses those of a block's channels
        tune: TuneBlock | None = None,  # called with the solved block in its module
        keeps_inputs: bool = False,  # Hessians come with some of the inputs
        token_weights: Mapping[str, Tensor] = NOTHING,  # linear -> [S, L] float32, of each token in its Hessian; of others all count alike
    ) -> None:
        self.model, self.architecture, self.checkpoint = model, architecture, checkpoint
        self.device, self.dtype, self.scratch = device, dtype, scratch
        self.counted, self.processes = tokens.counted, processes
        self.samples, self.length = tokens.ids.shape
        self.step = max(1, chunk_tokens // self.length)
        self.experts_together, self.solve_experts = experts_together, solve_experts
        self.equalization, self.orders, self.tune = equalization, orders, tune
        self.keeps_inputs, self.token_weights = keeps_inputs, token_weights
        self._roots: dict[str, Tensor] = {}  # of their weights, [S, L, 1] on the device, of the block in work
        self.of_tokens = TokenArguments(architecture, self.samples, self.length, dtype, device, scratch)
        shape = (self.samples, self.length, architecture.hidden_size)
        self.hidden = scratch.resident(shape, dtype) if resident else torch.empty(shape, dtype=dtype)
        self._embed(tokens.ids)
        self.reference: ReferenceModel | None = None
        if corrects_drift:
            theirs = scratch.resident(shape, dtype).copy_(self.hidden) if resident else self.hidden.clone()
            self.reference = ReferenceModel(theirs, checkpoint.read, scratch, device, processes)

    def states(self) -> dict[str, Tensor]:
        """Everything that the next block depends on, as it is: not copies."""
        found = {"hidden": self.hidden} | self.of_tokens.states(COMPRESSED)
        return found | ({"original": self.reference.hidden} | self.of_tokens.states(REFERENCE) if self.reference is not None else {})

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Continue where another run over the same tokens stood, given its `states`."""
        self.hidden.copy_(states["hidden"])
        self.of_tokens.restore(COMPRESSED, states)
        if self.reference is not None:
            self.reference.hidden.copy_(states["original"])
            self.of_tokens.restore(REFERENCE, states)

    def chunks(self) -> Iterator[slice]:
        for first in range(0, self.samples, self.step):
            yield slice(first, min(first + self.step, self.samples))

    def _embed(self, ids: Tensor) -> None:
        """Hidden states that enter the first block, and samples in a chunk -> keyword arguments of every block."""
        self.calls = embed(self.model, self.architecture, self.checkpoint, ids, self.chunks(), self.hidden, self.of_tokens, self.device)

    def run_block(self, block: Block, solve: SolveStage, *, replay: bool = False, others: Mapping[str, Tensor] = NOTHING) -> None:
        """Take the hidden states through one block, solving its linears on the way.

        replay: its linears are solved; `solve` knows their weights and is given no Hessian. others: norms and biases that are not the
        original's, of a block that is replayed. The hidden states become the same bit for bit.
        """
        layer = self.model.get_submodule(block.path)
        self._roots.clear()
        self.install(block, layer, block.others)
        if self.equalization is not None and not replay and self.equalization.choose(block, layer, self):
            drop_parameters(layer)
            self.install(block, layer, block.others)
        if self.reference is not None:
            self.reference.run_block(block, layer, self.chunks(), partial(self.output_of, layer, REFERENCE))
        if self.orders is not None and not replay:
            self._reorder(block, layer, self.orders)
        self.put(block, layer, others)
        whole = {part.module: layer.get_submodule(part.module) for part in block.parts if part.module}
        try:
            replays, outputs = self._run_parts(block, layer, solve, replay)
            if self.tune is not None and not replay:
                _set_modules(layer, whole)
                tuned = self.tune(block, layer, self)
                if tuned is None:
                    _set_modules(layer, replays)
                else:
                    self.put(block, layer, tuned.others)
                    replays, outputs = self._run_parts(block, layer, tuned.stage, replay=True)
            for samples in self.chunks():
                self._set_replays(replays, outputs, samples)
                self.hidden[samples] = self._call(layer, block.index, samples)
        finally:
            _set_modules(layer, whole)
            drop_parameters(layer)

    def _run_parts(self, block: Block, layer: nn.Module, solve: SolveStage, replay: bool) -> tuple[dict[str, Replay], dict[str, Output]]:
        """Solve the parts of a block one after another. Each is replaced by what replays its output, which are both returned."""
        replays: dict[str, Replay] = {}
        outputs: dict[str, Output] = {}
        for part in block.parts:
            if isinstance(part, Chain):
                self._run_chain(block, layer, part, replays, outputs, solve, replay)
                continue
            calls = self._calls(layer, block, part, replays, outputs)
            if isinstance(part, Experts):
                outputs[part.module] = self._run_experts(block, layer, part, calls, solve, replay)
                replays[part.module] = Replay(flat=True, experts=part.count if part.shares_first else 1)
            else:
                outputs[part.module] = self._run_branch(block, layer, part, calls, outputs, solve, replay)
                replays[part.module] = Replay(part.returns_tuple)
            layer.set_submodule(part.module, replays[part.module])
        return replays, outputs

    def output_with(self, block: Block, layer: nn.Module, values: Mapping[str, Tensor], samples: slice) -> Tensor:
        """[B, L, hidden]: what the block makes of the compressed model's hidden states with these parameters of its module."""
        hidden = self.hidden[samples].to(self.device).clone()  # some blocks add to it in place
        given = self.calls[len(hidden)][block.index] | self.of_tokens.of(block, samples, COMPRESSED)
        return hidden_states(functional_call(layer, dict(values), (hidden,), given))

    def target(self, samples: slice) -> Tensor:
        """[B, L, hidden]: the reference model's hidden states behind the block that was run last."""
        assert self.reference is not None
        return self.reference.hidden[samples].to(self.device)

    def is_counted(self, samples: slice) -> Tensor:
        return self.counted[samples].to(self.device)

    def put(self, block: Block, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            set_parameter(layer, block.parameter(name), tensor.to(self.device, self.dtype))

    def _reorder(self, block: Block, layer: nn.Module, orders: ChannelOrders) -> None:
        """Have the orders of the block's channels chosen. What the reference model noted is read in them too."""
        if self.reference is None and orders.folds[block.index]:
            linears = (
                block.linear(name) for part in block.parts if not isinstance(part, Experts) for stage in part.stages for name in stage
            )
            self.install(block, layer, [f"{name}.weight" for name in linears])
        columns = orders.choose(block, layer, self)
        if self.reference is not None:
            self.reference.reorder(columns)

    def energies(self, block: Block, layer: nn.Module, modules: Sequence[str]) -> dict[str, Tensor]:
        """Sums of squares [K] float32 of what these linears read in the original block, in which they run in this order, with tokens
        weighted as in the Hessians. Of the reference model's activations where there is one."""
        sums = {module: torch.zeros((), dtype=torch.float64, device=self.device) for module in modules}
        branches = {part.last: part for part in block.parts if isinstance(part, Branch)}
        for samples in self.chunks():
            counted = self.counted[samples].to(self.device).unsqueeze(-1)
            for module, x in self._original_inputs(block, layer, modules, samples).items():
                squares = x.reshape(*counted.shape[:2], -1).float().square()
                branch = branches.get(module)
                root = self._root(block, module, samples)
                if root is not None:
                    squares *= root.square()
                if self.reference is not None and branch is not None and self.reference.adds and branch.module in block.streams:
                    squares *= self.reference.token_scale(branch, samples).square()
                sums[module] = sums[module] + torch.where(counted & torch.isfinite(squares), squares, 0).double().sum((0, 1))
        return {module: self.processes.sum(total).float() for module, total in sums.items()}

    def _original_inputs(self, block: Block, layer: nn.Module, modules: Sequence[str], samples: slice) -> dict[str, Tensor]:
        if self.reference is not None:
            return {module: self.reference.input(module, samples) for module in modules}
        *earlier, last = modules
        with inputs_of(layer, earlier, copy=False) as seen:
            (x, *_), _ = call_until(layer.get_submodule(last), self._call, layer, block.index, samples)
        return {**seen, last: x}

    def first_input(self, block: Block, layer: nn.Module, module: str) -> Tensor:
        """What a linear reads of the first samples with the weights that the block's module holds."""
        (x, *_), _ = call_until(layer.get_submodule(module), self._call, layer, block.index, next(self.chunks()))
        found: Tensor = x
        return found

    def first_inputs(self, block: Block, layer: nn.Module, modules: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """What modules that are run read of the first sample with the weights that the block's module holds, [T, K] each, and what the
        block leaves of it, or what its experts are given, [T, hidden]."""
        hidden = self.hidden[FIRST_SAMPLE].to(self.device).clone()  # some blocks add to it in place
        run = partial(self.output_of, layer, COMPRESSED, hidden, block.index, FIRST_SAMPLE)
        with inputs_of(layer, modules) as seen:
            if block.experts:
                experts = layer.get_submodule(block.experts[0].module)
                left = next(iter(bound(experts, *call_until(experts, run)).values()))
            else:
                left = run()
        return {name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()}, left.reshape(-1, left.shape[-1]).clone()

    def first_left(self, block: Block) -> list[Tensor]:
        """What the block left for later ones when `first_input` ran it, and what lay there before: copies."""
        slots = self.of_tokens.slots(COMPRESSED).values() if block.shares else ()
        return [slot[next(self.chunks())].clone().nan_to_num_() for several in slots for slot in several]

    def install(self, block: Block, layer: nn.Module, tensors: Iterable[str]) -> None:
        """Put tensors of the checkpoint into the block's module; of a parameter that is held in pieces, all."""
        asked = list(tensors)
        for name in asked:
            if name not in block.pieces:
                set_parameter(layer, block.parameter(name), self.checkpoint.read(name).to(self.device, self.dtype))
        for parameter, names in block.assembled.items():
            if not set(names).isdisjoint(asked):
                whole = torch.cat([self.checkpoint.read(name) for name in names])
                set_parameter(layer, parameter, whole.to(self.device, self.dtype))

    def _call(self, layer: nn.Module, index: int, part: slice) -> Tensor:
        return self.output_of(layer, COMPRESSED, self.hidden[part].to(self.device), index, part)

    def output_of(self, layer: nn.Module, model: str, hidden: Tensor, index: int, part: slice) -> Tensor:
        """[B, L, hidden]: what a block makes of hidden states, which it may change. model: whose they are, COMPRESSED or REFERENCE."""
        of_tokens = self.of_tokens.of(self.architecture.blocks[index], part, model)
        return hidden_states(layer(hidden, **self.calls[hidden.shape[0]][index], **of_tokens))

    def _set_replays(self, replays: Mapping[str, Replay], outputs: Mapping[str, Output], part: slice) -> None:
        for name, replay in replays.items():
            replay.output = outputs[name](part)

    def _calls(
        self, layer: nn.Module, block: Block, branch: Branch | Experts, replays: Mapping[str, Replay], outputs: Mapping[str, Output]
    ) -> Calls:
        """The arguments with which the block calls `branch`, chunk by chunk; parts before it are replayed."""
        module = layer.get_submodule(branch.module)
        for part in self.chunks():
            self._set_replays(replays, outputs, part)
            yield part, *call_until(module, self._call, layer, block.index, part)

    def _run_branch(
        self, block: Block, layer: nn.Module, branch: Branch, arguments: Calls,
        outputs: Mapping[str, Output], solve: SolveStage, replay: bool,
    ) -> Output:  # fmt: skip
        """Solve the linears of one branch; returns its output."""
        module = layer.get_submodule(branch.module)
        first, last = tuple(map(block.linear, branch.first)), block.linear(branch.last)
        width_in, width_last = block.linears[first[0]].in_features, block.linears[last].in_features

        inputs = self.scratch.tensor("branch input", (self.samples, self.length, width_in), self.dtype)
        calls: dict[int, dict[str, Any]] = {}  # samples in a chunk -> the branch's other arguments
        gram = self._gram(width_in, replay)
        for part, args, kwargs in arguments:
            (_, x), *others = bound(module, args, kwargs).items()
            inputs[part] = x
            calls.setdefault(x.shape[0], dict(others))
            if not replay:
                self._add(gram, block, branch.first[0], x, part)
        self._install(layer, block, solve(first, gram.hessian(first, self.processes), ""))

        between = self.scratch.tensor("between", (self.samples, self.length, width_last), self.dtype)
        gram = self._gram(width_last, replay)
        last_module = layer.get_submodule(branch.last)
        for part in self.chunks():
            x = inputs[part].to(self.device)
            (middle, *_), _ = call_until(last_module, module, x, **for_samples(calls[x.shape[0]], part))
            between[part] = middle
            if replay:
                continue
            if self.reference is None or not self.reference.adds or branch.module not in block.streams:
                self._add(gram, block, branch.last, middle, part)
                continue
            scale, root = self.reference.token_scale(branch, part), self._root(block, branch.last, part)
            scale = scale if root is None else scale * root
            stream = self.hidden[part].to(self.device)
            for before in block.streams[branch.module]:
                stream = stream + outputs[before](part)
            middle, theirs = scaled(middle, scale), scaled(self.reference.input(branch.last, part), scale)
            gram.add_residual(middle, (self.reference.residual(branch, part).float() - stream.float()) * scale, self.counted[part])
            gram.add(middle, self.counted[part])
            gram.add_drift(middle, theirs, self.counted[part])
        self._install(layer, block, solve((last,), gram.hessian((last,), self.processes), ""))

        if branch is block.parts[-1]:  # its output is used once, when the block is left
            return lambda part: last_module(between[part].to(self.device))
        output = self._output_slot(block, branch, block.linears[last].out_features)
        for part in self.chunks():
            output[part] = last_module(between[part].to(self.device))
        return lambda part: self._copied(output, part)

    def _gram(self, k: int, replay: bool) -> Gram:
        rows = Rows(self.samples * self.length, self.length) if self.keeps_inputs and not replay else None
        return Gram(k, self.device, collects=not replay, rows=rows)

    def _add(self, gram: Gram, block: Block, module: str, x: Tensor, part: slice) -> None:
        """To the sums of a stage what its first linear reads, [B, L, K] or [B * L, K], beside what it reads in the reference model."""
        root = self._root(block, module, part)
        x = scaled(x, root)
        gram.add(x, self.counted[part])
        if self.reference is not None:
            gram.add_drift(x, scaled(self.reference.input(module, part), root), self.counted[part])

    def _root(self, block: Block, module: str, part: slice) -> Tensor | None:
        """What the inputs of a linear are multiplied by, so that tokens have their weights: [B, L, 1] float32. None: all count alike."""
        name = block.linear(module)
        if name not in self.token_weights:
            return None
        if name not in self._roots:
            self._roots[name] = self.token_weights[name].to(self.device).sqrt().unsqueeze(-1)
        return self._roots[name][part]

    def _run_chain(
        self, block: Block, layer: nn.Module, chain: Chain,
        replays: dict[str, Replay], outputs: dict[str, Output], solve: SolveStage, replay: bool,
    ) -> None:  # fmt: skip
        """Solve the stages of a chain one after another, and replay its output from then on."""
        for stage in chain.stages:
            names = tuple(map(block.linear, stage))
            gram = self._gram(block.linears[names[0]].in_features, replay)
            target = layer.get_submodule(stage[0])
            for part in () if replay else self.chunks():
                self._set_replays(replays, outputs, part)
                (x, *_), _ = call_until(target, self._call, layer, block.index, part)
                self._add(gram, block, stage[0], x, part)
            self._install(layer, block, solve(names, gram.hessian(names, self.processes), ""))
        if not chain.module or chain is block.parts[-1]:
            return
        module = layer.get_submodule(chain.module)
        kept: Slot | None = None
        flat = False
        for part in self.chunks():
            self._set_replays(replays, outputs, part)
            output = call_through(module, self._call, layer, block.index, part)
            hidden = output[0] if chain.returns_tuple else output
            flat = hidden.dim() == 2
            if kept is None:
                kept = self._output_slot(block, chain, hidden.shape[-1])
            kept[part] = hidden.view(part.stop - part.start, self.length, -1)
        assert kept is not None
        whole = kept
        outputs[chain.module] = lambda part: self._copied(whole, part)
        replays[chain.module] = Replay(chain.returns_tuple, flat=flat)
        layer.set_submodule(chain.module, replays[chain.module])

    def _output_slot(self, block: Block, part: Part, width: int) -> Slot:
        return self.scratch.tensor(f"output {block.parts.index(part)}", (self.samples, self.length, width), self.dtype)

    def _run_experts(self, block: Block, layer: nn.Module, experts: Experts, arguments: Calls, solve: SolveStage, replay: bool) -> Output:
        """Solve the experts of a block; returns their summed output."""

        def one_by_one(inputs: Sequence[StageInput]) -> list[Mapping[str, Tensor]]:
            return [solve(stage.names, stage.hessian, stage.remark) for stage in inputs]

        together = one_by_one if self.solve_experts is None or replay else self.solve_experts
        module = layer.get_submodule(experts.module)
        pipeline = ExpertsPipeline(
            block, experts, module, self.counted,
            device=self.device, dtype=self.dtype, scratch=self.scratch, step=self.step,
            together=self.experts_together, replay=replay, processes=self.processes,
            reference=None if self.reference is None else self.reference.experts(block, layer, experts),
        )  # fmt: skip
        whole = pipeline.run(((part, routed(experts, bound(module, args, kwargs))) for part, args, kwargs in arguments), together)
        return lambda part: self._copied(whole, part)

    def _copied(self, slot: Slot, part: slice) -> Tensor:
        """Of what is replayed: some blocks add to it in place."""
        return slot[part].clone() if isinstance(slot, Tensor) else slot[part].to(self.device)

    def run_head(self, head: str, solve: SolveStage) -> None:
        """Solve the output head, whose input is the final norm of the last block's output; the reference model's, where drift is corrected.

        Tokens count alike: after a norm no token is longer than others.
        """
        norm = self.model.get_submodule(self.architecture.module(self.architecture.norm))
        for name in self.architecture.norm_tensors:
            set_parameter(self.model, self.architecture.module(name), self.checkpoint.read(name).to(self.device, self.dtype))
        gram = self._gram(self.architecture.hidden_size, False)
        for part in self.chunks():
            x = norm(self.hidden[part].to(self.device))
            gram.add(x, self.counted[part])
            if self.reference is not None:
                gram.add_drift(x, norm(self.reference.hidden[part].to(self.device)), self.counted[part])
        drop_parameters(norm)
        solve((head,), gram.hessian((head,), self.processes), "")

    def _install(self, layer: nn.Module, block: Block, weights: Mapping[str, Tensor]) -> None:
        self.put(block, layer, {f"{name}.weight": weight for name, weight in weights.items()})


def _set_modules(layer: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        layer.set_submodule(name, module)
