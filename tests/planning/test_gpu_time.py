"""Seconds of a run on a GPU: each phase counts what it does, and reports of runs give back the rates that they were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_rates
from benchmarks.shapes import SHAPES
from marlinctl.errors import UsageError
from marlinctl.models.architectures import Architecture
from marlinctl.models.families import architecture
from marlinctl.oneshot.open import Options
from marlinctl.oneshot.run import run_job
from marlinctl.planning.disk import resident_bytes
from marlinctl.planning.gpu_time import BESIDE, H200, RATES, Counts, Gpu, counts, gram_operations, seconds_of_phases
from marlinctl.planning.memory import Work, experts_together, predicted_device_peak, predicted_peak, stages_of_block
from marlinctl.planning.preflight import require_samples
from marlinctl.planning.time import machine, seconds_of_blocks
from marlinctl.recipes.schema import Recipe, load_recipe, resolve
from marlinctl.system.console import Console
from tests.planning.test_memory import LLAMA_8B, WORK
from tests.runs import plan, recipe

MODEL_BYTES = 16_060_522_496
LLAMA = SHAPES["llama-3-8b"]
FEW, MORE = {"num_hidden_layers": 2}, {"num_hidden_layers": 4}


def chosen(name: str, **changes: Any) -> Recipe:
    return resolve(load_recipe(name), {"calibration.source": "t.txt", "calibration.sequence_length": 2048, **changes})[0]


def counted(name: str, changes: dict[str, Any] | None = None, *, known: Architecture = LLAMA_8B, ranks: int = 1) -> Counts:
    asked = chosen(name, **(changes or {}))
    work = Work.of(asked, element=2, corrects_drift=asked.quantize.drift_correction > 0, on_device=True, ranks=ranks)
    return counts(known, dict.fromkeys(known.linears, 128), work, asked, MODEL_BYTES)


# ---- what is counted -----------------------------------------------------------------------------------------------------------------


def test_a_block_without_linears_is_counted_too() -> None:
    """If blocks of a hybrid were all taken to have attention or experts, its plan would end in a traceback."""
    first, *others = LLAMA_8B.blocks
    bare = replace(first, parts=(), linears={})
    known = replace(LLAMA_8B, blocks=(bare, *others))
    seconds = [seconds_of_phases(counted("int4", known=one), H200)["forward and Gram"] for one in (known, LLAMA_8B)]
    assert 0.9 < seconds[0] / seconds[1] < 1.0


# docs/log/2026-11-30-compression-speed.md, one H200: seconds of the whole process.
MEASURED = {
    ("llama-3-8b", "int4", 2): 19.99,
    ("llama-3-8b", "int4", 6): 23.84,
    ("llama-3-8b", "int4", 32): 41.37,
    ("llama-3-8b", "int4-best", 2): 21.98,
    ("llama-3-8b", "int4-best", 32): 90.37,
    ("llama-3-8b", "sparse-int4", 2): 27.16,
    ("llama-3-70b", "int4", 2): 47.47,
    ("llama-3-70b", "int4", 6): 56.28,
    ("qwen3-30b-a3b", "int4", 2): 21.67,
    ("qwen3-30b-a3b", "int4", 4): 32.14,
}


def test_gradients_take_three_passes_and_the_head_two() -> None:
    """The time of the phase would be that of one pass, or be counted with the walk; and what is not asked for costs none."""
    uniform, weighted = (counted("int4", {"quantize.token_weights": kind}) for kind in ("uniform", "gradient"))
    assert not uniform["token weights"] and "token weights" not in seconds_of_phases(uniform, H200)
    tokens = 128 * 2048
    weights = sum(spec.out_features * spec.in_features for spec in LLAMA_8B.linears.values())
    assert weighted["token weights"]["forward"] == tokens * (6 * weights + 4 * 128256 * 4096)
    assert {phase: terms for phase, terms in weighted.items() if phase != "token weights"} == {
        phase: terms for phase, terms in uniform.items() if phase != "token weights"
    }
    assert 5 < seconds_of_phases(weighted, H200)["token weights"] < 60
    half = counted("int4", {"quantize.token_weights": "gradient"}, ranks=2)["token weights"]
    assert half["forward"] == weighted["token weights"]["forward"] / 2


@pytest.mark.parametrize(("shape", "name", "blocks"), list(MEASURED))
def test_runs_that_were_measured_are_planned_within_a_quarter(shape: str, name: str, blocks: int) -> None:
    """If a term or a rate were lost, the plan of a night's run would be off by hours."""
    known = architecture({**SHAPES[shape], "num_hidden_layers": blocks})
    asked = chosen(name, **{"quantize.bits": 4, "quantize.tune_steps": 0})
    work = Work.of(asked, element=2, corrects_drift=asked.quantize.drift_correction > 0, on_device=True)
    size = 2 * sum(prod(shape) for shape in known.expected.values())
    memory = (40 if shape == "llama-3-70b" else 139) << 30
    seconds = seconds_of_phases(counts(known, dict.fromkeys(known.linears, 128), work, asked, size, memory), H200)
    assert sum(seconds.values()) == pytest.approx(MEASURED[shape, name, blocks], rel=0.25)


def test_tuning_is_planned_within_a_sixth() -> None:
    """It is a third of the time of a sparse run. Two blocks took 4.97 s, 64 steps of 8,192 tokens (docs/log/2026-11-30-accuracy.md)."""
    known = architecture({**LLAMA, "num_hidden_layers": 2})
    assert seconds_of_phases(counted("sparse-int4", known=known), H200)["tune"] == pytest.approx(4.97, rel=1 / 6)
    assert "tune" not in seconds_of_phases(counted("sparse-int4", {"quantize.tune_steps": 0}, known=known), H200)


@pytest.mark.parametrize(("name", "seconds"), [("int4", 32.6), ("int4-best", 57.5)])
def test_runs_on_two_gpus_are_planned_within_a_tenth(name: str, seconds: float) -> None:
    """Measured after the rates were set, in the process of rank 0. If what ranks share were forgotten, it would be one GPU's."""
    assert sum(seconds_of_phases(counted(name, ranks=2), H200).values()) == pytest.approx(seconds, rel=0.1)


def test_phases_of_a_whole_model_are_planned_within_a_sixth() -> None:
    """If terms of two phases were exchanged, the sum would still come out."""
    measured = {"int4": {"forward and Gram": 15.4, "solve": 6.1, "check": 4.5}, "int4-best": {"forward and Gram": 39.4, "solve": 30.9}}
    for name, phases in measured.items():
        seconds = seconds_of_phases(counted(name), H200)
        for phase, expected in phases.items():
            assert seconds[phase] == pytest.approx(expected, rel=1 / 6), (name, phase)


def test_activations_that_the_gpu_does_not_hold_take_time() -> None:
    """Page-locking 39 GiB and moving it to and fro is a quarter of a short run of a 70B."""
    known = architecture({**SHAPES["llama-3-70b"], "num_hidden_layers": 2})
    asked = chosen("int4")
    work = Work.of(asked, element=2, corrects_drift=False, on_device=True)
    sizes = dict.fromkeys(known.linears, 128)
    some, none = (counts(known, sizes, work, asked, MODEL_BYTES, memory) for memory in (40 << 30, 139 << 30))
    assert none["forward and Gram"]["page-locked"] == 0
    elsewhere = some["forward and Gram"]["page-locked"]
    needed = resident_bytes(known, work) + predicted_device_peak(known, sizes, work)
    assert elsewhere == needed - (40 << 30) > 20 << 30
    assert some["forward and Gram"]["to the host"] == 2 * 2 * elsewhere


def test_operations_of_the_forward_pass_are_those_of_the_matrices() -> None:
    """2 N K for each token and linear, and attention; with drift correction the reference model's beside them."""
    tokens = 128 * 2048
    weights = sum(spec.out_features * spec.in_features for spec in LLAMA_8B.linears.values())
    attention = 32 * 2 * 2048 * 4096 * tokens
    assert counted("int4")["forward and Gram"]["forward"] == 2 * weights * tokens + attention
    assert counted("int4-best")["forward and Gram"]["forward"] == 2 * (2 * weights * tokens + attention)


def test_drift_correction_adds_full_cross_products_and_residuals() -> None:
    """A cross matrix has no symmetry, and the residual of o and down is multiplied twice: the estimate once took it for half of that."""
    tokens, widths = 128 * 2048, (4096, 4096, 4096, 14336)  # the inputs of qkv, o, gate up, down
    plain, best = (counted(name)["forward and Gram"]["gram"] for name in ("int4", "int4-best"))
    assert plain == 32 * tokens * sum(gram_operations(k) for k in widths)
    assert best - plain == 32 * tokens * (sum(2 * k * k for k in widths) + sum(4 * k * 4096 for k in (4096, 14336)))
    assert gram_operations(2048) == 2 * 2048**2 and gram_operations(14336) == pytest.approx(2 * 14336**2 * 4 / 7)


def test_each_setting_of_the_solver_is_counted() -> None:
    """Refinement, iterations and mask sweeps decide the time of a solve: one that is not counted makes the plan a guess."""
    none, two = (counted("int4", {"quantize.refine": n})["solve"] for n in (0, 2))
    half = sum(n * k * k for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))) * 32
    assert two["panels"] - none["panels"] == 4 * half and two["products"] - none["products"] == 2 * 8 * half
    assert none["columns"] * 5 == two["columns"] and none["solve"] == two["solve"] == 4 * 32
    few, many = (counted("sparse-int4", {"sparsify.ls_iterations": n})["solve"] for n in (20, 30))
    assert many["products"] - few["products"] == 10 * 2 * half and many["panels"] == few["panels"]
    calm, sweeps = (counted("sparse-int4", {"sparsify.mask_sweeps": n})["solve"] for n in (4, 5))
    assert sweeps["panels"] - calm["panels"] == 2 * half and sweeps["columns"] > calm["columns"]
    greedy = counted("sparse-int4", {"sparsify.method": "sparsegpt"})["solve"]
    assert greedy["iterations"] == 0 and greedy["panels"] < calm["panels"]


def test_experts_are_solved_in_batches_on_their_share_of_the_tokens() -> None:
    """A batch of experts waits once for what each of them would wait for, and each expert sees one token in sixteen."""
    known = architecture({**SHAPES["qwen3-30b-a3b"], **FEW})
    found = counted("int4", known=known)
    together = experts_together(known, dict.fromkeys(known.linears, 128), replace(WORK, on_device=True))
    batches = -(-128 // together)
    assert 1 < batches < 16
    assert found["solve"]["solve"] == 2 * (2 + 2 * batches) and found["forward and Gram"]["expert"] == 2 * 128
    expert = 3 * 2048 * 768
    attention = 2048 * (4096 + 2 * 512) + 4096 * 2048
    expected = 2 * 128 * 2048 * (2 * (8 * expert + attention) + 2 * 2048 * 4096)
    assert found["forward and Gram"]["forward"] == pytest.approx(expected)
    assert sum(stages_of_block(known.blocks[0], {}).values()) == 2 + 2 * 128


def test_the_phases_of_a_run_are_those_that_are_planned(tiny: Path, tmp_path: Path, text: Path) -> None:
    """A phase of the report that no plan has could never be held against it."""
    report, _ = run_job(str(tiny), tmp_path / "out", recipe(text), Options(dtype="float32"), Console.quiet())
    assert set(report["phases"]) <= set(counted("int4"))


def test_the_disk_is_waited_for_where_it_is_slower_than_the_rest() -> None:
    """Writing runs beside the blocks; only what is left when they are done is waited for."""
    found = counted("int4")
    assert "wait for the disk" not in seconds_of_phases(found, H200)
    slow = Gpu("slow disk", {**RATES, "write": 1e-7})
    waits = seconds_of_phases(found, slow)
    beside = sum(waits[phase] for phase in ("forward and Gram", "read", "solve"))
    assert waits["wait for the disk"] == pytest.approx(found["wait for the disk"]["write"] * 1e-7 - beside)


def test_the_estimate_on_a_cpu_is_what_it_was() -> None:
    """Its rates were measured on two processors (docs/comparison.md); counting a GPU in another way must not move them."""
    expected = {
        "int4": (5082.187079497956, 2980.898190859378, 1697.4861391189338),
        "int4-best": (10164.374158995912, 8942.694572578133, 12755.073818702025),
        "sparse-int4": (10164.374158995912, 8942.694572578133, 47019.64049292924),
    }
    for name, (forward, gram, solve) in expected.items():
        asked = resolve(load_recipe(name), {"calibration.source": "t.txt", "quantize.tune_steps": 0})[0]
        work = Work.of(asked, element=2, corrects_drift=asked.quantize.drift_correction > 0, on_device=False)
        sizes = dict.fromkeys(LLAMA_8B.linears, 128)
        seconds = seconds_of_blocks(LLAMA_8B, sizes, work, asked, machine("cpu", 2, 2, matrix_units=False), MODEL_BYTES)
        assert seconds == {"start": 10.0, "forward": forward, "gram": gram, "solve": solve, "files": 112.423657472}


# ---- several ranks -------------------------------------------------------------------------------------------------------------------


def test_ranks_share_samples_and_rows_and_not_factorisations() -> None:
    """What does not get less with more GPUs decides how far they help."""
    one, four = counted("int4"), counted("int4", ranks=4)
    for term in ("forward", "gram", "activations"):
        assert four["forward and Gram"][term] == pytest.approx(one["forward and Gram"][term] / 4)
    for term in ("panels", "products", "weights"):
        assert four["solve"][term] == pytest.approx(one["solve"][term] / 4)
    for term in ("factor", "columns", "solve"):
        assert four["solve"][term] == one["solve"][term]
    assert four["read"] == one["read"] and four["check"] == one["check"]
    sums = 32 * 4 * (3 * 4096**2 + 14336**2)
    rows = 32 * sum(n * k for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
    assert not one["between ranks"] and four["between ranks"]["link"] == pytest.approx(2 * 3 / 4 * sums + 3 / 4 * rows)


@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "cuda"])
def test_memory_of_a_rank_is_less_and_of_all_ranks_more(on_device: bool) -> None:
    """Every process has its own copies of matrices: eight of them on a host that holds one would be killed."""
    asked = chosen("int4", **{"calibration.samples": 512})
    sizes = dict.fromkeys(LLAMA_8B.linears, 128)
    peaks = {
        n: predicted_peak(LLAMA_8B, sizes, Work.of(asked, element=2, corrects_drift=False, on_device=on_device, ranks=n)) for n in (1, 4)
    }
    states = 512 * 2048 * 4096 * 2
    assert peaks[1] - peaks[4] >= 0.7 * states and 4 * peaks[4] > peaks[1]
    if on_device:
        device = [
            predicted_device_peak(LLAMA_8B, sizes, Work.of(asked, element=2, corrects_drift=False, on_device=True, ranks=n)) for n in (1, 4)
        ]
        assert 12 * 14336**2 < device[1] < device[0]


def test_a_plan_says_what_each_process_takes_and_what_all_take(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The check of the host is against all processes; a GPU is held against one of them."""
    one, three = (plan(tiny, recipe(text), device="cuda", device_memory=8 << 30, max_memory=64 << 30, ranks=n) for n in (1, 3))
    host = three["memory"]["host"]
    assert (
        host["processes"] == 3
        and host["together"] == 3 * host["peak"]
        and one["memory"]["host"]["together"] == one["memory"]["host"]["peak"]
    )
    checks = {check["resource"]: check["needed"] for check in three["checks"]}
    assert checks["host memory of 3 processes"] == host["together"]
    assert checks["memory of each GPU"] == three["memory"]["device"]["peak"] <= one["memory"]["device"]["peak"]
    assert one["disk"] == three["disk"]
    assert three["settings"]["ranks"] == 3 and "is a guess" in three["time"]["basis"] and "is a guess" not in one["time"]["basis"]
    from marlinctl.cli import main

    flags = ["--group-size", "32", "--calibration", str(text), "--device", "cuda", "--device-memory", "8GiB", "--max-memory", "64GiB"]
    assert main(["plan", str(tiny), *flags, "--ranks", "3"]) == 0
    assert "in each of 3 processes" in (out := capsys.readouterr().out) and "each GPU" in out and "3 processes" in out


def test_ranks_without_a_gpu_each_do_not_fit(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes on a machine with two GPUs would fail at their start."""
    from marlinctl.planning import plan as planning

    monkeypatch.setattr(planning, "free_device_memory", lambda device: ("NVIDIA Test", 8 << 30) if device in ("cuda:0", "cuda:1") else None)
    assert plan(tiny, recipe(text), device="cuda", ranks=2)["fits"]
    refused = plan(tiny, recipe(text), device="cuda", ranks=4)
    assert not refused["fits"] and any("2 of 4 GPUs" in check["where"] for check in refused["checks"])


@pytest.mark.parametrize(
    ("changes", "settings", "what"),
    [
        (
            {"calibration__samples": 2, "calibration__minimum_tokens": 1},
            {"ranks": 3},
            "2 calibration samples cannot be spread over 3 processes",
        ),
        ({}, {"ranks": 2, "device": "cuda:1"}, "2 processes have a GPU each"),
        (
            {"sparsify__pattern": "2:4", "distill__tokens": 100_000},
            {"ranks": 3},
            "32 rows in a step cannot be shared equally by 3 processes",
        ),
        ({"sparsify__pattern": "2:4", "distill__tokens": 100_000, "distill__mode": "blockwise"}, {"ranks": 2}, "is for one process"),
    ],
)
def test_ranks_that_cannot_be_are_refused(tiny: Path, text: Path, changes: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    """With the id that the run refuses them with."""
    with pytest.raises(UsageError, match=what) as refused:
        plan(tiny, recipe(text, **changes), **settings)
    assert refused.value.error_id == "E288"
    require_samples(recipe(text).calibration.samples, 8)


# ---- rates from reports --------------------------------------------------------------------------------------------------------------


def synthetic(folder: Path, name: str, config: Mapping[str, Any], asked: Recipe, true: Gpu) -> Path:
    """The report of a run on a machine with the rates `true`, as `compress_speed.py --keep` leaves it."""
    known = architecture(config)
    drift = asked.quantize.drift_correction > 0
    work = Work.of(asked, element=2, corrects_drift=drift, on_device=True)
    layers = [{"name": linear, "group_size": 128} for linear in known.linears]
    seconds = seconds_of_phases(counts(known, dict.fromkeys(known.linears, 128), work, asked, MODEL_BYTES), true)
    report = {
        "recipe": {"sha256": "0", **asked.model_dump(mode="json")}, "dtype": "bfloat16", "layers": layers, "bytes": {"source": MODEL_BYTES},
        "phases": {phase: value for phase, value in seconds.items() if phase != "the rest"} | {"nap": 1.0},
    }  # fmt: skip
    place = folder / name
    place.mkdir()
    (place / "marlinctl_report.json").write_text(json.dumps(report))
    (place / "config.json").write_text(json.dumps(config))
    (place / "seconds.json").write_text(json.dumps({"seconds": 1.0 + sum(seconds.values())}))
    return place


def test_rates_come_back_from_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Seven runs of three shapes and three recipes on a machine whose rates are others by factors: planned again within a few percent."""
    wrong = {term: 1.0 + 0.6 * ((7 * i) % 5 - 2) / 2 for i, term in enumerate(RATES)}
    true = Gpu("true", {term: seconds * wrong[term] for term, seconds in RATES.items()})
    small, large = ({**SHAPES[shape], **FEW} for shape in ("qwen3-30b-a3b", "llama-3-70b"))
    made = {
        "8b-int4": (LLAMA, "int4"), "8b-best": (LLAMA, "int4-best"), "8b-sparse": (LLAMA, "sparse-int4"),
        "70b-2": (large, "int4"), "70b-4": ({**large, **MORE}, "int4"), "moe-2": (small, "int4"), "moe-4": ({**small, **MORE}, "int4"),
    }  # fmt: skip
    folders = [synthetic(tmp_path, name, config, chosen(recipe_name), true) for name, (config, recipe_name) in made.items()]
    runs = [plan_rates.read(folder) for folder in folders]
    fitted = Gpu("fitted", plan_rates.fit(runs))
    for run in runs:
        again = seconds_of_phases(run.counted, fitted)
        for phase in (set(run.measured) & set(run.counted)) - set(BESIDE):
            assert again[phase] == pytest.approx(run.measured[phase], rel=0.1, abs=0.15), (run.name, phase)
    monkeypatch.setattr("sys.argv", ["plan_rates.py", *map(str, folders)])
    assert plan_rates.main() == 0
    out = capsys.readouterr().out
    assert "| 8b-int4 | nap | not planned | 1.00 |" in out and "| moe-4 | together |" in out and '| "forward" | 1 / 7.5e+14 |' in out


def test_what_no_run_counts_keeps_its_rate() -> None:
    """A fit of int4 alone must not move the rates of least squares, or make up one for the link."""
    found = counted("int4")
    slow = {phase: 2 * seconds for phase, seconds in seconds_of_phases(found, H200).items()}
    fitted = plan_rates.fit([plan_rates.Run("twice", found, slow)])
    for term in ("iterations", "correction", "link", "expert", "groups"):
        assert fitted[term] == pytest.approx(RATES[term])
    assert fitted["embed"] == pytest.approx(2 * RATES["embed"], rel=0.1)
