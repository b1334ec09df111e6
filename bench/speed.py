"""A training step of each method against PEFT's LoRA and the frozen backbone alone, in time and memory.

    python bench/speed.py                                  # writes bench/speed-DEVICE.md
    python bench/speed.py --device cuda --width 1024 --depth 12 --batch 16 --length 256

One step is forward, backward and AdamW on the same Transformer, batch and targets (all six matrices of each
block, rank 8). The contestants take turns within one process and the numbers are ratios of medians, since
machines are noisy. The frozen backbone trains its head alone. Saved is what autograd keeps for the backward
pass, counted by hooks: the memory that grows with the batch. Needs peft (requirements-optional.txt).
"""

import argparse
import copy
import importlib
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import model as modelling  # noqa: E402

SIX = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
OURS = {
    "frozen backbone": ("baselines.head", {}),
    "lora": ("baselines.lora", {"rank": 8}),
    "tlora": ("tlora", {"rank": 8}),
    "tlora, no dropout": ("tlora", {"rank": 8, "dropout": 0.0}),
    "tlora_plus": ("tlora_plus", {"rank": 8}),
    "task_tlora": ("task_tlora", {"rank": 8}),
    "triadapt (r = 8)": ("triadapt", {"rank": 8}),
    "triadapt, no penalty": ("triadapt", {"rank": 8, "orth": 0.0}),
}


def contestants(base):
    """{name: (model, optimizer, penalty or None)}, all with the same base weights."""
    made = {}
    for name, (module, options) in OURS.items():
        model, method = copy.deepcopy(base), importlib.import_module(module)
        method.inject(model, SIX, **options)
        model.head.requires_grad_(True)
        penalty = getattr(method, "penalty", None) if options.get("orth", 1) else None
        made[name] = model, torch.optim.AdamW(method.param_groups(model, 1e-3, 0.0)), penalty
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=SIX, modules_to_save=["head"], lora_dropout=0.0)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    made["PEFT LoRA"] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3), None
    return made


def step(model, optimizer, penalty, ids, labels, autocast):
    with autocast():
        loss = F.cross_entropy(model(ids).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if penalty is not None:
        penalty(model).backward()
    optimizer.step()


def saved_bytes(model, ids, labels, autocast):
    """Bytes that autograd keeps for backward besides the parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast():
        F.cross_entropy(model(ids).float(), labels)
    return sum(size for size, _ in kept.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = modelling.Config(2048, args.width, args.depth, args.width // 32, 4 * args.width)
    base = modelling.Transformer(config, "classification", 2).to(args.device)
    ids = torch.randint(2048, (args.batch, args.length), device=args.device)
    labels = torch.randint(2, (args.batch,), device=args.device)
    autocast = lambda: torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)  # noqa: E731
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    made = contestants(base)
    times = {name: [] for name in made}
    for round in range(args.rounds + 5):  # five to warm up
        for name, parts in made.items():
            wait()
            start = time.perf_counter()
            step(*parts, ids, labels, autocast)
            wait()
            if round >= 5:
                times[name].append(time.perf_counter() - start)
    memory = {name: saved_bytes(parts[0], ids, labels, autocast) for name, parts in made.items()}
    peft, frozen = statistics.median(times["PEFT LoRA"]), statistics.median(times["frozen backbone"])
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {args.threads} thread"
    lines = [
        f"`python {' '.join(sys.argv)}`: {name}, torch {torch.__version__}, width {args.width}, {args.depth} blocks, "
        f"batch {args.batch} x {args.length}, {'bf16 autocast' if args.bf16 else 'float32'}, median of {args.rounds} rounds.", "",
        "| | step, ms | time / PEFT LoRA | time / frozen backbone | saved, MB | saved / PEFT LoRA |", "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for key, values in times.items():
        t, size = statistics.median(values), memory[key]
        lines.append(f"| {key} | {1e3 * t:.1f} | {t / peft:.2f} | {t / frozen:.2f} | {size / 1e6:.1f} | {size / memory['PEFT LoRA']:.2f} |")
    text = "\n".join(lines) + "\n"
    with open(os.path.join(ROOT, "bench", f"speed-{torch.device(args.device).type}.md"), "w") as f:
        f.write(text)
    print(text)


if __name__ == "__main__":
    main()
