"""`evaluate` and `compare`: scores, perplexity and the distance to another model, each with its standard error.

    from marlinctl.system.console import Console
    from marlinctl.evaluation.run import EvalSettings, compare, evaluate

    evaluate(Path("OUT"), EvalSettings(tasks=("mmlu", "arc", "winogrande"), limit=50), Console.quiet(), baseline=Path("MODEL"))
    compare(Path("OUT"), Path("MODEL"), EvalSettings(), Console.quiet())          perplexity, KL and top-1 agreement only

Both return a JSON document (docs/evaluate.md describes it). The order of work: everything that can be refused is looked at first (names of
tasks, their data, the text, the folders); then the text, with both models in memory; then the tasks of one model after the other.
With a results file every finished piece is kept, and a killed run is continued where it stopped.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.data.text import LONGEST_TEXT, PYTHONDOC, Text, load_text
from marlinctl.data.tokens import MOST_CHARACTERS_PER_TOKEN
from marlinctl.errors import UsageError, number_of
from marlinctl.evaluation import chat, divergence, loading, results, statistics, table, tasks, windows
from marlinctl.evaluation.settings import DEFAULT_WINDOW, EvalSettings
from marlinctl.report.scores import figure
from marlinctl.system import devices
from marlinctl.system.console import Console

if TYPE_CHECKING:
    from marlinctl.checkpoint.contents import Contents

render_table = table.render_table


def evaluate(
    model_folder: Path,
    settings: EvalSettings,
    console: Console,
    *,
    baseline: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    names: tuple[str | None, str | None] = (None, None),
) -> results.Document:
    """Task scores, and the text when it is asked for, when there is a baseline, or when there are no tasks."""
    subject = loading.open_subject(model_folder, names[0])
    other = None if baseline is None else loading.open_subject(baseline, names[1])
    run = _Run(subject, other, settings, console)
    text = text_of(settings) if settings.text or other or not settings.tasks else None
    if text is not None:
        run.refuse_text(text)
    with run.planned_tasks() as plan:
        run.refuse_chat()
        run.look()
        file = results.ResultsFile(out, run.fresh_document(text, plan), resume=resume, samples=settings.log_samples)
        document = file.document
        if text is not None and not _text_is_done(document):
            run.measure_text(text, document)
            file.save()
        if plan is not None:
            for side, who in (("model", subject), ("baseline", other)):
                if who is not None:
                    run.score_tasks(plan, who, side, file)
            if other is not None:
                document["comparison"] |= _task_differences(plan, document, settings.seed)
        document["finished"] = True
        file.save()
    return document


def compare(model_folder: Path, baseline_folder: Path, settings: EvalSettings, console: Console) -> results.Document:
    """Perplexity of both on a text, KL(baseline || model) and top-1 agreement."""
    subject, other = loading.open_subject(model_folder), loading.open_subject(baseline_folder)
    run = _Run(subject, other, settings, console)
    text = text_of(settings)
    run.refuse_text(text)
    run.look()
    document = run.fresh_document(text, None)
    run.measure_text(text, document)
    document["finished"] = True
    return document


def text_of(settings: EvalSettings) -> Text:
    """As much of it as the windows can need, and never less than what is read of every text, whose digest stands beside the figures."""
    return load_text(settings.text or PYTHONDOC, longest=max(LONGEST_TEXT, settings.tokens * MOST_CHARACTERS_PER_TOKEN))


class _Run:
    """The pieces of one evaluation, in the order in which they run."""

    def __init__(self, subject: loading.Subject, other: loading.Subject | None, settings: EvalSettings, console: Console) -> None:
        loading.refuse_idle_rounding(settings.activations, subject)
        self.subject, self.other, self.settings, self.console = replace(subject, activations=settings.activations), other, settings, console
        self.device = devices.choose_device(settings.device)
        self.dtype = loading.choose_dtype(settings.dtype, self.device, subject.config)
        self.window = settings.window_for(subject.longest, None if other is None else other.longest)
        self.contents: dict[Path, Contents] = {}  # of each folder; filled by `look`

    @property
    def models(self) -> list[loading.Subject]:
        return [who for who in (self.subject, self.other) if who is not None]

    def refuse_text(self, text: Text) -> None:
        """It may be too short, or the windows too long: that shows before any weight is read."""
        windows.of_models(text, self.models, self.settings)

    def refuse_chat(self) -> None:
        """With --apply-chat-template: UsageError E253 for a model without a template, E261 where the two models have different ones."""
        if self.settings.apply_chat_template and self.settings.tasks:
            first, *others = [chat.tried_template(loading.load_tokenizer(who), who.name) for who in self.models]
            if any(other != first for other in others):
                fix = "compare without --apply-chat-template, or give both models one template"
                raise UsageError("E261", "the two models have different chat templates", where="--against", fix=fix)

    def look(self) -> None:
        """What the person should know of the folders, whether their weights can be believed, and their identity, in one reading."""
        for who in (self.subject, self.other):
            if who is not None:
                for note in who.notes:
                    self.console.warn(f"{who.name}: {note}")
                self.contents[who.folder] = loading.look_at_weights(who, self.console)

    def fresh_document(self, text: Text | None, plan: tasks.TaskPlan | None) -> results.Document:
        s = self.settings
        found = self.contents
        sides = [None if w is None else {"name": w.name, "identity": found[w.folder].identity} for w in (self.subject, self.other)]
        return {
            "kind": "evaluation",
            "finished": False,
            "settings": {
                "tasks": list(s.tasks),
                "task_data": None if s.task_data is None else str(s.task_data.resolve()),
                "limit": s.limit,
                "num_fewshot": s.num_fewshot,
                "apply_chat_template": s.apply_chat_template,
                "fewshot_as_multiturn": s.fewshot_as_multiturn,
                "log_samples": s.log_samples,
                "activations": s.activations,
                "backend": s.backend,
                "batch_size": s.batch_size,
                "text_sha256": None if text is None else text.sha256,
                "tokens": s.tokens,
                "window": self.window,
                "seed": s.seed,
                "dtype": self.dtype,
                "device": self.device,
            },
            "versions": _versions(self.settings if plan is not None else None),
            "names": [] if plan is None else list(plan.names),
            "text": None,
            "model": sides[0],
            "baseline": sides[1],
            "comparison": None if self.other is None else {},
        }

    @contextmanager
    def planned_tasks(self) -> Iterator[tasks.TaskPlan | None]:
        s = self.settings
        if not s.tasks:
            yield None
            return
        with tasks.plan_tasks(s, self.console) as plan:
            for name in plan.names:
                leaves = tasks.leaves_of(plan.groups[name]) if name in plan.groups else [name]
                splits = ", ".join(sorted({plan.splits[leaf] for leaf in leaves}))
                documents = sum(min(len(plan.leaves[leaf].eval_docs), s.limit or 10**9) for leaf in leaves)
                several = f"{len(leaves)} tasks, " if len(leaves) > 1 else ""
                self.console.say(f"{name}: split {splits}, {several}{number_of(documents, 'document')}")
            yield plan

    @contextmanager
    def loaded(self, who: loading.Subject) -> Iterator[Any]:
        """The model, and its memory given back afterwards."""
        import torch

        from marlinctl.quantize.activations import RoundingLinear

        self.console.say(f"loading {who.name} ({self.dtype} on {self.device})")
        model = loading.load_model(who, dtype=self.dtype, device=self.device)
        if rounded := Counter(module.activations for module in model.modules() if isinstance(module, RoundingLinear)):
            kinds = ", ".join(f"{kind} in {number_of(count, 'linear')}" for kind, count in rounded.most_common())
            self.console.say(f"{who.name}: activations are rounded, {kinds}")
        self.contents[who.folder].require_unchanged()  # scores are noted under the identity of what was read before
        try:
            yield model
        finally:
            del model
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()

    @contextmanager
    def answering(self, who: loading.Subject) -> Iterator[Any]:
        """The model as lm_eval wants it, by the backend that was asked for."""
        s = self.settings
        if s.backend == "vllm":
            from marlinctl.evaluation.vllm_backend import VllmHarness

            self.console.say(f"loading {who.name} ({self.dtype}, vLLM)")
            harness = VllmHarness(who.folder, dtype=self.dtype, batch_size=s.batch_size, seed=s.seed)
            self.contents[who.folder].require_unchanged()
            try:
                yield harness
            finally:
                harness.close()
                gc.collect()
            return
        from marlinctl.evaluation.harness import Harness

        with self.loaded(who) as model:
            yield Harness(model, loading.load_tokenizer(who), batch_size=s.batch_size, console=self.console)

    def measure_text(self, text: Text, document: results.Document) -> None:
        s = self.settings
        rows, start = self._windows(text)
        document["text"] = {
            "name": text.name,
            "note": text.note,
            "sha256": text.sha256,
            "windows": len(rows),
            "window": self.window,
            "starts_with": start,
        }
        self.console.say(f"text: {text.note}, SHA-256 {text.sha256[:16]}..., {number_of(len(rows), 'window')} of {self.window:,} tokens")
        if s.window is None and self.window < min(DEFAULT_WINDOW, s.tokens):
            self.console.say(f"windows are no longer than the {self.window:,} positions of the model")
        if len(rows) < s.tokens // self.window:
            self.console.warn(f"the text is shorter than --tokens {s.tokens:,}: {len(rows) * self.window:,} are used")
        if self.other is None:
            with self.loaded(self.subject) as model:
                losses = divergence.measure_losses(model, rows, self.console, label=self.subject.name)
            document["model"]["perplexity"] = statistics.perplexity(losses).document()
            return
        with self.loaded(self.subject) as model, self.loaded(self.other) as baseline:
            found = divergence.measure_divergence(model, baseline, rows, self.console)
        document["model"]["perplexity"] = statistics.perplexity(found.losses).document()
        document["baseline"]["perplexity"] = statistics.perplexity(found.baseline_losses).document()
        document["comparison"] |= {
            "perplexity": statistics.perplexity_difference(found.losses, found.baseline_losses).document(),
            "kl": statistics.token_mean(found.kl).document(),
            "top1": statistics.token_mean(found.agrees).document(),
        }

    def _windows(self, text: Text) -> tuple[Any, int | None]:
        return windows.of_models(text, self.models, self.settings)

    def score_tasks(self, plan: tasks.TaskPlan, who: loading.Subject, name_of_side: str, file: results.ResultsFile) -> None:
        side = file.document[name_of_side]
        records: dict[str, tasks.Record] = side.setdefault("tasks", {})
        if plan.leaves.keys() - records.keys():
            if records:
                self.console.say(f"{who.name}: {len(records)} finished tasks are kept")

            def finished(name: str, record: tasks.Record, samples: list[dict[str, Any]]) -> None:
                if self.settings.log_samples:
                    file.save_samples(name_of_side, name, (tasks.plain(sample) for sample in samples))
                records[name] = record
                file.save()
                scores = ", ".join(f"{metric} {figure(estimate)}" for metric, estimate in record["metrics"].items())
                self.console.say(f"{who.name}: {name}: {scores}")
                if record["cut"]:
                    what = f"{record['cut']} of {record['documents']} questions are longer than the model reads"
                    self.console.warn(f"{who.name}: {name}: {what}; their beginnings were left out")

            with self.answering(who) as harness:
                tasks.run_leaves(plan, harness, self.settings, done=set(records), label=who.name, finished=finished)
                del harness
        side["groups"] = tasks.group_scores(plan, records)


def _text_is_done(document: results.Document) -> bool:
    return document["text"] is not None and "perplexity" in document["model"]


def _task_differences(plan: tasks.TaskPlan, document: results.Document, seed: int) -> dict[str, dict[str, Any]]:
    """Of every leaf and group, paired by document: {"tasks": {name: {metric: {"value", "stderr"}}}, model - baseline; and "flips": the same
    of the share of answers that change, with the shares "to_wrong" and "to_correct", of every score that is right or wrong.
    """
    ours, theirs = document["model"]["tasks"], document["baseline"]["tasks"]
    leaves: dict[str, dict[str, statistics.Estimate]] = {}
    flips: dict[str, dict[str, statistics.Flips]] = {}
    for name, record in ours.items():
        if record["prompts_sha256"] != theirs[name]["prompts_sha256"]:
            raise UsageError(
                "E261",
                f"the models were asked different questions in {name}",
                where="--against",
                fix="start over with another --out: the data changed between the runs",
            )
        leaves[name], flips[name] = {}, {}
        for metric, samples in record["samples"].items():
            baseline = theirs[name]["samples"][metric]
            if None not in samples and None not in baseline:
                leaves[name][metric] = _leaf_difference(plan.leaves[name], metric, samples, baseline, seed)
                if _is_mean(plan.leaves[name], metric) and all(score in (0, 1) for score in (*samples, *baseline)):
                    flips[name][metric] = statistics.flips(samples, baseline)
    groups: dict[str, dict[str, statistics.Estimate]] = {}
    for name, record in document["model"]["groups"].items():
        groups[name], flips[name] = {}, {}
        for metric in record["metrics"]:
            by_size = tasks.weighs_by_size(plan.groups[name], metric)
            parts = [(leaves[leaf][metric], ours[leaf]["documents"]) for leaf in record["tasks"] if metric in leaves[leaf]]
            if parts:
                groups[name][metric] = statistics.pooled(parts, by_size=by_size)
            flipped = [(flips[leaf][metric], ours[leaf]["documents"]) for leaf in record["tasks"] if metric in flips[leaf]]
            if flipped and len(flipped) == len(record["tasks"]):
                flips[name][metric] = statistics.pooled_flips(flipped, by_size=by_size)
    differences = {name: {metric: e.document() for metric, e in found.items()} for name, found in (leaves | groups).items()}
    return {"tasks": differences, "flips": {name: {m: f.document() for m, f in found.items()} for name, found in flips.items() if found}}


def _leaf_difference(task: Any, metric: str, samples: list[Any], baseline: list[Any], seed: int) -> statistics.Estimate:
    if _is_mean(task, metric):
        return statistics.paired_mean(samples, baseline)
    return statistics.paired_bootstrap(samples, baseline, task.aggregation()[metric.split(",")[0]], seed=seed)


def _is_mean(task: Any, metric: str) -> bool:
    aggregate = task.aggregation().get(metric.split(",")[0])
    return aggregate is None or aggregate.__name__ == "mean"


def _versions(with_tasks: EvalSettings | None) -> dict[str, str]:
    from marlinctl import __version__

    asked = () if with_tasks is None else ("lm_eval", "vllm") if with_tasks.backend == "vllm" else ("lm_eval",)
    packages = ("torch", "transformers", *asked)
    return {"marlinctl": __version__, **{name: importlib.metadata.version(name) for name in packages}}
