"""Head only: the backbone stays as it is and the task head alone is trained. The lower yardstick.

No layer is wrapped, `targets` is not looked at and nothing is to be merged.
"""

from collections.abc import Sequence


def inject(model, targets: Sequence[str] | None = None) -> list[str]:
    """Freeze everything; whoever trains turns the task head on again. Returns [] for no layer is wrapped."""
    model.requires_grad_(False)
    return []


def param_groups(model, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW: whatever is trainable, one rate, one decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


def merge(model) -> list[str]:
    """Nothing to fold. Returns []."""
    return []
