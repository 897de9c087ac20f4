"""Native folders through AutoModelForCausalLM.from_pretrained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import marlinctl
from marlinctl.benchmarking.generation import load_packed, unpack_linears
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.errors import BadInput
from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear
from tests import forked, runs
from tests.packed import by_reference, edit_json, edit_tensors, make_packed, make_sparse_packed, remake_manifest
from tests.test_architecture import ROOT
from tests.tiny import VOCAB_SIZE, make_tiny
from tests.zoo import build

pytestmark = pytest.mark.filterwarnings("ignore:packed tensors on the CPU")

assert marlinctl.__version__, "importing marlinctl is what registers"
MAKE: dict[str, Callable[..., object]] = {"marlin": make_packed, "marlin_24": make_sparse_packed}
KIND: dict[str, type[torch.nn.Module]] = {"marlin": MarlinLinear, "marlin_24": SparseMarlinLinear}
IDS = torch.arange(40).view(2, 20) * 7 % VOCAB_SIZE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "source")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_model_computes_what_the_interchange_form_does(source: Path, tmp_path: Path, fmt: str, group_size: int) -> None:
    """If this failed, a served model would not be the one that was evaluated."""
    MAKE[fmt](source, tmp_path / "native", fmt, group_size=group_size)
    MAKE[fmt](source, tmp_path / "ct", "ct", group_size=group_size)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    packed = [module for module in model.modules() if isinstance(module, KIND[fmt])]
    assert len(packed) == 14 and not model.training
    assert not any(isinstance(m, torch.nn.Linear) for name, m in model.named_modules() if name != "lm_head")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    exact = logits(load_dense(tmp_path / "native", dtype=torch.float32))
    assert distance(logits(model), exact) < 1e-2, "products in bfloat16, as torch's operator makes them"
    assert all(module.B is None if fmt == "marlin" else module.B_24 is None for module in packed), "tiles are kept beside it"
    ours = distance(logits(by_reference(model)), exact)
    assert ours < 3e-3
    assert ours < 2 * distance(logits(theirs), exact), "further from the exact model than transformers itself in 16 bits"


def test_bfloat16(source: Path, tmp_path: Path) -> None:
    """If this failed, models made in bfloat16 would not load, or their scales would be rounded to it."""
    make_packed(source, tmp_path / "native", "marlin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith(".s")} == {torch.float16}
    assert distance(logits(model), logits(load_dense(tmp_path / "native", dtype=torch.float32))) < 3e-2


@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
@pytest.mark.parametrize("rows", [1, 80], ids=["a token", "a prompt"])
def test_on_a_cpu_it_is_as_near_as_bfloat16(source: Path, tmp_path: Path, fmt: str, rows: int) -> None:
    """If this failed, the fast way on a CPU would be another model than its own weights in bfloat16 are, for few or for many rows."""
    MAKE[fmt](source, tmp_path / "native", fmt, group_size=64)
    ids = torch.arange(rows)[None] * 7 % VOCAB_SIZE
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.bfloat16)
    with torch.no_grad():
        exact = load_dense(tmp_path / "native", dtype=torch.float32)(ids).logits.double()
        ours = distance(packed(ids).logits.double(), exact)
        assert unpack_linears(packed, torch.bfloat16) == 14
        theirs = distance(packed(ids).logits.double(), exact)
    assert 0 < ours < 1.5 * theirs


def test_biases_overrides_and_a_skipped_linear(tmp_path: Path) -> None:
    """If this failed, models with biases, several group sizes or linears left in 16 bits would load wrongly."""
    source = build("llama", tmp_path / "llama", dtype=torch.float16)
    skip, other = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    make_packed(source, tmp_path / "native", "marlin", group_size=32, overrides={other: 64}, skip=[skip])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert isinstance(model.get_submodule(skip), torch.nn.Linear)
    assert model.get_submodule(other).group_size == 64
    assert model.get_submodule(other).bias is not None
    assert distance(logits(by_reference(model)), logits(load_dense(tmp_path / "native", dtype=torch.float32))) < 5e-3


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "phi3"])
def test_other_architectures(tmp_path: Path, model_type: str) -> None:
    """If this failed, tied heads, other names or fused projections would not load."""
    source = build(model_type, tmp_path / "source", dtype=torch.bfloat16)
    make_packed(source, tmp_path / "native", "marlin", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert distance(logits(model), logits(load_dense(tmp_path / "native", dtype=torch.float32))) < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3", "lfm3"])
def test_names_that_transformers_renames_are_found(tmp_path: Path, model_type: str) -> None:
    """The folder has the names of the checkpoint; if a linear were looked for under those, it would be called missing."""
    from marlinctl.convert.repack import repack
    from marlinctl.models.transformers_config import client_class

    folder = build(model_type, tmp_path / "model", dtype=torch.bfloat16)
    runs.quantize(folder, tmp_path / "ct", runs.recipe(runs.write_text(tmp_path / "text.txt")))
    repack(tmp_path / "ct", tmp_path / "marlin", format="marlin")
    kind = client_class(AutoConfig.from_pretrained(tmp_path / "marlin"))
    model = kind.from_pretrained(tmp_path / "marlin", dtype=torch.bfloat16)
    assert sum(isinstance(module, MarlinLinear) for module in model.modules()) >= 14
    ids = torch.arange(3, 20).view(1, -1)
    with torch.no_grad():
        ours, dense = (one(input_ids=ids).logits.float() for one in (model, load_dense(tmp_path / "ct", dtype=torch.bfloat16)))
    assert (ours - dense).norm() < 0.03 * dense.norm()


def test_generation(source: Path, tmp_path: Path) -> None:
    """If this failed, one token at a time would go another way than a prompt."""
    make_packed(source, tmp_path / "native", "marlin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    out = model.generate(IDS[:1, :5], attention_mask=torch.ones(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    whole = model(out[:, :-1]).logits[0, 4:].argmax(-1)
    assert torch.equal(out[0, 5:], whole)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
def test_on_a_gpu(source: Path, tmp_path: Path, fmt: str) -> None:
    """If this failed, tensors would be left on the CPU, or the kernels would compute another model than the reference."""
    MAKE[fmt](source, tmp_path / "native", fmt)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native", device_map="cuda")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        found = model(IDS.cuda()).logits.double().cpu()
    assert distance(found, logits(load_dense(tmp_path / "native", dtype=torch.float32))) < 3e-3


# What must not load


def shorten(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.B"] = tensors["model.layers.0.mlp.up_proj.B"][:, :-128].clone()


def widen(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.s"] = tensors["model.layers.0.mlp.up_proj.s"].float()


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight_shape"] = torch.tensor([128, 256])


DAMAGES: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda t: t.pop("model.layers.1.self_attn.q_proj.s"), "the model needs model.layers.1.self_attn.q_proj.s, which the checkpoint lacks"),
    (lambda t: t.pop("model.layers.1.input_layernorm.weight"), "the model needs model.layers.1.input_layernorm.weight"),
    (lambda t: t.pop("lm_head.weight"), "the model needs lm_head.weight, which the checkpoint lacks"),
    (lambda t: [t.pop(name) for name in list(t) if ".1.mlp.up_proj." in name], "the model needs model.layers.1.mlp.up_proj.weight"),
    (lambda t: t.update({"model.extra": torch.zeros(1)}), "the model has no place for the checkpoint's model.extra"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(8, 128).half()}), "lm_head.weight is [8, 128] in the folder and [288, 128]"),
    (shorten, "model.layers.0.mlp.up_proj.B is I32 [8, 384], expected I32 [8, 512]"),
    (widen, "model.layers.0.mlp.up_proj.s is F32 [4, 256], expected F16 [4, 256]"),
    (reshape, "model.layers.1.mlp.up_proj is [128, 256] in the folder and [256, 128] in the model"),
    (lambda t: t.update({"model.other.B": torch.zeros(8, 512).int(), "model.other.weight_shape": torch.tensor([256, 128])}),
     "the model has no linear model.other, which the folder has packed"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "what"), DAMAGES, ids=[what for _, what in DAMAGES])
def test_a_damaged_folder_does_not_load(source: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], Any], what: str) -> None:
    """If this failed, transformers would fill what is missing with random numbers and continue."""
    make_packed(source, tmp_path / "native", "marlin")
    edit_tensors(tmp_path / "native", damage)
    with pytest.raises(BadInput) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert caught.value.error_id == "E302"
    assert any(what in problem.what for problem in caught.value.problems), caught.value.problems


UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Path:
    """One quad of a 2:4 linear names its second survivor first; shapes, dtypes and every other number are right."""
    make_sparse_packed(source, tmp_path / "native", "marlin_24")
    edit_tensors(tmp_path / "native", lambda tensors: tensors[f"{UP}.B_meta"].view(-1)[700:701].fill_(0x4144))
    remake_manifest(tmp_path / "native")
    return tmp_path / "native"


@pytest.mark.parametrize(
    "load",
    [
        AutoModelForCausalLM.from_pretrained,
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"}),
        lambda folder: load_packed(folder, torch.device("cpu"), torch.float16),
    ],
    ids=["from_pretrained", "device_map", "bench --model"],
)
def test_no_kernel_ever_sees_damaged_metadata(damaged: Path, load: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a GPU would compute with metadata that it has no meaning for, and say nothing."""
    monkeypatch.setattr(SparseMarlinLinear, "forward", lambda *_: pytest.fail("a packed linear was multiplied with"))
    with pytest.raises(BadInput) as caught:
        load(damaged)
    assert caught.value.error_id == "E346"
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"{UP}.B_meta: metadata of row 121, columns ") and "is 0x1," in problem.what
    assert problem.where == str(damaged / "marlin-00001-of-00001.safetensors") and problem.fix
    with pytest.raises(BadInput, match=re.escape(problem.what.partition(": ")[2])):  # verify reads it so
        load_dense(damaged, dtype=torch.float32)


def test_offloaded_metadata_are_looked_at_too(source: Path, damaged: Path, tmp_path: Path) -> None:
    """If what lies on the disk were passed over, kernels would see it later; if tensors without memory were asked, nothing would load."""
    places = {"model.layers.0": "disk", "model.layers.1": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where = {"device_map": {**places, "model.rotary_emb": "cpu"}, "offload_folder": tmp_path / "offloaded", "offload_buffers": True}
    with pytest.raises(BadInput, match=f"{UP}.B_meta: metadata of row 121"):
        AutoModelForCausalLM.from_pretrained(damaged, **where)
    make_packed(source, tmp_path / "dense", "marlin")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **where).get_submodule(UP).B.is_meta
    make_sparse_packed(source, tmp_path / "sound", "marlin_24")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sound", **where)
    assert model.get_submodule(UP).B_meta.is_meta
    assert torch.equal(logits(model), logits(by_reference(AutoModelForCausalLM.from_pretrained(tmp_path / "sound"))))
    assert model.get_submodule(UP).B_meta.is_meta, "what comes from the disk for a call stays in memory"


def test_experts_that_are_fused_are_refused(tmp_path: Path) -> None:
    """If this failed, a mixture of experts would load with random experts."""
    source = build("mixtral", tmp_path / "mixtral", dtype=torch.float16)
    make_packed(source, tmp_path / "native", "marlin", group_size=32)
    with pytest.raises(BadInput, match="the model has no linear") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert "--format ct" in caught.value.problems[0].fix


def test_float32_is_refused(source: Path, tmp_path: Path) -> None:
    """If this failed, the first forward pass would stop in the operator."""
    make_packed(source, tmp_path / "native", "marlin")
    with pytest.raises(BadInput, match=r"float16 or bfloat16, not in torch\.float32") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert caught.value.error_id == "E313"


def test_a_newer_folder_is_refused(source: Path, tmp_path: Path) -> None:
    """If this failed, a layout of the future would be read as today's."""
    make_packed(source, tmp_path / "native", "marlin")
    edit_json(tmp_path / "native" / "config.json", lambda config: config["quantization_config"].update(format_version=3))
    with pytest.raises(BadInput, match="format_version 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "native")


def test_it_is_not_saved_as_something_else(source: Path, tmp_path: Path) -> None:
    """If this failed, save_pretrained would write a folder that plain transformers loads at random."""
    make_packed(source, tmp_path / "native", "marlin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert not hasattr(model.config, "transformers_weights")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


# When it is registered


PLAIN = """
        from transformers import AutoModelForCausalLM
        for folder in sys.argv[1:]:
            try:
                AutoModelForCausalLM.from_pretrained(folder)
            except OSError as error:
                print(error)
        assert "marlinctl" not in sys.modules
"""


@pytest.mark.parametrize("first", [pytest.param("", id="marlinctl", marks=pytest.mark.slow), pytest.param(PLAIN, id="transformers")])
def test_importing_marlinctl_is_enough(source: Path, tmp_path: Path, first: str) -> None:
    """If this failed, whether a folder loads would depend on the order of imports.

    Without marlinctl nothing may load: transformers only warns about an unknown quant_method and fills the layers with random numbers;
    without a model file it stops.
    """
    folders = [str(tmp_path / name) for name in ("native", "native_24")]
    make_packed(source, tmp_path / "native", "marlin")
    make_sparse_packed(source, tmp_path / "native_24", "marlin_24")
    for folder in folders:
        assert json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["format_version"] == 1
    program = f"""
        import sys
        {first}
        import marlinctl
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "native")!r})
        print(type(model.model.layers[0].mlp.up_proj).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *refused, loaded = done.stdout.splitlines()
    assert loaded == "MarlinLinear"
    said = "\n".join(refused)
    assert not first or (said.count("model.safetensors") >= 2 and all(folder in said for folder in folders))


def test_importing_marlinctl_imports_nothing_heavy() -> None:
    """If this failed, every `marlinctl --help` would wait for torch."""
    program = "import sys, marlinctl; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_the_example_of_the_page(source: Path, tmp_path: Path) -> None:
    """If this failed, what docs/serve.md tells people to run would not run."""
    make_packed(source, tmp_path / "my-model-marlin", "marlin")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "serve.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    loading, fusing, operators = blocks
    for program in (loading + fusing, operators):
        done = forked.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip()
    assert json.loads((tmp_path / "my-model-marlin" / "config.json").read_text())["quantization_config"]["quant_method"] == "marlinctl"
