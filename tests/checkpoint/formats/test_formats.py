from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.base import FormatInfo, LinearParts
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.errors import BadInput
from marlinctl.quantize.scheme import INT8
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear
from tests.packed import (
    ct_block,
    edit_json,
    edit_tensors,
    foreign_ct,
    foreign_gptq,
    gptq_block,
    make_foreign,
    make_packed,
    make_sparse_packed,
    pruned,
    rtn,
)
from tests.tiny import make_tiny

TOKENS = torch.arange(1, 25).reshape(1, -1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("formats") / "source")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits.double()


def client_error(folder: Path) -> float:
    """Relative logit error of transformers with compressed-tensors against the dequantized weights."""
    client = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ours = logits(load_dense(folder, dtype=torch.float32))
    return float((client - ours).norm() / ours.norm())


# ---- telling formats apart -----------------------------------------------------------------------------------------------------------


def test_detect_needs_no_torch(source: Path) -> None:
    """`inspect` and `--help` would take seconds if telling a format imported torch."""

    program = (
        "import sys\nfrom marlinctl.checkpoint import writer\nfrom marlinctl.checkpoint.formats import registry as formats\n"
        "from marlinctl.checkpoint.reader import open_checkpoint\n"
        f"c = open_checkpoint({str(source)!r})\nassert formats.detect(c.config, c.tensors).name == 'dense'\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


LAYER = "model.layers.0.mlp.up_proj"
CT_NAMES = [f"{LAYER}.{suffix}" for suffix in FORMATS["ct"].suffixes if suffix != "weight_zero_point"]
ZERO_POINT = f"{LAYER}.weight_zero_point"
GPTQ_NAMES = [f"{LAYER}.{suffix}" for suffix in FORMATS["gptq"].suffixes]
MARLIN = {"quant_method": "marlinctl", "format": "marlin", "format_version": 1, "bits": 4, "group_size": 64}
MARLIN_NAMES = [f"{LAYER}.{suffix}" for suffix in FORMATS["marlin"].suffixes]
MARLIN_24_NAMES = [f"{LAYER}.{suffix}" for suffix in FORMATS["marlin_24"].suffixes]


@pytest.mark.parametrize(
    ("block", "names", "name", "variant", "size"),
    [
        (None, ["model.norm.weight"], "dense", "", None),
        (ct_block(), CT_NAMES, "ct", "", 32),
        (ct_block(strategy="channel", group_size=None), CT_NAMES, "ct", "", -1),
        (ct_block(actorder="static"), CT_NAMES, "ct", "", 32),
        (ct_block(symmetric=False), [*CT_NAMES, ZERO_POINT], "ct", "", 32),
        (gptq_block(sym=False, checkpoint_format="gptq_v2"), GPTQ_NAMES, "gptq", "v2", 32),
        (gptq_block(), GPTQ_NAMES, "gptq", "v1", 32),
        (gptq_block(checkpoint_format="gptq_v2", group_size=-1), GPTQ_NAMES, "gptq", "v2", -1),
        (gptq_block(desc_act=True), GPTQ_NAMES, "gptq", "v1", 32),  # g_idx decides, when it is read
        (gptq_block(dynamic={r"+:.*\.up_proj$": {"group_size": 64}}), GPTQ_NAMES, "gptq", "v1", 64),
        (MARLIN, MARLIN_NAMES, "marlin", "", 64),
        ({**MARLIN, "overrides": {LAYER: 32}}, MARLIN_NAMES, "marlin", "", 32),
        ({**MARLIN, "format": "marlin_24"}, MARLIN_24_NAMES, "marlin_24", "", 64),
    ],
)
def test_formats_are_told_apart(block: Any, names: list[str], name: str, variant: str, size: int | None) -> None:
    """A format taken for another one is unpacked into noise."""
    info = registry.detect({"quantization_config": block} if block else {}, names)
    assert (info.name, info.variant, info.group_size) == (name, variant, size)


@pytest.mark.parametrize(
    ("block", "names", "error_id", "says"),
    [
        ({"quant_method": "awq", "bits": 4}, GPTQ_NAMES, "E340", "awq"),
        ({"quant_method": "bitsandbytes"}, [], "E340", "bitsandbytes"),
        ([1], CT_NAMES, "E340", "not an object"),
        (None, MARLIN_24_NAMES, "E340", "no quantization_config"),
        (MARLIN, MARLIN_24_NAMES, "E340", "says marlin, but"),
        ({**MARLIN, "format": "marlin_24"}, MARLIN_NAMES, "E340", "says marlin_24, but"),
        ({**MARLIN, "format": "marlin_28"}, MARLIN_NAMES, "E340", "marlin_28"),
        (None, CT_NAMES, "E340", "no quantization_config"),
        (None, GPTQ_NAMES, "E340", "no quantization_config"),
        ({**ct_block(), "format": "marlin-24"}, CT_NAMES, "E340", "marlin-24"),
        ({**ct_block(), "sparsity_config": {"format": "sparse-24-bitmask"}}, CT_NAMES, "E340", "sparse-24-bitmask"),
        ({**ct_block(), "config_groups": {}}, CT_NAMES, "E340", LAYER),
        ({**ct_block(), "config_groups": {"g": {"weights": {}}}}, CT_NAMES, "E340", "targets"),
        (ct_block(num_bits=3), CT_NAMES, "E340", f"{LAYER}: 3-bit"),
        (ct_block(type="float"), CT_NAMES, "E340", "float"),
        (ct_block(symmetric=False), CT_NAMES, "E340", "weight_zero_point is missing, and config.json says asymmetric 4-bit"),
        (ct_block(symmetric=False, num_bits=8), [*CT_NAMES, ZERO_POINT], "E340", "asymmetric 8-bit"),
        (ct_block(symmetric=None), CT_NAMES, "E340", "asymmetric"),
        (ct_block(), [*CT_NAMES, ZERO_POINT], "E340", "weight_zero_point is there, and config.json says 4-bit"),
        (ct_block(strategy="block"), CT_NAMES, "E340", "block"),
        (ct_block(actorder="group"), CT_NAMES, "E340", "static order"),
        (ct_block(group_size=0), CT_NAMES, "E340", "group_size 0"),
        (gptq_block(bits=3), GPTQ_NAMES, "E340", "3-bit"),
        (gptq_block(sym=False), GPTQ_NAMES, "E340", "asymmetric"),
        (gptq_block(sym=False, checkpoint_format="gptq_v2", bits=8), GPTQ_NAMES, "E340", "asymmetric"),
        (gptq_block(dynamic={".*": {"sym": False}}), GPTQ_NAMES, "E340", LAYER),
        (gptq_block(checkpoint_format="marlin"), GPTQ_NAMES, "E340", "marlin"),
        (gptq_block(group_size=0), GPTQ_NAMES, "E340", "group_size"),
        (gptq_block(dynamic={".*": {"bits": 3}}), GPTQ_NAMES, "E340", LAYER),
        (gptq_block(dynamic={f"+:.*{i}": {} for i in range(5001)}), GPTQ_NAMES, "E340", "more than 5,000 regular expressions"),
        ({**MARLIN, "format_version": 3}, MARLIN_NAMES, "E340", "update marlinctl"),
        ({**MARLIN, "format_version": "1"}, MARLIN_NAMES, "E340", "format_version"),
        ({**MARLIN, "format": "marlin_48"}, MARLIN_NAMES, "E340", "marlin_48"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(block: Any, names: list[str], error_id: str, says: str) -> None:
    """Anything let through here is converted into a model that loads and talks nonsense. Exit code 3, and the reason."""
    with pytest.raises(BadInput) as caught:
        registry.detect({} if block is None else {"quantization_config": block}, names)
    assert caught.value.error_id == error_id
    assert caught.value.exit_code == 3
    assert says in " ".join(f"{p.what} {p.where} {p.fix}" for p in caught.value.problems)


def ct(**top: Any) -> dict[str, Any]:
    return {**ct_block(), **top}


def ct_group(**keys: Any) -> dict[str, Any]:
    block = ct_block()
    block["config_groups"]["group_0"].update(keys)
    return block


PLAIN_GPTQ = [name for name in GPTQ_NAMES if not name.endswith("g_idx")]

# What changes the model and shows in no weight: (block, tensors, id, what the refusal names).
CHANGES_THE_MODEL: list[tuple[dict[str, Any], list[str], str, str]] = [
    (ct(transform_config={"config_groups": {"R1": {"type": "hadamard", "apply": []}}}), CT_NAMES, "E340", "transform_config"),
    (ct(kv_cache_scheme={"num_bits": 8, "type": "float"}), CT_NAMES, "E340", "kv_cache_scheme"),
    (ct(kv_cache_scheme={}), CT_NAMES, "E340", "kv_cache_scheme"),  # which stands for eight bits
    (ct(moe_sparsity_config={"method": "prune", "num_experts": [4]}), CT_NAMES, "E340", "moe_sparsity_config"),
    (ct(quantization_status="calibration"), CT_NAMES, "E340", "quantization_status"),
    (ct(rotation="hadamard"), CT_NAMES, "E340", "rotation"),
    (ct(sparsity_config={"format": "dense", "mask": True}), CT_NAMES, "E340", "mask"),
    (ct_block(actorder="GROUP"), CT_NAMES, "E340", "actorder"),
    (ct_block(actorder="Dynamic"), CT_NAMES, "E340", "actorder"),
    (ct_block(actorder=True), CT_NAMES, "E340", "actorder"),
    (ct_block(actorder="weights"), CT_NAMES, "E340", "actorder"),
    (ct_block(block_structure=[16, 16]), CT_NAMES, "E340", "block_structure"),
    (ct_block(dynamic="local"), CT_NAMES, "E340", "dynamic"),
    (ct_block(scale_dtype="torch.float8_e4m3fn"), CT_NAMES, "E340", "scale_dtype"),
    (ct_block(strategy="tensor", group_size=None), CT_NAMES, "E340", "tensor"),
    (ct_block(strategy=None, group_size=None), CT_NAMES, "E340", "strategy None"),  # one scale for the whole matrix
    (ct_block(strategy="channel", group_size=32), CT_NAMES, "E340", "channel"),
    (ct_block(zero_point_offset=8), CT_NAMES, "E340", "zero_point_offset"),
    (ct_group(input_activations={}), CT_NAMES, "E340", "activations"),  # eight bits again
    (ct_group(output_activations={"num_bits": 8}), CT_NAMES, "E340", "output_activations"),
    (ct_group(format="mxfp4-pack-quantized"), CT_NAMES, "E340", "mxfp4"),
    (ct_group(transforms=[]), CT_NAMES, "E340", "transforms"),
    (ct(), [*CT_NAMES, f"{LAYER}.weight_g_idx"], "E340", f"{LAYER}.weight_g_idx"),
    (ct(), [*CT_NAMES, f"{LAYER}.input_scale"], "E340", f"{LAYER}.input_scale"),
    (ct(), [*CT_NAMES, f"{LAYER}.weight"], "E340", f"{LAYER}.weight"),
    (ct(), [*CT_NAMES, f"{LAYER}.lora.A"], "E340", f"{LAYER}.lora.A"),
    (ct(), [*CT_NAMES, "lm_head.weight", "lm_head.weight_scale"], "E340", "lm_head.weight_scale"),
    (gptq_block(desc_act=True), PLAIN_GPTQ, "E340", "g_idx"),
    (gptq_block(desc_act="yes"), GPTQ_NAMES, "E340", "desc_act"),
    (gptq_block(dynamic={r".*": {"desc_act": True}}), PLAIN_GPTQ, "E340", "g_idx"),
    (gptq_block(dynamic={r".*": {"rotation": "hadamard"}}), GPTQ_NAMES, "E340", "rotation"),
    (gptq_block(dynamic={r".*": {"adapter": {"rank": 8}}}), GPTQ_NAMES, "E340", "adapter"),
    (gptq_block(dynamic={r".*": 8}), GPTQ_NAMES, "E340", "dynamic"),
    (gptq_block(dynamic={r"-:.*up_proj": {}}), GPTQ_NAMES, "E340", LAYER),
    (gptq_block(adapter={"name": "lora", "rank": 32}), GPTQ_NAMES, "E340", "adapter"),
    (gptq_block(pack_dtype="int16"), GPTQ_NAMES, "E340", "pack_dtype"),
    (gptq_block(format="qqq"), GPTQ_NAMES, "E340", "qqq"),
    (gptq_block(extra_config={LAYER: {"bits": 8}}), GPTQ_NAMES, "E340", "extra_config"),
    (gptq_block(act_bits=8), GPTQ_NAMES, "E340", "act_bits"),
    (gptq_block(rotation="hadamard"), GPTQ_NAMES, "E340", "rotation"),
    (gptq_block(), [*GPTQ_NAMES, f"{LAYER}.channel_scale"], "E340", "channel_scale"),
    ({**MARLIN, "act_order": True}, MARLIN_NAMES, "E340", "act_order"),
    (MARLIN, [*MARLIN_NAMES, f"{LAYER}.g_idx"], "E340", f"{LAYER}.g_idx"),
]


@pytest.mark.parametrize(("block", "names", "error_id", "says"), CHANGES_THE_MODEL)
def test_what_would_change_the_model_is_refused_by_name(block: Any, names: list[str], error_id: str, says: str) -> None:
    """Read past, each of these gives other numbers than the checkpoint's, up to noise, and no warning."""
    with pytest.raises(BadInput) as caught:
        registry.detect({"quantization_config": block}, names)
    told = " ".join(f"{p.what} {p.where}" for p in caught.value.problems)
    assert (caught.value.error_id, caught.value.exit_code) == (error_id, 3) and says in told


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": ct_block(), "compression_config": gptq_block()}, "say different things"),
        ({"quantization_config": ct_block(), "text_config": {"quantization_config": gptq_block()}}, "text_config"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_a_second_block_is_not_overlooked(config: dict[str, Any], says: str) -> None:
    """Which of two blocks a client follows is its own choice."""
    with pytest.raises(BadInput, match=says):
        registry.detect(config, CT_NAMES)


AS_WRITTEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "compressed-tensors 0.17, by llm-compressor": (
        {
            "config_groups": {
                "group_0": {
                    "format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"],
                    "weights": {
                        "actorder": "static", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                        "observer": "memoryless_minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group", "symmetric": True,
                        "type": "int", "zp_dtype": None,
                    },
                }
            },
            "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {},
            "version": "0.17.0",
        },
        CT_NAMES,
    ),
    "compressed-tensors of 2024": (
        {
            **ct_block(observer="minmax", observer_kwargs={}, block_structure=None, actorder=None, group_size=-1, strategy="channel"),
            "global_compression_ratio": 1.9, "kv_cache_scheme": None, "quantization_status": "frozen",
            "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "registry_requires_subclass": False,
                                "sparsity_structure": "unstructured", "targets": [], "ignore": []},
        },
        CT_NAMES,
    ),
    "GPTQModel": (
        {
            "bits": 4, "checkpoint_format": "gptq", "desc_act": False,
            "dynamic": {r"-:.*\.o_proj": {}, r"+:.*\.up_proj$": {"group_size": 32}},
            "format": "gptq", "group_size": 128, "lm_head": False, "pack_dtype": "int32", "quant_method": "gptq", "sym": True,
            "meta": {"act_group_aware": True, "damp_percent": 0.05, "mse": 0.0, "quantizer": ["gptqmodel:7.7.0"], "true_sequential": True},
        },
        GPTQ_NAMES,
    ),
    "AutoGPTQ, with activation order": (
        {
            "bits": 4, "damp_percent": 0.01, "desc_act": True, "group_size": 128, "is_marlin_format": False,
            "model_file_base_name": "model", "model_name_or_path": None,
            "quant_method": "gptq", "static_groups": False, "sym": True, "true_sequential": True,
        },
        [*GPTQ_NAMES, f"{LAYER}.bias"],  # it writes one for every linear
    ),
    "optimum": (
        {
            "backend": "auto", "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True, "dataset": "c4",
            "damp_percent": 0.1, "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128, "max_input_length": None,
            "model_seqlen": None, "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None, "pad_token_id": None,
            "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True,
        },
        GPTQ_NAMES,
    ),
    "AutoRound": (
        {
            "autoround_version": "0.13.0", "bits": 4, "data_type": "int", "desc_act": False, "dynamic": {r"-:.*linear_attn.*": {}},
            "enable_quanted_input": False, "group_size": 128, "iters": 0, "lm_head": False, "provider": "auto-round",
            "quant_method": "gptq", "sym": True, "true_sequential": False, "damp_percent": 0.01,
        },
        GPTQ_NAMES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_what_other_tools_write_is_read(name: str) -> None:
    """An allow-list that is too short turns sound checkpoints away."""
    block, names = AS_WRITTEN[name]
    assert registry.detect({"quantization_config": block}, names).layers.keys() == {LAYER}


def test_the_tables_know_every_field_of_compressed_tensors() -> None:
    """A field of a later release would be refused in every checkpoint that it writes, until somebody has looked at what it means."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    from marlinctl.checkpoint.formats import blocks

    pairs = ((QuantizationConfig, blocks.CT_BLOCK), (QuantizationScheme, blocks.CT_GROUP), (QuantizationArgs, blocks.CT_WEIGHTS))
    for model, table in pairs:
        assert set(model.model_fields) <= set(table), model.__name__


def test_the_tables_know_every_key_of_transformers_gptq_config() -> None:
    """The same for what transformers writes of a GPTQ model."""
    import inspect

    from transformers import GPTQConfig

    from marlinctl.checkpoint.formats import blocks

    assert set(inspect.signature(GPTQConfig).parameters) - {"kwargs"} <= set(blocks.GPTQ_BLOCK)


def test_all_unreadable_layers_are_listed() -> None:
    """Naming one layer per attempt would make the person try as often as there are layers."""
    names = [f"model.layers.{i}.q_proj.weight_packed" for i in range(5)]
    with pytest.raises(BadInput) as caught:
        registry.detect({"quantization_config": ct_block(num_bits=3)}, names)
    assert len(caught.value.problems) == 5


# ---- tensors -------------------------------------------------------------------------------------------------------------------------


class Folderless:
    """Just enough of a Checkpoint to read tensors from memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {name: type("Info", (), {"file": Path("memory"), "shape": tuple(t.shape)}) for name, t in tensors.items()}
        self.read = lambda name: tensors[name].clone()
        self.folder = Path("memory")


@pytest.mark.parametrize("expression", [r"(.*.*)*x", r"(a+|[a-z.]+)+\d$", r"^(model|layers|\.|.)*!$"])
def test_expressions_of_a_config_cannot_hold_us(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of a stranger's config.json would hold every verb that opens the folder for ever."""
    monkeypatch.setattr("marlinctl.system.patterns.Time.__init__.__defaults__", (0.5,))
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(30) for p in "qkvo"]
    ct = ct_block()
    ct["config_groups"]["group_0"]["targets"] = ["re:" + expression, "Linear"]
    gptq = gptq_block(dynamic={f"+:{expression}": {"bits": 4}})
    for block, suffix in ((ct, "weight_packed"), (gptq, "qweight")):
        started = time.process_time()
        with suppress(BadInput):
            assert len(registry.detect({"quantization_config": block}, [f"{n}.{suffix}" for n in names]).layers) == len(names)
        assert time.process_time() - started < 5


def test_many_names_in_a_config_cost_little() -> None:
    """Targets and rules that name a hundred thousand experts one by one were compared with as many layers: hours."""
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(100) for e in range(300)]
    ct = ct_block()
    ct["config_groups"]["group_0"]["targets"] = names
    ct["ignore"] = [f"re:^{re.escape(name)}$" for name in names]
    started = time.monotonic()
    assert len(registry.detect({"quantization_config": ct}, [f"{n}.weight_packed" for n in names]).layers) == len(names)
    gptq = gptq_block(dynamic={f"+:^{re.escape(name)}$": {"group_size": 32} for name in names})
    assert set(registry.detect({"quantization_config": gptq}, [f"{n}.qweight" for n in names]).layers.values()) == {32}
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("fmt", ["ct", "gptq", "marlin", "marlin_24"])
@pytest.mark.parametrize(("n", "k", "size"), [(64, 128, 32), (128, 128, -1), (16, 80, 16), (200, 48, 48), (80, 192, 64)])
def test_what_is_written_reads_back_bit_for_bit(fmt: str, n: int, k: int, size: int) -> None:
    """Codes are data: a format that loses one on the way changes the model."""
    q = rtn(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)), size)
    q = QuantizedLinear(q.codes, q.scales * torch.where(torch.arange(n) % 2 == 0, 1, -1).unsqueeze(1).half(), q.group_size)
    q = pruned("l", q) if fmt == "marlin_24" else q
    tensors = registry.linear_tensors(FORMATS[fmt], "l", q)
    info = FormatInfo(FORMATS[fmt], {"l": size}, "v1" if fmt == "gptq" else "")
    back = registry.read_linear(Folderless(tensors), info, "l")  # type: ignore[arg-type]
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales)
    assert back.group_size == q.group_size
    assert not isinstance(q, SparseQuantizedLinear) or torch.equal(back.keep, q.keep)  # type: ignore[attr-defined]
    for suffix, (dtypes, shape) in FORMATS[fmt].shapes(n, k, size).items():
        names = {torch.int32: "I32", torch.int64: "I64", torch.int16: "I16", torch.float16: "F16"}
        assert tuple(tensors[f"l.{suffix}"].shape) == shape
        assert names[tensors[f"l.{suffix}"].dtype] in dtypes
    assert set(tensors) == {f"l.{suffix}" for suffix in FORMATS[fmt].suffixes} - {"l.weight_zero_point"}


def test_marlin_24_needs_a_mask() -> None:
    """A mask made up from the codes would move kept weights that are zero; who has none has to say where it comes from."""
    q = pruned("l", rtn(torch.randn(64, 64), 32))
    with pytest.raises(ValueError, match="l has no mask"):
        registry.linear_tensors(FORMATS["marlin_24"], "l", QuantizedLinear(q.codes, q.scales, 32))
    parts = LinearParts(q.codes, q.scales, 32, q.keep)
    assert all(
        torch.equal(t, registry.linear_tensors(FORMATS["marlin_24"], "l", q)[name])
        for name, t in registry.linear_tensors(FORMATS["marlin_24"], "l", parts).items()
    )


def test_gptq_decodes_by_the_published_formula() -> None:
    """GPTQModel computes (u - z) * s[g_idx] with z one more than stored; if qzeros or g_idx were off, it would load garbage silently."""
    q = rtn(torch.randn(24, 64), 32)
    t = {name: tensor.numpy() for name, tensor in registry.linear_tensors(FORMATS["gptq"], "l", q).items()}
    shifts = 4 * np.arange(8)
    u = (t["l.qweight"].view(np.uint32)[:, None, :] >> shifts[None, :, None] & 15).reshape(64, 24).astype(np.int64)  # [K, N]
    z = (t["l.qzeros"].view(np.uint32)[:, :, None] >> shifts & 15).reshape(2, 24).astype(np.int64) + 1  # [G, N]
    g = t["l.g_idx"]
    weight = (u - z[g]) * t["l.scales"].astype(np.float32)[g]
    assert np.array_equal(weight.T, q.dequantize().numpy())
    assert (t["l.qzeros"] == 0x77777777).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_foreign_scales_pass_to_ct_unchanged_and_elsewhere_only_when_exact(dtype: torch.dtype) -> None:
    """A scale rounded on the way changes every weight of its group without a word."""
    codes = torch.zeros(8, 32, dtype=torch.int8)
    inexact = LinearParts(codes, torch.full((8, 1), 1e-6, dtype=dtype), 32)
    assert torch.equal(registry.linear_tensors(FORMATS["ct"], "l", inexact)["l.weight_scale"], inexact.scales)
    for fmt in ("gptq", "marlin"):
        with pytest.raises(BadInput, match=r"l: its .* scales have no exact float16 form") as caught:
            registry.linear_tensors(FORMATS[fmt], "l", inexact)
        assert caught.value.error_id == "E349"
    exact = LinearParts(codes, torch.full((8, 1), 0.25, dtype=dtype), 32)
    assert registry.linear_tensors(FORMATS["gptq"], "l", exact)["l.scales"].dtype == torch.float16


@pytest.mark.parametrize(
    ("fmt", "damage", "says"),
    [
        ("gptq", lambda t: t.update({"l.qzeros": torch.full_like(t["l.qzeros"], -2004318072)}), "checkpoint_format"),
        ("gptq", lambda t: t.update({"l.qzeros": torch.zeros_like(t["l.qzeros"])}), "asymmetric"),
        ("gptq", lambda t: t.update({"l.g_idx": t["l.g_idx"].flip(0)}), "static order"),
        ("gptq", lambda t: t.pop("l.qzeros"), "l.qzeros is missing"),
        ("ct", lambda t: t.pop("l.weight_shape"), "l.weight_shape is missing"),
        ("ct", lambda t: t.update({"l.weight_shape": torch.tensor([-1, 64])}), "weight_shape"),
        ("ct", lambda t: t["l.weight_scale"].fill_(float("nan")), "NaN"),
        ("ct", lambda t: t.update({"l.weight_scale": t["l.weight_scale"][:, :1].contiguous()}), "group_size 32"),
        ("ct", lambda t: t.update({"l.weight_scale": t["l.weight_scale"].int()}), "scales"),
        ("marlin", lambda t: t.update({"l.s": t["l.s"][:1].contiguous()}), "s has shape"),
        ("marlin", lambda t: t.update({"l.weight_shape": torch.tensor([640, 640])}), "B has shape"),
        ("marlin_24", lambda t: t.update({"l.weight_shape": torch.tensor([640, 640])}), "B_24 has shape"),
        ("marlin_24", lambda t: t["l.B_meta"].fill_(0), "row 0, columns 0..3 is 0x0"),
        ("marlin_24", lambda t: t.update({"l.B_meta": t["l.B_meta"].int()}), "meta of N=64, K=64 must be int16"),
        ("marlin_24", lambda t: t.pop("l.B_meta"), "l.B_meta is missing"),
    ],
)
def test_a_damaged_layer_is_refused_by_name(fmt: str, damage: Callable[[dict[str, torch.Tensor]], Any], says: str) -> None:
    """Each of these loads in some client and computes garbage there."""
    tensors = registry.linear_tensors(FORMATS[fmt], "l", pruned("l", rtn(torch.randn(64, 64), 32)))
    damage(tensors)
    info = FormatInfo(FORMATS[fmt], {"l": 32}, "v1" if fmt == "gptq" else "")
    with pytest.raises(BadInput) as caught:
        registry.read_linear(Folderless(tensors), info, "l")  # type: ignore[arg-type]
    problem = caught.value.problems[0]
    assert "l" in problem.what and says in f"{problem.what} {problem.fix}"
    assert caught.value.error_id in ("E302", "E346")


@pytest.mark.parametrize("v2", [False, True])
def test_foreign_gptq_is_read(source: Path, tmp_path: Path, v2: bool) -> None:
    """A checkpoint of another program, written without our code, must give its own codes."""
    block = gptq_block(checkpoint_format="gptq_v2" if v2 else "gptq", desc_act=True)  # with a plain g_idx, desc_act means nothing
    codes = make_foreign(source, tmp_path / "out", block, lambda q: foreign_gptq(q, v2=v2))
    checkpoint = open_checkpoint(tmp_path / "out")
    info = registry.detect(checkpoint.config, checkpoint.tensors)
    for layer, q in codes.items():
        assert torch.equal(registry.read_linear(checkpoint, info, layer).dequantize(), q.dequantize())
    edit_json(tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq" if v2 else "gptq_v2"))
    swapped = open_checkpoint(tmp_path / "out")
    with pytest.raises(BadInput, match="checkpoint_format"):
        registry.read_linear(swapped, registry.detect(swapped.config, swapped.tensors), layer)


# ---- what real clients load ----------------------------------------------------------------------------------------------------------


def mixed(i: int) -> dict[str, int]:
    return {f"model.layers.{i}.self_attn.{p}_proj": 64 for p in "qkv"} | {f"model.layers.{i}.mlp.down_proj": -1}


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({}, {"group_size": -1}),
        ({"tie_word_embeddings": True}, {"skip": ["model.layers.0.self_attn.o_proj"]}),
        ({}, {"overrides": mixed(1)}),
        (
            {"num_hidden_layers": 12},
            {"overrides": mixed(1) | mixed(11), "skip": ["model.layers.10.mlp.up_proj", "model.layers.10.mlp.gate_proj"]},
        ),
    ],
    ids=["uniform", "whole-rows", "tied-and-skipped", "mixed", "mixed-12-blocks"],
)
def test_transformers_loads_what_is_written(tmp_path: Path, changes: dict[str, Any], options: dict[str, Any]) -> None:
    """The config block must mean to compressed-tensors what it means to us: which linear, which group size, which one is 16-bit."""
    make_packed(make_tiny(tmp_path / "source", **changes), tmp_path / "out", **options)
    assert client_error(tmp_path / "out") <= 1e-3


def vllm_group(name: str, class_name: str, groups: dict[str, list[str]]) -> str | None:
    """vLLM's order of asking (compressed_tensors/utils.py, 0.8 to 0.33): the name, then the class, then the shards of a fused linear."""
    from marlinctl.checkpoint.formats.targets import FUSED, matches

    def find(value: str, contains: bool = False) -> str | None:
        return next(
            (
                g
                for g, ts in groups.items()
                for t in ts
                if (t != "Linear" and matches(value, t)) or (contains and t.lower() in value.lower())
            ),
            None,
        )

    parent, _, last = name.rpartition(".")
    shards = [find(f"{parent}.{shard}") for shard in FUSED.get(last, ())]
    return find(name) or find(class_name, contains=True) or (shards[0] if shards and all(shards) else None)


def test_no_group_says_linear_when_sizes_differ() -> None:
    """vLLM would give the fused qkv_proj (class QKVParallelLinear) the group that says Linear, whatever q, k and v say."""
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qkvo"]
    sizes = {name: 64 if ".layers.2." in name else 128 for name in names}
    block = registry.quantization_config(FORMATS["ct"], sizes, ["lm_head"])
    groups = {name: group["targets"] for name, group in block["config_groups"].items()}
    size_of = {name: group["weights"]["group_size"] for name, group in block["config_groups"].items()}
    for i in range(4):
        group = vllm_group(f"model.layers.{i}.self_attn.qkv_proj", "QKVParallelLinear", groups)
        assert group is not None and size_of[group] == (64 if i == 2 else 128)
        group = vllm_group(f"model.layers.{i}.self_attn.o_proj", "RowParallelLinear", groups)
        assert group is not None and size_of[group] == (64 if i == 2 else 128)
    wrong = {"group_0": ["Linear"], "group_1": groups["group_1"]}
    assert vllm_group("model.layers.2.self_attn.qkv_proj", "QKVParallelLinear", wrong) == "group_0"  # the trap itself


@pytest.mark.parametrize("fmt", ["ct", "gptq"])
@pytest.mark.parametrize("few", ["k_proj", "o_proj"])
def test_bits_of_single_linears_are_read_back(fmt: str, few: str) -> None:
    """Broken: a client, or marlinctl itself, unpacks 8-bit words as 4-bit ones, or takes its group size from other linears."""
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"]
    sizes = {name: 32 if name.endswith("q_proj") else 64 for name in names}
    grids = {name: INT8 for name in names if name.endswith(few) or ".layers.1." in name}
    block = registry.quantization_config(FORMATS[fmt], sizes, ["lm_head"], grids=grids)
    found = registry.detect({"quantization_config": block}, [f"{name}.{FORMATS[fmt].suffixes[0]}" for name in names])
    assert dict(found.layers) == sizes and dict(found.grids) == grids
    if fmt == "ct":
        from compressed_tensors.quantization import QuantizationConfig

        QuantizationConfig.model_validate(block)


def test_bits_that_are_not_read_are_refused() -> None:
    """Broken: 3-bit words are unpacked as 4-bit ones, or true as one bit."""
    for bits in (3, 2, True, "8", None):
        ct = registry.quantization_config(FORMATS["ct"], {LAYER: 32}, [])
        ct["config_groups"]["group_0"]["weights"]["num_bits"] = bits
        gptq = {**registry.quantization_config(FORMATS["gptq"], {LAYER: 32}, []), "bits": bits}
        for block, suffix in ((ct, "weight_packed"), (gptq, "qweight")):
            with pytest.raises(BadInput, match="bit") as caught:
                registry.detect({"quantization_config": block}, [f"{LAYER}.{suffix}"])
            assert caught.value.error_id == "E340"


def test_forgotten_quantization_status_is_the_trap_it_is_said_to_be(source: Path, tmp_path: Path) -> None:
    """Without `quantization_status: compressed` transformers loads random numbers; our config must hold it, and then logits agree."""
    make_packed(source, tmp_path / "good")
    assert client_error(tmp_path / "good") <= 1e-3
    make_packed(source, tmp_path / "bad", edit_config=lambda c: c["quantization_config"].pop("quantization_status"))
    assert f"{LAYER}.weight" in unmet(tmp_path / "bad")
    assert client_error(tmp_path / "bad") > 0.1


def unmet(folder: Path) -> set[str]:
    """What transformers misses and fills with numbers of its own, with no more than a warning."""
    _, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return set(info["missing_keys"])


def test_weight_shape_is_not_redundant(source: Path, tmp_path: Path) -> None:
    """vLLM does without `weight_shape`; transformers takes it for missing and unpacks with numbers from uninitialised memory."""
    make_packed(source, tmp_path / "out")

    def forget(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_shape")]:
            del tensors[name]

    assert unmet(tmp_path / "out") == set()
    edit_tensors(tmp_path / "out", forget)
    assert f"{LAYER}.weight_shape" in unmet(tmp_path / "out")


def test_ignore_names_every_16_bit_linear(source: Path, tmp_path: Path) -> None:
    """A 16-bit linear that `ignore` forgets is taken for a packed one: transformers loses its weight."""
    skip = ["model.layers.1.self_attn.o_proj"]
    make_packed(source, tmp_path / "good", skip=skip)
    block = json.loads((tmp_path / "good" / "config.json").read_text())["quantization_config"]
    assert sorted(block["ignore"]) == ["lm_head", *skip]
    make_packed(source, tmp_path / "bad", skip=skip, edit_config=lambda c: c["quantization_config"].update(ignore=["lm_head"]))
    assert unmet(tmp_path / "good") == set()
    assert unmet(tmp_path / "bad") >= {f"{skip[0]}.weight_packed", f"{skip[0]}.weight_scale"}


def test_routers_and_tied_heads_are_ignored_and_embeddings_are_not_linears() -> None:
    """Servers look for packed tensors of a router that `ignore` does not name; lm_head is a module even where it is tied."""
    shapes = {
        "model.embed_tokens.weight": (288, 128),
        "model.layers.0.mlp.gate.weight": (4, 128),
        "model.layers.0.input_layernorm.weight": (128,),
        "model.layers.0.mlp.experts.0.up_proj.weight": (64, 128),
        "embed_out.weight": (288, 128),  # the output head of GPT-NeoX
    }
    found = registry.sixteen_bit_linears(shapes, [])
    assert found == ["embed_out", "lm_head", "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.gate"]
    assert "lm_head" not in registry.sixteen_bit_linears({}, ["lm_head"])


def test_our_ct_config_is_valid_for_compressed_tensors(source: Path) -> None:
    """`weights` forbids unknown keys and `actorder: group`; provenance at the top level must be ignored, not refused."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    block = registry.quantization_config(
        FORMATS["ct"], {"a.q_proj": 128, "a.o_proj": -1}, ["lm_head"], {"version": "1", "recipe_hash": "f" * 64}
    )
    parsed = QuantizationConfig.model_validate(block)
    assert parsed.quantization_status == QuantizationStatus.COMPRESSED
    assert "sparsity_config" not in block and "actorder" not in block["config_groups"]["group_0"]["weights"]
    assert block["marlinctl"] == {"version": "1", "recipe_hash": "f" * 64}


def test_gptq_config_says_all_that_clients_need(source: Path, tmp_path: Path) -> None:
    """Each field is one that some client reads: a wrong checkpoint_format is off by one step, desc_act true is refused by servers."""
    make_packed(source, tmp_path / "out", "gptq")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    wanted = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    assert {key: block[key] for key in wanted} == wanted
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == block
    names = set(open_checkpoint(tmp_path / "out").tensors)
    assert all(f"{LAYER}.{suffix}" in names for suffix in ("qweight", "qzeros", "scales", "g_idx"))


def test_gptq_exceptions_become_dynamic_rules_that_reach_fused_linears() -> None:
    """vLLM and SGLang match `dynamic` against qkv_proj, GPTQModel against q_proj: the rules must hit both, and nothing else."""
    import re

    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"]
    sizes = {name: 32 if ".layers.1." in name else 64 for name in names if ".layers.2." not in name}
    skipped = [name for name in names if ".layers.2." in name]
    dynamic = registry.quantization_config(FORMATS["gptq"], sizes, ["lm_head", *skipped])["dynamic"]

    def rule(name: str) -> Any:
        for pattern, value in dynamic.items():
            if re.match(pattern[2:], name):
                return "skip" if pattern.startswith("-:") else value["group_size"]
        return None

    for last in ("q_proj", "v_proj", "o_proj", "qkv_proj"):
        assert rule(f"model.layers.1.self_attn.{last}") == 32
        assert rule(f"model.layers.2.self_attn.{last}") == "skip"
        assert rule(f"model.layers.11.self_attn.{last}") is None


@pytest.mark.parametrize("fmt", ["ct", "gptq", "marlin", "marlin_24"])
def test_every_format_loads_to_the_same_model(source: Path, tmp_path: Path, fmt: str) -> None:
    """One set of codes must be one model, whatever the packing."""
    codes = make_sparse_packed(source, tmp_path / fmt, fmt, overrides=mixed(0), skip=["model.layers.1.mlp.down_proj"])
    model = load_dense(tmp_path / fmt, dtype=torch.float32)
    for layer, q in codes.items():
        assert torch.equal(model.get_parameter(f"{layer}.weight"), q.dequantize())


def test_foreign_ct_with_fp32_scales_is_read_exactly(source: Path, tmp_path: Path) -> None:
    """CT files may hold fp32 scales; reading them through fp16 would lose bits."""
    codes = make_foreign(source, tmp_path / "out", ct_block(), lambda q: {**foreign_ct(q), "weight_scale": q.scales.float() * 1.0001})
    checkpoint = open_checkpoint(tmp_path / "out")
    parts = registry.read_parts(checkpoint, registry.detect(checkpoint.config, checkpoint.tensors), LAYER)
    assert parts.scales.dtype == torch.float32
    assert torch.equal(parts.scales, codes[LAYER].scales.float() * 1.0001)


# ---- hostile input -------------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.sampled_from(["group", "channel", "int", "gptq", "marlin", "marlin_24", "re:(", "Linear", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["weights", "targets", "group_size", "g", "re:(", "+:("]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.sampled_from([ct_block(), gptq_block(), MARLIN]), st.data())
def test_any_config_is_understood_or_refused(block: dict[str, Any], data: st.DataObject) -> None:
    """config.json comes from strangers: whatever stands in it, the person gets three lines and never a traceback."""
    path = data.draw(st.lists(st.sampled_from(["config_groups", "group_0", "weights"]), max_size=3))
    damaged = json.loads(json.dumps(block))
    place = damaged
    for step in path:
        place = place[step] if isinstance(place.get(step), dict) else place
    keys = [*place, "dynamic", "overrides", "sparsity_config", "ignore", "format", "actorder", "input_activations"]
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=3)):
        place[key] = data.draw(VALUES)
    try:
        info = registry.detect({"quantization_config": damaged}, [*CT_NAMES, *GPTQ_NAMES, *MARLIN_NAMES])
    except BadInput:
        return
    assert all(isinstance(size, int) and (size == -1 or size > 0) for size in info.layers.values())


@given(st.sampled_from(["ct", "gptq", "marlin", "marlin_24"]), st.data())
def test_any_tensors_are_unpacked_or_refused(fmt: str, data: st.DataObject) -> None:
    """So do the tensors: shapes and dtypes that do not belong together must not reach an index error, or a huge allocation."""
    tensors = registry.linear_tensors(
        FORMATS[fmt], "l", pruned("l", rtn(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), 32))
    )
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.int16, torch.float16, torch.float32, torch.uint8]))
    tensors[name] = data.draw(st.sampled_from([torch.zeros, torch.ones]))(shape, dtype=dtype)
    info = FormatInfo(FORMATS[fmt], {"l": data.draw(st.sampled_from([-1, 7, 32, 64, 10**30]))}, "v1" if fmt == "gptq" else "")
    with suppress(BadInput):
        parts = registry.read_parts(Folderless(tensors), info, "l")  # type: ignore[arg-type]
        assert parts.weight().shape == parts.codes.shape
