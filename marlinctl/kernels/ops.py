"""The operators: a 16-bit matrix times packed weights, as torch knows it.

    torch.ops.marlinctl.marlin_gemm(activations, qweight, scales, out_features, group_size, bias=None, overlap=False,
                                    rounding="none", factored=None)
    torch.ops.marlinctl.sparse_marlin_gemm(activations, qweight, meta, scales, out_features, group_size, bias=None, overlap=False,
                                           rounding="none", factored=None, int8_meta=None)

    CUDA   a kernel that dispatch.py picks for this M, N, K; for large M one dense weight and torch.matmul
    CPU    reference.py: slow, with the same result up to rounding; said once. The modules of linear.py have a fast way (cpu.py)
    meta   the shape alone, for torch.compile

Importing this module registers them. Both return a new tensor and change nothing, so torch.compile needs no graph break. Which kernel runs
is decided inside, by the M of the call: a traced program holds no choice. They are not differentiable.

overlap: on Hopper the kernel may begin, and read weights, while the one before it on the stream still runs (programmatic dependent launch):
2 to 3 us less a call. What the kernel before writes must not be these weights; activations may be.

rounding: "int8" or "int8-128" allows 8-bit activations, rounded in the call (quantize/activations.py): one scale for each token, or one for
each 128 of its K. A GPU multiplies 8-bit numbers where that is faster, which M decides; the CPU always rounds, so that what is measured
there is the accuracy of 8 bits.

factored: of factored.py, the same scales once more, for "int8": a GPU multiplies with them where that is faster. For 2:4 weights that needs
int8_meta as well, of int8_metadata.py the same metadata once more; without both a GPU multiplies 16-bit activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from marlinctl.kernels import dispatch, jit
from marlinctl.kernels.activations import check_rounding
from marlinctl.kernels.configurations import NUMBERS, Grid, group_shift
from marlinctl.kernels.functions import Function, architecture_of
from marlinctl.kernels.launch import ALIGNMENT, LoadedKernel, load, load_unpack, multiply, unpack
from marlinctl.kernels.reference import dequantize, dequantize_sparse, gemm
from marlinctl.kernels.rounding import round_on_gpu
from marlinctl.pack.types import PackedLinear, PackedSparseLinear, padded
from marlinctl.quantize.activations import group_of, nearest
from marlinctl.quantize.scheme import Rounding
from marlinctl.sparsify.types import QUAD

ROW = 8  # numbers in 16 bytes: the kernels read and write rows that are multiples of it


class Product(NamedTuple):
    """The arguments of either operator. A tuple, because making a frozen dataclass takes 0.6 us more, in each call."""

    activations: Tensor  # [.., K], float16 or bfloat16
    weights: tuple[Tensor, ...]  # qweight, or qweight and meta
    scales: Tensor
    out_features: int
    group_size: int
    bias: Tensor | None = None
    overlap: bool = False
    rounding: Rounding = "none"
    factored: Tensor | None = None  # int16 [G' + 1, N']
    int8_meta: Tensor | None = None  # of 2:4: int16, as meta

    @property
    def sparse(self) -> bool:
        return len(self.weights) == 2

    @property
    def operator(self) -> str:
        """Its name, for errors."""
        return _operator(self.sparse)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.activations.shape[:-1], self.out_features)


def _on_gpu(p: Product) -> Tensor:
    k = _check(p)
    activations, weights, scales, bias, n = p.activations, p.weights, p.scales, p.bias, p.out_features
    device, dtype = activations.device, activations.dtype
    for tensor in (*weights, scales, p.factored, p.int8_meta):
        if tensor is not None and tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"{p.operator}: a tensor {list(tensor.shape)} is not aligned to {ALIGNMENT} bytes")
    x = activations if activations.ndim == 2 else activations.reshape(-1, k)  # torch's shape functions cost a microsecond each
    m, n_rows, k_rows = x.shape[0], -(-n // ROW) * ROW, -(-k // ROW) * ROW  # the last two as the kernels write and read them
    if m == 0:
        return activations.new_empty(p.out_shape)
    shift = group_shift(k if p.group_size == -1 else p.group_size, k)
    factored = p.factored is not None and (p.int8_meta is not None or not p.sparse)
    route = _route(device.index, dtype, p.sparse, m, n_rows, k_rows, shift, p.rounding, factored)
    if route is None:
        weight = unpack(_unpack(p.sparse, dtype, device.index), weights, scales, dtype, n, k_rows, shift)
        return linear(x, weight[:, :k], bias).view(p.out_shape)
    if k_rows != k:
        x = pad(x, (0, k_rows - k))
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None and (n_rows != n or not bias.is_contiguous()):
        bias = pad(bias, (0, n_rows - n)).contiguous()
    kernel, grid = route
    out = torch.empty(m, n_rows, dtype=dtype, device=device)
    if kernel.configuration.int8:
        rounded = round_on_gpu(x, group_of(p.rounding), p.overlap, p.sparse)
        x, weights = rounded.codes, (*weights[:1], *(() if p.int8_meta is None else (p.int8_meta,)), rounded.scales)
        if kernel.configuration.factored:
            assert p.factored is not None
            scales = p.factored
    multiply(kernel, x, weights, scales, bias, out, shift, grid, overlap=p.overlap)
    if n_rows != n:
        out = out[:, :n].contiguous()
    return out if activations.ndim == 2 else out.view(p.out_shape)


def decode(p: PackedLinear | PackedSparseLinear, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that the tiles stand for, each code times its scale rounded once to `dtype`, float16 or bfloat16."""
    if p.scales.device.type != "cuda":
        return (dequantize_sparse(p) if isinstance(p, PackedSparseLinear) else dequantize(p)).to(dtype)
    n, k = p.out_features, p.in_features
    weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
    function = _unpack(len(weights) == 2, dtype, p.scales.device.index)
    weight = unpack(function, weights, p.scales, dtype, n, -(-k // ROW) * ROW, group_shift(p.group_size, k))
    return weight[:, :k].contiguous()


@lru_cache(maxsize=4096)
def _route(
    index: int, dtype: torch.dtype, sparse: bool, m: int, n: int, k: int, shift: int, rounding: Rounding, factored: bool
) -> tuple[LoadedKernel, Grid] | None:
    """The kernel for a product and its grid; None: dequantize."""
    device = torch.device("cuda", index)
    choice = dispatch.choose(architecture_of(device), sparse, m, n, k, rounding, factored)
    if choice is None:
        return None
    groups = choice.configuration.int8 and group_of(rounding) is not None
    kernel = load(choice.configuration, dtype, device, jit.default_folder(), shift, groups)
    return kernel, kernel.grid(m, n, k, min(choice.per_multiprocessor, kernel.resident), choice.sharing)


@lru_cache(maxsize=64)
def _unpack(sparse: bool, dtype: torch.dtype, index: int) -> Function:
    """Kept here: to name the folder of kernels takes longer than the launch."""
    return load_unpack(sparse, dtype, torch.device("cuda", index), jit.default_folder())


def _on_cpu(p: Product) -> Tensor:
    k = _check(p)
    _say_that_it_is_slow()
    n, size = p.out_features, k if p.group_size == -1 else p.group_size
    packed: PackedLinear | PackedSparseLinear
    if p.sparse:
        packed = PackedSparseLinear(p.weights[0], p.weights[1], p.scales, n, k, size)
    else:
        packed = PackedLinear(p.weights[0], p.scales, n, k, size)
    x = p.activations.reshape(-1, k)
    x = x if p.rounding == "none" else nearest(x, p.rounding)
    return gemm(x, packed, p.bias).to(p.activations.dtype).view(p.out_shape)


def _on_meta(p: Product) -> Tensor:
    check_rounding(p.rounding)  # when a program is traced
    return p.activations.new_empty(p.out_shape)


@lru_cache(maxsize=1)
def _say_that_it_is_slow() -> None:
    """Once in a process."""
    what = "packed tensors on the CPU are multiplied by the reference, which decodes every weight in each call: right, and slow"
    warnings.warn(what, UserWarning, stacklevel=2)


# What would be read wrongly is refused before anything is launched


def _check(p: Product) -> int:
    """K. ValueError names the tensor, what it must be and what it is."""
    activations, bias, n, sparse = p.activations, p.bias, p.out_features, p.sparse
    check_rounding(p.rounding)
    if activations.dtype not in NUMBERS:
        raise ValueError(f"{p.operator}: activations must be float16 or bfloat16, got {activations.dtype}")
    if activations.ndim == 0:
        raise ValueError(f"{p.operator}: activations must be [.., K], got a single number")
    k = activations.shape[-1]
    words, scale_shape = _shapes(sparse, n, k, p.group_size)
    _must_be("qweight", p.weights[0], torch.int32, words, activations.device, sparse)
    if sparse:
        _must_be("meta", p.weights[1], torch.int16, words, activations.device, sparse)
    _must_be("scales", p.scales, torch.float16, scale_shape, activations.device, sparse)
    if p.factored is not None:
        rows = 1 if p.group_size in (-1, k) else scale_shape[0] + 1
        _must_be("factored", p.factored, torch.int16, (rows, scale_shape[1]), activations.device, sparse)
    if p.int8_meta is not None:
        _must_be("int8_meta", p.int8_meta, torch.int16, words, activations.device, sparse)
    if bias is not None and (bias.dtype != activations.dtype or bias.shape != (n,) or bias.device != activations.device):
        what = f"bias must be {activations.dtype} [{n}] on {activations.device}"
        raise ValueError(f"{p.operator}: {what}, got {bias.dtype} {list(bias.shape)} on {bias.device}")
    return k


def _must_be(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int], device: torch.device, sparse: bool) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        what = f"{name} must be {dtype} {list(shape)} on {device}"
        raise ValueError(f"{_operator(sparse)}: {what}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{_operator(sparse)}: {name} must be contiguous")


@lru_cache(maxsize=4096)
def _shapes(sparse: bool, n: int, k: int, group_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of words and metadata, and of scales, for a weight [N, K]."""
    size = k if group_size == -1 else group_size
    if n < 1 or k < 1:
        raise ValueError(f"{_operator(sparse)}: out_features and in_features must be positive, got N={n}, K={k}")
    if size < 1 or k % size:
        raise ValueError(f"{_operator(sparse)}: group_size {group_size} does not divide K={k}")
    if sparse and k % QUAD:
        raise ValueError(f"{_operator(sparse)}: K={k} is not a multiple of {QUAD}, so 2:4 cannot cover it")
    group_shift(size, k)  # ValueError for other sizes than the kernels have
    groups = 1 if size == k else -(-padded(k) // size)
    return (padded(k) // (32 if sparse else 16), 2 * padded(n)), (groups, padded(n))


def _operator(sparse: bool) -> str:
    return "sparse_marlin_gemm" if sparse else "marlin_gemm"


def _implementation(compute: Callable[[Product], Tensor], weights: int) -> Callable[..., Tensor]:
    """What torch calls with an operator's arguments in the order of its schema; `weights` of them, after the activations, are weights."""

    def call(activations: Tensor, *arguments: Any) -> Tensor:
        return compute(Product(activations, arguments[:weights], *arguments[weights:]))

    return call


# `custom_op` would do the same at half as much time again for each call.
_library = torch.library.Library("marlinctl", "DEF")  # type: ignore[no-untyped-call]
_ROUNDING = ", str rounding='none', Tensor? factored=None"
_OPERATORS = (("marlin_gemm", ("qweight",), ""), ("sparse_marlin_gemm", ("qweight", "meta"), ", Tensor? int8_meta=None"))
for _name, _weights, _more in _OPERATORS:
    _arguments = ", ".join(f"Tensor {name}" for name in ("activations", *_weights, "scales"))
    _arguments += f", int out_features, int group_size, Tensor? bias=None, bool overlap=False{_ROUNDING}{_more}"
    _library.define(f"{_name}({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for _key, _compute in (("CUDA", _on_gpu), ("CPU", _on_cpu), ("Meta", _on_meta)):
        _library.impl(_name, _implementation(_compute, len(_weights)), _key)  # type: ignore[no-untyped-call]

# Looked up once and not by each call.
marlin_gemm = torch.ops.marlinctl.marlin_gemm.default
sparse_marlin_gemm = torch.ops.marlinctl.sparse_marlin_gemm.default
