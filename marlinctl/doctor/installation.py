"""Is what is installed what marlinctl asks for? Its own metadata, as an installer reads it, is the only list of bounds.

python         Requires-Python; the versions that tests run with are the classifiers
marlinctl      the files that run are those of the installed distribution (RECORD), or of its editable folder (direct_url.json)
requirements   Requires-Dist
vllm, sglang   their versions, and whether they find the plugin
known-bad      known_bad.py
duplicates     folders NAME-VERSION.dist-info of the same name and different versions: an upgrade that was cut short
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

from marlinctl.doctor.known_bad import KNOWN_BAD
from marlinctl.doctor.result import Check, Status
from marlinctl.serve.native.release import PLUGIN, Release
from marlinctl.serve.sglang.versions import RELEASE as SGLANG
from marlinctl.serve.sglang.versions import plugin_found as sglang_plugin_found
from marlinctl.serve.vllm.versions import RELEASE as VLLM
from marlinctl.serve.vllm.versions import plugin_found

EXTRAS = ("eval", "distill")  # those that verbs need; the others are for work on marlinctl itself
_INFO = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*?)-(?P<version>[0-9][^-]*)(-py[0-9.]+)?\.(?P<kind>dist|egg)-info")


def own_distribution() -> Distribution | None:
    try:
        return distribution("marlinctl")
    except PackageNotFoundError:
        return None


def python(own: Distribution | None, version: str = platform.python_version()) -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    described = f"{platform.python_implementation()} {version}, {sys.executable}"
    needed = (own.metadata["Requires-Python"] if own is not None else None) or ""
    classifiers = (own.metadata.get_all("Classifier") if own is not None else None) or []
    tested = [found[1] for line in classifiers if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))]
    if not SpecifierSet(needed).contains(version, prereleases=True):
        cure = f"make an environment with Python {' or '.join(tested) or needed}"
        yield Check("python", "fail", f"{described}; marlinctl needs {needed}", cure)
    elif tested and ".".join(version.split(".")[:2]) not in tested:
        cure = f"if anything fails, try Python {' or '.join(tested)}"
        yield Check("python", "warn", f"{described}; marlinctl is tested with {', '.join(tested)}", cure)
    else:
        yield Check("python", "ok", described)


def marlinctl(own: Distribution | None, package: Path) -> Iterator[Check]:
    """package: the folder that marlinctl was imported from."""
    package = package.resolve()
    if own is None:
        cure = "pip install marlinctl, or pip install -e . in its repository"
        yield Check("marlinctl", "warn", f"imported from {package}, and not installed: its requirements are unknown", cure)
        return
    place = _place(own)
    if place is None or package == place:
        yield Check("marlinctl", "ok", f"{own.version}, {package}")
    else:
        cure = f"take {package.parent} off PYTHONPATH or leave that folder, or install it: pip install -e {package.parent}"
        yield Check("marlinctl", "warn", f"imported from {package}, but pip installed {own.version} at {place}", cure)


def _place(own: Distribution) -> Path | None:
    """The package's folder by the installer's records; None where they do not say."""
    direct = json.loads(own.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        return (Path(unquote(urlsplit(direct["url"]).path)) / "marlinctl").resolve()
    if any(str(file) == "marlinctl/__init__.py" for file in own.files or []):
        return Path(str(own.locate_file("marlinctl"))).resolve()
    return None


def requirements(own: Distribution | None, path: Sequence[str]) -> Iterator[Check]:
    from packaging.requirements import Requirement

    if own is None:
        return  # `marlinctl` says so
    met, missing_extras, sound = 0, [], True
    for line in own.requires or []:
        wanted = Requirement(line)
        extra = next((name for name in EXTRAS if wanted.marker and wanted.marker.evaluate({"extra": name})), None)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}) and extra is None:
            continue
        version = _version(wanted.name, path)
        bare = f"{wanted.name}{wanted.specifier}"
        if version is None and extra is not None:
            missing_extras.append(f"{wanted.name} ({extra})")
        elif version is None:
            sound = False
            yield Check("requirements", "fail", f"{wanted.name} is not installed", f"pip install '{bare}'")
        elif not wanted.specifier.contains(version, prereleases=True):
            sound = False
            status: Status = "fail" if extra is None else "warn"
            who = "marlinctl" if extra is None else f"marlinctl[{extra}]"
            yield Check("requirements", status, f"{wanted.name} {version}; {who} needs {wanted.specifier}", f"pip install '{bare}'")
        else:
            met += 1
    if sound:
        without = f"; not installed: {', '.join(dict.fromkeys(missing_extras))}" if missing_extras else ""
        yield Check("requirements", "ok", f"{met} installed as marlinctl {own.version} asks{without}")


def vllm(path: Sequence[str]) -> Iterator[Check]:
    """Whether vLLM would serve native folders, and its own 4-bit models with our kernels."""
    yield _server("vllm", path, VLLM, plugin_found(), "VLLM_PLUGINS", "which was tested")


def sglang(path: Sequence[str]) -> Iterator[Check]:
    """Whether SGLang would serve native folders."""
    known = "which marlinctl's plugin was written for and not run on a GPU with"
    yield _server("sglang", path, SGLANG, sglang_plugin_found(), "SGLANG_PLUGINS", known)


def _server(name: str, path: Sequence[str], release: Release, found: bool, variable: str, known: str) -> Check:
    """found: whether it finds the plugin. variable: its own, which names the plugins that it may load. known: of the release's version."""
    version = _version(release.package, path)
    if version is None:
        return Check(name, "ok", f"not installed; marlinctl serves in {release.server} {release.known}")
    why = release.refusal(version)
    if why is not None:
        return Check(name, "warn", f"{version}: {why}", f"pip install '{name}{release.supported}'")
    if not found:
        what = f"{version}, {known}, but it does not find marlinctl's plugin (entry point {release.group})"
        return Check(name, "warn", what, "pip install marlinctl again, or pip install -e . in its repository")
    if (allowed := os.environ.get(variable)) is not None and PLUGIN not in [one.strip() for one in allowed.split(",")]:
        what = f"{version}, {known}, but {variable}={allowed} keeps marlinctl's plugin out"
        return Check(name, "warn", what, f"unset {variable}, or add {PLUGIN} to it")
    return Check(name, "ok", f"{version}, {known}; it finds marlinctl's plugin")


def known_bad(path: Sequence[str]) -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    caught = False
    for entry in KNOWN_BAD:
        version = _version(entry.distribution, path)
        if version is not None and SpecifierSet(entry.versions).contains(version, prereleases=True):
            caught = True
            yield Check("known-bad", entry.status, f"{entry.distribution} {version}: {entry.reason} ({entry.source})", entry.cure)
    if not caught:
        yield Check("known-bad", "ok", f"none of {len(KNOWN_BAD)} known bad ranges of versions is installed")


def duplicates(path: Sequence[str]) -> Iterator[Check]:
    found: dict[str, dict[str, Path]] = {}  # name -> version -> folder
    torn: list[Path] = []
    for folder in dict.fromkeys(Path(entry or ".").resolve() for entry in path):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if match := _INFO.fullmatch(entry.name):
                found.setdefault(normal(match["name"]), {}).setdefault(match["version"], folder)
                if match["kind"] == "dist" and not (entry / "METADATA").is_file():
                    torn.append(entry)
    twice = {name: places for name, places in found.items() if len(places) > 1}
    for name, places in twice.items():
        where = " and ".join(f"{version} in {folder}" for version, folder in places.items())
        cure = f"pip uninstall {name} until none is left, then install it again"
        yield Check("duplicates", "warn", f"{name} is there in {len(places)} versions: {where}", cure)
    for entry in torn:
        yield Check("duplicates", "warn", f"{entry} has no METADATA: what is left of an installation", "remove that folder")
    if not twice and not torn:
        yield Check("duplicates", "ok", f"{len(found)} distributions, each in one version")


def normal(name: str) -> str:
    """One spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str, path: Sequence[str]) -> str | None:
    """Of the distribution that Python finds first."""
    return next(filter(None, map(_stated_version, distributions(name=name, path=list(path)))), None)


def _stated_version(found: Distribution) -> str | None:
    """The line alone: the parser of whole METADATA took 8 ms longer for thirty distributions, of the 140 that --quick computes.

    None where an installation that was cut short left a folder without METADATA.
    """
    text = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""
    stated = re.search(r"^Version: *(\S+)", text, flags=re.MULTILINE)
    return stated[1] if stated else None
