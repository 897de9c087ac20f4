"""So that `python -m pytest -m gpu tests/kernels` runs on a machine with a GPU, torch and pytest alone."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("hypothesis") else ["test_emulate.py"]
