"""Versions known to be bad: what they do, and who says so. The only such list; a line is added when a version is caught.

`fail` is for those that give wrong results in silence, `warn` for those that refuse or do less than expected. Most are no requirement of
marlinctl: they are other programs that share the environment and load what it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class KnownBad:
    distribution: str
    versions: str  # PEP 440 specifier of the bad ones
    status: Literal["warn", "fail"]
    reason: str
    source: str
    cure: str


KNOWN_BAD = (
    KnownBad(
        "transformers",
        "==5.10.*",
        "fail",
        "experts of a mixture load with random weights, and nothing is said",
        "huggingface/transformers #47407, #47410",
        "pip install -U transformers",
    ),
    KnownBad(
        "compressed-tensors",
        "<0.15",
        "fail",
        "transformers 5 does not load with it, and its marlin-24 packer orders scales wrongly where K is twice the group size",
        "transformers COMPRESSED_TENSORS_MIN_VERSION; 0.14.0 tried on 2026-11-20",
        "pip install -U compressed-tensors",
    ),
    KnownBad(
        "kernels",
        "<0.18.2",
        "warn",
        "transformers 5.23 does not accept it and goes without the kernels it would bring",
        "transformers 5.23 dependency_versions_table.py",
        "pip install 'kernels>=0.18.2,<0.19', or pip uninstall kernels",
    ),
    KnownBad(
        "gptqmodel",
        "<1.4.3",
        "warn",
        "transformers cannot load GPTQ folders with it",
        "transformers quantizer_gptq.py",
        "pip install -U gptqmodel",
    ),
    KnownBad(
        "optimum",
        "<1.24",
        "warn",
        "transformers cannot load GPTQ folders with it",
        "transformers quantizer_gptq.py",
        "pip install -U optimum",
    ),
    KnownBad(
        "vllm",
        "<0.24",
        "warn",
        "linears that its tiles do not divide are refused or run slower; from 0.24 on they are padded",
        "vllm-project/vllm #45295",
        "pip install -U vllm, best in an environment of its own",
    ),
    KnownBad(
        "llmcompressor",
        "<=0.14.0.1",
        "warn",
        "it asks for transformers 5.17 or older, so installers go back to old releases of one or the other",
        "dependencies resolved on 2026-11-20",
        "keep it in an environment of its own",
    ),
    KnownBad(
        "nvidia-modelopt",
        "<=0.27.0",
        "warn",
        "an old release that installers fall back to, because newer ones do not accept this transformers",
        "dependencies resolved on 2026-11-20",
        "keep it in an environment of its own",
    ),
)
