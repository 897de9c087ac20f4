"""The lists of model types that are kept by hand: every entry is there, and is still needed; no type is missing."""

from __future__ import annotations

import pytest

from marlinctl.checkpoint import runtimes
from marlinctl.checkpoint.formats import compressed_tensors
from marlinctl.checkpoint.runtimes import CONVERTED_WEIGHTS, READ_WEIGHTS, WHOLE_EXPERTS
from marlinctl.models.config import RENAMED_DECODERS
from marlinctl.models.derivation import derived_architecture
from tests.models.model_list import read_table
from tests.models.sweep import outcome
from tests.models.test_derivation import config_of
from tests.test_architecture import ROOT

LISTS = {
    "CONVERTED_WEIGHTS": CONVERTED_WEIGHTS, "READ_WEIGHTS": READ_WEIGHTS, "RENAMED_DECODERS": RENAMED_DECODERS,
    "WHOLE_EXPERTS": WHOLE_EXPERTS,
}  # fmt: skip
ENTRIES = [(name, entry) for name, entries in LISTS.items() for entry in sorted(entries)]
LIST = read_table((ROOT / "docs" / "models.md").read_text().partition("<!-- models: begin -->\n")[2])
DERIVED = sorted(name for name, one in LIST.items() if one.how == "derived")
LOADING = sorted(READ_WEIGHTS | CONVERTED_WEIGHTS)


@pytest.mark.parametrize(("name", "model_type"), ENTRIES)
def test_every_entry_is_a_type_of_transformers(name: str, model_type: str) -> None:
    """If a release renamed a type, its entry would mean nothing, and `loads` would promise what transformers does not load."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert model_type in CONFIG_MAPPING, f"{name} has {model_type}, which this transformers lacks"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DERIVED)
def test_lists_of_names_are_those_of_the_conversions(model_type: str) -> None:
    """If a type were missing, or needed no more, clients would not find linears at 16 bits, or experts would be taken for unloadable."""
    known = derived_architecture(config_of(model_type))
    whole = {bool(part.whole) for block in known.blocks for part in block.experts}
    assert whole <= {model_type in WHOLE_EXPERTS}
    prefix = known.blocks[0].prefix.rpartition(".")[0]
    assert (prefix != known.module(prefix)) == (model_type in RENAMED_DECODERS)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LOADING)
def test_what_transformers_is_said_not_to_load_it_does_not_load(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a release loaded it, people would be sent to another program without need. A type that is missing shows in the sweep."""
    monkeypatch.setattr(runtimes, "READ_WEIGHTS", frozenset())
    monkeypatch.setattr(runtimes, "CONVERTED_WEIGHTS", frozenset())
    monkeypatch.setattr(compressed_tensors, "_ASKED_FOR_WEIGHTS", frozenset())
    found = outcome(model_type)
    assert found.how == "wrong" and "transformers" in found.reason, f"{model_type} loads: take it from the list ({found.line})"
