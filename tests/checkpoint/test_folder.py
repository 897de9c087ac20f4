"""The one look at a model folder: every verb refuses the same damages with the same ids, and nothing of a folder chooses code.

All in this process: a refusal comes before any work.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlinctl import api
from marlinctl.benchmarking.cases import checkpoint_set
from marlinctl.benchmarking.generation import load_packed
from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.compress import run_compress
from marlinctl.convert.repack import repack
from marlinctl.errors import BadInput, MarlinctlError, UsageError
from marlinctl.evaluation.run import EvalSettings, evaluate
from marlinctl.models.families import architecture
from marlinctl.models.meta_model import build
from marlinctl.models.switches import SWITCHES, cleaned
from marlinctl.models.transformers_config import building, transformers_config
from marlinctl.oneshot.open import Options, open_model
from marlinctl.oneshot.run import run_job
from marlinctl.planning.plan import Settings, make_plan
from marlinctl.recipes.schema import Recipe, load_recipe, resolve
from marlinctl.report.files import JSON
from marlinctl.report.rewrite import rewrite
from marlinctl.system.console import Console
from marlinctl.verify import run as verify
from marlinctl.verify.inspect import inspect
from tests import runs
from tests.packed import edit_json, edit_tensors, foreign_gptq, gptq_block, make_foreign, make_packed, remake_manifest
from tests.pruned import prune
from tests.tiny import VOCAB_SIZE, make_tiny, tiny_config

QUIET = Console.quiet()
TEXT = "A sentence of some words, and another one. " * 60


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` and `packed`, good and published, and a text."""
    root = tmp_path_factory.mktemp("folder")
    make_tiny(root / "dense")
    prune(root / "dense", root / "pruned")  # a student for the teacher that is damaged
    make_packed(root / "dense", root / "packed")
    make_packed(root / "dense", root / "native", "marlin")
    for name in ("packed", "native"):
        (root / name / JSON).write_text('{"kind": "quantize"}')
    (root / "text.txt").write_text(TEXT)
    return root


# ---- the verbs -----------------------------------------------------------------------------------------------------------------------


def recipe(**changes: Any) -> Recipe:
    """The recipe int4, small; `quantize_bits=16` is quantize.bits."""
    small = {"quantize.group_size": 32, "quantize.refine": 0}
    small |= {"calibration.samples": 2, "calibration.sequence_length": 32, "calibration.minimum_tokens": 16}
    return resolve(load_recipe("int4"), {**small, **{key.replace("_", ".", 1): value for key, value in changes.items()}})[0]


def _distill(student: Path, teacher: Path) -> None:
    from contextlib import ExitStack

    from marlinctl.distillation.open import open_models

    packed = "quantization_config" in json.loads((student / "config.json").read_text()) if (student / "config.json").is_file() else False
    asked = recipe(distill_tokens=1000, distill_mode="scales" if packed else "full").distill
    with ExitStack() as stack:
        open_models(str(student), str(teacher), asked, Options(), QUIET, stack)


def _eval(folder: Path, baseline: Path | None = None) -> None:
    settings = EvalSettings(text=str(folder.parent / "text.txt"), tokens=64, window=32, dtype="float32", device="cpu")
    evaluate(folder, settings, QUIET, baseline=baseline)


def _verify(folder: Path) -> None:
    verify.verify(folder, source=None, load=False, console=QUIET)


# Each gets the damaged folder; beside it lies a good model, `dense`.
FROM_DENSE: dict[str, Callable[[Path], object]] = {
    "quantize": lambda f: open_model(str(f), f.with_name("out"), recipe(), Options(), QUIET),
    "sparsify": lambda f: open_model(str(f), f.with_name("out"), recipe(sparsify_pattern="2:4"), Options(), QUIET),
    "compress": lambda f: run_compress(str(f), f.with_name("out"), recipe(), Options(), QUIET, evaluate_result=False),
    "plan": lambda f: make_plan(str(f), recipe(), Settings(f.with_name("out")), QUIET),
    "distill, as teacher": lambda f: _distill(f.with_name("pruned"), f),
    "verify --source": lambda f: verify.verify(f.with_name("packed"), source=f, load=False, console=QUIET),
    "eval --against": lambda f: _eval(f.with_name("dense"), f),
}
FROM_PACKED: dict[str, Callable[[Path], object]] = {
    "pack": lambda f: repack(f, f.with_name("out"), format="marlin"),
    "distill, as student": lambda f: _distill(f, f.with_name("dense")),
    "report": rewrite,
    "bench": lambda f: checkpoint_set(f, QUIET),
    "bench --model": lambda f: load_packed(f, torch.device("cpu"), torch.float16),
}
FROM_ANY: dict[str, Callable[[Path], object]] = {"eval": _eval, "inspect": inspect, "api.load": api.load}
DENSE, PACKED = FROM_DENSE | FROM_ANY, FROM_PACKED | FROM_ANY
NEED_A_TOKENIZER = {*FROM_DENSE, "eval", "distill, as student"} - {"verify --source"}


# ---- the damages ---------------------------------------------------------------------------------------------------------------------


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def _link_out(folder: Path) -> None:
    (folder / "tokenizer_config.json").rename(folder.parent / "elsewhere.json")
    (folder / "tokenizer_config.json").symlink_to(folder.parent / "elsewhere.json")


def _linked_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder.parent / "elsewhere.jinja").write_text("{{ 1 }}")
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to(folder.parent / "elsewhere.jinja")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "LICENSE")


def _own_code(folder: Path) -> None:
    (folder / "modeling_x.py").write_text(f"import os\nos.mkdir({str(folder / 'canary')!r})\n")
    _config(model_type="of-my-own", auto_map={"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"})(folder)


def _two_heads(folder: Path) -> None:
    _config(tie_word_embeddings=True)(folder)


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _unmerged(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 128)}))


def _half_a_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:64]}))


Damage = tuple[Callable[[Path], None], str, str]  # what is done, the id, and what the refusal says
ANY_FOLDER: dict[str, Damage] = {
    "another hidden size": (_config(hidden_size=64, head_dim=32), "E302", "config.json asks for"),
    "more layers than weights": (_config(num_hidden_layers=3), "E302", "model.layers.2."),
    "fewer layers than weights": (_config(num_hidden_layers=1), "E302", "model.layers.1."),
    "half a tensor": (_half_a_tensor, "E302", "model.norm.weight has shape [64]"),
    "a tied head that is another matrix": (_two_heads, "E302", "tie_word_embeddings"),
    "an adapter that was not merged": (_unmerged, "E302 E340", "lora_A"),
    "a companion that is linked": (_link_out, "E301", "out of the checkpoint folder"),
    "a template that is linked": (_linked_template, "E301", "out of the checkpoint folder"),
    "a companion that is a FIFO": (_fifo, "E301", "FIFO"),
    "a companion that is no JSON": (lambda f: (f / "generation_config.json").write_text("{"), "E301", "not JSON"),  # type: ignore[dict-item]
    "code for a model of its own": (_own_code, "E312", "never runs"),
    "an adapter": (_adapter, "E390", "org/base"),
    "a dtype that is a function": (_config(dtype="save"), "E301", 'dtype is "save"'),
    "sizes that are none": (_config(vocab_size=10**12), "E301", "vocab_size"),
}
PACKED_FOLDER: dict[str, Damage] = {
    "an unknown key": (lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(rotation="hadamard")), "E340",
                       "rotation"),
    "a stray order of columns": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.mlp.up_proj.weight_g_idx": torch.arange(128)})),
        "E340", "weight_g_idx"),
}  # fmt: skip
PUBLISHED: dict[str, Damage] = {
    "a manifest of tomorrow": (
        lambda f: edit_json(f / manifest.NAME, lambda m: m.update(schema_version=2, tool={"version": "9.9"})), "E101", "by marlinctl 9.9"),
    "another chat template": (lambda f: (f / "chat_template.jinja").write_text("{{ 1 }}"), "E304", "chat_template.jinja"),  # type: ignore[dict-item]
    "another generation config": (lambda f: (f / "generation_config.json").write_text("{}"), "E304", "generation_config.json"),  # type: ignore[dict-item]
    "another config": (_config(rms_norm_eps=1e-6), "E304", "config.json"),
    "another tokenizer": (lambda f: edit_json(f / "tokenizer.json", lambda t: t["model"]["merges"].pop()), "E304", "tokenizer.json"),
    "a licence that nobody published": (lambda f: (f / "LICENSE").write_text("mine"), "E304", "LICENSE"),  # type: ignore[dict-item]
    "a missing companion": (lambda f: (f / "generation_config.json").unlink(), "E304", "is missing"),
}  # fmt: skip


def refusal(run: Callable[[Path], object], folder: Path) -> MarlinctlError:
    with pytest.raises(MarlinctlError) as caught:
        run(folder)
    assert not folder.with_name("out").exists() and not (folder / "canary").exists()
    return caught.value


def assert_says(error: MarlinctlError, ids: str, text: str) -> None:
    told = " ".join(part for problem in error.problems for part in (problem.what, problem.where, problem.fix))
    assert error.error_id in ids.split() and text in told, f"{error.error_id}: {told}"


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Path:
    """The good folders, as links; `copied` gives one that may be damaged."""
    for path in root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def copied(place: Path, name: str) -> Path:
    return Path(shutil.copytree(place / name, place / "damaged"))


def met(damages: Mapping[str, object], verbs: Iterable[str]) -> pytest.MarkDecorator:
    """Each damage with two of the verbs, by turns; with the others it is `slow`. All verbs ask one function (checkpoint/folder.py)."""
    verbs = list(verbs)
    quick = {(name, verbs[(i + j) % len(verbs)]) for i, name in enumerate(damages) for j in range(2)}
    pairs = [(name, verb) for name in damages for verb in verbs]
    return pytest.mark.parametrize(
        ("name", "verb"), [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]
    )


@met(ANY_FOLDER, DENSE)
def test_every_verb_refuses_a_damaged_model(place: Path, name: str, verb: str) -> None:
    """A verb that skips a check computes garbage, hangs or ends in a traceback on what the others refuse."""
    damage, ids, text = ANY_FOLDER[name]
    folder = copied(place, "dense")
    damage(folder)
    assert_says(refusal(DENSE[verb], folder), ids, text)


@met(ANY_FOLDER | PACKED_FOLDER, PACKED)
def test_every_verb_refuses_a_damaged_packed_model(place: Path, name: str, verb: str) -> None:
    """The same of a folder whose linears are packed, where nobody wrote down what it was."""
    damage, ids, text = (ANY_FOLDER | PACKED_FOLDER)[name]
    folder = copied(place, "native" if verb == "bench --model" else "packed")
    (folder / manifest.NAME).unlink()
    damage(folder)
    assert_says(refusal(PACKED[verb], folder), ids, text)


@met(PUBLISHED, PACKED)
def test_every_verb_refuses_what_the_manifest_disproves(place: Path, name: str, verb: str) -> None:
    """`pack` would write a new manifest that vouches for the damage; `eval` and a report would be of another model."""
    damage, ids, text = PUBLISHED[name]
    folder = copied(place, "native" if verb == "bench --model" else "packed")
    damage(folder)
    assert_says(refusal(PACKED[verb], folder), ids, text)


@pytest.mark.parametrize("name", ANY_FOLDER | PACKED_FOLDER)
def test_verify_fails_where_the_others_refuse(place: Path, name: str) -> None:
    """Damage that happened before publishing, so that digests agree with it, must not pass the check either."""
    damage, ids, text = (ANY_FOLDER | PACKED_FOLDER)[name]
    folder = copied(place, "packed")
    damage(folder)
    remake_manifest(folder)
    error = refusal(_verify, folder)
    assert error.exit_code in (1, 3)
    if error.exit_code == 3:
        assert_says(error, ids, text)
    else:  # its own words for what it checks more closely
        assert error.error_id in ("E105", "E101")


@pytest.mark.parametrize("verb", sorted(NEED_A_TOKENIZER))
def test_a_missing_tokenizer_is_found_where_one_is_needed(place: Path, verb: str) -> None:
    """Calibration or evaluation would fail with it, after the model is loaded."""
    folder = copied(place, "dense" if verb in DENSE else "packed")
    (folder / manifest.NAME).unlink(missing_ok=True)
    _no_tokenizer(folder)
    assert_says(refusal((DENSE | PACKED)[verb], folder), "E314", "tokenizer")


def test_a_good_folder_passes(place: Path) -> None:
    """If the good folders of these tests were refused, every test above would pass for nothing."""
    for name in ("dense", "packed", "native"):
        with open_folder(place / name, tokenizer=True) as examined:
            assert examined.architecture is not None and examined.notes == ()


# ---- layouts that are whole, and not the usual one -------------------------------------------------------------------------------------


def _renamed(folder: Path, rename: Callable[[str], str], **extra: torch.Tensor) -> Path:
    make_tiny(folder, tie_word_embeddings=True)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_prefix_is_named(tmp_path: Path) -> None:
    """The text model of a wrapper, or of a trainer, has the right tensors under longer names."""
    error = refusal(FROM_DENSE["plan"], _renamed(tmp_path / "model", lambda name: f"language_model.{name}"))
    assert error.error_id == "E302" and "'language_model.'" in error.problems[0].what


def test_a_missing_head_is_not_taken_for_a_layout(tmp_path: Path) -> None:
    """Saved again, transformers would fill the head with random numbers."""
    folder = _renamed(tmp_path / "model", lambda name: name.removeprefix("model."))
    _config(tie_word_embeddings=False)(folder)
    assert_says(refusal(FROM_DENSE["plan"], folder), "E302", "lm_head.weight is missing")


def _unprefixed(folder: Path) -> Path:
    return _renamed(folder, lambda name: name.removeprefix("model."))


def test_names_without_their_beginning_are_taken_as_they_are(tmp_path: Path) -> None:
    """Embedding models are saved without their head, so their names lack "model."; transformers loads them. The result, and whatever is
    made of it, has the checkpoint's own names, and the config's patterns match them and transformers' modules.
    """
    folder = _unprefixed(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    _eval(folder)
    runs.quantize(folder, tmp_path / "out", runs.recipe(tmp_path / "text.txt", quantize__skip=["up_proj"]))
    with open_folder(tmp_path / "out", structure="needed") as examined:
        assert "layers.1.mlp.down_proj" in examined.info.layers and "layers.1.mlp.up_proj.weight" in examined.checkpoint.tensors
        assert examined.checkpoint.config["quantization_config"]["ignore"] == [
            r"re:^(.*\.)?layers\.0\.mlp\.up_proj$", r"re:^(.*\.)?layers\.1\.mlp\.up_proj$", r"re:^(.*\.)?lm_head$",
        ]  # fmt: skip
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0
    repack(tmp_path / "out", tmp_path / "marlin", format="marlin", also=["gptq"])
    assert verify.verify(tmp_path / "marlin", source=folder, load=True, console=QUIET, kernels=False).linears == 12


def test_a_tied_head_that_is_stored_alone_is_the_embedding(tmp_path: Path) -> None:
    """transformers loads such a folder; the result has the matrix where every client looks for it."""
    folder = _renamed(tmp_path / "model", lambda name: name.replace("model.embed_tokens", "lm_head"))
    (tmp_path / "text.txt").write_text(TEXT)
    runs.quantize(folder, tmp_path / "out", runs.recipe(tmp_path / "text.txt"))
    with open_folder(tmp_path / "out") as examined:
        assert "lm_head.weight" not in examined.checkpoint.tensors
        assert torch.equal(examined.checkpoint.read("model.embed_tokens.weight"), load_file(folder / "model.safetensors")["lm_head.weight"])
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0


GUESTS = {
    "model.layers.0.self_attn.k_scale": (torch.ones(1), "scales of a quantized KV cache"),
    "mtp.fc.weight": (torch.full((128, 256), 0.5), "(MTP)"),
    "model.layers.2.eh_proj.weight": (torch.full((128, 256), 0.5), "(MTP)"),  # where config.json says num_nextn_predict_layers 1
    "v_head.summary.weight": (torch.full((1, 128), 0.5), "value head"),
    "score.weight": (torch.full((2, 128), 0.5), "a part that the model of config.json lacks"),
}


def test_tensors_that_others_added_are_carried(tmp_path: Path) -> None:
    """transformers loads such a model without a word of harm, so "download both again" does not help. They come out as they went in."""
    folder = make_tiny(tmp_path / "model", num_nextn_predict_layers=1)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor for name, (tensor, _) in GUESTS.items()}))
    with open_folder(folder, structure="needed") as examined:
        (said,) = examined.notes
        assert said.startswith("5 tensors are no part of the model") and all(kind in said for _, kind in GUESTS.values())
    (tmp_path / "text.txt").write_text(TEXT)
    _eval(folder)
    runs.quantize(folder, tmp_path / "out", runs.recipe(tmp_path / "text.txt"))
    with open_folder(tmp_path / "out") as examined:
        assert all(torch.equal(examined.checkpoint.read(name), tensor) for name, (tensor, _) in GUESTS.items())
        ignored = examined.checkpoint.config["quantization_config"]["ignore"]
        assert {"mtp.fc", "model.layers.2.eh_proj", "lm_head"} <= set(ignored)
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0


def test_tensors_that_others_added_are_left_out_on_demand(tmp_path: Path) -> None:
    """If they stayed in the folder, or in `ignore`, the flag would promise what it does not do; `plan` counts what the run writes."""
    folder = make_tiny(tmp_path / "model", num_nextn_predict_layers=1)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor for name, (tensor, _) in GUESTS.items()}))
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = runs.recipe(tmp_path / "text.txt")
    carried, left_out = (runs.plan(folder, recipe, drop_unexpected=drop)["outputs"][0]["bytes"]["weights"] for drop in (False, True))
    assert carried - left_out == sum(tensor.nbytes for tensor, _ in GUESTS.values())
    runs.quantize(folder, tmp_path / "out", recipe, drop_unexpected=True)
    with open_folder(tmp_path / "out") as examined:
        assert not GUESTS.keys() & examined.checkpoint.tensors.keys() and not examined.notes
        assert examined.checkpoint.config["quantization_config"]["ignore"] == ["lm_head"]
    assert verify.verify(tmp_path / "out", source=folder, load=True, console=QUIET).logit_error == 0


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "model.layers.2.mlp.up_proj.weight", "lm_head.bias"])
def test_tensors_of_another_model_are_refused(tmp_path: Path, name: str) -> None:
    """transformers drops them too, and computes another model than the one that was trained."""
    folder = make_tiny(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(256)}))
    error = refusal(FROM_DENSE["plan"], folder)
    assert_says(error, "E302", name)
    assert "download" not in error.problems[0].fix


@pytest.mark.parametrize(
    ("changes", "planned"),
    [
        ({"model_type": "gemma3n_text", "intermediate_size": [8192] * 2, "num_kv_shared_layers": 0}, "E390"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0}, "E302"),  # known, and these are a Llama's
        ({"model_type": "openelm", "num_key_value_heads": [1, 2], "head_dim": 64}, "E390"),
    ],
)
def test_a_sound_config_of_an_unknown_kind_is_not_called_damaged(tmp_path: Path, changes: dict[str, Any], planned: str) -> None:
    """ "Download it again" sends people round in circles; inspect needs no architecture."""
    folder = make_tiny(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    assert inspect(folder)["model_type"] == changes["model_type"]
    assert refusal(FROM_DENSE["plan"], folder).error_id == planned
    (tmp_path / "text.txt").write_text(TEXT)
    error = refusal(_eval, folder)  # these weights are a Llama's, so nothing else could load them
    assert error.exit_code == 3 and error.error_id in ("E302", "E392")


@pytest.mark.parametrize("changes", [{"pretraining_tp": "x"}, {"initializer_range": True}, {"is_causal": "x"}, {"layer_types": 1}])
def test_a_value_that_transformers_refuses_is_no_defect_of_ours(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its classes raise errors of their own kinds, some only in the forward pass."""
    (tmp_path / "text.txt").write_text(TEXT)
    error = refusal(_eval, make_tiny(tmp_path / "model", **changes))
    assert error.error_id in ("E301", "E392") and error.exit_code == 3


def test_hostile_sizes_in_lists_are_refused(tmp_path: Path) -> None:
    """A list is as good a place for 10^12 as a number."""
    for value in ([10**12], ["8"], [], [1] * 20_000, [[8]]):
        make_tiny(tmp_path / "model", intermediate_size=256)
        _config(intermediate_size=value)(tmp_path / "model")
        with pytest.raises(BadInput, match="intermediate_size"):
            open_checkpoint(tmp_path / "model")


def test_a_module_map_is_held_against_every_block(tmp_path: Path) -> None:
    """A map that fits block 0 alone ended in a KeyError."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    config = {"model_type": "glm4_moe", **sizes, **experts, "head_dim": 16, "vocab_size": VOCAB_SIZE, "n_group": 1, "topk_group": 1}
    attention = {"module": "self_attn", "first": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "last": "self_attn.o_proj"}
    mlp = {"module": "mlp", "first": ["mlp.gate_proj", "mlp.up_proj"], "last": "mlp.down_proj"}
    names = {"decoder": "model", "blocks": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm"}

    def refused(**changes: Any) -> str:
        (tmp_path / "map.json").write_text(json.dumps({**names, "attention": attention, "mlp": mlp, **changes}))
        with pytest.raises(UsageError) as caught:
            architecture(config, tmp_path / "map.json")
        assert caught.value.error_id == "E251"
        return caught.value.problems[0].what

    assert "block 1 lacks mlp.gate_proj, mlp.up_proj, mlp.down_proj" in refused()
    assert "model.0." in refused(blocks="model")  # whose children have no numbers
    assert "input_layernorm" in refused(mlp={**mlp, "last": "input_layernorm"})  # which is no linear
    assert "model.norm.weight" in refused(embedding="model.norm")


# ---- what chooses code -----------------------------------------------------------------------------------------------------------------

HOSTILE: dict[str, Any] = {
    "attn_implementation": "kernels-community/anything@branch",
    "_attn_implementation": "evil/attention",
    "_attn_implementation_internal": "evil/attention",
    "experts_implementation": "deepgemm",
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "evil/norm:RMSNorm"},
    "fusion_config": {"anything": True},
    "auto_map": {"AutoModelForCausalLM": "evil/repository--modeling_x.M"},
    "configuration_files": ["config.9.json"],
    "transformers_weights": "other.safetensors",
    "attribute_map": {"hidden_size": "intermediate_size"},
    "base_model_tp_plan": {"layers.*": "colwise"},
}  # fmt: skip
INNER: dict[str, Any] = {"to_dict": 1, "validate": "x", "return_dict": False, "output_attentions": True, "get_text_config": None}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_config_chooses_no_code(no_network: None, tmp_path: Path) -> None:
    """One line in config.json fetched a kernel from the hub and ran it, in eval and quantize alike, offline or not."""
    (tmp_path / "text.txt").write_text(TEXT)
    plain = make_tiny(tmp_path / "plain")
    hostile = make_tiny(
        tmp_path / "hostile", **HOSTILE, **INNER, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "use_kernels": True}
    )
    edit_json(plain / "config.json", lambda config: config.update(rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    edit_json(hostile / "tokenizer_config.json", lambda document: document.update(auto_map={"AutoTokenizer": ["evil--x.T", None]}))
    edit_json(hostile / "generation_config.json", lambda document: document.update(custom_generate="evil/generate"))
    with open_folder(hostile, structure="needed", tokenizer=True) as examined:
        told = "\n".join(examined.notes)
    assert all(key in told for key in (*HOSTILE, "custom_generate", "kernels-community/anything@branch", "tokenizer_config.json"))
    settings = EvalSettings(text=str(tmp_path / "text.txt"), tokens=256, window=64, dtype="float32", device="cpu")
    scores = [evaluate(folder, settings, QUIET)["model"]["perplexity"] for folder in (plain, hostile)]
    assert scores[0] == scores[1]
    assert isinstance(api.load(hostile).config._attn_implementation, str)
    assert api.load(hostile).config._attn_implementation in ("sdpa", "eager")
    for folder in (plain, hostile):
        run_job(
            str(folder),
            folder.with_name(f"{folder.name}-out"),
            recipe(calibration_source=str(tmp_path / "text.txt")),
            Options(dtype="float32"),
            QUIET,
        )
    ours, theirs = ((tmp_path / f"{name}-out" / manifest.NAME) for name in ("plain", "hostile"))
    codes = [json.loads(path.read_text())["layers"] for path in (ours, theirs)]
    assert codes[0] == codes[1]
    published = tmp_path / "hostile-out"
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert not SWITCHES.keys() & _all_keys(json.loads((published / name).read_text()))
    assert (published / "tokenizer.json").read_bytes() == (hostile / "tokenizer.json").read_bytes()
    verify.verify(published, source=hostile, load=True, console=QUIET)


def _all_keys(document: Any) -> set[str]:
    if isinstance(document, dict):
        return {*document, *(key for value in document.values() for key in _all_keys(value))}
    return {key for item in document for key in _all_keys(item)} if isinstance(document, list) else set()


def test_companions_without_switches_are_copied_as_bytes() -> None:
    """Rewriting a tokenizer's file for nothing would change its digest."""
    data = b'{"a":1,\n "b": "\xc3\xa9"}'
    assert cleaned("tokenizer_config.json", data) == data and cleaned("tokenizer.json", b"{") == b"{"
    assert json.loads(cleaned("generation_config.json", b'{"a": {"auto_map": {}}, "b": [1]}')) == {"a": {}, "b": [1]}
    with pytest.raises(BadInput):
        cleaned("generation_config.json", b"{")


@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}]
)
def test_transformers_gets_the_config_that_it_would_have_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A setting that is lost on the way in makes another model; transformers itself tells ministral from mistral by its layers."""
    from transformers import AutoConfig

    folder = make_tiny(tmp_path / "model", rope_scaling={"rope_type": "linear", "factor": 2.0}, attention_bias=True, **changes)
    theirs = AutoConfig.from_pretrained(folder)
    ours = transformers_config(json.loads((folder / "config.json").read_text()), folder)
    assert type(ours) is type(theirs)
    differing = {key for key, value in theirs.to_dict().items() if ours.to_dict().get(key) != value}
    assert differing <= {"dtype"}


def test_a_deep_config_is_refused(tmp_path: Path) -> None:
    """What walks the document calls itself for each level, and would end in a RecursionError."""
    folder = make_tiny(tmp_path / "model")
    deep = "[" * 300 + "]" * 300
    (folder / "generation_config.json").write_text(f'{{"a": {deep}}}')
    assert_says(refusal(inspect, folder), "E301", "nested too deeply")
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(tiny_config())[:-1] + f', "a": {deep}}}')
    assert_says(refusal(inspect, folder), "E301", "nested too deeply")


# ---- what was published ----------------------------------------------------------------------------------------------------------------


def _nan(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    remake_manifest(folder)


@pytest.mark.parametrize(("verb", "error_id", "exit_code"), [("pack", "E620", 6), ("eval", "E620", 6), ("verify", "E106", 1)])
def test_nan_in_an_untouched_tensor_is_found(place: Path, verb: str, error_id: str, exit_code: int) -> None:
    """`pack` copied it and vouched for it, and the check without a load passed."""
    folder = copied(place, "packed")
    _nan(folder)
    error = refusal({**PACKED, "verify": _verify}[verb], folder)
    assert (error.error_id, error.exit_code) == (error_id, exit_code) and "model.norm.weight" in error.problems[0].what


@pytest.mark.parametrize("verb", ["pack", "eval"])
def test_weights_that_the_manifest_disproves_are_refused(place: Path, verb: str) -> None:
    """A flipped bit is a weight too."""
    folder = copied(place, "packed")
    shard = next(folder.glob("model*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert_says(refusal(PACKED[verb], folder), "E304", shard.name)


def test_a_report_of_tomorrow_is_refused(place: Path) -> None:
    """Its keys may mean something else; rewriting it would lose them."""
    folder = copied(place, "packed")
    (folder / JSON).write_text('{"kind": "quantize", "schema_version": 2, "versions": {"marlinctl": "9.9"}}')
    assert_says(refusal(rewrite, folder), "E374", "by marlinctl 9.9")


def test_a_listed_name_does_not_lead_out_of_the_folder(place: Path) -> None:
    """A manifest may be written by anybody."""
    (place / "secret.txt").write_text("x")
    listing = {"../secret.txt": {"bytes": 1, "sha256": "0" * 64}}
    folder = copied(place, "packed")
    edit_json(folder / manifest.NAME, lambda document: document["files"].update(listing))
    assert_says(refusal(inspect, folder), "E304", "may leave the checkpoint folder")


# ---- what transformers makes of a config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": "1e-5"},  # transformers' own checker of fields, whose errors are its own
        {"hidden_act": ["silu"]},
        {"eos_token_id": ["x"]},
        {"initializer_range": float("1e308")},
        {"pad_token_id": 10**9},  # an assertion of torch's
        {"text_config": {"a": 1}},
    ],
)
def test_whatever_transformers_refuses_is_bad_input(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A mistyped value of config.json ended as "this is a defect of marlinctl"."""
    folder = make_tiny(tmp_path / "model")
    _config(**changes)(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    config = json.loads((folder / "config.json").read_text())
    for run in (lambda _: build(config, torch.float32), _eval):  # the walk's skeleton, and a model with weights
        error = refusal(run, folder)
        assert error.error_id == "E392" and error.exit_code == 3


def test_memory_that_runs_out_is_not_blamed_on_the_config() -> None:
    """Exit 3 and "restore config.json" for a machine that is too small."""
    for error in (RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA"), MemoryError()):
        with pytest.raises(type(error)), building("config.json"):
            raise error


@pytest.mark.parametrize(
    ("text", "key"), [("1e400", "rms_norm_eps"), ("NaN", "rms_norm_eps"), ('{"factor": -Infinity}', "rms_norm_eps.factor")]
)
def test_settings_that_are_no_number_are_refused(tmp_path: Path, text: str, key: str) -> None:
    """With an epsilon of infinity every norm gives zero: all linears were "solved", and the report could not be written."""
    folder = make_tiny(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("1e-05", text))
    with pytest.raises(BadInput, match=f"{key} is not a finite number"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(config.replace("1e-05", '1e-05, "time_step_limit": [0.0, Infinity]'))  # Mamba 2
    open_checkpoint(folder).close()


@pytest.mark.parametrize(
    "changes",
    [{"num_labels": 10**9}, {"model_type": "gpt2", "n_layer": 10**8}, {"model_type": "gpt2", "n_positions": 10**12}],
)
def test_sizes_are_bounded_under_every_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A table of 10^9 labels took 4 GB and more than 40 s; blocks and positions have other names in other families."""
    folder = make_tiny(tmp_path / "model")
    _config(**changes)(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    error = refusal(_eval, folder)
    assert f"{list(changes)[-1]} is 1" in error.problems[0].what


def _with_biases(folder: Path, value: float) -> Path:
    """As AutoGPTQ saves a Llama: a bias for every linear, which the model has no place for."""
    make_tiny(folder.parent / "source")
    codes = make_foreign(folder.parent / "source", folder, gptq_block(), foreign_gptq)
    tensors = load_file(folder / "model.safetensors")
    biases = {f"{name}.bias": torch.full((q.codes.shape[0],), value, dtype=torch.float16) for name, q in codes.items()}
    save_file({**tensors, **biases}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_idle_biases_are_left_out(tmp_path: Path) -> None:
    """`pack` would publish a folder that its own `verify` refuses, and `eval` would refuse a model that every runtime loads."""
    folder = _with_biases(tmp_path / "foreign", 0.0)
    assert main(["pack", str(folder), str(tmp_path / "out"), "--format", "ct", "-q"]) == 0
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0
    assert load_dense(folder, dtype=torch.float32) is not None


def test_biases_without_a_place_that_are_not_zero_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of the model would be lost without a word."""
    assert main(["pack", str(_with_biases(tmp_path / "foreign", 0.5)), str(tmp_path / "out"), "--format", "ct", "-q"]) == 3
    assert "biases are not zero" in capsys.readouterr().err
