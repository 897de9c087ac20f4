"""The model without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marlinctl.models.meta_model import build
from tests.tiny import tiny_config


def test_no_random_numbers_are_drawn_for_what_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a model would take a millisecond of Python for each of its tensors, more than all else of its construction."""
    drawn: list[bool] = []

    def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(tensor.is_meta)
        return tensor

    monkeypatch.setattr("torch.nn.init._no_grad_normal_", noting)
    model = build(tiny_config(), torch.float16)
    assert not drawn
    assert all(parameter.is_meta and parameter.dtype == torch.float16 for parameter in model.parameters())


def test_buffers_are_real() -> None:
    """If this failed, rotary embeddings of every block would be without memory, or what was in it before."""
    model = build(tiny_config(), torch.float16)
    (frequencies,) = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".inv_freq")}.values()
    assert torch.allclose(frequencies, 10000.0 ** (-torch.arange(0, 32, 2) / 32))
