"""Blocks that do something unusual: each is run as it is, or refused. The reference is a hook on every linear of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedConfig, PreTrainedModel

from marlinctl.data.tokens import Tokens
from marlinctl.errors import BadInput
from marlinctl.models.architectures import Architecture
from marlinctl.models.derivation import architecture_of_model
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.quantize.types import Hessian
from marlinctl.system.offload import Scratch

HIDDEN, INNER, VOCAB = 32, 64, 96
SAMPLES, LENGTH = 3, 12


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Mean of earlier tokens in place of attention: what stands between the linears does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))

    def mixed(self, q: Tensor, v: Tensor) -> Tensor:
        return q.sigmoid() * v.cumsum(1) / torch.arange(1, v.shape[1] + 1).unsqueeze(-1)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.mixed(self.q(x), self.v(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    attention: Callable[[], nn.Module] = Attention
    mlp: Callable[[], nn.Module] = Mlp

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.n1, self.n2 = Norm(), Norm()
        self.a, self.m = type(self).attention(), type(self).mlp()

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.a(self.n1(hidden_states))
        return hidden_states + self.m(self.n2(hidden_states))


class Config(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, **others: Any) -> None:
        self.num_hidden_layers, self.hidden_size, self.vocab_size = 2, HIDDEN, VOCAB
        super().__init__(**others)


class Decoder(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(blocks)
        self.norm = Norm()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden: Any = self.embed(input_ids)
        kept: Any = None
        for layer in self.layers:
            hidden = layer(hidden, kept) if isinstance(layer, Handing) else layer(hidden)
            if isinstance(hidden, tuple):
                hidden, kept = hidden
        out: Tensor = self.norm(hidden)
        return out


class Model(PreTrainedModel):
    config_class = Config
    base_model_prefix = "model"

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(Config(tie_word_embeddings=False))
        self.model = Decoder(blocks)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None: ...

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.lm_head(self.model(input_ids, use_cache))


# ---- what is unusual -----------------------------------------------------------------------------------------------------------------


class WritesBetween(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        x.mul_(0.5).add_(1.0)
        return self.down(silu(gate) * self.up(x))


class WritesFirst(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5).add_(1.0)
        return super().forward(x)


class WritesLast(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(0.3)


class AddsInPlace(Block):
    def forward(self, hidden_states: Tensor) -> Tensor:
        a = self.a(self.n1(hidden_states))
        a += hidden_states
        m: Tensor = self.m(self.n2(a))
        m += a
        return m


class ReturnsValues(Attention):
    def forward(self, x: Tensor) -> Any:
        v = self.v(x)
        return self.o(self.mixed(self.q(x), v)), v


class ReadsValues(Block):
    attention = ReturnsValues

    def forward(self, hidden_states: Tensor) -> Tensor:
        y, v = self.a(self.n1(hidden_states))
        hidden_states = hidden_states + y + v
        return hidden_states + self.m(self.n2(hidden_states))


class HasOneMore(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.more = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden_states: Tensor) -> Any:
        return self.more(super().forward(hidden_states))


class AsksForDtype(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.up.weight.dtype))


class UsesWeight(Attention):
    def forward(self, x: Tensor) -> Any:
        y = self.o(self.mixed(self.q(x), self.v(x)))
        return y + linear(x, self.q.weight)


class Handing(Block):
    """The values of the first block are added in the second one."""

    attention = ReturnsValues

    def forward(self, hidden_states: Tensor, values: Tensor | None = None) -> Any:
        y, v = self.a(self.n1(hidden_states))
        hidden_states = hidden_states + y if values is None else hidden_states + y + values
        return hidden_states + self.m(self.n2(hidden_states)), v


def of(mlp: type[nn.Module] = Mlp, attention: type[nn.Module] = Attention) -> type[Block]:
    return type("Of", (Block,), {"mlp": mlp, "attention": attention})


def model_of(block: type[Block]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model([block(i) for i in range(2)])
        for parameter in model.parameters():
            parameter.requires_grad_(False).normal_(0.0 if parameter.dim() > 1 else 1.0, 0.15)
    return model.eval()


def derived(model: Model) -> Architecture:
    return architecture_of_model(copy.deepcopy(model).to("meta"), "toy")


class Stored:
    def __init__(self, model: Model) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        return self.tensors[name][row_ids].clone()


ALL = {"a.q", "a.v", "a.o", "m.gate", "m.up", "m.down"}
UNUSUAL: dict[str, tuple[type[Block], set[str]]] = {  # block -> linears that are solved
    "writes into its input between two linears": (of(WritesBetween), ALL),
    "writes into its input": (of(WritesFirst), ALL),
    "writes into its output": (of(WritesLast), ALL),
    "adds to what a branch returns in place": (AddsInPlace, ALL),
    "reads a second thing that a branch returns": (ReadsValues, ALL),
    "has a linear beside two branches": (HasOneMore, {*ALL, "more"}),
    "asks for the dtype of a weight": (of(AsksForDtype), ALL - {"m.up"}),
    "uses a weight in another place too": (of(attention=UsesWeight), ALL - {"a.q"}),
}


@pytest.mark.parametrize("case", UNUSUAL)
@torch.no_grad()
def test_each_linear_is_solved_for_the_inputs_that_it_gets(case: str, tmp_path: Path) -> None:
    """If a plan were wrong, a Gram matrix would be of tensors that the quantized model never computes. Activations stay in memory, as on a
    GPU: what is read from a file is a copy, and hides what writes into it."""
    block, solved = UNUSUAL[case]
    model = model_of(block)
    known, stored = derived(model), Stored(model)
    assert {name.split(".", 3)[3] for name in known.linears} == solved
    ids = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    grams: dict[str, Tensor] = {}

    def disturb(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        assert hessian is not None
        for name in names:
            grams[name] = hessian.matrix.double()
            weight = model.get_submodule(name).weight
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(grams)))
        return {name: model.get_submodule(name).weight.clone() for name in names}

    cpu = torch.device("cpu")
    pipeline = SequentialPipeline(
        copy.deepcopy(model).to("meta"), known, stored, Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), device=cpu,
        dtype=torch.float32, scratch=Scratch(tmp_path, cpu, device_budget=1 << 30), chunk_tokens=2 * LENGTH,
    )  # fmt: skip
    for one in known.blocks:
        pipeline.run_block(one, disturb)
    expected: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        expected[name] = rows.T @ rows / len(rows)

    for name in grams:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
    after: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: after.append(args[0]))
    model(ids)
    assert torch.allclose(pipeline.hidden, after[0], atol=1e-4)
    for name, gram in grams.items():
        assert (gram - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_what_blocks_hand_to_each_other_is_refused() -> None:
    """The pipeline gives a block the same arguments for all samples, and none that another block makes. Zeros in place of what linears
    compute would hide that they depend on the tokens."""
    with pytest.raises(BadInput, match="values, which depends on what other blocks return"):
        derived(model_of(Handing))


def test_a_linear_of_two_blocks_is_refused() -> None:
    """If it were quantized for the first block, the second one would read other weights than the result has."""
    model = model_of(of())
    first, second = (cast(Any, block) for block in model.model.layers)
    second.a.o = first.a.o
    with pytest.raises(BadInput, match=r"a\.o of a block runs more than once"):
        derived(model)


def test_weights_that_are_tied_within_the_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If each were quantized by itself, transformers would load one of them for both."""
    model = model_of(of())
    monkeypatch.setattr(model, "all_tied_weights_keys", {"model.layers.1.m.up.weight": "model.layers.0.m.up.weight"})
    model.to("meta")
    with pytest.raises(BadInput, match="the same tensor as another one"):
        architecture_of_model(model, "toy")
