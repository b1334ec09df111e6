"""What enters B, and how far each matrix moves: does a method's best rate follow from such sizes?

    python bench/sizes.py --write    # writes bench/sizes.md; about five minutes

Each method trains for 100 steps of AdamW at its default, constant, from the start that it has. Sizes are root mean squares over
all adapted layers: of what enters B (s A x; with a middle matrix before B that too) on batches that are not trained on, and of
each matrix's gradient, its update in that step and its entries.
"""

import argparse
import itertools
import math
import os
import statistics
import sys

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import sweep  # noqa: E402
from claims import B_TIMES  # noqa: E402
from trial import HELD, size  # noqa: E402

import data  # noqa: E402
from harness.methods import METHODS  # noqa: E402
from harness.run import Run, to_device  # noqa: E402
from harness.settings import parse  # noqa: E402
from train import groups_of  # noqa: E402

PAGE = os.path.join(ROOT, "bench", "sizes.md")
STEPS = (1, 10, 100)
NAMES = ["lora", "tlora", "tlora_plus", "task_tlora", "triadapt"]


def entering(layer):
    """The matrix M of M x, what enters B: s A, alpha A (TLoRA), A (TLoRA+), s (L+U) A (TriAdaptLoRA)."""
    M = layer.D @ layer.A if hasattr(layer, "D") else layer.A
    return getattr(layer, "scaling", getattr(layer, "alpha", 1.0)) * M


@torch.no_grad()
def entered(run, layers, batches):
    """The size of what enters B in these layers, in eval mode."""
    seen = []
    see = lambda layer, args: seen.append(F.linear(args[0], entering(layer)))  # noqa: E731
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    run.model.eval()
    for batch in batches:
        run.forward(batch)
    run.model.train()
    for hook in hooks:
        hook.remove()
    return size(seen)


def batches_of(run):
    """Training batches without end, each epoch in an order of its own."""
    for epoch in itertools.count():
        s = run.settings
        rows = data.batches(run.train_features, run.task, s.batch_size, run.tokenizer.pad_id, shuffle_seed=epoch)
        for batch in rows:
            yield {key: value for key, value in to_device(batch, run.device).items() if key != "index"}


def measured(method, task):
    """(what enters B at the start and at the end, {(step, matrix): (gradient, update, entries)}) of 100 steps."""
    run = Run.start(parse(["--method", method, "--task", task, "--seed", "100", "--threads", "1"]))
    run.adapt()
    run.model.to(run.device).train()
    layers = [m for m in run.model.modules() if hasattr(m, "factors")]
    matrices = {}
    for layer in layers:
        for name, p in layer.named_parameters(recurse=False):
            matrices.setdefault(name, []).append(p)
    optimizer, stream, found = torch.optim.AdamW(groups_of(run)), batches_of(run), {}
    held = list(itertools.islice(stream, HELD))
    begin = entered(run, layers, held)
    torch.manual_seed(run.settings.seed)  # of dropout
    for step, batch in enumerate(itertools.islice(stream, STEPS[-1]), 1):
        loss = run.forward(batch)
        if hasattr(run.method, "penalty"):
            loss = loss + run.method.penalty(run.model)
        optimizer.zero_grad()
        loss.backward()
        before = {name: [p.detach().clone() for p in ps] for name, ps in matrices.items()} if step in STEPS else {}
        optimizer.step()
        for name, old in before.items():
            ps = matrices[name]
            moved = size([p.detach() - b for p, b in zip(ps, old, strict=True)])
            found[step, name] = size([p.grad for p in ps]), moved, size([p.detach() for p in ps])
    return (begin, entered(run, layers, held)), found


RATES = {m: METHODS[m][2] * (B_TIMES if m == "tlora_plus" else 1) for m in NAMES}  # of B, at the defaults


def by_rule(every, when):
    """{method: (what enters B as a multiple of LoRA's, LoRA's rate by that)}, geometric means over the tasks."""
    found = {m: statistics.geometric_mean(every[m, task][0][when] for task in sweep.TASKS) for m in NAMES}
    return {m: (value / found["lora"], RATES["lora"] * found["lora"] / value) for m, value in found.items()}


def text():
    """bench/sizes.md."""
    every = {(method, task): measured(method, task) for task in sweep.TASKS for method in NAMES}
    lines = [f"| task | {' | '.join(NAMES)} |", "|---|" + "--:|" * len(NAMES)]
    for task in sweep.TASKS:
        cells = [" → ".join(f"{value:.2f}" for value in every[method, task][0]) for method in NAMES]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    sums = ["| | at the start, from LoRA's | B's rate by the rule | after the steps | by the rule | B's rate at the default |"]
    sums, start, end = [*sums, "|---|--:|--:|--:|--:|--:|"], by_rule(every, 0), by_rule(every, 1)
    for m in NAMES:
        cells = [f"{k:.2f} | {rate:.2g}" for k, rate in (start[m], end[m])]
        sums.append(f"| {m} | {' | '.join(cells)} | {RATES[m]:.3g} |")
    off = [{m: abs(math.log10(RATES[m] / rule[m][1])) for m in NAMES[1:]} for rule in (start, end)]
    by_start, by_end = (statistics.mean(far.values()) for far in off)
    by_lora = statistics.mean(abs(math.log10(RATES[m] / RATES["lora"])) for m in NAMES[1:])
    worst = max(off[1], key=off[1].get)
    matrices = ["| method | matrix | step | gradient | update | entries |", "|---|---|--:|--:|--:|--:|"]
    for m in NAMES:
        for (step, name), values in sorted(every[m, "cola"][1].items(), key=lambda item: (item[0][1], item[0][0])):
            matrices.append(f"| {m} | {name} | {step} | {' | '.join(f'{value:.2g}' for value in values)} |")
    return f"""`python bench/sizes.py --write`: root mean squares over all adapted layers, seed 100, the generated tasks.

## What enters B

s A x; for TriAdaptLoRA s (L+U) A x at the rank 1 that it starts with. At the start → after {STEPS[-1]} steps at the default rate.

{chr(10).join(lines)}

**The rule that AdamW suggests: its steps have one size, so a method whose B gets k times what LoRA's gets wants a k-th of LoRA's
rate.** Geometric means over the tasks; TLoRA+'s B trains at {B_TIMES} times `--lr`:

{chr(10).join(sums)}

In the mean of the four the rule is {by_start:.2f} decades from the rate that the sweep found with the sizes of the start,
{by_end:.2f} with those after {STEPS[-1]} steps (most for {worst}, {off[1][worst]:.2f}); LoRA's own rate is {by_lora:.2f}.
Sizes after steps come of the rate that was trained with: they explain a rate, they do not predict it. TriAdaptLoRA's s falls
from 16 to 2 as it grows from rank 1 to 8: with 2 the rule would say {8 * end["triadapt"][1]:.2g}. The rule leaves out how many
numbers enter B (its rank) and what follows it (C). What twenty steps of training predict: [docs/trial.md](../docs/trial.md).

## Matrix by matrix, on cola

{chr(10).join(matrices)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/sizes.md, else print it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    page = text()
    if not args.write:
        return print(page)
    with open(PAGE, "w", encoding="utf-8") as f:
        f.write(page)


if __name__ == "__main__":
    main()
