"""Config groups of compressed-tensors with 8-bit activations: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import LinearParts
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.errors import BadInput
from marlinctl.quantize.scheme import FP8, INT8_ACTIVATIONS, Grid

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
PACKED = [f"{UP}.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape")]
UNPACKED = [f"{DOWN}.{suffix}" for suffix in ("weight", "weight_scale")]


def block(grid: Grid, *, alone: bool = False) -> dict[str, Any]:
    sizes = {DOWN: -1} if alone else {UP: 32, DOWN: -1}
    return registry.quantization_config(FORMATS["ct"], sizes, ["lm_head"], grids={DOWN: grid})


def refused(config: dict[str, Any], names: list[str]) -> str:
    with pytest.raises(BadInput) as caught:
        registry.detect({"quantization_config": config}, names)
    assert caught.value.error_id == "E340"
    return " ".join(problem.what for problem in caught.value.problems)


@pytest.mark.parametrize(("grid", "name", "kind"), [(INT8_ACTIVATIONS, "int-quantized", "int"), (FP8, "float-quantized", "float")])
def test_a_mixed_folder_says_the_format_of_each_group(grid: Grid, name: str, kind: str) -> None:
    """If a group had no format of its own, vLLM would look for packed words of the 8-bit linears, or round all activations."""
    found = block(grid)
    assert found["format"] == "mixed-precision"
    whole, packed = found["config_groups"].values()
    assert (packed["format"], packed["input_activations"]) == ("pack-quantized", None)
    assert whole["format"] == name and whole["targets"] == [DOWN]
    assert whole["weights"] == {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False, "strategy": "channel", "group_size": None}
    assert whole["input_activations"] == {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    QuantizationConfig.model_validate(found)
    info = registry.detect({"quantization_config": found}, [*PACKED, *UNPACKED, "lm_head.weight"])
    assert info.layers == {UP: 32, DOWN: -1} and info.grids == {DOWN: grid}
    assert set(info.owned) == {*PACKED, *UNPACKED, f"{UP}.weight_zero_point"}


@pytest.mark.parametrize(("grid", "name"), [(INT8_ACTIVATIONS, "int-quantized"), (FP8, "float-quantized")])
def test_a_folder_of_one_kind_has_its_format(grid: Grid, name: str) -> None:
    """If all linears were alike and the folder still said mixed-precision, older clients would refuse what they can read."""
    found = block(grid, alone=True)
    assert found["format"] == name and [group["format"] for group in found["config_groups"].values()] == [name]
    assert registry.detect({"quantization_config": found}, [*UNPACKED, "lm_head.weight"]).grids == {DOWN: grid}


def test_other_folders_are_written_as_before() -> None:
    """If groups of packed linears said their format too, every earlier folder would change for nothing."""
    found = registry.quantization_config(FORMATS["ct"], {UP: 32, DOWN: 64}, [])
    assert found["format"] == "pack-quantized" and not any("format" in group for group in found["config_groups"].values())


def test_what_other_tools_write_of_such_a_group_is_read() -> None:
    """If llm-compressor's W8A8 folders were refused for a null, people would have to start from the original."""
    config = json.loads(
        """{"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "global_compression_ratio": null, "kv_cache_scheme": null, "config_groups": {"group_0": {"targets": ["Linear"],
        "weights": {"actorder": null, "block_structure": null, "dynamic": false, "group_size": null, "num_bits": 8, "observer": "minmax",
                    "observer_kwargs": {}, "strategy": "channel", "symmetric": true, "type": "int"},
        "input_activations": {"actorder": null, "block_structure": null, "dynamic": true, "group_size": null, "num_bits": 8,
                    "observer": "memoryless", "observer_kwargs": {}, "strategy": "token", "symmetric": true, "type": "int"},
        "output_activations": null}}}"""
    )
    info = registry.detect({"quantization_config": config}, [*UNPACKED, "lm_head.weight"])
    assert info.layers == {DOWN: -1} and info.grids == {DOWN: INT8_ACTIVATIONS}


def _inputs(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda group: group["input_activations"].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_inputs(dynamic=False), "dynamic false"),
        (_inputs(dynamic="local"), "dynamic"),
        (_inputs(num_bits=4), "num_bits 4"),
        (_inputs(num_bits=True), "num_bits true"),
        (_inputs(symmetric=False), "symmetric false"),
        (_inputs(strategy="tensor"), "strategy"),
        (_inputs(group_size=128), "group_size 128"),
        (_inputs(type="float"), "float activations"),
        (_inputs(hadamard=True), "hadamard"),
        (lambda group: group["input_activations"].pop("dynamic"), "dynamic"),
        (lambda group: group["input_activations"].pop("type"), "type"),
        (lambda group: group.update(input_activations=None), "16-bit activations"),
        (lambda group: group.update(output_activations={"num_bits": 8}), "output"),
        (lambda group: group.update(format="naive-quantized"), "naive-quantized"),
        (lambda group: group.update(format="mixed-precision"), "mixed-precision"),
        (lambda group: group.pop("format"), "mixed-precision"),
        (lambda group: group["weights"].update(strategy="group", group_size=32), "strategy"),
        (lambda group: group["weights"].update(symmetric=False), "asymmetric"),
        (lambda group: group["weights"].update(type="float"), "8-bit float"),
        (lambda group: group["weights"].update(num_bits=4), "4-bit"),
    ],
)
def test_another_rounding_of_activations_is_refused(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    """Read past, each of these would be evaluated with activations that no client computes with."""
    config = block(INT8_ACTIVATIONS)
    change(config["config_groups"]["group_0"])
    assert says in refused(config, [*PACKED, *UNPACKED, "lm_head.weight"])


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.sampled_from(["int", "float", "int-quantized", "token", "channel", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["num_bits", "type", "format"]), inner, max_size=3),
    max_leaves=4,
)


@given(st.data())
def test_any_group_is_understood_or_refused(data: st.DataObject) -> None:
    """config.json comes from strangers: a list in the place of a format ended in a traceback."""
    config = json.loads(json.dumps(block(INT8_ACTIVATIONS)))
    group = config["config_groups"]["group_0"]
    place = data.draw(st.sampled_from([group, group["weights"], group["input_activations"], config]))
    for key in data.draw(st.lists(st.sampled_from([*place, "format"]), min_size=1, max_size=3)):
        place[key] = data.draw(ANYTHING)
    with suppress(BadInput):
        info = registry.detect({"quantization_config": config}, [*PACKED, *UNPACKED, "lm_head.weight"])
        assert all(isinstance(size, int) and (size == -1 or size > 0) for size in info.layers.values())


def test_tensors_and_groups_belong_together() -> None:
    """If codes were taken as packed words although the group says otherwise, or reversed, the weights would be noise."""
    config = block(INT8_ACTIVATIONS)
    assert "weight_packed" in refused(config, [*PACKED, *(f"{DOWN}.{s}" for s in ("weight_packed", "weight_scale", "weight_shape"))])
    assert f"{UP}.weight" in refused(config, [*PACKED, *UNPACKED, f"{UP}.weight"])
    assert f"{DOWN}.weight_shape" in refused(config, [*PACKED, *UNPACKED, f"{DOWN}.weight_shape"])
    ignored = {**config, "ignore": [DOWN]}
    assert f"{DOWN}.weight_scale" in refused(ignored, [*PACKED, *UNPACKED])


def test_experts_with_rounded_activations_are_refused() -> None:
    """transformers fuses experts, so an evaluation could not round what enters them, and would be of another model."""
    expert = "model.layers.0.mlp.experts.0.up_proj"
    config = registry.quantization_config(FORMATS["ct"], {expert: -1}, [], grids={expert: FP8})
    assert "experts" in refused(config, [f"{expert}.weight", f"{expert}.weight_scale"])


@pytest.mark.parametrize("grid", [INT8_ACTIVATIONS, FP8], ids=str)
def test_codes_lie_on_the_disk_as_they_are(grid: Grid) -> None:
    """If bytes were moved or their sign lost, every client would compute with other weights."""
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(4, 64)
    if grid.floating:
        codes = codes.masked_fill((codes & 0x7F) == 0x7F, 0)  # NaN
    scales = torch.tensor([[0.5], [0.25], [2.0], [1.0]], dtype=torch.float16)
    parts = LinearParts(codes, scales, 64, grid=grid)
    ct = FORMATS["ct"]
    tensors = ct.pack("l", parts)
    assert tensors["weight"].dtype == (torch.float8_e4m3fn if grid.floating else torch.int8)
    assert torch.equal(tensors["weight"].view(torch.int8), codes) and set(tensors) == set(ct.shapes(4, 64, -1, grid))
    back = ct.unpack(tensors, -1, "", grid)
    assert torch.equal(back.codes, codes) and back.group_size == 64 and back.grid == grid
    assert ct.second_reading is not None
    assert torch.equal(ct.second_reading(tensors, 4, 64, -1, grid), parts.weight())
    assert torch.equal(parts.weight(), tensors["weight"].float() * scales.float())


def test_damaged_codes_are_refused() -> None:
    """A NaN among FP8 codes, or a scale too many, would reach every logit."""
    unpack, scales = FORMATS["ct"].unpack, torch.ones(2, 1, dtype=torch.float16)
    nan = torch.tensor([[1, -1], [2, 3]], dtype=torch.int8)  # -1 is 0xff
    with pytest.raises(ValueError, match="NaN"):
        unpack({"weight": nan.view(torch.float8_e4m3fn), "weight_scale": scales}, -1, "", FP8)
    with pytest.raises(ValueError, match="int8"):
        unpack({"weight": nan, "weight_scale": scales}, -1, "", FP8)
    with pytest.raises(ValueError, match="scales"):
        unpack({"weight": nan, "weight_scale": torch.ones(2, 2)}, -1, "", INT8_ACTIVATIONS)
    with pytest.raises(ValueError, match="NaN or infinity"):
        unpack({"weight": nan, "weight_scale": scales * float("inf")}, -1, "", INT8_ACTIVATIONS)


@pytest.mark.parametrize("fmt", ["gptq", "marlin", "marlin_24"])
@pytest.mark.parametrize("grid", [INT8_ACTIVATIONS, FP8], ids=str)
def test_formats_without_a_place_for_it_say_so(fmt: str, grid: Grid) -> None:
    """If gptq took the codes without their activations, the folder would compute something else, silently."""
    problems = registry.misfits({UP: (64, 64), DOWN: (64, 64)}, [FORMATS[fmt]], {DOWN: grid})
    said = [problem for problem in problems if problem.what.startswith(f"{DOWN} has {grid}")]
    assert len(said) == 1 and "16-bit activations" in said[0].what and said[0].fix == "pack to ct"
