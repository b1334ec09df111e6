"""TLoRA+: A Low-Rank Parameter-Efficient Fine-Tuning Method for Large Language Models
(Cao & Liu 2026, arXiv 2604.13368).

A frozen linear layer W0 (m, n) gets an update of three matrices, each with a learning rate of its own:

    h = W0 x + C B A x        A (r2, n), B (r1, r2), C (m, r1)        (Sec. 3.1, Eq. 2)

A and C are drawn at random and B starts at zero, so the update starts at exactly zero. All three are
trained (r2 n + r1 r2 + m r1 numbers per layer), or B and one outer matrix, or B alone, as in TLoRA.
How the three rates must differ is derived in the paper's Sec. 3.2, and line by line in this file:
start at `loss_change`. This file needs torch alone; copy it and call

    names = inject(model, ["q_proj", "v_proj"], rank=8, ratio="4")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, weight_decay=0.1))
    ...                                 # train as usual
    merge(model)                        # back to plain nn.Linear layers

`python tlora_plus.py` shows it on one layer.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F


class TLoRAPlusLinear(nn.Module):
    """A frozen nn.Linear with the update C B A. Input (..., n), output (..., m)."""

    def __init__(self, base, rank1, rank2, train, init_b, ratio):
        super().__init__()
        m, n = base.weight.shape
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.ratio = ratio  # for param_groups
        for letter, shape in {"A": (rank2, n), "B": (rank1, rank2), "C": (m, rank1)}.items():
            # LeCun: A ~ N(0, 1/n), B ~ N(0, 1/r2), C ~ N(0, 1/r1), so that A x, B A x and C B A x are as
            # large as x. The text does not say how dW starts at zero; B = 0 does it, as in TLoRA.
            matrix = torch.zeros(shape, **like)
            if letter != "B" or init_b == "lecun":
                nn.init.normal_(matrix, std=shape[1] ** -0.5)
            if letter.lower() in train:
                self.register_parameter(letter, nn.Parameter(matrix))
            else:
                self.register_buffer(letter, matrix)

    # Some models look at their layers instead of calling them (T5 asks for wo.weight.dtype).
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def factors(self):
        """P (m, r2), Q (r2, n) with dW = P @ Q, B absorbed in P."""
        return self.C @ self.B, self.A

    def forward(self, x):
        h = F.linear(x, self.A)  # (..., r2)
        h = F.linear(h, self.B)  # (..., r1)
        return self.base(x) + F.linear(h, self.C)  # Eq. 2: (..., m)


# ------------------------------------------------------ the learning-rate ratios (Sec. 3.2)
#
# Of the layer only Y = C B A X is looked at, with X (n, tokens) and W0 = 0. Each matrix should do an
# equal part of the work: a step should lower the loss by the same amount through A, through B and
# through C. So find out how much each does at learning rate 1; its rate is the inverse of that.


def loss_change(gradient, rate):
    """What one step of one matrix changes the loss by, to first order. A tensor of one number, <= 0."""
    step = -rate * gradient.sign()  # Eq. 4: Adam with beta1 = beta2 = 0 is sign descent
    return (gradient * step).sum()  # Eq. 3, which makes it -rate ||gradient||_1 (Eq. 5)


def gradients(A, B, C, G):
    """Eq. 6: the loss's gradients for A, B, C. G (m, n) = dL/dY X^T is the one W0 would have."""
    return (
        B.T @ C.T @ G,  # (r2, n)
        C.T @ G @ A.T,  # (r1, r2)
        G @ A.T @ B.T,  # (m, r1)
    )


def gradient_sizes(m, n, r1, r2, estimate):
    """How large one entry of each gradient is beside one entry of G, at the LeCun start.

    "paper" multiplies the sizes of the two matrices that each line of Eq. 6 puts around G, and leaves
    out that a matrix product sums. "summed" (ours) keeps the sums: k terms of random sign add up to
    sqrt(k) times one of them.
    """
    A, B, C = n**-0.5, r2**-0.5, r1**-0.5  # the standard deviations of their entries
    if estimate == "paper":
        return B * C, C * A, A * B
    return (
        B * C * math.sqrt(r1 * m),  # C B sums over r1, (C B)^T G over m
        C * A * math.sqrt(m * n),  # C^T G sums over m, G A^T over n
        A * B * math.sqrt(n * r2),  # G A^T sums over n, (G A^T) B^T over r2
    )


def estimated_changes(m, n, r1, r2, estimate):
    """How much A, B and C change the loss at learning rate 1: the number of entries times their size."""
    size_A, size_B, size_C = gradient_sizes(m, n, r1, r2, estimate)
    return r2 * n * size_A, r1 * r2 * size_B, m * r1 * size_C


def rate_ratios(ratio, m, n, r1, r2):
    """(1, eta_B / eta_A, eta_C / eta_A) for `ratio`: "paper", "summed" or a number lambda.

    "paper" and "summed" make the three loss changes of their estimate equal. For 768 x 768 and rank 8
    they give 1 : 940.6 : 9.8 and 1 : 96 : 9.8. This is a finding about the paper: without the sums, its
    eta_B is too large by sqrt(n / r1), and its eta_C by sqrt(n r2 / (m r1)), here 1. Measured on random
    layers of that shape (B at N(0, 1/r2): at B = 0 only B has a gradient), A, B and C change the loss
    about as 1 : 0.01 : 0.05 at equal rates. "paper" overshoots: B does 7 to 16 times as much as A, and
    C 0.3 to 1.1 times. "summed" brings B to 0.6 to 2.3. Where signs are not random both miss by more:
    the gradient of a squared error contains the update's own output, and over 1,024 tokens B does
    about 55 and 6 times as much as A. (All of it in tests/test_tlora_plus.py.)

    lambda takes the place of n in the simplified ratios. With r1 = r2 = 1 "paper" is Eq. 7,
    1 : n^(3/2) : n^(3/2) / m; the paper drops the shape's aspect m / n (Eq. 8), and its experiments
    make n a number to choose, from 1 (plain AdamW) to 10. They recommend 4 to 8; 4 gives 1 : 8 : 2.
    """
    if ratio in ("paper", "summed"):
        change_A, change_B, change_C = estimated_changes(m, n, r1, r2, ratio)
        return 1.0, change_A / change_B, change_A / change_C
    return 1.0, ratio**1.5, ratio**0.5  # Eq. 8


def learning_rates(lr, ratio, m, n, r1, r2):
    """{"A": eta_A, "B": eta_B, "C": eta_C}. lr is eta_A for a number, eta_B for "paper" and "summed".

    (An eta_A of 1e-4 would make "paper" train B at 0.1 in a layer of 768.)
    """
    ratios = rate_ratios(ratio, m, n, r1, r2)
    anchor = ratios[1] if ratio in ("paper", "summed") else 1.0
    return {letter: lr * (r / anchor) for letter, r in zip("ABC", ratios)}


def parse_ratio(ratio):
    """What `ratio` says: "paper", "summed" or a number. ValueError if it is none of these."""
    if ratio in ("paper", "summed"):
        return ratio
    try:
        number = float(ratio)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"ratio '{ratio}' is not one of paper, summed or a number above 0")
    return number


# ------------------------------------------------------------------------- the verbs


def inject(
    model,
    targets,
    *,
    rank: int = 8,
    rank1: int = 0,
    rank2: int = 0,
    train: Literal["abc", "ab", "bc", "b"] = "abc",
    init_b: Literal["zero", "lecun"] = "zero",
    ratio: str = "4",
):
    """Freeze `model` and wrap every nn.Linear whose dotted name ends in one of `targets`.

    A target that is a layer's full name means that layer alone. Returns the names wrapped, in the
    model's order. ValueError if a target matches nothing, a rank does not fit a layer, or an option is
    unknown.

    Options:
        rank: rank of the update
        rank1: rank r1 of C (m, r1) and B (r1, r2); 0 means rank
        rank2: rank r2 of B (r1, r2) and A (r2, n); 0 means rank
        train: the matrices to train; the others stay as they were drawn
        init_b: B's start; zero leaves the model's function as it is, lecun (the derivation's N(0, 1/r2))
            changes it before the first step
        ratio: learning rates of A, B and C: a number lambda makes them 1, lambda^1.5 and lambda^0.5 times
            the run's (4 to 8 is the paper's advice, 1 is plain AdamW); paper and summed give B the run's
            and derive A's and C's from each layer's shape
    """
    linears = find_linears(model, targets)
    rank1, rank2 = rank1 or rank, rank2 or rank
    for name, linear in linears.items():
        for r in (rank1, rank2):
            if not 1 <= r <= min(linear.weight.shape):
                raise ValueError(
                    f"rank {r} does not fit layer {name} {tuple(linear.weight.shape)}: "
                    f"allowed are 1 to {min(linear.weight.shape)}"
                )
    for option, value in (("train", train), ("init_b", init_b)):
        allowed = get_args(inject.__annotations__[option])
        if value not in allowed:
            raise ValueError(f"{option} '{value}' is not one of {', '.join(allowed)}")
    ratio = parse_ratio(ratio)
    model.requires_grad_(False)
    for name, linear in linears.items():
        layer = TLoRAPlusLinear(linear, rank1, rank2, train, init_b, ratio)
        replace(model, name, layer.train(linear.training))
    return list(linears)


def param_groups(model, lr, weight_decay):
    """Groups for torch.optim.AdamW: A's, B's and C's by learning rate; the task head at lr; one decay.

    AdamW's decay is lr * weight_decay, so it follows each group's rate.
    """
    groups = {}  # (matrix, learning rate) -> parameters
    for layer in model.modules():
        if isinstance(layer, TLoRAPlusLinear):
            (m, r1), (r2, n) = layer.C.shape, layer.A.shape
            for letter, rate in learning_rates(lr, layer.ratio, m, n, r1, r2).items():
                if getattr(layer, letter).requires_grad:
                    groups.setdefault((letter, rate), []).append(getattr(layer, letter))
    matrices = {p for params in groups.values() for p in params}
    head = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    if head:
        groups["head", lr] = head
    return [{"params": p, "lr": rate, "weight_decay": weight_decay} for (_, rate), p in groups.items()]


@torch.no_grad()
def merge(model):
    """Fold dW into W0 and give the plain nn.Linear back; returns the names merged.

    Summed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped,
    so a second merge is refused.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, TLoRAPlusLinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no TLoRAPlusLinear (merged already?)")
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
    m = n = 768
    r1 = r2 = 8
    print(f"learning rates of A : B : C, layer {m} x {n}, rank {r1}, and what each matrix then changes")
    print("the loss by, as multiples of what A does (Eq. 5, measured on random matrices):")
    A, B, C = torch.randn(r2, n) / n**0.5, torch.randn(r1, r2) / r2**0.5, torch.randn(m, r1) / r1**0.5
    G = torch.randn(m, 64) @ torch.randn(64, n)  # dL/dY X^T of 64 tokens
    for ratio in ("1", "4", "paper", "summed"):
        rates = rate_ratios(parse_ratio(ratio), m, n, r1, r2)
        changes = [loss_change(g, rate) for g, rate in zip(gradients(A, B, C, G), rates)]
        print(f"  ratio {ratio:7s}" + " : ".join(f"{rate:.4g}" for rate in rates).ljust(20), end="")
        print(" : ".join(f"{change / changes[0]:.2f}" for change in changes))

    print("training with two ratios:")
    for ratio in ("1", "4"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48))
        x = torch.randn(256, 64)
        y = model(x).detach() + x @ (torch.randn(64, 4) @ torch.randn(4, 48)) / 16  # a shift of rank 4
        before = model(x)
        inject(model, ["0"], rank=4, ratio=ratio)
        print(f"  ratio {ratio}, output unchanged at the start:", torch.equal(model(x), before))
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.0))
        for step in range(201):
            loss = F.mse_loss(model(x), y)
            if step % 100 == 0:
                print(f"    step {step:3d}  loss {loss.item():.6f}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    adapted = model(x)
    merge(model)
    print(f"merged into {model[0]}: largest difference {(model(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
