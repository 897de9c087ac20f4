"""The pages cannot drift from the program: verbs, options, error ids, recipe keys and links."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from marlinctl import cli
from marlinctl.recipes.schema import Recipe, builtin_names
from marlinctl.system.troubleshooting import CATALOG
from tests.test_architecture import PACKAGE, ROOT

DOCS = ROOT / "docs"
AT_THE_TOP = ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = sorted([*(ROOT / name for name in AT_THE_TOP), *DOCS.rglob("*.md")])


def headings(page: Path) -> list[str]:
    body = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ +(.*?)\s*$", body, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it: lower case, punctuation dropped, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("script", ["make_cli_docs.py", "make_troubleshooting.py"])
def test_generated_pages_are_what_their_source_says(script: str) -> None:
    """An option that was renamed would live on in the docs, and an error would print a link that leads nowhere."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_picture_of_the_pipeline_is_what_the_script_draws() -> None:
    """A step that was renamed would live on in the picture of the home page."""
    script = ROOT / "scripts" / "draw_pipeline.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_steps_of_the_picture_are_verbs() -> None:
    """The picture names commands; one that is gone would be tried."""
    drawn = set(re.findall(r'font-weight="600"[^>]*>([^<]+)<', (DOCS / "figures" / "pipeline.svg").read_text("utf-8")))
    assert len(drawn) > 4 and drawn - {"model", "OUT"} <= set(cli.VERBS)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_a_section_and_an_example(verb: str) -> None:
    """A verb without an example is a verb that nobody tries."""
    page = (DOCS / "cli.md").read_text("utf-8")
    section = re.search(rf"^## marlinctl {verb}$(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    assert re.search(rf"Example:\s+marlinctl {verb} ", section[1])


def test_examples_in_the_docs_use_real_options() -> None:
    """A command that is copied from a page must not end with `there is no option`."""
    wrong = []
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = line.removeprefix("$ ").split("#")[0].split()
                if words[:1] != ["marlinctl"] or len(words) < 2 or words[1].startswith("-"):
                    continue
                command: Any = importlib.import_module(f"marlinctl.commands.{words[1]}").command
                if isinstance(command, click.Group) and len(words) > 2:
                    command = command.commands[words[2]]
                shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
                known = {name for parameter in shown for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
                wrong += [
                    f"{page.name}: {line.strip()}: {word}" for word in words if word.startswith("--") and word.split("=")[0] not in known
                ]
    assert not wrong


def named_ids(text: str) -> set[str]:
    return {found.upper() for found in re.findall(r"\bE\d{3}\b|(?<=#)e\d{3}\b", text)}


def test_every_error_id_is_explained_and_no_other() -> None:
    """`docs: marlinctl explain E312` must lead somewhere, and a page full of dead ids hides the living ones."""
    catalog = PACKAGE / "system" / "troubleshooting.py"
    sources = [path.read_text("utf-8") for path in PACKAGE.rglob("*.py") if path != catalog]
    used = {found for text in sources for found in re.findall(r"[\"'](E\d{3})[\"']", text)}
    explained = [entry.error_id for entry in CATALOG]
    assert explained == sorted(set(explained))
    assert sorted(used - set(explained)) == [], "raised, but not in the catalog"
    assert sorted(set(explained) - used) == [], "in the catalog, but never raised"
    assert [heading for heading in headings(DOCS / "troubleshooting.md") if re.fullmatch(r"E\d+", heading)] == explained


def test_pages_and_docstrings_name_ids_that_are_printed() -> None:
    """A reader would look for an id that no error has any more."""
    living = {entry.error_id for entry in CATALOG}
    files = [path for path in [*PAGES, *PACKAGE.rglob("*.py")] if path.stem != "troubleshooting"]
    assert {path.name: gone for path in files if (gone := sorted(named_ids(path.read_text("utf-8")) - living))} == {}


def test_a_number_never_gets_another_meaning() -> None:
    """An id in an old log would lead to the explanation of something else, or to two."""
    former = [error_id for entry in CATALOG for error_id in entry.former]
    assert len(former) == len(set(former)) and not {*former} & {entry.error_id for entry in CATALOG}
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    for entry in CATALOG:
        assert all(
            re.search(rf"^- .*\b{error_id}\b.*\(#{entry.error_id.lower()}\)$", page, flags=re.MULTILINE) for error_id in entry.former
        )
        assert {error_id[:2] for error_id in entry.former} <= {entry.error_id[:2]}, "the exit code of a kind would have changed"


def test_error_ids_stand_under_their_exit_code() -> None:
    """The page says that the first digit is the exit code."""
    code = ""
    for heading in headings(DOCS / "troubleshooting.md"):
        if found := re.search(r"\(exit (\d+)\)", heading):
            code = found[1]
        elif re.fullmatch(r"E\d+", heading):
            assert heading[1] == code or (heading, code) == ("E900", "70"), heading


def test_every_recipe_key_is_explained() -> None:
    """A key that the page does not know is a key that nobody can choose well."""
    page = (DOCS / "recipes.md").read_text("utf-8")
    for section, field in Recipe.model_fields.items():
        names = getattr(field.annotation, "model_fields", {})
        for name in names or [section]:
            assert re.search(rf"^\| `{name}` ", page, flags=re.MULTILINE), f"{section}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    """A dead link is the first thing a visitor finds."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        alive = goal.exists() and goal.is_relative_to(ROOT)
        if alive and fragment and goal.suffix == ".md":
            alive = fragment in {anchor(heading) for heading in headings(goal)}
        if not alive:
            dead.append(target)
    assert not dead


def test_every_page_is_in_the_index() -> None:
    """A page that nothing leads to is not read."""
    index = DOCS / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", index.read_text("utf-8"))}
    for folder in [path for path in linked if path.is_dir()]:
        linked.add(folder / "README.md")
    below = {page.parent for page in linked if page.name == "README.md" and page.parent != DOCS}
    unlisted = [page for page in DOCS.rglob("*.md") if page != index and page not in linked and page.parent not in below]
    assert not unlisted


def test_the_commands_of_the_readme_are_verbs() -> None:
    """README's first commands are what people run first."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    verbs = re.findall(r"^marlinctl (\w+)", "\n".join(blocks), flags=re.MULTILINE)
    assert len(verbs) >= 2
    assert set(verbs) <= set(cli.VERBS)


def test_every_page_is_in_the_sites_list() -> None:
    """`make site` stops at a page without a place; this finds it without the generator."""
    import yaml

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]  # type: ignore[attr-defined]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_built_in_recipe_is_explained() -> None:
    """A recipe that no page names is a recipe that nobody uses."""
    page = (DOCS / "recipes.md").read_text("utf-8")
    assert [name for name in builtin_names() if not re.search(rf"^\| `{name}` ", page, flags=re.MULTILINE)] == []


def test_commands_that_install_marlinctl_name_the_repository() -> None:
    """The package index has no marlinctl yet: the first command that a reader copies would fail. Drop this when it is published.

    An extra alone is for an environment that has marlinctl; pip then asks no index for it.
    """
    pages = [ROOT / "README.md", *(page for page in DOCS.rglob("*.md") if page.parent.name != "log")]
    commands = [
        f"{page.name}: {line}"
        for page in pages
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if re.search(r"pip install .*\bmarlinctl\b", line)
    ]
    assert len(commands) >= 5
    assert [line for line in commands if "git+https" not in line and not re.search(r"pip install 'marlinctl\[\w+\]'$", line)] == []
    assert [line for line in commands if line.startswith(("README.md", "install.md")) and "git+https" not in line] == []
