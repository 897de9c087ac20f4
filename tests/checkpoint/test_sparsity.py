"""marlinctl/checkpoint/sparsity.py: who states the 2:4 pattern of a folder, and what its weights say."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from marlinctl.checkpoint import sparsity
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.mask import Masks, open_masks
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.errors import BadInput
from marlinctl.models.families import architecture
from tests.packed import edit_masks, edit_tensors, keep_of, make_packed, make_sparse_packed
from tests.tiny import make_tiny, write_weights

Opened = tuple[Checkpoint, FormatInfo, Masks | None]
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("pattern") / "source")


@pytest.fixture
def opened() -> object:
    with ExitStack() as stack:

        def open_folder(folder: Path) -> Opened:
            checkpoint = stack.enter_context(open_checkpoint(folder, weight_files="auto"))
            return checkpoint, registry.detect(checkpoint.config, checkpoint.tensors), stack.enter_context(open_masks(folder))

        yield open_folder


@pytest.mark.parametrize(
    ("fmt", "origin"), [("ct", "mask file"), ("gptq", "mask file"), ("marlin", "mask file"), ("marlin_24", "metadata")]
)
def test_a_stated_pattern_is_found_and_counted(source: Path, tmp_path: Path, opened: object, fmt: str, origin: str) -> None:
    """If this failed, a 2:4 model would be taken for a dense one, or its zeros for its mask."""
    codes = make_sparse_packed(source, tmp_path / "out", fmt, skip=["model.layers.0.self_attn.o_proj"])
    folder = opened(tmp_path / "out")  # type: ignore[operator]
    assert sparsity.stated(*folder) == sparsity.Pattern(origin, tuple(sorted(codes)))
    found = sparsity.counted(*folder)
    assert found.pattern == sparsity.stated(*folder)
    assert found.kept == sum(q.codes.numel() // 2 for q in codes.values())
    zero = sum(int((q.codes[q.keep] == 0).sum()) for q in codes.values())
    assert found.zero == zero > 100


def test_a_pattern_that_nobody_states_is_found_in_the_zeros(source: Path, tmp_path: Path, opened: object) -> None:
    """If this failed, 2:4 models of other tools would count as dense."""
    codes = make_sparse_packed(source, tmp_path / "out", "ct", stated=False)
    folder = opened(tmp_path / "out")  # type: ignore[operator]
    assert sparsity.stated(*folder) == sparsity.Pattern(None, ())
    found = sparsity.counted(*folder)
    assert found.pattern == sparsity.Pattern("zeros", tuple(sorted(codes)))
    assert found.zero == sum(int((q.codes[q.keep] == 0).sum()) for q in codes.values())  # filled up: as many as there were


def test_a_dense_model_has_no_pattern(source: Path, tmp_path: Path, opened: object) -> None:
    """If this failed, any model would count as 2:4; so would one whose linear is zero altogether."""
    make_packed(source, tmp_path / "out", "ct")
    assert sparsity.counted(*opened(tmp_path / "out")) == sparsity.KeptWeights(sparsity.Pattern(None, ()), 0, 0)  # type: ignore[operator]

    def wipe(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight_packed"].fill_(-2004318072)  # code 0 everywhere

    edit_tensors(tmp_path / "out", wipe)
    assert sparsity.counted(*opened(tmp_path / "out")).pattern.linears == ()  # type: ignore[operator]


def dense_24(source: Path, out: Path) -> Path:
    """The source with every linear pruned, as another tool saves it: 16-bit, no mask file."""
    folder = make_tiny(out)
    with open_checkpoint(source) as checkpoint:
        linears = architecture(checkpoint.config).linears
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    for name in linears:
        tensors[f"{name}.weight"] *= keep_of(name, *tensors[f"{name}.weight"].shape)
    write_weights(folder, tensors)
    return folder


def test_16_bit_weights_are_looked_at_too(source: Path, tmp_path: Path, opened: object) -> None:
    """If this failed, the output of `sparsify` and of other pruners could not be told from a dense model. The head is not pruned."""
    found = sparsity.counted(*opened(dense_24(source, tmp_path / "out")))  # type: ignore[operator]
    assert found.pattern.origin == "zeros" and len(found.pattern.linears) == 14
    assert "lm_head" not in found.pattern.linears and found.zero < 20


def test_masks_of_nothing_are_named(source: Path, tmp_path: Path, opened: object) -> None:
    """If this failed, a mask file of another model would be carried along, or two masks of one linear could differ."""
    make_sparse_packed(source, tmp_path / "out", "ct")
    edit_masks(tmp_path / "out", lambda masks: masks.update({"model.layers.9.mlp.up_proj.keep": masks[f"{LAYER}.keep"]}))
    checkpoint, info, masks = opened(tmp_path / "out")  # type: ignore[operator]
    linears = sparsity.shapes(checkpoint, info)
    assert [p.what for p in sparsity.strangers(linears, info, masks)] == [
        "there is a mask of model.layers.9.mlp.up_proj, and no such linear"
    ]
    native = FormatInfo(FORMATS["marlin_24"], info.layers)
    assert len(sparsity.strangers(linears, native, masks)) == 1 + len(info.layers)


def test_a_mask_is_compared_with_its_weight(source: Path, tmp_path: Path, opened: object) -> None:
    """If this failed, packing by a wrong mask would drop weights that are not zero."""
    make_sparse_packed(source, tmp_path / "out", "gptq")
    edit_masks(tmp_path / "out", lambda masks: masks.update({f"{LAYER}.keep": ~masks[f"{LAYER}.keep"]}))
    folder = opened(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(BadInput) as caught:
        sparsity.weight_and_mask(folder[0], folder[1], LAYER, folder[2])
    assert caught.value.error_id == "E356" and f"{LAYER}: row 0, column" in caught.value.problems[0].what


def test_why_codes_are_not_two_of_four() -> None:
    """If this failed, a person would be told that a model is not 2:4 and not where."""
    codes = torch.zeros(4, 12, dtype=torch.int8)
    codes[2, 4:7] = 1
    codes[3, 8:12] = -8
    problem = sparsity.crowded("l", codes)
    assert problem.what == "l: row 2, columns 4..7: 3 of four codes are not zero, 2:4 keeps two (2 of 12 such groups)"
    assert "K=10 is not a multiple of 4" in sparsity.crowded("l", codes[:, :10]).what
