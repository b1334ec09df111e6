"""Head only: the backbone stays as it is and the task head alone is trained. The lower yardstick.

No layer is wrapped, `targets` is not looked at and nothing is to be merged.
"""

from collections.abc import Sequence

from baselines import full, lora

param_groups, merge = lora.param_groups, full.merge


def inject(model, targets: Sequence[str] | None = None) -> list[str]:
    """Freeze everything; whoever trains turns the task head on again. Returns [] for no layer is wrapped."""
    model.requires_grad_(False)
    return []
