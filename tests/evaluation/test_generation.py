"""Tasks whose answers are written: chat templates, samples, consent to run code, packages of a task, the vLLM backend, flips."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.cli import main
from marlinctl.errors import BadInput, EnvironmentProblem, UsageError
from marlinctl.evaluation import packages, statistics, tasks
from marlinctl.evaluation.run import EvalSettings, evaluate, render_table
from marlinctl.system.console import Console
from tests.evaluation.local_copies import parquet_layout, write_parquet
from tests.tiny import CHAT_TEMPLATE, make_tiny

QUIET = Console.quiet()
SMALL: dict[str, Any] = {"dtype": "float32", "device": "cpu", "tokens": 128, "window": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("other") / "other", seed=1, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GSM8K, IFEval and HumanEval in the columns of the hub, beside WinoGrande."""
    root = parquet_layout(tmp_path_factory.mktemp("data"))
    sums = [{"question": f"What is {i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(6)]
    write_parquet(root / "gsm8k" / "main", "train", sums)
    write_parquet(root / "gsm8k" / "main", "test", sums[:3])
    asked = {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
    write_parquet(root / "IFEval", "train", [asked])
    code = {"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}
    write_parquet(root / "openai_humaneval", "test", [{**code, "canonical_solution": "    return 1\n"}])
    return root


def prompts(folder: Path, side: str, task: str) -> list[str]:
    lines = (folder / f"{side}.{task}.jsonl").read_text().splitlines()
    return [json.loads(line)["arguments"][0][0] for line in lines]


def test_gsm8k_through_the_chat_template(
    model: Path, other: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts would reach an instruct model without its template, examples would be counted wrongly, or samples would not be written."""
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "max_gen_toks", 8)
    asked = ["eval", str(model), "--tasks", "gsm8k", "--task-data", str(data), "--num-fewshot", "2", "--limit", "2", "--log-samples"]
    asked += ["--tokens", "128", "--window", "64", "--dtype", "float32", "--apply-chat-template"]
    out = tmp_path / "one.json"
    assert main([*asked, "--against", str(other), "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    record = document["model"]["tasks"]["gsm8k"]
    assert (record["num_fewshot"], record["documents"], set(record["metrics"])) == (
        2,
        2,
        {"exact_match,strict-match", "exact_match,flexible-extract"},
    )
    one_turn = prompts(tmp_path / "one.samples", "model", "gsm8k")
    assert one_turn == prompts(tmp_path / "one.samples", "baseline", "gsm8k") and len(one_turn) == 4  # two documents, two filters
    assert all(prompt.count("<|im_start|>user") == 1 and prompt.endswith("<|im_start|>assistant\n") for prompt in one_turn)
    assert all(prompt.count("Question:") == 3 for prompt in one_turn)
    flips = document["comparison"]["flips"]["gsm8k"]["exact_match,strict-match"]
    assert flips == {"value": 0.0, "stderr": 0.0, "to_wrong": {"value": 0.0, "stderr": 0.0}, "to_correct": {"value": 0.0, "stderr": 0.0}}
    assert main([*asked, "--fewshot-as-multiturn", "--out", str(tmp_path / "many.json")]) == 0
    assert all(p.count("<|im_start|>user") == 3 for p in prompts(tmp_path / "many.samples", "model", "gsm8k"))
    assert f"prompts and answers in {tmp_path / 'many.samples'}" in capsys.readouterr().err


def test_samples_need_a_place_of_their_own(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples would be lost, or those of two runs would lie in one folder."""
    asked = ["eval", str(model), "--tasks", "winogrande", "--task-data", str(data), "--dtype", "float32"]
    assert main([*asked, "--log-samples"]) == 2
    assert "add --out FILE.json" in capsys.readouterr().err
    assert main([*asked, "--out", str(tmp_path / "r.json")]) == 0
    assert main([*asked, "--out", str(tmp_path / "r.json"), "--resume", "--log-samples"]) == 2
    assert "settings.log_samples was False, is True" in capsys.readouterr().err
    (tmp_path / "s.samples").mkdir()
    assert main([*asked, "--out", str(tmp_path / "s.json"), "--log-samples"]) == 2
    assert "of another run" in capsys.readouterr().err


TEMPLATES = [(None, UsageError, "E253"), ("{{ raise_exception('no') }}", UsageError, "E253"), ("{{ 'a' * 10 ** 10 }}", BadInput, "E325")]


@pytest.mark.parametrize(("template", "kind", "error_id"), TEMPLATES, ids=["none", "refuses", "too much"])
def test_a_template_is_tried_first(data: Path, tmp_path: Path, template: str | None, kind: type[Exception], error_id: str) -> None:
    """A base model would be asked without a template, or a template would stop or take the machine in the middle of a task."""
    folder = make_tiny(tmp_path / "model", chat_template=template)
    settings = EvalSettings(tasks=("winogrande",), task_data=data, apply_chat_template=True, **SMALL)
    with pytest.raises(kind) as caught:
        evaluate(folder, settings, QUIET)
    assert getattr(caught.value, "error_id", None) == error_id


def test_models_with_different_templates(model: Path, data: Path, tmp_path: Path) -> None:
    """It would show after hours, when the prompts of the second model turn out to be others."""
    theirs = make_tiny(tmp_path / "theirs", chat_template=CHAT_TEMPLATE.replace("user", "human") + " ", max_position_embeddings=1024)
    settings = EvalSettings(tasks=("winogrande",), task_data=data, apply_chat_template=True, **SMALL)
    with pytest.raises(UsageError, match="different chat templates") as caught:
        evaluate(model, settings, QUIET, baseline=theirs)
    assert caught.value.error_id == "E261"


def test_packages_of_a_task(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A package that IFEval lacks would be reported as damaged data."""
    there = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in ("langdetect", "immutabledict") else there(name))
    assert main(["eval", str(model), "--tasks", "gsm8k,ifeval", "--task-data", str(data)]) == 4
    told = capsys.readouterr().err
    assert "the task ifeval needs packages that are not installed: immutabledict, langdetect" in told
    assert "pip install 'lm_eval[ifeval]'" in told and "copy the data" not in told


def test_packages_that_show_when_a_task_is_loaded() -> None:
    """An import inside of a function, or of a metric, would be reported as damaged data."""
    try:
        try:
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.metrics")
        except ModuleNotFoundError as inner:
            raise ValueError("cannot load the metric") from inner
    except ValueError as error:
        found = packages.missing(error)
    assert found == "sklearn" and packages.missing(ValueError("other")) is None
    assert packages.refusal({"t": ["sklearn"]}).problems[0].fix == "pip install scikit-learn"


def test_data_of_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    """IFEval would stop in the middle, at the first answer that is divided into words, and be reported as a task that cannot run."""

    def find(name: str) -> None:
        raise LookupError(name)

    monkeypatch.setitem(sys.modules, "nltk", types.SimpleNamespace(data=types.SimpleNamespace(find=find)))
    packages.require_nltk_data({"gsm8k": None})
    with pytest.raises(EnvironmentProblem, match="needs the data punkt_tab of NLTK") as caught:
        packages.require_nltk_data({"ifeval": None})
    assert caught.value.error_id == "E402" and "python -m nltk.downloader punkt_tab" in caught.value.problems[0].fix


def test_code_of_the_model_needs_consent(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code that a model wrote would run without a word of the person, or could not be run at all."""
    import evaluate as metrics

    class Ran:
        def compute(self, *, references: Any, predictions: Any, k: Any) -> Any:
            import os

            assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
            return {"pass@1": float(len(predictions) == len(references))}, None

    monkeypatch.setattr(metrics, "load", lambda name: Ran())
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.humaneval.utils", raising=False)
    asked = ["eval", str(model), "--tasks", "humaneval", "--task-data", str(data), "--dtype", "float32", "--limit", "1", "--json"]
    assert main(asked) == 2
    told = json.loads(capsys.readouterr().out)["error"]
    assert "humaneval runs code that the model wrote" in told["problems"][0]["what"]
    assert "--confirm-run-unsafe-code" in told["problems"][0]["fix"]
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # restored when the test is over
    from lm_eval.models.huggingface import HFLM

    answer = HFLM.generate_until
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: ["    return 1\n" for _ in requests])
    assert main([*asked, "--confirm-run-unsafe-code"]) == 0
    monkeypatch.setattr(HFLM, "generate_until", answer)
    assert json.loads(capsys.readouterr().out)["model"]["tasks"]["humaneval"]["metrics"]["pass@1,create_test"]["value"] == 1.0


def test_vllm_that_is_not_there(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The person would get an ImportError after the model was fetched, or scores of another backend than asked for."""
    there = tasks.find_spec
    monkeypatch.setattr(tasks, "find_spec", lambda name: None if name == "vllm" else there(name))
    assert main(["eval", str(model), "--tasks", "winogrande", "--task-data", str(data), "--backend", "vllm"]) == 4
    told = capsys.readouterr().err
    assert "the package vllm is not installed" in told and "pip install vllm" in told


def test_vllm_answers_the_tasks(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--backend vllm` would give lm_eval another folder, dtype or count of cut questions than the results say."""
    from lm_eval.models.huggingface import HFLM

    made: list[dict[str, Any]] = []
    stopped: list[bool] = []

    class VLLM(HFLM):
        def __init__(self, **given: Any) -> None:
            made.append(given)
            super().__init__(pretrained=given["pretrained"], dtype=given["dtype"], device="cpu", batch_size=4)
            core = types.SimpleNamespace(shutdown=lambda: stopped.append(True))
            self.model.llm_engine = types.SimpleNamespace(engine_core=core)

    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)
    monkeypatch.delitem(sys.modules, "marlinctl.evaluation.vllm_backend", raising=False)
    monkeypatch.setattr(tasks, "find_spec", lambda name: True)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.0" if name == "vllm" else version(name))
    settings = {"tasks": ("winogrande",), "task_data": data, **SMALL}
    expected = evaluate(model, EvalSettings(**settings), QUIET)
    found = evaluate(model, EvalSettings(backend="vllm", **settings), QUIET)
    assert made == [{"pretrained": str(model), "dtype": "float32", "batch_size": "auto", "seed": 1234}] and stopped == [True]
    assert found["model"]["tasks"] == expected["model"]["tasks"]
    assert (found["settings"]["backend"], found["versions"]["vllm"]) == ("vllm", "0.18.0")


def test_flips_against_a_count_by_hand() -> None:
    """A model that loses as many answers as it wins would look unchanged, or the two directions would be swapped."""
    baseline, scores = [1, 1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1, 0, 1]
    found = statistics.flips(scores, baseline)
    assert (found.share.value, found.to_wrong.value, found.to_correct.value) == (3 / 8, 2 / 8, 1 / 8)
    changed = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0], dtype=torch.float64)
    assert found.share.stderr == pytest.approx((changed.std() / 8**0.5).item())
    pooled = statistics.pooled_flips([(found, 8), (statistics.flips([1, 0], [1, 1]), 2)], by_size=True)
    assert pooled.share.value == pytest.approx(4 / 10) and pooled.to_wrong.value == pytest.approx(3 / 10)


def test_flips_of_two_models(model: Path, other: Path, data: Path) -> None:
    """The table or the JSON document would hold other flips than the samples of the two models show."""
    document = evaluate(model, EvalSettings(tasks=("winogrande", "arc"), task_data=data, **SMALL), QUIET, baseline=other)
    found = document["comparison"]["flips"]["winogrande"]["acc"]
    ours, theirs = (document[side]["tasks"]["winogrande"]["samples"]["acc"] for side in ("model", "baseline"))
    to_wrong = sum(a < b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    to_correct = sum(a > b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    assert (found["to_wrong"]["value"], found["to_correct"]["value"]) == pytest.approx((to_wrong, to_correct))
    assert found["value"] == pytest.approx(to_wrong + to_correct) and found["value"] > 0
    assert document["comparison"]["tasks"]["winogrande"]["acc"]["value"] == pytest.approx(to_correct - to_wrong)
    head, line, *_ = render_table(document).splitlines()
    assert head.endswith("flips")
    assert line.endswith(f"{found['value']:.4f} ± {found['stderr']:.4f} (-{to_wrong:.4f} +{to_correct:.4f})")
