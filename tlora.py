"""TLoRA: Tri-Matrix Low-Rank Adaptation of Large Language Models (Islam 2025, arXiv 2504.18735).

A frozen linear layer W0 (m, n) gets an update of which only the small middle is trained:

    h = W0 x + Dropout(alpha C B A x)        A (r, n), B (r, r), C (m, r), alpha one number

A and C are drawn at random and stay as they are. B starts at zero, so the update starts at exactly
zero, and alpha, the learned scale of its layer, starts at one: r r + 1 trained numbers per layer,
whatever the layer's size. This file needs torch alone; copy it and call

    names = inject(model, ["q_proj", "v_proj"], rank=32)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.01))
    ...                                 # train as usual
    merge(model)                        # back to plain nn.Linear layers

`python tlora.py` shows it on one layer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class TLoRALinear(nn.Module):
    """A frozen nn.Linear with the update alpha C B A. Input (..., n), output (..., m)."""

    def __init__(self, base, rank, dropout):
        super().__init__()
        m, n = base.weight.shape
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.dropout = dropout
        self.register_buffer("A", torch.empty(rank, n, **like))
        self.B = nn.Parameter(torch.zeros(rank, rank, **like))
        self.register_buffer("C", torch.empty(m, rank, **like))
        # At least float32: next to 1.0, bfloat16 has steps of 0.004 and would round a step of 0.001 away.
        like["dtype"] = torch.promote_types(base.weight.dtype, torch.float32)
        self.alpha = nn.Parameter(torch.ones((), **like))
        # Gain sqrt(2 / (1 + 5)), std gain / sqrt(fan_in), with the fan_in of linear maps: n for A, r for C.
        # The author writes x A B C and draws A as (n, r), C as (r, m), whose fan_ins are r and m. Only the
        # product of the two stds matters to dW: ours is sqrt(m / n) times the author's, the same if m = n.
        nn.init.kaiming_normal_(self.A, a=math.sqrt(5))
        nn.init.kaiming_normal_(self.C, a=math.sqrt(5))

    # Some models look at their layers instead of calling them (T5 asks for wo.weight.dtype).
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def factors(self):
        """P (m, r), Q (r, n) with dW = P @ Q, alpha and B absorbed in P: Q never changes."""
        return self.C @ (self.alpha * self.B), self.A

    def forward(self, x):
        h = F.linear(x, self.A)  # (..., r)
        # Scaling B costs r*r numbers, scaling the output would cost m for every token.
        h = F.linear(h, self.alpha * self.B)  # (..., r)
        h = F.linear(h, self.C)  # (..., m)
        # Dropout on the update's output: a merged layer is the layer without dropout.
        return self.base(x) + (dropout(h, self.dropout) if self.training and self.dropout else h)  # (..., m)


def dropout(h, p):
    """Zeros with probability p, h / (1 - p) else. It draws a bit an entry where torch's dropout draws a float."""
    bits, scale = draw_bits(h.numel(), p, h.device)
    places = torch.arange(8, dtype=torch.uint8, device=h.device)[:, None]
    # First the lowest bit of every byte, then the next: so the shifts run over whole rows.
    keep = (bits.view(torch.uint8) >> places).bitwise_and_(1)  # (8, bytes), 0 or 1
    return h * keep.view(-1)[: h.numel()].view(h.shape) * scale  # backward keeps a byte an entry


def draw_bits(count, p, device):
    """`count` random bits in words of 64, each 0 with probability p (1/256 to 255/256), and the factor 1 / (1 - p).

    With 1 - p = 0.b1 b2 .. in binary and w a fair bit, a bit is 1 with that probability if it is (w or rest) where b1 = 1
    and (w and rest) where b1 = 0, `rest` made so of b2 ..: p = 0.5 takes one fair bit an entry, any p at most eight.
    """
    keep = 256 - min(max(round(256 * p), 1), 255)  # of 256
    bits = None  # zeros, until the last digit that is 1
    for digit in (keep >> place & 1 for place in range(8)):
        if digit or bits is not None:
            fair = torch.randint(-(2**63), 2**63 - 1, (-(-count // 64),), device=device)
            bits = fair if bits is None else fair | bits if digit else fair & bits
    return bits, 256 / keep


# -------------------------------------------------------------- what the paper looks at


@torch.no_grad()
def cosine_similarity(update1, update2):
    """Cosine of the angle between two updates dW = P Q of one layer, each given as its factors (P, Q).

    <P1 Q1, P2 Q2> is the sum over (P1^T P2) * (Q1 Q2^T), so dW is never formed. nan if an update is
    zero. The paper's text compares dW, as this does; the author's code compares W0 + dW, and finds
    values near 1 for any two small updates, because both sums are mostly W0.
    """

    def inner(update1, update2):
        (P1, Q1), (P2, Q2) = update1, update2
        return ((P1.T @ P2) * (Q1 @ Q2.T)).sum()  # sums over (k1, k2)

    update1, update2 = ([M.to("cpu", torch.float64) for M in update] for update in (update1, update2))
    return (inner(update1, update2) / (inner(update1, update1) * inner(update2, update2)).sqrt()).item()


# ------------------------------------------------------------------------- the verbs


def inject(model, targets, *, rank: int = 32, dropout: float = 0.5):
    """Freeze `model` and wrap every nn.Linear whose dotted name ends in one of `targets`.

    A target that is a layer's full name means that layer alone. Returns the names wrapped, in the
    model's order. ValueError if a target matches nothing or a rank does not fit a layer.

    Options:
        rank: rank r of the update (32: the author's run)
        dropout: dropout on the update's output (0.5: the author's)
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
        replace(model, name, TLoRALinear(linear, rank, dropout).train(linear.training))
    return list(linears)


def param_groups(model, lr, weight_decay):
    """Groups for torch.optim.AdamW: whatever is trainable (B, alpha, the task head), one rate, one decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


@torch.no_grad()
def watch(model):
    """{quantity: {layer name: number}}, what is worth seeing during and after a run.

    alpha; B_norm, the Frobenius norm of B; A_spectral, B_spectral, C_spectral, the largest singular
    values (those of A and C stay as they are).
    """
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, TLoRALinear):
            A, B, C = layer.A.float(), layer.B.float(), layer.C.float()
            numbers = {
                "alpha": layer.alpha,
                "B_norm": torch.linalg.matrix_norm(B),
                "A_spectral": torch.linalg.matrix_norm(A, 2),
                "B_spectral": torch.linalg.matrix_norm(B, 2),
                "C_spectral": torch.linalg.matrix_norm(C, 2),
            }
            for quantity, number in numbers.items():
                seen.setdefault(quantity, {})[name] = number.item()
    return seen


@torch.no_grad()
def merge(model):
    """Fold dW into W0 and give the plain nn.Linear back; returns the names merged.

    Summed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped,
    so a second merge is refused.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, TLoRALinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no TLoRALinear (merged already?)")
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
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2))
    x = torch.randn(256, 64)
    y = (x @ torch.randn(64) > 0).long()  # two classes that the model does not know yet
    before = model(x)
    inject(model, ["0"], rank=32)
    print("output unchanged at the start:", torch.equal(model(x), before))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.state_dict().items():
        print(f"  {name:14s} {str(tuple(p.shape)):10s} {'trained' if name in trained else 'frozen'}")
    print(f"{sum(trained.values())} numbers are trained; LoRA at rank 32 trains {32 * (64 + 256)}")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.01))
    for step in range(301):
        loss = F.cross_entropy(model(x), y)
        if step % 100 == 0:
            seen = {quantity: layers["0"] for quantity, layers in watch(model).items()}
            print(f"  step {step:3d}  loss {loss.item():.6f}  ", end="")
            print(f"alpha {seen['alpha']:.3f}  norm of B {seen['B_norm']:.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted = model.eval()(x)  # eval() ends the dropout, which merging leaves out as well
    merge(model)
    print(f"merged into {model[0]}: largest difference {(model(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
