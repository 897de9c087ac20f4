"""The folder of an unfinished `compress`: one job for each of its stages lies inside."""

from __future__ import annotations

from marlinctl.jobs.journal import JobFolder


class CompressJob(JobFolder):
    """That of `compress`, with a job for each stage inside."""

    @property
    def progress(self) -> bool:
        """A stage is finished, or one of them has something to resume."""
        if self.publishing is not None:
            return True
        inner = [path for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []
        return any(path.suffix != ".job" or JobFolder(path.with_suffix("")).has_progress() for path in inner)
