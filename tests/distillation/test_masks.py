"""Masks that are renewed: the step against its definition in float64, the result, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from marlinctl.checkpoint.mask import open_masks
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.distillation import loop as loops
from marlinctl.distillation.masks import Masks, Renewal, mean_kept, renewed
from marlinctl.distillation.student import Student
from marlinctl.errors import BadInput, UsageError
from marlinctl.system.console import Console
from marlinctl.verify.run import verify
from tests import zoo
from tests.distillation.runs import Crash, crash_after, distill, recipe, write_text
from tests.distillation.test_open import refused
from tests.pruned import edit_tensor, keep_largest, prune, prune_and_quantize, read_all, write_masks
from tests.tiny import make_tiny

FIXED = {"mask": "fixed", "ce": 2 / 3, "kl": 1 / 3, "squarehead": 0.0}
CAST = FIXED | {"mask": "renewed", "mask_interval": 3}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher; other, a dense model; student, the teacher pruned to 2:4; packed, the same as int4; a text. Read only."""
    root = tmp_path_factory.mktemp("masks")
    make_tiny(root / "teacher")
    make_tiny(root / "other", seed=1)
    prune(root / "teacher", root / "student")
    prune_and_quantize(root / "teacher", root / "packed")
    write_text(root / "text.txt")
    return root


def run(place: Path, out: Path, *, student: str = "student", resume: bool = False, device: str = "cpu", **changes: Any) -> dict[str, Any]:
    chosen = recipe(place / "text.txt", **(CAST | changes))
    return distill(place / student, out, place / "teacher", chosen, resume=resume, device=device)


def masks_of(folder: Path) -> dict[str, Tensor]:
    """Linear -> mask, each checked to be 2:4."""
    weights = read_all(folder)
    with open_masks(folder) as masks:
        assert masks is not None
        return {name: masks.keep(name, *weights[f"{name}.weight"].shape) for name in masks.layers}


def assert_two_of_four(folder: Path) -> dict[str, Tensor]:
    """The masks of a folder, of which every one is 2:4, obeyed, and what the weights themselves show."""
    weights, masks = read_all(folder), masks_of(folder)
    for name, mask in masks.items():
        weight = weights[f"{name}.weight"]
        assert not weight[~mask].any(), name
        assert float((weight[mask] == 0).double().mean()) < 0.01, name  # a kept weight may round to zero
        assert torch.equal(weight.view(torch.int16)[~mask], torch.zeros_like(weight.view(torch.int16)[~mask])), "-0.0 is not written"
    return masks


# ---- the step ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "rate", "decay"), [("other", 3e-3, 0.3), ("student", 1e-2, 0.5)])
def test_a_step_with_decay_and_renewal_in_float64(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str, rate: float, decay: float
) -> None:
    """Loss shares, dense forward pass, AdamW, decay of the pruned weights alone, then the mask: written out once more."""
    steps, interval = 5, 2
    seen: dict[str, Any] = {"rows": []}
    settle, order, train = Student.settle, loops.rows_of_step, loops.Loop.run

    def keep_weights(self: Student, opened: Any) -> None:
        seen["after"] = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        seen["masks"] = {masked.name: masked.pruned.clone() for masked in self.masks.masked}
        settle(self, opened)

    def keep_rows(*args: Any) -> Tensor:
        seen["rows"].append(order(*args))
        return seen["rows"][-1]

    def keep_ids(self: loops.Loop, resumed: Any) -> None:
        seen["ids"] = self.rows.ids
        train(self, resumed)

    monkeypatch.setattr(Student, "settle", keep_weights)
    monkeypatch.setattr(loops, "rows_of_step", keep_rows)
    monkeypatch.setattr(loops.Loop, "run", keep_ids)
    chosen: dict[str, Any] = {"tokens": steps * 256, "warmup": 0.0, "learning_rate": rate, "mask_interval": interval, "mask_decay": decay}
    run(place, tmp_path / "out", student=student, **chosen)

    model, teacher = (load_dense(place / name, dtype=torch.float64) for name in (student, "teacher"))
    trained = {name: model.get_parameter(name) for name in seen["after"]}
    kept = {name: keep_largest(trained[name].detach().float()) for name in seen["masks"]}
    begun = dict(kept)
    unit = {name: float(trained[name].detach()[kept[name]].abs().mean()) for name in kept}
    first, second = ({name: torch.zeros_like(parameter) for name, parameter in trained.items()} for _ in range(2))
    for step in range(steps):
        ids = seen["ids"][seen["rows"][step]]
        s, t = (net(input_ids=ids).logits[:, :-1].log_softmax(-1) for net in (model, teacher))
        t = t.detach()
        ce = -s.gather(-1, ids[:, 1:, None]).mean()
        kl = (t.exp() * (t - s)).sum(-1).mean()
        gradients = torch.autograd.grad((2 * ce + kl) / 3, list(trained.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                parameter -= rate * (steps - step) / steps * m / (v.sqrt() + 1e-8)
                if name in kept:
                    share = (step + 1) / sum(range(1, steps + 1))  # rises linearly, and all of them are 1
                    nearer = parameter.sign() * (parameter.abs() - decay * unit[name] * share).clamp(min=0)
                    parameter.copy_(torch.where(kept[name], parameter, nearer))
                    if (step + 1) % interval == 0 or step + 1 == steps:
                        kept[name] = keep_largest(parameter)
    assert len(seen["rows"]) == steps
    for name, parameter in trained.items():
        difference = (seen["after"][name].double() - parameter.detach()).abs()
        # Adam divides by |gradient|: where a gradient is all rounding, so is its step, and a few of the masks.
        assert float((difference > 0.1 * rate).double().mean()) < 0.03, name
    for name, mask in kept.items():
        assert float((seen["masks"][name] == mask).double().mean()) < 0.01, name  # theirs is True where pruned
        assert float((mask != begun[name]).double().mean()) > 0.01, "hardly a mask moved"


def test_the_decay_rises_linearly_and_sums_to_what_is_asked() -> None:
    """Another sum would make the setting depend on the number of steps; a decay that is strong early prunes before anything is learned."""
    amounts = [Renewal(10, 2.5, 40).amount(step) for step in range(40)]
    assert sum(amounts) == pytest.approx(2.5)
    assert all(later - earlier == pytest.approx(amounts[0]) for earlier, later in pairwise(amounts))
    due = [step for step in range(25) if Renewal(10, 1.0, 25).due(step)]
    assert due == [9, 19, 24] and Renewal(10, 1.0, 25).count == 3


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_renewed_mask_keeps_the_two_largest(axis: int) -> None:
    """One hand-written four of each kind: clear, equal, and one that the pattern does not cover. Experts may lie transposed."""
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 1.0, -1.0, 1.0, 1.0, 5.0, 6.0, 7.0, 8.0]])
    pruned = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    wanted = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    if axis == -2:
        weight, pruned, wanted = (tensor.T.repeat(2, 1, 1) for tensor in (weight, pruned, wanted))
    assert torch.equal(renewed(weight, pruned, axis), wanted)
    assert mean_kept(weight, pruned, axis) == (3 + 2 + 1 + 1) / 4


# ---- the result ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [pytest.param("student", marks=pytest.mark.slow), "other"])
def test_the_result_is_two_of_four(place: Path, tmp_path: Path, student: str) -> None:
    """Whatever the student was, the folder must be exactly 2:4, with the mask that its weights show, and the report must say what moved."""
    report = run(place, tmp_path / "out", student=student, tokens=40 * 256, learning_rate=3e-3)
    masks = assert_two_of_four(tmp_path / "out")
    assert len(masks) == report["sparse_linears"] == 14
    # float16 has weights of equal magnitude in one four, of which either may be kept
    first = {name: keep_largest(weight) for name, weight in ((n, read_all(place / student)[f"{n}.weight"]) for n in masks)}
    replaced = sum(int((first[name] & ~mask).sum()) for name, mask in masks.items())
    training = report["training"]
    assert 0 < training["mask"]["changed"] == pytest.approx(replaced / sum(int(mask.sum()) for mask in masks.values()), rel=0.01)
    assert training["mask"]["renewals"] == 14
    before, after = training["mask"]["pruned_norm"]["before"], training["mask"]["pruned_norm"]["after"]
    assert (before > 0.2) == (student == "other") and after < 0.02
    norms = [entry["pruned_norm"] for entry in training["curve"]]
    assert norms[-1] == pytest.approx(after) and max(norms) > after
    assert sum(entry["mask_changed"] for entry in training["curve"]) >= training["mask"]["changed"]
    assert training["curve"][-1]["loss"] < training["curve"][0]["loss"]
    assert verify(tmp_path / "out", source=None, load=True, console=Console.quiet()).format == "dense"
    page = (tmp_path / "out" / "marlinctl_report.md").read_text()
    assert "14 renewals, every 3 steps" in page and "2:4 masks of 14 linears renewed" in page


def test_what_is_measured_is_what_is_published(place: Path, tmp_path: Path) -> None:
    """A loss of the dense weights, with what the masks prune still in them, would promise more than the folder holds."""
    report = run(place, tmp_path / "out", student="other")
    again = distill(tmp_path / "out", tmp_path / "more", place / "teacher", recipe(place / "text.txt", **FIXED))
    assert again["held_out"]["before"] == pytest.approx(report["held_out"]["after"], rel=1e-6)


def test_a_student_that_was_never_pruned_is_no_warning(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dense student is nearer to the teacher than its 2:4 self: "try a lower learning rate" would be wrong advice."""
    said: list[str] = []
    monkeypatch.setattr(Console, "warn", lambda _self, text: said.append(text))
    report = run(place, tmp_path / "out", student="teacher", tokens=512, ce=0.0)
    assert report["held_out"]["after"]["loss"] > report["held_out"]["before"]["loss"]
    assert not [text for text in said if "has risen" in text]


def test_linears_without_a_mask_stay_dense(place: Path, tmp_path: Path) -> None:
    """A mask file decides which linears are 2:4; pruning the others too would lose what was to be kept."""
    keeps = {name: keep for name, keep in prune(place / "teacher", tmp_path / "whole").items() if name != UP}
    shutil.copytree(tmp_path / "whole", tmp_path / "student")
    original = read_all(place / "teacher")[f"{UP}.weight"]
    edit_tensor(tmp_path / "student", f"{UP}.weight", lambda _: original)
    write_masks(tmp_path / "student", keeps)
    run(place, tmp_path / "out", student=str(tmp_path / "student"), learning_rate=3e-3)
    assert set(assert_two_of_four(tmp_path / "out")) == set(keeps)
    assert float((read_all(tmp_path / "out")[f"{UP}.weight"] != 0).double().mean()) > 0.99


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", pytest.param("llama4_text", marks=pytest.mark.slow)])
def test_experts_are_renewed_along_their_inputs(model_type: str, tmp_path: Path) -> None:
    """Experts lie stacked, and transposed in some models: fours of the wrong axis would be no 2:4 in the checkpoint."""
    teacher = zoo.build(model_type, tmp_path / "teacher", dtype=torch.bfloat16)
    chosen = recipe(write_text(tmp_path / "text.txt"), **(CAST | {"tokens": 6 * 256}))
    distill(teacher, tmp_path / "out", teacher, chosen)
    assert_two_of_four(tmp_path / "out")


# ---- resuming ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "saved"), [("other", 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("student", 5), ("other", 12)))]
)
def test_a_resumed_job_ends_with_the_same_bytes(
    place: Path, tmp_path: Path, student: str, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state lies between two renewals, or behind the last step: pruned weights that are not zero, and the mask that they decay under,
    must come back."""
    settings: dict[str, Any] = {"student": student, "mask_interval": 4, "learning_rate": 1e-2, "mask_decay": 0.2}
    whole = run(place, tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        crash_after(patched, saved + 3)
        patched.setattr("marlinctl.distillation.run.build", lambda *args, **kwargs: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            run(place, tmp_path / "out", **settings)
    assert json.loads((tmp_path / "out.job" / "state.json").read_text())["step"] == saved
    resumed = run(place, tmp_path / "out", resume=True, **settings)
    apart = {"README.md", "marlinctl_report.json", "marlinctl_report.md", "marlinctl_report.html"}
    for path in (tmp_path / "whole").iterdir():
        if path.name not in apart:
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert whole["training"]["mask"]["changed"] > 0.01
    assert resumed["training"]["mask"] == whole["training"]["mask"] and resumed["held_out"] == whole["held_out"]
    for key in ("loss", "mask_changed", "pruned_norm"):
        assert [entry[key] for entry in resumed["training"]["curve"]] == [entry[key] for entry in whole["training"]["curve"]]


def test_a_lost_mask_would_be_seen(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above proves nothing if the mask in the state does not matter."""
    settings: dict[str, Any] = {"mask_interval": 4, "learning_rate": 1e-2, "mask_decay": 0.2}
    run(place, tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        crash_after(patched, 8)
        with pytest.raises(Crash):
            run(place, tmp_path / "out", **settings)
    monkeypatch.setattr(Masks, "restore", lambda *_: None)
    run(place, tmp_path / "out", resume=True, **settings)
    ours, theirs = read_all(tmp_path / "out"), read_all(tmp_path / "whole")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_fixed_mask_leaves_the_state_as_it_was(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of an earlier version resume: the same fingerprint, and no mask in the state."""
    crash_after(monkeypatch, 8)
    with pytest.raises(Crash):
        distill(place / "student", tmp_path / "out", place / "teacher", recipe(place / "text.txt", **FIXED))
    fingerprint = json.loads((tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()[0])["fingerprint"]
    assert not [key for key in fingerprint["recipe"] if key.startswith("mask")]
    with safe_open(tmp_path / "out.job" / "state-00000005.safetensors", "pt") as state:
        assert {key.split(".")[0] for key in list(state.keys())} == {"weight", "exp_avg", "exp_avg_sq"}


# ---- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "fix"), [("blockwise", "--mode full"), ("scales", "the 16-bit model")])
def test_modes_that_keep_their_mask(place: Path, tmp_path: Path, mode: str, fix: str) -> None:
    """A setting that changes nothing would be believed."""
    student = place / ("packed" if mode == "scales" else "student")
    error = refused(UsageError, student, tmp_path / "out", place / "teacher", place / "text.txt", **(CAST | {"mode": mode}))
    (problem,) = error.problems
    assert error.error_id == "E288" and problem.where == f"--mask renewed and --mode {mode}" and fix in problem.fix


def test_a_quantized_student(place: Path, tmp_path: Path) -> None:
    """Codes have no gradient: the advice must be the order of the two steps, and not --mode scales, which is refused too."""
    error = refused(UsageError, place / "packed", tmp_path / "out", place / "teacher", place / "text.txt", **CAST)
    (problem,) = error.problems
    assert error.error_id == "E288" and "quantized" in problem.what and "16-bit model" in problem.fix


def test_a_linear_that_has_no_fours(tmp_path: Path) -> None:
    """K = 30 has a group of two at its end, which no mask covers: to be said before an hour of training."""
    make_tiny(tmp_path / "teacher", intermediate_size=30)
    text = write_text(tmp_path / "text.txt")
    error = refused(BadInput, tmp_path / "teacher", tmp_path / "out", tmp_path / "teacher", text, **CAST)
    assert error.error_id == "E356" and len(error.problems) == 2
    assert "model.layers.0.mlp.down_proj cannot become 2:4: K=30" in error.problems[0].what and "--skip" in error.problems[0].fix


# ---- on a GPU ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_renews_the_same_masks(place: Path, tmp_path: Path) -> None:
    """Decay or comparison of another order on CUDA would end with another model."""
    for device in ("cpu", "cuda"):
        run(place, tmp_path / device, student="other", device=device, tokens=30 * 256)
    ours, theirs = (assert_two_of_four(tmp_path / device) for device in ("cuda", "cpu"))
    assert all(float((ours[name] != theirs[name]).double().mean()) < 0.01 for name in ours)
