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

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from baselines import lora, pissa

param_groups, merge = lora.param_groups, lora.merge


@dataclass
class Start:
    """Where one layer starts: B (m, r), A (r, n), before the scaling is divided out. `spectrum` is for a figure."""

    B: torch.Tensor
    A: torch.Tensor
    spectrum: torch.Tensor  # the eigenvalues of C, largest first


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


def second_moments(
    model: torch.nn.Module,
    linears: Mapping[str, torch.nn.Linear],
    batches: Iterable,
    loss_fn: Callable[..., torch.Tensor],
    samples: int,
) -> dict[str, torch.Tensor]:
    """{name: C (n, n), on the CPU}: the mean over the calls of X^T X, X (tokens, n) divided by its largest entry."""
    moments = {name: [] for name in linears}  # the sum so far, the number of calls

    def see(name, X):
        X = pissa.wide(X).reshape(-1, X.shape[-1])
        if not X.isfinite().all():
            raise ValueError(f"layer {name} gets NaN or infinity as input")
        largest = X.max().abs()  # as both codes: of the largest entry, not the largest of the absolute values
        X = X / largest if largest > 0 else X
        with torch.autocast(X.device.type, enabled=False):
            C = (X.mT @ X).cpu()
        total, calls = moments[name] or (torch.zeros_like(C), 0)
        moments[name] = total + C, calls + 1  # type: ignore[assignment]

    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, [*args, *kwargs.values()][0]), with_kwargs=True
        )
        for name, linear in linears.items()
    ]
    try:
        with undisturbed(model):
            for _, batch in zip(range(samples), batches):
                loss_fn(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, seen in moments.items():
        if not seen or not seen[0].any():
            raise ValueError(f"layer {name} saw no input but zeros on the samples: leave it out, or give other samples")
    return {name: total / calls for name, (total, calls) in moments.items()}


def damped(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C with 0.01 of its mean diagonal added to it, doubled until its inverse is one in floats; and that inverse."""
    eye, damp = torch.eye(len(C), dtype=C.dtype, device=C.device), 0.01
    while True:
        D = C + damp * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(D)
        if torch.dist(D @ inverse, eye) < 0.05:
            return D, inverse
        damp *= 2


def oriented(W: torch.Tensor, C: torch.Tensor, r: int, directions: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B (m, r), A (r, n) with B A the part of W (m, n) in the first (ipm) or last (kpm) r directions of W C."""
    D, inverse = damped(C)
    U, S, Vh = torch.linalg.svd(W @ D, full_matrices=False)
    chosen = slice(r) if directions == "ipm" else slice(len(S) - r, None)
    root = S[chosen].sqrt()
    return U[:, chosen] * root, root[:, None] * (Vh @ inverse)[chosen]


# ------------------------------------------------------------------------- the verbs


def calibrate(
    model: torch.nn.Module, targets: Sequence[str], batches: Iterable, loss_fn: Callable[..., torch.Tensor], *,
    rank: int = 8, samples: int = 256, directions: Literal["ipm", "kpm"] = "ipm", progress=iter, **walk,
) -> dict[str, Start]:  # fmt: skip
    """Look at inputs, return the plan {layer name: Start} for `inject`. `batches` yields batches of one example each
    (padding would count as tokens), loss_fn(model, batch) runs the model, `progress` is tqdm for a bar over layers.
    ValueError as inject's, and where a layer sees NaN or nothing.

    Options:
        rank: rank r of the trained part; the update of W0 has 2 r
        samples: batches to look at, fewer will do
        directions: ipm = train those strongest on the samples; kpm = train the weakest and keep those
    """
    if directions not in ("ipm", "kpm"):
        raise ValueError(f"directions '{directions}' is not one of ipm, kpm")
    linears = lora.find_linears(model, targets, **walk)
    check_rank(linears, rank)
    moments, plan = second_moments(model, linears, batches, loss_fn, samples), {}
    for name in progress(list(linears)):
        linear = linears[name]
        W, C = pissa.wide(linear.weight), moments.pop(name)
        B, A = oriented(W, C.to(W), rank, directions)
        plan[name] = Start(B.cpu(), A.cpu(), torch.linalg.eigvalsh(C).clamp_min(0).flip(0))
    return plan


def check_rank(linears: Mapping[str, torch.nn.Linear], rank: int, share: int = 1) -> None:
    """ValueError if a layer has not `share` * rank directions."""
    for name, linear in linears.items():
        most = min(linear.weight.shape) // share
        if not 1 <= rank <= most:
            raise ValueError(f"rank {rank} does not fit layer {name} {tuple(linear.weight.shape)}: allowed are 1 to {most}")


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
    return follow(plan, model, targets, lambda given, s: (given.B / s**0.5, given.A / s**0.5),
                  rank=rank, alpha=alpha, dropout=dropout, **walk)  # fmt: skip


def follow(
    plan: Mapping[str, Start] | None,
    model: torch.nn.Module,
    targets: Sequence[str],
    start: Callable[[Start, float], tuple[torch.Tensor, torch.Tensor]],
    **options,
) -> list[str]:
    """Inject with start(what the plan says of a layer, its scaling) as B0 and A0."""
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
