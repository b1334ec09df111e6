"""LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou et al. 2024, arXiv 2402.12354;
code github.com/nikhil-ghosh-berkeley/loraplus).

LoRA, baselines/lora.py, with a larger learning rate for B: in the limit of wide models both matrices learn features
efficiently only if lr_B / lr_A grows with the width (Theorem 1). So only the groups for the optimizer differ:

    A and whatever else    lr              B and all vectors    lr_ratio * lr       embeddings    1e-6

The authors' script for RoBERTa takes lr 5e-5 with a ratio of 80, their README says 20.
"""

from collections.abc import Sequence

from torch import nn

from baselines import lora

merge = lora.merge

EMBEDDING_LR = 1e-6  # the authors'


def inject(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    lr_ratio: float = 20.0,
    **walk,
) -> list[str]:
    """As baselines/lora.py's inject, which takes `walk` too: freeze, wrap, return the names; its errors.

    Options:
        rank: rank r of the update
        alpha: the update is scaled by alpha / rank
        dropout: dropout on the adapter's input
        lr_ratio: learning rate of B over that of A
    """
    if not lr_ratio > 0:
        raise ValueError(f"lr_ratio {lr_ratio} is not above 0")
    names = lora.inject(model, targets, rank=rank, alpha=alpha, dropout=dropout, **walk)
    for name in names:
        model.get_submodule(name).lr_ratio = lr_ratio  # for param_groups
    return names


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW by the authors' rule: vectors (biases, norms) go with B, and biases and LayerNorms
    have no weight decay; embeddings have a rate of their own. Groups that would be empty are left out."""
    ratio = next(m.lr_ratio for m in model.modules() if isinstance(m, lora.LoRALinear))
    A, B, spared, embeddings = [], [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            owner, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner)
            if isinstance(owner, nn.Embedding):
                embeddings.append(p)
            elif isinstance(owner, lora.LoRALinear) and leaf == "B":
                B.append(p)
            elif p.ndim == 1:
                (spared if "bias" in name or isinstance(owner, nn.LayerNorm) else B).append(p)
            else:
                A.append(p)
    groups = [
        {"params": A, "lr": lr, "weight_decay": weight_decay},
        {"params": embeddings, "lr": EMBEDDING_LR, "weight_decay": weight_decay},
        {"params": B, "lr": ratio * lr, "weight_decay": weight_decay},
        {"params": spared, "lr": ratio * lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
