"""lm_eval's tasks, one leaf at a time.

A name is a task (`winogrande`), a group with scores of its own (`mmlu`: 57 tasks, four categories) or a tag that only gathers
(`ai2_arc`). Here each becomes its leaves; a leaf is run by `lm_eval.evaluate` and handed to the caller as soon as it ends, so a killed
run loses one leaf at most. Groups are put together at the end by lm_eval's own rule.

lm_eval's answer cache is never used: its key does not contain the model, so a second model would read the first one's answers.

Indexing everything that lm_eval knows takes 14 seconds, the usual folders 0.2. Only a name that is not found there pays for the index.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from marlinctl.errors import BadInput, EnvironmentProblem, HubProblem, MarlinctlError, Problem, UsageError
from marlinctl.evaluation import local_data, packages
from marlinctl.evaluation.settings import EvalSettings
from marlinctl.system.console import Console

ABBREVIATIONS = {"arc": ("arc_easy", "arc_challenge")}
USUAL_FOLDERS = ("mmlu/default", "arc", "winogrande", "wikitext", "hellaswag", "piqa", "openbookqa", "gsm8k", "ifeval", "humaneval")

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """What will be run: lm_eval's task objects by leaf name, its groups, and what was asked for."""

    names: tuple[str, ...]  # what gets a line in the result: groups with a score, else leaves
    leaves: dict[str, Any]
    groups: dict[str, Any]
    splits: dict[str, str]  # leaf -> the split that is measured


def require_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise EnvironmentProblem(
            "E402", "task scores need lm_eval, which is not installed", where="--tasks", fix="pip install 'marlinctl[eval]'"
        )


def check_tasks(settings: EvalSettings, console: Console) -> None:
    """Refuse names that lm_eval does not know, code without consent, and copies of data that are not there (E243); packages that a task
    needs (E402). Loads and fetches no data."""
    with _found(settings, console):
        pass


@contextmanager
def plan_tasks(settings: EvalSettings, console: Console) -> Iterator[TaskPlan]:
    """The plan is usable inside the `with`: the data of the tasks are mapped from a temporary folder."""
    if settings.task_data is not None:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before datasets and huggingface_hub are imported
    if settings.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked by the metric when the task is loaded
    with _found(settings, console) as (wanted, index):
        yield _load(wanted, index, settings)


@contextmanager
def _found(settings: EvalSettings, console: Console) -> Iterator[tuple[list[str], Any]]:
    """The wanted names, and a task manager that knows them all, with local copies of the data where there are some."""
    require_lm_eval()
    if settings.backend == "vllm" and find_spec("vllm") is None:
        fix = "pip install vllm (Linux, a GPU), or leave --backend out: the tasks then run in transformers"
        raise EnvironmentProblem("E402", "the package vllm is not installed", where="--backend vllm", fix=fix)
    if settings.task_data is not None:
        local_data.check_folder(settings.task_data)
    from marlinctl.evaluation.harness import lm_eval_speaks_to

    wanted = list(dict.fromkeys(full for name in settings.tasks for full in ABBREVIATIONS.get(name, (name,))))
    with tempfile.TemporaryDirectory(prefix="marlinctl-tasks-") as temporary, lm_eval_speaks_to(console):
        manager = _find_names(wanted, console)
        configs = {leaf: manager.task_index[leaf].cfg for leaf in _leaf_names(wanted, manager.task_index)}
        if not settings.run_code:
            _refuse_code([name for name, config in configs.items() if config.get("unsafe_code")])
        packages.require(configs)
        if settings.task_data is not None:
            manager = _with_local_data(wanted, manager, settings.task_data, Path(temporary))
        yield wanted, manager


def _refuse_code(names: Sequence[str]) -> None:
    if names:
        what = "runs code that the model wrote, on this machine and with your rights"
        fix = "--confirm-run-unsafe-code allows it, best in a container without network; or leave the task out"
        raise UsageError.from_problems("E243", [Problem(f"{name} {what}", "--tasks", fix) for name in names])


def run_leaves(
    plan: TaskPlan,
    model: Any,
    settings: EvalSettings,
    *,
    done: set[str],
    label: str,
    finished: Callable[[str, Record, list[dict[str, Any]]], None],
) -> None:
    """Every leaf that is not done yet; `model` is a Harness. `finished` gets name, record and lm_eval's own samples."""
    from lm_eval import evaluate

    from marlinctl.evaluation.harness import out_of_memory

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm_eval's bootstrap would fork a process per core, with the model in it
    left = [name for name in plan.leaves if name not in done]
    for place, name in enumerate(left, start=1):
        model.label = f"{label}: {name} ({place} of {len(left)})"
        model.cut.clear()
        plan.leaves[name].set_fewshot_seed(seed=settings.seed)  # the baseline gets the examples that the model got before it
        try:
            result = evaluate(
                lm=model,
                task_dict={"tasks": {name: plan.leaves[name]}, "groups": {}, "group_map": {}},
                limit=settings.limit,
                bootstrap_iters=1000,
                log_samples=True,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.fewshot_as_multiturn,
                confirm_run_unsafe_code=settings.run_code,
            )
        except (MarlinctlError, OSError):
            raise
        except Exception as error:  # lm_eval and the code of its tasks raise what they like
            if out_of_memory(error):
                raise
            if (missing := packages.missing(error)) is not None:
                raise packages.refusal({name: [missing]}) from error
            raise UsageError("E243", f"lm_eval cannot run the task: {_first_line(error)}", where=name, fix="leave the task out") from error
        finished(name, _record(plan, name, result, len(model.cut)), result["samples"][name])


def _record(plan: TaskPlan, name: str, result: Any, cut: int) -> Record:
    """One leaf as JSON. `samples` holds each metric document by document, for paired differences; `cut` documents were too long."""
    metrics = {key: value for key, value in result["results"][name].items() if "," in key and "_stderr," not in key}
    samples: dict[str, list[Any]] = {key: [] for key in metrics}
    digest = hashlib.sha256()
    for sample in result["samples"][name]:
        digest.update(f"{sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}\n".encode())
        for metric in sample["metrics"]:
            if (key := f"{metric},{sample['filter']}") in samples:
                samples[key].append(sample[metric])
    counts = result["n-samples"][name]
    record = {
        "split": plan.splits[name],
        "documents": counts["effective"],
        "of_documents": counts["original"],
        "cut": cut,
        "num_fewshot": result["n-shot"][name],
        "version": result["versions"][name],
        "prompts_sha256": digest.hexdigest(),
        "metrics": _estimates(result["results"][name]),
        "samples": {_short(key): values for key, values in samples.items()},
    }
    return plain(record)  # the same now as when it is read back


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON holds it."""
    return cast(dict[str, Any], json.loads(json.dumps(_finite(value), default=_plain)))


def group_scores(plan: TaskPlan, records: dict[str, Record]) -> dict[str, Record]:
    """The groups that lm_eval gives a score of its own, from the records of their leaves."""
    flat: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        flat[name] = {"sample_len": record["documents"], "alias": name}
        for metric, estimate in record["metrics"].items():
            key = _long(metric)
            flat[name][key] = estimate["value"]
            flat[name][_stderr_key(key)] = "N/A" if estimate["stderr"] is None else estimate["stderr"]
    scores: dict[str, Record] = {}
    for name, group in plan.groups.items():
        result = group.aggregate(flat)
        if metrics := _estimates(result):
            scores[name] = {"documents": result["sample_len"], "tasks": leaves_of(group), "metrics": metrics}
    return scores


def leaves_of(group: Any) -> list[str]:
    return [task.task_name for task in group.get_all_tasks()]


def weighs_by_size(group: Any, metric: str) -> bool:
    return any(item.weight_by_size for item in group.aggregate_metric_list or () if item.metric == metric.split(",")[0])


def _short(key: str) -> str:
    """lm_eval's "acc,none" as "acc"; a filter that does something stays visible: "exact_match,strict-match"."""
    return key.removesuffix(",none")


def _long(metric: str) -> str:
    return metric if "," in metric else f"{metric},none"


def _estimates(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm_eval's {"acc,none": .5, "acc_stderr,none": .01} as {"acc": {"value": .5, "stderr": .01}}."""
    scores = {key: value for key, value in result.items() if "," in key and "_stderr," not in key}
    return {_short(key): {"value": _number(value), "stderr": _number(result.get(_stderr_key(key)))} for key, value in scores.items()}


def _stderr_key(key: str) -> str:
    return key.replace(",", "_stderr,", 1)


def _number(value: Any) -> float | None:
    """None for "N/A", which is what lm_eval says when it does not know, and for what JSON cannot hold."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else by its text."""
    return value.item() if hasattr(value, "item") else str(value)


def _find_names(wanted: Sequence[str], console: Console) -> Any:
    """A task manager that knows every wanted name."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    home = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(include_path=[home / folder for folder in USUAL_FOLDERS if (home / folder).is_dir()], include_defaults=False)
    if all(name in manager.task_index for name in wanted):
        return manager
    console.detail("looking through everything that lm_eval knows")
    manager = _everything()
    unknown = [name for name in wanted if name not in manager.task_index]
    if unknown:
        known = [*ABBREVIATIONS, *manager.all_tasks]
        raise UsageError.from_problems("E243", [_unknown(name, known) for name in unknown])
    return manager


@lru_cache(maxsize=1)
def _everything() -> Any:
    """lm_eval's whole index: 14 seconds, once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unknown(name: str, known: Sequence[str]) -> Problem:
    near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5))
    return Problem(f"lm_eval knows no task {name}", "--tasks", f"did you mean {near}?" if near else "see: lm_eval ls tasks")


def _below(name: str, index: Any) -> list[str]:
    """A name and all that lm_eval would run for it: groups, tags and tasks. Read from the index, so that no data are loaded for it."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return [name, *sorted(entry.tags)]
    if entry.kind.name != "GROUP":
        return [name]
    found = [name]
    members = list(entry.cfg["task"])
    while members:
        member = members.pop(0)
        if isinstance(member, dict):  # a reference with overrides, or a group written out on the spot
            inside = member.get("group") if member.get("group") in index else member.get("task")
            members[:0] = inside if isinstance(inside, list) else [inside]
        elif member in index and member not in found:
            found += _below(member, index)
    return found


def _leaf_names(wanted: Sequence[str], index: Any) -> list[str]:
    needed = dict.fromkeys(below for name in wanted for below in _below(name, index))
    return [name for name in needed if index[name].kind.name not in ("GROUP", "TAG")]


def _with_local_data(wanted: Sequence[str], manager: Any, root: Path, temporary: Path) -> Any:
    """A task manager over the same definitions, each with its data taken from `root`."""
    import yaml
    from lm_eval.tasks import TaskManager

    index = manager.task_index
    missing: list[str] = []
    copies: list[local_data.LocalCopy] = []
    for place, leaf in enumerate(_leaf_names(wanted, index)):
        config = index[leaf].cfg
        copy = local_data.find_copy(root, str(config.get("dataset_path")), config.get("dataset_name"))
        changed = local_data.overrides(config, copy) if copy is not None else None
        if changed is None:
            missing.append(leaf)
            continue
        assert copy is not None
        copies.append(copy)
        changed["dataset_kwargs"]["cache_dir"] = str(temporary / "cache")
        definition = {"include": str(index[leaf].yaml_path), "task": leaf, **changed}
        (temporary / f"{place:04d}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf-8")
    if missing:
        raise _no_data(missing, root, index)
    local_data.check_unpacked(copies)
    needed = dict.fromkeys(below for name in wanted for below in _below(name, index))
    folders = sorted({path.parent for name in needed if (path := index[name].yaml_path) is not None})
    return TaskManager(include_path=[*folders, temporary], include_defaults=False)


def _no_data(missing: Sequence[str], root: Path, index: Any) -> UsageError:
    first = index[missing[0]].cfg
    wanted = "/".join(str(first[key]) for key in ("dataset_path", "dataset_name") if first.get(key))
    names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return UsageError(
        "E243",
        f"the local copies lack the data of {names} (looked for {wanted.split('/', 1)[-1]}, splits to measure included)",
        where=f"--task-data {root}",
        fix=f"the folder holds {local_data.listing(root)}; add the data, name another folder, or leave the task out",
    )


def _load(wanted: Sequence[str], manager: Any, settings: EvalSettings) -> TaskPlan:
    leaves: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    names: list[str] = []
    for name in wanted:
        try:
            loaded = manager.load([name])
        except (ConnectionError, OSError) as error:
            if settings.task_data is not None:
                raise _unusable(name, error) from error
            raise HubProblem(
                "E707",
                f"the data of {name} could not be fetched: {_first_line(error)}",
                where="--tasks",
                fix="check the network, or give local copies with --task-data DIR",
            ) from error
        except Exception as error:  # datasets, pyarrow and lm_eval raise what they like on data that do not fit a task
            if (missing := packages.missing(error)) is not None:
                raise packages.refusal({name: [missing]}) from error
            raise _unusable(name, error) from error
        leaves |= loaded["tasks"]
        groups |= loaded["groups"]
        scored = name in loaded["groups"] and loaded["groups"][name].has_aggregation
        names += [name] if scored else list(loaded["tasks"])
    if not settings.run_code:
        _refuse_code([name for name, task in leaves.items() if getattr(task, "UNSAFE_CODE", False)])
    pictures = [name for name, task in leaves.items() if getattr(task, "MULTIMODAL", False)]
    if pictures:
        what = "shows pictures to the model, which marlinctl does not do"
        raise UsageError.from_problems("E243", [Problem(f"{name} {what}", "--tasks", "leave the task out") for name in pictures])
    packages.require_nltk_data(leaves)
    for task in leaves.values():
        _set_fewshot(task, settings.num_fewshot)
    splits = {name: local_data.measured_split(_split_names(task)) or "its own" for name, task in leaves.items()}
    return TaskPlan(tuple(dict.fromkeys(names)), leaves, groups, splits)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As lm_eval's command line does: a task that insists on 0 keeps 0, a task that says nothing gets 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _split_names(task: Any) -> dict[str, str | None]:
    return {key: task.get_config(key) for key in ("test_split", "validation_split")}


def _unusable(name: str, error: Exception) -> BadInput:
    return BadInput(
        "E385",
        f"the data of {name} cannot be used: {_first_line(error)}",
        where="--task-data",
        fix="copy the data again; they must have the columns of the data set on the hub",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
