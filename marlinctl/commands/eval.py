"""`marlinctl eval`: task scores, perplexity, and the distance to the original, each with its standard error."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from marlinctl.commands.common import common_options, go_offline
from marlinctl.commands.evaluation_flags import CHAT_TEMPLATE, NUM_FEWSHOT, names_of_tasks
from marlinctl.commands.help import Command
from marlinctl.quantize.scheme import RunWith
from marlinctl.system.console import Console


class _BatchSize(click.ParamType):
    name = "auto|N"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        try:
            return int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither auto nor a number", param, ctx)


@click.command("eval", cls=Command)
@click.argument("model", type=click.Path())
@click.option("--tasks", metavar="NAMES", default="", help="Tasks of lm_eval, by comma; arc means both ARC sets. Needs the extra `eval`.")
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Local copies of the tasks' data: parquet folders as on the hub, or saved data sets. No network is used.",
)
@click.option("--limit", type=int, metavar="N", help="Only the first N documents of each task.")
@NUM_FEWSHOT
@click.option("--apply-chat-template", is_flag=True, help=CHAT_TEMPLATE)
@click.option("--fewshot-as-multiturn", is_flag=True, help="Each example as turns of the chat. Needs --apply-chat-template.")
@click.option("--log-samples", is_flag=True, help="Write prompts and answers beside --out: FILE.samples/SIDE.TASK.jsonl.")
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run code written by the model (humaneval).")
@click.option(
    "--activations",
    type=click.Choice(["16-bit", "int8", "int8-128"]),
    help="Of MODEL's quantized linears, whatever its folder says; int8: a scale for each token, int8-128: for each 128 inputs.",
)
@click.option(
    "--backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True, help="What answers the tasks: transformers or vLLM."
)
@click.option(
    "--batch-size",
    type=_BatchSize(),
    default="auto",
    show_default=True,
    help="Sequences at once in tasks; give a number for published figures.",
)
@click.option(
    "--against", metavar="BASELINE", help="Compare with this model: perplexity, KL divergence, top-1 agreement, differences of scores."
)
@click.option(
    "--text",
    metavar="FILE|pythondoc",
    help="Text for perplexity and comparison: .txt, .jsonl, .parquet, or pythondoc (text in every CPython, the default).",
)
@click.option("--tokens", type=int, default=20480, show_default=True, metavar="N", help="Use the first N tokens of the text.")
@click.option("--window", type=int, metavar="N", help="Tokens read together. Default: 1024, or all that a smaller model can read.")
@click.option("--seed", type=int, default=1234, show_default=True, metavar="N", help="Seed of few-shot examples and bootstraps.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype of weights and activations. auto: as stored; on a CPU bfloat16 if supported, else float32.",
)
@click.option("--device", metavar="DEVICE", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="Write results here, after each task.")
@click.option("--resume", is_flag=True, help="Continue --out; model, settings and versions must be equal.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of MODEL on the hub.")
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Cache of converted GGUF files.")
@common_options
def command(
    console: Console,
    model: str,
    tasks: str,
    task_data: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    fewshot_as_multiturn: bool,
    log_samples: bool,
    confirm_run_unsafe_code: bool,
    activations: RunWith | None,
    backend: str,
    batch_size: int | Literal["auto"],
    against: str | None,
    text: str | None,
    tokens: int,
    window: int | None,
    seed: int,
    dtype: str,
    device: str,
    out: Path | None,
    resume: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Measure a model: task scores, perplexity, and how far it is from another one.

    \b
    Example:
      marlinctl eval OUT --against MODEL
      marlinctl eval OUT --tasks mmlu,arc,winogrande --against MODEL --out scores.json
      marlinctl eval OUT --activations 16-bit --against MODEL
      marlinctl eval OUT --tasks gsm8k,ifeval --apply-chat-template --num-fewshot 5 --against MODEL

    MODEL and BASELINE are folders (dense, compressed-tensors, GPTQ or native), hub ids or GGUF files. Without --tasks, or
    with --against, a text is measured too. Every figure comes with its standard error.
    """
    if task_data is not None and not console.offline and _is_local(model) and (against is None or _is_local(against)):
        go_offline()  # before the hub clients are imported
    from marlinctl.checkpoint.hub import require_hub_id
    from marlinctl.checkpoint.source import is_gguf, is_local, resolve_model
    from marlinctl.data.text import PYTHONDOC, check_text
    from marlinctl.evaluation.early import check_arguments
    from marlinctl.evaluation.loading import open_subject, refuse_idle_rounding
    from marlinctl.evaluation.results import check_place, samples_folder
    from marlinctl.evaluation.settings import EvalSettings
    from marlinctl.system.devices import check_name

    settings = EvalSettings(
        tasks=tuple(names_of_tasks(tasks)),
        task_data=task_data,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        log_samples=log_samples,
        run_code=confirm_run_unsafe_code,
        activations=activations,
        backend=backend,
        batch_size=batch_size,
        text=text,
        tokens=tokens,
        window=window,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    check_name(device)  # this and what follows: before torch is imported
    check_place(out, resume=resume, samples=log_samples)
    if with_text := bool(text or against or not settings.tasks):
        check_text(text or PYTHONDOC)
    for folder, commit in ((model, revision), (against, None)):
        if folder is not None and not is_local(folder, commit):
            require_hub_id(folder)
        elif folder is not None and not is_gguf(folder):
            subject = open_subject(Path(folder).expanduser())
            refuse_idle_rounding(activations if folder is model else None, subject)
    from marlinctl.evaluation.run import evaluate, render_table
    from marlinctl.system.devices import choose_device, say_choice

    say_choice(device, choose_device(device), console)  # this and what follows: before a model is fetched
    check_arguments(settings, console, with_text=with_text, load_tasks=False)  # they are loaded at once
    offline = console.offline
    source = resolve_model(model, revision=revision, cache_dir=cache_dir, offline=offline, console=console)
    other = None if against is None else resolve_model(against, revision=None, cache_dir=cache_dir, offline=offline, console=console)
    document = evaluate(
        source.folder,
        settings,
        console,
        baseline=None if other is None else other.folder,
        out=out,
        resume=resume,
        names=(source.name, None if other is None else other.name),
    )
    if out is not None:
        console.say(f"results are in {out}" + (f", prompts and answers in {samples_folder(out)}" if log_samples else ""))
    console.result(render_table(document), document)


def _is_local(model: str) -> bool:
    return Path(model).expanduser().exists()
