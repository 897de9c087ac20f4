"""What is compiled before a server begins is all that its products can ask for."""

from __future__ import annotations

import pytest
import torch

from marlinctl.kernels import dispatch
from marlinctl.kernels.configurations import SPARSE_A8_FACTORED_SM90
from marlinctl.kernels.prepare import Multiplied, needed
from marlinctl.kernels.rounding import defines as rounding_defines
from marlinctl.quantize.scheme import Rounding

WAYS: tuple[tuple[Rounding, bool], ...] = (("none", False), ("int8", False), ("int8-128", False), ("int8", True))
LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (1152, 576)]


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_80", "sm_86"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("n", "k"), [pytest.param(*shape, marks=[] if shape in (LLAMA[0], LLAMA[-1]) else pytest.mark.slow) for shape in LLAMA]
)
def test_choices_are_those_of_every_m(architecture: str, sparse: bool, n: int, k: int) -> None:
    """An M whose kernel is not among them would be compiled by the first request that has it, or stop a capture."""
    for rounding, factored in WAYS:
        asked = {dispatch.choose(architecture, sparse, m, n, k, rounding, factored) for m in (*range(1, 1200), 5000)}
        assert dispatch.choices(architecture, sparse, n, k, rounding, factored) == asked


@pytest.mark.parametrize(("rounding", "group"), [("int8", None), ("int8-128", 128)])
def test_kernels_of_rounded_activations_are_among_them(rounding: Rounding, group: int | None) -> None:
    """If this failed, the first prompt of a server with 8-bit activations would wait for the compiler, or stop a capture."""
    found = needed("sm_90a", [Multiplied(False, 4096, 4096, 128, torch.float16, rounding)])
    assert not any(c.factored for c, *_ in found.kernels)
    assert {groups for c, _, _, groups in found.kernels if c.int8} == {group is not None}
    assert any(not c.int8 for c, *_ in found.kernels), "few tokens have 16-bit activations"
    assert found.roundings == {(torch.float16, 4096, group, False)}
    assert any(source == "round_activations.cu" for source, _ in found.sources)
    assert needed("sm_120", [Multiplied(False, 4096, 4096, 128, torch.float16, rounding)]).roundings == frozenset(), (
        "no kernel of ours there"
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89"])
@pytest.mark.parametrize(("size", "shift"), [(32, 1), (-1, -1)])
def test_kernels_of_rounded_activations_on_ampere_are_those_of_the_group_size(architecture: str, size: int, shift: int) -> None:
    """If this failed, a server on an A100 would compile under its first prompt: the group size is compiled in there, too."""
    found = needed(architecture, [Multiplied(False, 4096, 4096, size, torch.bfloat16, "int8")])
    kernels = {(shift, c.wgmma) for c, _, shift, _ in found.kernels if c.int8}
    assert kernels == {(shift, False)} and found.roundings == {(torch.bfloat16, 4096, None, False)}
    other = needed(architecture, [Multiplied(False, 4096, 4096, 64, torch.bfloat16, "int8")])
    assert {one for one in found.sources if "a8" in one[0]}.isdisjoint(other.sources)


def test_kernels_of_factored_weights_are_among_them() -> None:
    """If this failed, a folder whose scales have that form would be served by the slower kernel, or wait for the compiler."""
    found = needed("sm_90a", [Multiplied(False, 28672, 4096, 128, torch.float16, "int8", factored=True)])
    assert any(c.factored for c, *_ in found.kernels) and not any(groups for *_, groups in found.kernels)
    assert needed("sm_90a", [Multiplied(False, 28672, 4096, 128, torch.float16, "int8-128", factored=True)]) == needed(
        "sm_90a", [Multiplied(False, 28672, 4096, 128, torch.float16, "int8-128")]
    ), "a scale for each 128 of a token needs sums of groups"


def test_kernels_of_sparse_weights_are_among_them_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a 2:4 model with int8 activations would wait for the compiler, or compile what no table chooses."""
    one = Multiplied(True, 28672, 4096, 128, torch.float16, "int8", factored=True)
    dispatch.choose.cache_clear()
    without = {key: table for key, table in dispatch.tables().items() if key[1] != dispatch.SPARSE_FACTORED}
    monkeypatch.setattr(dispatch, "tables", lambda: without)
    assert needed("sm_90a", [one]) == needed("sm_90a", [Multiplied(True, 28672, 4096, 128, torch.float16)])
    eight = SPARSE_A8_FACTORED_SM90[-1]
    rows = (dispatch.Row(64, 28672, 4096, None), dispatch.Row(1024, 28672, 4096, dispatch.Choice(eight, 1)))
    with_one = without | {("sm_90a", dispatch.SPARSE_FACTORED): dispatch.Table(None, rows)}
    monkeypatch.setattr(dispatch, "tables", lambda: with_one)
    dispatch.choose.cache_clear()
    found = needed("sm_90a", [one])
    assert (eight, torch.float16, 3, False) in found.kernels and found.roundings == {(torch.float16, 4096, None, True)}
    assert ("round_activations.cu", (*rounding_defines(torch.float16, 4096, None), "QUADS=1")) in found.sources
    dispatch.choose.cache_clear()


def test_kernels_are_named_with_their_groups_and_dtype() -> None:
    """wgmma kernels are compiled for a group size and a dtype each; the wrong one would be compiled again when it is asked for."""
    one = Multiplied(False, 4096, 4096, 128, torch.float16)
    found = needed("sm_90a", [one, one])
    assert {(dtype, shift) for _, dtype, shift, _ in found.kernels} == {(torch.float16, 3)}
    assert found.unpacks == {(False, torch.float16)}
    assert len(found.sources) == len(found.kernels) + 1
    rows = needed("sm_90a", [Multiplied(True, 4096, 4096, -1, torch.bfloat16)])
    assert {(dtype, shift) for _, dtype, shift, _ in rows.kernels} == {(torch.bfloat16, -1)} and rows.unpacks == {(True, torch.bfloat16)}


def test_mma_sync_kernels_are_compiled_once_for_all_groups() -> None:
    both = needed("sm_80", [Multiplied(False, 4096, 4096, size, torch.float16) for size in (64, 128)])
    alone = needed("sm_80", [Multiplied(False, 4096, 4096, 64, torch.float16)])
    assert both.sources == alone.sources
