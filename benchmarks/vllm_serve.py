"""What vLLM makes of a folder through marlinctl's plugin: how fast, the same tokens or not, and what it says of a damaged one. Needs a GPU.

    python benchmarks/vllm_serve.py time FOLDER LABEL [--batch 1,16,64,128] [--repeats 5] [--weights] [--kernels] [--devices 2]
    python benchmarks/vllm_serve.py tokens FOLDER OUT.json [--text FILE] [--devices 2]
    python benchmarks/vllm_serve.py reference FOLDER TOKENS.json ..
    python benchmarks/vllm_serve.py damaged NATIVE_FOLDER
    python benchmarks/vllm_serve.py repack

time        64 tokens in and 64 out, all requests of a batch at once, greedy, CUDA graphs, the engine in this process. TTFT: mean over
            the requests, from the first request handed over to a request's first token. TPOT: the rest by 63. Median of the repeats.
            Weights are random (load_format dummy) unless --weights. --kernels: also the microseconds of a token by kernel, from one
            more run of each batch under torch's profiler.
tokens      greedy continuations of six prompts, and the log-probabilities of four windows of text
reference   the same weights, dequantized, in transformers and float32: is each token of vLLM the most likely one there, how much less
            likely is it where not, and is the perplexity the same
damaged     copies of a folder, each wrong in one way: every one must be refused with an error of marlinctl
repack      GPTQ and compressed-tensors words to tiles on the GPU: weights per millisecond, the most memory, and equal to the packer's

One line each begins with SERVE.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.vllm_weights import described, fill

IN = OUT = 64
WINDOWS, WINDOW = 4, 256
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("time")
    verb.add_argument("folder", type=Path)
    verb.add_argument("label")
    verb.add_argument("--batch", default="1,16,64,128")
    verb.add_argument("--repeats", type=int, default=5)
    verb.add_argument("--weights", action="store_true", help="load them")
    verb.add_argument("--kernels", action="store_true", help="print which kernels the time of a token is")
    verb.add_argument("--devices", type=int, default=1)
    verb = verbs.add_parser("tokens")
    verb.add_argument("folder", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("--text", type=Path, help=".txt, or token ids as .json; without it, random ones")
    verb.add_argument("--devices", type=int, default=1)
    verb = verbs.add_parser("reference")
    verb.add_argument("folder", type=Path)
    verb.add_argument("tokens", type=Path, nargs="+")
    verb = verbs.add_parser("damaged")
    verb.add_argument("folder", type=Path)
    verbs.add_parser("repack")
    chosen = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    if chosen.verb == "time":
        batches = [int(size) for size in chosen.batch.split(",")]
        how = {"weights": chosen.weights, "kernels": chosen.kernels, "devices": chosen.devices}
        time_folder(chosen.folder, chosen.label, batches, chosen.repeats, **how)
    elif chosen.verb == "tokens":
        write_tokens(chosen.folder, chosen.out, chosen.text, chosen.devices)
    elif chosen.verb == "reference":
        compare(chosen.folder, chosen.tokens)
    elif chosen.verb == "damaged":
        sys.exit(try_damaged(chosen.folder))
    else:
        time_repacking()
    sys.stdout.flush()
    os._exit(0)  # an engine leaves threads behind that do not end


def say(*words: object) -> None:
    print("SERVE", *words, flush=True)


# ---- how fast ------------------------------------------------------------------------------------------------------------------------


def time_folder(folder: Path, label: str, batches: Sequence[int], repeats: int, *, weights: bool, kernels: bool, devices: int) -> None:
    from vllm import LLM

    started = time.perf_counter()
    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="auto" if weights else "dummy",
        dtype="float16",
        max_model_len=512,
        max_num_seqs=max(batches),
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        tensor_parallel_size=devices,
        seed=0,
        compilation_config={"cudagraph_capture_sizes": sorted({*GRAPHS, *batches})},
    )
    if not weights:
        engine.apply_model(fill)
    say(f"{label:14} up in {time.perf_counter() - started:.1f} s; {engine.apply_model(described)[0]}")
    numbers = random.Random(0)
    for batch in batches:
        one_batch(engine, batch, numbers)  # warm
        runs = [one_batch(engine, batch, numbers) for _ in range(repeats)]
        first, each = (statistics.median(run[i] for run in runs) for i in range(2))
        least, most = min(run[1] for run in runs), max(run[1] for run in runs)
        say(f"{label:14} batch {batch:4}  TPOT {each:.3f} ms ({least:.3f} to {most:.3f})  TTFT {first:.2f} ms")
        if kernels:
            say_kernels(engine, batch, numbers, label)


def say_kernels(engine: Any, batch: int, numbers: random.Random, label: str) -> None:
    """Microseconds of a token by kernel, also those of graphs, with the first token; then what the host does before the first token."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        one_batch(engine, batch, numbers)
    found = [(event.self_device_time_total / OUT, event.count / OUT, event.key) for event in recorded.key_averages()]
    say(f"{label:14} batch {batch:4}  all kernels {sum(each for each, _, _ in found):.0f} us a token")
    for each, count, name in sorted(found, reverse=True)[:8]:
        say(f"{label:14} batch {batch:4}  {each:8.1f} us  {count:6.1f} launches  {name[:110]}")

    waits = [one_batch(engine, batch, numbers, tokens=1)[0] for _ in range(5)]
    say(f"{label:14} batch {batch:4}  first token alone: {', '.join(f'{wait:.1f}' for wait in waits)} ms")
    host = cProfile.Profile()
    host.runcall(one_batch, engine, batch, numbers, tokens=1)
    found = pstats.Stats(host).stats.items()  # type: ignore[attr-defined]  # typeshed leaves it out
    for (file, line, name), (_, calls, own, whole, _) in sorted(found, key=lambda entry: -entry[1][2])[:25]:
        where = f"{file[-50:]}:{line} {name[:60]}"
        say(f"{label:14} batch {batch:4}  {1e3 * own:6.2f} ms of the host, {1e3 * whole:6.2f} with calls  {calls:6}  {where}")


_requests = iter(range(10**9))


def one_batch(engine: Any, batch: int, numbers: random.Random, tokens: int = OUT) -> tuple[float, float]:
    """Milliseconds to the first token and for each of the others, means over the requests."""
    import torch
    from vllm import SamplingParams

    core = engine.llm_engine
    settings = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [[numbers.randrange(1000, 100000) for _ in range(IN)] for _ in range(batch)]
    first: dict[str, tuple[float, int]] = {}
    last: dict[str, tuple[float, int]] = {}
    torch.cuda.synchronize()
    started = time.perf_counter()
    for prompt in prompts:
        core.add_request(str(next(_requests)), {"prompt_token_ids": prompt}, settings)
    while core.has_unfinished_requests():
        outputs = core.step()
        now = time.perf_counter()
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            if count:
                first.setdefault(output.request_id, (now, count))
                last[output.request_id] = (now, count)
    if len(last) != batch or any(count != tokens for _, count in last.values()):
        raise SystemExit(f"{len(last)} of {batch} requests were answered, with {sorted({count for _, count in last.values()})} tokens")
    waits = [moment - started for moment, _ in first.values()]
    paces = [(last[key][0] - moment) / max(tokens - count, 1) for key, (moment, count) in first.items()]
    return 1e3 * statistics.mean(waits), 1e3 * statistics.mean(paces)


# ---- the same tokens -----------------------------------------------------------------------------------------------------------------


def write_tokens(folder: Path, out: Path, text: Path | None, devices: int) -> None:
    from vllm import LLM, SamplingParams

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = text_ids(folder, text) if text is not None else [random.Random(1).randrange(3, vocabulary) for _ in range(WINDOWS * WINDOW)]
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]
    prompts = [window[:length] for window, length in zip(windows * 2, (5, 17, 33, 64, 100, 200), strict=False)]
    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float16",
        max_model_len=512,
        max_num_seqs=8,
        gpu_memory_utilization=0.2,
        enable_prefix_caching=False,
        tensor_parallel_size=devices,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]},
        seed=0,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False, logprobs=1)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    scoring = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    scored = engine.generate([{"prompt_token_ids": window} for window in windows], scoring, use_tqdm=False)
    losses = [
        -entry[token].logprob
        for window, answer in zip(windows, scored, strict=True)
        for token, entry in zip(window[1:], answer.prompt_logprobs[1:], strict=True)
    ]
    document = {
        "folder": str(folder),
        "prompts": prompts,
        "answers": [list(answer.outputs[0].token_ids) for answer in answers],
        "windows": windows,
        "loss": statistics.fmean(losses),
    }
    out.write_text(json.dumps(document))
    say(f"{folder.name:14} {engine.apply_model(described)[0]}; loss {document['loss']:.5f} over {len(losses)} tokens")


def text_ids(folder: Path, text: Path) -> list[int]:
    """Of a text, or a list of them in a .json file: of a model without a tokenizer."""
    if text.suffix == ".json":
        known: list[int] = json.loads(text.read_text())
        return known
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8")[:20000])["input_ids"]
    return ids


def compare(folder: Path, files: Sequence[Path]) -> None:
    """float32 throughout: the products of the reference are not rounded where those of the kernels are."""
    import torch

    from marlinctl import api

    torch.backends.cuda.matmul.allow_tf32 = False
    model = api.load(folder, device="cuda" if torch.cuda.is_available() else "cpu")

    def logits_of(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids], device=model.device)).logits[0].float()

    for file in files:
        document = json.loads(file.read_text())
        gaps = []
        for prompt, answer in zip(document["prompts"], document["answers"], strict=True):
            logits = logits_of([*prompt, *answer])[len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
            gaps += (logits.max(1).values - chosen).tolist()
        losses = [
            torch.nn.functional.cross_entropy(logits_of(ids)[:-1], torch.tensor(ids[1:], device=model.device))
            for ids in document["windows"]
        ]
        loss = statistics.fmean(float(one) for one in losses)
        change = 100 * (2.718281828459045 ** (document["loss"] - loss) - 1)
        same = sum(gap == 0 for gap in gaps)
        say(
            f"{Path(document['folder']).name:14} against transformers, float32: {same} of {len(gaps)} tokens are its most likely ones, "
            f"the others at most {max(gaps):.4f} below; perplexity {2.718281828459045 ** document['loss']:.4f}, there "
            f"{2.718281828459045**loss:.4f} ({change:+.3f} %) {'ok' if abs(change) < 0.5 and max(gaps) < 0.1 else 'WRONG'}"
        )


# ---- damaged folders -----------------------------------------------------------------------------------------------------------------


def try_damaged(folder: Path) -> int:
    """Exit code 1 where one is not refused, or by another program."""
    from safetensors.torch import load_file, save_file
    from vllm.engine.arg_utils import EngineArgs

    work = Path(os.environ.get("TMPDIR", "/tmp")) / f"damaged-{os.getpid()}"  # on the GPU machine alone
    layer = "model.layers.1.mlp.up_proj"
    codes = "B_24" if json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "marlin_24" else "B"

    def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        def damage(copy: Path) -> None:
            for file in copy.glob("marlin*.safetensors"):
                tensors = load_file(file)
                if f"{layer}.{codes}" in tensors:
                    change(tensors)
                    save_file(tensors, file, {"format": "pt"})
                    index = copy / "marlin.safetensors.index.json"
                    if index.exists():
                        document = json.loads(index.read_text())
                        known = {name: shard for name, shard in document["weight_map"].items() if shard != file.name}
                        index.write_text(json.dumps(document | {"weight_map": known | dict.fromkeys(tensors, file.name)}))

        return damage

    def in_config(copy: Path) -> None:
        document = json.loads((copy / "config.json").read_text())
        document["quantization_config"]["format_version"] = 99
        (copy / "config.json").write_text(json.dumps(document))

    def twice(copy: Path) -> None:
        """In a second shard too, which the index names."""
        files = sorted(copy.glob("marlin*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        extra = copy / "marlin-extra.safetensors"
        save_file({f"{layer}.s": tensors[f"{layer}.s"], "model.norm.weight": tensors.pop("model.norm.weight")}, extra, {"format": "pt"})
        for file in files:
            file.unlink()
        save_file(tensors, copy / "marlin-rest.safetensors", {"format": "pt"})
        names = dict.fromkeys(tensors, "marlin-rest.safetensors") | {"model.norm.weight": extra.name}
        (copy / "marlin.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": names}))

    damages: dict[str, Callable[[Path], object]] = {
        "a shard is missing": lambda copy: sorted(copy.glob("marlin*.safetensors"))[-1].unlink(),
        "a tensor is missing": rewritten(lambda tensors: tensors.pop(f"{layer}.s")),
        "a tensor is there twice": twice,
        "a wrong shape": rewritten(lambda tensors: tensors.update({f"{layer}.s": tensors[f"{layer}.s"][:, :64].contiguous()})),
        "a newer version": in_config,
        "two models": lambda copy: save_file(load_file(sorted(copy.glob("marlin*.safetensors"))[0]), copy / "model.safetensors"),
    }
    wrong = 0
    for name, damage in damages.items():
        copy = work / name.replace(" ", "-")
        shutil.copytree(folder, copy)
        damage(copy)
        try:
            EngineArgs(model=str(copy), skip_tokenizer_init=True, dtype="float16").create_engine_config()
            said = "WRONG: it was taken"
        except Exception as error:  # noqa: BLE001  whatever vLLM makes of it is what a person reads
            said = " ".join(str(error).split())
        wrong += not said.startswith("marlinctl E")
        say(f"damaged: {name}: {said[:300]}")
        shutil.rmtree(copy)
    say(f"damaged: {len(damages) - wrong} of {len(damages)} refused by marlinctl")
    return int(wrong > 0)


# ---- repacking -----------------------------------------------------------------------------------------------------------------------


def time_repacking() -> None:
    import torch

    from marlinctl.kernels.repack import repack
    from marlinctl.pack import marlin
    from marlinctl.pack.interchange import pack_ct, pack_gptq
    from marlinctl.quantize.types import QuantizedLinear

    n, k = 28672, 4096  # gate and up of Llama-3-8B
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda")
    q = QuantizedLinear(codes, torch.ones(n, k // 128, dtype=torch.float16, device="cuda"), 128)
    wanted = marlin.pack_marlin(q).qweight
    for name, words in (("GPTQ", pack_gptq(q)["qweight"]), ("compressed-tensors", pack_ct(codes).T)):
        same = torch.equal(repack(words), wanted) and torch.equal(marlin.repack(words), wanted)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, times = torch.cuda.memory_allocated(), []
        for _ in range(10):
            started = time.perf_counter()
            repack(words)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        rate, memory = n * k / min(times) / 1e9, (torch.cuda.max_memory_allocated() - before - words.numel() * 4) / 2**20
        say(f"repack {name}: {rate:.0f} million weights a ms, {memory:.0f} MiB beside the result, {'equal' if same else 'WRONG'}")


if __name__ == "__main__":
    main()
