"""What refuses a run without torch, whose import takes seconds. A verb asks here first, and imports the run if nothing is wrong.

The run asks again (run.py, compress.py, distillation/run.py): it is called from Python too, and by `resume`. A launcher's processes ask
there alone, because they must all hear the answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.checkpoint.hub import require_hub_id
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.remote_headers import headers
from marlinctl.checkpoint.source import is_gguf, is_local, writable_cache
from marlinctl.checkpoint.writer import check_output
from marlinctl.data.calibration_size import check_documents
from marlinctl.data.text import PYTHONDOC, check_text
from marlinctl.models.module_map import check_module_map
from marlinctl.planning.preflight import check_arguments, check_lengths, check_texts, look
from marlinctl.planning.training_settings import check_settings, check_sizes
from marlinctl.system.console import Console
from marlinctl.system.devices import check_name

if TYPE_CHECKING:
    from marlinctl.evaluation.settings import EvalSettings
    from marlinctl.jobs.journal import JobFolder
    from marlinctl.oneshot.open import Options
    from marlinctl.recipes.schema import Recipe


def check_run(
    model: str, outs: Sequence[Path], job: JobFolder, recipe: Recipe, options: Options, measured: EvalSettings | None, *, distils: bool
) -> None:
    """`quantize`, `sparsify` and `compress`. outs: every folder that is published. measured: how the result is measured, if it is.

    distils: a recipe that trains is divided into stages. Errors as the run raises them.
    """
    if not _asked_here(options):
        return
    for out in outs:
        check_output(out, overwrite=options.overwrite, sources=_local([model]), rejects=measured is not None and out == outs[0])
    job.refuse_taken()
    check_name(options.device)
    check_arguments(recipe, options.module_map, distils=distils)
    check_texts(recipe, distils=distils)
    if measured is not None:
        check_text(measured.text or PYTHONDOC)
    if not is_local(model, options.revision):
        require_hub_id(model)
        return
    if is_gguf(model):
        writable_cache(options.cache_dir)  # where the folder will be that it is turned into
    with headers(model, revision=None, cache_dir=options.cache_dir, offline=True, console=Console.quiet()) as seen:
        look(seen.checkpoint, recipe, options.module_map, None, files=seen.files, weights=False, drop_unexpected=options.drop_unexpected)
        check_lengths(recipe, seen.checkpoint.config, distils=distils)


def check_training(student: str, teacher: str, out: Path, job: JobFolder, recipe: Recipe, options: Options) -> None:
    """`distill`. Errors as the run raises them."""
    if not _asked_here(options):
        return
    asked = recipe.distill
    check_settings(asked, 1)
    check_output(out, overwrite=options.overwrite, sources=_local([student, teacher]))
    job.refuse_taken()
    check_name(options.device)
    check_module_map(options.module_map)
    check_documents(asked.data)
    for model, revision in ((student, None), (teacher, options.revision)):
        if not is_local(model, revision):
            require_hub_id(model)
        elif not is_gguf(model):
            with open_checkpoint(Path(model).expanduser()) as checkpoint:
                if model == student:
                    check_sizes(asked, checkpoint.config, 1)


def _asked_here(options: Options) -> bool:
    return not options.resume and int(os.environ.get("WORLD_SIZE", "1")) == 1


def _local(models: Sequence[str]) -> list[Path]:
    return [Path(model) for model in models if Path(model).exists()]
