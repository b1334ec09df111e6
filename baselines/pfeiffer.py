"""Pfeiffer adapters: AdapterFusion (Pfeiffer et al. 2020, arXiv 2005.00247; adapter-hub's `SeqBnConfig`).

Houlsby's adapter, baselines/houlsby.py, behind the MLP alone and with a relu:

    h = y + W2 relu(W1 y + b1) + b2        W1 (k, m), W2 (m, k), k = m / 16

Norms stay frozen. The weights start from N(0, 0.02^2) and biases at zero, as in adapter-hub, so the model does not
start exactly as it was; `zero=True` starts W2 at zero, and then it does.
"""

from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F

from baselines import houlsby, lora

param_groups, merge = houlsby.param_groups, houlsby.merge


def inject(
    model: nn.Module, targets: Sequence[str], *, reduction: int = 16, zero: bool = False, places: str = "", **walk
) -> list[str]:
    """Freeze `model` and put an adapter behind the MLPs' output projections among the layers that `targets` name;
    returns the names wrapped. `walk` goes to lora.find_linears. ValueError as there, and if none is an output.

    Options:
        reduction: the adapters' width is that of the layer's output divided by this
        zero: W2 starts at zero, so that the model starts as it was; otherwise as adapter-hub's
        places: ends of the names of the layers to follow, with commas between them; empty = the output
            projections of the MLP as the known models call them
    """
    if reduction < 1:
        raise ValueError(f"reduction {reduction} is below 1")
    linears = houlsby.find_outputs(model, targets, places, houlsby.MLP, **walk)
    if not places:  # BERT's attention.output.dense ends as its MLP's output.dense does
        linears = {name: m for name, m in linears.items() if not f".{name}".endswith(".attention.output.dense")}
        if not linears:
            raise ValueError("no output projection of an MLP among the targets, only attention's")
    model.requires_grad_(False)
    for name, linear in linears.items():
        layer = houlsby.BottleneckLinear(linear, max(1, linear.out_features // reduction), F.relu)
        nn.init.normal_(layer.W1, std=0.02)
        nn.init.normal_(layer.W2, std=0.0 if zero else 0.02)
        lora.replace(model, name, layer.train(linear.training))
    return list(linears)
