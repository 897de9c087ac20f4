"""The flags of `quantize`, `compress` and `distill` that change a recipe, and those that say how the job runs.

Each recipe flag is one row of `_RECIPE_FLAGS` or `_DISTILL_FLAGS`: the key it sets and its help. A flag that is not given is None and
leaves the recipe alone, so defaults live in recipes/int4.yaml and nowhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlinctl.commands.card_flags import BASE_MODEL, LICENSE, chosen_card
from marlinctl.commands.common import FormerFlag
from marlinctl.errors import UsageError
from marlinctl.system.log import redact
from marlinctl.system.sizes import size_in_bytes

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from marlinctl.oneshot.open import Options
    from marlinctl.recipes.schema import Recipe
    from marlinctl.system.console import Console

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class AutoOr(click.ParamType):
    """A number, or `auto`."""

    name = "auto|fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "auto":
            return "auto"
        return float(click.FLOAT.convert(value, param, ctx))


_RECIPE_FLAGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "quantize.bits": ("--bits", {"type": int, "metavar": "4|8", "help": "Bits per weight; `sparsify` leaves 16 without it."}),
    "quantize.symmetric": (
        "--asymmetric",
        {"is_flag": True, "flag_value": False, "help": "4-bit codes with a zero point for each group, for ct and gptq."},
    ),
    "quantize.group_size": (
        "--group-size",
        {"type": int, "metavar": "128|64|32|-1", "help": "Inputs that share a scale; -1: the whole row."},
    ),
    "quantize.activations": (
        "--activations",
        {"metavar": "16-bit|int8", "help": "int8: kernels may round what enters 4-bit linears. For the format marlin."},
    ),
    "quantize.activation_group": (
        "--activation-group",
        {"type": int, "metavar": "128|-1", "help": "Inputs of a token that share a scale of --activations int8; -1: all."},
    ),
    "quantize.group_scales": (
        "--group-scales",
        {"metavar": "float16|integer", "help": "integer: small integers times one number per row, for kernels of int8 products."},
    ),
    "quantize.scale_sign": ("--scale-sign", {"metavar": "both|positive", "help": "positive for runtimes that require positive scales."}),
    "quantize.act_order": ("--act-order", {"metavar": "static|none", "help": "Order of columns during the solve; files stay the same."}),
    "quantize.scale_search": ("--scale-search", {"metavar": "hessian|mse|none", "help": "Error that a group's scale minimizes."}),
    "quantize.damping": (
        "--damping",
        {"type": AutoOr(), "help": "Fraction of the mean diagonal added to the Hessian; auto: by the tokens per input."},
    ),
    "quantize.equalize": (
        "--equalize",
        {"metavar": "auto|never", "help": "Even out columns by powers of two that the norm before them makes up for."},
    ),
    "quantize.rotate": (
        "--rotate",
        {"metavar": "auto|always|never", "help": "Rotate residual stream and value heads, so that no channel is much larger than others."},
    ),
    "quantize.token_weights": (
        "--token-weights",
        {"metavar": "uniform|gradient", "help": "gradient: tokens count by the gradient of the model's loss; four forward passes more."},
    ),
    "quantize.refine": ("--refine", {"type": int, "help": "Rounds of coordinate descent and scale re-fit after the solve."}),
    "quantize.drift_correction": (
        "--drift-correction",
        {"type": float, "metavar": "0..1", "help": "Share of the drift from the unquantized model that is corrected; 0 is plain GPTQ."},
    ),
    "quantize.tune_steps": ("--tune-steps", {"type": int, "help": "Steps of tuning each block's scales and norms, codes frozen."}),
    "quantize.skip": (
        "--skip",
        {"multiple": True, "metavar": "PATTERN", "help": "Keep these linears at 16 bits (o_proj, re:...)."},
    ),
    "quantize.include": (
        "--include",
        {"multiple": True, "metavar": "lm_head", "help": "Quantize the output head too; a tied one is copied."},
    ),
    "sparsify.method": (
        "--method",
        {"metavar": "iterative|sparsegpt|wanda|magnitude", "help": "How the kept weights are chosen when pruning to 2:4."},
    ),
    "sparsify.mask_sweeps": ("--mask-sweeps", {"type": int, "help": "Sweeps of --method iterative that may change the mask."}),
    "sparsify.ls_iterations": ("--ls-iterations", {"type": int, "help": "Least-squares steps of --method iterative."}),
    "sparsify.permute": (
        "--permute",
        {"metavar": "auto|always|never", "help": "Put channels together so that a 2:4 pattern keeps more."},
    ),
    "calibration.source": (
        "--calibration",
        {"metavar": "SOURCE", "help": "auto, self, a .txt/.jsonl/.json/.parquet file, a hub data set, or a mixture: A:0.5,B:0.5."},
    ),
    "calibration.samples": ("--samples", {"type": int, "help": "Calibration samples."}),
    "calibration.sequence_length": ("--sequence-length", {"type": int, "help": "Tokens per sample."}),
    "calibration.seed": ("--seed", {"type": int, "help": "Random seed."}),
    "calibration.chat": ("--chat", {"metavar": "auto|always|never", "help": "When to apply the chat template."}),
}


_FORMER_FLAGS = {"--drift-correction": "--match"}

_DISTILL_FLAGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "distill.data": ("--data", {"metavar": "SOURCE", "help": "self, a .txt/.jsonl/.json/.parquet file, a hub data set, or a mixture."}),
    "distill.tokens": ("--tokens", {"type": int, "metavar": "N", "help": "Tokens to train on."}),
    "distill.mode": ("--mode", {"metavar": "full|blockwise|scales", "help": "The whole model, one block at a time, or scales and norms."}),
    "distill.learning_rate": ("--learning-rate", {"type": float, "help": "Peak learning rate."}),
    "distill.warmup": ("--warmup", {"type": float, "help": "Share of the steps in which the learning rate rises."}),
    "distill.batch_tokens": ("--batch-tokens", {"type": int, "help": "Tokens per optimizer step, over all processes."}),
    "distill.micro_batch": ("--micro-batch", {"type": int, "help": "Rows in one forward pass; fewer need less memory."}),
    "distill.sequence_length": ("--sequence-length", {"type": int, "help": "Tokens per row."}),
    "distill.ce": ("--ce", {"type": float, "metavar": "WEIGHT", "help": "Weight of the cross entropy with the text."}),
    "distill.squarehead": ("--squarehead", {"type": float, "metavar": "WEIGHT", "help": "Weight of the error of the hidden states."}),
    "distill.kl": ("--kl", {"type": float, "metavar": "WEIGHT", "help": "Weight of the divergence from the teacher."}),
    "distill.temperature": ("--temperature", {"type": float, "help": "Temperature of the divergence."}),
    "distill.mask": (
        "--mask",
        {"metavar": "fixed|renewed", "help": "Keep the 2:4 mask, or train all weights toward a mask that follows them."},
    ),
    "distill.mask_interval": (
        "--mask-interval",
        {"type": int, "metavar": "STEPS", "help": "Steps between two renewals of the mask."},
    ),
    "distill.mask_decay": (
        "--mask-decay",
        {"type": float, "help": "Decay of pruned weights over the training, in mean magnitudes of kept weights."},
    ),
    "distill.cache_logits": (
        "--cache-logits",
        {"type": int, "metavar": "K", "help": "Store the teacher's K largest predictions on disk instead of keeping it in memory."},
    ),
    "distill.checkpointing": (
        "--checkpointing/--no-checkpointing",
        {"is_flag": True, "help": "Recompute activations: less memory, a third more time."},
    ),
    "distill.save_every": ("--save-every", {"type": int, "metavar": "STEPS", "help": "Steps between two saved states."}),
    "distill.seed": ("--seed", {"type": int, "help": "Seed of the order of the data, and of text that the teacher writes."}),
}


def recipe_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """--recipe, one flag for each key of the recipe that a run may want to change, and --override."""
    decorators = _of_table(_RECIPE_FLAGS)
    decorators.append(
        click.option(
            "--override",
            multiple=True,
            metavar="PATTERN=KEY:N",
            help="Another group_size or bits, or 8-bit activations, for these linears; may be given again.",
        )
    )
    return _apply(function, decorators)


def distill_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """--recipe, and one flag for each key of its section `distill`."""
    return _apply(function, _of_table(_DISTILL_FLAGS))


# What every job has.
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is complete.")
_THREADS = click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.")
_CACHE_DIR = click.option("--cache-dir", type=click.Path(path_type=Path), metavar="DIR", help="Downloads and converted GGUF files.")
_MODULE_MAP = click.option("--module-map", type=click.Path(path_type=Path), metavar="FILE", help="Description of an unknown architecture.")


_STRICT = click.option(
    "--strict",
    is_flag=True,
    help="Make warnings errors: exit 3 for shards missing from the index and an index without metadata, exit 6 for a Hessian that needs a "
    "fallback, weights or inputs that are all zero, and constant columns.",
)
_DETERMINISTIC = click.option("--deterministic", is_flag=True, help="The same bytes every time on CUDA; the CPU always does that.")
_MAX_MEMORY = click.option(
    "--max-memory", metavar="SIZE", help="Refuse to start if more memory is needed (4GiB, 800MiB). Default: free memory."
)
_DEVICE_MEMORY = click.option("--device-memory", metavar="SIZE", help="Take no more of the GPU's memory (40GiB). Default: what is free.")
_KEEP_JOB = click.option("--keep-job", is_flag=True, help="Keep OUT.job, the run's journal, when OUT is published.")
MAX_SHARD_SIZE = click.option("--max-shard-size", metavar="SIZE", help="Largest weight file of OUT (2GB, 500MB). Default: 5GB.")
_RESUME = click.option("--resume", is_flag=True, help="Continue this interrupted job (shorter: `marlinctl resume OUT`).")
_DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute. auto: a CUDA GPU if there is one."
)
_TRACKER = click.option(
    "--tracker",
    type=click.Choice(["tensorboard", "wandb"]),
    help="Log losses, learning rate and speed there too. Needs the extra of that name.",
)
_DROP_UNEXPECTED = click.option(
    "--drop-unexpected", is_flag=True, help="Leave out MTP and value heads, KV-cache scales and other tensors that transformers drops."
)
_RUN_FLAGS: list[_Decorator] = [
    BASE_MODEL,
    LICENSE,
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
    _DEVICE,
    click.option(
        "--dtype", default="auto", metavar="auto|bfloat16|float32", help="Dtype of the forward pass. auto: bfloat16 if the hardware has it."
    ),
    _OVERWRITE,
    _RESUME,
    _KEEP_JOB,
    MAX_SHARD_SIZE,
    _STRICT,
    _DETERMINISTIC,
    _THREADS,
    _MAX_MEMORY,
    _DEVICE_MEMORY,
    _CACHE_DIR,
    _MODULE_MAP,
    _DROP_UNEXPECTED,
]


def run_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """How the job runs; none of these changes the codes on a CPU, but --device and --dtype."""
    return _apply(function, _RUN_FLAGS)


def plan_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where the run that is planned would take place."""
    apart = (BASE_MODEL, LICENSE, _OVERWRITE, _RESUME, _KEEP_JOB, MAX_SHARD_SIZE, _STRICT, _DETERMINISTIC, _MAX_MEMORY, _DEVICE_MEMORY)
    chosen = [option for option in _RUN_FLAGS if option not in apart]
    return _apply(
        function,
        [
            *chosen,
            click.option("--max-memory", metavar="SIZE", help="Host memory to plan for (4GiB, 800MiB). Default: free memory."),
            click.option("--device-memory", metavar="SIZE", help="GPU memory to plan for. Default: free according to nvidia-smi."),
        ],
    )


def distill_run_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """How a distillation runs."""
    return _apply(
        function,
        [
            _TRACKER,
            BASE_MODEL,
            LICENSE,
            click.option("--revision", metavar="REV", help="Branch, tag or commit of a teacher on the hub."),
            _DEVICE,
            click.option(
                "--dtype",
                default="auto",
                metavar="auto|bfloat16|float32",
                help="Dtype of products; weights are trained in float32. auto: bfloat16 where the hardware has it.",
            ),
            _OVERWRITE,
            _RESUME,
            _KEEP_JOB,
            MAX_SHARD_SIZE,
            _THREADS,
            _CACHE_DIR,
            _MODULE_MAP,
        ],
    )


def chosen_recipe(
    console: Console, values: dict[str, Any], extra: Mapping[str, Any] | None = None, verb: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe with the given flags over it; takes what `recipe_flags` added out of `values`. What flags changed is said once.

    extra: keys that flags of the verb itself set. verb: keys that the verb implies whatever the recipe says; not reported.
    """
    overrides = _given(values, _RECIPE_FLAGS)
    overrides["quantize.overrides"] = _overrides(values.pop("override")) or None
    return _resolved(console, values, {**overrides, **(extra or {})}, verb)


def chosen_distillation(console: Console, values: dict[str, Any]) -> Recipe:
    """The same for what `distill_flags` added."""
    return _resolved(console, values, _given(values, _DISTILL_FLAGS))


def chosen_options(console: Console, values: Mapping[str, Any]) -> Options:
    from marlinctl.checkpoint.shards import max_shard_bytes
    from marlinctl.oneshot.open import Options

    refuse_unknown_dtype(values["dtype"])
    said = chosen_card(values)
    return Options(
        revision=values["revision"],
        device=values["device"],
        dtype=values["dtype"],
        cache_dir=values["cache_dir"],
        offline=console.offline,
        overwrite=values["overwrite"],
        strict=values.get("strict", False),
        deterministic=values.get("deterministic", False),
        threads=values["threads"],
        max_memory=size_in_bytes(values.get("max_memory"), "--max-memory"),
        device_memory=size_in_bytes(values.get("device_memory"), "--device-memory"),
        module_map=values["module_map"],
        drop_unexpected=values.get("drop_unexpected", False),
        command=command_line(),
        keep_job=values["keep_job"],
        max_shard_bytes=max_shard_bytes(values.get("max_shard_size")),
        tracker=values.get("tracker"),
        base_model=said.base_model,
        license=said.license,
        resume=values["resume"],
    )


def refuse_unknown_dtype(dtype: str) -> None:
    if dtype not in ("auto", "bfloat16", "float32"):
        raise UsageError(
            "E202",
            f"--dtype {dtype} is not offered",
            where="--dtype",
            fix="auto, bfloat16 or float32 (float16 overflows in some models)",
        )


def command_line() -> str:
    """The command as it was typed, for report, card and manifest; without tokens and logins, which stand in files that are published."""
    import shlex

    return redact(shlex.join(["marlinctl", *sys.argv[1:]]))


def _of_table(flags: Mapping[str, tuple[str, dict[str, Any]]]) -> list[_Decorator]:
    recipe = click.option(
        "--recipe",
        "recipe_name",
        default="int4",
        show_default=True,
        metavar="NAME|FILE",
        help="See `marlinctl recipes ls`.",
        shell_complete=_recipe_names,
    )
    options = []
    for key, (flag, attributes) in flags.items():
        values = str(attributes.get("metavar", "")).split("|")
        complete = _beginning_with(values) if len(values) > 1 else None
        options.append(click.option(flag, _parameter(key), default=None, shell_complete=complete, **attributes))
        if flag in _FORMER_FLAGS:
            options.append(click.option(_FORMER_FLAGS[flag], flag, cls=FormerFlag, type=attributes["type"]))
    return [recipe, *options]


def _beginning_with(values: list[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """For the shell: the values that the help shows."""
    return lambda _context, _parameter, typed: [value for value in values if value.startswith(typed)]


def _recipe_names(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from marlinctl.recipes.schema import builtin_names

    names = [CompletionItem(name) for name in builtin_names() if name.startswith(typed)]
    return names or click.Path().shell_complete(context, parameter, typed)


def _given(values: dict[str, Any], flags: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The keys that flags set, taken out of `values`; None for a flag that was not given."""
    return {
        key: values.pop(_parameter(key)) or None if attributes.get("multiple") else values.pop(_parameter(key))
        for key, (_, attributes) in flags.items()
    }


def _resolved(console: Console, values: dict[str, Any], overrides: Mapping[str, Any], verb: Mapping[str, Any] | None = None) -> Recipe:
    from marlinctl.recipes.schema import load_recipe, resolve

    recipe, _ = resolve(load_recipe(values.pop("recipe_name"), deprecated=console.warn), verb or {})
    resolved, changes = resolve(recipe, overrides, deprecated=console.warn)
    for change in changes:
        console.say(change)
    return resolved


def _apply(function: Callable[..., Any], decorators: list[_Decorator]) -> Callable[..., Any]:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def _parameter(key: str) -> str:
    return key.replace(".", "__")


_OVERRIDE_KEYS = ("group_size", "bits", "activations")


def _overrides(texts: Sequence[str]) -> dict[str, dict[str, int | str]]:
    """Several rules may be given for one pattern, each with another key."""
    found: dict[str, dict[str, int | str]] = {}
    for text in texts:
        pattern, equals, rules = text.rpartition("=")
        for rule in rules.split(","):
            key, colon, value = rule.partition(":")
            number = value.removeprefix("-").isdecimal()
            if not (equals and colon and pattern and value and key in _OVERRIDE_KEYS and number == (key != "activations")):
                fix = "--override 'PATTERN=group_size:32', or 'PATTERN=bits:8', or 'PATTERN=bits:8,activations:int8'"
                raise UsageError("E202", f"{text!r} is not an override", where="--override", fix=fix)
            found.setdefault(pattern, {})[key] = int(value) if number else value
    return found
