"""Tokens a second of `marlinctl distill` on GPUs, and the share of what the GPU multiplies at most.

    python benchmarks/distill_speed.py FOLDER TEXT.jsonl --blocks 8                                # one GPU
    python benchmarks/distill_speed.py FOLDER TEXT.jsonl --blocks 8 --processes 2 --profile       # FSDP2 on two

Steps are those of the run (distillation/loop.py: teacher, student, losses, gradients, AdamW, mask), over a model of the shape with random
weights (shapes.py), whose student is that model with the two largest weights of each four, and rows of random tokens. What a run does
beside its steps is left out: digests, comparisons of whole and sharded models, saved states, publishing. Times are between events at the
end of steps, without waiting for the device; the median over the steps behind the warm-up counts.

Operations of a step are counted in two ways. By parameters, as publications do: 6 for a parameter of the student and token, 2 for one of
the teacher, 2 more with checkpointing. By products: what is multiplied in fact. The embedding is looked up, and the output head, which is
not trained, has no gradient of its weights. Attention's own products are in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.shapes import SHAPES, make_model
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.distillation.distributed import Processes
from marlinctl.distillation.loop import Loop
from marlinctl.distillation.losses import Weights
from marlinctl.distillation.open import open_models
from marlinctl.distillation.rows import Rows
from marlinctl.distillation.state import DistillJob
from marlinctl.distillation.student import load_student
from marlinctl.distillation.teacher import live
from marlinctl.models.architectures import Architecture
from marlinctl.oneshot.open import Options
from marlinctl.planning.training_settings import check_sizes
from marlinctl.recipes.schema import Distill, load_recipe, resolve
from marlinctl.sparsify.mask import two_largest
from marlinctl.system.console import Console
from marlinctl.system.devices import set_up_allocator

PEAK = 989e12  # operations a second in bfloat16, dense: the data sheet of the H100 and H200 (SXM)
PRODUCT = 8192  # of the square matrices whose product shows what the card multiplies at its power limit
KERNELS = 30  # of the profile


@dataclass(frozen=True, slots=True)
class Measured:
    """Of all processes together."""

    seconds: list[float]  # of each step
    tokens: int  # of a step
    processes: int
    peaks: list[tuple[int, int]]  # of each process: bytes of its device that were alive, and that torch held
    product: float  # operations a second in bfloat16, of one device
    by_parameters: int  # operations of a step
    by_products: int
    profile: str | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path, help="JSONL, for the tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not counted")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a step, over all processes")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows in one forward pass")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--squarehead", type=float, default=1.0)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of one step")
    parser.add_argument("--started", action="store_true", help=argparse.SUPPRESS)  # by accelerate, as one of the processes
    chosen = parser.parse_args()
    teacher, student = (chosen.folder / f"{chosen.shape}-{chosen.blocks}{suffix}" for suffix in ("", "-2of4"))
    if not chosen.started:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        if not teacher.exists():
            files = chosen.folder / f"{chosen.shape}-files"
            make_model(SHAPES[chosen.shape], chosen.blocks, files, teacher, chosen.text, "cuda" if torch.cuda.is_available() else "cpu")
        if not student.exists():
            prune(teacher, student)
        if chosen.processes > 1:
            return launch(chosen.processes)
    settings = {
        "tokens": chosen.steps * chosen.batch_tokens, "batch_tokens": chosen.batch_tokens, "sequence_length": chosen.sequence_length,
        "micro_batch": chosen.micro_batch, "checkpointing": chosen.checkpointing, "squarehead": chosen.squarehead,
    }  # fmt: skip
    asked = resolve(load_recipe("int4"), {f"distill.{key}": value for key, value in settings.items()})[0].distill
    measured = measure(teacher, student, asked, chosen.steps, "auto", torch.bfloat16, profile=chosen.profile)
    if measured is not None:
        print("\n".join(lines(measured, chosen.warmup)))
    return 0


def launch(processes: int) -> int:
    """The same command in several processes, as `accelerate launch` starts `marlinctl distill`."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    each = ["--num_processes", str(processes), "--num_cpu_threads_per_process", str(max(1, len(os.sched_getaffinity(0)) // processes))]
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHER, *each, "-m", "benchmarks.distill_speed"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run([*command, *sys.argv[1:], "--started"], env={**os.environ, "PYTHONPATH": path}, check=False).returncode


LAUNCHER = [
    *("--use_fsdp", "--fsdp_version", "2", "--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no"),
]


def prune(teacher: Path, student: Path) -> None:
    """The two largest weights of each four in every linear of the blocks; shards without any are linked."""
    made = student.with_name(student.name + ".part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for path in sorted(teacher.iterdir()):
        if path.name.startswith("block-"):
            save_file(dict(_pruned(load_file(path))), made / path.name, metadata={"format": "pt"})
        elif path.suffix == ".safetensors":
            os.link(path, made / path.name)
        else:
            shutil.copy(path, made / path.name)
    made.rename(student)


def _pruned(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.shape[1] % 4 == 0 and "gate.weight" not in name:  # a router stays as it is
            weight = tensor.to(device)
            tensor = (weight * two_largest(weight.float().abs().T.contiguous()).T).cpu().contiguous()
        yield name, tensor


def measure(
    teacher: Path, student: Path, asked: Distill, steps: int, device: str, dtype: torch.dtype, *, profile: bool = False
) -> Measured | None:
    """Train for some steps; None in every process but the main one."""
    processes = Processes(device)
    set_up_allocator(processes.device)
    product = product_rate(processes.device) if processes.device.type == "cuda" else PEAK
    with ExitStack() as stack:
        opened = open_models(str(student), str(teacher), asked, Options(device=device), Console.quiet(), stack)
        known = opened.student.architecture
        check_sizes(asked, opened.student.checkpoint.config, processes.count)
        weights = Weights(asked.ce, asked.squarehead, asked.kl, asked.temperature)
        original = load_dense(teacher, dtype=dtype, device="cpu" if processes.sharded else processes.device)
        processes.shard(original, [original.get_submodule(block.prefix) for block in opened.teacher.architecture.blocks])
        pupil = load_student(opened, asked, processes, dtype)
        loop = Loop(
            pupil, live(original, weights), random_rows(asked, known.vocab_size), asked,
            dtype=dtype, processes=processes, job=DistillJob(student.with_name("none")), console=Console.quiet(),
        )  # fmt: skip
        if processes.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(processes.device)
        processes.wait()
        seconds = timed(loop.step, steps, processes.device)
        peaks = processes.gather(peak(processes.device))
        shown = profiled(lambda: loop.step(steps - 1), processes.device) if profile else None
    by_parameters, by_products = operations(known, asked)
    main, count = processes.main, processes.count
    processes.part(None)
    return Measured(seconds, asked.batch_tokens, count, peaks, product, by_parameters, by_products, shown) if main else None


def random_rows(asked: Distill, vocabulary: int) -> Rows:
    """Enough for one step, read again by every step, and one that is held out."""
    count = asked.batch_tokens // asked.sequence_length + 1
    ids = torch.randint(vocabulary, (count, asked.sequence_length), generator=torch.Generator().manual_seed(0))
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), 1, {})


def timed(step: Callable[[int], Any], steps: int, device: torch.device) -> list[float]:
    """Seconds from the end of a step to the end of the next, the first from its start. On a GPU nothing waits for it."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for number in range(steps):
            step(number)
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for number in range(steps):
        step(number)
        events[number + 1].record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def product_rate(device: torch.device) -> float:
    """Operations a second of a product of square bfloat16 matrices: the median of ten behind three."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device).bfloat16() for _ in range(2))
    seconds = timed(lambda _: a @ b, 13, device)
    return 2 * PRODUCT**3 / statistics.median(seconds[3:])


def peak(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def operations(known: Architecture, asked: Distill) -> tuple[int, int]:
    """Of a step, over all processes: by parameters, by products."""
    again = 2 if asked.checkpointing else 0
    everything = sum(prod(shape) for shape in known.expected.values())
    blocks = sum(spec.out_features * spec.in_features for spec in known.linears.values())
    head = known.vocab_size * known.hidden_size
    by_products = (6 + again) * blocks + 4 * head + 2 * (blocks + head)
    return asked.batch_tokens * (8 + again) * everything, asked.batch_tokens * by_products


def profiled(step: Callable[[], Any], device: torch.device) -> str:
    """One step, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = [event for event in recorded.key_averages() if not on_gpu or _is_kernel(event)]
    rows = sorted(((_microseconds(event, on_gpu), event.count, event.key) for event in found), reverse=True)
    total = sum(row[0] for row in rows)
    shown = [f"{time_ / 1e3:9.2f} ms {100 * time_ / total:5.1f} % {count:6d} x  {name[:100]}" for time_, count, name in rows[:KERNELS]]
    return "\n".join([f"one step by kernel, {total / 1e3:.1f} ms of all streams together:", *shown])


def _is_kernel(event: Any) -> bool:
    """Not a range that the program has named, whose kernels are listed themselves."""
    named = getattr(event, "is_user_annotation", False) or event.key.startswith(("FSDP::", "nccl:", "Optimizer."))
    return str(event.device_type).endswith("CUDA") and not named


def _microseconds(event: Any, on_gpu: bool) -> float:
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


def lines(measured: Measured, warmup: int) -> list[str]:
    """What a person reads, and the figures as JSON."""
    seconds = statistics.median(measured.seconds[warmup:] or measured.seconds)
    each = seconds * measured.processes
    shares = {
        f"{way}, of {against}": operations_ / each / rate
        for way, operations_ in (("by parameters", measured.by_parameters), ("by products", measured.by_products))
        for against, rate in (
            (f"{PEAK / 1e12:.0f} TFLOP/s", PEAK),
            (f"the product's {measured.product / 1e12:.0f} TFLOP/s", measured.product),
        )
    }
    speed = f"{seconds:.4f} s a step, {measured.tokens / seconds:,.0f} tokens/s"
    found = [
        f"{measured.processes} processes, {measured.tokens:,} tokens a step: {speed}",
        f"steps: {' '.join(f'{value:.3f}' for value in measured.seconds)}",
        *(f"{title}: {100 * share:.1f} %" for title, share in shares.items()),
        *(f"process {i}: peak {alive / 2**30:.1f} GiB, {held / 2**30:.1f} held" for i, (alive, held) in enumerate(measured.peaks)),
    ]  # fmt: skip
    document = {"seconds": seconds, "tokens_per_second": measured.tokens / seconds, "shares": shares, "peaks": measured.peaks}
    return [*found, *([measured.profile] if measured.profile else []), json.dumps(document)]


if __name__ == "__main__":
    sys.exit(main())
