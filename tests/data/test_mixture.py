"""marlinctl/data/mixture.py: how `web.jsonl:0.5,chat.jsonl:0.5` is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlinctl.data.mixture import Part, parts_of, samples_of_parts
from marlinctl.errors import UsageError


def test_parts_and_shares(tmp_path: Path) -> None:
    """Shares would go to other sources, a config of a hub data set would be taken for one, or a file with a comma would be divided."""
    assert parts_of("web.jsonl") == (Part("web.jsonl", 1.0),)
    assert parts_of("self") == (Part("self", 1.0),)
    assert parts_of("web.jsonl:1, org/name:config:train:3") == (Part("web.jsonl", 0.25), Part("org/name:config:train", 0.75))
    assert parts_of("a.jsonl,b.json.gz") == (Part("a.jsonl", 0.5), Part("b.json.gz", 0.5))
    odd = tmp_path / "a,b.jsonl"
    odd.write_text("{}")
    assert parts_of(str(odd)) == (Part(str(odd), 1.0),)
    single = tmp_path / "web.jsonl"
    single.write_text("{}")
    assert parts_of(f"{single}:0.5") == (Part(str(single), 1.0),)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a.jsonl:0.5,b.jsonl", "some have none"),
        ("a.jsonl:0,b.jsonl:1", "not above 0"),
        ("a.jsonl:0.5,self:0.5", "cannot be a part"),
        ("a.jsonl:0.5,", "no name"),
    ],
)
def test_mixtures_that_are_none(source: str, said: str) -> None:
    """A mixture that says nothing would be read as some mixture."""
    with pytest.raises(UsageError, match=said) as caught:
        parts_of(source)
    assert caught.value.error_id == "E246"


def test_samples_are_whole_and_all_there() -> None:
    """Samples would be lost in rounding, or a small part would be left out without a word."""
    parts = parts_of("a.txt:1,b.txt:1,c.txt:1")
    assert samples_of_parts(parts, 8) == (3, 3, 2)
    assert samples_of_parts(parts_of("a.txt:0.7,b.txt:0.3"), 10) == (7, 3)
    with pytest.raises(UsageError, match="less than one"):
        samples_of_parts(parts_of("a.txt:0.99,b.txt:0.01"), 8)
