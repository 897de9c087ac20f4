"""benchmarks/distill_speed.py on a tiny model and a CPU: it is run once on rented GPUs, and must not fail there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from benchmarks import distill_speed as subject
from benchmarks.shapes import SHAPES, make_model
from marlinctl.models.families import architecture
from marlinctl.system import launcher
from tests.distillation.runs import recipe

SMALL = {
    **SHAPES["llama-3-8b"],
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("speed")
    (root / "text.jsonl").write_text(json.dumps({"text": "The garden is behind the house. " * 20}) + "\n")
    make_model(SMALL, 2, root / "files", root / "teacher", root / "text.jsonl", "cpu")
    subject.prune(root / "teacher", root / "student")
    return root / "teacher", root / "student"


def test_steps_are_measured_with_their_kernels(models: tuple[Path, Path]) -> None:
    """The same loop as a run's, from models that the benchmark has made itself."""
    asked = recipe("self", tokens=3 * 256, batch_tokens=256, sequence_length=32, micro_batch=4).distill
    measured = subject.measure(*models, asked, 3, "cpu", torch.float32, profile=True)
    assert measured is not None and len(measured.seconds) == 3 and min(measured.seconds) > 0 and measured.processes == 1
    shown = subject.lines(measured, 1)
    document = json.loads(shown[-1])
    assert document["tokens_per_second"] == pytest.approx(256 / document["seconds"])
    assert "one step by kernel" in shown[-2] and "aten::mm" in shown[-2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_the_step(checkpointing: bool) -> None:
    """8 for each parameter and token of an 8B, 10 with checkpointing: shares of the roofline stand and fall with it."""
    known = architecture(SHAPES["llama-3-8b"])
    asked = recipe("self", batch_tokens=16384, checkpointing=checkpointing).distill
    by_parameters, by_products = subject.operations(known, asked)
    blocks, head = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336), 128256 * 4096
    more = 2 if checkpointing else 0
    assert by_parameters == 16384 * (8 + more) * 8_030_261_248
    assert by_products == 16384 * ((6 + more) * blocks + 4 * head + 2 * (blocks + head))


def test_the_launcher_asks_for_what_distill_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 without anything that is refused: found out here and not when two GPUs wait."""
    threads = ["--num_cpu_threads_per_process", "16"]
    arguments = [*subject.LAUNCHER, "--num_processes", "2", *threads, "-m", "benchmarks.distill_speed"]
    asked, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    for name, value in prepare_multi_gpu_env(asked).items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    assert launcher.sharding_asked()
