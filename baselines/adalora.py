"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023, arXiv 2303.10512;
code github.com/QingruZhang/AdaLoRA).

LoRA in the form of an SVD, whose least important singular values are set to zero while training:

    h = W0 x + alpha / (r + 1e-5) * B diag(E) A x        A (r, n), E (r, 1), B (m, r), all trained      (Eq. 3)

with a penalty that keeps A's rows and B's columns orthonormal (Eq. 4). E starts at zero, so the update does.
The total rank falls from r to the target in a cubic curve (Eq. 12); which values of E stay
is decided by sensitivity, smoothed, times its uncertainty (Eqs. 7 to 11). In the loop:

    (loss + penalty(model)).backward()
    before_step(model, step, total)        # step counts from 1 (the authors' from 0, one step later)
    optimizer.step()

The masking comes before the optimizer's step, as in the authors' loop, and that step moves the masked values of E
again: they have to be among the largest at the next masking to stay. The authors' CoLA: rank 3 to 1, lr 8e-4,
t_init 800, t_final 3500 of about 6,700 steps, interval 10.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import lora

param_groups, merge = lora.param_groups, lora.merge

EPS = 1e-5  # of the scaling's divisor, as the authors' code has it
STD = 0.02  # of A and B at the start


class AdaLoRALinear(lora.LoRALinear):
    """A frozen nn.Linear with the update alpha / (r + 1e-5) B diag(E) A. Input (..., n), output (..., m)."""

    def __init__(self, plain: lora.LoRALinear, settings: dict):
        super().__init__(plain.base, plain.rank, plain.alpha, plain.dropout)
        self.settings = settings  # of `inject`, the same dict in every layer
        nn.init.normal_(self.A, std=STD)
        nn.init.normal_(self.B, std=STD)
        self.E = nn.Parameter(self.A.new_zeros(plain.rank, 1))
        self.kept = nn.Buffer(torch.ones(plain.rank, dtype=torch.bool, device=self.A.device))
        for name in "AEB":  # both averages of every entry; they are saved with the adapter, or no run could go on
            self.register_buffer(f"importance_{name}", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(getattr(self, name)))
        self.train(plain.training)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank + EPS)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, r), Q (r, n) with dW = P @ Q, the scaling and E absorbed in P."""
        return self.scaling * self.B * self.E.mT, self.A

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True  # a layer whose weight is read instead is not to be merged
        h = F.dropout(input, self.dropout, self.training)  # (..., n)
        h = F.linear(h, (self.E * self.A).to(h.dtype))  # (..., r)
        return self.base(input) + F.linear(h, (self.scaling * self.B).to(h.dtype))  # (..., m)

    def observe(self) -> None:
        """Eqs. 8 to 10: I = |w dL/dw|, its average, and the average of its distance from that. A gradient that is not finite,
        of a step that a GradScaler leaves out, counts as the average: it would spoil both for good."""
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        for name in "AEB":
            p, mean, spread = (getattr(self, prefix + name) for prefix in ("", "importance_", "uncertainty_"))
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            now = torch.where(now.isfinite(), now, mean)
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def scores(self) -> torch.Tensor:
        """Eqs. 7, 11: the score (r,) of each triplet, that of E plus the means over A's row and B's column."""
        A, E, B = (getattr(self, f"importance_{name}") * getattr(self, f"uncertainty_{name}") for name in "AEB")
        return E[:, 0] + A.mean(1) + B.mean(0)


def budget_at(step: int, total: int, start: int, target: int, t_init: int, t_final: int) -> int:
    """The total rank after `step`: `start` until t_init, `target` from total - t_final, a cubic curve between."""
    if step <= t_init:
        return start
    if step >= total - t_final:
        return target
    left = 1 - (step - t_init) / (total - t_final - t_init)
    return int(target + (start - target) * left**3)


def mean_norm(As: Iterable[torch.Tensor], Bs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of ||A A^T - I||_F and ||B^T B - I||_F over all A (r, n) and B (m, r); a 0-dim tensor."""
    As, Bs = list(As), list(Bs)
    home = As[0].device
    with torch.autocast(home.type, enabled=False):  # bfloat16 would round the small errors away next to the 1 on the diagonal
        grams = [A @ A.mT for A in As] + [B.mT @ B for B in Bs]
        return torch.stack([torch.linalg.matrix_norm(g - torch.eye(len(g)).to(g)).to(home) for g in grams]).mean()


def check(from_zero: Mapping[str, float], from_one: Mapping[str, float], shares: Mapping[str, float]) -> None:
    """ValueError that names the first option {name: value} out of its range."""
    for options, fits, allowed in [
        (from_zero, lambda value: value >= 0, "0 and up"),
        (from_one, lambda value: value >= 1, "1 and up"),
        (shares, lambda value: 0 < value < 1, "between 0 and 1"),
    ]:
        for option, value in options.items():
            if not fits(value):
                raise ValueError(f"{option} {value} is out of range: allowed are {allowed}")


# ------------------------------------------------------------------------- the verbs


def inject(
    model: nn.Module, targets: Sequence[str], *,
    rank: int = 12, rank_target: int = 8, alpha: float = 16.0, dropout: float = 0.0, t_init: int = 0,
    t_final: int = 0, mask_interval: int = 10, beta1: float = 0.85, beta2: float = 0.85, orth: float = 0.1, **walk,
) -> list[str]:  # fmt: skip
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    Options:
        rank: rank r every layer starts with
        rank_target: the rank of the average layer in the end
        alpha: the update is scaled by alpha / (r + 1e-5), r the rank of the start
        dropout: dropout on the adapter's input
        t_init: steps before the total rank begins to fall
        t_final: steps at the end, with the total rank at its target
        mask_interval: steps between two maskings while it falls
        beta1: of the importance's average
        beta2: of the uncertainty's average
        orth: coefficient of the orthogonality penalty, 0 turns it off
    """
    settings = {"target": rank_target, "t_init": t_init, "t_final": t_final, "interval": mask_interval,
                "beta1": beta1, "beta2": beta2, "orth": orth}  # fmt: skip
    if not 1 <= rank_target <= rank:
        raise ValueError(f"rank_target {rank_target} is out of range: allowed are 1 to rank {rank}")
    check({"t_init": t_init, "t_final": t_final, "orth": orth}, {"mask_interval": mask_interval},
          {"beta1": beta1, "beta2": beta2})  # fmt: skip
    names = lora.inject(model, targets, rank=rank, alpha=alpha, dropout=dropout, **walk)
    for name in names:
        lora.replace(model, name, AdaLoRALinear(model.get_submodule(name), settings))
    return names


def penalty(model: nn.Module) -> torch.Tensor:
    """The orthogonality term of the loss (Eq. 4) as the authors' code has it: orth times the mean over all A and B
    of the norm, not squared, of A A^T - I and B^T B - I."""
    layers = [m for m in model.modules() if isinstance(m, AdaLoRALinear)]
    return layers[0].settings["orth"] * mean_norm([layer.A for layer in layers], [layer.B for layer in layers])


@torch.no_grad()
def before_step(model: nn.Module, step: int, total: int) -> dict | None:
    """Look at the gradients, and mask when it is time: between backward and the optimizer's step, which is number
    `step` of `total`, counted from 1. Returns None, or {"ranks": {name: values of E kept}, "budget": total rank}."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaLoRALinear)}
    s = next(iter(layers.values())).settings
    if s["t_init"] + s["t_final"] >= total:
        raise ValueError(f"t_init {s['t_init']} and t_final {s['t_final']} leave none of the {total} steps to the masking")
    final = step >= total - s["t_final"]
    if not final:
        for layer in layers.values():
            layer.observe()
    start = sum(layer.rank for layer in layers.values())
    budget = budget_at(step, total, start, s["target"] * len(layers), s["t_init"], s["t_final"])
    if budget >= start or not (final or step % s["interval"] == 0):
        return None
    scores = {name: layer.scores() for name, layer in layers.items()}
    # Equal to the threshold is masked too, so ties (all that never had a gradient) may leave less than the budget.
    threshold = torch.cat(list(scores.values())).kthvalue(start - budget).values
    for name, layer in layers.items():
        kept = scores[name] > threshold
        layer.kept.copy_(kept)
        layer.E[~kept] = 0.0
    return {"ranks": watch(model)["ranks"], "budget": budget}


def watch(model: nn.Module) -> dict[str, dict[str, float]]:
    """{quantity: {layer name: number}}: the values of E kept at the last masking, the mean score of a triplet."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaLoRALinear)}
    return {
        "ranks": {name: int(layer.kept.sum()) for name, layer in layers.items()},
        "importance": {name: layer.scores().mean().item() for name, layer in layers.items()},
    }
