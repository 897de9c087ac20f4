"""How long the solver takes for the linears of a model on a GPU, part by part, with its kernels and with torch operators.

    python benchmarks/solve_speed.py                        # the four stacks of a block of Llama-3-8B
    python benchmarks/solve_speed.py --stack 4096x14336     # rows x columns; repeatable
    python benchmarks/solve_speed.py --experts 19 --stack 1536x2048 --stack 2048x768    # of Qwen3-30B-A3B: together, and one by one

Weights are random; the Hessian is that of random inputs with correlated columns. Every part is timed on its own: a warm-up, then the median
of three. Both ways must agree: the table has the share of equal codes, and the layer error of the kernels' result over that of torch's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.quantize.gptq import SEARCH_MARGIN, SEARCH_RATIOS, SolveSettings, solve, solve_many
from marlinctl.quantize.hessian import add_gram, mirror
from marlinctl.quantize.refine import layer_error, refit_scales
from marlinctl.quantize.solver import factor, factor_stack
from marlinctl.quantize.types import Hessian
from marlinctl.solver_kernels.steps import SolverKernels
from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.masked_ls import masked_least_squares
from marlinctl.sparsify.sparsegpt import PruneSettings, prune, prune_many
from marlinctl.sparsify.steps import TORCH, PruneSteps

DEVICE = torch.device("cuda", 0)
LLAMA = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")  # q k v, o, gate up, down
TOKENS = 32768
GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", action="append", metavar="RxK", help=f"default: {' '.join(LLAMA)}")
    parser.add_argument("--skip-torch", action="store_true", help="only the kernels")
    parser.add_argument("--experts", type=int, metavar="E", help="so many stacks, each with a Hessian of its own, together and one by one")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, groups of {GROUP}, {TOKENS} tokens; milliseconds")
    kernels = SolverKernels(DEVICE, jit.default_folder()).steps()
    for stack in arguments.stack or LLAMA:
        rows, k = map(int, stack.split("x"))
        if arguments.experts:
            measure_many(arguments.experts, rows, k, kernels)
            continue
        measure(rows, k, kernels, None if arguments.skip_torch else TORCH)


def measure(rows: int, k: int, kernels: PruneSteps, torch_steps: PruneSteps | None) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(rows, k, generator=generator, device=DEVICE) * 0.02
    x = inputs(k, generator)
    total = torch.zeros(k, k, device=DEVICE)
    print(f"\n{rows} rows, {k} columns")
    show("Gram matrix", timed(lambda: add_gram(total.zero_(), x)))
    matrix = mirror(total) / TOKENS
    diagonal = matrix.diagonal().clone()
    show("factor", timed(lambda: factor(matrix, 0.01)))
    factored = factor(matrix, 0.01)
    w = weight.T.contiguous()
    group_of = torch.arange(k, device=DEVICE) // GROUP
    damped = matrix.clone()
    damped.diagonal().add_(0.01 * float(diagonal.mean()))
    keep = two_largest(w.abs())
    found: dict[str, dict[str, Tensor]] = {}
    for name, steps in (("kernels", kernels), ("torch", torch_steps)):
        if steps is None:
            continue
        how = {"group_size": GROUP, "both_signs": True, "bfloat16_exact": True, "ratios": SEARCH_RATIOS, "margin": SEARCH_MARGIN}
        show(f"{name}: scale search", timed(lambda: steps.search_scales(weight, diagonal, **how)))  # noqa: B023  # called at once
        scales = steps.search_scales(weight, diagonal, **how).T.contiguous()
        show(f"{name}: sweep", timed(lambda: steps.sweep(w, w, factored.feedback, scales, group_of)))  # noqa: B023
        codes, errors = steps.sweep(w, w, factored.feedback, scales, group_of)
        show(f"{name}: 2:4 sweep", timed(lambda: steps.sparsegpt_sweep(w, factored.pivots, factored.feedback, None, group_of)))  # noqa: B023
        show(f"{name}: mask refinement", timed(lambda: steps.improve_mask(w, w * keep, keep, damped)))  # noqa: B023
        values, better = steps.improve_mask(w, w * keep, keep, damped)
        found[name] = {"scales": scales, "codes": codes, "error": layer_error(errors, matrix).sum(), "mask": better}
        found[name]["mask error"] = layer_error(w - values, matrix).sum()
        settings = SolveSettings(GROUP, True, True, "static", "hessian", 0.01, 2)
        show(f"{name}: solve, refine 2", timed(lambda: solve(weight, Hessian(matrix, TOKENS), settings, steps=steps)))  # noqa: B023
        pruning = PruneSettings("iterative", 0.01, 2, 20)
        show(f"{name}: prune, refined", timed(lambda: prune(weight, Hessian(matrix, TOKENS), pruning, steps)))  # noqa: B023
    codes, scales = found["kernels"]["codes"], found["kernels"]["scales"]
    show("both: re-fit of scales", timed(lambda: refit_scales(w, codes, scales, damped, group_of, positive=False, bfloat16_exact=True)))
    show("both: least squares, 20", timed(lambda: masked_least_squares(w, w * keep, keep, damped, 20)))
    show("both: layer error", timed(lambda: layer_error(w, matrix)))
    if "torch" in found:
        ours, theirs = found["kernels"], found["torch"]
        for what in ("scales", "codes", "mask"):
            print(f"  equal {what}: {float((ours[what] == theirs[what]).float().mean()):.6f}")
        for what in ("error", "mask error"):
            print(f"  {what}, kernels over torch: {float(ours[what] / theirs[what]):.6f}")


def measure_many(count: int, rows: int, k: int, kernels: PruneSteps) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = torch.randn(count, rows, k, generator=generator, device=DEVICE) * 0.02
    hessians = []
    for _ in range(count):
        total = torch.zeros(k, k, device=DEVICE)
        add_gram(total, inputs(k, generator))
        hessians.append(Hessian(mirror(total) / TOKENS, TOKENS))
    matrices = torch.stack([hessian.matrix for hessian in hessians])
    print(f"\n{count} experts, {rows} rows, {k} columns")
    show("factor: together", timed(lambda: factor_stack(matrices, [0.01] * len(matrices))))
    show("factor: one by one", timed(lambda: [factor(matrix, 0.01) for matrix in matrices]))
    damped = matrices.double()
    damped.diagonal(dim1=1, dim2=2).add_(0.01)
    show("float64 Cholesky: together", timed(lambda: torch.linalg.cholesky_ex(damped)))
    show("float64 Cholesky: one by one", timed(lambda: [torch.linalg.cholesky_ex(one) for one in damped]))
    pruning = PruneSettings("iterative", 0.01, 2, 20)
    for refine in (0, 2):
        settings = SolveSettings(GROUP, True, True, "static", "hessian", 0.01, refine)
        one_by_one = lambda: [solve(w, h, settings, steps=kernels) for w, h in zip(weights, hessians, strict=True)]  # noqa: B023, E731
        show(f"solve, refine {refine}: together", timed(lambda: solve_many(weights, hessians, settings, steps=kernels)))  # noqa: B023
        show(f"solve, refine {refine}: one by one", timed(one_by_one))
        pairs = zip(solve_many(weights, hessians, settings, steps=kernels), one_by_one(), strict=True)
        equal = [float((many.linear.codes == one.linear.codes).float().mean()) for many, one in pairs]
        print(f"  equal codes, the worst expert: {min(equal):.6f}")
    show("prune, refined: together", timed(lambda: prune_many(weights, hessians, pruning, kernels)))
    show("prune, refined: one by one", timed(lambda: [prune(w, h, pruning, kernels) for w, h in zip(weights, hessians, strict=True)]))


def inputs(k: int, generator: torch.Generator) -> Tensor:
    """[TOKENS, K] bfloat16: columns of different sizes that share directions."""
    shared = torch.randn(TOKENS, 256, generator=generator, device=DEVICE) @ torch.randn(256, k, generator=generator, device=DEVICE) / 16
    own = torch.randn(TOKENS, k, generator=generator, device=DEVICE)
    sizes = torch.rand(k, generator=generator, device=DEVICE) * 2 + 0.1
    return ((shared + own) * sizes).bfloat16()


def timed(work: Callable[[], object]) -> float:
    """Milliseconds: the median of three after a warm-up."""
    work()
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize(DEVICE)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(DEVICE)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def show(what: str, milliseconds: float) -> None:
    print(f"  {what:28} {milliseconds:10.2f}", flush=True)


if __name__ == "__main__":
    main()
