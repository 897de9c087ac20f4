"""Other people's INT4 kernels, measured beside ours where they are installed. None of them is needed, and none comes with marlinctl.

Words and scales are random and lie in the peer's own layout, in which every word is valid, so nothing of theirs is converted. Their
interfaces change from release to release: before a call is made its keywords are compared with the signature of what is installed, and a
peer whose interface is another is reported with the difference, not measured and not guessed at.

    vLLM      Marlin (sm_80 and later) and Machete (sm_90)       vllm._custom_ops
    humming   W4A16                                              humming.layer, humming.tune

Written against the published wheels of vLLM 0.24.0 and humming 0.1.19 (2026-11-21): the tests have their signatures and do not run
them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from marlinctl.benchmarking.building import EVERYWHERE
from marlinctl.benchmarking.cases import Shape
from marlinctl.benchmarking.documents import PeerNote

Call = Callable[[Tensor], object]  # activations [M, K] -> their product with one copy of the weights
SCALE = 0.02


class ApiDiffers(Exception):
    """What is installed has another interface than this module was written against."""


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    package: str  # as it is imported; its distribution has the same name, but for humming's
    distributions: tuple[str, ...]
    architectures: tuple[str, ...]
    make: Callable[[Shape, torch.dtype, torch.device], Call]


def find_peers(architecture: str) -> tuple[list[Peer], list[PeerNote]]:
    """Those that are installed and run on this architecture, and a note on every other."""
    there, notes = [], []
    for peer in PEERS:
        if find_spec(peer.package) is None:
            notes.append(PeerNote(name=peer.name, version=None, status="absent", why="not installed"))
        elif architecture in peer.architectures:
            there.append(peer)
    return there, notes


def installed_version(peer: Peer) -> str | None:
    for name in peer.distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def bind(function: Callable[..., Any], given: Mapping[str, object], empty: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The function with keywords fixed; `empty` are None where the installed version has them. ApiDiffers where that does not suffice.

    What is known only at the call, activations mostly, is the keyword that `given` holds with the value `...`.
    """
    name = getattr(function, "__name__", str(function))
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ApiDiffers(f"{name} does not report its parameters") from error
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [key for key in given if key not in parameters and not takes_any]
    if missing:
        raise ApiDiffers(f"{name} has no parameter {', '.join(missing)}")
    keywords = {key: None for key in empty if key in parameters} | dict(given)
    required = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    unknown = [key for key in required if key not in keywords]
    if unknown:
        raise ApiDiffers(f"{name} wants {', '.join(unknown)} too")
    late = next((key for key, value in given.items() if value is ...), None)

    def call(value: object = None) -> Any:
        return function(**(keywords if late is None else {**keywords, late: value}))

    return call


def attribute(module: str, *names: str) -> Any:
    """The first of `names` that the module has: functions are renamed now and then. ApiDiffers where it has none."""
    try:
        found = import_module(module)
    except Exception as error:  # an extension built for another torch fails in its own ways
        raise ApiDiffers(f"{module} cannot be imported: {error}") from error
    for name in names:
        if hasattr(found, name):
            return getattr(found, name)
    raise ApiDiffers(f"{module} has no {' or '.join(names)}")


def _words(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32, device=device)


def _scales(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    groups = 1 if shape.group_size == -1 else shape.k // shape.group_size
    return torch.randn(groups, shape.n, device=device).mul_(SCALE).to(dtype)


def _vllm_marlin(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    given = {
        "a": ...,
        "b_q_weight": _words(shape.k // 16, 2 * shape.n, device),
        "b_scales": _scales(shape, dtype, device),
        "workspace": torch.zeros(torch.cuda.get_device_properties(device).multi_processor_count, dtype=torch.int32, device=device),
        "b_q_type": attribute("vllm.scalar_type", "scalar_types").uint4b8,
        "size_n": shape.n,
        "size_k": shape.k,
        "is_k_full": True,
        "use_fp32_reduce": True,
    }
    # Renamed marlin_gemm by 0.24. Where both are there, marlin_gemm is the operator of the first MARLIN, which takes fewer arguments.
    function = attribute("vllm._custom_ops", "gptq_marlin_gemm", "marlin_gemm")
    empty = ("c", "b_bias", "a_scales", "global_scale", "b_zeros", "g_idx", "perm")
    bind(function, {**given, "size_m": 1}, empty)  # now, rather than while it is timed
    return lambda activations: bind(function, {**given, "size_m": len(activations)}, empty)(activations)


def _machete(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    int4 = attribute("vllm.scalar_type", "scalar_types").uint4b8
    words = _words(shape.n, shape.k // 8, device).T  # [K/8, N], columns in a row
    prepack = attribute("vllm._custom_ops", "machete_prepack_B")
    packed = bind(prepack, {"b_q_weight": words, "a_type": dtype, "b_type": int4, "group_scales_type": dtype})()
    size = shape.k if shape.group_size == -1 else shape.group_size
    given = {"a": ..., "b_q": packed, "b_type": int4, "b_group_scales": _scales(shape, dtype, device), "b_group_size": size}
    return bind(attribute("vllm._custom_ops", "machete_mm"), given)


def _humming(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    weights = {"dtype": "uint4", "group_size": 0 if shape.group_size == -1 else shape.group_size}
    make = bind(
        attribute("humming.layer", "HummingLayer"),
        {"shape_n": shape.n, "shape_k": shape.k, "weight_config": weights, "torch_dtype": dtype},
    )
    layer = make().to(device)
    for tensor in layer.parameters():
        if tensor.is_floating_point():
            tensor.data.normal_().mul_(SCALE)
        else:  # all 16 codes, as in a checkpoint: words without code 0 would be turned into sign and magnitude, another kernel
            tensor.data.random_(-(2**31), 2**31)
    if not hasattr(layer, "transform"):
        raise ApiDiffers("HummingLayer has no transform")
    layer.transform()
    if getattr(layer, "humming_config", None) is None:
        raise ApiDiffers("HummingLayer.transform sets no humming_config")
    # For one M at a time. Left to itself, the layer compiles what it would choose for any M up to 8192, 33 kernels, at its first call.
    heuristics = {"layer_config": layer.humming_config, "shape_m": ..., "gemm_type": "dense", "device": device}
    tuned = cache(bind(attribute("humming.tune", "get_heuristics_config"), heuristics))
    bind(layer.forward, {"inputs": ..., "tuning_config": None})  # now, rather than while it is timed
    return lambda activations: layer(inputs=activations, tuning_config=tuned(len(activations)))


PEERS = (
    Peer("vllm marlin", "vllm", ("vllm",), EVERYWHERE, _vllm_marlin),
    Peer("vllm machete", "vllm", ("vllm",), ("sm_90a",), _machete),
    Peer("humming", "humming", ("humming-kernels", "humming"), EVERYWHERE, _humming),
)
