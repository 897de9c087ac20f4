"""Which linears a decoder block has, in the order they run, and which of them share an input.

Every supported model is a stack of blocks, and a block is a row of parts, of which there are three kinds. That is all that
oneshot/sequential.py needs to know: everything between linears (norms, rotary embeddings, convolutions, residuals) is run by transformers'
own block.

    Branch    first = q_proj k_proj v_proj    last = o_proj       what enters the module is what `first` read, what `last` makes leaves it
    Chain     q_a kv_a ─► q_b ─► kv_b ─► o                        any other module, in stages: the linears of a stage read one tensor
    Experts   a router, and for each expert  gate up ─► down      behind it

    Llama     Branch self_attn ──► Branch mlp                     DeepSeek-V3    Chain self_attn ──► Experts ──► Chain mlp.shared_experts

Blocks of a model may differ. A linear that is in no part stays as it is, like norms and routers.

The table below is driven by the config: a row says how a model_type spells its linears, norms and biases. Nothing here imports torch,
so `inspect` and the preflight of a run can ask it too. A model that is not in the table can be described by hand (`--module-map`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from marlinctl.errors import BadInput, Problem, UsageError
from marlinctl.models.config import wraps
from marlinctl.models.module_map import read_module_map

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear of a block. `out_features` and `in_features` are N and K."""

    name: str  # full dotted name, without ".weight"
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """A sub-module of the block: `first` linears share its input, `last` produces its output. Names are relative to the block."""

    module: str  # "self_attn", "mlp"
    first: tuple[str, ...]
    last: str
    returns_tuple: bool  # attention modules return (output, attention weights)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        return self.first, (self.last,)


@dataclass(frozen=True, slots=True)
class Chain:
    """Linears of the block in the order in which they run, each stage reading one tensor. Names are relative to the block."""

    module: str  # holds all of them, and its output can be replayed; "": the block itself, which is run again for each stage
    stages: tuple[tuple[str, ...], ...]
    returns_tuple: bool = False  # (output, anything that nothing reads)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: a router that stays 16-bit, and one (first, last) pair of 2-D linears for each expert.

    transformers holds all experts in two parameters of the module that it calls with (hidden, expert ids, shares): models/places.py.
    """

    module: str  # relative to the block
    count: int
    top_k: int
    first: tuple[str, ...]  # gate and up of one expert, or up alone, with {e} for its number, as the checkpoint spells them
    last: str
    parameters: tuple[str, str] = ("gate_up_proj", "down_proj")  # of the module: [E, 2 I, H], gate first, and [E, H, I]
    whole: tuple[str, ...] = ()  # those two as checkpoints spell them, of families that store no expert by itself; relative to the block
    transposed: bool = False  # [E, H, 2 I] and [E, I, H]
    interleaved: bool = False  # gate and up by turns, not one after the other
    biased: bool = False  # there are gate_up_proj_bias [E, 2 I] and down_proj_bias [E, H] as well, which stay as they are
    shares_first: bool = False  # the module is given [E * T, H], each token times its share of each expert: zero for all but one

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Of one expert, with {e} for its number."""
        return self.first, (self.last,)


Part = Branch | Chain | Experts


@dataclass(frozen=True, slots=True)
class Block:
    index: int
    prefix: str  # "model.layers.3"
    parts: tuple[Part, ...]  # in the order in which they run
    linears: Mapping[str, LinearSpec]  # full name -> spec, in run order
    others: Mapping[str, Shape]  # full tensor names of norms, routers and biases -> shape
    renamed: Mapping[str, str] = field(default_factory=dict)  # those of them that the block's module calls otherwise
    buffers: frozenset[str] = frozenset()  # those of them that are no parameters: they are not trained
    returns_tuple: bool = False  # the block returns (hidden states, ...)
    module: str = ""  # its path in transformers' model, where that is not `prefix`

    @property
    def path(self) -> str:
        """Where it is in transformers' model."""
        return self.module or self.prefix

    def parameter(self, tensor: str) -> str:
        """The name, relative to the block's module, of a tensor of the checkpoint."""
        return self.renamed.get(tensor, tensor)[len(self.prefix) + 1 :]

    @property
    def experts(self) -> tuple[Experts, ...]:
        return tuple(part for part in self.parts if isinstance(part, Experts))

    @property
    def homes(self) -> tuple[str, ...]:
        """The modules whose outputs, in most models, are added to the residual stream one after another: parts, or what holds several of
        them. "": linears of the block itself."""
        parts = Counter(part.module.partition(".")[0] for part in self.parts)
        tops = ((part.module, part.module.partition(".")[0]) for part in self.parts)
        return tuple(dict.fromkeys(module if parts[top] == 1 else top for module, top in tops))

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """Branches that may be added to the residual stream as they are -> homes before them, each of which is one part."""
        homes = self.homes
        single = {part.module for part in self.parts if not isinstance(part, Experts)} - {""}
        branches = {part.module for part in self.parts if isinstance(part, Branch)}
        return {home: homes[:i] for i, home in enumerate(homes) if home in branches and single.issuperset(homes[:i])}

    def stages(self) -> list[tuple[tuple[LinearSpec, ...], Experts | None]]:
        """The linears of each stage in run order; of experts, those of the first one."""
        return [
            (tuple(self.linears[f"{self.prefix}.{name.format(e=0)}"] for name in stage), part if isinstance(part, Experts) else None)
            for part in self.parts
            for stage in part.stages
        ]


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a checkpoint names what transformers' model calls otherwise: (in the checkpoint, in the model).

    Gemma 3 with its vision tower: decoder ("language_model.model", "model.language_model"), head ("language_model.lm_head", "lm_head").
    A model that was saved without its head: decoder ("", "model").
    """

    decoder: tuple[str, str]
    head: tuple[str, str]

    def module(self, name: str) -> str:
        """The path in the model of a module or tensor of the checkpoint."""
        for stored, path in (self.head, self.decoder):
            if not stored:
                return f"{path}.{name}"
            if name == stored or name.startswith(f"{stored}."):
                return path + name[len(stored) :]
        return name

    def holds(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is the language model's, and not of another part of a wrapper."""
        return any(not stored or name.startswith(f"{stored}.") for stored, _ in (self.head, self.decoder))


@dataclass(frozen=True, slots=True)
class Architecture:
    """A whole model as names and shapes. Names are those of the checkpoint; where transformers' modules have others, `module` has them."""

    model_type: str
    decoder: str  # the path of the module that holds embedding, blocks and final norm: "model"
    blocks: tuple[Block, ...]
    embedding: str
    norm: str
    head: LinearSpec | None  # None: tied to the embedding
    hidden_size: int
    vocab_size: int
    expected: Mapping[str, Shape]  # every tensor the checkpoint must hold
    ignorable: tuple[str, ...] = field(default=("rotary_emb.inv_freq", "lm_head.weight"))  # endings a checkpoint may hold besides
    tied: LinearSpec | None = None  # the output head, where it is tied to the embedding
    outside: tuple[str, ...] = ()  # tensors of the decoder besides blocks, embedding and norm: learned positions, a norm before the blocks
    spelling: Spelling | None = None  # None: the checkpoint names modules as transformers does
    carried: frozenset[str] = frozenset()  # other tensors of the checkpoint, of parts that are copied and not looked at
    guests: Mapping[str, str] = field(default_factory=dict)  # tensors of the checkpoint that the model lacks, copied -> what (guests.py)

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """All linears that are quantized unless a rule says otherwise, in run order."""
        return {name: spec for block in self.blocks for name, spec in block.linears.items()}

    def module(self, name: str) -> str:
        """The path, in transformers' model, of a module or tensor of the checkpoint."""
        return name if self.spelling is None else self.spelling.module(name)

    @property
    def norm_tensors(self) -> list[str]:
        """Weight and bias of the norm after the last block, as far as it has them."""
        return [name for name in self.expected if name.startswith(f"{self.norm}.")]

    def unexpected(self, names: Mapping[str, object]) -> list[str]:
        """Tensors of a checkpoint that this architecture has no place for: a sign that config and weights do not belong together."""
        apart = {*self.carried, *self.guests}
        return sorted(n for n in names if n not in self.expected and n not in apart and not n.endswith(self.ignorable))

    def untied(self) -> Architecture:
        """The same model with an output head of its own. Only for one whose head is tied."""
        assert self.tied is not None
        expected = {**self.expected, f"{self.tied.name}.weight": (self.tied.out_features, self.tied.in_features)}
        return replace(self, head=self.tied, tied=None, expected=expected)

    def tied_copies(self, names: Iterable[str]) -> list[str]:
        """A head that config.json ties to the embedding and the checkpoint holds all the same."""
        return [n for n in names if self.head is None and n not in self.expected and n.endswith("lm_head.weight")]


def respelled(known: Architecture, spelling: Spelling) -> Architecture:
    """A language model in the names that a checkpoint has for it; paths of modules become those of `spelling`."""
    begins, spec = f"{known.decoder}.", known.head or known.tied
    head = None if spec is None else spec.name
    stored = f"{spelling.decoder[0]}." if spelling.decoder[0] else ""

    def name(old: str) -> str:
        if head is not None and (old == head or old.startswith(f"{head}.")):
            return spelling.head[0] + old[len(head) :]
        return stored + old.removeprefix(begins) if old.startswith(begins) else old

    def linear(old: LinearSpec) -> LinearSpec:
        return replace(old, name=name(old.name))

    def block(old: Block) -> Block:
        return replace(
            old,
            prefix=name(old.prefix),
            module=spelling.module(name(old.prefix)),
            linears={name(key): linear(spec) for key, spec in old.linears.items()},
            others={name(key): shape for key, shape in old.others.items()},
            renamed={name(key): name(module) for key, module in old.renamed.items()},
            buffers=frozenset(map(name, old.buffers)),
        )

    return replace(
        known,
        decoder=spelling.decoder[1],
        blocks=tuple(map(block, known.blocks)),
        embedding=name(known.embedding),
        norm=name(known.norm),
        head=None if known.head is None else linear(known.head),
        tied=None if known.tied is None else linear(known.tied),
        expected={name(key): shape for key, shape in known.expected.items()},
        outside=tuple(map(name, known.outside)),
        spelling=spelling,
    )


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
