"""The architecture of a model that is not in the table: transformers builds it without weights, and one forward pass shows what runs.

    meta model ─► its modules of experts (fused_experts.py) ─► forward pass (tracing.py) ─► for each block its parts (parts.py)
        ─► the embedding, the blocks, the final norm and the head, by what was called between them ─► names of checkpoints (stored_names.py)

What the pipeline cannot run (oneshot/sequential.py) is refused with the reason: blocks that are given more than hidden states, linears that
run twice for a token, experts that are held in an unknown way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from marlinctl.models.architectures import Architecture, Block, Experts, LinearSpec, Piece, Shape, Spelling, respelled
from marlinctl.models.fused_experts import expert_modules, experts_of, named
from marlinctl.models.meta_model import build
from marlinctl.models.parts import BlockReader
from marlinctl.models.refusals import refused
from marlinctl.models.stored_names import StoredNames, stored_names
from marlinctl.models.token_arguments import OfTokens, of_tokens
from marlinctl.models.tracing import Trace, same, traced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that was traced."""

    module: PreTrainedModel
    kind: str
    shapes: Mapping[str, Shape]  # of its tensors, by their names in the model
    buffers: frozenset[str]  # those of them that are no parameters
    trace: Trace
    other: Trace  # over other tokens
    experts: Mapping[str, Experts]  # by the full names of their modules
    names: StoredNames
    arguments: OfTokens  # what blocks are given besides the hidden states


def derived_architecture(config: Mapping[str, Any]) -> Architecture:
    """Names and shapes of the model that `config` describes, from transformers' own code.

    BadInput E390 with the reason for a model that the pipeline cannot run; E392 for one that transformers cannot build.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(config.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refused(kind, "transformers has no language model of this type; a newer release may have one")
    known, prefix, others = _derived(cast("PreTrainedModel", build(config, torch.float32)), kind)
    if prefix == known.decoder and not others:
        return known
    head = known.head or known.tied
    names = ("lm_head", "lm_head") if head is None else (head.name, head.name)
    return respelled(known, Spelling((prefix, known.decoder), names, None, others))


def architecture_of_model(model: PreTrainedModel, kind: str) -> Architecture:
    """The same of a model on the meta device, whose decoder is called as it is there. kind: what it is called in a refusal."""
    return _derived(model, kind)[0]


def _derived(model: PreTrainedModel, kind: str) -> tuple[Architecture, str, dict[str, str]]:
    """The architecture, with the decoder's name in the model; what checkpoints call the decoder; and tensors of it outside of the blocks
    that they call otherwise -> their names in the model."""
    names = {module: name for name, module in model.named_modules()}
    decoder, blocks_at = _stack(model, kind, names)
    embedding = names.get(model.get_input_embeddings())
    if embedding is None or not embedding.startswith(f"{decoder}."):
        raise refused(kind, "its token embedding is not part of the decoder")
    blocks = [f"{blocks_at}.{i}" for i in range(len(list(model.get_submodule(blocks_at).children())))]
    _refuse_conv1d(model, kind, blocks_at)
    shared = sorted(name for pair in model.all_tied_weights_keys.items() for name in pair if name.startswith(f"{blocks_at}."))
    if shared:
        raise refused(kind, f"{shared[0]} is the same tensor as another one, and would be quantized for one of two places")
    known, prefix = _followed(model, kind, decoder, blocks)
    norm = _final_norm(model, kind, known.trace, decoder, blocks[-1])
    built = tuple(_block(i, prefix, known) for i, prefix in enumerate(blocks))
    if not any(block.linears for block in built):
        raise refused(kind, "its blocks have no linears")

    head = _head(model, names, known.trace, norm)
    stored = known.names.tensors
    if head is not None:
        head = replace(head, name=stored[f"{head.name}.weight"].removesuffix(".weight"))
    _refuse_renamed(kind, known, decoder, blocks_at, None if head is None else head.name)
    tied = bool(model.config.tie_word_embeddings)
    expected = _expected(known, built, decoder, blocks_at)
    if tied and (last := names.get(model.get_output_embeddings())):
        expected.pop(stored.get(f"{last}.weight", ""), None)
    apart = tuple(f"{part}." for part in (blocks_at, embedding, norm))
    outside = tuple(n for n in expected if n.startswith(f"{decoder}.") and not n.startswith(apart))
    vocab, hidden = known.shapes[f"{embedding}.weight"]
    if (entered := known.trace.entered[blocks[0]]) is not None:
        hidden = entered.shape[-1]  # OPT may have narrower embeddings, and a projection behind them
    found = Architecture(
        kind, decoder, built, embedding, norm, None if tied else head, hidden, vocab, expected,
        tied=head if tied else None, outside=outside, beside=linears_beside(model, blocks_at),
        dropped=_dropped(model), per_token=known.arguments.per_token, shared=known.arguments.shared,
        by_token=frozenset(f"{name}.weight" for name in known.trace.by_token) & set(outside),
    )  # fmt: skip
    begins = f"{prefix}." if prefix else ""
    outer = [name for name in known.shapes if name.startswith(f"{decoder}.") and not name.startswith(f"{blocks_at}.")]
    otherwise = {stored[name]: name for name in outer if stored[name] != name}
    return found, prefix, {begins + other.removeprefix(f"{decoder}."): name for other, name in otherwise.items()}


# ---- what the model is made of -------------------------------------------------------------------------------------------------------


def _stack(model: PreTrainedModel, kind: str, names: Mapping[nn.Module, str]) -> tuple[str, str]:
    """Names of the decoder and of its list of blocks."""
    count = getattr(model.config, "num_hidden_layers", None)
    bases = [model.base_model] if model.base_model is not model else list(model.children())
    found = []
    for decoder in (getattr(base, "decoder", base) for base in bases):
        lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList) and len(module) == count]
        found += [(names[decoder], names[module]) for module in lists]
    if len(found) != 1:
        raise refused(kind, "it is not a decoder with one list of blocks, as many as config.json says")
    return found[0]


def _followed(model: PreTrainedModel, kind: str, decoder: str, blocks: Sequence[str]) -> tuple[_Model, str]:
    """The model, and what checkpoints call its decoder."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = expert_modules(model, blocks, kind)
    homes = {name: next(prefix for prefix in blocks if name.startswith(f"{prefix}.")) for name in modules}
    trace, other = (traced(model, kind, blocks, tuple(modules), first=first) for first in (1, 2))
    arguments = of_tokens(kind, blocks, trace, other, lambda: traced(model, kind, blocks, tuple(modules), first=1, shifted=True))
    experts = {name: experts_of(name, module, homes[name], trace, kind) for name, module in modules.items()}
    stored = stored_names(model, kind, experts)
    prefix = stored.prefix(decoder, blocks[0])
    stored = stored.within(decoder, prefix)
    buffers = frozenset(name for name, _ in model.named_buffers() if name in shapes)
    return _Model(model, kind, shapes, buffers, trace, other, named(experts, stored, homes), stored, arguments), prefix


def _final_norm(model: nn.Module, kind: str, trace: Trace, decoder: str, last_block: str) -> str:
    """The module that is given the last block's output."""
    ends = trace.of(last_block)
    if len(ends) != 1:
        raise refused(kind, f"its blocks are run {len(ends)} times")
    for call in trace.calls[ends[0].order + 1 :]:
        if call.name.startswith(f"{decoder}.") and same(call.given, ends[0].returned):
            if len(trace.of(call.name)) > 1 and any(True for _ in model.get_submodule(call.name).parameters()):
                raise refused(kind, f"{call.name} runs in other places too, and not only after the last block")
            return call.name
    raise refused(kind, "no norm follows its last block")


def _head(model: PreTrainedModel, names: Mapping[nn.Module, str], trace: Trace, norm: str) -> LinearSpec | None:
    """The output head, where it reads what the final norm returns."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        return None
    name = names[module]
    calls = [call for call in trace.linears if call.name == name]
    if len(calls) != 1 or not same(calls[0].given, trace.of(norm)[-1].returned):
        return None
    return LinearSpec(name, module.out_features, module.in_features, module.bias is not None)


def _refuse_renamed(kind: str, known: _Model, decoder: str, blocks_at: str, head: str | None) -> None:
    """The pipeline knows other names for the output head, inside of blocks, and inside of the decoder."""
    if outside := [name for name in known.names.pieces if not name.startswith(f"{blocks_at}.")]:
        raise refused(kind, f"its checkpoints hold {outside[0]} in pieces")
    for name, other in known.names.tensors.items():
        inside = blocks_at if name.startswith(f"{blocks_at}.") else decoder
        together = name.startswith(f"{inside}.") and other.startswith(f"{inside}.")
        if name != other and not together and other not in (f"{head}.weight", f"{head}.bias"):
            raise refused(kind, f"its checkpoints hold {name} in another way, as {other}")


def _refuse_conv1d(model: nn.Module, kind: str, blocks_at: str) -> None:
    """docs/decisions/README.md has the reason."""
    from transformers.pytorch_utils import Conv1D

    if any(isinstance(module, Conv1D) for module in model.get_submodule(blocks_at).modules()):
        raise refused(kind, "its linears are Conv1D, stored as (in, out), and compressed-tensors packs only nn.Linear")


def _dropped(model: nn.Module) -> tuple[str, ...]:
    """What transformers leaves out when it loads the model."""
    found = (getattr(module, "_keys_to_ignore_on_load_unexpected", None) or () for module in model.modules())
    return tuple(dict.fromkeys(pattern for patterns in found for pattern in patterns))


def linears_beside(model: nn.Module, blocks_at: str) -> tuple[str, ...]:
    """All linears of a model but those of its blocks."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return tuple(name for name in names if not name.startswith(f"{blocks_at}."))


# ---- one block -----------------------------------------------------------------------------------------------------------------------


def _block(index: int, prefix: str, known: _Model) -> Block:
    reader = BlockReader(prefix, known.module.get_submodule(prefix), known.kind, known.trace, known.other, known.experts)
    parts = reader.parts()
    elements = known.trace.of(prefix)[-1].elements
    if elements > 2:
        raise refused(known.kind, f"its blocks return {elements} values")
    if prefix in known.trace.second_read:
        raise refused(known.kind, f"{prefix} returns something besides the hidden states that is read")
    linears: dict[str, LinearSpec] = {}
    fused: set[str] = set()
    for part in parts:
        if isinstance(part, Experts):
            linears |= _experts_linears(prefix, part, known.shapes)
            fused |= {f"{prefix}.{part.module}.{name}" for name in part.parameters}
        else:
            linears |= {spec.name: spec for stage in part.stages for name in stage for spec in [_spec(f"{prefix}.{name}", known)]}
    stored = known.names.tensors
    cut = known.names.pieces
    held = {name for name in known.shapes if name.startswith(f"{prefix}.") and name not in fused and name not in cut}
    pieces = {name: piece for owner in cut if owner.startswith(f"{prefix}.") for name, piece in _pieces(owner, cut[owner]).items()}
    others = {
        stored[name]: known.shapes[name] for name in known.shapes if name in held and stored[name].removesuffix(".weight") not in linears
    }
    others |= {name: (piece.stop - piece.first, *known.shapes[piece.parameter][1:]) for name, piece in pieces.items()}
    renamed = {stored[name]: name for name in held if stored[name] != name}
    buffers = frozenset(stored[name] for name in held & known.buffers)
    given, shares = known.arguments.given.get(prefix, {}), known.arguments.shares.get(prefix, "")
    return Block(index, prefix, parts, linears, others, renamed, pieces, buffers, elements > 0, given=given, shares=shares)


def _pieces(parameter: str, rows: Mapping[str, int]) -> dict[str, Piece]:
    """By their names, one below the other."""
    ends = list(accumulate(rows.values()))
    return {name: Piece(parameter, stop - count, stop) for (name, count), stop in zip(rows.items(), ends, strict=True)}


def _spec(name: str, known: _Model) -> LinearSpec:
    rows, columns = known.shapes[f"{name}.weight"]
    return LinearSpec(known.names.tensors[f"{name}.weight"].removesuffix(".weight"), rows, columns, f"{name}.bias" in known.shapes)


def _experts_linears(prefix: str, experts: Experts, shapes: Mapping[str, Shape]) -> dict[str, LinearSpec]:
    """A linear for each part of each expert, in run order."""
    rows, columns = shapes[f"{prefix}.{experts.module}.{experts.parameters[1]}"][1:]
    hidden, width = (columns, rows) if experts.transposed else (rows, columns)
    found: dict[str, LinearSpec] = {}
    for e in range(experts.count):
        for name in experts.first:
            spec = LinearSpec(f"{prefix}.{name.format(e=e)}", width, hidden, bias=False)
            found[spec.name] = spec
        spec = LinearSpec(f"{prefix}.{experts.last.format(e=e)}", hidden, width, bias=False)
        found[spec.name] = spec
    return found


def _expected(known: _Model, blocks: Sequence[Block], decoder: str, blocks_at: str) -> dict[str, Shape]:
    """Every tensor that a checkpoint must hold. Those of the decoder outside of the blocks have their names in the model."""
    found: dict[str, Shape] = {}
    for name, shape in known.shapes.items():
        if not name.startswith(f"{blocks_at}."):
            found[name if name.startswith(f"{decoder}.") else known.names.tensors[name]] = shape
    for block in blocks:
        found |= block.others
        found |= {f"{spec.name}.weight": (spec.out_features, spec.in_features) for spec in block.linears.values()}
    return found
