"""What one device of several holds of a packed linear: a slice of its tensors, which is the packed slice of its codes.

    outputs n   words [.., 2 first : 2 end], scales [.., first : end]      tiles are 64 outputs wide; scales change places inside of one
    inputs k    words [first / step : end / step, ..], and scales by groups

Where one group is left of several, its scales get the order that kernels expect of one group (tile.py); a linear with one scale for each
row keeps all of them on each device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from marlinctl.pack import marlin, sparse_marlin
from marlinctl.pack.types import PAD_TO, padded


@dataclass(frozen=True, slots=True)
class Slice:
    """Outputs `outputs` = (first, end) and inputs `inputs` of a linear [N, K]. ValueError where a cut goes through a tile or a group."""

    out_features: int  # N of the whole
    in_features: int  # K
    group_size: int  # K: one scale for each row
    outputs: tuple[int, int]
    inputs: tuple[int, int]

    def __post_init__(self) -> None:
        for name, (first, end), size in (("outputs", self.outputs, self.out_features), ("inputs", self.inputs, self.in_features)):
            if not 0 <= first < end <= size:
                raise ValueError(f"{name} {first}..{end} of {size}")
            if first % PAD_TO or (end % PAD_TO and end != size):
                raise ValueError(f"{name} {first}..{end} of {size} cut a tile of {PAD_TO}")
        first, end = self.inputs
        if self.group_size != self.in_features and (first % self.group_size or end % self.group_size):
            raise ValueError(f"inputs {first}..{end} of {self.in_features} cut a group of {self.group_size}")

    @property
    def one_group(self) -> bool:
        """Whether each output of the slice has one scale."""
        first, end = self.inputs
        return self.group_size >= end - first

    def words(self, matrix: Tensor) -> Tensor:
        """A view of qweight or meta, [K'/step, 2N'], whatever the step is."""
        (first_k, end_k), (first_n, end_n) = self.inputs, self.outputs
        step = padded(self.in_features) // matrix.shape[0]
        return matrix[first_k // step : padded(end_k) // step, 2 * first_n : 2 * padded(end_n)]

    def scales(self, matrix: Tensor, *, sparse: bool) -> Tensor:
        """Of scales [G', N']: a view, or a copy in another order."""
        (first_k, end_k), (first_n, end_n) = self.inputs, self.outputs
        outputs = matrix[:, first_n : padded(end_n)]
        if self.group_size == self.in_features:
            return outputs
        groups = outputs[first_k // self.group_size : -(-padded(end_k) // self.group_size)]
        if not self.one_group:
            return groups
        return sparse_marlin.one_group(groups[:1]) if sparse else marlin.one_group(groups[:1])
