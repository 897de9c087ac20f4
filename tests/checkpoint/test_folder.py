"""The one look at a model folder: every verb refuses the same damages with the same ids, and nothing of a folder chooses code.

All in this process: a refusal comes before any work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch

from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.folder import open_folder
from tests.checkpoint.verbs import (
    DENSE,
    NEED_A_TOKENIZER,
    PACKED,
    assert_says,
    check,
    copied,
    edit_config,
    refusal,
)
from tests.packed import edit_json, edit_tensors, remake_manifest


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
    edit_config(model_type="of-my-own", auto_map={"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"})(folder)


def _two_heads(folder: Path) -> None:
    edit_config(tie_word_embeddings=True)(folder)


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
    "another hidden size": (edit_config(hidden_size=64, head_dim=32), "E302", "config.json asks for"),
    "more layers than weights": (edit_config(num_hidden_layers=3), "E302", "model.layers.2."),
    "fewer layers than weights": (edit_config(num_hidden_layers=1), "E302", "model.layers.1."),
    "half a tensor": (_half_a_tensor, "E302", "model.norm.weight has shape [64]"),
    "a tied head that is another matrix": (_two_heads, "E302", "tie_word_embeddings"),
    "an adapter that was not merged": (_unmerged, "E302 E340", "lora_A"),
    "a companion that is linked": (_link_out, "E301", "out of the checkpoint folder"),
    "a template that is linked": (_linked_template, "E301", "out of the checkpoint folder"),
    "a companion that is a FIFO": (_fifo, "E301", "FIFO"),
    "a companion that is no JSON": (lambda f: (f / "generation_config.json").write_text("{"), "E301", "not JSON"),  # type: ignore[dict-item]
    "code for a model of its own": (_own_code, "E312", "never runs"),
    "an adapter": (_adapter, "E390", "org/base"),
    "a dtype that is a function": (edit_config(dtype="save"), "E301", 'dtype is "save"'),
    "sizes that are none": (edit_config(vocab_size=10**12), "E301", "vocab_size"),
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
    "another config": (edit_config(rms_norm_eps=1e-6), "E304", "config.json"),
    "another tokenizer": (lambda f: edit_json(f / "tokenizer.json", lambda t: t["model"]["merges"].pop()), "E304", "tokenizer.json"),
    "a licence that nobody published": (lambda f: (f / "LICENSE").write_text("mine"), "E304", "LICENSE"),  # type: ignore[dict-item]
    "a missing companion": (lambda f: (f / "generation_config.json").unlink(), "E304", "is missing"),
}  # fmt: skip


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
    error = refusal(check, folder)
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
