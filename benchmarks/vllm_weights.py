"""What vllm_serve.py asks of a model inside of vLLM. A module of its own, because the processes of several devices import it by name."""

from __future__ import annotations

from typing import Any


def fill(model: Any) -> None:
    """Numbers like those of a model: dummies are nearly zero, and words of GPTQ and compressed-tensors whatever the memory held."""
    import torch

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        leaf, data = name.rpartition(".")[2], parameter.data
        if leaf in ("qweight", "weight_packed"):
            data.random_(-(2**31), 2**31 - 1)
        elif leaf in ("s", "scales", "weight_scale"):
            data.uniform_(0.002, 0.006)
        elif data.is_floating_point():
            data.fill_(1.0) if data.dim() == 1 else data.normal_(0.0, 0.02)


def described(model: Any) -> str:
    """Which kernel multiplies each linear of a block, the head, and the bytes of all weights."""
    names = [f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    modules = [model.get_submodule(name) for name in [*names, "lm_head"]]
    kernels = [getattr(one.quant_method, "kernel", None) or getattr(getattr(one, "scheme", None), "kernel", None) for one in modules]
    said = [type(kernel or module.quant_method).__name__ for kernel, module in zip(kernels, modules, strict=True)]
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return f"{size / 1e9:.2f} GB; blocks {', '.join(dict.fromkeys(said[:-1]))}; head {said[-1]}"
