"""Several real processes on the CPU (gloo): the result is that of one, up to ties, and no process waits for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from marlinctl.checkpoint.formats.registry import detect, read_linear
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.cli import main
from marlinctl.errors import UsageError
from marlinctl.oneshot.rows import own_rows
from marlinctl.planning.preflight import require_samples
from marlinctl.system.processes import Processes
from tests import forked, zoo
from tests.oneshot.stopping import PROGRAM, SIZES
from tests.runs import TEXT
from tests.test_architecture import ROOT
from tests.tiny import make_tiny

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
ASKED = ["--group-size", "32", "--samples", "7", "--sequence-length", "64", "--dtype", "float32", "--threads", "1", "--device", "cpu"]


@dataclass(frozen=True)
class Place:
    root: Path

    def command(self, verb: str, out: Path, *more: str, recipe: str = "int4", samples: int = 7) -> list[str]:
        asked = [word if word != "7" else str(samples) for word in ASKED]
        recipes = ["--recipe", f"{self.root}/{recipe}.yaml", "--calibration", f"{self.root}/text.txt"]
        return [verb, str(self.root / "model"), str(out), *recipes, *asked, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("ranks")
    make_tiny(root / "model", **SIZES)
    (root / "text.txt").write_text(TEXT)
    (root / "int4.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\n")
    sparse = "sparsify: {pattern: '2:4', ls_iterations: 8}\n"
    (root / "sparse.yaml").write_text(f"extends: sparse-int4\n{sparse}calibration: {{minimum_tokens: 32}}\ndistill: {{tokens: 0}}\n")
    short = "calibration: {minimum_tokens: 32}\n"
    training = f"tokens: 1024, data: {root}/text.txt, sequence_length: 32, batch_tokens: 256, micro_batch: 4, save_every: 2"
    solves = "sparsify: {ls_iterations: 8}\nquantize: {refine: 0, tune_steps: 4}\n"
    (root / "trained.yaml").write_text(f"extends: sparse-int4\n{solves}{short}distill: {{{training}}}\n")
    return Place(root)


def start(count: int, arguments: list[str], out: IO[str], err: IO[str], program: list[str] | None = None) -> list[Any]:
    """With the variables that a launcher would give them, without the seconds that it takes to start."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        forked.Popen(
            [sys.executable, *(program or ["-m", "marlinctl"]), *arguments], cwd=ROOT, stdout=out, stderr=err, text=True,
            env=ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def run(folder: Path, count: int, arguments: list[str]) -> tuple[list[int], str, str]:
    """Exit codes, stdout and stderr."""
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as err:
        codes = [job.wait(timeout=100) for job in start(count, arguments, out, err)]
    return codes, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def rows_apart(ours: Path, theirs: Path) -> tuple[int, int]:
    """How many rows of the first stack of all, block 0's q k v, have other codes or scales. One code that rounds to the other side moves
    the later ones of its row, and through the hidden states, in a model as small as this, some rows of every later linear."""
    apart = total = 0
    with open_checkpoint(ours) as a, open_checkpoint(theirs) as b:
        mine, other = detect(a.config, a.tensors), detect(b.config, b.tensors)
        assert mine.layers.keys() == other.layers.keys() and a.tensors.keys() == b.tensors.keys()
        for name in (f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"):
            x, y = read_linear(a, mine, name), read_linear(b, other, name)
            apart += int(((x.codes != y.codes).any(1) | (x.scales != y.scales).any(1)).sum())
            total += len(x.codes)
    return apart, total


@pytest.mark.parametrize(
    ("count", "verb", "recipe"),
    [(2, "quantize", "int4"), pytest.param(3, "quantize", "int4", marks=pytest.mark.slow), (2, "sparsify", "sparse")],
)
def test_the_result_is_that_of_one_process(place: Place, tmp_path: Path, count: int, verb: str, recipe: str) -> None:
    """If samples, sums or rows were spread wrongly, several GPUs would make another model than one. Seven samples divide by neither."""
    more = ["--bits", "4", "--no-eval"] if verb == "sparsify" else []
    assert main([*place.command(verb, tmp_path / "alone", *more, "-q", recipe=recipe)]) == 0
    codes, told, heard = run(tmp_path, count, place.command(verb, tmp_path / "out", *more, "--json", recipe=recipe))
    assert codes == [0] * count, heard[-3000:]
    report = json.loads(told)  # exactly one document
    assert report["processes"] == count
    alone = json.loads((tmp_path / "alone" / "marlinctl_report.json").read_text())
    assert [layer["tokens"] for layer in report["layers"]] == [layer["tokens"] for layer in alone["layers"]]
    for ours, theirs in zip(report["layers"], alone["layers"], strict=True):
        assert ours["name"] == theirs["name"] and ours["error"] == pytest.approx(theirs["error"], rel=0.1)
    assert report["error"]["mean"] == pytest.approx(alone["error"]["mean"], rel=0.01)
    apart, total = rows_apart(tmp_path / "out", tmp_path / "alone")
    assert total == 128 and apart <= 4, f"{apart} of {total}"
    assert not (tmp_path / "out.job").exists()


def test_compress_with_training_has_one_group_of_processes(place: Place, tmp_path: Path) -> None:
    """Three stages, of which each would make a group of its own, or train in one process while the others prune again."""
    codes, told, heard = run(tmp_path, 2, place.command("compress", tmp_path / "out", "--no-eval", "--json", recipe="trained"))
    assert codes == [0, 0], heard[-3000:]
    report = json.loads(told)
    assert report["processes"] == 2 and set(report["stages"]) == {"pruned", "distilled"}
    assert report["stages"]["distilled"]["training"]["steps"] == 4
    with open_checkpoint(tmp_path / "out") as made:
        assert len(detect(made.config, made.tensors).layers) == 28
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-marlin_24", "out.log", "stderr", "stdout"]


HUB_OF_ONE = """
import os, sys
from marlinctl.cli import main
from marlinctl.data import default_set
if os.environ["RANK"] == "1":
    default_set._unreachable = lambda **_: sys.exit("rank 1 asked the hub")
else:
    default_set.DEFAULT_SET, default_set._unreachable = sys.argv[1], lambda **_: None
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("verb", [pytest.param("quantize", marks=pytest.mark.slow), "compress"])
def test_the_main_process_decides_what_auto_is(place: Place, tmp_path: Path, verb: str) -> None:
    """If each asked the hub, one that it does not answer would write the text itself while the others read it."""
    arguments = place.command(verb, tmp_path / "out", "--json", *(["--no-eval"] if verb == "compress" else []))
    arguments[arguments.index("--calibration") + 1] = "auto"
    with (tmp_path / "stdout").open("w+") as out, (tmp_path / "stderr").open("w+") as err:
        jobs = start(2, [str(place.root / "text.txt"), *arguments], out, err, ["-c", HUB_OF_ONE])
        codes = [job.wait(timeout=100) for job in jobs]
    assert codes == [0, 0], (tmp_path / "stderr").read_text()[-3000:]
    assert json.loads((tmp_path / "stdout").read_text())["calibration"]["source"].endswith("text.txt")


def launched(place: Place, out: Path, device: str, *launcher: str) -> dict[str, Any]:
    """The report of a run that `accelerate launch` has started."""
    asked = place.command("quantize", out, "--json", "--device", device)
    done = subprocess.run([*launcher, "-m", "marlinctl", *asked], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_port", "0", "--mixed_precision", "no"),
)


@pytest.mark.slow
def test_accelerate_launch_starts_the_processes(place: Place, tmp_path: Path, alone: Path) -> None:
    """The variables of the tests above are those of the launcher, or a person's command starts two runs that refuse each other's lock."""
    assert launched(place, tmp_path / "out", "cpu", *ACCELERATE)["processes"] == 2
    require_like(place, tmp_path / "out", alone)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_two_gpus_make_what_one_makes(place: Place, tmp_path: Path) -> None:
    """NCCL, kernels on two devices, blocks that are written behind: not what gloo on a CPU does."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, torch sees {torch.cuda.device_count()}")
    launched(place, tmp_path / "one", "cuda", sys.executable)
    assert launched(place, tmp_path / "two", "cuda", *ACCELERATE)["processes"] == 2
    require_like(place, tmp_path / "two", tmp_path / "one")


def begin(place: Place, folder: Path, count: int, seconds: float) -> list[Any]:
    """A run that is in block 1, where it stays for so long."""
    with (folder / "said").open("w") as out, (folder / "told").open("w") as err:
        if count > 1:
            jobs = start(count, [str(seconds), *place.command("quantize", folder / "out")], out, err, ["-c", PROGRAM])
        else:
            given = [sys.executable, "-c", PROGRAM, str(seconds), *place.command("quantize", folder / "out")]
            jobs = [forked.Popen(given, cwd=ROOT, stdout=out, stderr=err, text=True, env=ENVIRONMENT)]
    deadline = time.monotonic() + 60
    while (folder / "said").read_text().count("in block 1") < count:
        assert all(job.poll() is None for job in jobs) and time.monotonic() < deadline, (folder / "told").read_text()
        time.sleep(0.01)
    return jobs


def require_like(place: Place, out: Path, alone: Path) -> None:
    """Up to ties."""
    ours, theirs = (json.loads((folder / "marlinctl_report.json").read_text()) for folder in (out, alone))
    assert [layer["name"] for layer in ours["layers"]] == [layer["name"] for layer in theirs["layers"]]
    assert ours["error"]["mean"] == pytest.approx(theirs["error"]["mean"], rel=0.01)
    apart, total = rows_apart(out, alone)
    assert apart <= 4, f"{apart} of {total}"


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    assert main([*place.command("quantize", place.root / "alone"), "-q"]) == 0
    return place.root / "alone"


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow), (3, 2)])
def test_a_job_goes_on_with_another_number_of_processes(place: Place, tmp_path: Path, alone: Path, first: int, then: int) -> None:
    """What is kept is of all samples, whoever kept it: else a machine with other GPUs could not finish a job."""
    jobs = begin(place, tmp_path, first, 0.5)
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    assert [job.wait(timeout=60) for job in jobs] == [143] * first
    told = (tmp_path / "told").read_text()
    assert told.count("block 1 is finished and kept") == 1
    assert told.count("to resume: ") == 1 and ("accelerate launch ... -m marlinctl resume" in told) == (first > 1)
    journal = (tmp_path / "out.job" / "journal.jsonl").read_text()
    assert len(journal.splitlines()) == 3
    if first == 3:  # the blocks run once more with their stored weights
        for state in (tmp_path / "out.job" / "states").iterdir():
            state.unlink()
    codes, _, heard = run(tmp_path, then, ["resume", str(tmp_path / "out")])
    assert codes == [0] * then, heard[-3000:]
    assert heard.count("resuming: 2 of 4 blocks finished") == 1
    assert heard.count("run once more with their stored weights") == (first == 3)
    require_like(place, tmp_path / "out", alone)


def test_a_process_that_dies_ends_all(place: Place, tmp_path: Path, alone: Path) -> None:
    """The other would wait in its next sum for six hours, on GPUs that somebody pays for."""
    main_one, second = begin(place, tmp_path, 2, 0.5)
    second.kill()
    assert (second.wait(timeout=60), main_one.wait(timeout=20)) == (-signal.SIGKILL, 5)
    told = (tmp_path / "told").read_text()
    assert told.count("error: ") == 1 and "error: process 1 of 2 ended: it was killed" in told, told
    assert f"pid {second.pid}" in told and "E505" in told
    assert not (tmp_path / "out").exists()
    assert main(["resume", str(tmp_path / "out"), "-q"]) == 0
    require_like(place, tmp_path / "out", alone)


def test_the_main_process_dies(place: Place, tmp_path: Path) -> None:
    """Its lock goes with it, and a process that lives on would write nothing and say nothing."""
    main_one, second = begin(place, tmp_path, 2, 0.5)
    main_one.kill()
    assert second.wait(timeout=20) == 5
    assert "error: process 0 of 2 ended: it was killed" in (tmp_path / "told").read_text()


def test_an_error_is_reported_once(place: Place, tmp_path: Path) -> None:
    """Found by the main process alone, by all, or by the second one alone: one report, one exit code."""
    codes, _, heard = run(tmp_path, 2, place.command("quantize", tmp_path / "out", samples=1))
    assert codes == [2, 2] and heard.count("error: ") == 1
    assert "1 calibration samples cannot be spread over 2 processes" in heard
    program = """
import sys
from marlinctl import cli
from marlinctl.errors import ResourceProblem
from marlinctl.oneshot.layers import LayerQuantizer
def stage(self, *given):
    if not self.processes.main:
        raise ResourceProblem("E590", "memory ran out", where="block 0", fix="less")
    return staged(self, *given)
staged, LayerQuantizer.stage = LayerQuantizer.stage, stage
sys.exit(cli.main(sys.argv[1:]))
"""
    with (tmp_path / "said").open("w") as out, (tmp_path / "told").open("w") as err:
        jobs = start(2, place.command("quantize", tmp_path / "out"), out, err, ["-c", program])
        assert [job.wait(timeout=60) for job in jobs] == [5, 5]
    told = (tmp_path / "told").read_text()
    assert told.count("error: ") == 1 and "error: memory ran out" in told
    assert "where: block 0; process 1 (pid " in told
    assert not (tmp_path / "out").exists()


SAME_SUMS = """
import sys
import torch
from pathlib import Path
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.data.tokens import Tokens
from marlinctl.models.families import architecture
from marlinctl.models.meta_model import build
from marlinctl.oneshot.ranks import kept_states, own_samples, restore
from marlinctl.oneshot.rows import solve_stacks
from marlinctl.oneshot.sequential import SequentialPipeline
from marlinctl.oneshot.solve import StackedSolver
from marlinctl.recipes.schema import load_recipe, resolve
from marlinctl.system.offload import Scratch
from marlinctl.system.processes import ALONE, Processes

torch.set_grad_enabled(False)
cpu = torch.device("cpu")
generator = torch.Generator().manual_seed(3)
ids = torch.randint(3, 200, (7, 24), generator=generator)
counted = torch.rand(7, 24, generator=generator) < 0.9
recipe = resolve(load_recipe("sparse-int4"), {"quantize.group_size": 32})[0]
solver = StackedSolver.of(recipe, corrects_drift=True, bfloat16_exact=False)


def walk(checkpoint, processes):
    hessians = {}
    def noise(name, w):
        return 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    def stage(names, hessian, remark):
        hessians[names] = hessian
        read = {name: checkpoint.read(f"{name}.weight").float() for name in names}
        return {name: w + noise(name, w) for name, w in read.items()}
    def stages(inputs):
        together.append(len(inputs))
        return [stage(one.names, one.hessian, one.remark) for one in inputs]
    known = architecture(checkpoint.config)
    pipeline = SequentialPipeline(
        build(checkpoint.config, torch.float32), known, checkpoint, own_samples(Tokens(ids, counted), processes), device=cpu,
        dtype=torch.float32, scratch=Scratch(Path(sys.argv[2]), cpu), chunk_tokens=48, corrects_drift=True, processes=processes,
        experts_together=5, solve_experts=stages,
    )
    for block in known.blocks:
        pipeline.run_block(block, stage)
    return pipeline, hessians


def near(a, b, scale):
    assert (a is None) == (b is None)
    assert a is None or (a - b).norm() <= 2e-5 * b.norm() + 1e-6 * scale.norm(), float((a - b).norm())


with Processes("cpu") as processes, open_checkpoint(Path(sys.argv[1])) as checkpoint:
    together = []
    pipeline, ours = walk(checkpoint, processes)
    alone, theirs = walk(checkpoint, ALONE)
    assert len(ours) == len(theirs) == int(sys.argv[3]) and max(together, default=5) == 5
    hessian = list(theirs.values())[-1]
    assert any(h.residual is not None and h.residual.any() for h in theirs.values()) and hessian.drift.any()
    for names, whole in theirs.items():  # batches may hold other experts
        mine = ours[names]
        assert mine.tokens == whole.tokens, names
        for name in ("matrix", "drift", "residual"):
            near(getattr(mine, name), getattr(whole, name), whole.matrix)  # drift is a difference of two means
    states = kept_states(pipeline, 7, processes)
    assert sorted(states) == (["hidden", "original"] if processes.main else [])
    for name, tensor in states.items():
        near(tensor, alone.states()[name], tensor)
    before = pipeline.hidden.clone()
    pipeline.hidden.zero_()
    restore(pipeline, states, 7, processes)
    assert torch.equal(pipeline.hidden, before)
    stacks = torch.randn(5, 8, 64, generator=generator)
    matrices = [torch.eye(64) + 0.1 * e for e in range(5)]
    matrices[3].zero_()
    many = [type(hessian)(matrix, 10 + e) for e, matrix in enumerate(matrices)]
    for e, found in enumerate(solve_stacks(solver, stacks, None, many, 32, processes)):
        wanted = solver.solve(stacks[e], None, many[e], 32)
        x, y = found[1](slice(0, 8)), wanted[1](slice(0, 8))
        assert torch.equal(x.codes, y.codes) and torch.equal(x.keep, y.keep) and torch.equal(x.scales, y.scales), e
        assert (found[0].dead, found[0].fallback, found[0].damping) == (wanted[0].dead, wanted[0].fallback, wanted[0].damping)
        assert torch.equal(found[0].error, wanted[0].error)
    for rows in (64, 7, 4, 1) if hessian.residual is not None else ():
        stack = checkpoint.read("model.layers.3.mlp.down_proj.weight").float()[:rows]
        given = type(hessian)(hessian.matrix, hessian.tokens, hessian.drift, hessian.residual[:, :rows].contiguous())
        (found,), wanted = solve_stacks(solver, stack.unsqueeze(0), None, [given], 32, processes), solver.solve(stack, None, given, 32)
        x, y = found[1](slice(0, rows)), wanted[1](slice(0, rows))
        apart = (x.codes != y.codes).any(1) | (x.keep != y.keep).any(1) | (x.scales != y.scales).any(1)
        assert int(apart.sum()) <= rows // 16 and torch.equal(found[2], x.keep), apart
        assert (found[0].dead, found[0].fallback, found[0].damping) == (wanted[0].dead, wanted[0].fallback, wanted[0].damping)
        for name in ("error", "output_energy"):
            a, b = getattr(found[0], name), getattr(wanted[0], name)
            assert a.shape == (rows,) and torch.allclose(a[~apart], b[~apart], rtol=1e-3)
    if processes.main:
        print("the same")
"""


@pytest.mark.parametrize(
    ("count", "experts"), [(2, False), (3, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, False), (2, True)))]
)
def test_sums_rows_and_states_are_those_of_one_process(place: Place, tmp_path: Path, count: int, experts: bool) -> None:
    """Codes agree up to ties and hide a sum that is slightly wrong: here no code is rounded between one Hessian and the next."""
    with (tmp_path / "said").open("w") as out, (tmp_path / "told").open("w") as err:
        model, solves = place.root / "model", 16
        if experts:
            changes: dict[str, Any] = {"num_experts": 12, "num_experts_per_tok": 3, "num_hidden_layers": 2, "mlp_only_layers": []}
            model, solves = zoo.build("qwen3_moe", tmp_path / "model", **changes), 2 * (2 + 2 * 12)
        jobs = start(count, [str(model), str(tmp_path), str(solves)], out, err, ["-c", SAME_SUMS])
        assert [job.wait(timeout=60) for job in jobs] == [0] * count, (tmp_path / "told").read_text()[-3000:]
    assert (tmp_path / "said").read_text() == "the same\n"


@pytest.mark.parametrize(("rows", "count"), [(8, 2), (7, 3), (4, 3), (1, 4), (5, 2)])
def test_every_row_is_solved(rows: int, count: int) -> None:
    """A row that no process has would be published as it lay in memory."""
    sent: list[int] = []
    for index in range(count):
        processes = Processes()
        processes.count, processes.index = count, index
        mine, each = own_rows(rows, processes)
        taken = list(range(rows))[mine]
        assert 0 < len(taken) <= each
        sent += (taken + [-1] * each)[:each]
    assert sent[:rows] == list(range(rows))


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        require_samples(2, 3)
    assert caught.value.problems[0].fix.startswith("--samples 3 or more")
    require_samples(3, 3)


def test_samples_are_spread_in_their_order() -> None:
    """If this failed, a sample would be lost, or counted twice."""
    processes = Processes()
    processes.count = 3
    assert [processes.part_of(7, index) for index in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 7)]


def test_one_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that some scheduler sets must not make a single run wait for others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with Processes("cpu") as processes:
        assert processes.count == 1 and processes.main and processes.device == torch.device("cpu")
    part = torch.arange(6.0).reshape(3, 2)
    assert processes.collect(part, 3) is part and processes.concatenate(part) is part and processes.hand_out(part, part, 3) is part
