"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (Balazy et al. 2024, arXiv 2405.17604;
code github.com/MohammadrezaBanaei/LoRA-XS).

    h = W0 x + (alpha / r) C R A x        C = U_r S_r (m, r), A = V_r^T (r, n) of U S V^T = svd(W0), frozen

Only R (r, r) is trained: r^2 numbers a layer. (The paper calls the outer two A and B.) It is TLoRA with the singular
vectors of W0 in the place of random outer matrices, so the difference of the two is what those are worth.
The authors draw R from N(0, 1e-5^2), which moves the function a little; zero, which leaves it, is the default here.
Their code takes the SVD of the transposed weight, so that its S stands on the input's side; the paper is followed.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import lora

param_groups, merge = lora.param_groups, lora.merge


class LoRAXSLinear(lora.LoRALinear):
    """A frozen nn.Linear with the update (alpha / r) C R A. Input (..., n), output (..., m)."""

    def __init__(self, plain: lora.LoRALinear, std: float):
        super().__init__(plain.base, plain.rank, plain.alpha, plain.dropout)
        r, wide = plain.rank, torch.promote_types(plain.base.weight.dtype, torch.float32)
        U, S, Vh = torch.linalg.svd(plain.base.weight.to(wide), full_matrices=False)
        del self.A, self.B
        self.A = nn.Buffer(Vh[:r].contiguous())  # type: ignore[assignment]
        self.C = nn.Buffer((U[:, :r] * S[:r]).contiguous())
        self.R = nn.Parameter(std * torch.randn(r, r).to(plain.A))
        self.train(plain.training)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, r), Q (r, n) with dW = P @ Q, the scaling absorbed in P."""
        return self.scaling * self.C @ self.R, self.A

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True  # a layer whose weight is read instead is not to be merged
        h = F.dropout(input, self.dropout, self.training)
        h = F.linear(h, self.A.to(h.dtype))  # (..., r)
        h = F.linear(h, (self.scaling * self.R).to(h.dtype))  # (..., r)
        return self.base(input) + F.linear(h, self.C.to(h.dtype))  # (..., m)


def inject(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    std: float = 0.0,
    **walk,
) -> list[str]:
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    Options:
        rank: rank r of the update, which has r * r trained numbers
        alpha: the update is scaled by alpha / rank
        dropout: dropout on the adapter's input
        std: standard deviation R is drawn with; 0 keeps the function, the authors take 1e-5
    """
    if not std >= 0:
        raise ValueError(f"std {std} is below 0")
    names = lora.inject(model, targets, rank=rank, alpha=alpha, dropout=dropout, **walk)
    for name in names:
        lora.replace(model, name, LoRAXSLinear(model.get_submodule(name), std))
    return names
