"""What only reads arguments, config.json and the tokenizer is refused before a weight is read and before a model is fetched; and where a
measurement fails all the same, what is finished is kept and measured otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from marlinctl.cli import main
from marlinctl.evaluation.gate import Measurement
from marlinctl.evaluation.settings import EvalSettings
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.recipes.schema import load_recipe, recipe_hash, resolve
from tests.distillation.runs import write_text
from tests.evaluation.local_copies import parquet_layout
from tests.pruned import prune
from tests.tiny import make_tiny

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
}  # fmt: skip
RAISING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model (512 positions), short (64 positions), base (no chat template), raising (a template that refuses system turns), pruned, texts,
    a recipe, task data."""
    root = tmp_path_factory.mktemp("early")
    make_tiny(root / "model", **SIZES)
    make_tiny(root / "short", max_position_embeddings=64, **SIZES)
    make_tiny(root / "base", chat_template=None, **SIZES)
    make_tiny(root / "raising", chat_template=RAISING, **SIZES)
    prune(root / "model", root / "pruned")
    write_text(root / "text.txt")
    (root / "empty.txt").write_text("\n\n")
    (root / "little.txt").write_text("fewer tokens than one window\n")
    (root / "names.jsonl").write_text('{"name": "no text"}\n')
    turns = [{"role": "user", "content": "hello there " * 40}, {"role": "assistant", "content": "general reply " * 40}]
    rows = [json.dumps({"messages": turns})] * 3 + [json.dumps({"messages": [{"role": "system", "content": "be brief"}, *turns]})] * 60
    (root / "chats.jsonl").write_text("\n".join(rows))
    (root / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    (root / "sparse.yaml").write_text("extends: sparse-int4\ncalibration: {minimum_tokens: 32}\n")
    (root / "map.json").write_text("[" * 100_000)
    names = {"decoder": "model", "blocks": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm"}
    attention = {"module": "self_attn", "first": ["self_attn.q_proj"], "last": "self_attn.o_proj"}
    other = {"module": "mlp", "first": ["mlp.up"], "last": "mlp.down"}
    (root / "others-map.json").write_text(json.dumps({**names, "attention": attention, "mlp": other}))
    parquet_layout(root / "data")
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture(autouse=True)
def usual_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval's whole index takes 14 seconds for each misspelled name; the usual folders do here."""
    from lm_eval.tasks import TaskManager

    home = Path(lm_eval.tasks.__file__).parent
    usual = TaskManager(include_path=[home / "winogrande", home / "piqa"], include_defaults=False)
    monkeypatch.setattr("marlinctl.evaluation.tasks._everything", lambda: usual)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes to reading weights fails the test, as exit 70."""

    def reading(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    for name in ("oneshot.open.of_source", "checkpoint.contents._Work.read", "compress.read_contents", "checkpoint.contents.read_contents"):
        monkeypatch.setattr(f"marlinctl.{name}", reading)
    for name in ("_open_pattern", "read_contents"):
        monkeypatch.setattr(f"marlinctl.distillation.open.{name}", reading)


SMALL = ["--recipe", "mine.yaml", "--group-size", "32", "--samples", "2", "--sequence-length", "32", "--calibration", "text.txt"]
SMALL_SPARSE = ["--recipe", "sparse.yaml", *SMALL[2:]]
DISTILL = ["--tokens", "512", "--sequence-length", "32", "--batch-tokens", "256", "--data", "text.txt"]
WORK = {
    "quantize": ["quantize", "model", "out", *SMALL],
    "sparsify": ["sparsify", "model", "out", *SMALL],
    "compress": ["compress", "model", "out", *SMALL],
    "plan": ["plan", "model", *SMALL],
    "eval": ["eval", "model", "--tokens", "512"],
    "distill": ["distill", "pruned", "out", "--teacher", "model", *DISTILL],
}
TRAINING = [*SMALL_SPARSE, "--distill-tokens", "512"]
MEASURED = [
    (["--text", "absent.txt"], "e240"),
    (["--text", "empty.txt"], "e393"),
    (["--text", "names.jsonl"], "e385"),
    (["--text", "data"], "e240"),
    (["--window", "513"], "e246"),
    (["--window", "1"], None),
    (["--tokens", "64", "--window", "65"], "e246"),
    (["--limit", "0"], None),
    (["--limit", str(10**30)], None),
    (["--tasks", "winogrand"], "e243"),
    (["--tasks", "piqa", "--task-data", "data"], "e243"),
    (["--tasks", "winogrande", "--task-data", "absent"], "e243"),
]
CALIBRATED = [
    (["--calibration", "absent.jsonl"], "e240"),
    (["--calibration", "names.jsonl"], "e385"),
    (["--calibration", "empty.txt"], "e393"),
    (["--sequence-length", "513"], "e246"),
    (["--samples", str(10**30)], "e202"),
    (["--recipe", "int4"], "e393"),
    (["--damping", "nan"], "e202"),
    (["--drift-correction", "inf"], "e202"),
    (["--module-map", "map.json"], "e251"),
    (["--module-map", "absent.json"], "e251"),
    (["--module-map", "others-map.json", "--sequence-length", "513"], "e251"),  # the map first, since it may be of another model
    (["--device", "gpu"], "e202"),
    (["--device", "cpuu"], "e202"),
    (["--dtype", "float8"], "e202"),
    (["--chat", "always"], "e253"),
]
CASES = [
    *(("compress", *case) for case in MEASURED),
    *((verb, *case) for verb in ("sparsify", "plan", "eval") for case in MEASURED[::4]),
    *(("quantize", *case) for case in CALIBRATED),
    *((verb, *case) for verb in ("sparsify", "compress", "plan") for case in CALIBRATED[::4][:3]),
    *(("sparsify", ["--max-kl", value], "e202") for value in ("nan", "inf", "-1", "0")),
    *(("compress", ["--max-ppl-ratio", value], "e202") for value in ("nan", "inf", "-1", "0")),
    ("plan", ["--device", "cpuu"], "e202"),
    *((verb, ["--text", "little.txt"], "e393") for verb in ("eval", "sparsify", "compress")),
    ("eval", ["--seed", "-1"], "e246"),
    ("eval", ["--seed", str(2**32)], "e246"),
    ("eval", ["--device", "gpu"], "e202"),
    ("eval", ["--out", "text.txt/scores.json"], "e244"),
    ("eval", ["--out", "text.txt"], "e244"),
    ("eval", ["--batch-size", "0"], "e246"),
    ("distill", ["--data", "absent.txt"], "e240"),
    ("distill", ["--data", "names.jsonl"], "e385"),
    ("distill", ["--sequence-length", "513", "--batch-tokens", "1024"], "e246"),
    ("distill", ["--learning-rate", "nan"], "e202"),
    ("distill", ["--tokens", str(10**30)], "e202"),
    ("distill", ["--module-map", "map.json"], "e251"),
    ("distill", ["--sequence-length", "512", "--batch-tokens", "100000", "--tokens", "999999", "--data", "names.jsonl"], "e385"),
    ("compress", [*TRAINING, "--distill-data", "absent.txt"], "e240"),
    ("compress", [*TRAINING, "--distill-sequence-length", "513"], "e246"),
    ("plan", [*TRAINING, "--distill-data", "absent.txt"], "e240"),
    ("plan", [*TRAINING, "--distill-sequence-length", "513"], "e246"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "more", "anchor"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else str(value))
def test_refused_before_a_weight_is_read(
    verb: str, more: list[str], anchor: str | None, here: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: a day of work ends with a typo in --tasks, and every resume with the same one."""
    assert main([*WORK[verb], *more]) in (2, 3)
    told = capsys.readouterr().err
    if anchor is not None:
        assert told.rstrip().endswith(f"explain {anchor.upper()}") and any(word in told for word in more), told
    assert not (here / "out").exists() and not (here / "out.job").exists()


@pytest.mark.parametrize("verb", ["sparsify", "compress"])
def test_a_model_without_a_chat_template_is_refused_at_once(
    verb: str, here: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: a day of work ends with a base model that cannot be asked in turns."""
    asked = [verb, "base", "out", *SMALL, "--tasks", "winogrande", "--task-data", "data", "--apply-chat-template"]
    assert main(asked) == 2 and capsys.readouterr().err.rstrip().endswith("explain E253")
    assert not (here / "out.job").exists()


def test_a_recipe_says_how_prompts_are_made() -> None:
    """If `compress --apply-chat-template --num-fewshot 5` were lost on the way, an instruct model would be scored as a base model."""
    asked = resolve(load_recipe("int4"), {"evaluate.apply_chat_template": True, "evaluate.num_fewshot": 5})[0]
    settings = EvalSettings.of_recipe(asked.evaluate, None)
    assert (settings.apply_chat_template, settings.num_fewshot) == (True, 5)
    plain = EvalSettings.of_recipe(load_recipe("int4").evaluate, None)
    assert (plain.apply_chat_template, plain.num_fewshot) == (False, None)


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("compress", ["--text", "absent.txt"]),
        ("compress", ["--tasks", "winogrand"]),
        ("sparsify", ["--limit", "0"]),
        ("quantize", ["--calibration", "names.jsonl"]),
        ("quantize", ["--module-map", "map.json"]),
        ("quantize", ["--device", "gpu"]),
        ("quantize", ["--recipe", "int4"]),
        ("eval", ["--text", "absent.txt"]),
        ("eval", ["--tasks", "winogrand"]),
        ("eval", ["--out", "text.txt/scores.json"]),
        ("distill", ["--data", "absent.txt"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)  # fmt: skip
def test_refused_before_a_model_is_fetched(verb: str, more: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: 140 GB are downloaded first, to be told of a typo."""

    def fetching(*_: object, **__: object) -> None:
        raise AssertionError("the hub is asked")

    monkeypatch.setattr("marlinctl.checkpoint.source.fetch", fetching)
    hub = ["org/name" if word in ("model", "pruned") else word for word in WORK[verb]]
    assert main([*hub, *more]) in (2, 3)


@pytest.mark.parametrize("verb", ["quantize", "compress", "distill"])
def test_a_chat_that_the_template_refuses_is_named(
    verb: str, here: Path, no_weights: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Broken: exit 70 and `TemplateError`, for what many templates do with a system turn."""
    prune(here / "raising", tmp_path / "pruned")
    asked = {
        "quantize": ["quantize", "raising", "out", *SMALL, "--calibration", "chats.jsonl", "--samples", "10"],
        "compress": ["compress", "raising", "out", *TRAINING, "--distill-data", "chats.jsonl", "--distill-tokens", "50000"],
        "distill": ["distill", f"{tmp_path}/pruned", "out", "--teacher", "raising", *DISTILL, "--data", "chats.jsonl", "--tokens", "4096"],
    }  # fmt: skip
    assert main(asked[verb]) in (2, 3)
    told = capsys.readouterr().err
    assert "System role not supported" in told and "chats.jsonl, line 4" in told and "--chat never" in told


def test_chats_that_the_template_refuses_are_read_as_text_on_demand(here: Path, tmp_path: Path) -> None:
    """Broken: the way out that the refusal names is none."""
    asked = ["quantize", "raising", str(tmp_path / "out"), *SMALL, "--calibration", "chats.jsonl", "--samples", "10", "--chat", "never"]
    assert main(asked) == 0


# ---- a short model -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [pytest.param("sparsify", marks=pytest.mark.slow), "compress"])
def test_a_model_of_few_positions_is_measured_in_windows_that_it_can_read(
    verb: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: everything is pruned, and then a default is longer than the model."""
    out = tmp_path / "out"
    assert main([verb, "short", str(out), *SMALL, "--tokens", "640"]) == 0
    assert capsys.readouterr().err.count("no longer than the 64 positions") == 1
    report = json.loads((out / "marlinctl_report.json").read_text())
    assert report["evaluation"]["document"]["settings"]["window"] == 64
    assert report["recipe"]["evaluate"]["window"] is None


def test_the_window_of_a_recipe_is_not_shortened(here: Path, tmp_path: Path, no_weights: None) -> None:
    """Broken: a figure of other windows than the person asked for, or a refusal after the work."""
    (tmp_path / "r.yaml").write_text(f"extends: {here}/mine.yaml\nevaluate: {{window: 128}}\n")
    assert main(["compress", "short", str(tmp_path / "out"), *SMALL, "--recipe", str(tmp_path / "r.yaml")]) == 2


def test_a_gate_without_the_memory_to_measure_is_refused_early(
    here: Path, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: hours of work are kept as OUT.rejected, because two models never fitted."""
    monkeypatch.setattr("marlinctl.evaluation.gate.available_memory", lambda: 1000)
    assert main(["sparsify", "model", str(tmp_path / "out"), *SMALL, "--max-kl", "5"]) == 1
    told = capsys.readouterr().err
    assert "explain E115" in told and "needs a measurement" in told
    assert not list(tmp_path.glob("out.*ed"))


# ---- a measurement that fails at the end ---------------------------------------------------------------------------------------------


def failed_at_the_end(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """A run whose arguments were right when it began: the text goes away while it works."""
    with monkeypatch.context() as patch:
        patch.setattr("marlinctl.oneshot.early._asked_here", lambda options: False)
        patch.setattr(Measurement, "check_arguments", lambda self: None)
        patch.setattr(Measurement, "check_model", lambda self, folder, config: None)
        return main(arguments)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are solved from now on."""
    solved: list[int] = []
    run_block = SequentialPipeline.run_block

    def noting(self: SequentialPipeline, block: Any, solve: Any) -> None:
        solved.append(block.index)
        run_block(self, block, solve)

    monkeypatch.setattr(SequentialPipeline, "run_block", noting)
    return solved


@pytest.mark.parametrize(
    ("verb", "how"),
    [
        ("compress", "resume"),
        pytest.param("compress", "whole", marks=pytest.mark.slow),
        ("sparsify", "no-eval"),
    ],
)
def test_what_is_finished_is_measured_otherwise(
    verb: str, how: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: `resume` repeats the error of a misspelled --text for ever, and the corrected command is refused (E286)."""
    out = tmp_path / "out"
    also = ["--also", "marlin"] if verb == "compress" else []
    command = [verb, "model", str(out), *SMALL, *also, "--tokens", "640"]
    wrong = ["--text", "absent.txt", "--window", "600"]
    assert failed_at_the_end(monkeypatch, [*command, *wrong]) == 2
    told = capsys.readouterr().err
    assert f"to resume: marlinctl resume {out}; to change the measurement add --tasks" in told and "--no-eval" in told
    assert blocks == [0, 1] and not out.exists()

    assert main(["resume", str(out)]) == 2, "the same arguments are wrong again"
    assert main([*command, "--text", "text.txt"]) == 2
    assert f"marlinctl resume {out}" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # paths that are given now are relative to where we are now
    (tmp_path / "elsewhere" / "other.txt").write_text((here / "text.txt").read_text())
    if how == "whole":
        monkeypatch.chdir(here)
        assert main([*command, "--text", "text.txt", "--resume"]) == 0
        used: dict[str, Any] = {"text": "text.txt", "window": None}
    elif how == "resume":
        assert main(["resume", str(out), "--text", "other.txt", "--window", "64"]) == 0
        used = {"text": str(tmp_path / "elsewhere" / "other.txt"), "window": 64}
    else:
        assert main(["resume", str(out), "--no-eval"]) == 0
        used = {"text": "absent.txt", "window": 600}
    assert blocks == [0, 1], "nothing is solved again"

    for folder in (out, *((out.with_name("out-marlin"),) if also else ())):
        report = json.loads((folder / "marlinctl_report.json").read_text())
        recipe = load_recipe(folder / "recipe.yaml")
        assert {key: report["recipe"]["evaluate"][key] for key in used} == used
        assert {key: getattr(recipe.evaluate, key) for key in used} == used
        assert ("evaluation" in report) == (how != "no-eval")
        assert ("; marlinctl" in report["command"]) == (how in ("resume", "no-eval"))
        assert main(["verify", str(folder), "--no-load", "-q"]) == 0
    manifest = json.loads((out / "marlinctl_manifest.json").read_text())
    assert manifest["recipe"]["sha256"] == report["recipe"]["sha256"] == recipe_hash(recipe)
    if how != "no-eval":
        settings = json.loads((out / "marlinctl_report.json").read_text())["evaluation"]["document"]["settings"]
        assert settings["window"] == (used["window"] or 512)


def test_what_was_given_to_resume_is_kept_for_the_next_time(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: a resume that is stopped itself forgets what was corrected, and the next one fails on the old typo."""
    out = tmp_path / "out"
    assert failed_at_the_end(monkeypatch, ["compress", "model", str(out), *SMALL, "--text", "absent.txt", "--max-kl", "9"]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["resume", str(out), "--text", "text.txt", "--tokens", "640", "--max-kl", "8"]) == 130
    assert main(["resume", str(out)]) == 0
    report = json.loads((out / "marlinctl_report.json").read_text())
    assert report["evaluation"]["document"]["text"]["name"] == "text.txt"
    assert report["evaluation"]["gate"]["max_kl"] == 8
    assert blocks == [0, 1]


def test_a_job_is_not_mixed_with_another_recipe(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: what decides the codes may differ as well, and two jobs become one; or job.json forgets the job that was begun."""
    out = tmp_path / "out"
    command = ["compress", "model", str(out), *SMALL]
    assert failed_at_the_end(monkeypatch, [*command, "--text", "absent.txt"]) == 2
    before = (tmp_path / "out.job" / "job.json").read_bytes()
    assert main([*command, "--resume", "--text", "text.txt", "--seed", "1"]) == 2
    assert (tmp_path / "out.job" / "job.json").read_bytes() == before


def test_a_verb_that_measures_nothing_takes_no_such_flags(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Broken: the flag is ignored in silence."""
    out = tmp_path / "out"
    run_block = SequentialPipeline.run_block

    def stopping(self: SequentialPipeline, block: Any, solve: Any) -> None:
        if block.index == 1:
            raise KeyboardInterrupt
        run_block(self, block, solve)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialPipeline, "run_block", stopping)
        assert main(["quantize", "model", str(out), *SMALL]) == 130
    capsys.readouterr()
    for flags in (["--text", "text.txt"], ["--no-eval"], ["--max-kl", "1"]):
        assert main(["resume", str(out), *flags]) == 2
        told = capsys.readouterr().err
        assert "explain E288" in told and flags[0] in told
    assert main(["resume", str(out)]) == 0


def test_a_baseline_that_is_not_there_is_the_one_that_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`where` would send the person to the argument MODEL, which is right."""
    assert main(["eval", "model", "--against", "./modle"]) == 2
    told = capsys.readouterr().err
    assert "  where: the model ./modle\n" in told and "MODEL" not in told


def test_a_window_of_more_than_is_measured_is_said_of_the_window(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--tokens is out of range` was said to a person who had given --window alone."""
    assert main(["eval", "model", "--window", "30000"]) == 2
    told = capsys.readouterr().err
    assert (
        "one window of 30000 tokens is more than is measured, 20480 tokens" in told
        and "  fix: a smaller --window, or more --tokens\n" in told
    )
