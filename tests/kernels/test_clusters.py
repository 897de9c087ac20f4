"""Thread block clusters, with the kernels' own sources on the CPU (software_kernel.py): parts of a tile in distributed shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlinctl.kernels.configurations import DENSE_SM90, LARGEST_CLUSTER, SPARSE_SM90, Configuration, Grid
from tests.kernels.software_kernel import NAMED, build, mistake, random_packed

CLUSTER_CASES = [(3, 72, 2048, 128), (17, 192, 576, -1), (65, 136, 896, 128)]  # 2 to 8 CTAs, as the steps of k divide


def clustered(configuration: Configuration, m: int, n: int, k: int) -> Grid:
    """As large clusters as this product can have."""
    tiles = configuration.output_tiles(m, n)
    steps = configuration.units(m, n, k) // tiles
    cluster = max(parts for parts in range(1, LARGEST_CLUSTER + 1) if steps % parts == 0)
    return Grid(tiles * cluster, cluster=cluster)


CLUSTERED = [  # each way in which warps share words and k, of both kinds
    *((NAMED[name], torch.float16) for name in ("m8n384k256x3", "m32n128k256x5", "m64n512k128x4w")),
    *((NAMED[name], torch.float16) for name in ("m8n256k256x6s", "m16n128k512x4s", "m96n256k128x5ws")),
    *((c, torch.bfloat16) for c in (DENSE_SM90[-1], SPARSE_SM90[-1])),
]


SLOW = [NAMED[name] for name in ("m32n128k256x5", "m64n512k128x4w", "m16n128k512x4s", "m96n256k128x5ws")]  # their ways occur in the others


@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [pytest.param(c, dtype, id=f"{c.name}-{str(dtype)[6:]}", marks=pytest.mark.slow if c in SLOW else ()) for c, dtype in CLUSTERED],
)
def test_clusters(configuration: Configuration, dtype: torch.dtype, tmp_path: Path) -> None:
    """If this failed, a part that a cluster's CTA shows to the others would be lost, added in another order, or read too early or too late:
    what comes through distributed shared memory has the bits of what comes through L2.
    """
    launch, sizes = build(configuration, dtype, tmp_path / "csrc"), set()
    for m, n, k, group_size in CLUSTER_CASES:
        p, _ = random_packed(configuration, n, k, group_size, seed=m)
        activations, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        grid = clustered(configuration, m, n, k)
        ctas = list(range(grid.ctas))
        through_l2 = launch(activations, p, bias, ctas)
        lazy = launch(activations, p, bias, ctas, cluster=grid.cluster)
        eager = launch(activations, p, bias, ctas[::-1], cluster=grid.cluster, eager=True, backwards=True)
        case = f"{configuration.name}: M={m} N={n} K={k} group_size={group_size} {grid}"
        assert bool(through_l2.isfinite().all()), case
        assert torch.equal(through_l2, lazy), case
        assert torch.equal(through_l2, eager), f"{case}: the order of CTAs or copies changes the bits"
        sizes.add(grid.cluster)
    assert len(sizes) > 1


CLUSTER_MISTAKES = [
    ("    sync_cluster();\n", "", "reads parts that are not there"),
    ("    sync_cluster();  // a CTA's shared memory", "    //", "leaves while others read"),
    ("if constexpr (K_WARPS == 1) sync_threads<THREADS>();", "", "writes over what is multiplied"),
    ("load_of_cta(cta, from", "load_of_cta(0, from", "one part for all"),
    ("subtile % WARPS * 32 + role.lane", "role.thread", "a subtile of the thread that reduces it"),
    ("role.warp * ctas + cluster_rank()", "role.warp * ctas", "subtiles that no CTA reduces"),
]


@pytest.mark.parametrize(("right", "wrong"), [m[:2] for m in CLUSTER_MISTAKES], ids=[m[2] for m in CLUSTER_MISTAKES])
def test_the_software_gpu_sees_mistakes_of_clusters(tmp_path: Path, right: str, wrong: str) -> None:
    """If this failed, test_clusters could not fail."""
    edit, hits = mistake(right, wrong)
    configuration = DENSE_SM90[0]
    launch = build(configuration, torch.float16, tmp_path / "csrc", edit)
    p, weight = random_packed(configuration, 448, 1344, 64, seed=1)
    activations = torch.randn(16, 1344, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    exact = activations.double() @ weight.double().T
    grid = clustered(configuration, 16, 448, 1344)
    ctas = list(range(grid.ctas))
    outputs = [
        launch(activations, p, None, ctas, cluster=grid.cluster),
        launch(activations, p, None, ctas[::-1], cluster=grid.cluster, eager=True, backwards=True),
    ]
    assert sum(hits) == 1
    assert any(not torch.allclose(out.double(), exact, rtol=1e-2, atol=1e-2) for out in outputs)
