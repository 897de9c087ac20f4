"""`--include lm_head` all the way: own heads and tied ones, odd vocabularies, every format; transformers against the dequantized model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlinctl.checkpoint.formats.registry import detect
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.compress import run_compress
from marlinctl.errors import CheckFailed, UsageError
from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear
from marlinctl.models.families import architecture
from marlinctl.oneshot.layers import LayerQuantizer
from marlinctl.oneshot.open import Options
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.planning.layer_rules import plan as rules
from marlinctl.quantize.types import Hessian
from marlinctl.system.console import Console
from marlinctl.verify.inspect import inspect
from marlinctl.verify.run import verify
from tests.runs import plan, quantize, recipe
from tests.tiny import make_tiny, tiny_config, tiny_tensors, write_weights

pytestmark = pytest.mark.filterwarnings("ignore:packed linears on the CPU")

IDS = torch.arange(40).view(2, 20) * 7 % 257
NATIVE = {"marlin": MarlinLinear, "marlin_24": SparseMarlinLinear}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(IDS).logits.double()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def tensor_bytes(folder: Path) -> int:
    with open_checkpoint(folder, weight_files="auto") as checkpoint:
        return sum(info.nbytes for info in checkpoint.tensors.values())


@pytest.mark.parametrize(
    ("tied", "vocabulary", "name", "formats"),
    [
        (False, 288, "int4", ["ct", "gptq", "marlin"]),
        pytest.param(False, 321, "sparse-int4", ["ct", "marlin", "marlin_24"], marks=pytest.mark.slow),
        pytest.param(True, 321, "int4", ["ct", "marlin"], marks=pytest.mark.slow),
        (True, 321, "sparse-int4", ["ct", "marlin_24"]),
    ],
)
def test_the_head_all_the_way(tmp_path: Path, text: Path, tied: bool, vocabulary: int, name: str, formats: list[str]) -> None:
    """If a format, or the padding of a vocabulary that 64 does not divide, lost a row of the head, whole tokens could never be said."""
    source = make_tiny(tmp_path / "model", tie_word_embeddings=tied, vocab_size=vocabulary)
    short = {"quantize__tune_steps": 0, "sparsify__ls_iterations": 4} if name == "sparse-int4" else {}
    chosen = recipe(text, name, quantize__include=["lm_head"], pack__formats=formats, distill__tokens=0, **short)
    run_compress(str(source), tmp_path / "out", chosen, Options(dtype="float32"), Console.quiet(), evaluate_result=False)
    exact = logits(load_dense(tmp_path / "out", dtype=torch.float32))
    assert exact.shape[-1] == vocabulary
    for fmt in formats:
        folder = tmp_path / ("out" if fmt == formats[0] else f"out-{fmt}")
        with open_checkpoint(folder, weight_files="auto") as written, open_checkpoint(source) as original:
            info = detect(written.config, written.tensors)
            assert "lm_head" in info.layers and "lm_head.weight" not in written.tensors
            assert written.config["tie_word_embeddings"] is False
            assert written.raw("model.embed_tokens.weight") == original.raw("model.embed_tokens.weight")
        assert torch.equal(logits(load_dense(folder, dtype=torch.float32)), exact), fmt
        assert verify(folder, source=source, load=None, console=Console.quiet()).source is not None
        assert inspect(folder)["tied_head"] is False
        if fmt == "ct":
            assert written.config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
            theirs = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
            assert distance(theirs, exact) < 1e-3
        elif fmt in NATIVE:
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert isinstance(model.lm_head, NATIVE[fmt])
            assert distance(logits(model), exact) < 3e-2  # a CPU multiplies with activations in bfloat16


def test_a_tied_head_costs_what_plan_says(tmp_path: Path, text: Path) -> None:
    """If the plan left out the copy, or counted the embedding twice, a folder would not fit, or the report would show a wrong ratio."""
    source = make_tiny(tmp_path / "model", tie_word_embeddings=True)
    with_head, without = (recipe(text, quantize__include=names) for names in (["lm_head"], []))
    planned, plain = plan(source, with_head), plan(source, without)
    report = quantize(source, tmp_path / "out", with_head)
    copy = 288 * 128 // 2 + 2 * 288 * 4 + 16  # codes, scales, weight_shape
    weights = [document["outputs"][0]["bytes"]["weights"] for document in (planned, plain)]
    assert weights[0] - weights[1] == copy and weights[0] == tensor_bytes(tmp_path / "out") == report["bytes"]["result"]
    assert report["bytes"]["source"] == planned["model"]["bytes"] == plain["model"]["bytes"] == tensor_bytes(source)
    (note,) = [note for note in planned["notes"] if "tied" in note]
    assert f"{copy / 2**20:.2f} MiB larger" in note and f"in place of {2 * 288 * 128 / 2**20:.2f} MiB" in note
    assert not [note for note in plain["notes"] if "tied" in note]


def test_a_tied_head_that_the_file_holds_besides(tmp_path: Path, text: Path) -> None:
    """Some tools store the one matrix twice. If the copy were solved apart from the other case, equal models would give unequal codes."""
    chosen = recipe(text, quantize__include=["lm_head"])
    found = []
    for twice in (False, True):
        source = make_tiny(tmp_path / f"model{twice}", tie_word_embeddings=True)
        if twice:
            tensors = tiny_tensors(tiny_config(tie_word_embeddings=True))
            write_weights(source, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        quantize(source, tmp_path / f"out{twice}", chosen)
        with open_checkpoint(tmp_path / f"out{twice}") as written:
            found.append({name: bytes(written.raw(name)) for name in written.tensors})
    assert found[0] == found[1]


def test_pruning_a_tied_head(tmp_path: Path, text: Path) -> None:
    """A 16-bit model whose head is 2:4 and whose embedding is not: tied again by a client, one of the two would be lost."""
    source = make_tiny(tmp_path / "model", tie_word_embeddings=True)
    chosen = recipe(text, sparsify__pattern="2:4", quantize__bits=16, quantize__include=["lm_head"])
    assert plan(source, chosen)["outputs"][0]["bytes"]["weights"] - tensor_bytes(source) > 2 * 288 * 128
    quantize(source, tmp_path / "out", chosen)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert head.data_ptr() != embedding.data_ptr()
    assert (head.view(288, -1, 4) != 0).sum(-1).max() == 2 and (embedding != 0).float().mean() > 0.9


def test_verify_compares_the_head_with_the_embedding(tmp_path: Path, text: Path) -> None:
    """If a head that was made of a tied embedding were not compared with it, a permuted one would pass."""
    source = make_tiny(tmp_path / "model", tie_word_embeddings=True)
    quantize(source, tmp_path / "out", recipe(text, quantize__include=["lm_head"]))
    other = make_tiny(tmp_path / "other", tie_word_embeddings=True)
    tensors = tiny_tensors(tiny_config(tie_word_embeddings=True))
    write_weights(other, {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"].roll(7, 1)})
    with pytest.raises(CheckFailed) as refused:
        verify(tmp_path / "out", source=other, load=False, console=Console.quiet())
    assert any("lm_head: ||W - Q|| / ||W||" in problem.what for problem in refused.value.problems)


def test_drift_is_corrected_in_the_head(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads the final norm of both models. If its Hessian held another product, its codes would aim at other logits.

    Reference: the norms' outputs in the source and in the written model, as transformers computes them.
    """
    source = make_tiny(tmp_path / "model")
    seen: dict[str, Any] = {}
    stage, embed = LayerQuantizer.stage, SequentialPipeline._embed

    def noted(self: LayerQuantizer, names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        if names == ("lm_head",):
            assert hessian is not None and hessian.drift is not None
            seen.update(matrix=hessian.matrix.clone(), drift=hessian.drift.clone())
        return stage(self, names, hessian, remark)

    monkeypatch.setattr(LayerQuantizer, "stage", noted)
    monkeypatch.setattr(SequentialPipeline, "_embed", lambda self, ids: (seen.update(ids=ids), embed(self, ids))[1])
    quantize(source, tmp_path / "out", recipe(text, quantize__include=["lm_head"], quantize__drift_correction=0.5))

    def normed(folder: Path) -> Tensor:
        model = load_dense(folder, dtype=torch.float32)
        with torch.no_grad():
            return model.model(seen["ids"]).last_hidden_state.double().flatten(0, 1)

    ours, theirs = normed(tmp_path / "out"), normed(source)
    matrix, drift = ours.T @ ours / len(ours), ours.T @ (theirs - ours) / len(ours)
    assert distance(seen["matrix"].double(), matrix) < 1e-5
    assert distance(seen["drift"].double(), drift) < 1e-3 and drift.norm() > 1e-3 * matrix.norm()


def test_what_has_no_head_is_refused() -> None:
    """If a model without lm_head went on, hours of work would end at a name that nothing has."""
    known = architecture(tiny_config())
    headless = architecture(tiny_config(tie_word_embeddings=True))
    assert headless.untied() == known
    for include, model, said in ((["lm_head"], replace(known, head=None), "no linear that is called lm_head"), (["embed"], known, "embed")):
        with pytest.raises(UsageError, match=said):
            rules(model, group_size=32, skip=(), overrides={}, include=include)


def test_an_embedding_beside_a_packed_head_of_its_own_may_be_large(tmp_path: Path, text: Path) -> None:
    """It stays as it is: to refuse it for what 4 bits cannot hold would refuse the model for nothing. A tied one is the head, and is."""
    config = tiny_config(dtype="float32")
    make_tiny(tmp_path / "model", dtype=torch.float32)
    tensors = tiny_tensors(config, dtype=torch.float32)
    tensors["model.embed_tokens.weight"][-1, 0] = 1e6
    write_weights(tmp_path / "model", tensors)
    report = quantize(tmp_path / "model", tmp_path / "out", recipe(text, quantize__include=["lm_head"]))
    assert "lm_head" in {layer["name"] for layer in report["layers"]}
