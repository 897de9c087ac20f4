"""What marlinctl published comes back damaged: section H of the fault list, and the flipped bits of section C.

    digests     a file is not what the manifest says: changed, missing, extra, no file at all
    labels      config.json says another thing than the tensors are, and clients believe config.json
    structure   tensors are missing, too many, of another shape or dtype; numbers that nothing can mean
    breakages   right names, shapes and numbers, and nonsense all the same: five ways to get packing wrong, in every format

All but the first are made as if they had happened before publishing: the manifest agrees with the damaged files, and something else must
notice. `verify` fails, and whatever would multiply with these tensors refuses them first.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tests.faults.commands import Command, Prepare, asked
from tests.packed import edit_json, edit_tensors, make_packed, make_sparse_packed, remake_manifest
from tests.tiny import make_tiny

LAYER = "model.layers.1.mlp.gate_proj"
SKIPPED = "model.layers.0.self_attn.o_proj"
MANIFEST = "marlinctl_manifest.json"
SHARD = "model.safetensors"  # of a published folder in ct
FORMATS = ("ct", "gptq", "marlin", "marlin_24")
CODES = {"ct": "weight_packed", "gptq": "qweight", "marlin": "B", "marlin_24": "B_24"}
SCALES = {"ct": "weight_scale", "gptq": "scales", "marlin": "s", "marlin_24": "s"}

Damage = Callable[[Path], object]
Tensors = dict[str, Tensor]


_ROOM = TemporaryDirectory()  # as long as this process lives


@functools.cache
def _sound(fmt: str) -> Path:
    """Before the damage, the same for all; of the model that test_faults.py has as `good`."""
    make_tiny(Path(_ROOM.name) / fmt / "good")
    make = make_sparse_packed if fmt == "marlin_24" else make_packed
    folder = Path(_ROOM.name) / fmt / "packed"
    make(folder.parent / "good", folder, fmt, skip=[SKIPPED], overrides={"model.layers.1.mlp.down_proj": 64})
    return folder


def _published(root: Path, fmt: str, damage: Damage, remade: bool) -> Path:
    """root/packed, in one format, with one linear left in 16 bits and one in another group size; then damaged."""
    folder = Path(shutil.copytree(_sound(fmt), root / "packed"))
    damage(folder)
    if remade:
        remake_manifest(folder)
    return folder


def _verify(fmt: str, damage: Damage, *, remade: bool = True, source: bool = False) -> Prepare:
    """remade: the manifest agrees with the damage. source: compared with the original."""

    def prepare(root: Path) -> list[str]:
        folder = _published(root, fmt, damage, remade)
        return ["verify", str(folder), "--no-load", *(["--source", f"{root}/good"] if source else [])]

    return prepare


def _eval(fmt: str, damage: Damage) -> Prepare:
    return lambda root: ["eval", str(_published(root, fmt, damage, True)), "--text", "pythondoc", "--tokens", "64", "--window", "32"]


def _pack(fmt: str, damage: Damage, *, remade: bool = True) -> Prepare:
    to = "gptq" if fmt == "ct" else "ct"
    return lambda root: ["pack", str(_published(root, fmt, damage, remade)), f"{root}/out", "--format", to]


# ---- digests -------------------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit of the last number but one."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def _flip_first(folder: Path) -> None:
    flip(min(folder.glob("*.safetensors")))


def _wrong_digest(folder: Path) -> None:
    edit_json(folder / MANIFEST, lambda document: document["files"]["tokenizer.json"].update(sha256="0" * 64))


def _no_file_any_more(make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "config.json").unlink()
        make(folder / "config.json")

    return damage


def _code_below(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "evil.py").write_text("raise SystemExit")


def _rotten_cache(root: Path) -> list[str]:
    """A model as the hub's client keeps it: files are links to blobs, and the blob of weights is called by its SHA-256."""
    repository = root / "hub" / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted((root / "model").iterdir()):
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else hashlib.sha1(data).hexdigest()
        (blobs / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    flip(min(snapshot.glob("*.safetensors")).resolve())
    return asked(root, model=str(snapshot.relative_to(root)))


def _rotten_dense(root: Path) -> list[str]:
    """A 16-bit model that marlinctl published is quantized."""
    remake_manifest(root / "good")
    _flip_first(root / "good")
    return asked(root, model="good")


DIGESTS: dict[str, Command] = {
    "no manifest": Command(_verify("ct", lambda f: (f / MANIFEST).unlink(), remade=False), 1, f"there is no {MANIFEST}"),
    "a digest that is wrong": Command(_verify("ct", _wrong_digest, remade=False), 1, "tokenizer.json has SHA-256"),
    "a file that was cut": Command(_verify("ct", lambda f: os.truncate(f / SHARD, 9), remade=False), 1, f"{SHARD} has 9 bytes"),
    "a file that is missing": Command(
        _verify("ct", lambda f: (f / "tokenizer.json").unlink(), remade=False), 1, "tokenizer.json is missing"
    ),
    "a shard too many": Command(
        _verify("ct", lambda f: shutil.copy(f / SHARD, f / "model-old.safetensors"), remade=False),
        1,
        "model-old.safetensors is not in the manifest",
    ),
    "code in a folder below": Command(_verify("ct", _code_below, remade=False), 1, "sub/evil.py is not in the manifest"),
    "a link too many": Command(
        _verify("ct", lambda f: (f / "link.json").symlink_to("/etc/hostname"), remade=False), 1, "link.json is not in the manifest"
    ),
    "a link in the place of a file": Command(
        _verify("ct", _no_file_any_more(lambda p: p.symlink_to("tokenizer.json")), remade=False), 1, "config.json has -1 bytes"
    ),
    "a fifo in the place of a file": Command(
        _verify("ct", _no_file_any_more(lambda p: os.mkfifo(p)), remade=False), 1, "config.json has -1 bytes"
    ),
    **{f"a flipped bit, {fmt}": Command(_verify(fmt, _flip_first, remade=False), 1, ".safetensors has") for fmt in FORMATS},
    "a flipped bit, packed on": Command(_pack("ct", _flip_first, remade=False), 3, f"packed/{SHARD}"),
    "a flipped bit, quantized": Command(_rotten_dense, 3, "good/model.safetensors"),
    "a flipped bit in the hub's cache": Command(_rotten_cache, 3, "its SHA-256 differs"),
}


# ---- labels --------------------------------------------------------------------------------------------------------------------------


def _label(change: Callable[[Any], object]) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def _said(**values: object) -> Damage:
    return _label(lambda block: block.update(values))


_GROUP_64 = _label(lambda block: block["config_groups"]["group_0"]["weights"].update(group_size=64))

LABELS: dict[str, Command] = {
    "gptq_v2 on what is v1": Command(_verify("gptq", _said(checkpoint_format="gptq_v2")), 1, "off by one"),
    "gptq_v2 on what is v1, evaluated": Command(_eval("gptq", _said(checkpoint_format="gptq_v2")), 3, 'write "checkpoint_format": "gptq"'),
    "gptq_v2 on what is v1, packed on": Command(_pack("gptq", _said(checkpoint_format="gptq_v2")), 3, 'write "checkpoint_format": "gptq"'),
    "a checkpoint_format that nobody knows": Command(_verify("gptq", _said(checkpoint_format="gptq_v9")), 3, "'gptq_v9' is not read"),
    "a checkpoint_format that nobody knows, evaluated": Command(
        _eval("gptq", _said(checkpoint_format="gptq_v9")), 3, "'gptq_v9' is not read"
    ),
    "desc_act where there is none": Command(_verify("gptq", _said(desc_act=True)), 1, "desc_act"),
    "no quantization_status": Command(_verify("ct", _label(lambda b: b.pop("quantization_status"))), 1, "random numbers"),
    "a 16-bit linear that ignore leaves out": Command(_verify("ct", _said(ignore=["lm_head"])), 1, f"{SKIPPED} is 16-bit"),
    "a packed linear that ignore names": Command(_verify("ct", _label(lambda b: b["ignore"].append(LAYER))), 1, f"{LAYER} is packed"),
    "another group size, ct": Command(_verify("ct", _GROUP_64), 1, "weight_scale"),
    "another group size, marlin": Command(_verify("marlin", _said(group_size=64)), 1, ".s is F16"),
    "overrides left out": Command(_verify("marlin", _label(lambda b: b.pop("overrides"))), 1, "down_proj.s"),
    "a format_version to come": Command(_verify("marlin", _said(format_version=3)), 3, "format_version 3"),
    "dense tiles called 2:4": Command(_verify("marlin", _said(format="marlin_24")), 3, "says marlin_24, but"),
    "2:4 tiles called dense": Command(_verify("marlin_24", _said(format="marlin")), 3, "says marlin, but"),
}  # fmt: skip


# ---- structure -----------------------------------------------------------------------------------------------------------------------


def _tensors(change: Callable[[Tensors], object]) -> Damage:
    return lambda folder: edit_tensors(folder, change)


def _without(name: str) -> Damage:
    return _tensors(lambda tensors: tensors.pop(name))


def _instead(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return _tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def _added(name: str, tensor: Tensor) -> Damage:
    return _tensors(lambda tensors: tensors.update({name: tensor}))


def _one(name: str, place: int, value: float) -> Damage:
    """One number of a tensor is another."""
    return _tensors(lambda tensors: tensors[name].view(-1)[place : place + 1].fill_(value))


STRUCTURE: dict[str, Command] = {
    "a norm that is missing": Command(_verify("ct", _without("model.norm.weight")), 1, "model.norm.weight is missing"),
    "zero points that are missing": Command(_verify("gptq", _without(f"{LAYER}.qzeros")), 1, f"{LAYER}.qzeros is missing"),
    "metadata that is missing": Command(_verify("marlin_24", _without(f"{LAYER}.B_meta")), 1, f"{LAYER}.B_meta is missing"),
    "a tensor of no linear": Command(
        _verify("ct", _added("model.layers.9.mlp.up_proj.weight", torch.zeros(2, 2))), 1, "not a tensor of this model"
    ),
    "groups in another order": Command(_verify("gptq", _instead(f"{LAYER}.g_idx", torch.zeros_like)), 3, "act-order"),
    "a weight_shape of another linear": Command(
        _verify("ct", _added(f"{LAYER}.weight_shape", torch.tensor([128, 256]))), 1, "weight_shape does not say"
    ),
    "a norm of half the size": Command(_verify("ct", _added("model.norm.weight", torch.ones(64).half())), 1, "expected"),
    "an infinite scale": Command(_verify("ct", _one(f"{LAYER}.weight_scale", 3, torch.inf)), 3, "NaN or infinity"),
    "a scale that is no number": Command(_verify("marlin", _one(f"{LAYER}.s", 3, torch.nan)), 3, "NaN or infinity"),
}

# What a kernel would multiply with: nobody who is about to do so may take it. The exit code is verify's; the others' is 3.
UNREADABLE: Mapping[str, tuple[str, Damage, int, str]] = {
    "scales that are missing": ("ct", _without(f"{LAYER}.weight_scale"), 1, f"{LAYER}.weight_scale is missing"),
    "scales of another type": ("marlin", _instead(f"{LAYER}.s", Tensor.bfloat16), 1, f"{LAYER}"),
    "scales of another shape": ("marlin", _instead(f"{LAYER}.s", lambda s: s[1:]), 1, f"{LAYER}"),
    "words of another shape": ("marlin", _instead(f"{LAYER}.B", lambda words: words[:, :-2]), 1, f"{LAYER}"),
    "metadata of another shape": ("marlin_24", _instead(f"{LAYER}.B_meta", lambda meta: meta[1:]), 1, f"{LAYER}"),
    "metadata that names a survivor twice": ("marlin_24", _one(f"{LAYER}.B_meta", 700, 0x4F44), 3, f"{LAYER}: metadata of row 121"),
    "metadata in the wrong order": ("marlin_24", _one(f"{LAYER}.B_meta", 700, 0x4144), 3, f"{LAYER}: metadata of row 121"),
}
for _what, (_fmt, _damage, _code, _text) in UNREADABLE.items():
    STRUCTURE[f"{_what}, verified"] = Command(_verify(_fmt, _damage), _code, _text)
    STRUCTURE[f"{_what}, evaluated"] = Command(_eval(_fmt, _damage), 3, _text)
    STRUCTURE[f"{_what}, packed on"] = Command(_pack(_fmt, _damage), 3, _text)


# ---- breakages -----------------------------------------------------------------------------------------------------------------------


def _permuted_scales(fmt: str) -> Damage:
    """The scales of another order, as a packer with a wrong permutation writes them: reversed along N."""
    return _instead(f"{LAYER}.{SCALES[fmt]}", lambda scales: scales.flip(0 if fmt == "ct" else 1))


def _swapped_nibbles(fmt: str) -> Damage:
    """The two nibbles of every byte exchanged: another convention of packing."""

    def swap(words: Tensor) -> Tensor:
        data = words.contiguous().view(torch.uint8)
        return (data >> 4 | data << 4).view(torch.int32)

    return _instead(f"{LAYER}.{CODES[fmt]}", swap)


def _swapped_words(fmt: str) -> Damage:
    """Words of a row in reverse: a wrong tile order."""
    return _instead(f"{LAYER}.{CODES[fmt]}", lambda words: words.flip(1))


def _another_layer(fmt: str) -> Damage:
    """gate and up exchanged: right shapes, wrong layer."""

    def exchange(tensors: Tensors) -> None:
        for suffix in (CODES[fmt], SCALES[fmt]):
            a, b = f"{LAYER}.{suffix}", f"model.layers.1.mlp.up_proj.{suffix}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return _tensors(exchange)


def _shifted_codes(fmt: str) -> Damage:
    """Every code four too high, wrapped around: another zero point."""

    def shift(words: Tensor) -> Tensor:
        nibbles = ((words.to(torch.int64) & 0xFFFFFFFF).unsqueeze(-1) >> torch.arange(0, 32, 4) & 15) + 4 & 15
        total = (nibbles << torch.arange(0, 32, 4)).sum(-1)
        return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)

    return _instead(f"{LAYER}.{CODES[fmt]}", shift)


_WAYS = {
    "permuted scales": _permuted_scales,
    "swapped nibbles": _swapped_nibbles,
    "swapped words": _swapped_words,
    "another layer": _another_layer,
    "shifted codes": _shifted_codes,
}
# Every one of these loads everywhere. If it happened before publishing, only the original tells.
BREAKAGES: dict[str, Command] = {
    f"{way}, {fmt}": Command(_verify(fmt, make(fmt), source=True), 1, LAYER) for way, make in _WAYS.items() for fmt in FORMATS
} | {
    "permuted metadata": Command(_verify("marlin_24", _instead(f"{LAYER}.B_meta", lambda meta: meta.flip(1)), source=True), 1, LAYER),
}

PACKED: dict[str, Command] = DIGESTS | LABELS | STRUCTURE | BREAKAGES
