"""marlinctl: compress language models to 4-bit checkpoints that real runtimes load.

The command line is marlinctl.cli, the Python API marlinctl.api. This file holds the version and imports nothing but a few modules of
the standard library and one small one, so that `marlinctl --help` answers at once.

It also sees to it that transformers loads native folders once marlinctl is imported, whichever of the two comes first.
"""

from __future__ import annotations

from importlib import import_module

from marlinctl.system.after_import import after_import

__version__ = "0.1.0"

after_import("transformers.quantizers.auto", lambda: import_module("marlinctl.serve.transformers_quantizer"))
