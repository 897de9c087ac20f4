"""What bench launches, on the software GPU: real sources, real launches, real checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlinctl.benchmarking import accuracy, implementations
from marlinctl.benchmarking.cases import KINDS, Kind, Shape
from marlinctl.benchmarking.implementations import Configured, Dequantized, Operator, fewest
from marlinctl.kernels import launch as launcher
from marlinctl.kernels.configurations import DENSE, DENSE_SM90, SPARSE
from tests.kernels.software_driver import SoftwareDriver, install, software_kernel, software_unpack

CPU = torch.device("cpu")
FIRST = {"dense": DENSE[0], "sparse": SPARSE[0]}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SoftwareDriver:
    monkeypatch.setattr(accuracy, "ODD_SHAPES", ((64, 48, -1), (80, 64, 32)))
    monkeypatch.setattr(accuracy, "ODD_TOKENS", (1, 9))
    monkeypatch.setattr(accuracy, "IDENTITY", (64, 128))
    return install(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_passes_the_check(kind: Kind, driver: SoftwareDriver, tmp_path: Path) -> None:
    """If this failed, bench would launch something else than it names, or call a right kernel wrong."""
    one = Configured(software_kernel(FIRST[kind], torch.float16, tmp_path, resident=2), 2)
    assert (one.name, one.kind, one.dtype) == (f"{FIRST[kind].name}/2", kind, torch.float16)
    found, problems = accuracy.check([one], [(Shape(128, 256, 64), [3])], CPU, thorough=True)
    assert problems == []
    assert found.checks == 2 * 2 * 2 + 4 + 1
    units = FIRST[kind].units(3, 128, 256)
    assert driver.launches[-1].ctas == min(3 * 2, units), "two CTAs on each of three multiprocessors, as far as there is work"


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_over_a_plain_weight_passes_the_check(
    kind: Kind, driver: SoftwareDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, the M from which the operators dequantize would be tuned by something else."""
    function = software_unpack(kind == "sparse", torch.float16, tmp_path)
    monkeypatch.setattr(implementations, "load_unpack", lambda *_: function)
    one = Dequantized(kind, torch.float16)
    found, problems = accuracy.check([one], [], CPU, thorough=True)
    assert problems == [] and found.checks > 0
    assert driver.launches


def test_a_wrong_configuration_fails_the_check(driver: SoftwareDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the checks above could not fail: the groups are told to be twice as long."""
    one = Configured(software_kernel(DENSE[0], torch.float16, tmp_path), 1)
    monkeypatch.setattr(launcher, "group_shift", lambda size, k: 2)
    _, problems = accuracy.check([one], [], CPU, thorough=True)
    assert problems


def test_the_fewest_and_the_most_ctas_are_checked() -> None:
    kernel = software_kernel(DENSE[0], torch.float16, None, resident=3)
    assert [one.per_multiprocessor for one in fewest([Configured(kernel, i) for i in (1, 2, 3)])] == [1, 3]


def test_names_are_those_of_the_table() -> None:
    """If this failed, tables, pictures and tuning would not find what was measured."""
    names = [one(kind, torch.float16).name for one in (Operator, Dequantized) for kind in KINDS]
    assert names == ["int4", "int4 2:4", "dequantize", "dequantize 2:4"]


def test_ways_of_sharing_that_come_to_the_same_are_timed_once() -> None:
    """If this failed, `bench --tune` would check and time clusters of kernels that have none, or leave out those that are there."""
    ways = {}
    for c in (DENSE[0], DENSE_SM90[1]):  # 32 and 16 tiles, of 16 steps each
        kernel = software_kernel(c, torch.float16, None, multiprocessors=132)
        ways[c.wgmma] = [s for s in c.sharings if Configured(kernel, 1, s).is_worth_timing(8, 4096, 4096)]
    assert ways == {False: ["striped", "even"], True: ["striped", "even", "cluster"]}
