"""`marlinctl completion`: the scripts of click, asked as the shells ask."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlinctl import cli

PROGRAM = f"""#!{sys.executable}
import sys
from marlinctl.cli import main
sys.exit(main())
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`marlinctl` as an installer makes it, in a folder of its own."""
    path = tmp_path / "bin" / "marlinctl"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return path


def ask(words: str, place: int) -> list[tuple[str, str]]:
    """(kind, value) as the bash script gets them."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(place), cli.COMPLETION_VARIABLE: "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-m", "marlinctl"], env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return [(kind, value) for kind, _, value in (line.partition(",") for line in done.stdout.splitlines())]


@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [
        ("marlinctl quan", 1, [("plain", "quantize")]),
        ("marlinctl recipes s", 2, [("plain", "show")]),
        ("marlinctl quantize --group-si", 2, [("plain", "--group-size")]),
        ("marlinctl quantize --mask-s", 2, [("plain", "--mask-sweeps")]),  # which --help leaves out
        ("marlinctl quantize --help-", 2, [("plain", "--help-all")]),
        ("marlinctl quantize --act-order s", 3, [("plain", "static")]),
        ("marlinctl compress m o --recipe sp", 5, [("plain", "sparse-int4")]),
        ("marlinctl completion z", 2, [("plain", "zsh")]),
        ("marlinctl eval --dtype b", 3, [("plain", "bfloat16")]),
    ],
)
def test_the_program_knows_what_may_follow(words: str, place: int, expected: list[tuple[str, str]]) -> None:
    """A completion that knows nothing is worse than none: the shell's own file names are gone, too."""
    assert ask(words, place) == expected


@pytest.mark.parametrize("verb", ["quantize", "inspect", "verify", "pack", "report", "plan"])
def test_models_are_completed_as_paths(verb: str) -> None:
    """Folders are what is typed most."""
    assert ask(f"marlinctl {verb} ./", 2)[0][0] in ("file", "dir")


def test_every_verb_is_offered() -> None:
    """A verb that completion does not know will not be found."""
    assert [value for _, value in ask("marlinctl ", 1)] == list(cli.VERBS)


def test_in_a_real_bash(program: Path) -> None:
    """The script as bash runs it: read, asked for, and the answer put where bash looks."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    script = """
        source <(marlinctl completion bash)
        COMP_WORDS=(marlinctl quantize --group-si); COMP_CWORD=2
        _marlinctl_completion marlinctl; printf '%s\\n' "${COMPREPLY[@]}"
        complete -p marlinctl
    """
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "--norc", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[0] == "--group-size", done.stderr
    assert "_marlinctl_completion" in done.stdout.splitlines()[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script_that_it_accepts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script with a broken character is noticed at every new terminal."""
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert cli.COMPLETION_VARIABLE in text and f"{shell}_complete" in text
    assert cli.main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["script"] == text.rstrip("\n")
    if (binary := shutil.which(shell)) is not None:
        subprocess.run([binary, "-n"], input=text, text=True, check=True, timeout=60)


def test_an_unknown_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """The allowed ones must be named."""
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err
