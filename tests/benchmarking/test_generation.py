"""`marlinctl bench --model`: a packed model writes text, and the same weights in 16 bits do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import marlinctl
from marlinctl.benchmarking import generation, gpu
from marlinctl.benchmarking.generation import Lengths, Writer, agreement, load_packed, parse_lengths, unpack_linears
from marlinctl.cli import main
from marlinctl.errors import BadInput, UsageError
from marlinctl.system.console import Console
from tests.benchmarking.software import SoftwareGpu
from tests.packed import by_reference, make_packed, make_sparse_packed
from tests.tiny import VOCAB_SIZE, make_tiny

pytestmark = pytest.mark.filterwarnings("ignore:packed tensors on the CPU")

assert marlinctl.__version__, "importing marlinctl is what registers"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    make_packed(make_tiny(folder / "source"), folder / "native", "marlin", group_size=32)
    return folder / "native"


@torch.inference_mode()
def test_the_writer_writes_what_transformers_would(packed: Path) -> None:
    """If cache, positions or mask were wrong, the times would be those of another computation."""
    model = by_reference(load_packed(packed, CPU, torch.bfloat16))  # whose logits are rarely so close that they fall either way
    prompt = torch.randint(VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(3))
    expected = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
    writer = Writer(model, 3, 9 + 8)
    for _ in range(2):  # the second text lies over the first
        writer.read(prompt)
        written = [writer.tokens.clone()]
        for _ in range(7):
            writer.step()
            written.append(writer.tokens.clone())
        assert torch.equal(torch.cat(written, dim=1), expected)


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_step_writes_the_same(packed: Path) -> None:
    """If the operators broke a graph, or the compiled step forgot the cache, --compile would stop or be fast at writing nonsense."""
    model = load_packed(packed, CPU, torch.bfloat16)
    prompt = torch.randint(VOCAB_SIZE, (2, 5), generator=torch.Generator().manual_seed(3))
    texts = []
    for compiled in (False, True):
        writer = Writer(model, 2, 5 + 6, compiled)
        writer.read(prompt)
        written = [writer.tokens.clone()]
        for _ in range(5):
            writer.step()
            written.append(writer.tokens.clone())
        texts.append(torch.cat(written, dim=1))
    assert agreement(*texts) > 0.5  # nearly equal logits may fall either way


@pytest.mark.parametrize("fmt", ["marlin", "marlin_24"])
@torch.inference_mode()
def test_the_baseline_has_the_same_weights(fmt: str, tmp_path: Path) -> None:
    """If it had others, or were packed still, the speed-up would compare two models, or a model with itself."""
    make = make_packed if fmt == "marlin" else make_sparse_packed
    make(make_tiny(tmp_path / "source"), tmp_path / "native", fmt, group_size=32)
    model = by_reference(load_packed(tmp_path / "native", CPU, torch.float16))
    ids = torch.arange(20).view(2, 10) % VOCAB_SIZE
    before, bytes_before = model(ids).logits.double(), generation.weight_bytes(model)
    assert unpack_linears(model, torch.float16) == 14
    assert all(isinstance(m, nn.Linear) for name, m in model.named_modules() if name.endswith("_proj"))
    after = model(ids).logits.double()
    assert float((after - before).norm() / before.norm()) < 2e-3
    assert generation.weight_bytes(model) > bytes_before


def test_a_run_measures_every_case(packed: Path) -> None:
    """If a case were lost, or times of one model stood under the other, nobody would see it in a table."""
    document = generation.run(packed, SoftwareGpu(), (1, 2), (Lengths(4, 3), Lengths(6, 2)), torch.bfloat16, Console.quiet())
    assert [(case["batch"], case["prompt"], case["new"]) for case in document["cases"]] == [(1, 4, 3), (1, 6, 2), (2, 4, 3), (2, 6, 2)]
    for case in document["cases"]:
        assert case["speedup"] == pytest.approx(case["dense"]["token"] / case["packed"]["token"])
        assert case["packed"]["first"] > 0 and 0 <= case["agreement"] <= 1
    assert document["bytes"]["dense"] > document["bytes"]["packed"]
    assert json.loads(json.dumps(document)) == document
    text = generation.table(document)
    assert "a CPU that plays a GPU" in text and f"{document['cases'][0]['packed']['token']:.3f}" in text


def test_a_fused_run_compares_with_a_model_that_is_not(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the baseline were fused too, or the packed model were not, --fuse would measure nothing."""
    document = generation.run(packed, SoftwareGpu(), (1,), (Lengths(4, 3),), torch.bfloat16, Console(), fused=True)
    assert "4 groups of linears fused" in capsys.readouterr().err
    plain = generation.run(packed, SoftwareGpu(), (1,), (Lengths(4, 3),), torch.bfloat16, Console.quiet())
    assert document["bytes"]["dense"] == plain["bytes"]["dense"]
    assert "fused" in generation.table(document) and "fused" not in generation.table(plain)


def test_texts_agree_until_their_first_difference() -> None:
    """A text that has left the other one agrees by chance alone."""
    one = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    other = torch.tensor([[1, 2, 9, 4], [5, 6, 7, 8]])
    assert agreement(one, other) == 6 / 8


@pytest.mark.parametrize("text", ["64", "64:1", "0:64", "a:b", "64:64,", "-1:4"])
def test_lengths_that_say_nothing_are_refused(text: str) -> None:
    """If they were not, a crash in torch would say so."""
    with pytest.raises(UsageError, match="prompt length") as caught:
        parse_lengths(text)
    assert caught.value.error_id == "E246"


def test_a_text_longer_than_the_model_reads_is_refused(packed: Path) -> None:
    """Positions that a model does not have give numbers all the same."""
    with pytest.raises(UsageError, match="positions"):
        generation.run(packed, SoftwareGpu(), (1,), (Lengths(10**6, 2),), torch.bfloat16, Console.quiet())


def test_a_folder_that_is_not_packed_is_refused(tmp_path: Path) -> None:
    """A dense model would be compared with itself."""
    make_tiny(tmp_path / "source")
    with pytest.raises(BadInput, match="no packed linears") as caught:
        load_packed(tmp_path / "source", CPU, torch.bfloat16)
    assert caught.value.error_id == "E313"


def test_the_command_gives_table_and_file(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way from the flags to the document."""
    monkeypatch.setattr(gpu, "open_gpu", lambda name: SoftwareGpu())
    flags = ["--batch", "1", "--lengths", "4:2", "--dtype", "bfloat16", "--out", str(tmp_path / "out"), "--json"]
    assert main(["bench", "--model", str(packed), *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "generation" and len(document["cases"]) == 1
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["cases"] == document["cases"]


@pytest.mark.parametrize(
    "flags", [["--batch", "1"], ["--lengths", "4:2"], ["--model", "x", "--layers", "llama3-8b"], ["--model", "x", "--build"]]
)
def test_flags_that_mean_nothing_together_are_refused(flags: list[str]) -> None:
    """A flag that has no effect is a mistake that nobody sees."""
    assert main(["bench", *flags]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_graphs_write_what_transformers_would(packed: Path, compiled: bool) -> None:
    """If a graph were recorded with a wrong state, it would be fast at writing nonsense."""
    device = torch.device("cuda", 0)
    with torch.cuda.device(device), torch.inference_mode():
        model = load_packed(packed, device, torch.bfloat16)
        plain = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, device_map={"": str(device)})
        clock = gpu.Gpu(0)
        _, written = generation._write(model, clock, 2, Lengths(16, 8), compiled)
        prompt = torch.randint(int(model.config.vocab_size), (2, 16), device=device, generator=clock.generator(2))
        expected = plain.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 16:]
        assert agreement(written, expected) > 0.5  # nearly equal logits may fall either way
