"""How the cost of a step grows with tokens, rank, width and layers: ours and PEFT's LoRA, time and memory, with exponents.

    python bench/cost.py            # some minutes on one core
    python bench/cost.py --write    # also writes bench/cost-DEVICE.md and .jsonl

One thing changes at a time from a middle shape. An exponent is the slope of log cost over log size, by least squares: 1 is
linear, 2 is quadratic. Below it, what scoring and growing cost TriAdaptLoRA in a run of its own. Contestants, clock and
memory as in bench/speed.py and bench/memory.py. Needs peft (requirements-optional.txt).
"""

import argparse
import copy
import math
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import memory
import speed

import triadapt

MIDDLE = {"tokens": 1024, "rank": 8, "width": 256, "layers": 4}
SIZES = {"tokens": [256, 512, 1024, 2048, 4096], "rank": [2, 8, 32, 128], "width": [128, 256, 512, 768], "layers": [2, 4, 8]}


def contestants(base, rank):
    import peft

    budget = {"triadapt": {"rank_ref": rank}}  # which may not be below the rank
    ours = {name: speed.ours(base, method, {**options, "rank": rank, **budget.get(name, {})}, fast_path=True)
            for name, (method, options) in speed.OURS.items() if name in ("lora", "task_tlora", "triadapt")}  # fmt: skip
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=speed.SIX, modules_to_save=["head"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    return ours | {"PEFT LoRA": speed.Contestant(model, [p for p in model.parameters() if p.requires_grad], fused=False)}


def measured(args, **shape):
    """A row per contestant: median seconds of a step, peak and saved bytes."""
    args.batch = shape["tokens"] // args.length
    base, ids, labels = speed.problem(shape["width"], shape["layers"], args)
    made = contestants(base, shape["rank"])
    times = speed.measure(made, ids, labels, args)
    rows = []
    for name, contestant in made.items():
        sizes = memory.measure(contestant, ids, labels, args.bf16)
        ratio = statistics.median(a / b for a, b in times[name])
        rows.append({"contestant": name, **shape, "seconds": statistics.median(t for t, _ in times[name]), "to_peft": ratio,
                     "peak_bytes": sizes["peak"], "saved_bytes": sizes["saved"]})  # fmt: skip
    return rows


def exponent(xs, ys):
    """The slope of log y over log x."""
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(xs, ys).slope


def table(rows, what):
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    columns = [f"{name}, ms" for name in names] + [f"{name} / PEFT" for name in names[:-1]]
    columns += [f"{name}, peak MB" for name in names]
    lines = [f"| {what} | " + " | ".join(columns) + " |"]
    lines.append("|" + "--:|" * (3 * len(names)))
    for size in SIZES[what]:
        mine = {row["contestant"]: row for row in rows if row[what] == size}
        cells = [f"{1e3 * mine[n]['seconds']:.1f}" for n in names] + [f"{mine[n]['to_peft']:.2f}" for n in names[:-1]]
        lines.append(f"| {size} | " + " | ".join(cells + [f"{mine[n]['peak_bytes'] / 1e6:.1f}" for n in names]) + " |")
    slopes = []
    for key in ("seconds", "peak_bytes"):
        slopes += [[f"{exponent(SIZES[what], [r[key] for r in rows if r['contestant'] == n]):.2f}" for n in names]]
    lines.append("| exponent | " + " | ".join(slopes[0] + [""] * (len(names) - 1) + slopes[1]) + " |")
    return "\n".join(lines)


def growth_share(args):
    """(share of a run's time that TriAdaptLoRA scores and grows, events) over 300 steps from rank 1 to 8, every 20 steps."""
    args.batch = MIDDLE["tokens"] // args.length
    base, ids, labels = speed.problem(MIDDLE["width"], MIDDLE["layers"], args)
    contestant = speed.ours(base, "triadapt", {"rank": 1, "rank_ref": 8, "t0": 20, "interval": 20}, fast_path=True)
    growing, start, events = 0.0, time.perf_counter(), 0
    for step in range(1, 301):
        contestant.step(ids, labels, args.bf16)
        before = time.perf_counter()
        events += triadapt.after_step(contestant.model, contestant.optimizer, step, 300) is not None
        growing += time.perf_counter() - before
    return growing / (time.perf_counter() - start), events


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = speed.arguments(parser, [], rounds=10)
    parts, rows = [], []
    for what, sizes in SIZES.items():
        mine = [row for size in sizes for row in measured(args, **MIDDLE | {what: size})]
        rows += [{"varied": what, "hardware": speed.hardware(args.device), **row} for row in mine]
        named = {key: f"{value} {key}" if key != "width" else f"width {value}" for key, value in MIDDLE.items()}
        others = ", ".join(words for key, words in named.items() if key != what)
        parts.append(f"## {what}\n\nWith {others}.\n\n{table(mine, what)}\n")
        print(parts[-1], flush=True)
    share, events = growth_share(args)
    parts.append(f"## growth\n\nScoring and growing took {100 * share:.2f} % of 300 steps with {events} events "
                 f"(width {MIDDLE['width']}, {MIDDLE['layers']} layers, rank 1 to a mean of 8).\n")  # fmt: skip
    rows.append({"varied": "growth", "share": share, "events": events})
    first = {**speed.facts_of(args, MIDDLE["width"], MIDDLE["layers"]), **rows[0]}
    speed.report(args, "cost", f"medians of {args.rounds} rounds", parts, [first, *rows[1:]])


if __name__ == "__main__":
    main()
