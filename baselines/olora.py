"""OLoRA: Orthonormal Low-Rank Adaptation (Buyukakyuz 2024, arXiv 2406.01775).

PiSSA with a QR decomposition in the place of the SVD: with Q R = qr(W0)

    B0 = Q_r, the first r columns, orthonormal;  A0 = R_r, the first r rows
    h = (W0 - s B0 A0) x + s B A x,  B and A trained from B0 and A0

Note that s B0 A0 is s times a part of W0: with s = 1 the residual is what the first r columns of Q do not span.
The layer is PiSSA's, see baselines/pissa.py: W0 stays as it is and the update is dW = s (B A - B0 A0).
"""

from collections.abc import Sequence

import torch

from baselines import lora, pissa

param_groups, merge = lora.param_groups, lora.merge


def orthonormal(W: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B0 (m, r) and A0 (r, n) of W (m, n)."""
    Q, R = torch.linalg.qr(W)
    return Q[:, :r], R[:r]


def inject(
    model: torch.nn.Module, targets: Sequence[str], *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, **walk
) -> list[str]:
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    Options:
        rank: rank r of the trained part; the update of W0 has 2 r
        alpha: the trained part is scaled by alpha / rank
        dropout: dropout on the adapter's input
    """
    names = lora.inject(model, targets, rank=rank, alpha=alpha, dropout=dropout, **walk)
    return pissa.begin(model, names, lambda name, layer: orthonormal(pissa.wide(layer.weight), layer.rank))
