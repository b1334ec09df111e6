"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al. 2024, arXiv 2404.02948).

LoRA that starts in the principal part of W0 instead of at zero. With U S V^T = svd(W0) and s = alpha / r

    B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r^T                          (Eqs. 2, 3)
    h = (W0 - s B0 A0) x + s B A x,  B and A trained from B0 and A0            (Eqs. 4, 5)

so the model starts as it was and the residual W0 - s B0 A0 is what stays frozen. The authors (and PEFT) write the
residual over W0. Here W0 stays and B0, A0 are kept beside B, A: the update of W0 is dW = s (B A - B0 A0), of rank 2r,
and an adapter file fits the base that everybody has. The authors take r = alpha = 128, so s = 1, and lr 2e-5.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import lora

param_groups, merge = lora.param_groups, lora.merge


class ResidualLinear(lora.LoRALinear):
    """A frozen nn.Linear with the update s (B A - B0 A0), from B = B0 (m, r), A = A0 (r, n), which stay frozen.

    `plain` is the LoRALinear whose place it takes. Also the layer of OLoRA, CorDA and LoRA-GA.
    """

    def __init__(self, plain: lora.LoRALinear, B0: torch.Tensor, A0: torch.Tensor):
        super().__init__(plain.base, len(A0), plain.alpha, plain.dropout)
        # row-major, as a loaded one is: what an SVD returns may be the other way round, and products round differently
        A0, B0 = A0.to(plain.A).contiguous(), B0.to(plain.B).contiguous()
        self.A, self.B = nn.Parameter(A0.clone()), nn.Parameter(B0.clone())
        self.A0, self.B0 = nn.Buffer(A0.clone()), nn.Buffer(B0.clone())
        self.train(plain.training)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, 2r), Q (2r, n) with dW = P @ Q, the scaling absorbed in P."""
        return self.scaling * torch.cat([self.B, -self.B0], dim=1), torch.cat([self.A, self.A0])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True  # a layer whose weight is read instead is not to be merged
        x = F.dropout(input, self.dropout, self.training)  # on all of the update, so the start is W0 x then too
        # B A - B0 A0 = B (A - A0) + (B - B0) A0: no difference of large numbers, and exactly zero at the start
        h = F.linear(x, (self.A - self.A0).to(x.dtype))  # (..., r)
        h0 = F.linear(x, self.A0.to(x.dtype))  # (..., r)
        update = F.linear(h, (self.scaling * self.B).to(h.dtype))  # (..., m)
        return self.base(input) + update + F.linear(h0, (self.scaling * (self.B - self.B0)).to(h.dtype))

    def _load_from_state_dict(self, state, prefix, *args):
        """A start computed from data has the rank it was saved with: take that first, if all of it fits."""
        rank, (m, n) = len(state.get(prefix + "A", self.A)), self.base.weight.shape
        shapes = {"A": (rank, n), "A0": (rank, n), "B": (m, rank), "B0": (m, rank)}
        if rank != self.rank and all(state.get(prefix + k, self.A).shape == shape for k, shape in shapes.items()):
            for key, shape in shapes.items():
                tensor = getattr(self, key)
                tensor.data = tensor.data.new_empty(shape)
        super()._load_from_state_dict(state, prefix, *args)


def principal(W: torch.Tensor, r: int, s: float, niter: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """B0 (m, r) and A0 (r, n) of W (m, n), s B0 A0 its best approximation of rank r; by `niter` power iterations if > 0."""
    if niter:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.mT
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / s).sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


@torch.no_grad()
def begin(
    model: nn.Module, names: list[str], start: Callable[[str, lora.LoRALinear], tuple[torch.Tensor, torch.Tensor]]
) -> list[str]:
    """Put a ResidualLinear in the place of each LoRALinear: start(name, layer) gives its B0 (m, r), A0 (r, n)."""
    layers = {}
    for name in names:  # all of them before the first is replaced
        plain = model.get_submodule(name)
        layers[name] = ResidualLinear(plain, *start(name, plain))
    for name, layer in layers.items():
        lora.replace(model, name, layer)
    return names


def wide(weight: torch.Tensor) -> torch.Tensor:
    """A weight's numbers in float32 at least, for a decomposition."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def inject(
    model: nn.Module, targets: Sequence[str], *, rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, niter: int = 0, **walk
) -> list[str]:
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    Options:
        rank: rank r of the trained part; the update of W0 has 2 r
        alpha: the trained part is scaled by alpha / rank
        dropout: dropout on the adapter's input
        niter: power iterations of a randomised SVD, the authors' for speed is 16; 0 = the exact SVD
    """
    if niter < 0:
        raise ValueError(f"niter {niter} is below 0")
    if not alpha > 0:
        raise ValueError(f"alpha {alpha} is not above 0: the start is divided by its root")
    names = lora.inject(model, targets, rank=rank, alpha=alpha, dropout=dropout, **walk)
    return begin(model, names, lambda name, layer: principal(wide(layer.weight), layer.rank, layer.scaling, niter))
