"""marlinctl/recipes/schema.py and recipes/yaml_positions.py: what a recipe resolves to, and every way one can be wrong."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marlinctl import cli
from marlinctl.errors import UsageError
from marlinctl.recipes.schema import builtin_names, load_recipe, recipe_hash, recipe_of_document, resolve
from marlinctl.recipes.yaml_positions import read_yaml


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_recipes_load_and_survive_their_own_yaml(name: str, tmp_path: Path) -> None:
    """The recipe.yaml beside a published model must mean the same job, even after the defaults have changed."""
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description.endswith(".")
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_int4_is_the_one_home_of_every_default(tmp_path: Path) -> None:
    """A second copy of a default would drift."""
    empty = load_recipe(write(tmp_path, "name: int4\ndescription: " + load_recipe("int4").description))
    assert empty == load_recipe("int4")
    assert load_recipe("quick").quantize.model_copy(update={"refine": empty.quantize.refine}) == empty.quantize


def test_a_recipe_says_only_what_differs(tmp_path: Path) -> None:
    """Sections must be merged key by key, a list or mapping under a key replaced as a whole."""
    write(tmp_path, "extends: quick\nquantize:\n  skip: [a, b]\n  overrides: {x: {group_size: 32}}\ncalibration: {seed: 7}", "base.yaml")
    mine = load_recipe(write(tmp_path, "extends: base.yaml\nquantize:\n  skip: [c]\n  overrides: {y: {group_size: -1}}\n"))
    quick = load_recipe("quick")
    assert mine.name == "mine" and mine.description == ""
    assert mine.quantize.skip == ("c",)
    assert {pattern: override.group_size for pattern, override in mine.quantize.overrides.items()} == {"y": -1}
    assert mine.calibration == quick.calibration.model_copy(update={"seed": 7})
    assert mine.evaluate == quick.evaluate


def test_a_key_that_came_later_changes_no_hash() -> None:
    """A published folder holds the hash of its recipe, and a job that an earlier version began has none of the key."""
    recipe = load_recipe("int4")
    assert "symmetric" not in recipe.canonical()["quantize"]
    document = recipe.model_dump(mode="json")
    del document["quantize"]["symmetric"]
    assert recipe_of_document(document) == recipe
    asymmetric = resolve(recipe, {"quantize.symmetric": False})[0]
    assert recipe_hash(asymmetric) != recipe_hash(recipe) and recipe_of_document(asymmetric.model_dump(mode="json")) == asymmetric
    rule = resolve(recipe, {"quantize.overrides": {"down_proj": {"group_size": 32}}})[0]
    assert rule.canonical()["quantize"]["overrides"] == {"down_proj": {"group_size": 32}}


def test_the_hash_is_of_the_job_not_of_its_name(tmp_path: Path) -> None:
    """The same job under another name must be recognised; another seed must not."""
    one = load_recipe(write(tmp_path, "name: a\ndescription: x\n"))
    assert recipe_hash(one) == recipe_hash(load_recipe("int4"))
    assert recipe_hash(load_recipe(write(tmp_path, "calibration: {seed: 1}"))) != recipe_hash(one)
    body = json.loads(one.canonical_json())
    del body["name"], body["description"]
    assert recipe_hash(one) == hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert one.canonical_json() == json.dumps(json.loads(one.canonical_json()), sort_keys=True, separators=(",", ":"))


def test_recipes_are_frozen() -> None:
    """Whoever changes a recipe in passing changes what the manifest claims."""
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("int4").quantize.damping = 0.5


# Flags


def test_flags_win_and_are_told_once() -> None:
    """A flag that disagrees with the recipe must count, and the person and the manifest must learn of it."""
    recipe, changes = resolve(
        load_recipe("int4"),
        {
            "quantize.group_size": 64,
            "quantize.bits": 4,
            "quantize.skip": ("a",),
            "calibration.seed": None,
            "pack.formats": ("ct", "marlin"),
        },
    )
    assert recipe.quantize.group_size == 64 and recipe.quantize.skip == ("a",) and recipe.pack.formats == ("ct", "marlin")
    assert recipe.calibration == load_recipe("int4").calibration
    assert changes == [
        "--group-size 64 instead of 128 (recipe int4)",
        "--skip a instead of none (recipe int4)",
        "--format/--also ct, marlin instead of ct (recipe int4)",
    ]


def test_no_flags_change_nothing() -> None:
    """Defaults live in the recipe alone: a flag that was not given must not bring one of its own."""
    assert resolve(load_recipe("quick"), {"quantize.group_size": None, "evaluate.limit": None}) == (load_recipe("quick"), [])


@pytest.mark.parametrize(
    ("flags", "where", "fix"),
    [
        ({"quantize.group_size": 100}, "--group-size 100", "128, 64, 32 or -1"),
        ({"quantize.bits": 3}, "--bits 3", "4"),
        ({"quantize.damping": 0.0}, "--damping 0.0", "greater than 0"),
        ({"quantize.overrides": {"x": {"group_size": 48}}}, "--override ", "128, 64, 32 or -1"),
        ({"calibration.samples": 0}, "--samples 0", "greater than or equal to 1"),
        ({"quantize.overrides": {"x": {"activations": "int8"}}}, "--override ", "bits: 8"),
        ({"quantize.overrides": {"x": {"bits": 4, "activations": "fp8"}}}, "--override ", "bits: 8"),
        ({"quantize.overrides": {"x": {"bits": 8, "activations": "int4"}}}, "--override ", "'int8' or 'fp8'"),
        ({"quantize.overrides": {"x": {"bits": 8, "activations": "int8", "group_size": 64}}}, "--override ", "leave group_size out"),
    ],
)
def test_a_flag_out_of_range_names_the_allowed_set(flags: dict[str, Any], where: str, fix: str) -> None:
    """`--group-size 100` must be refused before any work, with what would be right."""
    with pytest.raises(UsageError) as caught:
        resolve(load_recipe("int4"), flags)
    assert caught.value.error_id == "E202"
    assert caught.value.problems[0].where.startswith(where) and fix in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("recipe", "flags", "where", "fix"),
    [
        ("int4", {"quantize.activation_group": -1}, "--activation-group -1", "--activations int8"),
        ("int4", {"quantize.activation_group": 128}, "--activation-group 128", "--activations int8"),
        ("int4-a8", {"quantize.activation_group": -1, "quantize.activations": "16-bit"}, "--activation-group -1", "--activations int8"),
        ("int4", {"distill.mask_interval": 10}, "--mask-interval 10", "--mask renewed"),
        ("int4", {"distill.mask_decay": 3.0}, "--mask-decay 3.0", "--mask renewed"),
        ("int4", {"distill.temperature": 2.0, "distill.kl": 0.0}, "--temperature 2.0", "--kl 1"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(recipe: str, flags: dict[str, Any], where: str, fix: str) -> None:
    """Its person would believe in what is not done: one scale a token, where nothing is rounded at all."""
    with pytest.raises(UsageError, match="has no effect") as caught:
        resolve(load_recipe(recipe), flags)
    (problem,) = caught.value.problems
    assert caught.value.error_id == "E288" and problem.where == where and fix in problem.fix


def test_a_group_of_activations_without_rounding_is_refused_in_a_file(tmp_path: Path) -> None:
    """If a file were taken at its word, its folders would have 16-bit activations, and the file would say otherwise."""
    file = write(tmp_path, "quantize:\n  activation_group: -1\n")
    with pytest.raises(UsageError, match=r"quantize\.activation_group has no effect") as caught:
        load_recipe(file)
    assert caught.value.error_id == "E288" and caught.value.problems[0].where == f"{file}:2:3"
    assert load_recipe(write(tmp_path, "extends: int4-a8\nquantize: {activation_group: -1}")).quantize.activation_group == -1
    with pytest.raises(UsageError, match="has no effect"):
        load_recipe(write(tmp_path, "extends: mine.yaml\nquantize: {activations: 16-bit, activation_group: -1}", "other.yaml"))


def test_the_recipe_for_rounded_activations_is_the_fast_one() -> None:
    """If one of these were missing, folders would be run by a kernel that takes up to 1.4 times as long, or lose what a rotation gains."""
    q = load_recipe("int4-a8").quantize
    assert (q.activations, q.activation_group, q.group_scales, q.rotate) == ("int8", -1, "integer", "auto")


def test_who_turns_rounding_off_need_not_know_its_groups(tmp_path: Path) -> None:
    """If the group of the recipe below stayed, --activations 16-bit would be refused, or the recipe that is published could not be read."""
    rounding = load_recipe(write(tmp_path, "extends: int4-a8\nquantize: {activation_group: -1}"))
    without, _ = resolve(rounding, {"quantize.activations": "16-bit"})
    assert without.quantize == rounding.quantize.model_copy(
        update={"activations": "16-bit", "activation_group": 128, "group_scales": "float16"}
    )
    assert load_recipe(write(tmp_path, without.to_yaml(), "again.yaml")) == without
    child = load_recipe(write(tmp_path, "extends: mine.yaml\nquantize: {activations: 16-bit}", "child.yaml"))
    assert child.quantize == without.quantize


def test_several_scales_a_token_leave_group_scales_as_they_are() -> None:
    """If they stayed integers, every weight would be less exact for a kernel that scales each group's sums and gains nothing from it."""
    grouped, _ = resolve(load_recipe("int4-a8"), {"quantize.activation_group": 128})
    assert grouped.quantize.group_scales == "float16"
    asked, _ = resolve(load_recipe("int4-a8"), {"quantize.activation_group": 128, "quantize.group_scales": "integer"})
    assert asked.quantize.group_scales == "integer"
    assert resolve(asked, {"quantize.activation_group": 128})[0] == asked, "nothing was changed"


# Everything that can be wrong with a file: text, id, line:column, part of the fix

WRONG = {
    "unknown section": ("quantise:\n  bits: 4", "E206", "1:1", "quantize"),
    "unknown key": ("quantize:\n  bits: 4\n  group_sise: 64", "E206", "3:3", "group_size"),
    "unknown key without a near one": ("quantize:\n  zzz: 64", "E206", "2:3", "known here: bits"),
    "unknown key of an override": ("quantize:\n  overrides:\n    'a':\n      groupsize: 64", "E206", "4:7", "group_size"),
    "wrong type": ("calibration:\n  samples: many", "E206", "2:3", "valid integer"),
    "number as text": ("calibration:\n  samples: '128'", "E206", "2:3", "valid integer"),
    "true is not 1": ("calibration:\n  samples: true", "E206", "2:3", "valid integer"),
    "section is a list": ("quantize: [1, 2]", "E206", "1:1", "valid dictionary"),
    "section is empty": ("quantize:", "E206", "1:1", "valid dictionary"),
    "list item": ("pack:\n  formats:\n    - ct\n    - awq", "E206", "4:7", "use ct"),
    "not in the set": ("quantize: {group_size: 100}", "E206", "1:12", "128, 64, 32 or -1"),
    "activations without bits": ("quantize:\n  overrides: {a: {activations: int8}}", "E206", "2:15", "activations int8 need 8-bit weights"),
    "three bits": ("quantize:\n  bits: 3", "E206", "2:3", "4"),
    "out of range": ("quantize:\n  damping: 0", "E206", "2:3", "greater than 0"),
    "not a number": ("quantize:\n  damping: .nan", "E206", "2:3", "finite number"),
    "yes is a boolean": ("calibration:\n  chat: no", "E206", "2:3", "'auto', 'always' or 'never'"),
    "key twice": ("quantize:\n  bits: 4\n  bits: 4", "E206", "3:3", "2:3"),
    "section twice": ("quantize: {}\npack: {}\nquantize: {}", "E206", "3:1", "1:1"),
    "python tag": ("name: !!python/object/apply:os.system ['true']", "E206", "1:7", "docs/recipes.md"),
    "python name": ("quantize: !!python/name:os.system", "E206", "1:11", "docs/recipes.md"),
    "own tag": ("name: !mine x", "E206", "1:7", "docs/recipes.md"),
    "date": ("name: 2024-01-01", "E206", "1:7", "docs/recipes.md"),
    "alias": ("name: &a x\ndescription: *a", "E206", "1:7", "docs/recipes.md"),
    "merge key": ("quantize:\n  <<: {bits: 4}", "E206", "2:3", "docs/recipes.md"),
    "syntax": ("quantize: [1, 2\nname: x", "E206", "2:5", "docs/recipes.md"),
    "tab": ("quantize:\n\tbits: 4", "E206", "2:1", "docs/recipes.md"),
    "two documents": ("name: a\n---\nname: b", "E206", "2:1", "docs/recipes.md"),
    "list at the top": ("- a\n- b", "E206", "", "docs/recipes.md"),
    "empty": ("", "E206", "", "docs/recipes.md"),
    "list as a key, malformed": ('a: \n  ?  : - +1"a+1', "E206", "2:6", "docs/recipes.md"),
    "complex key": ("? [a, b]\n: c", "E206", "1:3", "docs/recipes.md"),
    "control character": ("name: a\x07b", "E206", "", "control characters"),
    "huge number": ("calibration:\n  samples: " + "9" * 5000, "E206", "2:12", "docs/recipes.md"),
    "extends a number": ("extends: 4", "E206", "1:1", "extends: int4"),
    "extends nothing that is there": ("extends: int5", "E240", "1:1", "did you mean int4?"),
    "extends itself": ("name: x\nextends: mine.yaml", "E206", "2:1", "int4"),
}


@pytest.mark.parametrize(("text", "error_id", "place", "fix"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_recipe_is_refused_at_its_line(text: str, error_id: str, place: str, fix: str, tmp_path: Path) -> None:
    """Without line and column a person searches; without a refusal a typing error decides the numbers."""
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    error = caught.value
    assert error.error_id == error_id, error.problems
    assert error.problems[0].where == f"{path}:{place}".rstrip(":")
    assert fix in error.problems[0].fix


def test_all_problems_of_a_recipe_are_listed(tmp_path: Path) -> None:
    """One problem per run would take a person four runs."""
    path = write(tmp_path, "quantize:\n  bits: 3\n  groupsize: 64\ncalibration:\n  samples: 0\nnme: x\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert sorted(problem.where.rsplit(":", 2)[1] for problem in caught.value.problems) == ["2", "3", "5", "6"]


def test_a_mistake_in_the_parent_is_found_in_the_parent(tmp_path: Path) -> None:
    """The line of the wrong file would send the person to the wrong place."""
    base = write(tmp_path, "quantize:\n  damping: 7\n", "base.yaml")
    with pytest.raises(UsageError) as caught:
        load_recipe(write(tmp_path, "extends: base.yaml\nquantize:\n  bits: 4\n"))
    assert caught.value.problems[0].where == f"{base}:2:3"


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    """PyYAML reads 1e-3 as text; a person would be told that a number is none."""
    assert load_recipe(write(tmp_path, "quantize: {damping: 1e-3}")).quantize.damping == 1e-3
    assert load_recipe(write(tmp_path, "quantize: {damping: 1}")).quantize.damping == 1.0


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{a: " * 50_000, "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 1000))], ids=["lists", "maps", "blocks"]
)
def test_deep_nesting_is_refused_quickly(text: str, tmp_path: Path) -> None:
    """A recipe of brackets must neither crash the interpreter nor keep it busy."""
    started = time.monotonic()
    with pytest.raises(UsageError):
        load_recipe(write(tmp_path, text))
    assert time.monotonic() - started < 20


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    """A model folder, a weight file or a missing path given as a recipe."""
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\x80\x04\xff\xfe" * 10)
    large = write(tmp_path, "#" * (1 << 20) + "\n", "large.yaml")
    for wrong, error_id in ((binary, "E206"), (large, "E206"), (tmp_path, "E240"), (tmp_path / "none.yaml", "E240"), ("a\0b", "E240")):
        with pytest.raises(UsageError) as caught:
            load_recipe(wrong)
        assert caught.value.error_id == error_id


CHARACTERS = st.characters(max_codepoint=0xD7FF)  # beyond it JSON escapes surrogate pairs, which YAML does not know
KEYS = st.text(CHARACTERS, max_size=100)  # YAML's keys end at 1024 characters; an escape takes six
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(CHARACTERS), lambda c: st.lists(c) | st.dictionaries(KEYS, c), max_leaves=8
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine the first draw takes a second
@given(PLAIN)
def test_any_json_mapping_reads_as_itself(value: Any) -> None:
    """JSON is YAML: a reader that is stricter about tags and keys must still read plain data exactly."""
    text = json.dumps({"top": value})
    assert read_yaml(text, "t")[0] == {"top": value}


@given(st.text(max_size=200))
def test_any_text_is_a_mapping_or_a_usage_error(text: str) -> None:
    """An exception of the YAML library would be reported as a defect of marlinctl."""
    try:
        values, places = read_yaml(text, "t")
    except UsageError:
        return
    assert all((key,) in places for key in values)


def test_what_was_read_before_is_as_it_was_written() -> None:
    """If this failed, the changes that one recipe makes to the one it extends would reach the next recipe of the same process."""
    text = "quantize: {skip: [lm_head]}\n"
    for _ in range(2):
        values, places = read_yaml(text, "t")
        assert values == {"quantize": {"skip": ["lm_head"]}} and set(places) == {
            ("quantize",),
            ("quantize", "skip"),
            ("quantize", "skip", "0"),
        }
        values["quantize"]["skip"].append("more")
        places.clear()
    assert str(read_yaml(text, "other")[1]["quantize",]) == "other:1:1"


# The verb


def test_recipes_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ls, show and check are how a person finds out what a run will do."""
    assert cli.main(["recipes", "ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == builtin_names()
    assert cli.main(["recipes", "show", "quick"]) == 0
    mine = write(tmp_path, capsys.readouterr().out)
    assert load_recipe(mine) == load_recipe("quick")
    assert cli.main(["recipes", "check", str(mine), "int4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recipes"][1] == {"name": "int4", "sha256": recipe_hash(load_recipe("int4"))}
    assert cli.main(["recipes"]) == 0
    assert "show" in capsys.readouterr().out


def test_recipes_check_lists_the_problems_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of recipes is checked in one go."""
    one = write(tmp_path, "quantise: {}", "one.yaml")
    two = write(tmp_path, "quantize: {bits: 3}", "two.yaml")
    assert cli.main(["recipes", "check", str(one), str(two)]) == 2
    err = capsys.readouterr().err
    assert f"{one}:1:1" in err and f"{two}:1:12" in err
