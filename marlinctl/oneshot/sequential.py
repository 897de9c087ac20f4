"""The loop over decoder blocks: every linear runs once, with the final weights of all linears before it.

    hidden states x ─► norm ─► h ─► Gram of h ─► solve q k v ─► attention up to o ─► a ─► Gram of a ─► solve o ─► its output ─┐
         ▲                     (h is kept in scratch)                           (a is kept in scratch)                       │
         └── next block ◄── the block once more, both outputs replayed ◄── solve down ◄── m ◄── solve gate up ◄── norm ◄──────┘

The block's own code, from transformers, runs everything between the linears. It is stopped where a branch (attention, MLP) begins, the
branch is run by itself in two steps, and its output is replayed when the block goes on. So no forward of any model is written again
here, and what one linear sees is what the compressed model will compute.

Memory: the hidden states are held once; the inputs of the current branch and of its last linear lie in scratch files that are mapped, not
read; activations in flight are one chunk wide. A block's weights are read when it is its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from marlinctl.data.tokens import Tokens
from marlinctl.errors import NumericalProblem
from marlinctl.models.architectures import Architecture, Block, Branch, Experts
from marlinctl.models.meta_model import Replay, call_until, drop_parameters, set_parameter
from marlinctl.oneshot.reference_stream import Original
from marlinctl.quantize.hessian import add_cross, add_gram, mirror
from marlinctl.quantize.types import Hessian
from marlinctl.system.offload import FileTensor, Scratch

LOST_TOKENS_LIMIT = 0.1  # share of calibration tokens whose activations may be NaN or infinite before the run stops


class Tensors(Protocol):
    """What the walk needs of a checkpoint."""

    def read(self, name: str) -> Tensor: ...

    def rows(self, name: str, row_ids: Tensor) -> Tensor: ...


# Called with the names of linears that share an input, that input's Hessian, and a remark for the report ("" mostly);
# returns each linear's final weight [N, K] float32.
SolveStage = Callable[[tuple[str, ...], Hessian, str], Mapping[str, Tensor]]


# The output of a branch on a range of samples, [B, L, hidden] on the device.
Output = Callable[[slice], Tensor]


class Walk:
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
        match: bool = False,  # let the original walk along, so that Hessians hold the drift
    ) -> None:
        self.model, self.architecture, self.checkpoint = model, architecture, checkpoint
        self.device, self.dtype, self.scratch = device, dtype, scratch
        self.counted = tokens.counted
        self.samples, self.length = tokens.ids.shape
        self.step = max(1, chunk_tokens // self.length)
        self.decoder = model.get_submodule(architecture.decoder)
        self.calls: dict[int, list[dict[str, Any]]] = {}  # samples in a chunk -> keyword arguments of every block
        self.hidden = torch.empty(self.samples, self.length, architecture.hidden_size, dtype=dtype)
        self._embed(tokens.ids)
        self.original = Original(self.hidden.clone(), checkpoint.read, scratch, device) if match else None

    def states(self) -> dict[str, Tensor]:
        """Everything that the next block depends on, as it is: not copies."""
        return {"hidden": self.hidden} | ({"original": self.original.hidden} if self.original is not None else {})

    def go_on(self, states: Mapping[str, Tensor]) -> None:
        """Stand where another walk over the same tokens stood, given its `states`."""
        self.hidden = states["hidden"]
        if self.original is not None:
            self.original.hidden = states["original"]

    def chunks(self) -> Iterator[slice]:
        for first in range(0, self.samples, self.step):
            yield slice(first, min(first + self.step, self.samples))

    def _embed(self, ids: Tensor) -> None:
        """Hidden states that enter the first block, and the keyword arguments that the decoder gives to each block.

        Only the embedding rows that occur are read. The model's own forward runs over blocks that pass their input through.
        """
        used, compact = torch.unique(ids, return_inverse=True)
        name = f"{self.architecture.embedding}.weight"
        set_parameter(self.model, name, self.checkpoint.rows(name, used).to(self.device, self.dtype))
        embedding = cast(nn.Embedding, self.model.get_submodule(self.architecture.embedding))
        embedding.padding_idx = None  # it counts in the whole vocabulary, and a forward pass does not need it
        blocks = [self.model.get_submodule(block.prefix) for block in self.architecture.blocks]
        norm = self.model.get_submodule(self.architecture.norm)
        calls: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def passing(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(hidden)
            calls.append(kwargs)
            return hidden

        for block in blocks:
            block.forward = passing
        try:
            for part in self.chunks():
                calls.clear()
                first.clear()
                batch = compact[part].to(self.device)
                call_until(norm, self.decoder, input_ids=batch, use_cache=False)
                self.hidden[part] = first[0]
                self.calls.setdefault(batch.shape[0], list(calls))
        finally:
            for block in blocks:
                del block.forward
        set_parameter(self.model, name, torch.empty(0, device="meta"))

    def run_block(self, block: Block, solve: SolveStage) -> None:
        """Take the hidden states through one block, solving its linears on the way."""
        layer = self.model.get_submodule(block.prefix)
        for name in block.others:
            set_parameter(layer, block.parameter(name), self.checkpoint.read(name).to(self.device, self.dtype))
        if self.original is not None:
            self.original.run_block(block, layer, self.chunks(), lambda hidden, index: layer(hidden, **self.calls[hidden.shape[0]][index]))
        whole = {part: layer.get_submodule(part) for part in (block.attention.module, block.mlp.module)}
        try:
            replays: dict[str, Replay] = {}
            outputs: dict[str, Output] = {}
            bypassed: list[nn.Module] = []
            for branch, following in ((block.attention, block.mlp), (block.mlp, None)):
                feeder = self._feeder(layer, block, branch, replays, outputs)
                if isinstance(branch, Experts):
                    outputs[branch.module] = self._run_experts(block, layer, branch, replays, outputs, solve)
                else:
                    outputs[branch.module] = self._run_branch(block, layer, branch, replays, outputs, solve)
                replays[branch.module] = Replay(isinstance(branch, Branch) and branch.returns_tuple, flat=isinstance(branch, Experts))
                layer.set_submodule(branch.module, replays[branch.module])
                if feeder is not None and self._may_bypass(feeder, layer, block, following, replays, outputs):
                    bypassed.append(feeder)
            for part in self.chunks():
                self._set_replays(replays, outputs, part)
                self.hidden[part] = self._call(layer, block.index, part)
        finally:
            for module in bypassed:
                del module.forward
            for name, module in whole.items():
                layer.set_submodule(name, module)
            drop_parameters(layer)

    def _call(self, layer: nn.Module, index: int, part: slice) -> Any:
        hidden = self.hidden[part].to(self.device)
        return layer(hidden, **self.calls[hidden.shape[0]][index])

    def _set_replays(self, replays: Mapping[str, Replay], outputs: Mapping[str, Output], part: slice) -> None:
        for name, replay in replays.items():
            replay.output = outputs[name](part)

    def _feeder(
        self,
        layer: nn.Module,
        block: Block,
        branch: Branch | Experts,
        replays: Mapping[str, Replay],
        outputs: Mapping[str, Output],
    ) -> nn.Module | None:
        """The child of the block whose output is the branch's input, mostly a norm: its work is wasted once the branch is replayed."""
        made: dict[int, nn.Module] = {}
        handles = [child.register_forward_hook(lambda child, _, out: made.__setitem__(id(out), child)) for child in layer.children()]
        part = next(self.chunks())
        self._set_replays(replays, outputs, part)
        try:
            args, kwargs = call_until(layer.get_submodule(branch.module), self._call, layer, block.index, part)
        finally:
            for handle in handles:
                handle.remove()
        return made.get(id(args[0] if args else kwargs["hidden_states"]))

    def _may_bypass(
        self, feeder: nn.Module, layer: nn.Module, block: Block, following: Branch | Experts | None,
        replays: Mapping[str, Replay], outputs: Mapping[str, Output],
    ) -> bool:  # fmt: skip
        """Let `feeder` pass its input through, if that changes nothing: tried on a chunk, because it might feed something else too."""
        part = next(self.chunks())
        self._set_replays(replays, outputs, part)

        def rest() -> Tensor:
            if following is None:
                result: Tensor = self._call(layer, block.index, part)
                return result
            args, kwargs = call_until(layer.get_submodule(following.module), self._call, layer, block.index, part)
            return args[0] if args else kwargs["hidden_states"]

        expected = rest()
        feeder.forward = lambda hidden, *args, **kwargs: hidden
        if torch.equal(rest(), expected):
            return True
        del feeder.forward
        return False

    def _run_branch(
        self, block: Block, layer: nn.Module, branch: Branch,
        replays: Mapping[str, Replay], outputs: Mapping[str, Output], solve: SolveStage,
    ) -> Output:  # fmt: skip
        """Solve the linears of one branch; returns its output."""
        module = layer.get_submodule(branch.module)
        prefix = block.prefix + "."
        first = tuple(prefix + name for name in branch.first)
        last = prefix + branch.last
        width_in, width_last = block.linears[first[0]].in_features, block.linears[last].in_features

        inputs = self.scratch.tensor("branch input", (self.samples, self.length, width_in), self.dtype)
        calls: dict[int, dict[str, Any]] = {}  # samples in a chunk -> the branch's other arguments
        by_name = False  # whether the block passes hidden_states by name
        gram = _Gram(width_in, self.device)
        for part in self.chunks():
            self._set_replays(replays, outputs, part)
            args, kwargs = call_until(module, self._call, layer, block.index, part)
            x = args[0] if args else kwargs.pop("hidden_states")
            inputs[part] = x
            by_name = not args
            calls.setdefault(x.shape[0], kwargs)
            gram.add(x, self.counted[part])
            if self.original is not None:
                gram.add_drift(x, self.original.input(branch.first[0], width_in, part), self.counted[part])
        self._install(layer, block, solve(first, gram.hessian(first), ""))

        between = self.scratch.tensor("between", (self.samples, self.length, width_last), self.dtype)
        gram = _Gram(width_last, self.device)
        last_module = layer.get_submodule(branch.last)
        for part in self.chunks():
            x = inputs[part].to(self.device)
            given = ((), {"hidden_states": x}) if by_name else ((x,), {})
            (middle, *_), _ = call_until(last_module, module, *given[0], **given[1], **calls[x.shape[0]])
            between[part] = middle
            if self.original is None:
                gram.add(middle, self.counted[part])
                continue
            theirs = self.original.input(branch.last, width_last, part)
            if self.original.adds:
                scale = self.original.token_scale(branch, part)
                stream = self.hidden[part].to(self.device)
                stream = stream if branch is block.attention else stream + outputs[block.attention.module](part)
                middle, theirs = (middle.float() * scale).to(self.dtype), (theirs.float() * scale).to(self.dtype)
                gram.add_residual(middle, (self.original.residual(branch, part).float() - stream.float()) * scale, self.counted[part])
            gram.add(middle, self.counted[part])
            gram.add_drift(middle, theirs, self.counted[part])
        self._install(layer, block, solve((last,), gram.hessian((last,)), ""))

        if branch is block.mlp:  # its output is used once, when the block is left
            return lambda part: last_module(between[part].to(self.device))
        output = self.scratch.tensor("attention output", (self.samples, self.length, self.architecture.hidden_size), self.dtype)
        for part in self.chunks():
            output[part] = last_module(between[part].to(self.device))
        return lambda part: output[part].to(self.device)

    def _run_experts(
        self, block: Block, layer: nn.Module, experts: Experts,
        replays: Mapping[str, Replay], outputs: Mapping[str, Output], solve: SolveStage,
    ) -> Output:  # fmt: skip
        """Solve the experts of a block one after another; returns their summed output.

        Each expert is two Hessians over the tokens that the router sent it. An expert that saw fewer than a trustworthy number of
        tokens is blended with the layer: H = a H_expert + (1 - a) H_all, a = tokens / trustworthy, where H_all comes from tokens of
        the whole layer as this expert would see them.
        """
        module = layer.get_submodule(experts.module)
        hidden = self.architecture.hidden_size
        inputs = self.scratch.tensor("branch input", (self.samples * self.length, hidden), self.dtype)
        routed = torch.empty(self.samples * self.length, experts.top_k, dtype=torch.int32)
        shares = torch.empty(self.samples * self.length, experts.top_k, dtype=torch.float32)
        everyone = _Gram(hidden, self.device)
        for part in self.chunks():
            self._set_replays(replays, outputs, part)
            (x, ids, weights), _ = call_until(module, self._call, layer, block.index, part)
            rows = slice(part.start * self.length, part.stop * self.length)
            inputs[rows], routed[rows], shares[rows] = x, ids.to(torch.int32), weights.float()
            everyone.add(x, self.counted[part])
        counted = self.counted.reshape(-1)
        sample = counted.nonzero().squeeze(-1)[:_MOST_BORROWED]
        h_all = everyone.hessian((block.prefix + "." + experts.module,))
        output = self.scratch.tensor("experts output", (self.samples * self.length, hidden), self.dtype).zero_()
        for e in range(experts.count):
            where = (routed == e).any(-1).nonzero().squeeze(-1)
            share = shares[where].masked_fill(routed[where] != e, 0.0).sum(-1)
            self._run_expert(block, experts, e, inputs, where, share, counted, sample, h_all, output, solve)
        whole = self.scratch.tensor("experts output", (self.samples, self.length, hidden), self.dtype)
        return lambda part: whole[part].to(self.device)

    def _run_expert(
        self, block: Block, experts: Experts, e: int, inputs: Tensor | FileTensor, where: Tensor, share: Tensor, counted: Tensor,
        sample: Tensor, h_all: Hessian, output: Tensor | FileTensor, solve: SolveStage,
    ) -> None:  # fmt: skip
        from transformers.activations import ACT2FN

        activation = ACT2FN[experts.activation]
        gate, up, down = (f"{block.prefix}.{name.format(e=e)}" for name in (*experts.first, experts.last))

        def pieces(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
            """Chunks of an index tensor, with their place in it."""
            for first in range(0, len(rows), self.step * self.length):
                part = slice(first, min(first + self.step * self.length, len(rows)))
                yield part, rows[part]

        own = _Gram(inputs.shape[1], self.device)
        for _, rows in pieces(where):
            own.add(inputs[rows].to(self.device), counted[rows])
        h_own = own.hessian((gate, up))
        blended, remark = _blend(h_own, h_all, experts)
        weights = {name: w.to(self.device, self.dtype) for name, w in solve((gate, up), blended, remark).items()}

        def middle(rows: Tensor) -> Tensor:
            x = inputs[rows].to(self.device)
            return activation(nn.functional.linear(x, weights[gate])) * nn.functional.linear(x, weights[up])

        width = weights[gate].shape[0]
        between = self.scratch.tensor("between", (len(where), width), self.dtype)
        own = _Gram(width, self.device)
        for part, rows in pieces(where):
            between[part] = m = middle(rows)
            own.add(m, counted[rows])
        h_down = own.hessian((down,))
        if remark:
            borrowed = _Gram(width, self.device)
            for _, rows in pieces(sample):
                borrowed.add(middle(rows), counted[rows])
            h_down, remark = _blend(h_down, borrowed.hessian((down,)), experts, trusted=_trustworthy(h_own, h_all, experts))
        weight = solve((down,), h_down, remark)[down].to(self.device, self.dtype)
        for part, rows in pieces(where):
            y = nn.functional.linear(between[part].to(self.device), weight) * share[part].to(self.device, self.dtype).unsqueeze(-1)
            output[rows] = output[rows].to(self.device) + y

    def run_head(self, head: str, solve: SolveStage) -> None:
        """Solve the output head, whose input is the final norm of the last block's output."""
        name = f"{self.architecture.norm}.weight"
        norm = self.model.get_submodule(self.architecture.norm)
        set_parameter(norm, "weight", self.checkpoint.read(name).to(self.device, self.dtype))
        gram = _Gram(self.architecture.hidden_size, self.device)
        for part in self.chunks():
            gram.add(norm(self.hidden[part].to(self.device)), self.counted[part])
        drop_parameters(norm)
        solve((head,), gram.hessian((head,)), "")

    def _install(self, layer: nn.Module, block: Block, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            set_parameter(layer, name[len(block.prefix) + 1 :] + ".weight", weight.to(self.device, self.dtype))


_MOST_BORROWED = 8192  # tokens of other experts that a poorly fed one is shown


def _trustworthy(own: Hessian, everyone: Hessian, experts: Experts) -> int:
    """Tokens below which an expert's own Hessian is not trusted alone: K / 8, or half a percent of its fair share."""
    fair = everyone.tokens * experts.top_k // experts.count
    return max(own.matrix.shape[0] // 8, fair // 200, 1)


def _blend(own: Hessian, everyone: Hessian, experts: Experts, trusted: int | None = None) -> tuple[Hessian, str]:
    trusted = trusted or _trustworthy(own, everyone, experts)
    if own.tokens >= trusted:
        return own, ""
    share = own.tokens / trusted
    matrix = own.matrix.mul(share).add_(everyone.matrix, alpha=1.0 - share)
    return Hessian(matrix, own.tokens), f"{own.tokens} tokens, blended with the layer's Hessian"


class _Gram:
    """The running sum of x xᵀ over counted tokens. A token with a value that is not finite is dropped and counted.

    Where the original walks along, also those of x x'ᵀ and x (r' - r)ᵀ (quantize/types.py, Hessian).
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.total = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0
        self.lost = 0
        self.cross: Tensor | None = None
        self.residual: Tensor | None = None

    def add(self, x: Tensor, counted: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if not bool(counted.all()):
            rows = rows[counted.reshape(-1).to(rows.device)]
        if not bool(torch.isfinite(rows.sum())):
            good = torch.isfinite(rows).all(-1)
            self.lost += int((~good).sum())
            rows = rows[good]
        self.tokens += rows.shape[0]
        add_gram(self.total, rows)

    def add_drift(self, x: Tensor, original: Tensor, counted: Tensor) -> None:
        if self.cross is None:
            self.cross = torch.zeros_like(self.total)
        add_cross(self.cross, *self._usable(x, original, counted))

    def add_residual(self, x: Tensor, difference: Tensor, counted: Tensor) -> None:
        if self.residual is None:
            self.residual = torch.zeros(x.shape[-1], difference.shape[-1], dtype=torch.float32, device=x.device)
        add_cross(self.residual, *self._usable(x.float(), difference, counted))

    def _usable(self, x: Tensor, y: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of both that are counted and finite."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        good = counted.reshape(-1).to(x.device) & torch.isfinite(x).all(-1) & torch.isfinite(y).all(-1)
        return x[good], y[good]

    def hessian(self, names: tuple[str, ...]) -> Hessian:
        if self.lost > LOST_TOKENS_LIMIT * (self.tokens + self.lost):
            raise NumericalProblem(
                "E620",
                f"the inputs of this linear are NaN or infinite for {self.lost} of {self.tokens + self.lost} calibration tokens",
                where=", ".join(names),
                fix="check the model with its own weights first; a model that overflows in bfloat16 needs --dtype float32",
            )
        count = max(self.tokens, 1)
        matrix = mirror(self.total).div_(count)
        drift = None if self.cross is None else self.cross.div_(count).sub_(matrix)
        return Hessian(matrix, self.tokens, drift, None if self.residual is None else self.residual.div_(count))
