"""Other people's kernels: found where they are, and refused where their interface is another."""

from __future__ import annotations

import pytest
import torch

from marlinctl.benchmarking import peers


def gemm(a: object, b_q_weight: object, c: object = None, *, size_m: int) -> tuple[object, ...]:
    return a, b_q_weight, c, size_m


def test_keywords_are_given_where_the_installed_version_has_them() -> None:
    """If this failed, a release that adds an optional tensor would break the comparison."""
    bound = peers.bind(gemm, {"a": ..., "b_q_weight": 2, "size_m": 3}, empty=("c", "b_bias"))
    assert bound("rows") == ("rows", 2, None, 3)


def test_a_function_that_takes_any_keyword_is_given_ours() -> None:
    """If this failed, a wrapper of theirs would count as another interface."""
    assert peers.bind(lambda a, **others: (a, others), {"a": ..., "size_m": 3})(1) == (1, {"size_m": 3})


@pytest.mark.parametrize(
    ("given", "what"),
    [({"a": ..., "b_q": 2, "size_m": 3}, "no parameter b_q"), ({"a": ..., "b_q_weight": 2}, "wants size_m too")],
)
def test_another_interface_is_told(given: dict[str, object], what: str) -> None:
    """If this failed, a renamed parameter would end the run, or worse, be passed as another one."""
    with pytest.raises(peers.ApiDiffers, match=what):
        peers.bind(gemm, given)


def test_what_is_not_installed_is_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, nobody would know that the comparison lacks somebody."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    there, notes = peers.find_peers("sm_90a")
    assert there == []
    assert [(note.name, note.status) for note in notes] == [(peer.name, "absent") for peer in peers.PEERS]


def test_a_peer_for_another_architecture_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, Machete would fail on every linear of an A100."""
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    assert "vllm machete" not in {peer.name for peer in peers.find_peers("sm_80")[0]}
    assert "vllm machete" in {peer.name for peer in peers.find_peers("sm_90a")[0]}


def test_a_package_that_cannot_be_imported_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, an extension that was built for another torch would end our run."""
    with pytest.raises(peers.ApiDiffers, match="cannot be imported"):
        peers.attribute("a_module_that_is_not_there", "gemm")
    with pytest.raises(peers.ApiDiffers, match="torch has no marlin or machete"):
        peers.attribute("torch", "marlin", "machete")
    assert peers.attribute("torch", "marlin", "matmul") is torch.matmul
