"""The two layouts that other programs load: compressed-tensors pack-quantized and GPTQ.

Both put neighbours in K into one int32, the first in the lowest bits: eight codes of 4 bits or four of 8. So their codes differ by a
transpose:

    compressed-tensors   weight_packed [N, ceil(K/8)]     GPTQ   qweight [K/8, N] = weight_packed.T
                         weight_scale  [N, G]                    scales  [G, N]   = weight_scale.T
                                                                 qzeros  [G, N/8], g_idx [K]

Codes enter and leave as int8, and no step makes anything wider than int16 out of them: two int8 codes seen as one
int16 fold into one byte, four bytes seen as one int32 are the word (the hosts and devices of torch are little-endian).

On disk a code has half of its range added: 8, or 128. GPTQ carries a zero point per column and group. Ours is always
that half. Files of version 1 store it as 7 (127), one less than it is, files of version 2 (checkpoint_format gptq_v2)
as 8 (128). The caller says which rule the file claims to follow; one that is symmetric by the other rule alone is
refused as mislabelled.
"""

from __future__ import annotations

import torch
from torch import Tensor, split
from torch.nn.functional import pad

from marlinctl.pack.tile import NIBBLES, OFFSET
from marlinctl.pack.types import SLAB, as_float16, transposed
from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.quantize.types import CODE_MAX, CODE_MIN, QuantizedLinear

ZEROS_V1 = {4: 0x77777777, 8: 0x7F7F7F7F}  # bits -> a word of 8 - 1, or of 128 - 1
ZEROS_V2 = {4: 0x88888888 - (1 << 32), 8: 0x80808080 - (1 << 32)}  # a word of 8, or of 128, as a signed number
WORD_BITS = 32


def pack_ct(codes: Tensor, bits: int = 4) -> Tensor:
    """codes int8 [N, K] -> weight_packed int32 [N, K / codes in a word, up]. What lies beyond K is 0, as compressed-tensors has it."""
    _expect("codes", codes, torch.int8)
    if bits == 8:
        padded = pad(codes, (0, -codes.shape[1] % 4), value=-128).contiguous()  # which is byte 0
        return (padded.view(torch.uint8) ^ 0x80).view(torch.int32)
    low, high = torch.aminmax(codes)
    if int(low) < CODE_MIN or int(high) > CODE_MAX:  # would spill into the neighbours
        raise ValueError(f"codes {list(codes.shape)} lie in {int(low)}..{int(high)}, outside {CODE_MIN}..{CODE_MAX}")
    if codes.shape[1] % NIBBLES:
        codes = pad(codes, (0, -codes.shape[1] % NIBBLES), value=CODE_MIN)  # which is nibble 0
    weight_packed = codes.new_empty(codes.shape[0], codes.shape[1] // NIBBLES, dtype=torch.int32)
    for words, slab in zip(split(weight_packed, SLAB), split(codes, SLAB), strict=True):
        pairs = (slab + OFFSET).reshape(-1).view(torch.int16)  # two neighbours: nibbles in bits 0..3 and 8..11
        words.view(-1).view(torch.uint8).copy_(pairs | pairs >> 4)  # int16 to uint8 drops the high byte
    return weight_packed


def unpack_ct(weight_packed: Tensor, n: int, k: int, bits: int = 4) -> Tensor:
    """weight_packed int32 [n, k / codes in a word, up] -> codes int8 [n, k]."""
    _expect("weight_packed", weight_packed, torch.int32)
    across = -(-k // (WORD_BITS // bits))
    if tuple(weight_packed.shape) != (n, across):
        raise ValueError(f"weight_packed of N={n}, K={k} must be [{n}, {across}], got {list(weight_packed.shape)}")
    if bits == 8:
        return (weight_packed.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)[:, :k].contiguous()
    codes = torch.empty(n, NIBBLES * weight_packed.shape[1], dtype=torch.int8, device=weight_packed.device)
    for slab, words in zip(split(codes, SLAB), split(weight_packed, SLAB), strict=True):
        pairs = words.reshape(-1).view(torch.uint8).to(torch.int16)  # a byte holds two neighbours
        pairs |= pairs << 4
        pairs &= 0x0F0F
        torch.sub(pairs.view(torch.int8), OFFSET, out=slab.view(-1))
    return codes[:, :k].contiguous()


def pack_gptq(q: QuantizedLinear) -> dict[str, Tensor]:
    """The four tensors of a GPTQ layer: version 1 (checkpoint_format gptq), or version 2 of asymmetric codes."""
    n, k, bits = q.out_features, q.in_features, q.grid.bits
    if n % NIBBLES or k % NIBBLES:
        raise ValueError(f"GPTQ packs 8 codes to a word along K and 8 zeros along N, so both must be multiples of 8: N={n}, K={k}")
    device = q.codes.device
    groups = q.scales.shape[1]
    return {
        "qweight": transposed(pack_ct(q.codes, bits)),  # [K/8, N], or [K/4, N]
        "qzeros": torch.full((groups, n * bits // WORD_BITS), ZEROS_V1[bits], dtype=torch.int32, device=device)
        if q.zeros is None
        else pack_ct(q.zeros.T.contiguous(), bits),
        "scales": transposed(as_float16(q.scales)),  # [G, N]
        "g_idx": _plain_g_idx(k, q.group_size, device),
    }


def unpack_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, v2: bool, grid: Grid = INT4) -> QuantizedLinear:
    """The codes of a GPTQ layer without activation order at run time; anything else is refused.

    v2 says how the file stores its zero points: checkpoint_format gptq_v2, against gptq. g_idx is None where the file
    has none, which means plain order as long as its config says desc_act: false.
    """
    _expect("qweight", qweight, torch.int32)
    together = WORD_BITS // grid.bits  # codes in a word
    k, n = together * qweight.shape[0], qweight.shape[1]
    if n % together:
        raise ValueError(f"qweight {list(qweight.shape)} has N={n} columns, which is not a multiple of {together}")
    _expect("scales", scales, torch.float16, torch.bfloat16)
    groups = scales.shape[0]
    if scales.shape[1] != n or not groups or k % groups:
        raise ValueError(f"scales of N={n}, K={k} must be [G, {n}] with G dividing {k}, got {list(scales.shape)}")
    _expect("qzeros", qzeros, torch.int32)
    if tuple(qzeros.shape) != (groups, n // together):
        raise ValueError(f"qzeros of N={n} and {groups} groups must be [{groups}, {n // together}], got {list(qzeros.shape)}")
    if grid.symmetric:
        _refuse_asymmetric(qzeros, v2, grid.bits)
    elif not v2:
        raise ValueError("asymmetric codes are read in version 2 alone")
    zeros = None if grid.symmetric else transposed(unpack_ct(qzeros, groups, n, grid.bits))
    if g_idx is not None:
        _refuse_act_order(g_idx, k, k // groups)
    return QuantizedLinear(unpack_ct(qweight.T, n, k, grid.bits), transposed(scales), k // groups, grid=grid, zeros=zeros)


def _plain_g_idx(k: int, group_size: int, device: torch.device) -> Tensor:
    """[K] int32: column k belongs to group k // group_size."""
    return torch.arange(k, dtype=torch.int32, device=device) // group_size


def _refuse_asymmetric(qzeros: Tensor, v2: bool, bits: int) -> None:
    """Every zero point must be 8, or 128. A file that is symmetric by the other version's rule is most likely mislabelled: that is said."""
    first, second = ZEROS_V1[bits], ZEROS_V2[bits]
    symmetric, other, version, other_version = (second, first, "gptq_v2", "gptq") if v2 else (first, second, "gptq", "gptq_v2")
    mask, together = (1 << bits) - 1, WORD_BITS // bits
    wrong = qzeros != symmetric
    if not bool(wrong.any()):
        return
    if bool((qzeros == other).all()):
        raise ValueError(
            f"qzeros {list(qzeros.shape)} store {other & mask} everywhere, which is symmetric in {other_version} and not in {version}: "
            f"config.json names the wrong one: {'' if v2 else '`marlinctl pack --gptq-v2` reads it so, or '}"
            f'write "checkpoint_format": "{other_version}" into it and pack again'
        )
    group, column = wrong.nonzero()[0].tolist()
    word = int(qzeros[group, column])
    place = next(i for i in range(together) if (word ^ symmetric) >> (bits * i) & mask)
    raise ValueError(
        f"asymmetric: qzeros {list(qzeros.shape)} must store {symmetric & mask} everywhere ({version}), "
        f"but group {group}, output {together * column + place} stores {word >> (bits * place) & mask}; {int(wrong.sum())} words differ"
    )


def _refuse_act_order(g_idx: Tensor, k: int, group_size: int) -> None:
    """Columns must lie in groups in their own order: other orders need a gather at run time, which MARLIN tiles have no room for."""
    if g_idx.is_floating_point() or tuple(g_idx.shape) != (k,):
        raise ValueError(f"g_idx must be integers [{k}], got {g_idx.dtype} {list(g_idx.shape)}")
    plain = _plain_g_idx(k, group_size, g_idx.device)
    wrong = (g_idx != plain).nonzero()
    if wrong.numel():
        first = int(wrong[0])
        raise ValueError(
            f"act-order: with group_size {group_size}, g_idx[{first}] must be {first // group_size} and is {int(g_idx[first])} "
            f"({wrong.numel()} of {k} columns are out of order); quantize the original again with static order"
        )


def _expect(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes or tensor.ndim != 2 or not tensor.numel():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be a non-empty matrix of {wanted}, got {tensor.dtype} {list(tensor.shape)}")
