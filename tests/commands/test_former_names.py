"""Flags, recipe keys and values under their former names: the same result, and one line on stderr that says the new name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from marlinctl import cli
from marlinctl.errors import UsageError
from marlinctl.recipes.schema import load_recipe, recipe_hash, resolve, with_sections
from tests.runs import TEXT
from tests.tiny import make_tiny

SMALL = """\
extends: int4
calibration: {source: TEXT, samples: 8, sequence_length: 64, minimum_tokens: 256}
quantize:
  group_size: 32
"""
PUBLISHED = Path(__file__).parent.parent / "published_0_1"
REPORTS = ("marlinctl_report.json", "marlinctl_report.html", "marlinctl_report.md", "README.md")  # they show the command as it was typed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and one recipe under today's names and under the former ones."""
    folder = tmp_path_factory.mktemp("names")
    make_tiny(folder / "model", hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    (folder / "text.txt").write_text(TEXT)
    small = SMALL.replace("TEXT", str(folder / "text.txt"))
    (folder / "plain.yaml").write_text("name: mine\n" + small)
    (folder / "now.yaml").write_text("name: mine\n" + small + "  drift_correction: 0.5\nsparsify:\n  method: iterative\n")
    (folder / "former.yaml").write_text("name: mine\n" + small + "  match: 0.5\nsparsify:\n  method: refined\n")
    return folder


def published(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in REPORTS)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def sparsify(place: Path, out: Path, *flags: str) -> dict[str, bytes]:
    assert cli.main(["sparsify", str(place / "model"), str(out), "--bits", "4", "--no-eval", "-q", *flags]) == 0
    return published(out)


def test_the_result_is_the_same_and_each_new_name_is_said_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script of the last version would stop, or get another model, or its owner would never hear of the new names."""
    wanted = sparsify(place, tmp_path / "now", "--recipe", str(place / "now.yaml"))
    assert "is called" not in capsys.readouterr().err
    assert b"drift_correction: 0.5" in wanted["recipe.yaml"] and b"method: iterative" in wanted["recipe.yaml"]
    flags = ["--recipe", str(place / "plain.yaml"), "--match=0.5", "--method", "refined"]
    assert sparsify(place, tmp_path / "flags", *flags) == wanted
    told = [line for line in capsys.readouterr().err.splitlines() if "is called" in line]
    assert told == [
        "warning: --match is called --drift-correction now",
        "warning: sparsify.method refined is called iterative now",
    ]
    former = place / "former.yaml"
    assert sparsify(place, tmp_path / "keys", "--recipe", str(former)) == wanted
    told = [line for line in capsys.readouterr().err.splitlines() if "is called" in line]
    assert told == [
        f"warning: {former}:6:3: quantize.match is called quantize.drift_correction now",
        f"warning: {former}:8:3: sparsify.method refined is called iterative now",
    ]


@pytest.mark.parametrize("name", ["whole", "sparse"])
def test_the_hash_of_a_recipe_is_what_it_was(name: str) -> None:
    """config.json would change with a rename, and folders of two versions could not be compared."""
    manifest = json.loads((PUBLISHED / name / "marlinctl_manifest.json").read_text())
    told: list[str] = []
    recipe = load_recipe(PUBLISHED / name / "recipe.yaml", deprecated=told.append)
    assert [line.partition(": ")[2] for line in told] == [
        "quantize.match is called quantize.drift_correction now", "sparsify.method refined is called iterative now"
    ]  # fmt: skip
    # A recipe of before says nothing of orders and exponents, and a new run of it chooses them.
    earlier = {"sparsify": {"permute": "never"}, "quantize": {"equalize": "never", "rotate": "never"}}
    recipe = recipe.model_copy(update={key: getattr(recipe, key).model_copy(update=values) for key, values in earlier.items()})
    assert recipe_hash(recipe) == manifest["recipe"]["sha256"]
    assert recipe.quantize.drift_correction == (0.5 if name == "sparse" else 0.0) and recipe.sparsify.method == "iterative"


def test_both_names_at_once_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the two values would be dropped in silence."""
    asked = ["quantize", str(place / "model"), str(tmp_path / "out"), "--match", "0", "--drift-correction", "0.5"]
    assert cli.main(asked) == 2
    assert "--match and --drift-correction are the same option" in capsys.readouterr().err
    both = tmp_path / "both.yaml"
    both.write_text("quantize: {match: 0.5, drift_correction: 0.5}")
    with pytest.raises(UsageError) as caught:
        load_recipe(both)
    assert caught.value.error_id == "E206" and caught.value.problems[0].what == "unknown key quantize.match"


def test_a_wrong_value_is_found_where_it_stands(tmp_path: Path) -> None:
    """The error would name the recipe and not the line."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("quantize:\n  match: 7\n")
    with pytest.raises(UsageError) as caught, pytest.warns(FutureWarning):
        load_recipe(wrong)
    assert caught.value.problems[0].where == f"{wrong}:2:3"


def test_former_names_in_python(recwarn: pytest.WarningsRecorder) -> None:
    """`marlinctl.sparsify(match=0.5)` of the last version would fail."""
    former, _ = resolve(load_recipe("int4"), with_sections({"match": 0.5, "method": "refined"}))
    assert len([item for item in recwarn if item.category is FutureWarning]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert former == resolve(load_recipe("int4"), with_sections({"drift_correction": 0.5, "method": "iterative"}))[0]


def test_former_flags_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that goes away would be learned again."""
    for verb, former in (("quantize", "--match"), ("resume", "--redo-from")):
        assert cli.main([verb, "--help"]) == 0
        assert former not in capsys.readouterr().out
    assert cli.main(["quantize", "a", "b", "--mach", "1"]) == 2
    assert "--match" not in capsys.readouterr().err
