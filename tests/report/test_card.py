from __future__ import annotations

import ast
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.runtimes import Loads
from marlinctl.report.card import CardFacts, of_compression, of_training, render
from marlinctl.report.page import Name
from marlinctl.report.scores import Score, recovery
from tests.report import documents


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    document: dict[str, Any] = ModelCard(card).data.to_dict()
    return document


FACTS = CardFacts(
    "model-int4",
    FORMATS["ct"],
    {"model.layers.0.mlp.up_proj": 128, "model.layers.0.mlp.down_proj": 128, "model.layers.1.mlp.down_proj": -1},
    [f"skipped_{i}" for i in range(9)],
    "marlinctl quantize org/Model OUT --recipe int4",
    documents.loads(),
    base_model="org/Model-1B",
    license={"license": "other", "license_name": "own", "license_link": "https://example.org/licence"},
    made_from=[("Calibration", "128 samples of 2,048 tokens of self"), ("SHA-256 of the recipe", Name("ab" * 32))],
    scores=[Score("task", "winogrande", "validation", "acc", 2, documents.estimate(0.51), documents.estimate(0.52))],
)


def test_the_hub_understands_the_front_matter() -> None:
    """base_model is how the hub links a quantized model to its original; the licence is a duty."""
    meta = front_matter(render(FACTS))
    assert meta["base_model"] == "org/Model-1B" and meta["base_model_relation"] == "quantized"
    assert (meta["license"], meta["license_name"], meta["license_link"]) == ("other", "own", "https://example.org/licence")
    assert meta["pipeline_tag"] == "text-generation"
    assert "compressed-tensors" in meta["tags"]


def test_the_card_says_what_was_done() -> None:
    """Who gets the model must know groups, what was left out, where it runs, the scores, and how to repeat and check it."""
    card = render(FACTS)
    for text in (
        "128 (2 linears), whole rows (1 linear)",
        "and 3 more",
        "vLLM, SGLang",
        "marlinctl quantize org/Model OUT --recipe int4",
        "| winogrande | acc | 0.51 ± 0.01 | 0.52 ± 0.01 | 98.1 % |",
        "marlinctl verify FOLDER --source ORIGINAL",
        "ab" * 32,
        "# model-int4\n",
    ):
        assert text in card, text


@pytest.mark.parametrize("fmt", ["ct", "gptq", "marlin", "dense"])
def test_a_card_without_optional_facts_is_whole(fmt: str) -> None:
    """Foreign input comes without base model, recipe and scores: no `None` may stand in the card."""
    card = render(CardFacts("out", FORMATS[fmt], {"a": 64}, ["lm_head"], "marlinctl pack IN OUT", documents.loads(fmt)))
    assert "None" not in card and "## Scores" not in card and front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert ("finds no model file" in card) is (fmt == "marlin")
    assert ("rounded to 11" in card) is (fmt == "dense")


def test_hostile_names_stay_inside_their_place() -> None:
    """Names come from configs and command lines of strangers: they must not add keys, rows or end a code block."""
    hostile = 'x"\nlicense: mit\n---\n| a | b |'
    card = render(
        CardFacts(
            hostile,
            FORMATS["ct"],
            {"a": 64},
            ["l|m"],
            "run ``` now",
            Loads(("marlinctl",), {"vLLM": (f"{hostile}: group size 16",)}, {}),
            base_model=hostile,
            license={"license": hostile},
            scores=[Score("task", "t|u", "x\n---\n", "m\nn", 0, documents.estimate(1.0))],
        )
    )
    assert '| Refused by | vLLM: x"\\\\nlicense: mit' in card and "\\| a \\| b \\|: group size 16 |" in card
    meta = front_matter(card)
    assert meta["base_model"] == hostile and meta["license"] == hostile
    assert "````text\nrun ``` now\n````" in card and "t\\|u | m\\\\nn" in card


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("fmt", "installed", "imported"),
    [
        ("ct", "pip install vllm\n", "from transformers"),
        ("gptq", "pip install vllm\n", "from transformers"),
        ("dense", "pip install vllm\n", "from transformers"),
        ("marlin", "pip install vllm==0.26.0 marlinctl\n", "import marlinctl"),
        ("marlin_24", "pip install vllm==0.26.0 marlinctl\n", "import marlinctl"),
    ],
)
def test_what_people_copy_comes_first(fmt: str, installed: str, imported: str) -> None:
    """Whoever opens a card wants to run the model: a native folder without the plugin's release would not start, and few scroll."""
    card = render(CardFacts("out", FORMATS[fmt], {"a": 64}, [], "marlinctl pack IN OUT", documents.loads(fmt)))
    assert blocks(card, "bash")[0] == f"{installed}vllm serve ./out\n"
    (code,) = blocks(card, "python")
    ast.parse(code)
    assert code.startswith(imported) and 'from_pretrained("./out"' in code
    assert card.index("vllm serve") < card.index("from_pretrained") < card.index("## What it is") < card.index("## How it was made")


@pytest.mark.parametrize("fmt", ["ct", "marlin"])
def test_no_command_is_given_for_a_program_that_refuses(fmt: str) -> None:
    """A command that fails after the download is worse than none."""
    card = render(CardFacts("out", FORMATS[fmt], {"a": 64}, [], "marlinctl pack IN OUT", Loads(("marlinctl",), {}, {})))
    assert "vllm" not in card and "transformers import" not in card
    (code,) = blocks(card, "python")
    ast.parse(code)
    assert 'from marlinctl.api import load\n\nmodel = load("./out")' in code


def test_recovery_is_of_tasks_where_more_is_better() -> None:
    """A perplexity of 150 % of the original's read as a recovery would make a damaged model look better than its original."""
    card = of_compression(documents.report(), documents.folder(), {"a": 64})
    assert "| winogrande | acc | 0.5300 ± 0.0100 | 0.5500 ± 0.0100 | 96.4 % |" in card and "near the score of guessing" in card
    assert all(re.search(rf"^\| pythondoc \| {metric}.*\|  \|$", card, re.MULTILINE) for metric in ("perplexity", "KL"))
    for metric, value, wanted in (("acc_norm", 0.5, 0.96), ("exact_match,strict-match", 0.5, 0.96), ("word_perplexity", 0.5, None),
                                  ("wer", 0.5, None), ("acc", 0.0, None), ("acc", None, None)):  # fmt: skip
        score = Score("task", "t", "test", metric, 4, documents.estimate(0.48), documents.estimate(value))
        assert recovery(score) == wanted, metric


def test_the_text_of_a_measurement_is_named_without_its_path() -> None:
    """A home folder does not belong in a published card."""
    document = documents.evaluation()
    document["text"]["note"] = "/home/somebody/secret/wiki.txt"
    card = of_compression(documents.report(evaluation={"document": document}), documents.folder(), {"a": 64})
    assert "text: wiki.txt" in card and "/home" not in card


def test_a_run_tells_everything_that_a_card_needs() -> None:
    """Whoever gets the model must be able to judge it: licence, data, seeds, versions, scores, digests, runtimes."""
    card = of_compression(documents.report(), documents.folder(), {"a": 64})
    for wanted in (
        "| Original | `org/Model-1B` |",
        "| Licence of the original | apache-2.0 |",
        "c" * 40,  # the original's commit
        "| Calibration | texts.jsonl: 8 samples, 4,000 tokens",
        "de" * 32,  # the token ids
        "| Seeds | calibration 0 |",
        "torch 2.13.0+cpu, transformers 5.23.0",
        "f" * 64,  # the manifest
        "vLLM, SGLang",
        "| winogrande | acc | 0.5300 ± 0.0100 | 0.5500 ± 0.0100 | 96.4 % |",
        "4 windows of 1,024 tokens",
        "marlinctl compress org/Model-1B out/model",
    ):
        assert wanted in card, wanted
    assert "/home/somebody" not in card, "a path of the machine that made it is nobody's business"
    assert front_matter(card)["license"] == "apache-2.0"


def test_the_hub_shows_the_scores_of_whole_tasks() -> None:
    """If this failed, the hub would show no scores, or one of five questions as if it were the benchmark's."""
    document = documents.evaluation()
    document["model"]["tasks"]["arc_easy"]["documents"] = 100
    document["model"]["perplexity"]["value"] = None  # JSON's NaN
    found = of_compression(documents.report(evaluation={"document": document}), documents.folder(), {"a": 64})
    said: Any = ModelCard(found).data
    (result,) = said.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type, result.metric_value) == ("arc_easy", "test", "acc", 0.59)
    assert front_matter(found)["model-index"][0]["name"] == "model-int4"


def test_a_card_without_tasks_has_no_empty_column() -> None:
    """The first card that a person sees, of `compress` without --tasks, would look unfinished."""
    document = documents.evaluation()
    document["names"] = []
    for side in ("model", "baseline"):
        document[side]["tasks"] = {}
    card = of_compression(documents.report(evaluation={"document": document}), documents.folder(), {"a": 64})
    assert "| Measured on | Metric | This model | Original |\n" in card and "Recovery" not in card


def test_a_card_shows_flips_where_they_were_measured() -> None:
    """The same score may hide answers that changed: who serves the model would not see them."""
    document = documents.evaluation()
    estimate = {"value": 0.15, "stderr": 0.01, "to_wrong": {"value": 0.1}, "to_correct": {"value": 0.05}}
    document["comparison"]["flips"] = {"winogrande": {"acc": estimate}}
    card = of_compression(documents.report(evaluation={"document": document}), documents.folder(), {"a": 64})
    assert "| Measured on | Metric | This model | Original | Recovery | Flips |\n" in card
    assert "| winogrande | acc | 0.5300 ± 0.0100 | 0.5500 ± 0.0100 | 96.4 % | 0.1500 ± 0.0100 (-0.1000 +0.0500) |" in card
    assert "correct to wrong" in card


def test_rows_of_the_original_say_so() -> None:
    """A local original has no row of its own, and `Its licence` would read as the licence of this folder."""
    source: dict[str, Any] = {"kind": "folder", "name": "x", "revision": None, "fingerprint": {"files": {}}}
    card = of_compression(documents.report(source=source), documents.folder(), {"a": 64})
    rows = card.partition("## What it is")[2].partition("## How")[0]
    assert "| Its " not in rows
    assert "| Licence of the original |" in rows and "| SHA-256 of the fingerprint of the original |" in rows


def test_a_distilled_model_has_a_card_of_the_same_form() -> None:
    """Its licence is the teacher's, and its data is what it was trained on."""
    card = of_training(documents.training(), documents.folder("dense"))
    meta = front_matter(card)
    assert (meta["base_model"], meta["base_model_relation"], meta["license_name"]) == ("org/Model-1B", "finetune", "own")
    for wanted in (
        "2:4 sparse",
        "| Data | self: 960 tokens in 60 steps",
        "| Seeds | 0 |",
        "| loss | 2 | 1 |",
        "marlinctl distill a b",
        "f" * 64,
    ):
        assert wanted in card, wanted
    measured = of_training(documents.training(evaluation={"document": documents.evaluation()}), documents.folder("dense"))
    assert "| winogrande | acc | 0.5300" in measured and front_matter(measured)["model-index"][0]["name"] == "model-int4"


@pytest.mark.parametrize("kind", ["compress", "distill"])
def test_programs_that_refuse_the_model_are_named_with_the_reason(kind: str) -> None:
    """A card that lists vLLM for a model that it refuses costs whoever believes it a download and a GPU."""
    found = Loads(("transformers", "marlinctl"), {"vLLM": ("a.qkv_proj: q_proj, k_proj, v_proj are not alike", "b")}, {"SGLang": "x"})
    about = documents.folder("ct", found)
    card = of_training(documents.training(), about) if kind == "distill" else of_compression(documents.report(), about, {"a": 64})
    assert "| Loads in | transformers, marlinctl |" in card and "| Not tested | SGLang, with x |" in card
    assert "| Refused by | vLLM: a.qkv_proj: q_proj, k_proj, v_proj are not alike (and 1 more) |" in card


def test_no_licence_is_said() -> None:
    """Silence would read as permission."""
    card = of_compression(documents.report(source={"kind": "folder", "name": "x", "revision": None}), documents.folder(), {"a": 64})
    assert "| Licence of the original | not stated" in card and "license" not in front_matter(card)


def test_the_base_model_is_the_one_that_it_all_began_with() -> None:
    """Pruned, distilled, then quantized: the hub would link the result to nothing, and its licence to nobody."""
    distilled = {"kind": "folder", "name": "distilled", "revision": None, "license": {"license": "apache-2.0"}}
    card = of_compression(documents.report(source=distilled), documents.after_distilling(), {"a": 64})
    meta = front_matter(card)
    assert (meta["base_model"], meta["license"]) == ("org/Model-1B", "apache-2.0")
