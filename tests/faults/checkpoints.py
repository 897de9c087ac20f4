"""Damaged checkpoints: sections B, C and D of the fault list. One function per way, and what must be said about it.

A damage function takes a good sharded folder, as

    make_tiny(folder, shards=SHARDS)

leaves it, and spoils it in one way. The reader's tests ask the preflight, test_faults.py asks `marlinctl quantize`, and both expect the
same exit code. Nothing in here is allowed to hang or to need more than a few megabytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SHARDS = 3
INDEX = "model.safetensors.index.json"
SECOND = f"model-00002-of-{SHARDS:05d}.safetensors"
THIRD = f"model-00003-of-{SHARDS:05d}.safetensors"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"


class Fault(NamedTuple):
    damage: Callable[[Path], None]
    exit_code: int
    text: str  # appears in what, where or fix of one of the problems


# ---- tools ---------------------------------------------------------------------------------------------------------------------------


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header as an object, and the data behind it."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_shard(path: Path, header: Any, data: bytes) -> None:
    """A safetensors file with any header: an object, a text, or bytes."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _edit_header(edit: Callable[[dict[str, Any], list[str]], None]) -> Callable[[Path], None]:
    """Damage the second shard's header: `edit` gets the header and the tensor names in the order of their data."""

    def damage(folder: Path) -> None:
        header, data = read_shard(folder / SECOND)
        names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        edit(header, names)
        write_shard(folder / SECOND, header, data)

    return damage


def _set(**values: Any) -> Callable[[Path], None]:
    """Give the first tensor's entry other values; the offsets stay, unless they are among the values."""
    return _edit_header(lambda header, names: header[names[0]].update(values))


def _raw_header(raw: bytes | str) -> Callable[[Path], None]:
    return lambda folder: write_shard(folder / SECOND, raw, read_shard(folder / SECOND)[1])


def _length(value: int) -> Callable[[Path], None]:
    """Overwrite the header length alone."""

    def damage(folder: Path) -> None:
        with (folder / SECOND).open("r+b") as handle:
            handle.write(struct.pack("<Q", value))

    return damage


def _cut(by: int | None) -> Callable[[Path], None]:
    """Cut the second shard by so many bytes; None: in half."""

    def damage(folder: Path) -> None:
        size = (folder / SECOND).stat().st_size
        os.truncate(folder / SECOND, size // 2 if by is None else size - by)

    return damage


def _replace(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def _text(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def _edit_json(name: str, edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        edit(document)
        (folder / name).write_text(json.dumps(document))

    return damage


def _config(**values: Any) -> Callable[[Path], None]:
    return _edit_json("config.json", lambda document: document.update(values))


def _index_path(shard: object) -> Callable[[Path], None]:
    """The index names `shard` for all tensors of the second one."""

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"] = {t: shard if s == SECOND else s for t, s in index["weight_map"].items()}

    return _edit_json(INDEX, edit)


# ---- ways to be wrong that need more than one line -----------------------------------------------------------------------------------


def _gap(header: dict[str, Any], names: list[str]) -> None:
    del header[names[1]]


def _overlap(header: dict[str, Any], names: list[str]) -> None:
    twin = dict(header[names[0]])
    header["model.twin.weight"] = twin


def _huge_shape(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]]["shape"] = [2**40, 2**40, 2**40]


def _far_away(header: dict[str, Any], names: list[str]) -> None:
    entry = header[names[-1]]
    entry["data_offsets"] = [offset + 2**60 for offset in entry["data_offsets"]]


def _rank_100(header: dict[str, Any], names: list[str]) -> None:
    entry = header[names[0]]
    entry["shape"] = [1] * (100 - len(entry["shape"])) + entry["shape"]


def _half_the_rows(folder: Path) -> None:
    header, data = read_shard(folder / SECOND)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    entry = header[last]
    begin, end = entry["data_offsets"]
    entry["shape"][0] //= 2
    entry["data_offsets"] = [begin, begin + (end - begin) // 2]
    write_shard(folder / SECOND, header, data[: entry["data_offsets"][1]])


def _integers(folder: Path) -> None:
    """A weight as I16: the same bytes, another meaning."""
    header, data = read_shard(folder / SECOND)
    name = next(n for n in header if n.endswith("proj.weight"))
    header[name]["dtype"] = "I16"
    write_shard(folder / SECOND, header, data)


def _grown(folder: Path) -> tuple[dict[str, Any], bytes]:
    header, data = read_shard(folder / SECOND)
    return header, data + b"\0" * 16


def _duplicate_tensor(folder: Path) -> None:
    header, data = read_shard(folder / SECOND)
    name = next(n for n in header if n != "__metadata__")
    text = json.dumps(header)
    write_shard(folder / SECOND, "{" + json.dumps(name) + ":" + json.dumps(header[name]) + "," + text[1:], data)


def _duplicate_key_in_entry(folder: Path) -> None:
    header, data = read_shard(folder / SECOND)
    write_shard(folder / SECOND, json.dumps(header).replace('"dtype": "F16"', '"dtype": "F16", "dtype": "BF16"', 1), data)


def _tensor_in_two_shards(folder: Path) -> None:
    header, data = read_shard(folder / SECOND)
    other, more = read_shard(folder / THIRD)
    name = next(n for n in header if n != "__metadata__")
    begin, end = header[name]["data_offsets"]
    other[name] = header[name] | {"data_offsets": [len(more), len(more) + end - begin]}
    write_shard(folder / THIRD, other, more + data[begin:end])


def _drop_tensor(folder: Path) -> None:
    """The shard does not hold the last tensor it should; index unchanged."""
    header, data = read_shard(folder / SECOND)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    write_shard(folder / SECOND, {n: e for n, e in header.items() if n != last}, data[: header[last]["data_offsets"][0]])


def _drop_tensor_everywhere(folder: Path) -> None:
    before = set(read_shard(folder / SECOND)[0])
    _drop_tensor(folder)
    gone = before - set(read_shard(folder / SECOND)[0])

    def forget(index: dict[str, Any]) -> None:
        index["weight_map"] = {tensor: shard for tensor, shard in index["weight_map"].items() if tensor not in gone}

    _edit_json(INDEX, forget)(folder)


def _forget_in_index(folder: Path) -> None:
    name = next(n for n in read_shard(folder / SECOND)[0] if n != "__metadata__")
    _edit_json(INDEX, lambda index: index["weight_map"].pop(name))(folder)


def _missing_shards(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / THIRD).unlink()


def _no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def _no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def _only_pickle(folder: Path) -> None:
    """A pickle that would create the file `canary` if anybody opened it."""
    _no_weights(folder)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(folder / "canary"),))

    import pickle

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def _link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / SECOND).rename(outside)
    (folder / SECOND).symlink_to(outside)


def _parent_path(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / SECOND)
    _index_path(f"../{SECOND}")(folder)


def _index_to_pickle(folder: Path) -> None:
    (folder / SECOND).rename(folder / "weights.bin")
    _index_path("weights.bin")(folder)


def _remote_code(folder: Path) -> None:
    """Code in the folder that would create the file `canary` when imported, for a model type nobody knows."""
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(folder / 'canary')!r})\n")
    _config(model_type="evil", auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"})(folder)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _poison(value: bytes) -> Callable[[Path], None]:
    """Overwrite element [1, 3] of the first projection in the second shard."""

    def damage(folder: Path) -> None:
        header, _ = read_shard(folder / SECOND)
        name = next(n for n in header if n.endswith("proj.weight"))
        length = int.from_bytes((folder / SECOND).read_bytes()[:8], "little")
        columns = header[name]["shape"][1]
        with (folder / SECOND).open("r+b") as handle:
            handle.seek(8 + length + header[name]["data_offsets"][0] + 2 * (columns + 3))
            handle.write(value)

    return damage


def _larger_tokenizer(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["one-too-many"] = 288


FAULTS: dict[str, Fault] = {
    # shards
    "cut by one byte": Fault(_cut(1), 3, "truncated"),
    "cut by 100 bytes": Fault(_cut(100), 3, "truncated"),
    "cut in half": Fault(_cut(None), 3, "truncated"),
    "empty shard": Fault(_text(SECOND, ""), 3, "empty"),
    "five bytes": Fault(_text(SECOND, "12345"), 3, "too few"),
    "git-lfs pointer": Fault(_text(SECOND, LFS_POINTER), 3, "git lfs pull"),
    "trailing bytes": Fault(lambda f: write_shard(f / SECOND, *_grown(f)), 3, "behind the last tensor"),
    "header longer than the file": Fault(_length(50_000_000), 3, "truncated"),
    "header over 100 MB": Fault(_length(100_000_001), 3, "the format allows"),
    "header length 0": Fault(_length(0), 3, "shortest"),
    "header length 1": Fault(_length(1), 3, "shortest"),
    "header length 2^62": Fault(_length(2**62), 3, "the format allows"),
    "header length 2^63": Fault(_length(2**63), 3, "the format allows"),
    "header length 2^64-1": Fault(_length(2**64 - 1), 3, "the format allows"),
    "header not UTF-8": Fault(_raw_header(b'{"\xff\xfe": {}}'), 3, "UTF-8"),
    "header not JSON": Fault(_raw_header("{not json}"), 3, "not a safetensors header"),
    "header a list": Fault(_raw_header("[]"), 3, "begin with {"),
    "header a number": Fault(_raw_header("42"), 3, "begin with {"),
    "header unfinished": Fault(_raw_header('{"a": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}'), 3, "expected , or }"),
    "two headers": Fault(_raw_header("{}{}"), 3, "continues after"),
    "header nested deeply": Fault(_raw_header('{"a":' * 100_000), 3, "must be an object of dtype"),
    "shape nested deeply": Fault(_raw_header('{"a": {"dtype": "F16", "shape": ' + "[" * 4000 + "}}"), 3, "not JSON"),
    "entry a number": Fault(_raw_header('{"a": 1}'), 3, "must be an object of dtype"),
    "metadata not texts": Fault(_edit_header(lambda h, n: h.update(__metadata__={"a": 1})), 3, "texts only"),
    "metadata a list": Fault(_edit_header(lambda h, n: h.update(__metadata__=[])), 3, "must begin with {"),
    "metadata twice": Fault(_raw_header('{"__metadata__": {}, "__metadata__": {}}'), 3, "appears twice"),
    "tensor twice in a header": Fault(_duplicate_tensor, 3, "appears twice"),
    "key twice in an entry": Fault(_duplicate_key_in_entry, 3, "appears twice"),
    "name with half a surrogate": Fault(_raw_header('{"\\ud800": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}'), 3, "not text"),
    "unknown dtype": Fault(_set(dtype="F12"), 3, "supported: BOOL"),
    "dtype a number": Fault(_set(dtype=7), 3, "supported: BOOL"),
    "shape negative": Fault(_set(shape=[-1, 4]), 3, "shape must be"),
    "shape fractions": Fault(_set(shape=[1.5]), 3, "shape must be"),
    "shape of truths": Fault(_set(shape=[True, True]), 3, "shape must be"),
    "shape times dtype wrong": Fault(_set(shape=[3]), 3, "needs 6 bytes"),
    "shape overflows": Fault(_edit_header(_huge_shape), 3, "impossibly large"),
    "rank 100": Fault(_edit_header(_rank_100), 3, "100 dimensions"),
    "offsets negative": Fault(_set(data_offsets=[-2, 2]), 3, "data_offsets must be"),
    "offsets backwards": Fault(_set(data_offsets=[8, 4]), 3, "data_offsets must be"),
    "offsets three": Fault(_set(data_offsets=[0, 2, 4]), 3, "data_offsets must be"),
    "offsets out of range": Fault(_edit_header(_far_away), 3, "truncated"),
    "offsets with a gap": Fault(_edit_header(_gap), 3, "gap"),
    "offsets overlap": Fault(_edit_header(_overlap), 3, "overlaps"),
    "extra key in an entry": Fault(_set(extra=1), 3, "must hold dtype, shape and data_offsets"),
    "missing shards": Fault(_missing_shards, 3, THIRD),
    "shard is a fifo": Fault(_replace(SECOND, lambda p: os.mkfifo(p)), 3, "FIFO"),
    "shard is a directory": Fault(_replace(SECOND, lambda p: p.mkdir()), 3, "a directory"),
    "shard is a device": Fault(_replace(SECOND, lambda p: p.symlink_to("/dev/zero")), 3, "out of the checkpoint folder"),
    "shard links out": Fault(_link_out, 3, "out of the checkpoint folder"),
    "shard links to itself": Fault(_replace(SECOND, lambda p: p.symlink_to(p.name)), 3, "cannot be followed"),
    "shard links to nothing": Fault(_replace(SECOND, lambda p: p.symlink_to("gone")), 3, "missing"),
    # index
    "index cut": Fault(lambda f: os.truncate(f / INDEX, (f / INDEX).stat().st_size // 2), 3, "not JSON"),
    "index empty": Fault(_text(INDEX, ""), 3, "not JSON"),
    "index a list": Fault(_text(INDEX, "[]"), 3, "weight_map"),
    "index without weight_map": Fault(_text(INDEX, '{"metadata": {}}'), 3, "weight_map"),
    "index with empty weight_map": Fault(_text(INDEX, '{"weight_map": {}}'), 3, "weight_map"),
    "index with a key twice": Fault(_text(INDEX, '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'), 3, "twice"),
    "index nested deeply": Fault(_text(INDEX, '{"weight_map":' * 100_000), 3, "nested too deeply"),
    "index value a number": Fault(_index_path(7), 3, "no file name"),
    "index value a list": Fault(_index_path([SECOND]), 3, "no file name"),
    "index is a fifo": Fault(_replace(INDEX, lambda p: os.mkfifo(p)), 3, "FIFO"),
    "index path to the parent": Fault(_parent_path, 3, "may leave the checkpoint folder"),
    "index path absolute": Fault(_index_path("/etc/passwd.safetensors"), 3, "may leave the checkpoint folder"),
    "index path with NUL": Fault(_index_path("model\0.safetensors"), 3, "may leave the checkpoint folder"),
    "index path with backslash": Fault(_index_path("..\\model.safetensors"), 3, "may leave the checkpoint folder"),
    "index path empty": Fault(_index_path(""), 3, "may leave the checkpoint folder"),
    "index path endless": Fault(_index_path("a" * 100_000 + ".safetensors"), 3, "cannot be followed"),
    "index names a pickle": Fault(_index_to_pickle, 3, "not a safetensors file"),
    "index promises too much": Fault(_drop_tensor, 3, "does not hold it"),
    "index forgets a tensor": Fault(_forget_in_index, 3, "not in the index"),
    "tensor in two shards": Fault(_tensor_in_two_shards, 3, "two shards"),
    "no index": Fault(_no_index, 3, "no model.safetensors.index.json"),
    # the folder as a whole
    "no weights": Fault(_no_weights, 3, "no weights"),
    "only a pickle": Fault(_only_pickle, 3, "save_pretrained"),
    "tensor missing everywhere": Fault(_drop_tensor_everywhere, 3, "is missing"),
    "tensor with half the rows": Fault(_half_the_rows, 3, "config.json asks for"),
    "tensor of integers": Fault(_integers, 3, "holds I16"),
    # contents
    "NaN in a weight": Fault(_poison(b"\x00\x7e"), 6, "[1, 3] is nan"),
    "infinity in a weight": Fault(_poison(b"\x00\xfc"), 6, "[1, 3] is -inf"),
    # config and tokenizer
    "config missing": Fault(lambda f: (f / "config.json").unlink(), 3, "config.json is missing"),
    "config cut": Fault(lambda f: os.truncate(f / "config.json", 40), 3, "not JSON"),
    "config a list": Fault(_text("config.json", "[]"), 3, "not an object"),
    "config nested deeply": Fault(_text("config.json", "[" * 100_000), 3, "nested too deeply"),
    "config with a key twice": Fault(_text("config.json", '{"model_type": "llama", "model_type": "gemma2"}'), 3, "twice"),
    "config is a fifo": Fault(_replace("config.json", lambda p: os.mkfifo(p)), 3, "FIFO"),
    "vocab_size 10^12": Fault(_config(vocab_size=10**12), 3, "vocab_size"),
    "num_hidden_layers 10^12": Fault(_config(num_hidden_layers=10**12), 3, "num_hidden_layers"),
    "hidden_size a text": Fault(_config(hidden_size="128"), 3, "hidden_size"),
    "config asks for more layers": Fault(_config(num_hidden_layers=3), 3, "is missing"),
    "config with another hidden_size": Fault(_config(hidden_size=64), 3, "config.json asks for"),
    "already quantized": Fault(_config(quantization_config={"quant_method": "gptq", "bits": 4}), 3, "marlinctl pack"),
    "unknown architecture": Fault(_config(model_type="mamba9"), 3, "mamba9"),
    "remote code": Fault(_remote_code, 3, "never runs"),
    "tokenizer missing": Fault(_no_tokenizer, 3, "tokenizer is missing"),
    "tokenizer larger than the embedding": Fault(_edit_json("tokenizer.json", _larger_tokenizer), 3, "larger than the embedding"),
    "tokenizer cut": Fault(lambda f: os.truncate(f / "tokenizer.json", 1000), 3, "not JSON"),
    "tokenizer is a fifo": Fault(_replace("tokenizer.json", lambda p: os.mkfifo(p)), 3, "FIFO"),
}  # fmt: skip
