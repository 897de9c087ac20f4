"""Under which licence a model may be used, as far as those who published it say so beside its weights.

    README.md    front matter as the hub reads it: license, and for `other` license_name and license_link
    model.gguf   the key general.license

Both are written by strangers: short strings are taken, everything else is ignored. A licence file travels with the weights in any case
(checkpoint/writer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlinctl.checkpoint.source import Source
from marlinctl.system.files import FileRefused, open_member

KEYS = ("license", "license_name", "license_link")
_CARD = "README.md"
_MOST_BYTES = 1 << 16
_LONGEST = 300


def licence_of(source: Source) -> dict[str, str] | None:
    """The keys of the hub that are stated; None where `license` is not."""
    facts = _of_gguf(Path(source.name).expanduser()) if source.kind == "gguf" else front_matter(source.folder)
    found = {key: text for key in KEYS if isinstance(text := facts.get(key), str) and 0 < len(text) <= _LONGEST and text.isprintable()}
    return found if "license" in found else None


def spoken(licence: Mapping[str, str] | None) -> str:
    """For people: `apache-2.0`, `own-licence (other), https://...`."""
    if licence is None:
        return "not stated beside its weights: ask whoever published it"
    name = f"{licence['license_name']} ({licence['license']})" if "license_name" in licence else licence["license"]
    return f"{name}, {licence['license_link']}" if "license_link" in licence else name


def front_matter(folder: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines of three hyphens of the folder's card; nothing where there is none that can be read."""
    import yaml

    try:
        with open_member(folder, _CARD) as file:
            text = file.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except FileRefused:
        return {}
    head, _, rest = text.partition("\n")
    if head.strip() != "---" or "\n---" not in rest:
        return {}
    try:
        facts = yaml.safe_load(rest[: rest.index("\n---")])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _of_gguf(path: Path) -> Mapping[str, Any]:
    from marlinctl.checkpoint.gguf.header import read_gguf_header

    facts = read_gguf_header(path).facts
    return {
        "license": facts.get("general.license"),
        "license_name": facts.get("general.license.name"),
        "license_link": facts.get("general.license.link"),
    }
