"""Which releases of vLLM the plugin was run with."""

from __future__ import annotations

from marlinctl.checkpoint.formats.base import VLLM_RELEASE
from marlinctl.serve.native.release import PLUGIN, Release

SUPPORTED = f"=={VLLM_RELEASE}"
GROUP, NAME = "vllm.general_plugins", PLUGIN  # of the entry point
RELEASE = Release("vLLM", "vllm", SUPPORTED, GROUP, "run with")


def installed() -> str | None:
    return RELEASE.installed()


def refusal(found: str | None) -> str | None:
    return RELEASE.refusal(found)


def plugin_found() -> bool:
    return RELEASE.plugin_found()
