"""Under which licence a model may be used, as far as those who published it say so beside its weights.

    README.md    front matter as the hub reads it: license, and for `other` license_name and license_link
    model.gguf   the key general.license

Both are written by strangers: short strings are taken, everything else is ignored. A licence file travels with the weights in any case
(checkpoint/writer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlinctl.checkpoint.source import Source
from marlinctl.system.files import FileRefused, open_member

KEYS = ("license", "license_name", "license_link")
# What the hub accepts as `license` (its answer of 2026-10: "license" must be one of ...). Anything else it calls an error of the card.
_HUB_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0
bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
HUB_IDS = frozenset(_HUB_IDS.split())
_CARD = "README.md"
_MOST_BYTES = 1 << 16
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class Stated:
    """What a person says of the original, for the card, instead of what is found."""

    base_model: str | None = None  # its id on the hub
    license: str | None = None  # one of HUB_IDS


NOTHING_STATED = Stated()


def licence_of(source: Source) -> dict[str, str] | None:
    """The keys of the hub that are stated; None where `license` is not."""
    facts = _of_gguf(Path(source.name).expanduser()) if source.kind == "gguf" else front_matter(source.folder)
    found = {key: text for key in KEYS if isinstance(text := facts.get(key), str) and 0 < len(text) <= _LONGEST and text.isprintable()}
    return found if "license" in found else None


def stated(found: Mapping[str, str] | None, given: str | None) -> dict[str, str] | None:
    """What was found, or the id that the person gave; name and link stay where both are the same id."""
    if given is None or (found or {}).get("license") == given:
        return None if found is None else dict(found)
    return {"license": given}


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
