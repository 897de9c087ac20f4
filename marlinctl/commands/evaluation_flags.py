"""The flags of `compress`, `sparsify`, `resume` and `plan` that say how a result is measured, and how good it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlinctl.commands.common import FiniteFloat

if TYPE_CHECKING:
    from marlinctl.evaluation.gate import Gate

_POSITIVE = FiniteFloat(0, min_open=True)
_KEYS = ("tasks", "limit", "num_fewshot", "apply_chat_template", "text", "tokens", "window")  # of the recipe's section

# As `eval` has them.
NUM_FEWSHOT = click.option("--num-fewshot", type=int, metavar="N", help="Examples before each question. Default: what the task says.")
CHAT_TEMPLATE = "Put prompts through the model's chat template, as an instruct model needs."

_MEASURING = (
    click.option(
        "--tasks", metavar="NAMES", help="Tasks of lm_eval to score before and after: mmlu,arc,winogrande. Needs the extra `eval`."
    ),
    click.option(
        "--task-data", type=click.Path(path_type=Path), metavar="DIR", help="Local copies of the tasks' data, read without network."
    ),
    click.option("--limit", type=int, metavar="N", help="Only the first N documents of each task."),
    NUM_FEWSHOT,
    click.option("--apply-chat-template", is_flag=True, default=None, help=CHAT_TEMPLATE),
    click.option("--text", metavar="SOURCE", help="Text for perplexity and KL: pythondoc, or a .txt, .jsonl or .parquet file."),
    click.option("--tokens", type=int, metavar="N", help="Use the first N tokens of the text."),
    click.option("--window", type=int, metavar="N", help="Tokens read together. Default: 1024, or all that a smaller model can read."),
)
_GATE = (
    click.option("--max-kl", type=_POSITIVE, metavar="NATS", help="Do not publish above this KL divergence."),
    click.option("--max-ppl-ratio", type=_POSITIVE, metavar="X", help="Do not publish above X times the original's perplexity."),
    click.option("--publish-anyway", is_flag=True, default=None, help="Publish even if --max-kl or --max-ppl-ratio is exceeded."),
)


def measuring_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is measured: keys of the recipe's section `evaluate`, and where the tasks' data lie."""
    return _apply(function, _MEASURING)


def evaluation_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, whether it is measured at all, and the gate. Nothing that was not given has a value: `resume` asks which were."""
    evaluated = click.option("--eval/--no-eval", "evaluated", default=None, help="Measure the result. Default: yes.")
    return _apply(function, (*_MEASURING, *_GATE, evaluated))


def chosen_measuring(values: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Takes what `measuring_flags` added out of `values`: keys of the recipe, None where not given; and the folder of the tasks' data."""
    tasks = values["tasks"]
    values["tasks"] = None if tasks is None else names_of_tasks(tasks)
    return {f"evaluate.{key}": values.pop(key) for key in _KEYS}, values.pop("task_data")


def names_of_tasks(text: str) -> list[str]:
    """mmlu, arc -> ["mmlu", "arc"]"""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def chosen_gate(values: dict[str, Any]) -> Gate:
    """Takes what makes a gate out of `values`."""
    from marlinctl.evaluation.gate import Gate

    return Gate(**{key: value for key, value in _gate(values).items() if value is not None})


def changed_gate(values: dict[str, Any], recorded: Mapping[str, Any]) -> Gate:
    """The same over the gate that a job was begun with."""
    from marlinctl.evaluation.gate import Gate

    return Gate(**{**recorded, **{key: value for key, value in _gate(values).items() if value is not None}})


def _gate(values: dict[str, Any]) -> dict[str, Any]:
    return {key: values.pop(key) for key in ("max_kl", "max_ppl_ratio", "publish_anyway")}


def _apply(function: Callable[..., Any], decorators: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function
