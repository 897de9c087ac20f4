"""The cache of compiled kernels: what decides an entry, who may write it, and what happens to a damaged one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from marlinctl.kernels import jit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")

KERNEL = '#include "number.cuh"\nextern "C" __global__ void kernel(int* out) { *out = NUMBER + VALUE; }\n'
HEADER = "#pragma once\n#define NUMBER 3\n"
ARGUMENTS = ("kernel.cu", ("VALUE=4",), "sm_90")


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc of one small kernel and its header."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernel.cu").write_text(KERNEL)
    (folder / "number.cuh").write_text(HEADER)
    monkeypatch.setattr(jit, "SOURCES", folder)
    return folder


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of the source at each compilation."""
    names: list[str] = []
    original = jit._compile

    def counting(nvrtc: ModuleType, source: str, texts: dict[str, str], flags: Sequence[str]) -> bytes:
        names.append(source)
        return original(nvrtc, source, texts, flags)

    monkeypatch.setattr(jit, "_compile", counting)
    return names


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir())


def test_a_kernel_is_compiled_once(csrc: Path, compilations: list[str], tmp_path: Path) -> None:
    """If this failed, every start of a program would cost seconds."""
    cache = tmp_path / "cache"
    first = jit.cubin(*ARGUMENTS, cache)
    assert first.startswith(b"\x7fELF")
    assert jit.cubin(*ARGUMENTS, cache) == first
    assert compilations == ["kernel.cu"]
    assert [path.suffix for path in entries(cache)] == [".cubin"]


@pytest.mark.parametrize(
    "change",
    [
        lambda csrc: (csrc / "kernel.cu").write_text(KERNEL.replace("+", "-")) and ARGUMENTS,
        lambda csrc: (csrc / "number.cuh").write_text(HEADER.replace("3", "5")) and ARGUMENTS,
        lambda csrc: ("kernel.cu", ("VALUE=7",), "sm_90"),
        lambda csrc: ("kernel.cu", ("VALUE=4",), "sm_80"),
        lambda csrc: ("kernel.cu", ("VALUE=4",), "sm_90a"),
    ],
    ids=["source", "header", "flag", "architecture", "architecture with a letter"],
)
def test_whatever_decides_the_result_is_in_the_key(
    csrc: Path, compilations: list[str], tmp_path: Path, change: Callable[[Path], tuple[str, tuple[str, ...], str]]
) -> None:
    """If this failed, a changed source or another GPU would be given stale machine code."""
    first = jit.cubin(*ARGUMENTS, tmp_path / "cache")
    assert jit.cubin(*change(csrc), tmp_path / "cache") != first
    assert len(compilations) == len(entries(tmp_path / "cache")) == 2


def test_the_version_of_the_compiler_is_in_the_key() -> None:
    """If this failed, an upgrade that mends a compiler's mistake would change nothing."""
    assert jit.cache_key({"a.cu": ""}, ["-DA"], "a.cu", "13.0") != jit.cache_key({"a.cu": ""}, ["-DA"], "a.cu", "13.1")


def test_parts_of_the_key_cannot_run_into_each_other() -> None:
    """If this failed, two different requests could share an entry: text moved from a name into its file, or between flags."""
    assert jit.cache_key({"ab": "c"}, [], "ab", "1") != jit.cache_key({"a": "bc"}, [], "ab", "1")
    assert jit.cache_key({}, ["-DA", "-DB"], "a", "1") != jit.cache_key({}, ["-DA-DB"], "a", "1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: bytes(len(data)),
    ],
    ids=["a flipped bit", "cut short", "empty", "zeros"],
)
def test_a_damaged_entry_is_compiled_again(csrc: Path, compilations: list[str], tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """If this failed, a full disk or a power cut would hand broken machine code to the GPU, for ever."""
    cache = tmp_path / "cache"
    first = jit.cubin(*ARGUMENTS, cache)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert jit.cubin(*ARGUMENTS, cache) == first
    assert len(compilations) == 2
    assert entry.read_bytes() == whole


def test_two_processes_at_once(csrc: Path, tmp_path: Path) -> None:
    """If this failed, the workers of one server would break each other's first start."""
    program = f"""
        import sys
        from pathlib import Path
        from marlinctl.kernels import jit
        jit.SOURCES = Path({str(csrc)!r})
        print("ready", flush=True)
        sys.stdin.readline()
        print(len(jit.cubin("kernel.cu", ("VALUE=4",), "sm_90", Path({str(tmp_path / "cache")!r}))))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(jit.__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:  # all of them are imported and wait
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert len(entries(tmp_path / "cache")) == 1, "temporary files are left, or two entries for one key"
    assert len(jit.cubin(*ARGUMENTS, tmp_path / "cache")) == int(answers[0][0])


def test_an_interrupted_write_leaves_nothing(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a full disk would leave half an entry, or litter."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            jit.cubin(*ARGUMENTS, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    assert jit.cubin(*ARGUMENTS, tmp_path / "cache")


@pytest.mark.parametrize("exists", [False, True], ids=["new", "open to others"])
def test_nobody_else_can_write_the_cache(csrc: Path, tmp_path: Path, exists: bool) -> None:
    """If this failed, another user of the machine could put code of theirs on our GPU."""
    cache = tmp_path / "cache"
    if exists:
        cache.mkdir()
        cache.chmod(0o777)
    jit.cubin(*ARGUMENTS, cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (entry,) = entries(cache)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_the_folder_of_another_user_is_refused(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, entries prepared by somebody else would be run."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "cache").stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to user"):
        jit.cubin(*ARGUMENTS, tmp_path / "cache")


# ---- whose machine code it is; without a compiler, so that it is tested everywhere ---------------------------------------------------


@pytest.fixture
def pretended(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A compiler that gives other code at each call; the list grows by what it gave."""
    made: list[bytes] = []

    def compiling(nvrtc: ModuleType, source: str, texts: dict[str, str], flags: Sequence[str]) -> bytes:
        made.append(b"code %d" % len(made))
        return made[-1]

    monkeypatch.setattr(jit, "_nvrtc", lambda: None)
    monkeypatch.setattr(jit, "nvrtc_version", lambda nvrtc: "13.0")
    monkeypatch.setattr(jit, "_compile", compiling)
    return made


def another_user(monkeypatch: pytest.MonkeyPatch, of: Path) -> None:
    """Files of this inode belong to somebody else, as far as fstat tells: changing owners takes root."""
    real, inode = os.fstat, of.lstat().st_ino

    def fstat(handle: int) -> os.stat_result:
        status = real(handle)
        changed = list(status)
        changed[stat.ST_UID] = status.st_uid + (1 if status.st_ino == inode else 0)
        return os.stat_result(changed)

    monkeypatch.setattr(os, "fstat", fstat)


def plant(entry: Path, kind: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a sound entry there that somebody else may have written."""
    sound = entry.read_bytes()
    if kind == "link":
        elsewhere.write_bytes(sound)
        entry.unlink()
        entry.symlink_to(elsewhere)
    elif kind == "fifo":
        entry.unlink()
        os.mkfifo(entry)
    elif kind == "writable":
        entry.chmod(0o664)
    else:
        another_user(monkeypatch, entry)


@pytest.mark.parametrize("kind", ["another user's", "link", "fifo", "writable"])
def test_an_entry_that_somebody_else_could_have_written_is_not_run(
    pretended: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A file planted while the folder was open to others, digest and all, would run on our GPU."""
    cache = tmp_path / "cache"
    assert jit.cubin(*ARGUMENTS, cache) == b"code 0" and jit.cached(*ARGUMENTS, cache)
    (entry,) = entries(cache)
    elsewhere = tmp_path / "elsewhere"
    plant(entry, kind, elsewhere, monkeypatch)
    before = elsewhere.read_bytes() if elsewhere.exists() else b""
    assert not jit.cached(*ARGUMENTS, cache)
    assert jit.cubin(*ARGUMENTS, cache) == b"code 1", "compiled again"
    assert jit.cubin(*ARGUMENTS, cache) == b"code 1" and len(pretended) == 2, "and put there"
    (entry,) = entries(cache)
    assert entry.is_file() and not entry.is_symlink() and stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert not elsewhere.exists() or elsewhere.read_bytes() == before, "what the link led to is as it was"


def test_an_entry_under_another_key_is_none(pretended: list[bytes], tmp_path: Path) -> None:
    """Who may rename our own entries could give us a sound kernel for the wrong shapes."""
    cache = tmp_path / "cache"
    jit.cubin(*ARGUMENTS, cache)
    (first,) = entries(cache)
    jit.cubin("kernel.cu", ("VALUE=7",), "sm_90", cache)
    (second,) = [entry for entry in entries(cache) if entry != first]
    second.write_bytes(first.read_bytes())
    assert jit.cubin("kernel.cu", ("VALUE=7",), "sm_90", cache) == b"code 2"


def test_a_folder_that_is_a_link_or_anothers_is_refused(pretended: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernels -> /tmp/theirs` would be the cache of whoever made the link."""
    (tmp_path / "theirs").mkdir(mode=0o755)
    (tmp_path / "cache").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="is a link"):
        jit.cubin(*ARGUMENTS, tmp_path / "cache")
    assert entries(tmp_path / "theirs") == [] and stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o755
    another_user(monkeypatch, tmp_path / "theirs")
    with pytest.raises(PermissionError, match="belongs to user"):
        jit.cubin(*ARGUMENTS, tmp_path / "theirs")
    assert pretended == []


def test_the_users_own_table_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of somebody else's would choose which kernel runs; ignoring it in silence would hide why tuning has no effect."""
    folder = tmp_path / "kernels"
    assert jit.read_own(folder, "dispatch.json") is None and not folder.exists()
    jit.write_own(folder, "dispatch.json", b"table")
    assert jit.read_own(folder, "dispatch.json") == b"table" and stat.S_IMODE((folder / "dispatch.json").stat().st_mode) == 0o600
    (folder / "dispatch.json").rename(tmp_path / "theirs")
    (folder / "dispatch.json").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match=r"dispatch\.json is a link"):
        jit.read_own(folder, "dispatch.json")
    jit.write_own(folder, "dispatch.json", b"new")
    assert (tmp_path / "theirs").read_bytes() == b"table" and jit.read_own(folder, "dispatch.json") == b"new"


def test_a_mistake_in_a_source_is_told(csrc: Path, tmp_path: Path) -> None:
    """If this failed, whoever changes a kernel would see an error number."""
    (csrc / "kernel.cu").write_text(KERNEL.replace("*out", "*nowhere"))
    with pytest.raises(jit.CompilationFailed, match=r'(?s)stopped at kernel\.cu.*--gpu-architecture=sm_90.*kernel\.cu\(2\).*"nowhere"'):
        jit.cubin(*ARGUMENTS, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_an_unknown_architecture_is_refused(csrc: Path, tmp_path: Path) -> None:
    """If this failed, code for another GPU could be asked for, and would fail at its first launch."""
    with pytest.raises(ValueError, match="unknown architecture 'sm_75', known are sm_80"):
        jit.cubin("kernel.cu", (), "sm_75", tmp_path / "cache")


def test_without_bindings(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, users of a CPU build of torch would see a bare ImportError."""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(jit.CompilerMissing, match="cuda-bindings cannot be imported"):
        jit.cubin(*ARGUMENTS, tmp_path / "cache")


def test_without_the_library(csrc: Path, tmp_path: Path) -> None:
    """If this failed, bindings without libnvrtc would end in a search report of a hundred lines. Loaded once, it stays: hence a process."""
    program = f"""
        from pathlib import Path
        import cuda.pathfinder
        def nowhere(name):
            raise cuda.pathfinder.DynamicLibNotFoundError("No such file: libnvrtc.so.13\\nlistdir: ...")
        cuda.pathfinder.load_nvidia_dynamic_lib = nowhere
        from marlinctl.kernels import jit
        jit.SOURCES = Path({str(csrc)!r})
        try:
            jit.cubin("kernel.cu", ("VALUE=4",), "sm_90", Path({str(tmp_path / "cache")!r}))
        except jit.CompilerMissing as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(jit.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "the library NVRTC cannot be loaded: No such file: libnvrtc.so.13\n"
