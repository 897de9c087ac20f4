"""A model from the hub, through the hub's own library and cache, and its refusals as one line each.

What is fetched: weights in safetensors, JSON, tokenizer files, chat templates and licences; never a pickle, never code, nothing
from sub-folders (other formats and older copies live there) but marlinctl's own orders of channels. The revision is resolved to a
commit first and compared with what arrives, because the library quietly falls back to older files when the hub does not answer:
those are for `--offline`. The library resumes a cut transfer a few times by itself; what we repeat, three times at most, is the first
question.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from marlinctl.checkpoint.formats.base import MODEL_FILES, STEMS
from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.safetensors_header import MAX_HEADER_BYTES, header_length
from marlinctl.errors import BadInput, EnvironmentProblem, HubProblem, MarlinctlError, ResourceProblem, UsageError
from marlinctl.models.tokenizer_files import TOKENIZER_FILES
from marlinctl.system.files import FileRefused, exists, read_json, shown

if TYPE_CHECKING:
    from marlinctl.system.console import Console

WANTED = [
    "model*.safetensors",
    "marlin*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "README.md",  # its front matter states the licence; it is never copied
]
UNWANTED = ["*/*"]
ATTEMPTS = 3
_FIRST_WAIT = 1.0  # seconds; doubles
_AGAIN = "the download continues where it stopped; --offline uses what was downloaded before"
_Result = TypeVar("_Result")


def is_hub_id(text: str) -> bool:
    """The hub's own rule for names: `name` or `organisation/name`. File names of models are no ids."""
    parts = text.split("/")
    return (
        1 <= len(parts) <= 2
        and all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?", part) for part in parts)
        and not re.search(r"--|\.\.|\.(git|gguf|safetensors|bin|pt)$", text)
    )


def fetch(model: str, *, revision: str | None, cache_dir: Path | None, offline: bool, console: Console) -> tuple[Path, str, str]:
    """Folder, commit and a note. `cache_dir` None is the hub's own cache, which other tools share."""
    wanted = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    if is_offline(offline):
        folder = _cached(model, wanted)
        return folder, folder.name, "offline: the cached copy is used"
    folder = _download(model, wanted, console)
    return folder, folder.name, ""


def require_hub_id(model: str) -> None:
    """UsageError E240 for what cannot be one."""
    if not is_hub_id(model):
        raise UsageError(
            "E240",
            f"there is no folder or file {shown(model)!r}, and it cannot be a hub id either (name or organisation/name)",
            where=f"the model {shown(model)}",
            fix="check the path; a hub id looks like HuggingFaceTB/SmolLM2-135M",
        )


def is_offline(asked: bool) -> bool:
    """--offline, or what the environment says, in each of its spellings."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return asked or HF_HUB_OFFLINE


def hub_cache(cache_dir: Path | None) -> Path:
    """Where downloads lie: in --cache-dir, else in the hub's own cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return cache_dir / "hub" if cache_dir is not None else Path(HF_HUB_CACHE)


def fetch_headers(model: str, folder: Path, *, revision: str | None, cache_dir: Path, console: Console) -> tuple[str, int]:
    """Fill `folder` with the small files of a hub model and, for each shard, a file of its size that holds its header and a hole.

    Returns the commit, and how many bytes of weights the cache lacks. A shard costs one ranged request, two where its header is longer
    than _HEADER_GUESS, none where it is in the cache.
    """
    from huggingface_hub import HfApi, hf_hub_url, snapshot_download, try_to_load_from_cache

    require_hub_id(model)
    with _translated(model, revision), _quiet_library():
        info = _repeated(lambda: HfApi(library_name="marlinctl").model_info(model, revision=revision, files_metadata=True, timeout=30))
        _refuse_strange_names(model, info)
        small = [name for name in WANTED if not name.endswith(".safetensors")]
        found = snapshot_download(
            model, revision=info.sha, cache_dir=cache_dir, allow_patterns=small, ignore_patterns=UNWANTED, library_name="marlinctl"
        )
        for path in Path(found).iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
        missing = 0
        for entry in info.siblings or []:
            name, size = entry.rfilename, entry.size or 0
            if "/" in name or not re.fullmatch(r"(model|marlin)[^/]*\.safetensors|marlinctl_mask\.safetensors", name):
                continue
            cached = try_to_load_from_cache(model, name, cache_dir=cache_dir, revision=info.sha)
            if isinstance(cached, str):
                size = Path(cached).stat().st_size
                front = _header(lambda count, path=cached: _first_bytes(path, count), size)  # type: ignore[misc]
            else:
                missing += size
                url = hf_hub_url(model, name, revision=info.sha)
                front = _header(lambda count, url=url: _front(url, count), size)  # type: ignore[misc]
            with (folder / name).open("wb") as file:
                file.write(front)
                file.truncate(size)
    console.say(f"{model}: commit {info.sha}, headers of its shards alone ({missing / 1e9:.2f} GB of weights are not in the cache)")
    return str(info.sha), missing


_HEADER_GUESS = 200_000  # bytes of a shard's front that are asked for; a shard of a few hundred tensors needs a tenth


def _header(read: Callable[[int], bytes], size: int) -> bytes:
    """Length and header of a shard of `size` bytes, as far as it is there. read: the first so many bytes."""
    front = read(_HEADER_GUESS)
    length = 8 + header_length(front)
    if len(front) < length <= min(size, 8 + MAX_HEADER_BYTES):
        front = read(length)
    return front[: min(length, size)]


def _first_bytes(path: str, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _front(url: str, count: int) -> bytes:
    """The first `count` bytes of a file on the hub, or all of a shorter one; a server that ignores the range is cut off."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    asked = {**build_hf_headers(library_name="marlinctl"), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}

    def ask() -> bytes:
        with get_session().stream("GET", url, headers=asked, timeout=30, follow_redirects=True) as response:
            hf_raise_for_status(response)
            front = b""
            for piece in response.iter_bytes():
                front += piece
                if len(front) >= count:
                    break
            return front[:count]

    return _repeated(ask)


def missing_files(folder: Path) -> list[str]:
    """What a snapshot lacks to be a model, as far as its own files show."""
    missing = [] if exists(folder, "config.json") else ["config.json"]
    missing += [] if any(exists(folder, name) for name in TOKENIZER_FILES) else ["tokenizer.json"]
    stem = next((stem for stem in STEMS if exists(folder, f"{stem}.safetensors.index.json")), None)
    if stem is None:
        return missing + ([] if any(exists(folder, f"{stem}.safetensors") for stem in STEMS) else [f"{MODEL_FILES}.safetensors"])
    index = f"{stem}.safetensors.index.json"
    try:
        document = read_json(folder, index)
    except FileRefused:
        return [*missing, index]
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    shards = {s for s in weight_map.values() if isinstance(s, str)} if isinstance(weight_map, dict) else set()
    return missing + sorted(shard for shard in shards if "\0" in shard or not (folder / shard).exists())


def _refuse_strange_names(model: str, info: Any) -> None:
    """BadInput E301 for names with control characters: the hub's library shows them in its bars."""
    for entry in info.siblings or []:
        if not entry.rfilename.isprintable():
            what = f"a file of the model has a name with control characters: {shown(entry.rfilename)}"
            raise BadInput("E301", what, where=f"hub model {model}, commit {info.sha}", fix="choose another model")


def _cached(model: str, wanted: dict[str, Any]) -> Path:
    """What earlier downloads left: enough for a model, or an error that lists what is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, local_files_only=True, **wanted))
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # newer releases distinguish a partial snapshot from none
        if partial is None:
            at = f" at revision {shown(wanted['revision'], 80)}" if wanted["revision"] else ""
            what = f"{model}{at} is not in the cache, and offline means that the hub is not asked"
            fix = "run once without --offline (and without HF_HUB_OFFLINE) where there is a network"
            raise HubProblem("E709", what, where=_where(model), fix=fix) from None
        folder = Path(partial)
    missing = missing_files(folder)
    if missing:
        raise HubProblem(
            "E709",
            f"the cached copy of {model} is incomplete; missing: {shown(', '.join(missing), 2000)}",
            where=str(folder),
            fix="run once without --offline where there is a network; the download continues where it stopped",
        )
    return folder


def _download(model: str, wanted: dict[str, Any], console: Console) -> Path:
    """Ask for the commit and the list of files, then fetch what we read."""
    from huggingface_hub import HfApi, snapshot_download

    revision = wanted["revision"]
    with _translated(model, revision):
        info = _repeated(lambda: HfApi(library_name="marlinctl").model_info(model, revision=revision, files_metadata=True, timeout=30))
    _refuse_strange_names(model, info)
    where = f"hub model {model}, commit {info.sha}"
    files = {entry.rfilename: entry.size or 0 for entry in info.siblings or [] if "/" not in entry.rfilename}
    if not any(name.startswith(STEMS) and name.endswith(".safetensors") for name in files):
        pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
        what = f"the model has no safetensors weights{f', only {shown(pickles[0])}' if pickles else ''}"
        fix = "choose another model, or convert it on a machine you can afford to lose: from_pretrained, then save_pretrained"
        raise BadInput("E301", what, where=where, fix=fix)
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    console.say(f"{model}: commit {info.sha}, {weights / 1e9:.2f} GB of weights (fetching what the cache lacks)")
    with _translated(model, revision), _quiet_library():
        folder = Path(snapshot_download(model, library_name="marlinctl", **wanted))
    if folder.name != info.sha:  # the library fell back to an older copy, or there was a push just now
        what = f"commit {info.sha} was asked for and {folder.name} came"
        raise HubProblem("E707", what, where=where, fix="start again; a commit named with --revision cannot move")
    if any(entry.rfilename == ORDER_FILE for entry in info.siblings or []):
        with _translated(model, revision), _quiet_library():
            orders = {**wanted, "revision": info.sha, "allow_patterns": [ORDER_FILE], "ignore_patterns": None}
            snapshot_download(model, library_name="marlinctl", **orders)
    missing = missing_files(folder)
    if missing:
        what = f"the model on the hub lacks {shown(', '.join(missing), 2000)}"
        raise BadInput("E301", what, where=where, fix="choose another revision or another model")
    return folder


def _repeated(ask: Callable[[], _Result]) -> _Result:
    """Ask again after a short wait if the hub is busy or the connection fails; a refusal is an answer."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: the base class of whichever HTTP client it uses

    for attempt in range(1, ATTEMPTS):
        try:
            return ask()
        except HTTPError as error:
            status = _status(error) if isinstance(error, HfHubHTTPError) else 429
            if status != 429 and status < 500:
                raise
        time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
    return ask()


class _IntoOurLog(logging.Handler):
    """What the hub library says while it retries goes to the log; the terminal gets one line when it gives up."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("marlinctl").debug("huggingface_hub: %s", record.getMessage())


@contextmanager
def _quiet_library() -> Iterator[None]:
    """No messages of the hub library, and no progress bars where there is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    library = logging.getLogger("huggingface_hub")
    before, library.handlers = library.handlers, [_IntoOurLog()]
    try:
        yield
    finally:
        library.handlers = before
        if quiet:
            enable_progress_bars()


@contextmanager
def _translated(model: str, revision: str | None) -> Iterator[None]:
    """A failure of the hub library as one of our errors, with one line about the cause."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(model, revision, error) from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise (_refusal(model, revision, cause) if isinstance(cause, HfHubHTTPError) else _no_connection(model, cause)) from error
    except HTTPError as error:
        raise _no_connection(model, error) from error
    except OSError as error:
        place = str(error.filename or "the hub cache")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "free some space, or name another --cache-dir"
            raise ResourceProblem("E500", f"the disk is full: {error.strerror}", where=place, fix=fix) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            fix = "name another place with --cache-dir or HF_HOME"
            raise EnvironmentProblem("E490", f"the hub cache cannot be written: {error.strerror}", where=place, fix=fix) from error
        raise _no_connection(model, error) from error  # among others, the library's size check after a cut transfer


def _refusal(model: str, revision: str | None, error: Exception) -> MarlinctlError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = _status(error)
    if isinstance(error, GatedRepoError):
        facts = "E701", "the model is gated: its owner wants to be asked first", "ask for access on its page, then run hf auth login"
    elif isinstance(error, RevisionNotFoundError):
        what = f"the hub has no revision {shown(revision or 'main', 80)!r} of this model"
        facts = "E702", what, "see the branches and tags on the model's page"
    elif isinstance(error, RepositoryNotFoundError):
        what = "the hub has no model of that name, or it is private"
        facts = "E702", what, "check the spelling; for a private model, run hf auth login"
    elif status in (401, 403):
        what = f"the hub refuses the access token (HTTP {status})"
        facts = "E701", what, "run hf auth login, or unset HF_TOKEN if it is outdated"
    elif status == 429:
        what = "the hub asks to slow down (HTTP 429, too many requests)"
        facts = "E707", what, "wait some minutes; with hf auth login the limits are higher"
    else:
        facts = "E707", f"the hub answers with an error (HTTP {status})", f"try again later; {_AGAIN}"
    error_id, what, fix = facts
    return HubProblem(error_id, what, where=_where(model), fix=fix)


def _no_connection(model: str, error: BaseException) -> HubProblem:
    cause = shown(str(error).splitlines()[0]) if str(error) else "no more is known"
    what = f"the connection to the hub failed: {type(error).__name__}: {cause}"
    return HubProblem("E707", what, where=_where(model), fix=f"check the network and the proxy, then start again: {_AGAIN}")


def _status(error: Exception) -> int:
    response = getattr(error, "response", None)
    return int(response.status_code) if response is not None else 0


def _where(model: str) -> str:
    return f"hub model {model} (there is no local path of that name)"
