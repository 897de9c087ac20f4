"""What our linears look like, as a part of the key of vLLM's cache of compiled models.

vLLM 0.26 loads a compiled model by a key of versions, arguments, config.json and known environment variables, before it traces anything.
Which kernel multiplies a linear, and which linears of a folder are packed, is in none of them: a model that was compiled with Machete would
be loaded for weights that lie in our tiles, and be wrong without a word. vLLM hashes the values of a table of variables
(`envs.compile_factors`). A line is added to it when the first linear is ours; a model without one keeps its key.
"""

from __future__ import annotations

import hashlib

import vllm.envs as envs

from marlinctl import __version__

LINE = "VLLM_MARLINCTL_LINEARS"  # never read from the environment
_linears: set[str] = set()


def note(linear: str) -> None:
    """`linear`: everything of it that a traced program holds."""
    _linears.add(linear)
    envs.environment_variables.setdefault(LINE, factor)


def factor() -> str:
    return hashlib.sha256("\n".join([__version__, *sorted(_linears)]).encode()).hexdigest()
