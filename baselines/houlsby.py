"""Houlsby adapters: Parameter-Efficient Transfer Learning for NLP (Houlsby et al. 2019, arXiv 1902.00751;
code github.com/google-research/adapter-bert).

A small network with a bottleneck behind the output projection of attention and behind that of the MLP, before the
residual sum. With y the projection's output

    h = y + W2 gelu(W1 y + b1) + b2        W1 (k, m), W2 (m, k)        (Sec. 2.1, Fig. 2 there)

The weights start so small (truncated normal, std 1e-3, biases zero) that h is nearly y. The layer norms are trained
too. The authors take k = 64 and rates around 3e-4. It is no update of W0: nothing can be merged, there are no factors.
They put the adapter behind the dropout that follows the projection in BERT; here it wraps the projection itself, so
that dropout comes after it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import full, lora

param_groups = full.param_groups  # no weight decay for biases and norms, as the authors' code

# How the output projections end in our own transformer, LLaMA and Mistral; RoBERTa, BERT and DeBERTa; T5; GPT-2; OPT.
ATTENTION = ("o_proj", "attention.output.dense", "SelfAttention.o", "EncDecAttention.o", "attn.c_proj", "out_proj")
MLP = ("down_proj", "output.dense", "DenseReluDense.wo", "mlp.c_proj", "fc2")


class BottleneckLinear(nn.Module):
    """A frozen nn.Linear with an adapter behind it. Input (..., n), output (..., m)."""

    def __init__(self, base: nn.Linear, bottleneck: int, activation: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        m, k, weight = base.out_features, bottleneck, base.weight
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.base, self.activation = base, activation
        self.W1, self.b1 = nn.Parameter(torch.empty(k, m, **like)), nn.Parameter(torch.zeros(k, **like))
        self.W2, self.b2 = nn.Parameter(torch.empty(m, k, **like)), nn.Parameter(torch.zeros(m, **like))

    # Some models look at their layers instead of calling them (T5 asks for wo.weight.dtype).
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("an adapter behind a layer is no update of its weight: it has no factors and cannot be merged")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = self.base(input)  # (..., m)
        h = self.activation(F.linear(y, self.W1.to(y.dtype), self.b1.to(y.dtype)))  # (..., k)
        return y + F.linear(h, self.W2.to(h.dtype), self.b2.to(h.dtype))


def find_outputs(model: nn.Module, targets: Sequence[str], places: str, default: tuple[str, ...], **walk) -> dict[str, nn.Linear]:
    """{dotted name: nn.Linear}: those of the layers that `targets` name whose names end in one of `places`, words
    with commas between them, or if that is empty in one of `default`. ValueError if there is none."""
    ends = tuple(place.strip() for place in places.split(",") if place.strip()) or default
    linears = lora.find_linears(model, targets, **walk)
    found = {name: m for name, m in linears.items() if f".{name}".endswith(tuple(f".{end}" for end in ends))}
    if not found:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ValueError(f"no output projection among the targets, none ends in {', '.join(ends)}; they end in: {names}")
    return found


def inject(model: nn.Module, targets: Sequence[str], *, bottleneck: int = 64, places: str = "", **walk) -> list[str]:
    """Freeze `model`, put an adapter behind the output projections among the layers that `targets` name, train the
    norms; returns the names wrapped. `walk` goes to lora.find_linears. ValueError as there, and if none is an output.

    Options:
        bottleneck: width k of the adapters
        places: ends of the names of the layers to follow, with commas between them; empty = the output
            projections of attention and MLP as the known models call them
    """
    if bottleneck < 1:
        raise ValueError(f"bottleneck {bottleneck} is below 1")
    linears = find_outputs(model, targets, places, ATTENTION + MLP, **walk)
    model.requires_grad_(False)
    for name, linear in linears.items():
        layer = BottleneckLinear(linear, bottleneck, F.gelu)
        for W in (layer.W1, layer.W2):
            nn.init.trunc_normal_(W, std=1e-3, a=-2e-3, b=2e-3)
        lora.replace(model, name, layer.train(linear.training))
    for module in model.modules():
        if "Norm" in type(module).__name__:  # LayerNorm, and the RMS norms of LLaMA and T5, which are classes of theirs
            module.requires_grad_(True)
    return list(linears)


def merge(model: nn.Module) -> list[str]:
    """ValueError: what comes after a layer is not in its weight."""
    raise ValueError("adapters behind layers cannot be merged into the weights: keep them in the model")
