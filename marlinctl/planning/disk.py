"""How many bytes of disk a run writes: its outputs, exactly, and what lies beside them while it runs. From names and shapes alone.

blocks    the finished linears in the interchange form, the activations of one block in unnamed files (system/offload.py), and the
          hidden states that enter two blocks, to resume from (oneshot/resume.py). In the end the linears are there twice: in the pieces
          that were written block by block, and in the files that are published (checkpoint/shards.py)
publish   every output at once: each is built beside its place and renamed
mask      2:4 linears have one bit a weight in a file of its own, which is written twice: its header is known last
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import Format
from marlinctl.checkpoint.safetensors_header import TensorInfo
from marlinctl.checkpoint.shards import MAX_SHARD_BYTES
from marlinctl.models.architectures import Architecture, Block, Branch, Chain, Experts
from marlinctl.planning.layer_rules import Plan
from marlinctl.planning.memory import SHARD_BYTES, Work, token_weights_bytes, trained_weights
from marlinctl.recipes.schema import Distill

Shapes = Mapping[str, tuple[int, int]]  # linear -> (N, K)
_PER_TENSOR = 1100  # header, index, manifest and report with its pictures, for each tensor; measured on the tests' models and SmolLM2
_PAGE = 120_000  # card and report of a model that has no layer at all


@dataclass(frozen=True, slots=True)
class Output:
    """What one published folder holds, in bytes."""

    format: Format
    linears: int
    untouched: int
    mask: int
    orders: int  # of rows and columns that lie otherwise than in the original
    tensors: int  # how many

    @property
    def weights(self) -> int:
        """All tensors together, without the headers of their files."""
        return self.linears + self.untouched + self.mask + self.orders

    @property
    def on_disk(self) -> int:
        """With the small files, whose size depends on the number of tensors."""
        return self.weights + _PER_TENSOR * self.tensors + _PAGE


def output(fmt: Format, tensors: Mapping[str, TensorInfo], shapes: Shapes, rules: Plan, masked: Iterable[str], orders: int = 0) -> Output:
    """A folder in format `fmt` of a 16-bit model whose `shapes` are compressed. rules: group sizes and grids. masked: the 2:4 linears.
    orders: bytes of the file of orders (checkpoint/orders.py)."""
    weights = {f"{name}.weight" for name in shapes}
    untouched = [info.nbytes for name, info in tensors.items() if name not in weights]
    if not fmt.quantized:
        linears = sum(tensors[name].nbytes for name in weights)
    else:
        linears = sum(registry.linear_bytes(fmt, n, k, rules.group_sizes[name], rules.grid(name)) for name, (n, k) in shapes.items())
    each = sum(len(fmt.shapes(n, k, rules.group_sizes[name], rules.grid(name))) for name, (n, k) in shapes.items())
    named = [] if fmt.needs_mask else [shapes[name] for name in masked]
    mask = sum(n * -(-k // 8) for n, k in named)
    return Output(fmt, linears, sum(untouched), mask, orders, len(untouched) + each + len(named))


def needed_by_blocks(first: Output, scratch: int, states: int) -> int:
    """Bytes at the fullest moment of quantize or sparsify: activations are gone before the pieces are merged."""
    return first.linears + first.mask + max(scratch, first.on_disk) + states


def merged_bytes(pieces: int, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """What lies on the disk twice while pieces of so many bytes are merged, and each goes when it is: one published file, and the pieces
    that it shares with its neighbours."""
    return min(pieces, max_shard_bytes + 2 * SHARD_BYTES)


def state_bytes(architecture: Architecture, work: Work) -> int:
    """The hidden states that enter two blocks, with drift correction also the reference model's: what a run resumes from. And the weights
    of tokens."""
    copies = 2 * (2 if work.corrects_drift else 1)
    states = copies * work.samples * work.length * (architecture.hidden_size + architecture.shared_values) * work.element
    return states + token_weights_bytes(architecture, work)


def scratch_bytes(architecture: Architecture, work: Work) -> int:
    """The unnamed files that hold activations beside the output: every slot of `Scratch` in oneshot/, of the walk or of the gradients
    before it."""
    return max(_scratch_of_walk(architecture, work), entering_bytes(architecture, work))


def entering_bytes(architecture: Architecture, work: Work) -> int:
    """The hidden states that enter all blocks, from which gradients go back (oneshot/gradients.py)."""
    if not work.weighs_tokens:
        return 0
    values = len(architecture.blocks) * architecture.hidden_size + sum(architecture.per_token.values())
    return work.samples * work.length * values * work.element


def _scratch_of_walk(architecture: Architecture, work: Work) -> int:
    tokens, hidden = work.samples * work.length, architecture.hidden_size
    widths: dict[str, int] = {}

    def count(slot: str, width: int) -> None:
        widths[slot] = max(widths.get(slot, 0), width)

    for block in architecture.blocks:
        original = 0  # slots of the reference model
        for number, part in enumerate(block.parts):
            last = block.linears[block.linear(part.stages[-1][-1].format(e=0))]
            if not isinstance(part, Chain):
                count("branch input", hidden)
                count("between", last.in_features)
            if isinstance(part, Experts):
                count("between", hidden)  # the tokens of several experts
                count("experts output", hidden)
            elif part is not block.parts[-1]:
                count(f"output {number}", last.out_features)
            if not work.corrects_drift:
                continue
            places = [hidden] if isinstance(part, Experts) else _inputs(block, part)
            if part.module in block.streams:
                places.append(hidden)  # the residual stream there
            for width in places:
                count(f"original {original}", width)
                original += 1
    shared = architecture.shared_values * (2 if work.corrects_drift else 1)
    return tokens * work.element * (sum(widths.values()) + sum(architecture.per_token.values()) + shared)


def _inputs(block: Block, part: Branch | Chain) -> list[int]:
    """Widths of what the stages of a part read."""
    return [block.linears[block.linear(stage[0])].in_features for stage in part.stages]


def resident_bytes(architecture: Architecture, work: Work) -> int:
    """What one rank keeps on its device of all this, and of the hidden states, where there is room (system/offload.py)."""
    hidden = work.length * architecture.hidden_size * work.element * (2 if work.corrects_drift else 1)
    return work.own_samples * (scratch_bytes(architecture, work) // work.samples + hidden)


def needed_by_distillation(architecture: Architecture, result: int, asked: Distill) -> int:
    """Bytes beside the result: two states (weights and two moments in float32, renewed masks) and what the teacher predicts."""
    trained, blocks = trained_weights(architecture), len(architecture.blocks)
    weight = 13 if asked.mask == "renewed" else 12
    states = {"full": 2 * weight * trained, "blockwise": 2 * 12 * trained // blocks + 4 * trained, "scales": result}[asked.mode]
    return states + 12 * asked.cache_logits * asked.tokens
