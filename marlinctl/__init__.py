"""marlinctl: compress language models to 4-bit checkpoints that real runtimes load.

The command line is marlinctl.cli, the Python API marlinctl.api. This file holds the version and imports nothing but a few modules of
the standard library, so that `marlinctl --help` answers at once.

It also sees to it that transformers loads native folders once marlinctl is imported, whichever of the two comes first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"

_REGISTRY = "transformers.quantizers.auto"


class _AfterTheRegistry(MetaPathFinder):
    """Registers when transformers imports its registry of quantizers: until then it costs nothing, and needs no transformers."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module("marlinctl.serve.transformers_quantizer")

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _REGISTRY in sys.modules:
    import_module("marlinctl.serve.transformers_quantizer")
else:
    sys.meta_path.insert(0, _AfterTheRegistry())
