"""BitFit: only the biases are trained (Ben Zaken et al. 2022, arXiv 2106.10199). A yardstick, with the verbs of the methods.

Biases of linear layers and of norms both count (Sec. 3 there). No layer is wrapped, `targets` is not looked at and
nothing is to be merged.
"""

from collections.abc import Sequence


def inject(model, targets: Sequence[str] | None = None) -> list[str]:
    """Freeze everything but the biases. Returns [] for no layer is wrapped; ValueError if there is no bias."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]  # in_proj_bias, q_bias, too
    if not biases:
        raise ValueError("BitFit trains biases, and this model has none")
    model.requires_grad_(False)
    for p in biases:
        p.requires_grad_(True)
    return []


def param_groups(model, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW: the task head as the run says, no weight decay for the biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
    ]


def merge(model) -> list[str]:
    """Nothing to fold: the biases are the model's own. Returns []."""
    return []
