"""How fast, and how near, `fast_vectors` of task_tlora.py is to the full SVD.

    OMP_NUM_THREADS=1 python bench/svd.py --write    # two minutes on one core; writes bench/svd.md

Both get the same W (m, n) and C (n, n) in float64 and give A (r, n). They take turns and
the time is the processor's, so that whatever else the machine does hardly counts; the times are medians.
"""

import argparse
import os
import platform
import statistics
import sys
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import task_tlora  # noqa: E402
from task_tlora import exact_vectors, fast_vectors, subspace_similarity  # noqa: E402


def problem(m, n, kind):
    """W (m, n) and C (n, n): of 4 n tokens whose variance falls as 1 / i, or the identity: the hardest."""
    torch.manual_seed(n)
    W = torch.randn(m, n, dtype=torch.float64) / n**0.5
    if kind == "C = I":
        return W, torch.eye(n, dtype=torch.float64)
    X = torch.randn(4 * n, n, dtype=torch.float64) * torch.arange(1, n + 1, dtype=torch.float64) ** -0.5
    return W, X.mT @ X / len(X)


def columns(M, r):
    """How many columns `fast_vectors` sees, None if it takes the full SVD."""
    seen, task_tlora.exact_vectors = [], lambda M, r: seen.append(M.shape[1]) or exact_vectors(M, r)
    try:
        fast_vectors(M, r)
    finally:
        task_tlora.exact_vectors = exact_vectors
    return seen[0] if seen[0] < M.shape[1] else None


def compare(m, n, r, kind, repeats):
    W, C = problem(m, n, kind)
    seconds = {exact_vectors: [], fast_vectors: []}
    A = {}
    for turn in range(repeats):
        for vectors, times in list(seconds.items())[:: 1 - turn % 2 * 2]:  # either is first as often
            start = time.process_time()
            A[vectors] = vectors(W @ C, r)
            times.append(time.process_time() - start)
    exact, fast = (statistics.median(times) for times in seconds.values())
    M = W @ C
    sigma = torch.linalg.eigvalsh(M.mT @ M).clamp_min(0).flip(0).sqrt()
    energy = (M @ A[fast_vectors].mT).square().sum() / sigma[:r].square().sum()
    phi = subspace_similarity(A[fast_vectors], A[exact_vectors])
    k = columns(M, r)
    return (
        f"| {m} x {n} | {r} | {kind} | {f'{k} columns' if k else 'full SVD'} | {exact * 1e3:.1f} | {fast * 1e3:.1f} | "
        f"{exact / fast:.2f} | {sigma[r - 1] / sigma[r]:.3f} | {phi:.6f} | {energy:.6f} |"
    )


def processor():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(": ")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/svd.md")
    write = parser.parse_args().write
    lines = [
        "# A of Task-aware TLoRA: full SVD or block Krylov",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python bench/svd.py` on {processor()}, "
        f"torch {torch.__version__}, CPU, float64; load average {os.getloadavg()[0]:.1f} at the start. A "
        "time is the processor's for W C and its vectors, the median of turns that both took; `gap` is "
        "sigma_r / sigma_(r+1); phi and energy should be 0.999 at least (phi where the gap is 1.05 or more).",
        "",
        "`fast` is block Krylov where that sees at most 5/8 of min(m, n) columns, and the full SVD elsewhere: there "
        "both columns time the same code, and what their ratio differs from 1 by is the noise of this table.",
        "",
        "| W | r | C | fast takes | exact, ms | fast, ms | exact / fast | gap | phi | energy |",
        "|--:|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    falls = "variance 1 / i"
    for m, n, repeats, rows in (
        (128, 128, 30, ((8, falls), (8, "C = I"), (32, falls))),
        (512, 128, 30, ((8, falls),)),
        (128, 512, 20, ((8, falls),)),
        (256, 256, 16, ((1, falls), (4, falls), (8, falls), (8, "C = I"), (32, falls))),
        (512, 512, 10, ((8, falls), (8, "C = I"), (16, falls), (17, falls), (32, falls))),
        (512, 2048, 4, ((8, falls), (12, falls), (32, falls))),
        (2048, 512, 4, ((8, falls), (16, falls), (32, falls))),
        (1024, 1024, 4, ((8, falls), (8, "C = I"), (32, falls), (37, falls), (38, falls), (128, falls))),
        (2048, 2048, 2, ((8, falls), (8, "C = I"), (32, falls), (128, falls))),
    ):
        for r, kind in rows:
            lines.append(compare(m, n, r, kind, repeats))
            print(lines[-1], flush=True)
    if write:
        with open(os.path.join(HERE, "svd.md"), "w") as f:
            f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
