"""TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation (Liang, Wang, Zeng 2025, arXiv 2501.08008).

A frozen linear layer W0 (m, n) gets the update

    h = W0 x + alpha/(r + eps) * B (L + U) A x            (Eqs. 4, 5)

with A (r, n), B (m, r) and the two triangles L (lower) and U (upper) of shape (r, r), both with
their diagonal. All four are trained: r (m + n) + r (r + 1) numbers. Every layer starts with r = 1,
and ranks grow while training, where it matters, until a budget is used up:

  - a growth of dr adds rows to A, columns to B and a border to L and U, and leaves every old entry
    where it was (Eqs. 6-9): that is what the triangles are for;
  - which layers grow: those whose ||L + U||_F / r rose most since the last growth event (Eq. 11).
    It costs r^2 numbers per layer, at events alone: no bookkeeping at every step;
  - how many grow: a share of the remaining budget (Eq. 12) that rises with time (Eqs. 13, 14).

A growth from r = 2 to 3. The numbers are places in the packed L and U: what is new stands at the end.

        L                 U
    [ 0     | . ]     [ 0  1 | 3 ]      packed L: 0 | 1 2 | 3 4 5    rows, one after the other
    [ 1  2  | . ]     [    2 | 4 ]      packed U: 0 | 1 2 | 3 4 5    columns, one after the other
    [-------+---]     [------+---]
    [ 3  4  | 5 ]     [ .  . | 5 ]      3 4 are L_down and U_up, 5 is L_aug and U_aug

A layer that has just grown scores low at the next event: its r in the denominator is larger, its D is
not yet. So the next ranks go to others first.

Two jumps follow from the text. New Gaussian entries change the function a little, and the factor
alpha/(r + eps) shrinks the old update when r grows, five times when 1 becomes 5. That is the paper
and the default here; `preserve=True` makes growth leave the function as it is.

This file needs torch alone; copy it and call

    names = inject(model, ["q_proj", "v_proj"], interval=100, t0=100)
    model.score.requires_grad_(True)                        # the task head, whatever its name: inject froze it too
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.0))
    for step in range(1, total + 1):
        loss = loss_of(model, batch) + penalty(model)       # Eq. 10
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        after_step(model, optimizer, step, total)           # grows when it is time
    save(model, "adapter.safetensors")                      # `load` puts it on the base model again
    merge(model)                                            # back to plain nn.Linear layers

Growth puts new Parameters into the model and the optimizer. A list of parameters made before it, say
for clip_grad_norm_, is stale: ask model.parameters() or the optimizer's groups anew at every step.

The authors' code (github.com/YaoLiang2023/DiverValue-Bench, a fork of PEFT 0.4; of the versions of its
triadaptlora.py the one ending in `single` is the paper's text) differs from their paper: k is rounded
down; every layer that ties with the k-th score grows; events come when t is a multiple of the interval;
the budget is looked at before an event alone, so that growth can pass it; dr is r_ref / 2 unless given;
fixed k is not reached; the penalty is the mean of unsquared norms (`orth_form="mean"`); what grows is
added as parameters of their own, for which Adam's step count begins anew. The live version starts from
L = U = I with the constant scale 2.

`python triadapt.py` shows it on one model of three layers.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

EPS = 1e-5  # the eps of Eq. 5
STD = 0.02  # of every Gaussian entry, as AdaLoRA's code; the paper gives none


class TriAdaptLinear(nn.Module):
    """A frozen nn.Linear with the update alpha/(r+eps) B (L+U) A. Input (..., n), output (..., m).

    L and U are stored packed, r(r+1)/2 numbers each: L row by row, U column by column. So a growth
    only ever appends, to the parameter and to the optimizer's moments alike.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, growth: dict):
        super().__init__()
        m, n = base.weight.shape
        # At least float32, whatever the base: a step of 1e-4 is rounded away beside a bfloat16 weight of 0.1.
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.base = base
        self.alpha, self.dropout = alpha, dropout
        self.growth = growth  # the settings of `inject`, the same dict in every layer
        self.A = nn.Parameter(STD * torch.randn(rank, n, **like))
        self.B = nn.Parameter(torch.zeros(m, rank, **like))
        self.L = nn.Parameter(STD * torch.randn(rank * (rank + 1) // 2, **like))
        self.U = nn.Parameter(STD * torch.randn(rank * (rank + 1) // 2, **like))
        if growth.get("start") == "identity":  # older files have no such setting
            half_identity_(self.L, 0, rank)
            half_identity_(self.U, 0, rank)
        # preserve=True multiplies the old D at each growth; this is the product of those factors.
        self.register_buffer("rescale", torch.ones((), dtype=torch.float32, device=base.weight.device))
        # The second term of Eq. 11: the normalised norm at the event before.
        self.register_buffer("reference", torch.zeros((), dtype=torch.float32, device=base.weight.device))
        if not base.weight.is_meta:  # where there are no numbers, only shapes to count
            self.reference.fill_(self.normalised_norm())  # type: ignore[has-type]

    called = weight_read = False  # `merge` looks at these

    # Some models look at their layers (T5 asks for wo.weight.dtype), a few compute with the weight themselves.
    @property
    def weight(self) -> torch.Tensor:
        self.weight_read = True
        return self.base.weight

    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank + EPS)

    @property
    def D(self) -> torch.Tensor:
        """The dense transformation matrix L + U, (r, r)."""
        return lower(self.L, self.rank) + lower(self.U, self.rank).T  # Eq. 4

    @property
    def options(self) -> dict:
        """What `load` gives to __init__."""
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "growth": self.growth}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, r), Q (r, n) with dW = P @ Q, the scaling absorbed in P."""
        return self.scaling * self.B @ self.D, self.A

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["called"] = True  # nn.Module's own way to set it takes a hundred times as long
        x = input  # (..., n), under nn.Linear's name for it: some callers use keywords
        h = F.dropout(x, self.dropout, self.training)  # (..., n)
        h = F.linear(h, self.A.to(x.dtype))  # (..., r)
        h = F.linear(h, self.D.to(x.dtype))  # (..., r)
        # Eq. 5. Scaling B costs m*r numbers, scaling the output would cost m for every token.
        return self.base(x) + F.linear(h, (self.scaling * self.B).to(x.dtype))  # (..., m)

    def _apply(self, fn, recurse=True):
        """.to(dtype), .half(), .cuda() and the like: the base follows, the update stays at least float32."""
        if recurse:
            self.base._apply(fn)
        super()._apply(at_least_float32(fn), recurse=False)
        # Always float32: in float64 what has not changed would no longer score exactly zero.
        self.rescale, self.reference = self.rescale.float(), self.reference.float()  # type: ignore[has-type]
        return self

    @torch.no_grad()
    def normalised_norm(self) -> float:
        """||L + U||_F over r, sqrt(r) or 1 (Table III): the quantity whose change is Eq. 11."""
        divisor = {"r": self.rank, "sqrt": math.sqrt(self.rank), "none": 1.0}[self.growth["normalise"]]
        # With preserve=True grown matrices carry a larger D for the same dW: take that out again.
        # float32, as `reference` is kept: what has not changed scores exactly zero, and ties are ties.
        return (self.D.float().norm() / self.rescale / divisor).item()

    @torch.no_grad()
    def grow(self, added: int) -> list[tuple[nn.Parameter, nn.Parameter, int]]:
        """Eqs. 6-9: the rank rises by `added`. Returns [(old parameter, new one, dim it grew in)]."""
        r, (m, n) = self.rank, self.base.weight.shape
        A_aug = STD * torch.randn(added, n).to(self.A)
        B_aug = STD * torch.randn(m, added).to(self.B)
        # Row by row, the new rows of L are [L_down L_aug]; column by column, those of U [U_up; U_aug].
        border = sum(range(r + 1, r + added + 1))
        L_new = STD * torch.randn(border).to(self.L)
        U_new = STD * torch.randn(border).to(self.U)
        if self.growth.get("start") == "identity":
            half_identity_(L_new, r, added)
            half_identity_(U_new, r, added)
        if self.growth["preserve"]:
            # B_aug = 0 and U_up = 0 add nothing to B D A, and D * factor undoes alpha's new divisor.
            B_aug.zero_()
            row = torch.cat([torch.arange(k) for k in range(r + 1, r + added + 1)]).to(self.U.device)
            U_new[row < r] = 0.0
            factor = (r + added + EPS) / (r + EPS)
            self.L.mul_(factor)
            self.U.mul_(factor)
            self.rescale.mul_(factor)
        changes = []
        for name, new, dim in [("A", A_aug, 0), ("B", B_aug, 1), ("L", L_new, 0), ("U", U_new, 0)]:
            old = getattr(self, name)
            grown = nn.Parameter(torch.cat([old, new], dim), requires_grad=old.requires_grad)
            setattr(self, name, grown)
            changes.append((old, grown, dim))
        return changes

    def _load_from_state_dict(self, state, prefix, *args):
        """A saved layer may have grown: the Parameters, which an optimizer may hold, take its shapes.

        All four fit the base and one rank, or the load is refused and nothing of this layer is touched.
        """
        m, n = self.base.weight.shape
        A = state.get(prefix + "A", self.A)
        rank = A.shape[0] if A.ndim == 2 else self.rank
        triangle = (rank * (rank + 1) // 2,)
        shapes = {"A": (rank, n), "B": (m, rank), "L": triangle, "U": triangle}
        found = {name: tuple(state[prefix + name].shape) for name in shapes if prefix + name in state}
        wrong = [name for name in found if found[name] != shapes[name]]
        wrong += [name for name in shapes if name not in found and rank != self.rank]  # else it stays, if strict=False
        if wrong:
            for name in wrong:
                text = f"size mismatch for {prefix}{name}: {found.get(name, 'missing')}, right is {shapes[name]}"
                args[-1].append(text)  # the last argument collects the errors; load_state_dict raises them
            return
        for name, shape in shapes.items() if rank != self.rank else ():
            p = getattr(self, name)
            grown = p.data.new_empty(shape)  # super() fills it
            p.grad = None
            p.data = p.data.half()  # another dtype for a moment: else a graph that is still alive keeps the old shape
            p.data = grown
        super()._load_from_state_dict(state, prefix, *args)


# -------------------------------------------------- the method's mathematics, as pure functions


def lower(packed: torch.Tensor, rank: int) -> torch.Tensor:
    """The lower triangular (rank, rank) matrix whose rows stand one after the other in `packed`."""
    i, j = torch.tril_indices(rank, rank, device=packed.device)
    return packed.new_zeros(rank, rank).index_put((i, j), packed)


@torch.no_grad()
def half_identity_(packed: torch.Tensor, r: int, added: int) -> None:
    """Turn packed rows r to r + added - 1 of a triangle into those of I / 2: with both, L + U = I."""
    diagonal = [i * (i + 3) // 2 - r * (r + 1) // 2 for i in range(r, r + added)]
    packed.zero_()[diagonal] = 0.5


def orthogonality(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Eq. 10: ||A A^T - I||_F^2 + ||B^T B - I||_F^2 for A (r, n), B (m, r); summed over layers (.., r, n), (.., m, r).

    The paper prints A^T A, an (n, n) product of rank r that cannot be I. The (r, r) one is meant, as
    in AdaLoRA, which it cites.
    """
    return sum(error.square().sum() for error in gram_errors(A, B))  # type: ignore[return-value]


def gram_errors(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A A^T - I and B^T B - I, each (.., r, r), for A (.., r, n) and B (.., m, r)."""
    eye = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    return A @ A.mT - eye, B.mT @ B - eye


def budget_left(rank_ref: int, ranks: Sequence[int]) -> int:
    """Eq. 12: R = r_ref M - r M at the start, less dr k at each growth: r_ref M minus the ranks now."""
    return rank_ref * len(ranks) - sum(ranks)


def event_steps(t0: int, interval: int, total: int) -> range:
    """The steps t at which ranks grow: t0 < t < T, every `interval`. What grew at T would never be trained."""
    return range(t0 + interval, total, interval)


def matrices_to_grow(budget: int, t: int, t0: int, total: int, mode: str, fixed_k: int | None = None) -> int:
    """k, how many matrices the threshold asks for at step t, at least 1 (Eqs. 13, 14).

    linear: ceil(R a), nonlinear: ceil(e^(a ln R)) = ceil(R^a), with a = (t - t0) / (total - t0).
    """
    if mode == "linear":
        k = -(-budget * (t - t0) // (total - t0))  # in integers: ceil(100 * 11 / 20) is 55, not 56
    elif mode == "nonlinear":
        k = math.ceil(budget ** ((t - t0) / (total - t0)) - 1e-9)
    else:
        k = fixed_k
    return max(k, 1)  # type: ignore[return-value, type-var]


def choose_growth(
    scores: Sequence[float], ranks: Sequence[int], limits: Sequence[int], budget: int, k: int, delta: int
) -> list[tuple[int, int]]:
    """[(index, rank to add)] for the k matrices with the highest scores; ties in order.

    The formula can ask for more than there is: never more matrices than can grow, never more rank
    than the budget, and no rank above its limit min(m, n).
    """
    able = [i for i in range(len(ranks)) if ranks[i] < limits[i]]
    if budget < 1 or not able:
        return []
    delta = min(delta, budget)
    k = min(k, len(able), budget // delta)
    top = sorted(able, key=lambda i: -scores[i])[:k]  # Python's sort is stable: ties stay in order
    return [(i, min(delta, limits[i] - ranks[i])) for i in sorted(top)]


def check_optimizer(optimizer: torch.optim.Optimizer, layers: Mapping[str, TriAdaptLinear]) -> None:
    """ValueError, before anything grows, if `optimizer` lacks one of the layers' matrices or cannot grow with it."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        for letter in "ABLU":
            p = getattr(layer, letter)
            if p.requires_grad and p not in held:
                raise ValueError(f"the optimizer does not hold {letter} of layer {name}: make a new one after inject")
            for key, value in optimizer.state.get(p, {}).items():
                # At r = 1 this must be exact: Adafactor's factors for A (1, n) are (1, 1) and (1, n).
                if isinstance(value, list) or (torch.is_tensor(value) and value.shape not in ((), p.shape)):
                    shape = f"of shape {tuple(value.shape)}" if torch.is_tensor(value) else "a list"
                    raise ValueError(
                        f"layer {name} cannot grow under {type(optimizer).__name__}: its {key} for {letter} "
                        f"{tuple(p.shape)} is {shape}; take one with a state of that shape, as AdamW and SGD have"
                    )
    if isinstance(optimizer, torch.optim.LBFGS):  # its state lies at the first parameter, whichever that is
        raise ValueError("layers cannot grow under LBFGS: it keeps a list of parameters of its own; take AdamW or SGD")


@torch.no_grad()
def extend_in_optimizer(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, dim: int) -> None:
    """Put `new` in the place of `old`: the old entries keep their moments, the new ones start at zero.

    The step count is one per tensor and stays. So the first update of a new entry under Adam is the rate times
    (1 - beta1) / (1 - beta1^t) / sqrt((1 - beta2) / (1 - beta2^t)), t the steps with that one: 0.48 of the rate
    after 10 steps, 0.98 after 100, 2.5 after 1,000 and at most (1 - beta1) / sqrt(1 - beta2) = 3.2 late in a run.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return  # no step taken yet
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == old.shape:
            shape = list(new.shape)
            shape[dim] -= old.shape[dim]
            state[key] = torch.cat([value, value.new_zeros(shape)], dim)
    optimizer.state[new] = state


# ------------------------------------------------------------------------- the verbs


def inject(
    model,  # no types for these three: `check_options` reads those that the signature has
    targets,
    exclude=(),
    *,
    rank: int = 1,
    rank_ref: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    delta: int = 4,
    interval: int = 50,
    t0: int = 50,
    mode: Literal["linear", "nonlinear", "fixed"] = "linear",
    fixed_k: int = 4,
    normalise: Literal["r", "sqrt", "none"] = "r",
    start: Literal["gaussian", "identity"] = "gaussian",
    preserve: bool = False,
    orth: float = 0.1,
    orth_form: Literal["sum", "mean"] = "sum",
):
    """Freeze `model` and wrap every nn.Linear whose dotted name ends in one of `targets`.

    A target that is a layer's full name means that layer alone; `exclude` names, in the same words, layers
    to leave as they are. The task head is frozen too: unfreeze it afterwards. Returns the names wrapped, in
    the model's order. ValueError if a target matches nothing or a rank does not fit a layer.

    Options:
        rank: rank r every layer starts with
        rank_ref: reference rank: the budget is rank_ref times the number of layers
        alpha: the update is scaled by alpha / (r + 1e-5), r the layer's rank now
        dropout: dropout on the adapter's input
        delta: by how much a chosen layer grows
        interval: steps between growth events; the paper's 100 to 1000 are for runs of thousands of steps
        t0: step after which growth begins
        mode: how many layers grow (Eq. 13, Eq. 14, or always fixed_k)
        fixed_k: layers that grow per event with mode fixed
        normalise: what the importance divides ||L + U|| by (Table III)
        start: what L and U hold before they are trained, at growth too: Gaussian entries, or L + U = I
        preserve: growth leaves the function as it was (the paper's does not)
        orth: coefficient of the orthogonality penalty, 0 turns it off
        orth_form: sum over layers of squared norms (Eq. 10 as printed), or the mean of
            unsquared norms over all A and B (AdaLoRA's code)
    """
    linears = find_linears(model, targets, exclude)
    for name, linear in linears.items():
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(
                f"rank {rank} does not fit layer {name} {tuple(linear.weight.shape)}: "
                f"allowed are 1 to {min(linear.weight.shape)}, or exclude it"
            )
    growth = check_options(locals())
    model.requires_grad_(False)
    for name, linear in linears.items():
        replace(model, name, TriAdaptLinear(linear, rank, alpha, dropout, growth).train(linear.training))
    return list(linears)


LEAST = {"delta": 1, "interval": 1, "fixed_k": 1, "t0": 0, "orth": 0}


def check_options(options: dict) -> dict:
    """{option: value}: what `inject` was given of the growth settings. Their kinds stand in its signature alone."""
    words = {int: "a whole number", float: "a finite number", bool: "True or False"}
    growth = {}
    for name, kind in inject.__annotations__.items():
        value = options[name]
        if get_args(kind) and value not in get_args(kind):
            raise ValueError(f"{name} '{value}' is not one of {', '.join(get_args(kind))}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if kind in words and not (number if kind is float else type(value) is kind):
            raise ValueError(f"{name} {value!r} is not {words[kind]}")
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{name} {value} is below {LEAST[name]}")
        growth[name] = value
    rank, dropout, _ = (growth.pop(name) for name in ("rank", "dropout", "alpha"))  # these are each layer's own
    if growth["rank_ref"] < rank:
        raise ValueError(f"rank_ref {growth['rank_ref']} is below the start rank {rank}: there is no budget to grow")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")
    return growth


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW: whatever is trainable (A, B, L, U, the task head), one rate, one decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


def wrapped_layers(model: nn.Module) -> dict[str, TriAdaptLinear]:
    """{dotted name: TriAdaptLinear}, in the model's order. ValueError if there is none, or if their settings differ."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TriAdaptLinear)}
    if not layers:
        raise ValueError("the model holds no TriAdaptLinear: inject first (or merged already?)")
    growth = next(iter(layers.values())).growth
    for name, layer in layers.items():
        if layer.growth != growth:
            raise ValueError(f"layer {name} has other settings than the first: take each injected part of the model by itself")
    return layers


def penalty(model: nn.Module) -> torch.Tensor:
    """The orthogonality term of the loss, a scalar: orth times Eq. 10 summed over layers, or its mean form.

    AdaLoRA's and IncreLoRA's code, where coefficients of 0.1-0.3 come from, takes the mean norm, which is
    far smaller. The default is the equation as printed.
    """
    layers = list(wrapped_layers(model).values())
    growth = layers[0].growth
    if growth["orth"] == 0:
        return torch.zeros((), device=layers[0].A.device)
    alike = {}  # layers of one shape are one batch of products
    for layer in layers:
        alike.setdefault((layer.A.shape, layer.B.shape, layer.A.device), []).append(layer)
    home = layers[0].A.device
    with torch.autocast(home.type, enabled=False):  # bfloat16 would round the small errors away next to the 1 on the diagonal
        stacks = [[torch.stack([getattr(layer, x) for layer in group]) for x in "AB"] for group in alike.values()]
        if growth["orth_form"] == "sum":
            return growth["orth"] * sum(orthogonality(A, B).to(home) for A, B in stacks)
        norms = [torch.linalg.matrix_norm(error).to(home) for A, B in stacks for error in gram_errors(A, B)]
        return growth["orth"] * torch.cat(norms).mean()


def after_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> dict | None:
    """Grow where and when the method says so; call it after each optimizer step, counted from 1.

    Returns None, or at an event {"grown": {name: new rank}, "scores": {name: S}, "budget": what is left}.
    The layers that grew have new Parameters then: a list of parameters made before is stale. In one process, layers
    that have never run, as those of a tower without a loss, stay as they are and add nothing to the budget. Raises
    before anything grows: ValueError for an optimizer that cannot grow and for a run that ends before growth begins,
    FloatingPointError for a score that is no number. A run too short for any event is warned of at step 1.

    With several processes (torch.distributed) all grow alike, or a ValueError says that they have drifted apart.
    DistributedDataParallel does not know the new Parameters: give this its `module`, and wrap that anew at an event.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel would not train what grows: give after_step its module, and at an event wrap that anew"
        )
    layers = wrapped_layers(model)
    if not several():  # another process may run others. And DataParallel runs copies: then none is known to have run.
        layers = {name: layer for name, layer in layers.items() if layer.called} or layers
    growth = next(iter(layers.values())).growth
    for name, value in (("step", step), ("total", total)):
        if type(value) is not int:
            raise ValueError(f"{name} {value!r} is not a whole number")
    t0, interval = growth["t0"], growth["interval"]
    events = event_steps(t0, interval, total)
    if step != 1 and step not in events:  # the first step says what is wrong before hours are lost
        return None
    names, ranks = list(layers), [layer.rank for layer in layers.values()]
    limits = [min(layer.base.weight.shape) for layer in layers.values()]
    budget = budget_left(growth["rank_ref"], ranks)
    if budget < 1 or all(r >= limit for r, limit in zip(ranks, limits)):
        return None
    if total <= t0:
        raise ValueError(f"t0 {t0} is not below the {total} steps of the run: growth would begin after its end")
    if not events:
        warnings.warn(f"no layer will grow: the first event is at t0 + interval = {t0 + interval}, "
                      f"the run ends at {total}", stacklevel=2)  # fmt: skip
    check_optimizer(optimizer, layers)
    if step not in events:
        return None
    norms = [layer.normalised_norm() for layer in layers.values()]  # all before any growth
    scores = [now - layer.reference.item() for now, layer in zip(norms, layers.values())]  # Eq. 11
    for name, score in zip(names, scores):
        if not math.isfinite(score):
            raise FloatingPointError(f"score {score} of layer {name} at step {step}: its L + U is not finite")
    for now, layer in zip(norms, layers.values()):
        layer.reference.fill_(now)
    k = matrices_to_grow(budget, step, t0, total, growth["mode"], growth["fixed_k"])
    chosen = choose_growth(scores, ranks, limits, budget, k, growth["delta"])
    check_alike((scores, ranks))
    for i, added in chosen:
        for old, new, dim in layers[names[i]].grow(added):
            share(new)
            extend_in_optimizer(optimizer, old, new, dim)
    return {
        "grown": {names[i]: ranks[i] + added for i, added in chosen},
        "scores": dict(zip(names, scores)),
        "budget": budget - sum(added for _, added in chosen),
    }


def several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_alike(value: tuple) -> None:
    """ValueError if another process has another `value`."""
    if several():
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        if any(other != value for other in found):
            raise ValueError(
                "the processes have drifted apart: their scores or ranks differ (what an event grew must be wrapped anew)"
            )


def share(parameter: nn.Parameter) -> None:
    """Make a Parameter in every process what it is in the first."""
    if several():
        dist.broadcast(parameter.data, 0)


def watch(model: nn.Module) -> dict[str, dict[str, float]]:
    """{quantity: {layer name: number}}, what is worth seeing during and after a run."""
    layers = wrapped_layers(model)
    return {
        "ranks": {name: layer.rank for name, layer in layers.items()},
        "importance": {name: layer.normalised_norm() - layer.reference.item() for name, layer in layers.items()},
    }


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Fold dW into W0 and give the plain nn.Linear back; returns the names merged.

    Summed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped,
    so a second merge is refused, and as `check_mergeable` says.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, TriAdaptLinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no TriAdaptLinear (merged already?)")
    check_mergeable(wrapped)
    for name, layer in wrapped.items():
        with torch.autocast(layer.base.weight.device.type, enabled=False):  # which would make the products bfloat16
            P, Q = layer.factors()
            layer.base.weight.copy_(layer.base.weight + P @ Q)  # P @ Q is float32 at least, and so is the sum
        replace(model, name, layer.base)
    return list(wrapped)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter alone: all that is trained (the task head too), what was drawn, and how to wrap it again.

    safetensors if that is installed, else a file of torch.save, in a new folder if need be. What is frozen is
    not in it, a frozen head neither, but what BatchNorms counted. Under fully_shard every process has to call
    it. ValueError if `path` is a folder, if nothing is wrapped.
    """
    # Their names are no part of the layers'.
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel", "AveragedModel"):
        model = next(model.children())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TriAdaptLinear)}
    if not layers:
        raise ValueError("nothing to save: the model holds no TriAdaptLinear (merged already?)")
    if others := [name for name, m in model.named_modules() if hasattr(m, "factors") and name not in layers]:
        raise ValueError(f"layer {others[0]} is adapted by another method: save each part of the model by itself")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {f"{name}.{key}": t for name, layer in layers.items() for key, t in own_state(layer).items()}
    options = {name: layer.options for name, layer in layers.items()}
    tensors = trained | own | running_statistics(model)
    write_adapter(path, tensors, {"method": "triadapt", "layers": options, "trained": list(trained)})


def load(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Wrap the layers of a base model as those of the saved one were, and fill them; returns their names.

    The model is ready for more training or for `merge`. Build the optimizer afterwards. ValueError, before
    anything is changed, if the file is another method's or does not fit the model.
    """
    tensors, metadata = read_adapter(path, "triadapt")
    layers = {}
    for name, linear in find_saved(model, path, metadata["layers"]).items():
        layers[name] = TriAdaptLinear(linear, **metadata["layers"][name]).train(linear.training)
    place_saved(model, path, layers, tensors, metadata["trained"])
    return list(layers)


# ------------------------------------- walking the modules, and files (the same in every file)


def find_linears(model: nn.Module, targets: Collection[str], exclude: Collection[str] = ()) -> dict[str, nn.Linear]:
    """{dotted name: nn.Linear} for the layers that `targets` name and `exclude` does not. ValueError as `inject` says."""
    modules = dict(model.named_modules())
    adapted = [name for name, m in modules.items() if hasattr(m, "factors")]
    if adapted:
        raise ValueError(f"the model is adapted already ({adapted[0]}): merge it first")
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    named = match(modules, targets, "target")
    found = named - match(modules, exclude, "exclude")
    if not found:
        raise ValueError("every layer that the targets name is excluded" if named else "no targets given")
    owners = {}  # parameter -> the modules that hold it, a module with two names twice
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(name)
    for name in sorted(found):
        weight, parent = linears[name].weight, type(modules[name.rpartition(".")[0]])
        # Packed 4- and 8-bit numbers are a class or a dtype of their own; a parametrized weight is no Parameter.
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            kind = f"a {type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"layer {name} is not adapted: its weight is {kind}, not a plain Parameter of 16 bits or more: "
                "load the model unquantised, or exclude the layer"
            )
        if weight.is_meta and hasattr(linears[name], "_hf_hook"):
            raise ValueError(f"layer {name} is not adapted: accelerate keeps its weight elsewhere: load without offloading")
        if len(owners[weight]) > 1:
            raise ValueError(f"layer {name} is not adapted: {owners[weight]} share its weight")
        if issubclass(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"layer {name} is not adapted: nn.{parent.__name__} reads its weight, not calling it")
    if share := experts_share(modules):
        warnings.warn(f"{share:.0%} of the blocks' numbers are experts kept as 3-D parameters: these are not adapted")
    return {name: linear for name, linear in linears.items() if name in found}


def match(modules: Mapping[str, nn.Module], words: Collection[str], option: str) -> set[str]:
    """The set of nn.Linear names that end in one of `words`; a word that is a layer's full name means that layer alone."""
    found = set()
    linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    for word in [words] if isinstance(words, str) else words:
        hits = [word] if word in linears else [name for name in linears if name.endswith("." + word)]
        if not hits:
            kinds = [type(m).__name__ for name, m in modules.items() if f".{name}".endswith(f".{word}")]
            wrong = f"is a {kinds[0]}, no nn.Linear" if kinds else "matches no nn.Linear"
            ends = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(f"{option} '{word}' {wrong}; names end in: {', '.join(ends)}")
        found.update(hits)
    return found


def experts_share(modules: Mapping[str, nn.Module]) -> float:
    """Which share of the numbers in the blocks (what is inside an nn.ModuleList) stands in 3-D parameters.

    Mixtral and Qwen-MoE keep their experts so, as one parameter (experts, m, n). Convolutions are 3-D as well.
    """
    lists = tuple(name + "." for name, m in modules.items() if isinstance(m, nn.ModuleList))
    numbers = {False: 0, True: 0}
    for name, module in modules.items():
        if name.startswith(lists):
            for p in module.parameters(recurse=False):
                numbers[p.ndim == 3 and not type(module).__module__.startswith("torch.")] += p.numel()
    return numbers[True] / max(sum(numbers.values()), 1)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` points to."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def at_least_float32(move: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`move`, what .to(), .half(), .cuda() and the like do to a tensor, but that nothing gets narrower than float32."""

    def moved(t):
        new = move(t)
        wide = torch.promote_types(new.dtype, torch.float32) if new.is_floating_point() else new.dtype
        return new if new.dtype == wide else t.to(new.device, wide)

    return moved


def check_mergeable(layers: Mapping[str, nn.Module]) -> None:
    """ValueError if folding a layer's update into W0 would not keep what the model computes.

    Its numbers are in shards (fully_shard), or its base is no W0 x + b (BitNet's, a hook), or the model computes with the
    weight (Mamba's dt_proj) instead of calling the layer, whose update had no part: not known before a forward pass.
    """
    called = any(layer.called for layer in layers.values())
    if not called and (read := [name for name, layer in layers.items() if layer.weight_read]):
        warnings.warn(f"layer {read[0]} was read and no adapted layer called: if the model has run, its update did nothing")
    for name, layer in layers.items():
        base, W, b = layer.base, layer.base.weight, layer.base.bias
        if any(hasattr(p, "full_tensor") for p in layer.parameters()):
            raise ValueError(f"layer {name} is in shards: save in every process, load on a whole base, and merge there")
        if not W.is_meta and (b is None or b.dtype == W.dtype):  # others run under autocast alone
            x = torch.linspace(-1, 1, base.in_features).to(W)[None, None]  # a batch: hooks may index it
            wanted = F.linear(x, W, b).float()
            if (base(x).float() - wanted).norm() > 0.05 * wanted.norm():
                raise ValueError(f"layer {name} is not to be merged: its base, a {type(base).__name__}, computes no W0 x + b")
        if called and layer.weight_read and not layer.called:
            raise ValueError(
                f"layer {name} is read and never called, so its update did nothing and is not to be merged: "
                f"train with exclude=['{name.rpartition('.')[2]}'], or put {name}.base in its place"
            )


def write_adapter(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict) -> None:
    """One file, as safetensors if that is installed, else as torch's. A temporary name first: a kill leaves no half."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a file in it")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}  # of fully_shard
    # Copies: safetensors refuses parameters that share memory. _orig_mod: torch.compile's name for a block it has compiled.
    tensors = {name.replace("_orig_mod.", ""): t.detach().to("cpu", copy=True).contiguous() for name, t in whole.items()}
    metadata = {key: json.dumps(value).replace("_orig_mod.", "") for key, value in metadata.items()}
    temporary = f"{path}.{os.getpid()}.tmp"  # every process may save
    try:
        from safetensors.torch import save_file
    except ImportError:
        torch.save({"tensors": tensors, "metadata": metadata}, temporary)
    else:
        save_file(tensors, temporary, metadata)
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_adapter(path: str | os.PathLike[str], method: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, metadata) of a file of `write_adapter`; no code in it is run. ValueError if it is not `method`'s."""
    try:
        with open(path, "rb") as f:
            zipped = f.read(2) == b"PK"  # as torch's files are, and safetensors' are not
        if zipped:
            file = torch.load(path, "cpu", weights_only=True)
            tensors, metadata = file.get("tensors"), file.get("metadata")
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as f:
                tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    except Exception as e:  # no such file, no safetensors, damaged: each raises a kind of its own
        raise ValueError(f"{path} cannot be read: {e}".splitlines()[0]) from None
    if not {"method", "layers", "trained"} <= set(metadata or ()):
        raise ValueError(f"{path} is not a file that `save` wrote")
    metadata = {key: json.loads(value) for key, value in metadata.items()}
    if metadata["method"] != method:
        raise ValueError(f"{path} is an adapter of {metadata['method']}, not of {method}")
    return tensors, metadata


def find_saved(model: nn.Module, path: str | os.PathLike[str], names: Collection[str]) -> dict[str, nn.Linear]:
    """{name: nn.Linear} for the layers `names` of an adapter file. ValueError if the model lacks one."""
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(modules.get(name), nn.Linear) and not hasattr(modules.get(name), "factors"):
            raise ValueError(f"{path} does not fit: it adapts {name}, and the model has no nn.Linear of that name")
    linears = find_linears(model, names)
    if any(linear.weight.is_meta for linear in linears.values()):
        raise ValueError("the model is on the meta device, without numbers: load its own first, then the adapter")
    return linears


def place_saved(
    model: nn.Module,
    path: str | os.PathLike[str],
    layers: Mapping[str, nn.Module],
    tensors: dict[str, torch.Tensor],
    trained: Collection[str],
) -> None:
    """Put the new `layers` into the model, then `tensors` into both. ValueError before anything of the model changes."""
    have = dict(model.named_parameters()) | running_statistics(model)
    for name, layer in layers.items():
        have.update({f"{name}.{key}": t for key, t in layer.state_dict().items()})
    need = {f"{name}.{key}" for name, layer in layers.items() for key in own_state(layer)}
    for key in sorted(need | tensors.keys()):
        found, right = (tuple(side[key].shape) if key in side else "missing" for side in (tensors, have))
        if found != right:
            raise ValueError(f"{path} does not fit: {key} is {found} in the file, {right} in the model")
    for name, layer in layers.items():
        replace(model, name, layer)
    model.load_state_dict(tensors, strict=False)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the BatchNorms keep of the batches they saw, {name: buffer}: no gradient trains it, and eval mode computes with it."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    return {f"{name}.{key}": t for name, m in norms.items() for key, t in m.named_buffers()}


def own_state(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What an adapted layer holds beside its base: {name: tensor}, parameters and buffers."""
    return {key: t for key, t in layer.state_dict().items() if not key.startswith("base.")}


# -------------------------------------------------------------------------- the demo


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    x = torch.randn(512, 64)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():  # only the middle layer has something to learn, an update of rank 6
        teacher[2].weight += torch.randn(64, 6) @ torch.randn(6, 64) / 8
        y, before = teacher(x), model(x)
    names = inject(model, ["0", "2", "4"], rank_ref=4, delta=2, interval=60, t0=60, alpha=8.0, orth=0.01)
    print("output unchanged at the start:", torch.equal(model(x), before))
    print(f"ranks {watch(model)['ranks']}, budget {4 * len(names)} in all; the middle layer is the one that is off")
    optimizer = torch.optim.AdamW(param_groups(model, lr=5e-3, weight_decay=0.0))
    total, grown = 600, {}
    for step in range(1, total + 1):
        loss = F.mse_loss(model(x), y)
        if step == 1 or step % 100 == 0:
            print(f"  step {step:3d}  loss {loss.item():.5f}")
        optimizer.zero_grad()
        (loss + penalty(model)).backward()
        optimizer.step()
        if event := after_step(model, optimizer, step, total):
            scores = "  ".join(f"{n}{'*' * (n in grown)}: {score:+.4f}" for n, score in event["scores"].items())
            print(f"  step {step:3d}  scores  {scores}  -> new ranks {event['grown']}, budget left {event['budget']}")
            grown = event["grown"]
    print(f"ranks {watch(model)['ranks']}; * grew at the event before: ||L + U|| is divided by a larger r, so it scores low")
    adapted = model(x)
    merge(model)
    print(f"merged into {model[2]}: largest difference {(model(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
