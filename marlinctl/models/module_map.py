"""Module maps (docs/module-map.md): a JSON object with the names that the table of architectures would give, read and checked."""

from __future__ import annotations

from pathlib import Path

from marlinctl.errors import UsageError
from marlinctl.system.files import FileRefused, read_plain_json

_MAX_MAP_BYTES = 1 << 20
NamedBranch = tuple[str, tuple[str, ...], str, bool]  # module, first, last, whether it returns a tuple


def check_module_map(module_map: Path | None) -> None:
    """UsageError E251 for a file that is not a module map. Whether it fits the model is another question (`architecture`)."""
    if module_map is not None:
        read_module_map(module_map)


def read_module_map(module_map: Path) -> tuple[list[NamedBranch], str, str, str, str]:
    """Attention and MLP, and the names of decoder, blocks, embedding and norm. UsageError E251."""
    fix = "docs/module-map.md shows a whole one to start from"
    try:
        given = read_plain_json(module_map, limit=_MAX_MAP_BYTES)
        branches = [
            (
                _name(given[key]["module"]),
                tuple(_name(name) for name in given[key]["first"]),
                _name(given[key]["last"]),
                bool(given[key].get("returns_tuple", key == "attention")),
            )
            for key in ("attention", "mlp")
        ]
        decoder, blocks, embedding, norm = (_name(given[key]) for key in ("decoder", "blocks", "embedding", "norm"))
        if not all(first for _, first, _, _ in branches):
            raise ValueError("`first` is empty")
    except FileRefused as refused:
        what = f"the module map cannot be used: {refused.problem.what}"
        raise UsageError("E251", what, where=str(module_map), fix=fix) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError("E251", f"the module map cannot be used: {error!r}", where=str(module_map), fix=fix) from None
    return branches, decoder, blocks, embedding, norm


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not the name of a module")
    return value
