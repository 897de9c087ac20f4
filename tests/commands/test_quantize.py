"""What the end of a run says of its linears."""

from __future__ import annotations

from typing import Any

import pytest

from marlinctl.commands.quantize import largest_errors


def layers(bits: int = 4, **errors: float) -> list[dict[str, Any]]:
    return [{"name": f"model.layers.{i}.mlp.{kind}", "error": error, "bits": bits} for kind, error in errors.items() for i in range(3)]


def test_the_kind_that_stands_out_is_named_with_its_rule() -> None:
    """If a run ended without a word, the linears that need 8 bits would go unnoticed."""
    said = largest_errors(layers(down_proj=0.04, up_proj=0.01, o_proj=0.02))
    assert said.startswith("largest mean layer errors: down_proj 0.04000, o_proj 0.02000, up_proj 0.01000")
    assert said.endswith("--override down_proj=bits:8")


def test_linears_that_servers_load_as_one_are_named_together() -> None:
    """If v_proj alone had 8 bits, no server would load the folder."""
    said = largest_errors(layers(v_proj=0.04, q_proj=0.01, k_proj=0.01, o_proj=0.01))
    assert all(f"--override {name}=bits:8" in said for name in ("q_proj", "k_proj", "v_proj")) and "o_proj=" not in said


@pytest.mark.parametrize(
    "found",
    [
        layers(down_proj=0.02, up_proj=0.019, o_proj=0.021),
        layers(8, down_proj=0.04) + layers(up_proj=0.01, o_proj=0.01),
        layers(down_proj=float("nan"), up_proj=0.01, o_proj=0.01),
        layers(down_proj=0.04),
        layers(16, down_proj=0.04, up_proj=0.01),
        [],
    ],
)
def test_where_nothing_stands_out_nothing_is_said(found: list[dict[str, Any]]) -> None:
    """If every run advised 8 bits, also for linears that have them or were pruned alone, the advice would mean nothing."""
    assert not largest_errors(found)
