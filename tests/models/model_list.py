"""The list of models in docs/models.md, as scripts/make_models.py writes it and reads it again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from tests.models.sweep import NOT_TRIED, Outcome

# How a type works -> what its line begins with.
_WORK = {
    "table": "In the table, so that a plan needs no torch",
    "derived": "Derived from transformers' own code",
    "wrapper": "With parts for images or sound, of which the language model is compressed",
}
# What stands once -> words of the reasons that it stands for.
_SHARED = {
    "Encoders, and decoders whose layers are not one list of blocks": "one list of blocks",
    "Not tried, because the script cannot make a tiny model of them in time": NOT_TRIED,
}
_ALONE = "Of these, marlinctl alone loads the result, and transformers does not"
_LONGEST = 180  # letters of a reason
_WRONG = "taken, and wrong: "


def table(found: Iterable[Outcome]) -> str:
    """Types that work, and reasons for the others; a reason that many share stands once."""
    known = sorted(found, key=lambda one: one.model_type)
    shared = {title: [one.model_type for one in known if one.how == "refused" and words in one.reason] for title, words in _SHARED.items()}
    single = [one for one in known if one.how in ("refused", "wrong") and not any(one.model_type in group for group in shared.values())]
    alone = [one for one in known if one.how in _WORK and one.reason]
    return "\n".join(
        [
            *(f"{title}: {_listed(one.model_type for one in known if one.how == how)}.\n" for how, title in _WORK.items()),
            f"{_ALONE}: {_listed(one.model_type for one in alone)}.\n",
            "Refused:\n",
            *(f"- {title}: {_listed(group)}." for title, group in shared.items()),
            "\n| model_type | reason |\n|---|---|",
            *(f"| `{one.model_type}` | {_reason(one)} |" for one in single),
            "",
        ]
    )


def read_table(text: str) -> dict[str, Outcome]:
    """What `table` wrote."""
    titles = {title: (how, "") for how, title in _WORK.items()} | {f"- {title}": ("refused", words) for title, words in _SHARED.items()}
    found: dict[str, Outcome] = {}
    for line in text.splitlines():
        title, _, listed = line.partition(": ")
        names = re.findall("`([^`]+)`", listed)
        if title in titles:
            how, reason = titles[title]
            found |= {name: Outcome(name, how, reason) for name in names}
        elif title == _ALONE:
            found |= {name: replace(found[name], reason=_ALONE) for name in names}
        elif row := re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line):
            how = "wrong" if row[2].startswith(_WRONG) else "refused"
            found[row[1]] = Outcome(row[1], how, row[2].removeprefix(_WRONG).replace("\\|", "|"))
    return found


def _reason(one: Outcome) -> str:
    reason = (one.reason.partition(" cannot be compressed: ")[2] or one.reason).replace("|", "\\|")
    return f"{_WRONG}{reason[:_LONGEST]}" if one.how == "wrong" else reason[:_LONGEST]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
