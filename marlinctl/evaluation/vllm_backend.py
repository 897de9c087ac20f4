"""`--backend vllm`: the tasks answered by vLLM, through lm_eval's own class for it. Perplexity and KL stay with our forward passes.

This module imports lm_eval, torch and vLLM; only run.py imports it, where vLLM was asked for and is installed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # vLLM's own variable: stdout is for results

from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.vllm_causallms import VLLM


class VllmHarness(VLLM):
    """`label` and `cut` as in harness.py. vLLM chooses its batches itself; a number is how many requests it is handed at once."""

    def __init__(self, folder: Path, *, dtype: str, batch_size: int | Literal["auto"], seed: int) -> None:
        super().__init__(pretrained=str(folder), dtype=dtype, batch_size=batch_size, seed=seed)
        self.label = "tasks"
        self.cut: set[int] = set()
        self._documents: list[int] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._documents = [request.doc_id for request in requests]  # lm_eval encodes them in this order
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._documents = []  # a long text is read in windows, and nothing of it is left out
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> Any:
        lengths = (len(context) + len(rest) for _, context, rest in requests)
        self.cut |= {document for document, length in zip(self._documents, lengths, strict=False) if length > self.max_length}
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        for request in requests:
            room = self.max_length - normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if len(self.tok_encode(request.args[0])) > room:
                self.cut.add(request.doc_id)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def close(self) -> None:
        """The engine is a process of its own, which holds the GPU's memory: the next model needs it."""
        core = getattr(self.model.llm_engine, "engine_core", None)
        if core is not None:
            core.shutdown()
