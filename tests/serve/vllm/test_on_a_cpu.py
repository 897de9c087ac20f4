"""What `quantize` and `pack` write, in a real vLLM on a CPU, without marlinctl's plugin: `pytest -m slow --vllm PYTHON`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl import api
from marlinctl.quantize.activations import RoundingLinear
from tests import runs, zoo
from tests.serve.vllm.generate import NEW_TOKENS

# Widths that vLLM's kernels for CPUs take.
_WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": _WIDE | {"attention_bias": False, "mlp_bias": False},
    "llava": {"text_config": {"model_type": "llama", **zoo._TEXT, **_WIDE}},
    "qwen3_moe": _WIDE | {"moe_intermediate_size": 256, "num_experts": 8, "mlp_only_layers": []},
}
PROMPTS = [[(7 * i + 3 * j) % 250 + 3 for j in range(8 + i)] for i in range(6)]
LARGEST_GAP = 1e-2  # of a token that is not the most likely one: products of float16, with logits of two units

# torchvision of PyPI belongs to torch for CUDA. With torch for CPUs it cannot declare its operators, and cannot be imported then. vLLM's
# models for images import it; without an image nothing of it is called.
DECLARED = """
import torch
try:
    import torchvision
except ImportError:
    pass
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture(scope="module")
def vllm(request: pytest.FixtureRequest) -> str:
    python: str | None = request.config.getoption("--vllm")
    if python is None:
        pytest.skip("needs vLLM for CPUs: pytest --vllm PYTHON (CONTRIBUTING.md)")
    return python


def experts_in_four_bits() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())  # what vLLM asks before it takes them


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fmt", ["ct", "gptq"])
@pytest.mark.parametrize("model_type", [*MODELS, "qwen3_moe, experts"])
def test_vllm_generates_what_transformers_would(model_type: str, fmt: str, vllm: str, tmp_path: Path) -> None:
    """If names, `ignore`, shards of fused linears or zero points were not what vLLM expects, people would serve a model of noise.

    vLLM 0.32 multiplies experts of 4 bits on a CPU with AMX alone; elsewhere the mixture keeps its experts at 16 bits.
    """
    kind, _, experts = model_type.partition(", ")
    if experts and not experts_in_four_bits():
        pytest.skip("vLLM has no 4-bit experts on a CPU without AMX")
    source, out, packed = (tmp_path / name for name in ("model", "out", "packed"))
    zoo.build(kind, source, dtype=torch.bfloat16, **MODELS[kind])
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    skip = ["re:.*experts.*"] if kind == "qwen3_moe" and not experts else []
    runs.quantize(source, out, runs.recipe(text, "quick", quantize__group_size=64, quantize__skip=skip, calibration__samples=64))
    if fmt != "ct":
        api.pack(out, packed, format=fmt)
    served = out if fmt == "ct" else packed

    gaps = gaps_of(api.load(served), generated(served, vllm, tmp_path))
    assert max(gaps) < LARGEST_GAP and sum(gap == 0 for gap in gaps) >= 0.95 * len(gaps), sorted(gaps)[-8:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("rest", ["4 bits", "none"])
def test_vllm_rounds_activations_as_eval_does(activations: str, rest: str, vllm: str, tmp_path: Path) -> None:
    """If formats of single groups were not what vLLM expects, it would take packed words for int8 weights; if it rounded otherwise than our
    model, a KL that was measured here would be that of another one.

    A last bit of float16 moves a code that lies on a tie, so more tokens than elsewhere are the second most likely one: 14 % with FP8
    throughout, half as far from the most likely one as for the model without rounding. The steps of int8 are too small for so small a
    model to tell the two apart.
    """
    source, out, text = tmp_path / "model", tmp_path / "out", tmp_path / "t.txt"
    zoo.build("llama", source, dtype=torch.bfloat16, **MODELS["llama"])
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    rule = {"bits": 8, "activations": activations}
    overrides = {"*": rule} if rest == "none" else {"down_proj": rule, "re:(q|k|v)_proj$": rule}
    chosen = runs.recipe(text, "quick", quantize__group_size=64, quantize__overrides=overrides, calibration__samples=64)
    runs.quantize(source, out, chosen)
    answers, model = generated(out, vllm, tmp_path), api.load(out)
    gaps = gaps_of(model, answers)
    assert max(gaps) < 1 and sum(gap == 0 for gap in gaps) >= 0.8 * len(gaps), sorted(gaps)[-8:]
    for path, module in list(model.named_modules()):
        if isinstance(module, RoundingLinear):
            exact = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            exact.weight = module.weight
            model.set_submodule(path, exact)
    told_apart = rest == "none" and activations == "fp8"
    assert not told_apart or sum(gaps) < sum(gaps_of(model, answers)), "the model without rounding is another one"


def generated(served: Path, vllm: str, tmp_path: Path) -> list[list[int]]:
    """The tokens that vLLM generates after each prompt."""
    asked, answered = tmp_path / "prompts.json", tmp_path / "answers.json"
    asked.write_text(json.dumps(PROMPTS))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DECLARED)
    script = Path(__file__).with_name("generate.py")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [vllm, str(script), str(served), str(asked), str(answered)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: list[list[int]] = json.loads(answered.read_text())
    assert len(answers) == len(PROMPTS) and all(len(answer) == NEW_TOKENS for answer in answers)
    return answers


def gaps_of(model: Any, answers: list[list[int]]) -> list[float]:
    """How much less likely than the most likely one each token is, in logits of `model`."""
    gaps: list[float] = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].float()[len(prompt) - 1 : -1]
        gaps += (logits.amax(1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).tolist()
    return gaps
