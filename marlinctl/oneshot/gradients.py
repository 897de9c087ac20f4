"""The gradient of the model's own loss at the outputs of its linears, block by block, so that a model may be larger than the device.

    forward     tokens ─► block 0 ─► block 1 ─► ... ─► norm, head ─► logits ─► at each token, one that is drawn from them
                       kept       kept                                              │
    backward           ◄── block 0 ◄── block 1 ◄── ... ◄───────── d log p(the drawn one) / d hidden, summed over tokens
                              │ at the outputs z of linears that share an input: mean of (dl/dz)² over all these outputs

The tokens are drawn by the model and not taken from the text: the mean of squares is then the diagonal of the Fisher information, which
says how much a small change of z changes what the model predicts. The loss is a sum over tokens, so that gradients of tokens compare.

Going back, a block is read again and its forward pass made again from what entered it, which lies in scratch: of all blocks, samples x
length x hidden. Gradients are of the dtype of the run, bfloat16 or float32, whose ranges are the same: no scale of the loss is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from marlinctl.errors import NumericalProblem
from marlinctl.models.architectures import Block, Experts
from marlinctl.models.meta_model import drop_parameters, set_parameter
from marlinctl.oneshot.gram import LOST_TOKENS_LIMIT
from marlinctl.oneshot.of_tokens import COMPRESSED
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.planning.memory import LOGITS
from marlinctl.system.host import release_heap

_SHARES = 2.0**40  # of a probability: sums of whole numbers do not depend on their order, and torch has them in its deterministic mode

Stages = dict[str, tuple[str, ...]]  # first linear -> all linears that share its input, full names


def stages_of(block: Block) -> Stages:
    """Of linears outside of experts."""
    parts = (part for part in block.parts if not isinstance(part, Experts))
    found = (tuple(map(block.linear, stage)) for part in parts for stage in part.stages)
    return {names[0]: names for names in found}


def squared_gradients(
    walk: SequentialPipeline, draws: Tensor, *, expect: Callable[[Block], None], done: Callable[[], None]
) -> Iterator[dict[str, Tensor]]:
    """For each block, the last one first: first linear of a stage -> [S, L] float32, the mean square of gradients; 0 where the loss does
    not depend on the outputs, NaN or infinite where the gradient is.

    walk: stands before the first block, and is used up: its hidden states become gradients. draws: [S, L] float64 from [0, 1), the samples'
    random numbers. expect: is told which block's weights are read next. done: is called twice for each block. NumericalProblem E620 where
    too many gradients are not finite.
    """
    blocks = walk.architecture.blocks
    entering = []
    expect(blocks[0])
    for block, following in zip(blocks, (*blocks[1:], blocks[-1]), strict=True):
        with _installed(walk, block) as layer:
            expect(following)
            kept = walk.scratch.tensor(f"entering {block.index}", tuple(walk.hidden.shape), walk.dtype)
            for part in walk.chunks():
                hidden = walk.hidden[part].to(walk.device)
                kept[part] = hidden
                walk.hidden[part] = walk.output_of(layer, COMPRESSED, hidden, block.index, part)
        entering.append(kept)
        done()
    _through_head(walk, draws)
    for block in reversed(blocks):
        with _installed(walk, block) as layer:
            if block.index:
                expect(blocks[block.index - 1])
            found = _Squares(walk, block, layer)
            for part in walk.chunks():
                hidden = entering[block.index][part].to(walk.device).detach().requires_grad_()
                with torch.enable_grad(), found.of(part):
                    output = walk.output_of(layer, COMPRESSED, hidden.clone(), block.index, part)  # some blocks add to it in place
                    (gradient,) = torch.autograd.grad(output, hidden, walk.hidden[part].to(walk.device))
                walk.hidden[part] = gradient
            _refuse_lost(walk, block.prefix)
        done()
        yield found.means


def drawn(probabilities: Tensor, draws: Tensor) -> Tensor:
    """A token for each row [T] int64, drawn from probabilities [T, V] float32 by numbers [T] float64 from [0, 1)."""
    upto = (probabilities * _SHARES).long().cumsum_(-1)
    total = upto[:, -1:]
    wanted = torch.minimum((draws.unsqueeze(-1) * total).long(), total - 1)
    return torch.searchsorted(upto, wanted, right=True).squeeze(-1).clamp_max(probabilities.shape[-1] - 1)


@contextmanager
def _installed(walk: SequentialPipeline, block: Block) -> Iterator[nn.Module]:
    """The block's module with the original's weights."""
    layer = walk.model.get_submodule(block.path)
    walk.install(block, layer, [*block.others, *(f"{name}.weight" for name in block.linears)])
    try:
        yield layer
    finally:
        drop_parameters(layer)
        release_heap()


class _Squares:
    """Means over outputs of squared gradients, of the stages of one block."""

    def __init__(self, walk: SequentialPipeline, block: Block, layer: nn.Module) -> None:
        stages = stages_of(block)
        shape = (walk.samples, walk.length)
        self.means = {first: torch.zeros(shape, dtype=torch.float32, device=walk.device) for first in stages}
        self._outputs = {first: sum(block.linears[name].out_features for name in names) for first, names in stages.items()}
        self._modules = {
            layer.get_submodule(block.parameter(f"{name}.weight").removesuffix(".weight")): first
            for first, names in stages.items()
            for name in names
        }

    @contextmanager
    def of(self, part: slice) -> Iterator[None]:
        """While it lasts, gradients of the outputs of linears are those of these samples."""

        def note(module: nn.Module, _: Any, output: Tensor) -> None:
            if output.requires_grad:  # a choice of tokens has no gradient (the indexer of DeepSeek V3.2)
                output.register_hook(lambda gradient: add(self._modules[module], gradient))

        def add(first: str, gradient: Tensor) -> None:
            squares = gradient.float().square().sum(-1).div_(self._outputs[first])
            self.means[first][part] += squares.reshape(part.stop - part.start, -1)

        handles = [module.register_forward_hook(note) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# ---- behind the last block -----------------------------------------------------------------------------------------------------------


def _through_head(walk: SequentialPipeline, draws: Tensor) -> None:
    """In place of the hidden states behind the last block, the gradient there."""
    step = max(1, LOGITS // walk.architecture.vocab_size)
    with _logits(walk) as logits_of:
        for part in walk.chunks():
            hidden, counted = walk.hidden[part].to(walk.device), walk.is_counted(part)
            numbers = draws[part].to(walk.device)
            gradient = torch.zeros_like(hidden)
            if bool(counted.any()):
                rows = zip(hidden[counted].split(step), numbers[counted].split(step), strict=True)
                gradient[counted] = torch.cat([_gradient_of(logits_of, x, u) for x, u in rows])
            walk.hidden[part] = gradient
    _refuse_lost(walk, walk.architecture.norm)


def _gradient_of(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, draws: Tensor) -> Tensor:
    """[T, hidden]: of the sum of log p of drawn tokens, with respect to hidden [T, hidden]. draws: [T]."""
    x = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
    probabilities = logits.detach().float().softmax(-1)
    tokens = drawn(probabilities, draws)
    wanted = probabilities.neg_()
    wanted[torch.arange(len(tokens), device=tokens.device), tokens] += 1
    return torch.autograd.grad(logits, x, wanted.to(logits.dtype))[0]


@contextmanager
def _logits(walk: SequentialPipeline) -> Iterator[Callable[[Tensor], Tensor]]:
    """The function from hidden states behind the last block [T, hidden] to logits [T, V]: norm and head, and what the model's own code does
    beside them (a cap, a factor). The decoder is replaced by its norm, so that the code around it runs as it is."""
    architecture, model = walk.architecture, walk.model
    head = architecture.head or architecture.tied
    assert head is not None  # planning/preflight.py
    norm = model.get_submodule(architecture.module(architecture.norm))
    last: nn.Module = cast(Any, model).get_output_embeddings()  # some families name it otherwise than their checkpoints do
    path = next(name for name, module in model.named_modules() if module is last)
    stored = {architecture.module(name): name for name in architecture.norm_tensors}
    stored |= {path + name[len(head.name) :]: name for name in architecture.expected if name.startswith(f"{head.name}.")}
    if architecture.head is None:
        stored[f"{path}.weight"] = f"{architecture.embedding}.weight"
    for parameter, name in stored.items():
        set_parameter(model, parameter, walk.checkpoint.read(name).to(walk.device, walk.dtype))
    owner = path.rpartition(".")[0]
    names = architecture.decoder.split(".")
    around = [".".join(names[:i]) for i in range(1, len(names) + 1)]
    replaced = [model.get_submodule(name) for name in around if name != owner and not owner.startswith(f"{name}.")]
    entering: list[Tensor] = []

    def normed(*_: Any, **__: Any) -> _Decoded:
        return _Decoded((norm(entering[0]),))

    def logits_of(hidden: Tensor) -> Tensor:
        entering[:] = [hidden.unsqueeze(0)]
        found: Tensor = model.get_submodule(owner)(inputs_embeds=entering[0], use_cache=False).logits
        return found.squeeze(0)

    for module in replaced:
        module.forward = normed
    try:
        yield logits_of
    finally:
        for module in replaced:
            del module.forward
        for module in (norm, last):
            drop_parameters(module)
        release_heap()


class _Decoded(tuple[Tensor, ...]):
    """What a decoder returns, whatever its model has besides: models read the hidden states by name or as the first item."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _refuse_lost(walk: SequentialPipeline, where: str) -> None:
    """Gradients that are not finite become 0, so that they take no other token along. NumericalProblem E620 where they are too many."""
    counts = torch.zeros(2, dtype=torch.int64, device=walk.device)
    for part in walk.chunks():
        gradient, counted = walk.hidden[part].to(walk.device), walk.is_counted(part)
        good = torch.isfinite(torch.linalg.vector_norm(gradient, torch.inf, dim=-1))
        counts += torch.stack([(counted & ~good).sum(), counted.sum()])
        walk.hidden[part] = torch.where(good.unsqueeze(-1), gradient, 0)
    lost, of = walk.processes.sum(counts).tolist()
    if lost > LOST_TOKENS_LIMIT * of:
        raise NumericalProblem(
            "E620", f"the gradient of the loss is NaN or infinite for {lost} of {of} calibration tokens", where=where,
            fix="check the model with its own weights first; --token-weights uniform needs no gradients",
        )  # fmt: skip
