"""What a reader of a model card copies: how to serve and load this folder, for each program that takes it.

Which programs those are is what checkpoint/runtimes.py says of this very model. Nothing here was made up for a program that refuses it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from marlinctl.checkpoint.formats.base import (
    GPTQMODEL,
    SGLANG,
    TRANSFORMERS,
    TRANSFORMERS_CT,
    TRANSFORMERS_GPTQ,
    VLLM,
    VLLM_MARLINCTL,
    VLLM_RELEASE,
)
from marlinctl.report.markdown import code, listing

_SERVE = {  # program -> what is installed, and the command before the folder
    VLLM: ("vllm", "vllm serve"),
    VLLM_MARLINCTL: (f"vllm=={VLLM_RELEASE} marlinctl", "vllm serve"),
    SGLANG: ("sglang", "python -m sglang.launch_server --model-path"),
}
_LOAD = {  # program -> what is installed, and the imports that it needs
    TRANSFORMERS: ("transformers accelerate", ""),
    TRANSFORMERS_CT: ("transformers accelerate compressed-tensors", ""),
    TRANSFORMERS_GPTQ: ("transformers accelerate optimum gptqmodel", ""),
    VLLM_MARLINCTL: ("marlinctl", "import marlinctl  # teaches transformers this format\n"),
}


def usage(name: str, accepted: Sequence[str], *, wraps: bool = False) -> list[str]:
    """Markdown lines. name: of the folder. accepted, wraps: as in runtimes.Loads."""
    place = f"./{name}"
    quoted = json.dumps(place, ensure_ascii=False)  # as a Python string
    lines = ["## Use it", "", f"{code(place)} is this folder. For a copy on the hub, put its id there, such as {code(f'me/{name}')}.", ""]
    for program in accepted:
        if program in _SERVE:
            installed, command = _SERVE[program]
            lines += [f"Serve it with {program}:", "", listing(f"pip install {installed}\n{command} {shlex.quote(place)}", "bash"), ""]
    loader = next((program for program in accepted if program in _LOAD), None)
    if loader is not None:
        installed, imports = _LOAD[loader]
        lines += ["Load it with transformers:", "", listing(f"pip install {installed}", "bash"), ""]
        lines += [listing(f"{imports}{_transformers(quoted, wraps)}", "python"), ""]
    elif GPTQMODEL in accepted:
        lines += ["Load it with GPTQModel:", "", listing("pip install gptqmodel", "bash"), ""]
        lines += [listing(f"from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load({quoted})", "python"), ""]
    else:
        lines += ["Load it with marlinctl, which dequantizes the weights:", "", listing("pip install marlinctl", "bash"), ""]
        lines += [listing(f"from marlinctl.api import load\n\nmodel = load({quoted})", "python"), ""]
    return lines


def _transformers(quoted: str, wraps: bool) -> str:
    kind = "AutoModelForImageTextToText" if wraps else "AutoModelForCausalLM"
    return (
        f"from transformers import {kind}, AutoTokenizer\n"
        "\n"
        f'model = {kind}.from_pretrained({quoted}, dtype="auto", device_map="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})\n"
        'ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=16)[0]))"
    )
