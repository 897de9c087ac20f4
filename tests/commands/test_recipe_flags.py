"""Every flag of every verb that changes a recipe: given, it changes the recipe that the job gets; left away, it does not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import click
import pytest

from marlinctl import cli
from marlinctl.errors import UsageError
from marlinctl.recipes.schema import Recipe, load_recipe, recipe_hash

# verb -> what it is called with, and what gets its recipe
VERBS = {
    "compress": (["MODEL", "OUT"], "marlinctl.compress.run_compress"),
    "quantize": (["MODEL", "OUT"], "marlinctl.oneshot.run.run_job"),
    "sparsify": (["MODEL", "OUT"], "marlinctl.oneshot.run.run_job"),
    "plan": (["MODEL"], "marlinctl.planning.plan.make_plan"),
    "distill": (["STUDENT", "OUT", "--teacher", "MODEL"], "marlinctl.distillation.run.run_distill"),
}
# flag -> a value that no recipe has by itself
VALUES = {
    "--bits": "16", "--group-size": "32", "--scale-sign": "positive", "--act-order": "none", "--scale-search": "mse", "--damping": "0.5",
    "--equalize": "never", "--activations": "int8", "--activation-group": "-1", "--group-scales": "integer",
    "--rotate": "always",
    "--token-weights": "gradient",
    "--refine": "7", "--drift-correction": "0.25", "--skip": "k_proj", "--include": "lm_head", "--override": "down_proj=group_size:32",
    "--method": "wanda", "--mask-sweeps": "9", "--ls-iterations": "3", "--permute": "never", "--tune-steps": "8",
    "--calibration": "other.txt", "--samples": "5", "--sequence-length": "77", "--seed": "123", "--chat": "never",
    "--format": "gptq", "--also": "gptq", "--tasks": "arc", "--limit": "3", "--num-fewshot": "3", "--apply-chat-template": None,
    "--text": "other.txt", "--tokens": "5000", "--window": "64",
    "--distill-tokens": "5000", "--distill-data": "other.txt", "--distill-sequence-length": "77",
    "--data": "other.txt", "--mode": "scales", "--learning-rate": "0.25",
    "--warmup": "0.5", "--batch-tokens": "64", "--micro-batch": "3", "--ce": "0.5", "--squarehead": "0.5", "--kl": "0.5",
    "--temperature": "2", "--mask": "renewed", "--mask-interval": "7", "--mask-decay": "0.5",
    "--cache-logits": "5", "--checkpointing": None, "--asymmetric": None, "--save-every": "3",
}  # fmt: skip
# flag -> what it needs beside it, or it is refused
BESIDE = {
    "--activation-group": ["--activations", "int8"], "--mask-interval": ["--mask", "renewed"], "--mask-decay": ["--mask", "renewed"],
}  # fmt: skip
# flags that say how or where a job runs, or how good its result must be: none of them may change what is computed
NOT_OF_THE_RECIPE = {
    "--json", "--quiet", "--verbose", "--log-file", "--no-color", "--debug", "--offline",
    "--revision", "--device", "--dtype", "--overwrite", "--strict", "--deterministic", "--threads", "--max-memory", "--cache-dir",
    "--module-map", "--task-data", "--max-kl", "--max-ppl-ratio", "--publish-anyway", "--eval", "--pattern", "--out", "--device-memory",
    "--teacher", "--keep-job", "--resume", "--probe", "--recipe", "--ranks", "--help-all", "--base-model", "--license", "--tracker",
    "--max-shard-size", "--drop-unexpected",
}  # fmt: skip


class Asked(Exception):
    pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """The recipe with which a verb would start its job."""

    def run(verb: str, *flags: str) -> Recipe:
        arguments, place = VERBS[verb]
        found: list[Recipe] = []

        def job(*given: Any, **named: Any) -> None:
            found.extend(value for value in (*given, *named.values()) if isinstance(value, Recipe))
            raise Asked

        monkeypatch.setattr(place, job)
        monkeypatch.setattr("marlinctl.oneshot.early._asked_here", lambda _options: False)  # the files are not there
        assert cli.main([verb, *arguments, *flags, "-q"]) == 70  # our exception is no known one
        (recipe,) = found
        return recipe

    return run


def flags(verb: str) -> list[str]:
    command = importlib.import_module(f"marlinctl.commands.{verb}").command
    return [max(parameter.opts, key=len) for parameter in command.params if isinstance(parameter, click.Option) and not parameter.hidden]


CASES = [(verb, flag) for verb in VERBS for flag in flags(verb) if flag not in NOT_OF_THE_RECIPE]


@pytest.mark.parametrize(("verb", "flag"), CASES, ids=lambda value: value)
def test_each_flag_changes_the_recipe(verb: str, flag: str, asked: Callable[..., Recipe]) -> None:
    """A flag that is parsed and then forgotten: the job runs, and the person believes in what it did not do."""
    value = "4" if (verb, flag) == ("sparsify", "--bits") else VALUES[flag]  # it means 16 unless told
    beside = BESIDE.get(flag, [])
    plain, changed = asked(verb, *beside), asked(verb, *beside, flag, *([] if value is None else [value]))
    assert recipe_hash(plain) != recipe_hash(changed)
    different = {
        f"{section}.{key}"
        for section, values in plain.model_dump().items()
        if isinstance(values, dict)
        for key, was in values.items()
        if was != changed.model_dump()[section][key]
    }
    assert len(different) == 1, f"{flag} changes {different}"


@pytest.mark.parametrize("verb", VERBS)
def test_without_flags_the_recipe_is_as_it_was(verb: str, asked: Callable[..., Recipe]) -> None:
    """A default of a flag would be a second home of a default."""
    wanted = load_recipe("quick").model_dump()
    if verb == "sparsify":  # what the verb means, whatever the recipe says
        wanted["sparsify"]["pattern"], wanted["quantize"]["bits"] = "2:4", 16
    assert asked(verb, "--recipe", "quick").model_dump() == wanted


def test_every_value_of_the_table_is_a_flag() -> None:
    """A flag that was renamed would leave its row behind, and this file would look complete."""
    known = {flag for verb in VERBS for flag in flags(verb)}
    assert set(VALUES) <= known and known >= NOT_OF_THE_RECIPE


@pytest.mark.parametrize(("codes", "said"), [([], True), (["--bits", "4"], False)])
def test_sparsify_says_that_it_makes_no_codes_of_a_recipe_that_has_them(
    codes: list[str], said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this failed, an hour of `sparsify --recipe sparse-int4` would end in a 16-bit model without a word."""

    def refuse(*_: object, **__: object) -> None:
        raise UsageError("E222", "what", where="where", fix="fix")

    monkeypatch.setattr("marlinctl.oneshot.run.run_job", refuse)
    assert cli.main(["sparsify", "MODEL", "OUT", "--no-eval", "--recipe", "sparse-int4", *codes]) == 2
    assert ("without --bits 4" in capsys.readouterr().err) == said


def test_overrides_of_one_pattern_are_joined(asked: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    """A second rule for a pattern would take the place of the first, and a key that is misspelt would be left out."""
    given = ["--override", "down_proj=bits:8", "--override", "down_proj=group_size:64", "--override", "re:o_proj$=bits:8,group_size:-1"]
    overrides = {"down_proj": {"group_size": 64, "bits": 8}, "re:o_proj$": {"group_size": -1, "bits": 8}}
    assert asked("quantize", *given).model_dump()["quantize"]["overrides"] == overrides
    assert asked("quantize", *given[:2]).model_dump()["quantize"]["overrides"] == {"down_proj": {"bits": 8}}
    rounded = asked("quantize", "--override", "down_proj=bits:8,activations:int8").model_dump()["quantize"]["overrides"]
    assert rounded == {"down_proj": {"bits": 8, "activations": "int8"}}
    wrong_activations = ("down_proj=bits:8,activations:8", "down_proj=bits:8,activations:", "down_proj=bits:8,activations:int4")
    for wrong in ("down_proj=bits:5", "down_proj=bits", "down_proj=damping:1", "down_proj=bits:8,", "bits:8", *wrong_activations):
        assert cli.main(["quantize", *VERBS["quantize"][0], "--override", wrong, "-q"]) == 2
        assert "override" in capsys.readouterr().err
