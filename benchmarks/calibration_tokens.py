"""The tokens that `marlinctl quantize --calibration TEXT` would show a model, in a file for tools that run in other environments.

    python benchmarks/calibration_tokens.py MODEL TEXT.jsonl TOKENS.json --samples 128 --sequence-length 512

TOKENS.json: {"source", "sha256", "ids": [samples][sequence_length]}; sha256 is that of the ids, as in a manifest of marlinctl. Text alone:
chats are padded, and each tool has its own view of padding.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from marlinctl.data.calibration import load_calibration
from marlinctl.models.config import read_config
from marlinctl.recipes.schema import load_recipe
from marlinctl.system.console import Console


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    chosen = parser.parse_args()
    size = {"source": chosen.text, "samples": chosen.samples, "sequence_length": chosen.sequence_length, "minimum_tokens": 1}
    asked = load_recipe("int4").calibration.model_copy(update=size)
    found = load_calibration(asked, chosen.model, read_config(chosen.model), console=Console.quiet(), load_model=no_model)
    sizes = found.facts["tokens"]
    if sizes["got"] < sizes["asked"]:
        raise SystemExit(f"{chosen.text}: samples are padded ({sizes['got']} of {sizes['asked']} tokens): give text, not chats")
    document = {"source": chosen.text, "sha256": found.facts["sha256"], "ids": found.tokens.ids.tolist()}
    chosen.out.write_text(json.dumps(document))
    return 0


def no_model() -> torch.nn.Module:
    raise SystemExit("a text is needed: other tools cannot calibrate on what the model writes")


if __name__ == "__main__":
    sys.exit(main())
