"""What the tests of `pack` read of folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

LAYER = "model.layers.0.mlp.up_proj"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {path: tensor for shard in folder.glob("*.safetensors") for path, tensor in load_file(shard).items()}
