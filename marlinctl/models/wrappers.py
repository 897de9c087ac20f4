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

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from marlinctl.errors import BadInput
from marlinctl.models.architectures import Architecture, Spelling, respelled
from marlinctl.models.derivation import architecture_of_model, linears_beside
from marlinctl.models.families import FAMILIES, architecture
from marlinctl.models.meta_model import build
from marlinctl.models.stored_names import Loaded, StoredNames, module_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def wrapped_architecture(config: Mapping[str, Any], names: Collection[str]) -> Architecture:
    """The language model of a wrapper, spelled as in the checkpoint that holds `names`; its other tensors are `carried`.

    BadInput E390 with the reason for a wrapper whose language model cannot be compressed; E392 for one that transformers cannot build.
    """
    model = cast("PreTrainedModel", build(config, torch.float32))
    kind = str(config.get("model_type"))
    decoder, head = _language_model(model, kind)
    held = model.state_dict()
    tied = f"{head}.weight" in model.all_tied_weights_keys
    known = _alone(model.get_submodule(decoder), None if head is None else model.get_submodule(head), kind, tied)
    modules = module_names(model, held, names)
    blocks_at = f"{decoder}.{known.blocks[0].path.removeprefix(f'{known.decoder}.').rpartition('.')[0]}"
    return replace(_spelled(known, modules, held, decoder, head), beside=linears_beside(model, blocks_at))


# ---- the language model --------------------------------------------------------------------------------------------------------------


class _Alone(nn.Module):
    """The decoder and the head of a wrapper as a language model: the names are those that language models have."""

    base_model_prefix = "model"

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
    prefix = stored.get(f"{decoder}.{first}", f"{decoder}.{first}").removesuffix(first).removesuffix(".")
    of_head = stored.get(f"{head}.weight", f"{head}.weight").removesuffix(".weight")
    blocks = known.blocks[0].prefix.rpartition(".")[0].removeprefix(f"{known.decoder}.")
    of_blocks = StoredNames(stored, {}).prefix(f"{decoder}.{blocks}", f"{decoder}.{blocks}")
    apart = None if of_blocks in (f"{prefix}.{blocks}", blocks) else (of_blocks, f"{decoder}.{blocks}")
    found = respelled(known, Spelling((prefix, decoder), (of_head, head or "lm_head"), apart))
    # Of tensors of another shape: they are copied unseen.
    made = {module for loaded in modules.values() if loaded.converted for module in (loaded.name, *loaded.others)}
    beside = {module: tuple(tensor.shape) for module, tensor in held.items() if not module.startswith(inside)}
    others = {stored.get(module, module): shape for module, shape in beside.items() if module not in made}
    carried = frozenset(name for name, loaded in modules.items() if loaded.converted and loaded.name in beside)
    return replace(found, expected={**found.expected, **others}, carried=carried)
