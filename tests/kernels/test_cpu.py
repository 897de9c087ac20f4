"""Packed linears on a CPU: torch's int4 operator, few and many rows, under every kind of processor that this one can play."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import cpu
from marlinctl.kernels.configurations import DENSE, SPARSE
from marlinctl.kernels.linear import MarlinLinear, packed_module
from marlinctl.kernels.reference import dequantize_sparse
from marlinctl.pack.sparse_marlin import remask
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.types import QuantizedLinear
from tests.kernels.software_kernel import random_packed

GATE = 5e-3  # relative error, Frobenius: of bfloat16, as `bench --check` and `verify` have it
CAPABILITIES = ("avx512", "avx2", "default")
SHAPES = ((64, 128), (80, 96), (8, 192), (200, 256), (321, 1152))  # N, K: tiles and torch's blocks end elsewhere
GROUP_SIZES = (32, 64, 128, -1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # by turns
ROWS = (1, 4, 5, 17, 64, 65, 70)


def packed(sparse: bool, n: int, k: int, group_size: int, seed: int = 0) -> tuple[PackedLinear | PackedSparseLinear, Tensor]:
    """Random tiles, scales of both signs, and the weight [N, K] float32 that they stand for."""
    return random_packed(SPARSE[0] if sparse else DENSE[0], n, k, group_size, seed=seed)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def check_products() -> None:
    """AssertionError names the case. Run by a process of its own for each kind of processor."""
    worst, turn = 0.0, itertools.count()
    for number, (sparse, (n, k), group_size) in enumerate(itertools.product((False, True), SHAPES, GROUP_SIZES)):
        if k % (group_size if group_size > 0 else k):
            continue
        p, weight = packed(sparse, n, k, group_size, seed=n + k)
        assert bool((p.scales < 0).any()) and bool((p.scales > 0).any())
        for m, dtype in zip(ROWS, itertools.cycle(DTYPES[number % 3 :] + DTYPES[: number % 3]), strict=False):
            generator = torch.Generator().manual_seed(m)
            x, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n,)))
            given = bias if next(turn) % 2 else None
            out = packed_module(p, given)(x) if m == 1 else cpu.cpu_gemm(x, *_made(p), n, given)
            exact = x.double() @ weight.double().T + (0 if given is None else given.double())
            assert out.dtype == dtype and out.shape == (m, n)
            found = error(out, exact)
            worst = max(worst, found)
            assert found < GATE, (sparse, n, k, group_size, m, dtype, given is not None, found)
    print(torch.backends.cpu.get_cpu_capability(), cpu.layout().block, f"{worst:.1e}")


_KNOWN: dict[int, tuple[PackedLinear | PackedSparseLinear, tuple[Tensor, Tensor]]] = {}


def _made(p: PackedLinear | PackedSparseLinear) -> tuple[Tensor, Tensor]:
    """for_cpu(p), once for each p; it is kept, so that its id stays its own."""
    return _KNOWN.setdefault(id(p), (p, cpu.for_cpu(p)))[1]


def check_tiles() -> None:
    """Tiles come back bit for bit, padding that no packer writes included."""
    generator = torch.Generator().manual_seed(1)
    for sparse, (n, k) in itertools.product((False, True), SHAPES):
        p, _ = packed(sparse, n, k, -1, seed=n)
        p.qweight.copy_(torch.randint(-(2**31), 2**31, p.qweight.shape, generator=generator))
        weight, _ = cpu.for_cpu(p)
        assert torch.equal(cpu.words_again(weight, p.meta if isinstance(p, PackedSparseLinear) else None), p.qweight), (sparse, n, k)


@pytest.mark.parametrize("capability", [pytest.param(c, marks=() if c == CAPABILITIES[-1] else pytest.mark.slow) for c in CAPABILITIES])
def test_products_under_every_kind_of_processor(capability: str) -> None:
    """If this failed, some CPU would compute with codes in the wrong places, or further off than bfloat16 is."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    if CAPABILITIES.index(capability) < (CAPABILITIES.index(here) if here in CAPABILITIES else 2):
        pytest.skip(f"this processor is {here}")
    program = "from tests.kernels import test_cpu; test_cpu.check_products(); test_cpu.check_tiles()"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0].lower() == capability


def test_layouts_are_found_out_by_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a layout of another torch would be decoded as nonsense instead of being refused."""
    known = cpu.layout()
    real = cpu.convert
    monkeypatch.setattr(cpu, "convert", lambda codes, tiles: real(codes, tiles).view(-1).flip(0).view(len(codes), -1))
    cpu.layout.cache_clear()
    with pytest.raises(RuntimeError, match="in an unknown way"):
        cpu.layout()
    monkeypatch.undo()
    assert cpu.layout() == known


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_tiles_are_dropped_and_come_back(sparse: bool) -> None:
    """If this failed, a model would take twice its size, or be saved as something else than it was loaded from."""
    p, _ = packed(sparse, 200, 256, 64)
    module = packed_module(p, torch.zeros(200).bfloat16())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    size = 4 * before[module.WORDS].numel()
    out = module(torch.ones(1, 256).bfloat16())
    assert getattr(module, module.WORDS) is None
    held = sum(buffer.numel() * buffer.element_size() for buffer in (module.cpu_weight, module.cpu_scales) if buffer is not None)
    weight = module.cpu_weight
    assert weight is not None and weight.numel() == (2 if sparse else 1) * size, "half a byte for each weight"
    assert held < 1.15 * (2 if sparse else 1) * size

    def same(state: dict[str, Tensor]) -> bool:
        return set(state) == set(before) and all(torch.equal(state[name], before[name]) for name in before)

    assert same(module.state_dict()), "saving"
    assert same(copy.deepcopy(module).state_dict()) and same(pickle.loads(pickle.dumps(module)).state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).cpu_weight is None, "the layout of one processor would reach another"
    assert getattr(module, module.WORDS) is None, "copying changed the module"
    given = module.packed()
    assert torch.equal(given.qweight, p.qweight) and module.cpu_weight is None
    assert torch.equal(module(torch.ones(1, 256).bfloat16()), out)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_nothing_holds_the_tiles(sparse: bool) -> None:
    """If this failed, what is dropped would stay in memory all the same."""
    module = packed_module(packed(sparse, 200, 256, 64)[0])
    words = weakref.ref(getattr(module, module.WORDS))
    assert words() is not None
    module(torch.ones(1, 256).bfloat16())
    assert words() is None


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_moves_and_conversions(sparse: bool) -> None:
    """If this failed, `.to()` would round the scales, or take the CPU's layout to a GPU, whose kernels would read it as tiles."""
    module = packed_module(packed(sparse, 80, 96, 32)[0], torch.ones(80).bfloat16())
    x = torch.randn(3, 96).bfloat16()
    out = module(x)
    for convert in (torch.nn.Module.float, torch.nn.Module.half, torch.nn.Module.bfloat16):
        convert(module)
        assert module.cpu_scales is not None and module.cpu_scales.dtype == torch.bfloat16 and module.s.dtype == torch.float16
    assert torch.equal(module(x), out)
    with pytest.raises(ValueError, match="activations are on meta and the linear is on the CPU"):
        module(x.to("meta"))
    module.to("meta")
    assert module.cpu_weight is None and module.cpu_scales is None and getattr(module, module.WORDS).is_meta
    assert module(x.to("meta")).shape == (3, 80)


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_to_a_gpu_and_back(sparse: bool) -> None:
    """If this failed, a model that was called on the CPU would be another one on the GPU."""
    p, weight = packed(sparse, 80, 96, 32)
    module, x = packed_module(p), torch.randn(3, 96).bfloat16()
    module(x)
    exact = x.double() @ weight.double().T
    assert error(module.cuda()(x.cuda()).cpu(), exact) < GATE
    assert torch.equal(getattr(module, module.WORDS).cpu(), p.qweight)
    with pytest.raises(ValueError, match=r"the tiles must be on the CPU"):
        module(x)
    assert error(module.cpu()(x), exact) < GATE


def test_weights_that_are_loaded_later_count() -> None:
    """If this failed, load_state_dict into a module that had been called would change nothing."""
    one, other = (packed_module(packed(False, 80, 96, 32, seed=seed)[0]) for seed in (1, 2))
    x = torch.randn(2, 96).bfloat16()
    one(x)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))
    other(x)
    incomplete = {name: tensor for name, tensor in other.state_dict().items() if name != "B"}
    assert one.load_state_dict(incomplete, strict=False).missing_keys == ["B"]
    assert torch.equal(one(x), other(x)), "what was not loaded is lost"


@pytest.mark.filterwarnings("ignore:packed tensors on the CPU")
def test_tiles_that_somebody_changes() -> None:
    """If this failed, `remask` would change tiles that no product reads."""
    p, weight = packed(True, 80, 96, 32)
    module, x = packed_module(p), torch.eye(96).bfloat16()
    assert torch.allclose(module(x).T.float(), weight, rtol=2**-7, atol=0)
    module.overlap = False
    given = module.packed()
    for seed in (1, 2):  # again after a call, which must not have dropped them
        codes = torch.randint(1, 8, (80, 96), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
        assert isinstance(given, PackedSparseLinear)
        remask(given, QuantizedLinear(codes, torch.ones(80, 3).half(), 32))
        assert torch.allclose(module(x).T.float(), dequantize_sparse(given), rtol=2**-7, atol=0)
        assert bool((dequantize_sparse(given) != weight).any())


def test_torch_compile() -> None:
    """If this failed, a compiled model would break at every linear, or compile again for every number of rows."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(packed_module(packed(False, 128, 96, 32)[0]), packed_module(packed(True, 80, 128, 64)[0]))
    with pytest.raises(Exception, match="call the model once before it is compiled"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.ones(1, 96).bfloat16())
    torch._dynamo.reset()
    loose = torch.compile(copy.deepcopy(model), backend="aot_eager")
    model(torch.ones(1, 96).bfloat16())
    whole = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (1, 3, 70):
        x = torch.randn(m, 96).bfloat16()
        assert torch.equal(whole(x), model(x)) and torch.equal(loose(x), model(x))
    weight, scales = model[0].cpu_weight, model[0].cpu_scales
    for x in (torch.randn(3, 96).half(), torch.randn(2, 70, 96).bfloat16()):
        torch.library.opcheck(cpu.cpu_gemm, (x, weight, scales, 128, torch.zeros(128, dtype=x.dtype)))


def test_threads_that_call_at_once() -> None:
    """If this failed, one thread would find the tiles gone and nothing in their place."""
    x = torch.randn(2, 96).bfloat16()
    for seed in range(20):
        module = packed_module(packed(False, 80, 96, 32, seed=seed)[0])
        found: list[Tensor] = []
        threads = [threading.Thread(target=lambda module=module, found=found: found.append(module(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("m", [0, 1, 70])
def test_shapes_of_activations(m: int) -> None:
    """If this failed, no rows, more dimensions or other strides would stop a model."""
    p, weight = packed(False, 80, 96, 32)
    module = packed_module(p)
    x = torch.randn(96, 2 * m).bfloat16().T.view(2, m, 96) if m else torch.empty(2, 0, 96, dtype=torch.bfloat16)
    assert module(x).shape == (2, m, 80) and module(x).is_contiguous()
    if m:
        assert error(module(x), x.double() @ weight.double().T) < GATE
        assert error(module(x[0, 0]), x[0, 0].double() @ weight.double().T) < GATE


def test_what_is_refused() -> None:
    """If this failed, torch would read beyond a weight, or a module would add a bias of another type than a GPU accepts."""
    module = packed_module(packed(False, 80, 96, 32)[0], torch.zeros(80).half())
    with pytest.raises(ValueError, match=r"bias must be torch.bfloat16 \[80\], got torch.float16"):
        module(torch.ones(1, 96).bfloat16())
    with pytest.raises(ValueError, match="is not one of N=80, K=256"):
        module(torch.ones(1, 256).half())
    with pytest.raises(ValueError, match=r"activations must be float16, bfloat16 or float32, got torch\.float64"):
        module(torch.ones(1, 96).double())
    odd = PackedLinear(torch.zeros(8, 128, dtype=torch.int32), torch.zeros(8, 64).half(), 64, 128, 16)
    with pytest.raises(ValueError, match="32, 64, 128 and channel-wise"):
        MarlinLinear(odd)(torch.ones(1, 128).half())
