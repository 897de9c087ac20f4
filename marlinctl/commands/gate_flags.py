"""The flags of `sparsify` and `compress` that say how good the result must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from marlinctl.gate import Gate


def gate_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--max-kl", type=click.FloatRange(0, min_open=True), metavar="NATS", help="Do not publish above this KL divergence."),
        click.option(
            "--max-ppl-ratio",
            type=click.FloatRange(0, min_open=True),
            metavar="X",
            help="Do not publish where perplexity is more than X times the original's.",
        ),
        click.option("--publish-anyway", is_flag=True, help="Publish even where --max-kl or --max-ppl-ratio says no."),
        click.option("--eval/--no-eval", "evaluated", default=True, show_default=True, help="Measure the result against the original."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def chosen_gate(values: dict[str, Any]) -> Gate:
    """Takes what `gate_flags` added, but `evaluated`, out of `values`."""
    from marlinctl.gate import Gate

    return Gate(values.pop("max_kl"), values.pop("max_ppl_ratio"), values.pop("publish_anyway"))
