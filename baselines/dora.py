"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv 2402.09353; code github.com/NVlabs/DoRA).

LoRA gives a direction, a trained vector gives each output row its length:

    W' = magnitude * V / ||V||        V = W0 + s B A, ||V|| the norm of each row        (Eq. 5)

The magnitude starts as the norms of W0's rows and B at zero, so W' starts as W0. The norm is a constant to the
gradient (Sec. 4.3). What differs from baselines/lora.py is that W' - W0 is not of low rank: it merges, but has no
factors. The authors take lr 2e-4 and ranks 16 and 32 for LLaMA.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import lora

param_groups = lora.param_groups


class DoRALinear(lora.LoRALinear):
    """A LoRALinear `plain` whose rows have a trained length. Input (..., n), output (..., m)."""

    def __init__(self, plain: lora.LoRALinear):
        super().__init__(plain.base, plain.rank, plain.alpha, plain.dropout)
        self.A, self.B = plain.A, plain.B
        self.magnitude = nn.Parameter(self.row_norms())  # (m,)
        self.train(plain.training)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("DoRA's change of the weight is not of low rank, it has no factors: merge it, or --export-merged")

    def direction(self) -> torch.Tensor:
        """V = W0 + s B A (m, n), in float32 at least as A and B are: in half precision small changes of a length would vanish."""
        with torch.autocast(self.A.device.type, enabled=False):
            return self.base.weight + self.scaling * self.B @ self.A

    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        V = self.direction()
        return torch.linalg.vector_norm(V, dim=1).clamp_min(torch.finfo(V.dtype).tiny)  # (m,), a row may be zero

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True  # a layer whose weight is read instead is not to be merged
        y = self.base(input)  # (..., m)
        x = F.dropout(input, self.dropout, self.training)
        h = F.linear(x, self.A.to(x.dtype))  # (..., r)
        update = F.linear(h, (self.scaling * self.B).to(h.dtype))  # (..., m)
        if self.dropout and self.training:
            W0_x = F.linear(x, self.base.weight)
        else:
            W0_x = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        stretch = self.magnitude / self.row_norms()  # (m,)
        # W' x = stretch * (W0 x + s B A x), written as y and what is to be added, so that it starts as y to the bit
        return y + (stretch - 1).to(y.dtype) * W0_x + stretch.to(y.dtype) * update


def inject(
    model: nn.Module, targets: Sequence[str], *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, **walk
) -> list[str]:
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    Options:
        rank: rank r of the direction's update
        alpha: the direction's update is scaled by alpha / rank
        dropout: dropout on the adapter's input
    """
    names = lora.inject(model, targets, rank=rank, alpha=alpha, dropout=dropout, **walk)
    for name in names:
        lora.replace(model, name, DoRALinear(model.get_submodule(name)))
    return names


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Put W' in the place of W0 and give the plain nn.Linear back; returns the names merged.

    Computed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped, and if the model reads
    a layer's weight and never calls the layer.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, DoRALinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no DoRALinear (merged already?)")
    lora.check_mergeable(wrapped)
    for name, layer in wrapped.items():
        stretch = layer.magnitude / layer.row_norms()
        layer.base.weight.copy_(stretch[:, None] * layer.direction())
        lora.replace(model, name, layer.base)
    return list(wrapped)
