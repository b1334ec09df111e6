"""What training costs in memory, each method against PEFT's LoRA: the peak, what backward keeps, the optimizer, the adapter.

    python bench/memory.py                        # 256 wide, 4 blocks, and 768 wide, 2 blocks; some minutes
    python bench/memory.py --write                # also writes bench/memory-DEVICE.md and .jsonl
    python bench/memory.py --device cuda --bf16 --shapes 1024x12 --length 256

The same contestants as bench/speed.py, which says what they are. Peak is the most that was allocated at once during a step,
beyond what the model and its optimizer hold between steps: on the CPU every allocation that torch's profiler reports, on
CUDA the allocator's own peak. Saved is what autograd keeps for backward besides parameters and buffers, each storage once.
Optimizer is its state. Adapter is the trained numbers and, of the methods that draw theirs at random and freeze them,
those: what a file must hold, the head left out.
"""

import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import speed


def peak_bytes(contestant, *batch):
    """The highest sum of allocations less releases during a step."""
    if batch[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.step(*batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # zero_grad releases the last step's gradients, which are part of what is held between steps: hold none.
    contestant.optimizer.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contestant.step(*batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def saved_bytes(contestant, *batch):
    """Bytes that autograd keeps for backward besides the parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in [*contestant.model.parameters(), *contestant.model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        contestant.loss(*batch)
    return sum(size for size, _ in kept.values())


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def optimizer_bytes(contestant):
    states = contestant.optimizer.state.values()
    return nbytes(t for state in states for t in state.values() if torch.is_tensor(t) and t.ndim)


def adapter_bytes(contestant):
    """Trained parameters, and the buffers of layers with factors(), but for the head."""
    model = contestant.model
    frozen = [b for layer in model.modules() if hasattr(layer, "factors") for b in layer.buffers(recurse=False)]
    return nbytes(p for name, p in model.named_parameters() if p.requires_grad and "head" not in name) + nbytes(frozen)


def measure(contestant, *batch):
    """{quantity: bytes} of one contestant."""
    contestant.step(*batch)  # the optimizer's state is made by the first step
    return {"peak": peak_bytes(contestant, *batch), "saved": saved_bytes(contestant, *batch),
            "optimizer": optimizer_bytes(contestant), "adapter": adapter_bytes(contestant)}  # fmt: skip


def table(rows):
    lines = ["| | peak, MB | / PEFT LoRA | saved, MB | / PEFT LoRA | optimizer, kB | adapter, kB |",
             "|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    yard = next(row for row in rows if row["contestant"] == "PEFT LoRA")
    for row in rows:
        cells = [f"{row[x] / 1e6:.1f} | {row[x] / yard[x]:.2f}" for x in ("peak_bytes", "saved_bytes")]
        cells += [f"{row[x] / 1e3:.1f}" for x in ("optimizer_bytes", "adapter_bytes")]
        lines.append(f"| {row['contestant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def wanted(rows):
    """What was to be shown of the methods whose A is frozen, beside what the frozen backbone alone keeps and takes."""
    lines = ["| width | | saved / PEFT LoRA | at most | peak / PEFT LoRA | below | |", "|--:|---|--:|--:|--:|--:|---|"]
    for row in rows:
        yard = next(r for r in rows if r["contestant"] == "PEFT LoRA" and r["width"] == row["width"])
        saved, peak = (row[x] / yard[x] for x in ("saved_bytes", "peak_bytes"))
        if row["contestant"] in ("floor", "tlora, fast", "task_tlora, fast"):
            ours, missed = row["contestant"] != "floor", saved > 0.60 or peak >= 0.794
            limits = ("0.60", "0.794") if ours else ("", "")
            lines.append(f"| {row['width']} | {row['contestant']} | {saved:.2f} | {limits[0]} | {peak:.2f} | {limits[1]} "
                         f"| {'missed' * (ours and missed)} |")  # fmt: skip
    return "\n".join(["What was wanted (0.794: Table 7 of Task-aware TLoRA):\n", *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = speed.arguments(parser, [(256, 4), (768, 2)], rounds=1)
    parts, rows = [], []
    for width, depth in args.shapes:
        base, ids, labels = speed.problem(width, depth, args)
        measured, made = {}, speed.contestants(base)
        for name in [name for name in made if name in {"PEFT LoRA", *(args.only or made)}]:
            measured[name] = measure(made.pop(name), ids, labels, args.bf16)
        rows += [{"contestant": name, **speed.facts_of(args, width, depth),
                  **{f"{x}_bytes": size for x, size in sizes.items()}} for name, sizes in measured.items()]  # fmt: skip
        parts.append(f"Width {width}, {depth} blocks:\n\n{table(rows[-len(measured) :])}\n")
    speed.report(args, "memory", "one step each", parts + [wanted(rows)], rows)


if __name__ == "__main__":
    main()
