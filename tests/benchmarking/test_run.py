"""`marlinctl bench`: a whole run on a CPU that plays a GPU, and what the command line says without one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl import cli
from marlinctl.benchmarking import accuracy, implementations, peers, tuning
from marlinctl.benchmarking import run as bench
from marlinctl.benchmarking.cases import KINDS, Layer, LayerSet, Shape, shapes_set
from marlinctl.benchmarking.documents import read_document, write_document
from marlinctl.benchmarking.implementations import dequantized_name
from marlinctl.benchmarking.run import Asked, run
from marlinctl.errors import BadInput, CheckFailed, EnvironmentProblem, UsageError
from marlinctl.kernels import dispatch
from marlinctl.kernels.configurations import DENSE, SPARSE
from marlinctl.kernels.jit import CompilerMissing
from marlinctl.quantize.scheme import Rounding
from marlinctl.system.console import Console
from tests.benchmarking.figures import made_up
from tests.benchmarking.software import Pretended, SoftwareGpu

SETS = (LayerSet("model", (Layer("a", Shape(128, 64, 32)), Layer("b", Shape(64, 64, -1), 2))), shapes_set(["64x64"], -1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "ODD_SHAPES", ((80, 64, -1),))
    monkeypatch.setattr(accuracy, "ODD_TOKENS", (7,))
    monkeypatch.setattr(accuracy, "IDENTITY", (64, 128))


def asked(**changes: Any) -> Asked:
    settings: dict[str, Any] = {"sets": SETS, "tokens": (1, 4), "dtype": torch.float16, "group_size": 128, "kinds": KINDS}
    return Asked(**{**settings, "with_peers": False, "replays": 3, **changes})


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


# A run


@pytest.mark.usefixtures("small")
def test_a_run_measures_every_linear_times_every_m(tmp_path: Path) -> None:
    """If this failed, a GPU's hour would give a table with holes, or sums of something else."""
    gpu = SoftwareGpu()
    document = run(asked(), gpu, Console.quiet())
    assert [(case.n, case.k, case.group_size, case.m) for case in document.cases] == [
        (128, 64, 32, 1), (128, 64, 32, 4), (64, 64, -1, 1), (64, 64, -1, 4)
    ]  # fmt: skip
    for case in document.cases:
        assert [(timed.name, timed.family) for timed in case.candidates] == [
            ("torch [N, K]", "torch"), ("torch [K, N]", "torch"), ("int4", "dense"),
            ("int4, overlap", "dense"), ("int4 2:4", "sparse"), ("int4 2:4, overlap", "sparse"),
        ]  # fmt: skip
        assert case.baseline.startswith("torch [")
    assert [one.name for one in document.sets] == ["model", "shapes"]
    ours = [row for row in document.sets[0].sums if row.name == "int4" and row.m == 4]
    times = {(case.n, case.m): timed.us for case in document.cases if (timed := case.named("int4")) is not None}
    assert ours[0].us == pytest.approx(times[128, 4] + 2 * times[64, 4])
    names = {timed.name for timed in document.cases[0].candidates}
    assert document.drift is not None and set(document.drift.ratios) == names
    assert document.accuracy.checks > 0 and {worst.name for worst in document.accuracy.worst} == names - {"torch [N, K]", "torch [K, N]"}
    write_document(document, tmp_path / "bench.json")
    assert read_document(tmp_path / "bench.json") == document


@pytest.mark.usefixtures("small")
def test_rounded_activations_stand_beside_16_bit_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, `bench` of a folder for int8 activations would not show the products that its model makes, or others."""
    rounding: Rounding = "int8-128"
    eight_bits = dispatch.choose("sm_90a", False, 32, 28672, 4096, "int8")
    assert eight_bits is not None and eight_bits.configuration.int8
    monkeypatch.setattr(implementations, "choose", lambda architecture, sparse, m, n, k, rounds: eight_bits if m >= 4 else None)
    allowed = frozenset({Shape(128, 64, 32)})
    document = run(asked(rounding=rounding, rounded=allowed), SoftwareGpu(), Console.quiet())
    names = {f"int4, {rounding}", f"int4, {rounding}, overlap"}
    for case in document.cases:
        timed = {one.name for one in case.candidates} & names
        assert timed == (names if case.m == 4 and case.shape in allowed else set())
    sums = {row.name: row.us for row in document.sets[0].sums if row.m == 4}
    large, small = (next(case for case in document.cases if (case.m, case.n) == (4, n)) for n in (128, 64))
    times = large.named(f"int4, {rounding}"), small.named("int4")
    assert times[0] is not None and times[1] is not None
    assert sums[f"int4, {rounding}"] == pytest.approx(times[0].us + 2 * times[1].us)
    worst = {one.name: one for one in document.accuracy.worst}
    assert all(worst[name].checks > 0 and worst[name].relative < worst[name].gate / 2 for name in names)
    assert document.settings.rounding == rounding


@pytest.mark.usefixtures("small")
def test_rounding_in_another_way_is_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel that takes one scale for a token where each group has its own would have a speed-up."""

    def multiply(activations: torch.Tensor, p: Any, bias: torch.Tensor | None, *, overlap: bool, rounding: Rounding) -> torch.Tensor:
        return real(activations, p, bias, overlap=overlap, rounding="int8" if rounding == "int8-128" else rounding)

    real = implementations.multiply
    monkeypatch.setattr(implementations, "multiply", lambda *given, rounding="none", **more: multiply(*given, rounding=rounding, **more))
    monkeypatch.setattr(accuracy, "ODD_SHAPES", ((64, 256, 128),))
    with pytest.raises(CheckFailed, match="int4, int8-128: M=7 N=64 K=256"):
        run(asked(rounding="int8-128", rounded=frozenset(SETS[0].shapes)), SoftwareGpu(), Console.quiet())


def test_a_gpu_that_multiplies_nothing_in_8_bits_is_told(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, a person would look for rows that are not there."""
    run(asked(rounding="int8", rounded=frozenset(SETS[0].shapes), only_check=True), SoftwareGpu(), Console())
    assert "config.json allows int8 activations, and a CPU that plays a GPU multiplies none of these" in capsys.readouterr().err


def test_a_wrong_product_ends_the_run_before_anything_is_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel that is wrong would have a speed-up."""
    monkeypatch.setattr(bench, "Operator", lambda kind, dtype, overlap: Pretended(kind, dtype, wrong=lambda product: product * 1.01))
    gpu = SoftwareGpu()
    with pytest.raises(CheckFailed) as caught:
        run(asked(), gpu, Console.quiet())
    assert caught.value.error_id == "E113"
    assert gpu.recorded == []


def test_an_operator_without_a_compiler_says_what_to_install(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a machine whose torch came without cuda-bindings would show a traceback."""

    def missing(product: torch.Tensor) -> torch.Tensor:
        raise CompilerMissing("the package cuda-bindings cannot be imported")

    monkeypatch.setattr(bench, "Operator", lambda kind, dtype, overlap: Pretended(kind, dtype, wrong=missing))
    with pytest.raises(EnvironmentProblem, match="cuda-bindings cannot be imported") as caught:
        run(asked(), SoftwareGpu(), Console.quiet())
    assert caught.value.error_id == "E403"


@pytest.mark.usefixtures("small")
def test_check_alone_times_nothing() -> None:
    gpu = SoftwareGpu()
    document = run(asked(only_check=True), gpu, Console.quiet())
    assert gpu.recorded == [] and document.cases == [] and document.accuracy.checks > 0


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_the_memory_is_left_out_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, --roofline would end on a card of 24 GB after measuring half of it."""
    gpu = SoftwareGpu(memory_bytes=4 * 2**20)
    document = run(asked(tokens=(1, 4, 10_000)), gpu, Console())
    assert {case.m for case in document.cases} == {1, 4}
    assert "2 products do not fit into the 0 GiB of a CPU that plays a GPU" in capsys.readouterr().err
    with pytest.raises(UsageError):
        run(asked(tokens=(10_000,)), gpu, Console.quiet())


def test_a_peer_that_differs_or_fails_is_noted_and_ours_go_on(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, somebody else's new release would end our run, or vanish from the table without a word."""

    def differs(*_: object) -> peers.Call:
        raise peers.ApiDiffers("gemm has no parameter b")

    def breaks(*_: object) -> peers.Call:
        return lambda activations: 1 / 0

    def works(shape: Shape, dtype: torch.dtype, device: torch.device) -> peers.Call:
        weight = torch.randn(shape.k, shape.n).to(dtype)
        return lambda activations: activations @ weight

    found = [peers.Peer(make.__name__, "pytest", ("pytest",), ("sm_90a",), make) for make in (differs, breaks, works)]
    monkeypatch.setattr(peers, "PEERS", tuple(found))
    document = run(asked(with_peers=True), SoftwareGpu(), Console.quiet())
    assert {note.name: note.status for note in document.peers} == {"differs": "differs", "breaks": "failed", "works": "measured"}
    assert {timed.name for case in document.cases for timed in case.candidates if timed.family == "peer"} == {"works"}
    assert any(row.name == "works" for row in document.sets[0].sums)


# The operators' table


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Configurations that are the reference under real names."""
    chosen = [*DENSE[:2], *SPARSE[:2]]
    ours = [Pretended("sparse" if c.sparse else "dense", name=f"{c.name}/1, overlap") for c in chosen]
    monkeypatch.setattr(bench, "configured", lambda device, architecture, kinds, *_: ([one for one in ours if one.kind in kinds], []))
    monkeypatch.setattr(bench, "fewest", lambda implementations: implementations)
    monkeypatch.setattr(bench, "Dequantized", lambda kind, dtype: Pretended(kind, dtype, name=dequantized_name(kind)))
    return [one.name for one in ours]


@pytest.mark.usefixtures("small")
def test_tuning_writes_what_the_operators_read(every: list[str], own_cache: Path) -> None:
    """If this failed, --tune would measure for an hour and change nothing, or the wrong thing."""
    dispatch.tables.cache_clear()
    document = run(asked(every=True), SoftwareGpu(), Console.quiet())
    names = {timed.name for timed in document.cases[0].candidates}
    assert names >= {"dequantize", "dequantize 2:4"} and names & set(every), "a rival that is slow here today may be left out"
    timed_by_name = [replace(case, candidates=[t for t in case.candidates if "int4" not in t.name]) for case in document.cases]
    path = tuning.write_own_table(tuning.merged(tuning.read_own_table(), replace(document, cases=timed_by_name)))
    assert path == own_cache / "kernels" / "dispatch.json"
    table = dispatch.tables()["sm_90a", "dense"]
    for case in document.cases:
        fastest = min((t for t in case.candidates if t.family == "dense" and "/" in t.name), key=lambda t: t.us)
        row = next(row for row in table.rows if (row.m, row.n, row.k) == (case.m, case.n, case.k))
        dense_weight = [t.us for t in case.candidates if t.name == "dequantize"]  # left out where it is hopeless
        if row.choice is None:
            assert min(dense_weight) < fastest.us
        else:
            assert f"{row.choice.name}, overlap" == fastest.name and fastest.us <= min(dense_weight, default=fastest.us)
    dispatch.tables.cache_clear()


@pytest.mark.usefixtures("small", "every")
def test_tuning_knows_what_the_operators_choose_by_their_own_time(own_cache: Path) -> None:
    """If this failed, one disturbed call of the configuration in use would put a slower one into its place."""
    dispatch.tables.cache_clear()
    document = run(asked(every=True, kinds=("dense",)), SoftwareGpu(), Console.quiet())
    case, timed = document.cases[0], next(t for t in document.cases[0].candidates if "/" in t.name)
    now = dispatch.choose(document.machine.architecture, False, case.m, case.n, case.k)
    assert now is not None and f"{now.name}, overlap" not in {t.name for t in case.candidates}
    for own, chosen in ((1.0, now.name), (3.0, timed.name.removesuffix(", overlap"))):
        candidates = [replace(timed, us=2.0), replace(timed, name="int4, overlap", us=own)]
        table = tuning.merged(tuning.read_own_table(), replace(document, cases=[replace(case, candidates=candidates)]))
        assert [row[-1] for row in table["architectures"]["sm_90a"]["dense"]["choices"]] == [chosen]


@pytest.mark.usefixtures("small", "every")
def test_tuning_keeps_what_it_did_not_measure(own_cache: Path) -> None:
    """If this failed, tuning the dense kernels would forget the 2:4 ones, or another GPU's."""
    other: dict[str, Any] = {"measured": {}, "dequantize_from": None, "choices": [[1, 64, 64, f"{SPARSE[0].name}/1"]]}
    before = {"schema_version": dispatch.SCHEMA_VERSION, "architectures": {"sm_80": {"sparse": other}, "sm_90a": {"sparse": other}}}
    document = run(asked(every=True, kinds=("dense",)), SoftwareGpu(), Console.quiet())
    after = tuning.merged(before, document)["architectures"]
    assert after["sm_80"] == {"sparse": other}
    assert after["sm_90a"]["sparse"] == other and set(after["sm_90a"]) == {"dense", "sparse"}


def test_a_damaged_table_is_told_before_anything_is_measured(own_cache: Path) -> None:
    """If this failed, the hour would be lost when the table is written."""
    (own_cache / "kernels").mkdir(parents=True)
    (own_cache / "kernels" / "dispatch.json").write_text("{")
    with pytest.raises(BadInput) as caught:
        tuning.read_own_table()
    assert caught.value.error_id == "E374" and "dispatch.json" in caught.value.problems[0].where


# The command line

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")


@without_gpu
def test_without_a_gpu_three_lines_name_what_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, nobody would learn that kernels can be compiled and tiles checked on this machine."""
    code, out, err = run_main(capsys, "--layers", "llama3-8b")
    assert (code, out) == (4, "")
    assert [line.split(":")[0].strip() for line in err.splitlines()] == ["error", "where", "fix", "docs"]
    assert "--build" in err and "verify --kernels" in err and "explain E420" in err


@without_gpu
def test_without_a_gpu_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_main(capsys, "--json")
    assert code == 4 and json.loads(out)["error"]["id"] == "E420"


@pytest.mark.parametrize(
    ("arguments", "error_id", "where"),
    [
        (["--build", "--tokens", "1"], "e288", "--build --tokens"),
        (["--build", "--from", "a.json"], "e288", "--build --from"),
        (["--from", "a.json", "--tune"], "e288", "--from --tune"),
        (["--arch", "sm_80"], "e288", "--arch"),
        (["--only", "m8n128k256x4"], "e288", "--only"),
        (["--tune", "--check"], "e288", "--tune --check"),
        (["--build", "--arch", "sm_70"], "e202", "--arch sm_70"),
        (["--tokens", "none"], "e202", "--tokens"),
        (["--shape", "1x1"], "e202", "--shape"),
        (["--group-size", "48", "--layers", "ideal"], "e202", "--group-size"),
    ],
)
def test_what_means_nothing_is_refused(arguments: list[str], error_id: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, an option would be ignored without a word, or need a GPU to be refused."""
    code, _, err = run_main(capsys, *arguments)
    assert code == 2 and f"explain {error_id.upper()}" in err and f"  where: {where}\n" in err


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
def test_build_tells_what_it_compiled(capsys: pytest.CaptureFixture[str], tmp_path: Path, own_cache: Path) -> None:
    """If this failed, an image could not be prepared on a machine without a GPU."""
    options = ("--build", "--arch", "sm_80", "--only", DENSE[0].name, "--only", "unpack", "--cache-dir", str(tmp_path / "here"))
    code, out, _ = run_main(capsys, *options, "--json")
    document = json.loads(out)
    assert (code, document["schema_version"], document["kind"]) == (0, 1, "build")
    assert {one["configuration"] for one in document["built"]} == {DENSE[0].name, "unpack"}
    assert len(list((tmp_path / "here" / "kernels").glob("*.cubin"))) == len(document["built"]) == 4
    assert not own_cache.exists()
    code, out, _ = run_main(capsys, *options)
    assert code == 0 and "0 compiled, 4 in the cache already" in out


def test_pictures_are_drawn_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, a picture could not be drawn again without the GPU."""
    write_document(made_up(), tmp_path / "bench.json")
    code, out, err = run_main(capsys, "--from", str(tmp_path / "bench.json"), "--out", str(tmp_path / "pictures"))
    assert code == 0, err
    assert "speedup-llama3-8b.png" in {path.name for path in (tmp_path / "pictures").iterdir()}
    assert read_document(tmp_path / "pictures" / "bench.json") == made_up()
    assert "llama3-8b, sum of 4 linears" in out
    code, out, _ = run_main(capsys, "--from", str(tmp_path / "bench.json"), "--json")
    assert {**made_up().as_json(), "schema_version": 1} == json.loads(out)


def test_files_of_somebody_else_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bench --out .` in a project that has a bench.json of its own, or a link of that name, would overwrite it."""
    document = tmp_path / "made.json"
    write_document(made_up(), document)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bench.json").write_text('{"kind": "mine"}')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "roofline.png").write_text("mine")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "bench.json").symlink_to(document)
    for name in "abc":
        code, _, err = run_main(capsys, "--from", str(document), "--out", str(tmp_path / name))
        assert code == 2 and "explain E224" in err, name
        assert len(list((tmp_path / name).iterdir())) == 1
    assert (tmp_path / "a" / "bench.json").read_text() == '{"kind": "mine"}'
    code, _, err = run_main(capsys, "--from", str(document), "--out", str(tmp_path / "d"))
    assert code == 0, err
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "d" / "speedup-llama3-8b.png").unlink()
    (tmp_path / "d" / "speedup-llama3-8b.png").symlink_to(secret)
    assert run_main(capsys, "--from", str(document), "--out", str(tmp_path / "d"))[0] == 0, "what it wrote itself may be replaced"
    assert secret.read_text() == "mine"


def test_a_file_that_is_no_document_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[]")
    code, _, err = run_main(capsys, "--from", str(tmp_path / "other.json"))
    assert code == 3 and "explain E374" in err and "other.json" in err
