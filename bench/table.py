"""Every method on every generated task, over seeds: the table of the README, and what the tasks were made to show.

    python bench/table.py --write                 # all methods, all tasks, seeds 0 1 2: some hours on two cores
    python bench/table.py --methods head full lora-r1 lora --tasks mnli rte --seeds 0 1 2
    python bench/table.py --jobs 1 --minutes 50   # starts no run after 50 minutes; go on another day

Each run is `python train.py --method M --task T --seed S` with the defaults of that method and task. Finished runs are
kept in bench/table.jsonl and not run again while the base, the tokenizer, the task's rows, the code and the defaults are
the same; what changed is run anew, and until then the table says how many of its runs are old. The slowest run of a method on a
task is timed once more, alone on two cores, if it took more than a minute. With --write bench/table.md, the
picture docs/results.png and the table in README.md are made anew of these rows alone.
"""

import argparse
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from sweep import code  # noqa: E402

import data  # noqa: E402
from harness.methods import METHODS as ALL  # noqa: E402
from harness.run import base_of  # noqa: E402
from harness.settings import parse  # noqa: E402

ROWS = os.path.join(ROOT, "bench", "table.jsonl")
TASKS = [name for name in data.GENERATED if not data.TASKS[name].pretraining]
METHODS = {name: ["--method", name] for name in ALL}
METHODS["lora-r1"] = ["--method", "lora", "--rank", "1"]  # is rank 8 of use?
SEEDS = [0, 1, 2]
MINUTE = 60  # seconds that a run may take on two cores
MARKS = ("<!-- table of bench/table.py -->", "<!-- end of the table -->")


@functools.cache
def fingerprint(method, task):
    """What a number depends on: base, tokenizer, the code of the rows, model, the method's file, all settings and options."""
    settings = parse([*METHODS[method], "--task", task])
    method_file = ALL[settings.method][0].replace(".", "/") + ".py"
    digest = hashlib.sha256()
    for path in (base_of(settings), os.path.join(ROOT, "assets", "tokenizer.json")):
        with open(path, "rb") as f:
            digest.update(f.read())
    asked = {key: value for key, value in vars(settings).items() if key not in ("out", "base")}
    rows = code("generated/world.py") + code("generated/suite.py")
    for part in (rows, code("model.py"), code(method_file), json.dumps(asked, sort_keys=True)):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def read_rows():
    """The kept rows; one that no longer holds stands until it is run anew, and `caption` counts it."""
    if not os.path.exists(ROWS):
        return []
    with open(ROWS) as f:
        return [json.loads(line) for line in f]


def holds(row):
    return row["fingerprint"] == fingerprint(row["method"], row["task"])


def caption(rows):
    """A sentence about rows of earlier code, empty if there are none."""
    old = sum(not holds(row) for row in rows)
    which = "All" if old == len(rows) else f"{old} of these"
    return f"{which} {len(rows)} runs are of an earlier version of the code or its defaults." if old else ""


def run(method, task, seed, deadline, threads=1):
    """One training run in a folder of its own; returns its row, None if it is too late to start."""
    if time.monotonic() > deadline:
        return None
    mark = fingerprint(method, task)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", *METHODS[method], "--task", task, "--seed", str(seed)]
        extra = ["--out", os.path.join(out, "run"), "--threads", str(threads), "--device", "cpu", "--no-figures"]
        result = subprocess.run(command + extra, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}: {result.stderr.strip()}")
        with open(os.path.join(out, "run", "metrics.jsonl")) as f:
            last = [json.loads(line) for line in f][-1]
    return {"method": method, "task": task, "seed": seed, "fingerprint": mark, **last}


def save(rows):
    with open(ROWS + ".tmp", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(ROWS + ".tmp", ROWS)


def slowest(rows):
    """{(method, task): its slowest row}"""
    return {(row["method"], row["task"]): row for row in sorted(rows, key=lambda row: row["seconds"])}


def scores(rows, method, task, metric=None):
    """The runs' metric, in points of 100."""
    metric = metric or data.TASKS[task].metrics[0]
    return [100 * row[metric] for row in rows if (row["method"], row["task"]) == (method, task) and row["seed"] in SEEDS]


def cell(values):
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f"±{statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(rows):
    """The markdown table: mean and standard deviation of each task's first metric, in points of 100."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    heads = [f"{task} ({data.TASKS[task].metrics[0]})" for task in tasks]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(tasks)]
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(cell(scores(rows, method, task)) for task in tasks) + " |")
    return "\n".join(lines)


def summary(rows):
    """The README's table: per method the mean of the tasks to understand over seeds, `math`, and the numbers trained on cola."""
    understand = [task for task in TASKS if data.TASKS[task].kind != "lm"]
    lines = ["| method | nine tasks | math | trained |", "|---|--:|--:|--:|"]
    for method in (method for method in METHODS if any(row["method"] == method for row in rows)):
        nine = [statistics.mean(seed) for seed in zip(*(scores(rows, method, task) for task in understand), strict=True)]
        trained = max(row["trained"] for row in rows if (row["method"], row["task"]) == (method, "cola"))
        lines.append(f"| {method} | {cell(nine)} | {cell(scores(rows, method, 'math'))} | {trained:,} |")
    return "\n".join(lines)


def costs(rows):
    """Trained numbers, other metrics and seconds of each task."""
    lines = ["| task | method | trained | seconds | alone | other metrics |", "|---|---|--:|--:|--:|---|"]
    alone = {pair: f"{row['alone']:.0f}" for pair, row in slowest(rows).items() if "alone" in row}
    for task in TASKS:
        for method in METHODS:
            mine = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            if mine:
                others = [f"{metric} {cell(scores(rows, method, task, metric))}" for metric in data.TASKS[task].metrics[1:]]
                trained, seconds = max(row["trained"] for row in mine), statistics.mean(row["seconds"] for row in mine)
                lines.append(f"| {task} | {method} | {trained:,} | {seconds:.0f} "
                             f"| {alone.get((method, task), '')} | {', '.join(others)} |")  # fmt: skip
    return "\n".join(lines)


def verdicts(rows):
    """What the tasks and bases were made to show, each with the tasks that miss it; those not run count as missed."""

    def judge(text, methods, holds, wanted):
        missed = []
        for task in TASKS:
            found = [scores(rows, name, task) for name in methods]
            if min(map(len, found)) < 3 or not holds(*found):
                missed.append(task)
        held = len(TASKS) - len(missed)
        return f"- {text}: {held} of {len(TASKS)}, wanted {wanted}" + (f" (not: {', '.join(missed)})" if missed else "")

    mean, sd = statistics.mean, statistics.stdev
    seconds = {pair: row.get("alone", row["seconds"]) for pair, row in slowest(rows).items()}
    long = sorted(f"{method} on {task} {s:.0f}" for (method, task), s in seconds.items() if s > MINUTE)
    return "\n".join([
        judge("full fine-tuning between 85 and 99", ["full"], lambda full: 85 <= mean(full) <= 99, 10),
        judge("the head alone at least 15 points below full", ["head", "full"],
              lambda head, full: mean(head) <= mean(full) - 15, 8),
        judge("LoRA of rank 8 within 3 points of full", ["lora", "full"],
              lambda lora, full: mean(lora) >= mean(full) - 3, 7),
        judge("LoRA of rank 1 below rank 8 by more than two standard deviations (the larger of the two)", ["lora-r1", "lora"],
              lambda one, eight: mean(eight) - mean(one) > 2 * max(sd(one), sd(eight)), 3),
        judge("standard deviation of head, full and both LoRAs at most 2 points", ["head", "full", "lora-r1", "lora"],
              lambda *four: max(map(sd, four)) <= 2, 8),
        f"- one run of one method on one task in {MINUTE} seconds on two cores: {len(seconds) - len(long)} of {len(seconds)}"
        + (f" (not: {', '.join(long)})" if long else "") + f"; the longest took {max(seconds.values(), default=0):.0f}",
    ])  # fmt: skip


def picture(rows):
    """docs/results.png: of each task how far the methods are from LoRA, with the standard deviations of both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = [method for method in METHODS if method != "lora" and any(row["method"] == method for row in rows)]
    figure, panels = plt.subplots(2, 5, figsize=(13, 5), sharey=True)
    for ax, task in zip(panels.flat, TASKS):
        yard = scores(rows, "lora", task)
        middle, spread = statistics.mean(yard), statistics.stdev(yard)
        ax.axvspan(-spread, spread, color="#c9ced6", linewidth=0)
        ax.axvline(0, color="black", linewidth=1)
        for y, method in enumerate(methods):
            if values := scores(rows, method, task):
                off = statistics.mean(values) - middle
                if off < -20:
                    ax.plot(-20, y, "<", color="#D55E00", markersize=6)
                else:
                    ax.errorbar(off, y, xerr=statistics.stdev(values), fmt="o", color="#0072B2", markersize=5)
        ax.set_title(f"{task} ({data.TASKS[task].metrics[0]}), LoRA {middle:.1f}", fontsize=10)
        ax.set_xlim(-22, 12)
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    title = "LoRA of rank 8 is ahead of the other low-rank methods or level: points from LoRA, mean and standard deviation\n"
    figure.suptitle(title + "of 3 seeds (grey: LoRA's own standard deviation; an arrow: more than 20 points behind)", fontsize=11)
    figure.tight_layout()
    figure.savefig(os.path.join(ROOT, "docs", "results.png"), dpi=90)
    plt.close(figure)


def write(rows):
    picture(rows)
    with open(os.path.join(ROOT, "bench", "table.md"), "w") as f:
        f.write(f"`python bench/table.py`, seeds {' '.join(map(str, SEEDS))}: mean ± standard deviation of the development "
                f"metric after the last epoch, in points of 100. {caption(rows)}\n\n{table(rows)}\n\n"
                f"What the tasks and bases were made to show (targets for them, not for a method):\n\n{verdicts(rows)}\n\n"
                f"Seconds of one run on one thread, with another run beside it. Alone: the slowest of these runs once more, with "
                f"both cores to itself, where it took more than {MINUTE}.\n\n{costs(rows)}\n")  # fmt: skip
    path = os.path.join(ROOT, "README.md")
    with open(path) as f:
        readme = f.read()
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with open(path, "w") as f:
        f.write(f"{before}{MARKS[0]}\n{summary(rows)}\n{MARKS[1]}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many minutes")
    parser.add_argument("--write", action="store_true", help="write bench/table.md, docs/results.png and README's table")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    rows = read_rows()
    done = {(row["method"], row["task"], row["seed"]) for row in rows if holds(row)}
    wanted = [(m, t, s) for s in args.seeds for t in args.tasks for m in args.methods]
    wanted = [(m, t, s) for m, t, s in wanted if (m, t, s) not in done and (m, data.TASKS[t].kind) != ("head", "lm")]
    print(f"{len(done)} runs hold, {len(wanted)} to do")
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(run, *key, deadline) for key in wanted]):
            row = future.result()
            if row is None:
                continue
            key = row["method"], row["task"], row["seed"]
            rows = [old for old in rows if (old["method"], old["task"], old["seed"]) != key] + [row]
            save(rows)  # after each run: an interruption loses nothing
            metric = data.TASKS[row["task"]].metrics[0]
            scored = f"{metric} {row[metric]:.4f}  {row['seconds']} s"
            print(f"{row['method']:12s} {row['task']:6s} seed {row['seed']}  {scored}", flush=True)
    for (method, task), row in slowest(rows).items():
        if row["seconds"] > MINUTE and "alone" not in row:
            again = run(method, task, row["seed"], deadline, threads=2)
            if again:
                row["alone"] = again["seconds"]
                save(rows)
                print(f"{method:12s} {task:6s} alone  {row['alone']} s", flush=True)
    if args.write:
        write(rows)
    print(table(rows), verdicts(rows), sep="\n\n")


if __name__ == "__main__":
    main()
