"""From what the person typed to a folder: a local folder, a GGUF file, or a model on the hub.

    ./llama            a folder                       taken as it is
    ./llama.gguf       a file that begins with GGUF   turned into a folder in our cache (gguf.py)
    org/llama          nothing of that name here      downloaded into the hub's own cache, at one commit

Something that exists locally is never looked up on the hub. From the hub come weights in safetensors, JSON, tokenizer files and
licences, never a pickle and never code. The revision is resolved to a commit first and compared with what arrives, because the
hub library quietly falls back to older files when the hub does not answer: those are for `--offline`. The library itself
resumes a cut transfer a few times; what we repeat is the first question.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from marlinctl.checkpoint.files import FileRefused, exists, read_json, shown
from marlinctl.errors import BadInput, EnvironmentProblem, HubProblem, MarlinctlError, ResourceProblem, UsageError

if TYPE_CHECKING:
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.console import Console, Progress

INDEX_NAMES = ("model.safetensors.index.json", "marlin.safetensors.index.json")
SINGLE_NAMES = ("model.safetensors", "marlin.safetensors")
WANTED = ("model*.safetensors", "marlin*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*")
UNWANTED = ("*/*",)  # other formats and older copies live in folders of their own
ATTEMPTS = 3
_FIRST_WAIT = 1.0  # seconds; doubles
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies, and what it was called."""

    folder: Path
    kind: Literal["folder", "hub", "gguf"]
    name: str  # as the person typed it
    revision: str | None  # the commit, for a model from the hub
    note: str  # what the person should know about it; may be empty


def cache_root(cache_dir: Path | None) -> Path:
    """--cache-dir, else MARLINCTL_CACHE, else the user's cache folder. Nothing is made."""
    if cache_dir is not None:
        return Path(cache_dir)
    if os.environ.get("MARLINCTL_CACHE"):
        return Path(os.environ["MARLINCTL_CACHE"])
    import platformdirs

    return platformdirs.user_cache_path("marlinctl")


def writable_cache(cache_dir: Path | None) -> Path:
    """The cache root, made and proved to be writable."""
    root = cache_root(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentProblem(
            "E410", f"the cache folder cannot be written: {error.strerror}", where=str(root), fix="name another one with --cache-dir or MARLINCTL_CACHE"
        ) from None
    return root


def resolve_model(model: str, *, revision: str | None, cache_dir: Path | None, offline: bool, console: Console) -> Source:
    """The folder behind what the person typed; downloads or converts if need be."""
    path = Path(model).expanduser()
    if model and "\0" not in model and os.path.lexists(path):
        if revision is not None:
            raise UsageError("E281", "--revision names a version on the hub, but the model is a local path", where=str(path), fix="leave --revision out")
        return _local(path, model, cache_dir, console)
    if not is_hub_id(model):
        raise UsageError(
            "E280",
            f"there is no folder or file {shown(model)!r}, and it cannot be a hub id either (name or organisation/name)",
            where="the argument MODEL",
            fix="check the path; a hub id looks like HuggingFaceTB/SmolLM2-135M",
        )
    from huggingface_hub.constants import HF_HUB_OFFLINE  # what the environment says, in each of its spellings

    offline = offline or HF_HUB_OFFLINE
    return (_cached if offline else _download)(model, revision, cache_dir, console)


def is_hub_id(text: str) -> bool:
    """The hub's own rule for names."""
    parts = text.split("/")
    return (
        1 <= len(parts) <= 2
        and all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?", part) for part in parts)
        and not re.search(r"--|\.\.|\.(git|gguf|safetensors|bin|pt)$", text)
    )


def check_hub_digests(checkpoint: Checkpoint, progress: Progress | None = None) -> int:
    """Compare weights in the hub cache with the SHA-256 that names their blob; how many files had one. A flipped bit is found here.

    A local folder has no such names, so nothing can be promised for it.
    """
    checked = 0
    for path in checkpoint.files:
        real = path.resolve()
        if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
            with real.open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != real.name:
                    raise BadInput(
                        "E304", "the file is not what the hub holds: its SHA-256 differs", where=str(real), fix="delete that file and start again; it is then downloaded anew"
                    )
            checked += 1
        if progress is not None:
            progress.advance()
    return checked


def missing_files(folder: Path) -> list[str]:
    """What a snapshot lacks to be a model, as far as it tells itself."""
    missing = [] if exists(folder, "config.json") else ["config.json"]
    index = next((name for name in INDEX_NAMES if exists(folder, name)), None)
    if index is None:
        return missing + ([] if any(exists(folder, name) for name in SINGLE_NAMES) else ["model.safetensors"])
    try:
        document = read_json(folder, index)
    except FileRefused:
        return [*missing, index]
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    shards = {s for s in weight_map.values() if isinstance(s, str)} if isinstance(weight_map, dict) else set()
    return missing + sorted(shard for shard in shards if "\0" in shard or not (folder / shard).exists())


def _local(path: Path, model: str, cache_dir: Path | None, console: Console) -> Source:
    from marlinctl.checkpoint.gguf_header import MAGIC

    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return Source(path, "folder", model, None, "")
        magic = b""
        if stat.S_ISREG(mode):
            with path.open("rb") as handle:
                magic = handle.read(4)
    except OSError as error:
        raise BadInput("E300", f"the path cannot be read: {error.strerror}", where=str(path), fix="check the path, its links and its permissions") from None
    if magic != MAGIC:
        fix = "name the folder that holds it" if path.suffix in (".safetensors", ".json") else "name a model folder, a GGUF file or a hub id"
        raise BadInput("E300", "this is neither a folder nor a GGUF file", where=str(path), fix=fix)
    from marlinctl.checkpoint.gguf import gguf_folder

    folder, note = gguf_folder(path, writable_cache(cache_dir), console)
    return Source(folder, "gguf", model, None, note)


# ---- the hub -------------------------------------------------------------------------------------------------------------------------


def _cached(model: str, revision: str | None, cache_dir: Path | None, console: Console) -> Source:
    """What earlier downloads left, complete or not at all."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                model, revision=revision, cache_dir=_hub_cache(cache_dir), local_files_only=True, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
            )
        )
        missing = missing_files(folder)
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # newer releases tell a partial snapshot from none
        if partial is None:
            raise HubProblem(
                "E708",
                f"{model}{_at(revision)} is not in the cache, and offline means that the hub is not asked",
                where=f"hub model {model} (there is no local path of that name)",
                fix="run once without --offline (and without HF_HUB_OFFLINE) where there is a network",
            ) from None
        folder = Path(partial)
        missing = missing_files(folder) or ["tokenizer or licence files"]
    if missing:
        raise HubProblem(
            "E709",
            f"the cached copy of {model} is incomplete; missing: {shown(', '.join(missing), 2000)}",
            where=str(folder),
            fix="run once without --offline where there is a network; the download goes on where it stopped",
        )
    return Source(folder, "hub", model, folder.name, "offline: the cached copy is used")


def _download(model: str, revision: str | None, cache_dir: Path | None, console: Console) -> Source:
    """Ask for the commit and the list of files, then fetch what we read."""
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(library_name="marlinctl")
    info = _translated(model, revision, lambda: _repeated(lambda: api.model_info(model, revision=revision, files_metadata=True, timeout=30)))
    files = {entry.rfilename: entry.size or 0 for entry in info.siblings or [] if "/" not in entry.rfilename}
    if not any(name.startswith(("model", "marlin")) and name.endswith(".safetensors") for name in files):
        pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
        raise BadInput(
            "E305",
            f"the model has no safetensors weights{f', only {shown(pickles[0])}' if pickles else ''}",
            where=f"hub model {model}, commit {info.sha}",
            fix="marlinctl reads safetensors only: convert the weights on a machine you can afford to lose (from_pretrained, then save_pretrained), or choose another model",
        )
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    console.say(f"{model}: commit {info.sha}, {weights / 1e9:.2f} GB of weights (fetching what the cache lacks)")
    with _quiet_bars():
        folder = _translated(
            model,
            revision,
            lambda: snapshot_download(
                model, revision=revision, cache_dir=_hub_cache(cache_dir), allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED), library_name="marlinctl"
            ),
        )
    if Path(folder).name != info.sha:  # the library fell back to an older copy, or somebody pushed just now
        raise HubProblem(
            "E707", f"commit {info.sha} was asked for and {Path(folder).name} came", where=f"hub model {model}", fix="start again; name a commit with --revision"
        )
    missing = missing_files(Path(folder))
    if missing:
        raise BadInput("E301", f"the model on the hub lacks {shown(', '.join(missing), 2000)}", where=f"hub model {model}, commit {info.sha}", fix="choose another revision")
    return Source(Path(folder), "hub", model, info.sha, "")


def _hub_cache(cache_dir: Path | None) -> Path | None:
    """The hub's own cache, which other tools share, unless the person asked for a place."""
    return writable_cache(cache_dir) / "hub" if cache_dir is not None else None


def _at(revision: str | None) -> str:
    return f" at revision {shown(revision, 80)}" if revision else ""


class _quiet_bars:
    """No bars of the hub library where there is no terminal to draw them on."""

    def __enter__(self) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

        self.restore = not are_progress_bars_disabled() and not sys.stderr.isatty()
        if self.restore:
            disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import enable_progress_bars

        if self.restore:
            enable_progress_bars()


def _repeated(ask: Callable[[], _Result]) -> _Result:
    """Ask again after a short wait if the hub is busy or the connection fails; a refusal is an answer."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: the base class of whichever HTTP client it uses

    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if attempt == ATTEMPTS - 1 or (status != 429 and status < 500):
                raise
        except HTTPError:
            if attempt == ATTEMPTS - 1:
                raise
        time.sleep(_FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _translated(model: str, revision: str | None, ask: Callable[[], _Result]) -> _Result:
    """Run a request; its failure as one of our errors, with one line about the cause."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return ask()
    except HfHubHTTPError as error:
        raise _from_response(model, revision, error) from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _from_response(model, revision, cause) from error
        raise _no_connection(model, cause or error) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise _no_connection(model, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceProblem(
                "E530", f"the disk is full: {error.strerror}", where=str(error.filename or "the hub cache"), fix="free some space, or name another --cache-dir"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise EnvironmentProblem(
                "E410", f"the hub cache cannot be written: {error.strerror}", where=str(error.filename or "the hub cache"), fix="name another one with --cache-dir or HF_HOME"
            ) from error
        raise _no_connection(model, error) from error  # the library's size check after a cut transfer


def _from_response(model: str, revision: str | None, error: Exception) -> MarlinctlError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"hub model {model} (there is no local path of that name)"
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    if isinstance(error, GatedRepoError):
        return HubProblem(
            "E701", "the model is gated: its owner wants to be asked first", where=where, fix=f"ask for access on the model's page ({model}), then run hf auth login"
        )
    if isinstance(error, RevisionNotFoundError):
        return HubProblem("E703", f"the hub has no revision {shown(revision or 'main', 80)!r} of this model", where=where, fix="see the branches and tags on the model's page")
    if isinstance(error, RepositoryNotFoundError):
        return HubProblem("E702", "the hub has no model of that name, or it is private", where=where, fix="check the spelling; for a private model, run hf auth login")
    if status in (401, 403):
        return HubProblem("E704", f"the hub refuses the access token (HTTP {status})", where=where, fix="run hf auth login, or unset HF_TOKEN if it is outdated")
    if status == 429:
        return HubProblem("E705", "the hub asks to slow down (HTTP 429, too many requests)", where=where, fix="wait some minutes; with hf auth login the limits are higher")
    return HubProblem("E706", f"the hub answers with an error (HTTP {status})", where=where, fix="try again later; --offline uses what was downloaded before")


def _no_connection(model: str, error: BaseException) -> HubProblem:
    cause = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return HubProblem(
        "E707",
        f"the connection to the hub failed: {type(error).__name__}: {cause}",
        where=f"hub model {model} (there is no local path of that name)",
        fix="check the network and the proxy, then start again: the download goes on where it stopped; --offline uses what was downloaded before",
    )
