"""Names that strangers wrote, in every place that has one: no escape sequence of theirs reaches a terminal, a log or a page."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from marlinctl import cli
from marlinctl.system.log import Visible, visible_streams
from tests.packed import make_packed
from tests.tiny import make_tiny

EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202e"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]")  # all but line ends


def folder_of(kind: str, tmp_path: Path) -> Path:
    """A folder with the name in one kind of place."""
    folder = tmp_path / kind.replace(" ", "-")
    if kind.startswith("packed"):
        make_packed(make_tiny(tmp_path / "source"), folder)
    else:
        make_tiny(folder, shards=2 if kind == "index" else 1)

    def edit(name: str, **changes: Any) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    if kind in ("tensor", "packed tensor"):
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        save_file(tensors | {f"model.{EVIL}.weight": next(iter(tensors.values())).clone()}, path, metadata={"format": "pt"})
    elif kind == "index":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] |= {EVIL: f"{EVIL}.safetensors", "b": 5}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "config":
        edit("config.json", model_type=EVIL, architectures=[EVIL], dtype=EVIL, hidden_act=EVIL)
    elif kind == "sizes":
        edit("config.json", hidden_size=EVIL)
    elif kind == "activation":
        edit("config.json", hidden_act=EVIL)
    elif kind == "quantization":
        edit("config.json", quantization_config={"quant_method": EVIL})
    elif kind == "packed config":
        edit("config.json", quantization_config={"quant_method": "compressed-tensors", "format": EVIL})
    elif kind == "tokenizer":
        edit("tokenizer.json", pre_tokenizer={"type": EVIL})
        edit("tokenizer_config.json", tokenizer_class=EVIL)
    elif kind == "template":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('" + EVIL + "') }}")
    elif kind == "file":
        (folder / f"{EVIL}.json").write_text("{}")
        (folder / "model.safetensors").unlink()
        (folder / f"{EVIL}.bin").write_bytes(b"")
    elif kind == "packed report":
        (folder / "marlinctl_report.json").write_text(json.dumps({"kind": EVIL}))
    elif kind == "packed manifest":
        document = json.loads((folder / "marlinctl_manifest.json").read_text())
        document["files"][EVIL] = {"sha256": EVIL, "bytes": 1}
        (folder / "marlinctl_manifest.json").write_text(json.dumps(document))
    return folder


KINDS = ("tensor", "index", "config", "sizes", "activation", "quantization", "tokenizer", "file")
PACKED = ("packed tensor", "packed config", "packed report", "packed manifest")
SMALL = ("--calibration", "TEXT", "--samples", "2", "--sequence-length", "16", "--group-size", "32")


def calls(kind: str, folder: str, text: str, out: str) -> list[list[str]]:
    model = [
        ["inspect", folder],
        ["verify", folder],
        ["plan", folder],
        ["pack", folder, out, "--format", "marlin"],
        ["report", folder],
        ["eval", folder, "--text", text, "--tokens", "64", "--window", "32"],
    ]
    if kind in PACKED:
        return model[:-1]
    small = [text if word == "TEXT" else word for word in SMALL]
    return [
        *model,
        ["quantize", folder, out, *small],
        ["sparsify", folder, out, *small[:-2]],
        ["distill", folder, out, "--teacher", folder],
    ]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The river runs past the garden. " * 60)
    return str(path)


def printed(arguments: list[str], log: Path, capfd: pytest.CaptureFixture[str]) -> str:
    cli.main([*arguments, "--verbose", "--debug", "--log-file", str(log)])
    out, err = capfd.readouterr()
    return out + err + log.read_text()


@pytest.mark.parametrize("kind", [*KINDS, *PACKED])
def test_no_escape_sequence_gets_through(kind: str, tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """`inspect` of a downloaded folder would rename the terminal's window, clear it, or forge lines of ours."""
    folder = folder_of(kind, tmp_path)
    for number, arguments in enumerate(calls(kind, str(folder), text, str(tmp_path / "out"))):
        shown = printed(arguments, tmp_path / f"{number}.log", capfd)
        found = CONTROL.search(shown)
        assert found is None, (arguments[0], shown[max(0, found.start() - 200) : found.end() + 20])
        pages = [path for path in (*folder.glob("*.md"), *folder.glob("*.html")) if CONTROL.search(path.read_text())]
        assert not pages, arguments[0]


def test_names_that_a_person_was_sent(tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A recipe, a data file or a job from somebody else holds names too; so does what is pasted into a command line."""
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(json.dumps({"quantize": {EVIL: 1}, "name": EVIL}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({EVIL: "x"}) + "\n")
    job = tmp_path / "below" / f"{EVIL}.job"
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps({"format": 1, "verb": EVIL, "arguments": {}, "folder": "/"}))
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"kind": EVIL}))
    model = str(make_tiny(tmp_path / "model"))
    commands = [
        ["recipes", "check", str(recipe)],
        ["plan", model, "--recipe", str(recipe)],
        ["plan", model, "--skip", EVIL],
        ["plan", EVIL],
        ["quantize", model, str(tmp_path / "o"), "--calibration", str(rows), "--samples", "1"],
        ["eval", model, "--text", str(rows)],
        ["jobs", "ls", str(tmp_path / "below")],
        ["bench", "--from", str(results)],
        ["report", model, "--eval", str(results)],
        [EVIL],
        ["plan", f"--{EVIL}"],
    ]
    for number, arguments in enumerate(commands):
        log = tmp_path / f"{number}.log"
        cli.main([*arguments, "--log-file", str(log)])
        out, err = capfd.readouterr()
        shown = out + err + (log.read_text() if log.exists() else "")
        assert CONTROL.search(shown) is None, (arguments, shown[-400:])
        assert shown.strip()


def test_what_libraries_print_is_made_visible(capfd: pytest.CaptureFixture[str]) -> None:
    """transformers warns of a config's model_type with the name as it is; so do logging, warnings and print of any library."""
    with visible_streams():
        print(f"out {EVIL}")
        sys.stderr.write(warnings.formatwarning(EVIL, UserWarning, "library.py", 1, f"warn({EVIL!r})"))  # pytest keeps warnings to itself
        handler = logging.StreamHandler()
        logger = logging.getLogger("a.library")
        logger.addHandler(handler)
        logger.warning("the model %s", EVIL)
        logger.removeHandler(handler)
        sys.stderr.write(f"\r 10% {EVIL}")  # a bar
        sys.stderr.write("\n")
        sys.stderr.write("\x1b[A")
    assert not isinstance(sys.stderr, Visible)
    out, err = capfd.readouterr()
    assert CONTROL.search(out) is None and r"out \x1b]0;owned\x07" in out
    assert CONTROL.search(err.removesuffix("\x1b[A")) is None
    assert "\r 10% \\x1b]0;" in err and err.endswith("\n\x1b[A")


PIPES = {
    "manifest": ("packed", "marlinctl_manifest.json", [["inspect", "F"], ["verify", "F"], ["report", "F"]]),
    "report": ("packed", "marlinctl_report.json", [["report", "F"]]),
    "config": ("model", "config.json", [["inspect", "F"], ["plan", "F"]]),
    "index": ("model", "model.safetensors.index.json", [["inspect", "F"]]),
    "mask": ("packed", "marlinctl_mask.safetensors", [["inspect", "F"], ["verify", "F"]]),
    "tokenizer": ("model", "tokenizer.json", [["plan", "F"], ["quantize", "F", "O"]]),
    "settings": ("model", "generation_config.json", [["plan", "F"], ["eval", "F"]]),
    "card": ("model", "README.md", [["plan", "F"]]),
    "text": ("model", "text.txt", [["quantize", "F", "O", "--calibration", "P"], ["eval", "F", "--text", "P"]]),
    "rows": ("model", "rows.parquet", [["quantize", "F", "O", "--calibration", "P"]]),
    "recipe": ("model", "r.yaml", [["recipes", "check", "P"], ["plan", "F", "--recipe", "P"]]),
    "module map": ("model", "map.json", [["plan", "F", "--module-map", "P"]]),
    "results": ("model", "results.json", [["eval", "F", "--out", "P", "--resume"]]),
    "bench": ("packed", "bench.json", [["report", "F", "--bench", "P"], ["bench", "--from", "P"]]),
    "log": ("model", "run.log", [["inspect", "F", "--log-file", "P"]]),
    "GGUF": ("model", "model.gguf", [["plan", "P"]]),
    "journal": ("model", "x.job/journal.jsonl", [["jobs", "ls", "T"]]),
    "running": ("model", "x.job/running.json", [["jobs", "ls", "T"]]),
}
IN_FOLDER = ("manifest", "report", "config", "index", "mask", "tokenizer", "settings", "card")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", PIPES)
def test_nothing_waits_for_a_writer(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A FIFO in the place of any file that is read would hold the program for ever, without a word."""
    base, name, commands = PIPES[kind]
    folder = make_tiny(tmp_path / "model")
    if base == "packed":
        make_packed(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    path = (folder if kind in IN_FOLDER else tmp_path / "elsewhere") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if "x.job" in name:
        (path.parent / "job.json").write_text(json.dumps({"format": 1, "verb": "quantize", "arguments": {}, "folder": "/"}))
    os.mkfifo(path)
    words = {"F": str(folder), "P": str(path), "O": str(tmp_path / "out"), "T": str(tmp_path / "elsewhere")}
    for command in commands:
        code = cli.main([words.get(word, word) for word in command])
        told = capfd.readouterr().err
        assert code in ((0,) if command[0] == "jobs" else (1, 2, 3)), (command, code, told)


def test_a_token_of_the_command_line_is_published_nowhere(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who pastes an address with a token into an option would publish it with the model's card."""
    secret = "hf_" + "aBcDeFgHiJ1234567890KlMnOpQrStUvWx"
    place = tmp_path / f"https:{os.sep}me:passw0rd@host" / secret
    place.mkdir(parents=True)
    source = place / "text.txt"
    source.write_text(Path(text).read_text())
    folder, out = make_tiny(tmp_path / "model"), tmp_path / "out"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("calibration: {minimum_tokens: 32}\n")
    arguments = ["quantize", str(folder), str(out), "--recipe", str(recipe), "--calibration", str(source), "--samples", "4"]
    arguments += ["--sequence-length", "16", "--group-size", "32", "--cache-dir", f"https://me:passw0rd@host/{secret}", "--keep-job"]
    monkeypatch.setattr(sys, "argv", ["marlinctl", *arguments])
    assert cli.main(arguments) == 0, capfd.readouterr().err
    written = {path: path.read_text(errors="replace") for path in (*out.iterdir(), Path(f"{out}.log")) if path.suffix != ".safetensors"}
    assert "<redacted>" in written[out / "README.md"]
    leaks = [path.name for path, body in written.items() if secret in body or "passw0rd" in body]
    assert not leaks
    assert secret not in "".join(capfd.readouterr())
    job = tmp_path / "out.job" / "job.json"
    assert secret in job.read_text()  # to resume, it has to be asked for again
    assert job.stat().st_mode & 0o077 == 0
