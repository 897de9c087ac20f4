from __future__ import annotations

from typing import Any

import pytest

from marlinctl.checkpoint.formats import LOADERS
from marlinctl.runtimes import Verdict, loaders, servers_that_accept, split_units, survey, uneven

LLAMA_8B = {"num_attention_heads": 32, "num_key_value_heads": 8}
BLOCK = "model.layers.0."


def llama(hidden: int, inner: int, kv: int) -> dict[str, tuple[int, int]]:
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{BLOCK}self_attn.{k}": v for k, v in attention.items()} | {f"{BLOCK}mlp.{k}": v for k, v in mlp.items()}


def verdicts(shapes: dict[str, tuple[int, int]], size: int, config: dict[str, Any], tp: int = 1) -> dict[str, Verdict]:
    found = survey(shapes, dict.fromkeys(shapes, size), config, [tp])
    return {v.runtime: v for v in found}


def test_a_common_model_is_accepted_by_all() -> None:
    """Refusing Llama-3-8B at group 128 would make the table worthless."""
    assert all(v.accepted for v in verdicts(llama(4096, 14336, 1024), 128, LLAMA_8B).values())


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
    assert f"{BLOCK}self_attn.o_proj: K=576 is no multiple of 128" in refused


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
    units, broken = split_units(shapes, dict.fromkeys(shapes, 128), LLAMA_8B, 16)
    assert broken == []
    assert {u.name: u.n for u in units}[f"{BLOCK}self_attn.qkv_proj"] == 4096 // 16 + 2 * 128


def test_shards_are_judged_fused() -> None:
    """N=192 of k_proj is no multiple of 128, but servers see 576 + 2 * 192 = 960 columns of qkv_proj."""
    shapes = llama(576, 1536, 192)
    units, _ = split_units(shapes, dict.fromkeys(shapes, 64), {}, 1)
    assert {u.name.rpartition(".")[2]: u.n for u in units} == {"qkv_proj": 960, "o_proj": 576, "gate_up_proj": 3072, "down_proj": 576}


def test_servers_are_those_that_read_the_format() -> None:
    """`ok` because of a runtime that cannot open the folder would be a lie."""
    shapes = llama(4096, 14336, 1024)
    found = survey(shapes, dict.fromkeys(shapes, 128), LLAMA_8B, [1, 2])
    assert servers_that_accept(found, "ct", 2) == ["vLLM 0.24+ Marlin", "SGLang 0.5 Marlin"]
    assert servers_that_accept(found, "marlin", 2) == []


def test_uneven_linears_are_warned_of() -> None:
    """The server's own message names a fused layer that appears nowhere in the checkpoint."""
    lines = uneven(
        {"a.q_proj": 32, "a.k_proj": 64, "b.gate_proj": 32, "m.experts.0.w1": -1, "n.experts.0.w1": 64}, ["a.v_proj", "b.up_proj"]
    )
    assert [line.split(":")[0] for line in lines[:2]] == ["a.qkv_proj", "b.gate_up_proj"]
    assert "16-bit, group 32, group 64" in lines[0] and lines[2].startswith("experts have group sizes -1, 64")
    assert uneven({"a.q_proj": 32, "a.k_proj": 32, "a.v_proj": 32}, ["lm_head"]) == []


def test_loaders_leave_out_the_servers_that_refuse() -> None:
    """A plan that promises SGLang for K=576 promises a server that stops at its first layer."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 8}
    odd = survey({"o_proj": (576, 576)}, {"o_proj": 64}, config, (1,))
    even = survey({"o_proj": (512, 512)}, {"o_proj": 64}, config, (1,))
    assert {"vLLM", "SGLang"} <= set(loaders("ct", even, uneven=False))
    assert "vLLM" in loaders("ct", odd, uneven=False) and "SGLang" not in loaders("ct", odd, uneven=False)
    assert not {"vLLM", "SGLang"} & set(loaders("gptq", even, uneven=True))
    assert loaders("dense", [], uneven=False) == list(LOADERS["dense"])
    assert loaders("marlin", odd, uneven=True) == ["marlinctl"]
