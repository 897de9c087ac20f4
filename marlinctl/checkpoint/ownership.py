"""What marlinctl may remove or replace: what it made itself, what is a model and nothing else, and never more.

    OUT.job        marlinctl_job.json in it says that marlinctl made it, and every entry, in its folders too, has a name that marlinctl
                   gives there
    OUT            the files that its manifest names, and those that may be rewritten beside it; without a manifest, the files of one
                   model: config.json, weights, tokenizer, licence and the like (model_files.py)
    OUT.rejected   one of the two

Everything else is foreign, so it stops the run that would remove it, before the work and once more before
the folder is replaced. Entries are judged without following links, and a link is a stranger wherever a file or a folder should be.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from marlinctl.checkpoint import manifest
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.model_files import SUBFOLDERS, is_model_file, is_weights
from marlinctl.errors import UsageError
from marlinctl.system.atomic import is_temporary, sync_folder, write_document
from marlinctl.system.files import FileRefused, read_json, shown

JOB_MARKER = "marlinctl_job.json"
_MARK = {"magic": "marlinctl job folder", "format": 1}
_SHOWN = 5  # names in a refusal; the rest is counted

_REQUEST = "job.json"
_LOCK, _RUNNING = "lock", "running.json"
_NFS = re.compile(r"\.nfs[0-9a-f]+")  # what a network file system shows of a file that is removed and still open
BY_BLOCK = ("states", "orders")  # folders of a job with a file for each of some blocks (oneshot/resume.py)
_OF_BLOCK = re.compile(r"\d+\.safetensors(\.part)?")


def _outputs() -> str:
    """What stages of compress publish inside of a job: a format each, and what comes before it is quantized."""
    return "|".join([*FORMATS, "pruned", "distilled"])


def _is_job_folder(name: str) -> bool:
    known = rf"staged(-({_outputs()}))?(\.whole|\.copied)?|{'|'.join(BY_BLOCK)}|({_outputs()})(\.job)?|[^/]+\.old-[0-9a-f]{{8}}"
    return re.fullmatch(known, name) is not None


def _is_job_file(name: str) -> bool:
    """With .part: what an earlier version of marlinctl left of a file that it was writing."""
    known = (
        rf"({re.escape(JOB_MARKER)}|{_LOCK}|{re.escape(_RUNNING)}|job\.json|journal\.jsonl|(blocks|state|pruned|tracker)\.json"
        rf"|staged(-({_outputs()}))?\.masks|(calibration|token_weights|rows)\.safetensors|(teacher|block|state)-\d+\.safetensors)(\.part)?"
    )
    return re.fullmatch(known, name) is not None


# ---- a job's folder ------------------------------------------------------------------------------------------------------------------


def mark_job(folder: Path) -> None:
    """Say that this folder is a job's. The first thing that is written into it, and the last that goes."""
    if not _is_marked(folder):
        write_document(folder / JOB_MARKER, _MARK)
        sync_folder(folder.parent)


def is_job(folder: Path) -> bool:
    """Whether marlinctl made this folder for a job. False for a link, wherever it leads."""
    return _is_folder(folder) and (_is_marked(folder) or (_has_request(folder) and not strangers_in_job(folder)))


def strangers_in_job(folder: Path) -> list[str]:
    """What is in the way of taking or removing a job's folder; nothing for one that is marlinctl's, or empty."""
    if not _is_folder(folder):
        return [f"{folder.name}{_kind_of(folder)}"]
    if _is_marked(folder) or _has_request(folder):
        return [stranger for name, kind in _entries(folder) for stranger in _strange_in_job(folder, name, kind)]
    return [name + kind for name, kind in _entries(folder) if not _is_stray(folder, name, kind)]


def misfits_in_job(folder: Path) -> list[str]:
    """Entries with a name of marlinctl's that are something else: a link in the place of the journal, a folder in that of a file, and
    a folder with a foreign file in it."""
    known = [(name, kind) for name, kind in _entries(folder) if _is_job_file(name) or _is_job_folder(name)]
    return [stranger for name, kind in known for stranger in _strange_in_job(folder, name, kind)]


def remove_job(folder: Path) -> None:
    """Remove what marlinctl wrote into a job's folder, and the folder if nothing else is in it. What cannot be removed stays.

    The request goes first: without it the rest is not taken for a job if this is cut short. The mark goes last: with it the next
    run may remove the rest.
    """
    order = {_REQUEST: 0, _LOCK: 2, JOB_MARKER: 3}
    for name, kind in sorted(_entries(folder), key=lambda entry: order.get(entry[0], 1)):
        with suppress(OSError):
            if not _strange_in_job(folder, name, kind):
                remove(folder / name)
    with suppress(OSError):
        folder.rmdir()


def empty_job(folder: Path) -> None:
    """The same, but what says whose folder it is and who is at work stays. An OSError goes to the caller: what stays would be taken up."""
    for name, kind in list(_entries(folder)):
        if name not in (JOB_MARKER, _LOCK, _RUNNING) and not _strange_in_job(folder, name, kind):
            remove(folder / name)


def leave_results(folder: Path) -> None:
    """Remove a job's own files where the folder is kept for the outputs in it; the mark stays, so that it may be replaced one day."""
    for name, kind in list(_entries(folder)):
        if not kind and name != JOB_MARKER and _may_lie_in_a_job(name):
            remove(folder / name)


def remove_temporaries(folder: Path, *, older: float = 0.0) -> None:
    """Remove what a killed run was writing. older: by so many seconds; 0 only where no other run is at work, as in a job that is held."""
    for name, kind in list(_entries(folder)) if _is_folder(folder) else ():
        with suppress(OSError):
            if not kind and is_temporary(name) and time.time() - (folder / name).lstat().st_mtime >= older:
                (folder / name).unlink()


def set_aside(name: str, out: str) -> str | None:
    """The name of the output that an entry of OUT.job was before a new one took its place; None for any other entry.

    A job replaces OUT and, where it has several formats, OUT-FORMAT. Under any other name nothing leaves its folder.
    """
    found = re.fullmatch(r"(.+)\.old-[0-9a-f]{8}", name)
    return found[1] if found is not None and is_place(found[1], out) else None


def is_place(name: str, out: str) -> bool:
    """Whether the job of `out` publishes a folder of this name."""
    return re.fullmatch(rf"{re.escape(out)}(-({_outputs()}))?", name) is not None


def _strange_in_job(folder: Path, name: str, kind: str) -> list[str]:
    """An entry of a job's folder that marlinctl did not write, or what is in it; nothing for what is marlinctl's."""
    if kind != "/" or not _is_job_folder(name):
        return [] if not kind and _may_lie_in_a_job(name) else [name + kind]
    inner = folder / name
    if name.endswith(".job"):
        below = strangers_in_job(inner)
    elif name in BY_BLOCK:
        below = list(_strangers(inner, lambda file: _OF_BLOCK.fullmatch(file) is not None))
    elif ".old-" in name:
        below = list(_strangers(inner, _published(inner) or _model(inner) or is_model_file))
    else:
        below = list(_strangers(inner, is_model_file))
    return [f"{name}/{stranger}" for stranger in below]


def _may_lie_in_a_job(name: str) -> bool:
    return is_temporary(name) or _is_job_file(name) or _NFS.fullmatch(name) is not None


def _is_marked(folder: Path) -> bool:
    return _document(folder, JOB_MARKER).get("magic") == _MARK["magic"]


def _has_request(folder: Path) -> bool:
    """Earlier versions did not mark the folder of a job; its request has exactly this form."""
    found = _document(folder, _REQUEST)
    forms = {"format": int, "verb": str, "arguments": dict, "folder": str}
    return found.keys() == forms.keys() and found["format"] == 1 and all(isinstance(found[key], form) for key, form in forms.items())


def _is_stray(folder: Path, name: str, kind: str) -> bool:
    """What a run leaves that is killed before its folder is marked: nothing in it is worth anything."""
    if kind:
        return False
    if name == _RUNNING:
        return _document(folder, name).keys() == {"pid", "host"}
    return is_temporary(name) or (name == _LOCK and (folder / name).lstat().st_size == 0)


# ---- an output -----------------------------------------------------------------------------------------------------------------------


def strangers_in_output(folder: Path) -> list[str]:
    """What `--overwrite` must not delete; nothing for a folder that marlinctl published, for a model's folder, and for an empty one."""
    if not _is_folder(folder):
        return [f"{folder.name}{_kind_of(folder)}"]
    return list(_strangers(folder, _published(folder) or _model(folder) or (lambda name: False)))


def strangers_in_cache(folder: Path, note: str) -> list[str]:
    """The same for an entry of marlinctl's cache: files of a model, whole or damaged, and the note about them."""
    if not _is_folder(folder):
        return [f"{folder.name}{_kind_of(folder)}"]
    return list(_strangers(folder, lambda name: is_model_file(name) or name == note))


def strangers_in_rejected(folder: Path) -> list[str]:
    """The same for OUT.rejected: a checkpoint, or all that a `compress` had made."""
    if is_job(folder):
        return strangers_in_job(folder)
    inside = list(_entries(folder)) if _is_folder(folder) else []
    if inside and all(kind == "/" and re.fullmatch(_outputs(), name) for name, kind in inside):  # of a version that did not mark it
        return [f"{name}/{stranger}" for name, _ in inside for stranger in strangers_in_output(folder / name)]
    return strangers_in_output(folder)


def _published(folder: Path) -> Callable[[str], bool] | None:
    """Whether a name is one of a published folder's, as its manifest says; None where no manifest can be read."""
    files = _document(folder, manifest.NAME).get("files")
    if not isinstance(files, dict) or not files:
        return None
    named = {name for name in files if is_model_file(name)} | manifest.OUTSIDE  # a manifest cannot make thesis.tex a part of a model
    return lambda name: name in named


def _model(folder: Path) -> Callable[[str], bool] | None:
    """The same for a model of another tool; None for a folder that does not look like one."""
    config = _document(folder, "config.json")
    weights = any(is_weights(name) and not kind for name, kind in _entries(folder))
    if not weights or not config.keys() & {"model_type", "architectures"}:
        return None
    code = set(_code_of(config.get("auto_map")))
    return lambda name: is_model_file(name) or name in code


def _code_of(auto_map: Any) -> Iterator[str]:
    """The Python files that an auto_map names: "modeling_x.Model", or a list of such."""
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and "--" not in name:
                yield f"{name.partition('.')[0]}.py"


def _strangers(folder: Path, ours: Callable[[str], bool], within: str = "") -> Iterator[str]:
    for name, kind in _entries(folder):
        path = f"{within}{name}"
        if kind == "/" and not within and name in SUBFOLDERS:
            yield from _strangers(folder / name, ours, f"{path}/")
        elif kind or not (ours(path) or is_temporary(name) or _NFS.fullmatch(name)):
            yield path + kind


# ---- removing ------------------------------------------------------------------------------------------------------------------------


def remove_tree(folder: Path) -> None:
    """A folder with all that is in it; NotADirectoryError for a link or a file."""
    if not _is_folder(folder):
        raise NotADirectoryError(f"{folder} is not a folder")
    shutil.rmtree(folder)  # follows no link below


def remove(path: Path) -> None:
    """A file, a link itself, or a folder with all that is in it."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink()


# ---- telling -------------------------------------------------------------------------------------------------------------------------


def refuse_strangers(what: str, folder: Path, strangers: Sequence[str], fix: str) -> None:
    """UsageError E224 with the first names. what: how the sentence with them begins."""
    if strangers:
        names = ", ".join(shown(name) for name in strangers[:_SHOWN])
        more = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
        raise UsageError("E224", f"{what}: {names}{more}", where=str(folder), fix=fix)


def refuse_protected(folder: Path) -> None:
    """UsageError E225 for a folder that cannot be replaced by a rename, or must not: it holds the person's place, their home, or a disk."""
    reason = None
    if folder == Path.cwd() or folder in Path.cwd().parents:
        reason = "is the current folder, or holds it"
    elif (home := _home()) is not None and (folder == home or folder in home.parents):
        reason = "is the home folder, or holds it"
    elif os.path.ismount(folder):
        reason = "is a mount point, which cannot be renamed"
    if reason:
        fix = f"name a folder inside of it, such as {folder / 'model'}"
        raise UsageError("E225", f"the output {reason}", where=str(folder), fix=fix)


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:  # a user without one, as containers have
        return None


# ---- looking -------------------------------------------------------------------------------------------------------------------------

_KINDS = ((stat.S_ISREG, ""), (stat.S_ISDIR, "/"), (stat.S_ISLNK, " (a link)"))


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, kind): "" for a file, "/" for a folder, else what it is. Links are not followed."""
    with suppress(FileNotFoundError):  # gone meanwhile
        for path in sorted(folder.iterdir()):
            with suppress(FileNotFoundError):
                yield path.name, _kind_of(path)


def _kind_of(path: Path) -> str:
    mode = path.lstat().st_mode
    return next((kind for test, kind in _KINDS if test(mode)), " (no file)")


def _is_folder(path: Path) -> bool:
    """A folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _document(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder, or an empty one where there is none, or where it cannot be read or is reached through a link."""
    with suppress(OSError, FileRefused):
        if _kind_of(folder / name) == "":
            found = read_json(folder, name)
            return found if isinstance(found, dict) else {}
    return {}
