"""Compiling ahead of time, on a machine without a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from marlinctl.benchmarking import building
from marlinctl.errors import UsageError
from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE, DENSE_SM90, SPARSE
from marlinctl.system.console import Console

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")


@on_linux
def test_one_configuration_lands_where_the_operators_look(own_cache: Path) -> None:
    """If this failed, what was compiled ahead of time would be compiled again at first use, or cost more than 3 s."""
    name = DENSE[0].name
    first = building.build(["sm_86"], only=[name], console=Console.quiet())
    assert [(b["configuration"], b["dtype"], b["architecture"]) for b in first["built"]] == [(name, d, "sm_86") for d in building.DTYPES]
    assert first["folder"] == str(own_cache / "kernels")
    assert len(list((own_cache / "kernels").glob("*.cubin"))) == 2
    for one in first["built"]:
        assert not one["cached"]
        assert one["stack_bytes"] == 0 and 32 <= one["registers"] <= 255
        assert one["shared_bytes"] == DENSE[0].shared_bytes
    started = time.perf_counter()
    again = building.build(["sm_86"], only=[name], console=Console.quiet())
    assert all(one["cached"] for one in again["built"])
    assert time.perf_counter() - started < 1
    assert [one["registers"] for one in again["built"]] == [one["registers"] for one in first["built"]]
    table = building.build_table(again)
    assert name in table and "0 compiled, 2 in the cache already" in table


@on_linux
def test_a_configuration_compiles_in_seconds(own_cache: Path) -> None:
    """If this failed, the first call of a model would hang for too long: the largest configuration, in processor time."""
    largest = max((*DENSE, *SPARSE), key=lambda c: c.tokens * c.k_step)
    started = time.process_time()
    building.build(["sm_90"], only=[largest.name], console=Console.quiet())
    assert (time.process_time() - started) / len(building.DTYPES) < 6  # 1.5 to 3.3 on the processors that it was run on


@on_linux
def test_a_gpu_of_nine_zero_gets_what_it_runs(own_cache: Path) -> None:
    """If this failed, `--arch sm_90` would fill the cache with code that no GPU asks for."""
    document = building.build(["sm_90", "sm_90a"], only=[DENSE[0].name], console=Console.quiet())
    assert [one["architecture"] for one in document["built"]] == ["sm_90a"] * len(building.DTYPES)


def test_small_shared_memory_leaves_configurations_out() -> None:
    """If this failed, kernels would be built for a GPU that cannot start them."""
    assert {c.name for c in building.offered("sm_86")} < {c.name for c in building.offered("sm_90a")}
    assert all(c.shared_bytes <= 99 * 1024 for c in building.offered("sm_86"))
    assert all(c.sparse for c in building.offered("sm_80", "sparse"))


def test_a_kernel_for_one_group_size_is_built_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a model with groups of 64 would find nothing in the cache on Hopper, or something compiled for groups of 128."""
    monkeypatch.setattr(building, "configurations", lambda kind: (DENSE[0], DENSE_SM90[0]) if kind == "dense" else ())
    found = [job for job in building._jobs("sm_90a") if job.name == DENSE_SM90[0].name and job.dtype == "float16"]
    assert {(job.group_size, *(part for part in job.defines if part.startswith("GROUP_SHIFT"))) for job in found} == {
        (32, "GROUP_SHIFT=1"), (64, "GROUP_SHIFT=2"), (128, "GROUP_SHIFT=3"), (-1, "GROUP_SHIFT=-1")
    }  # fmt: skip
    assert [job.group_size for job in building._jobs("sm_90a") if job.name == DENSE[0].name] == [None, None]
    assert {job.group_size for job in building._jobs("sm_90a", [64]) if job.name == DENSE_SM90[0].name} == {64}
    assert not [job for job in building._jobs("sm_89") if job.name == DENSE_SM90[0].name]


def test_8_bit_kernels_are_built_where_they_may_be_chosen() -> None:
    """If this failed, an image for A100s would compile under the first prompt, or one for B200s be built for minutes in vain."""
    sources = {a: {job.source for job in building._jobs(a) if "_a8_" in job.source} for a in building.EVERYWHERE}
    ampere, hopper = ({f"marlin_a8_{a}.cu", f"marlin_a8_factored_{a}.cu"} for a in ("sm80", "sm90"))
    expected = {**dict.fromkeys(("sm_80", "sm_86", "sm_89"), ampere), "sm_90a": {*hopper, "sparse_marlin_a8_factored_sm90.cu"}}
    assert sources == {a: expected.get(a, set()) for a in building.EVERYWHERE}
    found = [job for job in building._jobs("sm_86", [64]) if "_a8_" in job.source]
    assert {part for job in found for part in job.defines if part.startswith("GROUP_SHIFT")} == {"GROUP_SHIFT=2"}
    assert {job.name.endswith("-groups") for job in found} == {True, False} and len({job.name for job in found}) == len(found) / 2


def test_every_architecture_that_is_built_is_one_the_compiler_knows() -> None:
    """If this failed, --build without --arch would end with an error."""
    assert set(building.EVERYWHERE) <= set(jit.ARCHITECTURES)
    assert set(jit.ARCHITECTURES) == {*building.EVERYWHERE, *building.RUNS}


def test_what_this_compiler_does_not_know_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, --build with the NVRTC of CUDA 12 would end with an error, as it does not know sm_110."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert building.default_architectures() == building.EVERYWHERE
    nvrtc = jit._nvrtc()
    monkeypatch.setattr(nvrtc, "nvrtcGetSupportedArchs", lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, [80, 86, 89, 90, 100, 120]))
    assert building.default_architectures() == tuple(name for name in building.EVERYWHERE if name != "sm_110")


@pytest.mark.parametrize(("architectures", "only"), [(["sm_75"], []), (["sm_80"], ["m8n8k8x1"])])
def test_an_unknown_name_is_refused_with_those_that_exist(architectures: list[str], only: list[str]) -> None:
    """If this failed, a misspelled name would build nothing and say that all is well."""
    with pytest.raises(UsageError) as caught:
        building.build(architectures, only=only, console=Console.quiet())
    assert caught.value.error_id == "E202"
    assert ("sm_90" if only == [] else DENSE[0].name) in caught.value.problems[0].fix
