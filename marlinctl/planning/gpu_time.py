"""How long a run on a GPU takes, phase by phase: what each phase does is counted, and each count has a rate.

    phase of the report (oneshot/run.py)   counts
    start                                  imports
    text                                   the tokenizer and the text
    look at the model                      SHA-256 of the model's files, as far as it takes longer than the text beside it
    probe                                  the largest solve, and the libraries' first calls
    token weights                          products there and back, logits, bytes of activations, chunks, the model's weights twice
    embed                                  the embedding of all tokens
    forward and Gram                       products, Gram matrices, bytes of activations, chunks, experts, activations in host memory
    read                                   bytes of weights on their way to the GPU
    solve                                  factorisations, products, steps of the sweeps, passes over weights, solves
    tune                                   products of passes in both directions, steps
    wait for the disk                      what the thread that writes is behind when the last block is done
    copy                                   bytes of the source that are copied as they are, as far as it takes longer than the blocks
                                           beside it
    check                                  linears, weights that are unpacked, bytes that are hashed
    between ranks                          bytes of Gram matrices and rows through the link; of several ranks, and no phase of the report
    the rest                               of the process, in no phase: the start of python, reports, publishing

A term is counted wherever its work is done, so an estimate is linear in the rates but for work beside other work, and a few reports
give all rates (benchmarks/plan_rates.py). Rates are of one NVIDIA H200 and its machine, set by hand so that the runs of
docs/log/2026-11-30-compression-speed.md come out: three shapes, three recipes. Fitted rates come closer and mean less, because runs of so
few shapes cannot tell products from Gram matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from marlinctl.models.architectures import Architecture, Block, Chain, Experts
from marlinctl.planning.disk import entering_bytes, resident_bytes
from marlinctl.planning.memory import (
    CHUNK_TOKENS_ON_DEVICE,
    LOGITS,
    STORED,
    Stage,
    Work,
    experts_together,
    parameters,
    predicted_device_peak,
    stage_of,
    stages,
    stages_of_block,
)
from marlinctl.recipes.schema import Recipe

# Seconds for one unit of each term.
RATES: Mapping[str, float] = MappingProxyType(
    {
        "start": 1.8,  # once
        "text": 7.5,  # once, imports of transformers among it
        "the rest": 4.0,  # once
        "digest": 1 / 3.2e9,  # byte of the model's files
        "probe": 0.85,  # once, beside the solve itself
        "embed": 0.4,  # once
        "forward": 1 / 7.5e14,  # operation of linears and attention, in bfloat16
        "gram": 1 / 5.8e14,  # operation of Gram and cross matrices
        "activations": 1 / 3.6e11,  # byte of inputs and outputs of linears and of the stream; each is passed over many times
        "chunk": 9e-4,  # chunk of tokens through a block: launches
        "tuning": 1 / 3.4e14,  # operation of linears while a block is tuned, in both directions; weights are made of codes in each step
        "tuning step": 5e-3,  # step of the tuning of a block: launches
        "expert": 6e-3,  # expert of a block: some hundred launches that gather its tokens and sum its matrices
        "read": 1 / 2e11,  # byte of weights, read ahead: what is waited for
        "factor columns": 5e-7,  # column of a factorisation
        "factor": 1 / 4e13,  # operation of a factorisation, K³/3
        "panels": 1 / 4e13,  # operation of products with panels of 128 columns, within sweeps
        "products": 1 / 1.7e14,  # operation of products with whole matrices, float32 as three of TF32
        "correction": 1 / 4.2e13,  # operation of the regression of drift correction, float64
        "columns": 4.4e-7,  # column of a sweep
        "weights": 1 / 3.2e9,  # weight in a solve: stacked, split, searched, rounded, put in order
        "iterations": 1e-11,  # weight in an iteration of least squares
        "groups": 5e-5,  # group of columns in a re-fit of scales
        "solve": 3.5e-3,  # solve: launches, and questions that wait for the device
        "link": 1 / 100e9,  # byte between GPUs of one host: a guess, never measured
        "page-locked": 1 / 2.7e9,  # byte of activations that host memory holds: taken once
        "released": 1 / 8e9,  # byte of the same, when the process ends
        "to the host": 1 / 1.8e11,  # byte of activations between host and GPU; the link takes 55 GB/s, most of it beside products
        "write": 1 / 1e9,  # byte of a result, digest and all
        "copy": 1 / 9.2e8,  # byte that is copied as it is
        "linear": 2e-3,  # linear that is read back
        "unpack": 1 / 7.5e9,  # weight that is read back and unpacked
        "hash": 1 / 1.5e9,  # byte of the result
    }
)

Terms = defaultdict[str, float]  # term -> units
Counts = dict[str, Terms]  # by phase
_GRAM_PANEL = 2048  # columns (quantize/hessian.py)
_SLOTS = 6  # times that the residual stream is read or written in a block, by norms and sums


@dataclass(frozen=True, slots=True)
class Gpu:
    """The rates of one GPU."""

    title: str
    seconds: Mapping[str, float]  # for one unit of each term
    solves: float = 1.0  # seconds that a solve took, over seconds that were counted for it


H200 = Gpu("an NVIDIA H200", RATES)


def with_probe(gpu: Gpu, title: str, *, forward: float, gram: float, solves: float) -> Gpu:
    """With what a probe has shown: operations a second, and the time of a solve over what was counted for it."""
    return replace(gpu, title=title, seconds={**gpu.seconds, "forward": 1 / forward, "gram": 1 / gram}, solves=solves)


def seconds_of_phases(counted: Counts, gpu: Gpu) -> dict[str, float]:
    """Seconds of each phase. What a thread does is waited for where it takes longer than the work beside it."""
    seconds = {phase: sum(units * gpu.seconds[term] for term, units in terms.items()) for phase, terms in counted.items()}
    first_calls = counted["probe"]["probe"] * gpu.seconds["probe"]
    seconds["probe"] = first_calls + gpu.solves * (seconds["probe"] - first_calls)
    seconds["solve"] *= gpu.solves
    blocks = sum(seconds[phase] for phase in ("forward and Gram", "read", "solve"))
    for phase, beside in (("look at the model", seconds["text"]), ("wait for the disk", blocks), ("copy", blocks)):
        seconds[phase] = max(0.0, seconds[phase] - beside)
    return {phase: value for phase, value in seconds.items() if value}


def seconds_of_solve(stage: Stage, recipe: Recipe, gpu: Gpu, *, corrects_drift: bool) -> float:
    """All rows of it."""
    return gpu.solves * sum(units * gpu.seconds[term] for term, units in _solve(stage, recipe, corrects_drift, stage.rows).items())


def counts(
    architecture: Architecture,
    compressed: Mapping[str, int],
    work: Work,
    recipe: Recipe,
    model_bytes: int,
    device_memory: int | None = None,
) -> Counts:
    """What one pass over the blocks does, in the rank that has most to do. compressed: linear -> group size. device_memory: bytes of the
    GPU that the run may take; None where all activations stay there.
    """
    found: Counts = {phase: defaultdict(float) for phase in _PHASES}
    for phase in ("start", "text", "probe", "embed", "the rest"):
        found[phase][phase] = 1
    found["look at the model"]["digest"] = model_bytes
    largest = max(
        stages(architecture, compressed), key=lambda s: (seconds_of_solve(s, recipe, H200, corrects_drift=work.corrects_drift), s.k)
    )
    found["probe"].update(_solve(largest, recipe, work.corrects_drift, largest.rows))
    together = experts_together(architecture, compressed, work)
    for block in architecture.blocks:
        _add_block(found, architecture, block, compressed, work, recipe, together)
    if architecture.head is not None and architecture.head.name in compressed:
        stage = stage_of([architecture.head], compressed)
        _add_stage(found, stage, 1, work.own_samples * work.length, architecture.hidden_size, work, recipe, together)
        found["read"]["read"] += STORED * stage.rows * stage.k
    every = [*architecture.linears.values(), *([architecture.head] if architecture.head is not None else [])]
    solved = [(spec.out_features, spec.in_features, compressed[spec.name]) for spec in every if spec.name in compressed]
    weights = sum(n * k for n, k, _ in solved)
    scales = sum(2 * n * (1 if size == -1 else k // size) for n, k, size in solved)
    result = round(weights * (recipe.scheme.bits + recipe.scheme.prunes) / 8) + (scales if recipe.scheme.quantizes else 0)
    untouched = max(0, model_bytes - round(model_bytes * weights / parameters(architecture)))
    found["wait for the disk"]["write"] = result
    found["copy"]["copy"] = untouched
    found["check"].update(linear=len(solved), unpack=weights, hash=result + untouched)
    if work.weighs_tokens:
        _add_gradients(found["token weights"], architecture, work)
    if device_memory is not None:
        working = predicted_device_peak(architecture, compressed, work)
        if work.weighs_tokens:
            entering = max(0, entering_bytes(architecture, work) // work.ranks + working - device_memory)
            found["token weights"].update({"page-locked": entering, "to the host": 2 * entering})
        needed = resident_bytes(architecture, replace(work, weighs_tokens=False)) + working
        elsewhere = max(0, needed - device_memory)
        found["forward and Gram"]["page-locked"] += elsewhere
        found["the rest"]["released"] += elsewhere
        found["forward and Gram"]["to the host"] += 2 * elsewhere * len(architecture.blocks)
    return found


BESIDE = ("look at the model", "wait for the disk", "copy")  # phases that wait for what a thread does beside others
_PHASES = (
    *(
        "start",
        "text",
        "look at the model",
        "probe",
        "token weights",
        "embed",
        "forward and Gram",
        "read",
        "solve",
        "tune",
        "wait for the disk",
        "copy",
        "check",
    ),
    *("between ranks", "the rest"),
)


def _add_block(
    found: Counts, architecture: Architecture, block: Block, compressed: Mapping[str, int], work: Work, recipe: Recipe, together: int
) -> None:
    tokens, hidden = work.own_samples * work.length, architecture.hidden_size
    passes = 2 if work.corrects_drift else 1  # the reference model's beside the compressed one's
    forward = found["forward and Gram"]
    for stage, count in stages_of_block(block, compressed).items():
        _add_stage(found, stage, count, tokens * stage.share, hidden, work, recipe, together)
    for experts in block.experts:
        forward["gram"] += gram_operations(hidden) * tokens  # of the layer, which experts with few tokens borrow from
        forward["expert"] += experts.count
    attention = block.parts[0] if block.parts else None  # or what stands in its place
    first = None if attention is None or isinstance(attention, Experts) else block.linear(attention.stages[0][0])
    queries = 0 if first is None else block.linears[first].out_features
    runs = len(attention.stages) if isinstance(attention, Chain) else 1  # of the compressed model's
    forward["forward"] += (passes - 1 + runs) * 2 * work.length * queries * tokens  # scores and values, half of them masked
    forward["activations"] += passes * _SLOTS * hidden * tokens * work.element
    if work.tunes and block.in_one_pass:
        found["tune"]["tuning"] += operations_of_tuning(block, recipe, CHUNK_TOKENS_ON_DEVICE)
        found["tune"]["tuning step"] += recipe.quantize.tune_steps
    forward["chunk"] += passes * -(-work.own_samples // max(1, CHUNK_TOKENS_ON_DEVICE // work.length))
    read = STORED * sum(spec.out_features * spec.in_features for spec in block.linears.values())
    found["read"]["read"] += read
    if work.corrects_drift:
        forward["read"] += read  # for the reference model, within this phase


def _add_gradients(found: Terms, architecture: Architecture, work: Work) -> None:
    """oneshot/gradients.py: each block forward, forward again and back, the head there and back. The rates are those of the other
    phases: an H200 took 4.6 s for Qwen2.5-Coder-0.5B with 128 x 512 tokens, start of the phase included; nothing larger was measured."""
    tokens, hidden = work.own_samples * work.length, architecture.hidden_size
    linears = architecture.linears.values()
    weights = sum(spec.out_features * spec.in_features for spec in linears)
    logits = tokens * architecture.vocab_size
    found["embed"] = 1
    found["forward"] = 3 * 2 * weights * tokens + 4 * logits * hidden
    found["activations"] = work.element * tokens * 3 * sum(spec.out_features + spec.in_features for spec in linears) + 16 * logits
    chunks = -(-work.own_samples // max(1, CHUNK_TOKENS_ON_DEVICE // work.length))
    found["chunk"] = 3 * chunks * len(architecture.blocks) + logits / LOGITS
    found["read"] = STORED * (2 * weights + architecture.vocab_size * hidden)


def _add_stage(found: Counts, stage: Stage, count: int, tokens: float, hidden: int, work: Work, recipe: Recipe, together: int) -> None:
    """count: how many such stages the block has. tokens: that each of them sees. together: experts that are solved at once."""
    forward, k, rows = found["forward and Gram"], stage.k, stage.rows + stage.other_rows
    drift = work.corrects_drift
    experts = stage.experts > 1
    into_stream = drift and rows == hidden and not experts  # where its output is added to the residual stream, that is corrected too
    # The reference model's pass, and what experts make of its inputs.
    forward["forward"] += count * tokens * 2 * rows * k * (1 if not drift else 3 if experts else 2)
    # A cross matrix is full, where a Gram matrix is half; the residual, which is float32, is multiplied as two of bfloat16.
    forward["gram"] += count * tokens * (gram_operations(k) + (2 * k * k if drift else 0) + (2 * 2 * k * hidden if into_stream else 0))
    forward["activations"] += count * tokens * work.element * ((k + rows) * (2 if drift else 1) + (2 * k if drift else 0))
    batches = -(-count // min(together, count))
    own = work.own_rows(stage.rows)
    for term, units in _solve(stage, recipe, drift, own).items():
        found["solve"][term] += (batches if term in _ONCE_A_BATCH else count) * units
    if work.ranks > 1 and stage.rows:
        ring = (work.ranks - 1) / work.ranks
        sums = 4 * k * k * (2 if drift else 1) + (4 * k * hidden if into_stream else 0)
        result = 1 if recipe.scheme.quantizes else 4
        gathered = stage.rows * k * (result + (1 if recipe.scheme.prunes else 0))
        found["between ranks"]["link"] += count * ring * (2 * sums + gathered)


def operations_of_tuning(block: Block, recipe: Recipe, chunk: int) -> float:
    """Of all steps for a block, each a chunk of so many tokens through it and back, and eight chunks to judge."""
    weights = sum(spec.out_features * spec.in_features for spec in block.linears.values())
    return 2.0 * weights * chunk * (3 * recipe.quantize.tune_steps + 8)


_ONCE_A_BATCH = ("solve", "factor columns", "columns", "groups")  # what experts that are solved together wait for only once


def gram_operations(k: int) -> float:
    """Operations for a token: panels on and below the diagonal."""
    panels = max(1, -(-k // _GRAM_PANEL))
    return 2 * k * k * (panels + 1) / (2 * panels)


def _solve(stage: Stage, recipe: Recipe, corrects_drift: bool, rows: int) -> Terms:
    """One solve. rows: those of this rank, which makes the factorisations itself."""
    k = stage.k
    found: Terms = defaultdict(float)
    if not rows:
        return found
    half, full, factor = rows * k * k, 2 * rows * k * k, k**3 / 3
    quantizes, prunes = recipe.scheme.quantizes, recipe.scheme.prunes
    found["solve"] = 1
    if corrects_drift:  # W driftᵀ, a factorisation, two triangular solves
        found["correction"] += 2 * full + factor
        found["factor columns"] += k
        found["weights"] += rows * k
    if prunes:
        iterative = recipe.sparsify.method == "iterative"
        sweeps, iterations = (recipe.sparsify.mask_sweeps, recipe.sparsify.ls_iterations) if iterative else (0, 0)
        found["factor"] += factor
        found["factor columns"] += k
        found["panels"] += half + sweeps * full  # a sweep over the mask asks all columns, not those before
        found["columns"] += k * (1 + sweeps)
        found["products"] += 2 * full + (full * (iterations + 1) if iterative else 0)  # two errors, the residual, the iterations
        found["weights"] += rows * k * (1 + sweeps)
        found["iterations"] += rows * k * iterations
    if quantizes:
        refine = recipe.quantize.refine
        found["factor"] += factor
        found["factor columns"] += k
        found["panels"] += half * (1 + 2 * refine)
        found["columns"] += k * (1 + 2 * refine)
        found["products"] += full * (2 + refine * 4)  # two errors; two descents, both sides of a re-fit
        found["weights"] += rows * k * (1 + refine)
        found["groups"] += stage.groups * refine
    return found
