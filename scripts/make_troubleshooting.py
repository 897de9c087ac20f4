"""Writes docs/troubleshooting.md from the catalog of error ids (marlinctl/system/troubleshooting.py).

python scripts/make_troubleshooting.py            writes it
python scripts/make_troubleshooting.py --check    exit 1 when it would change
"""

from __future__ import annotations

import inspect
import sys
from itertools import groupby

import generated

from marlinctl.errors import exit_code
from marlinctl.system.troubleshooting import CATALOG, Entry

PAGE = generated.DOCS / "troubleshooting.md"

HEAD = """\
# Troubleshooting

<!-- Written by scripts/make_troubleshooting.py from marlinctl/system/troubleshooting.py; `make docs` writes it again. -->

Every error says what is wrong, where, and how to fix it:

```text
error: what is wrong
  where: which file, tensor, byte, option or line
  fix: what would be right
  docs: marlinctl explain E312
```

An id names a kind of problem; its first digit is the exit code. Ids are stable: scripts may rely on them. With `--json`, the same fields
are one document: `{"schema_version": 1, "error": {"id", "exit_code", "problems": [{"what", "where", "fix"}], "docs"}}`. `--debug` adds the
traceback; the log always has it. `marlinctl explain E312` prints an entry of this page, and `marlinctl explain` lists them.
Of problems of one kind three are shown; `--json` lists all. [`marlinctl doctor`](doctor.md) tests the machine.

Unless an entry says otherwise, nothing was published and an existing output is unchanged.
"""
SECTIONS = {
    1: "A check said no",
    2: "Usage and recipes",
    3: "Bad input",
    4: "This machine lacks something",
    5: "Disk or memory",
    6: "Numbers",
    7: "Hub and network",
    70: "A defect of marlinctl",
}
FORMER = """\
## Former ids

Ids of earlier versions, and those that replaced them:

"""


def page() -> str:
    parts = [HEAD]
    for code, entries in groupby(CATALOG, key=lambda entry: exit_code(entry.error_id)):
        parts.append(f"## {SECTIONS[code]} (exit {code})\n")
        parts += [f"### {entry.error_id}\n**{entry.title}.**\n{_body(entry)}\n" for entry in entries]
    rows = [f"- {', '.join(entry.former)}: [{entry.error_id}](#{entry.error_id.lower()})" for entry in CATALOG if entry.former]
    return "\n".join([*parts, FORMER + "\n".join(rows) + "\n"])


def _body(entry: Entry) -> str:
    """In one paragraph with the title; Markdown wants a list apart."""
    text = inspect.cleandoc(entry.text)
    return f"\n{text}" if text.startswith("- ") else text


if __name__ == "__main__":
    sys.exit(generated.main(PAGE, page()))
