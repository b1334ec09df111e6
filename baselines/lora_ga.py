"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al. 2024, arXiv 2407.05000;
code github.com/Outsider565/LoRA-GA).

LoRA that starts where its first step is nearest to that of full fine-tuning. With G (m, n) the mean gradient of W0 on
samples and U S V^T its singular value decomposition (a randomised one of 4 r directions)

    A0 = scale V_(1..r)^T,  B0 = scale U_(r+1..2r)        scale = m^(1/4) / sqrt(gamma)
    h = (W0 - s B0 A0) x + s B A x,  B and A trained from B0 and A0

B takes the second r directions: their own would give one matrix what the other has. `variant="peft"` is what PEFT
makes of it: B0 keeps its singular values and A0 has no scale. The layer is PiSSA's, see baselines/pissa.py.
The authors take 64 batches of 2, gamma 16, and the model as it trains; here it is in eval mode, without dropout.

    plan = calibrate(model, targets, batches, loss_fn, rank=8)
    names = inject(model, targets, plan=plan)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch

from baselines import lora, pissa, start

param_groups, merge, describe = lora.param_groups, lora.merge, start.describe


def mean_gradients(
    model: torch.nn.Module,
    linears: Mapping[str, torch.nn.Linear],
    batches: Iterable,
    loss_fn: Callable[..., torch.Tensor],
    samples: int,
) -> dict[str, torch.Tensor]:
    """{name: G (m, n), on the CPU}; beside those sums the gradient of one layer at a time is alive."""
    sums = {name: torch.zeros_like(pissa.wide(linear.weight), device="cpu") for name, linear in linears.items()}

    def see(name, weight):
        sums[name] += weight.grad.cpu()
        weight.grad = None  # before backward makes the next layer's

    hooks, count = [], 0
    try:
        with start.undisturbed(model), torch.enable_grad():
            for name, linear in linears.items():
                weight = linear.weight.requires_grad_(True)
                weight.grad = None
                hooks.append(weight.register_post_accumulate_grad_hook(lambda w, name=name: see(name, w)))
            for count, batch in zip(range(1, samples + 1), batches):  # noqa: B007 (read below)
                loss_fn(model, batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, G in sums.items():
        if not G.isfinite().all() or not G.any():
            what = "is zero" if G.isfinite().all() else "has NaN or infinity"
            raise ValueError(f"the gradient of layer {name} on the {count} samples {what}: LoRA-GA starts from it")
    return {name: G / count for name, G in sums.items()}


def approximated(G: torch.Tensor, r: int, gamma: float, variant: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B0 (m, r), A0 (r, n) and the singular values that were found of a gradient G (m, n)."""
    torch.default_generator.manual_seed(0)  # the CPU's, where G is: the same plan from the same gradients
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    scale = len(G) ** 0.25 / gamma**0.5
    B, A = U[:, r : 2 * r] * scale, V[:, :r].mT
    return (B * S[r : 2 * r], A, S) if variant == "peft" else (B, A * scale, S)


def calibrate(
    model: torch.nn.Module, targets: Sequence[str], batches: Iterable, loss_fn: Callable[..., torch.Tensor], *,
    rank: int = 8, samples: int = 128, gamma: float = 16.0, variant: Literal["authors", "peft"] = "authors",
    progress=iter, **walk,
) -> dict[str, start.Start]:  # fmt: skip
    """Look at gradients, return the plan {layer name: Start} for `inject`. `batches` yields batches,
    loss_fn(model, batch) gives the scalar loss, `progress` is tqdm for a bar over layers. ValueError as inject's, and
    where a gradient is zero or not finite.

    Options:
        rank: rank r of the trained part, at most half of the layer's smaller side; the update of W0 has 2 r
        samples: batches to look at, fewer will do
        gamma: the start is scaled by m^(1/4) / sqrt(gamma)
        variant: authors = both matrices scaled; peft = B has its singular values and the scale, A neither
    """
    if variant not in ("authors", "peft"):
        raise ValueError(f"variant '{variant}' is not one of authors, peft")
    if not gamma > 0:
        raise ValueError(f"gamma {gamma} is not above 0")
    linears = lora.find_linears(model, targets, **walk)
    start.check_rank(linears, rank, share=2)
    gradients = mean_gradients(model, linears, batches, loss_fn, samples)
    with torch.random.fork_rng(devices=[]):
        return {name: start.Start(*approximated(gradients[name], rank, gamma, variant)) for name in progress(list(linears))}


def inject(
    model: torch.nn.Module, targets: Sequence[str], *, plan=None, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, **walk
) -> list[str]:
    """As baselines/corda.py's inject, with a plan of `calibrate` above: there the errors and what no plan means.

    Options:
        rank: rank r of the trained part, at most half of the layer's smaller side; the update of W0 has 2 r
        alpha: the trained part is scaled by alpha / rank
        dropout: dropout on the adapter's input
    """
    return start.follow(plan, model, targets, lambda given, s: (given.B, given.A),
                        rank=rank, alpha=alpha, dropout=dropout, **walk)  # fmt: skip
