"""What `--help` shows: options under titles, and of the longest verbs the usual ones only; `--help-all` shows all.

A command file says `@click.command("quantize", cls=Command)`. Where an option stands is an entry of `TITLES`; one without an entry ends
the help with a KeyError, and tests/commands/test_help.py before that.

Why no library: docs/decisions/README.md, "The titles of the help are our own".
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import click

COMMON = "Options of every command"

# Title -> its options, both in the order of the help. `bench:--tokens` is the option of that verb alone and wins over `--tokens`.
TITLES: Mapping[str, str] = {
    "Models and output": "--teacher --against --source --model --format --also --out --overwrite --max-shard-size --from --scores"
    " --bench --revision --base-model --license --module-map --drop-unexpected --gptq-v2 --cache-dir",
    "What is computed": "--recipe --pattern --mode --build --arch --only --check --tp --layers --shape --roofline --dense --sparse"
    " --bits --asymmetric --group-size --activations --activation-group bench:--tokens --configurations --tune --peers --batch --lengths"
    " --fuse --compile --skip --include --override --method --mask-sweeps --ls-iterations --permute --group-scales --scale-search"
    " --scale-sign --act-order --equalize --rotate --token-weights --refine --drift-correction --damping --tune-steps --from-block"
    " --weights",
    "Calibration": "--calibration --samples --sequence-length --chat --seed",
    "Training": "--distill-data --distill-tokens --distill-sequence-length --data distill:--tokens distill:--sequence-length"
    " --learning-rate --warmup --batch-tokens --micro-batch --ce --squarehead --kl --temperature --mask --mask-interval"
    " --mask-decay --cache-logits --checkpointing --save-every --tracker distill:--seed",
    "Quality": "--tasks --task-data --limit --num-fewshot --apply-chat-template --fewshot-as-multiturn --log-samples"
    " --confirm-run-unsafe-code --backend --batch-size eval:--seed --eval --text --tokens --window --max-kl --max-ppl-ratio"
    " --publish-anyway --load --kernels",
    "Running": "--device --dtype --ranks --probe --threads --max-memory --device-memory --deterministic --strict --resume --keep-job"
    " --quick --yes",
    COMMON: "--json --quiet --verbose --log-file --no-color --debug --offline --help --help-all",
}
# What `--help` shows of a verb with too many options for a screen of 40 lines. A verb that is not here shows all.
USUAL: Mapping[str, str] = {
    "compress": "--format --also --overwrite --recipe --group-size --skip --calibration --samples --tasks --eval --max-kl --device",
    "quantize": "--overwrite --recipe --group-size --skip --override --calibration --samples --sequence-length --device --max-memory",
    "sparsify": "--overwrite --recipe --bits --method --calibration --samples --tasks --eval --max-kl --device",
    "distill": "--teacher --overwrite --mode --data --tokens --sequence-length --learning-rate --cache-logits --device",
    "eval": "--against --out --tasks --task-data --limit --batch-size --text --device --resume",
    "plan": "--also --recipe --group-size --calibration --samples --device --ranks --probe --max-memory",
}

_NAMES = list(TITLES)
_PLACES = {entry: (number, place) for number, entries in enumerate(TITLES.values()) for place, entry in enumerate(entries.split())}
_ALL = "marlinctl.commands.help"  # key of click's meta: --help-all was asked for
_COLUMN = 26  # a longer option has a line of its own


class Command(click.Command):
    """A verb whose options stand under titles. What follows a form feed in its docstring is shown by `--help-all` alone."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        if self.name in USUAL:
            about = "Show all options and exit."
            self.params.append(
                click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_answer_in_full, help=about)
            )

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        before = len(formatter.buffer)
        super().format_help_text(ctx, formatter)  # up to the form feed
        continue_examples(formatter, before)
        rest = inspect.cleandoc(self.help or "").partition("\f")[2].strip()
        if rest and _shows_all(ctx):
            formatter.write_paragraph()
            formatter.write(click.wrap_text(rest, formatter.width, "  ", "  ", preserve_paragraphs=True) + "\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = self.sections(ctx)
        width = max(len(flag) for rows in sections.values() for flag, _ in rows if len(flag) <= _COLUMN)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(flag.ljust(width), text) for flag, text in rows], col_max=width)
        if not _shows_all(ctx):
            formatter.write(f"\nAll options: {ctx.command_path} --help-all\n")

    def sections(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Title -> (option, help) of the options to show, in the order of `TITLES`. KeyError for an option without an entry there."""
        usual = None if _shows_all(ctx) else USUAL[str(self.name)].split()
        placed = []
        for parameter in self.get_params(ctx):
            if not isinstance(parameter, click.Option) or (record := parameter.get_help_record(ctx)) is None:  # the latter: hidden
                continue
            flag = max(parameter.opts, key=len)
            number, place = _PLACES.get(f"{self.name}:{flag}") or _PLACES[flag]
            if usual is None or flag in usual:
                placed.append((number, place, record))
        found: dict[str, list[tuple[str, str]]] = {}
        for number, _, record in sorted(placed):
            found.setdefault(_NAMES[number], []).append(record)
        return found


class Group(click.Group):
    """A verb with verbs of its own, whose options stand under titles."""

    command_class = Command


def continue_examples(formatter: click.HelpFormatter, start: int) -> None:
    """Examples among what was written since `start` that are wider than the terminal continue after a backslash, and can be copied."""
    lines = "".join(formatter.buffer[start:]).split("\n")
    formatter.buffer[start:] = ["\n".join(_continued(line, formatter.width) for line in lines)]


def _continued(line: str, width: int) -> str:
    example = line.lstrip()
    if len(line) <= width or not example.startswith("marlinctl "):
        return line
    indent = line[: len(line) - len(example)]
    whole = re.sub(r"(?<= )(--[a-z0-9-]+) (?!-)", "\\1\0", example)  # an option keeps its value
    parts = textwrap.wrap(
        whole, width - len(" \\"), initial_indent=indent, subsequent_indent=f"{indent}    ", break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(parts).replace("\0", " ")


def show_all(context: click.Context) -> None:
    """The help of this context has all options from here on."""
    context.meta[_ALL] = True


def _shows_all(context: click.Context) -> bool:
    return context.command.name not in USUAL or bool(context.meta.get(_ALL))


def _answer_in_full(context: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given and not context.resilient_parsing:
        show_all(context)
        click.echo(context.get_help(), color=context.color)
        context.exit()
