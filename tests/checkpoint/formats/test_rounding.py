"""Which linears may have rounded activations: what config.json says of it, in native folders and as a note in others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from marlinctl.checkpoint.formats import rounding
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.checkpoint.formats.registry import FORMATS, detect, losses, quantization_config
from marlinctl.errors import BadInput
from marlinctl.quantize.scheme import Rounding

Q, DOWN, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.experts.0.up_proj"
SIZES = {Q: 64, DOWN: 64, EXPERT: 64}
NAMES = [f"{layer}.{suffix}" for layer in SIZES for suffix in ("B", "s", "weight_shape")]
CT_NAMES = [f"{layer}.{suffix}" for layer in SIZES for suffix in ("weight_packed", "weight_scale", "weight_shape")]


def block(fmt: str, chosen: dict[str, Rounding], **provenance: Any) -> dict[str, Any]:
    return quantization_config(FORMATS[fmt], SIZES, ["lm_head"], provenance, rounding_of=chosen)


def read(config: dict[str, Any], names: list[str] = NAMES) -> FormatInfo:
    return detect({"quantization_config": json.loads(json.dumps(config))}, names)


@pytest.mark.parametrize(("kind", "group"), [("int8", -1), ("int8-128", 128)])
def test_a_native_folder_says_what_may_be_rounded(kind: Rounding, group: int) -> None:
    """If this were lost, `eval` and servers would run 16-bit activations, or round a linear that calibration kept out."""
    config = block("marlin", {Q: kind})
    wanted = {"format_version": 2, "activations": "int8", "activation_group": group, "sixteen_bit_activations": [DOWN]}
    assert config.items() >= wanted.items()
    found = read(config)
    assert found.rounding == {Q: kind} and [found.activations(layer) for layer in SIZES] == [kind, "16-bit", "16-bit"]
    everything = block("marlin", {Q: kind, DOWN: kind})
    assert "sixteen_bit_activations" not in everything and read(everything).rounding == {Q: kind, DOWN: kind}, "experts are not rounded"


def test_folders_without_it_are_what_they_were() -> None:
    """If their version went up too, readers of before would refuse every new folder for nothing."""
    plain = block("marlin", {}, version="test")
    assert plain == {
        "quant_method": "marlinctl", "format": "marlin", "format_version": 1, "bits": 4, "group_size": 64, "marlinctl": {"version": "test"}
    }  # fmt: skip
    assert read(plain).rounding == {}
    assert block("marlin_24", {Q: "int8"}) == block("marlin_24", {}) | {"marlinctl": rounding.entries({Q: "int8"}, SIZES)}


def test_other_formats_carry_a_note_for_pack() -> None:
    """If ct forgot it, `quantize` and then `pack` would lose what calibration found; if ct meant it, evaluations of ct would round."""
    config = block("ct", {Q: "int8-128"}, version="test")
    assert config["marlinctl"] == {
        "version": "test", "activations": "int8", "activation_group": 128, "sixteen_bit_activations": [DOWN]
    }  # fmt: skip
    found = read(config, CT_NAMES)
    assert found.rounding == {Q: "int8-128"} and {found.activations(layer) for layer in SIZES} == {"16-bit"}
    again = quantization_config(FORMATS["marlin"], SIZES, [], config["marlinctl"], rounding_of=found.rounding)
    assert again["marlinctl"] == {"version": "test"} and again["activations"] == "int8", "the note becomes a key"
    assert losses(found, FORMATS["gptq"]) == losses(found, FORMATS["marlin"]) == []
    lost = losses(read(again), FORMATS["ct"])
    assert len(lost) == 1 and "1 linear has 8-bit activations, and the ct folder has 16-bit ones" in lost[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 1},
        {"activations": "fp8"},
        {"activation_group": 64},
        {"activation_group": True},
        {"activation_group": None},
        {"sixteen_bit_activations": Q},
        {"sixteen_bit_activations": [3]},
        {"sixteen_bit_activations": None},
        {"activations": None},
        {"format_version": 3},
        {"activation_scale": 1.0},
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any]) -> None:
    """If an unknown way to round were skipped, a folder would be served with other numbers than it was measured with."""
    config = block("marlin", {Q: "int8-128"}) | changes
    with pytest.raises(BadInput) as refused:
        read(config)
    assert refused.value.error_id == "E340"


def test_a_marlin_folder_is_read_by_its_own_keys_alone() -> None:
    """If `verify` took names from where `read` does not look, it would refuse a good folder, or end in a traceback."""
    config = block("marlin", {}) | {"marlinctl": {"activations": "int8", "sixteen_bit_activations": 5}}
    assert read(config).rounding == {} and rounding.misspelt(config, FORMATS["marlin"], SIZES) == []
    noted = block("ct", {Q: "int8"})
    noted["marlinctl"]["sixteen_bit_activations"] = ["q_porj"]
    assert rounding.misspelt(noted, FORMATS["ct"], SIZES) == ["q_porj"]


def test_2_to_4_tiles_have_no_such_keys() -> None:
    """If marlin_24 took them, a server would round beside a kernel that multiplies 16-bit activations."""
    config = block("marlin_24", {}) | {"format_version": 2, "activations": "int8", "activation_group": 128}
    names = [f"{Q}.{suffix}" for suffix in ("B_24", "B_meta", "s", "weight_shape")]
    with pytest.raises(BadInput, match="activations is not a known key"):
        read(config, names)


def test_one_model_rounds_in_one_way() -> None:
    """If two ways were written as one, half of the linears would be rounded otherwise than asked."""
    with pytest.raises(ValueError, match="in one way"):
        block("marlin", {Q: "int8", DOWN: "int8-128"})
