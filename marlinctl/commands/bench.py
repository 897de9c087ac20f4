"""`marlinctl bench`: are the kernels right and how fast are they; or compile them ahead of time."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click

from marlinctl.commands.common import common_options
from marlinctl.commands.help import Command
from marlinctl.commands.recipe_flags import command_line
from marlinctl.errors import UsageError
from marlinctl.system.console import Console

SET_NAMES = ("llama3-8b", "llama3-8b-unfused", "llama3-70b", "llama2-7b", "llama2-13b", "llama-33b", "llama-65b", "falcon-180b", "ideal")


@click.command("bench", cls=Command)
@click.argument("folder", type=click.Path(path_type=Path), required=False, metavar="[FOLDER]")
@click.option("--build", "build_only", is_flag=True, help="Compile every kernel into the cache and stop; needs no GPU.")
@click.option(
    "--arch", multiple=True, metavar="sm_90", help="With --build: for this architecture; repeatable. Default: this GPU's, else all."
)
@click.option("--only", multiple=True, metavar="NAME", help="With --build: this configuration; repeatable.")
@click.option(
    "--layers", multiple=True, type=click.Choice(SET_NAMES), help="Linears of this model's block; repeatable. Default: llama3-8b."
)
@click.option("--shape", multiple=True, metavar="NxK", help="A linear with N outputs and K inputs; repeatable.")
@click.option("--roofline", is_flag=True, help="Square linears of 4k to 32k, batch 1 to 65536.")
@click.option("--tokens", metavar="1,16,..", help="Values of M. Default: 1,8,16,32,64,128.")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True, help="Dtype of activations and outputs."
)
@click.option("--group-size", type=int, metavar="N", help="32, 64, 128, or -1 for channel-wise. Default: 128; --build: all.")
@click.option("--dense", "kind", flag_value="dense", help="Only the dense kernels.")
@click.option("--sparse", "kind", flag_value="sparse", help="Only the 2:4 kernels. Default: both.")
@click.option("--configurations", is_flag=True, help="Check and time every kernel configuration.")
@click.option("--tune", is_flag=True, help="The same, then write this GPU's dispatch table.")
@click.option("--check", "only_check", is_flag=True, help="Check correctness only.")
@click.option("--peers/--no-peers", default=True, help="Time vLLM's Marlin and Machete, and humming, if installed. Default: yes.")
@click.option("--model", type=click.Path(path_type=Path), metavar="PACKED", help="Time text generation with this packed model.")
@click.option("--batch", metavar="1,16,..", help="With --model: batch sizes. Default: 1,16.")
@click.option("--lengths", metavar="64:64,..", help="With --model: prompt and generated tokens. Default: 64:64.")
@click.option("--fuse", "fused", is_flag=True, help="With --model: fuse q, k, v and gate, up.")
@click.option("--compile", "compiled", is_flag=True, help="With --model: torch.compile the decoding step.")
@click.option("--device", default="cuda", show_default=True, metavar="DEVICE", help="cuda, cuda:N or cpu.")
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Cache of compiled kernels.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write bench.json and the pictures here.")
@click.option(
    "--from", "source", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Read a bench.json; measure nothing."
)
@common_options
def command(console: Console, **given: Any) -> None:
    """Check the INT4 kernels and time them, or compile them ahead of time.

    \b
    Example:
        marlinctl bench --layers llama3-8b --out bench-8b
        marlinctl bench ./smollm2-marlin --tokens 1,16,64
        marlinctl bench --model ./smollm2-marlin --batch 1,16 --lengths 64:64,1024:128
        marlinctl bench --build --arch sm_90
        marlinctl bench --device cpu --tokens 1,8
        marlinctl bench --from bench-8b/bench.json --out pictures

    Products are first compared with float64; a wrong one ends the run with exit code 1. Then each linear is timed in a CUDA graph, with
    weights not in cache, beside torch.matmul. FOLDER is a packed checkpoint whose linears are measured, with int8 activations too
    where its config.json allows them and this GPU is faster with them. Exit code 4: there is no GPU.

    --device cpu measures the modules on this CPU in bfloat16, beside torch's own int4 operator: 4096x4096 unless --shape says other.

    --model generates text with a packed checkpoint in transformers, then with the same weights in 16 bits, and times the first token and
    the following ones.
    """
    _refuse_contradictions(given)
    if given["cache_dir"] is not None:
        os.environ["MARLINCTL_CACHE"] = str(given["cache_dir"].absolute())  # where the operators look, in this process
    if given["build_only"]:
        _build(console, given)
        return
    if given["model"] is not None:
        _generate(console, given)
        return
    if given["source"] is not None:
        from marlinctl.benchmarking.documents import read_document

        _take(given["out"], "bench")
        _give(console, read_document(given["source"]), given["out"])
        return
    if given["device"] == "cpu":
        _measure_cpu(console, given)
        return
    _measure(console, given)


def _refuse_contradictions(given: dict[str, Any]) -> None:
    """UsageError E288: options that mean nothing together."""
    modes = [name for name, key in (("--build", "build_only"), ("--from", "source"), ("--model", "model")) if given[key]]
    measuring = {
        "FOLDER": given["folder"],
        "--layers": given["layers"],
        "--shape": given["shape"],
        "--roofline": given["roofline"],
        "--tokens": given["tokens"],
        "--configurations": given["configurations"],
        "--tune": given["tune"],
        "--check": given["only_check"],
    }
    asked = [name for name, value in measuring.items() if value]
    if len(modes) > 1 or (modes and asked):
        both = [*modes, *asked]
        raise UsageError(
            "E288", f"{both[0]} measures no linears, so {both[1]} means nothing", where=" ".join(both), fix=f"leave {both[1]} out"
        )
    if modes != ["--model"]:
        for name, value in (
            ("--batch", given["batch"]),
            ("--lengths", given["lengths"]),
            ("--fuse", given["fused"]),
            ("--compile", given["compiled"]),
        ):
            if value:
                raise UsageError("E288", f"{name} belongs to --model", where=name, fix=f"add --model, or leave {name} out")
    if modes != ["--build"]:
        for name, value in (("--arch", given["arch"]), ("--only", given["only"])):
            if value:
                raise UsageError("E288", f"{name} belongs to --build", where=name, fix=f"add --build, or leave {name} out")
    if given["device"] == "cpu":
        needs_gpu = {"--tune": given["tune"], "--configurations": given["configurations"], "--roofline": given["roofline"]}
        for name, value in {**needs_gpu, "--model": given["model"]}.items():
            if value:
                fix = f"leave {name} out, or give --device cuda"
                raise UsageError("E288", f"{name} measures kernels on a GPU", where=f"{name} --device cpu", fix=fix)
    if given["tune"] and given["only_check"]:
        raise UsageError("E288", "--tune measures, --check does not", where="--tune --check", fix="leave one of them out")


def _build(console: Console, given: dict[str, Any]) -> None:
    from marlinctl.benchmarking.building import build, build_table, default_architectures
    from marlinctl.benchmarking.cases import GROUPS, checked

    sizes = GROUPS if given["group_size"] is None else (checked(128, 128, given["group_size"]).group_size,)
    document = build(given["arch"] or default_architectures(), only=given["only"], group_sizes=sizes, console=console)
    console.result(build_table(document), document)


def _generate(console: Console, given: dict[str, Any]) -> None:
    import torch

    from marlinctl.benchmarking import cases, generation
    from marlinctl.benchmarking.gpu import open_gpu
    from marlinctl.system.atomic import write_bytes

    batches = cases.parse_tokens(given["batch"], "--batch") if given["batch"] else generation.DEFAULT_BATCHES
    lengths = generation.parse_lengths(given["lengths"]) if given["lengths"] else generation.DEFAULT_LENGTHS
    gpu = open_gpu(given["device"])
    _take(given["out"], "generation")
    with gpu.current():
        dtype = getattr(torch, given["dtype"])
        document = generation.run(given["model"], gpu, batches, lengths, dtype, console, compiled=given["compiled"], fused=given["fused"])
    if given["out"] is not None:
        write_bytes(given["out"] / "generation.json", (json.dumps(document, indent=1) + "\n").encode())
    console.result(generation.table(document), document)


def _measure(console: Console, given: dict[str, Any]) -> None:
    import torch

    from marlinctl.benchmarking import cases, tuning
    from marlinctl.benchmarking.gpu import open_gpu
    from marlinctl.benchmarking.run import Asked, run
    from marlinctl.benchmarking.timing import REPLAYS

    tokens = cases.parse_tokens(given["tokens"]) if given["tokens"] else None
    size = 128 if given["group_size"] is None else given["group_size"]
    sets = [cases.named_set(name, size) for name in given["layers"]]
    if given["shape"]:
        sets.append(cases.shapes_set(given["shape"], size))
    if given["roofline"]:
        sets.append(cases.roofline_set(size))
        tokens = tokens or cases.ROOFLINE_TOKENS
    kind: cases.Kind | None = given["kind"]
    gpu = open_gpu(given["device"])
    table = tuning.read_own_table() if given["tune"] else None
    _take(given["out"], "bench")
    own = None if given["folder"] is None else cases.checkpoint_set(given["folder"], console)
    if own is not None:
        sets.append(own.linears)
        kind = kind or own.kind
    names, default_tokens = (tuning.SETS, tuning.TOKENS) if given["tune"] else (("llama3-8b",), cases.DEFAULT_TOKENS)
    asked = Asked(
        sets=tuple(sets) or tuple(cases.named_set(name, size) for name in names),
        tokens=tokens or default_tokens,
        dtype=getattr(torch, given["dtype"]),
        group_size=size,
        kinds=cases.KINDS if kind is None else (kind,),
        rounding="none" if own is None else own.rounding,
        rounded=frozenset() if own is None else own.rounded,
        every=given["configurations"] or given["tune"],
        only_check=given["only_check"],
        with_peers=given["peers"],
        replays=tuning.REPLAYS if given["tune"] else REPLAYS,
        command=command_line(),
    )
    document = run(asked, gpu, console)
    if table is not None:
        path = tuning.write_own_table(tuning.merged(table, document))
        console.say(f"{path}: the operators choose by these measurements from now on")
    _give(console, document, given["out"])


def _measure_cpu(console: Console, given: dict[str, Any]) -> None:
    from marlinctl.benchmarking import cases, processor
    from marlinctl.system.atomic import write_bytes

    tokens = cases.parse_tokens(given["tokens"]) if given["tokens"] else processor.DEFAULT_TOKENS
    size = 128 if given["group_size"] is None else given["group_size"]
    sets = [cases.named_set(name, size) for name in given["layers"]]
    if given["shape"]:
        sets.append(cases.shapes_set(given["shape"], size))
    _take(given["out"], "cpu")
    kind: cases.Kind | None = given["kind"]
    rounding: dict[str, Any] = {}
    if given["folder"] is not None:
        own = cases.checkpoint_set(given["folder"], console)
        sets.append(own.linears)
        kind, rounding = kind or own.kind, {"rounding": own.rounding, "rounded": own.rounded}
    shapes = cases.distinct(sets) or (cases.checked(*processor.DEFAULT_SHAPE, size),)
    kinds = cases.KINDS if kind is None else (kind,)
    document = processor.run(shapes, tokens, kinds, console, only_check=given["only_check"], **rounding)
    if given["out"] is not None:
        write_bytes(given["out"] / "cpu.json", (json.dumps(document, indent=1) + "\n").encode())
    console.result(processor.table(document), document)


def _take(out: Path | None, kind: str) -> None:
    """Make the folder of --out. UsageError E224 where that kind of document would replace files that marlinctl did not write."""
    if out is None:
        return
    from marlinctl.system.files import FileRefused, exists, read_json, shown

    out.mkdir(parents=True, exist_ok=True)
    name = f"{kind}.json"
    try:
        found = read_json(out, name) if exists(out, name) else None
        ours = isinstance(found, dict) and found.get("kind") == kind
    except FileRefused:
        ours = False
    pictures = [path.name for path in sorted(out.glob("*.png")) if kind == "bench" and re.match(r"speedup-|shares-|roofline\.", path.name)]
    foreign = [] if ours else [*([name] if exists(out, name) else []), *pictures]
    if foreign:
        what = f"--out would replace what marlinctl did not write: {', '.join(shown(name) for name in foreign[:5])}"
        raise UsageError("E224", what, where=str(out), fix="name another folder, or move these files away")


def _give(console: Console, document: Any, out: Path | None) -> None:
    from marlinctl.benchmarking.table import render

    if out is not None:
        from marlinctl.benchmarking.documents import write_document
        from marlinctl.benchmarking.pictures import draw

        write_document(document, out / "bench.json")
        pictures = draw(document, out)
        console.say(f"{out}: bench.json, {', '.join(path.name for path in pictures) or 'no picture: too few figures'}")
    console.result(render(document), document.as_json())
