"""Under which licence a model may be used, from files that strangers wrote."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from marlinctl.checkpoint.licence import licence_of, spoken
from marlinctl.checkpoint.source import Source


def of_card(folder: Path, text: str) -> dict[str, str] | None:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return licence_of(Source(folder, "folder", "m", None, ""))


def test_the_front_matter_of_the_card(tmp_path: Path) -> None:
    """A quantized model without its original's licence may not be passed on."""
    assert of_card(tmp_path, "---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n") == {"license": "apache-2.0"}
    other = of_card(tmp_path, "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.org/l\n---\n")
    assert other == {"license": "other", "license_name": "llama3", "license_link": "https://example.org/l"}
    assert spoken(other) == "llama3 (other), https://example.org/l"
    assert "not stated" in spoken(None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter\nlicense: mit\n",
        "---\nlicense: mit\n",  # never closed
        "---\nlicense: [mit\n---\n",
        "---\n!!python/object/apply:os.system ['true']\n---\n",
        "---\n- mit\n---\n",
        "---\nlicense: 5\n---\n",
        "---\nlicense: 'a\\nb'\n---\n" + "license: |\n  two\n  lines\n",
        '---\nlicense: "a\\u001b[2J"\n---\n',
        "---\nlicense: " + "m" * 5000 + "\n---\n",
        "---\nlicense_name: mine\n---\n",
        "---\n" + "a: " * 3000 + "\n---\n",
        "---\n" + "[" * 20000 + "\n---\n",
    ],
)
def test_anything_else_is_no_licence(tmp_path: Path, text: str) -> None:
    """A damaged card must neither stop a run nor put words into ours."""
    found = of_card(tmp_path, text)
    assert found is None or found == {"license": "a\\nb"}


def test_no_card_and_no_plain_file(tmp_path: Path) -> None:
    """A link out of the folder, or a folder of that name, is nothing to read."""
    source = Source(tmp_path, "folder", "m", None, "")
    assert licence_of(source) is None
    secret = tmp_path.parent / f"{tmp_path.name}-secret"
    secret.write_text("---\nlicense: mit\n---\n")
    (tmp_path / "README.md").symlink_to(secret)
    assert licence_of(source) is None
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert licence_of(source) is None


def test_a_gguf_file_states_it_in_its_header(tmp_path: Path) -> None:
    """The converted copy has no card; the file itself is asked."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert licence_of(Source(tmp_path, "gguf", str(path), None, "")) == {"license": "apache-2.0"}
