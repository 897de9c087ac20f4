from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import LinearParts
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.errors import BadInput, CheckFailed, MarlinctlError
from marlinctl.system.console import Console
from marlinctl.verify import run as module
from marlinctl.verify.run import verify
from tests import zoo
from tests.packed import edit_json, edit_masks, edit_tensors, make_packed, make_sparse_packed, remake_manifest
from tests.tiny import make_tiny

LAYER = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("verify") / "source")


@pytest.fixture(scope="module")
def good(source: Path) -> dict[str, Path]:
    folders = {fmt: source.parent / fmt for fmt in ("ct", "gptq", "marlin", "marlin_24", "sparse-ct")}
    for name, folder in folders.items():
        make = make_sparse_packed if name in ("marlin_24", "sparse-ct") else make_packed
        fmt = name.removeprefix("sparse-")
        make(source, folder, fmt, skip=["model.layers.0.self_attn.o_proj"], overrides={"model.layers.1.mlp.down_proj": 64})
    return folders


@pytest.fixture
def copy(good: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(fmt: str) -> Path:
        return Path(shutil.copytree(good[fmt], tmp_path / fmt))

    return make


def failure(folder: Path, *, source: Path | None = None, load: bool | None = False) -> MarlinctlError:
    with pytest.raises((CheckFailed, BadInput)) as caught:
        verify(folder, source=source, load=load, console=Console.quiet())
    return caught.value


# ---- good folders --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["ct", "gptq", "marlin"])
def test_a_good_folder_passes(good: dict[str, Path], source: Path, fmt: str) -> None:
    """A check that fails on good folders is switched off, and then finds nothing."""
    checked = verify(good[fmt], source=source, load=None, console=Console.quiet())
    assert (checked.format, checked.linears) == (fmt, 13)
    assert checked.source is not None and 0.05 < checked.source["median_error"] < 0.15 and checked.source["converted"] == []
    if fmt == "ct":
        assert checked.logit_error is not None and checked.logit_error <= 1e-3 and checked.skipped == ()
    else:
        assert checked.logit_error is None and "not loaded with transformers" in checked.skipped[0]
    json.dumps(checked.document())


def test_a_tensor_of_64_bits_that_was_carried_along_passes(copy: Callable[[str], Path]) -> None:
    """`quantize` takes such a model; if `verify` did not, every result of it would be called damaged."""
    folder = copy("ct")
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].double()}))
    remake_manifest(folder)
    assert verify(folder, source=None, load=False, console=Console.quiet()).linears == 13


def test_what_was_not_loaded_is_said(good: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence would read as success."""
    assert "--no-load" in verify(good["ct"], source=None, load=False, console=Console.quiet()).skipped[0]
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    assert "GiB of memory" in verify(good["ct"], source=None, load=None, console=Console.quiet()).skipped[0]
    assert verify(good["ct"], source=None, load=True, console=Console.quiet()).skipped == ()


def test_available_memory_is_a_plausible_number() -> None:
    """Zero would skip every load check, a wrong unit would swap the machine to death."""
    assert 1 << 26 < module.available_memory() <= 1 << 62


@pytest.mark.parametrize(("name", "origin"), [("marlin_24", "metadata"), ("sparse-ct", "mask file")])
def test_a_good_sparse_folder_passes(good: dict[str, Path], source: Path, name: str, origin: str) -> None:
    """Half of the weights are pruned on purpose: compared with the original, only kept weights may count."""
    checked = verify(good[name], source=source, load=None, console=Console.quiet())
    assert checked.pattern is not None and (checked.pattern["origin"], checked.pattern["linears"]) == (origin, 13)
    assert checked.pattern["zero_kept"] > 100
    assert checked.source is not None and 0.05 < checked.source["median_error"] < 0.15
    assert checked.document()["pattern"] == checked.pattern
    assert (checked.logit_error is None) is (name == "marlin_24")


@pytest.mark.parametrize("name", ["marlin", "marlin_24"])
def test_tiles_are_read_as_a_kernel_reads_them(good: dict[str, Path], name: str) -> None:
    """If no check ever multiplied with the tiles, packing and unpacking could be wrong in the same way, and all models garbage on a GPU."""
    checked = verify(good[name], source=None, load=False, console=Console.quiet()).kernels
    assert checked is not None and checked.by == "emulator" and checked.linears == 13
    assert 13 <= checked.blocks < checked.of_blocks
    assert 0.0 < checked.error < 1e-6
    unread = verify(good[name], source=None, load=False, kernels=False, console=Console.quiet())
    assert unread.kernels is None and any("--no-kernels" in line for line in unread.skipped)


def test_groups_that_no_kernel_multiplies_are_told(source: Path, tmp_path: Path) -> None:
    """If they were passed over in silence, the user would learn it when the model is served."""
    make_sparse_packed(source, tmp_path / "out", "marlin_24", group_size=16)
    checked = verify(tmp_path / "out", source=None, load=False, console=Console.quiet())
    assert checked.kernels is not None and (checked.kernels.linears, len(checked.kernels.unread)) == (0, 14)
    assert any("14 linears have groups that no kernel multiplies" in line for line in checked.skipped)


@pytest.mark.parametrize(
    ("name", "tensor"), [("marlin", "B"), ("marlin", "s"), ("marlin_24", "B_24"), ("marlin_24", "B_meta"), ("marlin_24", "s")]
)
def test_tiles_in_another_order_are_found_by_their_products(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, tensor: str
) -> None:
    """If packer and unpacker agreed on a wrong order, comparing bytes would find nothing; only a kernel's eyes do."""
    folder = copy(name)
    with open_checkpoint(folder, weight_files="auto") as checkpoint:
        right = registry.read_parts(checkpoint, registry.detect(checkpoint.config, checkpoint.tensors), LAYER)
    edit_tensors(folder, lambda tensors: tensors.update({f"{LAYER}.{tensor}": tensors[f"{LAYER}.{tensor}"].roll(1, dims=1)}))
    remake_manifest(folder)
    read = registry.read_parts
    monkeypatch.setattr(module, "check_linears", lambda *_: module.Linears((), (), 0, ()))
    monkeypatch.setattr(registry, "read_parts", lambda c, i, layer, m=None: right if layer == LAYER else read(c, i, layer, m))
    caught = failure(folder)
    assert caught.error_id == "E113" and len(caught.problems) == 1 and LAYER in caught.problems[0].what


def test_a_dense_sparse_folder_passes(good: dict[str, Path], tmp_path: Path) -> None:
    """16-bit 2:4 folders are what `sparsify` writes and what fine-tuning starts from."""
    from marlinctl.convert.repack import repack

    repack(good["marlin_24"], tmp_path / "out", format="dense")
    checked = verify(tmp_path / "out", source=None, load=False, console=Console.quiet())
    assert (checked.format, checked.linears) == ("dense", 0) and checked.pattern is not None and checked.pattern["linears"] == 13
    edit_tensors(tmp_path / "out", lambda tensors: tensors[f"{LAYER}.weight"].fill_(1))
    remake_manifest(tmp_path / "out")
    problem = failure(tmp_path / "out")
    assert problem.error_id == "E106" and LAYER in problem.problems[0].what


# ---- damage (that of tests/faults/packed.py apart, which is asked of the command) ----------------------------------------------------


def test_padding_must_be_zero(tmp_path: Path) -> None:
    """Kernels multiply the padding; anything but code 0 there may end up in real outputs."""
    folder = make_tiny(tmp_path / "s", hidden_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=12, intermediate_size=80)
    make_packed(folder, tmp_path / "out", "marlin", group_size=16)
    verify(tmp_path / "out", source=folder, load=False, console=Console.quiet())

    def dirty(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.B"][-1, -1] += 1

    edit_tensors(tmp_path / "out", dirty)
    remake_manifest(tmp_path / "out")
    problem = failure(tmp_path / "out")
    assert problem.error_id == "E106" and "padding" in problem.problems[0].what


def test_sparse_padding_must_be_zero(tmp_path: Path) -> None:
    """Kernels read the padding of 2:4 tiles too: codes that are not 0, and metadata that is not what the packer writes."""
    folder = make_tiny(tmp_path / "s", hidden_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=12, intermediate_size=80)
    make_sparse_packed(folder, tmp_path / "out", "marlin_24", group_size=16)
    verify(tmp_path / "out", source=folder, load=False, console=Console.quiet())
    name = "model.layers.0.self_attn.q_proj"
    for suffix, bit in (("B_24", 1 << 28), ("B_meta", 1 << 3)):
        bad = Path(shutil.copytree(tmp_path / "out", tmp_path / suffix))

        def dirty(tensors: dict[str, Tensor], suffix: str = suffix, bit: int = bit) -> None:
            tensors[f"{name}.{suffix}"][-1, -1] ^= bit

        edit_tensors(bad, dirty)
        remake_manifest(bad)
        problem = failure(bad)
        assert problem.error_id == "E106" and f"{name}.{suffix} is not what packing" in problem.problems[0].what


@pytest.mark.parametrize(
    ("change", "error_id", "says"),
    [
        (lambda masks: masks.update({f"{LAYER}.keep": masks[f"{LAYER}.keep"].flip(0)}), "E106", f"{LAYER}: row 0, column"),
        (lambda masks: masks.update({f"{LAYER}.keep": masks[f"{LAYER}.keep"][:8].contiguous()}), "E106", f"the mask of {LAYER} is U8"),
        (lambda masks: masks[f"{LAYER}.keep"].fill_(0x77), "E106", "is not 2:4"),
        (lambda masks: masks.update({"model.layers.5.mlp.up_proj.keep": masks[f"{LAYER}.keep"].clone()}), "E105", "no such linear"),
    ],
)
def test_masks_are_compared_with_weights(copy: Callable[[str], Path], change: Callable[[Any], Any], error_id: str, says: str) -> None:
    """A mask that lies makes the next packing drop weights; no client would notice, because none reads the file."""
    folder = copy("sparse-ct")
    edit_masks(folder, change)
    assert failure(folder).error_id == "E101"
    remake_manifest(folder)
    problem = failure(folder)
    assert problem.error_id == error_id and says in problem.problems[0].what and problem.exit_code == 1


def test_a_mask_beside_metadata_is_noticed(good: dict[str, Path], copy: Callable[[str], Path]) -> None:
    """Two statements about one linear could differ; nobody could say which is true."""
    folder = copy("marlin_24")
    shutil.copy(good["sparse-ct"] / "marlinctl_mask.safetensors", folder)
    remake_manifest(folder)
    problem = failure(folder)
    assert problem.error_id == "E105" and "has a mask beside its metadata" in str(problem) and len(problem.problems) == 13


def test_logits_are_compared_and_not_only_loaded(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading without an error proves nothing: transformers loads garbage happily when a field is missing."""
    folder = copy("ct")
    edit_json(folder / "config.json", lambda config: config["quantization_config"].pop("quantization_status"))
    remake_manifest(folder)
    monkeypatch.setattr(module, "_config_problems", lambda checkpoint, info: [])  # only the logits are left to notice
    problem = failure(folder, load=True)
    assert problem.error_id == "E108" and any(f"misses {LAYER}.weight " in p.what for p in problem.problems)


def test_weights_must_agree(good: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may find all its tensors and still read them otherwise; here ours is the one that reads them otherwise."""
    real = LinearParts.weight
    monkeypatch.setattr(LinearParts, "weight", lambda parts: real(parts) * 1.01)
    monkeypatch.setattr(module, "check_linears", lambda *_: module.Linears((), (), 0, ()))
    problem = failure(good["ct"], load=True)
    assert problem.error_id == "E108" and len(problem.problems) == 13
    assert any(f"another {LAYER}.weight than" in each.what for each in problem.problems)


def test_logits_must_agree(good: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with the right weights may still compute something else with them, as one that quantizes activations does."""
    load = AutoModelForCausalLM.from_pretrained

    def client(folder: Path, **options: Any) -> Any:
        model, info = load(folder, **options)
        model.lm_head.register_forward_hook(lambda head, given, out: out * 1.01)
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", client)
    problem = failure(good["ct"], load=True)
    assert problem.error_id == "E108" and "relative error 1.00e-02" in problem.problems[0].what


# ---- mixtures of experts: transformers rounds their weights, and a last bit may send a token to another expert --------------------------


def mixture(folder: Path, layers: int, experts: int, chosen: int, **packing: Any) -> Path:
    """A packed Qwen3-MoE of 16-bit scales, random and sound."""
    changes: dict[str, Any] = {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": chosen, "mlp_only_layers": []}
    zoo.build("qwen3_moe", folder / "source", **changes)
    make_packed(folder / "source", folder / "ct", **packing)
    return folder / "ct"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("mixture"), 2, 6, 2)


def probes(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (60, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("layers", "experts", "chosen"),
    [(8, 16, 2), pytest.param(6, 64, 8, marks=pytest.mark.slow), pytest.param(16, 64, 8, marks=pytest.mark.slow)],
)
def test_a_sound_mixture_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, experts: int, chosen: int) -> None:
    """A tenth of such texts and more were called garbage, which kept a sound model from being published at the end of all the work."""
    monkeypatch.setattr(module, "_probe", probes)
    folder = mixture(tmp_path, layers, experts, chosen)
    checked = verify(folder, source=None, load=True, console=Console.quiet())
    assert checked.logit_error is not None and checked.logit_error < 1e-6


def _last_bit_of_a_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.weight_scale"].view(torch.int16)[5, 0] += 1


def _one_code(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.weight_packed"][7, 2] ^= 1 << 8


def _two_experts(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        other = name.replace("experts.3", "experts.4")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _one_linear(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.weight_scale"][0, 1] *= 2


EXPERT = "model.layers.1.mlp.experts.3.down_proj"
HELD = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_last_bit_of_a_scale, [f"{HELD}[3]"]),
        (_one_code, [f"{HELD}[3]"]),
        (_two_experts, [f"{HELD}[3]", f"{HELD}[4]"]),
        (_one_linear, ["model.layers.0.self_attn.o_proj.weight"]),
    ],
)
def test_whatever_a_client_reads_otherwise_is_named(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], None], named: list[str]
) -> None:
    """If rounding were allowed by a tolerance, a wrong expert would hide in it: one that no token of the probe chooses changes no logit."""
    wrong = Path(shutil.copytree(moe, tmp_path / "wrong"))
    edit_tensors(wrong, change)
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda folder, **options: load(wrong, **options))
    problem = failure(moe, load=True)
    assert problem.error_id == "E108"
    assert [each.what for each in problem.problems] == [f"transformers holds another {name} than the dequantized one" for name in named]


@pytest.mark.parametrize(
    ("packing", "loads"),
    [
        ({"overrides": {f"model.layers.{i}.self_attn.o_proj": 64 for i in range(2)}}, True),
        ({"skip": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]}, True),
        ({"overrides": {"model.layers.0.mlp.experts.1.up_proj": -1}}, True),
        ({"overrides": {"model.layers.0.mlp.experts.1.up_proj": 32}, "group_size": 16}, False),
        ({"skip": ["model.layers.0.mlp.experts.1.down_proj"]}, False),
        ({"skip": [f"model.layers.0.mlp.experts.{e}.{name}_proj" for e in range(4) for name in ("gate", "up", "down")]}, False),
    ],
)
def test_it_is_known_beforehand_what_transformers_refuses(tmp_path: Path, packing: dict[str, Any], loads: bool) -> None:
    """If card and plan promised a folder that transformers refuses, the run would find it out after the work, and publish nothing."""
    folder = mixture(tmp_path, 2, 4, 2, **packing)
    if loads:
        assert verify(folder, source=None, load=True, console=Console.quiet()).logit_error == 0.0
        assert verify(folder, source=None, load=None, console=Console.quiet()).skipped == ()
    else:
        assert failure(folder, load=True).error_id == "E108"
        (skipped,) = verify(folder, source=None, load=None, console=Console.quiet()).skipped
        assert skipped.startswith("not loaded with transformers, which refuses it: model.layers.0.mlp.experts.")


def test_a_folder_that_transformers_refuses_is_a_failure(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of another library must become three lines that a person understands."""
    import transformers

    def stop(*_: object, **__: object) -> None:
        raise ValueError("what another library says")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    problem = failure(copy("ct"), load=True)
    assert problem.error_id == "E108" and "what another library says" in str(problem) and problem.exit_code == 1


def test_an_altered_norm_is_noticed_with_the_source(copy: Callable[[str], Path], source: Path) -> None:
    """What was not quantized must be the source's bytes; another dtype is told and allowed."""
    folder = copy("marlin")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()

    edit_tensors(folder, change)
    remake_manifest(folder)
    problem = failure(folder, source=source)
    assert problem.error_id == "E107" and [p.what.split()[0] for p in problem.problems] == ["model.norm.weight"]


def test_another_model_as_source_is_noticed(good: dict[str, Path], tmp_path: Path) -> None:
    """Comparing with the wrong original must not end in a table of numbers."""
    other = make_tiny(tmp_path / "other", seed=5)
    assert failure(good["ct"], source=other).error_id == "E107"
    smaller = make_tiny(tmp_path / "smaller", num_hidden_layers=1)
    problem = failure(good["ct"], source=smaller)
    assert problem.error_id == "E302" and str(problem).startswith("the source has no model.layers.1.")
    wider = make_tiny(tmp_path / "wider", intermediate_size=512)
    problem = failure(good["ct"], source=wider)
    assert problem.error_id == "E107" and f"{LAYER} is [512, 128] in the source and [256, 128] here" in [p.what for p in problem.problems]


@pytest.mark.parametrize("fmt", ["ct", "marlin"])
def test_a_quantized_source_is_refused_before_the_work(good: dict[str, Path], fmt: str) -> None:
    """If its weights were only found missing at the end, a large model would be read in vain, and a native folder would lack an index."""
    refused = failure(good["gptq"], source=good[fmt])
    assert refused.error_id == "E313" and f"the source is quantized itself ({fmt})" in refused.problems[0].what


def test_unknown_architectures_are_checked_as_far_as_possible(tmp_path: Path, source: Path) -> None:
    """A model outside the table still has layers whose tensors belong together; what could not be checked is said."""
    out = tmp_path / "out"
    make_packed(source, out, edit_config=lambda config: config.update(model_type="fancy"))
    checked = verify(out, source=None, load=False, console=Console.quiet())
    assert any("own list of tensors was not checked" in line for line in checked.skipped)
    edit_tensors(out, lambda tensors: tensors.update({f"{LAYER}.weight_scale": tensors[f"{LAYER}.weight_scale"][:, :1]}))
    remake_manifest(out)
    assert failure(out).error_id == "E105"
