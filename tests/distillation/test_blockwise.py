"""One block at a time: errors fall, masks hold, and a job that was stopped ends as one that was not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from marlinctl.checkpoint.mask import open_masks
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.data.calibration import load_tokenizer
from marlinctl.distillation import blockwise
from marlinctl.errors import NumericalProblem, UsageError
from marlinctl.recipes.schema import resolve
from tests import zoo
from tests.distillation.runs import distill, recipe, write_text
from tests.pruned import prune, read_all
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blockwise")
    make_tiny(root / "teacher", num_hidden_layers=3)
    prune(root / "teacher", root / "student")
    write_text(root / "text.txt")
    return root


def run(place: Path, out: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    chosen = recipe(place / "text.txt", mode="blockwise", **changes)
    return distill(place / "student", out, place / "teacher", chosen, resume=resume)


@torch.no_grad()
def block_errors(folder: Path, teacher: Path, ids: torch.Tensor) -> list[float]:
    """Relative error of every block's output in the whole model, in float64: what blockwise claims to lower."""
    student, original = (
        load_dense(path, dtype=torch.float64)(input_ids=ids, output_hidden_states=True).hidden_states[1:-1] for path in (folder, teacher)
    )
    return [float((s - t).square().mean() / t.square().mean()) for s, t in zip(student, original, strict=True)]


def test_every_block_gets_nearer_to_the_teachers(place: Path, tmp_path: Path) -> None:
    """A block that was trained on the wrong inputs or targets would report a small error and be further away in the model."""
    keeps = prune(place / "teacher", tmp_path / "again")
    report = run(place, tmp_path / "out", tokens=28 * 256)
    text = (place / "text.txt").read_text()
    ids = torch.tensor(load_tokenizer(place / "teacher")(text)["input_ids"][-128:]).reshape(4, 32)  # behind what was trained on
    before, after = (block_errors(folder, place / "teacher", ids) for folder in (place / "student", tmp_path / "out"))
    assert all(now < 0.7 * then for now, then in zip(after, before, strict=True)), (before, after)
    blocks = report["training"]["blocks"]
    assert [record["block"] for record in blocks] == [0, 1, 2]
    assert all(record["after"] < record["before"] for record in blocks)
    tensors, original = read_all(tmp_path / "out"), read_all(place / "student")
    with open_masks(tmp_path / "out") as masks:
        assert masks is not None
        for name, keep in keeps.items():
            assert torch.equal(masks.keep(name, *keep.shape), keep) and not tensors[f"{name}.weight"][~keep].any()
    untouched = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert {name for name in tensors if torch.equal(tensors[name], original[name])} == untouched


def test_the_reported_error_is_that_of_the_published_block(place: Path, tmp_path: Path) -> None:
    """The figure must be measured on held-out rows, after rounding, and with the inputs that the block will see."""
    report = run(place, tmp_path / "out")
    again = distill(
        tmp_path / "out", tmp_path / "more", place / "teacher", recipe(place / "text.txt", mode="blockwise", learning_rate=1e-12)
    )
    found = [record["before"] for record in again["training"]["blocks"]]
    assert found == pytest.approx([record["after"] for record in report["training"]["blocks"]], rel=1e-5)


@pytest.mark.parametrize(
    "model_type",
    ["gemma3_text", "mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v3", "falcon_h1", "phi3", "qwen2"))],
)
def test_blocks_of_other_architectures(model_type: str, tmp_path: Path) -> None:
    """Fused experts, biases, renamed routers and sliding windows must be found when a block stands alone."""
    teacher = zoo.build(model_type, tmp_path / "teacher", dtype=torch.bfloat16)
    prune(teacher, tmp_path / "student")
    text = write_text(tmp_path / "text.txt")
    report = distill(tmp_path / "student", tmp_path / "out", teacher, recipe(text, mode="blockwise", tokens=20 * 256))
    assert all(record["after"] < record["before"] for record in report["training"]["blocks"])
    assert bool(torch.isfinite(load_dense(tmp_path / "out", dtype=torch.float32)(torch.arange(20).reshape(1, -1)).logits).all())


class _Crash(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    run(place, place / "whole")
    return place / "whole"


@pytest.mark.parametrize("steps", [12, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (3, 8, 20, 35))])
def test_a_resumed_job_ends_with_the_same_bits(
    place: Path, undisturbed: Path, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first state, inside a block, between two blocks: finished blocks, hidden states and moments must all come back."""
    step = blockwise.BlockLoop.step
    done: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        if len(done) == steps:
            raise _Crash
        done.append(1)
        return step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(blockwise.BlockLoop, "step", counted)
        with pytest.raises(_Crash):
            run(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    job = tmp_path / "out.job"
    finished = json.loads((job / "blocks.json").read_text())["blocks"] if (job / "blocks.json").exists() else []
    assert len(finished) == steps // 12
    run(place, tmp_path / "out", resume=True)
    ours, theirs = read_all(tmp_path / "out"), read_all(undisturbed)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_padding_has_no_influence(place: Path, tmp_path: Path) -> None:
    """Rows of chats are padded; what stands in the padding must not train a block."""
    results = []
    for pad in ("<|endoftext|>", "<|im_end|>"):
        root = tmp_path / pad.strip("<|>")
        teacher = make_tiny(root / "teacher")
        settings = json.loads((teacher / "tokenizer_config.json").read_text())
        (teacher / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": pad}))
        prune(teacher, root / "student")
        chats = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This " * (i % 5 + 1)}] for i in range(40)]
        (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        distill(root / "student", root / "out", teacher, recipe(root / "chats.jsonl", mode="blockwise", tokens=4 * 256))
        results.append(read_all(root / "out"))
    assert not [name for name in results[0] if not torch.equal(results[0][name], results[1][name])]


def test_a_loss_that_is_not_finite_stops_the_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of NaN would poison all blocks after it."""
    monkeypatch.setattr(blockwise, "learning_rate", lambda *_: 1e30)
    with pytest.raises(NumericalProblem, match="block 0"):
        run(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused() -> None:
    """They would all train the same block and overwrite each other's files."""
    from marlinctl.planning.training_settings import check_settings

    with pytest.raises(UsageError, match="for one process"):
        check_settings(recipe("self", mode="blockwise").distill, 2)


def test_models_whose_blocks_are_given_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    """A block of Gemma 4 E2B would be trained without its per-layer inputs, or without the keys of the block that it reads: on garbage."""
    from marlinctl.models.lookup import any_architecture
    from marlinctl.planning.training_settings import refuse_blockwise
    from tests.runs import plan

    folder, text = zoo.build("gemma4_text", tmp_path / "model"), write_text(tmp_path / "text.txt")
    asked = recipe(text, mode="blockwise")
    with pytest.raises(UsageError, match="gemma4_text are given more than hidden states") as caught:
        distill(folder, tmp_path / "out", folder, asked)
    assert caught.value.error_id == "E288" and caught.value.problems[0].fix == "--mode full"
    assert not (tmp_path / "out.job").exists()
    with pytest.raises(UsageError, match="given more than hidden states"):  # `compress` with a recipe that distils, and `plan` of it
        plan(folder, resolve(asked, {"sparsify.pattern": "2:4", "calibration.source": str(text)})[0])

    known = any_architecture(zoo.config_of("gemma4_text").to_dict())
    assert known.per_token and known.shared
    for part in (replace(known, per_token={}), replace(known, shared={})):  # either is enough
        with pytest.raises(UsageError):
            refuse_blockwise(asked.distill, part)
    refuse_blockwise(recipe(text, mode="full").distill, known)
    refuse_blockwise(asked.distill, any_architecture(zoo.config_of("llama").to_dict()))
