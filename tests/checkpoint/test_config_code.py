"""What a config.json may not do: choose code, end in a traceback, or make transformers read other settings than it would have."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl import api
from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.folder import open_folder
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.errors import BadInput
from marlinctl.evaluation.run import EvalSettings, evaluate
from marlinctl.models.meta_model import build
from marlinctl.models.switches import SWITCHES, cleaned
from marlinctl.models.transformers_config import building, transformers_config
from marlinctl.oneshot.open import Options
from marlinctl.oneshot.run import run_job
from marlinctl.verify import run as verify
from marlinctl.verify.inspect import inspect
from tests.checkpoint.verbs import (
    QUIET,
    TEXT,
    assert_says,
    edit_config,
    measure,
    recipe,
    refusal,
)
from tests.packed import edit_json
from tests.tiny import make_tiny, tiny_config

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
    """A setting that is lost on the way in makes another model; transformers itself distinguishes ministral from mistral by its layers."""
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
    edit_config(**changes)(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    config = json.loads((folder / "config.json").read_text())
    for run in (lambda _: build(config, torch.float32), measure):  # the walk's skeleton, and a model with weights
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
    edit_config(**changes)(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    error = refusal(measure, folder)
    assert f"{list(changes)[-1]} is 1" in error.problems[0].what
