"""What `accelerate launch` exports decides nothing that marlinctl does not know of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.distillation.distributed import Processes
from marlinctl.errors import UsageError
from marlinctl.system.launcher import cpu_asked, settings_aside, sharding_asked
from tests.distillation.launched import zero_like_transformers_5_22
from tests.tiny import make_tiny

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}
AS_LAUNCHED = SHARDED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


def export(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("settings", "named"), [
    (SHARDED | {"FSDP_VERSION": "1"}, "fsdp_version 1 with fsdp_offload_params false"),
    ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1"),
    (SHARDED | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_version 2 with fsdp_offload_params true"),
    (SHARDED | {"FSDP_ACTIVATION_CHECKPOINTING": "True"}, "fsdp_activation_checkpointing"),
    (SHARDED | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend inductor"),
])  # fmt: skip
def test_what_is_not_followed_is_refused(settings: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch configuration that is not followed must not be ignored in silence."""
    export(settings, monkeypatch)
    with pytest.raises(UsageError) as caught:
        Processes("cpu")
    assert caught.value.error_id == "E288" and named in caught.value.problems[0].what


def test_everything_that_is_refused_is_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One refusal for each start of eight GPUs would take an evening."""
    export(SHARDED | {"FSDP_VERSION": "1", "ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_DYNAMO_BACKEND": "EAGER"}, monkeypatch)
    with pytest.raises(UsageError) as caught:
        sharding_asked()
    assert len(caught.value.problems) == 3


def test_what_accelerate_config_writes_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its defaults, and bf16, ask for nothing else than what is done; refusing them would leave no configuration."""
    assert not sharding_asked() and not cpu_asked()
    defaults = {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_ACTIVATION_CHECKPOINTING": "false", "ACCELERATE_USE_CPU": "True"}
    export(AS_LAUNCHED | defaults, monkeypatch)
    assert sharding_asked() and cpu_asked()


def test_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in the same process afterwards (a trainer that calls marlinctl) still has the launcher's settings, after an error too."""
    export(AS_LAUNCHED | {"ACCELERATE_CPU_AFFINITY": "1"}, monkeypatch)
    before = dict(os.environ)
    with suppress(KeyError), settings_aside():
        assert not [name for name in AS_LAUNCHED if name in os.environ] and os.environ["ACCELERATE_CPU_AFFINITY"] == "1"
        raise KeyError
    assert dict(os.environ) == before


def test_gradients_are_not_divided_behind_our_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate divides every loss by this variable, whatever the program asked for."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    loss = torch.tensor(1.0, requires_grad=True)
    Processes("cpu").accelerator.backward(loss)
    assert loss.grad == 1.0


@pytest.fixture
def second_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What transformers looks at to know that it is in the second process of a sharded run."""
    export(AS_LAUNCHED | {"LOCAL_RANK": "1"}, monkeypatch)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("as_5_22", [False, True], ids=["as installed", "as 5.17 to 5.22"])
@pytest.mark.usefixtures("second_of_a_machine")
def test_the_second_process_loads_the_weights_too(tmp_path: Path, tied: bool, as_5_22: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves zeros there for a launcher of FSDP: half of every parameter was zero on two GPUs, and training went on."""
    folder = make_tiny(tmp_path / "m", tie_word_embeddings=tied)
    if as_5_22:
        monkeypatch.setattr(PreTrainedModel, "_move_missing_keys_from_meta_to_device", zero_like_transformers_5_22())
    found = load_dense(folder, dtype=torch.float32)
    with settings_aside():
        wanted = type(found).from_pretrained(folder, dtype=torch.float32)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]) and ours[name].any(), name
