"""Which model a folder holds: digests of its files, what is read for them, and what counts as a change."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from marlinctl.checkpoint import contents as subject
from marlinctl.checkpoint import manifest, mask
from marlinctl.checkpoint.contents import Contents, Noted, read_contents, reading_contents
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint
from marlinctl.checkpoint.source_digests import check_known_digests
from marlinctl.errors import BadInput
from marlinctl.system.atomic import canonical
from marlinctl.system.console import Console
from tests.faults.checkpoints import INDEX, SECOND, SHARDS
from tests.tiny import make_tiny, tiny_config, tiny_tensors, write_weights

QUIET = Console.quiet()
FIRST = SECOND.replace("00002", "00001", 1)
NEVER_NEW = -(10**15)  # files of a test are younger than two seconds


def read(folder: Path, noted: Noted | None = None) -> Contents:
    with open_checkpoint(folder) as checkpoint:
        return read_contents(checkpoint, QUIET, scan=checkpoint.tensors, noted=noted)


def noted(found: Contents) -> Noted:
    """As a journal holds it: through JSON."""
    return Noted.of(json.loads(json.dumps(found.fingerprint)), json.loads(json.dumps(found.document())))


def flip(path: Path, place: int = -5) -> None:
    """One bit of a weight, and the time of the last change as before."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def shards_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """How many bytes of each file were read since the last time this was asked."""
    counts: dict[str, int] = {}
    read_file_into = Checkpoint.read_file_into

    def counting(self: Checkpoint, file: Path, offset: int, buffer: memoryview, where: str) -> None:
        counts[file.name] = counts.get(file.name, 0) + len(buffer)
        read_file_into(self, file, offset, buffer, where)

    def taken() -> dict[str, int]:
        found = dict(counts)
        counts.clear()
        return found

    monkeypatch.setattr(Checkpoint, "read_file_into", counting)
    return taken


# ---- what identifies a model ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_every_kind_of_change(tmp_path: Path) -> None:
    """A resumed job would continue with another model."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    first = read(folder).fingerprint
    assert read(folder).fingerprint == first
    assert read(Path(shutil.copytree(folder, tmp_path / "copy"))).fingerprint == first, "where it lies decides nothing"
    assert set(first["files"]) >= {"config.json", "tokenizer.json", INDEX} and SECOND in first["shards"]
    (folder / "marlinctl_report.json").write_text("{}")
    assert read(folder).fingerprint == first, "a report tells how long things took"

    flip(folder / SECOND)
    assert {name: facts == first["shards"][name] for name, facts in read(folder).fingerprint["shards"].items()} == {
        name: name != SECOND for name in first["shards"]
    }
    flip(folder / SECOND)
    (folder / mask.NAME).write_bytes(b"masks")
    assert read(folder).fingerprint["masks"] != {}
    (folder / mask.NAME).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    assert read(folder).fingerprint != first


def test_digests_are_those_of_the_files_and_each_byte_is_read_once(
    tmp_path: Path, shards_read: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's digests and a manifest's are compared with these; reading twice costs minutes with a large model."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    monkeypatch.setattr(subject, "CHUNK_BYTES", 1000 // 8 * 8)
    found = read(folder)
    assert shards_read() == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    for name, facts in manifest.build(folder, {})["files"].items():
        assert found.digests.get(name, facts["sha256"]) == facts["sha256"], name
    assert len(found.digests) >= SHARDS + 4


def test_known_digests_come_before_what_the_weights_are(tmp_path: Path) -> None:
    """A NaN that a damaged disk has made would be called a training that diverged."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    (folder / manifest.NAME).write_bytes(canonical(manifest.build(folder, {})))
    with open_checkpoint(folder) as checkpoint:
        assert check_known_digests(checkpoint, read_contents(checkpoint, QUIET)) == SHARDS
        info = next(info for info in checkpoint.tensors.values() if info.file.name == SECOND)
    with (folder / SECOND).open("r+b") as file:
        file.seek(info.begin)
        file.write(b"\xff\xff")
    with open_checkpoint(folder) as checkpoint:
        found = read_contents(checkpoint, QUIET, scan=checkpoint.tensors)
        assert "E620" in found.problems
        with pytest.raises(BadInput) as caught:
            check_known_digests(checkpoint, found)
    assert caught.value.error_id == "E304" and [SECOND in problem.where for problem in caught.value.problems] == [True]


def test_a_process_of_its_own_finds_the_same(tmp_path: Path) -> None:
    """If this failed, weights read while the text is read would pass with a NaN, or get a digest that resuming does not find again."""
    config = tiny_config()
    tensors = tiny_tensors(config)
    names = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    tensors[names[0]][0, 0] = torch.nan
    tensors[names[1]].zero_()
    folder = make_tiny(tmp_path / "model")
    write_weights(folder, tensors)
    with open_checkpoint(folder) as checkpoint:
        here = read_contents(checkpoint, QUIET, scan=checkpoint.tensors)
        with reading_contents(checkpoint, QUIET, scan=checkpoint.tensors, apart_from=0) as read_apart:
            apart = read_apart()
    assert apart == here and apart.document() == here.document()
    assert set(apart.problems) == {"E620"} and apart.zero_tensors == [names[1]]


def test_a_shard_that_is_cut_is_refused_by_the_other_process_too(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 5000)
        with reading_contents(checkpoint, QUIET, apart_from=0) as read_apart, pytest.raises(BadInput) as refused:
            read_apart()
    assert refused.value.error_id == "E301" and "longer when it was checked" in str(refused.value)


def test_the_other_process_ends_with_what_it_was_begun_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a run that refuses its text would leave a process behind that reads for minutes."""
    folder = make_tiny(tmp_path / "model")
    fork, begun = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: begun.append(fork()) or begun[-1])
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 1 << 34)  # sparse: half a minute to read
        larger = replace(checkpoint, tensors={name: replace(info, end=1 << 34) for name, info in list(checkpoint.tensors.items())[-1:]})
        with pytest.raises(ZeroDivisionError), reading_contents(larger, QUIET, apart_from=0):
            raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)


def test_without_a_second_process_all_is_read_in_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a machine that forbids overcommitting memory would refuse every large model with a defect."""

    def refuse() -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    folder = make_tiny(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        here = read_contents(checkpoint, QUIET, scan=checkpoint.tensors)
        monkeypatch.setattr(os, "fork", refuse)
        with reading_contents(checkpoint, QUIET, scan=checkpoint.tensors, apart_from=0) as read_later:
            assert read_later() == here


def test_matrices_of_zeros_are_found(tmp_path: Path) -> None:
    """A linear that was never filled in would be quantized to nothing, without a word; a zero bias is no such thing."""
    folder = make_tiny(tmp_path / "model")
    tensors = tiny_tensors(tiny_config())
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(-0.0)
    tensors["model.layers.0.mlp.up_proj.weight"][1:] = 0
    tensors["model.norm.weight"].zero_()
    tensors["codes"], tensors["nothing"] = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(0, 4)
    write_weights(folder, tensors)
    assert read(folder).zero_tensors == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_columns_with_one_value_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Inputs that a damaged or padded weight does nothing with would be told of nowhere; rows that span chunks would hide them."""
    monkeypatch.setattr(subject, "CHUNK_BYTES", chunk)
    folder = make_tiny(tmp_path / "model")
    tensors = tiny_tensors(tiny_config())
    up, down, head = (tensors[f"{name}.weight"] for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"))
    up[:, [0, 5, 127]] = torch.tensor([1.0, 0.0, -2.0]).half()
    up[3::2, 5] = -0.0
    down[:, 77] = 0.5
    head[:, 9] = 0.25
    head[-1, 9] = 0.5  # all rows but the last
    tensors["model.layers.0.self_attn.k_proj.weight"].zero_()
    tensors["few"] = torch.ones(7, 4)
    write_weights(folder, tensors)
    found = read(folder)
    assert found.constant_columns == {"model.layers.0.mlp.up_proj.weight": 3, "model.layers.1.mlp.down_proj.weight": 1}
    assert found.zero_tensors == ["model.layers.0.self_attn.k_proj.weight"]


# ---- what is read again --------------------------------------------------------------------------------------------------------------


def test_a_shard_that_nobody_touched_is_not_read_again(
    tmp_path: Path, shards_read: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `resume` of a large model would begin with reading all of it; or what the first scan found would be forgotten."""
    monkeypatch.setattr(subject, "SETTLED_NS", NEVER_NEW)
    folder = make_tiny(tmp_path / "model")
    write_weights(folder, tiny_tensors(tiny_config()) | {"model.norm.weight": torch.zeros(2, 64)}, shards=SHARDS)
    first = read(folder)
    shards_read()
    again = read(folder, noted(first))
    assert shards_read() == {}
    assert (again.fingerprint, again.zero_tensors, again.document()) == (first.fingerprint, ["model.norm.weight"], first.document())


def _flipped(path: Path) -> None:
    flip(path)


def _replaced(path: Path) -> None:
    """By a file of the same size and times, under the same name."""
    before, copy = path.stat(), path.with_name("copy")
    shutil.copy(path, copy)
    flip(copy)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(path)


def _linked(path: Path) -> None:
    """The name leads to another file now, as after a `huggingface-cli download` of another revision."""
    other = path.with_name("other.bin")
    shutil.copy(path, other)
    flip(other)
    path.unlink()
    path.symlink_to(other.name)


@pytest.mark.parametrize("change", [_flipped, _replaced, _linked])
def test_a_change_is_seen_though_time_and_size_are_as_before(
    tmp_path: Path, shards_read: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """One flipped bit, its time put back, would pass for the file that was there."""
    monkeypatch.setattr(subject, "SETTLED_NS", NEVER_NEW)
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    first = read(folder)
    shards_read()
    change(folder / SECOND)
    again = read(folder, noted(first))
    assert shards_read().keys() == {SECOND}
    assert [name for name, facts in again.fingerprint["shards"].items() if facts != first.fingerprint["shards"][name]] == [SECOND]


def test_a_file_that_was_just_written_is_not_believed(tmp_path: Path, shards_read: Callable[[], dict[str, int]]) -> None:
    """Clocks of file systems tick slowly: a change in the tick of the first reading leaves the stamp as it is."""
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    first = read(folder)
    assert shards_read().keys() >= {FIRST, SECOND}
    assert all(facts["stamp"] is None for facts in first.document().values())
    read(folder, noted(first))
    assert shards_read().keys() >= {FIRST, SECOND}


@pytest.mark.parametrize(
    "document",
    [None, [], "x", {FIRST: None}, {FIRST: {"stamp": 3, "odd": {}}}, {FIRST: {"stamp": [1, 2], "odd": None}}, {FIRST: {}}],
)
@pytest.mark.parametrize("fingerprint", [None, {"shards": None}, {"shards": {FIRST: None}}, {"shards": {FIRST: {"sha256": 5}}}])
def test_notes_of_a_damaged_journal_are_not_believed(tmp_path: Path, document: object, fingerprint: object) -> None:
    """A journal with a flipped bit would end in a traceback, or vouch for a file."""
    assert Noted.of(fingerprint, document) == Noted({}, {}, {})


# ---- while a run is at work ----------------------------------------------------------------------------------------------------------


def test_a_change_after_reading_is_refused_and_a_touch_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that somebody writes to during a run of ten hours would be published as a mixture of both."""
    monkeypatch.setattr(subject, "SETTLED_NS", NEVER_NEW)
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    found = read(folder)
    found.require_unchanged()
    (folder / SECOND).touch()
    read_again: list[str] = []
    sha256 = subject.sha256_of_member
    monkeypatch.setattr(subject, "sha256_of_member", lambda folder, name: (read_again.append(name), sha256(folder, name))[1])
    found.require_unchanged()
    found.require_unchanged()
    assert read_again == [SECOND], "a file that was touched is read once and known again then"

    flip(folder / SECOND)
    (folder / FIRST).unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput) as caught:
        found.require_unchanged()
    assert caught.value.error_id == "E306"
    assert {problem.what.split(" ")[0] for problem in caught.value.problems} == {FIRST, SECOND, "tokenizer.json"}


def test_a_shard_that_is_replaced_while_it_is_read_is_refused_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest would be of half the old file and half the new one, and belong to neither."""
    monkeypatch.setattr(subject, "SETTLED_NS", NEVER_NEW)
    folder = make_tiny(tmp_path / "model", shards=SHARDS)
    read_shard = subject._read_shard

    def disturbed(checkpoint: Checkpoint, path: Path, *rest: object) -> object:
        found = read_shard(checkpoint, path, *rest)  # type: ignore[arg-type]
        if path.name == SECOND:
            flip(path)
        return found

    monkeypatch.setattr(subject, "_read_shard", disturbed)
    found = read(folder)
    with pytest.raises(BadInput, match="changed while this run was at work"):
        found.require_unchanged()


def test_a_small_file_that_may_not_be_followed_is_refused(tmp_path: Path) -> None:
    """A link out of the folder would end in a traceback."""
    folder = make_tiny(tmp_path / "model")
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / "added_tokens.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BadInput) as caught:
        read(folder)
    assert caught.value.error_id == "E301" and "added_tokens.json" in caught.value.problems[0].where
