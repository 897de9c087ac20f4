"""Which linears a decoder block has, in the order they run, and which of them share an input.

Every supported model is a stack of blocks, and a block is a row of parts, of which there are three kinds. That is all that
oneshot/sequential.py needs to know: everything between linears (norms, rotary embeddings, convolutions, residuals) is run by transformers'
own block.

    Branch    first = q_proj k_proj v_proj    last = o_proj       what enters the module is what `first` read, what `last` makes leaves it
    Chain     q_a kv_a ─► q_b ─► kv_b ─► o                        any other module, in stages: the linears of a stage read one tensor
    Experts   a router, and for each expert  gate up ─► down      behind it

    Llama     Branch self_attn ──► Branch mlp                     DeepSeek-V3    Chain self_attn ──► Experts ──► Chain mlp.shared_experts

Blocks of a model may differ. A linear that is in no part stays as it is, like norms and routers.

families.py makes them from config.json for the most common families, derivation.py from transformers' code for others. Nothing here imports
torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeVar

Shape = tuple[int, ...]
_Value = TypeVar("_Value")


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
    renamed: Mapping[str, str] = field(default_factory=dict)  # tensors, of linears too, that the block's module calls otherwise
    buffers: frozenset[str] = frozenset()  # those of `others` that are no parameters: they are not trained
    returns_tuple: bool = False  # the block returns (hidden states, ...)
    module: str = ""  # its path in transformers' model, where that is not `prefix`
    given: Mapping[str, str] = field(default_factory=dict)  # arguments, besides the hidden states, that are of the tokens -> `per_token`
    shares: str = ""  # the argument in which blocks leave tensors for later ones, `shared` of the whole model

    @property
    def path(self) -> str:
        """Where it is in transformers' model."""
        return self.module or self.prefix

    def parameter(self, tensor: str) -> str:
        """The name, relative to the block's module, of a tensor of the checkpoint."""
        return self.renamed.get(tensor, tensor)[len(self.prefix) + 1 :]

    def linear(self, module: str) -> str:
        """The full name of the linear that is the block's `module`, or of an expert."""
        own = f"{self.prefix}.{module}"
        return next((name for name, weight in self.renamed.items() if weight == f"{own}.weight"), f"{own}.weight").removesuffix(".weight")

    @property
    def experts(self) -> tuple[Experts, ...]:
        return tuple(part for part in self.parts if isinstance(part, Experts))

    @property
    def in_one_pass(self) -> bool:
        """Whether its module can be run as a whole and alone: not with experts, which are never in memory together, nor where it leaves
        tensors for later blocks."""
        return not self.experts and not self.shares

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
            (tuple(self.linears[self.linear(name.format(e=0))] for name in stage), part if isinstance(part, Experts) else None)
            for part in self.parts
            for stage in part.stages
        ]


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a checkpoint names what transformers' model calls otherwise: (in the checkpoint, in the model).

    Gemma 3 with its vision tower: decoder ("language_model.model", "model.language_model"), head ("language_model.lm_head", "lm_head").
    A model that was saved without its head: decoder ("", "model").
    Kimi K2.5 as transformers saves it: blocks ("language_model.model.blocks", "model.language_model.layers").
    """

    decoder: tuple[str, str]
    head: tuple[str, str]
    blocks: tuple[str, str] | None = None  # where it is not that of the decoder

    def module(self, name: str) -> str:
        """The path in the model of a module or tensor of the checkpoint."""
        for stored, path in (self.head, *([self.blocks] if self.blocks else []), self.decoder):
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
    beside: tuple[str, ...] = ()  # linears of transformers' model outside of the blocks, by their paths: clients must be told to leave them
    per_token: Mapping[str, int] = field(default_factory=dict)  # what blocks are given that is of the tokens alone -> values for each
    shared: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)  # what blocks leave for later ones -> shapes; 0: the tokens
    by_token: frozenset[str] = frozenset()  # those of `outside` that are embeddings of tokens, of which the rows that occur are read
    dropped: tuple[str, ...] = ()  # expressions for names that transformers leaves out when it loads such a model, though they lie inside
    guests: Mapping[str, str] = field(default_factory=dict)  # tensors of the checkpoint that the model lacks, copied -> what (guests.py)

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """All linears that are quantized unless a rule says otherwise, in run order."""
        return {name: spec for block in self.blocks for name, spec in block.linears.items()}

    def module(self, name: str) -> str:
        """The path, in transformers' model, of a module or tensor of the checkpoint."""
        return name if self.spelling is None else self.spelling.module(name)

    @property
    def shared_values(self) -> int:
        """Of each token, that blocks leave for later ones."""
        return sum(prod(n for n in shape if n) for shapes in self.shared.values() for shape in shapes)

    @property
    def renamed_modules(self) -> dict[str, str]:
        """Modules that are called otherwise inside of a block of the checkpoint -> their names in transformers', behind the same prefix."""
        weights = {name: module for block in self.blocks for name, module in block.renamed.items() if name.endswith(".weight")}
        return {name.removesuffix(".weight"): module.removesuffix(".weight") for name, module in weights.items()}

    def by_all_names(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
        """Values of linears, also under the names that clients have for those that they call otherwise inside of the decoder."""
        renamed = self.renamed_modules
        found = {**values, **{renamed[name]: values[name] for name in values.keys() & renamed.keys()}}
        if self.spelling is None or self.spelling.blocks is None:
            return found
        stored, path = (f"{name}." for name in self.spelling.blocks)
        own = f"{self.spelling.decoder[0]}." + path.removeprefix(f"{self.spelling.decoder[1]}.")
        return found | {own + name[len(stored) :]: value for name, value in found.items() if name.startswith(stored)}

    def sixteen_bit(self, names: Iterable[str], quantized: Iterable[str]) -> list[str]:
        """Linears that stay as they are, which the checkpoint calls `names`, with all names that clients have for them."""
        beside = set(self.beside) - {self.module(name) for name in quantized}
        return sorted({*self.by_all_names(dict.fromkeys(names)), *beside})

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
    blocks = f"{known.blocks[0].prefix.rpartition('.')[0]}."

    def name(old: str) -> str:
        if head is not None and (old == head or old.startswith(f"{head}.")):
            return spelling.head[0] + old[len(head) :]
        if spelling.blocks is not None and old.startswith(blocks):
            return f"{spelling.blocks[0]}.{old[len(blocks) :]}"
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
        by_token=frozenset(map(name, known.by_token)),
        spelling=spelling,
    )
