"""Which releases of vLLM the plugin was run with. Inner interfaces change from one to the next, so others are refused by name."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version

SUPPORTED = "==0.26.0"  # run on an H200; a release is added when it was run
GROUP, NAME = "vllm.general_plugins", "marlinctl"  # of the entry point


def installed() -> str | None:
    """vLLM's version; None where it is not installed."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def refusal(found: str | None) -> str | None:
    """Why the plugin stays out of this version; None where it was run with it. Local builds, 0.26.0+cu129, count as their release."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion

    known = SUPPORTED.removeprefix("==")
    if found is None:
        return f"vLLM is imported and not installed, so its version is unknown; marlinctl was run with vLLM {known}"
    try:
        if SpecifierSet(SUPPORTED).contains(found, prereleases=True):
            return None
    except (InvalidSpecifier, InvalidVersion):
        pass  # a version that is none is another one
    return (
        f"marlinctl was not run with vLLM {found}, but with {known}: pip install 'vllm{SUPPORTED}', or a marlinctl that knows vLLM {found}"
    )


def plugin_found() -> bool:
    """Whether vLLM would find the plugin: marlinctl is installed, and not only importable."""
    return any(point.name == NAME for point in entry_points(group=GROUP))
