"""A plan for people: one line a fact, linears of one kind together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from marlinctl.errors import number_of
from marlinctl.system.console import duration, gibibytes
from marlinctl.system.log import printable


def table(plan: Mapping[str, Any]) -> str:
    """The document of `make_plan` as text."""
    return "\n".join(f"{key:<14}{printable(value, one_line=True)}" for key, value in _rows(plan))


def _rows(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, settings, recipe = plan["model"], plan["settings"], plan["recipe"]
    size = f"{model['parameters'] / 1e9:.2f} billion parameters, {_gigabytes(model['bytes'])} as {', '.join(model['dtypes'])}"
    yield "model", f"{model['model_type']}, {number_of(model['blocks'], 'block')}, {size}"
    asked = recipe["calibration"]
    ranks = f", {settings['ranks']} processes" if settings["ranks"] > 1 else ""
    tokens = f"calibration {asked['samples']} x {asked['sequence_length']} tokens of {asked['source']}"
    yield "recipe", f"{recipe['name']}, {tokens}, forward pass in {settings['dtype']} on {settings['device']}{ranks}"
    yield from _linears(plan["linears"])
    for output in plan["outputs"]:
        yield from _output(output)
    yield from _memory(plan["memory"])
    yield from _disk(plan["disk"])
    time = plan["time"]
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in sorted(time["parts"].items(), key=lambda part: -part[1]))
    yield "time", f"about {duration(time['seconds'])}: {parts}"
    yield "", time["basis"]
    yield from (("note", note) for note in plan["notes"])
    for check in plan["checks"]:
        there = "unknown" if check["available"] is None else gibibytes(check["available"])
        verdict = "fits" if check["fits"] else "UNKNOWN" if check["available"] is None else "DOES NOT FIT"
        yield "check", f"{check['resource']}: {gibibytes(check['needed'])} needed, {there} ({check['where']}): {verdict}"
    yield "fits", "yes" if plan["fits"] else "no"


def _linears(linears: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    kinds = Counter(
        (_kind(item["name"]), *item["shape"], item["bits"], item["group_size"], item["pattern"], item["activations"])
        for item in linears["compressed"]
    )
    yield "compressed", number_of(len(linears["compressed"]), "linear")
    for (kind, n, k, bits, group, pattern, activations), count in kinds.items():
        scales = "" if group is None else ", one scale a row" if group == -1 else f", group size {group}"
        inputs = "" if activations == "16-bit" else f", {activations} activations"
        yield "", f"{count:>5} x {kind:<22} [{n}, {k}] {bits} bits{scales}{inputs}{f', {pattern}' if pattern else ''}"
    for title in ("skipped", "kept"):
        for (kind, reason), count in Counter((_kind(item["name"]), item["reason"]) for item in linears[title]).items():
            yield title, f"{count:>5} x {kind:<22} {reason}"


def _kind(name: str) -> str:
    """model.layers.3.mlp.experts.7.up_proj -> experts.up_proj"""
    last = name.rpartition(".")[2]
    return f"experts.{last}" if ".experts." in name else last


def _output(output: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sizes = output["bytes"]
    parts = f"linears {_gigabytes(sizes['linears'])} ({output['bits_per_weight']} bits a weight), the rest {_gigabytes(sizes['untouched'])}"
    mask = f", mask {_gigabytes(sizes['mask'])}" if sizes["mask"] else ""
    yield "output", f"{output['format']}, {_gigabytes(sizes['weights'])}: {parts}{mask}"
    yield "", f"loads in {', '.join(output['loads_in'])}"
    for runtime, reasons in output["refused_by"].items():
        yield "", f"{runtime} refuses {number_of(len(reasons), 'linear')}: {_first(reasons)}"
    for program, what in output["untested"].items():
        yield "", f"{program}: not tested with {what}"


def _memory(memory: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    each = "each GPU" if memory["host"]["processes"] > 1 else "GPU memory"
    for title, key in (("host memory", "host"), (each, "device")):
        if memory[key] is not None:
            stages = memory[key]["stages"]
            detail = f" ({', '.join(f'{name} {gibibytes(size)}' for name, size in stages.items())})" if len(stages) > 1 else ""
            if memory[key].get("processes", 1) > 1:
                detail += f" in each of {memory[key]['processes']} processes, {gibibytes(memory[key]['together'])} together"
            beside = f", and {gibibytes(memory[key]['activations'])} of activations, where there is room beside" if key == "device" else ""
            yield title, f"{gibibytes(memory[key]['peak'])} at the peak{detail}{beside}"


def _disk(disk: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    fetch = f"; {_gigabytes(disk['fetch'])} come into the cache first" if disk["fetch"] else ""
    sizes = f"{_gigabytes(disk['outputs'])} in the end, {_gigabytes(disk['during'])} at the fullest moment"
    yield "disk", f"{sizes} (activations {_gigabytes(disk['scratch'])}){fetch}"


def _first(reasons: Iterable[str]) -> str:
    first, *more = reasons
    return f"{first}{', ...' if more else ''}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
