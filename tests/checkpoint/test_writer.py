from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marlinctl.checkpoint import manifest, shards, writer
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.errors import BadInput, ResourceProblem, UsageError
from marlinctl.system import atomic
from tests.packed import tree
from tests.tiny import make_tiny

TENSORS = {"a": torch.arange(6, dtype=torch.float16).reshape(2, 3), "b": torch.arange(3), "c": torch.tensor([True]), "d": torch.zeros(0, 4)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "source")


def nothing(folder: Path) -> None:
    """A verification that finds nothing wrong."""


def publish(
    out: Path, *, overwrite: bool = False, fmt: str = "ct", verify: Callable[[Path], None] = nothing, value: float = 1.0,
    max_shard_bytes: int = 10**9,
) -> None:  # fmt: skip
    """A whole small publication: two pieces, copied tensors, companions."""
    source = open_checkpoint(out.parent / "source")
    with writer.StagedCheckpoint(out, overwrite=overwrite, fmt=FORMATS[fmt], max_shard_bytes=max_shard_bytes) as stage:
        stage.write_shard({"first": torch.full((3, 5), value)})
        stage.write_shard(TENSORS)
        stage.copy_tensors(source, ["model.norm.weight", "lm_head.weight"])
        stage.copy_companions(source.folder)
        stage.publish({"model_type": "llama"}, manifest={"recipe_hash": "x"}, verify=verify, report_files={"README.md": b"card"})


@pytest.mark.parametrize("ahead", ["all", "one of two", "left by a run that was killed"])
def test_what_is_merged_ahead_makes_the_same_folder(source: Path, tmp_path: Path, ahead: str) -> None:
    """If this failed, a run that merges each block while it computes the next would publish other bytes than one that merges in the end."""
    found = open_checkpoint(source)
    names = ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
    first = {"first.weight": torch.full((3, 5), 2.0)}

    def build(out: Path, over: threading.Event | None) -> dict[str, bytes]:
        job = tmp_path / f"{out.name}.job"
        left = job / "staged.whole" / "model.safetensors"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"of another model")
        with writer.StagedCheckpoint(
            out, overwrite=False, fmt=FORMATS["ct"], pieces=job / "staged", resumable=True, max_shard_bytes=20_000
        ) as stage:
            stage.copy_tensors(found, names)
            if over is not None:
                stage.expect([described(first), described(TENSORS)])
                stage.copy_ahead(over)
            stage.write_shard(first)
            stage.write_shard(TENSORS)
            stage.publish({"model_type": "llama"}, manifest={}, verify=nothing, report_files={})
        assert not left.parent.exists() and list(job.iterdir()) == []
        return tree(out)

    class AfterOne(threading.Event):
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 1

    over = {"one of two": AfterOne(), "left by a run that was killed": None}.get(ahead, threading.Event())
    assert build(tmp_path / "ahead", over) == build(tmp_path / "plain", None)


def described(tensors: dict[str, torch.Tensor]) -> list[atomic.Entry]:
    return [atomic.tensor_entry(*item) for item in tensors.items()]


@pytest.mark.parametrize("expected", [{"other": torch.zeros(2)}, {"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(1)}])
def test_other_tensors_than_expected_are_not_published(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    """A tensor that never came would be zeros in the published file, and one of another shape would lie over its neighbour."""

    def build() -> None:
        with writer.StagedCheckpoint(tmp_path / "out", overwrite=False, fmt=FORMATS["ct"]) as stage:
            stage.expect([described(expected)])
            stage.write_shard({"a": torch.ones(2)})
            stage.publish({}, manifest={}, verify=nothing, report_files={})

    with pytest.raises(ValueError, match="expected"):
        build()
    assert not (tmp_path / "out").exists()


# ---- what a published folder is ------------------------------------------------------------------------------------------------------


def test_safetensors_itself_reads_what_is_written(source: Path, tmp_path: Path) -> None:
    """The files are written by our own code; every loader reads them with safetensors."""
    publish(tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: tensor for shard in set(index["weight_map"].values()) for name, tensor in load_file(tmp_path / "out" / shard).items()}
    original = load_file(source / "model.safetensors")
    for name, tensor in {**TENSORS, "lm_head.weight": original["lm_head.weight"]}.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert set(found) == set(index["weight_map"]) == {*TENSORS, "first", "model.norm.weight", "lm_head.weight"}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    assert open_checkpoint(tmp_path / "out").files  # our own preflight agrees: no gaps, no trailing bytes
    publish(tmp_path / "one")
    (whole,) = (tmp_path / "one").glob("*.safetensors*")
    assert whole.name == "model.safetensors" and {name: tensor.tolist() for name, tensor in load_file(whole).items()} == {
        name: tensor.tolist() for name, tensor in found.items()
    }


@pytest.mark.parametrize(
    ("most", "sizes"), [(100, [[8, 2, 8, 2, 9]]), (20, [[8, 2, 8, 2], [9]]), (19, [[8, 2], [8, 2, 9]]), (1, [[8, 2], [8, 2], [9]])]
)
def test_a_linear_lies_in_one_file(most: int, sizes: list[list[int]]) -> None:
    """Broken: a file is larger than was asked for, a linear is torn apart, or two runs divide the same tensors differently."""

    def entry(name: str, size: int) -> atomic.Entry:
        return atomic.Entry(name, "U8", (size,), size, lambda: memoryview(b""))

    written = [[entry("b.codes", 8), entry("a.codes", 8), entry("b.scales", 2), entry("a.scales", 2)], [entry("head", 9)]]
    files = shards.divided(written, most)
    assert [[e.size for e in sorted(entries, key=lambda e: e.name)] for entries in files] == sizes
    assert shards.divided([[*reversed(written[0])], written[1]], most) == files


@pytest.mark.parametrize("problem", [None, errno.EXDEV, errno.ENOSYS, errno.EIO])
def test_where_the_kernel_cannot_copy_bytes_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: int | None
) -> None:
    """Broken: on a file system without copy_file_range nothing is published, or a failing disk is taken for one."""

    def copies(*_: Any) -> int:
        assert problem is not None
        raise OSError(problem, os.strerror(problem))

    publish(tmp_path / "plain")
    if problem is not None:
        monkeypatch.setattr(os, "copy_file_range", copies)
    with pytest.raises(ResourceProblem) if problem == errno.EIO else nullcontext():
        publish(tmp_path / "out")
        assert tree(tmp_path / "out") == tree(tmp_path / "plain")


def test_native_shards_are_not_called_model(source: Path, tmp_path: Path) -> None:
    """transformers would load a model.safetensors of native tensors and fill the linears with random numbers. The index stays: it is what
    transformers is told to read, before it knows how many files there are."""
    for out, most in (("one", 10**9), ("three", 20_000)):
        publish(tmp_path / out, fmt="marlin", max_shard_bytes=most)
        assert not any(name.startswith("model") for name in tree(tmp_path / out))
        assert open_checkpoint(tmp_path / out, weight_files="marlin").notes == ()
    assert {"marlin.safetensors.index.json", "marlin.safetensors"} <= {*tree(tmp_path / "one")}
    assert {"marlin.safetensors.index.json", "marlin-00001-of-00003.safetensors"} <= {*tree(tmp_path / "three")}


def test_files_follow_the_umask(source: Path, tmp_path: Path) -> None:
    """safetensors writes with mode 0600: nobody else on a shared machine could read the model."""
    before = os.umask(0o027)
    try:
        publish(tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_two_publications_are_equal_byte_for_byte(source: Path, tmp_path: Path) -> None:
    """The same numbers must give the same files, or digests cannot be compared between machines."""
    publish(tmp_path / "one")
    publish(tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_config_comes_after_all_weights_and_the_manifest_last(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run must not leave a folder that looks like a model, nor a manifest of an incomplete one."""
    renamed: list[str] = []
    replace = os.replace

    def spy(a: Path, b: Path) -> None:
        renamed.append(Path(b).name)
        replace(a, b)

    monkeypatch.setattr(os, "replace", spy)
    publish(tmp_path / "out")
    assert renamed[-2:] == ["config.json", manifest.NAME]


def test_the_folder_is_verified_before_it_appears(source: Path, tmp_path: Path) -> None:
    """A checkpoint that does not read back must never get its name."""

    def fails(folder: Path) -> None:
        assert folder.name.startswith("out.tmp-") and (folder / "config.json").is_file() and not (tmp_path / "out").exists()
        raise ResourceProblem("E500", "no", where="", fix="")

    with pytest.raises(ResourceProblem):
        publish(tmp_path / "out", verify=fails)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []


def test_a_tensor_cannot_be_written_twice(tmp_path: Path) -> None:
    """Two shards with one tensor: loaders take either of them."""
    with writer.StagedCheckpoint(tmp_path / "out", overwrite=False, fmt=FORMATS["ct"]) as stage:
        stage.write_shard({"a": torch.zeros(1)})
        with pytest.raises(ValueError, match="a was written before"):
            stage.write_shard({"a": torch.zeros(1)})


def test_large_copies_are_split_into_shards(source: Path, tmp_path: Path) -> None:
    """One shard of all untouched tensors would be too large for file systems and clients."""
    checkpoint = open_checkpoint(source)
    with writer.StagedCheckpoint(tmp_path / "out", overwrite=False, fmt=FORMATS["ct"], max_shard_bytes=100_000) as stage:
        stage.copy_tensors(checkpoint, list(checkpoint.tensors))
        stage.publish(checkpoint.config, manifest={}, verify=nothing, report_files={})
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 110_000
    copied = open_checkpoint(tmp_path / "out")
    assert all(copied.raw(name) == checkpoint.raw(name) for name in checkpoint.tensors)


# ---- companions ----------------------------------------------------------------------------------------------------------------------


def test_companions_travel_and_nothing_else(source: Path, tmp_path: Path) -> None:
    """Without its tokenizer and licence a model is useless or illegal; code and old weights must stay behind."""
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", "tokenizer.model", "x.tiktoken"):
        (source / name).write_text(name)
    for name in ("modeling_evil.py", "LICENSE.py", "pytorch_model.bin", "README.md", ".gitattributes", "training_args.bin", "secrets.json"):
        (source / name).write_text("no")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("t")
    publish(tmp_path / "out")
    names = set(tree(tmp_path / "out"))
    assert {"LICENSE", "LICENSE.txt", "NOTICE", "tokenizer.model", "x.tiktoken", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"chat_template.jinja", "generation_config.json", "additional_chat_templates/tools.jinja"} <= names
    assert not {"modeling_evil.py", "LICENSE.py", "pytorch_model.bin", ".gitattributes", "training_args.bin", "secrets.json"} & names
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    manifest.check(tmp_path / "out")


@pytest.mark.parametrize("kind", ["link-out", "fifo", "folder", "dangling"])
def test_odd_companions_are_refused(source: Path, tmp_path: Path, kind: str) -> None:
    """A link could publish a private file of this machine, a FIFO would hang the run."""
    target = source / "tokenizer.model"
    if kind == "link-out":
        (tmp_path / "private").write_text("secret")
        target.symlink_to(tmp_path / "private")
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to("gone")
    with pytest.raises(BadInput) as caught:
        publish(tmp_path / "out")
    assert caught.value.error_id == "E301" and "tokenizer.model" in caught.value.problems[0].where
    assert not (tmp_path / "out").exists()


def test_links_into_the_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links: a model from there must keep its tokenizer."""
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text("tokens")
    (snapshot / "tokenizer.model").symlink_to("../../blobs/123")
    assert list(writer.companions(snapshot)) == [("tokenizer.model", b"tokens")]


# ---- output places that cannot work: exit 2, before any work --------------------------------------------------------------------------


def refused(out: Path, sources: list[Path], *, overwrite: bool = False) -> UsageError:
    with pytest.raises(UsageError) as caught:
        writer.check_output(out, overwrite=overwrite, sources=sources)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_may_not_touch_the_input(source: Path, tmp_path: Path, overwrite: bool) -> None:
    """Writing over the input while it is read destroys the only copy (llama.cpp had this bug)."""
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "inside", tmp_path / "link", tmp_path / "x" / ".." / "source", tmp_path / "link" / "inside", tmp_path):
        problem = refused(out, [source], overwrite=overwrite)
        assert problem.error_id == "E225" and "(input: " in problem.problems[0].where


def test_output_may_not_exist_unless_overwrite(source: Path, tmp_path: Path) -> None:
    """A run of hours may not replace a model because of a reused name."""
    publish(tmp_path / "out")
    before = tree(tmp_path / "out")
    problem = refused(tmp_path / "out", [source])
    assert problem.error_id == "E222" and "--overwrite" in problem.problems[0].fix
    writer.check_output(tmp_path / "out", overwrite=True, sources=[source])
    assert tree(tmp_path / "out") == before


def test_overwrite_does_not_delete_folders_that_are_no_checkpoint(source: Path, tmp_path: Path) -> None:
    """`--overwrite` with a mistyped OUT such as a home folder must not delete it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    problem = refused(tmp_path / "home", [source], overwrite=True)
    assert problem.error_id == "E224" and "thesis.tex" in problem.problems[0].what


def test_a_rejected_result_may_replace_its_like_alone(source: Path, tmp_path: Path) -> None:
    """The gate says no after hours: where the result is kept then must be known to be free before."""
    publish(tmp_path / "out.rejected", value=1.0)
    (tmp_path / "staged").mkdir()
    writer.check_output(tmp_path / "out", overwrite=False, sources=[], rejects=True)
    assert writer.keep_rejected(tmp_path / "staged", tmp_path / "out") == tmp_path / "out.rejected"
    assert list((tmp_path / "out.rejected").iterdir()) == []
    (tmp_path / "out.rejected" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex") as caught:
        writer.check_output(tmp_path / "out", overwrite=False, sources=[], rejects=True)
    assert caught.value.error_id == "E224"
    writer.check_output(tmp_path / "out", overwrite=False, sources=[])  # nothing will be rejected
    (tmp_path / "staged").mkdir()
    kept = writer.keep_rejected(tmp_path / "staged", tmp_path / "out")  # it came there while the run was at work
    assert kept.is_dir() and kept.name.startswith("out.rejected-") and (tmp_path / "out.rejected" / "thesis.tex").read_text() == "mine"


def test_what_appears_in_an_output_meanwhile_is_not_deleted(source: Path, tmp_path: Path) -> None:
    """The folder was looked at before the work, and in ten hours somebody may have put notes into it, or a link in its place."""
    publish(tmp_path / "out", value=1.0)

    def somebody_writes(folder: Path) -> None:
        (tmp_path / "out" / "thesis.tex").write_text("mine")

    old = tree(tmp_path / "out")
    with pytest.raises(UsageError, match=r"thesis\.tex") as caught:
        publish(tmp_path / "out", value=2.0, overwrite=True, verify=somebody_writes)
    assert caught.value.error_id == "E224" and tree(tmp_path / "out") == {**old, "thesis.tex": b"mine"}

    def somebody_links(folder: Path) -> None:
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "out").symlink_to(tmp_path / "moved")

    (tmp_path / "out" / "thesis.tex").unlink()
    with pytest.raises(UsageError, match="a link"):
        publish(tmp_path / "out", value=2.0, overwrite=True, verify=somebody_links)
    assert tree(tmp_path / "moved") == old


# ---- links and names that somebody has put there -------------------------------------------------------------------------------------


def test_no_writer_follows_a_link(source: Path, tmp_path: Path) -> None:
    """A downloaded folder holds links with the names of our files: whatever they lead to would be overwritten."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("README.md", "config.json", "x.safetensors"):
        (folder / name).symlink_to(precious)
        (folder / f"{name}.part").symlink_to(precious)
    atomic.write_bytes(folder / "README.md", b"card")
    atomic.write_document(folder / "config.json", {})
    atomic.write_tensors(folder / "x.safetensors", TENSORS)
    assert precious.read_text() == "mine" and (folder / "README.md").read_bytes() == b"card"
    assert not any((folder / name).is_symlink() for name in ("README.md", "config.json", "x.safetensors"))
    (folder / "journal.jsonl").symlink_to(precious)
    with pytest.raises(ResourceProblem, match="link") as caught:
        atomic.append_line(folder / "journal.jsonl", {})
    assert caught.value.error_id == "E500" and precious.read_text() == "mine"


def test_a_name_that_is_taken_is_not_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the temporary name known, a link there would be followed: it must be new, and nothing stays of a write that failed."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr(atomic, "temporary_name", lambda: "taken")
    (tmp_path / "taken").symlink_to(precious)
    with pytest.raises(ResourceProblem):
        atomic.write_bytes(tmp_path / "x", b"new")
    assert precious.read_text() == "mine" and not (tmp_path / "x").exists()


def test_a_linked_folder_inside_of_a_checkpoint_is_not_written_through(source: Path, tmp_path: Path) -> None:
    """`additional_chat_templates` as a link would put templates into somebody's folder, and tidying up would empty it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("mine")
    staged = tmp_path / "out.job" / "staged"
    whole = staged.with_name("staged.whole")
    for folder in (staged, whole):
        folder.mkdir(parents=True)
        (folder / "additional_chat_templates").symlink_to(elsewhere)
    with writer.StagedCheckpoint(tmp_path / "out", overwrite=False, fmt=FORMATS["ct"], pieces=staged) as stage:
        assert list(whole.iterdir()) == []
        (whole / "additional_chat_templates").symlink_to(elsewhere)
        with pytest.raises(ResourceProblem, match="link"):
            stage.write_file("additional_chat_templates/a.jinja", b"x")
        stage.spool.symlink_to(elsewhere / "thesis.tex")
        with pytest.raises(ResourceProblem, match="link"):
            stage.write_mask("layer", torch.ones(4, 8, dtype=torch.bool))
        with pytest.raises(ResourceProblem, match="link"):
            stage.restore([], [])
        stage.spool.unlink()
        stage.restore([], [])
        assert list(staged.iterdir()) == []
    assert not staged.exists() and [path.name for path in elsewhere.iterdir()] == ["thesis.tex"]
    shutil.rmtree(whole)
    for link, said in ((staged, "link"), (whole, "not a folder")):
        link.symlink_to(elsewhere)
        with (
            pytest.raises(ResourceProblem, match=said),
            writer.StagedCheckpoint(tmp_path / "out", overwrite=False, fmt=FORMATS["ct"], pieces=staged),
        ):
            pass
        link.unlink()
    assert (elsewhere / "thesis.tex").read_text() == "mine"


def test_output_may_not_be_a_file_or_a_dead_link(source: Path, tmp_path: Path) -> None:
    """Found at the end, this would cost the whole run."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dead").symlink_to("nowhere")
    for name, what in (("file", "not a folder"), ("dead", "leads nowhere")):
        problem = refused(tmp_path / name, [source], overwrite=True)
        assert problem.error_id == "E244" and what in str(problem)


def test_output_parents_may_be_missing(source: Path, tmp_path: Path) -> None:
    """The README's first command would be refused. Nothing is made before the inputs are accepted."""
    writer.check_output(tmp_path / "no" / "such" / "out", overwrite=False, sources=[source])
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file" / "out", [source]).error_id == "E244"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into folders without the write bit")
def test_output_parent_must_be_writable(source: Path, tmp_path: Path) -> None:
    """llama.cpp found this out after the calibration."""
    (tmp_path / "locked").mkdir(mode=0o555)
    problem = refused(tmp_path / "locked" / "out", [source])
    assert problem.error_id == "E244" and "cannot be written to" in str(problem)


def test_output_parent_on_a_read_only_mount(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode bits of a read-only mount look fine; only trying tells."""

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Read-only" in refused(tmp_path / "out", [source]).problems[0].what


def test_good_places_pass_and_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    """A check that leaves something behind, or refuses an empty folder, would break scripts that make OUT first."""
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    writer.check_output(tmp_path / "new", overwrite=False, sources=[source])
    writer.check_output(tmp_path / "empty", overwrite=False, sources=[source])
    assert sorted(tmp_path.iterdir()) == before
    publish(tmp_path / "empty")
    manifest.check(tmp_path / "empty")


def test_a_link_to_a_folder_is_followed(source: Path, tmp_path: Path) -> None:
    """People point OUT at a larger disk with a link; replacing the link by a folder would fill the small one."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    publish(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
