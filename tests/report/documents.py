"""Documents as a run, an evaluation and a benchmark write them, small enough to be read here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.runtimes import Loads
from marlinctl.recipes.schema import load_recipe, recipe_hash
from marlinctl.report.comparison import Output
from marlinctl.report.provenance import Folder, public_notes
from marlinctl.report.scores import scores

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
HOSTILE = (
    "model.layers.0.<script>document.title='gone'</script>",
    'model.layers.1."><img src=x onerror="document.title=1">',
    "model.layers.2.$\\frac{1}{0}$ $",
    "model.layers.3.a|b\n| c | d |\n## forged",
    "model.layers.4.{{ 7 * 7 }}{% raw %}",
    "model.layers.5.\x1b[2J\u202egnp.exe",
    "model.layers.6.`](https://example.org) ```",
    "model.layers.7.]]>--></svg><style>*{display:none}</style>",
    "",
    "../../etc/passwd",
)


def estimate(value: float | None, stderr: float | None = 0.01) -> dict[str, float | None]:
    return {"value": value, "stderr": stderr}


def layer(name: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "name": name, "shape": [64, 128], "group_size": 64, "pattern": None, "error": 0.001 * (1 + number % 7),
        "damping": 0.01, "tokens": 4096, "dead": 0,
         "fallback": None, "remark": "", "digest": "0" * 64, "bytes_in": 16384, "bytes_out": 4368, "seconds": 0.1,
    }  # fmt: skip
    return record | changes


def evaluation(**changes: Any) -> dict[str, Any]:
    """Two tasks and a text, against the original."""

    def side(name: str, shift: float) -> dict[str, Any]:
        tasks = {
            task: {"split": split, "metrics": {"acc": estimate(score + shift)}, "documents": 20, "of_documents": 100}
            for task, split, score in (("winogrande", "validation", 0.55), ("arc_easy", "test", 0.61))
        }
        return {"name": name, "identity": name, "tasks": tasks, "groups": {}, "perplexity": estimate(14.0 - 20 * shift, 0.7)}

    document = {
        "kind": "evaluation",
        "finished": True,
        "names": ["winogrande", "arc_easy"],
        "text": {"name": "pythondoc", "note": "prose of CPython", "sha256": "ab" * 32, "windows": 4, "window": 1024, "starts_with": None},
        "model": side("model", -0.02),
        "baseline": side("original", 0.0),
        "comparison": {
            "perplexity": estimate(0.4, 0.1),
            "kl": estimate(0.1234, 0.002),
            "top1": estimate(0.85),
            "tasks": {"winogrande": {"acc": estimate(-0.02, 0.004)}, "arc_easy": {"acc": estimate(-0.02, 0.004)}},
        },
    }
    return document | changes


def bench() -> dict[str, Any]:
    def timed(name: str, family: str, us: float, moved: float, flops: float, speedup: float) -> dict[str, Any]:
        seconds = us / 1e6
        return {
            "name": name, "family": family, "us": us, "p20": us * 0.98, "p80": us * 1.03, "calls": 40, "speedup": speedup,
            "bytes_per_second": moved / seconds, "flops_per_second": flops / seconds, "of_read": moved / seconds / 4e12, "of_matmul": 0.5,
        }  # fmt: skip

    def case(m: int, dense: float, packed: float) -> dict[str, Any]:
        n = k = 4096
        flops = 2.0 * m * n * k
        return {
            "n": n, "k": k, "m": m, "group_size": 128, "baseline": "torch", "ideal": {"dense": packed * 0.9},
            "candidates": [
                timed("torch", "torch", dense, 2.0 * n * k, flops, 1.0),
                timed("torch, transposed", "torch", dense * 1.1, 2.0 * n * k, flops, 0.9),
                timed("n128 m16", "dense", packed, n * k / 2, flops, dense / packed),
                timed("n64 m16", "dense", packed * 2, n * k / 2, flops, dense / packed / 2),
            ],
        }  # fmt: skip

    return {
        "kind": "bench",
        "bench_version": 1,
        "machine": {"gpu": "Some GPU", "architecture": "sm_90", "torch": "2.13.0", "driver": None, "date": "2026-11-21"},
        "settings": {"dtype": "float16", "replays": 20},
        "ceilings": {"read": 4.2e12, "matmul": 7.0e14},
        "accuracy": {"checks": 3, "worst": [{"name": "n128 m16", "dtype": "float16", "relative": 2e-4, "gate": 1e-3, "checks": 3}]},
        "cases": [case(1, 12.0, 4.0), case(16, 13.0, 4.4), case(256, 40.0, 38.0)],
        "sets": [
            {
                "name": "llama3-8b",
                "layers": [{"name": "qkv"}, {"name": "o"}],
                "sums": [
                    {"m": 1, "name": "torch", "family": "torch", "us": 80.0, "speedup": 1.0},
                    {"m": 1, "name": "n128 m16", "family": "dense", "us": 25.0, "speedup": 3.2},
                ],
            }
        ],
    }


def report(names: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """Of a `compress` with everything that a page can show."""
    recipe = load_recipe("int4")
    names = names if names is not None else [f"model.layers.{block}.{kind}" for block in range(6) for kind in KINDS]
    layers = [layer(name, number) for number, name in enumerate(names)]
    document = {
        "kind": "compress",
        "command": "marlinctl compress org/Model-1B out/model",
        "written": "2026-11-21",
        "source": {"kind": "hub", "name": "org/Model-1B", "revision": "c" * 40, "note": "", "license": {"license": "apache-2.0"}},
        "recipe": {"sha256": recipe_hash(recipe), **recipe.model_dump(mode="json")},
        "calibration": {
            "source": "/home/somebody/texts.jsonl",
            "how": "documents joined",
            "samples": {"asked": 8, "got": 8},
            "tokens": {"asked": 4096, "got": 4096, "counted": 4000},
            "sequence_length": 512,
            "seed": 7,
            "sha256": "de" * 32,
        },
        "versions": {"marlinctl": "0.1.0", "algorithm": "3", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "device": "cpu, 2 threads",
        "dtype": "bfloat16",
        "bits": 4,
        "sparse": 0,
        "bytes": {"source": 3_000_000, "result": 1_000_000},
        "kept": [{"name": "lm_head", "reason": "output head"}],
        "fallbacks": [{"name": names[0], "fallback": "diagonal Hessian"}] if names else [],
        "underfed": [],
        "dead_inputs": [{"name": names[-1], "count": 3}] if names else [],
        "warnings": ["weights that hold nothing but zeros: <b>model.layers.2</b>"],
        "error": {"mean": 0.002, "worst": names[0] if names else ""},
        "seconds": 12.3,
        "peak_memory_bytes": 1 << 29,
        "peak_device_memory_bytes": None,
        "peak_device_reserved_bytes": None,
        "layers": layers,
        "outputs": [{"folder": "out/model", "format": "ct"}],
        "verified": {"ct": {"files": 9, "linears": len(names), "logit_error": 1e-7, "kernels": None, "source": None}},
        "evaluation": {"document": evaluation()},
        "bench": bench(),
    }
    return document | changes


def training(mode: str = "full", **changes: Any) -> dict[str, Any]:
    """Of a `distill`."""
    recipe = load_recipe("int4").model_dump(mode="json")
    recipe["distill"] |= {"mode": mode, "tokens": 1000}
    fixed = {"learning_rate": 1e-4}
    rows: list[dict[str, float]] = [{"step": n, "tokens": n * 16, **fixed, "loss": 3 / n, "kl": 1 / n} for n in range(1, 61)]
    if mode == "blockwise":
        rows = [{"step": row["step"], "block": row["step"] // 30, "loss": row["loss"]} for row in rows]
    document = {
        "kind": "distill",
        "command": "marlinctl distill a b --teacher org/Model-1B --tokens 1000",
        "format": "dense",
        "written": "2026-11-21",
        "student": {"kind": "folder", "name": "a", "revision": None},
        "teacher": {"kind": "hub", "name": "org/Model-1B", "revision": "d" * 40, "license": {"license": "other", "license_name": "own"}},
        "recipe": {"sha256": "9" * 64, **recipe},
        "sparse_linears": 14,
        "data": {"source": "self", "how": "written by the teacher", "rows": {"trained": 10, "held_out": 2}},
        "warnings": ["teacher: weights that are not read lie in the folder: old.safetensors"],
        "training": {"steps": 60, "tokens": 960, "seconds": 4.2, "tokens_per_second": 228.0, "curve": rows},
        "held_out": {"before": {"loss": 2.0, "kl": 1.0}, "after": {"loss": 1.0, "kl": 0.5}},
        "versions": {"marlinctl": "0.1.0", "torch": "2.13.0"},
        "device": "cpu, 2 threads",
        "processes": 1,
        "dtype": "float32",
        "peak_memory_bytes": 1 << 29,
        "peak_device_memory_bytes": None,
        "peak_device_reserved_bytes": None,
    }
    return document | changes


def outputs(names: Sequence[str] = ("model-int4", "model-int4-g32", "model-2of4")) -> list[Output]:
    """Of one model, ever larger and better."""
    found = []
    for number, name in enumerate(names):
        measured = evaluation()
        for task in measured["model"]["tasks"].values():
            task["metrics"]["acc"] = estimate(0.5 + 0.02 * number)
        measured["comparison"]["kl"] = estimate(0.3 - 0.1 * number / len(names))
        by_key = {(score.name, score.metric): score for score in scores(measured)}
        questions = {"winogrande": ("a" * 64,), "arc_easy": ("b" * 64,)}
        size = 1_000_000 + 100_000 * number
        notes = tuple(public_notes(measured))
        found.append(Output(name, "compressed-tensors", size, 3_000_000, "org/Model-1B", by_key, ("original", "text"), notes, questions))
    return found


def loads(fmt: str = "ct") -> Loads:
    return Loads(FORMATS[fmt].loaders, {}, {})


def folder(fmt: str = "ct", found: Loads | None = None) -> Folder:
    source = {"kind": "hub", "name": "org/Model-1B", "fingerprint": {"files": {}, "shards": {}}}
    return Folder("model-int4", FORMATS[fmt], {"source": source}, "f" * 64, found or loads(fmt))


def after_distilling() -> Folder:
    """Of a model that was quantized after it was distilled, and pruned before."""
    original = {"kind": "hub", "name": "org/Model-1B", "fingerprint": {"files": {"a": "1"}}}
    pruned = {"kind": "folder", "name": "pruned", "fingerprint": {"files": {"a": "2"}}, "made_from": {"source": original}}
    distilled = {
        "kind": "folder",
        "name": "distilled",
        "fingerprint": {"files": {"a": "3"}},
        "made_from": {"source": pruned, "teacher": original},
    }
    return Folder("model-int4", FORMATS["ct"], {"source": distilled}, "f" * 64, loads())
