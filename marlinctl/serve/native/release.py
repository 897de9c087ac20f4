"""Which releases of a server a plugin works with. Inner interfaces change from one to the next, so others are refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

PLUGIN = "marlinctl"  # the name of the entry point


@dataclass(frozen=True, slots=True)
class Release:
    server: str  # as its people write it
    package: str
    supported: str  # "==0.26.0"
    group: str  # of the entry point
    looked: str  # what was done with that release: "run with"

    @property
    def known(self) -> str:
        return self.supported.removeprefix("==")

    def installed(self) -> str | None:
        """Its version; None where it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def refusal(self, found: str | None) -> str | None:
        """Why the plugin stays out of this version; None where it is the known one. Local builds, 0.26.0+cu129, count as their release."""
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion

        if found is None:
            return (
                f"{self.server} is imported and not installed, so its version is unknown; marlinctl was {self.looked} "
                f"{self.server} {self.known}"
            )
        try:
            if SpecifierSet(self.supported).contains(found, prereleases=True):
                return None
        except (InvalidSpecifier, InvalidVersion):
            pass  # a version that is none is another one
        return (
            f"marlinctl was not {self.looked} {self.server} {found}, but {self.looked.split()[-1]} {self.known}: "
            f"pip install '{self.package}{self.supported}', or a marlinctl that knows {self.server} {found}"
        )

    def plugin_found(self) -> bool:
        """Whether the server would find the plugin: marlinctl is installed, and not only importable."""
        return any(point.name == PLUGIN for point in entry_points(group=self.group))
