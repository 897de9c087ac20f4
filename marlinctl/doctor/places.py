"""Are the folders writable, and is there disk space? Mode bits do not show a read-only mount, so each folder is
written to: file, fsync, rename, fsync of the folder, read, remove. Folders that had to be made for it are removed again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from marlinctl.doctor.result import Check
from marlinctl.system.atomic import sync_folder, temporary_name
from marlinctl.system.console import gibibytes

GIB = 2**30
OUTPUT_BYTES = 10 * GIB  # a 4-bit model of 8 billion parameters, its job beside it while it runs, and some air
CACHE_BYTES = 20 * GIB  # the same model in 16 bits, fetched or converted
SHARED_BYTES = GIB  # what NVIDIA's and PyTorch's container notes ask for; docker gives 64 MiB


def cache() -> Iterator[Check]:
    from marlinctl.checkpoint.source import cache_root

    yield _writable("cache", cache_root(None), "name another folder with MARLINCTL_CACHE or --cache-dir")
    yield _writable("hub-cache", hub_cache(), "name another folder with HF_HOME")


def temporary(asked: str | None) -> Iterator[Check]:
    """asked: TMPDIR. Python silently uses another folder where that one cannot be used."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Check("temporary", "fail", str(error), "name a writable folder with TMPDIR")
        return
    if asked and Path(asked).absolute() != folder:
        cure = "make that folder, or name another one with TMPDIR"
        yield Check("temporary", "warn", f"TMPDIR={asked} cannot be used; {folder} is used instead", cure)
    else:
        yield _writable("temporary", folder, "name another folder with TMPDIR")


def space(cwd: Path) -> Iterator[Check]:
    from marlinctl.checkpoint.source import cache_root

    more = "free some space, or work on another disk; `marlinctl quantize` says what it needs before it starts"
    yield _free("disk", cwd, OUTPUT_BYTES, more)
    yield _free("disk-cache", cache_root(None), CACHE_BYTES, "free some space, or name another disk with MARLINCTL_CACHE")
    yield _free("disk-hub-cache", hub_cache(), CACHE_BYTES, "free some space, or name another disk with HF_HOME")


def shared_memory(devices: int, folder: Path = Path("/dev/shm")) -> Iterator[Check]:
    """Only several GPUs talk through it (NCCL)."""
    if devices < 2 or not folder.is_dir():
        return
    yield _free("shared-memory", folder, SHARED_BYTES, "start the container with --shm-size=1g or --ipc=host")


def hub_cache() -> Path:
    """Where huggingface_hub keeps models; read from the environment as its documentation says, without importing it."""
    named = os.environ.get("HF_HUB_CACHE")
    return Path(os.path.expandvars(named)).expanduser() if named else hub_home() / "hub"


def hub_home() -> Path:
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_HOME") or str(fallback))).expanduser()


def _writable(name: str, folder: Path, cure: str) -> Check:
    step = "making it"
    first, second = (folder / temporary_name() for _ in range(2))
    try:
        with _made(folder), _removed(first, second):
            step = "writing"
            with first.open("xb") as handle:
                handle.write(b"marlinctl")
                handle.flush()
                step = "fsync"
                os.fsync(handle.fileno())
            step = "renaming"
            first.replace(second)
            step = "fsync of the folder"
            sync_folder(folder)
            step = "reading"
            if second.read_bytes() != b"marlinctl":
                return Check(name, "fail", f"{folder}: what is read there is not what was written", cure)
            step = "removing"
            second.unlink()
    except OSError as error:
        return Check(name, "fail", f"{folder}: {step} failed: {error.strerror or error}", cure)
    return Check(name, "ok", f"{folder} can be written")


@contextmanager
def _removed(*probes: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for probe in probes:
            with suppress(OSError):  # what stopped the test is reported, not this
                probe.unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for place in missing:
            with suppress(OSError):  # another process put something there meanwhile
                place.rmdir()


def _free(name: str, folder: Path, wanted: int, cure: str) -> Check:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    found = f"{gibibytes(free, 1)} free in {folder}"
    return Check(name, "ok", found) if free >= wanted else Check(name, "warn", f"{found}, less than {gibibytes(wanted, 0)}", cure)
