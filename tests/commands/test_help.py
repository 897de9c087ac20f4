"""marlinctl/commands/help.py: options under titles, a screen of the usual ones, and all with --help-all."""

from __future__ import annotations

import re

import click
import pytest

from marlinctl import cli
from marlinctl.commands import help
from tests.test_architecture import ROOT
from tests.test_output import commands

COMMANDS = dict(commands())
EVERY = pytest.mark.parametrize(("name", "command"), COMMANDS.items(), ids=list(COMMANDS))
LONG = pytest.mark.parametrize("verb", list(help.USUAL))


def flags(command: click.Command) -> list[str]:
    """Of a verb, without hidden ones."""
    with click.Context(command, info_name=command.name, help_option_names=["-h", "--help"]) as context:
        options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    return [max(option.opts, key=len) for option in options if not option.hidden]


def shown(text: str) -> list[str]:
    """The options that a help lists."""
    options = "".join(re.split(r"^\w[\w ]*:$", text, maxsplit=1, flags=re.MULTILINE)[1:])  # from the first title on
    return re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", options, flags=re.MULTILINE)


def at_80_columns(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


@EVERY
def test_every_option_has_a_title(name: str, command: click.Command) -> None:
    """The help of a verb with a new option would end with a KeyError: give the option an entry in TITLES of commands/help.py."""
    assert isinstance(command, help.Command), f"{name}: its decorator needs cls=Command"
    entries = " ".join(help.TITLES.values()).split()
    assert [flag for flag in flags(command) if flag not in entries and f"{command.name}:{flag}" not in entries] == []


def test_every_entry_is_an_option() -> None:
    """An option that was renamed would leave its entry, and a usual one would be missing from the help without a word."""
    of_verbs = {str(command.name): flags(command) for command in COMMANDS.values()}
    known = {flag for found in of_verbs.values() for flag in found}
    known |= {f"{verb}:{flag}" for verb, found in of_verbs.items() for flag in found}
    entries = " ".join(help.TITLES.values()).split()
    assert sorted(set(entries) - known) == [] and len(entries) == len(set(entries))
    for verb, usual in help.USUAL.items():
        assert sorted(set(usual.split()) - set(of_verbs[verb])) == [], verb


@LONG
def test_the_usual_options_fit_on_a_screen(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred lines scroll away, and with them the examples."""
    text = at_80_columns([verb, "--help"], monkeypatch, capsys)
    lines = text.splitlines()
    assert len(lines) <= 40
    assert [line for line in lines if len(line) > 80] == []
    assert sorted(shown(text)) == sorted(help.USUAL[verb].split())
    assert text.index("Example:") < min(text.index(f"\n{title}:") for title in help.TITLES if f"\n{title}:" in text)
    assert lines[-1] == f"All options: marlinctl {verb} --help-all"


def test_an_example_that_is_too_wide_can_be_copied(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal would break it in the middle of a word, and what is copied from there would hold a line break."""
    wide = "marlinctl compress ./smollm2 ./smollm2-marlin --group-size 64 --also marlin"
    text = at_80_columns(["compress", "--help"], monkeypatch, capsys)
    assert "      marlinctl compress ./smollm2 ./smollm2-marlin --group-size 64 \\\n          --also marlin\n" in text
    assert wide in " ".join(text.replace("\\\n", " ").split())
    assert "marlinctl eval out/qwen3-int4 --tasks mmlu,arc,winogrande \\\n" in at_80_columns([], monkeypatch, capsys)


@EVERY
def test_all_options_are_shown_once(
    name: str, command: click.Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What neither help shows can be found by reading the source only."""
    long = command.name in help.USUAL
    text = at_80_columns([*name.split(), "--help-all" if long else "--help"], monkeypatch, capsys)
    assert sorted(shown(text)) == sorted(flags(command))
    assert long == ("--help-all" in text)
    titles = re.findall(r"^(\w.*):$", text, flags=re.MULTILINE)
    assert titles == [title for title in help.TITLES if title in titles] and titles[-1] == help.COMMON


@LONG
def test_what_a_screen_has_no_room_for_is_in_the_long_help(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A form feed would be printed, or what follows it lost."""
    usual, form_feed, rest = (COMMANDS[verb].help or "").partition("\f")
    short = at_80_columns([verb, "--help"], monkeypatch, capsys)
    full = at_80_columns([verb, "--help-all"], monkeypatch, capsys)
    assert "\f" not in short + full
    assert usual.split()[-1] in short and usual.split()[-1] in full
    if form_feed:
        assert " ".join(rest.split()) in " ".join(full.split())
        assert " ".join(rest.split()) not in " ".join(short.split())


def test_a_misspelled_option_leads_to_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The help that is named would not have the option that was meant."""
    assert cli.main(["quantize", "a", "b", "--mask-sweps", "3"]) == 2
    assert "marlinctl quantize --help-all lists all" in capsys.readouterr().err


@EVERY
def test_the_page_lists_every_option(name: str, command: click.Command) -> None:
    """docs/cli.md is what people search."""
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    section = re.search(rf"^##+ marlinctl {name}\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    common = help.TITLES[help.COMMON].split()
    assert sorted(shown(section[1])) == sorted(flag for flag in flags(command) if flag not in common)
