"""The probe: one solve on random numbers before the long part, and what a plan makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.cli import main
from marlinctl.errors import ResourceProblem
from marlinctl.models.families import architecture
from marlinctl.oneshot import probe
from marlinctl.oneshot.open import Options, open_model
from marlinctl.oneshot.probe import run_probe
from marlinctl.oneshot.solve import StackedSolver
from marlinctl.planning.layer_rules import plan as rules
from marlinctl.planning.memory import Work, stages
from marlinctl.planning.time import largest_stage, machine, machine_of_probe, seconds_of_blocks
from marlinctl.sparsify.steps import TORCH
from marlinctl.system.console import Console
from tests.runs import plan, quantize, recipe


def known(tiny: Path) -> tuple[Any, dict[str, int]]:
    found = architecture(open_checkpoint(tiny).config, None)
    return found, dict(rules(found, group_size=32, skip=(), overrides={}, include=()).group_sizes)


@pytest.mark.parametrize("name", ["int4", "int4-best", "sparse-int4"])
def test_the_stack_that_takes_longest_is_solved_as_the_run_would(
    tiny: Path, text: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe of another shape, or with other steps, promises what the run does not keep."""
    found, sizes = known(tiny)
    chosen = recipe(text, name)
    seen: list[tuple[tuple[int, ...], int, bool]] = []
    solve = StackedSolver.solve

    def spy(self: StackedSolver, stack: torch.Tensor, keep: Any, hessian: Any, group_size: int) -> Any:
        assert self == StackedSolver.of(chosen, corrects_drift=True, bfloat16_exact=False)
        seen.append((tuple(stack.shape), group_size, hessian.drift is not None))
        return solve(self, stack, keep, hessian, group_size)

    monkeypatch.setattr(StackedSolver, "solve", spy)
    measured = run_probe(found, sizes, chosen, corrects_drift=True, device=torch.device("cpu"), dtype=torch.float32)
    expected = largest_stage(found, sizes, chosen, machine("cpu", torch.get_num_threads(), 4, matrix_units=False), corrects_drift=False)
    assert seen == [((expected.rows, expected.k), 32, chosen.quantize.drift_correction > 0)]
    assert expected in stages(found, sizes)
    assert measured.stage == expected and measured.seconds > 0 and measured.products > 0 and measured.gram > 0


def test_asymmetric_codes_are_probed_without_the_kernels(tiny: Path, text: Path) -> None:
    """The GPU's kernels refuse zero points: every asymmetric run on a GPU ended in the probe, with an internal error."""
    found, sizes = known(tiny)
    chosen = recipe(text, quantize__symmetric=False)

    def refuses(*_args: Any, **_more: Any) -> Any:
        raise ValueError("the kernels have no zero points")

    kernels = replace(TORCH, sweep=refuses, search_scales=refuses)
    measured = run_probe(found, sizes, chosen, corrects_drift=False, device=torch.device("cpu"), dtype=torch.float32, steps=kernels)
    assert measured.seconds > 0


def test_a_rehearsal_leaves_no_trace_in_random_numbers(tiny: Path, text: Path) -> None:
    """If it drew from the global generator, a run with a probe would differ from one without."""
    found, sizes = known(tiny)
    before = torch.get_rng_state()
    run_probe(found, sizes, recipe(text), corrects_drift=False, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_time_of_a_pass_is_estimated_from_the_measured_rates(tiny: Path, text: Path) -> None:
    """Otherwise --probe would print the guess of another machine."""
    found, sizes = known(tiny)
    chosen = recipe(text)
    guess = machine("cpu", 2, 4, matrix_units=False)
    measured = run_probe(found, sizes, chosen, corrects_drift=False, device=torch.device("cpu"), dtype=torch.float32)
    work = Work.of(chosen, element=4, corrects_drift=False, on_device=False)
    slow = machine_of_probe(guess, measured, chosen, corrects_drift=False)
    slower = replace(measured, seconds=2 * measured.seconds, products=measured.products / 2, gram=measured.gram / 2)
    twice = machine_of_probe(guess, slower, chosen, corrects_drift=False)
    first, second = (seconds_of_blocks(found, sizes, work, chosen, speed, 10**6) for speed in (slow, twice))
    for part in ("forward", "gram", "solve"):
        assert second[part] == pytest.approx(2 * first[part])
    assert first["files"] == second["files"] and first["start"] == second["start"]


def test_memory_that_does_not_suffice_is_found_before_anything_is_written(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first large layer says so, hours later, with a traceback of torch."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore lines")

    monkeypatch.setattr(probe, "_measure", full)
    out = text.parent / "out"
    with pytest.raises(ResourceProblem) as caught:
        quantize(tiny, out, recipe(text))
    assert caught.value.error_id == "E522" and caught.value.exit_code == 5
    assert "Tried to allocate" in str(caught.value) and "more lines" not in str(caught.value)
    assert not out.exists() and not list(text.parent.glob("out.tmp*"))


def test_other_errors_of_a_rehearsal_are_not_called_a_lack_of_memory(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in a solve would be blamed on the machine."""

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(probe, "_measure", broken)
    found, sizes = known(tiny)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_probe(found, sizes, recipe(text), corrects_drift=False, device=torch.device("cpu"), dtype=torch.float32)


def test_a_run_says_how_long_it_will_take(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever starts ten hours of work wants to know that at the start."""
    from marlinctl.oneshot.run import run_job

    run_job(str(tiny), text.parent / "out", recipe(text), Options(dtype="float32"), Console())
    assert "probed the largest solve" in capsys.readouterr().err


def test_plan_probes_when_it_is_asked_to(tiny: Path, text: Path) -> None:
    """--probe without effect would leave the guess, and a probe that nobody asked for would import torch."""
    assert plan(tiny, recipe(text))["probe"] == []
    chosen = recipe(text, "sparse-int4", distill__tokens=1000, distill__data=str(text))
    document = plan(tiny, chosen, probe=probe.probe_on("cpu", None, Console()))
    assert [entry["name"] for entry in document["probe"]] == ["prune", "quantize"]
    assert "this machine" in document["time"]["basis"] and "factor of two" not in document["time"]["basis"]


def test_the_flag_reaches_the_plan(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that click swallows."""
    arguments = ["plan", str(tiny), "--calibration", str(text), "--group-size", "32", "--dtype", "float32", "--json", "--probe"]
    assert main(arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["probe"]) == 1


def test_the_first_estimate_of_a_run_knows_its_processes(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs would be told the time of one."""
    seen: list[Work] = []

    def seconds(_known: object, _sizes: object, work: Work, *_: object) -> dict[str, float]:
        seen.append(work)
        return {"solve": 60.0}

    monkeypatch.setattr(probe, "seconds_of_blocks", seconds)
    opened = open_model(str(tiny), tmp_path / "out", recipe(text), Options(), Console.quiet())
    for ranks in (1, 2):
        probe.probe_before(opened, recipe(text), TORCH, Console.quiet(), device_memory=None, ranks=ranks)
    assert [work.ranks for work in seen] == [1, 2]
