"""Linears with the same input as one: the same model, in fewer launches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import marlinctl
from marlinctl.benchmarking.generation import unpack_linears
from marlinctl.kernels.configurations import DENSE, SPARSE, Configuration
from marlinctl.kernels.linear import LinearPart, MarlinLinear, SharedLinear, SparseMarlinLinear
from marlinctl.kernels.reference import dequantize, dequantize_sparse
from marlinctl.pack.types import PackedSparseLinear, side_by_side
from marlinctl.serve.fusing import fuse_linears
from tests.kernels.software_kernel import random_packed
from tests.packed import by_reference, make_packed, make_sparse_packed
from tests.tiny import VOCAB_SIZE, make_tiny
from tests.zoo import build

pytestmark = pytest.mark.filterwarnings("ignore:packed tensors on the CPU")

assert marlinctl.__version__, "importing marlinctl is what registers"
IDS = torch.arange(40).view(2, 20) * 7 % VOCAB_SIZE


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def near(found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-3) -> bool:
    return float((found - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("kind", [DENSE[0], SPARSE[0]], ids=["dense", "sparse"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_tiles_side_by_side_are_the_weights_one_below_the_other(kind: Configuration, group_size: int) -> None:
    """If this failed, columns of tiles, metadata or scales would belong to another output."""
    parts = [random_packed(kind, n, 192, group_size, seed=n)[0] for n in (128, 64, 72)]
    together = side_by_side(parts)
    decode: Callable[[Any], torch.Tensor] = dequantize_sparse if isinstance(together, PackedSparseLinear) else dequantize
    assert torch.equal(decode(together), torch.cat([decode(part) for part in parts]))
    with pytest.raises(ValueError, match="multiples of 64"):
        side_by_side(parts[::-1])
    with pytest.raises(ValueError, match="same K and group size"):
        side_by_side([parts[0], random_packed(kind, 64, 128, group_size, seed=0)[0]])


@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
def test_a_fused_model_is_the_same_model(fmt: str, tmp_path: Path) -> None:
    """If this failed, a faster model would write something else."""
    make = make_packed if fmt == "marlin" else make_sparse_packed
    make(make_tiny(tmp_path / "source"), tmp_path / "native", fmt, group_size=32)
    model = by_reference(AutoModelForCausalLM.from_pretrained(tmp_path / "native"))
    expected = logits(model)
    assert fuse_linears(model) == 4, "q, k, v and gate, up of two blocks"
    linears = [module for module in model.modules() if isinstance(module, MarlinLinear | SparseMarlinLinear)]
    assert len(linears) == 8, "qkv, o, gate_up and down of two blocks"
    assert near(logits(model), expected)
    assert all(module.latest is None for module in model.modules() if isinstance(module, SharedLinear)), "activations are kept"
    assert fuse_linears(model) == 0
    assert unpack_linears(model, torch.float16) == 14
    assert not any(isinstance(module, SharedLinear | LinearPart) for module in model.modules())
    assert near(logits(model), expected, 2e-3), "weights are rounded to 16 bits there"


def test_each_product_is_made_once(tmp_path: Path) -> None:
    """If this failed, fusing would multiply three times as much, or hand out the product of other activations."""
    make_packed(make_tiny(tmp_path / "source"), tmp_path / "native", "marlin", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 3, 128).half(), torch.randn(2, 3, 128).half()
    names = ("q_proj", "k_proj", "v_proj")
    alone = {name: [getattr(attention, name)(z) for z in (x, y)] for name in names}
    fuse_linears(model)
    calls: list[torch.Tensor] = []
    attention.q_proj.shared.linear.register_forward_hook(lambda module, args, out: calls.append(args[0]))
    for order in (names, names[::-1]):
        assert all(near(getattr(attention, name)(x).double(), alone[name][0].double()) for name in order)
    assert len(calls) == 2
    attention.q_proj(x)
    assert near(attention.k_proj(y).double(), alone["k_proj"][1].double())
    assert near(attention.v_proj(x).double(), alone["v_proj"][0].double())
    buffer = x.clone()
    attention.q_proj(buffer)  # and nobody asks for k and v
    assert near(attention.q_proj(buffer.copy_(y)).double(), alone["q_proj"][1].double()), "the product of what the buffer held before"


def test_what_is_not_alike_stays_apart(tmp_path: Path) -> None:
    """If this failed, a linear with another group size, or one that was left in 16 bits, would be read with the wrong scales."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    source = build("llama", tmp_path / "llama", dtype=torch.float16, **sizes)  # with biases
    skip, other = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    make_packed(source, tmp_path / "native", "marlin", group_size=32, overrides={other: 64}, skip=[skip])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    expected = logits(model)
    assert fuse_linears(model) == 2
    assert isinstance(model.model.layers[0].self_attn.k_proj, LinearPart)
    assert isinstance(model.model.layers[1].self_attn.q_proj, MarlinLinear)
    assert isinstance(model.model.layers[0].mlp.gate_proj, MarlinLinear)
    assert near(logits(model), expected)


@pytest.mark.slow
def test_a_fused_model_compiles_whole(tmp_path: Path) -> None:
    """If this failed, what is handed from one part to the next would break the graph."""
    make_packed(make_tiny(tmp_path / "source"), tmp_path / "native", "marlin", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    expected = logits(model)  # and the linears are prepared for the CPU
    fuse_linears(model)
    assert all(module.cpu_weight is not None for module in model.modules() if isinstance(module, MarlinLinear))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        assert near(compiled(IDS, use_cache=False).logits.double(), expected)
