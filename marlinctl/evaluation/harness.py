"""The model as lm_eval wants it: its own HFLM around a model that is already loaded, with our batch sizes, progress and errors.

lm_eval's `batch_size="auto"` tries ever smaller batches of the longest context until memory suffices. On a CPU memory does not
run out politely, so `auto` here is computed: the logits of a batch, and what a block holds, must fit into a share of the memory.

In bf16 the batch size is part of the measurement: other shapes, other rounding, and close answers flip. SmolLM2-135M on the 1,267
questions of WinoGrande (CPU, 2026-11-20): 0.5130, 0.5107, 0.5028, 0.5138 with batches of 1, 8, 16, 32, and 0.5043 in fp32. 46 answers
differ between 8 and 16, 50 and 60 between these and fp32. A log-softmax in fp32 does not help (0.5083, 0.5020, 0.5099 with 8, 16, 32;
48 answers differ between 8 and 16), so it stays lm_eval's default, and plain lm_eval with the same batches gives the same figures.

This module imports lm_eval and torch; only marlinctl/evaluation/tasks.py imports it, when tasks are run.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any, Literal

import datasets
import lm_eval.api.task
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from marlinctl.errors import NumericalProblem, ResourceProblem
from marlinctl.system.console import Console, Progress

CPU_BATCH_BYTES = 2**30  # beyond this a CPU gains nothing from larger batches
CUDA_SHARE = 0.4  # of the memory that is free, once the model is loaded
MOST_ON_CPU, MOST_ON_CUDA = 16, 64


class _Count:
    """lm_eval calls `add_partial` for every answered request, meant for its answer cache. We only count."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        if self.progress is not None:
            self.progress.advance()


class Harness(HFLM):
    """`label` names what is running in the progress bar; tasks.py sets it, and empties `cut`.

    cut: documents of which some question is longer than the model reads. lm_eval leaves out its beginning, few-shot examples first.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int | Literal["auto"], console: Console) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1 if batch_size == "auto" else batch_size)
        self.label = "tasks"
        self.cut: set[int] = set()
        self._documents: list[int] = []  # of the requests that are being answered, in their order
        self._document_of: dict[str, int] = {}  # of a context that is to be continued
        self._automatic = batch_size == "auto"
        self._console = console
        self._count = _Count()
        self.set_cache_hook(self._count)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = max((len(context) + len(rest) for _, context, rest in requests), default=1)
        lengths = (len(context) + len(rest) for _, context, rest in requests)
        self.cut |= {document for document, length in zip(self._documents, lengths, strict=False) if length > self.max_length + 1}
        ask = super()._loglikelihood_tokens
        answers = self._sized(longest, len(requests), lambda: ask(requests, disable_tqdm=True))
        if any(math.isnan(log_likelihood) for log_likelihood, _ in answers):
            raise NumericalProblem(
                "E620",
                "the model predicts NaN",
                where=self.label,
                fix="try --dtype float32; if that cures it, the activations overflow 16 bits, else the weights are damaged",
            )
        return answers

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        ask = super().generate_until
        self._document_of = {request.args[0]: request.doc_id for request in requests}
        answers = (normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests)
        contexts = (len(self.tok_encode(request.args[0])) for request in requests)
        longest = max((context + answer for context, answer in zip(contexts, answers, strict=True)), default=1)
        return self._sized(longest, len(requests), lambda: ask(requests, disable_tqdm=True), writes=True)

    def tok_batch_encode(self, strings: list[str], *how: Any, left_truncate_len: int | None = None, **more: Any) -> Any:
        if left_truncate_len:
            self.cut |= {self._document_of[string] for string in strings if len(self.tok_encode(string)) > left_truncate_len}
        return super().tok_batch_encode(strings, *how, left_truncate_len=left_truncate_len, **more)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._documents = [request.doc_id for request in requests]  # lm_eval encodes them in this order
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._documents = []  # a long text is read in windows, and nothing of it is left out
        if self._automatic:
            self.batch_size_per_gpu = self.fitting_batch(self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def fitting_batch(self, longest: int, *, writes: bool = False) -> int:
        """How many sequences of `longest` tokens fit. writes: only the last token's logits are made, but keys and values are kept."""
        tokens = min(longest, self.max_length)
        size = self.model.dtype.itemsize
        config = self.model.config.get_text_config()
        inner = getattr(config, "intermediate_size", config.hidden_size)  # some families have one for each layer
        kept = 2 * config.num_hidden_layers * config.hidden_size if writes else 3 * config.vocab_size
        per_token = size * (kept + 8 * (max(inner) if isinstance(inner, (list, tuple)) else inner))
        if self.device.type == "cuda":
            budget, most = int(CUDA_SHARE * torch.cuda.mem_get_info(self.device)[0]), MOST_ON_CUDA
        else:
            budget, most = CPU_BATCH_BYTES, MOST_ON_CPU
        return max(1, min(most, budget // (per_token * tokens)))

    def _sized(self, longest: int, requests: int, ask: Callable[[], Any], *, writes: bool = False) -> Any:
        """Ask with a batch that fits. An automatic batch that did not fit after all is halved, once."""
        if self._automatic:
            self.batch_size_per_gpu = self.fitting_batch(longest, writes=writes)
        try:
            return self._counted(requests, ask)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if not self._automatic or self.batch_size_per_gpu == 1:
                raise self._does_not_fit() from error
        torch.cuda.empty_cache()
        self.batch_size_per_gpu //= 2
        self._console.warn(f"{self.label}: out of memory, once more with a batch of {self.batch_size_per_gpu}")
        try:
            return self._counted(requests, ask)
        except Exception as error:
            raise (self._does_not_fit() if out_of_memory(error) else error) from error

    def _counted(self, requests: int, ask: Callable[[], Any]) -> Any:
        with self._console.progress(self.label, requests) as self._count.progress:
            return ask()

    def _does_not_fit(self) -> ResourceProblem:
        return ResourceProblem(
            "E590",
            f"out of memory with a batch of {self.batch_size_per_gpu}",
            where=self.label,
            fix=f"give --batch-size {max(1, self.batch_size_per_gpu // 4)}; finished tasks are kept: add --resume",
        )


def out_of_memory(error: Exception) -> bool:
    """On the CPU torch says it with a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class _ToConsole(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.detail(f"lm_eval: {record.getMessage()}")


@contextmanager
def lm_eval_speaks_to(console: Console) -> Iterator[None]:
    """lm_eval logs, prints on stdout and draws bars. stdout is for results: what it logs becomes detail, its bars are left out."""
    logger = logging.getLogger("lm_eval")
    handler, propagated, bars = _ToConsole(console), logger.propagate, datasets.are_progress_bars_disabled()
    bar = lm_eval.api.task.tqdm  # drawn while the prompts of a task are made; there is no switch for it
    logger.addHandler(handler)
    logger.propagate = False
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.removeHandler(handler)
        logger.propagate = propagated
        if not bars:
            datasets.enable_progress_bars()
