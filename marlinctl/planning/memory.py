"""How much memory a run takes: before it, from names and shapes alone, and after it. Nothing here imports torch.

    anonymous memory = BASE + text as it is tokenized + hidden states of all tokens + one block as it is run + the largest of:
        collecting   a Gram matrix while chunks of tokens pass
        matching     the regression on the original's inputs, in double precision (recipe: drift_correction)
        factoring    H, its reordered copy, and the factorisation with its input, in the precision that its condition asks for
        sweeping     the rows of linears that share an input, as weights, stack, targets, codes and errors
        pruning      the same with the matrices of least squares

quantize/memory.py and sparsify/memory.py have the arrays of each; `_phases` adds them up. What the C library's heap keeps of freed arrays
is added, which decides for models with small matrices. A mapped file is not counted: the system takes its pages back when it needs them.
Text that the model writes itself (--calibration self) needs the whole model and its cache of keys and values, before the first block.

`predicted_peak` is what a run is held to before it starts (oneshot/open.py), what `plan` prints and what benchmarks/peak_memory.py compares
with the measured peak; docs/plan.md has the comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from marlinctl.data.calibration_size import CHARACTERS_PER_TOKEN, PIECE, SELF_BATCH
from marlinctl.models.architectures import Architecture, Block, Branch, Chain, LinearSpec
from marlinctl.quantize import memory as quantize
from marlinctl.quantize.damping import LEAST
from marlinctl.quantize.memory import Arrays
from marlinctl.quantize.scheme import Scheme
from marlinctl.recipes.schema import Distill, Recipe
from marlinctl.sparsify import memory as sparsify

CHUNK_TOKENS = 2048  # tokens in flight: enough for full speed of the matrix units, little enough for any memory
CHUNK_TOKENS_ON_DEVICE = 8192  # of a GPU: launches are expensive there, memory is not
QUEUED_BLOCKS = 8  # blocks of a GPU on their way to the disk, the one in work among them (oneshot/commits.py)
QUEUED_BYTES = 4 << 30  # of the device's memory that they hold; one block may be larger
EXPERTS_BYTES = 4 << 30  # of a GPU's memory that experts which are solved together may take: enough rows for all of an H200's units
LOGITS = 1 << 24  # of the chunk of tokens whose gradients go back through the output head: 100 tokens of a vocabulary of 150,000
SHARD_BYTES = 1 << 30  # finished tensors that `pack` keeps in memory before they become a shard

STORED = 2  # bytes of a weight in the checkpoint
BASE = 310 << 20  # python, torch and transformers before any tensor, and the threads' buffers
BASE_ON_DEVICE = 790 << 20  # CUDA context and libraries: what nvidia-smi counts beyond torch's own (H200, torch 2.11.0+cu130, driver 580)
_HEAP_BELOW = 32 << 20  # glibc takes smaller arrays from its heap, and keeps what is freed there (mallopt(3), M_MMAP_THRESHOLD)
_HOLES = 1.9  # what the heap grows to over what is alive in it: arrays of a dozen sizes leave holes
_KEPT = 1.1  # what it keeps of that for the phases after; both from seven synthetic models (docs/plan.md)
_TOKENIZER = 36 << 20  # 42 and 27 MiB with 49,152 and 151,665 entries (SmolLM2, Qwen2.5)
_TOKENIZING = 100  # bytes that a tokenizer needs for each character
_ROTATED_AT_ONCE = 4 * (128 << 20)  # checkpoint/rotated.py: a part before and after each factor
_BYTES_OF_LOGIT = 32  # logits, probabilities, their sums as integers, and gradients
_PACKING = 24  # bytes for each weight of a linear that is packed and read back


@dataclass(frozen=True, slots=True)
class Work:
    """What of a recipe and of its settings decides the memory of the run over the blocks."""

    samples: int
    length: int  # tokens of a sample
    element: int  # bytes of an activation
    damping: float  # the smallest that a linear may have: it decides the precision of the factorisation
    corrects_drift: bool  # drift from the reference model is corrected
    refines: bool
    scheme: Scheme
    writes_text: bool  # --calibration self
    on_device: bool
    ranks: int = 1  # processes that share samples and rows; memory is that of each
    tunes: bool = False  # scales and norms of a block, after its solves
    rotates: bool = False  # if the model can be rotated
    weighs_tokens: bool = False  # by gradients, before the first block

    @property
    def own_samples(self) -> int:
        """Of the rank that has most."""
        return -(-self.samples // self.ranks)

    def own_rows(self, rows: int) -> int:
        """Of a solve, in the rank that has most."""
        return -(-rows // self.ranks)

    @classmethod
    def of(cls, recipe: Recipe, *, element: int, corrects_drift: bool, on_device: bool, ranks: int = 1) -> Work:
        asked = recipe.calibration
        return cls(
            samples=asked.samples,
            length=asked.sequence_length,
            element=element,
            damping=recipe.quantize.fixed_damping or LEAST,
            corrects_drift=corrects_drift,
            refines=recipe.quantize.refine > 0,
            scheme=recipe.scheme,
            writes_text=asked.source == "self",
            on_device=on_device,
            ranks=ranks,
            tunes=recipe.tunes,
            rotates=recipe.quantize.rotate != "never" and recipe.scheme.quantizes and not recipe.scheme.prunes,
            weighs_tokens=recipe.weighs_tokens,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """Linears that share an input and are solved together."""

    k: int
    rows: int  # of those that are compressed
    other_rows: int  # of those that stay as they are
    groups: int  # of a row, at the smallest group size
    experts: int = 1  # of a block, each of which has such a stage; a GPU solves several together
    share: float = 1.0  # of the tokens, that one expert sees


def predicted_peak(architecture: Architecture, compressed: Mapping[str, int], work: Work) -> int:
    """Anonymous host memory of a run at its peak, in bytes; of several ranks, that of each. compressed: linear -> group size."""
    hidden, base = _hidden_states(architecture, work) + _text(work), BASE + _tokenizer(architecture)
    weights = token_weights_bytes(architecture, work) // work.samples * work.own_samples
    if work.on_device:  # weights pass through on their way to the device, results on their way back
        stage = max(8 * (s.rows + s.other_rows) * s.k for s in stages(architecture, compressed))
        return base + _BASE_OF_CUDA + max(hidden + weights + stage, _rotating(architecture, work))
    walking = _block_bytes(architecture, work) + max(_solving(architecture, compressed, work), _tuning(architecture, work))
    running = hidden + weights + max(walking, _gradients(architecture, work))
    return base + max(running, _writing(architecture, work), _rotating(architecture, work))


def _rotating(architecture: Architecture, work: Work) -> int:
    """The embedding or the head, whichever is read or written: as it is stored, as it is rotated, and a part in double precision."""
    return 2 * STORED * architecture.vocab_size * architecture.hidden_size + _ROTATED_AT_ONCE if work.rotates else 0


def predicted_device_peak(architecture: Architecture, compressed: Mapping[str, int], work: Work) -> int:
    """Memory of the CUDA device at the peak, in bytes, without the activations that stay there when there is room (system/offload.py).
    Each rank has a device of its own."""
    beside = _read_ahead(architecture) + _queued(architecture, compressed, work)
    running = _block_bytes(architecture, work) + max(_solving(architecture, compressed, work), _tuning(architecture, work)) + beside
    return BASE_ON_DEVICE + max(running, _read_ahead(architecture) + _gradients(architecture, work), _writing(architecture, work))


def _read_ahead(architecture: Architecture) -> int:
    """Weights on the device that a thread has read: what is left of this block, and all of the next (oneshot/reading.py)."""
    sizes = sorted(sum(spec.out_features * spec.in_features for spec in block.linears.values()) for block in architecture.blocks)
    return STORED * sum(sizes[-2:])


def _queued(architecture: Architecture, compressed: Mapping[str, int], work: Work) -> int:
    """Results on the device: those of this block, and of finished ones where the disk is slow, with a copy of the hidden states
    (oneshot/commits.py)."""
    block = max(sum(_result_bytes(spec, compressed, work) for spec in block.linears.values()) for block in architecture.blocks)
    finished, states = min(len(architecture.blocks) - 1, QUEUED_BLOCKS), _hidden_states(architecture, work)
    return block + (min(finished * block + states, max(QUEUED_BYTES, block + states)) if finished else 0)


def _result_bytes(spec: LinearSpec, compressed: Mapping[str, int], work: Work) -> int:
    """Codes as int8 and scales as float16, or the pruned weight; and the mask, a byte for each weight."""
    if spec.name not in compressed:
        return 0
    weights, size = spec.out_features * spec.in_features, compressed[spec.name]
    scales = 2 * spec.out_features * (1 if size == -1 else spec.in_features // size)
    return (weights + scales if work.scheme.quantizes else STORED * weights) + (weights if work.scheme.prunes else 0)


_BASE_OF_CUDA = 1 << 30  # what the CUDA libraries take of host memory; with it, three runs on an H200 were planned 5 to 13 % too high


def experts_together(architecture: Architecture, compressed: Mapping[str, int], work: Work) -> int:
    """How many experts of a block are solved together, over all ranks. A CPU solves one after another."""
    found = [stage for stage in stages(architecture, compressed) if stage.experts > 1]
    if not work.on_device or not found:
        return 1
    largest = max(_size(phase) for stage in found for phase in _phases_of_solve(architecture, stage, work))
    return max(1, min(EXPERTS_BYTES // max(largest, 1), *(stage.experts for stage in found)))


def stages(architecture: Architecture, compressed: Mapping[str, int]) -> set[Stage]:
    """The different solves of a run."""
    found = {stage for block in architecture.blocks for stage in stages_of_block(block, compressed)}
    if architecture.head is not None and architecture.head.name in compressed:
        found.add(stage_of([architecture.head], compressed))
    return found


def stages_of_block(block: Block, compressed: Mapping[str, int]) -> Counter[Stage]:
    """The solves of one block, and how many of each; experts are taken to be alike."""
    found: Counter[Stage] = Counter()
    for linears, experts in block.stages():
        if experts is None:
            found[stage_of(linears, compressed)] += 1
        else:
            found[stage_of(linears, compressed, experts.count, experts.top_k / experts.count)] += experts.count
    return found


def stage_of(linears: Sequence[LinearSpec], compressed: Mapping[str, int], experts: int = 1, share: float = 1.0) -> Stage:
    """The solve of linears that share an input. experts: how many such stages the block has, one for each expert. share: of the tokens,
    that one expert sees."""
    rows = sum(spec.out_features for spec in linears if spec.name in compressed)
    k = linears[0].in_features
    sizes = [compressed[spec.name] for spec in linears if spec.name in compressed]
    groups = max((1 if size == -1 else k // size for size in sizes), default=0)
    return Stage(k, rows, sum(spec.out_features for spec in linears) - rows, groups, experts, share)


def _hidden_states(architecture: Architecture, work: Work) -> int:
    """With what blocks leave for later ones, of which there is a copy while a block is kept."""
    width = architecture.hidden_size + architecture.shared_values
    return work.own_samples * work.length * width * work.element * (2 if work.corrects_drift else 1)


def _tokenizer(architecture: Architecture) -> int:
    return min(_TOKENIZER, 800 * architecture.vocab_size)


def _text(work: Work) -> int:
    """What the tokenizer took: the heap keeps it."""
    return 0 if work.writes_text else _TOKENIZING * min(CHARACTERS_PER_TOKEN * work.samples * work.length, PIECE)


def _block_bytes(architecture: Architecture, work: Work) -> int:
    """The weights of the largest block as the forward pass holds them. Experts are read a few at a time and stay nowhere, but for those of
    the reference model."""
    sizes = []
    for block in architecture.blocks:
        specs = [spec for linears, experts in block.stages() if experts is None for spec in linears]
        if work.corrects_drift:
            specs = list(block.linears.values())
        sizes.append(sum(spec.out_features * spec.in_features for spec in specs))
    return max(sizes) * work.element


def _solving(architecture: Architecture, compressed: Mapping[str, int], work: Work) -> int:
    """The fullest phase of all stages; on the host, with what the heap keeps of the others."""
    many = experts_together(architecture, compressed, work)
    phases = [phase for stage in stages(architecture, compressed) for phase in _phases(architecture, stage, work, min(many, stage.experts))]
    if work.on_device:
        return max(map(_size, phases))
    heap = [sum(count * size for count, size in phase if size < _HEAP_BELOW) for phase in phases]
    mapped = [sum(count * size for count, size in phase if size >= _HEAP_BELOW) for phase in phases]
    together = max(_HOLES * below + above for below, above in zip(heap, mapped, strict=True))
    return int(max(together, _KEPT * max(heap) + max(mapped)))


def _tuning(architecture: Architecture, work: Work) -> int:
    """oneshot/tuning.py: the weights of a block once more as codes, as weights, and as gradients, and the activations of a chunk with their
    gradients."""
    if not work.tunes:
        return 0
    tokens = max(CHUNK_TOKENS_ON_DEVICE if work.on_device else CHUNK_TOKENS, work.length)
    widths = max(sum(spec.out_features + spec.in_features for spec in block.linears.values()) for block in architecture.blocks)
    return 3 * _block_bytes(architecture, work) + 3 * tokens * widths * work.element


def _gradients(architecture: Architecture, work: Work) -> int:
    """oneshot/gradients.py: a block and the activations of a chunk with their gradients; or the output head and a chunk of logits."""
    if not work.weighs_tokens:
        return 0
    tokens = max(CHUNK_TOKENS_ON_DEVICE if work.on_device else CHUNK_TOKENS, work.length)
    widths = max(sum(spec.out_features + spec.in_features for spec in block.linears.values()) for block in architecture.blocks)
    block = _block_bytes(architecture, work) + 3 * tokens * widths * work.element
    head = architecture.vocab_size * architecture.hidden_size * work.element + _BYTES_OF_LOGIT * max(LOGITS, architecture.vocab_size)
    return max(block, head)


def token_weights_bytes(architecture: Architecture, work: Work) -> int:
    """Of all samples: a float32 number for each stage outside of experts, in memory and with the job."""
    if not work.weighs_tokens:
        return 0
    return 4 * work.samples * work.length * sum(experts is None for block in architecture.blocks for _, experts in block.stages())


def _phases(architecture: Architecture, stage: Stage, work: Work, together: int) -> Iterator[Arrays]:
    """The arrays that are alive in each phase of one stage, or of `together` experts with such a stage."""
    k, tokens = stage.k, max(CHUNK_TOKENS_ON_DEVICE if work.on_device else CHUNK_TOKENS, work.length)
    # oneshot/gram.py: activations of a chunk as they are beside the sums; then H as a whole
    widest = max(k, *(spec.out_features for spec in architecture.blocks[0].linears.values()))
    held, drift = _held(architecture, stage, work), work.corrects_drift
    others = [((2 if drift else 1) * (together - 1), 4 * k * k)] if together > 1 else []  # sums of the other experts
    yield [*held, *others, *quantize.gram(k, tokens, drift=drift), (4, tokens * widest * work.element)]
    yield [*held, *others, *quantize.mirror(k)]
    for phase in _phases_of_solve(architecture, stage, work):
        yield [(together * count, size) for count, size in phase]


def _held(architecture: Architecture, stage: Stage, work: Work) -> Arrays:
    """What is there in every phase of a stage."""
    k, rows = stage.k, _own_rows(stage, work)
    # Weights that pass through the solve untouched, or come out of other ranks' solves, as weights and codes.
    held = [(1, 4 * stage.other_rows * k), (1, 5 * (stage.rows - rows) * k)]
    if work.on_device:
        held += quantize.split(rows, k)
    if work.corrects_drift:  # E[(x' - x) xᵀ], E[(r' - r) xᵀ] and the stack before it was matched
        held += [(1, 4 * k * k), (1, 4 * k * architecture.hidden_size), (1, 4 * rows * k)]
    return held


def _own_rows(stage: Stage, work: Work) -> int:
    """Of the rank that has most. On GPUs ranks share the experts of a batch and not their rows, and each is counted with all of them."""
    return stage.rows if stage.experts > 1 and work.on_device else work.own_rows(stage.rows)


def _phases_of_solve(architecture: Architecture, stage: Stage, work: Work) -> Iterator[Arrays]:
    k, rows = stage.k, _own_rows(stage, work)
    if not rows:
        return
    held = _held(architecture, stage, work)
    if stage.experts > 1 and work.on_device:
        held.append((1, 4 * k * k))  # H of each expert, beside the stack of them
    if work.corrects_drift:
        yield [*held, *quantize.corrected_target(rows, k)]
    yield [*held, *quantize.factor(rows, k, work.damping)]
    pruned = sparsify.pruned(rows, k) if work.scheme.prunes else []
    if work.scheme.quantizes:
        yield [*held, *pruned, *quantize.solve(rows, k)]
        if work.refines:
            yield [*held, *pruned, *quantize.descend(rows, k)]
            yield [*held, *pruned, *quantize.refit_scales(rows, k, stage.groups)]
    if work.scheme.prunes:
        yield [*held, *sparsify.prune(rows, k)]


def _size(arrays: Arrays) -> int:
    return sum(count * size for count, size in arrays)


def _writing(architecture: Architecture, work: Work) -> int:
    """The whole model, the keys and values of the samples that it writes together, and their last logits."""
    if not work.writes_text:
        return 0
    attention = [block.linears[block.linear(name)] for block in architecture.blocks for name in _cached(block)]
    together = min(SELF_BATCH, work.samples)
    cache = together * work.length * sum(spec.out_features for spec in attention) * work.element
    return parameters(architecture) * work.element + int(_HOLES * cache) + together * architecture.vocab_size * 12  # it grows by the token


def _cached(block: Block) -> list[str]:
    """Linears whose outputs, or what becomes of them, a block keeps for each token: keys and values. Of a chain all but the last."""
    part = block.parts[0] if block.parts else None
    if isinstance(part, Chain):
        return [name for stage in part.stages[:-1] for name in stage]
    return list(part.first[1:]) if isinstance(part, Branch) else []


def predicted_repack(linears: Sequence[int], outputs: Sequence[int]) -> int:
    """Anonymous memory of packing: finished tensors up to a shard's worth, and one linear as codes, words and tiles.

    linears: weights of each. outputs: bytes of all linears in each format.
    """
    pending = min(sum(outputs), SHARD_BYTES)
    return BASE + pending + _PACKING * max(linears)


def parameters(architecture: Architecture) -> int:
    return sum(prod(shape) for shape in architecture.expected.values())


# ---- distillation --------------------------------------------------------------------------------------------------------------------


def predicted_distillation(architecture: Architecture, asked: Distill) -> int:
    """Memory that training needs besides activations, in bytes (the table of docs/distill.md).

    Trained weights are float32 with gradient and two moments, and one byte of mask; everything else of the student is float32, the
    teacher 2 bytes a weight. Mode scales is largest while it reads the model.
    """
    everything = parameters(architecture)
    if asked.mode == "scales":
        return 6 * everything
    if asked.mode == "blockwise":
        return 19 * max(sum(s.out_features * s.in_features for s in block.linears.values()) for block in architecture.blocks)
    trained = trained_weights(architecture)
    return 17 * trained + 4 * (everything - trained) + (0 if asked.cache_logits else 2 * everything)


def trained_weights(architecture: Architecture) -> int:
    return sum(spec.out_features * spec.in_features for spec in architecture.linears.values())
