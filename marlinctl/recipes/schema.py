"""Recipes: everything that decides the numbers of a run, as one frozen value with a hash.

A recipe is a YAML file. It says only what differs from the recipe it extends, in the end from `int4`, whose file is the one
home of every default. Flags of the command line override the recipe (`resolve`), and what they changed is said and recorded.

    quantize:     how weights become codes          pack:      which formats are published
    sparsify:     which weights are kept               evaluate:  how the result is measured
    calibration:  which tokens the Hessian sees
    distill:      how a 2:4 or 4-bit model is trained toward its original

A recipe may come from a stranger. It is data only: reading is `yaml_positions` (no tags, no aliases, no repeated keys), checking
is pydantic with unknown keys forbidden, and every refusal names file, line and column.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from marlinctl.errors import Problem, UsageError
from marlinctl.quantize.scheme import ACTIVATION_GROUP, INT8, Scheme
from marlinctl.recipes import renamed
from marlinctl.recipes.foreign_formats import instead_of
from marlinctl.recipes.yaml_positions import Place, read_yaml
from marlinctl.system.files import FileRefused, read_plain
from marlinctl.system.log import redacted

DEFAULT = "int4"
AUTO = "auto"  # a source of calibration text that is chosen when the work begins: data/default_set.py
_FLAG_NAMES = {"source": "--calibration", "formats": "--format/--also", "overrides": "--override"}  # of keys whose flag is called otherwise
MAXIMUM_BYTES = 1 << 17  # 2,000 overrides; the worst text of that size takes 11 s to read, one of a megabyte 90
_SECTIONS = ("quantize", "sparsify", "calibration", "pack", "evaluate")  # whose keys `with_sections` knows

GroupSize = Literal[128, 64, 32, -1]
Fraction = Annotated[float, Field(gt=0, le=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML knows lists, a frozen value wants tuples


# Upper ends are far beyond every use. They keep products of two of them within 64 bits, and what libraries are given within 32.
_MOST = 2**31 - 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Override(_Section):
    """What one pattern of layers does differently."""

    group_size: GroupSize | None = None
    bits: Literal[4, 8] | None = None
    activations: Literal["int8", "fp8"] | None = None  # rounded when the model runs; its weights are int8 or FP8 then

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.group_size is None and self.bits is None and self.activations is None:
            raise ValueError("use group_size or bits, or both")
        if self.activations is not None and self.bits != INT8.bits:
            raise ValueError(f"activations {self.activations} need 8-bit weights: use bits: 8 beside them")
        if self.activations is not None and self.group_size not in (None, -1):
            raise ValueError(f"weights beside {self.activations} activations have one scale per row: leave group_size out")
        return self

    @model_serializer(mode="wrap")
    def _what_is_said(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dumped(self).items() if value is not None}


class Quantize(_Section):
    bits: Literal[4, 8, 16]
    symmetric: bool
    group_size: GroupSize
    activations: Literal["16-bit", "int8"]
    activation_group: Literal[128, -1]
    group_scales: Literal["float16", "integer"]
    scale_sign: Literal["both", "positive"]
    act_order: Literal["static", "none"]
    scale_search: Literal["none", "mse", "hessian"]
    damping: Fraction | Literal["auto"]
    equalize: Literal["auto", "never"]
    rotate: Literal["auto", "always", "never"]
    token_weights: Literal["uniform", "gradient"]
    refine: int = Field(ge=0, le=100)
    drift_correction: float = Field(ge=0, le=1)
    drift_damping: Fraction
    tune_steps: int = Field(ge=0, le=10**6)
    tune_learning_rate: float = Field(gt=0, le=1)
    skip: Names
    overrides: dict[str, Override]
    include: Names

    @property
    def fixed_damping(self) -> float | None:
        """None: by the tokens per input (quantize/damping.py)."""
        return None if isinstance(self.damping, str) else self.damping


class Sparsify(_Section):
    pattern: Literal["none", "2:4"]
    method: Literal["magnitude", "wanda", "sparsegpt", "iterative"]
    mask_sweeps: int = Field(ge=0, le=100)
    ls_iterations: int = Field(ge=0, le=1000)
    permute: Literal["auto", "always", "never"]


class Calibration(_Section):
    source: str = Field(min_length=1)
    samples: int = Field(ge=1, le=_MOST)
    sequence_length: int = Field(ge=1, le=_MOST)
    seed: int = Field(ge=0, lt=2**63)
    chat: Literal["auto", "always", "never"]
    minimum_tokens: int = Field(ge=1, le=_MOST)


class Pack(_Section):
    formats: Annotated[tuple[Literal["ct", "gptq", "marlin", "marlin_24"], ...], Field(strict=False, min_length=1)]


class Evaluate(_Section):
    tasks: Names
    limit: Annotated[int, Field(ge=1, le=_MOST)] | None
    num_fewshot: Annotated[int, Field(ge=0, le=_MOST)] | None
    apply_chat_template: bool
    text: str = Field(min_length=1)
    tokens: int = Field(ge=2, le=_MOST)
    window: Annotated[int, Field(ge=2, le=_MOST)] | None


class Distill(_Section):
    mode: Literal["full", "blockwise", "scales"]
    data: str = Field(min_length=1)
    tokens: int = Field(ge=0, le=10**15)
    sequence_length: int = Field(ge=2, le=_MOST)
    batch_tokens: int = Field(ge=2, le=_MOST)
    micro_batch: int = Field(ge=1, le=_MOST)
    learning_rate: float = Field(gt=0, le=1)
    warmup: float = Field(ge=0, le=1)
    ce: float = Field(ge=0)
    squarehead: float = Field(ge=0)
    kl: float = Field(ge=0)
    temperature: float = Field(gt=0)
    mask: Literal["fixed", "renewed"]
    mask_interval: int = Field(ge=1, le=_MOST)
    mask_decay: float = Field(ge=0)
    cache_logits: int = Field(ge=0, le=_MOST)
    checkpointing: bool
    save_every: int = Field(ge=1, le=_MOST)
    seed: int = Field(ge=0, lt=2**62)


class Recipe(_Section):
    name: str = Field(min_length=1)
    description: str
    quantize: Quantize
    sparsify: Sparsify
    calibration: Calibration
    pack: Pack
    evaluate: Evaluate
    distill: Distill

    @property
    def scheme(self) -> Scheme:
        """What becomes of a linear for which nothing else is said."""
        q = self.quantize
        return Scheme(
            bits=q.bits, group_size=q.group_size, sparsity=self.sparsify.pattern, activations=q.activations, symmetric=q.symmetric,
            activation_group=q.activation_group,
        )  # fmt: skip

    @property
    def tunes(self) -> bool:
        """Whether scales and norms of each block are tuned after its solves: there are none where weights stay at 16 bits."""
        return self.quantize.tune_steps > 0 and self.scheme.quantizes

    @property
    def weighs_tokens(self) -> bool:
        """Whether calibration tokens count differently in the Hessians."""
        return self.quantize.token_weights == "gradient"

    def canonical(self) -> dict[str, Any]:
        """For hashes and journals: a JSON document that no rename of a key changes."""
        return renamed.canonical(self.model_dump(mode="json"))

    def canonical_json(self) -> str:
        """The same recipe gives the same text everywhere: sorted keys, no spaces, ASCII."""
        return json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    def to_yaml(self) -> str:
        """A file that `load_recipe` turns into an equal recipe, whatever the defaults are by then. Without secrets: it is published."""
        import yaml

        values = redacted(self.model_dump(mode="json"))
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the canonical JSON without name and description: equal hashes mean the same job."""
    body = recipe.canonical()
    del body["name"], body["description"]
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def builtin_names() -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in files("marlinctl.recipes").iterdir() if entry.name.endswith(".yaml"))


def _deprecated(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=3)


def load_recipe(name_or_path: str | Path, *, deprecated: Callable[[str], None] = _deprecated) -> Recipe:
    """A built-in recipe by name, or a file. Anything wrong with it is a UsageError that lists every problem, E288 for keys without effect.

    deprecated: is given one line for each key or value with a former name.
    """
    return _validate(_with_parents(_locate(name_or_path, Path(), where=f"recipe {name_or_path}"), (), deprecated))


def recipe_of_document(document: Mapping[str, Any]) -> Recipe:
    """What `model_dump` wrote, this version's or an earlier one's. pydantic's ValidationError for anything else."""
    return Recipe.model_validate(renamed.completed(renamed.current(document)[0]))


def resolve(recipe: Recipe, overrides: Mapping[str, Any], *, deprecated: Callable[[str], None] = _deprecated) -> tuple[Recipe, list[str]]:
    """The recipe with the flags that were given, {"quantize.group_size": 64, ...}; None means not given.

    Returns what the flags changed as sentences, to be said once and recorded. deprecated: as in `load_recipe`.
    """
    values = recipe.model_dump(mode="json")
    places: dict[tuple[str, ...], Place] = {}
    changes: list[str] = []
    given: dict[str, dict[str, Any]] = {}
    for dotted, value in overrides.items():
        section, field = dotted.split(".")
        if value is not None:
            given.setdefault(section, {})[field] = list(value) if isinstance(value, tuple) else value
    given, former = renamed.current(given)
    for item in former:
        deprecated(item.what)
    for section, field, value in ((section, field, value) for section, keys in given.items() for field, value in keys.items()):
        flag = _FLAG_NAMES.get(field, "--" + field.replace("_", "-"))
        places[section, field] = Place(f"{flag} {value}")
        if values[section].get(field) != value:
            changes.append(f"{flag} {_spoken(value)} instead of {_spoken(values[section].get(field))} (recipe {recipe.name})")
        values[section][field] = value
    _drop_rounding(values, given, recipe.quantize.activation_group)
    return _validate(_Layer(values, places, Place(f"recipe {recipe.name}")), error_id="E202", given=places), changes


def _spoken(value: Any) -> str:
    """A value in one line of text."""
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, dict)) else "none" if value is None else str(value)


def divided(recipe: Recipe) -> tuple[Recipe, Recipe] | None:
    """How `compress` divides a recipe that distils: what prunes before and what quantizes after. None: one pass does all."""
    if recipe.sparsify.pattern == "none" or recipe.distill.tokens == 0:
        return None
    return resolve(recipe, {"quantize.bits": 16})[0], resolve(recipe, {"sparsify.pattern": "none"})[0]


def with_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"group_size": 64} as `resolve` wants it: {"quantize.group_size": 64}. A key's name is unique over all sections."""
    known = {field: f"{section}.{field}" for section in _SECTIONS for field in _keys_at((section,))}
    homes = known | {field: f"{section}.{field}" for field, section in renamed.former_keys().items()}
    unknown = [name for name in values if name not in homes]
    if unknown:
        problems = [Problem(f"there is no option {name}", f"{name}={values[name]!r}", _nearest_key(name, list(known))) for name in unknown]
        raise UsageError.from_problems("E202", problems)
    return {homes[name]: value for name, value in values.items()}


# From files to one dictionary


@dataclass(frozen=True, slots=True)
class _Layer:
    values: dict[str, Any]
    places: Mapping[tuple[str, ...], Place]  # where each key was written
    origin: Place


@dataclass(frozen=True, slots=True)
class _Found:
    title: str  # what messages call it: `recipe int4`, or the path as it was given
    stem: str  # its name when it gives itself none
    folder: Path  # what `extends: ./other.yaml` is relative to
    identity: str
    text: str


def _locate(name_or_path: str | Path, folder: Path, *, where: str) -> _Found:
    """`int4` is a built-in; anything with a slash or a suffix is a file, relative to the file that extends it."""
    given = str(name_or_path)
    if given in builtin_names():
        return _Found(f"recipe {given}", given, Path(), given, (files("marlinctl.recipes") / f"{given}.yaml").read_text("utf-8"))
    path = folder / given
    if "\0" in given or not path.is_file():
        near = get_close_matches(given, builtin_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            "E240",
            f"'{given}' is neither a built-in recipe nor a file",
            where=where,
            fix=f"{hint}built in: {', '.join(builtin_names())}; or the path of a .yaml file",
        )
    try:
        text = read_plain(path, limit=MAXIMUM_BYTES).decode("utf-8")
    except FileRefused as refused:
        raise UsageError("E206", f"the recipe cannot be read: {refused.problem.what}", where=str(path), fix=refused.problem.fix) from None
    except UnicodeDecodeError as error:
        raise UsageError("E206", f"not UTF-8 text at byte {error.start}", where=str(path), fix="save the recipe as UTF-8") from error
    return _Found(str(path), path.stem, path.parent, str(path.resolve()), text)


def _with_parents(found: _Found, children: tuple[str, ...], deprecated: Callable[[str], None]) -> _Layer:
    """The file's own keys over those of the recipe it extends, up to int4."""
    written, places = read_yaml(found.text, found.title)
    own, former = renamed.current(written)
    for item in former:
        deprecated(f"{places[item.path]}: {item.what}")
        places[item.now] = places[item.path]
    parent = own.pop("extends", None if found.identity == DEFAULT else DEFAULT)
    own.setdefault("name", found.stem)
    own.setdefault("description", "")
    origin = Place(found.title)
    if parent is None:
        return _Layer(own, places, origin)
    where = str(places.get(("extends",), origin))
    if not isinstance(parent, str):
        raise UsageError("E206", f"extends must be a recipe's name or path, not {parent!r}", where=where, fix=f"extends: {DEFAULT}")
    base_file = _locate(parent, found.folder, where=where)
    chain = (*children, found.identity)
    if base_file.identity in chain:
        raise UsageError("E206", "recipes extend each other in a circle", where=where, fix=f"end the chain at {DEFAULT}")
    base = _with_parents(base_file, chain, deprecated)
    merged = _merge(base.values, own)
    _drop_rounding(merged, own, base.values.get("quantize", {}).get("activation_group", ACTIVATION_GROUP))
    return _Layer(merged, {**base.places, **places}, origin)


def _drop_rounding(values: dict[str, Any], own: Mapping[str, Any], former_group: object) -> None:
    """Whoever turns the rounding of another recipe off means its groups too, and the scales that only kernels for it have a use for; and
    whoever gives a token several scales where that recipe had one means the latter.
    """
    said = own.get("quantize")
    if not isinstance(said, Mapping):
        return
    off = said.get("activations") == "16-bit"
    if off and "activation_group" not in said:
        values["quantize"]["activation_group"] = ACTIVATION_GROUP
    several = said.get("activation_group") == ACTIVATION_GROUP != former_group
    if (off or several) and "group_scales" not in said:
        values["quantize"]["group_scales"] = "float16"


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; a key's value, list or mapping, is replaced as a whole."""
    merged = dict(base)
    for key, value in own.items():
        merged[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


# Checking


def _validate(layer: _Layer, error_id: str = "E206", given: Collection[tuple[str, ...]] = ()) -> Recipe:
    """given: the keys that flags set."""
    try:
        recipe = Recipe.model_validate(layer.values)
    except ValidationError as error:
        found = error.errors(include_url=False)
    else:
        if useless := list(_idle(recipe, layer, given)):
            raise UsageError.from_problems("E288", useless)
        return recipe
    unknown = [item for item in found if item["type"] == "extra_forbidden"]
    problems = [_problem(item, layer) for item in [*unknown, *(item for item in found if item not in unknown)]]
    raise UsageError.from_problems(error_id, problems)


@dataclass(frozen=True, slots=True)
class _Rule:
    """When a key changes nothing beside the others. Whoever gives it would believe in what is not done."""

    idle: Callable[[Recipe], bool]
    why: str
    needed: str  # the flag that gives the key a meaning
    default: object = None  # a file may say it all the same, as `to_yaml` writes all keys; None: files are not asked


_RULES: Mapping[tuple[str, str], _Rule] = {
    ("quantize", "activation_group"): _Rule(
        lambda recipe: recipe.scheme.rounding == "none",
        "activations stay at 16 bits, so no inputs share a scale",
        "--activations int8",
        ACTIVATION_GROUP,
    ),
    ("distill", "mask_interval"): _Rule(lambda recipe: recipe.distill.mask == "fixed", "the mask is fixed", "--mask renewed"),
    ("distill", "mask_decay"): _Rule(lambda recipe: recipe.distill.mask == "fixed", "the mask is fixed", "--mask renewed"),
    ("distill", "temperature"): _Rule(lambda recipe: recipe.distill.kl == 0, "the divergence has weight 0", "--kl 1"),
}


def _idle(recipe: Recipe, layer: _Layer, given: Collection[tuple[str, ...]]) -> Iterator[Problem]:
    """given: the keys that flags set, with whatever value."""
    for key, rule in _RULES.items():
        section, name = key
        said = key in given or (rule.default is not None and getattr(getattr(recipe, section), name) != rule.default)
        if said and rule.idle(recipe):
            what = f"{section}.{name} has no effect: {rule.why}"
            yield Problem(what, str(_place(key, layer)), f"{rule.needed} as well, or leave it out")


def _problem(item: Any, layer: _Layer) -> Problem:
    path = tuple(str(part) for part in item["loc"])
    where = str(_place(path, layer))
    name = ".".join(path)
    if item["type"] == "extra_forbidden":
        return Problem(f"unknown key {name}", where, _nearest_key(path[-1], _keys_at(path[:-1])))
    if item["type"] == "literal_error" and path[:2] == ("pack", "formats"):
        return Problem(f"there is no format {item['input']!r}", where, instead_of(item["input"], item["ctx"]["expected"]))
    if item["type"] == "literal_error":
        return Problem(f"{name} cannot be {item['input']!r}", where, f"use {item['ctx']['expected']}")
    if item["type"] == "value_error":
        return Problem(f"{name} cannot be {item['input']!r}", where, str(item["ctx"]["error"]))
    message = item["msg"].removeprefix("Input should be ")
    return Problem(f"{name} cannot be {item['input']!r}", where, f"use {message}" if message != item["msg"] else message)


def _nearest_key(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def _place(path: tuple[str, ...], layer: _Layer) -> Place:
    """The nearest place that is known: a wrong list item is found at its own line, a flag at its name."""
    for length in range(len(path), 0, -1):
        if path[:length] in layer.places:
            return layer.places[path[:length]]
    return layer.origin


def _keys_at(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        if part == "overrides" or model is Override:
            model = Override
        else:
            annotation = model.model_fields[part].annotation
            assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
            model = annotation
    return [*model.model_fields, *(["extends"] if model is Recipe else [])]
