"""A bench document whose figures are made up: they follow a formula, come from no machine, and are no result."""

from __future__ import annotations

from marlinctl.benchmarking.cases import LayerSet, distinct, named_set, roofline_set
from marlinctl.benchmarking.documents import (
    Accuracy,
    Case,
    Ceilings,
    Clocks,
    Document,
    Family,
    Machine,
    PeerNote,
    Settings,
    Worst,
    fixed_costs,
    ideal_us,
    make_case,
    make_drift,
    make_set,
    moved_bytes,
)
from marlinctl.benchmarking.timing import Sample

CEILINGS = Ceilings(read=4e12, matmul=7e14)
KINDS = ("dense", "sparse")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
MADE_UP = "a GPU that does not exist"


def flat(us: float) -> Sample:
    return Sample(us, 0.99 * us, 1.02 * us, 20, 50)


def made_up_case(one: LayerSet, m: int, index: int) -> Case:
    shape = one.layers[index].shape
    torch = 5 + 1e6 * max(moved_bytes(shape, m, 16) / CEILINGS.read, 2 * m * shape.n * shape.k / CEILINGS.matmul)
    samples: dict[str, tuple[Family, Sample]] = {
        "torch [N, K]": ("torch", flat(torch)),
        "torch [K, N]": ("torch", flat(1.03 * torch)),
        "int4": ("dense", flat(6 + 1.15 * ideal_us(shape, m, "dense", CEILINGS) * (1 + min(m, 128) / 300))),
        "int4 2:4": ("sparse", flat(6 + 1.25 * ideal_us(shape, m, "sparse", CEILINGS) * (1 + min(m, 128) / 200))),
        "vllm marlin": ("peer", flat(9 + 1.5 * ideal_us(shape, m, "dense", CEILINGS))),
    }
    return make_case(shape, m, samples, CEILINGS, KINDS)


def made_up(sets: tuple[LayerSet, ...] | None = None, tokens: tuple[int, ...] = TOKENS) -> Document:
    chosen = sets or (named_set("llama3-8b", 128), named_set("ideal", 128))
    first = {shape: (one, [layer.shape for layer in one.layers].index(shape)) for one in chosen for shape in one.shapes}
    cases = [made_up_case(first[shape][0], m, first[shape][1]) for shape in distinct(chosen) for m in tokens]
    machine = Machine(
        gpu=MADE_UP,
        architecture="sm_90a",
        multiprocessors=100,
        l2_bytes=50 * 2**20,
        memory_bytes=100 * 2**30,
        torch="0",
        cuda="0",
        cublas=None,
        driver=None,
        nvrtc=None,
        date="2026-01-01",
        clocks_at_start=Clocks(),
        clocks_at_end=Clocks(sm_mhz=1000),
    )
    settings = Settings(
        dtype="float16", kinds=list(KINDS), tokens=list(tokens), group_size=128, every_configuration=False, replays=20, command="none"
    )
    worst = Worst(name="int4", kind="dense", dtype="float16", checks=96, relative=2.5e-4, mean_ratio=2e-4, gate=1e-3)
    notes = [
        PeerNote(name="vllm marlin", version="0", status="measured", why=""),
        PeerNote(name="vllm machete", version="0", status="differs", why="machete_mm has no parameter b_q"),
        PeerNote(name="humming", version=None, status="absent", why="not installed"),
    ]
    again = {name: flat(timed.us * 1.01) for timed in cases[0].candidates if (name := timed.name)}
    return Document(
        machine=machine,
        settings=settings,
        ceilings=CEILINGS,
        kernels=[],
        accuracy=Accuracy(checks=96, worst=[worst]),
        peers=notes,
        cases=cases,
        sets=[make_set(one, cases) for one in chosen],
        drift=make_drift(cases[0], again),
        fixed_costs=fixed_costs(cases),
    )


def made_up_roofline() -> Document:
    return made_up((roofline_set(128),), tuple(4**i for i in range(9)))
