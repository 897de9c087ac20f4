"""The 2:4 pattern that a source already has: from its mask file, or from the zeros of its weights.

Looked for before any work. A mask that contradicts its weights is refused; weights without a mask are 2:4 when at least two of every
aligned four are zero. The first linear decides whether the others are looked at: no dense model has such zeros by accident.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from marlinctl.checkpoint.mask import NAME, open_masks
from marlinctl.errors import BadInput, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.console import Console


@dataclass(frozen=True, slots=True)
class Patterns:
    """Linears whose weights are 2:4 already -> where that is known from ("mask" or "zeros")."""

    checkpoint: Checkpoint
    linears: Mapping[str, str] = field(default_factory=dict)

    def found(self, name: str) -> str | None:
        return self.linears.get(name)

    def keep(self, name: str, weight: Tensor) -> Tensor:
        """The survivors [N, K] bool of a linear that `linears` names."""
        if self.linears[name] == "mask":
            with open_masks(self.checkpoint.folder) as masks:
                assert masks is not None
                return masks.keep(name, weight.shape[0], weight.shape[1])
        from marlinctl.sparsify.keep import two_of_four

        keep = two_of_four(weight)
        assert keep is not None
        return keep


def find_patterns(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]], console: Console) -> Patterns:
    """Which of these linears (name -> (N, K)) are 2:4. BadInput lists every mask that does not belong to its weight."""
    with open_masks(checkpoint.folder) as masks:
        if masks is not None:
            strangers = [name for name in masks.layers if name not in shapes]
            fix = "mask and weights do not belong together; fetch or write the checkpoint again"
            problems = [Problem(f"there is a mask for {name}, which is no linear of this model", NAME, fix) for name in strangers]
            linears = [name for name in shapes if name in masks.layers]
            with console.progress("check the 2:4 masks", len(linears)) as progress:
                for name in linears:
                    try:
                        problem = _contradiction(name, checkpoint.read(f"{name}.weight"), masks.keep(name, *shapes[name]))
                    except BadInput as error:
                        problems += error.problems
                    else:
                        problems += problem
                    progress.advance()
            if problems:
                raise BadInput.from_problems("E362", problems)
            return Patterns(checkpoint, dict.fromkeys(linears, "mask"))
    return _from_zeros(checkpoint, list(shapes), console)


def _contradiction(name: str, weight: Tensor, keep: Tensor) -> Iterable[Problem]:
    wrong = (weight != 0) & ~keep
    if not bool(wrong.any()):
        return []
    row, column = wrong.nonzero()[0].tolist()
    what = f"{name}: the mask prunes weight [{row}, {column}], which is {float(weight[row, column]):.4g} ({int(wrong.sum())} such weights)"
    return [Problem(what, NAME, "mask and weights do not belong together; fetch or write the checkpoint again")]


def _from_zeros(checkpoint: Checkpoint, names: list[str], console: Console) -> Patterns:
    from marlinctl.sparsify.keep import two_of_four

    def sparse(name: str) -> bool:
        return two_of_four(checkpoint.read(f"{name}.weight")) is not None

    if not names or not sparse(names[0]):
        return Patterns(checkpoint)
    with console.progress("look for the 2:4 pattern", len(names)) as progress:
        found = []
        for name in names:
            found += [name] if sparse(name) else []
            progress.advance()
    return Patterns(checkpoint, dict.fromkeys(found, "zeros"))
