"""SHA-256 of files and tensors, as hexadecimal digits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.system.files import open_member
from marlinctl.system.page_locked import to_host

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 8 << 20


def sha256_of(path: Path) -> str:
    """Of a file that the person named or marlinctl wrote. OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_part(path: Path, begin: int, size: int) -> str:
    """Of `size` bytes from `begin` on, or of fewer where the file ends before."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(begin)
        while size and (chunk := file.read(min(size, _CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def sha256_of_member(folder: Path, name: str) -> str:
    """Of a file of a model's folder. FileRefused for what may not be followed, or is not a file."""
    with open_member(folder, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(*tensors: Tensor) -> str:
    """Of the bytes of tensors, one after the other in row-major order, without shapes and dtypes."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(to_host(tensor.contiguous()).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
