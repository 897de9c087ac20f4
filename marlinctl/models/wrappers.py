"""Language models inside of wrappers for images or sound, and what checkpoints call their tensors.

    config.json ─► transformers' wrapper on the meta device ─► its decoder and output head ─► the architecture of a language model alone
    names in the checkpoint ─► transformers' own renaming ─► modules ─► the architecture, in the checkpoint's names

One wrapper has several spellings on the hub: transformers renames what it loads, and back where it saves. So names are never guessed: those
that the checkpoint holds go through what transformers does to them when it loads, and the names of its modules come out.

    language_model.model.layers.0.mlp.up_proj.weight          Gemma 3 4B as it was published
    model.language_model.layers.0.mlp.up_proj.weight          the module, and how newer models are stored
    vision_tower.vision_model.encoder.layers.0. ...           any other part: it must be there, and is copied as it is
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from marlinctl.errors import BadInput
from marlinctl.models.architectures import Architecture, Experts, Spelling, renamed, respelled, with_experts
from marlinctl.models.derivation import architecture_of_model, linears_beside
from marlinctl.models.families import FAMILIES, architecture
from marlinctl.models.meta_model import build
from marlinctl.models.stored_names import Loaded, StoredNames, module_names, template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def wrapped_architecture(config: Mapping[str, Any], names: Collection[str]) -> Architecture:
    """The language model of a wrapper, spelled as in the checkpoint that holds `names`; its other tensors are `carried`.

    BadInput E390 with the reason for a wrapper whose language model cannot be compressed; E392 for one that transformers cannot build.
    """
    model = cast("PreTrainedModel", build(config, torch.float32))
    kind = str(config.get("model_type"))
    decoder, head = _language_model(model, kind)
    _refuse_without_text(model, kind)
    held = model.state_dict()
    tied = f"{head}.weight" in model.all_tied_weights_keys
    known = _alone(model.get_submodule(decoder), None if head is None else model.get_submodule(head), kind, tied)
    decoder += known.decoder.removeprefix(_DECODER)  # OPT has its blocks one module further inside
    modules = module_names(model, held, names)
    blocks_at = f"{decoder}.{known.blocks[0].path.removeprefix(f'{known.decoder}.').rpartition('.')[0]}"
    found = _renamed_inside(_spelled(known, modules, held, decoder, head), modules)
    _refuse_otherwise_stored(found, modules, held, kind)
    return replace(found, beside=linears_beside(model, blocks_at))


# ---- the language model --------------------------------------------------------------------------------------------------------------


_DECODER = "model"  # what language models call it


class _Alone(nn.Module):
    """The decoder and the head of a wrapper as a language model: the names are those that language models have."""

    base_model_prefix = _DECODER

    def __init__(self, decoder: nn.Module, head: nn.Module | None, config: PreTrainedConfig) -> None:
        super().__init__()
        self.model = decoder
        self.lm_head = head
        self.config = config
        inside: Mapping[str, str] = cast(Any, decoder).all_tied_weights_keys
        self.all_tied_weights_keys = {f"model.{name}": f"model.{other}" for name, other in inside.items()}

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, cast(Any, self.model).get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=use_cache)[0]
        return hidden if self.lm_head is None else self.lm_head(hidden)


def _language_model(model: PreTrainedModel, kind: str) -> tuple[str, str | None]:
    """Names of the decoder and of the output head inside of the wrapper."""
    from transformers import PreTrainedModel

    paths = {module: name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    if decoder is not model and isinstance(getattr(decoder, "model", None), PreTrainedModel):  # Llama 4 wraps one that has its own head
        decoder = decoder.model
    if decoder is model or decoder not in paths or not hasattr(decoder, "config"):
        _refuse(kind, "transformers names no decoder inside of it")
    if getattr(decoder.config, "is_encoder_decoder", False):
        _refuse(kind, "its language model is an encoder and a decoder")
    return paths[decoder], paths.get(model.get_output_embeddings())


def _refuse_without_text(model: PreTrainedModel, kind: str) -> None:
    """BLIP-2 is run with an image alone."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [
        one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD and one.name != "input_ids"
    ]
    if needed:
        _refuse(kind, f"transformers runs it with {needed[0]} alone, and evaluation and checks have text only")


def _alone(decoder: nn.Module, head: nn.Module | None, kind: str, tied: bool) -> Architecture:
    """The architecture of a language model by itself, by the table where it has a row."""
    config: PreTrainedConfig = copy(cast(Any, decoder).config)
    config.tie_word_embeddings = tied  # the wrapper's own setting counts
    if config.model_type in FAMILIES:
        return architecture(config.to_dict())  # with the defaults that config.json leaves out
    return architecture_of_model(cast("PreTrainedModel", _Alone(decoder, head, config)), f"{kind} ({config.model_type})")


def _refuse(kind: str, reason: str) -> NoReturn:
    raise BadInput(
        "E390", f"models of type {kind!r} cannot be compressed: {reason}", where="config.json, key model_type",
        fix="docs/models.md has the models that work, and why others do not",
    )  # fmt: skip


# ---- names ---------------------------------------------------------------------------------------------------------------------------


def _spelled(
    known: Architecture, modules: Mapping[str, Loaded], held: Mapping[str, Tensor], decoder: str, head: str | None
) -> Architecture:
    """The architecture in the checkpoint's names. modules: those names -> modules, as `module_names` has them."""
    stored = {loaded.name: name for name, loaded in modules.items()}
    inside = (f"{decoder}.", f"{head}.")
    first = f"{known.embedding.removeprefix(f'{known.decoder}.')}.weight"
    of_head = stored.get(f"{head}.weight", f"{head}.weight").removesuffix(".weight")
    blocks = known.blocks[0].prefix.rpartition(".")[0].removeprefix(f"{known.decoder}.")
    of_blocks = StoredNames(stored, {}).prefix(f"{decoder}.{blocks}", f"{decoder}.{blocks}")
    of_first = stored.get(f"{decoder}.{first}", f"{decoder}.{first}")
    prefix = (of_first.removesuffix(first) if of_first.endswith(first) else of_blocks.removesuffix(blocks)).removesuffix(".")
    apart = None if of_blocks in (f"{prefix}.{blocks}", blocks) else (of_blocks, f"{decoder}.{blocks}")
    outside = [f"{decoder}.{name.removeprefix(f'{known.decoder}.')}" for name in (*known.norm_tensors, *known.outside)]
    odd = {stored[path]: path for path in (f"{decoder}.{first}", *outside) if path in stored}
    begins = f"{prefix}." if prefix else ""
    odd = {name: path for name, path in odd.items() if name != begins + path.removeprefix(f"{decoder}.")}
    found = respelled(known, Spelling((prefix, decoder), (of_head, head or "lm_head"), apart, odd))
    # Of tensors of another shape: they are copied unseen.
    made = {module for loaded in modules.values() if loaded.converted for module in (loaded.name, *loaded.others)}
    beside = {module: tuple(tensor.shape) for module, tensor in held.items() if not module.startswith(inside)}
    others = {stored.get(module, module): shape for module, shape in beside.items() if module not in made}
    carried = frozenset(name for name, loaded in modules.items() if loaded.converted and loaded.name in beside)
    return replace(found, expected={**found.expected, **others}, carried=carried)


def _renamed_inside(known: Architecture, modules: Mapping[str, Loaded]) -> Architecture:
    """With the checkpoint's own names for tensors that transformers calls otherwise inside of a block: to_q for q_proj (Cosmos 3)."""
    stored = {loaded.name: name for name, loaded in modules.items() if not loaded.converted}
    known = _with_stored_experts(known, modules)
    names: dict[str, str] = {}
    for block in known.blocks:
        held = [*block.others, *(f"{linear}.weight" for linear in block.linears)]
        own = {name: stored.get(known.module(block.renamed.get(name, name)), name) for name in held}
        names |= {name: other for name, other in own.items() if name != other and other.startswith(f"{block.prefix}.")}
    return renamed(known, names) if names else known


def _with_stored_experts(known: Architecture, modules: Mapping[str, Loaded]) -> Architecture:
    """With the checkpoint's own names for experts that have a tensor each, as far as none is missing."""
    single: dict[str, dict[int, list[str]]] = {}  # parameter -> the number of the part in it -> names, by the experts' numbers
    for name in sorted(modules, key=_last_number):
        if modules[name].converted:
            single.setdefault(modules[name].name, {}).setdefault(modules[name].part, []).append(name)
    changed: dict[tuple[str, str], Experts] = {}
    for block in known.blocks:
        start = len(block.prefix) + 1
        for part in block.experts:
            held = [single.get(f"{block.path}.{part.module}.{parameter}", {}) for parameter in part.parameters]
            lists = [names for one, count in zip(held, (len(part.first), 1), strict=True) for _, names in sorted(one.items())[:count]]
            inside = all(name.startswith(f"{block.prefix}.") for names in lists for name in names)
            if inside and len(lists) == len(part.first) + 1 and all(len(names) == part.count > 1 for names in lists):
                found = [template(names[0], names[1])[start:].removesuffix(".weight") for names in lists]
                changed[block.prefix, part.module] = replace(part, first=tuple(found[:-1]), last=found[-1], whole=())
    return with_experts(known, changed) if changed else known


def _last_number(name: str) -> int:
    """Of an expert."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdecimal()), -1)


def _refuse_otherwise_stored(known: Architecture, modules: Mapping[str, Loaded], held: Mapping[str, Tensor], kind: str) -> None:
    """BadInput E390 where what is missing is there in another way: names or tensors of which transformers makes those of the model."""
    missing = {known.module(name) for name in known.expected if name not in modules}
    if not missing:
        return
    inside = f"{known.decoder}."
    whole = {f"{block.prefix}.{name}" for block in known.blocks for part in block.experts for name in part.whole}
    made = {name: loaded for name, loaded in modules.items() if loaded.converted and name not in known.expected and name not in whole}
    of_blocks = [name for name, loaded in made.items() if loaded.name.startswith(inside) and loaded.name in held]
    experts = {f"{block.path}.{part.module}.{weight}" for block in known.blocks for part in block.experts for weight in part.parameters}
    if of_blocks:
        name = min(of_blocks, key=lambda name: made[name].name in experts)
        _refuse(kind, f"its checkpoints hold {name}, which no single tensor of transformers' model is")
    embedding = known.module(f"{known.embedding}.weight").removeprefix(inside)
    for name, loaded in modules.items():
        if f"{inside}{embedding}" in missing and loaded.name not in held and loaded.name.endswith(f".{embedding}"):
            _refuse(kind, f"transformers reads {name} as {loaded.name}, which its language model of this type does not have")
