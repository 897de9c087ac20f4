"""What `accelerate launch` starts in the tests of several processes: marlinctl itself, with transformers as it was up to 5.22.

accelerate launch ... launched.py distill STUDENT OUT ...      the command line of marlinctl
accelerate launch ... launched.py agreement FOLDER             what is found where processes differ, as JSON from process 0
accelerate launch ... launched.py gathering FOLDER             a sharded model in bfloat16: dtypes, and gradients against a whole one's
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from click.exceptions import Exit
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.distillation.agreement import Comparison, require_same_weights
from marlinctl.distillation.distributed import Processes, local, whole
from marlinctl.errors import CheckFailed
from marlinctl.system.console import Console


def zero_like_transformers_5_22() -> Callable[..., None]:
    """PreTrainedModel._move_missing_keys_from_meta_to_device of 5.17 to 5.22, where a launcher asked for FSDP's efficient loading."""
    installed = PreTrainedModel._move_missing_keys_from_meta_to_device

    def move(self: PreTrainedModel, *given: Any, **named: Any) -> None:
        if is_fsdp_enabled() and os.environ["LOCAL_RANK"] != "0":
            for path, tensor in [*self.named_parameters(), *self.named_buffers()]:
                parent, _, name = path.rpartition(".")
                zeros = torch.zeros_like(tensor, device="cpu")
                module = self.get_submodule(parent)
                setattr(module, name, torch.nn.Parameter(zeros) if isinstance(tensor, torch.nn.Parameter) else zeros)
        else:
            installed(self, *given, **named)

    return move


def agreement(folder: Path) -> None:
    """Sound weights; a process with other weights; a sound shard; a shard of zeros, in the second process alone."""
    processes = Processes("cpu")

    def outcome(check: Callable[[], None]) -> str:
        try:
            check()
        except CheckFailed as failed:
            return f"{failed.error_id} {failed.problems[0].what} | {failed.problems[0].where}"
        except Exit as left:
            return f"left with {left.exit_code}"
        return "passed"

    load = partial(load_dense, folder, dtype=torch.float32)
    comparison = Comparison(torch.arange(1, 41).reshape(1, -1), torch.float32, processes, Console.quiet())
    comparison.measure("student", 0, load)
    comparison.measure("teacher", 1 << 60, load)  # does not fit
    model = load()
    found = {"sound weights": outcome(lambda: require_same_weights("student", model, processes))}
    norm = model.get_parameter("model.norm.weight")
    with torch.no_grad():
        kept = norm[7].item()
        if not processes.main:
            norm[7] += 0.001
        found["other weights"] = outcome(lambda: require_same_weights("student", model, processes))
        norm[7] = kept
    processes.shard(model, [model.get_submodule(f"model.layers.{i}") for i in range(2)])
    found["sound shards"] = outcome(lambda: comparison.require_same_losses("student", model))
    if not processes.main:
        with torch.no_grad():
            for parameter in model.parameters():
                local(parameter).zero_()
    found["shards of zeros"] = outcome(lambda: comparison.require_same_losses("student", model))
    found["not measured"] = outcome(lambda: comparison.require_same_losses("teacher", model))
    everywhere = processes.gather(found)
    if processes.main:
        print(json.dumps(everywhere))
    processes.part(None)


def gathering(folder: Path) -> None:
    """Each process has a row of its own; gradients are averaged over both."""
    processes = Processes("cpu")
    model = load_dense(folder, dtype=torch.float32)
    rows = torch.arange(3, 67).reshape(2, 32)
    whole_model = copy.deepcopy(model)
    for parameter in whole_model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    expected: dict[str, torch.Tensor] = {}
    for row in rows:
        _loss(whole_model, row).backward()
        for name, parameter in whole_model.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, 0.0) + parameter.grad.double() / 2
            parameter.grad = None
    processes.shard(model, [model.get_submodule(f"model.layers.{i}") for i in range(2)], torch.bfloat16)
    seen: dict[str, str] = {}
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    linear.register_forward_hook(lambda module, given, out: seen.update(weight=str(module.weight.dtype), stream=str(given[0].dtype)))
    _loss(model, rows[processes.index]).backward()
    found = {"dtypes": seen, "kept": sorted({str(p.dtype) for p in model.parameters()} | {str(p.grad.dtype) for p in model.parameters()})}
    errors = {
        name: float((whole(parameter.grad).double() - expected[name]).norm() / expected[name].norm())
        for name, parameter in model.named_parameters()
    }
    everywhere = processes.gather({**found, "error": max(errors.values())})
    if processes.main:
        print(json.dumps(everywhere))
    processes.part(None)


def _loss(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), row[1:])


if __name__ == "__main__":
    PreTrainedModel._move_missing_keys_from_meta_to_device = zero_like_transformers_5_22()
    if sys.argv[1] == "agreement":
        agreement(Path(sys.argv[2]))
    elif sys.argv[1] == "gathering":
        gathering(Path(sys.argv[2]))
    else:
        sys.exit(main())
