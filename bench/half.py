"""What training loses on a base in bfloat16 or float16: what the loss falls by in 200 steps, beside float32's.

    OMP_NUM_THREADS=1 python bench/half.py             # a minute and a half on one core
    OMP_NUM_THREADS=1 python bench/half.py --write     # writes bench/half.md

One layer of 768 x 768 learns an update of rank 4 from 64 rows, AdamW, no schedule. Base and rows are exact in
all three dtypes, and what a method draws does not depend on the dtype, so that the dtype is all that differs.
"Narrow" is what happens where the trained matrices have the base's dtype: small steps are rounded away.
"""

import argparse
import importlib
import os
import sys

import torch
import torch.nn as nn

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from svd import processor  # noqa: E402

SIZE, ROWS, STEPS = 768, 64, 200
CASES = {  # what stands in the table: (module, learning rate, options)
    "triadapt": ("triadapt", 1e-3, {"t0": 20, "interval": 20}),
    "tlora": ("tlora", 1e-2, {}),
    "tlora_plus, ratio 4": ("tlora_plus", 1e-4, {}),
    "tlora_plus, ratio paper": ("tlora_plus", 1e-4, {"ratio": "paper"}),
    "tlora_plus, ratio summed": ("tlora_plus", 1e-4, {"ratio": "summed"}),
    "task_tlora": ("task_tlora", 1e-3, {}),
    "lora": ("baselines.lora", 1e-3, {}),
}


def loss_of(model, rows):
    """The squared error, summed over the outputs: with the mean, float16's gradients would need a loss scale."""
    x, y = rows
    return (model(x).float() - y).square().sum(1).mean()


def problem(dtype):
    """(model, rows): the base W0 and the rows x of 8 bits each, y of W0 + dW in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)).bfloat16().to(dtype)
    x = torch.randn(ROWS, SIZE).bfloat16()
    wide = nn.functional.linear(x.float(), *(p.detach().float() for p in model[0].parameters()))
    y = wide + x.float() @ torch.randn(SIZE, 4) @ torch.randn(4, SIZE) / SIZE
    return model, (x.to(dtype), y)


def train(case, dtype, narrow=False, seed=0):
    """(mean squared error before training, what it fell by, share of the trained entries that moved)."""
    module, lr, options = CASES[case]
    method = importlib.import_module(module)
    model, rows = problem(dtype)
    torch.manual_seed(seed)  # of what the method draws
    start = loss_of(model, rows).item() / SIZE
    if hasattr(method, "calibrate"):
        singles = [(x[None], y[None]) for x, y in zip(*rows)]
        options = {"plan": method.calibrate(model, ["0"], singles, loss_of)}
    method.inject(model, ["0"], **options)
    if narrow:
        for p in model.parameters():
            p.data = p.data.to(dtype)
    optimizer = torch.optim.AdamW(method.param_groups(model, lr=lr, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        (loss + method.penalty(model) if hasattr(method, "penalty") else loss).backward()
        optimizer.step()
        if hasattr(method, "after_step"):
            method.after_step(model, optimizer, step, STEPS)
    after = dict(model.named_parameters())
    old = {name: after[name][tuple(map(slice, p.shape))] for name, p in before.items()}  # what grew is behind it
    moved = torch.cat([(old[name] != p).flatten() for name, p in before.items()])
    return start, start - loss_of(model, rows).item() / SIZE, moved.double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/half.md")
    write = parser.parse_args().write
    lines = [
        "# Training on a base in half precision",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python bench/half.py --write` on {processor()}, torch "
        f"{torch.__version__}, CPU. One layer of {SIZE} x {SIZE}, {ROWS} rows, {STEPS} steps of AdamW: the mean squared "
        "error before training, and what it fell by with a base of each dtype. Spread: largest less smallest of three "
        "draws of the adapter, float32. Narrow: the trained matrices in the base's dtype instead of float32, and the "
        "share of their entries that moved at all.",
        "",
        "| method | lr | before | float32 | spread | bf16 base | fp16 base | narrow bf16 | moved | narrow fp16 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    print("\n".join(lines))
    half = (torch.bfloat16, torch.float16)
    for case, (_, lr, _) in CASES.items():
        (start, wide, _), *others = (train(case, torch.float32, seed=seed) for seed in range(3))
        falls = [wide] + [fall for _, fall, _ in others]
        numbers = [start, wide, max(falls) - min(falls)] + [train(case, dtype)[1] for dtype in half]
        (_, bf16, moved), (_, fp16, _) = (train(case, dtype, narrow=True) for dtype in half)
        cells = [f"{number:.3e}" for number in numbers] + [f"{bf16:.3e}", f"{moved:.0%}", f"{fp16:.3e}"]
        lines.append(f"| {case} | {lr:g} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if write:
        with open(os.path.join(HERE, "half.md"), "w", encoding="utf-8", newline="\n") as f:
            f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
