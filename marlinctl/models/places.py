"""Where a tensor of the checkpoint lies in transformers' model.

Mostly under its own name. The experts of a mixture are 2-D linears on disk, which transformers stacks into two 3-D parameters:

    experts.gate_up_proj [E, 2 I, H]     rows 0..I are gate, I..2I are up; interleaved: gate is 0 2 4 .., up is 1 3 5 ..
    experts.down_proj    [E, H, I]
    transposed           [E, H, 2 I] and [E, I, H]

No torch here: what is indexed is a tensor of whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from marlinctl.models.architectures import Block, Experts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    parameter: str
    index: tuple[int | slice, ...] = ()  # the part of the parameter; () is all of it
    transposed: bool = False  # the part is the tensor transposed

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor, as a view of the parameter: to read or to write."""
        part = parameter[self.index]
        return part.T if self.transposed else part


def block_places(block: Block) -> dict[str, Place]:
    """Every tensor of a block -> its place. Parameters are named as in the whole model."""
    found = {name: Place(block.renamed.get(name, name)) for name in block.others}
    found |= {name: Place(piece.parameter, (slice(piece.first, piece.stop),)) for name, piece in block.pieces.items()}
    found |= {f"{name}.weight": Place(block.renamed.get(f"{name}.weight", f"{name}.weight")) for name in block.linears}
    for experts in block.experts:
        for e in range(experts.count):
            found |= {f"{block.prefix}.{name}.weight": place for name, place in expert_places(block, experts, e).items()}
    return found


def expert_places(block: Block, experts: Experts, e: int) -> dict[str, Place]:
    """The linears of expert `e`, by their names relative to the block."""
    first, last = (f"{block.prefix}.{experts.module}.{name}" for name in experts.parameters)
    width = block.linears[f"{block.prefix}.{experts.last.format(e=0)}"].in_features
    found = {}
    for i, name in enumerate(experts.first):
        rows = slice(i, None, 2) if experts.interleaved else slice(i * width, (i + 1) * width)
        index = (e, slice(None), rows) if experts.transposed else (e, rows)
        found[name.format(e=e)] = Place(first, index, experts.transposed)
    return found | {experts.last.format(e=e): Place(last, (e,), experts.transposed)}
