"""Copies between a GPU and host memory that the system cannot move."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in host memory; one on a GPU is copied into page-locked memory, which torch keeps and uses again.

    Into memory that the system gives page by page, the driver copies 1.4 GB/s on an H200's machine, and every launch of a kernel waits for
    it meanwhile (2026-11).
    """
    import torch

    if not tensor.is_cuda:
        return tensor
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copied
