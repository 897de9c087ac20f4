"""Architectures from config.json alone, for the most common families.

The table is driven by the config: a row says how a model_type spells its linears, norms and biases. Nothing here imports torch, so that
`inspect` and the preflight of a run can ask it too. A model that is not in the table is derived (lookup.py) or described by hand
(`--module-map`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput, Problem, UsageError
from marlinctl.models.architectures import Architecture, Block, Branch, Experts, LinearSpec, Part, Shape
from marlinctl.models.config import wraps
from marlinctl.models.module_map import read_module_map


@dataclass(frozen=True, slots=True)
class _Family:
    """A row of the table: how one model_type differs from Llama."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    attention_bias: bool | str = "attention_bias"  # a bool, or the config key that says so
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    fused: bool = False  # qkv_proj and gate_up_proj
    qk_norm: str | None = None  # None, "head" ([head_dim]) or "full" ([heads * head_dim])
    experts: tuple[str, str, str, str] | None = None  # router, gate, up, down of expert {e}, as the checkpoint spells them
    experts_key: str = "num_experts"  # or num_local_experts, which newer transformers write for every family
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers' config class assumes for an absent key


_EXPERTS = ("mlp.gate", "mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj")
_GEMMA_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")

FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(mlp_bias="mlp_bias"),
    "mistral": _Family(attention_bias=False, output_bias=False, defaults={"num_key_value_heads": 8}),
    "qwen2": _Family(attention_bias=True, output_bias=False, defaults={"num_key_value_heads": 32}),
    "qwen3": _Family(qk_norm="head", defaults={"head_dim": 128, "num_key_value_heads": 32}),
    "gemma2": _Family(norms=_GEMMA_NORMS, tied=True, defaults={"head_dim": 256, "num_key_value_heads": 4}),
    "gemma3_text": _Family(norms=_GEMMA_NORMS, tied=True, qk_norm="head", defaults={"head_dim": 256, "num_key_value_heads": 4}),
    "phi3": _Family(attention_bias=False, output_bias=False, fused=True),
    "olmo2": _Family(norms=("post_attention_layernorm", "post_feedforward_layernorm"), qk_norm="full"),
    "olmo3": _Family(norms=("post_attention_layernorm", "post_feedforward_layernorm"), qk_norm="full"),
    "granite": _Family(mlp_bias="mlp_bias"),
    "smollm3": _Family(mlp_bias="mlp_bias", tied=True, defaults={"num_key_value_heads": 4}),
    "exaone4": _Family(
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        attention_bias=False,
        output_bias=False,
        qk_norm="head",
        defaults={"num_key_value_heads": 32},
    ),
    "seed_oss": _Family(
        output_bias="attention_out_bias", mlp_bias="mlp_bias", defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8}
    ),
    "ernie4_5": _Family(
        attention_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        tied=True,
        defaults={"head_dim": 128, "num_key_value_heads": 2},
    ),
    "ministral": _Family(attention_bias=False, output_bias=False, defaults={"num_key_value_heads": 8}),
    "ministral3": _Family(attention_bias=False, output_bias=False, defaults={"head_dim": 128, "num_key_value_heads": 8}),
    "gemma": _Family(tied=True, defaults={"head_dim": 256, "num_key_value_heads": 16}),
    "mixtral": _Family(
        attention_bias=False,
        output_bias=False,
        experts=(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{e}.w1",
            "block_sparse_moe.experts.{e}.w3",
            "block_sparse_moe.experts.{e}.w2",
        ),
        experts_key="num_local_experts",
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": _Family(
        qk_norm="head",
        experts=_EXPERTS,
        defaults={"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
    ),
    "olmoe": _Family(qk_norm="full", experts=_EXPERTS, defaults={"num_experts": 64, "num_experts_per_tok": 8}),
}

_MAX_DIMENSION = 2**24  # no layer, head or vocabulary of a real model is larger; a config that says so is damaged or hostile
_MAX_BLOCKS = 10_000


def architecture(config: Mapping[str, Any], module_map: Path | None = None) -> Architecture:
    """Names and shapes of the model that `config` (a parsed config.json) describes.

    BadInput E390 for a model_type that is not in the table and has no module map (lookup.py knows more of them); E392 for a config whose
    sizes are missing or absurd.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if module_map is not None:
        return _by_hand(config, module_map)
    if family is None:
        raise BadInput(
            "E390",
            f"the architecture {model_type!r} is not in marlinctl's table",
            where="config.json, key model_type",
            fix=f"in the table: {', '.join(sorted(FAMILIES))}; docs/models.md has the others that can be compressed",
        )
    return _from_family(str(model_type), family, _Sizes.read(config, family))


def may_be_derived(config: Mapping[str, Any]) -> bool:
    """Whether the table has no row for the model, and config.json no reason why transformers' code cannot be followed."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type not in FAMILIES and not wraps(config)


@dataclass(frozen=True, slots=True)
class _Sizes:
    config: Mapping[str, Any]
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def read(cls, config: Mapping[str, Any], family: _Family) -> _Sizes:
        problems: list[Problem] = []

        def size(key: str, fallback: int | None = None, limit: int = _MAX_DIMENSION) -> int:
            value = config.get(key)
            if value is None:
                value = family.defaults.get(key, fallback)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
                problems.append(
                    Problem(
                        f"{key} is {value!r}, not a whole number from 1 to {limit}",
                        f"config.json, key {key}",
                        "restore the model's own config.json",
                    )
                )
                return 1
            return value

        if family.experts:
            key = "num_local_experts" if "num_local_experts" in config else family.experts_key
            config = {**config, family.experts_key: size(key, limit=_MAX_BLOCKS)}
            size("num_experts_per_tok", limit=_MAX_BLOCKS)
            size("moe_intermediate_size", 1)
            size("decoder_sparse_step", 1)
            dense = config.get("mlp_only_layers")
            if dense is not None and not isinstance(dense, list):
                what = f"mlp_only_layers is {dense!r}, not a list"
                problems.append(Problem(what, "config.json, key mlp_only_layers", "restore the model's own config.json"))
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        sizes = cls(
            config={**family.defaults, **{k: v for k, v in config.items() if v is not None}},
            hidden=hidden,
            intermediate=size("intermediate_size"),
            blocks=size("num_hidden_layers", limit=_MAX_BLOCKS),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", max(1, hidden // heads)),
            vocab=size("vocab_size"),
        )
        if problems:
            raise BadInput.from_problems("E392", problems)
        return sizes


def _from_family(model_type: str, family: _Family, sizes: _Sizes) -> Architecture:
    blocks = tuple(_block(i, family, sizes) for i in range(sizes.blocks))
    tied = bool(sizes.config.get("tie_word_embeddings", family.tied))
    head = LinearSpec("lm_head", sizes.vocab, sizes.hidden, bias=False)
    expected: dict[str, Shape] = {"model.embed_tokens.weight": (sizes.vocab, sizes.hidden), "model.norm.weight": (sizes.hidden,)}
    for block in blocks:
        expected |= block.others
        expected |= {f"{spec.name}.weight": (spec.out_features, spec.in_features) for spec in block.linears.values()}
    if not tied:
        expected["lm_head.weight"] = (sizes.vocab, sizes.hidden)
    own, shared = (None, head) if tied else (head, None)
    return Architecture(
        model_type, "model", blocks, "model.embed_tokens", "model.norm", own, sizes.hidden, sizes.vocab, expected, tied=shared
    )


def _block(index: int, family: _Family, sizes: _Sizes) -> Block:
    prefix = f"model.layers.{index}"

    def flag(rule: bool | str) -> bool:
        return rule if isinstance(rule, bool) else bool(sizes.config.get(rule, False))

    q_width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    attention_bias, output_bias, mlp_bias = flag(family.attention_bias), flag(family.output_bias), flag(family.mlp_bias)
    if family.fused:
        widths = {"self_attn.qkv_proj": q_width + 2 * kv_width}
    else:
        widths = {"self_attn.q_proj": q_width, "self_attn.k_proj": kv_width, "self_attn.v_proj": kv_width}
    linears = [LinearSpec(f"{prefix}.{name}", n, sizes.hidden, attention_bias) for name, n in widths.items()]
    linears.append(LinearSpec(f"{prefix}.self_attn.o_proj", sizes.hidden, q_width, output_bias))
    attention = Branch("self_attn", tuple(widths), "self_attn.o_proj", returns_tuple=True)

    others: dict[str, Shape] = {f"{prefix}.{norm}.weight": (sizes.hidden,) for norm in family.norms}
    if family.qk_norm:
        q_norm, k_norm = (sizes.head_dim, sizes.head_dim) if family.qk_norm == "head" else (q_width, kv_width)
        others |= {f"{prefix}.self_attn.q_norm.weight": (q_norm,), f"{prefix}.self_attn.k_norm.weight": (k_norm,)}

    mlp: Part
    renamed: dict[str, str] = {}
    if family.experts and _is_sparse(index, sizes.config):
        router, gate, up, down = family.experts
        count, width = int(sizes.config[family.experts_key]), int(sizes.config.get("moe_intermediate_size", sizes.intermediate))
        others[f"{prefix}.{router}.weight"] = (count, sizes.hidden)
        renamed[f"{prefix}.{router}.weight"] = f"{prefix}.mlp.gate.weight"
        for e in range(count):
            linears += [LinearSpec(f"{prefix}.{name.format(e=e)}", width, sizes.hidden, False) for name in (gate, up)]
            linears.append(LinearSpec(f"{prefix}.{down.format(e=e)}", sizes.hidden, width, False))
        mlp = Experts("mlp.experts", count, int(sizes.config["num_experts_per_tok"]), (gate, up), down)
    else:
        first = (
            {"mlp.gate_up_proj": 2 * sizes.intermediate}
            if family.fused
            else dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), sizes.intermediate)
        )
        linears += [LinearSpec(f"{prefix}.{name}", n, sizes.hidden, mlp_bias) for name, n in first.items()]
        linears.append(LinearSpec(f"{prefix}.mlp.down_proj", sizes.hidden, sizes.intermediate, mlp_bias))
        mlp = Branch("mlp", tuple(first), "mlp.down_proj", returns_tuple=False)

    others |= {f"{spec.name}.bias": (spec.out_features,) for spec in linears if spec.bias}
    return Block(index, prefix, (attention, mlp), {spec.name: spec for spec in linears}, others, renamed)


def _is_sparse(index: int, config: Mapping[str, Any]) -> bool:
    """Qwen3-MoE may keep single blocks dense; the other families have experts in every block."""
    if index in (config.get("mlp_only_layers") or ()):
        return False
    return (index + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _by_hand(config: Mapping[str, Any], module_map: Path) -> Architecture:
    """An architecture from a module map: a JSON object with the names that the table would give.

    {"attention": {"module": "self_attn", "first": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                   "last": "self_attn.o_proj"},
     "mlp": {"module": "mlp", "first": ["mlp.gate_proj", "mlp.up_proj"], "last": "mlp.down_proj"},
     "decoder": "model", "blocks": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm"}

    Shapes come from the model that transformers builds for the config, on the meta device; transformers must know the model_type.
    """
    where = str(module_map)
    named_branches, decoder, blocks_at, embedding, norm = read_module_map(module_map)
    branches = [Branch(*branch) for branch in named_branches]
    from marlinctl.models.meta_model import linear_modules, meta_shapes

    shapes, tied = meta_shapes(config)
    modules = linear_modules(config)
    numbers = {name[len(blocks_at) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{blocks_at}.")}
    count = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    named = [name for b in branches for name in (*b.first, b.last)]
    absent = [f"{name}.weight" for name, rank in ((embedding, 2), (norm, 1)) if len(shapes.get(f"{name}.weight", ())) != rank]
    absent += [f"{blocks_at}.0.{name}.weight" for name in named if f"{blocks_at}.0.{name}" not in modules]
    if absent or not count:
        raise UsageError(
            "E251",
            f"the module map names what the model does not have: {', '.join(absent) or blocks_at}",
            where=where,
            fix=f"the first block holds: {_holdings(shapes, f'{blocks_at}.0')}",
        )
    uneven = [
        Problem(
            f"block {i} lacks {', '.join(lacking)}: a module map describes blocks that are all built alike",
            where,
            f"block {i} holds: {_holdings(shapes, f'{blocks_at}.{i}')}; a model whose blocks differ cannot be described by a map",
        )
        for i in range(count)
        if (lacking := [name for name in named if f"{blocks_at}.{i}.{name}" not in modules])
    ]
    if uneven:
        raise UsageError.from_problems("E251", uneven)
    blocks = []
    for i in range(count):
        prefix = f"{blocks_at}.{i}"
        names = [f"{prefix}.{name}" for name in named]
        linears = {n: LinearSpec(n, shapes[f"{n}.weight"][0], shapes[f"{n}.weight"][1], f"{n}.bias" in shapes) for n in names}
        weights = {f"{n}.weight" for n in names}
        others = {n: s for n, s in shapes.items() if n.startswith(prefix + ".") and n not in weights}
        blocks.append(Block(i, prefix, tuple(branches), linears, others))
    vocab, hidden = shapes[f"{embedding}.weight"]
    head = LinearSpec("lm_head", vocab, hidden, "lm_head.bias" in shapes) if "lm_head" in modules else None
    own, shared = (None, head) if tied else (head, None)
    expected = {n: s for n, s in shapes.items() if not (tied and n == "lm_head.weight")}
    return Architecture(str(config.get("model_type")), decoder, tuple(blocks), embedding, norm, own, hidden, vocab, expected, tied=shared)


def _holdings(shapes: Mapping[str, Shape], prefix: str) -> str:
    """The parameters of a block, as a sentence that ends somewhere."""
    return ", ".join(sorted(name for name in shapes if name.startswith(f"{prefix}.")))[:600]
