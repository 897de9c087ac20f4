"""The targets of tests/fuzz.py without a fuzzer: their seeds, and a fixed budget of arbitrary bytes. `make fuzz` goes further."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import TARGETS, seeds

SEEDS = [(target, seed) for target in TARGETS for seed in seeds(target)]


@pytest.mark.parametrize(("target", "seed"), SEEDS, ids=[f"{target} {i}" for i, (target, _) in enumerate(SEEDS)])
def test_seeds_are_accepted(target: str, seed: bytes, tmp_path: Path) -> None:
    """A target that refuses everything would find nothing."""
    assert TARGETS[target](tmp_path, seed)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SEEDS), st.binary(max_size=60), st.integers(0, 400), st.integers(0, 20))
def test_changed_seeds_are_read_or_refused(tmp_path: Path, seed: tuple[str, bytes], junk: bytes, place: int, gone: int) -> None:
    """Some bytes would give a traceback, a hang, or a model that safetensors reads otherwise."""
    target, data = seed
    place %= len(data)
    TARGETS[target](tmp_path, data[:place] + junk + data[place + gone :])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path: Path, target: str, data: bytes) -> None:
    """The same for bytes that resemble nothing."""
    TARGETS[target](tmp_path, data)
