"""The experts of a block: routing against a plain loop, batches against one after another, drift against float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.errors import NumericalProblem
from marlinctl.models.architectures import Architecture
from marlinctl.models.families import architecture
from marlinctl.models.meta_model import build as build_meta
from marlinctl.oneshot import layers
from marlinctl.oneshot import run as job
from marlinctl.oneshot.gram import StageInput
from marlinctl.oneshot.layers import LayerQuantizer
from marlinctl.oneshot.routing import sort_by_expert
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.oneshot.solve import StackedSolver
from marlinctl.quantize.types import Hessian
from marlinctl.sparsify.steps import TORCH
from marlinctl.system.offload import Scratch
from marlinctl.system.processes import ALONE
from tests import zoo
from tests.oneshot.test_sequential import LENGTH, SAMPLES, tokens
from tests.runs import quantize, recipe, write_text
from tests.solver_kernels.software import install

CPU = torch.device("cpu")
MANY: dict[str, Any] = {"num_experts": 24, "num_experts_per_tok": 3, "mlp_only_layers": []}  # some of them see few tokens


def test_tokens_are_sorted_as_a_loop_over_experts_finds_them() -> None:
    """If a token went to another expert, or with another's share, hidden states would be of another model."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(50)]).to(torch.int32)
    experts[experts == 4] = 8  # expert 4 gets no token
    shares = torch.rand(50, 3, generator=generator)
    routing = sort_by_expert(experts, shares, 10)
    for e in range(10):
        rows = routing.rows(e)
        where = (experts == e).any(-1).nonzero().squeeze(-1)
        assert torch.equal(routing.tokens[rows], where), e
        assert torch.equal(routing.shares[rows], shares[where].masked_fill(experts[where] != e, 0.0).sum(-1)), e
    assert routing.rows(4) == slice(routing.first[4], routing.first[4])


class Disturbed:
    """Solves nothing: weights get noise, so that the compressed model drifts. Notes what it is given."""

    def __init__(self, checkpoint: Checkpoint, noise: float) -> None:
        self.checkpoint, self.noise = checkpoint, noise
        self.hessians: dict[str, Hessian] = {}
        self.remarks: dict[str, str] = {}
        self.changed: dict[str, Tensor] = {}
        self.calls: list[int] = []

    def stage(self, names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        assert hessian is not None
        for name in names:
            weight = self.checkpoint.read(f"{name}.weight").float()
            generator = torch.Generator().manual_seed(len(name) + weight.shape[0] + sum(map(ord, name)))
            self.changed[name] = weight + self.noise * torch.randn(weight.shape, generator=generator)
            self.hessians[name], self.remarks[name] = hessian, remark
        return {name: self.changed[name] for name in names}

    def stages(self, inputs: Sequence[StageInput]) -> list[dict[str, Tensor]]:
        self.calls.append(len(inputs))
        return [self.stage(one.names, one.hessian, one.remark) for one in inputs]


@torch.no_grad()
def run(folder: Path, scratch: Path, *, together: int = 1, drift: bool = False) -> tuple[SequentialPipeline, Disturbed, Architecture]:
    checkpoint = open_checkpoint(folder)
    known = architecture(checkpoint.config)
    solver = Disturbed(checkpoint, 0.02)
    pipeline = SequentialPipeline(
        build_meta(checkpoint.config, torch.float32), known, checkpoint, tokens(),
        device=CPU, dtype=torch.float32, scratch=Scratch(scratch, CPU), chunk_tokens=2 * LENGTH, corrects_drift=drift,
        experts_together=together, solve_experts=solver.stages,
    )  # fmt: skip
    for block in known.blocks:
        pipeline.run_block(block, solver.stage)
    return pipeline, solver, known


@pytest.mark.parametrize("drift", [False, True])
def test_batches_of_experts_are_the_same_experts(drift: bool, tmp_path: Path) -> None:
    """If experts that are solved together saw other tokens, a GPU would solve other problems than a CPU."""
    folder = zoo.build("qwen3_moe", tmp_path / "model", **MANY)
    one, alone, _ = run(folder, tmp_path, drift=drift)
    many, together, _ = run(folder, tmp_path, together=5, drift=drift)
    assert max(together.calls) == 5 and set(alone.calls) == {1}
    assert any(alone.remarks.values()), "no expert is poorly fed: the test does not cover their blend"
    assert together.remarks == alone.remarks
    for name, hessian in alone.hessians.items():
        found = together.hessians[name]
        assert torch.equal(found.matrix, hessian.matrix) and found.tokens == hessian.tokens, name
        assert (found.drift is None) == (hessian.drift is None) == (not drift), name
        if found.drift is not None and hessian.drift is not None:
            assert torch.equal(found.drift, hessian.drift), name
    assert torch.equal(one.hidden, many.hidden)


def test_a_batch_holds_no_more_tokens_than_the_scratch(tmp_path: Path) -> None:
    """If a batch were bounded by its number alone, the tokens of popular experts would not fit where `plan` counted them."""
    folder = zoo.build("qwen3_moe", tmp_path / "model", **(MANY | {"num_experts_per_tok": 12}))
    _, solver, known = run(folder, tmp_path, together=24)
    (experts,) = known.blocks[0].experts
    width = known.linears[f"model.layers.0.{experts.last.format(e=0)}"].in_features
    assert SAMPLES * LENGTH * experts.top_k > SAMPLES * LENGTH * (known.hidden_size // width), "all fit into one batch"
    assert 1 < max(solver.calls) < experts.count


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
@torch.no_grad()
def test_drift_of_an_expert_is_that_of_its_tokens(model_type: str, tmp_path: Path) -> None:
    """If x' were of other tokens, or m' of other weights than the expert's own, the target would correct an error that is not there."""
    from transformers import AutoModelForCausalLM

    folder = zoo.build(model_type, tmp_path / "model")
    pipeline, solver, known = run(folder, tmp_path, drift=True)
    original = {name: open_checkpoint(folder).read(f"{name}.weight").double() for name in known.linears}

    def inputs_of_experts(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Per block what the experts are given and which of them, of a model with these weights in place of its own."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for block in known.blocks:
            layer = model.get_submodule(block.prefix)
            if not block.experts:
                for name in block.linears:
                    if name in weights:
                        cast(Any, model.get_submodule(name)).weight.copy_(weights[name])
                continue
            for name in (name for stage in block.parts[0].stages for name in stage):
                if (full := f"{block.prefix}.{name}") in weights:
                    cast(Any, layer.get_submodule(name)).weight.copy_(weights[full])
            (experts,) = block.experts
            module = cast(Any, layer.get_submodule(experts.module))
            for e in range(experts.count):
                gate, up, down = (f"{block.prefix}.{name.format(e=e)}" for name in (*experts.first, experts.last))
                if gate in weights:
                    module.gate_up_proj[e].copy_(torch.cat([weights[gate], weights[up]]))
                    module.down_proj[e].copy_(weights[down])
            module.register_forward_pre_hook(lambda _, args, p=block.prefix: seen.__setitem__(p, (args[0], args[1])))
        hidden = model.model(tokens().ids).last_hidden_state
        assert pipeline.reference is not None
        norm = model.model.norm
        assert torch.allclose(norm(pipeline.hidden if weights else pipeline.reference.hidden), hidden, atol=1e-3)
        return seen

    theirs, ours = inputs_of_experts({}), inputs_of_experts(solver.changed)
    counted = tokens().counted.reshape(-1)
    rerouted = 0
    for block in known.blocks:
        if not block.experts:
            continue
        (experts,) = block.experts
        (x_all, routed), (x_theirs, routed_theirs) = ours[block.prefix], theirs[block.prefix]
        rerouted += int((routed.sort(-1).values != routed_theirs.sort(-1).values).any(-1).sum())
        for e in range(experts.count):
            gate, up, down = (f"{block.prefix}.{name.format(e=e)}" for name in (*experts.first, experts.last))
            rows = (routed == e).any(-1) & counted
            x, other = x_all[rows].double(), x_theirs[rows].double()
            for name in (gate, down):
                assert solver.remarks[name] == "", "a poorly fed expert: its Hessian is blended"
                assert solver.hessians[name].residual is None
            check_drift(solver.hessians[gate], x, other, gate)
            m = silu(linear(x, solver.changed[gate].double())) * linear(x, solver.changed[up].double())
            check_drift(solver.hessians[down], m, silu(linear(other, original[gate])) * linear(other, original[up]), down)
    assert rerouted, "both models send all tokens to the same experts: the test does not cover those that differ"


def check_drift(found: Hessian, x: Tensor, other: Tensor, name: str) -> None:
    """The mean of x (x' - x)ᵀ, float64."""
    assert found.tokens == len(x) and found.drift is not None, name
    expected, gram = x.T @ (other - x) / len(x), x.T @ x / len(x)
    assert (found.matrix.double() - gram).norm() <= 1e-3 * gram.norm(), name
    assert (found.drift.double() - expected).norm() <= 2e-3 * expected.norm() + 1e-4 * gram.norm(), name


def test_drift_correction_lowers_the_error_of_a_mixture(tmp_path: Path) -> None:
    """If experts were corrected towards something else, the recipe that costs more would be worse."""
    text = write_text(tmp_path / "text.txt")
    folder = zoo.build("olmoe", tmp_path / "model")
    for name, share in (("plain", 0.0), ("corrected", 0.5)):
        quantize(folder, tmp_path / name, recipe(text, quantize__drift_correction=share, calibration__samples=32))
    assert divergence(folder, tmp_path / "corrected", text) < divergence(folder, tmp_path / "plain", text)


@torch.no_grad()
def divergence(source: Path, compressed: Path, text: Path) -> float:
    """Mean KL divergence of next tokens on the text."""
    from transformers import AutoTokenizer

    from marlinctl.checkpoint.transformers_model import load_dense

    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"][: 32 * 64]).reshape(32, 64)
    first, second = (load_dense(path, dtype=torch.float32).eval()(ids).logits.log_softmax(-1) for path in (source, compressed))
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_a_run_in_batches_publishes_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a batch mixed up its linears, weights would be published under another name."""
    text = write_text(tmp_path / "text.txt")
    folder = zoo.build("qwen3_moe", tmp_path / "model", **MANY)
    chosen = recipe(text, quantize__overrides={"experts.3.gate_proj": {"group_size": -1}}, quantize__skip=["experts.5.up_proj"])
    quantize(folder, tmp_path / "alone", chosen)
    monkeypatch.setattr(layers, "experts_together", lambda *_: 7)
    report = quantize(folder, tmp_path / "together", chosen)
    with open_checkpoint(tmp_path / "alone") as alone, open_checkpoint(tmp_path / "together") as together:
        assert sorted(alone.tensors) == sorted(together.tensors)
        for name in alone.tensors:
            assert alone.raw(name) == together.raw(name), name
    assert len(report["layers"]) == len({record["name"] for record in report["layers"]})


def test_the_expert_at_fault_is_named() -> None:
    """If the error of one expert named the whole batch, it would not be found."""
    solver = StackedSolver.of(recipe("chat"), corrects_drift=False, bfloat16_exact=False, steps=TORCH)
    quantizer = object.__new__(LayerQuantizer)
    quantizer.processes = ALONE
    good = Hessian(torch.eye(32), 10)
    bad = Hessian(torch.full((32, 32), torch.nan), 10)
    with pytest.raises(NumericalProblem, match="NaN") as raised:
        quantizer._solve(solver, [["experts.0.down"], ["experts.1.down"]], torch.randn(2, 4, 32), None, [good, bad], 32)
    assert "experts.1.down" in str(raised.value.problems) and "experts.0.down" not in str(raised.value.problems)


def test_a_job_without_drift_of_experts_is_not_continued_with_it(tmp_path: Path) -> None:
    """If a job of an earlier version went on, half of the experts would be corrected and half not, and its states would lack a model."""
    text = write_text(tmp_path / "text.txt")
    for model_type, share, expected in (("olmoe", 0.5, "drift correction"), ("olmoe", 0.0, None), ("llama", 0.5, None)):
        folder, out = zoo.build(model_type, tmp_path / f"{model_type} {share}"), tmp_path / f"out {model_type} {share}"
        quantize(folder, out, recipe(text, quantize__drift_correction=share), keep_job=True)
        begun = json.loads((out.with_name(out.name + ".job") / "journal.jsonl").read_text().splitlines()[0])
        assert begun["fingerprint"].get("experts") == expected


@pytest.mark.parametrize("name", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int4-best", "sparse-int4"))])
def test_a_run_with_kernels_in_batches_is_as_good(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the way of a GPU through the experts lost something on the way, its layers would be worse than a CPU's."""
    text = write_text(tmp_path / "text.txt")
    folder = zoo.build("qwen3_moe", tmp_path / "model", **(MANY | {"num_hidden_layers": 1}))
    # Attention stays as it is: codes that differ by rounding there would send tokens to other experts.
    chosen = recipe(text, name, distill__tokens=0, quantize__skip=["self_attn.*"])
    alone = quantize(folder, tmp_path / "alone", chosen)
    kernels = install(monkeypatch, tmp_path / "built").steps()
    monkeypatch.setattr(job, "steps_on", lambda *_: kernels)
    monkeypatch.setattr(layers, "experts_together", lambda *_: 7)
    together = quantize(folder, tmp_path / "together", chosen)
    records = {record["name"]: record for record in together["layers"]}
    for record in alone["layers"]:
        found = records[record["name"]]
        same = ("tokens", "damping", "dead", "fallback", "remark", "pattern", "group_size", "shape")
        assert [found[key] for key in same] == [record[key] for key in same], record["name"]
        if "down" not in record["name"]:  # whose input is what gate and up came to be
            # A handful of tokens leaves a Hessian nearly singular, where pairs of columns gain alike: 5 % between masks of one rounding.
            assert found["error"] == pytest.approx(record["error"], rel=0.15), record["name"]
    assert len(records) == 3 * MANY["num_experts"]
    assert together["error"]["mean"] == pytest.approx(alone["error"]["mean"], rel=0.02)
