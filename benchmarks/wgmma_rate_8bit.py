"""What wgmma with 8-bit A in registers gives on Hopper: clocks, TFLOP/s, power and accuracy of every way to decode 4-bit words for it.

    PYTHONPATH=. python benchmarks/wgmma_rate_8bit.py              # an H200, about a minute
    PYTHONPATH=. python benchmarks/wgmma_rate_8bit.py --compile    # no GPU: registers and spills of every kernel

The products are m64nNk32 of e4m3 and of int8, beside m64nNk16 of float16. A, 64 outputs, comes from MARLIN words: two words of a lane from
neighbouring rows of qweight are its 16 weights of 32 k. Forms of A:

    float16  code x scale, as marlin_sm90.cu decodes from 48 tokens on
    raw      e4m3 of code + 8: the bytes 0..15 of e4m3 are their number times 2^-9, so a nibble is its own operand. 8 times the sum of the
             activations is taken off each group's sum
    signed   e4m3 of the code, by vabsdiff4: sign and magnitude, the magnitude again its own operand
    lookup   e4m3 of the code, by prmt out of two tables of eight; the activations lie in another order
    int8     16 x code

Instructions for 16 weights, and how many of them the ALU pipe takes, which starts one every other clock (NVRTC 13.0): raw 8, 8; signed 18,
16; lookup 20, 16; int8 8, 6. Three loops are timed, in every multiprocessor: products alone, a decoding before each product, and groups of
128 k, whose four products go to a temporary that is then multiplied by the scales of its rows and added to float32 sums. Words are
computed and not loaded. `words` products have sums of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl.benchmarking.machine_code import resources
from marlinctl.kernels import jit
from marlinctl.kernels.driver import done
from marlinctl.pack.marlin import pack_marlin
from marlinctl.quantize.types import QuantizedLinear

HERE = Path(__file__).parent
FORMS = ("float16", "raw", "signed", "lookup", "int8")
GROUP = 128  # k of a group; 128 bytes of 8-bit activations, a row of shared memory
TOKENS = (8, 16, 32, 64, 96, 128, 192, 256)
POWER = (("float16", "decoded"), ("signed", "alone"), ("signed", "groups"), ("int8", "groups"))  # loops whose power is measured
CHECKED = 64  # tokens of the kernel that is compared with float64


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled loop. It is launched with 1 .. `warpgroups` warpgroups."""

    form: str  # of FORMS
    tokens: int
    words: int  # 64 outputs each
    warpgroups: int
    decoded: bool = True
    parts: int = 1  # products that share a fragment, each of them tokens / parts wide
    temporaries: int = 0  # of groups; 0: products add to the sums, and there are no groups
    check: bool = False

    def defines(self) -> list[str]:
        sizes = {"FORM": FORMS.index(self.form), "N": self.tokens // self.parts, "WORDS": self.words, "PARTS": self.parts}
        sizes |= {"WARPGROUPS": self.warpgroups, "DECODED": int(self.decoded), "GROUPED": int(self.temporaries > 0)}
        sizes |= {"TEMPORARIES": self.temporaries, "CHECK": int(self.check)}
        # TOKENS is for the products of ptx_sm90.cuh, which stop at 128 and are not used.
        return ["TOKENS=8", *(f"{name}={value}" for name, value in sizes.items())]

    @property
    def shared_bytes(self) -> int:
        return self.tokens * (128 + 4)

    @property
    def depth(self) -> int:
        """k of a round."""
        return GROUP if self.temporaries else 16 if self.form == "float16" else 32


def product(form: str, n: int) -> str:
    """d = a * b, or d += a * b where `keep` is true, for any N: one wgmma.mma_async.m64nNk16 (float16) or m64nNk32."""
    numbers, tail = {
        "float16": ("k16.f32.f16.f16", ", 1, 1, 0"),
        "int8": ("k32.s32.s8.s8", ""),
    }.get(form, ("k32.f32.e4m3.e4m3", ", 1, 1"))
    letter, count = ("r" if form == "int8" else "f"), n // 2
    d = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    sums = ", ".join(f'"+{letter}"(d[{i // 4}][{i % 4}])' for i in range(count))
    return f"""
__device__ __forceinline__ void product(Sum (&d)[{n // 8}][4], const unsigned (&a)[4], unsigned long long b, bool keep) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}{numbers} {{{d}}}, {{{a}}}, %{count + 4}, p{tail};\\n}}"
        : {sums} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(keep)));
}}
"""


def compiled(kernel: Kernel) -> bytes:
    """Machine code for sm_90a. It needs no GPU."""
    from cuda.bindings import nvrtc

    own = {name: (HERE / name).read_text("utf-8") for name in ("wgmma_rate_8bit.cu", "w4a8_decoding.cuh")}
    own["product.cuh"] = product(kernel.form, kernel.tokens // kernel.parts)
    return jit._compile(nvrtc, "wgmma_rate_8bit.cu", {**jit.texts_of(jit.SOURCES), **own}, jit.flags_for(kernel.defines(), "sm_90a"))


# Tokens, words, warpgroups of which the registers suffice.
ALONE = ((8, 4, 4), (16, 4, 4), (32, 4, 3), (64, 4, 2), (96, 2, 3), (128, 2, 2), (192, 1, 3), (256, 1, 2))
# Tokens, words, parts, temporaries, warpgroups.
GROUPS = (
    *((8, 4, 1, 2, 4), (16, 4, 1, 2, 4), (32, 4, 1, 2, 2), (64, 2, 1, 2, 2), (64, 2, 1, 1, 3), (64, 4, 2, 1, 2), (96, 2, 1, 1, 2)),
    *((128, 1, 1, 1, 3), (128, 2, 2, 1, 2), (192, 1, 3, 1, 3), (256, 1, 4, 2, 2)),
)


def kernels() -> list[Kernel]:
    alone = [Kernel(form, *shape, decoded=False) for form in ("float16", "signed", "int8") for shape in ALONE]
    decoded = [Kernel(form, *shape) for form in FORMS for shape in ALONE if form == "float16" or shape[0] in (16, 64, 128)]
    grouped = [
        Kernel(form, tokens, words, warpgroups, parts=parts, temporaries=temporaries)
        for form in FORMS[1:]
        for tokens, words, parts, temporaries, warpgroups in GROUPS
        if form != "lookup" or tokens in (64, 128)
    ]
    return [*(Kernel(form, CHECKED, 1, 1, check=True) for form in FORMS[1:]), *alone, *decoded, *grouped]


def compile_all(wanted: Sequence[Kernel]) -> dict[Kernel, bytes]:
    """Without those that spill, which are printed."""
    started = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        codes = dict(zip(wanted, pool.map(compiled, wanted), strict=True))
    spilled = {kernel for kernel, code in codes.items() if resources(code).stack_bytes}
    print(f"{len(codes)} kernels compiled in {time.perf_counter() - started:.1f} s; {len(spilled)} spill and are left out", flush=True)
    for kernel in spilled:
        print(f"- {kernel}: {resources(codes[kernel])}")
    return {kernel: code for kernel, code in codes.items() if kernel not in spilled}


def order(form: str) -> list[int]:
    """Of each 32 activations: place -> k. The lookup takes the nibbles of a word in their own order, k + 8 beside k."""
    if form == "float16":
        return list(range(32))
    pairs = (0, 8, 1, 9) if form == "lookup" else (0, 1, 16, 17)
    return [2 * t + k + half for half in ((0, 16) if form == "lookup" else (0, 8)) for t in range(4) for k in pairs]


def quantized(x: Tensor, form: str) -> Tensor:
    """x [tokens, k] float32 -> the numbers that are multiplied, the largest of each token being the format's: 8-bit, or float16."""
    if form == "float16":
        return x.half()
    largest = x.abs().amax(1, keepdim=True)
    return (x / largest * 127).round().to(torch.int8) if form == "int8" else (x / largest * 448).to(torch.float8_e4m3fn)


def rows(activations: Tensor, form: str) -> Tensor:
    """Their bytes in the order in which A has them: uint8 [tokens, 128]."""
    bytes_of = activations.view(torch.uint8).view(len(activations), 4, 32)
    return (bytes_of if form == "float16" else bytes_of[:, :, order(form)]).reshape(len(activations), 128).contiguous()


class Card:
    """The GPU and what it loaded."""

    def __init__(self, codes: dict[Kernel, bytes]) -> None:
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self._clocks = torch.zeros(self.multiprocessors, dtype=torch.int32, device="cuda")  # and a context
        self._never = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._functions = {kernel: _loaded(code) for kernel, code in codes.items()}
        self._activations: dict[tuple[str, int], Tensor] = {}

    def launch(self, kernel: Kernel, ctas: int, warpgroups: int, *given: Tensor | int) -> None:
        from cuda.bindings import driver

        values = [ctypes.c_int(one) if isinstance(one, int) else ctypes.c_void_p(one.data_ptr()) for one in given]
        table = (ctypes.c_void_p * len(values))(*(ctypes.addressof(one) for one in values))
        shape = (ctas, 1, 1, 128 * warpgroups, 1, 1, kernel.shared_bytes)
        stream = torch.cuda.current_stream().cuda_stream
        done(driver.cuLaunchKernel(self._functions[kernel], *shape, stream, ctypes.addressof(table), 0))

    def run(self, kernel: Kernel, warpgroups: int, rounds: int, launches: int = 1) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueues a loop on every multiprocessor; events before and after."""
        key = (kernel.form, kernel.tokens)
        if key not in self._activations:
            x = torch.randn(kernel.tokens, 64 if kernel.form == "float16" else 128, generator=torch.Generator().manual_seed(0))
            self._activations[key] = rows(quantized(x, kernel.form), kernel.form).cuda()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(launches):
            self.launch(kernel, self.multiprocessors, warpgroups, self._clocks, self._never, self._activations[key], rounds)
        after.record()
        return before, after

    def clocks(self) -> float:
        """Of the last launch, the mean over multiprocessors."""
        torch.cuda.synchronize()
        return float(self._clocks.double().mean())


def _loaded(code: bytes) -> Any:
    from cuda.bindings import driver

    library = done(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    return done(driver.cuKernelGetFunction(done(driver.cuLibraryGetKernel(library, b"rate"))))


class Meter:
    """NVML: energy since the driver was loaded, and the clock. OSError without NVML, RuntimeError for what it refuses."""

    SM_CLOCK = 1

    def __init__(self) -> None:
        self._nvml, self._handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        self._call("nvmlInit_v2")
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))

    def joules(self) -> float:
        energy = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(energy))
        return energy.value / 1000

    def megahertz(self) -> int:
        clock = ctypes.c_uint()
        self._call("nvmlDeviceGetClockInfo", self._handle, self.SM_CLOCK, ctypes.byref(clock))
        return clock.value

    def _call(self, name: str, *given: Any) -> None:
        status = getattr(self._nvml, name)(*given)
        if status:
            raise RuntimeError(f"{name} reports {status}")


@dataclass(frozen=True, slots=True)
class Rate:
    kernel: Kernel
    warpgroups: int
    clocks: float  # of a multiprocessor for one product, or for a group's four
    rounds: int
    teraflops: float  # of the whole card, in the measurement
    megahertz: float  # clocks of the multiprocessors by time

    def __str__(self) -> str:
        parts = f"/{self.kernel.parts}" if self.kernel.parts > 1 else ""
        return f"{self.clocks:.1f} ({self.warpgroups} x {self.kernel.words}{parts})"


def rate_of(kernel: Kernel, warpgroups: int, rounds: int, clocks: float, seconds: float, card: Card) -> Rate:
    products = rounds * warpgroups * kernel.words
    operations = 2 * 64 * kernel.tokens * kernel.depth * products * card.multiprocessors
    return Rate(kernel, warpgroups, clocks / products, rounds, operations / seconds / 1e12, clocks / seconds / 1e6)


def measure(card: Card, kernel: Kernel, seconds: float) -> list[Rate]:
    """With 1 .. kernel.warpgroups warpgroups, about `seconds` each."""
    found = []
    for warpgroups in range(1, kernel.warpgroups + 1):
        rounds = 400
        card.run(kernel, warpgroups, rounds)
        rounds = round(rounds * seconds * 1.6e9 / card.clocks() / 2) * 2
        before, after = card.run(kernel, warpgroups, rounds)
        clocks = card.clocks()
        found.append(rate_of(kernel, warpgroups, rounds, clocks, before.elapsed_time(after) / 1000, card))
    return found


def power(card: Card, meter: Meter, rate: Rate, seconds: float) -> list[str]:
    """A line of the table: the same launch for `seconds`, after a third of a second that does not count.

    Power is the energy between the first and the last time that NVML's counter moved: it does so a few times a second.
    """
    kernel = rate.kernel
    launch = rate.rounds * kernel.words * rate.warpgroups * rate.clocks / rate.megahertz / 1e6  # seconds
    card.run(kernel, rate.warpgroups, rate.rounds, max(1, round(0.35 / launch)))
    launches = max(1, round(seconds / launch))
    before, after = card.run(kernel, rate.warpgroups, rate.rounds, launches)
    before.synchronize()
    moved, last, megahertz = [], meter.joules(), []
    while not after.query():
        if (joules := meter.joules()) != last:
            moved.append((time.perf_counter(), joules))
            last = joules
        megahertz.append(meter.megahertz())
        time.sleep(0.01)
    watts = (moved[-1][1] - moved[0][1]) / (moved[-1][0] - moved[0][0]) if len(moved) > 1 else math.nan
    held = rate_of(kernel, rate.warpgroups, rate.rounds, card.clocks(), before.elapsed_time(after) / 1000 / launches, card)
    by_nvml = sum(megahertz) / len(megahertz) if megahertz else math.nan
    numbers = (watts, by_nvml, held.megahertz, held.teraflops, held.clocks * GROUP / kernel.depth)
    loop = "groups" if kernel.temporaries else "decoded" if kernel.decoded else "alone"
    named = [f"{kernel.form}, {loop}", str(kernel.tokens), f"{rate.warpgroups} x {kernel.words}"]
    return [*named, *(f"{number:.0f}" for number in numbers), f"{watts / held.teraflops:.2f}"]


def products_of(card: Card, form: str, codes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over one group of 128 as the card gives them, and in float64 of the same numbers: [outputs, tokens].

    codes: int8 [outputs, 128], outputs a multiple of 64. x: float32 [CHECKED, 128].
    """
    activations = quantized(x, form)
    exact = activations.double()
    packed = pack_marlin(QuantizedLinear(codes, torch.ones(len(codes), 1, dtype=torch.float16), GROUP))
    out = torch.zeros(len(codes), CHECKED, dtype=torch.int32 if form == "int8" else torch.float32, device="cuda")
    kernel = Kernel(form, CHECKED, 1, 1, check=True)
    card.launch(kernel, len(codes) // 64, 1, packed.qweight.cuda(), rows(activations, form).cuda(), out)
    torch.cuda.synchronize()
    found = out.cpu().double() * {"int8": 1 / 16, "lookup": 1}.get(form, 512)
    return found - (8 * exact.sum(1) if form == "raw" else 0), codes.double() @ exact.T


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check(card: Card) -> bool:
    """Reading of tiles, fragments and the order of activations, on a small known matrix."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (192, GROUP), dtype=torch.int8, generator=generator)
    x = torch.randn(CHECKED, GROUP, generator=generator)
    right = True
    for form in FORMS[1:]:
        error = difference(*products_of(card, form, codes, x))
        agrees = error == 0 if form == "int8" else error < 5e-3  # the gate; a wrong place gives about 1
        right &= agrees
        print(f"- {form}: {'agrees' if agrees else 'WRONG'}, relative difference to float64 {error:.1e}", flush=True)
    return right


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


def best(rates: Sequence[Rate], form: str, tokens: int, loop: str) -> Rate | None:
    wanted = {"alone": (False, False), "decoded": (True, False), "groups": (True, True)}[loop]
    those = [r for r in rates if (r.kernel.form, r.kernel.tokens, r.kernel.decoded, r.kernel.temporaries > 0) == (form, tokens, *wanted)]
    return min(those, key=lambda rate: rate.clocks, default=None)


def accuracy(card: Card) -> None:
    """What the card's sums lose over 128 k: codes of a rounded normal distribution, activations with a mean."""
    generator = torch.Generator().manual_seed(2)
    codes = (2.7 * torch.randn(64 * 64, GROUP, generator=generator)).round().clamp(-8, 7).to(torch.int8)
    x = torch.randn(CHECKED, GROUP, generator=generator)
    means = (0.0, 0.25, 1.0)
    lines = [[form, *(f"{difference(*products_of(card, form, codes, x + mean)):.1e}" for mean in means)] for form in FORMS[1:]]
    print("\n## Relative error of sums over 128, against float64 of the same 8-bit numbers")
    table(("", *(f"mean {mean:g} sigma" for mean in means)), lines)


LOOPS = {
    "alone": "Products alone: clocks of a multiprocessor for one wgmma (warpgroups x words)",
    "decoded": "A decoding before each product: the same",
    "groups": "Groups of 128 k: clocks for the 64 x N tile of a group (warpgroups x words / parts)",
}


def rate_tables(rates: Sequence[Rate]) -> None:
    for loop, what in LOOPS.items():
        print(f"\n## {what}")
        found = {form: [best(rates, form, tokens, loop) for tokens in TOKENS] for form in FORMS}
        found = {form: line for form, line in found.items() if any(line)}
        lines = [["by the data sheet", *(str(tokens // 2 * (4 if loop == "groups" else 1)) for tokens in TOKENS)]]
        if loop == "groups":  # float16 scales weights: it has no groups, and eight products for 128 k
            scaled = [best(rates, "float16", tokens, "decoded") for tokens in TOKENS]
            lines.append(["float16, decoded, x 8", *(f"{8 * r.clocks:.1f}" if r else "" for r in scaled)])
        lines += [[form, *(str(r or "") for r in line)] for form, line in found.items()]
        for form, line in found.items():
            lines.append([f"{form}, TFLOP/s at MHz", *(f"{r.teraflops:.0f} at {r.megahertz:.0f}" if r else "" for r in line)])
        table(("", *(f"N={tokens}" for tokens in TOKENS)), lines)


def shape_table(rates: Sequence[Rate], codes: dict[Kernel, bytes]) -> None:
    print("\n## Every shape of groups: clocks for 64 x N x 128")
    counts = range(1, 5)
    lines = []
    for k in codes:
        if k.temporaries:
            clocks = {r.warpgroups: f"{r.clocks:.1f}" for r in rates if r.kernel == k}
            named = [k.form, str(k.tokens), f"{k.words} / {k.parts}, {k.temporaries}", str(resources(codes[k]).registers)]
            lines.append([*named, *(clocks.get(count, "") for count in counts)])
    table(("", "N", "words / parts, temporaries", "registers", *(f"{count} warpgroups" for count in counts)), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile every kernel, print registers and stop; needs no GPU")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each rate")
    parser.add_argument("--power-seconds", type=float, default=1.5, help="of each measurement of power")
    given = parser.parse_args()
    codes = compile_all(kernels())
    if given.compile:
        table(("kernel", "registers"), ([str(kernel), str(resources(code).registers)] for kernel, code in codes.items()))
        return 0
    card = Card(codes)
    print(f"\n{torch.cuda.get_device_name()}, {card.multiprocessors} multiprocessors\n\n## One group of 128, against float64\n")
    right = check(card)
    accuracy(card)
    rates = [rate for kernel in codes if not kernel.check for rate in measure(card, kernel, given.seconds)]
    rate_tables(rates)
    shape_table(rates, codes)
    print("\n## Power")
    meter = Meter()
    chosen = [best(rates, form, tokens, loop) for form, loop in POWER for tokens in (64, 128, 256)]
    measured = ("W", "MHz by NVML", "MHz, clocks by time", "TFLOP/s", "clocks for 64 x N x 128", "pJ / operation")
    lines = (power(card, meter, rate, given.power_seconds) for rate in chosen if rate)
    table(("", "N", "warpgroups x words", *measured), lines)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
