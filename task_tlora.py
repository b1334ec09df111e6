"""Task-aware TLoRA: Task-aware Low Rank Adaptation (Lin et al. 2026, arXiv 2604.18124).

LoRA whose A is not drawn but computed: before training the model looks at N samples of the task.

    h = W0 x + s_i B A x        A (r_i, n) frozen, B (m, r_i) trained from zero        (Eq. 1)

With A frozen, updates of W0 stay in the row space of A, so that space has to be right: a step of SGD
from B = 0 makes dW = -eta s_i^2 dL/dW A^T A (Eq. 2; the paper forgets one s_i, that of dL/dB). A is
the top r_i right singular vectors of W0 C, C the second moment of the layer's input (Eq. 4). A layer
that matters more to the loss (Eq. 5) gets more of the ranks (Eq. 6) and a larger scale s_i (Eq. 7):
r_i m trained numbers per layer. This file needs torch alone; copy it and call

    plan = calibrate(model, ["q_proj", "v_proj"], batches, loss_fn, rank=8, alpha=16.0)
    names = inject(model, ["q_proj", "v_proj"], plan=plan)
    model.score.requires_grad_(True)    # the task head, whatever its name: inject froze it too
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.0))
    ...                                 # train as usual
    save(model, "adapter.safetensors")  # `load` puts it on the base model again
    merge(model)                        # back to plain nn.Linear layers

The authors' code (github.com/Rambo-Yi/TLora) differs from their paper: it centres each sample
(`center=True`), its scripts calibrate on 256 samples, the largest layer gets what rounding loses, the
scale is max(alpha, round(L alpha p_i)) / r_init, never below LoRA's, and A is not frozen (`train_a=True`).

`python task_tlora.py` shows it on two layers.
"""

import contextlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Allocation:
    """What one layer gets. A (rank, n), or None: drawn as LoRA draws it. Rank 0: no adapter."""

    rank: int
    scaling: float  # s_i = alpha_i / r_i
    A: torch.Tensor | None = None
    score: float = 0.0  # S_i of Eq. 5; zero where nothing was measured
    share: float = 0.0  # p_i = S_i / sum_j S_j
    spectrum: tuple = ()  # the eigenvalues of C_i, largest first; empty where they were not asked for


class TaskTLoRALinear(nn.Module):
    """A frozen nn.Linear with the update s_i B A. Input (..., n), output (..., m)."""

    def __init__(self, base: nn.Linear, allocation: Allocation, train_a: bool, dropout: float):
        super().__init__()
        m, n = base.weight.shape
        rank = allocation.rank
        # At least float32, whatever the base: a step of 1e-4 is rounded away beside a bfloat16 weight of 0.1.
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.base = base
        self.scaling, self.dropout = allocation.scaling, dropout
        # For `watch` alone.
        self.share = nn.Buffer(torch.tensor(allocation.share, dtype=torch.float32, device=base.weight.device))
        A = torch.empty(rank, n, **like)
        if allocation.A is None:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as baselines/lora.py: uniform on +-1/sqrt(n)
        else:
            A.copy_(allocation.A)
        self.A = nn.Parameter(A) if train_a else nn.Buffer(A)
        self.B = nn.Parameter(torch.zeros(m, rank, **like))

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
    def options(self) -> dict:
        """What `load` gives to __init__; the score behind the share is not kept."""
        allocation = {"rank": self.rank, "scaling": self.scaling, "share": self.share.item()}
        return {"allocation": allocation, "train_a": "A" in self._parameters, "dropout": self.dropout}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, r), Q (r, n) with dW = P @ Q, the scaling absorbed in P."""
        return self.scaling * self.B, self.A

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["called"] = True  # nn.Module's own way to set it takes a hundred times as long
        x = input  # (..., n), under nn.Linear's name for it: some callers use keywords
        h = F.dropout(x, self.dropout, self.training)  # (..., n)
        h = F.linear(h, self.A.to(x.dtype))  # (..., r)
        # Eq. 1. Scaling B costs m*r numbers, scaling the output would cost m for every token.
        return self.base(x) + F.linear(h, (self.scaling * self.B).to(x.dtype))  # (..., m)

    def _apply(self, fn, recurse=True):
        """.to(dtype), .half(), .cuda() and the like: the base follows, the update stays at least float32."""
        if recurse:
            self.base._apply(fn)
        return super()._apply(at_least_float32(fn), recurse=False)

    # The scaling is a Python float: a buffer would be rounded by .to(torch.bfloat16). These two, which
    # state_dict and load_state_dict call, keep it with the weights, in float64.
    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.scaling, dtype=torch.float64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scaling = state.item()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Ranks differ between layers and runs: take the stored one, if the stored A and B fit the layer."""
        A, B = state_dict.get(prefix + "A"), state_dict.get(prefix + "B")
        if A is not None and B is not None and A.ndim == 2 and len(A) != self.rank:
            if A.shape == (len(A), self.in_features) and B.shape == (self.out_features, len(A)):
                for own, stored in ((self.A, A), (self.B, B)):
                    new = own.data.new_empty(stored.shape)
                    own.data = own.data.half()  # another dtype for a moment: else a graph that is alive keeps the old shape
                    own.data, own.grad = new, None
        super()._load_from_state_dict(state_dict, prefix, *args)


# ---------------------------------------------------------------- what the samples tell


def sensitivity(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Eq. 5: S(W) = mean of |w dL/dw| over the entries of W (m, n). Float32 at least; a 0-dim tensor."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) * gradient.to(dtype)).abs().mean()


def covariance(X: torch.Tensor, center: bool = False) -> torch.Tensor:
    """X^T X (n, n) of a layer's input X (..., n), summed over the tokens, in float32 at least.

    Uncentred, as Algorithm 1 writes it; Eq. 8 says Cov: `center` subtracts the mean of the tokens.
    """
    with torch.autocast(X.device.type, enabled=False):  # which would make the product bfloat16
        X = X.reshape(-1, X.shape[-1]).to(torch.promote_types(X.dtype, torch.float32))
        if center:
            X = X - X.mean(0)
        return X.mT @ X


@contextlib.contextmanager
def only_looking(model: nn.Module) -> Iterator[list]:
    """Eval mode, nothing trains. Gives a list for hooks; afterwards they are gone and all is as it was."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    hooks = []
    try:
        model.eval().requires_grad_(False)
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def on_input(linear: nn.Linear, see: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """A hook that calls see(X) with the layer's input X (..., n) whenever the layer runs."""
    take = lambda linear, args, named: see(args[0] if args else named["input"])  # noqa: E731
    return linear.register_forward_pre_hook(take, with_kwargs=True)


def check_loss(loss: object, count: int) -> None:
    """ValueError if what loss_fn gave for sample `count` is no finite scalar."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"the loss of calibration sample {count} is {found}: it must be a scalar tensor")
    if not loss.isfinite():
        raise ValueError(f"the loss of calibration sample {count} is {loss.item()}")


def see_gradients(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Iterable, loss_fn: Callable[..., torch.Tensor]
) -> tuple[list[float], list]:
    """Algorithm 1's S: the list of S_i, from one forward and backward pass per batch, and the batches as a list.

    A layer that no batch runs has S_i = 0. One that runs and can get no gradient is an error, not a zero.
    """
    scores, seen = dict.fromkeys(linears, 0.0), []
    reached, dark = set(), set()  # the layers that a gradient came to; those that ran with gradients off

    def see_input(name, X):
        if not X.isfinite().all():
            raise ValueError(f"layer {name} gets NaN or infinity as input")
        if not torch.is_grad_enabled():
            dark.add(name)

    def see_gradient(name, weight):
        score = sensitivity(weight.detach(), weight.grad).item()
        weight.grad = None  # before backward makes the next layer's: one at most is alive
        if not math.isfinite(score):
            raise ValueError(f"the gradient of layer {name} has NaN or infinity")
        scores[name] += score
        reached.add(name)

    with only_looking(model) as hooks:
        for name, linear in linears.items():
            weight = linear.weight.requires_grad_(True)
            weight.grad = None
            hooks.append(on_input(linear, partial(see_input, name)))
            hooks.append(weight.register_post_accumulate_grad_hook(partial(see_gradient, name)))
        for batch in batches:
            seen.append(batch)
            with torch.enable_grad():
                loss = loss_fn(model, batch)
            check_loss(loss, len(seen))
            if loss.requires_grad:  # not if the sample passed by every target
                loss.backward()
    if not seen:
        raise ValueError("there is no sample to calibrate on")
    # Reentrant checkpointing runs with gradients off, too, but then a gradient comes: unless its input has none.
    lost = [name for name in linears if name not in reached and (name in dark or not reached)]
    if lost:
        raise ValueError(
            f"no gradient reaches layer {lost[0]} ({len(lost)} of {len(linears)} layers): no sample runs it, the loss "
            "is detached, gradients are off (no_grad, inference_mode), or checkpointing needs use_reentrant=False"
        )
    return [S / len(seen) for S in scores.values()], seen


@torch.no_grad()
def see_inputs(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence,
    loss_fn: Callable[..., torch.Tensor],
    center: bool,
    idle: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Algorithm 1's C: {name: C_i (n, n)}, each where its layer computes, from forward passes alone.

    `idle` are the layers that may have no input: C is zero then. ValueError if another has none.

    Apart from the gradients, because a forward pass per group of layers costs less than holding all C at
    once, and because activation checkpointing runs a layer twice per backward pass.
    """
    covariances = {}

    def see_input(name, X):
        C = covariance(X.detach(), center)
        covariances[name] = covariances[name].add_(C) if name in covariances else C
        if not covariances[name].diagonal().isfinite().all():  # no entry of C is above its largest diagonal one
            raise ValueError(f"layer {name} gets values too large to square as input")

    with only_looking(model) as hooks:
        hooks.extend(on_input(linear, partial(see_input, name)) for name, linear in linears.items())
        for batch in batches:
            loss_fn(model, batch)
    for name in [name for name in linears if name not in covariances]:
        if name not in idle:
            raise ValueError(
                f"layer {name} gets a gradient and is never seen to run: the model reads its weight instead of calling it "
                "(exclude it), or was compiled and has run before (calibrate the model that torch.compile was given)"
            )
        covariances[name] = covariance(linears[name].weight.new_zeros(1, linears[name].in_features))
    for C in covariances.values():
        C /= len(batches)
    return covariances


def in_parts(linears: Mapping[str, nn.Linear], memory: int) -> Iterator[dict[str, nn.Linear]]:
    """`linears` in consecutive dicts, each as long as its C take at most `memory` bytes; one layer at least."""
    part, size = {}, 0
    for name, linear in linears.items():
        C = linear.in_features**2 * max(4, linear.weight.element_size())
        if part and size + C > memory:
            yield part
            part, size = {}, 0
        part[name] = linear
        size += C
    if part:
        yield part


# ------------------------------------------------------------------- ranks and scalings


def shares(scores: Sequence[float]) -> list[float]:
    """p_i = S_i / sum_j S_j as a list; all equal if every score is zero."""
    largest = max(scores)
    scores = [S / largest if largest else 1.0 for S in scores]  # huge ones have no sum in floats
    total = sum(scores)
    return [S / total for S in scores]


def allocate_ranks(scores: Sequence[float], budget: int, caps: Sequence[int]) -> list[int]:
    """Eq. 6: r_i = round(R_total p_i) as a list, with 0 <= r_i <= caps[i] and sum r_i = R_total = `budget`.

    Rounding each alone breaks the budget: the largest remainders are rounded up, as many as it takes
    (the same, where rounding keeps the budget). What a cap frees goes to the other layers, by their
    scores. A budget above the sum of the caps is clipped, with a warning.
    """
    if budget > sum(caps):
        warnings.warn(f"a total rank of {budget} is more than the layers can hold: clipped to {sum(caps)}")
    ranks, rest = [0] * len(caps), list(range(len(caps)))
    while rest:
        quotas = {i: budget * p for i, p in zip(rest, shares([scores[i] for i in rest]))}
        full = [i for i in rest if quotas[i] >= caps[i]]
        if not full:
            break
        for i in full:  # which only raises the other quotas: none of these would come back
            ranks[i] = caps[i]
            budget -= caps[i]
            rest.remove(i)
    for i in rest:
        ranks[i] = math.floor(quotas[i])
        budget -= ranks[i]
    for i in sorted(rest, key=lambda i: ranks[i] - quotas[i])[:budget]:  # ties in the model's order
        ranks[i] += 1
    return ranks


def scalings(scores: Sequence[float], ranks: Sequence[int], rank: int, alpha: float, adapt_scale: bool = True) -> list[float]:
    """s_i = alpha_i / r_i as a list.

    Eq. 7: alpha_i = r_i (alpha_total / r_init) p_i with alpha_total = L alpha, so s_i = L (alpha / rank) p_i.
    Without scale adaptation s_i = alpha / r_i: the more important the layer, the smaller (Sec. 3.3).
    """
    if not adapt_scale:
        return [alpha / r if r else 0.0 for r in ranks]
    equal = 1 / len(scores)
    return [alpha / rank * (p / equal) for p in shares(scores)]  # p = 1 / L gives alpha / rank to the bit


# ---------------------------------------------------------------------------- what A is


def exact_vectors(M: torch.Tensor, r: int) -> torch.Tensor:
    """The first r right singular vectors of M (m, n), as rows (r, n)."""
    return torch.linalg.svd(M, full_matrices=False).Vh[:r]


def fast_vectors(M: torch.Tensor, r: int) -> torch.Tensor:
    """The same space without the full SVD, where that is the faster way; otherwise by the full SVD.

    (Block Krylov, Musco & Musco 2015, arXiv 1504.05477.) `width` random columns are multiplied by
    M^T M again and again, and the singular vectors are sought in the span of all k columns seen. The
    last ones alone take more than 50 steps where sigma_r = 1.05 sigma_(r+1) and the rest is flat; all
    of them take about log n. bench/svd.md shows times and agreement.
    """
    m, n = M.shape
    width = r + 8
    steps = n.bit_length() + 2
    k = width * (steps + 1)
    if k > 5 / 8 * min(m, n):  # from about 2/3 on, the full SVD takes less time (bench/svd.md)
        return exact_vectors(M, r)
    # A generator of its own: what the run draws does not depend on it.
    start = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=M.dtype, device="cpu")
    blocks = [start.to(M.device)]
    for _ in range(steps):
        blocks.append(torch.linalg.qr(M.mT @ (M @ blocks[-1])).Q)  # (n, width)
    Q = torch.linalg.qr(torch.cat(blocks, dim=1)).Q  # (n, k)
    return exact_vectors(M @ Q, r) @ Q.mT


def in_float64(T: torch.Tensor) -> torch.Tensor:
    """T in float64, because C squares the spread of the activations' scales. On the CPU or on CUDA: MPS has none."""
    return (T if T.is_cuda else T.cpu()).double()


def square_roots(C: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """(C + eps I)^(1/2) and its inverse, both (n, n). eps is absolute, as in Appendix A."""
    values, vectors = torch.linalg.eigh(C)
    root = (values.clamp_min(0) + eps).sqrt()  # C has no negative ones, but rounding has
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def init_A(W: torch.Tensor, C: torch.Tensor, r: int, init: str = "wc", svd: str = "fast") -> torch.Tensor:
    """A (r, n) from W (m, n) and C (n, n). Its rows are orthonormal, except with "theory".

    wc      Eq. 4: A = V_r^T of W C. The method.
    theory  Eqs. 3, 16: A = V_r^T C^(-1/2), V_r of W C^(1/2). Optimal on paper (Appendix A), but it
            divides by the small eigenvalues of C, of which there are many: the paper sees it diverge.
    w       V_r^T of W alone (Appendix D.2).
    """
    vectors = {"exact": exact_vectors, "fast": fast_vectors}[svd]
    if init == "w":
        return vectors(W, r)
    if init == "theory":
        root, inverse_root = square_roots(C)
        return vectors(W @ root, r) @ inverse_root
    # The scale of C does not change the vectors, but squared it could leave the range of floats.
    return vectors(W @ (C / C.abs().max().clamp_min(torch.finfo(C.dtype).tiny)), r)


# ------------------------------------------------------------------------- the verbs


@torch.random.fork_rng(devices=())  # a shuffling DataLoader draws from torch's generator
def calibrate(
    model: nn.Module,
    targets: Sequence[str],
    batches: Iterable,
    loss_fn: Callable[..., torch.Tensor],
    exclude: Sequence[str] = (),
    *,
    rank: int = 8,
    alpha: float = 16.0,
    samples: int = 32,
    init: Literal["wc", "w", "random", "theory"] = "wc",
    svd: Literal["exact", "fast"] = "fast",
    adapt_rank: bool = True,
    adapt_scale: bool = True,
    center: bool = False,
    spectrum=True,
    memory=2**31,
    progress=iter,
) -> dict[str, Allocation]:
    """Algorithm 1: look at the task, return the plan {layer name: Allocation} for `inject`.

    `batches` yields batches of one example each (fewer than `samples` will do), unpadded: padding would count in
    C. loss_fn(model, batch) gives the scalar loss and leaves the batch as it is: it comes again; what it trains beside
    the model gets gradients. The model is in eval mode meanwhile; modes, requires_grad and the generator's state come
    back as they were. ValueError as `inject` says, if there is no batch or no gradient, and where a layer sees NaN or
    infinity. `memory`: bytes that the C alive at once may take, one layer's at least; a model of 7e9 numbers, 2 GiB: 16
    passes a sample. `spectrum`: keep C's eigenvalues. For bars, wrap `batches` in tqdm, and give tqdm as `progress`.

    Options:
        rank: rank r of the update; with adapted ranks, of the average layer
        alpha: the update is scaled by alpha / rank; with adapted scales, in the average layer
        samples: calibration samples N, the first of the training set in the seeded order
        init: what A is: wc = the singular vectors of W C, the method; w = of W alone;
            random = as LoRA draws it; theory = Eq. 16, which is unstable
        svd: exact = a full SVD; fast = the same space by random projection where that takes less
            time: a third of it at 1024 inputs and rank 8, never at 128
        adapt_rank: a layer's rank follows its importance (Eq. 6); otherwise all have `rank`
        adapt_scale: a layer's scale follows its importance (Eq. 7); otherwise it is alpha / its rank
        center: C is a covariance, each sample's mean subtracted, as in the authors' code
    """
    linears = find_linears(model, targets, exclude)
    if isinstance(rank, float) or rank < 1:
        raise ValueError(f"rank {rank} is no whole number above 0")
    for option, value, allowed in (("init", init, ("wc", "w", "random", "theory")), ("svd", svd, ("exact", "fast"))):
        if value not in allowed:
            raise ValueError(f"{option} '{value}' is unknown: allowed are {', '.join(allowed)}")
    scores, batches = see_gradients(model, linears, itertools.islice(batches, samples), loss_fn)
    caps = [min(linear.weight.shape) for linear in linears.values()]
    ranks = allocate_ranks(scores, len(caps) * rank, caps) if adapt_rank else [min(rank, cap) for cap in caps]
    scales = scalings(scores, ranks, rank, alpha, adapt_scale)
    given = zip(ranks, scales, itertools.repeat(None), scores, shares(scores))
    plan = {name: Allocation(*each) for name, each in zip(linears, given)}
    needed = {name: linear for name, linear in linears.items() if spectrum or (plan[name].rank and init != "random")}
    idle = [name for name in needed if plan[name].score == 0]  # no sample runs them
    parts, covariances = in_parts(needed, memory), {}
    for name in progress(list(needed)):
        if not covariances:
            covariances = see_inputs(model, next(parts), batches, loss_fn, center, idle)
        complete(plan[name], needed[name].weight.detach(), covariances.pop(name), init, svd, spectrum)
    return plan


def complete(given: Allocation, W: torch.Tensor, C: torch.Tensor, init: str, svd: str, spectrum: bool) -> None:
    """Put A and, if asked for, the spectrum into the Allocation `given`, from W (m, n) and C (n, n)."""
    W, C = in_float64(W), in_float64(C)
    if given.rank and init != "random":
        given.A = init_A(W, C, given.rank, init, svd).cpu()
    if spectrum:
        given.spectrum = tuple(torch.linalg.eigvalsh(C).clamp_min(0).flip(0).tolist())


def check_plan(plan: Mapping[str, Allocation], linears: Mapping[str, nn.Linear]) -> None:
    """ValueError if a plan is not for these layers, or a rank or an A of it does not fit its layer."""
    if set(plan) != set(linears):
        raise ValueError(f"the plan is for other layers: {', '.join(sorted(set(plan) ^ set(linears)))}")
    for name, given in plan.items():
        m, n = linears[name].weight.shape
        if given.rank not in range(min(m, n) + 1):
            raise ValueError(f"the plan's rank {given.rank} does not fit layer {name} {(m, n)}: allowed are 0 to {min(m, n)}")
        if given.A is not None and given.A.shape != (given.rank, n):
            raise ValueError(f"the plan's A for layer {name} is {tuple(given.A.shape)}: {(given.rank, n)} is right")


def inject(
    model: nn.Module,
    targets: Sequence[str],
    exclude: Sequence[str] = (),
    *,
    plan=None,
    rank: int = 8,
    alpha: float = 16.0,
    train_a: bool = False,
    dropout: float = 0.0,
) -> list[str]:
    """Freeze `model` and wrap every nn.Linear whose dotted name ends in one of `targets`.

    A target that is a layer's full name means that layer alone; `exclude` names, in the same words, layers
    to leave as they are. `plan` is what `calibrate` returned for the same targets; without it every layer
    gets `rank`, alpha / rank and a random A. A layer with rank 0 stays as it is. The task head is frozen
    too: unfreeze it afterwards. Returns the names wrapped, in the model's order. ValueError if a target
    matches nothing, a rank does not fit a layer or the plan is not for these layers.

    Options:
        rank: rank r of the update; with adapted ranks, of the average layer
        alpha: the update is scaled by alpha / rank; with adapted scales, in the average layer
        train_a: train A as well (the paper's Table 5); otherwise B alone
        dropout: dropout on the adapter's input
    """
    linears = find_linears(model, targets, exclude)
    if plan is None:
        for name, linear in linears.items():
            if isinstance(rank, float) or not 1 <= rank <= min(linear.weight.shape):
                raise ValueError(
                    f"rank {rank} does not fit layer {name} {tuple(linear.weight.shape)}: "
                    f"allowed are 1 to {min(linear.weight.shape)}, or exclude it"
                )
        plan = {name: Allocation(rank, alpha / rank) for name in linears}
    check_plan(plan, linears)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")
    names = [name for name in linears if plan[name].rank]
    model.requires_grad_(False)
    for name in names:
        linear = linears[name]
        replace(model, name, TaskTLoRALinear(linear, plan[name], train_a, dropout).train(linear.training))
    return names


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW: whatever is trainable (B, A with train_a, the task head), one rate, one decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Fold dW into W0 and give the plain nn.Linear back; returns the names merged.

    Summed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped,
    so a second merge is refused, and as `check_mergeable` says.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, TaskTLoRALinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no TaskTLoRALinear (merged already?)")
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
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TaskTLoRALinear)}
    if not layers:
        raise ValueError("nothing to save: the model holds no TaskTLoRALinear (merged already?)")
    if others := [name for name, m in model.named_modules() if hasattr(m, "factors") and name not in layers]:
        raise ValueError(f"layer {others[0]} is adapted by another method: save each part of the model by itself")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {f"{name}.{key}": t for name, layer in layers.items() for key, t in own_state(layer).items()}
    options = {name: layer.options for name, layer in layers.items()}
    tensors = trained | own | running_statistics(model)
    write_adapter(path, tensors, {"method": "task_tlora", "layers": options, "trained": list(trained)})


def load(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Wrap the layers of a base model as those of the saved one were, and fill them; returns their names.

    The model is ready for more training or for `merge`. Build the optimizer afterwards. ValueError, before
    anything is changed, if the file is another method's or does not fit the model.
    """
    tensors, metadata = read_adapter(path, "task_tlora")
    layers = {}
    for name, linear in find_saved(model, path, metadata["layers"]).items():
        options = metadata["layers"][name]
        allocation = options.pop("allocation")
        layers[name] = TaskTLoRALinear(linear, Allocation(**allocation), **options).train(linear.training)
    place_saved(model, path, layers, tensors, metadata["trained"])
    return list(layers)


def watch(model: nn.Module) -> dict[str, dict[str, float]]:
    """{quantity: {layer name: number}}, what is worth seeing after a run; none changes during it."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TaskTLoRALinear)}
    return {
        "ranks": {name: layer.rank for name, layer in layers.items()},
        "importance": {name: layer.share.item() for name, layer in layers.items()},
        "scaling": {name: layer.scaling for name, layer in layers.items()},
    }


def describe(plan: Mapping[str, Allocation]) -> dict[str, dict]:
    """{layer name: {quantity: number or list}} for a JSON file: all of the plan but A, rank 0 included."""
    keys = ("rank", "scaling", "score", "share", "spectrum")
    return {name: {key: getattr(allocation, key) for key in keys} for name, allocation in plan.items()}


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


# ------------------------------------- for analysis only: why this A (Appendices A and B)


def objective(A: torch.Tensor, C: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Eq. 9: J(A) = Tr[A C D^T D C A^T (A C A^T)^-1], D (m, n) the ideal update. A 0-dim tensor.

    What B can reach with A frozen: the larger, the less is lost (Eq. 8). Where A C A^T is singular
    its pseudo-inverse is meant.
    """
    DCA = delta @ C @ A.mT  # (m, r)
    return torch.trace(DCA.mT @ DCA @ torch.linalg.pinv(A @ C @ A.mT, hermitian=True))


def expected_loss(A: torch.Tensor, C: torch.Tensor, delta: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Eq. 8: the mean squared error with the best B for this A. `noise` is d_out sigma^2."""
    return noise + torch.trace(delta @ C @ delta.mT) - objective(A, C, delta)


def projector(A: torch.Tensor) -> torch.Tensor:
    """P = A^T (A A^T)^-1 A (n, n), onto the row space of A. Eq. 10: J(A) = Tr[P M], P of A C^(1/2)."""
    return torch.linalg.pinv(A) @ A


def target_matrix(delta: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """M = (D C^(1/2))^T (D C^(1/2)) (n, n) of Eq. 10. The ideal update D is unknown before training:
    with W0 in its place this is Appendix A's proxy."""
    root, _ = square_roots(C, eps=0.0)
    return (delta @ root).mT @ (delta @ root)


def upper_bound(M: torch.Tensor, r: int) -> torch.Tensor:
    """Eq. 12: no A of rank r has a J(A) above the sum of the r largest eigenvalues of M."""
    return torch.linalg.eigvalsh(M)[-r:].sum()


def subspace_similarity(U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """Eqs. 15, 17: ||U^T V||_F^2 / r of the row spaces of U and V (r, n): 1 = equal, 0 = orthogonal."""
    U, V = torch.linalg.qr(U.mT).Q, torch.linalg.qr(V.mT).Q
    return (U.mT @ V).square().sum() / U.shape[1]


# -------------------------------------------------------------------------- the demo


def main() -> None:
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 32))

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    model, task = build(), build()
    # 256 examples of 8 tokens. As activations do, they have a few strong directions and a long weak tail.
    x = torch.randn(256, 8, 96) * torch.logspace(0.5, -2.5, 96) @ torch.linalg.qr(torch.randn(96, 96)).Q
    task[0].weight.data *= 1.5  # the task amplifies what the first layer does already
    y = task(x).detach()
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(32)]
    plans = {}
    for init in ("random", "wc"):
        plans[init] = calibrate(model, ["0", "2"], batches, loss_fn, rank=4, alpha=4.0, init=init)
    print("                                     J(A) / its upper bound, W0 for the ideal update")
    print("layer  importance  rank  scaling     A of W0 C    A at random")
    for (name, given), X in zip(plans["wc"].items(), (x, model[:2](x))):
        W, C = model.get_submodule(name).weight.detach().double(), covariance(X.detach()).double()
        bound = upper_bound(target_matrix(W, C), given.rank)
        J = [objective(A.double(), C, W) / bound for A in (given.A, torch.randn(given.A.shape))]  # type: ignore[union-attr]
        print(f"{name:5s} {given.share:11.3f} {given.rank:5d} {given.scaling:8.3f} {J[0]:13.3f} {J[1]:14.3f}")
    for init, plan in plans.items():
        student = build()
        inject(student, ["0", "2"], plan=plan)
        print(f"{init}: output unchanged at the start:", torch.equal(student(x), model(x)))
        optimizer = torch.optim.AdamW(param_groups(student, lr=1e-2, weight_decay=0.0))
        for step in range(101):
            loss = loss_fn(student, (x, y))
            if step % 50 == 0:
                print(f"  step {step:3d}  loss {loss.item():.6f}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    adapted = student(x)
    merge(student)
    print(f"merged into {student[0]}: largest difference {(student(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
