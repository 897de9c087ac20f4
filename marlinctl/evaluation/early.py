"""What an evaluation can be refused for before any work: its arguments, and how they fit the model.

A run that measures its result asks both at its start, hours before it measures. `check_arguments` needs no model, so it comes before one
is fetched. The same code reads the text and cuts it into windows here and in the end, so that the end has nothing new to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlinctl.data.text import PYTHONDOC, check_text
from marlinctl.evaluation.settings import EvalSettings
from marlinctl.system.console import Console


def check_arguments(settings: EvalSettings, console: Console, *, with_text: bool, load_tasks: bool = True) -> None:
    """Text, names of tasks and their data. UsageError, BadInput, EnvironmentProblem or HubProblem, as the evaluation would raise.

    load_tasks: read the data of the tasks, or fetch them. Without it, names are looked up, and copies in --task-data.
    """
    if with_text:
        check_text(settings.text or PYTHONDOC)
    if not settings.tasks:
        return
    from marlinctl.evaluation import tasks

    tasks.require_lm_eval()
    if not load_tasks:
        tasks.check_tasks(settings, console)
        return
    with tasks.plan_tasks(settings, console):
        pass


def check_model(settings: EvalSettings, folder: Path, config: Mapping[str, Any]) -> None:
    """The window against the model's positions, the text against the window, through the model's tokenizer, and its chat template."""
    from marlinctl.evaluation import chat, loading, windows
    from marlinctl.evaluation.run import text_of

    subject = loading.Subject(folder, folder.name, dict(config))
    windows.of_models(text_of(settings), [subject], settings)
    if settings.apply_chat_template and settings.tasks:
        chat.tried_template(loading.load_tokenizer(subject), subject.name)
