"""Settings of `accelerate launch` reach its processes as environment variables, which accelerate and transformers read on their own.

marlinctl takes from the launcher who the processes are, and whether models are sharded. Settings that ask for something else are refused
(`sharding_asked`), and all are kept from the libraries where those would act on them (`settings_aside`):

    FSDP_CPU_RAM_EFFICIENT_LOADING    true unless a configuration says otherwise. In every process but the first of a machine, transformers
                                      then fills what it has loaded with zeros (all of it up to 5.22, buffers since 5.23), for accelerate to
                                      send the weights over when it shards. fully_shard does not: a part of every parameter stayed zero.
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS    divides each loss in Accelerator.backward, whatever the program says
    ACCELERATE_DYNAMO_*, other FSDP_*         compile the model; configure a sharding that is not used
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from marlinctl.errors import Problem, UsageError

_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FP8_")
_HARMLESS = {"ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}  # speed, and checks of accelerate's own
_YES = ("1", "true", "t", "yes", "y", "on")  # as accelerate reads them
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config (tensor, context or sequence parallel)",
}


def sharding_asked() -> bool:
    """Whether FSDP2 was asked for. UsageError E288 lists everything that was asked for and is not offered."""
    fix = "distributed_type: FSDP with fsdp_version: 2, or --multi_gpu"
    problems = [_refused(f"{title} is not offered", fix) for name, title in _OTHERS.items() if _on(name)]
    precision, compiler = _value("ACCELERATE_MIXED_PRECISION", "no"), _value("ACCELERATE_DYNAMO_BACKEND", "no")
    if precision not in ("no", "bf16"):
        problems.append(_refused(f"mixed_precision {precision} is not offered", "mixed_precision: 'no'; --dtype says what products are in"))
    if compiler != "no":
        problems.append(_refused(f"dynamo_backend {compiler} is not offered", "dynamo_backend: 'no'"))
    sharded = _on("ACCELERATE_USE_FSDP")
    if sharded:
        version, offload = _value("FSDP_VERSION", "1"), _on("FSDP_OFFLOAD_PARAMS")
        if version != "2" or offload:
            what = f"fsdp_version {version} with fsdp_offload_params {str(offload).lower()} is not offered"
            fix = "fsdp_version: 2 and fsdp_offload_params: false; --mode blockwise needs the least memory"
            problems.append(_refused(what, fix))
        if _on("FSDP_ACTIVATION_CHECKPOINTING"):
            problems.append(
                _refused("fsdp_activation_checkpointing is not offered", "fsdp_activation_checkpointing: false, and --checkpointing")
            )
    if problems:
        raise UsageError.from_problems("E288", problems)
    return sharded


def cpu_asked() -> bool:
    return _on("ACCELERATE_USE_CPU")


@contextmanager
def settings_aside() -> Iterator[None]:
    """Without the launcher's settings in the environment, for a call into a library that would act on them."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES) and name not in _HARMLESS}
    for name in found:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(found)


def _refused(what: str, fix: str) -> Problem:
    return Problem(what, "accelerate launch", fix)


def _value(name: str, default: str) -> str:
    return os.environ.get(name, "").strip().lower() or default


def _on(name: str) -> bool:
    return _value(name, "false") in _YES
