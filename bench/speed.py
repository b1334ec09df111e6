"""A training step of each method against PEFT's LoRA and against the least that any adapter could take.

    python bench/speed.py                                  # 128, 256 and 768 wide; three quarters of an hour on one core
    python bench/speed.py --write                          # also writes bench/speed-DEVICE.md and .jsonl
    python bench/speed.py --write --shapes 256x4           # this shape anew; what is kept of others stays
    python bench/speed.py --device cuda --bf16 --shapes 1024x12 --length 256 --compile

One step is forward, backward and AdamW on the same Transformer, batch and targets: all six matrices of each block, rank 8
(TriAdaptLoRA at its full rank); 768x2 are two blocks of RoBERTa-base's shape. The contestants take turns within one process,
PEFT's LoRA before each of them, and the numbers are ratios to that neighbour: machines are noisy. On one CPU thread the clock is
that thread's own, which other programs do not stop.

The floor is the frozen backbone with its head alone trained, whose adapted layers ask for the gradient of their output as
an adapter on them would: it does all the work of W0, forward and backward, and none of an adapter. A row with "fast" has
gone through fast.py. Ours step with AdamW(fused=True); PEFT's with AdamW's default, as its examples do, and once fused.
PEFT's AdaLoRA does its update_and_allocate, but no orthogonality, which it adds only to models that return a loss.
Needs peft (requirements-optional.txt).
"""

import argparse
import copy
import importlib
import json
import os
import platform
import shlex
import statistics
import sys
import time

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import fast  # noqa: E402
import model as modelling  # noqa: E402

SIX = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
OURS = {
    "lora": ("baselines.lora", {"rank": 8}),
    "tlora": ("tlora", {"rank": 8}),
    "tlora, no dropout": ("tlora", {"rank": 8, "dropout": 0.0}),
    "tlora_plus": ("tlora_plus", {"rank": 8}),
    "task_tlora": ("task_tlora", {"rank": 8}),
    "triadapt": ("triadapt", {"rank": 8}),
    "triadapt, no penalty": ("triadapt", {"rank": 8, "orth": 0.0}),
}
# What the papers compare with, as train.py runs them: through fast.py where they have factors().
NEVER = 10**6  # no masking and no growth while time is taken
BASELINES = {
    **{name: {"rank": 8} for name in ("lora_plus", "dora", "pissa", "olora", "lora_ga", "corda", "lora_xs")},
    "adalora": {"t_init": NEVER, "t_final": NEVER},
    "increlora": {"rank": 8, "t0": NEVER},
    **{name: {} for name in ("houlsby", "pfeiffer", "bitfit", "full")},
}


class Contestant:
    """A model, its optimizer, and what its method adds to the loss (`penalty`), does before the optimizer and after."""

    def __init__(self, model, groups, fused, penalty=None, before=None, after=None):
        self.model, self.penalty, self.before, self.after, self.steps = model, penalty, before, after, 0
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0, fused=fused or None)

    def loss(self, ids, labels, bf16):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(self.model(ids).float(), labels)
        return loss + self.penalty(self.model) if self.penalty else loss

    def step(self, ids, labels, bf16):
        loss = self.loss(ids, labels, bf16)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.steps += 1
        if self.before:
            self.before(self.steps)
        self.optimizer.step()
        if self.after:
            self.after(self.steps)


def floor(base):
    model = copy.deepcopy(base).requires_grad_(False)
    model.head.requires_grad_(True)
    for name, layer in model.named_modules():
        if name.endswith(tuple(SIX)):
            layer.register_forward_hook(lambda layer, args, y: y if y.requires_grad else y.requires_grad_())
    return Contestant(model, model.head.parameters(), fused=True)


def ours(base, method, options, fast_path):
    model, method = copy.deepcopy(base), importlib.import_module(method)
    method.inject(model, SIX, **options)
    model.head.requires_grad_(True)
    if fast_path:
        fast.speed_up(model)
    penalty = getattr(method, "penalty", None) if options.get("orth", 1) else None
    made = Contestant(model, method.param_groups(model, 1e-3, 0.0), True, penalty)
    if hasattr(method, "before_step"):
        made.before = lambda step: method.before_step(model, step, 10 * NEVER)
    if hasattr(method, "after_step"):
        made.after = lambda step: method.after_step(model, made.optimizer, step, 10 * NEVER)
    return made


def pefts(base, kind, fused=False):
    import peft

    common = {"target_modules": SIX, "modules_to_save": ["head"], "lora_alpha": 16, "lora_dropout": 0.0}
    if kind == "AdaLoRA":
        config = peft.AdaLoraConfig(init_r=12, target_r=8, tinit=NEVER, tfinal=NEVER, total_step=10 * NEVER, **common)
    else:
        config = peft.LoraConfig(r=8, use_dora=kind == "DoRA", **common)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    after = model.base_model.update_and_allocate if kind == "AdaLoRA" else None
    return Contestant(model, [p for p in model.parameters() if p.requires_grad], fused, after=after)


def contestants(base):
    """{name: Contestant}, all with the same base weights."""
    made = {"floor": floor(base)}
    for name, (method, options) in OURS.items():
        made[name] = ours(base, method, options, fast_path=False)
        made[name + ", fast"] = ours(base, method, options, fast_path=True)
    for name, options in BASELINES.items():
        made[name] = ours(base, f"baselines.{name}", options, fast_path=True)
    made["PEFT LoRA"], made["PEFT LoRA, fused AdamW"] = pefts(base, "LoRA"), pefts(base, "LoRA", fused=True)
    return made | {f"PEFT {kind}": pefts(base, kind) for kind in ("DoRA", "AdaLoRA")}


def shape(text):
    """256x4: width and blocks."""
    width, depth = map(int, text.split("x"))
    return width, depth


def problem(width, depth, args):
    """The base model, ids (batch, length) and labels (batch,)."""
    torch.manual_seed(0)
    config = modelling.Config(2048, width, depth, width // 64, 4 * width)  # heads of 64, as in BERT and RoBERTa
    base = modelling.Transformer(config, "classification", 2).to(args.device)
    ids = torch.randint(2048, (args.batch, args.length), device=args.device)
    return base, ids, torch.randint(2, (args.batch,), device=args.device)


def hardware(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(": ")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def measure(made, ids, labels, args):
    """{name: [(seconds, those of PEFT's LoRA just before) of each round]}; five rounds to warm up are left out."""
    cuda = torch.device(args.device).type == "cuda"
    clock = time.thread_time if not cuda and args.threads == 1 else time.perf_counter
    times = {name: [] for name in made}

    def seconds(contestant):
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        contestant.step(ids, labels, args.bf16)
        if cuda:
            torch.cuda.synchronize()
        return clock() - start

    for round in range(args.rounds + 5):
        for name, contestant in made.items():
            before = seconds(made["PEFT LoRA"])
            pair = (before, before) if name == "PEFT LoRA" else (seconds(contestant), before)
            if round >= 5:
                times[name].append(pair)
    return times


def rows_of(times, facts):
    """A dict per contestant: median seconds, and ratios to PEFT's LoRA (with quartiles) and to the floor."""
    rows = []
    floor = statistics.median(t / yard for t, yard in times["floor"])
    for name, pairs in times.items():
        low, middle, high = statistics.quantiles([t / yard for t, yard in pairs], n=4, method="inclusive")
        rows.append({"contestant": name, **facts, "seconds": statistics.median(t for t, _ in pairs), "to_peft": middle,
                     "to_peft_quartiles": [low, high], "to_floor": middle / floor})  # fmt: skip
    return rows


def table(rows):
    lines = ["| | step, ms | time / PEFT LoRA | its quartiles | time / floor |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        low, high = row["to_peft_quartiles"]
        lines.append(f"| {row['contestant']} | {1e3 * row['seconds']:.1f} | {row['to_peft']:.2f} | {low:.2f}–{high:.2f} "
                     f"| {row['to_floor']:.2f} |")  # fmt: skip
    return "\n".join(lines)


README = {"frozen backbone": "floor", "LoRA": "lora, fast", "TLoRA+": "tlora_plus, fast", "Task-aware TLoRA": "task_tlora, fast",
          "TriAdaptLoRA": "triadapt, fast", "TLoRA": "tlora, fast", "without its dropout": "tlora, no dropout, fast"}  # fmt: skip


def readme(rows):
    """The table of README.md: ratios to PEFT's LoRA by width."""
    lines = ["| width | " + " | ".join(README) + " |", "|" + "--:|" * (len(README) + 1)]
    for width in dict.fromkeys(row["width"] for row in rows):
        ratios = {row["contestant"]: row["to_peft"] for row in rows if row["width"] == width}
        lines.append(f"| {width} | " + " | ".join(f"{ratios[name]:.2f}" for name in README.values()) + " |")
    return "\n".join(lines)


FROZEN_A = ("tlora", "task_tlora")
TRIED = """Where that is missed: TLoRA's dropout of the update cannot be folded into W0, so that each layer has two more thin
products a step and two passes over its output; its mask is one bit an entry, drawn 64 at a time. TriAdaptLoRA builds L + U and P
from small matrices in each layer and adds its penalty, which is batched over layers of one shape: many small operations, little
arithmetic."""


def wanted(rows):
    """What this bench was to show of our methods, defaults included, and where it does not."""
    lines = ["| width | | time / PEFT LoRA | at most | time / floor | at most | |", "|--:|---|--:|--:|--:|--:|---|"]
    for row in rows:
        method, _, path = row["contestant"].partition(", ")
        if method in ("lora", "tlora", "tlora_plus", "task_tlora", "triadapt") and path == "fast":
            most = {True: (0.80, 0.88), False: (0.90, 0.93)}[method in FROZEN_A][row["width"] >= 768]
            missed = row["to_peft"] > most or row["to_floor"] > 1.25
            lines.append(f"| {row['width']} | {method} | {row['to_peft']:.2f} | {most:.2f} | {row['to_floor']:.2f} | 1.25 "
                         f"| {'missed' if missed else ''} |")  # fmt: skip
    return "\n".join(["What was wanted:\n", *lines, f"\n{TRIED}"])


def arguments(parser, shapes, rounds):
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=shape, nargs="+", default=shapes, help="width x blocks, as 256x4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model, PEFT's too")
    parser.add_argument("--only", nargs="+", help="these contestants (the floor and PEFT LoRA always run)")
    parser.add_argument("--write", action="store_true", help="write the files beside this one too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def facts_of(args, width, depth):
    return {"hardware": hardware(args.device), "torch": torch.__version__, "width": width, "blocks": depth,
            "batch": args.batch, "length": args.length, "dtype": "bf16 autocast" if args.bf16 else "float32",
            "compiled": args.compile}  # fmt: skip


def place(args, name):
    """Where a bench keeps what it measures, without the ending."""
    kind = "-".join([name, torch.device(args.device).type] + ["bf16"] * args.bf16 + ["compiled"] * args.compile)
    return os.path.join(ROOT, "bench", kind)


def with_other_shapes(args, rows):
    """`rows`, and those kept of shapes that were not measured now, if card, torch and problem are the same; by shape."""
    same = ("hardware", "torch", "batch", "length", "dtype")
    shapes, kept = {(row["width"], row["blocks"]) for row in rows}, []
    if args.write and os.path.exists(path := place(args, "speed") + ".jsonl"):
        with open(path, encoding="utf-8") as f:
            kept = [row for row in map(json.loads, f) if (row["width"], row["blocks"]) not in shapes]
    kept = [row for row in kept if all(row[key] == rows[0][key] for key in same)]
    return sorted([*kept, *rows], key=lambda row: (row["width"], row["blocks"]))


def report(args, name, how, parts, rows):
    """Print, and with --write keep, what was measured: markdown, and a line of JSON per row."""
    where, first = place(args, name), rows[0]
    head = (f"`python {shlex.join(sys.argv)}`: {first['hardware']}, torch {first['torch']}, batch {args.batch} x {args.length}, "
            f"{first['dtype']}{', compiled' * args.compile}, {how}.\n")  # fmt: skip
    text = "\n".join([head, *parts]) + "\n"
    print(text)
    if args.write:
        with open(where + ".md", "w", encoding="utf-8") as f:
            f.write(text)
        with open(where + ".jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = arguments(parser, [(128, 4), (256, 4), (768, 2)], rounds=30)
    rows = []
    for width, depth in args.shapes:
        base, ids, labels = problem(width, depth, args)
        made = contestants(base)
        made = {name: c for name, c in made.items() if name in {"floor", "PEFT LoRA", *(args.only or made)}}
        for contestant in made.values() if args.compile else ():
            contestant.model.compile()
        times = measure(made, ids, labels, args)
        rows += rows_of(times, {**facts_of(args, width, depth), "rounds": args.rounds})
        print(f"Width {width}, {depth} blocks, as measured:\n\n{table(rows[-len(times) :])}\n", flush=True)
    rows = with_other_shapes(args, rows)
    parts = []
    for width, depth in dict.fromkeys((row["width"], row["blocks"]) for row in rows):
        mine = [row for row in rows if (row["width"], row["blocks"]) == (width, depth)]
        parts.append(f"Width {width}, {depth} blocks:\n\n{table(mine)}\n")
    report(args, "speed", f"medians of {args.rounds} rounds", parts + [wanted(rows)] * (args.device == "cpu"), rows)


if __name__ == "__main__":
    main()
