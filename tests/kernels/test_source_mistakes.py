"""Mistakes put into the kernels' sources, which the software GPU must show (software_kernel.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlinctl.kernels.configurations import DENSE, DENSE_SM90, SPARSE, SPARSE_SM90, Configuration
from tests.kernels.software_kernel import build, mistake, random_packed

SHARED = [  # by both kernels, in one text
    ("copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();", "waits for too few copies"),
    ("__syncthreads();  // all threads' copies have arrived, and all warps have read the stage that is filled next", "", "no barrier"),
    ("stage == 0 ? STAGES - 1 : stage - 1", "stage", "fills the stage that is read"),
    ("copy_chunk ^ copy_row % 8 ^ i * ROWS % 8", "copy_chunk", "no swizzle"),
    ("(cta == first_cta ? 1 : 0)", "0", "parts in one place"),
    ("a[1] = Number::lower(word >> 8)", "a[1] = Number::lower(word >> 4)", "nibbles"),
]
DENSE_ALONE = [("role.first_word + role.k_warp * OWN + word", "role.first_word + word", "wrong words")]
SPARSE_ALONE = [
    ("mma_sparse<0>", "mma_sparse<1>", "selector"),
    ("its_half * 128", "0", "one half of the metadata for all words"),
    ("(tile + its_tile) * BLOCKS", "tile * BLOCKS", "one tile's metadata for two"),
    ("inside ? places + i * META_ROWS * meta_row : meta, true", "places + i * META_ROWS * meta_row, inside", "zeros as metadata"),
    ("role.k_warp * OWN + i, second", "i, second", "wrong words"),
    ("part % 2 * 2 + part / 2", "part", "tokens for outputs"),
    ("grouped ? sums[word][slab][i] : group_sums[word][slab][i]", "group_sums[word][slab][i]", "grouped as channel-wise"),
]
HOPPER_BOTH = [
    ("barrier_wait(ring.full(place.stage), place.parity);", "", "does not wait for a stage"),
    ("part * (TOKENS * 128), activations", "0, activations", "one place for all boxes"),
    ("at.token_tile * TOKENS, full", "0, full", "the first tokens for all"),
    ("qweight, first_block, at.step * K_TILES", "qweight, first_block, 0", "the first rows of weights for all"),
    ("qweight, first_block, at.step * K_TILES", "qweight, 0, at.step * K_TILES", "the first columns of weights for all"),
    ("wgmma_wait<1>();  // the batch before", "wgmma_wait<2>();  //", "decodes over what is multiplied"),
    ("words_at + (i + AHEAD)", "words_at + i", "a step's words twice"),
]
HOPPER_WEIGHTS = [
    ("a[1] = Number::times(a[1], upper);", "a[1] = Number::times(a[1], lower);", "the scale of another column"),
    ("wgmma_wait<0>();\n        unreleased.release();", "unreleased.release();", "ends a tile while it is multiplied"),
]
HOPPER_SPARSE = [
    ("multiply_async<0>(NUMBER()", "multiply_async<1>(NUMBER()", "selector"),
    ("i % META_TILES * 2 + word / 2", "word / 2", "one step's metadata for two"),
    ("K_WARPS > 1 ? neighbour(sums, part, slab, i) : sums[part][slab][i]", "sums[part][slab][i]", "tokens for outputs"),
]
MISTAKES = [
    *((DENSE[1], *m) for m in (*SHARED, *DENSE_ALONE)),
    *((SPARSE[1], *m) for m in SPARSE_ALONE),
    *((DENSE_SM90[1], *m) for m in HOPPER_BOTH),
    *((DENSE_SM90[-1], *m) for m in HOPPER_WEIGHTS),
    *((SPARSE_SM90[1], *m) for m in HOPPER_SPARSE),
]

QUICK = {
    "waits for too few copies", "no swizzle", "nibbles", "selector", "tokens for outputs", "decodes over what is multiplied",
    "the scale of another column", "the first columns of weights for all",
}  # fmt: skip


@pytest.mark.parametrize(
    ("configuration", "right", "wrong"),
    [  # those that no other kind of mistake is like
        pytest.param(*m[:3], id=f"{m[0].kernel}: {m[3]}", marks=() if m[3] in QUICK else pytest.mark.slow) for m in MISTAKES
    ],
)
def test_the_software_gpu_sees_mistakes(tmp_path: Path, configuration: Configuration, right: str, wrong: str) -> None:
    """If this failed, the tests above could not fail."""
    edit, hits = mistake(right, wrong)
    launch = build(configuration, torch.float16, tmp_path / "csrc", edit)
    p, weight = random_packed(configuration, 448, 1344, 64, seed=1)  # the last stage of K is not full
    activations = torch.randn(16, 1344, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    exact = activations.double() @ weight.double().T
    outputs = [launch(activations, p, None, [2, 0, 1]), launch(activations, p, None, [1, 0, 2], eager=True, backwards=True)]
    assert sum(hits) == 1
    assert any(not torch.allclose(out.double(), exact, rtol=1e-2, atol=1e-2) for out in outputs)
