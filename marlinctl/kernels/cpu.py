"""Packed linears on a CPU, by torch's own int4 operator.

    tiles ──► codes [N', K'] ──► torch's layout, uint8 [N', K'/2] ─┬─► few rows:  aten._weight_int4pack_mm_for_cpu
      ▲                                                            └─► many rows: bfloat16, some outputs at a time, and torch.mm
      └────── codes ◄──────────── the same, read backwards

    torch.ops.marlinctl.cpu_gemm(activations, weight, scales, out_features, bias=None, rounding="none")   for the modules of linear.py

torch's layout depends on what the processor can do (AVX-512, AVX2, neither), so it is made in the process that uses it and never stored.
It is documented nowhere; `layout` converts codes that say where they are. All of N' and K' is converted, padding included, so that
the tiles can be made from it again, bit for bit.

Products are bfloat16 with sums in float32: activations of another type are rounded to it, and scales too. Measured relative error for
random weights: 2e-3 to 3e-3, where the gate for bfloat16 is 5e-3 (tests/kernels/test_cpu.py). Times: docs/bench.md.

rounding: activations are rounded to 8 bits before, as the 8-bit kernels of a GPU do, so that a model answers alike here and there. Nothing
is faster by it. Codes with one scale a token enter the product exactly; with a scale for each 128 of K they are rounded to bfloat16, as all
other activations. Both 2.8e-3 to 3.4e-3 against float64 of the rounded activations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlinctl.kernels.activations import check_rounding
from marlinctl.kernels.configurations import group_shift
from marlinctl.pack.marlin import pack_marlin, unpack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin, unpack_sparse_marlin
from marlinctl.pack.tile import OFFSET
from marlinctl.pack.types import SLAB, PackedLinear, PackedSparseLinear, padded
from marlinctl.quantize.activations import operand
from marlinctl.quantize.scheme import Rounding
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear

# Rows up to which torch's operator multiplies; with more the weight is decoded. Decoding pays only where the processor multiplies bfloat16
# itself: 4096 x 4096 times 128 rows, one core, 50 ms against 40 with AVX512-BF16 (64 rows: 28 against 27), 75 against 300 with AVX-512
# alone, 158 against 3,000 with AVX2. Without AVX, and on arm64, the operator is a plain loop: 30 ms a row, decoding 60 ms in all.
ANY = 1 << 62
WITH_BFLOAT16, WITHOUT_AVX = 64, 2
GROUPS = (256, 128, 64)  # the operator's, for channel-wise scales, which are repeated
PROBE = 64  # N and K of the codes that find out the layout: the widest block of outputs
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)

convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
few_rows = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class Layout(NamedTuple):
    """How torch lays out a weight: [N'/block, K', block/2] bytes, and which outputs of a block their nibbles are."""

    block: int
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        """Of a block, low nibbles first."""
        return (*self.low, *self.high)


def for_cpu(p: PackedLinear | PackedSparseLinear) -> tuple[Tensor, Tensor]:
    """The weight in torch's layout, uint8 [N', K'/2], and scales and zeros, bfloat16 [G, N', 2]; every zero is 0.

    Raises ValueError for tensors elsewhere, for group sizes that no kernel has, and for 2:4 metadata that mean nothing.
    """
    if p.qweight.device.type != "cpu" or p.scales.device.type != "cpu":
        raise ValueError(f"the tiles must be on the CPU, got {p.qweight.device}")
    group_shift(p.group_size, p.in_features)  # ValueError
    n, k = padded(p.out_features), padded(p.in_features)
    size = k if p.channel_wise else p.group_size
    if isinstance(p, PackedSparseLinear):
        q: QuantizedLinear = unpack_sparse_marlin(PackedSparseLinear(p.qweight, p.meta, p.scales, n, k, size))
    else:
        q = unpack_marlin(PackedLinear(p.qweight, p.scales, n, k, size))
    weight = torch.cat([_converted(codes) for codes in torch.split(q.codes, SLAB)])
    scales = q.scales.T.to(torch.bfloat16)
    if p.channel_wise:
        scales = scales.repeat(k // next(group for group in GROUPS if k % group == 0), 1)
    return weight, torch.stack((scales, torch.zeros_like(scales)), dim=-1)


def words_again(weight: Tensor, meta: Tensor | None) -> Tensor:
    """The words of the tiles that `for_cpu` was given, bit for bit: MARLIN's, or with metadata Sparse-MARLIN's."""
    form, n, k = layout(), weight.shape[0], 2 * weight.shape[1]
    codes = torch.empty(n, k, dtype=torch.int8)
    for rows, block in zip(torch.split(codes, form.block), weight.view(-1, k, form.block // 2), strict=True):
        rows[list(form.low)] = (block & 15).T.view(torch.int8)
        rows[list(form.high)] = (block >> 4).T.view(torch.int8)
    codes.sub_(OFFSET)
    scales = torch.zeros(n, 1, dtype=torch.float16)
    if meta is None:
        return pack_marlin(QuantizedLinear(codes, scales, k)).qweight
    pruned = PackedSparseLinear(torch.full(meta.shape, -0x77777778, dtype=torch.int32), meta, scales.T.contiguous(), n, k, k)  # code 0
    keep = unpack_sparse_marlin(pruned).keep
    return pack_sparse_marlin(SparseQuantizedLinear(codes, scales, k, keep)).qweight


@lru_cache(maxsize=1)
def most_rows() -> int:
    """Of activations that are given to torch's operator; more are multiplied with the decoded weight."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu.get_capabilities().get("avx512_bf16", False):
        return WITH_BFLOAT16
    return ANY if capability in ("AVX512", "AVX2") else WITHOUT_AVX


@lru_cache(maxsize=1)
def layout() -> Layout:
    """This processor's. RuntimeError where torch lays out weights in another way than in blocks of outputs."""
    place = torch.arange(PROBE)
    known = place[:, None].expand(PROBE, PROBE) + PROBE * place  # N in the lower six bits, K above
    low = high = torch.zeros(PROBE * PROBE // 2, dtype=torch.int64)
    for digit in range(3):  # of sixteen
        found = _converted(((known >> 4 * digit & 15) - OFFSET).to(torch.int8)).view(-1).to(torch.int64)
        low, high = low + ((found & 15) << 4 * digit), high + ((found >> 4) << 4 * digit)
    for block in (64, 32, 16):
        n = torch.arange(0, PROBE, block).view(-1, 1, 1) + PROBE * place.view(1, -1, 1)  # the first output of a block, and K
        inside = [nibbles.view(PROBE // block, PROBE, block // 2) - n for nibbles in (low, high)]
        first = [part[0, 0] for part in inside]
        if all(torch.equal(part, one.expand_as(part)) for part, one in zip(inside, first, strict=True)):
            form = Layout(block, *(tuple(one.tolist()) for one in first))
            if sorted(form.outputs) == list(range(block)):
                return form
    raise RuntimeError(f"torch {torch.__version__} lays out int4 weights for {torch.backends.cpu.get_cpu_capability()} in an unknown way")


def _converted(codes: Tensor) -> Tensor:
    """int8 [N, K] -> uint8 [N, K/2]. The last argument matters to GPUs alone."""
    weight: Tensor = convert(codes.to(torch.int32) + OFFSET, 1)
    return weight


def _gemm(
    activations: Tensor, weight: Tensor, scales: Tensor, out_features: int, bias: Tensor | None = None, rounding: Rounding = "none"
) -> Tensor:
    k = activations.shape[-1]
    check_rounding(rounding)
    if activations.dtype not in ACTIVATIONS:
        raise ValueError(f"cpu_gemm: activations must be float16, bfloat16 or float32, got {activations.dtype}")
    if padded(k) != 2 * weight.shape[1] or padded(out_features) != weight.shape[0]:
        raise ValueError(f"cpu_gemm: a weight {list(weight.shape)} is not one of N={out_features}, K={k}")
    if bias is not None and (bias.dtype != activations.dtype or bias.shape != (out_features,)):
        what = f"bias must be {activations.dtype} [{out_features}]"
        raise ValueError(f"cpu_gemm: {what}, got {bias.dtype} {list(bias.shape)}")
    x = activations.reshape(-1, k)
    x, factor = (x.to(torch.bfloat16), None) if rounding == "none" else operand(x, rounding, torch.bfloat16)
    if padded(k) != k:
        x = pad(x, (0, padded(k) - k))
    x = x.contiguous()
    if len(x) <= most_rows():
        out = few_rows(x, weight, padded(k) // len(scales), scales) if len(x) else x.new_empty(0, len(weight))
    else:
        out = _many_rows(x, weight, scales)
    out = out[:, :out_features] if factor is None else out[:, :out_features].float() * factor
    out = out.to(activations.dtype)
    out = out.contiguous() if bias is None else out + bias
    return out.view(*activations.shape[:-1], out_features)


def _many_rows(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """[M, K'] -> [M, N'], with each block of outputs decoded once. Buffers are reused: fresh memory cost twice as much as the work."""
    form, (m, k) = layout(), x.shape
    half = form.block // 2
    blocks = weight.view(-1, k, half)
    steps = scales[..., 0].view(len(scales), 1, -1, form.block)[..., list(form.outputs)].contiguous()  # [G, 1, block of outputs, outputs]
    nibbles, codes = torch.empty(k, half, dtype=torch.uint8), torch.empty(k, form.block, dtype=torch.uint8)
    decoded = torch.empty(k, form.block, dtype=torch.bfloat16)
    groups = decoded.view(len(scales), k // len(scales), form.block)
    product = torch.empty(len(blocks), m, form.block, dtype=torch.bfloat16)
    for i, block in enumerate(blocks):
        codes[:, :half] = torch.bitwise_and(block, 15, out=nibbles)
        codes[:, half:] = torch.bitwise_right_shift(block, 4, out=nibbles)
        decoded.copy_(codes.view(torch.int8).sub_(OFFSET))
        groups *= steps[:, :, i]
        torch.mm(x, decoded, out=product[i])
    if form.outputs != tuple(range(form.block)):
        product = product[..., torch.tensor(form.outputs).argsort()]
    return product.permute(1, 0, 2).reshape(m, -1)


def _shape(
    activations: Tensor, weight: Tensor, scales: Tensor, out_features: int, bias: Tensor | None = None, rounding: Rounding = "none"
) -> Tensor:
    return activations.new_empty(*activations.shape[:-1], out_features)


_library = torch.library.Library("marlinctl", "FRAGMENT")  # type: ignore[no-untyped-call]
_arguments = "Tensor activations, Tensor weight, Tensor scales, int out_features, Tensor? bias=None, str rounding='none'"
_library.define(f"cpu_gemm({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
_library.impl("cpu_gemm", _gemm, "CPU")  # type: ignore[no-untyped-call]
_library.impl("cpu_gemm", _shape, "Meta")  # type: ignore[no-untyped-call]

cpu_gemm = torch.ops.marlinctl.cpu_gemm.default
