"""Formats that others write and people ask for: what to use instead."""

from __future__ import annotations

_ELSEWHERE = {
    "awq": "ct: 4-bit groups as in AWQ, solved with GPTQ; vLLM, SGLang and transformers load it",
    "gguf": "ct for vLLM, SGLang and transformers; llama.cpp converts a copy in the format dense",
    "fp8": "ct: 4-bit weights, 16-bit activations",
    "nvfp4": "ct: 4-bit integers with a scale for each group",
    "bitsandbytes": "ct: transformers loads it, too",
    "compressed-tensors": "ct, which is compressed-tensors pack-quantized",
    "safetensors": "ct: every format here is safetensors; dense is the 16-bit one",
}


def instead_of(name: object, offered: str) -> str:
    """The fix for a format that is not written. offered: the names of those that are."""
    asked = str(name).lower().removeprefix("auto")
    known = next((fix for other, fix in _ELSEWHERE.items() if asked.startswith(other)), None)
    return f"use {known}" if known is not None else f"one of {offered}"
