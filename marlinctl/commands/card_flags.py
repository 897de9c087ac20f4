"""The flags that say of the original what the model card needs and nothing beside its weights says: --base-model, --license."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from marlinctl.errors import UsageError

if TYPE_CHECKING:
    from marlinctl.checkpoint.licence import Stated

BASE_MODEL = click.option("--base-model", metavar="HUB_ID", help="The original's name on the hub, for the card of a local MODEL.")
LICENSE = click.option("--license", metavar="ID", help="The original's licence as the hub calls it: apache-2.0, llama3.1, other, ...")


def card_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    return BASE_MODEL(LICENSE(function))


def chosen_card(values: Mapping[str, Any]) -> Stated:
    """UsageError E202 for what the hub would not accept, before anything is read."""
    from marlinctl.checkpoint.hub import is_hub_id
    from marlinctl.checkpoint.licence import HUB_IDS, Stated
    from marlinctl.system.files import shown

    base_model, licence = values["base_model"], values["license"]
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(
            "E202",
            f"{shown(base_model)!r} cannot be an id of the hub (name or organisation/name)",
            where="--base-model",
            fix="the name of the original's page, such as HuggingFaceTB/SmolLM2-135M; leave it out for a model that is not on the hub",
        )
    if licence is not None and licence not in HUB_IDS:
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(licence.lower(), sorted(HUB_IDS), n=3, cutoff=0.5))
        raise UsageError(
            "E202",
            f"the hub knows no licence {shown(licence)!r}",
            where="--license",
            fix=f"{f'one of {near}' if near else 'an id that the hub lists'}; or other, with the text in a file LICENSE",
        )
    return Stated(base_model, licence)
