"""Full fine-tuning: every number of the model is trained. The upper yardstick, with the verbs of the methods.

There is no low-rank update, so no layer is wrapped, `targets` is not looked at and nothing is to be merged.
"""

from collections.abc import Sequence


def inject(model, targets: Sequence[str] | None = None) -> list[str]:
    """Make everything trainable. Returns [] for no layer is wrapped."""
    model.requires_grad_(True)
    return []


def param_groups(model, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW: weight decay for matrices, none for biases and norms (as GPT-2 and BERT)."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
    ]


def merge(model) -> list[str]:
    """Nothing to fold: the weights are the model's own. Returns []."""
    return []
