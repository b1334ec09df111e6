"""Every method on every generated task, over seeds: the table of the README.

    python bench/table.py                         # all methods, all generated tasks, seeds 0 1 2
    python bench/table.py --jobs 1 --methods lora triadapt --tasks sst2 --seeds 0 1 2 3 4

Each run is `python train.py --method M --task T --seed S` with that method's defaults. Finished runs are kept in
bench/table.jsonl and not run again while the base, the tokenizer, the tasks and the defaults are the same; what
changed is run anew. bench/table.md and the table in README.md are rewritten from these rows alone.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data  # noqa: E402
import train  # noqa: E402

ROWS = os.path.join(ROOT, "bench", "table.jsonl")
TASKS = [name for name in data.GENERATED if data.TASKS[name].kind not in ("lm", "mlm")]
MARKS = ("<!-- table of bench/table.py -->", "<!-- end of the table -->")


def fingerprint(method):
    """What a number depends on: base, tokenizer, world, model, the method's file, the run's and the method's defaults."""
    digest = hashlib.sha256()
    method_file = train.METHODS[method][0].replace(".", "/") + ".py"
    for path in ("assets/encoder.safetensors", "assets/tokenizer.json", "world.py", "model.py", method_file):
        with open(os.path.join(ROOT, path), "rb") as f:
            digest.update(f.read())
    settings, options, _ = train.parse(["--method", method])
    digest.update(json.dumps([settings, options], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def read_rows():
    """The kept rows that still hold."""
    if not os.path.exists(ROWS):
        return []
    with open(ROWS) as f:
        rows = [json.loads(line) for line in f]
    now = {method: fingerprint(method) for method in {row["method"] for row in rows}}
    return [row for row in rows if row["fingerprint"] == now[row["method"]]]


def run(method, task, seed, *more):
    """One training run in a folder of its own, on one thread; returns its row."""
    mark = fingerprint(method)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", "--method", method, "--task", task, "--seed", str(seed), *more]
        extra = ["--out", os.path.join(out, "run"), "--threads", "1", "--device", "cpu", "--no-figures"]
        result = subprocess.run(command + extra, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}: {result.stderr.strip()}")
        with open(os.path.join(out, "run", "metrics.jsonl")) as f:
            last = [json.loads(line) for line in f][-1]
    return {"method": method, "task": task, "seed": seed, "fingerprint": mark, **last}


def table(rows, seeds):
    """The markdown table: mean and standard deviation of each task's first metric, in points of 100."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    methods = [method for method in train.METHODS if any(row["method"] == method for row in rows)]
    heads = [f"{task} ({data.TASKS[task].metrics[0]})" for task in tasks]
    lines = ["| method | trained | " + " | ".join(heads) + " | seconds |", "|---|--:|" + "--:|" * (len(tasks) + 1)]
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        cells = [f"{max(row['trained'] for row in mine):,}"]
        for task in tasks:
            scores = [100 * row[data.TASKS[task].metrics[0]] for row in mine if row["task"] == task and row["seed"] in seeds]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread}" if scores else "")
        cells.append(f"{statistics.mean(row['seconds'] for row in mine if row['seed'] in seeds):.0f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(rows, seeds):
    text = table(rows, seeds)
    with open(os.path.join(ROOT, "bench", "table.md"), "w") as f:
        f.write(f"`python bench/table.py`, seeds {' '.join(map(str, seeds))}: mean ± standard deviation of the development "
                f"metric after the last epoch, in points of 100; seconds of one run on one thread.\n\n{text}\n")
    path = os.path.join(ROOT, "README.md")
    with open(path) as f:
        readme = f.read()
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with open(path, "w") as f:
        f.write(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=train.METHODS, default=list(train.METHODS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    rows = read_rows()
    done = {(row["method"], row["task"], row["seed"]) for row in rows}
    wanted = [(m, t, s) for s in args.seeds for t in args.tasks for m in args.methods]
    wanted = [key for key in wanted if key not in done]
    print(f"{len(rows)} runs kept, {len(wanted)} to do")
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(run, *key) for key in wanted]):
            row = future.result()
            rows.append(row)
            with open(ROWS + ".tmp", "w") as f:  # after each run: an interruption loses nothing
                f.writelines(json.dumps(r) + "\n" for r in rows)
            os.replace(ROWS + ".tmp", ROWS)
            metric = data.TASKS[row["task"]].metrics[0]
            print(f"{row['method']:12s} {row['task']:6s} seed {row['seed']}  {metric} {row[metric]:.4f}  {row['seconds']} s", flush=True)
    write(rows, args.seeds)
    print(table(rows, args.seeds))


if __name__ == "__main__":
    main()
