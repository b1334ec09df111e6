"""A start that is computed from samples: what LoRA-GA and CorDA share. No method of its own.

Both look at the model before training (`calibrate`), which returns a plan {layer name: Start}, and inject by that plan
the layer of baselines/pissa.py, whose update is zero where it starts.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from baselines import lora, pissa


@dataclass
class Start:
    """Where one layer starts: B (m, r), A (r, n), before the scaling is divided out. `spectrum` is for a figure."""

    B: torch.Tensor
    A: torch.Tensor
    spectrum: torch.Tensor  # largest first: LoRA-GA's singular values of G, CorDA's eigenvalues of C


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and nothing trained inside; modes, requires_grad and the CPU's random state come back as they were."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def check_rank(linears: Mapping[str, torch.nn.Linear], rank: int, share: int = 1) -> None:
    """ValueError if a layer has not `share` * rank directions."""
    for name, linear in linears.items():
        most = min(linear.weight.shape) // share
        if not 1 <= rank <= most:
            raise ValueError(f"rank {rank} does not fit layer {name} {tuple(linear.weight.shape)}: allowed are 1 to {most}")


def follow(
    plan: Mapping[str, Start] | None,
    model: torch.nn.Module,
    targets: Sequence[str],
    start: Callable[[Start, float], tuple[torch.Tensor, torch.Tensor]],
    **options,
) -> list[str]:
    """Inject with start(what the plan says of a layer, its scaling) as B0 and A0. ValueError if alpha is not above 0."""
    if not options["alpha"] > 0:
        raise ValueError(f"alpha {options['alpha']} is not above 0: the start is divided by its root")
    if plan is not None:
        walk = {key: value for key, value in options.items() if key not in ("rank", "alpha", "dropout")}
        shapes = {name: tuple(m.weight.shape) for name, m in lora.find_linears(model, targets, **walk).items()}
        planned = {name: (len(given.B), given.A.shape[1]) for name, given in plan.items()}
        if odd := sorted(name for name in {*shapes, *planned} if shapes.get(name) != planned.get(name)):
            raise ValueError(f"the plan is for other layers: {', '.join(odd)}")
        options["rank"] = len(next(iter(plan.values())).A)
    names = lora.inject(model, targets, **options)
    if plan is None:
        return pissa.begin(model, names, lambda name, layer: (layer.B, layer.A))
    return pissa.begin(model, names, lambda name, layer: start(plan[name], layer.scaling))


def describe(plan: Mapping[str, Start]) -> dict[str, dict]:
    """{layer name: {quantity: number or list}} for a JSON file."""
    return {name: {"rank": len(given.A), "spectrum": given.spectrum.tolist()} for name, given in plan.items()}
