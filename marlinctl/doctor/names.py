"""Folders and files that hide a package: a `kernels/__init__.py` in the current folder breaks `import transformers`.

Python takes the first module of a name along sys.path. PYTHONPATH comes before what is installed, and so does the current folder for
`python -m`, notebooks and torchrun; the script `marlinctl` itself does not look there. Hence two grades: `fail` where this very process
would import the wrong module, `warn` where those others would. A folder without __init__.py hides nothing: Python continues the search.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path

from marlinctl.doctor.installation import EXTRAS
from marlinctl.doctor.result import Check, Status

IMPORT_NAMES = {"pyyaml": "yaml"}  # where it is not the distribution's name with underscores
# What our requirements import if they find it, installed or not.
OPTIONAL = frozenset({"kernels", "cuda", "triton", "evaluate", "optimum", "peft", "torchvision", "torchaudio", "scipy", "pandas"})
# Names of our folders and of runtimes: they matter only if a package of that name is installed too.
OTHERS = frozenset({"quantize", "sparsify", "pack", "vllm", "sglang", "gptqmodel"})
# no package depends on `test`, and it is a common folder; modules inside the interpreter cannot be hidden.
STANDARD = sys.stdlib_module_names - set(sys.builtin_module_names) - {"test"}


def shadowed(own: Distribution | None, cwd: Path, path: Sequence[str], pythonpath: str) -> Iterator[Check]:
    """cwd: the current folder; path: sys.path; pythonpath: the variable."""
    needed = needed_names(own)
    standard_folder = Path(os.__file__).resolve().parent
    looked = dict.fromkeys(folder.resolve() for folder in [cwd, *map(Path, filter(None, pythonpath.split(os.pathsep)))])
    searched = [Path(entry or cwd).resolve() for entry in path]
    sound = True
    for folder in looked:
        if folder == standard_folder or not folder.is_dir():
            continue
        there = {entry.name.partition(".")[0] for entry in folder.iterdir()}
        for name in sorted(there & (needed | OPTIONAL | OTHERS | STANDARD)):
            spec = _regular(name, [str(folder)])
            if spec is None or next(iter(distributions(name=name, path=[str(folder)])), None) is not None:
                continue  # nothing to import, or the package itself
            first = _regular(name, path)
            elsewhere = _regular(name, [entry for entry, at in zip(path, searched, strict=True) if at != folder])
            if name in OTHERS and elsewhere is None:
                continue
            sound = False
            here = folder in searched and first is not None and first.origin == spec.origin
            who = "is imported" if here else "would be imported by python -m, notebooks and torchrun from this folder"
            status: Status = "fail" if here and name in needed | OPTIONAL else "warn"
            cure = "rename it, or work in another folder" if folder == cwd.resolve() else f"rename it, or take {folder} off PYTHONPATH"
            yield Check("names", status, f"{spec.origin} {who} instead of the package {name}", cure)
    if sound:
        yield Check("names", "ok", f"nothing in {' or '.join(map(str, looked))} hides a package")


def needed_names(own: Distribution | None) -> frozenset[str]:
    """What marlinctl imports, by its own list of requirements."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in (own.requires if own is not None else None) or []]
    ours = [w.name for w in wanted if w.marker is None or any(w.marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS))]
    return frozenset(IMPORT_NAMES.get(name.lower(), name.replace("-", "_")) for name in ours)


def _regular(name: str, path: Sequence[str]) -> ModuleSpec | None:
    """The module that is found there; None for a folder without __init__.py."""
    spec = PathFinder.find_spec(name, list(path))
    return spec if spec is not None and spec.origin is not None else None
