"""The JSON document: what is in it follows from the times, and it comes back as it went."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from marlinctl.benchmarking.cases import Layer, LayerSet, Shape
from marlinctl.benchmarking.documents import Ceilings, fixed_costs, ideal_us, make_case, make_drift, make_set, moved_bytes, read_document
from marlinctl.benchmarking.documents import write_document as write
from marlinctl.errors import BadInput
from tests.benchmarking.figures import flat, made_up

CEILINGS = Ceilings(read=1e12, matmul=1e14)


@pytest.mark.parametrize(
    ("bits", "expected"), [(16, 2 * 128 * 256), (4, 128 * 256 // 2 + 2 * 128 * 2), (3, 128 * 256 * 3 // 8 + 2 * 128 * 2)]
)
def test_the_bytes_of_a_call(bits: int, expected: int) -> None:
    """If this failed, GB/s and the ideal would be off. N=128, K=256, two groups; 10 rows in and out."""
    assert moved_bytes(Shape(128, 256, 128), 10, bits) == expected + 2 * 10 * (128 + 256)


def test_the_ideal_is_the_slower_of_reading_and_multiplying() -> None:
    """If this failed, the ideal line would promise what no hardware does. At 1 TB/s and 100 TFLOP/s."""
    shape = Shape(8192, 8192, -1)
    assert ideal_us(shape, 1, "dense", CEILINGS) == pytest.approx(moved_bytes(shape, 1, 4) / 1e6)
    assert ideal_us(shape, 4096, "dense", CEILINGS) == pytest.approx(2 * 4096 * 8192**2 / 1e8)
    assert ideal_us(shape, 4096, "sparse", CEILINGS) == pytest.approx(4096 * 8192**2 / 1e8)


def test_the_baseline_is_the_faster_layout_and_speedups_are_over_it() -> None:
    """If this failed, a slow baseline would flatter us."""
    case = make_case(
        Shape(4096, 4096, 128), 16,
        {"torch [N, K]": ("torch", flat(100.0)), "torch [K, N]": ("torch", flat(90.0)), "int4": ("dense", flat(30.0))},
        CEILINGS, ["dense"],
    )  # fmt: skip
    assert case.baseline == "torch [K, N]"
    ours = case.named("int4")
    assert ours is not None and ours.speedup == pytest.approx(3)
    assert ours.flops_per_second == pytest.approx(2 * 16 * 4096**2 / 30e-6)
    assert ours.of_matmul == pytest.approx(ours.flops_per_second / 1e14)
    assert ours.bytes_per_second == pytest.approx(moved_bytes(case.shape, 16, 4) / 30e-6)


def test_a_set_counts_each_linear_as_often_as_it_has_it() -> None:
    """If this failed, a model with one large and many small linears would get the wrong speed-up. 2 x 10 + 30 us over 2 x 5 + 10."""
    small, large = Shape(64, 64, -1), Shape(128, 64, -1)
    samples = {small: (10.0, 5.0), large: (30.0, 10.0)}
    cases = [
        make_case(shape, 1, {"torch [N, K]": ("torch", flat(torch)), "int4": ("dense", flat(ours))}, CEILINGS, ["dense"])
        for shape, (torch, ours) in samples.items()
    ]
    one = make_set(LayerSet("model", (Layer("a", small, 2), Layer("b", large))), cases)
    ours = next(row for row in one.sums if row.name == "int4")
    assert (ours.us, ours.speedup, ours.shares) == (20, 2.5, [0.5, 0.5])
    assert next(point.speedup for point in one.ideal) == pytest.approx(50 / (2 * cases[0].ideal["dense"] + cases[1].ideal["dense"]))


def test_a_sum_leaves_out_who_was_not_measured_everywhere() -> None:
    """If this failed, a peer that fails on one linear would win the sum."""
    document = made_up()
    cases = list(document.cases)
    first = cases[0]
    cases[0] = replace(first, candidates=[timed for timed in first.candidates if timed.family != "peer"])
    one = make_set(LayerSet("model", tuple(Layer(x.name, Shape(x.n, x.k, x.group_size)) for x in document.sets[0].layers)), cases)
    assert {row.m for row in one.sums if row.family == "peer"} == {row.m for row in one.sums} - {first.m}


def test_a_sum_with_rounded_activations_has_16_bits_where_they_are_as_fast() -> None:
    """If this failed, a block of which one linear alone is multiplied in 8 bits would have no sum, or another one than a model takes."""
    small, large = Shape(64, 64, -1), Shape(128, 64, -1)
    plain = {"torch [N, K]": ("torch", flat(30.0)), "int4": ("dense", flat(10.0))}
    cases = [
        make_case(small, 300, plain, CEILINGS, ["dense"]),  # type: ignore[arg-type]
        make_case(large, 300, {**plain, "int4, int8": ("dense", flat(6.0))}, CEILINGS, ["dense"]),  # type: ignore[dict-item]
    ]
    one = make_set(LayerSet("model", (Layer("a", small, 2), Layer("b", large))), cases, {"int4, int8": "int4"})
    assert {row.name: row.us for row in one.sums} == pytest.approx({"torch": 90.0, "int4": 30.0, "int4, int8": 26.0})
    assert next(row.family for row in one.sums if row.name == "int4, int8") == "dense"
    assert "int4, int8" not in {row.name for row in make_set(LayerSet("model", (Layer("a", small, 2), Layer("b", large))), cases).sums}


def test_the_fixed_cost_is_where_the_line_meets_nothing_to_read() -> None:
    """If this failed, the target of 5.5 us a call could not be judged. 4 us and 2 TB/s by construction, whatever the size."""
    cases = [
        make_case(shape, 1, {"torch [N, K]": ("torch", flat(4 + moved_bytes(shape, 1, 16) / 2e6))}, CEILINGS, ["dense"])
        for shape in (Shape(4096, 4096, 128), Shape(6144, 4096, 128), Shape(28672, 4096, 128))
    ]
    (found,) = fixed_costs(cases)
    assert (found.name, found.m, found.linears) == ("torch [N, K]", 1, 3)
    assert (found.us, found.bytes_per_second) == (pytest.approx(4), pytest.approx(2e12))
    assert fixed_costs(cases[:2]) == [] == fixed_costs([])


def test_drift_is_the_end_over_the_start() -> None:
    """If this failed, a GPU that slowed down by a tenth would look steady."""
    first = made_up().cases[0]
    again = {timed.name: flat(1.1 * timed.us) for timed in first.candidates}
    assert all(ratio == pytest.approx(1.1) for ratio in make_drift(first, again).ratios.values())


def test_a_document_comes_back_as_it_went(tmp_path: Path) -> None:
    """If this failed, --from would draw something else than was measured."""
    document = made_up()
    write(document, tmp_path / "bench.json")
    assert read_document(tmp_path / "bench.json") == document
    content = json.loads((tmp_path / "bench.json").read_text())
    assert (content["kind"], content["bench_version"]) == ("bench", 1)
    (tmp_path / "printed.json").write_text(json.dumps({"schema_version": 1, **content}))  # bench --json > printed.json
    assert read_document(tmp_path / "printed.json") == document


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json", '{"kind": "build"}', '{"kind": "bench", "bench_version": 2}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    """If this failed, a wrong --from would end in a traceback."""
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(BadInput) as caught:
        read_document(tmp_path / "other.json")
    assert caught.value.error_id == "E374" and caught.value.problems[0].where.startswith(str(tmp_path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        read_document(tmp_path / "none.json")
    assert caught.value.error_id == "E374" and caught.value.problems[0].where.startswith(str(tmp_path))


def test_a_field_that_is_wrong_is_named(tmp_path: Path) -> None:
    """If this failed, a document edited by hand could not be repaired."""
    content = made_up().as_json()
    content["cases"][2]["candidates"][0]["us"] = "fast"
    (tmp_path / "edited.json").write_text(json.dumps(content))
    with pytest.raises(BadInput) as caught:
        read_document(tmp_path / "edited.json")
    assert "cases[2].candidates[0].us" in caught.value.problems[0].what


def test_a_field_too_many_or_too_few_is_told(tmp_path: Path) -> None:
    """If this failed, a renamed field would be written and silently lost when read."""
    content = made_up().as_json()
    content["machine"]["colour"] = "red"
    del content["settings"]["dtype"]
    (tmp_path / "edited.json").write_text(json.dumps(content))
    with pytest.raises(BadInput) as caught:
        read_document(tmp_path / "edited.json")
    assert {p.what for p in caught.value.problems} == {"machine.colour is no field of this document", "settings.dtype is missing"}
