"""One packed linear of a server: its parameters, how they are filled, and the product.

    B, s, weight_shape     or B_24, B_meta, s, weight_shape: parameters under the names that native folders have, tiles of this device alone

Each parameter has a loader of ours, which knows the layout; those of servers' classes know neither padding nor the order of scales. The
operators are called with what was fixed when the module was made, so a traced program holds no choice: which kernel runs is decided
inside of them, by the M of the call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from marlinctl.checkpoint.formats.base import CODES, METADATA, Format
from marlinctl.checkpoint.reader import dtype_called, name_of_dtype
from marlinctl.errors import BadInput
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.int8_metadata import int8_operands
from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.kernels.prepare import Multiplied
from marlinctl.pack.sparse_marlin import check_metadata
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.scheme import Rounding
from marlinctl.serve.native import products
from marlinctl.serve.native.layout import Arrivals, Layout, Part, check_tensor, layout
from marlinctl.serve.native.refusals import as_refusals

FACTORED = "factored"  # the buffer of scales as kernels/factored.py makes them, or None
INT8_META = "int8_meta"  # of 2:4: the buffer of metadata as kernels/int8_metadata.py makes them, or None
_ZERO_CODES, _FIRST_TWO = 0x88888888 - (1 << 32), 0x4444  # words of padding: code 0, and metadata that names the first two of four


class PackedLinearMethod:
    """Of one module. A server's own method class derives from it and from the server's base class."""

    def __init__(self, fmt: Format, names: Sequence[str], group_size: int, rounding: Rounding = "none") -> None:
        self.format, self.names, self.group_size = fmt, tuple(names), group_size
        self.rounding = rounding
        self.more: tuple[str, ...] = () if rounding == "none" else (rounding,)
        self.arrivals = Arrivals(self.names, fmt.suffixes)

    def make_parameters(self, layer: torch.nn.Module, place: Layout, dtype: torch.dtype) -> None:
        """dtype: of the activations."""
        self.layout = place
        self.out_features, self.product_group, self.sparse = place.out_features, place.product_group, self.format.needs_mask
        self.outputs = place.outputs if place.gaps else ()
        self.prepared = (FACTORED, INT8_META) if self.sparse else (FACTORED,)
        shapes = self.format.shapes(place.out_features, place.inputs, self.product_group)
        # What `apply` reads are plain numbers and names: a traced program guards all that it looks at.
        self.operands = (*(suffix for suffix, kind in self.format.tensors.items() if kind in (CODES, METADATA)), self.scales)
        for suffix, (dtypes, shape) in shapes.items():
            self._register(layer, suffix, torch.empty(shape, dtype=dtype_called(dtypes[0])))
            if not place.covered and len(shape) == 2:
                getattr(layer, suffix).data.fill_(_padding(self.format, suffix))
        self.product = Multiplied(self.sparse, self.out_features, place.inputs, self.product_group, dtype, self.rounding)
        # Whether scales are factored is known when they are there: `finish` asks for the other kernels where they are not.
        self.product = replace(self.product, factored=self.rounding == "int8")
        products.expect(self.product)

    def _register(self, layer: torch.nn.Module, suffix: str, values: Tensor) -> None:
        parameter = Parameter(values, requires_grad=False)
        parameter.weight_loader = partial(self.load, suffix)  # type: ignore[attr-defined]
        layer.register_parameter(suffix, parameter)

    @property
    def scales(self) -> str:
        assert self.format.scales is not None
        return self.format.scales

    def load(self, suffix: str, parameter: Parameter, loaded: Tensor, shard: object = None) -> None:
        """What a server calls with each tensor of the folder: `loaded` is the whole tensor, `shard` says which of the linears it is of."""
        with as_refusals():
            i = self.layout.index(shard)
            name, n, k = f"{self.names[i]}.{suffix}", self.layout.widths[i], self.layout.in_features
            self.arrivals.note(name)
            dtypes, shape = self.format.shapes(n, k, self.group_size)[suffix]
            check_tensor(name, name_of_dtype(loaded.dtype), loaded.shape, dtypes, shape)
            if len(shape) == 1:
                if loaded.tolist() != [n, k]:
                    fix = "config.json or weight_shape is of another model; fetch or write the folder again"
                    raise BadInput("E302", f"{name} says {loaded.tolist()}, and the model has [{n}, {k}] there", where=name, fix=fix)
                return
        for place in self.layout.places[i]:
            if suffix == self.scales:
                source, first = place.cut.scales(loaded, sparse=self.sparse), place.first
            else:
                source, first = place.cut.words(loaded), 2 * place.first
            parameter.data[:, first : first + source.shape[1]].copy_(source)

    def finish(self, layer: torch.nn.Module, log: logging.Logger) -> None:
        """All weights are there, and counted by the caller."""
        for suffix, kind in self.format.tensors.items():
            if kind == METADATA:
                self._check_metadata(suffix, getattr(layer, suffix))
        if hasattr(layer, self.format.shape_from):
            delattr(layer, self.format.shape_from)  # it has done its work, and no product needs it
        if self.rounding == "int8":
            made = self._prepared(layer)
            for name, found in made.items():
                standing = getattr(layer, name, None)
                if standing is not None and found is not None:
                    standing.copy_(found)  # weights that are loaded again, beside graphs that have its address
                else:
                    layer.register_buffer(name, found, persistent=False)
            self.product = replace(self.product, factored=made[FACTORED] is not None)
            products.expect(self.product)
        products.compile_expected(getattr(layer, self.scales).device, log)

    def _prepared(self, layer: torch.nn.Module) -> dict[str, Tensor | None]:
        """What the operator is given beside the parameters for int8 activations, in its order."""
        qweight, *meta, scales = (getattr(layer, name) for name in self.operands)
        sizes = (self.out_features, self.layout.inputs, self.layout.inputs if self.product_group == -1 else self.product_group)
        if not self.sparse:
            return {FACTORED: factored_scales(PackedLinear(qweight, scales, *sizes))}
        factored, reordered = int8_operands(PackedSparseLinear(qweight, meta[0], scales, *sizes)) or (None, None)
        return {FACTORED: factored, INT8_META: reordered}

    def _check_metadata(self, suffix: str, meta: Tensor) -> None:
        """Refused where the hardware has no meaning for it: kernels do not look."""
        try:
            check_metadata(meta.data)
        except ValueError as problem:
            name = f"{', '.join(self.names)}: {suffix}"
            with as_refusals():
                raise BadInput("E346", f"{name}: {problem}", where=name, fix="the file is damaged; fetch or write it again") from None

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = [getattr(layer, name) for name in self.operands]
        multiply: Callable[..., Tensor] = sparse_marlin_gemm if self.sparse else marlin_gemm
        more = (*self.more, *(getattr(layer, name) for name in self.prepared)) if self.product.factored else self.more
        if not self.outputs:
            return multiply(x, *weights, self.out_features, self.product_group, bias, True, *more)
        out = multiply(x, *weights, self.out_features, self.product_group, None, True, *more)
        out = torch.cat([out[..., first : first + count] for first, count in self.outputs], dim=-1)
        return out if bias is None else out + bias

    def fill_at_random(self, layer: torch.nn.Module) -> None:
        """Codes and places: the power that a GPU takes, and so its clock, depends on them. Scales stay as they are, but beside int8
        activations, for which random ones would choose another kernel than those of a real folder."""
        if self.rounding == "int8":
            getattr(layer, self.scales).data.fill_(2.0**-10)
        for suffix, kind in self.format.tensors.items():
            parameter = getattr(layer, suffix).data
            if kind == METADATA:
                ordered = torch.tensor([first + 4 * second for second in range(4) for first in range(second)], device=parameter.device)
                parameter.zero_()
                for i in range(4):
                    nibbles = ordered[torch.randint(6, parameter.shape, device=parameter.device, dtype=torch.int32)]
                    parameter |= (nibbles << 4 * i).to(torch.int16)  # keeps the low 16 bits
            elif kind == CODES:
                parameter.random_(-(2**31), 2**31 - 1)


def layout_of(
    layer: torch.nn.Module, names: Sequence[str], inputs_here: int, widths_here: Sequence[int], inputs: int, outputs: int,
    group_size: int, rank: int,
) -> Layout:  # fmt: skip
    """From what a server says of a module when it asks for weights. BadInput E302 where it cannot be cut so."""
    devices = outputs // sum(widths_here)  # that share the outputs; 1 where each has all of them
    copies = getattr(layer, "num_kv_head_replicas", 1)  # of keys and values
    replicas = [1, *[copies] * (len(widths_here) - 1)]
    words = getattr(layer, "org_vocab_size", None)  # of a head: its rows, without the server's padding
    parts = [
        Part(words if words is not None else here * devices // times, here, times)
        for here, times in zip(widths_here, replicas, strict=True)
    ]
    return layout(names, parts, in_features=inputs, inputs_here=inputs_here, group_size=group_size, rank=rank)


def _padding(fmt: Format, suffix: str) -> int:
    """What multiplies by zero."""
    if suffix == fmt.scales:
        return 0
    return _FIRST_TWO if fmt.tensors[suffix] == METADATA else _ZERO_CODES
