"""How train.py's default learning rates were chosen: every method on a grid of rates, on a seed no table uses.

    python bench/rates.py            # writes bench/rates.md; finished runs are kept in bench/rates.jsonl

For each method the rate with the best mean over the generated tasks is its default in train.METHODS.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor

from table import ROOT, TASKS, run

import data
import train

SEED = 100
GRID = {
    "lora": (2e-3, 4e-3, 8e-3),
    "triadapt": (2e-3, 4e-3, 8e-3),
    "tlora_plus": (5e-4, 1e-3, 2e-3),
    "task_tlora": (4e-3, 8e-3, 1.6e-2),
    "tlora": (1e-2, 2e-2, 4e-2),
    "full": (2.5e-4, 5e-4, 1e-3),
    "bitfit": (4e-3, 8e-3, 1.6e-2),
    "head": (1e-2, 3e-2),
}
ROWS = os.path.join(ROOT, "bench", "rates.jsonl")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=train.METHODS, default=list(GRID))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    rows = []
    if os.path.exists(ROWS):
        with open(ROWS) as f:
            rows = [json.loads(line) for line in f]
    done = {(row["method"], row["task"], row["lr"]) for row in rows}
    wanted = [(m, t, lr) for m in args.methods for lr in GRID[m] for t in TASKS if (m, t, lr) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        for (method, task, lr), row in zip(wanted, pool.map(lambda key: run(key[0], key[1], SEED, "--lr", str(key[2])), wanted)):
            rows.append({"method": method, "task": task, "lr": lr, "score": row[data.TASKS[task].metrics[0]]})
            print(rows[-1], flush=True)
            with open(ROWS, "w") as f:
                f.writelines(json.dumps(r) + "\n" for r in rows)
    lines = ["`python bench/rates.py`: development metric (points of 100) on seed 100, mean over "
             + ", ".join(TASKS) + ".", "", "| method | rate: score |", "|---|---|"]  # fmt: skip
    for method in train.METHODS:
        means = {}
        for lr in GRID[method]:
            scores = [100 * row["score"] for row in rows if (row["method"], row["lr"]) == (method, lr)]
            if len(scores) == len(TASKS):
                means[lr] = sum(scores) / len(scores)
        best = max(means, key=means.get, default=None)
        cells = (f"**{lr:g}: {m:.1f}**" if lr == best else f"{lr:g}: {m:.1f}" for lr, m in means.items())
        lines.append(f"| {method} | " + ", ".join(cells) + " |")
    with open(os.path.join(ROOT, "bench", "rates.md"), "w") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
