"""A learning rate before any training: what twenty steps tell of it.

    python bench/trial.py                                   # each method and task that has no row yet, minutes in all
    python bench/trial.py --methods lora --tasks cola
    python bench/trial.py --tasks cola --backbone DIR --data GLUE     # on a real encoder, with real files
    python bench/trial.py --write                           # docs/trial.md, from the rows of bench/trial.jsonl alone

Twenty steps of AdamW at a constant rate, from the same start for each half decade, the task head left as it was drawn. How
far have the features moved that the head reads (for a language model: the logits), as a share of their size? The rule: the
largest half decade at which they have moved by less than half. It looks at no label but those of the twenty batches, and
at no score.
"""

import argparse
import json
import math
import os
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
STEPS, HELD, HALF = 20, 4, 0.5  # batches trained on, batches looked at, the rule's share
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
    """The share by which STEPS steps at `lr` move the features of an adapted run, which is left as it was found."""
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


def chosen(shares):
    """The rule's k of {k: share}: the largest below the first share of a half or more; the lowest k if there is none."""
    ks = sorted(shares)
    beyond = next((i for i, k in enumerate(ks) if not shares[k] < HALF), len(ks))
    return ks[max(beyond - 1, 0)]


def carry_out(method, task, places):
    """The row of one method on one task; `places` are flags that name a backbone and its data."""
    run = Run.start(parse(["--method", method, "--task", task, "--seed", "100", "--threads", "1", *places]))
    run.adapt()
    run.model.to(run.device).train()
    run.speed_up()
    shares = {k: round(moved(run, sweep.rate(k)), 4) for k in GRID}
    study = "encoder" if places else "rates"
    return {"study": study, "method": method, "task": task, "flags": [], "moved": shares,
            "fingerprint": sweep.fingerprint({"study": study, "method": method, "task": task, "flags": []}),
            "hardware": speed.hardware(run.device.type), "torch": torch.__version__}  # fmt: skip


def pairs(rows):
    """[(row, {k: mean score}, best k)] of the rows whose rate was searched for as well, in the sweep's rows of today's code."""
    found, scored = sweep.valid(sweep.read(sweep.ROWS)), []
    for row in rows:
        tried = sweep.table(found, row["study"], [] if row["study"] == "rates" else None).get((row["method"], row["task"]), {})
        seeds = {k: [value for (other, seed), value in tried.items() if (other, seed) == (k, 100)] for k, _ in tried}
        scores = {k: value for k, [value] in ((k, v) for k, v in seeds.items() if v)}
        if len(scores) > 2:
            scored.append((row, scores, max(scores, key=scores.get)))
    return scored


def table(rows):
    lines = ["| method | task | moved by, at 1e-4, 3.16e-4, .. 1e-1 | the rule's rate | the best of the sweep | points lost |",
             "|---|---|---|--:|--:|--:|"]  # fmt: skip
    for row, scores, best in pairs(rows):
        k, shares = chosen(row["moved"]), ", ".join(f"{share:.2g}" for share in row["moved"].values())
        lost = f"{scores[best] - scores[k]:.1f}" if k in scores else "not tried"
        lines.append(f"| {row['method']} | {row['task']} | {shares} | {sweep.rate(k):g} | {sweep.rate(best):g} | {lost} |")
    return "\n".join(lines)


def read():
    """The rows, their k as numbers again."""
    return [{**row, "moved": {int(k): share for k, share in row["moved"].items()}} for row in sweep.read(ROWS)]


def text():
    """docs/trial.md."""
    rows = read()
    judged = pairs(rows)
    steps = [(chosen(row["moved"]) - best) // 2 for row, _, best in judged]
    lost = [scores[best] - scores[chosen(row["moved"])] for row, scores, best in judged if chosen(row["moved"]) in scores]
    bests = sorted(best for *_, best in judged)
    counts = ", ".join(f"{steps.count(n)} {words}" for n, words in [
        (0, "the same half decade"), (-1, "one lower"), (1, "one higher")] if n in steps)  # fmt: skip
    far = sum(abs(n) > 1 for n in steps)
    return f"""# A learning rate from twenty steps

Made by `python bench/trial.py --write` from the rows of `bench/trial.jsonl` and of the sweep ([rates.md](rates.md)).

Twenty steps of AdamW at a constant rate, from the same start for each half decade between 1e-4 and 1e-1, the task head left as
it was drawn. How far have the features moved that the head reads (`math`: the logits), as a share of their size? **The rule: the
largest half decade at which they have moved by less than half.** It takes {STEPS * len(GRID)} steps and no development score.

Against the sweep's best half decade (seed 100), which lies between {sweep.rate(bests[0]):g} and {sweep.rate(bests[-1]):g}: of
{len(judged)} pairs of method and task {counts}, {far} farther off. At the rule's rate a run ends
{sum(lost) / len(lost):.1f} points below the best of the sweep in the mean, {max(lost):.1f} at most ({len(lost)} pairs where
that rate was tried).

{table(rows)}
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
        with open(PAGE, "w", encoding="utf-8") as f:
            f.write(text())
        return
    for task in args.tasks:
        for method in args.methods:
            places = sweep.places(args.backbone, args.data, task) if args.backbone else []
            have = {(row["study"], row["method"], row["task"]) for row in sweep.valid(read())}
            if ("encoder" if places else "rates", method, task) in have:
                continue
            row = carry_out(method, task, places)
            with open(ROWS, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{task:6s} {method:11s} {sweep.rate(chosen(row['moved'])):g}  {row['moved']}", flush=True)


if __name__ == "__main__":
    main()
