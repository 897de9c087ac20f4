from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from marlinctl.checkpoint.formats.base import SGLANG, TRANSFORMERS_CT, VLLM, FormatInfo, Packed
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.runtimes import Loads, Verdict, loads, packed_of, servers_that_accept, split_units, survey
from marlinctl.checkpoint.safetensors_header import TensorInfo
from marlinctl.quantize.scheme import INT4, INT8

LLAMA_8B = {"num_attention_heads": 32, "num_key_value_heads": 8}
BLOCK = "model.layers.0."


def llama(hidden: int, inner: int, kv: int) -> dict[str, tuple[int, int]]:
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{BLOCK}self_attn.{k}": v for k, v in attention.items()} | {f"{BLOCK}mlp.{k}": v for k, v in mlp.items()}


def packed(
    shapes: dict[str, tuple[int, int]], size: int = 128, config: dict[str, Any] = LLAMA_8B, *, fmt: str = "ct", variant: str = "",
    overrides: dict[str, int] | None = None, skip: Sequence[str] = (), in_8_bits: Sequence[str] = (),
) -> Packed:  # fmt: skip
    """overrides, skip: by the ends of names."""

    def ends(name: str, tails: Iterable[str]) -> str | None:
        return next((tail for tail in tails if name.endswith(tail)), None)

    sizes = {name: size for name in shapes if ends(name, skip) is None}
    sizes |= {name: overrides[tail] for name in sizes if overrides and (tail := ends(name, overrides))}
    ignore = [name for name in shapes if name not in sizes]
    grids = {name: INT8 for name in sizes if ends(name, in_8_bits)}
    return Packed(FORMATS[fmt], {name: shapes[name] for name in sizes}, sizes, [*ignore, "lm_head"], config, variant, grids)


def verdicts(shapes: dict[str, tuple[int, int]], size: int, config: dict[str, Any], tp: int = 1) -> dict[str, Verdict]:
    return {v.runtime: v for v in survey(packed(shapes, size, config), [tp])}


def test_a_common_model_is_accepted_by_all() -> None:
    """Refusing Llama-3-8B at group 128 would make the table worthless."""
    assert all(v.accepted for v in verdicts(llama(4096, 14336, 1024), 128, LLAMA_8B).values())


@pytest.mark.parametrize("fmt", ["ct", "gptq"])
@pytest.mark.parametrize(("in_8_bits", "refused"), [(["down_proj", "o_proj"], False), (["_proj"], False), (["v_proj"], True)])
def test_8_bits_load_where_fused_linears_are_alike(fmt: str, in_8_bits: list[str], refused: bool) -> None:
    """Refusing what servers load would keep people from it; a q/k/v of different bits is found out at load, on somebody else's GPU."""
    found = loads(packed(llama(4096, 14336, 1024), fmt=fmt, in_8_bits=in_8_bits))
    assert {VLLM, SGLANG} <= {*(found.refused if refused else found.accepted)}
    if refused:
        assert "q_proj, k_proj, v_proj are not quantized alike (group 128, 8-bit, group 128)" in found.refused[VLLM][0]
    mine = next(v for v in survey(packed(llama(4096, 14336, 1024), fmt=fmt, in_8_bits=in_8_bits), [1]) if v.runtime == "marlinctl")
    assert mine.refused[0].endswith(": 8-bit codes"), "the kernels multiply 4-bit codes"


@pytest.mark.parametrize(
    ("shapes", "size", "refusing"),
    [
        (llama(896, 4864, 128), 128, {"IST-DASLab kernels"}),  # Qwen2-0.5B: N=896 is no multiple of 256
        (llama(4096, 14336, 1024), 64, {"IST-DASLab kernels", "vLLM 0.3-0.10 marlin"}),
        (llama(4096, 14336, 1024), 32, {"IST-DASLab kernels", "vLLM 0.3-0.10 marlin", "vLLM Machete (Hopper)"}),
        (
            llama(576, 1536, 192),
            64,
            {"IST-DASLab kernels", "vLLM 0.3-0.10 marlin", "vLLM Machete (Hopper)", "SGLang 0.5 Marlin"},
        ),  # SmolLM2-135M
        (llama(2048, 10944, 2048), 64, {"IST-DASLab kernels", "vLLM 0.3-0.10 marlin", "SGLang 0.5 Marlin"}),  # DeepSeek-V2-Lite's 10944
    ],
)
def test_known_shapes_meet_the_known_rules(shapes: dict[str, tuple[int, int]], size: int, refusing: set[str]) -> None:
    """These are the shapes that people reported; the table must say what their servers said."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 8}
    assert {name for name, v in verdicts(shapes, size, config).items() if not v.accepted} == refusing


def test_reasons_name_layer_and_number() -> None:
    """`no` alone does not tell what to change."""
    refused = verdicts(llama(576, 1536, 192), 64, {})["SGLang 0.5 Marlin"].refused
    assert f"{BLOCK}self_attn.o_proj: K=576 is not a multiple of 128" in refused


@pytest.mark.parametrize(("tp", "accepted"), [(1, True), (2, True), (4, True), (8, True), (16, False), (3, False)])
def test_row_parallel_cuts_may_not_go_through_a_group(tp: int, accepted: bool) -> None:
    """K=14336 holds 112 groups of 128: cut in 16 each part has seven whole ones, and with one group more none has."""
    shapes = llama(4096, 14336, 1024)
    shapes[f"{BLOCK}mlp.down_proj"] = (4096, 14336 if tp != 16 else 14336 + 128)
    assert verdicts(shapes, 128, LLAMA_8B, tp)["vLLM 0.24+ Marlin"].accepted is accepted


def test_whole_rows_split_anywhere_even() -> None:
    """One scale per row has no group to cut."""
    shapes = llama(4096, 14336, 1024)
    assert verdicts(shapes, -1, LLAMA_8B, 8)["vLLM 0.24+ Marlin"].accepted


def test_few_key_value_heads_are_replicated() -> None:
    """With more devices than key/value heads servers copy heads: N of k_proj is then one head, not N / devices."""
    shapes = llama(4096, 14336, 1024)
    units, broken = split_units(shapes, dict.fromkeys(shapes, (128, INT4)), LLAMA_8B, 16)
    assert broken == []
    assert {u.name: u.n for u in units}[f"{BLOCK}self_attn.qkv_proj"] == 4096 // 16 + 2 * 128


def test_shards_are_judged_fused() -> None:
    """N=192 of k_proj is no multiple of 128, but servers see 576 + 2 * 192 = 960 columns of qkv_proj."""
    shapes = llama(576, 1536, 192)
    units, _ = split_units(shapes, dict.fromkeys(shapes, (64, INT4)), {}, 1)
    assert {u.name.rpartition(".")[2]: u.n for u in units} == {"qkv_proj": 960, "o_proj": 576, "gate_up_proj": 3072, "down_proj": 576}


def test_servers_are_those_that_read_the_format() -> None:
    """`ok` because of a runtime that cannot open the folder would be a lie."""
    shapes = llama(4096, 14336, 1024)
    found = survey(packed(shapes), [1, 2])
    assert servers_that_accept(found, FORMATS["ct"], 2) == ["vLLM 0.24+ Marlin", "SGLang 0.5 Marlin"]
    assert servers_that_accept(found, FORMATS["marlin"], 2) == ["vLLM 0.26 with marlinctl"]


@pytest.mark.parametrize(("tp", "refused"), [(1, []), (3, []), (2, ["k_proj: [96, 576]"]), (4, ["k_proj: [48, 576]"])])
def test_tiles_are_not_cut(tp: int, refused: list[str]) -> None:
    """Three key heads of 64 make tiles for three devices; of 96 there would be one and a half, whatever the fused width is."""
    model = packed(llama(576, 1536, 192), 64, fmt="marlin")
    found = {v.runtime: v for v in survey(model, [tp])}["vLLM 0.26 with marlinctl"]
    torn = [line for line in found.refused if "on each device" in line]
    assert [line for line in torn if "k_proj" in line] == [
        f"{BLOCK}self_attn.{one} on each device is not a multiple of 64" for one in refused
    ]


def test_experts_stay_out_of_vllm_in_tiles() -> None:
    found = loads(packed(experts(), fmt="marlin"))
    assert found.accepted == ("marlinctl",) and "experts are not served" in found.refused["vLLM (with marlinctl)"][0]


# ---- loads in --------------------------------------------------------------------------------------------------------------------------


def experts(names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), module: str = "mlp") -> dict[str, tuple[int, int]]:
    """Attention of a block and its two experts, in sizes that every server takes."""
    gate, up, down = names
    attention = {name: shape for name, shape in llama(1024, 512, 256).items() if "self_attn" in name}
    places = [(f"{BLOCK}{module}.experts.{e}.", name) for e in range(2) for name in (gate, up, down)]
    return attention | {place + name: (1024, 512) if name == down else (512, 1024) for place, name in places}


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (packed(llama(4096, 14336, 1024)), {}),
        (packed(llama(4096, 14336, 1024), skip=["q_proj", "k_proj", "v_proj"]), {}),
        (packed(llama(4096, 14336, 1024), skip=["o_proj"], overrides={"down_proj": 32}), {}),
        (packed(llama(4096, 14336, 1024), skip=["k_proj"]), {"vLLM": "qkv_proj", "SGLang": "qkv_proj"}),
        (packed(llama(4096, 14336, 1024), overrides={"gate_proj": 32}), {"vLLM": "gate_up_proj", "SGLang": "gate_up_proj"}),
        (packed(llama(4096, 14336, 1024), 16), {"vLLM": "group size 16", "SGLang": "group size 16"}),
        (packed(llama(576, 1536, 192), 64), {"SGLang": "K=576"}),
        (packed(experts()), {}),
        (packed(experts(), overrides={"o_proj": 32}), {"SGLang": "scheme of experts"}),
        (
            packed(experts(("w1", "w3", "w2"), "block_sparse_moe"), overrides={"o_proj": 32}),
            {"vLLM": "scheme of experts", "SGLang": "scheme"},
        ),
        (packed(experts(), overrides={"experts.1.up_proj": 32}), {"vLLM": "experts", "SGLang": "experts", TRANSFORMERS_CT: "group 32"}),
        (packed(experts(), overrides={"down_proj": -1}), {"vLLM": "experts", "SGLang": "experts"}),
        (
            packed(experts(), -1, overrides={"down_proj": 32}),
            {"vLLM": "experts", "SGLang": "experts", TRANSFORMERS_CT: "whole rows, group 32"},
        ),
        (packed(experts(), skip=["0.down_proj", "1.down_proj"]), {"vLLM": "experts", "SGLang": "experts", TRANSFORMERS_CT: "16-bit"}),
        (packed(experts(), skip=["up_proj", "gate_proj", "down_proj"]), {TRANSFORMERS_CT: "16-bit"}),
    ],
)
def test_each_program_is_refused_for_its_own_reason(model: Packed, refused: dict[str, str]) -> None:
    """A card that lists a server sends people to rent a GPU for it; a reason that names no linear does not help them afterwards.

    The row of transformers is what 5.23 did with such folders (tests/verify/test_run.py); the others are from sources.
    """
    found = loads(model)
    assert set(found.refused) == set(refused), found
    for program, says in refused.items():
        assert any(says in reason for reason in found.refused[program]) and found.refused[program][0].startswith(BLOCK)
    assert set(found.accepted) == set(FORMATS["ct"].loaders) - set(refused)


def test_formats_have_their_own_readers() -> None:
    """What only our kernels read must not be told of a server; what no client fuses is refused by none."""
    uneven: dict[str, Any] = {"overrides": {"k_proj": 32}}
    assert loads(packed(llama(4096, 14336, 1024), fmt="gptq", **uneven)).accepted == (
        "GPTQModel", "transformers (with optimum and gptqmodel)", "marlinctl",
    )  # fmt: skip
    assert "SGLang" not in loads(packed(llama(4096, 14336, 1024), fmt="gptq", variant="v2")).accepted
    native = loads(packed(llama(576, 1536, 192), fmt="marlin", **uneven))
    assert native.accepted == ("marlinctl",) and list(native.refused) == ["vLLM (with marlinctl)"]
    assert loads(packed(llama(576, 1536, 192), 64, fmt="marlin")) == Loads(("vLLM (with marlinctl)", "marlinctl"), {}, {})
    assert loads(Packed(FORMATS["dense"], {}, {}, list(llama(576, 1536, 192)), LLAMA_8B)) == Loads(FORMATS["dense"].loaders, {}, {})


def test_what_nobody_tried_is_not_promised() -> None:
    """A 4-bit head is read by some releases of servers and not by others."""
    found = loads(packed({**llama(4096, 14336, 1024), "lm_head": (32000, 4096)}))
    assert found.untested == dict.fromkeys(("vLLM", "SGLang"), "a quantized lm_head")
    gptq = loads(packed({**llama(4096, 14336, 1024), "lm_head": (32000, 4096)}, fmt="gptq"))
    assert list(gptq.refused) == ["transformers (with optimum and gptqmodel)"], "optimum would leave the head at random numbers"
    assert not {"vLLM", "SGLang"} & {*found.accepted, *found.refused}
    assert ("Not tested", "vLLM, with a quantized lm_head") in found.rows() and len(found.warnings(FORMATS["ct"])) == 2
    assert list(loads(packed(experts(), fmt="gptq")).untested.values()) == ["experts"]


def test_programs_with_the_same_reasons_share_a_line() -> None:
    """Thirty blocks with one cause each must not become sixty lines."""
    blocks = {name.replace("layers.0", f"layers.{i}"): shape for i in range(30) for name, shape in llama(4096, 14336, 1024).items()}
    (line,) = loads(packed(blocks, skip=["k_proj"])).warnings(FORMATS["ct"])
    assert line == (
        "the ct folder will not load in vLLM, SGLang: model.layers.0.self_attn.qkv_proj: q_proj, k_proj, v_proj are not quantized alike "
        "(16-bit, group 128), and servers load them as one linear (and 29 more)"
    )


def test_headers_of_a_large_mixture_of_experts_are_read_in_linear_time(tmp_path: Path) -> None:
    """Qwen3-30B-A3B has 18,816 linears: where each tensor asks for all of them, the report takes minutes after the work is done."""
    layers = {f"model.layers.0.mlp.experts.{i}.down_proj": 128 for i in range(4000)}
    kinds = {"qweight": (16, 128), "scales": (1, 128), "qzeros": (1, 16), "g_idx": (128,)}
    tensors = {
        f"{layer}.{suffix}": TensorInfo(f"{layer}.{suffix}", "I32", shape, tmp_path / "model.safetensors", 0, 0)
        for layer in layers
        for suffix, shape in kinds.items()
    }
    checkpoint = Checkpoint(tmp_path, {}, tensors, ())
    started = time.process_time()
    found = packed_of(checkpoint, FormatInfo(FORMATS["gptq"], layers))
    assert time.process_time() - started < 5
    assert set(found.shapes.values()) == {(128, 128)} and len(found.shapes) == 4000
