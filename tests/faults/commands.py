"""What is no damage of a checkpoint: arguments, places, recipes, numbers, texts, the machine. Sections A, C, E and F of the fault list.

`COMMANDS` and `WORKS` have functions that get a folder with a good `model` (in shards), the same as `good` in one file, a `text.txt` and a
recipe `small.yaml`, change it, and return the arguments of the command that must end that way. What is left behind is looked at, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Prepare = Callable[[Path], list[str]]


class Command(NamedTuple):
    prepare: Prepare
    exit_code: int
    text: str  # appears in what, where or fix of one of the problems; for exit code 0 in the report
    environment: Mapping[str, str | None] = {}  # None: not set
    machine: tuple[str, ...] = ()  # states of tests/faults/machines.py
    holds: Callable[[Path], None] | None = None  # asserts of what was published what the report does not tell


def asked(root: Path, *more: str, model: str = "model", out: str = "out", text: str = "text.txt") -> list[str]:
    small = ["--recipe", f"{root}/small.yaml", "--group-size", "32", "--samples", "2", "--sequence-length", "32", "--dtype", "float32"]
    return ["quantize", f"{root}/{model}", f"{root}/{out}", "--calibration", f"{root}/{text}", *small, *more]


def _with(*more: str) -> Prepare:
    return lambda root: asked(root, *more)


def _recipe(text: str) -> Prepare:
    def prepare(root: Path) -> list[str]:
        (root / "mine.yaml").write_text(text)
        return asked(root, "--recipe", f"{root}/mine.yaml")

    return prepare


def _calibration(name: str, data: bytes) -> Prepare:
    def prepare(root: Path) -> list[str]:
        (root / name).write_bytes(data)
        return asked(root, text=name)

    return prepare


def _out_full(root: Path) -> list[str]:
    (root / "out").mkdir()
    (root / "out" / "config.json").write_text("{}")
    return asked(root)


def _out_is_link_to_input(root: Path) -> list[str]:
    (root / "out").symlink_to("model")
    return asked(root, "--overwrite")


def _model(change: Callable[[dict[str, Any]], None], dtype: str = "float16", **changes: Any) -> Prepare:
    """A model whose weights are changed before it is asked for."""

    def prepare(root: Path) -> list[str]:
        import torch

        from tests.tiny import tiny_config, tiny_tensors, write_weights

        shutil.rmtree(root / "model")
        shutil.copytree(root / "good", root / "model")
        (root / "model" / "model.safetensors").unlink(missing_ok=True)
        config = tiny_config(**({"dtype": dtype} | changes))
        tensors = tiny_tensors(config, dtype=getattr(torch, dtype))
        change(tensors)
        (root / "model" / "config.json").write_text(json.dumps(config))
        write_weights(root / "model", tensors)
        return asked(root)

    return prepare


def _scaled(factor: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("up_proj.weight"):
                tensors[name] = tensors[name] * factor

    return change


def _zero_linear(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()


def _constant_columns(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"][:, 3:5] = 0.25


def _stray_shard(root: Path) -> list[str]:
    """Of an earlier model, beside shards and index of this one."""
    shutil.copy(root / "good" / "model.safetensors", root / "model" / "model-00009.safetensors")
    return asked(root)


def _no_metadata(root: Path) -> list[str]:
    index = root / "model" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["metadata"]
    index.write_text(json.dumps(document))
    return asked(root)


def _zero_norm(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.input_layernorm.weight"].zero_()


def _overflowing_norm(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)


def _one_token_overflows(root: Path) -> list[str]:
    """Token Z alone has something in column 5 of the stream, which the last norm multiplies beyond float32: 1 of 64 tokens."""
    from tests.tiny import tiny_tokenizer

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][:, 5] = 0
        tensors["model.embed_tokens.weight"][tiny_tokenizer().token_to_id("Z"), 5] = 1
        for name in tensors:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name][5] = 0
        tensors["model.layers.1.post_attention_layernorm.weight"][5] = 3e38

    (root / "text.txt").write_text("xyzw" * 7 + "xyZz" + "wzyx" * 20)
    return _model(change, dtype="float32")(root)


def _head_is_embedding(tensors: dict[str, Any]) -> None:
    """A tied model whose file has the one matrix under both names."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _two_heads(tensors: dict[str, Any]) -> None:
    """A tied model whose file has a head that is not the embedding."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2


def _saved_once(root: Path) -> None:
    """The embedding is the source's, no head lies beside it, and transformers, which ties them again, gives the same logits."""
    from marlinctl.checkpoint.reader import open_checkpoint
    from marlinctl.system.console import Console
    from marlinctl.verify.run import verify

    with open_checkpoint(root / "out") as written, open_checkpoint(root / "model") as source:
        assert "lm_head.weight" not in written.tensors and written.config["tie_word_embeddings"] is True
        assert written.raw("model.embed_tokens.weight") == source.raw("model.embed_tokens.weight")
    assert verify(root / "out", source=None, load=True, console=Console.quiet()).logit_error is not None


def _program(root: Path) -> list[str]:
    """A data set of the old kind: a program beside its data. It would leave a file."""
    (root / "mine").mkdir()
    (root / "mine" / "mine.py").write_text(f"open({str(root / 'canary')!r}, 'w')\n")
    return asked(root, text="mine:train")


def _then(prepare: Prepare, *more: str) -> Prepare:
    return lambda root: [*prepare(root), *more]


def _gguf(root: Path) -> list[str]:
    (root / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    return asked(root, model="m.gguf")


COMMANDS: dict[str, Command] = {
    # arguments and places
    "misspelled verb": Command(lambda root: ["quantise", f"{root}/model", f"{root}/out"], 2, "quantize"),
    "misspelled option": Command(_with("--gruop-size", "64"), 2, "--group-size"),
    "no such model": Command(lambda root: asked(root, model="nope"), 2, "hub id"),
    "no such model, a hub id": Command(lambda root: ["quantize", "no/such", f"{root}/out", "--offline"], 7, "no/such"),
    "output is not empty": Command(_out_full, 2, "--overwrite"),
    "output is the input": Command(lambda root: asked(root, out="model"), 2, "the output is the input"),
    "output is inside the input": Command(lambda root: asked(root, out="model/out"), 2, "inside the input"),
    "output holds the input": Command(lambda root: asked(root, out="../" + root.name), 2, "inside the output"),
    "output is a link to the input": Command(_out_is_link_to_input, 2, "the output is the input"),
    "output below a file": Command(lambda root: asked(root, out="text.txt/out"), 2, "no folder"),
    "output in a folder that the system owns": Command(lambda root: ["quantize", f"{root}/model", "/proc/out"], 2, "cannot be written to"),
    "three bits": Command(_with("--bits", "3"), 2, "4"),
    "group size 100": Command(_with("--group-size", "100"), 2, "128"),
    "group size that does not divide K": Command(
        _then(_model(lambda tensors: None, intermediate_size=192), "--group-size", "128"), 2, "model.layers.1.mlp.down_proj"
    ),
    "an embedding, included": Command(_with("--include", "embed_tokens"), 2, "lm_head is the only one there is"),
    "an unknown dtype": Command(_with("--dtype", "float16"), 2, "bfloat16"),
    "no such size": Command(_with("--max-memory", "lots"), 2, "800MiB"),
    "size without a unit": Command(_with("--max-memory", "40"), 2, "40GiB"),
    # recipes
    "recipe: unknown key": Command(_recipe("extends: int4\nquantize: {grop_size: 64}\n"), 2, "group_size"),
    "recipe: wrong type": Command(_recipe("extends: int4\nquantize: {group_size: many}\n"), 2, "mine.yaml:2:12"),
    "recipe: key twice": Command(_recipe("extends: int4\nquantize: {refine: 1}\nquantize: {refine: 2}\n"), 2, "mine.yaml:3:1"),
    "recipe: python tag": Command(_recipe("extends: int4\nquantize: !!python/object/apply:os.system [ls]\n"), 2, "mine.yaml:2:11"),
    "recipe: deep nesting": Command(_recipe("a: " + "[" * 100_000), 2, "mine.yaml"),
    "recipe: no such file": Command(_with("--recipe", "nope.yaml"), 2, "nope.yaml"),
    "pattern that matches nothing": Command(_with("--skip", "dwon_proj"), 2, "down_proj"),
    "pattern that matches all": Command(_with("--skip", "*"), 2, "nothing would be quantized"),
    # numbers
    "weights too large for a float16 scale": Command(_model(_scaled(1e9), dtype="float32"), 6, "mlp.up_proj.weight[0, 0]"),
    "weights too large, bfloat16": Command(_model(_scaled(1e9), dtype="bfloat16"), 6, "hold up to 456,960"),
    "weights too small for a float16 scale": Command(_model(_scaled(1e-6), dtype="float32"), 6, "every weight rounds to zero"),
    "activations that overflow": Command(_model(_overflowing_norm, dtype="float32"), 6, "NaN or infinite"),
    "an input that is always zero, strict": Command(_then(_model(_zero_norm), "--strict"), 6, "--strict"),
    "a weight of zeros, strict": Command(_then(_model(_zero_linear), "--strict"), 6, "layers.1.mlp.up_proj.weight holds nothing but zeros"),
    "constant columns, strict": Command(_then(_model(_constant_columns), "--strict"), 6, "2 columns of model.layers.0.mlp.down_proj"),
    "a shard that no index names, strict": Command(_then(_stray_shard, "--strict"), 3, "model-00009.safetensors"),
    "an index without metadata, strict": Command(_then(_no_metadata, "--strict"), 3, "has no metadata"),
    "a tied head that is another matrix": Command(_model(_two_heads, tie_word_embeddings=True), 3, "tie_word_embeddings"),
    # calibration
    "text: empty": Command(_calibration("empty.txt", b""), 3, "the text is empty"),
    "text: blank lines": Command(_calibration("blank.txt", b"\n \n\n"), 3, "the text is empty"),
    "text: too little": Command(_calibration("little.txt", b"a word"), 3, "2 were asked for"),
    "text: binary": Command(_calibration("junk.txt", b"ok\n\x00\x01\x02\n"), 3, "line 2"),
    "text: another encoding": Command(_calibration("latin.txt", "fine\nGr\u00fc\u00dfe\n".encode("latin-1")), 3, "line 2"),
    "text: JSON lines that are none": Command(_calibration("bad.jsonl", b'{"text": "a"}\n{"text": \n'), 3, "line 2"),
    "text: without the column": Command(_calibration("column.jsonl", b'{"body": "a"}\n'), 3, "text"),
    "text: a data set that is a program": Command(_program, 3, "a program that would have to be run"),
    "text: CSV": Command(_calibration("rows.csv", b"text\na\n"), 2, ".jsonl"),
    "text: no such file": Command(lambda root: asked(root, text="nope.txt"), 2, "nope.txt"),
    # the machine
    "an unknown device": Command(_with("--device", "tpu"), 2, "cuda"),
    "too little memory": Command(_with("--max-memory", "1MiB"), 5, "--max-memory"),
    "a cache that cannot be written": Command(_gguf, 4, "--cache-dir", {"MARLINCTL_CACHE": "/dev/null/cache"}),
}  # fmt: skip

# What looks wrong and must work, with what the report must say.
WORKS: dict[str, Command] = {
    "one repeated token": Command(_calibration("one.txt", b"a" * 4000), 0, "damping"),
    "an input that is always zero": Command(_model(_zero_norm), 0, '"fallbacks": [{'),
    "a weight of zeros": Command(_model(_zero_linear), 0, "weights that hold nothing but zeros: model.layers.1.mlp.up_proj.weight"),
    "constant columns": Command(_model(_constant_columns), 0, "in every row: model.layers.0.mlp.down_proj.weight (2)"),
    "a shard that no index names": Command(_stray_shard, 0, "not read lie in the folder: model-00009.safetensors"),
    "an index without metadata": Command(_no_metadata, 0, "index.json has no metadata"),
    "weights near the largest float16": Command(_model(_scaled(1e5)), 0, "error"),
    "weights near the largest that 4 bits hold": Command(_model(_scaled(1e6), dtype="bfloat16"), 0, "error"),
    "one token in 64 that overflows": Command(_one_token_overflows, 0, '"tokens": 63'),
    "a tied head": Command(_model(lambda tensors: None, tie_word_embeddings=True), 0, "error", holds=_saved_once),
    "a tied head, stored twice": Command(_model(_head_is_embedding, tie_word_embeddings=True), 0, "error", holds=_saved_once),
    "no home, no place for temporary files": Command(
        _with(), 0, "error", {"HOME": None, "TMPDIR": "/nowhere", "MARLINCTL_CACHE": "/dev/null/cache"}
    ),
    "flag and recipe disagree": Command(_with("--damping", "0.05"), 0, "0.05"),
}
