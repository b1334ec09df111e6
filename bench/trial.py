"""From LoRA's best rate to another method's: what twenty steps tell.

    python bench/trial.py                                   # each method and task that has no row yet, minutes in all
    python bench/trial.py --methods lora dora --tasks cola
    python bench/trial.py --tasks cola --backbone DIR --data GLUE     # on a real encoder, with real files
    python bench/trial.py --write                           # docs/trial.md, from the rows of bench/trial.jsonl alone

Twenty steps of AdamW at a constant rate, from the same start for each half decade, the task head left as it was drawn. How
far have the features moved that the head reads (for a language model: the logits), as a share of their size? The rule: a
method's rate is the half decade that moves them as far as LoRA's best rate on that task does.
"""

import argparse
import json
import math
import os
import statistics
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import speed  # noqa: E402
import sweep  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import model as modelling  # noqa: E402
from harness.methods import METHODS  # noqa: E402
from harness.run import Run, to_device  # noqa: E402
from harness.settings import parse  # noqa: E402
from train import groups_of  # noqa: E402

ROWS, PAGE = os.path.join(ROOT, "bench", "trial.jsonl"), os.path.join(ROOT, "docs", "trial.md")
STEPS, HELD = 20, 4  # batches trained on, batches looked at
GRID = range(-16, -3, 2)  # 1e-4 to 1e-1 in quarter decades, every second
ADAPTERS = [name for name in METHODS if name not in ("full", "bitfit", "head")]


def size(tensors):
    """The root mean square of all their entries."""
    return math.sqrt(sum(t.square().sum().item() for t in tensors) / sum(t.numel() for t in tensors))


@torch.no_grad()
def features(run, batches):
    """What the task head reads of each batch; for a language model the logits of the labels' places."""
    run.model.eval()
    heads, seen = modelling.head_modules(run.model), []
    if heads:
        hook = run.model.get_submodule(heads[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
    for batch in batches:
        logits = modelling.logits(run.model, batch)
        if not heads:
            seen.append(logits[batch["labels"] != data.IGNORED].float())
    if heads:
        hook.remove()
    run.model.train()
    return seen


def moved(run, lr):
    """The share by which STEPS steps at `lr` move the features of an adapted run, whose model is left as it was."""
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    rows = data.batches(run.train_features, run.task, run.settings.batch_size, run.tokenizer.pad_id, shuffle_seed=0)
    batches = [{key: value for key, value in to_device(next(rows), run.device).items() if key != "index"}
               for _ in range(STEPS + HELD)]  # fmt: skip
    run.settings.lr, run.settings.head_lr = lr, 0.0
    optimizer = torch.optim.AdamW(groups_of(run))
    torch.manual_seed(run.settings.seed)  # of dropout
    before = features(run, batches[STEPS:])
    for batch in batches[:STEPS]:
        loss = run.forward(batch)
        if hasattr(run.method, "penalty"):
            loss = loss + run.method.penalty(run.model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = features(run, batches[STEPS:])
    run.model.load_state_dict(start)
    return size([b - a for a, b in zip(before, after, strict=True)]) / size(before)


def chosen(shares, target):
    """The k of {k: share} whose share is nearest to the target, in proportion; the lowest of those that are level."""
    return min(sorted(shares), key=lambda k: abs(math.log(max(shares[k], 1e-9) / target)))


def carry_out(method, task, places):
    """The row of one method on one task; `places` are flags that name a backbone and its data."""
    run = Run.start(parse(["--method", method, "--task", task, "--seed", "100", "--threads", "1", *places]))
    run.adapt()
    run.model.to(run.device).train()
    run.speed_up()
    shares = {k: round(moved(run, sweep.rate(k)), 4) for k in GRID}
    flags = ["--lr", f"{sweep.rate(GRID[0]):g}"]  # so that no default rate is part of the fingerprint
    what = {"study": "encoder" if places else "rates", "method": method, "task": task, "flags": flags}
    what |= {"checkpoint": sweep.checkpoint_of(places[1])} if places else {}
    return {**what, "moved": shares, "fingerprint": sweep.fingerprint(what),
            "hardware": speed.hardware(run.device.type), "torch": torch.__version__}  # fmt: skip


def pairs(rows):
    """[(row, its score at each k, the best k, the rule's k)]: the rows whose task has a search with LoRA too.

    Scores are those of seed 100, with which all half decades were looked at.
    """
    today, searched = sweep.valid(sweep.read(sweep.ROWS)), {}
    for row in rows:
        tried = sweep.table(today, row["study"], []).get((row["method"], row["task"]), {})
        scores = {k: value for (k, seed), value in tried.items() if seed == 100 and k in row["moved"]}
        if len(scores) > 2:
            searched[row["study"], row["task"], row["method"]] = row, scores, max(scores, key=scores.get)
    found = []
    for (study, task, _), (row, scores, best) in searched.items():
        if (study, task, "lora") in searched:
            yard, _, k = searched[study, task, "lora"]
            found.append((row, scores, best, chosen(row["moved"], yard["moved"][k])))
    return found


def table(found):
    lines = ["| task | method | moved at 1e-4, 3.16e-4, .. 1e-1 | at its best | the rule's rate | its best rate | points lost |",
             "|---|---|---|--:|--:|--:|--:|"]  # fmt: skip
    for row, scores, best, k in found:
        shares, lost = ", ".join(f"{share:.2g}" for share in row["moved"].values()), "–"
        if row["method"] != "lora":
            lost = f"{scores[best] - scores[k]:.1f}" if k in scores else "not tried"
        lines.append(f"| {row['task']} | {row['method']} | {shares} | {row['moved'][best]:.2f} | {sweep.rate(k):g} "
                     f"| {sweep.rate(best):g} | {lost} |")  # fmt: skip
    return "\n".join(lines)


def read(checkpoint=sweep.MINILM):
    """The rows of today's code, of real encoders that of the checkpoint, their k as numbers again."""
    rows = sweep.valid(sweep.read(ROWS), checkpoint)
    return [{**row, "moved": {int(k): share for k, share in row["moved"].items()}} for row in rows]


def text():
    """docs/trial.md."""
    every = pairs(read())
    judged = [entry for entry in every if entry[0]["method"] != "lora"]
    steps = [(k - best) // 2 for *_, best, k in judged]
    same = [(best - sweep.start("lora")) // 2 for *_, best, _ in judged]
    bests_of = {}
    for row, _, best, _ in judged:
        bests_of.setdefault(row["method"], {})[row["task"]] = best
    own = []  # (best on this task, the method's best on its other tasks)
    losses = []  # points lost with the rule, with LoRA's best for all, with the method's own, where all three were tried
    for row, scores, best, k in judged:
        if others := [k for task, k in bests_of[row["method"]].items() if task != row["task"]]:
            own.append((best, statistics.median_low(others)))
            if {*(guesses := (k, sweep.start("lora"), own[-1][1]))} <= {*scores}:
                losses.append([scores[best] - scores[guess] for guess in guesses])
    own_steps = [(k - best) // 2 for best, k in own]
    by_rule, by_lora, by_own = map(statistics.mean, zip(*losses))
    lost = sorted(((scores[best] - scores[k], f"{row['method']} on {row['task']}")
                   for row, scores, best, k in judged if k in scores), reverse=True)  # fmt: skip
    points = [value for value, _ in lost]
    shares = {task: sorted(row["moved"][best] for row, _, best, _ in every if row["task"] == task) for task in sweep.TASKS}
    usual = [f"{task} {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})" for task, found in shares.items()]
    bests = [sweep.rate(best) for *_, best, _ in judged]
    edges = sum(best in (min(scores), max(scores)) for _, scores, best, _ in every)
    near = lambda found, far: sum(abs(n) <= far for n in found)  # noqa: E731
    return f"""# From LoRA's best rate to another method's

Made by `python bench/trial.py --write` from the rows of `bench/trial.jsonl` and of the sweep ([rates.md](rates.md)), seed 100.

Twenty steps of AdamW at a constant rate, from the same start for each half decade between 1e-4 and 1e-1, the task head left as
it was drawn. How far have the features moved that the head reads (`math`: the logits), as a share of their size? **The rule: a
method's rate is the half decade that moves them as far as LoRA's best rate on that task does.** It takes
{STEPS * len(GRID)} steps of each method and no score but LoRA's. It loses {"fewer" if by_rule < by_lora else "no fewer"} points
than LoRA's rate would, and {"fewer" if by_rule < by_own else "more"} than the method's own best on other tasks, if that is known.

At the best rate, which is between {min(bests):g} and {max(bests):g}, that share is larger on squad and math than on the others;
median and range: {", ".join(usual)}.

Of {len(judged)} pairs of method and task the rule gives the sweep's best half decade in {near(steps, 0)}, a neighbour in
{near(steps, 1) - near(steps, 0)}, and is farther off in {len(steps) - near(steps, 1)}.
LoRA's best half decade for all, {sweep.rate(sweep.start("lora")):g}, would be it in {near(same, 0)}, a neighbour in
{near(same, 1) - near(same, 0)}; a method's own best on its other tasks (their median), which takes a sweep of those, in
{near(own_steps, 0)} of {len(own)}, a neighbour in {near(own_steps, 1) - near(own_steps, 0)}.
At the rule's rate a run ends {statistics.median(points):.1f} points below the method's best in the median of {len(lost)}
pairs where that rate was tried; in the mean of the {len(losses)} where all three were tried, {by_rule:.1f} points with the rule,
{by_lora:.1f} with LoRA's best for all, {by_own:.1f} with the method's own best on its other tasks. The rule's worst are
{", ".join(f"{pair} ({worst:.1f})" for worst, pair in lost[:4])}.
All rest on one seed. Best rates at an end of 1e-4 to 1e-1, beyond which the rule does not look: {edges} of {len(every)}.

{table(every)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=ADAPTERS)
    parser.add_argument("--tasks", nargs="+", choices=sweep.ALL_TASKS, default=sweep.TASKS)
    parser.add_argument("--backbone", help="a Hugging Face checkpoint")
    parser.add_argument("--data", help="with it: a folder with GLUE's folders CoLA, SST-2, ...")
    parser.add_argument("--write", action="store_true", help="write docs/trial.md")
    args = parser.parse_args()
    if args.write:
        page = text()
        with open(PAGE, "w", encoding="utf-8") as f:
            f.write(page)
        return
    checkpoint = sweep.checkpoint_of(args.backbone) if args.backbone else sweep.MINILM
    for task in args.tasks:
        for method in args.methods:
            places = sweep.places(args.backbone, args.data, task) if args.backbone else []
            have = {(row["study"], row["method"], row["task"]) for row in read(checkpoint)}
            if ("encoder" if places else "rates", method, task) in have:
                continue
            row = carry_out(method, task, places)
            with open(ROWS, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{task:6s} {method:11s} {row['moved']}", flush=True)


if __name__ == "__main__":
    main()
