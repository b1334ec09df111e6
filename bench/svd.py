"""How fast, and how near, `fast_vectors` of task_tlora.py is to the full SVD.

    OMP_NUM_THREADS=1 python bench/svd.py        # a minute on one core; writes bench/svd.md

Both get the same W (n, n) and C (n, n) in float64 and give A (r, n). They take turns, so that whatever
else the machine does slows both; the times are medians.
"""

import os
import platform
import statistics
import sys
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from task_tlora import exact_vectors, fast_vectors, subspace_similarity  # noqa: E402


def problem(n, kind):
    """W (n, n) and C (n, n): of 4 n tokens whose variance falls as 1 / i, or the identity: the hardest."""
    torch.manual_seed(n)
    W = torch.randn(n, n, dtype=torch.float64) / n**0.5
    if kind == "C = I":
        return W, torch.eye(n, dtype=torch.float64)
    X = torch.randn(4 * n, n, dtype=torch.float64) * torch.arange(1, n + 1, dtype=torch.float64) ** -0.5
    return W, X.mT @ X / len(X)


def compare(n, r, kind, repeats):
    W, C = problem(n, kind)
    seconds = {exact_vectors: [], fast_vectors: []}
    A = {}
    for _ in range(repeats):
        for vectors, times in seconds.items():
            start = time.perf_counter()
            A[vectors] = vectors(W @ C, r)
            times.append(time.perf_counter() - start)
    exact, fast = (statistics.median(times) for times in seconds.values())
    M = W @ C
    sigma = torch.linalg.eigvalsh(M.mT @ M).flip(0).sqrt()
    energy = (M @ A[fast_vectors].mT).square().sum() / sigma[:r].square().sum()
    phi = subspace_similarity(A[fast_vectors], A[exact_vectors])
    return (
        f"| {n} | {r} | {kind} | {exact * 1e3:.1f} | {fast * 1e3:.1f} | {exact / fast:.1f} | "
        f"{sigma[r - 1] / sigma[r]:.3f} | {phi:.6f} | {energy:.6f} |"
    )


def processor():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(": ")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    lines = [
        "# A of Task-aware TLoRA: full SVD or block Krylov",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python bench/svd.py` on {processor()}, "
        f"torch {torch.__version__}, CPU, float64; load average {os.getloadavg()[0]:.1f} at the start. A "
        "time is that of W C and its vectors, the median of turns that both took in one process; `gap` is "
        "sigma_r / sigma_(r+1); phi and energy should be 0.999 at least (phi where the gap is 1.05 or more).",
        "",
        "| n | r | C | exact, ms | fast, ms | exact / fast | gap | phi | energy |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for n, repeats in ((128, 15), (256, 9), (512, 7), (1024, 7), (2048, 3)):
        for r, kind in ((8, "variance 1 / i"), (8, "C = I"), (32, "variance 1 / i")):
            lines.append(compare(n, r, kind, repeats))
            print(lines[-1], flush=True)
    with open(os.path.join(HERE, "svd.md"), "w") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
