"""The names of a model's files: what travels with the weights, and what a folder may hold that is a model and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

ORDER_FILE = "marlinctl_order.safetensors"  # rows and columns that lie in another order than in the original (oneshot/permutation.py)

# What travels with the weights. Never weights, never code, never a README (the card is new).
_COMPANION_NAMES = frozenset(
    (
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.jinja",
            "chat_template.json",
        ),
        *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
        *("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "recipe.yaml"),
    )
)
_COMPANION_STARTS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_COMPANION_ENDS = (".tiktoken",)
MASK_FILE = "marlinctl_mask.safetensors"  # which weights of a 2:4 linear are kept (mask.py)
COMPANION_FOLDER = "additional_chat_templates"  # *.jinja
SUBFOLDERS = (COMPANION_FOLDER, "original")  # of a model's folder; no other one is part of a model

# What a model's folder holds beside its companions, whoever wrote it. Subfolders are named with their files.
_WEIGHTS = r"[\w.-]+\.safetensors|pytorch_model[\w-]*\.bin"
_MODEL = re.compile(
    rf"config\.json|{_WEIGHTS}|[\w.-]+\.safetensors\.index\.json|pytorch_model\.bin\.index\.json"
    r"|README\.md|\.gitattributes|quantize_config\.json|hf_quant_config\.json|marlinctl_(manifest|report)\.json|marlinctl_report\.(md|html)"
    rf"|run\.log|{COMPANION_FOLDER}/[^/]+\.jinja|original/(consolidated[\w.-]*\.(pth|safetensors)|params\.json|tokenizer\.model)"
)


def is_companion(name: str) -> bool:
    return name in _COMPANION_NAMES or name.endswith(_COMPANION_ENDS) or (name.startswith(_COMPANION_STARTS) and not name.endswith(".py"))


def companion_names(folder: Path) -> list[str]:
    """The companions that a folder holds, as names relative to it, in order. Nothing is opened."""
    templates = folder / COMPANION_FOLDER
    names = [path.name for path in folder.iterdir() if is_companion(path.name)]
    names += [f"{COMPANION_FOLDER}/{path.name}" for path in templates.glob("*.jinja")] if templates.is_dir() else []
    return sorted(names)


def is_weights(name: str) -> bool:
    return re.fullmatch(_WEIGHTS, name) is not None


def is_model_file(name: str) -> bool:
    """Whether a file of that name, a posix path relative to the folder, is one that model folders hold."""
    return _MODEL.fullmatch(name) is not None or ("/" not in name and is_companion(name))
