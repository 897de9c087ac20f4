"""How often a whole job unpacks each linear. Unpacking is most of what packing and verifying cost, and one more look is quickly added."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from marlinctl.cli import main
from marlinctl.pack import interchange, marlin, sparse_marlin
from tests.runs import TEXT
from tests.tiny import make_tiny

LINEARS = 14  # 2 blocks of 7


def unpackings(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> dict[str, float]:
    """Function -> calls for each linear, of a `compress` of a tiny model."""
    make_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    seen: Counter[str] = Counter()
    for module, name in ((interchange, "unpack_ct"), (marlin, "unpack_marlin"), (sparse_marlin, "unpack_sparse_marlin")):

        def counting(*given: object, real: object = getattr(module, name), name: str = name) -> object:
            seen[name] += 1
            assert callable(real)
            return real(*given)

        monkeypatch.setattr(module, name, counting)
    solves = "quantize: {refine: 0, tune_steps: 0}\nsparsify: {ls_iterations: 2, mask_sweeps: 1}\n"
    for name, text in (("int4", ""), ("sparse-int4", solves)):
        (folder / f"{name}.yaml").write_text(f"extends: {name}\n{text}calibration: {{minimum_tokens: 256}}\n")
    small = ["--samples", "8", "--sequence-length", "64", "--group-size", "32", "--dtype", "float32", "--no-eval", "-q"]
    asked = [flag.replace("FOLDER", str(folder)) for flag in flags]
    assert main(["compress", str(folder / "model"), str(folder / "out"), "--calibration", str(folder / "text.txt"), *small, *asked]) == 0
    return {name: count / LINEARS for name, count in seen.items()}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--recipe", "FOLDER/int4.yaml", "--also", "marlin"], {"unpack_ct": 5, "unpack_marlin": 3}),
        (["--recipe", "FOLDER/sparse-int4.yaml"], {"unpack_ct": 6, "unpack_sparse_marlin": 3}),
    ],
    ids=["dense", "2:4"],
)
def test_no_more_than_there_are_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], expected: dict[str, float]
) -> None:
    """ct: by the writer; by `pack` for the masks, to pack and to compare with what it wrote; by `verify`, and to load the model. Tiles: by
    the writer, by `verify`, and beside the kernel. It was 10 and 13 when each check of `verify` read the folder for itself."""
    assert unpackings(monkeypatch, tmp_path, *flags) == expected
