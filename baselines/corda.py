"""CorDA: Context-Oriented Decomposition Adaptation (Yang et al. 2024, arXiv 2406.05223; code github.com/iboing/CorDA).

PiSSA whose directions are those of W0 C instead of W0's, C the second moment of the layer's input on samples:

    C = mean of X^T X, each X divided by its largest entry, damped until it can be inverted
    U S V^T = svd(W0 C),  W0 = U S (V^T C^-1)
    B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) (V^T C^-1)_r
    h = (W0 - s B0 A0) x + s B A x,  B and A trained from B0 and A0

With `ipm`, instruction-previewed, the samples are of the task and the first r directions are trained; with `kpm`,
knowledge-preserved, they are of what is to be kept, and the last r. The layer is PiSSA's, see baselines/pissa.py.
The authors take 256 samples, r = 128 and s = 1.

    plan = calibrate(model, targets, batches, loss_fn, rank=8)
    names = inject(model, targets, plan=plan)
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch

from baselines import lora, pissa, start

param_groups, merge, describe = lora.param_groups, lora.merge, start.describe


def second_moments(
    model: torch.nn.Module, linears: Mapping[str, torch.nn.Linear], batches: Iterable, loss_fn: Callable[..., torch.Tensor],
    samples: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """{name: C (n, n), on the CPU}: the mean over the calls of X^T X, X (tokens, n) divided by its largest entry."""
    moments: dict[str, tuple] = {}  # the sum so far, the number of calls

    def see(name, _, args, kwargs):
        X = pissa.wide([*args, *kwargs.values()][0]).reshape(-1, linears[name].in_features)
        largest = X.max().abs()  # as both codes: of the largest entry, not the largest of the absolute values
        X = X / largest if largest > 0 else X
        with torch.autocast(X.device.type, enabled=False):
            C = (X.mT @ X).cpu()
        if not C.isfinite().all():
            raise ValueError(f"layer {name} gets NaN or infinity as input, or what overflows when it is squared")
        total, calls = moments.get(name, (0, 0))
        moments[name] = total + C, calls + 1

    hooks = [m.register_forward_pre_hook(functools.partial(see, name), with_kwargs=True) for name, m in linears.items()]
    try:
        with start.undisturbed(model):
            for _, batch in zip(range(samples), batches):
                loss_fn(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name in linears:
        if name not in moments or not moments[name][0].any():
            raise ValueError(f"layer {name} saw no input but zeros on the samples: leave it out, or give other samples")
    return {name: total / calls for name, (total, calls) in moments.items()}


def damped(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C with 0.01 of its mean diagonal added to it, doubled until its inverse is one in floats; and that inverse."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    for doublings in range(100):
        D = C + 0.01 * 2**doublings * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(D)
        if torch.dist(D @ inverse, eye) < 0.05:
            return D, inverse
    raise ValueError("a second moment of the inputs cannot be inverted")


def oriented(W: torch.Tensor, C: torch.Tensor, r: int, directions: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B (m, r), A (r, n) with B A the part of W (m, n) in the first (ipm) or last (kpm) r directions of W C."""
    D, inverse = damped(C)
    U, S, Vh = torch.linalg.svd(W @ D, full_matrices=False)
    chosen = slice(r) if directions == "ipm" else slice(len(S) - r, None)
    root = S[chosen].sqrt()
    return U[:, chosen] * root, root[:, None] * (Vh @ inverse)[chosen]


def calibrate(
    model: torch.nn.Module, targets: Sequence[str], batches: Iterable, loss_fn: Callable[..., torch.Tensor], *,
    rank: int = 8, samples: int = 256, directions: Literal["ipm", "kpm"] = "ipm", progress=iter, **walk,
) -> dict[str, start.Start]:  # fmt: skip
    """Look at inputs, return the plan {layer name: Start} for `inject`. `batches` yields batches of one example each
    (padding would count as tokens), loss_fn(model, batch) runs the model, `progress` is tqdm for a bar over layers.
    ValueError as inject's, and where a layer sees nothing, NaN or what overflows.

    Options:
        rank: rank r of the trained part; the update of W0 has 2 r
        samples: batches to look at, fewer will do
        directions: ipm = train those strongest on the samples; kpm = train the weakest and keep those
    """
    if directions not in ("ipm", "kpm"):
        raise ValueError(f"directions '{directions}' is not one of ipm, kpm")
    linears = lora.find_linears(model, targets, **walk)
    start.check_rank(linears, rank)
    moments, plan = second_moments(model, linears, batches, loss_fn, samples), {}
    for name in progress(list(linears)):
        W, C = pissa.wide(linears[name].weight), moments.pop(name)
        B, A = oriented(W, C.to(W), rank, directions)
        plan[name] = start.Start(B.cpu(), A.cpu(), torch.linalg.eigvalsh(C).clamp_min(0).flip(0))
    return plan


def inject(
    model: torch.nn.Module, targets: Sequence[str], *, plan=None, rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, **walk
) -> list[str]:
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    `plan` is what `calibrate` returned for the same targets. Without it, as when a saved adapter is to be loaded, the
    start is LoRA's. ValueError if the plan is for other layers.

    Options:
        rank: rank r of the trained part; the update of W0 has 2 r
        alpha: the trained part is scaled by alpha / rank
        dropout: dropout on the adapter's input
    """
    return start.follow(plan, model, targets, lambda given, s: (given.B / s**0.5, given.A / s**0.5),
                        rank=rank, alpha=alpha, dropout=dropout, **walk)  # fmt: skip
