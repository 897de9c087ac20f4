"""Tokens weighted by gradients: the weights, what they do to Hessians, and whole runs that are stopped, damaged, shared and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.cli import main
from marlinctl.data.tokens import Tokens
from marlinctl.models.lookup import any_architecture
from marlinctl.models.meta_model import build
from marlinctl.oneshot import token_weights
from marlinctl.oneshot.gradients import stages_of
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.oneshot.token_weights import LARGEST, computed, weights_of
from marlinctl.quantize.types import Hessian
from marlinctl.system.offload import Scratch
from tests import zoo
from tests.jobs.test_kill import published
from tests.oneshot.stopping import SIZES, Stopped, blocks_solved, lines_of, quantize, stop_in
from tests.oneshot.test_ranks import Place, run
from tests.oneshot.test_ranks import place as place  # several processes
from tests.oneshot.test_sequential import LENGTH, SAMPLES, tokens
from tests.runs import TEXT
from tests.tiny import make_tiny

CPU = torch.device("cpu")
WEIGHTED = ["--token-weights", "gradient"]


# ---- from squares to weights ---------------------------------------------------------------------------------------------------------


def test_weights_have_mean_one_over_the_tokens_that_count() -> None:
    """With another mean damping would be another share of the Hessian; padding in the mean would make it depend on the padding."""
    squares = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) ** 4
    counted = torch.ones(3, 50, dtype=torch.bool)
    counted[:, :5] = False
    weights = weights_of(squares, counted)
    assert weights.dtype == torch.float32 and not weights[~counted].any()
    assert float(weights[counted].double().mean()) == pytest.approx(1, rel=1e-6)
    roots = squares.double().sqrt()
    assert torch.allclose(weights[counted].double(), (roots / roots[counted].mean())[counted], rtol=1e-6)


def test_a_weight_is_at_most_the_largest() -> None:
    """One token would be the whole Hessian."""
    squares = torch.ones(1, 1000)
    squares[0, 3] = 1e12
    weights = weights_of(squares, torch.ones_like(squares, dtype=torch.bool))
    assert float(weights[0, 3]) == LARGEST
    assert float(weights[0, 4]) == pytest.approx(1000 / (999 + 1e6), rel=1e-6), "others are not scaled up for it"


def test_squares_that_are_not_finite_or_all_zero() -> None:
    """NaN in a weight would make the Hessian NaN; and a Hessian of zeros says that no input matters, where no gradient says nothing."""
    squares = torch.tensor([[1.0, torch.inf, torch.nan, 4.0]])
    counted = torch.tensor([[True, True, True, True]])
    assert torch.allclose(weights_of(squares, counted), torch.tensor([[4 / 3, 0, 0, 8 / 3]]))
    assert torch.equal(weights_of(torch.zeros(1, 3), torch.tensor([[True, False, True]])), torch.tensor([[1.0, 0.0, 1.0]]))


def test_the_same_seed_gives_the_same_weights_in_any_chunks(tmp_path: Path) -> None:
    """Draws that depended on how many tokens are in flight would make every machine its own codes."""
    folder = zoo.build("qwen2", tmp_path / "model")

    @torch.no_grad()
    def of(chunk: int, seed: int = 0) -> dict[str, Tensor]:
        return computed(new(folder, tmp_path, chunk=chunk), SAMPLES, seed, expect=lambda block: None, done=lambda: None)

    small, large, other = of(LENGTH), of(100 * LENGTH), of(LENGTH, seed=1)
    assert all(torch.allclose(small[name], large[name], rtol=1e-3, atol=1e-5) for name in small)
    assert all(not torch.allclose(small[name], other[name], rtol=1e-3) for name in small)


# ---- Hessians ------------------------------------------------------------------------------------------------------------------------


def new(folder: Path, scratch: Path, *, chunk: int = 2 * LENGTH, given: Tokens | None = None, **more: Any) -> SequentialPipeline:
    checkpoint = open_checkpoint(folder)
    return SequentialPipeline(
        build(checkpoint.config, torch.float32), any_architecture(checkpoint.config), checkpoint, given or tokens(),
        device=CPU, dtype=torch.float32, scratch=Scratch(scratch, CPU), chunk_tokens=chunk, **more,
    )  # fmt: skip


def random_weights(walk: SequentialPipeline) -> dict[str, Tensor]:
    """Of every stage its own, as if they had been computed."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, Tensor] = {}
    for block in walk.architecture.blocks:
        for names in stages_of(block).values():
            found |= dict.fromkeys(names, 4 * torch.rand(SAMPLES, LENGTH, generator=generator))
    return found


def disturbed(walk: SequentialPipeline) -> tuple[dict[str, Hessian], dict[str, Tensor]]:
    """The Hessians of a walk whose solves return other weights, and these weights."""
    seen: dict[str, Hessian] = {}
    changed: dict[str, Tensor] = {}

    def solve(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        assert hessian is not None
        seen.update(dict.fromkeys(names, hessian))
        for name in names:
            weight = walk.checkpoint.read(f"{name}.weight").float()
            changed[name] = weight + 0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(changed)))
        return {name: changed[name] for name in names}

    for block in walk.architecture.blocks:
        walk.run_block(block, solve)
    return seen, changed


def seen_by_the_model(folder: Path, names: set[str], weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What linears read in a whole model with these weights, and the residual stream before blocks, behind attention and behind blocks."""
    model = load_dense(folder, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in names:
            module.weight.data.copy_(weights.get(name, module.weight.data))
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        if name.endswith((".0", ".1")):
            module.register_forward_pre_hook(lambda _, args, name=name: streams.__setitem__(name, args[0]))
            module.register_forward_hook(lambda _, __, out, name=name: streams.__setitem__(f"{name} after", out))
        if name.endswith(".self_attn"):
            before = name.removesuffix(".self_attn")
            module.register_forward_hook(lambda _, __, out, p=before: streams.__setitem__(f"{p} middle", streams[p] + out[0]))
    model(tokens().ids)
    return {name: x.reshape(SAMPLES, LENGTH, -1) for name, x in inputs.items()}, streams


@pytest.mark.parametrize("model_type", ["qwen2", "opt"])  # branches, and linears of the block itself
@torch.no_grad()
def test_a_hessian_is_the_weighted_mean(model_type: str, tmp_path: Path) -> None:
    """Weights of another stage, block or order of tokens would shape every code and show nowhere."""
    folder = zoo.build(model_type, tmp_path / "model")
    weights = random_weights(new(folder, tmp_path))
    seen, changed = disturbed(new(folder, tmp_path, token_weights=weights))
    inputs, _ = seen_by_the_model(folder, set(seen), changed)
    counted = tokens().counted
    for name, x in inputs.items():
        rows, w = x[counted].double(), weights[name][counted].double().unsqueeze(-1)
        expected = (w * rows).T @ rows / len(rows)
        assert (seen[name].matrix.double() - expected).norm() / expected.norm() < 1e-4, name
        assert seen[name].tokens == len(rows)


@torch.no_grad()
def test_with_a_reference_model_every_sum_is_weighted(tmp_path: Path) -> None:
    """A drift or residual of other tokens than the Hessian's would push the weights away from the original."""
    folder = zoo.build("llama", tmp_path / "model")
    weights = random_weights(new(folder, tmp_path))
    seen, changed = disturbed(new(folder, tmp_path, token_weights=weights, corrects_drift=True))
    ours, our_streams = seen_by_the_model(folder, set(seen), changed)
    theirs, their_streams = seen_by_the_model(folder, set(seen), {})
    counted = tokens().counted
    for name, hessian in seen.items():
        scales = weights[name].double()
        block = name.rpartition(".self_attn")[0] or name.rpartition(".mlp")[0]
        place, behind = (block, f"{block} middle") if "self_attn" in name else (f"{block} middle", f"{block} after")
        if name.endswith(("o_proj", "down_proj")):
            energy = their_streams[behind].double().square().mean(-1)
            scales = scales * energy.mean() / energy
        rows, original, w = ours[name][counted].double(), theirs[name][counted].double(), scales[counted].unsqueeze(-1)
        expected = (w * rows).T @ rows / len(rows)
        drift = (w * rows).T @ original / len(rows) - expected
        assert (hessian.matrix.double() - expected).norm() / expected.norm() < 1e-4, name
        assert hessian.drift is not None
        assert (hessian.drift.double() - drift).norm() <= 1e-3 * drift.norm() + 1e-5 * expected.norm(), name
        if name.endswith(("o_proj", "down_proj")):
            residual = (w * rows).T @ (their_streams[place] - our_streams[place])[counted].double() / len(rows)
            assert hessian.residual is not None
            assert (hessian.residual.double() - residual).norm() <= 1e-3 * residual.norm() + 1e-6, name


@pytest.mark.parametrize("drift", [False, True])
@torch.no_grad()
def test_energies_are_those_of_the_hessians(tmp_path: Path, drift: bool) -> None:
    """Orders of channels would be chosen for other tokens than the solve is made for."""
    folder = zoo.build("llama", tmp_path / "model")
    walk = new(folder, tmp_path, token_weights=random_weights(new(folder, tmp_path)), corrects_drift=drift)
    block = walk.architecture.blocks[0]
    seen: dict[str, Tensor] = {}

    def original(names: tuple[str, ...], hessian: Hessian | None, remark: str) -> dict[str, Tensor]:
        assert hessian is not None
        seen.update(dict.fromkeys(names, hessian.matrix.diagonal() * hessian.tokens))
        return {name: walk.checkpoint.read(f"{name}.weight").float() for name in names}

    energies: dict[str, Tensor] = {}

    class Orders:
        folds = ({"any": ()}, {"any": ()})

        def choose(self, block: Any, layer: Any, walk: Any) -> dict[str, Tensor]:
            energies.update(walk.energies(block, layer, ["self_attn.o_proj", "mlp.down_proj"]))
            return {}

    walk.orders = Orders()  # type: ignore[assignment]
    walk.run_block(block, original)
    for module, energy in energies.items():
        assert torch.allclose(energy, seen[f"{block.prefix}.{module}"], rtol=1e-3), module


# ---- whole runs ----------------------------------------------------------------------------------------------------------------------


def alike(squares: Tensor, counted: Tensor, processes: Any) -> Tensor:
    return counted.float()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, text, and what runs that were not stopped publish: with weights, and without."""
    found = tmp_path_factory.mktemp("weighted")
    make_tiny(found / "model", **SIZES)
    (found / "text.txt").write_text(TEXT)
    (found / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    for name, more in (("whole", WEIGHTED), ("uniform", [])):
        (found / name).mkdir()
        assert main(quantize(found, found / name / "out", *more)) == 0
    return found


@pytest.fixture(scope="module")
def stopped(root: Path) -> Stopped:
    """The command with weights, stopped where the test says."""
    return Stopped(root, *WEIGHTED)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_run_is_another_one_and_says_so(root: Path) -> None:
    """If the weights did not reach the solves, the flag would cost time and change nothing."""
    weighted, uniform = tensors(root / "whole" / "out"), tensors(root / "uniform" / "out")
    apart = {name for name in weighted if not torch.equal(weighted[name], uniform[name])}
    assert len({name.rpartition(".")[0] for name in apart if name.endswith("weight_packed")}) == 28
    report = json.loads((root / "whole" / "out" / "marlinctl_report.json").read_text())
    assert "token weights" in report["phases"] and report["recipe"]["quantize"]["token_weights"] == "gradient"
    assert "token_weights: gradient" in (root / "whole" / "out" / "recipe.yaml").read_text()
    assert "token weights" not in json.loads((root / "uniform" / "out" / "marlinctl_report.json").read_text())["phases"]


@pytest.mark.parametrize("recipe", ["int4", "int4-best", "sparse-int4"])
def test_weights_of_one_are_no_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """A sum that were weighted twice, or rounded once more, would show here and in no report."""
    monkeypatch.setattr(token_weights, "weights_of", alike)
    (tmp_path / "mine.yaml").write_text(f"extends: {recipe}\ncalibration: {{minimum_tokens: 32}}\nquantize: {{tune_steps: 0}}\n")
    for name in ("model", "text.txt"):
        (tmp_path / name).symlink_to(root / name)
    for name, more in (("ones", WEIGHTED), ("none", [])):
        assert main(quantize(tmp_path, tmp_path / name, *more)) == 0
    ones, none = tensors(tmp_path / "ones"), tensors(tmp_path / "none")
    assert ones.keys() == none.keys() and all(torch.equal(ones[name], none[name]) for name in ones)


def test_a_resumed_run_takes_the_weights_of_before(root: Path, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine gradients differ in their last bits, and blocks of two sets of weights would be mixed."""
    out = tmp_path / "out"
    stopped(2, out)
    assert [line["step"] for line in lines_of(out)] == ["begun", "token weights", "block", "block"]

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("they are there")

    monkeypatch.setattr(token_weights, "computed", again)
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [2, 3])
    assert published(tmp_path) == published(root / "whole")


def test_what_is_stopped_before_the_first_block_keeps_its_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights take minutes to hours: that is more than nothing."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 0, quantize(root, out, *WEIGHTED)) == 130
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, [0, 1, 2, 3])
    assert published(tmp_path) == published(root / "whole")


def test_what_is_stopped_on_the_way_to_the_weights_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job without anything to resume from would stand in the way of the next run."""

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "squared_gradients", stopped)
        assert main(quantize(root, tmp_path / "out", *WEIGHTED)) == 130
    assert not (tmp_path / "out.job").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def no_line(path: Path) -> None:
    journal = path.with_name("journal.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"step":"token weights"' not in line))


@pytest.mark.parametrize("damage", [flip, Path.unlink, no_line])
def test_blocks_do_not_outlive_their_weights(
    root: Path,
    stopped: Stopped,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
) -> None:
    """One flipped bit would give the rest of the blocks other weights than the first; a missing file would end in a traceback."""
    out = tmp_path / "out"
    stopped(3, out)
    damage(tmp_path / "out.job" / "token_weights.safetensors")
    assert blocks_solved(monkeypatch, ["resume", str(out)]) == (0, [0, 1, 2, 3])
    assert "token weights of the job are damaged or missing" in capfd.readouterr().err
    assert published(tmp_path) == published(root / "whole")


@pytest.mark.parametrize(("damaged", "solved"), [("staged/model-00003.safetensors", [2, 3]), ("states/00003.safetensors", [3])])
def test_damaged_blocks_behind_weights_are_found(
    root: Path, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, solved: list[int]
) -> None:
    """Lines of blocks begin one line later than without weights: counted wrongly, a good block is dropped or a bad one kept."""
    out = tmp_path / "out"
    stopped(3, out)
    flip(tmp_path / "out.job" / damaged)
    assert blocks_solved(monkeypatch, ["resume", str(out), "-q"]) == (0, solved)
    assert published(tmp_path) == published(root / "whole")


def test_blocks_that_are_solved_again_on_request(root: Path, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--from-block 1 would solve block 0 or only block 2."""
    out = tmp_path / "out"
    stopped(3, out)
    assert blocks_solved(monkeypatch, ["resume", str(out), "--from-block", "1", "-q"]) == (0, [1, 2, 3])
    assert published(tmp_path) == published(root / "whole")


def test_a_job_does_not_change_its_kind_of_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a model would be solved with weights and half without."""
    out = tmp_path / "out"
    assert stop_in(monkeypatch, 2, quantize(root, out)) == 130
    assert main([*quantize(root, out, *WEIGHTED), "--resume"]) == 2


@pytest.mark.parametrize(
    ("model_type", "reason"), [("qwen3_moe", "has experts"), ("gemma4_text", "blocks that read what earlier ones leave")]
)
def test_models_whose_gradients_do_not_go_back_are_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], model_type: str, reason: str
) -> None:
    """A mixture would end with all experts of a block missing, or with gradients of half of the paths, after the forward pass."""
    source = str(zoo.build(model_type, tmp_path / "model"))
    asked = ["--calibration", str(text), "--group-size", "32", *WEIGHTED]
    for command in (["quantize", source, str(tmp_path / "out")], ["plan", source]):
        assert main([*command, *asked]) == 2
        told = capsys.readouterr().err
        assert "E288" in told and reason in told and "--token-weights uniform" in told
    assert not (tmp_path / "out.job").exists()


# ---- several processes ---------------------------------------------------------------------------------------------------------------


def test_two_processes_find_the_weights_of_one(place: Place, tmp_path: Path) -> None:
    """Weights over the mean of one process's own tokens would count the samples of one GPU more than those of another."""
    for name, count in (("alone", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        command = place.command("quantize", tmp_path / name / "out", *WEIGHTED, "--keep-job", "-q")
        codes, _, heard = run(tmp_path / name, count, command) if count > 1 else ([main(command)], "", "")
        assert codes == [0] * count, heard[-3000:]
    alone, two = (load_file(tmp_path / name / "out.job" / "token_weights.safetensors") for name in ("alone", "two"))
    assert alone.keys() == two.keys() and len(alone) == 4 * 4
    assert all(weights.shape == (7, 64) for weights in two.values())
    for name, weights in alone.items():
        assert torch.allclose(weights, two[name], rtol=1e-3, atol=1e-4), name
