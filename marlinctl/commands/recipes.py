"""`marlinctl recipes`: what recipes there are, what one resolves to, and whether one is right."""

from __future__ import annotations

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Group
from marlinctl.system.console import Console


@click.group("recipes", cls=Group)
def command() -> None:
    """List, show and check recipes.

    \b
    Example:
      marlinctl recipes ls
      marlinctl recipes show quick > mine.yaml
      marlinctl recipes check mine.yaml
    """


@command.command("ls")
@common_options
def ls(console: Console) -> None:
    """List the built-in recipes.

    \b
    Example:
      marlinctl recipes ls
    """
    from marlinctl.recipes.schema import builtin_names, load_recipe, recipe_hash

    recipes = [load_recipe(name) for name in builtin_names()]
    width = max(len(recipe.name) for recipe in recipes)
    console.result(
        "\n".join(f"{recipe.name:{width}}  {recipe.description}" for recipe in recipes),
        {"recipes": [{"name": recipe.name, "description": recipe.description, "sha256": recipe_hash(recipe)} for recipe in recipes]},
        hanging=width + 2,
    )


@command.command("show")
@click.argument("recipe", metavar="NAME_OR_FILE")
@common_options
def show(console: Console, recipe: str) -> None:
    """Print a recipe with every value it resolves to, as YAML that can be edited and used.

    \b
    Example:
      marlinctl recipes show quick
    """
    from marlinctl.recipes.schema import load_recipe, recipe_hash

    loaded = load_recipe(recipe, deprecated=console.warn)
    console.result(loaded.to_yaml().rstrip(), {"recipe": loaded.model_dump(mode="json"), "sha256": recipe_hash(loaded)})


@command.command("check")
@click.argument("recipes", metavar="FILE...", nargs=-1, required=True)
@common_options
def check(console: Console, recipes: tuple[str, ...]) -> None:
    """Say whether recipes are right; if not, list everything that is wrong, with line and column.

    \b
    Example:
      marlinctl recipes check mine.yaml
    """
    from marlinctl.errors import Problem, UsageError
    from marlinctl.recipes.schema import load_recipe, recipe_hash

    problems: list[Problem] = []
    first_id = ""
    hashes: dict[str, str] = {}
    for name in recipes:
        try:
            hashes[name] = recipe_hash(load_recipe(name, deprecated=console.warn))
        except UsageError as error:
            first_id = first_id or error.error_id
            problems.extend(error.problems)
    if problems:
        raise UsageError.from_problems(first_id, problems)
    console.result(
        "\n".join(f"{name}: ok, sha256 {digest}" for name, digest in hashes.items()),
        {"recipes": [{"name": name, "sha256": digest} for name, digest in hashes.items()]},
    )
