"""The walk against the whole model, for every architecture: what it computes between the linears is what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.data.tokens import Tokens
from marlinctl.models.architectures import Architecture, Branch
from marlinctl.models.families import FAMILIES, architecture
from marlinctl.models.lookup import any_architecture
from marlinctl.models.meta_model import build as build_skeleton
from marlinctl.oneshot.gram import _finite
from marlinctl.oneshot.reference_stream import ReferenceModel, mean_energy
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.quantize.types import Hessian
from marlinctl.system.offload import Scratch
from tests import zoo

SAMPLES, LENGTH = 5, 24
# Latent attention and experts beside a chain; parallel mixers; linears of the block itself; a flattened chain before experts.
CHAINS = ("deepseek_v3", "falcon_h1", "gemma4_text", "opt", "qwen3_next")


# Linears of the block itself; latent attention before a branch; blocks that read keys and values of earlier ones.
DENSE_CHAINS: dict[str, dict[str, Any]] = {"opt": {}, "deepseek_v3": {"first_k_dense_replace": 2}, "gemma4_text": {}}


# A norm or a factor stands between a branch and the residual stream.
NORMED = ("gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3", "exaone4", "granite", "opt")


def tokens(seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, zoo.VOCAB_SIZE, (SAMPLES, LENGTH), generator=generator)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False  # as if BOS
    counted[1, 15:] = False  # as if padded
    return Tokens(ids, counted)


@torch.no_grad()
def walked(folder: Path, scratch: Path, chunk: int = 2 * LENGTH) -> tuple[SequentialPipeline, dict[str, Hessian], Architecture, Checkpoint]:
    checkpoint = open_checkpoint(folder)
    known = any_architecture(checkpoint.config)
    seen: dict[str, Hessian] = {}

    def keep_weights(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        assert hessian is not None
        seen.update(dict.fromkeys(names, hessian))
        return {name: checkpoint.read(f"{name}.weight").float() for name in names}

    cpu = torch.device("cpu")
    walk = SequentialPipeline(
        build_skeleton(checkpoint.config, torch.float32), known, checkpoint, tokens(),
        device=cpu, dtype=torch.float32, scratch=Scratch(scratch, cpu), chunk_tokens=chunk,
    )  # fmt: skip
    for block in known.blocks:
        walk.run_block(block, keep_weights)
    return walk, seen, known, checkpoint


@pytest.mark.parametrize("model_type", sorted([*zoo.ZOO, *CHAINS]))
@torch.no_grad()
def test_walk_computes_what_the_model_computes(model_type: str, tmp_path: Path) -> None:
    """If a residual, norm, mask, rotary embedding or expert were treated wrongly, Hessians would be of another model."""
    from transformers import AutoModelForCausalLM

    folder = zoo.build(model_type, tmp_path / "model")
    walk, seen, known, _ = walked(folder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name in seen:
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    output: list[Tensor] = []
    model.get_submodule(known.norm).register_forward_pre_hook(lambda _, args: output.append(args[0]))
    given = tokens()
    model(given.ids)
    assert set(seen) == set(known.linears)
    assert torch.allclose(walk.hidden, output[0], atol=2e-4, rtol=1e-3)
    for name, x in inputs.items():
        rows = x.reshape(SAMPLES, LENGTH, -1)[given.counted].double()
        expected = rows.T @ rows / rows.shape[0]
        assert (seen[name].matrix.double() - expected).norm() / expected.norm() < 1e-4, name
        assert seen[name].tokens == int(given.counted.sum())


@pytest.mark.parametrize("model_type", sorted({*zoo.ZOO, *DENSE_CHAINS} - {"mixtral", "qwen3_moe", "olmoe"}))
@torch.no_grad()
def test_drift_is_the_difference_between_two_models(model_type: str, tmp_path: Path) -> None:
    """If x' and x were of other tokens, places or blocks, matching would push the weights somewhere else than to the original."""
    from transformers import AutoModelForCausalLM

    folder = zoo.build(model_type, tmp_path / "model", **DENSE_CHAINS.get(model_type, {}))
    checkpoint = open_checkpoint(folder)
    known = any_architecture(checkpoint.config)
    seen: dict[str, Hessian] = {}
    changed: dict[str, Tensor] = {}

    def disturb(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        assert hessian is not None
        seen.update(dict.fromkeys(names, hessian))
        for name in names:
            weight = checkpoint.read(f"{name}.weight").float()
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(changed)))
            changed[name] = weight + 0.2 * weight.std() * noise
        return {name: changed[name] for name in names}

    cpu = torch.device("cpu")
    walk = SequentialPipeline(
        build_skeleton(checkpoint.config, torch.float32), known, checkpoint, tokens(),
        device=cpu, dtype=torch.float32, scratch=Scratch(tmp_path, cpu), chunk_tokens=2 * LENGTH, corrects_drift=True,
    )  # fmt: skip
    for block in known.blocks:
        walk.run_block(block, disturb)

    def record(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        inputs: dict[str, Tensor] = {}
        streams: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name in seen:
                if name in weights:
                    module.weight.copy_(weights[name])
                module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for block in known.blocks:
            layer = model.get_submodule(block.prefix)
            layer.register_forward_pre_hook(lambda _, args, p=block.prefix: streams.__setitem__(p, args[0]))
            attention = layer.get_submodule(block.homes[0])
            attention.register_forward_hook(lambda _, __, out, p=block.prefix: streams.__setitem__(p + " middle", streams[p] + out[0]))
            layer.register_forward_hook(lambda _, __, out, p=block.prefix: streams.__setitem__(p + " after", out))
        model(tokens().ids)
        return inputs, streams

    counted = tokens().counted
    (theirs, their_streams), (ours, our_streams) = record({}), record(changed)
    weighted: dict[str, Tensor] = {}  # last linears whose tokens are weighted -> [T, 1] float64
    for block in known.blocks:
        for branch, after in zip(block.parts, (" middle", " after"), strict=False):
            if model_type not in NORMED and isinstance(branch, Branch):
                energy = their_streams[block.prefix + after].double().square().mean(-1)
                weighted[f"{block.prefix}.{branch.last}"] = (energy.mean() / energy)[counted].unsqueeze(1)
    for name in known.linears:
        x = ours[name].reshape(SAMPLES, LENGTH, -1)[counted].double()
        gone = theirs[name].reshape(SAMPLES, LENGTH, -1)[counted].double() - x
        weight = weighted.get(name, torch.ones(1, 1))
        expected, drift = x.T @ (gone * weight) / len(x), seen[name].drift
        assert drift is not None
        assert (drift.double() - expected).norm() <= 2e-4 * expected.norm() + 1e-5 * seen[name].matrix.norm(), name
        gram = x.T @ (x * weight) / len(x)
        assert (seen[name].matrix.double() - gram).norm() <= 2e-4 * gram.norm(), name
    for block in known.blocks:
        for branch, stream in zip(block.parts, (block.prefix, block.prefix + " middle"), strict=False):
            last = f"{block.prefix}.{branch.stages[-1][0]}"
            found = seen[last].residual
            if last not in weighted:
                assert found is None  # a norm or a factor stands between the branch and the residual stream
                continue
            assert found is not None
            x = ours[last].reshape(SAMPLES, LENGTH, -1)[counted].double()
            gone = (their_streams[stream] - our_streams[stream])[counted].double()
            expected = x.T @ (gone * weighted[last]) / len(x)
            assert (found.double() - expected).norm() <= 1e-3 * expected.norm() + 1e-5, last


@torch.no_grad()
def test_a_block_that_adds_in_place_adds_its_branches_to_the_stream(tmp_path: Path) -> None:
    """Falcon adds the output of attention to that of the MLP in place. If the sum were taken for the MLP's output, tokens would not be
    weighted, and drift of the stream would not be corrected."""
    folder = zoo.build("falcon", tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    known, cpu = any_architecture(checkpoint.config), torch.device("cpu")
    walk = SequentialPipeline(
        build_skeleton(checkpoint.config, torch.float32), known, checkpoint, tokens(),
        device=cpu, dtype=torch.float32, scratch=Scratch(tmp_path, cpu), chunk_tokens=2 * LENGTH, corrects_drift=True,
    )  # fmt: skip
    assert walk.reference is not None
    seen: list[Hessian] = []

    def keep(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        assert hessian is not None
        seen.append(hessian)
        return {name: checkpoint.read(f"{name}.weight").float() for name in names}

    walk.run_block(known.blocks[0], keep)
    assert walk.reference.adds and [hessian.residual is not None for hessian in seen] == [False, True, False, True]


def test_a_token_that_overflows_takes_no_other_along(tmp_path: Path) -> None:
    """If one infinite stream made every weight NaN, a single bad token would end a run that may lose a tenth of them."""
    cpu = torch.device("cpu")
    original = ReferenceModel(torch.zeros(1, 4, 8), lambda name: torch.empty(0), Scratch(tmp_path, cpu), cpu)
    branch = Branch("mlp", ("up",), "down", False)
    original.energy["mlp"] = torch.tensor([[1.0, 4.0, torch.inf, torch.nan]])
    original.mean["mlp"] = mean_energy(original.energy["mlp"])
    scale = original.token_scale(branch, slice(0, 1)).reshape(-1)
    assert scale[:2].tolist() == pytest.approx([2.5**0.5, (2.5 / 4) ** 0.5])
    assert not torch.isfinite(scale[3]) and scale[2] == 0


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_each_expert_sees_the_tokens_that_the_router_sends_it(model_type: str, tmp_path: Path) -> None:
    """If an expert's Hessian held other experts' tokens, it would be solved for inputs it never gets."""
    folder = zoo.build(model_type, tmp_path / "model")
    _, seen, known, _ = walked(folder, tmp_path)
    block = known.blocks[0]
    (experts,) = block.experts
    counts = [seen[f"{block.prefix}.{experts.first[0].format(e=e)}"].tokens for e in range(experts.count)]
    assert sum(counts) == int(tokens().counted.sum()) * experts.top_k


def test_chunks_do_not_change_the_result(tmp_path: Path) -> None:
    """If a chunk's keyword arguments were reused for one of another size, the last samples would be computed wrongly."""
    folder = zoo.build("gemma3_text", tmp_path / "model")
    whole, _, _, _ = walked(folder, tmp_path, chunk=SAMPLES * LENGTH)
    single, _, _, _ = walked(folder, tmp_path, chunk=LENGTH)
    assert torch.allclose(whole.hidden, single.hidden, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(zoo.ZOO))
def test_table_names_exactly_the_tensors_that_transformers_saves(model_type: str, tmp_path: Path) -> None:
    """If the table missed a tensor or a shape, a damaged checkpoint could pass, or a good one be refused."""
    checkpoint = open_checkpoint(zoo.build(model_type, tmp_path / "model"))
    known = architecture(checkpoint.config)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == dict(known.expected)


@pytest.mark.parametrize("model_type", sorted(zoo.ZOO))
def test_defaults_of_absent_config_keys_are_those_of_transformers(model_type: str) -> None:
    """If config.json leaves out a default, the table must assume the same value as transformers."""
    from transformers import AutoConfig

    family, config = FAMILIES[model_type], AutoConfig.for_model(model_type)
    for key, value in family.defaults.items():
        assert getattr(config, key) == value, key
    assert bool(config.tie_word_embeddings) == family.tied


def test_zoo_covers_the_table() -> None:
    """If an architecture were added without a tiny model, nothing would test it."""
    assert set(zoo.ZOO) == set(FAMILIES)


def test_module_map_describes_an_unknown_architecture(tmp_path: Path) -> None:
    """If --module-map gave other names or shapes than the table does for a known model, hand-described models would be wrong too."""
    folder = zoo.build("qwen2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    names = {
        "decoder": "model", "blocks": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm",
        "attention": {"module": "self_attn", "first": [f"self_attn.{x}_proj" for x in "qkv"], "last": "self_attn.o_proj"},
        "mlp": {"module": "mlp", "first": ["mlp.gate_proj", "mlp.up_proj"], "last": "mlp.down_proj"},
    }  # fmt: skip
    (tmp_path / "map.json").write_text(json.dumps(names))
    by_hand, by_table = architecture(config, tmp_path / "map.json"), architecture(config)
    assert dict(by_hand.expected) == dict(by_table.expected)
    assert by_hand.linears == by_table.linears
    assert [b.parts for b in by_hand.blocks] == [b.parts for b in by_table.blocks]
    assert by_hand.head == by_table.head


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_with_one_value_that_is_not_finite_is_found(dtype: torch.dtype, device: str) -> None:
    """If this failed, one overflow would make the whole Hessian NaN, or a token of large values be dropped."""
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 299], x[2, 0], x[3, 150] = torch.nan, torch.inf, -torch.inf
    x[4, :] = torch.finfo(dtype).max
    x[5, 0], x[5, 1] = torch.inf, torch.nan
    assert _finite(x.to(device)).tolist() == torch.isfinite(x).all(-1).tolist() == [True, False, False, False, True, False, True]


@torch.no_grad()
def test_what_blocks_leave_for_later_ones_is_kept_to_resume_from(tmp_path: Path) -> None:
    """If keys and values were not among the states, a resumed run would give the last blocks of Gemma 4 E2B those of nothing."""
    folder = zoo.build("gemma4_text", tmp_path / "model")
    whole, _, known, checkpoint = walked(folder, tmp_path)
    cpu = torch.device("cpu")

    def begun() -> SequentialPipeline:
        return SequentialPipeline(
            build_skeleton(checkpoint.config, torch.float32), known, checkpoint, tokens(),
            device=cpu, dtype=torch.float32, scratch=Scratch(tmp_path, cpu), chunk_tokens=2 * LENGTH,
        )  # fmt: skip

    def keep(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        return {name: checkpoint.read(f"{name}.weight").float() for name in names}

    first, second = begun(), begun()
    for block in known.blocks[:2]:
        first.run_block(block, keep)
    second.restore({name: tensor.clone() for name, tensor in first.states().items()})
    for block in known.blocks[2:]:
        second.run_block(block, keep)
    assert torch.equal(second.hidden, whole.hidden)
