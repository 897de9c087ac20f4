"""Bytes that a fuzzer chooses, as a checkpoint and as packed linears. What may happen: they are read, or they are refused as bad input.

    make fuzz                                             a minute: half of it for each target
    python -m tests.fuzz checkpoint -max_total_time=3600  longer; every option of libFuzzer is understood

    checkpoint   a shard, an index or a config of any bytes    ─► open, scan, read every tensor; what is accepted, safetensors accepts too
    packed       a packed linear of any words, shapes, config  ─► unpack; what is accepted is written again, to the same words

atheris guides by the branches that marlinctl takes. tests/test_fuzz.py runs the same two functions without it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FORMATS = {
    "ct": {"weight_packed": "I32", "weight_scale": "F16", "weight_shape": "I64"},
    "gptq": {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"},
    "marlin": {"B": "I32", "s": "F16", "weight_shape": "I64"},
    "marlin_24": {"B_24": "I32", "B_meta": "I16", "s": "F16", "weight_shape": "I64"},
}
_BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "I16": 2, "BF16": 2}
LAYER = "model.layers.0.mlp.up_proj"
LONGEST = 1 << 14  # bytes of one input


def checkpoint(folder: Path, data: bytes) -> bool:
    """Whether the folder was accepted. The first byte says which file the rest is; the others are good."""
    from marlinctl.checkpoint.contents import read_contents
    from marlinctl.checkpoint.reader import open_checkpoint
    from marlinctl.errors import BadInput, NumericalProblem
    from marlinctl.system.console import Console
    from tests.faults.checkpoints import INDEX

    kind, rest = (data[0] % 4 if data else 0), data[1:]
    entry = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
    good = json.dumps({"a": entry}).encode()
    shard = len(good).to_bytes(8, "little") + good + b"\0\0\0\x3c"
    if kind == 0:
        shard = rest
    elif kind == 1:  # a header of any bytes, with its true length
        header, _, tail = rest.partition(b"\xff\xff")
        shard = len(header).to_bytes(8, "little") + header + tail
    (folder / "model.safetensors").write_bytes(shard)
    (folder / "config.json").write_bytes(rest if kind == 2 else b"{}")
    (folder / INDEX).unlink(missing_ok=True)
    if kind == 3:
        (folder / INDEX).write_bytes(rest)
    try:
        with open_checkpoint(folder) as found:
            contents = read_contents(found, Console.quiet(), scan=found.tensors, for_4_bits=found.tensors)
            with suppress(NumericalProblem):
                contents.require_finite()
            names = {name: found.read(name).shape for name in found.tensors}
    except BadInput:
        return False
    if kind != 3:
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as theirs:
            assert {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()} == {n: tuple(s) for n, s in names.items()}  # noqa: SIM118
    return True


def packed(folder: Path, data: bytes) -> bool:
    """Whether the linear was accepted. Four bytes choose format, group size and shape; then changes of those; the rest are the words."""
    import torch

    from marlinctl.checkpoint.formats.registry import FORMATS as KNOWN
    from marlinctl.checkpoint.formats.registry import detect, linear_tensors, quantization_config, read_parts
    from marlinctl.checkpoint.reader import open_checkpoint
    from marlinctl.errors import BadInput

    head, data = data[:8].ljust(8, b"\0"), data[8:]
    fmt = list(FORMATS)[head[0] % 4]
    group_size = (-1, 32, 64, 128)[head[1] % 4]
    n, k = 8 * (1 + head[2] % 16), 32 * (1 + head[3] % 8)
    shapes = {suffix: list(shape) for suffix, (_, shape) in KNOWN[fmt].shapes(n, k, group_size).items()}
    if head[4] & 1:  # one shape is another
        shape = shapes[list(shapes)[head[5] % len(shapes)]]
        shape[head[6] % len(shape)] = head[7]
    header: dict[str, Any] = {}
    body = b""
    for suffix, dtype in FORMATS[fmt].items():
        if head[4] & 2 and head[5] % 5 == len(header):
            continue  # one tensor is missing
        if head[4] & 4 and head[6] % 5 == len(header):
            dtype = list(_BYTES)[head[7] % len(_BYTES)]
        size = _BYTES[dtype] * (shapes[suffix][0] if len(shapes[suffix]) == 1 else shapes[suffix][0] * shapes[suffix][1])
        words = _true(suffix, n, k, group_size) if not head[4] & (16 if suffix == "B_meta" else 8) else b""
        part = (words or _stretched(data, size))[:size].ljust(size, b"\0")
        data = data[1:] + data[:1]
        header[f"{LAYER}.{suffix}"] = {"dtype": dtype, "shape": shapes[suffix], "data_offsets": [len(body), len(body) + size]}
        body += part
    raw = json.dumps(header).encode()
    stem = "marlin" if fmt.startswith("marlin") else "model"
    for name in ("marlin", "model"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    (folder / f"{stem}.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization_config(KNOWN[fmt], {LAYER: group_size}, [], {})}))
    try:
        with open_checkpoint(folder, weight_files="auto") as found:
            info = detect(found.config, found.tensors)
            if LAYER not in info.layers:
                return False
            parts = read_parts(found, info, LAYER)
            quantized = parts.quantized(LAYER)
            again = linear_tensors(KNOWN[fmt], LAYER, quantized)
            for name, tensor in again.items():
                if name in found.tensors and not (fmt == "gptq" and name.endswith("qzeros")) and not _padding(fmt, n, k):
                    stored = found.read(name)
                    assert tensor.shape == stored.shape and torch.equal(tensor.to(stored.dtype), stored), name
    except BadInput:
        return False
    return True


def _padding(fmt: str, n: int, k: int) -> bool:
    """Whether there are words that no weight owns: what stands there does not come back."""
    return fmt.startswith("marlin") and bool(n % 64 or k % 64)


def _true(suffix: str, n: int, k: int, group_size: int) -> bytes:
    """The words that must be just so for anything to be accepted."""
    if suffix == "weight_shape":
        return n.to_bytes(8, "little") + k.to_bytes(8, "little")
    if suffix in ("qzeros", "B_meta"):
        return (b"\x77" if suffix == "qzeros" else b"\x4e") * (1 << 14)
    if suffix == "g_idx":
        return b"".join((i // (k if group_size == -1 else group_size)).to_bytes(4, "little") for i in range(k))
    return b""


def _stretched(data: bytes, size: int) -> bytes:
    return (data * (size // len(data) + 1))[:size] if data else bytes(size)


TARGETS: dict[str, Callable[[Path, bytes], bool]] = {"checkpoint": checkpoint, "packed": packed}


def seeds(target: str) -> list[bytes]:
    """Inputs that are accepted, for a fuzzer to begin with."""
    if target == "packed":
        return [bytes([f, g, 7, 3, flags, 0, 0, 0]) + bytes([0x11, 0x3C]) * 40 for f in range(4) for g in range(4) for flags in (0, 1 << 7)]
    entry = '"dtype":"F16","shape":[2],"data_offsets"'
    header = ('{"a":{' + entry + ':[0,4]},"__metadata__":{"format":"pt"},"b\\u00e9":{' + entry + ":[4,8]}}").encode()
    index = b'{"metadata":{},"weight_map":{"a":"model.safetensors"}}'
    return [
        b"\0" + len(header).to_bytes(8, "little") + header + bytes(8),
        b"\1" + header + b"\xff\xff" + bytes(8),
        b'\2{"model_type":"llama","hidden_size":8}',
        b"\3" + index,
    ]


def main() -> None:
    import atheris

    target = TARGETS[sys.argv[1]]
    with atheris.instrument_imports(include=["marlinctl"]):
        import marlinctl.checkpoint.finite
        import marlinctl.checkpoint.formats.registry
        import marlinctl.checkpoint.reader
        import marlinctl.pack.interchange
        import marlinctl.pack.sparse_marlin  # noqa: F401
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        folder, corpus = Path(place) / "checkpoint", Path(place) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        for i, seed in enumerate(seeds(sys.argv[1])):
            assert target(folder, seed), f"seed {i} is refused"
            (corpus / f"seed{i}").write_bytes(seed)
        atheris.Setup([sys.argv[0], f"-max_len={LONGEST}", *sys.argv[2:], str(corpus)], lambda data: (target(folder, data), None)[1])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
