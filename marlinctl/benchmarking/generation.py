"""A packed model writes text, and so does the same model in 16 bits: the time to the first token, and of each after it.

    folder ─► transformers, packed linears ─► prompt, then one token at a time ─┐
                    │                                                           ├─► milliseconds, speed-up, whether they write the same
                    └─► each packed linear decoded to 16 bits, in place ─► again ┘

Prompt and step are CUDA graphs over a cache of fixed size: a model of 32 blocks launches a thousand kernels for a token, and without graphs
what is measured is Python. Both models are measured in the same way, one after the other, because both together may not fit.
Prompts are random tokens, and writing is greedy.

With `fused` linears that read the same activations are one (serve/fusing.py), of the packed model alone: what it is compared with is
transformers' own. With `compiled` the step goes through torch.compile first, whose Triton kernels take the place of the many small ones
between the linears. The prompt does not: it is read once, and compiling takes a minute for each shape.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from marlinctl.errors import BadInput, UsageError
from marlinctl.serve.fusing import fuse_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from marlinctl.system.console import Console

REPEATS = 5  # of a whole text; the first one warms up and is not counted
DEFAULT_BATCHES = (1, 16)


class Device(Protocol):
    """What is needed of the machine; gpu.py has the one of CUDA."""

    device: torch.device
    name: str

    def record(self, call: Callable[[int], object], calls: int) -> Callable[[], None]: ...
    def microseconds(self, run: Callable[[], object]) -> float: ...
    def generator(self, seed: int) -> torch.Generator: ...
    def free(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt, and tokens written after it."""

    prompt: int
    new: int


DEFAULT_LENGTHS = (Lengths(64, 64),)


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians. `first` is the whole prompt, until its first token is there; `token` is each one after it, the mean over a text."""

    first: float  # milliseconds
    token: float  # milliseconds


@dataclass(frozen=True, slots=True)
class Case:
    batch: int
    prompt: int
    new: int
    packed: Timed
    dense: Timed
    agreement: float  # share of positions at which both write the same token, until each text's first difference

    @property
    def speedup(self) -> float:
        return self.dense.token / self.packed.token


def parse_lengths(text: str) -> tuple[Lengths, ...]:
    """`64:64,1024:128`: prompt and new tokens of each case. UsageError E202 for anything else."""
    found = []
    for part in text.split(","):
        prompt, _, new = part.partition(":")
        if not (prompt.isdecimal() and new.isdecimal() and int(prompt) >= 1 and int(new) >= 2):
            raise UsageError(
                "E246", f"{part!r} is not a prompt length and number of new tokens", where="--lengths", fix="such as 64:64,1024:128"
            )
        found.append(Lengths(int(prompt), int(new)))
    return tuple(found)


def run(
    folder: Path,
    gpu: Device,
    batches: Sequence[int],
    lengths: Sequence[Lengths],
    dtype: torch.dtype,
    console: Console,
    *,
    compiled: bool = False,
    fused: bool = False,
) -> dict[str, Any]:
    """The document of one model: every batch size times every pair of lengths, packed and dense."""
    model = load_packed(folder, gpu.device, dtype)
    if fused:
        console.say(f"{fuse_linears(model)} groups of linears fused; the same in 16 bits are not")
    packed_bytes = weight_bytes(model)
    asked = [(batch, length) for batch in batches for length in lengths]
    _refuse_long(model, lengths)
    with torch.inference_mode(), console.progress("write", 2 * len(asked)) as progress:
        packed = []
        for case in asked:
            packed.append(_write(model, gpu, *case, compiled))
            progress.advance(note=_line("packed", case, packed[-1][0]))
        unpack_linears(model, dtype)
        gpu.free()
        dense_bytes = weight_bytes(model)
        cases = []
        for case, (timed, tokens) in zip(asked, packed, strict=True):
            baseline, theirs = _write(model, gpu, *case, compiled)
            progress.advance(note=_line(str(dtype).removeprefix("torch."), case, baseline))
            batch, length = case
            cases.append(Case(batch, length.prompt, length.new, timed, baseline, agreement(tokens, theirs)))
    return {
        "kind": "generation",
        "generation_version": 1,
        "model": str(folder),
        "gpu": gpu.name,
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "fused": fused,
        "bytes": {"packed": packed_bytes, "dense": dense_bytes},
        "cases": [{**asdict(case), "speedup": case.speedup} for case in cases],
    }


def load_packed(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A native folder, its linears packed. BadInput E313 for any other folder."""
    from transformers import AutoModelForCausalLM

    from marlinctl.checkpoint.folder import open_folder
    from marlinctl.models.transformers_config import transformers_config

    with open_folder(folder) as examined:
        config = transformers_config(examined.checkpoint.config, folder, quantized=True)
    if not examined.info.format.native:
        raise BadInput(
            "E313",
            "this folder has no packed linears: it is not in the format marlin or marlin_24",
            where=str(folder),
            fix=f"pack it first: `marlinctl pack {folder} OUT --format marlin`",
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, device_map={"": str(device)}, local_files_only=True
    )
    return model.eval()


def unpack_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Every packed linear becomes an nn.Linear with the weight that it stands for, rounded to `dtype`; one at a time. Returns how many."""
    from marlinctl.kernels.linear import LinearPart, MarlinLinear, SparseMarlinLinear
    from marlinctl.kernels.ops import decode

    found = {name: module for name, module in model.named_modules() if isinstance(module, LinearPart | MarlinLinear | SparseMarlinLinear)}
    packed = [(name, module) for name, module in found.items() if name.removesuffix(".shared.linear") == name]
    for name, module in packed:
        linear, first = (module.shared.linear, module.first) if isinstance(module, LinearPart) else (module, 0)
        rows = slice(first, first + module.out_features)
        dense = nn.Linear(module.in_features, module.out_features, bias=linear.bias is not None, device="meta")
        dense.weight = nn.Parameter(decode(linear.packed(), dtype)[rows].clone(), requires_grad=False)
        if linear.bias is not None:
            dense.bias = nn.Parameter(linear.bias[rows].clone(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    return len(packed)


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each tensor once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Writer:
    """A model, a cache that holds `length` positions, and the tensors that both graphs read and write."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int, compiled: bool = False) -> None:
        from transformers import StaticCache

        device = model.device
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=length)
        self._next: Callable[..., Any] = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        self.positions = torch.arange(length, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # where the next token goes
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # the last ones written

    def read(self, prompt: Tensor) -> None:
        """prompt: [B, P]. Writes the first token after it."""
        self.rewind()
        self._run(self.model, prompt, self.positions[: prompt.shape[1]])
        self.at.fill_(prompt.shape[1])

    def step(self) -> None:
        """One token more."""
        self._run(self._next, self.tokens, self.at)
        self.at.add_(1)

    def rewind(self) -> None:
        """The cache is empty; what lies in it is written over."""
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()

    def _run(self, model: Callable[..., Any], ids: Tensor, positions: Tensor) -> None:
        mask = self.positions <= positions[:, None]  # [queries, keys]: what lies behind a token
        out = model(
            input_ids=ids,
            attention_mask=mask[None, None].expand(ids.shape[0], 1, -1, -1),
            position_ids=positions[None].expand(ids.shape[0], -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.tokens.copy_(out.logits[:, -1].argmax(-1, keepdim=True))


def _write(model: PreTrainedModel, gpu: Device, batch: int, length: Lengths, compiled: bool) -> tuple[Timed, Tensor]:
    """Medians over texts, and the tokens [B, new] of the last one."""
    vocabulary = int(model.config.vocab_size)
    prompt = torch.randint(vocabulary, (batch, length.prompt), device=gpu.device, generator=gpu.generator(batch))
    writer = Writer(model, batch, length.prompt + length.new, compiled)
    for _ in range(2):  # what is compiled, loaded or allocated once; the cache among it
        writer.read(prompt)
        writer.step()
    read = gpu.record(lambda i: writer.read(prompt), 1)
    step = gpu.record(lambda i: writer.step(), 1)
    written: list[Tensor] = []

    def rest() -> None:
        for _ in range(length.new - 1):
            step()
            written.append(writer.tokens.clone())

    first, token = [], []
    for repeat in range(1 + REPEATS):
        taken = gpu.microseconds(read)
        written = [writer.tokens.clone()]
        further = gpu.microseconds(rest) / (length.new - 1)
        if repeat:
            first.append(taken / 1e3)
            token.append(further / 1e3)
    return Timed(statistics.median(first), statistics.median(token)), torch.cat(written, dim=1)


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of tokens before each row's first difference: after it the texts are different ones. one, other: [B, new]."""
    same = (one == other).to(torch.int64).cumprod(dim=1)
    return float(same.double().mean())


def _refuse_long(model: PreTrainedModel, lengths: Sequence[Lengths]) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    for length in lengths:
        if limit is not None and length.prompt + length.new > limit:
            raise UsageError(
                "E246",
                f"{length.prompt} + {length.new} tokens are more than the {limit} positions of this model",
                where="--lengths",
                fix=f"at most {limit} together",
            )


def _versions() -> dict[str, str]:
    import transformers

    from marlinctl import __version__

    return {"marlinctl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _line(which: str, case: tuple[int, Lengths], timed: Timed) -> str:
    batch, length = case
    return f"{which}, batch {batch}, {length.prompt} + {length.new} tokens: first {timed.first:.2f} ms, then {timed.token:.3f} ms a token"


def table(document: dict[str, Any]) -> str:
    """For people."""
    from marlinctl.benchmarking.table import as_text, text_table

    baseline = document["dtype"]
    rows = text_table(
        ">batch", ">prompt", ">new", ">first, packed ms", f">{baseline} ms", ">speed-up",
        ">token, packed ms", f">{baseline} ms", ">speed-up", ">tokens/s", ">same tokens",
    )  # fmt: skip
    for case in document["cases"]:
        packed, dense = case["packed"], case["dense"]
        rows.add_row(
            str(case["batch"]), str(case["prompt"]), str(case["new"]),
            f"{packed['first']:.2f}", f"{dense['first']:.2f}", f"{dense['first'] / packed['first']:.2f}x",
            f"{packed['token']:.3f}", f"{dense['token']:.3f}", f"{case['speedup']:.2f}x",
            f"{case['batch'] / packed['token'] * 1e3:,.0f}", f"{100 * case['agreement']:.0f} %",
        )  # fmt: skip
    return "\n\n".join([as_text(rows), "\n".join(_notes(document))])


def _notes(document: dict[str, Any]) -> Iterator[str]:
    size, versions = document["bytes"], document["versions"]
    how = "torch.compile for tokens after the first, CUDA graphs" if document["compiled"] else "CUDA graphs"
    if document["fused"]:
        how = f"packed linears with the same input fused, {how}"
    yield f"{document['model']}: {size['packed'] / 1e9:.2f} GB packed, {size['dense'] / 1e9:.2f} GB in {document['dtype']}"
    yield f"{document['gpu']}, torch {versions['torch']}, transformers {versions['transformers']}, {document['date']}; {how}, medians"
