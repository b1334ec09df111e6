"""Every method on every generated task, over seeds: the table of all ten tasks, and what they were made to show.

    python bench/sweep.py compare --tasks all --seeds 0 1 2          # the runs: hours on two cores, go on another day
    python bench/sweep.py compare --methods lora --tasks all --seeds 0 1 2 --flags --rank 1
    python bench/table.py                                            # the table, from the rows kept
    python bench/table.py --write                                    # bench/table.md and its pictures

Each run is `python train.py --method M --task T --seed S` with the defaults of that method and task. Of the rows in
bench/sweep.jsonl the last of a method, task and seed counts; the table says how many of its runs are of earlier code or
defaults. A method stands in it once all its runs are there.
"""

import argparse
import itertools
import json
import os
import statistics
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import sweep  # noqa: E402

import data  # noqa: E402
from harness.methods import METHODS as ALL  # noqa: E402

TASKS = sweep.ALL_TASKS
METHODS = {name: (name, []) for name in ALL}
METHODS["lora-r1"] = ("lora", ["--rank", "1"])  # is rank 8 of use?
SEEDS = [0, 1, 2]


def read_rows():
    """The last row of each run, with the name that its method has in the table, of methods with all their runs."""
    names = {(method, *flags): name for name, (method, flags) in METHODS.items()}
    found = {}
    for row in sweep.read(sweep.ROWS):
        name = names.get((row["method"], *row["flags"]))
        if row["study"] == "compare" and row["seed"] in SEEDS and name:
            found[name, row["task"], row["seed"]] = {**row, "name": name}
    runs = {name: sum(key[0] == name for key in found) for name in METHODS}
    return [row for row in found.values() if runs[row["name"]] == len(SEEDS) * len(tasks_of(row["name"]))]


def tasks_of(name):
    return [task for task in TASKS if (name, data.TASKS[task].kind) != ("head", "lm")]


def caption(rows):
    """A sentence about rows of earlier code, empty if there are none."""
    old = len(rows) - len(sweep.valid(rows))
    which = "All" if old == len(rows) else f"{old} of these"
    return f"{which} {len(rows)} runs are of earlier code or defaults." if old else ""


def scores(rows, method, task, metric=None):
    """The runs' metric, in points of 100."""
    metric = metric or data.TASKS[task].metrics[0]
    mine = [row for row in rows if (row["name"], row["task"]) == (method, task)]
    return [100 * row["dev"][metric] if row["dev"] else 0.0 for row in mine]  # 0: a run that ended in NaN


def cell(values):
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f"±{statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(rows):
    """The markdown table: mean and standard deviation of each task's first metric, in points of 100."""
    methods = [method for method in METHODS if any(row["name"] == method for row in rows)]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    heads = [f"{task} ({data.TASKS[task].metrics[0]})" for task in tasks]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(tasks)]
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(cell(scores(rows, method, task)) for task in tasks) + " |")
    return "\n".join(lines)


def trained(rows):
    """The mean over runs, for growth differs from seed to seed; one that ended in NaN has none."""
    return round(statistics.mean(row["trained"] for row in rows if row["trained"]))


def totals(rows):
    """{method: (the mean of the nine tasks to understand, of each seed; the numbers trained on cola)}"""
    understand, found = [task for task in TASKS if data.TASKS[task].kind != "lm"], {}
    for method in (method for method in METHODS if any(row["name"] == method for row in rows)):
        nine = [statistics.mean(seed) for seed in zip(*(scores(rows, method, task) for task in understand), strict=True)]
        found[method] = nine, trained(row for row in rows if (row["name"], row["task"]) == (method, "cola"))
    return found


def costs(rows):
    """Trained numbers, other metrics and seconds of each task."""
    lines = ["| task | method | trained | seconds | other metrics |", "|---|---|--:|--:|---|"]
    for task in TASKS:
        for method in METHODS:
            mine = [row for row in rows if (row["name"], row["task"]) == (method, task)]
            if mine:
                others = [f"{metric} {cell(scores(rows, method, task, metric))}" for metric in data.TASKS[task].metrics[1:]]
                seconds = statistics.mean(row["seconds"] for row in mine)
                lines.append(f"| {task} | {method} | {trained(mine):,} | {seconds:.0f} | {', '.join(others)} |")
    return "\n".join(lines)


def verdicts(rows):
    """What the tasks and bases were made to show, each with the tasks that miss it or were not run."""

    def judge(text, methods, holds, wanted):
        missed = []
        for task in TASKS:
            found = [scores(rows, name, task) for name in methods]
            if min(map(len, found)) < 3:
                missed.append(f"{task} (not run)")
            elif not holds(*found):
                missed.append(task)
        held = len(TASKS) - len(missed)
        return f"- {text}: {held} of {len(TASKS)}, wanted {wanted}" + (f" (not: {', '.join(missed)})" if missed else "")

    mean, sd = statistics.mean, statistics.stdev
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
    ])  # fmt: skip


def picture(rows):
    """docs/results.png: of each task how far the methods are from LoRA, with the standard deviations of both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = [method for method in METHODS if method != "lora" and any(row["name"] == method for row in rows)]
    figure, panels = plt.subplots(2, 5, figsize=(13, 2 + 0.36 * len(methods)), sharey=True)
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
    title = f"Points from LoRA of rank 8, mean and standard deviation of {len(SEEDS)} seeds"
    figure.suptitle(f"{title} (grey: LoRA's own standard deviation; an arrow: more than 20 points behind)", fontsize=11)
    figure.tight_layout()
    figure.savefig(os.path.join(ROOT, "docs", "results.png"), dpi=90)
    plt.close(figure)


def step_times():
    """{method: a step's time over PEFT's LoRA's} at width 128, from bench/speed-cpu.jsonl, as train.py runs it."""
    with open(os.path.join(ROOT, "bench", "speed-cpu.jsonl"), encoding="utf-8") as f:
        times = {row["contestant"]: row["to_peft"] for row in map(json.loads, f) if row["width"] == 128}
    times["head"] = times["floor"]
    return {name: times.get(f"{name}, fast", times.get(name)) for name in METHODS}


def front(points):
    """The names of those that no other has beaten at the same cost or less: {name: (cost, score)}."""
    return [a for a, (cost, score) in points.items() if not any(c <= cost and s > score for c, s in points.values())]


def colour(name, best):
    return "#0072B2" if name in best else "#70757e"


def name_points(ax, points, spreads, colour):
    """Write each name beside its point, where no other name, point or error bar is if there is such a place."""
    taken = []
    for name, (x, y) in points.items():
        bar = [ax.transData.transform((x, y + sign * spreads[name])) for sign in (-1, 1)]
        taken += [(bar[0][0] - 1, bar[0][1], bar[1][0] + 1, bar[1][1])]
        x, y = ax.transData.transform((x, y))
        taken += [(x - 4, y - 4, x + 4, y + 4)]
    for name, point in points.items():
        x, y = ax.transData.transform(point)
        if not ax.bbox.contains(x, y):
            continue
        wide, high, places = 6.6 * len(name), 13, []
        for dx, dy in itertools.product((7, -7, 40, -40), (3, -3, 14, -14, 26, -26, 40, -40)):
            left, low = x + dx - wide * (dx < 0), y + dy - high * (dy < 0)
            box = left, low, left + wide, low + high
            clash = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            inside = ax.bbox.contains(*box[:2]) and ax.bbox.contains(*box[2:])
            places.append((not inside, clash, len(places), box))
        *_, box = min(places)
        taken.append(box)
        line = {"arrowstyle": "-", "color": colour(name), "linewidth": 0.5}  # from the point to its name
        ax.annotate(name, point, box[:2], textcoords="figure pixels", fontsize=9, color=colour(name), arrowprops=line)


def pareto(rows):
    """docs/pareto.png: the mean of the nine tasks against trained numbers and against the time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, times = totals(rows), step_times()
    spreads = {name: statistics.stdev(nine) for name, (nine, _) in found.items()}
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, dpi=90)  # as it is saved: names are placed by pixels
    against = {"trained numbers on cola": {name: count for name, (_, count) in found.items()},
             "time of a training step, PEFT's LoRA = 1 (width 128, one CPU thread)": times}  # fmt: skip
    shown = []
    for ax, (what, cost) in zip(axes, against.items()):
        points = {name: (cost[name], statistics.mean(found[name][0])) for name in found if cost[name] and name != "head"}
        best = front(points)
        for name, (x, y) in points.items():
            ax.errorbar(x, y, spreads[name], fmt="o", color=colour(name, best), markersize=5)
        ax.set_xlabel(what)
        ax.set_xscale("log" if what.startswith("trained") else "linear")
        ax.grid(alpha=0.3)
        ax.margins(0.15)
        shown.append((ax, points, best))
    axes[0].set_ylabel("mean of nine generated tasks, points")
    bars = [(statistics.mean(nine), spreads[name]) for name, (nine, _) in found.items() if name != "head"]
    axes[0].set_ylim(min(y - d for y, d in bars) - 0.5, max(y + d for y, d in bars) + 0.5)
    figure.suptitle("What a score costs: in blue those that no other beats at the same cost or less (the head alone is below)")
    figure.tight_layout()
    for ax, points, best in shown:
        name_points(ax, points, spreads, lambda name, best=best: colour(name, best))
    figure.savefig(os.path.join(ROOT, "docs", "pareto.png"), dpi=90)
    plt.close(figure)


def write(rows):
    picture(rows)
    pareto(rows)
    with open(os.path.join(ROOT, "bench", "table.md"), "w") as f:
        f.write(f"`python bench/table.py --write`, seeds {' '.join(map(str, SEEDS))}: mean ± standard deviation of the "
                f"development metric after the last epoch, in points of 100. {caption(rows)}\n\n{table(rows)}\n\n"
                "![what a score costs](../docs/pareto.png)\n\n"
                f"What the tasks and bases were made to show (targets for them, not for a method):\n\n{verdicts(rows)}\n\n"
                "Seconds of one run on one thread, with one to three others beside it: no comparison of methods, which is "
                f"[speed-cpu.md](speed-cpu.md).\n\n{costs(rows)}\n")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/table.md and its pictures in docs")
    args = parser.parse_args()
    rows = read_rows()
    if args.write:
        write(rows)
    print(table(rows), verdicts(rows), caption(rows), sep="\n\n")


if __name__ == "__main__":
    main()
