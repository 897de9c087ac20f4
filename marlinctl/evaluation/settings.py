"""What decides the numbers of an evaluation, and which values are in range. Without torch: `plan` asks too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from marlinctl.errors import UsageError
from marlinctl.quantize.scheme import RunWith

if TYPE_CHECKING:
    from marlinctl.recipes.schema import Evaluate

DEFAULT_TOKENS = 20480
DEFAULT_WINDOW = 1024  # or all positions of a model that has fewer
DEFAULT_SEED = 1234  # lm_eval's own
DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("hf", "vllm")
ACTIVATIONS = ("16-bit", "int8", "int8-128")
MOST = 2**31 - 1  # of anything that is counted: far beyond every use, and within every library's integers


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """UsageError E246 for what is out of range."""

    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None  # documents per task
    num_fewshot: int | None = None  # None: what each task says
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False  # each example a turn of its own; needs the chat template
    log_samples: bool = False  # prompts and answers, beside the results file
    run_code: bool = False  # the consent to tasks that run what the model writes
    activations: RunWith | None = None  # of the model's quantized linears: 16-bit, int8 or int8-128; None: as its folder says
    backend: str = "hf"  # what answers the tasks: hf, our forward passes; or vllm
    batch_size: int | Literal["auto"] = "auto"
    text: str | None = None  # see data/text.py; None: pythondoc when a text is needed
    tokens: int = DEFAULT_TOKENS
    window: int | None = None  # None: DEFAULT_WINDOW, or as many positions as the model has
    seed: int = DEFAULT_SEED
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = (
            (self.limit is None or 1 <= self.limit <= MOST, "--limit", f"1 to {MOST}"),
            (self.num_fewshot is None or 0 <= self.num_fewshot <= MOST, "--num-fewshot", f"0 to {MOST}"),
            (self.batch_size == "auto" or 1 <= self.batch_size <= MOST, "--batch-size", f"auto, or 1 to {MOST}"),
            (self.window is None or self.window >= 2, "--window", "at least 2: the first token is given, the others are predicted"),
            (2 <= self.tokens <= MOST, "--tokens", f"2 to {MOST}"),
            (0 <= self.seed < 2**32, "--seed", "0 to 2**32 - 1"),
            (self.dtype in ("auto", *DTYPES), "--dtype", f"auto, {', '.join(DTYPES)}"),
            (self.activations in (None, *ACTIVATIONS), "--activations", f"one of {', '.join(ACTIVATIONS)}"),
            (self.backend in BACKENDS, "--backend", f"one of {', '.join(BACKENDS)}"),
        )
        for holds, option, allowed in checks:
            if not holds:
                raise UsageError("E246", f"{option} is out of range", where=option, fix=f"give {allowed}")
        if self.window is not None and self.window > self.tokens:
            what = f"one window of {self.window} tokens is more than is measured, {self.tokens} tokens"
            raise UsageError("E246", what, where="--window, --tokens", fix="a smaller --window, or more --tokens")
        if self.activations is not None and self.backend != BACKENDS[0]:
            what, fix = f"{self.backend} rounds activations as the folder says", f"leave it out, or --backend {BACKENDS[0]}"
            raise UsageError("E246", what, where=f"--activations {self.activations} --backend {self.backend}", fix=fix)
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            what, fix = "--fewshot-as-multiturn makes turns of a chat, and prompts are plain text", "add --apply-chat-template"
            raise UsageError("E246", what, where="--fewshot-as-multiturn", fix=fix)

    @classmethod
    def of_recipe(cls, asked: Evaluate, task_data: Path | None) -> EvalSettings:
        """What a recipe says of it; device and dtype are chosen for it alone."""
        return cls(
            tasks=asked.tasks, task_data=task_data, limit=asked.limit, num_fewshot=asked.num_fewshot,
            apply_chat_template=asked.apply_chat_template, text=asked.text, tokens=asked.tokens, window=asked.window,
        )  # fmt: skip

    def window_for(self, *positions: int | None) -> int:
        """The window for models of so many positions; None: not known. UsageError E246 where the one asked for does not fit.

        The default window is at most as long as the shortest model allows.
        """
        known = [length for length in positions if length is not None]
        if self.window is None:
            return max(2, min([DEFAULT_WINDOW, self.tokens, *known]))
        return refuse_longer(self.window, min(known, default=None))


def refuse_longer(window: int, longest: int | None) -> int:
    """The window, or UsageError E246 where the model has fewer positions."""
    if longest is not None and window > longest:
        raise UsageError(
            "E246", f"--window {window} is longer than the {longest} positions of the model", where="--window", fix=f"--window {longest}"
        )
    return window
