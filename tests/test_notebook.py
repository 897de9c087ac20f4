"""notebooks/: commands that exist, no outputs of ours, and run from top to bottom on a tiny model without a GPU."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import TEXT
from tests.test_architecture import ROOT
from tests.test_docs_commands import SMALL, parse
from tests.tiny import make_tiny

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACES = re.compile(r"/(?:home|root|content|Users|tmp|work|mnt)/")


def cells(notebook: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(notebook.read_text("utf-8"))["cells"]
    return found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_and_no_places_of_a_machine(notebook: Path) -> None:
    """Whoever opens it would see results of another machine, and a diff would hold pictures."""
    found = cells(notebook)
    assert [cell["id"] for cell in found if cell.get("outputs") or cell.get("execution_count") is not None] == []
    assert PLACES.search(notebook.read_text("utf-8")) is None
    assert len({cell["id"] for cell in found}) == len(found)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_commands_are_command_lines(notebook: Path) -> None:
    """An option that was renamed would end the notebook in the middle."""
    values = {"GROUP_SIZE": "64", "DEVICE": "cpu"}
    lines = [line.strip() for cell in cells(notebook) if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    commands = [line.removeprefix("!marlinctl ") for line in lines if line.startswith("!marlinctl ")]
    assert {line.split()[0] for line in commands} >= {"compress", "verify", "pack", "bench"}
    for command in commands:
        parse(re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[1].lower()), command).split())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that fails is where a first visitor leaves."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'marlinctl[test]'")
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient: pip install 'marlinctl[test]'")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'marlinctl[test]'")
    make_tiny(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "small.yaml").write_text(SMALL.format(name="quick").replace("calibration: {", "calibration: {source: text.txt, "))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    document = nbformat.read(notebook, as_version=4)
    nbformat.validate(document)
    document.cells = [cell for cell in document.cells if "install" not in cell.metadata.get("tags", [])]
    (settings,) = [cell for cell in document.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source += '\nMODEL, OUT, RECIPE = "tiny", "out", "small.yaml"'
    nbclient.NotebookClient(document, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = {
        cell["id"]: "".join(output.get("text", "") for output in cell.outputs) for cell in document.cells if cell.cell_type == "code"
    }
    assert [name for name, text in printed.items() if re.search(r"^error: |Traceback", text, flags=re.MULTILINE)] == [], printed
    assert (tmp_path / "out" / "marlinctl_report.html").is_file() and "out: ok" in printed["verify"]
    assert "read by the emulator" in printed["pack"] and "8.0" in printed["bench"]
