"""CUDA sources to machine code at first use, without a C++ compiler, and a cache of what came out.

A kernel is compiled by NVRTC, a library that torch's CUDA wheels bring together with its Python bindings, for one named
architecture and straight to machine code (a cubin): the driver never compiles anything. No GPU and no driver are needed for it.

    csrc/*.cu, *.cuh      ─┐
    -D of a configuration ─┼─► NVRTC ─► cubin ─► <folder>/<key>.cubin ─► the driver
    sm_90                 ─┘

The key is the SHA-256 of everything that decides the result: all sources, the flags, the architecture and the version of
NVRTC. So an entry never becomes wrong, and nothing has to be deleted when a source changes. An entry begins with the SHA-256
of its key and the rest; one that does not match is compiled again. It is written under a temporary name, flushed to disk and
renamed, so two processes at once both succeed and whoever reads sees a whole entry or none.

Machine code that somebody else could have written is not run. The folder is the user's own, no link, and gets mode 0700. An
entry is a regular file of the user's that others cannot write; whatever else has its name, such as a file that was planted
while the folder was open to others, is compiled again and replaced. The folder is opened once, and entries are found from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCES = Path(__file__).parent / "csrc"
BLACKWELL = ("sm_100", "sm_103", "sm_110", "sm_120", "sm_121")  # compiled, and never run: nothing of ours has been on such a GPU
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", *BLACKWELL)  # 90a: 90 with wgmma, which newer architectures do not have
OPTIONS = ("--std=c++17",)
DIGEST_BYTES = hashlib.sha256().digest_size
LOG_LINES = 12  # of NVRTC's log in an error: the first mistake, mostly


class CompilerMissing(RuntimeError):
    """cuda-bindings or NVRTC is not installed, not whole, or cannot be loaded."""


class DriverTooOld(RuntimeError):
    """The driver knows an older major version of CUDA than NVRTC compiles for, so it may not load the machine code."""

    def __init__(self, known: tuple[int, int], made: str) -> None:
        super().__init__(f"the driver knows CUDA {known[0]}.{known[1]}, and the machine code would be made by NVRTC {made}")
        self.known, self.needed = known[0], int(made.partition(".")[0])  # major versions


class CompilationFailed(RuntimeError):
    """NVRTC refused a source. The message has the first lines of its log."""


def cubin(source: str, defines: Sequence[str], architecture: str, folder: Path, sources: Path | None = None) -> bytes:
    """The machine code of a source, from the cache in `folder`, or compiled and put there.

    Args:
        source: a file name in csrc, such as marlin_sm80.cu.
        defines: what -D is given, such as TOKENS=8, in a fixed order.
        architecture: one of ARCHITECTURES.
        folder: the cache; made if missing.
        sources: where the source and all that it includes lie; csrc beside this module unless another folder is named.

    Raises:
        CompilerMissing: the version of NVRTC is part of the key, so it must be there even for a cached entry.
        CompilationFailed: the source is not compiled without errors.
        PermissionError: the folder belongs to somebody else, or is a link.
        OSError: the folder cannot be read or written.
    """
    nvrtc = _nvrtc()
    texts, flags, key = _key(nvrtc, source, defines, architecture, sources or SOURCES)
    with _private(folder) as opened:
        known = _code(opened, key)
        if known is not None:
            return known
        code = _compile(nvrtc, source, texts, flags)
        _write(opened, _entry(key), _digest(key, code) + code)
    return code


def cached(source: str, defines: Sequence[str], architecture: str, folder: Path) -> bool:
    """Whether `cubin` would find its answer in the cache. Raises what it raises, but for CompilationFailed."""
    _, _, key = _key(_nvrtc(), source, defines, architecture, SOURCES)
    with _private(folder) as opened:
        return _code(opened, key) is not None


def read_own(folder: Path, name: str) -> bytes | None:
    """A file beside the entries, such as the user's table; None where there is none. PermissionError where it is not the user's own."""
    if not os.path.lexists(folder / name):
        return None
    with _private(folder) as opened:
        data = _read(opened, name)
    if data is None:
        raise PermissionError(f"{folder / name} is a link, or belongs to somebody else, or may be written by others")
    return data


def write_own(folder: Path, name: str, data: bytes) -> None:
    """The same, written whole or not at all. Raises what `cubin` raises of the folder."""
    with _private(folder) as opened:
        _write(opened, name, data)


def compiler_version() -> str:
    """NVRTC's, such as 13.0. CompilerMissing where there is none."""
    return nvrtc_version(_nvrtc())


def compiles_for(architecture: str) -> bool:
    """Whether the NVRTC that is installed knows an architecture. CompilerMissing where there is none."""
    nvrtc = _nvrtc()
    nvrtc_version(nvrtc)
    _, known = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    return int(re.sub(r"\D", "", architecture)) in known


def refuse_old_driver(known: tuple[int, int]) -> None:
    """DriverTooOld where `known`, the newest CUDA of the driver, is of an older major version than NVRTC. Newer minor versions load:
    https://docs.nvidia.com/deploy/cuda-compatibility/
    """
    made = compiler_version()
    if known[0] < int(made.partition(".")[0]):
        raise DriverTooOld(known, made)


def default_folder() -> Path:
    """The cache of a user: MARLINCTL_CACHE, else where caches lie by the XDG convention. Nothing is made."""
    if os.environ.get("MARLINCTL_CACHE"):
        return Path(os.environ["MARLINCTL_CACHE"]) / "kernels"
    home = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(home) if home else Path.home() / ".cache") / "marlinctl" / "kernels"


def texts_of(sources: Path) -> dict[str, str]:
    """Every file of a folder of sources by its name; they include each other by these names."""
    return {path.name: path.read_text("utf-8") for path in sorted(sources.glob("*.cu*"))}


def flags_for(defines: Sequence[str], architecture: str) -> tuple[str, ...]:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}, known are {', '.join(ARCHITECTURES)}")
    return (f"--gpu-architecture={architecture}", *OPTIONS, *(f"-D{define}" for define in defines))


def cache_key(texts: dict[str, str], flags: Sequence[str], source: str, version: str) -> str:
    """SHA-256 of everything that decides the machine code; JSON keeps its parts apart."""
    return hashlib.sha256(json.dumps([version, source, list(flags), sorted(texts.items())]).encode()).hexdigest()


def nvrtc_version(nvrtc: ModuleType) -> str:
    """Such as 13.0."""
    try:
        _, major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:  # the library is looked for at the first call
        raise CompilerMissing(f"the library NVRTC cannot be loaded: {str(error).splitlines()[0]}") from error
    return f"{major}.{minor}"


def _key(
    nvrtc: ModuleType, source: str, defines: Sequence[str], architecture: str, sources: Path
) -> tuple[dict[str, str], tuple[str, ...], str]:
    """All sources, the flags, and the key of what they give."""
    texts, flags = texts_of(sources), flags_for(defines, architecture)
    return texts, flags, cache_key(texts, flags, source, nvrtc_version(nvrtc))


def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompilerMissing(f"the package cuda-bindings cannot be imported: {error}") from error
    module: ModuleType = nvrtc
    return module


def _compile(nvrtc: ModuleType, source: str, texts: dict[str, str], flags: Sequence[str]) -> bytes:
    headers = [name for name in texts if name != source]
    contents = [texts[name].encode() for name in headers]
    names = [name.encode() for name in headers]
    _, program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(texts[source].encode(), source.encode(), len(headers), contents, names))
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _filled(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode("utf-8", "replace")
            lines = [line for line in log.splitlines() if line.strip()][:LOG_LINES]
            if status == nvrtc.nvrtcResult.NVRTC_ERROR_BUILTIN_OPERATION_FAILURE:  # libnvrtc-builtins, a library of its own
                raise CompilerMissing(f"NVRTC {nvrtc_version(nvrtc)} is not whole: {lines[0] if lines else status.name}")
            what = f"NVRTC {nvrtc_version(nvrtc)} stopped at {source} ({' '.join(flags)}): {status.name}"
            raise CompilationFailed("\n".join([what, *lines]))
        return _filled(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _filled(nvrtc: ModuleType, size_of: Any, get: Any, program: Any) -> bytes:
    """What NVRTC writes into a buffer of the caller: its log, the machine code."""
    _, size = _checked(nvrtc, size_of(program))
    buffer = bytearray(size)
    _checked(nvrtc, get(program, buffer))
    return bytes(buffer)


def _checked(nvrtc: ModuleType, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC reports {result[0].name}")
    return result


def _entry(key: str) -> str:
    return f"{key}.cubin"


def _digest(key: str, code: bytes) -> bytes:
    """Of the key too: an entry that was renamed to another key is none."""
    return hashlib.sha256(key.encode() + code).digest()


def _code(folder: int, key: str) -> bytes | None:
    """The machine code of an entry, or None where there is none, where it is damaged, or not the user's own."""
    data = _read(folder, _entry(key)) or b""
    digest, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return code if digest == _digest(key, code) else None


@contextmanager
def _private(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, made if missing, which its owner alone may read and write."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink():
        raise PermissionError(f"{folder} is a link; machine code is only taken from a folder of one's own")
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(opened)
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to user {status.st_uid}; machine code is only taken from a folder of one's own")
        if status.st_mode & 0o077:
            os.fchmod(opened, 0o700)
        yield opened
    finally:
        os.close(opened)


def _read(folder: int, name: str) -> bytes | None:
    """A regular file of the user's that others cannot write; None for anything else of that name."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:  # not there, a link, not readable
        return None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        return file.read() if ours else None


def _write(folder: int, name: str, data: bytes) -> None:
    temporary = f".{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
