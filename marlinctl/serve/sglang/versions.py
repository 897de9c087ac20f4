"""For which release of SGLang the plugin was written: from its sources, and not run on a GPU yet."""

from __future__ import annotations

from marlinctl.serve.native.release import PLUGIN, Release

SUPPORTED = "==0.5.23"
GROUP, NAME = "sglang.srt.plugins", PLUGIN  # of the entry point
RELEASE = Release("SGLang", "sglang", SUPPORTED, GROUP, "written for")


def installed() -> str | None:
    return RELEASE.installed()


def refusal(found: str | None) -> str | None:
    return RELEASE.refusal(found)


def plugin_found() -> bool:
    return RELEASE.plugin_found()
