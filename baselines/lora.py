"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2022, arXiv 2106.09685).

The yardstick of all four methods. A frozen linear layer W0 (m, n) gets an update of rank r:

    h = W0 x + (alpha / r) B A x        A (r, n), B (m, r)        (Sec. 4.1, Eq. 3 there)

A is drawn at random and B starts at zero, so the update starts at exactly zero. Both are trained:
r (m + n) numbers per layer. This file needs torch alone; copy it and call

    names = inject(model, ["q_proj", "v_proj"], rank=8, alpha=16.0)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.0))
    ...                                 # train as usual
    merge(model)                        # back to plain nn.Linear layers

`python baselines/lora.py` shows it on one layer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """A frozen nn.Linear with the update (alpha / r) B A. Input (..., n), output (..., m)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        m, n = base.weight.shape
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.alpha, self.dropout = alpha, dropout
        self.A = nn.Parameter(torch.empty(rank, n, **like))
        self.B = nn.Parameter(torch.zeros(m, rank, **like))
        # Microsoft's code and PEFT draw A so: uniform on +-1/sqrt(n). B is the one that is zero.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    # Some models look at their layers instead of calling them (T5 asks for wo.weight.dtype).
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    @property
    def rank(self):
        return self.A.shape[0]

    @property
    def scaling(self):
        return self.alpha / self.rank

    def factors(self):
        """P (m, r), Q (r, n) with dW = P @ Q, the scaling absorbed in P."""
        return self.scaling * self.B, self.A

    def forward(self, x):
        h = F.dropout(x, self.dropout, self.training)  # (..., n)
        h = F.linear(h, self.A)  # (..., r)
        # Scaling B costs m*r numbers, scaling the output would cost m for every token.
        return self.base(x) + F.linear(h, self.scaling * self.B)  # (..., m)


# ------------------------------------------------------------------------- the verbs


def inject(model, targets, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0):
    """Freeze `model` and wrap every nn.Linear whose dotted name ends in one of `targets`.

    A target that is a layer's full name means that layer alone. Returns the names wrapped, in the
    model's order. ValueError if a target matches nothing or a rank does not fit a layer.

    Options:
        rank: rank r of the update
        alpha: the update is scaled by alpha / rank
        dropout: dropout on the adapter's input
    """
    linears = find_linears(model, targets)
    for name, linear in linears.items():
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(
                f"rank {rank} does not fit layer {name} {tuple(linear.weight.shape)}: "
                f"allowed are 1 to {min(linear.weight.shape)}"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")
    model.requires_grad_(False)
    for name, linear in linears.items():
        replace(model, name, LoRALinear(linear, rank, alpha, dropout).train(linear.training))
    return list(linears)


def param_groups(model, lr, weight_decay):
    """Groups for torch.optim.AdamW: whatever is trainable (A, B, the task head), one rate, one decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


@torch.no_grad()
def merge(model):
    """Fold dW into W0 and give the plain nn.Linear back; returns the names merged.

    Summed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped,
    so a second merge is refused.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no LoRALinear (merged already?)")
    for name, layer in wrapped.items():
        dtype = layer.base.weight.dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        P, Q = layer.factors()
        layer.base.weight += P @ Q
        replace(model, name, layer.base.to(dtype))
    return list(wrapped)


# ------------------------------------------------- walking the modules (the same in every file)


def find_linears(model, targets):
    """{dotted name: nn.Linear} for the layers that `targets` name. ValueError as `inject` says."""
    targets = [targets] if isinstance(targets, str) else list(targets)
    modules = dict(model.named_modules())
    adapted = [name for name, m in modules.items() if hasattr(m, "factors")]
    if adapted:
        raise ValueError(f"the model is adapted already ({adapted[0]}): merge it first")
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    found = set()
    for target in targets:
        if target in linears:
            hits = [target]
        else:
            hits = [name for name in linears if name.endswith("." + target)]
        if not hits:
            ends = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(f"target '{target}' matches no nn.Linear; names end in: {', '.join(ends)}")
        found.update(hits)
    if not found:
        raise ValueError("no targets given")
    owners = {}  # parameter -> the modules that hold it, a module with two names twice
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(name)
    for name in sorted(found):
        if len(owners[linears[name].weight]) > 1:
            raise ValueError(f"layer {name} is not adapted: {owners[linears[name].weight]} share its weight")
        parent = type(modules[name.rpartition(".")[0]])
        if issubclass(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"layer {name} is not adapted: nn.{parent.__name__} reads its weight, not calling it")
    return {name: linear for name, linear in linears.items() if name in found}


def replace(model, name, module):
    """Put `module` where the dotted `name` points to."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# -------------------------------------------------------------------------- the demo


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    x = torch.randn(256, 64)
    y = model(x).detach() + x @ (torch.randn(64, 4) @ torch.randn(4, 48)) / 16  # a shift of rank 4
    before = model(x)
    inject(model, ["0"], rank=4, alpha=8.0)
    print("output unchanged at the start:", torch.equal(model(x), before))
    for name, p in model.named_parameters():
        print(f"  {name:14s} {str(tuple(p.shape)):10s} {'trained' if p.requires_grad else 'frozen'}")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    for step in range(301):
        loss = F.mse_loss(model(x), y)
        if step % 100 == 0:
            print(f"  step {step:3d}  loss {loss.item():.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted = model(x)
    merge(model)
    print(f"merged into {model[0]}: largest difference {(model(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
