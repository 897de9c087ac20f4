"""The preflight: what a good checkpoint gives, and that every damage of tests/faults/checkpoints.py is named, with its exit code."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from marlinctl.checkpoint import mask, reader
from marlinctl.checkpoint.contents import read_contents
from marlinctl.checkpoint.folder import examine
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.errors import BadInput, MarlinctlError
from marlinctl.models.switches import check_switches
from marlinctl.models.tokenizer_files import check_tokenizer
from marlinctl.system.console import Console
from tests.faults.checkpoints import FAULTS, INDEX, SECOND, SHARDS, Fault, write_shard
from tests.packed import make_packed
from tests.tiny import make_tiny, tiny_config, tiny_tensors, write_weights

REPOSITORY = Path(__file__).parents[2]


def preflight(folder: Path) -> Checkpoint:
    """What `quantize` asks before it starts."""
    checkpoint = open_checkpoint(folder)
    examine(checkpoint, structure="needed", dense=True, tokenizer=True)
    read_contents(checkpoint, Console.quiet(), scan=checkpoint.tensors).require_finite()
    return checkpoint


def told(error: MarlinctlError) -> str:
    return "\n".join(part for p in error.problems for part in (p.what, p.where, p.fix))


def everything_below(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.parent.rglob("*"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(tmp_path: Path, name: str) -> None:
    """A damaged checkpoint would be taken for a good one, or the error would not say what is wrong, or something hangs."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    fault: Fault = FAULTS[name]
    fault.damage(folder)
    before = everything_below(folder)
    with pytest.raises(MarlinctlError) as caught:
        preflight(folder)
    assert caught.value.exit_code == fault.exit_code, told(caught.value)
    assert fault.text in told(caught.value)
    assert all(p.what and p.where and p.fix and len(p.what) < 1000 for p in caught.value.problems)
    assert everything_below(folder) == before  # nothing written, no canary


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    """The person would fix one problem only to be told of the next."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    for name in ("missing shards", "config cut"):
        FAULTS[name].damage(folder)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    text = told(caught.value)
    assert SECOND in text and SECOND.replace("00002-of", "00003-of") in text and "config.json" in text
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("shards", [1, SHARDS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reads_what_safetensors_wrote(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    """Weights would be read from the wrong place or in the wrong dtype."""
    folder = make_tiny(tmp_path / "model", shards=shards, dtype=dtype)
    want = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    with preflight(folder) as checkpoint:
        assert checkpoint.tensors.keys() == want.keys()
        assert len(checkpoint.files) == shards
        assert checkpoint.notes == ()
        for name, tensor in want.items():
            got = checkpoint.read(name)
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), name
            assert bytes(checkpoint.raw(name)) == tensor.view(torch.uint8).numpy().tobytes(), name


def test_all_dtypes_and_shapes_of_the_format(tmp_path: Path) -> None:
    """A dtype, a scalar or an empty tensor would be misread."""
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "i64": torch.tensor([[-(2**40), 5]]),
        "i32": torch.arange(6, dtype=torch.int32).reshape(1, 2, 3),
        "u8": torch.arange(3, dtype=torch.uint8),
        "i8": torch.tensor([-128, 127], dtype=torch.int8),
        "i16": torch.tensor([-3], dtype=torch.int16),
        "f64": torch.tensor(3.5, dtype=torch.float64),
        "f8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.view(torch.uint8) if got.dim() else got, tensor.view(torch.uint8) if tensor.dim() else tensor), name


def test_rows_in_any_order_and_only_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding lookup would mix up rows, or read the whole embedding."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    checkpoint = open_checkpoint(folder)
    whole = checkpoint.read("model.embed_tokens.weight")
    read = 0
    original = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        done = original(descriptor, buffers, offset)
        read += done
        return done

    monkeypatch.setattr(os, "preadv", counting)
    for ids in ([287, 0, 3, 3, 0, 17], torch.tensor([[5, 4], [5, 287]]), []):
        got = checkpoint.rows("model.embed_tokens.weight", ids)
        assert torch.equal(got, whole[torch.as_tensor(ids, dtype=torch.int64).reshape(-1)])
    assert read == (4 + 3) * 2 * 128
    with pytest.raises(IndexError, match="288 rows"):
        checkpoint.rows("model.embed_tokens.weight", [288])
    with pytest.raises(IndexError, match="288 rows"):
        checkpoint.rows("model.embed_tokens.weight", [-1])


def test_reading_leaves_no_copies_in_memory(tmp_path: Path) -> None:
    """Peak memory of a long job would grow with the checkpoint: mapped pages or copies stay."""
    size = 256 << 20
    save_file({f"t{i}": torch.zeros(size // 16, dtype=torch.int8) for i in range(16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    program = (
        "import resource, sys, pathlib, torch\n"
        "from marlinctl.checkpoint.reader import open_checkpoint\n"
        "c = open_checkpoint(pathlib.Path(sys.argv[1])); c.read('t0')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in c.tensors: c.read(name)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < size // 4


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """Somebody who cuts the file during the job would kill us with SIGBUS or give us zeros."""
    folder = make_tiny(tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 5000)
    last = max(checkpoint.tensors.values(), key=lambda info: info.end)
    with pytest.raises(BadInput, match="longer when it was checked"):
        checkpoint.read(last.name)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without read permission would be a traceback. (chmod does not stop root, so open is made to refuse.)"""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    original = os.open

    def refusing(path: str | Path, flags: int, *args: int) -> int:
        if str(path).endswith(SECOND):
            raise PermissionError(13, "Permission denied")
        return original(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(BadInput, match="Permission denied") as caught:
        open_checkpoint(folder)
    assert SECOND in told(caught.value)


def test_index_wins_over_a_single_file(tmp_path: Path) -> None:
    """With both present, it would be chance which weights are read."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    write_weights(folder, tiny_tensors(tiny_config(), seed=1))
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) == SHARDS
    assert any("index is followed" in note for note in checkpoint.notes)
    assert torch.equal(checkpoint.read("model.norm.weight"), tiny_tensors(tiny_config())["model.norm.weight"])


def test_what_is_odd_about_a_folder_is_noted(tmp_path: Path) -> None:
    """A shard that the index has lost, or one that an earlier model left, would be passed over without a word."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    (folder / mask.NAME).write_bytes(b"belongs here")
    assert open_checkpoint(folder).notes == ()
    shutil.copy(folder / SECOND, folder / "model-00007.safetensors")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    metadata, stranger = open_checkpoint(folder).notes
    assert metadata.startswith(f"{INDEX} has no metadata") and "model-00007.safetensors" in stranger and SECOND not in stranger
    single = make_tiny(tmp_path / "single")
    shutil.copy(folder / SECOND, single / "adapter_model.safetensors")
    assert ["adapter_model.safetensors" in note for note in open_checkpoint(single).notes] == [True]


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """A model in the hub cache, which is made of links, would be refused; or links into other places would be followed."""
    good = make_tiny(tmp_path / "good", shards=SHARDS)
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(good.iterdir())):
        path.rename(repository / "blobs" / f"blob{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
    preflight(snapshot)
    elsewhere = tmp_path / "blobs-of-somebody"
    elsewhere.mkdir()
    link = snapshot / SECOND
    link.resolve().rename(elsewhere / "blob")
    link.unlink()
    link.symlink_to(elsewhere / "blob")
    with pytest.raises(BadInput, match="leads out"):
        preflight(snapshot)


def test_native_folders(tmp_path: Path) -> None:
    """marlin-*.safetensors would not be found, or be found by those who did not ask for them."""
    folder = make_tiny(tmp_path / "model", shards=2)
    for path in folder.glob("model*"):
        text = path.name.replace("model-", "marlin-").replace("model.", "marlin.")
        path.rename(folder / text)
    index = folder / "marlin.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0", "marlin-0"))
    assert len(open_checkpoint(folder, weight_files="marlin").tensors) == 21
    assert len(open_checkpoint(folder, weight_files="auto").tensors) == 21
    with pytest.raises(BadInput, match=r"config\.json belongs to weights called model"):
        open_checkpoint(folder)
    text = index.read_text()
    index.unlink()
    with pytest.raises(BadInput, match=r"no marlin\.safetensors\.index"):
        open_checkpoint(folder, weight_files="auto")
    index.write_text(text)
    write_weights(folder, tiny_tensors(tiny_config()))
    assert len(open_checkpoint(folder).files) == 1
    with pytest.raises(BadInput, match="two sets"):
        open_checkpoint(folder, weight_files="auto")


def test_whoever_needs_16_bit_weights_is_told_what_a_native_folder_is(tmp_path: Path) -> None:
    """If only the name of the files were looked at, an index would be said to be missing, and nothing can be downloaded that cures it."""
    make_packed(make_tiny(tmp_path / "model"), tmp_path / "marlin", "marlin")
    with pytest.raises(BadInput, match="the checkpoint is already quantized") as refused:
        preflight(tmp_path / "marlin")
    assert refused.value.error_id == "E313" and "marlinctl pack" in refused.value.problems[0].fix


def test_remote_code_of_a_known_model_is_ignored(tmp_path: Path) -> None:
    """A Llama that carries its own code would be refused, or its code would be run."""
    folder = make_tiny(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_x.M"})
    (folder / "modeling_x.py").write_text(f"import os\nos.mkdir({str(folder / 'canary')!r})\n")
    notes = check_switches(folder, open_checkpoint(folder).config)
    assert len(notes) == 1 and "is not run" in notes[0]
    assert not (folder / "canary").exists()


@pytest.mark.parametrize(
    ("file", "content", "fails"),
    [
        ("vocab.json", json.dumps({"a": 0, "b": 287}), False),
        ("vocab.json", json.dumps({"a": 0, "b": 288}), True),
        ("vocab.txt", "x\n" * 288, False),
        ("vocab.txt", "".join(f"x{i}\n" for i in range(289)), True),
        ("tokenizer.json", json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]] * 289}}), True),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 288, "content": "<x>"}]}), True),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"a": "0"}}}), True),
        ("tokenizer.json", json.dumps({"model": []}), True),
        ("tokenizer.model", b"\x0a\x03abc" * 288 + b"\x12\x00", False),
        ("tokenizer.model", b"\x0a\x03abc" * 289, True),
        ("tokenizer.model", b"\x0a\x7fabc", True),
        ("tokenizer.model", b"", True),
    ],
)
def test_tokenizers_of_all_kinds_are_counted(tmp_path: Path, file: str, content: str | bytes, fails: bool) -> None:
    """A tokenizer that is not a tokenizer.json would not be compared with the embedding."""
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    if fails:
        with pytest.raises(BadInput):
            check_tokenizer(tmp_path, tiny_config())
    else:
        check_tokenizer(tmp_path, tiny_config())


def test_gemma3_image_token_is_known(tmp_path: Path) -> None:
    """Every Gemma 3 text model would be refused: its tokenizer has one id behind the embedding."""
    document = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 288, "content": "<image_soft_token>", "special": True}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    check_tokenizer(tmp_path, tiny_config(model_type="gemma3_text"))
    with pytest.raises(BadInput, match="larger than the embedding"):
        check_tokenizer(tmp_path, tiny_config())


# ---- hostile bytes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filling",
    [
        *(b"\0", b"[", b'{"a":"', b'{"__metadata__":{"a":"\\n'),
        *(pytest.param(filling, marks=pytest.mark.slow) for filling in (b" ", b"{", b'"', b'{"__metadata__":{"a":"')),
    ],
)
def test_a_hostile_header_costs_little(tmp_path: Path, filling: bytes) -> None:
    """A header of 99 MB that describes nothing would cost gigabytes or minutes."""
    length = 99_000_000
    body = filling[:-2] + filling[-2:] * ((length - len(filling)) // 2) if filling.endswith(b"\\n") else filling
    path = tmp_path / "model.safetensors"
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", length) + body)
        tail = filling[-1:] if filling in (b"\0", b" ", b"{", b'"', b"[") else b"a"
        if not filling.endswith(b"\\n"):
            block = tail * (1 << 20)
            while handle.tell() < 8 + length:
                handle.write(block[: 8 + length - handle.tell()])
    os.truncate(path, 8 + length)
    tracemalloc.start()
    started = time.process_time()
    tensors, problems = read_header(tmp_path, path.name)
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not tensors and problems
    assert peak < 50e6
    assert seconds < 5  # under tracemalloc and on a busy machine; alone it is below 0.5


def test_fifty_thousand_tensors_are_quick(tmp_path: Path) -> None:
    """The entry by entry scan would be too slow for the largest real checkpoints."""
    header = {f"model.layers.{i}.weight": {"dtype": "F16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(50_000)}
    write_shard(tmp_path / "model.safetensors", header, bytes(100_000))
    started = time.process_time()
    tensors, problems = read_header(tmp_path, "model.safetensors")
    assert len(tensors) == 50_000 and not problems
    assert time.process_time() - started < 5  # alone it takes about 0.7 s


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "F32", "BF16", "I64"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), entries | json_values, max_size=4)
CONFIG_KEYS = ["vocab_size", "num_hidden_layers", "num_experts", "text_config"]
quiet = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def only_bad_input(folder: Path) -> None:
    with suppress(BadInput):
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.read(name)


@quiet
@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_as_a_shard(tmp_path: Path, raw: bytes) -> None:
    """Some bytes would give a traceback instead of an error."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(raw)
    only_bad_input(tmp_path)


@quiet
@given(raw=st.binary(max_size=120), rest=st.binary(max_size=40))
def test_arbitrary_bytes_as_a_header(tmp_path: Path, raw: bytes, rest: bytes) -> None:
    """Some header would give a traceback instead of an error."""
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / "model.safetensors", raw, rest)
    only_bad_input(tmp_path)


@quiet
@given(header=headers, size=st.integers(0, 40))
def test_arbitrary_json_as_a_header(tmp_path: Path, header: dict[str, object], size: int) -> None:
    """Well formed JSON of the wrong shape would give a traceback, or be accepted where safetensors refuses it."""
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / "model.safetensors", header, bytes(size))
    only_bad_input(tmp_path)
    tensors, problems = read_header(tmp_path, "model.safetensors")
    if not problems:
        assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()


@quiet
@given(index=json_values | st.fixed_dictionaries({"weight_map": json_values | st.dictionaries(st.text(max_size=8), st.text(max_size=20))}))
def test_arbitrary_json_as_an_index(tmp_path: Path, index: object) -> None:
    """Some index would give a traceback, or lead us out of the folder."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    only_bad_input(tmp_path)


@quiet
@given(config=json_values | st.dictionaries(st.sampled_from(CONFIG_KEYS), json_values))
def test_arbitrary_json_as_a_config(tmp_path: Path, config: object) -> None:
    """Some config.json would give a traceback."""
    write_shard(tmp_path / "model.safetensors", "{}", b"")
    (tmp_path / "config.json").write_text(json.dumps(config))
    only_bad_input(tmp_path)


def test_importing_and_opening_need_no_torch(tmp_path: Path) -> None:
    """`inspect` would take seconds because the reader imports torch."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    program = (
        "import sys, pathlib\nfrom marlinctl.checkpoint.reader import open_checkpoint\n"
        "from marlinctl.models import config, switches\nfrom marlinctl.checkpoint import finite, hub, source\n"
        "from marlinctl.checkpoint.gguf import convert\n"
        "from marlinctl.checkpoint.folder import examine\n"
        "examine(open_checkpoint(pathlib.Path(sys.argv[1])), structure='needed', dense=True, tokenizer=True)\n"
        "print({'torch', 'transformers', 'safetensors', 'gguf', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_problem_lists_are_capped(tmp_path: Path) -> None:
    """An index with a million missing shards would print a million problems."""
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {f"t{i}": f"model-{i}.safetensors" for i in range(300)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadInput) as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.problems) == reader.MAX_PROBLEMS + 1
    assert "200 more" in caught.value.problems[-1].what


@pytest.mark.parametrize(
    ("entry", "count"), [('"{}":5', 2_100_000), ('"{}":5', 200_000), ('"{}":"m{}.safetensors"', 200_000), ('"{}":[]', 200_000)]
)
def test_a_large_bad_index_costs_little(tmp_path: Path, entry: str, count: int) -> None:
    """An index of 57 MB with five million bad entries took 129 s and 1.9 GB; every entry became a line of the report."""
    folder = make_tiny(tmp_path / "model", shards=2)
    (folder / INDEX).write_text('{"weight_map":{' + ",".join(entry.replace("{}", str(i)) for i in range(count)) + "}}")
    started = time.process_time()
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    assert len(caught.value.problems) <= reader.MAX_PROBLEMS + 1
    assert ("holds more than 2,000,000 values" in caught.value.problems[0].what) == (count > 2_000_000), "refused before it is parsed"
    assert time.process_time() - started < 10


def test_one_file_under_many_names_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`./model.safetensors`, `././model.safetensors`, ... are one file, whose header of 100 MB would be parsed ten thousand times."""
    folder = make_tiny(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": "./" * i + "model.safetensors" for i in range(2000)}}))
    asked: list[str] = []
    real = reader.read_header
    monkeypatch.setattr(reader, "read_header", lambda folder, name: asked.append(name) or real(folder, name))
    with pytest.raises(BadInput, match="lies in two shards") as caught:
        open_checkpoint(folder)
    assert len(asked) < 20 and "were not looked at" in caught.value.problems[-1].what


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "anything"])
def test_no_fifo_lies_in_a_model(tmp_path: Path, name: str) -> None:
    """transformers opens files by their names and would wait for a writer for ever."""
    folder = make_tiny(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(BadInput, match="named pipe"):
        open_checkpoint(folder)


def test_threads_share_one_handle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two threads opened a shard at once and one handle replaced the other, a read in flight would hit a closed descriptor."""
    checkpoint = open_checkpoint(make_tiny(tmp_path / "model"))
    barrier, real = threading.Barrier(2), reader.open_member

    def together(*arguments: Any) -> Any:
        opened = real(*arguments)
        barrier.wait(timeout=10)
        return opened

    monkeypatch.setattr(reader, "open_member", together)
    handles: list[Any] = []
    threads = [threading.Thread(target=lambda: handles.append(checkpoint._handle(checkpoint.files[0]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handles[0] is handles[1] and not handles[0].closed
