"""marlinctl/api.py: the public functions do the job, quietly, and refuse with the errors that docs/api.md promises."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl import api
from marlinctl.errors import UsageError
from tests.test_architecture import ROOT
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("api") / "tiny")


def test_quantize_pack_load(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The three functions together are what a program embeds; they must agree with each other and print nothing."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {i} quick brown foxes jump over {i * i} lazy dogs." for i in range(400)))
    made = api.quantize(
        model, tmp_path / "int4", group_size=32, source=str(text), samples=4, sequence_length=128, minimum_tokens=100, refine=0
    )
    assert made == tmp_path / "int4"
    assert json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    packed = api.pack(made, tmp_path / "native", format="marlin", also=["gptq"])
    assert packed == [tmp_path / "native", tmp_path / "native-gptq"]
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        original = api.load(model)(ids).logits
        logits = [api.load(folder)(ids).logits for folder in (made, *packed)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert 0 < (logits[0] - original).norm() / original.norm() < 0.5
    assert api.load(made, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")


def test_sparsify_prunes_with_or_without_int4(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program that embeds the tool must get the same 2:4 folders as the command line, and the next function must take them."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {i} quick brown foxes jump over {i * i} lazy dogs." for i in range(400)))
    given: dict[str, Any] = {"source": str(text), "samples": 4, "sequence_length": 128, "minimum_tokens": 100}
    pruned = api.sparsify(model, tmp_path / "pruned", **given)
    for weight in (p for name, p in api.load(pruned).named_parameters() if name.endswith("_proj.weight")):
        assert int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2
    joint = api.sparsify(model, tmp_path / "joint", bits=4, group_size=32, drift_correction=0.5, method="iterative", **given)
    assert api.pack(joint, tmp_path / "tiles", format="marlin_24") == [tmp_path / "tiles"]
    assert capfd.readouterr() == ("", "")


def test_options_are_the_keys_of_a_recipe(model: Path, tmp_path: Path) -> None:
    """A misspelled option must not be ignored, and a wrong value must be refused before any work."""
    with pytest.raises(UsageError) as caught:
        api.quantize(model, tmp_path / "out", groupsize=64)
    assert caught.value.error_id == "E202" and "group_size" in caught.value.problems[0].fix
    with pytest.raises(UsageError) as caught:
        api.quantize(model, tmp_path / "out", group_size=100)
    assert caught.value.error_id == "E202" and caught.value.problems[0].where == "--group-size 100"
    with pytest.raises(UsageError):
        api.quantize(model, tmp_path / "out", recipe="no-such-recipe")
    assert list(tmp_path.iterdir()) == []


def test_weight_files_are_as_small_as_was_asked_for(model: Path, tmp_path: Path) -> None:
    """If the size were lost on the way, a program would get one file that its store does not take."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {i} quick brown foxes jump over {i * i} lazy dogs." for i in range(400)))
    given: dict[str, Any] = {"source": str(text), "samples": 4, "sequence_length": 128, "minimum_tokens": 100}
    made = api.quantize(model, tmp_path / "int4", group_size=32, refine=0, max_shard_size="20KB", **given)
    pruned = api.sparsify(model, tmp_path / "pruned", method="magnitude", max_shard_size="20KB", **given)
    packed = api.pack(made, tmp_path / "gptq", format="gptq", max_shard_size="20KB")
    assert all(len(list(folder.glob("*.safetensors"))) > 1 for folder in (made, pruned, *packed))
    assert len(list(api.pack(made, tmp_path / "whole", format="gptq")[0].glob("*.safetensors"))) == 1
    with pytest.raises(UsageError) as caught:
        api.pack(made, tmp_path / "out", format="gptq", max_shard_size=5)
    assert caught.value.error_id == "E202"


@pytest.mark.parametrize("name", api.__all__)
def test_the_page_shows_the_signature_that_is_there(name: str) -> None:
    """docs/api.md promises names and parameters; the code must have exactly these."""
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    promised = re.search(rf"^\| `{name}\((.*?)\)`", page, flags=re.MULTILINE)
    assert promised is not None
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in inspect.signature(getattr(api, name)).parameters.values()
    ]
    written = str(inspect.Signature(parameters)).strip("()").replace("'", '"')
    assert promised[1] == written
