"""GGUF files: written here with the gguf package's own writer, turned into folders by us, and compared number by number.

Names come from the gguf package's table and the transformations of the stored numbers are written down here a second time, in
the direction of llama.cpp's converter, so that an error on our side does not meet its twin.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from marlinctl.checkpoint.gguf import convert as ours
from marlinctl.checkpoint.gguf.architectures import FAMILIES, PlannedTensor, llama3_factors, plan_model
from marlinctl.checkpoint.gguf.header import read_gguf_header
from marlinctl.checkpoint.gguf.tokenizer import tokenizer_files
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.source import resolve_model
from marlinctl.errors import BadInput, MarlinctlError, NumericalProblem, UsageError
from marlinctl.models.tokenizer_files import check_tokenizer
from marlinctl.system.console import Console
from tests.tiny import tiny_tokenizer

REPOSITORY = Path(__file__).parents[3]
LAYERS = 7  # Gemma 3 has a global layer only from the sixth on

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
Extra = Callable[[gguf.GGUFWriter], None]


def granite(writer: gguf.GGUFWriter) -> None:
    writer.add_attention_scale(0.3)
    writer.add_embedding_scale(3.0)
    writer.add_residual_scale(0.7)
    writer.add_logit_scale(4.0)


def wide_heads(writer: gguf.GGUFWriter) -> None:
    writer.add_key_length(32)
    writer.add_value_length(32)


def softcaps(writer: gguf.GGUFWriter) -> None:
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(16)


# our architecture -> (transformers config, what llama.cpp's converter states besides the sizes)
MODELS: dict[str, tuple[dict[str, Any], list[Extra]]] = {
    "llama": ({"model_type": "llama"}, [lambda w: w.add_rope_dimension_count(16)]),
    "llama with biases": ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, []),
    "llama with wide heads": ({"model_type": "llama", "head_dim": 32}, [wide_heads]),
    "llama tied": ({"model_type": "llama", "tie_word_embeddings": True}, []),
    "llama scaled linearly": (
        {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        [lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), lambda w: w.add_rope_scaling_factor(4.0)],
    ),
    "granite": (
        {
            "model_type": "granite",
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 4.0,
        },
        [granite],
    ),
    "qwen2": ({"model_type": "qwen2"}, []),
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, [wide_heads]),
    "gemma2": (
        {
            "model_type": "gemma2",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        [wide_heads, softcaps],
    ),
    "gemma3": (
        {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "rope_local_base_freq": 10000.0,
            "tie_word_embeddings": True,
        },
        [wide_heads, lambda w: w.add_sliding_window(16)],
    ),
    "phi3": (
        {"model_type": "phi3", "sliding_window": 16, "original_max_position_embeddings": 128},
        [lambda w: w.add_sliding_window(16), lambda w: w.add_rope_dimension_count(16), lambda w: w.add_rope_scaling_orig_ctx_len(128)],
    ),
    "olmo2": ({"model_type": "olmo2"}, []),
}
ARCHITECTURE = {"gemma3_text": "gemma3"}


def writer_for(path: Path, architecture: str, config: Mapping[str, Any], vocab: int) -> gguf.GGUFWriter:
    """The metadata every model has, with the tiny byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    add_byte_level(writer, vocab)
    return writer


def add_byte_level(writer: gguf.GGUFWriter, size: int, pre: str = "gpt-2") -> None:
    document = json.loads(tiny_tokenizer().to_str())
    tokens = sorted(document["model"]["vocab"], key=document["model"]["vocab"].get)
    special = {entry["content"] for entry in document["added_tokens"]}
    kinds = [3 if t in special else 1 for t in tokens] + [5] * (size - len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(len(tokens), size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in document["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(str(writer.path))


def as_llama_cpp_stores_it(name: str, weight: np.ndarray, config: Mapping[str, Any], architecture: str) -> np.ndarray:
    """Halves of each head interleaved for Llama and Granite; 1 + w for Gemma's norms."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if architecture in ("llama", "granite") and heads:
        return np.concatenate([np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(weight, heads)])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight.astype(np.float32) + 1
    return weight


def write_model(path: Path, name: str) -> tuple[Path, torch.nn.Module]:
    """A random model of transformers, rounded to fp16, and its GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    changes, extras = MODELS[name]
    config = AutoConfig.for_model(**(COMMON | {"vocab_size": 272} | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.2).half().float())
    architecture = ARCHITECTURE.get(changes["model_type"], changes["model_type"])
    writer = writer_for(path, architecture, COMMON, 272)
    for extra in extras:
        extra(writer)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), LAYERS)
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, kind = full.rsplit(".", 1)
        data = as_llama_cpp_stores_it(full, tensor.numpy(), COMMON, architecture)
        translated = names.get_name(stem)
        assert translated is not None, full
        writer.add_tensor(f"{translated}.{kind}", data.astype(np.float16) if data.ndim > 1 else data)
    return finish(writer), model


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_ggufs_own_writer(tmp_path: Path, name: str) -> None:
    """A weight would land under a wrong name or with its rows in a wrong order, or a hyperparameter would be lost."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, model = write_model(tmp_path / "model.gguf", name)
    found = resolve_model(str(path), revision=None, cache_dir=tmp_path / "cache", offline=True, console=Console.quiet())
    assert found.kind == "gguf" and "GGUF" in found.note
    checkpoint = open_checkpoint(found.folder)
    check_tokenizer(found.folder, checkpoint.config)
    want = {k: v for k, v in model.state_dict().items() if k in checkpoint.tensors or k != "lm_head.weight"}
    assert checkpoint.tensors.keys() == want.keys()
    for key, tensor in want.items():
        assert torch.equal(checkpoint.read(key), tensor.half()), key
    loaded = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32).eval()
    ids = torch.arange(48).reshape(1, -1) * 5 % 272
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    for text in ("Hello the 123 \n\n world", "<|im_start|>user\nété 日本<|im_end|>", "", "  "):
        ids_of_text = tokenizer(text)["input_ids"]
        assert ids_of_text == tiny_tokenizer().encode(text).ids
        assert tokenizer.decode(ids_of_text) == text
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path: Path, factor: float) -> None:
    """Llama 3.1 and 3.2 would be read without their rotary scaling: right for short texts, wrong for long ones."""
    rule: dict[str, Any] = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = llama3_factors(500000.0, 128, factor)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", **rule}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(torch.tensor(factors), plain / frequencies, rtol=1e-5, atol=0)

    sizes = COMMON | {"hidden_size": 512, "rope_theta": 500000.0}
    header = header_with(tmp_path, sizes, {"rope_freqs.weight": np.array(factors, dtype=np.float32)})
    assert plan_model(header)[0]["rope_scaling"] == {"rope_type": "llama3", **rule}
    with pytest.raises(BadInput, match="no known rule"):
        plan_model(header_with(tmp_path, sizes, {"rope_freqs.weight": np.array(factors, dtype=np.float32) * 1.5}))


def llama_tensors(sizes: Mapping[str, Any], vocab: int = 272, layers: int = LAYERS) -> dict[str, np.ndarray]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    tensors: dict[str, np.ndarray] = {
        "token_embd.weight": np.zeros((vocab, hidden), np.float16),
        "output_norm.weight": np.ones(hidden, np.float32),
    }
    shapes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden)}
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    for i in range(layers):
        for part, shape in shapes.items():
            tensors[f"blk.{i}.{part}.weight"] = np.zeros(shape, np.float16)
        for part in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{part}.weight"] = np.ones(hidden, np.float32)
    return tensors


def llama_file(
    path: Path,
    sizes: Mapping[str, Any] = COMMON,
    more: Mapping[str, np.ndarray | None] | None = None,
    extra: Extra = lambda w: None,
    architecture: str = "llama",
) -> Path:
    """A Llama of zeros; `more` adds, replaces or (None) drops tensors."""
    writer = writer_for(path, architecture, sizes, 272)
    extra(writer)
    tensors = llama_tensors(sizes, layers=sizes["num_hidden_layers"]) | dict(more or {})
    for name, data in tensors.items():
        if data is not None:
            writer.add_tensor(name, data)
    return finish(writer)


def header_with(folder: Path, sizes: Mapping[str, Any], more: Mapping[str, np.ndarray | None]) -> Any:
    return read_gguf_header(llama_file(folder / "x.gguf", sizes, more))


@pytest.mark.parametrize(
    ("more", "extra", "text"),
    [
        ({"blk.0.attn_q.weight": None}, None, "no tensor for model.layers.0.self_attn.q_proj.weight"),
        ({"blk.0.attn_q.weight": np.zeros((32, 64), np.float16)}, None, "must have"),
        ({"blk.0.attn_q_norm.weight": np.zeros(16, np.float32)}, None, "no place in a llama model"),
        ({"blk.7.attn_norm.weight": np.zeros(64, np.float32)}, None, "no place in a llama model"),
        ({"mystery.weight": np.zeros(64, np.float32)}, None, "no place in a llama model"),
        ({"token_embd.weight": None}, None, "token_embd.weight is missing"),
        ({}, lambda w: w.add_uint32("llama.new_trick", 1), "new_trick"),
        ({}, lambda w: w.add_expert_count(8), "mixture of experts"),
        ({}, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "yarn"),
        ({}, lambda w: w.add_rope_dimension_count(8), "only 8 of the 16"),
        ({"rope_factors_long.weight": np.ones(8, np.float32)}, None, "LongRoPE"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, more: dict[str, np.ndarray], extra: Extra | None, text: str) -> None:
    """A hyperparameter or tensor that nobody reads would give another model without a word."""
    path = llama_file(tmp_path / "x.gguf", more=more, extra=extra or (lambda w: None))
    with pytest.raises(BadInput) as caught:
        ours.gguf_folder(path, tmp_path / "cache", Console.quiet())
    assert any(text in p.what for p in caught.value.problems), caught.value.problems
    assert not (tmp_path / "cache").exists()


def test_unknown_architecture(tmp_path: Path) -> None:
    """A model of another kind would be taken for a Llama."""
    with pytest.raises(BadInput, match="'starcoder2'") as caught:
        plan_model(read_gguf_header(llama_file(tmp_path / "x.gguf", architecture="starcoder2")))
    assert all(name in caught.value.problems[0].fix for name in FAMILIES)


# ---- quantization types --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F32"])
@pytest.mark.parametrize("heads", [None, 4])
def test_chunks_give_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, heads: int | None) -> None:
    """Rows would be mixed up or lost where a chunk ends."""
    monkeypatch.setattr(ours, "CHUNK_ELEMENTS", 64 * 5)  # 5 rows: 48 is no multiple
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("t", gguf.quantize(weight, quantization), raw_dtype=quantization)
    path = finish(writer)
    tensor = read_gguf_header(path).tensors["t"]
    assert tensor.shape == (48, 64)
    want = gguf.dequantize(gguf.quantize(weight, quantization), quantization).reshape(48, 64)
    if heads:
        want = np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in np.split(want, heads)])
    (tmp_path / "out").mkdir()
    with Console.quiet().progress("test", 1) as progress:
        ours._write_weights(path, [PlannedTensor("w", tensor, heads)], tmp_path / "out", progress)
    (tmp_path / "out" / "config.json").write_text("{}")
    got = open_checkpoint(tmp_path / "out").read("w")
    assert torch.equal(got, torch.from_numpy(want.astype(np.float16)))


def test_numbers_beyond_fp16_are_named(tmp_path: Path) -> None:
    """A weight of 10^5 would become infinity without a word."""
    bad = np.ones(64, np.float32)
    bad[5] = 1e5
    path = llama_file(tmp_path / "x.gguf", more={"output_norm.weight": bad})
    with pytest.raises(NumericalProblem, match=r"output_norm.*65504"):
        ours.gguf_folder(path, tmp_path / "cache", Console.quiet())
    assert [p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]  # nothing half made stays


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model would be one file of any size, or its index would not fit."""
    monkeypatch.setattr(ours, "MAX_SHARD_BYTES", 40_000)
    path, model = write_model(tmp_path / "model.gguf", "qwen2")
    folder, _ = ours.gguf_folder(path, tmp_path / "cache", Console.quiet())
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) > 5
    for key, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(key), tensor.half()), key


def test_memory_is_bounded_by_a_chunk(tmp_path: Path) -> None:
    """A tensor of several GB would be expanded to fp32 in memory as a whole."""
    rows, columns = 65536, 2048  # 256 MB of fp16, a sparse file
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor_info("t", (rows, columns), np.dtype(np.float16), rows * columns * 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = (tmp_path / "x.gguf").stat().st_size
    os.truncate(tmp_path / "x.gguf", (size + 31) // 32 * 32 + rows * columns * 2)
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom marlinctl.checkpoint.gguf import convert as gguf\n"
        "from marlinctl.system.console import Console\n"
        "from marlinctl.checkpoint.gguf.header import read_gguf_header\n"
        "from marlinctl.checkpoint.gguf.architectures import PlannedTensor\n"
        "folder = Path(sys.argv[1]); header = read_gguf_header(folder / 'x.gguf'); gguf._refuse_unknown_kinds(header)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "plan = [PlannedTensor('w', header.tensors['t'])]\n"
        "with Console.quiet().progress('test', 1) as p: gguf._write_weights(header.path, plan, folder, p)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # KB
    assert (tmp_path / "model.safetensors").stat().st_size > rows * columns * 2


# ---- the cache -----------------------------------------------------------------------------------------------------------------------


class Listener(Console):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_the_cache_is_used_and_damage_is_found(tmp_path: Path) -> None:
    """Every run would convert again, or a damaged copy would be used."""
    path = llama_file(tmp_path / "x.gguf")
    console = Listener()
    folder, _ = ours.gguf_folder(path, tmp_path / "cache", console)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    renamed = path.rename(tmp_path / "other-name.gguf")
    assert ours.gguf_folder(renamed, tmp_path / "cache", console)[0] == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made and not console.warnings

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))

    damages: list[Callable[[], object]] = [
        lambda: flip(folder / "model.safetensors"),
        lambda: (folder / "tokenizer.json").unlink(),
        lambda: (folder / "model-00009-of-00009.safetensors").write_text("{}"),
        lambda: (folder / ours.MANIFEST).write_text("[]"),
        lambda: os.truncate(folder / "config.json", 3),
    ]
    for i, damage in enumerate(damages):
        damage()
        assert ours.gguf_folder(renamed, tmp_path / "cache", console)[0] == folder
        assert len(console.warnings) == i + 1
        assert len(open_checkpoint(folder).tensors) == LAYERS * 9 + 2
        assert not (folder / "model-00009-of-00009.safetensors").exists()

    (folder / ours.MANIFEST).unlink()
    os.mkfifo(folder / ours.MANIFEST)  # which would be waited for
    with pytest.raises(UsageError, match="gguf_source"):
        ours.gguf_folder(renamed, tmp_path / "cache", console)
    (folder / ours.MANIFEST).unlink()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex") as caught:
        ours.gguf_folder(renamed, tmp_path / "cache", console)
    assert caught.value.error_id == "E224" and (folder / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("change", ["another user's folder", "another user's file", "open to everybody", "made without a umask"])
def test_what_others_may_have_written_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """In a cache that several users share, one would choose the weights of the others: an entry vouches for itself."""
    path = llama_file(tmp_path / "x.gguf")
    console = Listener()
    before = os.umask(0 if change == "made without a umask" else 0o022)
    try:
        folder, _ = ours.gguf_folder(path, tmp_path / "cache", console)
    finally:
        os.umask(before)
    if change.startswith("another"):
        theirs = folder if change.endswith("folder") else folder / "model.safetensors"
        lstat = Path.lstat

        def of_another(path: Path) -> os.stat_result:
            found = lstat(path)
            return os.stat_result((*found[:4], found.st_uid + 4000, *found[5:10])) if path == theirs else found

        monkeypatch.setattr(Path, "lstat", of_another)
        monkeypatch.setattr(os, "geteuid", lambda: 3999)
    elif change == "open to everybody":
        (folder / "config.json").chmod(0o666)
    ours.gguf_folder(path, tmp_path / "cache", console)
    assert len(console.warnings) == (change != "made without a umask")


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Two jobs that start together would write into one folder."""
    path = llama_file(tmp_path / "x.gguf")
    program = (
        "import sys\nfrom pathlib import Path\nfrom marlinctl.checkpoint.gguf.convert import gguf_folder\n"
        "from marlinctl.system.console import Console\n"
        "print(gguf_folder(Path(sys.argv[1]), Path(sys.argv[2]), Console.quiet())[0])"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "cache")]
    jobs = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sorted(p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()) == ["", ".lock"]
    open_checkpoint(Path(outputs[0][0].strip()))


# ---- tokenizers ----------------------------------------------------------------------------------------------------------------------


def build(folder: Path, fill: Callable[[gguf.GGUFWriter], None], architecture: str = "llama") -> tuple[Tokenizer, dict[str, str]]:
    writer = gguf.GGUFWriter(folder / "t.gguf", architecture)
    fill(writer)
    files = tokenizer_files(read_gguf_header(finish(writer)), {"max_position_embeddings": 128})
    return Tokenizer.from_str(files["tokenizer.json"]), files


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's 2024, ok", ["it", "'s", "Ġ2024", ",", "Ġok"]),
        ("smollm", "it's 2024, ok", ["it", "'s", "Ġ", "2", "0", "2", "4", ",", "Ġok"]),
        ("refact", "a 12", ["a", "Ġ", "1", "2"]),
        ("qwen2", "IT'S 2024\n\n ok", ["IT", "'S", "Ġ", "2", "0", "2", "4", "ĊĊ", "Ġok"]),
        ("llama-bpe", "IT'S 20245 ok", ["IT", "'S", "Ġ", "202", "45", "Ġok"]),
        ("dbrx", "20245 ok!\n", ["202", "45", "Ġok", "!Ċ"]),
        ("tekken", "camelCase 12/\n", ["camel", "Case", "Ġ", "1", "2", "/Ċ"]),
    ],
)
def test_word_rules(tmp_path: Path, pre: str, text: str, words: list[str]) -> None:
    """Text would be cut into other words than those the merges were learned on: a slightly worse model, and no error."""
    tokenizer, files = build(tmp_path, lambda w: add_byte_level(w, 272, pre))
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] == (pre in ("llama-bpe", "tekken"))
    assert (tokenizer.encode("x").ids[0] == 1) == (pre in ("llama-bpe", "tekken"))
    assert (tokenizer.normalizer is not None) == (pre == "qwen2")


def test_unknown_word_rule_is_refused(tmp_path: Path) -> None:
    """An unknown rule would be taken for GPT-2's."""
    for pre in ("default", "brand-new"):
        with pytest.raises(BadInput, match="word rule"):
            build(tmp_path, lambda w, pre=pre: add_byte_level(w, 272, pre))  # type: ignore[misc]


PIECES = [
    "▁t",
    "he",
    "▁the",
    "in",
    "▁a",
    "▁an",
    "ing",
    "▁s",
    "▁sing",
    "er",
    "▁th",
    "th",
    "▁thin",
    "t",
    "h",
    "e",
    "i",
    "n",
    "g",
    "s",
    "r",
    "▁",
    "a",
    "▁▁",
    "er▁",
]  # best score first


def add_sentencepiece(writer: gguf.GGUFWriter, **facts: Any) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|user|>"] + [f"<0x{i:02X}>" for i in range(256)] + PIECES
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 260 + [-float(i) for i in range(len(PIECES))])
    writer.add_token_types([2, 3, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in facts.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)


def sentencepiece_reference(text: str) -> list[str]:
    """SentencePiece BPE from its definition: merge the neighbours whose token scores best, leftmost first, until none is left."""
    symbols = list(text.replace(" ", "▁"))
    score = {piece: -i for i, piece in enumerate(PIECES)}
    while True:
        pairs = [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [token for s in symbols for token in ([s] if s in score else [f"<0x{b:02X}>" for b in s.encode()])]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="thinages r é日\n", max_size=30))
def test_sentencepiece_against_its_definition(tmp_path: Path, text: str) -> None:
    """The merges that we derive from the scores would not give SentencePiece's tokens."""
    tokenizer, _ = build(tmp_path, add_sentencepiece)
    want = sentencepiece_reference(" " + text) if text else []
    assert tokenizer.encode(text).tokens == ["<s>", *want]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_flags(tmp_path: Path) -> None:
    """A begin token or a leading space would be there when it must not be, or the other way round."""
    tokenizer, files = build(tmp_path, lambda w: add_sentencepiece(w, add_bos_token=False, add_eos_token=True, add_space_prefix=False))
    assert tokenizer.encode("the").tokens == ["t", "he", "</s>"]
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == "<s>"
    assert tokenizer.encode("<|user|>the", add_special_tokens=False).tokens == ["<|user|>", "t", "he"]
    phi, _ = build(tmp_path, add_sentencepiece, architecture="phi3")
    want = [phi.token_to_id("<|user|>"), phi.token_to_id("▁the")]  # Phi-3's tokens take the white space behind them along
    assert phi.encode("<|user|>\n the", add_special_tokens=False).ids == want
    plain, _ = build(tmp_path, add_sentencepiece)
    assert plain.encode("<|user|> the", add_special_tokens=False).tokens == ["<|user|>", *sentencepiece_reference("  the")]


def test_gemma_spaces(tmp_path: Path) -> None:
    """Runs of spaces, which Gemma's files spell with spaces, would fall apart; or a space would be put in front."""

    def fill(writer: gguf.GGUFWriter) -> None:
        pieces = ["a", "b", "▁", "▁b", "ab"]
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "   ", "    ", "\n", "\n\n", *[f"<0x{i:02X}>" for i in range(256)], *pieces]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-1000.0] * len(tokens))
        writer.add_token_types([3] * 4 + [4] * 5 + [6] * 256 + [1] * len(pieces))
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)

    tokenizer, _ = build(tmp_path, fill, architecture="gemma3")
    assert tokenizer.encode("a   b\n\nab b").tokens == ["<bos>", "a", "▁▁▁", "b", "\n\n", "ab", "▁b"]
    assert tokenizer.decode(tokenizer.encode("a   b\n\nab b").ids) == "a   b\n\nab b"
    assert tokenizer.encode("     a").tokens == ["<bos>", "▁▁▁▁", "▁", "a"]  # the longest run first, as in the model's own tokenizer.json


# ---- hostile files -------------------------------------------------------------------------------------------------------------------


def text_bytes(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def raw_gguf(tensors: int = 0, pairs: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def one_tensor(dims: list[int], kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    sizes = b"".join(struct.pack("<Q", d) for d in dims)
    return text_bytes("t") + struct.pack("<I", len(dims) if rank is None else rank) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GG", "truncated"),
        (b"GGML" + bytes(40), "not a GGUF"),
        (raw_gguf(version=1), "version 1"),
        (raw_gguf(version=3 << 24), "version"),  # big-endian
        (raw_gguf(tensors=2**63), "cannot lie"),
        (raw_gguf(pairs=2**40), "cannot lie"),
        (raw_gguf(pairs=1, body=struct.pack("<Q", 2**62) + bytes(20)), "a text of"),
        (raw_gguf(pairs=1, body=text_bytes("k") + struct.pack("<I", 99) + bytes(20)), "unknown value type 99"),
        (raw_gguf(pairs=1, body=text_bytes("k") + struct.pack("<IIQ", 9, 8, 2**60)), "an array of"),
        (raw_gguf(pairs=1, body=text_bytes("k") + struct.pack("<IIQ", 9, 8, 2**20)), "cannot lie"),
        (raw_gguf(pairs=1, body=text_bytes("k") + struct.pack("<IIQ", 9, 12, 2**20)), "cannot lie"),
        (raw_gguf(pairs=1, body=text_bytes("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20)), "values of type 9"),
        (raw_gguf(pairs=1, body=text_bytes("k") + struct.pack("<IQ", 8, 2**40) + bytes(20)), "a text of"),
        (raw_gguf(pairs=1, body=text_bytes("k") + struct.pack("<IQ", 8, 4) + b"\xff\xfe\xff\xfe"), "not UTF-8"),
        (raw_gguf(pairs=2, body=(text_bytes("k") + struct.pack("<IQ", 10, 1)) * 2), "appears twice"),
        (raw_gguf(pairs=1, body=text_bytes("general.alignment") + struct.pack("<II", 4, 33)), "alignment"),
        (raw_gguf(pairs=1, body=text_bytes("general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
        (raw_gguf(tensors=1, body=one_tensor([2**40]) + bytes(64)), "truncated"),
        (raw_gguf(tensors=1, body=one_tensor([2**63, 2**63]) + bytes(64)), "impossible shape"),
        (raw_gguf(tensors=1, body=one_tensor([0]) + bytes(64)), "impossible shape"),
        (raw_gguf(tensors=1, body=one_tensor([4], rank=2**31) + bytes(64)), "dimensions"),
        (raw_gguf(tensors=1, body=one_tensor([4], kind=9999) + bytes(64)), "unknown quantization type"),
        (raw_gguf(tensors=1, body=one_tensor([31], kind=2) + bytes(64)), "no multiple"),
        (raw_gguf(tensors=1, body=one_tensor([4], offset=3) + bytes(64)), "multiple of 32"),
        (raw_gguf(tensors=1, body=one_tensor([4], offset=2**62) + bytes(64)), "truncated"),
        (raw_gguf(tensors=2, body=one_tensor([4]) * 2 + bytes(64)), "appears twice"),
        (raw_gguf(tensors=2, body=one_tensor([16]) + one_tensor([16]).replace(b"t", b"u") + bytes(128)), "overlaps"),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes, text: str) -> None:
    """A count in the file would decide how much memory we use, or a damaged file would be a traceback."""
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(BadInput) as caught:
        read_gguf_header(tmp_path / "x.gguf")
    assert text in caught.value.problems[0].what
    assert "byte" in caught.value.problems[0].where


def test_truncation_anywhere(tmp_path: Path) -> None:
    """Some cut of a good file would be a traceback or be taken for whole."""
    data = llama_file(tmp_path / "x.gguf", COMMON | {"num_hidden_layers": 1}).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(200), *range(200, 20_000, 997), len(data) // 2, len(data) - 200, len(data) - 1]:
        if size >= len(data) - 31:  # the padding behind the last tensor
            continue
        cut.write_bytes(data[:size])
        with pytest.raises(BadInput):
            read_gguf_header(cut)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_any_flipped_bytes(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    """Some damaged metadata would be a traceback."""
    good = tmp_path / "good.gguf"
    if not good.exists():
        llama_file(good, COMMON | {"num_hidden_layers": 1})
    data = bytearray(good.read_bytes())
    for position, new in changes:
        data[position : position + len(new)] = new
    (tmp_path / "bad.gguf").write_bytes(bytes(data))
    with suppress(MarlinctlError):
        header = read_gguf_header(tmp_path / "bad.gguf")
        config, _ = plan_model(header)
        tokenizer_files(header, config)
