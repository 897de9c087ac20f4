"""How many calibration tokens there are for each input: what is said of it before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from marlinctl.cli import main
from marlinctl.models.families import architecture
from marlinctl.planning.tokens_per_input import fewest
from marlinctl.recipes.schema import load_recipe

ASKED = load_recipe("int4").calibration  # 128 x 512


def test_the_widest_linear_of_an_8b_has_five() -> None:
    """If the narrow linears were looked at, the default calibration of an 8B would pass for enough."""
    known = architecture(SHAPES["llama-3-8b"])
    found = fewest(known, dict.fromkeys(known.linears, 128), ASKED)
    assert found is not None and found.value == pytest.approx(128 * 512 / 14336) and found.few
    assert found.wanted == 448 and 448 * 512 / 14336 == 16
    assert "4.6 calibration tokens for each input of the widest linear (K=14,336)" in str(found) and "--samples 448 gives 16" in str(found)


def test_tokens_that_do_not_count_are_not_counted() -> None:
    """Padding does not calibrate anything."""
    known = architecture(SHAPES["llama-3-8b"])
    found = fewest(known, dict.fromkeys(known.linears, 128), ASKED, tokens=128 * 256)
    assert found is not None and found.value == pytest.approx(128 * 256 / 14336) and found.wanted == 896


def test_experts_have_their_share() -> None:
    """Each sees 8 of 128 parts of the tokens in the mean: less than two for each input where a dense linear has 32."""
    known = architecture(SHAPES["qwen3-30b-a3b"])
    found = fewest(known, dict.fromkeys(known.linears, 128), ASKED)
    assert found is not None and found.stage.experts == 128 and found.value == pytest.approx(128 * 512 * 8 / 128 / 2048)
    assert "an expert's widest linear" in str(found)


def test_skipped_linears_do_not_count() -> None:
    """Who leaves down_proj at 16 bits needs no tokens for it; who leaves all has nothing to be told."""
    known = architecture(SHAPES["llama-3-8b"])
    some = {name: 128 for name in known.linears if not name.endswith("down_proj")}
    found = fewest(known, some, ASKED)
    assert found is not None and found.stage.k == 4096 and not found.few and str(found).endswith("(K=4,096)")
    assert fewest(known, {}, ASKED) is None


def test_plan_and_run_say_it(tiny: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A thin calibration must show before ten hours of work, and in the report."""
    asked = ["--group-size", "32", "--calibration", str(text), "--samples", "8", "--sequence-length", "64"]
    (tmp_path / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    recipe = ["--recipe", str(tmp_path / "mine.yaml")]
    assert main(["plan", str(tiny), *asked, *recipe]) == 0
    assert "2 calibration tokens for each input of the widest linear (K=256)" in " ".join(capsys.readouterr().out.split())
    assert main(["quantize", str(tiny), str(tmp_path / "out"), *asked, *recipe, "-q"]) == 0
    assert "warning: 2 calibration tokens for each input" in capsys.readouterr().err
    assert "2 calibration tokens for each input" in (tmp_path / "out" / "marlinctl_report.md").read_text()
