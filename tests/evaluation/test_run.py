"""`marlinctl eval` from end to end, on a tiny model and hand-made local copies of the tasks."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.errors import BadInput, EnvironmentProblem, UsageError
from marlinctl.evaluation import loading, tasks
from marlinctl.evaluation import run as subject
from marlinctl.evaluation.run import EvalSettings, compare, evaluate, render_table
from marlinctl.system import devices
from marlinctl.system.console import Console
from tests.checkpoint.test_contents import flip
from tests.evaluation.local_copies import mmlu, parquet_layout, saved_layout, write_parquet
from tests.packed import edit_json
from tests.tiny import make_tiny, tiny_tokenizer

QUIET = Console.quiet()
ALL = ("winogrande", "arc", "mmlu_anatomy")
SMALL: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
PROSE = "She sells sea shells on the sea shore, and the shells that she sells are sea shells, I am sure. " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, other weights."""
    return make_tiny(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {"parquet": parquet_layout(root / "parquet"), "saved": saved_layout(root / "saved")}


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return str(path)


@pytest.mark.parametrize(("layout", "arc_split", "documents"), [("parquet", "test", (7, 7, 6, 5)), ("saved", "validation", (7, 6, 5, 5))])
def test_tasks_in_both_layouts(model: Path, layouts: dict[str, Path], layout: str, arc_split: str, documents: tuple[int, ...]) -> None:
    """A layout would not be read, or the split that is printed is not the one that was measured."""
    document = evaluate(model, EvalSettings(tasks=ALL, task_data=layouts[layout], **SMALL), QUIET)
    records = document["model"]["tasks"]
    assert document["names"] == list(records) == ["winogrande", "arc_easy", "arc_challenge", "mmlu_anatomy"]
    assert [record["split"] for record in records.values()] == ["validation", arc_split, arc_split, "test"]
    assert tuple(record["documents"] for record in records.values()) == documents
    for record in records.values():
        for metric, estimate in record["metrics"].items():
            scores = torch.tensor(record["samples"][metric], dtype=torch.float64)
            assert estimate["value"] == pytest.approx(scores.mean().item())
            assert estimate["stderr"] == pytest.approx(scores.std().item() / math.sqrt(len(scores)))
    assert document["finished"] and document["text"] is None
    json.dumps(document, allow_nan=False)


def test_winogrande_answers_are_those_of_the_model(model: Path, layouts: dict[str, Path]) -> None:
    """The scores would be those of a wrongly wrapped model: other tokens, other weights, other dtype."""
    document = evaluate(model, EvalSettings(tasks=("winogrande",), task_data=layouts["saved"], batch_size=2, **SMALL), QUIET)
    exact, tokenizer = load_dense(model, dtype=torch.float64, device="cpu"), tiny_tokenizer()
    expected = []
    for i in range(7):
        chances = []
        for option in ("cat", f"dog {i}"):
            start = tokenizer.encode(f"The cat {i} saw the dog because the {option}").ids
            end = tokenizer.encode(" was big.").ids
            with torch.no_grad():
                log_p = exact(input_ids=torch.tensor([start + end])).logits[0].log_softmax(-1)
            chances.append(sum(log_p[len(start) - 1 + j, token].item() for j, token in enumerate(end)))
        expected.append(float(chances.index(max(chances)) == i % 2))
    assert document["model"]["tasks"]["winogrande"]["samples"]["acc"] == expected


@pytest.mark.slow
def test_all_of_mmlu_as_a_group(model: Path, other: Path, tmp_path: Path) -> None:
    """MMLU would be shown as 57 lines, its average would not weigh subjects by their size, or its difference would be another average."""
    from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

    for place, name in enumerate(SUBJECTS):
        for split, count in (("test", 2 + place % 2), ("dev", 1)):
            write_parquet(tmp_path / "mmlu" / name, split, mmlu(count, name))
    settings = EvalSettings(tasks=("mmlu",), task_data=tmp_path, tokens=512, window=256, **SMALL)
    document = evaluate(model, settings, QUIET, baseline=other)
    records, group = document["model"]["tasks"], document["model"]["groups"]["mmlu"]
    assert document["names"] == ["mmlu"] and len(records) == len(group["tasks"]) == 57
    scores = [score for record in records.values() for score in record["samples"]["acc"]]
    theirs = [score for record in document["baseline"]["tasks"].values() for score in record["samples"]["acc"]]
    assert group["documents"] == len(scores)
    assert group["metrics"]["acc"]["value"] == pytest.approx(sum(scores) / len(scores))
    assert group["metrics"]["acc"]["stderr"] > 0
    difference = document["comparison"]["tasks"]["mmlu"]["acc"]
    assert difference["value"] == pytest.approx((sum(scores) - sum(theirs)) / len(scores))
    assert difference["stderr"] > 0
    table = render_table(document).splitlines()
    assert [line.split()[:3] for line in table if line.startswith("mmlu")] == [["mmlu", "test", "acc"]]


def test_missing_data_lists_what_is_there(model: Path, layouts: dict[str, Path]) -> None:
    """A part of MMLU would silently stand for the whole, or the person would not learn what the folder holds."""
    with pytest.raises(UsageError, match=r"lack the data of mmlu_\w+, .* and 51 more") as caught:
        evaluate(model, EvalSettings(tasks=("winogrande", "mmlu"), task_data=layouts["saved"], **SMALL), QUIET)
    assert caught.value.error_id == "E243"
    assert "hails/mmlu_no_train/*" in caught.value.problems[0].fix


def test_data_without_the_columns_of_the_task(model: Path, tmp_path: Path) -> None:
    """Data of another shape would end in a traceback of lm_eval's."""
    write_parquet(tmp_path / "winogrande" / "winogrande_xl", "validation", [{"question": "?", "answer": "1"}])
    with pytest.raises(BadInput, match="the data of winogrande cannot be used") as caught:
        evaluate(model, EvalSettings(tasks=("winogrande",), task_data=tmp_path, **SMALL), QUIET)
    assert caught.value.error_id == "E385"


def test_questions_that_are_cut_are_counted_and_told(layouts: dict[str, Path], tmp_path: Path) -> None:
    """lm_eval cuts a question that is longer than the model reads; a score on halves of questions would look like any other."""
    short = make_tiny(tmp_path / "short", max_position_embeddings=18)
    told = io.StringIO()
    settings = EvalSettings(tasks=("winogrande", "mmlu_anatomy"), task_data=layouts["parquet"], **SMALL)
    document = evaluate(short, settings, Console(colour=False, stderr=told))
    tokenizer = tiny_tokenizer()
    longest = [
        max(len(tokenizer.encode(f"The cat {i} saw the dog because the {option} was big.").ids) for option in ("cat", f"dog {i}"))
        for i in range(7)
    ]
    cut = sum(length > 18 + 1 for length in longest)
    records = document["model"]["tasks"]
    assert records["winogrande"]["cut"] == cut > 0 and records["mmlu_anatomy"]["cut"] == 5
    assert f"warning: short: winogrande: {cut} of 7 questions are longer than the model reads" in told.getvalue()
    assert f"cut: {cut} of 7 questions of winogrande, 5 of 5 questions of mmlu_anatomy" in render_table(document)


def test_limit(model: Path, layouts: dict[str, Path]) -> None:
    """`--limit` would be ignored, or a score on a part would look like one on the whole."""
    document = evaluate(model, EvalSettings(tasks=("winogrande",), task_data=layouts["saved"], limit=3, **SMALL), QUIET)
    assert document["model"]["tasks"]["winogrande"]["documents"] == 3
    assert document["model"]["tasks"]["winogrande"]["of_documents"] == 7
    assert "limited: 1 of 1" in render_table(document)


def test_few_shot_examples(model: Path, layouts: dict[str, Path]) -> None:
    """`--num-fewshot` would change nothing, or examples would be drawn again in each run."""
    settings = {"tasks": ("mmlu_anatomy",), "task_data": layouts["parquet"], **SMALL}
    runs = [evaluate(model, EvalSettings(num_fewshot=n, **settings), QUIET)["model"]["tasks"]["mmlu_anatomy"] for n in (0, 2, 2)]
    assert [run["num_fewshot"] for run in runs] == [0, 2, 2]
    assert runs[0]["prompts_sha256"] != runs[1]["prompts_sha256"]
    assert runs[1] == runs[2]


def test_killed_run_keeps_finished_tasks(model: Path, layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed in its last task would lose the hours before; a continued one would differ from an unbroken one."""
    import lm_eval

    settings = EvalSettings(tasks=ALL, task_data=layouts["parquet"], **SMALL)
    whole = evaluate(model, settings, QUIET)
    real, ran = lm_eval.evaluate, []

    def dies_at_the_third(**given: Any) -> Any:
        ran.extend(given["task_dict"]["tasks"])
        if len(ran) == 3:
            raise KeyboardInterrupt
        return real(**given)

    monkeypatch.setattr(lm_eval, "evaluate", dies_at_the_third, raising=False)
    out = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, settings, QUIET, out=out)
    kept = json.loads(out.read_text())
    assert list(kept["model"]["tasks"]) == ["winogrande", "arc_easy"] and not kept["finished"]
    continued = evaluate(model, settings, QUIET, out=out, resume=True)
    assert ran == ["winogrande", "arc_easy", "arc_challenge", "arc_challenge", "mmlu_anatomy"]
    assert continued == whole == json.loads(out.read_text())


def test_resume_refuses_another_model(model: Path, other: Path, prose: str, tmp_path: Path) -> None:
    """Half of the scores would come from each of two models of the same shape."""
    settings = EvalSettings(text=prose, tokens=512, window=256, **SMALL)
    out = tmp_path / "r.json"
    evaluate(model, settings, QUIET, out=out)
    with pytest.raises(UsageError, match=r"model\.identity"):
        evaluate(other, settings, QUIET, out=out, resume=True)


def test_no_answer_cache(model: Path, layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model would be given the answers of the first, whose cache key knows no model."""
    from lm_eval.caching import cache

    monkeypatch.setattr(cache, "PATH", str(tmp_path / "requests"))
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    evaluate(model, EvalSettings(tasks=("winogrande",), task_data=layouts["saved"], **SMALL), QUIET)
    assert set(tmp_path.iterdir()) == before


def test_perplexity_against_float64(model: Path, prose: str) -> None:
    """The printed perplexity would not be exp of the mean loss over the documented windows."""
    document = evaluate(model, EvalSettings(text=prose, tokens=1000, window=250, **SMALL), QUIET)
    ids = torch.tensor(tiny_tokenizer().encode(PROSE).ids[:1000]).reshape(4, 250)
    exact = load_dense(model, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        log_p = exact(input_ids=ids).logits[:, :-1].log_softmax(-1)
    losses = -log_p.gather(2, ids[:, 1:, None])[..., 0]
    means = losses.mean(1)
    assert document["model"]["perplexity"]["value"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert document["model"]["perplexity"]["stderr"] == pytest.approx((losses.mean().exp() * means.std() / 2).item(), rel=1e-4)
    assert document["text"]["windows"] == 4 and document["text"]["starts_with"] is None


def test_a_model_against_itself(model: Path, layouts: dict[str, Path], prose: str) -> None:
    """Equal models would show a difference."""
    settings = EvalSettings(tasks=("arc_easy",), task_data=layouts["saved"], text=prose, tokens=512, window=128, **SMALL)
    comparison = evaluate(model, settings, QUIET, baseline=model)["comparison"]
    assert comparison["kl"] == {"value": 0.0, "stderr": 0.0}
    assert comparison["top1"] == {"value": 1.0, "stderr": 0.0}
    assert comparison["perplexity"] == {"value": 0.0, "stderr": 0.0}
    assert comparison["tasks"] == {"arc_easy": {"acc": {"value": 0.0, "stderr": 0.0}, "acc_norm": {"value": 0.0, "stderr": 0.0}}}


def test_compare_and_the_table(model: Path, other: Path, prose: str) -> None:
    """compress's quality gate would get other figures than `eval --against`, or model and baseline would be swapped."""
    settings = EvalSettings(text=prose, tokens=512, window=128, **SMALL)
    ours, theirs = (evaluate(folder, settings, QUIET)["model"]["perplexity"] for folder in (model, other))
    document = compare(model, other, settings, QUIET)
    assert document == evaluate(model, settings, QUIET, baseline=other)
    assert document["model"]["perplexity"] == ours and document["baseline"]["perplexity"] == theirs
    assert document["comparison"]["perplexity"]["value"] == pytest.approx(ours["value"] - theirs["value"])
    assert document["comparison"]["kl"]["value"] > 0
    lines = render_table(document).splitlines()
    assert lines[0].split() == ["task", "split", "metric", "score", "baseline", "difference"]
    assert f"{ours['value']:.3f} ± {ours['stderr']:.3f}" in lines[1]
    assert f"{theirs['value']:.3f} ± {theirs['stderr']:.3f}" in lines[1]
    assert [line[:40].split()[2] for line in lines[2:4]] == ["KL,", "top-1"]


def test_gemma_starts_its_windows(tmp_path: Path, model: Path, prose: str) -> None:
    """A model that needs the start token would be measured without it."""
    folder = tmp_path / "gemma"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    opened = loading.open_subject(folder)
    gemma = loading.Subject(opened.folder, opened.name, opened.config | {"model_type": "gemma2"})
    run = subject._Run(gemma, None, EvalSettings(text=prose, tokens=512, window=128, **SMALL), QUIET)
    rows, start = run._windows(subject.load_text(prose))
    assert start == 1 and rows[:, 0].tolist() == [1] * 4


def test_other_tokenizer_is_refused(model: Path, tmp_path: Path, prose: str) -> None:
    """Tokens of one model would be compared with other tokens of the other."""
    twin = make_tiny(tmp_path / "twin")
    tokenizer = json.loads((twin / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][1:]
    (twin / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="tokenizers cut the text differently"):
        compare(model, twin, EvalSettings(text=prose, tokens=512, window=128, **SMALL), QUIET)


def test_tokenizer_that_is_too_large(tmp_path: Path, prose: str) -> None:
    """An id beyond the embedding would end in an IndexError in the middle of the run."""
    with pytest.raises(BadInput, match="vocab_size is 256") as caught:
        evaluate(make_tiny(tmp_path / "small", vocab_size=256), EvalSettings(text=prose, tokens=64, window=32, **SMALL), QUIET)
    assert caught.value.error_id == "E314"
    folder = make_tiny(tmp_path / "added")
    token = {"content": "<late>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    late = {str(i): {**token, "content": f"<{i}>"} for i in range(269, 300)}
    edit_json(folder / "tokenizer_config.json", lambda document: document.update(added_tokens_decoder=late))
    with pytest.raises(BadInput, match="the model knows 288 words") as caught:
        evaluate(folder, EvalSettings(text=prose, tokens=64, window=32, **SMALL), QUIET)
    assert caught.value.error_id == "E314"


def test_a_model_of_nan_has_no_score(model: Path, tmp_path: Path, layouts: dict[str, Path]) -> None:
    """lm_eval gives a model that predicts NaN the score of chance, without a word."""
    from marlinctl.errors import NumericalProblem
    from tests.tiny import tiny_config, tiny_tensors, write_weights

    folder = make_tiny(tmp_path / "nan")
    tensors = tiny_tensors(tiny_config())
    tensors["model.norm.weight"][3] = math.nan
    write_weights(folder, tensors)
    with pytest.raises(NumericalProblem) as caught:
        evaluate(folder, EvalSettings(tasks=("winogrande",), task_data=layouts["saved"], **SMALL), QUIET)
    assert caught.value.error_id == "E620"


def identity_of(folder: Path) -> str:
    return loading.read_weights(loading.open_subject(folder), QUIET).identity


def test_identity_sees_weights(model: Path, other: Path, tmp_path: Path) -> None:
    """--resume would continue with the results of a model that differs in nothing but its weights."""
    again = make_tiny(tmp_path / "again")
    identity = identity_of(model)
    assert identity_of(again) == identity != identity_of(other)
    (again / "marlinctl_report.json").write_text("{}")  # may be rewritten at any time
    assert identity_of(again) == identity
    shard = again / "model.safetensors"
    for place in range(shard.stat().st_size // 2, shard.stat().st_size, shard.stat().st_size // 7):
        flip(shard, place)
        assert identity_of(again) != identity, "one bit, wherever it is"
        flip(shard, place)
    (again / "tokenizer_config.json").write_text("{}")
    assert identity_of(again) != identity


def test_a_model_that_changes_before_it_is_loaded_is_not_measured(tmp_path: Path, prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores would be noted under the name of other weights, and `--resume` would continue with those."""
    folder = make_tiny(tmp_path / "model")
    opened = subject._Run._windows
    monkeypatch.setattr(subject._Run, "_windows", lambda *given: (flip(folder / "model.safetensors"), opened(*given))[1])
    with pytest.raises(BadInput) as caught:
        evaluate(folder, EvalSettings(text=prose, tokens=512, window=256, **SMALL), QUIET, out=tmp_path / "r.json")
    assert caught.value.error_id == "E306" and "perplexity" not in json.loads((tmp_path / "r.json").read_text())["model"]


@pytest.mark.parametrize(
    "changes",
    [
        {"limit": 0},
        {"num_fewshot": -1},
        {"batch_size": 0},
        {"window": 1},
        {"tokens": 5, "window": 6},
        {"dtype": "int4"},
        {"fewshot_as_multiturn": True},
        {"backend": "sglang"},
    ],
    ids=str,
)
def test_impossible_settings(changes: dict[str, Any]) -> None:
    """An impossible value would show after the model was loaded, as an error about something else."""
    with pytest.raises(UsageError) as caught:
        EvalSettings(**changes)
    assert caught.value.error_id == "E246"


def test_device_and_dtype() -> None:
    """`auto` would run fp16 on a CPU, at a hundredth of the speed; a missing GPU would be an error from inside torch."""
    assert loading.choose_dtype("auto", "cpu", {"dtype": "float16"}) in ("bfloat16", "float32")
    assert loading.choose_dtype("auto", "cuda:0", {"dtype": "float16"}) == "float16"
    assert loading.choose_dtype("auto", "cuda:0", {"torch_dtype": "bfloat16"}) == "bfloat16"
    assert loading.choose_dtype("auto", "cuda:0", {"dtype": "float64"}) == "bfloat16"
    assert loading.choose_dtype("float32", "cpu", {}) == "float32"
    for call in (lambda: loading.choose_dtype("float16", "cpu", {}), lambda: devices.choose_device("gpu")):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(EnvironmentProblem) as caught:
        devices.choose_device("cuda:99")
    assert caught.value.error_id == "E420"


def test_batches_shrink_with_length(model: Path) -> None:
    """`auto` would ask for a batch of long questions that no memory holds, or for batches of one everywhere."""
    from marlinctl.evaluation.harness import MOST_ON_CPU, Harness

    opened = loading.open_subject(model)
    harness = Harness(load_dense(model, dtype=torch.float32), loading.load_tokenizer(opened), batch_size="auto", console=QUIET)
    assert harness.fitting_batch(10) == MOST_ON_CPU
    harness.model.config.vocab_size = 262_144
    sizes = [harness.fitting_batch(length) for length in (50, 100, 500)]
    assert sizes[0] > sizes[1] > sizes[2] == 1


def test_out_of_memory_is_tried_once_with_half(model: Path, layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that does not fit would end a run of hours with a traceback, or be tried for ever."""
    from marlinctl.errors import ResourceProblem
    from marlinctl.evaluation.harness import Harness

    sizes: list[int] = []

    def full(self: Any, inputs: torch.Tensor, **_: Any) -> torch.Tensor:
        sizes.append(len(inputs))
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Harness, "_model_call", full)
    cases: list[tuple[int | Literal["auto"], list[int]]] = [("auto", [14, 8]), (4, [4])]
    for batch_size, asked in cases:
        sizes.clear()
        with pytest.raises(ResourceProblem) as caught:
            evaluate(model, EvalSettings(tasks=("winogrande",), task_data=layouts["saved"], batch_size=batch_size, **SMALL), QUIET)
        assert caught.value.error_id == "E590" and "--batch-size" in caught.value.problems[0].fix
        assert sizes == asked  # 7 questions of 2 answers; `auto` offers 16, then 8


def test_unknown_task_shows_near_names(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelled task would cost a traceback of lm_eval's after loading the model."""
    import lm_eval.tasks

    usual = lm_eval.tasks.TaskManager
    home = Path(lm_eval.tasks.__file__).parent
    monkeypatch.setattr(  # everything that lm_eval knows takes 14 s to index
        lm_eval.tasks, "TaskManager", lambda **given: usual(**(given or {"include_path": [home / "winogrande"], "include_defaults": False}))
    )
    with pytest.raises(UsageError, match="knows no task winogrand") as caught:
        evaluate(model, EvalSettings(tasks=("winogrand", "mmluu"), **SMALL), QUIET)
    assert caught.value.error_id == "E243" and len(caught.value.problems) == 2
    assert "winogrande" in caught.value.problems[0].fix


def test_without_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without lm_eval the person would get an ImportError instead of the pip command."""
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    assert main(["eval", str(model), "--tasks", "winogrande"]) == 4
    assert "pip install 'marlinctl[eval]'" in capsys.readouterr().err
    assert main(["eval", str(model), "--tokens", "64", "--window", "32", "--dtype", "float32"]) == 0


def test_command_line(model: Path, other: Path, layouts: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """stdout would hold more than the result (lm_eval prints), or the file and --json would differ."""
    out = tmp_path / "r.json"
    asked = ["eval", str(model), "--against", str(other), "--tasks", "arc,winogrande", "--task-data", str(layouts["saved"])]
    asked += ["--tokens", "512", "--window", "128", "--dtype", "float32", "--batch-size", "4", "--out", str(out)]
    assert main([*asked, "--json"]) == 0
    printed = capfd.readouterr()
    document = json.loads(printed.out)
    assert document.pop("schema_version") == 1
    assert document == json.loads(out.read_text()) and document["finished"]
    assert "arc_easy: split validation, 6 documents" in printed.err
    assert f"Python {sys.version.split()[0]}" in printed.err and document["text"]["sha256"][:16] in printed.err
    assert "it/s" not in printed.err  # lm_eval's own bars
    assert main(asked) == 2  # the file exists
    assert "--resume" in capfd.readouterr().err
    assert main([*asked, "--resume"]) == 0
    assert capfd.readouterr().out.splitlines()[0].split() == ["task", "split", "metric", "score", "baseline", "difference", "flips"]


def test_real_local_copies(model: Path, data_dir: Path) -> None:
    """The layout of the published data sets would not be read, or in part only."""
    document = evaluate(model, EvalSettings(tasks=("arc", "winogrande", "mmlu"), task_data=data_dir, limit=1, **SMALL), QUIET)
    records = document["model"]["tasks"]
    assert {name: (records[name]["split"], records[name]["of_documents"]) for name in ("arc_easy", "arc_challenge", "winogrande")} == {
        "arc_easy": ("test", 2376),
        "arc_challenge": ("test", 1172),
        "winogrande": ("validation", 1267),
    }
    assert sum(records[name]["of_documents"] for name in document["model"]["groups"]["mmlu"]["tasks"]) == 14_042


def test_real_text(data_dir: Path) -> None:
    """The rows of WikiText-2 would be joined otherwise than for the published perplexities."""
    text = subject.load_text(str(data_dir / "wikitext" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"))
    assert text.text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    assert "4,358 rows joined by blank lines" in text.note
