"""IncreLoRA: Incremental Parameter Allocation for Parameter-Efficient Fine-tuning (Zhang et al. 2023, arXiv 2308.12043;
code github.com/FeiyuZhang98/IncreLoRA).

AdaLoRA's form, growing instead of shrinking. Every layer starts with rank r = 1,

    h = W0 x + dW x,   dW = alpha / (r + 1e-5) * B diag(E) A        A (k, n), E (k, 1), B (m, k)

and E = 0, so dW = 0. A, E and B are lists to which rows are added. Behind the r rows in use stand a few in reserve,
whose E is frozen at 1e-5: so little that they hardly count, and enough for their A and B to learn before they do.

  - score of a layer: sum of |dW * dL/ddW| over its entries, divided by sqrt(m n), smoothed, times its uncertainty;
  - when step > t0 and step is a multiple of the interval, the `top` layers with the highest scores take their reserve
    into use, E is trained from then on, and get a new one; r grows by `delta`;
  - when the total rank has reached its target, growth ends and the reserve's E becomes zero.

    (loss + penalty(model)).backward()
    before_step(model, step, total)               # step counts from 1; sees the gradients
    optimizer.step()
    after_step(model, optimizer, step, total)     # the first makes the reserve, later ones grow

Differences from the authors' code: of layers with equal scores the first grow, not all; none grows past min(m, n); none
at the last step, for what grows there would never be trained. Their CoLA with rank 8: alpha 32, lr 1e-3, t0 and interval
100, top 3, delta 4 (half of the target rank).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from baselines import adalora, lora

param_groups, merge = lora.param_groups, lora.merge

RESERVE = 1e-5  # E of a row in reserve


class IncreLoRALinear(lora.LoRALinear):
    """A frozen nn.Linear with the update alpha / (r + 1e-5) B diag(E) A in growing lists. Input (..., n), output (..., m)."""

    def __init__(self, plain: lora.LoRALinear, settings: dict):
        super().__init__(plain.base, plain.rank, plain.alpha, plain.dropout)
        self.settings = settings  # of `inject`, the same dict in every layer
        self.ranknum = nn.Buffer(torch.tensor(plain.rank, device=self.A.device))
        self.smoothed = nn.Buffer(torch.zeros(2, device=self.A.device))  # the score's average and its uncertainty
        self.seen = 0.0  # the score of this step
        self.count = 0  # of entries in each list: their parameters are A0, A1, .. E0, E1, .. B0, B1, ..
        del self.A, self.B
        self.append(plain.rank, plain.A, 0.0, trained=True)
        self.train(plain.training)

    def append(self, rows: int, like: torch.Tensor, value: float, trained: bool) -> None:
        """A and B drawn and E set for `rows` more rows, in the type and on the device of `like`."""
        m, n, new = self.out_features, self.in_features, {"dtype": like.dtype, "device": like.device}
        self.register_parameter(f"A{self.count}", nn.Parameter(adalora.STD * torch.randn(rows, n, **new)))
        self.register_parameter(f"B{self.count}", nn.Parameter(adalora.STD * torch.randn(m, rows, **new)))
        E = nn.Parameter(torch.full((rows, 1), value, **new), requires_grad=trained)
        self.register_parameter(f"E{self.count}", E)
        self.count += 1

    def entries(self, letter: str) -> list[torch.Tensor]:
        """The list of A, E or B."""
        return [getattr(self, f"{letter}{i}") for i in range(self.count)]

    @property
    def rank(self) -> int:
        return int(self.ranknum)  # those in use

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank + adalora.EPS)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, k), Q (k, n) with dW = P @ Q, the scaling and E absorbed in P; k counts the reserve too."""
        A, E, B = torch.cat(self.entries("A")), torch.cat(self.entries("E")), torch.cat(self.entries("B"), 1)
        return self.scaling * B * E.mT, A

    reads_dW = True  # in its forward, for the score: fast.py leaves such a layer as it is

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True  # a layer whose weight is read instead is not to be merged
        P, Q = self.factors()
        dW = P @ Q  # (m, n), whole, for the gradient that the score needs
        if dW.requires_grad:
            value = dW.detach()  # a hook that held dW itself would keep it, and its graph, for ever
            dW.register_hook(lambda gradient: self.see(value, gradient))
        x = F.dropout(input, self.dropout, self.training)
        return self.base(input) + F.linear(x, dW.to(x.dtype))  # (..., m)

    def see(self, dW: torch.Tensor, gradient: torch.Tensor) -> None:
        """Score a backward pass. Several of one step are added; the authors keep the last. Several processes score their sum."""
        if dist.is_available() and dist.is_initialized():
            gradient = gradient.clone()
            dist.all_reduce(gradient)
        self.seen += (dW.float() * gradient.float()).abs().sum() / math.sqrt(dW.numel())  # type: ignore[assignment]

    def score(self) -> float:
        return (self.smoothed[0] * self.smoothed[1]).item()

    def _load_from_state_dict(self, state, prefix, *args):
        """A saved layer may have grown: make its lists as long. (Build the optimizer after loading, then.)"""
        rows = []
        while (key := f"{prefix}A{len(rows)}") in state:
            rows.append(len(state[key]))
        if rows and prefix + "ranknum" in state and rows != [len(A) for A in self.entries("A")]:
            first, used = self.A0, 0
            for i in range(self.count):
                for letter in "AEB":
                    delattr(self, f"{letter}{i}")
            self.count = 0
            for r in rows:
                used += r
                self.append(r, first, RESERVE, trained=used <= int(state[prefix + "ranknum"]))
        super()._load_from_state_dict(state, prefix, *args)


# ------------------------------------------------------------------------- the verbs


def inject(
    model: nn.Module, targets: Sequence[str], *,
    rank: int = 1, rank_target: int = 8, alpha: float = 16.0, dropout: float = 0.0, delta: int = 0,
    top: int = 3, interval: int = 50, t0: int = 50, beta1: float = 0.85, beta2: float = 0.85, orth: float = 0.1, **walk,
) -> list[str]:  # fmt: skip
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    Options:
        rank: rank r every layer starts with
        rank_target: growth ends when the average layer has this rank
        alpha: the update is scaled by alpha / (r + 1e-5), r the layer's rank now
        dropout: dropout on the adapter's input
        delta: by how much a chosen layer grows; 0 = half of rank_target, as the authors' table
        top: how many layers grow at a time
        interval: steps between growth events
        t0: step after which growth begins
        beta1: of the score's average
        beta2: of the uncertainty's average
        orth: coefficient of the orthogonality penalty, 0 turns it off
    """
    if rank_target < rank:
        raise ValueError(f"rank_target {rank_target} is out of range: allowed are rank {rank} and up")
    adalora.check({"delta": delta, "t0": t0, "orth": orth}, {"top": top, "interval": interval},
                  {"beta1": beta1, "beta2": beta2})  # fmt: skip
    settings = {"target": rank_target, "delta": delta or max(1, rank_target // 2), "top": top, "interval": interval,
                "t0": t0, "beta1": beta1, "beta2": beta2, "orth": orth}  # fmt: skip
    names = lora.inject(model, targets, rank=rank, alpha=alpha, dropout=dropout, **walk)
    for name in names:
        lora.replace(model, name, IncreLoRALinear(model.get_submodule(name), settings))
    return names


def layers_of(model: nn.Module) -> tuple[dict[str, IncreLoRALinear], dict]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, IncreLoRALinear)}
    return layers, next(iter(layers.values())).settings


def budget_left(layers: Mapping[str, IncreLoRALinear], settings: dict) -> int:
    return settings["target"] * len(layers) - sum(layer.rank for layer in layers.values())


def penalty(model: nn.Module) -> torch.Tensor:
    """The orthogonality term of the loss: orth times the mean over all entries of the lists A and B of the norm, not
    squared, of A A^T - I and B^T B - I. As the authors' code, so rows that came at different times may be alike."""
    layers, settings = layers_of(model)
    As, Bs = ([p for layer in layers.values() for p in layer.entries(letter)] for letter in "AB")
    return settings["orth"] * adalora.mean_norm(As, Bs)


@torch.no_grad()
def before_step(model: nn.Module, step: int, total: int) -> None:
    """Smooth the scores, as long as there is a budget: between backward and the optimizer's step number `step`."""
    layers, s = layers_of(model)
    growing = budget_left(layers, s) > 0
    for layer in layers.values():
        if growing:
            mean, spread = layer.smoothed
            seen = torch.as_tensor(layer.seen, device=mean.device)
            seen = torch.where(seen.isfinite(), seen, mean)  # as AdaLoRA's
            mean.mul_(s["beta1"]).add_((1 - s["beta1"]) * seen)
            spread.mul_(s["beta2"]).add_((1 - s["beta2"]) * (seen - mean).abs())
        layer.seen = 0.0


@torch.no_grad()
def after_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> dict | None:
    """Make the reserve after the first step, grow where and when the method says so; step counts from 1.

    Returns None, or at a growth {"grown": {name: new rank}, "scores": {name: score}, "budget": what is left}.
    """
    layers, s = layers_of(model)
    budget = budget_left(layers, s)
    if budget <= 0:
        return None
    if all(layer.count == 1 for layer in layers.values()):
        extend(model, optimizer, layers.values(), s["delta"])
        return None
    able = [name for name, layer in layers.items() if layer.rank + s["delta"] <= min(layer.base.weight.shape)]
    if step <= s["t0"] or step % s["interval"] or step >= total or not able:
        return None
    scores = {name: layer.score() for name, layer in layers.items()}
    chosen = sorted(able, key=scores.get, reverse=True)[: min(s["top"], budget)]  # type: ignore[arg-type]  # stable: ties stay in order
    for name in chosen:
        layer = layers[name]
        for E in layer.entries("E")[-s["delta"] :]:
            E.requires_grad_(True)
        layer.ranknum += s["delta"]  # type: ignore[misc]
    extend(model, optimizer, [layers[name] for name in chosen], s["delta"])
    budget = budget_left(layers, s)
    if budget <= 0:
        for layer in layers.values():
            for E in layer.entries("E")[-s["delta"] :]:
                E.zero_()
    return {"grown": {name: layers[name].rank for name in chosen}, "scores": scores, "budget": max(budget, 0)}


def extend(model: nn.Module, optimizer: torch.optim.Optimizer, layers: Iterable[IncreLoRALinear], rows: int) -> None:
    """Append `rows` rows in reserve to each layer, one by one as the authors, and give the optimizer what is new.

    A new parameter joins the group that holds its layer, at the place `param_groups` would give it: a run that is
    resumed finds the moments of each.
    """
    homes = {p: group for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        if layer.A0 not in homes:
            raise ValueError("the optimizer does not hold the parameters of an IncreLoRA layer: build it after inject")
    for layer in layers:
        home = homes[layer.A0]
        for _ in range(rows):
            layer.append(1, layer.A0, RESERVE, trained=False)
        home["params"] += [p for p in layer.parameters() if p.requires_grad and p not in homes]
    order = {p: i for i, p in enumerate(model.parameters())}
    for group in optimizer.param_groups:
        if all(p in order for p in group["params"]):
            group["params"].sort(key=order.get)


def watch(model: nn.Module) -> dict[str, dict[str, float]]:
    """{quantity: {layer name: number}}, what is worth seeing during and after a run."""
    layers, _ = layers_of(model)
    return {
        "ranks": {name: layer.rank for name, layer in layers.items()},
        "importance": {name: layer.score() for name, layer in layers.items()},
    }
