"""BitFit: only the biases are trained (Ben Zaken et al. 2022, arXiv 2106.10199). A yardstick, with the verbs of the methods.

Biases of linear layers and of norms both count (Sec. 3 there). No layer is wrapped, `targets` is not looked at and
nothing is to be merged.
"""

from collections.abc import Sequence

from baselines import full

param_groups, merge = full.param_groups, full.merge


def inject(model, targets: Sequence[str] | None = None) -> list[str]:
    """Freeze everything but the biases. Returns [] for no layer is wrapped; ValueError if there is no bias."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]  # in_proj_bias, q_bias, too
    if not biases:
        raise ValueError("BitFit trains biases, and this model has none")
    model.requires_grad_(False)
    for p in biases:
        p.requires_grad_(True)
    return []
