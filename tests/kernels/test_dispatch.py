"""Which kernel multiplies: the packaged table, files that are wrong, and what measurements become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlinctl.checkpoint.source import cache_root
from marlinctl.kernels import dispatch, jit
from marlinctl.kernels.configurations import A8_FACTORED_SM80, A8_SM80, DENSE, SPARSE, SPARSE_A8_FACTORED_SM90
from marlinctl.kernels.dispatch import PACKAGED, choose, read, reasoned, table_of, text_of
from marlinctl.quantize.scheme import Rounding


@pytest.fixture(autouse=True)
def no_memory(own_cache: Path) -> None:
    """Choices and tables are remembered for a process; every test has its own cache folder."""
    dispatch.choose.cache_clear()
    dispatch.tables.cache_clear()


def name(architecture: str, sparse: bool, m: int, n: int, k: int) -> str | None:
    choice = choose(architecture, sparse, m, n, k)
    return None if choice is None else choice.name


def test_measured_shapes_get_the_fastest_kernel() -> None:
    """If this failed, the operator would run another kernel than the one that won."""
    assert name("sm_90a", False, 1, 73728, 18432) == "wgmma-m8n384k256x3/1 mixed"
    assert name("sm_90a", False, 1, 4096, 4096) == "m8n128k512x5/1"
    assert name("sm_90a", True, 64, 28672, 4096) == "sparse-wgmma-m64n256k256x3w/1 even"


def test_what_lies_between_measured_m() -> None:
    """If this failed, 8 tokens would pay for 16, or 40 would run in a tile for 32 with half of a second one empty."""
    at = [name("sm_90a", False, m, 28672, 4096) for m in (8, 9, 17, 40, 129, 191)]
    assert [name.split("n")[0].removeprefix("wgmma-") for name in at if name is not None] == ["m8", "m16", "m32", "m48", "m128", "m128"]


def test_the_nearest_shape_decides_for_others() -> None:
    """If this failed, a model whose layers were not measured would get whatever comes first."""
    near = dispatch.tables()["sm_90a", "dense"]
    assert near.choose(1, 29568, 3584) == near.choose(1, 28672, 4096)
    assert near.choose(1, 3584, 3584) == near.choose(1, 4096, 4096)
    assert near.choose(1, 4096, 3584) != near.choose(1, 29568, 3584)


@pytest.mark.parametrize("kind", ["rounded", "rounded-128", "factored", "sparse-factored"])
def test_one_token_keeps_16_bits(kind: str) -> None:
    """If this failed, text would be written with rounded activations, and slower: the first row measured may have a tile for 32."""
    table = dispatch.tables()["sm_90a", kind]
    assert [(row.n, row.k) for row in table.rows if table.choose(1, row.n, row.k) is not None] == []


def test_a_measured_m_gets_what_was_measured() -> None:
    """If this failed, a tile for more tokens would go before the faster one, which was measured for this very product."""
    rows = [dispatch.Row(m, 64, 64, dispatch.Choice(c, 1)) for m, c in ((16, DENSE[4]), (32, DENSE[3]))]
    table = dispatch.Table(None, tuple(rows))
    assert [found.configuration if (found := table.choose(m, 64, 64)) else None for m in (16, 17, 32)] == [DENSE[4], DENSE[4], DENSE[3]]


def test_large_m_is_dequantized_once() -> None:
    """If this failed, long prompts would decode every weight for every 64 tokens."""
    assert choose("sm_90a", False, 256, 4096, 4096) is not None
    assert choose("sm_90a", False, 257, 4096, 4096) is None
    assert choose("sm_90a", False, 1024, 57344, 8192) is not None, "dequantizing as many weights takes longer than the kernel"
    assert choose("sm_90a", False, 1025, 57344, 8192) is None
    assert choose("sm_80", False, 511, 4096, 4096) is not None
    assert choose("sm_80", True, 1024, 4096, 4096) is None


@pytest.mark.parametrize("architecture", jit.ARCHITECTURES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_every_architecture_has_a_choice_that_fits(architecture: str, sparse: bool) -> None:
    """If this failed, a GPU without measurements would have no kernel, or one that it cannot start."""
    for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 100000):
        choice = reasoned(architecture, dispatch.KINDS[sparse]).choose(m, 4096, 11008)
        assert choice is not None and choice.configuration.fits(architecture) and choice.configuration.sparse == sparse
        assert choice.configuration.tokens >= min(m, 64)
        assert choice.per_multiprocessor == choice.configuration.ctas


def document(**changes: Any) -> dict[str, Any]:
    table = {"measured": {"gpu": "a GPU"}, "dequantize_from": 64, "choices": [[1, 64, 64, f"{DENSE[2].name}/2"]]} | changes
    return {"schema_version": 2, "architectures": {"sm_80": {"dense": table}}}


def test_the_users_table_goes_first(own_cache: Path) -> None:
    """If this failed, what `--tune` measured on this very GPU would be ignored, or would take the other tables away."""
    jit.default_folder().mkdir(parents=True)
    (jit.default_folder() / "dispatch.json").write_text(json.dumps(document()))
    assert name("sm_80", False, 1, 4096, 4096) == f"{DENSE[2].name}/2"
    assert choose("sm_80", False, 64, 4096, 4096) is None
    assert name("sm_90a", False, 1, 4096, 4096) == "m8n128k512x5/1"
    other = choose("sm_80", True, 1, 64, 64)
    assert other is not None and other.configuration in SPARSE


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ([], "list indices"),
        ({"architectures": {}}, "it lacks 'schema_version'"),
        ({"schema_version": 1, "architectures": {}}, "schema_version is 1"),
        ({"schema_version": 2, "architectures": {"sm_70": {"dense": {}}}}, "no kernel for sm_70, dense"),
        ({"schema_version": 2, "architectures": {"sm_80": {"thick": {}}}}, "no kernel for sm_80, thick"),
        (document(choices=[]), "no choices"),
        (document(choices=[[1, 64, 64, "m7n7k7x7/1"]]), "sm_80 has no configuration 'm7n7k7x7'"),
        (document(choices=[[1, 64, 64, f"{DENSE[6].name}/1"]]), "sm_80 has no configuration"),
        (document(choices=[[1, 64, 64, f"{SPARSE[0].name}/1"]]), "sm_80 has no configuration"),
        (document(choices=[[1, 64, f"{DENSE[0].name}/1"]]), "not enough values"),
        (document(choices=[[1, 64, 0, f"{DENSE[0].name}/1"]]), "positive integers"),
        (document(choices=[[1, 64, 64, DENSE[0].name]]), "is not CONFIGURATION/CTAs"),
        (document(choices=[[1, 64, 64, f"{DENSE[0].name}/0"]]), "is not CONFIGURATION/CTAs"),
        (document(choices=[[1, 64, 64, f"{DENSE[0].name}/1 uneven"]]), "followed by one of striped, even, mixed"),
        (document(choices=[[1, 64, 64, 7]]), "7 is not CONFIGURATION/CTAs"),
        (document(dequantize_from="64"), "dequantize_from"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, broken: Any, what: str) -> None:
    """If this failed, a damaged table would choose silently, or end in a traceback that names no file."""
    path = tmp_path / "dispatch.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="is no table of kernels") as caught:
        read(path)
    assert what in str(caught.value) and str(path) in str(caught.value)


def measured_row(m: int, **times: float) -> dict[str, Any]:
    names = {"small": f"{DENSE[0].name}/2", "large": f"{DENSE[4].name}/1 even", "matmul": "torch.matmul", "dequantize": "dequantize"}
    return {"sparse": False, "n": 64, "k": 128, "m": m, "group_size": 128, **{names[name]: time for name, time in times.items()}}


def test_measurements_become_a_table(tmp_path: Path) -> None:
    """If this failed, --tune would write another table than it measured."""
    timing = [measured_row(64, small=9.0, large=4.0, matmul=3.0), measured_row(1, small=1.0, large=2.0, matmul=0.5)]
    table = table_of("sm_80", {"gpu": "a GPU"}, timing)
    assert table["choices"] == [[1, 64, 128, f"{DENSE[0].name}/2"], [64, 64, 128, f"{DENSE[4].name}/1 even"]]
    assert table["dequantize_from"] == 512, "reasoned where it was not measured"
    path = tmp_path / "table.json"
    path.write_text(text_of({"schema_version": 2, "architectures": {"sm_80": {"dense": table}}}))
    choice = read(path)["sm_80", "dense"].choose(64, 64, 128)
    assert choice is not None and choice.configuration == DENSE[4]
    assert path.read_text().count("\n") < 30


def test_a_linear_may_be_dequantized_before_others() -> None:
    """If this failed, small linears would wait for large ones, or large ones would be dequantized in vain."""
    timing = [measured_row(64, small=9.0, large=4.0, dequantize=5.0), measured_row(256, small=9.0, large=7.0, dequantize=6.0)]
    table = table_of("sm_80", {}, timing)
    assert table["choices"] == [[64, 64, 128, f"{DENSE[4].name}/1 even"], [256, 64, 128, "dequantize"]]
    jit.default_folder().mkdir(parents=True)
    (jit.default_folder() / "dispatch.json").write_text(
        text_of({"schema_version": 2, "architectures": {"sm_80": {"dense": {**table, "dequantize_from": 1024}}}})
    )
    assert choose("sm_80", False, 64, 64, 128) is not None and choose("sm_80", False, 65, 64, 128) is None


def test_where_dequantizing_pays_is_measured() -> None:
    """If this failed, one lucky shape or M would send slower ones to torch.matmul."""
    rows = [measured_row(m, small=m, large=m, dequantize=100.0) for m in (1, 64, 128, 256)]
    assert table_of("sm_80", {}, rows)["dequantize_from"] == 128
    rows.append(measured_row(128, small=128, large=128, dequantize=200.0))
    assert table_of("sm_80", {}, rows)["dequantize_from"] == 256
    assert table_of("sm_80", {}, rows[:2])["dequantize_from"] == 512, "nowhere as far as was measured: reasoned"
    rows = [measured_row(m, small=m, large=m, dequantize=5000.0) for m in (1, 1024)]
    assert table_of("sm_80", {}, rows)["dequantize_from"] == 1025, "and not where it was measured to be slower"
    assert table_of("sm_80", {}, [*rows, measured_row(4096, small=1, large=1, dequantize=2.0)])["dequantize_from"] is None


def test_the_packaged_table_is_as_the_program_writes_it() -> None:
    """If this failed, the next measurement would change lines that it did not measure."""
    assert PACKAGED.read_text("utf-8") == text_of(json.loads(PACKAGED.read_text("utf-8")))


@pytest.mark.parametrize(
    "variables", [{}, {"XDG_CACHE_HOME": "/somewhere/cache"}, {"XDG_CACHE_HOME": ""}, {"MARLINCTL_CACHE": "/elsewhere"}]
)
def test_kernels_and_tool_agree_on_the_cache(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, `bench --build` would compile into a folder in which the operators do not look."""
    for variable in ("XDG_CACHE_HOME", "MARLINCTL_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert jit.default_folder() == cache_root(None) / "kernels"


WAYS = pytest.mark.parametrize(("rounding", "factored"), [("int8", False), ("int8-128", False), ("int8", True)])


@WAYS
@pytest.mark.parametrize("architecture", jit.ARCHITECTURES)
def test_8_bits_where_they_were_not_measured(architecture: str, rounding: Rounding, factored: bool) -> None:
    """If this failed, an A100 or an RTX 40 would never multiply in 8 bits, or with a kernel that it cannot start, or Blackwell would."""
    found = [choose(architecture, False, m, 4096, 11008, rounding, factored) for m in (64, 65, 128, 129, 512, 100000)]
    if architecture in ("sm_80", "sm_86", "sm_89"):
        expected = A8_FACTORED_SM80 if factored else A8_SM80
        assert all(choice is not None and choice.configuration in expected and choice.configuration.fits(architecture) for choice in found)
        few = choose(architecture, False, 63, 4096, 11008, rounding, factored)
        assert few is not None and few.configuration in DENSE
        assert choose(architecture, True, 64, 4096, 11008, rounding) == choose(architecture, True, 64, 4096, 11008), "2:4 has 16 bits"
    elif architecture != "sm_90a":
        assert not any(choice is not None and choice.configuration.int8 for choice in found)


def test_a_measured_table_of_8_bits_goes_first(own_cache: Path) -> None:
    """If this failed, what was measured on such a GPU would not count."""
    choices = [[96, 64, 64, "16-bit"], [128, 64, 64, f"{A8_SM80[0].name}/1"]]
    own = {"schema_version": 2, "architectures": {"sm_86": {"rounded": {"measured": {}, "dequantize_from": None, "choices": choices}}}}
    jit.default_folder().mkdir(parents=True)
    (jit.default_folder() / "dispatch.json").write_text(json.dumps(own))
    choice = choose("sm_86", False, 97, 4096, 4096, "int8")
    assert choice is not None and choice.configuration == A8_SM80[0]
    assert dispatch.fewest_rounded("sm_86", 4096, 4096, "int8") == 97
    assert dispatch.fewest_rounded("sm_86", 4096, 4096, "int8-128") == 64


@WAYS
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (4096, 4096), (64, 64)])
def test_the_fewest_rows_in_8_bits(n: int, k: int, rounding: Rounding, factored: bool) -> None:
    """If this failed, verify would check 8-bit products with so few rows that the operator makes 16-bit ones of them."""

    def eight_bits(m: int) -> bool:
        found = choose("sm_90a", False, m, n, k, rounding, factored)
        return found is not None and found.configuration.int8

    assert dispatch.fewest_rounded("sm_90a", n, k, rounding, factored) == next(m for m in range(1, 5000) if eight_bits(m))
    assert dispatch.fewest_rounded("sm_80", n, k, rounding, factored) == 64
    assert dispatch.fewest_rounded("sm_120", n, k, rounding, factored) is None


def test_sparse_weights_have_8_bits_only_where_they_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel that was never timed would serve 2:4 models, or one that was measured would not."""
    without = {key: table for key, table in dispatch.tables().items() if key[1] != dispatch.SPARSE_FACTORED}
    eight = f"{SPARSE_A8_FACTORED_SM90[0].name}/1 even"
    table = {"dequantize_from": None, "choices": [[64, 64, 64, "16-bit"], [128, 64, 64, eight]]}
    data = json.dumps({"schema_version": 2, "architectures": {"sm_90a": {dispatch.SPARSE_FACTORED: table}}}).encode()
    for tables, fewest in ((without, None), (without | dispatch.parse(data, tmp_path), 65)):
        monkeypatch.setattr(dispatch, "tables", lambda given=tables: given)
        choose.cache_clear()
        assert dispatch.fewest_rounded("sm_90a", 64, 64, "int8", True, sparse=True) == fewest
        assert dispatch.fewest_rounded("sm_80", 64, 64, "int8", True, sparse=True) is None, "there is none with mma.sync"
        for m in (1, 64, 65, 300):
            found, plain = choose("sm_90a", True, m, 64, 64, "int8", True), choose("sm_90a", True, m, 64, 64)
            assert (found != plain) == (fewest is not None and m >= fewest)
            assert choose("sm_90a", True, m, 64, 64, "int8-128", True) == choose("sm_90a", True, m, 64, 64, "int8") == plain
    choose.cache_clear()
