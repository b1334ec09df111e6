"""task_tlora.py: calibration against plain loops, A against numpy, ranks, scalings, Appendix A, saving."""

import copy
import inspect
import itertools
import json
import math
import random
import re
import typing
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import task_tlora
from baselines import lora
from model import load_base, logits
from reading.tokenizer import ASSETS
from task_tlora import Allocation, TaskTLoRALinear, calibrate, inject, merge, param_groups, see_gradients, see_inputs

INITS = ["wc", "w", "random", "theory"]


class Recorder(nn.Linear):
    """An nn.Linear that keeps its inputs: the reference looks here, the code under test hooks."""

    def forward(self, x):
        self.seen = getattr(self, "seen", []) + [x.detach().clone()]
        return super().forward(x)


class TinyTransformer(nn.Module):
    """One attention block and a classifier. `twice` runs twice per sample, `never` not at all."""

    def __init__(self, width=12, dropout=0.5):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.q_proj, self.k_proj, self.v_proj = (Recorder(width, width, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = Recorder(width, 3 * width), Recorder(3 * width, width)
        self.twice, self.pool, self.never = (Recorder(width, width) for _ in range(3))
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)

    def forward(self, ids):
        x = self.embed(ids)  # (B, T, d)
        attention = (self.q_proj(x) @ self.k_proj(x).mT / math.sqrt(x.shape[-1])).softmax(-1)
        x = self.norm(x + self.drop(attention @ self.v_proj(x)))
        x = x + self.down_proj(F.gelu(self.up_proj(x)))
        x = x + self.twice(torch.tanh(self.twice(x)))
        return self.head(torch.tanh(self.pool(x[:, 0])))  # `pool` gets a 2-D input


TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "twice", "pool", "never"]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def examples(count=6, seed=1):
    """Batches of one example of 3 to 9 tokens."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(0, high, shape, generator=g)  # noqa: E731
    return [(draw(20, 1, 3 + (5 * i) % 7), draw(3, 1)) for i in range(count)]


def transformer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return TinyTransformer(**options).to(dtype)


def matrix_with(values, m=None, seed=0):
    """A random float64 (m, n) matrix whose singular values are `values`."""
    n = len(values)
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m or n, n, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    return (U * torch.as_tensor(values, dtype=torch.float64)) @ V.mT


def random_problem(seed=0, m=7, n=9, tokens=40):
    """W (m, n), inputs X (tokens, n) with unequal directions, C = X^T X / tokens, an update D (m, n)."""
    g = torch.Generator().manual_seed(seed)
    W, D = torch.randn(2, m, n, generator=g, dtype=torch.float64)
    X = torch.randn(tokens, n, generator=g, dtype=torch.float64)
    X *= torch.logspace(0.5, -0.5, n, dtype=torch.float64)
    return W, X, X.mT @ X / tokens, D


# ---------------------------------------------------------------- what the samples tell


@pytest.mark.parametrize("center", [False, True])
def test_S_and_C_equal_per_sample_autograd_in_plain_loops(center):
    model, batches = transformer(), examples()
    plan = calibrate(model, TARGETS, batches, loss_fn, rank=2, samples=6, center=center, svd="exact")
    reference = transformer().eval()
    linears = {name: reference.get_submodule(name) for name in TARGETS}
    S = dict.fromkeys(TARGETS, 0.0)
    C = {name: np.zeros((layer.in_features, layer.in_features)) for name, layer in linears.items()}
    for batch in batches:
        for layer in linears.values():
            layer.seen = []
        loss = loss_fn(reference, batch)
        for name, layer in linears.items():
            if name != "never":
                (gradient,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
                entries = zip(layer.weight.flatten().tolist(), gradient.flatten().tolist())
                S[name] += sum(abs(w * g) for w, g in entries) / layer.weight.numel() / len(batches)
            for X in layer.seen:
                X = X.reshape(-1, X.shape[-1]).numpy()
                X = X - X.mean(0) if center else X
                for x in X:
                    C[name] += np.outer(x, x) / len(batches)
    assert len({round(s, 12) for s in S.values()}) == len(TARGETS)  # all differ, one is zero
    for name in TARGETS:
        spectrum = np.linalg.eigvalsh(C[name])[::-1]
        print(name, S[name], plan[name].score, abs(plan[name].spectrum - spectrum).max())
        assert plan[name].score == pytest.approx(S[name], rel=1e-12, abs=0)
        assert plan[name].share == pytest.approx(S[name] / sum(S.values()), rel=1e-12, abs=0)
        assert np.allclose(plan[name].spectrum, spectrum, atol=1e-12 * max(spectrum[0], 1))
        W = linears[name].weight.detach().numpy()
        if plan[name].rank:
            _, sigma, Vh = np.linalg.svd(W @ C[name])
            r = plan[name].rank
            if sigma[r - 1] > max(1.001 * sigma[r], 1e-10):  # beyond the rank of C any vectors do
                assert projector(plan[name].A.numpy()) == pytest.approx(projector(Vh[:r]), abs=1e-8)
    assert plan["never"].score == 0 and plan["never"].rank == 0 and not any(plan["never"].spectrum)


def projector(A):
    return A.T @ A  # rows orthonormal


def same(one, other):
    """Two plans are equal to the bit, A and the spectrum included."""
    pairs = [(one[name].A, other[name].A) for name in one]
    plain = [{name: {**vars(given), "A": None} for name, given in plan.items()} for plan in (one, other)]
    return plain[0] == plain[1] and all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def test_see_inputs_gives_the_matrix_C_itself():
    model, batches = transformer(), examples(3)
    linears = {"twice": model.twice, "never": model.never}
    covariances = see_inputs(model, linears, batches, loss_fn, False, idle=["never"])
    reference = transformer().eval()
    for batch in batches:
        reference(batch[0])
    X = torch.cat([x.reshape(-1, 12) for x in reference.twice.seen]).detach()
    assert len(reference.twice.seen) == 6  # two calls a sample
    error = (covariances["twice"] - X.mT @ X / 3).abs().max().item()
    print("largest difference", error)
    assert error < 1e-12
    assert torch.equal(covariances["never"], torch.zeros(12, 12, dtype=torch.float64))  # no sample runs it


def test_C_holds_no_graph_where_the_loss_turns_gradients_on():
    model = Blocks()
    model.embed.register_forward_hook(lambda module, args, x: x.requires_grad_())

    def loss(model, batch):
        with torch.enable_grad():
            value = loss_fn(model, batch)
        assert value.requires_grad
        return value

    covariances = see_inputs(model, {"blocks.1.2": model.blocks[1][2]}, examples(), loss, False)
    assert covariances["blocks.1.2"].trace() > 1 and not covariances["blocks.1.2"].requires_grad


def test_S_is_the_mean_over_the_batches_there_are_and_they_come_back():
    model, batches = transformer(), examples(3)
    linears = {"twice": model.twice, "never": model.never}
    scores, seen = see_gradients(model, linears, iter(batches), loss_fn)
    alone = [see_gradients(model, linears, [batch], loss_fn)[0][0] for batch in batches]
    assert all(a is b for a, b in zip(seen, batches, strict=True))
    assert len(set(alone)) == 3 and scores == [pytest.approx(sum(alone) / 3, rel=1e-14), 0.0]
    assert same(*(calibrate(model, TARGETS, batches, loss_fn, samples=n) for n in (3, 32)))


def test_a_layer_called_by_keyword_is_seen():
    class Named(nn.Sequential):
        def forward(self, x):
            return self[1](input=torch.tanh(self[0](x)))

    torch.manual_seed(0)
    model, batches = Named(nn.Linear(9, 7), nn.Linear(7, 5)), list(torch.randn(4, 1, 9))
    plain = nn.Sequential(model[0], nn.Tanh(), model[1])
    square = lambda m, x: m(x).square().sum()  # noqa: E731
    one, other = calibrate(model, ["1"], batches, square, rank=2), calibrate(plain, ["2"], batches, square, rank=2)
    assert one["1"].score > 0 and any(one["1"].spectrum) and same(one, {"1": other["2"]})


def test_sensitivity_is_Eq_5_on_a_worked_example():
    W, G = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[3.0, 1.0], [-4.0, 9.0]])
    assert task_tlora.sensitivity(W, G).item() == (3 + 2 + 2 + 0) / 4


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sensitivity_of_low_precision_is_computed_in_float32(low):
    g = torch.Generator().manual_seed(0)
    W, G = (torch.randn(50, 40, generator=g).to(low) for _ in range(2))
    S = task_tlora.sensitivity(W, G)
    exact = (W.double() * G.double()).abs().mean().item()
    print("relative error", abs(S.item() / exact - 1), "in the layer's own", abs((W * G).abs().mean().item() / exact - 1))
    assert S.dtype == torch.float32 and abs(S.item() / exact - 1) < 1e-6 < abs((W * G).abs().mean().item() / exact - 1)
    tiny = torch.full((2, 2), 1e-4).half()  # their products are below the smallest number of float16
    assert task_tlora.sensitivity(tiny, tiny).item() == pytest.approx(1e-8, rel=1e-2) and not (tiny * tiny).any()
    assert task_tlora.sensitivity(W.double(), G.double()).dtype == torch.float64


def test_covariance_sums_over_tokens_and_centres_on_request():
    X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # (1, 2, 2)
    assert task_tlora.covariance(X).tolist() == [[10.0, 14.0], [14.0, 20.0]]
    assert task_tlora.covariance(X, center=True).tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_only_the_first_samples_are_read():
    def endless():
        yield from examples(4)
        raise AssertionError("a fifth batch was asked for")

    four = calibrate(transformer(), ["v_proj"], endless(), loss_fn, rank=2, samples=4)
    three = calibrate(transformer(), ["v_proj"], examples(4), loss_fn, rank=2, samples=3)
    assert four["v_proj"].score != three["v_proj"].score


def test_bfloat16_models_and_autocast_are_measured_in_float32():
    model = transformer(torch.bfloat16)
    C = see_inputs(model, {"k_proj": model.k_proj}, examples(4), loss_fn, False)
    X = torch.cat([x.reshape(-1, 12) for x in model.k_proj.seen]).double()
    error = (C["k_proj"].double() - X.mT @ X / 4).abs().max() / C["k_proj"].max()
    rounded = (C["k_proj"].bfloat16().double() - X.mT @ X / 4).abs().max() / C["k_proj"].max()
    print("relative error", error.item(), "bfloat16 would give", rounded.item())
    assert C["k_proj"].dtype == torch.float32 and error < 1e-6 < 1e-4 < rounded

    def mixed(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(model, batch)

    model = transformer(torch.float32)
    C = see_inputs(model, {"k_proj": model.k_proj}, examples(4), mixed, False)
    X = torch.cat([x.reshape(-1, 12) for x in model.k_proj.seen]).double()
    assert (C["k_proj"].double() - X.mT @ X / 4).abs().max() / C["k_proj"].max() < 1e-6


def test_one_weight_gradient_at_most_is_alive(monkeypatch):
    model, alive, peak, sensitivity = transformer(), [], [], task_tlora.sensitivity

    def counting(weight, gradient):
        alive.append(weakref.ref(gradient))
        peak.append(sum(ref() is not None for ref in alive))
        assert sum(p.grad is not None for p in model.parameters()) == 1
        return sensitivity(weight, gradient)

    monkeypatch.setattr(task_tlora, "sensitivity", counting)
    calibrate(model, TARGETS, examples(3), loss_fn, rank=2)
    assert len(peak) == 3 * (len(TARGETS) - 1)  # `never` has none
    assert set(peak) == {1}


@pytest.mark.parametrize("kilobytes, parts", [(0, 8), (2.3, 5), (3.4, 4), (14.9, 2), (100, 1)])
def test_C_is_held_for_as_many_layers_as_fit_and_the_plan_is_the_same_to_the_bit(monkeypatch, kilobytes, parts):
    """C takes 12 x 12 x 8 bytes, 1.125 kB, in all layers but down_proj (36 inputs): 10.125 kB, the fifth."""
    calls, alive, counts = [], [], []

    def counting(model, linears, *others):
        assert not any(ref() is not None for ref in alive)  # of the parts before
        covariances = see_inputs(model, linears, *others)
        alive[:] = [weakref.ref(C) for C in covariances.values()]
        counts.append(sum(C.numel() * C.element_size() for C in covariances.values()))
        assert counts[-1] <= 1024 * kilobytes or len(linears) == 1
        calls.append(list(linears))
        return covariances

    whole = calibrate(transformer(), TARGETS, examples(), loss_fn, rank=2)
    passes = []
    loss = lambda model, batch: passes.append(torch.is_grad_enabled()) or loss_fn(model, batch)  # noqa: E731
    monkeypatch.setattr(task_tlora, "see_inputs", counting)
    bars = []
    bar = lambda names: bars.append(names) or iter(names)  # noqa: E731
    plan = calibrate(transformer(), TARGETS, examples(), loss, rank=2, memory=1024 * kilobytes, progress=bar)
    assert bars == [TARGETS]
    assert same(plan, whole) and len({given.score for given in plan.values()}) == len(TARGETS)
    assert sum(calls, []) == TARGETS and len(calls) == parts
    assert passes == [True] * 6 + [False] * 6 * parts


def test_layers_are_parted_by_the_bytes_of_their_C():
    linears = {name: nn.Linear(n, 2, dtype=dtype) for name, n, dtype in [
        ("a", 10, torch.float32), ("b", 10, torch.float64), ("c", 10, torch.bfloat16), ("d", 20, torch.float16),
        ("e", 10, torch.float32),
    ]}  # fmt: skip
    parted = lambda memory: [list(part) for part in task_tlora.in_parts(linears, memory)]  # noqa: E731
    assert parted(3600) == [["a", "b", "c", "d", "e"]]  # 400 + 800 + 400 + 1600 + 400: float32 at least
    assert parted(3599) == [["a", "b", "c", "d"], ["e"]] == parted(3200)
    assert parted(3199) == [["a", "b", "c"], ["d", "e"]] == parted(2000)
    assert parted(1999) == [["a", "b", "c"], ["d"], ["e"]] == parted(1600)
    assert parted(1599) == [["a", "b"], ["c"], ["d"], ["e"]] == parted(1200)
    assert parted(1199) == [["a"], ["b"], ["c"], ["d"], ["e"]] == parted(0)
    assert all(part[name] is linears[name] for part in task_tlora.in_parts(linears, 0) for name in part)
    assert list(task_tlora.in_parts({}, 0)) == []


def test_no_eigenvalue_is_negative_where_rounding_makes_one():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 5)), torch.randn(1, 3, 40)  # three tokens: C has rank 3
    loss = lambda m, x: m(x).square().sum()  # noqa: E731
    rounded = torch.linalg.eigvalsh(see_inputs(model, {"0": model[0]}, [x], loss, False)["0"].double())
    spectrum = calibrate(model, ["0"], [x], loss, rank=2)["0"].spectrum
    assert rounded[0] < 0 and spectrum == tuple(max(0.0, value) for value in reversed(rounded.tolist()))


@pytest.mark.parametrize("init", INITS)
def test_the_spectrum_is_left_out_on_request_with_every_C_that_nothing_else_needs(monkeypatch, init):
    asked = []
    full = calibrate(transformer(), TARGETS, examples(), loss_fn, rank=2, init=init)
    monkeypatch.setattr(task_tlora, "see_inputs", lambda m, linears, *o: asked.extend(linears) or see_inputs(m, linears, *o))
    plan = calibrate(transformer(), TARGETS, examples(), loss_fn, rank=2, init=init, spectrum=False)
    assert all(len(given.spectrum) > 0 for given in full.values())
    assert all(given.spectrum == () for given in plan.values())
    for given in full.values():
        given.spectrum = ()
    assert same(plan, full) and plan["never"].rank == 0
    assert asked == ([] if init == "random" else [name for name in TARGETS if plan[name].rank])
    assert task_tlora.describe(plan)["q_proj"]["spectrum"] == ()


# ------------------------------------------------------ zeros that are no scores


class Blocks(nn.Module):
    """An embedding, two blocks, a head; the blocks run as `run(block, x)` says."""

    def __init__(self, run=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.run = nn.Embedding(20, 12), run
        block = lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Dropout(0.5))  # noqa: E731
        self.blocks, self.head = nn.ModuleList([block(), block()]), nn.Linear(12, 3)
        self.double()

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.head(x.mean(1))


def checkpointed(reentrant):
    return lambda block, x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)


def without_gradient(block, x):
    with torch.no_grad():
        return block(x)


def detached(model, batch):
    return loss_fn(model, batch).detach()


def in_no_grad(model, batch):
    with torch.no_grad():
        return loss_fn(model, batch)


BLOCKS = ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # what torch itself says of it
@pytest.mark.parametrize(
    "run, loss, targets, lost",
    [
        (checkpointed(True), loss_fn, BLOCKS, "blocks.0.0 (4 of 4 layers)"),
        (checkpointed(True), loss_fn, [*BLOCKS, "head"], "blocks.0.0 (4 of 5 layers)"),  # the head has gradients
        (without_gradient, loss_fn, [*BLOCKS[:2], "head"], "blocks.0.0 (2 of 3 layers)"),
        (checkpointed(False), detached, BLOCKS, "blocks.0.0 (4 of 4 layers)"),
        (checkpointed(False), in_no_grad, [*BLOCKS[:3], "head"], "blocks.0.0 (4 of 4 layers)"),
    ],
)
def test_a_layer_that_can_get_no_gradient_is_an_error(run, loss, targets, lost):
    model = Blocks(run)
    with pytest.raises(ValueError) as error:
        calibrate(model, targets, examples(), loss, rank=2)
    assert f"no gradient reaches layer {lost}" in str(error.value) and "\n" not in str(error.value)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.head._forward_pre_hooks


def test_inference_mode_is_an_error_and_no_grad_is_not():
    model = transformer()
    with torch.inference_mode(), pytest.raises(ValueError, match="no gradient reaches layer q_proj .8 of 8 layers"):
        calibrate(model, TARGETS, examples(), loss_fn)
    assert all(p.requires_grad for p in model.parameters())
    plan = calibrate(model, TARGETS, examples(), loss_fn)
    with torch.no_grad():
        assert same(calibrate(model, TARGETS, examples(), loss_fn), plan)
    assert len({given.score for given in plan.values()}) == len(TARGETS)


def test_gradients_that_are_zero_are_an_allocation_like_any_other():
    plan = calibrate(Blocks(), BLOCKS, examples(), lambda m, b: 0 * loss_fn(m, b), rank=3, alpha=6.0)
    assert [(given.score, given.rank, given.scaling, given.share) for given in plan.values()] == [(0.0, 3, 2.0, 0.25)] * 4


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the passes without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_every_input_once(reentrant):
    """Its backward pass runs each layer a second time."""
    runs = []

    def run(block, x):
        runs.append(torch.is_grad_enabled())
        return checkpointed(reentrant)(lambda x: runs.append(torch.is_grad_enabled()) or block(x), x)

    model, plain = Blocks(run), Blocks()
    if reentrant:  # a user who did the right thing: the input of the first block asks for a gradient
        model.embed.register_forward_hook(lambda module, args, x: x.requires_grad_())
    plan = calibrate(model, BLOCKS, examples(), loss_fn, rank=3)
    assert len(runs) == 6 * (2 * 3 + 2 * 2)  # two blocks, run again in backward; forward passes alone do not
    expected = calibrate(plain, BLOCKS, examples(), loss_fn, rank=3)
    assert same(plan, expected) and len({given.score for given in plan.values()}) == 4


def test_a_layer_that_some_samples_pass_by_gets_the_mean_over_all():
    model, batches = Blocks(), examples(4)
    every = [see_gradients(model, {"head": model.head}, [batch], loss_fn)[0][0] for batch in batches]
    some = lambda m, b: loss_fn(m, b) if b is batches[1] else m.embed.weight.sum()  # noqa: E731
    scores, seen = see_gradients(model, {"head": model.head}, batches, some)
    assert scores == [every[1] / 4] and len(seen) == 4


@pytest.mark.parametrize(
    "loss, found",
    [
        (lambda m, b: m(b[0]), r"a tensor of shape \(1, 3\)"),
        (lambda m, b: 1.5, "float"),
        (lambda m, b: {"loss": loss_fn(m, b)}, "dict"),
        (lambda m, b: loss_fn(m, b)[None][:0], r"a tensor of shape \(0,\)"),
        (lambda m, b: None, "NoneType"),
    ],
)
def test_a_loss_that_is_no_scalar_tensor_is_named(loss, found):
    with pytest.raises(ValueError, match=f"^the loss of calibration sample 1 is {found}: it must be a scalar tensor$"):
        calibrate(transformer(), TARGETS, examples(), loss)


def test_a_loss_of_one_entry_will_do():
    one = calibrate(transformer(), TARGETS, examples(), lambda m, b: loss_fn(m, b)[None])
    assert same(one, calibrate(transformer(), TARGETS, examples(), loss_fn))


def test_calibration_leaves_the_model_and_the_generator_as_they_were():
    model = transformer()
    model.train()
    model.norm.eval()
    model.embed.weight.requires_grad_(False)
    model.k_proj.weight.requires_grad_(False)
    model.k_proj.weight.grad = torch.ones_like(model.k_proj.weight)  # a leftover must not be counted
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    assert len(set(modes)) == len(set(flags)) == 2
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan = calibrate(model, TARGETS, examples(), loss_fn, rank=2, init="wc", svd="fast")
    clean = calibrate(transformer(), TARGETS, examples(), loss_fn, rank=2)
    assert {name: a.score for name, a in plan.items()} == {name: a.score for name, a in clean.items()}
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    shuffled = torch.utils.data.DataLoader(list(examples()), batch_size=None, shuffle=True)
    assert calibrate(transformer(), TARGETS, shuffled, loss_fn, rank=2).keys() == plan.keys()
    assert torch.equal(torch.get_rng_state(), state)
    for layer in map(model.get_submodule, TARGETS):
        assert not layer._forward_pre_hooks and not layer.weight._post_accumulate_grad_hooks


def test_dropout_is_off_during_calibration():
    plans = [calibrate(transformer(dropout=p), ["v_proj"], examples(), loss_fn) for p in (0.0, 0.9)]
    assert plans[0]["v_proj"].score == plans[1]["v_proj"].score > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_layer_that_sees_NaN_or_infinity_is_named(bad):
    model = transformer()
    with torch.no_grad():
        model.v_proj.bias = nn.Parameter(torch.full((12,), bad, dtype=torch.float64))
    with pytest.raises(ValueError, match="layer up_proj gets NaN"):  # the first one after v_proj
        calibrate(model, TARGETS, examples(), loss_fn, rank=2)
    assert model.training and all(p.requires_grad for p in model.parameters())  # restored after the error
    assert not model.q_proj._forward_pre_hooks


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_enough(bad):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.tensor([[0.5, bad, 1.0]])
    with pytest.raises(ValueError, match="^layer 0 gets NaN or infinity as input$"):
        calibrate(model, ["0", "1"], [x], lambda m, x: m(x).sum(), rank=1)


def test_inputs_too_large_to_square_are_named():
    model = nn.Sequential(nn.Linear(2, 2))
    loss = lambda m, x: m(x).sum()  # noqa: E731
    for batches in ([torch.full((1, 2), 1e30)], [torch.tensor([[0.0, 1.5e19]])] * 2):  # at once; as a sum
        with pytest.raises(ValueError, match="^layer 0 gets values too large to square as input$"):
            calibrate(model, ["0"], batches, loss, rank=1)
    assert calibrate(model, ["0"], batches[:1], loss, rank=1)["0"].spectrum[0] == pytest.approx(2.25e38)


def test_a_gradient_or_a_loss_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    root = lambda m, x: m(x).mul(0).sum().sqrt()  # noqa: E731  (finite, with an infinite slope)
    with pytest.raises(ValueError, match="the gradient of layer 0 has NaN"):
        calibrate(model, ["0"], [torch.ones(1, 2)], root, rank=1)
    with pytest.raises(ValueError, match="the loss of calibration sample 2 is nan"):
        calibrate(model, ["0"], [1.0, math.nan], lambda m, x: m(torch.ones(1, 2)).sum() * x, rank=1)


def test_no_sample_is_an_error_and_so_is_no_layer_that_runs():
    with pytest.raises(ValueError, match="^there is no sample to calibrate on$"):
        calibrate(transformer(), ["v_proj"], [], loss_fn)
    with pytest.raises(ValueError, match="no gradient reaches layer never .1 of 1 layers.: no sample runs it"):
        calibrate(transformer(), ["never"], examples(), loss_fn)


def test_a_layer_that_never_runs_gets_a_full_A_where_it_gets_a_rank():
    plan = calibrate(transformer(), ["never", "pool"], examples(), loss_fn, rank=3, alpha=6.0, adapt_rank=False)
    given = plan["never"]
    assert (given.rank, given.scaling, given.score, given.spectrum) == (3, 0.0, 0.0, (0.0,) * 12)
    assert torch.allclose(given.A @ given.A.mT, torch.eye(3, dtype=torch.float64), atol=1e-12)


# ------------------------------------------------------------------- ranks and scalings


def random_scores(rng, count):
    kind = rng.choice(["any", "zeros", "one huge", "ties", "wide"])
    if kind == "zeros":
        return [0.0] * count
    if kind == "one huge":
        return [1e300 if i == 0 else rng.random() for i in range(count)]
    if kind == "ties":
        return [float(rng.randint(0, 2)) for _ in range(count)]
    if kind == "wide":
        return [10.0 ** rng.uniform(-300, 300) for _ in range(count)]
    return [rng.random() for _ in range(count)]


def test_ranks_always_sum_to_the_budget_within_the_caps():
    rng, clipped = random.Random(0), 0
    for _ in range(3000):
        count = rng.randint(1, 9)
        scores, caps = random_scores(rng, count), [rng.randint(1, 12) for _ in range(count)]
        budget = rng.randint(0, 60)
        if budget > sum(caps):
            clipped += 1
            with pytest.warns(UserWarning, match=f"total rank of {budget} .* clipped to {sum(caps)}"):
                ranks = task_tlora.allocate_ranks(scores, budget, caps)
        else:
            ranks = task_tlora.allocate_ranks(scores, budget, caps)
        assert sum(ranks) == min(budget, sum(caps)), (scores, budget, caps, ranks)
        assert all(0 <= r <= cap for r, cap in zip(ranks, caps))
        for i, j in itertools.permutations(range(count), 2):  # more important, at least as much rank
            if scores[i] > scores[j] and ranks[i] < caps[i]:
                assert ranks[i] >= ranks[j]
    assert 300 < clipped < 2700


def test_a_budget_that_fits_exactly_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task_tlora.allocate_ranks([3.0, 1.0, 0.0], 12, [3, 4, 5]) == [3, 4, 5]
        with pytest.raises(UserWarning, match="^a total rank of 13 is more than the layers can hold: clipped to 12$"):
            task_tlora.allocate_ranks([3.0, 1.0, 0.0], 13, [3, 4, 5])


def test_ranks_are_Eq_6_rounded_wherever_that_keeps_the_budget():
    rng, agreed = random.Random(1), 0
    for _ in range(500):
        scores = [rng.random() for _ in range(rng.randint(2, 8))]
        budget = 8 * len(scores)
        rounded = [round(budget * s / sum(scores)) for s in scores]
        if sum(rounded) == budget:
            agreed += 1
            assert task_tlora.allocate_ranks(scores, budget, [budget] * len(scores)) == rounded
    assert 100 < agreed < 500


def test_no_other_ranks_with_the_same_sum_are_nearer_to_the_shares():
    rng = random.Random(2)
    for _ in range(60):
        scores, budget = [rng.random() for _ in range(4)], rng.randint(1, 9)
        quotas = [budget * s / sum(scores) for s in scores]
        distance = lambda ranks: sum((r - q) ** 2 for r, q in zip(ranks, quotas))  # noqa: E731
        best = min(distance(r) for r in itertools.product(range(budget + 1), repeat=4) if sum(r) == budget)
        ours = distance(task_tlora.allocate_ranks(scores, budget, [budget] * 4))
        assert ours == pytest.approx(best, abs=1e-12)


def test_worked_allocations():
    allocate = task_tlora.allocate_ranks
    assert allocate([1.0, 1.0, 1.0], 24, [64, 64, 64]) == [8, 8, 8]
    assert allocate([0.0, 0.0, 0.0], 24, [64, 64, 64]) == [8, 8, 8]
    assert allocate([3.0, 1.0, 0.0], 16, [64, 64, 64]) == [12, 4, 0]
    assert allocate([3.0, 1.0, 0.0], 16, [10, 64, 64]) == [10, 6, 0]  # the cap frees 2 for the second
    assert allocate([3.0, 1.0, 0.0], 16, [10, 4, 64]) == [10, 4, 2]  # and then 2 for the third
    assert allocate([1.0, 1.0, 1.0], 10, [64, 64, 64]) == [4, 3, 3]  # ties in order
    assert allocate([6.0, 3.0, 1.0], 5, [64, 64, 64]) == [3, 2, 0]  # 3, 1.5, 0.5: rounding gives 6 or 5


def test_scalings_are_Eq_7_and_its_partial_ablations():
    scores, ranks = [3.0, 1.0, 0.0], [12, 4, 0]
    s = task_tlora.scalings(scores, ranks, 8, 16.0)
    assert s == pytest.approx([3 * 2 * 0.75, 3 * 2 * 0.25, 0.0], rel=1e-15)
    alpha_total, r_init = 3 * 16.0, 8
    alphas = [r * alpha_total / r_init * p for r, p in zip(ranks, (0.75, 0.25, 0.0))]  # Eq. 7 as printed
    assert alphas == [54.0, 6.0, 0.0]
    assert [s_i * r for s_i, r in zip(s, ranks)] == pytest.approx(alphas, rel=1e-15)
    assert task_tlora.scalings(scores, ranks, 8, 16.0, adapt_scale=False) == [16 / 12, 16 / 4, 0.0]
    assert task_tlora.scalings(scores, [8, 8, 8], 8, 16.0) == s  # without rank adaptation the same


@pytest.mark.parametrize("score", [0.0, 1e-300, 0.1, 1e300])
def test_equal_scores_give_back_LoRAs_ranks_and_scale_to_the_bit(score):
    for count, rank, alpha in itertools.product((1, 3, 7, 49), (1, 8, 13), (16.0, 0.1)):
        ranks = task_tlora.allocate_ranks([score] * count, count * rank, [64] * count)
        assert ranks == [rank] * count
        assert task_tlora.scalings([score] * count, ranks, rank, alpha) == [alpha / rank] * count


def test_shares_of_scores_beyond_a_floats_sum():
    assert task_tlora.shares([1e308, 1e308, 0.0]) == [0.5, 0.5, 0.0]
    assert task_tlora.shares([5e-324, 5e-324]) == [0.5, 0.5]


ROWS = list(itertools.product(["random", "wc"], [False, True], [False, True]))


@pytest.mark.parametrize("init, adapt_rank, adapt_scale", ROWS)
def test_the_eight_rows_of_table_4(init, adapt_rank, adapt_scale):
    """Rows without Init train A, rows with it freeze A. Ranks and scales by METHODS' formulas."""
    model, targets, L = transformer(), TARGETS[:-1], len(TARGETS) - 1
    options = {"init": init, "adapt_rank": adapt_rank, "adapt_scale": adapt_scale}
    plan = calibrate(model, targets, examples(), loss_fn, rank=2, alpha=3.0, **options)
    names = inject(model, targets, plan=plan, train_a=init == "random")
    assert names == [name for name in targets if plan[name].rank] and len(names) >= 5
    p = {name: plan[name].score / sum(a.score for a in plan.values()) for name in targets}
    for name in names:
        layer = model.get_submodule(name)
        if adapt_rank:
            assert abs(layer.rank - 2 * L * p[name]) < 1
        else:
            assert layer.rank == 2
        expected = L * (3.0 / 2) * p[name] if adapt_scale else 3.0 / layer.rank
        assert layer.scaling == pytest.approx(expected, rel=1e-14)
        assert isinstance(layer.A, nn.Parameter) == (init == "random")
        gram = layer.A @ layer.A.mT
        orthonormal = torch.allclose(gram, torch.eye(layer.rank, dtype=gram.dtype), atol=1e-12)
        assert orthonormal == (init == "wc") and not layer.B.any()
    ranks = [a.rank for a in plan.values()]
    assert sum(ranks) == 2 * L
    assert (len(set(ranks)) > 1) == adapt_rank
    assert (len({a.scaling for a in plan.values()}) > 1) == (adapt_rank or adapt_scale)


def test_with_nothing_on_it_is_baselines_lora_to_the_bit():
    runs = []
    for method in (lora, task_tlora):
        torch.manual_seed(3)
        model, batches, options = transformer(torch.float32), examples(8), {}
        if method is task_tlora:
            off = {"init": "random", "adapt_rank": False, "adapt_scale": False}
            plan = calibrate(model, TARGETS, batches, loss_fn, rank=3, alpha=7.0, **off)
            options = {"plan": plan, "train_a": True}
        method.inject(model, TARGETS, rank=3, alpha=7.0, dropout=0.1, **options)
        optimizer = torch.optim.AdamW(method.param_groups(model, lr=1e-2, weight_decay=0.1))
        losses = []
        for batch in batches * 3:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        runs.append((losses, trained))
    assert runs[0][0] == runs[1][0] and len(set(runs[0][0])) > 20
    assert list(runs[0][1]) == list(runs[1][1])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values()))
    assert all(p.any() for name, p in runs[0][1].items() if "never" not in name)


def test_without_a_plan_inject_is_baselines_lora_to_the_bit():
    layers = []
    for method, options in ((lora, {}), (task_tlora, {"train_a": True})):
        model = transformer()
        method.inject(model, TARGETS, rank=5, **options)
        layers.append([model.get_submodule(name) for name in TARGETS])
    assert all(torch.equal(a.A, b.A) and a.scaling == b.scaling for a, b in zip(*layers))


# ---------------------------------------------------------------------------- what A is


@pytest.mark.parametrize("svd", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (8, 8)])
def test_A_is_numpys_singular_vectors_of_WC_up_to_sign(svd, shape):
    m, n = shape
    W, _, C, _ = random_problem(m=m, n=n)
    for r in (1, 3, min(m, n)):
        A = task_tlora.init_A(W, C, r, "wc", svd).numpy()
        Vh = np.linalg.svd(W.numpy() @ C.numpy())[2][:r]
        signs = np.sign((A * Vh).sum(1, keepdims=True))
        print(r, "largest difference", abs(A - signs * Vh).max())
        assert A.shape == (r, n)
        assert np.allclose(A, signs * Vh, atol=1e-9)


def test_the_four_inits_through_calibrate():
    plans = {}
    for init in INITS:
        model = transformer()
        plans[init] = calibrate(model, ["up_proj"], examples(), loss_fn, rank=3, init=init)["up_proj"]
    reference = transformer().eval()
    for batch in examples():
        reference(batch[0])
    X = torch.cat([x.reshape(-1, 12) for x in reference.up_proj.seen]).numpy()
    W, C = reference.up_proj.weight.detach().numpy(), X.T @ X / 6
    values, vectors = np.linalg.eigh(C + 1e-6 * np.eye(12))
    root = vectors @ np.diag(values**0.5) @ vectors.T
    expected = {
        "wc": np.linalg.svd(W @ C)[2][:3],
        "w": np.linalg.svd(W)[2][:3],
        "theory": np.linalg.svd(W @ root)[2][:3] @ np.linalg.inv(root),
    }
    for init, A in expected.items():
        ours = plans[init].A.numpy()
        signs = np.sign((ours * A).sum(1, keepdims=True))
        print(init, abs(ours - signs * A).max())
        assert np.allclose(ours, signs * A, atol=1e-7 * abs(A).max())
    assert plans["random"].A is None
    spaces = [np.linalg.qr(A.T)[0] @ np.linalg.qr(A.T)[0].T for A in expected.values()]
    assert min(abs(a - b).max() for a, b in itertools.combinations(spaces, 2)) > 0.01  # three different A


def spectra(n, r):
    """Spectra to try: flat after a gap of 1.05 at r, a power law, a slow and a fast decay, a wide range."""
    flat = np.ones(n)
    flat[:r] = 1.05
    yield "a gap of 1.05, then flat", flat
    yield "1 / i", 1 / np.arange(1, n + 1)
    yield "1 / i^(1/4)", np.arange(1, n + 1) ** -0.25
    yield "0.99^i", 0.99 ** np.arange(n)
    yield "0.9^i", 0.9 ** np.arange(n)
    wide = np.full(n, 1e-8 / 1.06)
    wide[:r] = np.logspace(0, -8, r)
    yield "eight decades, then flat", wide
    yield "without order", np.linalg.svd(np.random.default_rng(n).normal(size=(n, n)))[1]


def random_columns(n, r):
    """How many columns the fast path would see, by its docstring: start and log2(n) + 2 steps of r + 8."""
    return (r + 8) * (1 + math.floor(math.log2(n)) + 1 + 2)


@pytest.mark.parametrize("n, r", [(200, 1), (300, 1), (300, 2), (320, 8)])
def test_the_fast_path_spans_the_space_of_the_exact_one(n, r):
    assert random_columns(n, r) < 5 / 8 * n  # no full SVD
    for name, sigma in spectra(n, r):
        M = matrix_with(sigma, m=n + 5)
        exact, fast = task_tlora.exact_vectors(M, r), task_tlora.fast_vectors(M, r)
        energy = (M @ fast.mT).square().sum() / (M @ exact.mT).square().sum()
        phi = task_tlora.subspace_similarity(fast, exact).item()
        print(f"{name}: gap {sigma[r - 1] / sigma[r]:.3f} phi {phi:.6f} energy {energy:.6f}")
        assert energy >= 0.999
        assert phi >= 0.999 or sigma[r - 1] / sigma[r] < 1.05
        assert torch.allclose(fast @ fast.mT, torch.eye(r, dtype=M.dtype), atol=1e-12)


@pytest.mark.parametrize("m, n, r, width", [
    (600, 1024, 8, 224), (1024, 1024, 8, 224), (512, 512, 8, 208), (2000, 512, 8, 208), (300, 300, 1, 108),
    (1024, 1024, 37, 630),  # of 640
    (1024, 1024, 38, None), (512, 512, 17, None), (1024, 1024, 128, None), (256, 256, 8, None), (3, 3, 2, None),
    (358, 1024, 8, None), (1024, 299, 8, None),  # the smaller side counts
    (359, 1024, 8, 224), (192, 300, 2, 120), (191, 300, 2, None),  # 120 is 5/8 of 192
])  # fmt: skip
def test_the_fast_path_is_not_the_exact_one_in_disguise_unless_that_is_faster(monkeypatch, m, n, r, width):
    """The full SVD sees a matrix of `width` columns, or M itself where that would be 5/8 of its smaller side."""
    shapes = []
    monkeypatch.setattr(task_tlora, "exact_vectors", lambda M, r: shapes.append(M.shape) or M[:r])
    g = torch.Generator().manual_seed(0)
    M = torch.randn(m, n, generator=g)
    A = task_tlora.fast_vectors(M, r)
    assert shapes == [(m, width or n)]
    if width is None:
        assert torch.equal(A, M[:r])
    else:
        assert width == random_columns(n, r) <= 5 / 8 * min(m, n)


def test_the_svd_asked_for_is_the_svd_taken():
    """Where Krylov pays, both give the same space and not the same bits; through calibrate, too."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(320, 300, bias=False)), list(torch.randn(3, 1, 400, 320))
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    C = see_inputs(model, {"0": model[0]}, batches, loss, False)["0"].double()
    M = model[0].weight.detach().double() @ (C / C.abs().max())
    for svd, vectors in (("exact", task_tlora.exact_vectors), ("fast", task_tlora.fast_vectors)):
        A = calibrate(model, ["0"], batches, loss, rank=1, svd=svd)["0"].A
        assert torch.equal(A, vectors(M, 1)) and torch.equal(A, task_tlora.init_A(M, torch.eye(320).double(), 1, svd=svd))
    assert not torch.equal(task_tlora.exact_vectors(M, 1).abs(), task_tlora.fast_vectors(M, 1).abs())
    assert inspect.signature(calibrate).parameters["svd"].default == "fast"


def test_fast_and_exact_agree_on_the_activations_of_the_pretrained_base():
    """C of its widest layers, with a W of full rank: theirs of rank 128 take the full SVD."""
    tokenizer, task = data.Tokenizer(), data.TASKS["cola"]
    base = load_base(ASSETS / "encoder.safetensors", "classification", 2)
    rows = data.features(task, data.load("cola")[:32], tokenizer, 64)
    batches = [next(data.batches([row], task, 1, tokenizer.pad_id)) for row in rows]
    loss = lambda model, batch: F.cross_entropy(logits(model, batch), batch["labels"])  # noqa: E731
    linears = task_tlora.find_linears(base, ["down_proj"])
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaps = []
    for name, C in see_inputs(base, linears, batches, loss, False).items():
        M = W @ C.double()
        exact = task_tlora.exact_vectors(M, 17)
        sigma = (M @ exact.mT).norm(dim=0)
        for r in (1, 2, 4, 8, 16):
            assert random_columns(512, r) < 5 / 8 * 512  # no full SVD
            fast = task_tlora.fast_vectors(M, r)
            energy = (M @ fast.mT).square().sum() / sigma[:r].square().sum()
            phi = task_tlora.subspace_similarity(fast, exact[:r]).item()
            gaps.append((sigma[r - 1] / sigma[r]).item())
            print(f"{name} r {r}: gap {gaps[-1]:.3f} phi {phi:.6f} energy {energy:.6f}")
            assert energy >= 0.999
            assert phi >= 0.999 or gaps[-1] < 1.05
    assert len(gaps) == 5 * len(linears) == 20 and sum(gap >= 1.05 for gap in gaps) > 8


@pytest.mark.parametrize("svd", ["exact", "fast"])
@pytest.mark.parametrize("init", ["wc", "w", "theory"])
def test_rank_deficient_and_zero_C_give_a_full_A(init, svd):
    W = random_problem(m=10, n=30)[0]
    X = random_problem(n=30, tokens=3)[1]
    for C in (X.mT @ X, torch.zeros(30, 30, dtype=W.dtype)):  # fewer tokens than r; none
        A = task_tlora.init_A(W, C, 8, init, svd)
        assert A.shape == (8, 30) and A.isfinite().all() and torch.linalg.matrix_rank(A) == 8
        if init != "theory":
            assert torch.allclose(A @ A.mT, torch.eye(8, dtype=W.dtype), atol=1e-12)
    if init == "wc":  # what the tokens span comes first
        seen = task_tlora.init_A(W, X.mT @ X, 8, init, svd)[:3]
        assert task_tlora.subspace_similarity(seen, X) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_the_scale_of_C_changes_nothing(svd):
    W, _, C, _ = random_problem(m=30, n=60, tokens=90)
    A = task_tlora.init_A(W, C, 3, "wc", svd)
    for scale in (1e-290, 1e-12, 1e12, 1e290):
        scaled = task_tlora.init_A(W, C * scale, 3, "wc", svd)
        assert task_tlora.subspace_similarity(A, scaled) == pytest.approx(1, abs=1e-12)


def test_huge_and_tiny_activations_through_calibrate():
    """Only the first layer's input is scaled: its ranks and A do not depend on the scale."""
    torch.manual_seed(0)
    W, x = torch.randn(8, 16), torch.randn(5, 16)
    spaces = []
    for scale in (1e-12, 1.0, 1e12):
        model = nn.Sequential(nn.Linear(16, 8, bias=False))
        model[0].weight.data = W / scale
        plan = calibrate(model, ["0"], [x * scale], lambda m, x: m(x).square().sum(), rank=4)
        assert plan["0"].score > 0
        spaces.append(plan["0"].A)
    assert task_tlora.subspace_similarity(spaces[0], spaces[1]) > 0.9999
    assert task_tlora.subspace_similarity(spaces[2], spaces[1]) > 0.9999


# -------------------------------------------------------- Section 3.2 and Appendices A and B


def test_Eq_2_an_SGD_step_on_B_moves_W_by_eta_s_squared_G_AtA():
    """The paper's Eq. 2 has the scaling once: its dL/dB = dL/dW A^T leaves out the s of h = s B A x."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 7).double()
    A = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q.mT
    layer = TaskTLoRALinear(linear.requires_grad_(True), Allocation(3, 2.5, A), False, 0.0)
    x, y = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    F.mse_loss(layer(x), y).backward()
    G, eta = linear.weight.grad, 0.1
    assert torch.allclose(layer.B.grad, 2.5 * G @ A.mT, atol=1e-14)
    torch.optim.SGD([layer.B], lr=eta).step()
    P, Q = layer.factors()
    expected = -eta * 2.5**2 * G @ A.mT @ A
    print("largest difference", (P @ Q - expected).abs().max().item())
    assert torch.allclose(P @ Q, expected, atol=1e-15)
    assert not torch.allclose(P @ Q, expected / 2.5, atol=1e-3)  # Eq. 2 as printed


@pytest.mark.parametrize("times", [0.25, 4.0])
def test_the_scale_and_AdamWs_rate_are_one_setting(times):
    """docs/claims.md: `times` the scale with the rate divided by it is the same run, as long as nothing clips the gradient."""

    def trained(alpha, lr):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(12, 9)).double(), torch.randn(32, 12, dtype=torch.float64)
        y = torch.randn(32, 9, dtype=torch.float64)
        inject(model, ["0"], rank=3, alpha=alpha)
        optimizer = torch.optim.AdamW(param_groups(model, lr=lr, weight_decay=0.0), eps=1e-30)
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return torch.matmul(*model[0].factors())

    here, there, other = trained(6.0, 0.01), trained(6.0 * times, 0.01 / times), trained(6.0 * times, 0.01)
    error = (here - there).abs().max().item()
    print(f"largest difference {error:.1e}, of the scale alone {(here - other).abs().max():.1e}")
    assert error < 1e-12 and (here - other).abs().max() > 0.01


@pytest.mark.parametrize("r", [1, 3])
def test_Eq_8_is_the_least_squares_error_with_A_frozen(r):
    W, X, C, D = random_problem()
    A = random_problem(seed=5, m=r)[0]
    H, Y = X @ A.mT, X @ D.mT  # features and targets
    B = torch.linalg.lstsq(H, Y).solution
    error = (Y - H @ B).square().sum() / len(X)
    print(error.item(), task_tlora.expected_loss(A, C, D).item())
    assert task_tlora.expected_loss(A, C, D) == pytest.approx(error.item(), rel=1e-10)
    assert task_tlora.expected_loss(A, C, D, noise=2.0) == pytest.approx(error.item() + 2, rel=1e-10)


def test_Eqs_9_and_10_are_the_same_number():
    _, _, C, D = random_problem()
    root, _ = task_tlora.square_roots(C, eps=0.0)
    for seed in range(5):
        A = random_problem(seed=seed + 1, m=3)[0]
        by_trace = torch.trace(task_tlora.projector(A @ root) @ task_tlora.target_matrix(D, C))
        assert task_tlora.objective(A, C, D) == pytest.approx(by_trace.item(), rel=1e-10)
    P = task_tlora.projector(A)
    assert torch.allclose(P, A.mT @ torch.linalg.inv(A @ A.mT) @ A, atol=1e-12)
    assert torch.allclose(P @ P, P, atol=1e-12) and P.trace() == pytest.approx(3)


def test_objective_takes_a_singular_ACAt():
    """Two equal rows say no more than one."""
    _, _, C, D = random_problem()
    a = random_problem(seed=5, m=1)[0]
    J = task_tlora.objective(a, C, D).item()
    assert task_tlora.objective(torch.cat([a, a]), C, D) == pytest.approx(J, rel=1e-9)


def test_Eqs_11_to_14_no_A_exceeds_the_top_eigenvalues_and_the_best_one_reaches_them():
    _, _, C, D = random_problem()
    M = task_tlora.target_matrix(D, C)
    root, inverse_root = task_tlora.square_roots(C, eps=0.0)
    for r in (1, 3, 6):
        bound = task_tlora.upper_bound(M, r).item()
        assert bound == pytest.approx(np.sort(np.linalg.eigvalsh(M.numpy()))[-r:].sum(), rel=1e-10)
        trials = [task_tlora.objective(random_problem(seed=s, m=r)[0], C, D) for s in range(300)]
        print(f"r {r}: bound {bound:.4f}, best of 300 random A {max(trials):.4f}")
        assert 0 < max(trials) <= bound * (1 + 1e-12)
        V = task_tlora.exact_vectors(D @ root, r)  # Eq. 14
        best = V @ inverse_root
        assert task_tlora.objective(best, C, D) == pytest.approx(bound, rel=1e-9)
        assert torch.allclose(task_tlora.projector(best @ root), V.mT @ V, atol=1e-9)  # Eq. 13
        Q = random_problem(seed=9, m=r, n=r)[0]  # any basis of the same space does
        assert task_tlora.objective(Q @ best, C, D) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_Eqs_3_and_16_the_theory_init_is_the_projection_of_Eq_13(svd):
    W, _, C, _ = random_problem()
    A = task_tlora.init_A(W, C, 3, "theory", svd)
    C = C + 1e-6 * torch.eye(9, dtype=C.dtype)
    root, inverse_root = task_tlora.square_roots(C, eps=0.0)
    assert torch.allclose(root @ root, C, atol=1e-12)
    assert torch.allclose(root @ inverse_root, torch.eye(9, dtype=C.dtype), atol=1e-10)
    values, vectors = np.linalg.eigh(task_tlora.target_matrix(W, C).numpy())  # the proxy of Appendix A
    P = torch.from_numpy(vectors[:, -3:] @ vectors[:, -3:].T)
    assert torch.allclose(task_tlora.projector(A @ root), P, atol=1e-9)
    assert task_tlora.objective(A, C, W) == pytest.approx(values[-3:].sum(), rel=1e-9)
    wc = task_tlora.objective(task_tlora.init_A(W, C, 3), C, W)  # Eq. 4 comes near, and stays below
    assert 0.8 * values[-3:].sum() < wc < values[-3:].sum()


def test_the_theory_init_amplifies_the_small_directions_and_wc_does_not():
    """Appendix B.1: rows of C^(-1/2) grow as the small eigenvalues shrink."""
    W = random_problem()[0]
    C = torch.diag(torch.logspace(2, -6, 9, dtype=torch.float64))
    theory, wc = (task_tlora.init_A(W, C, 7, init) for init in ("theory", "wc"))
    assert theory.norm(dim=1).max() > 50 and wc.norm(dim=1).max() == pytest.approx(1)


def test_square_roots_take_an_eigenvalue_that_rounding_made_negative():
    C = torch.diag(torch.tensor([1.0, -1e-5], dtype=torch.float64))
    root, inverse_root = task_tlora.square_roots(C)
    assert root.diag().tolist() == pytest.approx([(1 + 1e-6) ** 0.5, 1e-3], rel=1e-14)
    assert inverse_root.diag().tolist() == pytest.approx([(1 + 1e-6) ** -0.5, 1e3], rel=1e-14)


def test_eps_is_added_to_every_eigenvalue():
    """C + eps I of Appendix A, not a least value: an eigenvalue above eps moves, too."""
    C = torch.diag(torch.tensor([4.0, 1e-6, 0.0], dtype=torch.float64))
    for eps, options in ((1e-6, {}), (0.5, {"eps": 0.5})):
        root, inverse_root = task_tlora.square_roots(C, **options)
        expected = [math.sqrt(value + eps) for value in (4.0, 1e-6, 0.0)]
        assert root.diag().tolist() == pytest.approx(expected, rel=1e-14)
        assert inverse_root.diag().tolist() == pytest.approx([1 / value for value in expected], rel=1e-14)
        assert not (root - root.diag().diag()).any()


def test_Eqs_15_and_17_subspace_similarity():
    phi = task_tlora.subspace_similarity
    basis = torch.eye(6, dtype=torch.float64)
    mix = random_problem(m=2, n=2)[0]
    assert phi(mix @ basis[:2], basis[:2]) == pytest.approx(1)  # any basis of the same space
    assert phi(basis[:2], basis[2:4]) == 0
    assert phi(basis[:2], basis[1:3]) == pytest.approx(0.5)
    U, V = random_problem(m=3)[0], random_problem(seed=1, m=3)[0]
    u, v = np.linalg.qr(U.numpy().T)[0], np.linalg.qr(V.numpy().T)[0]
    cosines = np.linalg.svd(u.T @ v)[1]  # of the principal angles
    assert 0.05 < phi(U, V) < 0.95 and phi(U, V) == pytest.approx((cosines**2).mean(), rel=1e-12)


# ------------------------------------------------------------------------- the verbs


def adapted(dtype=torch.float64, train_a=False, **options):
    model = transformer(dtype)
    plan = calibrate(model, TARGETS, examples(), loss_fn, rank=3, alpha=5.0, **options)
    names = inject(model, TARGETS, plan=plan, train_a=train_a)
    return model, plan, names


def train(model, steps=4):
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    for batch in examples(steps, seed=7):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


def test_the_layer_is_Eq_1_in_numpy():
    torch.manual_seed(0)
    linear, A = nn.Linear(9, 7).double(), torch.randn(3, 9, dtype=torch.float64)
    layer = TaskTLoRALinear(linear, Allocation(3, 1.7, A), False, 0.0)
    layer.B.data = torch.randn(7, 3, dtype=torch.float64)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    W, b, B = (t.detach().numpy() for t in (linear.weight, linear.bias, layer.B))
    expected = x.numpy() @ (W + 1.7 * B @ A.numpy()).T + b
    assert np.allclose(layer(x).detach().numpy(), expected, atol=1e-13)


def test_dropout_is_on_the_adapters_input_and_in_training_alone():
    torch.manual_seed(0)
    linear, A, B = nn.Linear(9, 7), torch.randn(3, 9), torch.randn(7, 3)
    layer = TaskTLoRALinear(linear, Allocation(3, 1.7, A), False, 0.4)
    layer.B.data = B
    x = torch.randn(50, 9)
    torch.manual_seed(1)
    kept = F.dropout(torch.ones(50, 9), 0.4)  # 0 or 1 / 0.6
    assert 0.3 < (kept == 0).double().mean() < 0.5
    torch.manual_seed(1)
    trained = layer.train()(x)
    with torch.no_grad():
        in_training, in_eval = (linear(x) + 1.7 * (x * factor) @ A.mT @ B.mT for factor in (kept, 1))
    print("largest differences", (trained - in_training).abs().max().item(), (layer.eval()(x) - in_eval).abs().max().item())
    assert torch.allclose(trained, in_training, atol=1e-5) and torch.allclose(layer.eval()(x), in_eval, atol=1e-5)
    assert (trained - in_eval).abs().max() > 1


def test_a_wrapped_layer_keeps_its_mode_and_its_place_in_it():
    model = transformer()
    model.v_proj.eval()
    inject(model, ["v_proj", "k_proj"], rank=2, dropout=0.25)
    assert (model.v_proj.training, model.k_proj.training) == (False, True)
    assert model.v_proj.dropout == model.k_proj.dropout == 0.25
    assert task_tlora.watch(model)["importance"] == {"k_proj": 0.0, "v_proj": 0.0}  # nothing was measured


def test_the_groups_hold_what_is_trained_and_nothing_frozen():
    model, plan, names = adapted(train_a=True)
    model.head.requires_grad_(True)
    (group,) = param_groups(model, lr=0.3, weight_decay=0.7)
    trained = {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}
    assert trained == {f"{name}.{factor}" for name in names for factor in "AB"} | {"head.weight", "head.bias"}
    assert len(group["params"]) == len(trained) and set(group) == {"params", "lr", "weight_decay"}
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.7)


@pytest.mark.parametrize("train_a", [False, True])
def test_only_B_or_A_and_B_train(train_a):
    model, plan, names = adapted(train_a=train_a)
    before = {key: value.clone() for key, value in model.state_dict().items() if value is not None}
    train(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.{factor}" for name in names for factor in ("AB" if train_a else "B")}


def test_the_output_is_untouched_at_the_start():
    model, plan, names = adapted(torch.float32)
    plain = transformer(torch.float32).eval()
    model.eval()
    assert all(torch.equal(model(ids), plain(ids)) for ids, _ in examples())
    train(model)
    assert not any(torch.equal(model.eval()(ids), plain(ids)) for ids, _ in examples())


def test_zero_rank_layers_stay_plain():
    model, plan, names = adapted()
    assert plan["never"].rank == 0 and type(model.never) is Recorder and "never" not in names
    assert sum(a.rank for a in plan.values()) == 3 * len(TARGETS)


def test_ranks_are_capped_by_the_layers():
    model = nn.Sequential(nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 16))
    batches = [torch.randn(1, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    square = lambda m, x: m(x).square().sum()  # noqa: E731
    plan = calibrate(model, ["0", "2"], batches, square, rank=2)
    assert [a.rank for a in plan.values()] == [2, 2]
    with pytest.warns(UserWarning, match="total rank of 20 .* clipped to 4"):
        plan = calibrate(model, ["0", "2"], batches, square, rank=10)
    assert [a.rank for a in plan.values()] == [2, 2]
    uniform = {"adapt_rank": False, "adapt_scale": False}
    plan = calibrate(model, ["0", "2"], batches, square, rank=10, alpha=6.0, **uniform)
    assert [(a.rank, a.scaling) for a in plan.values()] == [(2, 3.0), (2, 3.0)]
    assert inject(model, ["0", "2"], plan=plan) == ["0", "2"]


def test_saved_adapters_load_into_a_model_injected_with_uniform_ranks():
    model, plan, names = adapted()
    train(model)
    ranks = {name: model.get_submodule(name).rank for name in names}
    assert len(set(ranks.values())) > 1
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(99)
    fresh = TinyTransformer().double()
    inject(fresh, names)  # rank 8 everywhere, another A
    fresh.load_state_dict(saved)
    assert {name: fresh.get_submodule(name).rank for name in names} == ranks
    assert task_tlora.watch(fresh) == task_tlora.watch(model)
    model.eval(), fresh.eval()
    assert all(torch.equal(fresh(ids), model(ids)) for ids, _ in examples())
    train(fresh), train(model)  # and it trains on
    assert all(torch.equal(fresh.eval()(ids), model.eval()(ids)) for ids, _ in examples())


def test_a_saved_adapter_of_another_width_is_refused():
    model, _, names = adapted()
    inject(other := TinyTransformer(width=24).double(), names)
    saved = {key: value for key, value in model.state_dict().items() if key.endswith((".A", ".B"))}
    with pytest.raises(RuntimeError, match="size mismatch for q_proj.A"):
        other.load_state_dict(saved, strict=False)


def test_the_scaling_survives_a_cast_and_a_round_trip():
    model, plan, names = adapted()
    assert torch.tensor(plan["q_proj"].scaling).bfloat16().item() != plan["q_proj"].scaling
    model.to(torch.bfloat16)
    assert model.q_proj.scaling == plan["q_proj"].scaling
    fresh = TinyTransformer().to(torch.bfloat16)
    inject(fresh, names)
    fresh.load_state_dict(model.state_dict())
    assert fresh.q_proj.scaling == plan["q_proj"].scaling


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_equals_unmerged_with_different_ranks(dtype, bound):
    model, plan, names = adapted(dtype)
    train(model)
    model.eval()
    before = [model(ids) for ids, _ in examples()]
    assert merge(model) == names
    assert not any(isinstance(m, TaskTLoRALinear) for m in model.modules())
    error = max((model(ids) - b).abs().max().item() for (ids, _), b in zip(examples(), before))
    print("largest difference", error)
    assert error < bound
    assert not torch.equal(model.q_proj.weight, transformer(dtype).q_proj.weight)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_A_is_the_plans_in_float32_whatever_the_models_dtype(dtype):
    model, plan, names = adapted(dtype)
    for name in names:
        layer = model.get_submodule(name)
        assert layer.base.weight.dtype == dtype and plan[name].A.dtype == torch.float64
        assert layer.A.dtype == layer.B.dtype == torch.float32
        assert torch.equal(layer.A, plan[name].A.float())


def test_watch_and_describe_are_plain_numbers():
    model, plan, names = adapted()
    assert task_tlora.watch(model) == {
        "ranks": {name: plan[name].rank for name in names},
        "importance": {name: pytest.approx(plan[name].share, rel=1e-6) for name in names},
        "scaling": {name: plan[name].scaling for name in names},
    }
    described = json.loads(json.dumps(task_tlora.describe(plan), allow_nan=False))
    assert list(described) == TARGETS
    for name, numbers in described.items():
        assert set(numbers) == {"rank", "scaling", "score", "share", "spectrum"}
        assert len(numbers["spectrum"]) == transformer().get_submodule(name).in_features
        assert numbers["spectrum"] == sorted(numbers["spectrum"], reverse=True)
        assert numbers["spectrum"][-1] >= 0
    assert sum(numbers["share"] for numbers in described.values()) == pytest.approx(1)


class Reads(nn.Module):
    """Calls one layer and computes with the weight of another, as Mamba and WavLM do."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.called(x) @ self.read.weight


def test_a_layer_that_is_read_instead_of_called_is_no_layer_without_input():
    torch.manual_seed(0)
    model, batches = Reads(), list(torch.randn(3, 2, 6))
    square = lambda model, batch: model(batch).square().sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"layer read gets a gradient and is never seen to run: .* \(exclude it\)"):
        calibrate(model, ["called", "read"], batches, square, rank=2)
    assert calibrate(model, ["called", "read"], batches, square, ["read"], rank=2)["called"].spectrum[0] > 0


def test_a_compiled_model_that_has_run_before_shows_no_input_and_is_refused():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).eval().requires_grad_(False), torch.randn(3, 2, 6)
    square = lambda model, batch: model(batch).square().sum()  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(batches[0])
    with pytest.raises(ValueError, match=r"layer _orig_mod.0 gets a gradient .* was compiled and has run before"):
        calibrate(compiled, ["0", "2"], batches, square, rank=2)
    assert all(given.spectrum[0] > 0 for given in calibrate(model, ["0", "2"], batches, square, rank=2).values())


def test_a_default_device_does_not_reach_the_draws_of_the_fast_svd():
    torch.manual_seed(0)
    M = torch.randn(600, 600, dtype=torch.float64)
    found = task_tlora.fast_vectors(M, 2)
    with torch.device("meta"):
        assert torch.equal(task_tlora.fast_vectors(M, 2), found)
    assert not torch.equal(task_tlora.exact_vectors(M, 2), found)  # the fast way was taken


def test_other_ranks_are_loaded_beside_a_graph_that_is_still_alive():
    models, x = [nn.Sequential(nn.Linear(16, 16)) for _ in range(2)], torch.randn(3, 16)
    for model, rank in zip(models, (2, 4)):
        inject(model, ["0"], rank=rank, train_a=True)
    alive = models[0](x).sum()
    models[0].load_state_dict(models[1].state_dict())
    models[0](x).sum().backward()
    assert models[0][0].B.grad.shape == (16, 4) and models[0][0].B.grad.abs().sum() > 0 and alive.requires_grad


def test_wrong_input_is_refused_in_one_line():
    model, batches = transformer(), examples()
    with pytest.raises(ValueError, match="init 'svd' is unknown: allowed are wc, w, random, theory"):
        calibrate(model, ["q_proj"], batches, loss_fn, init="svd")
    with pytest.raises(ValueError, match="svd 'slow' is unknown: allowed are exact, fast"):
        calibrate(model, ["q_proj"], batches, loss_fn, svd="slow")
    for rank in (0, 4.0):
        with pytest.raises(ValueError, match=f"rank {rank} is no whole number above 0"):
            calibrate(model, ["q_proj"], batches, loss_fn, rank=rank)
    with pytest.raises(ValueError, match="target 'nothing' matches no nn.Linear"):
        calibrate(model, ["nothing"], batches, loss_fn)
    plan = calibrate(model, ["q_proj"], batches, loss_fn, rank=2)
    with pytest.raises(ValueError, match="the plan is for other layers: k_proj"):
        inject(model, ["q_proj", "k_proj"], plan=plan)
    with pytest.raises(ValueError, match=r"rank 13 does not fit layer q_proj \(12, 12\): .* 1 to 12"):
        inject(model, ["q_proj"], rank=13)
    for rank in (-1, 0, 13, 36, 4.0):
        with pytest.raises(ValueError, match=rf"rank {rank} does not fit layer down_proj \(12, 36\): allowed are 1 to 12"):
            inject(model, ["down_proj"], rank=rank)
    for dropout in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"dropout {dropout} is not in \[0, 1\)"):
            inject(model, ["q_proj"], dropout=dropout)
    assert not any(isinstance(m, TaskTLoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())  # nothing was half done
    for rank in (1, 12):  # the smallest and the largest that fit
        inject(model := transformer(), ["down_proj"], rank=rank, alpha=3.0)
        assert (model.down_proj.rank, model.down_proj.scaling) == (rank, 3.0 / rank)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {"down_proj.B"}


@pytest.mark.parametrize(
    "wrong, words",
    [
        (Allocation(2, 1.0, torch.zeros(2, 12)), r"the plan's A for layer down_proj is \(2, 12\): \(2, 36\) is right"),
        (Allocation(2, 1.0, torch.zeros(3, 36)), r"the plan's A for layer down_proj is \(3, 36\): \(2, 36\) is right"),
        (Allocation(2, 1.0, torch.zeros(36)), r"the plan's A for layer down_proj is \(36,\): \(2, 36\) is right"),
        (Allocation(0, 0.0, torch.zeros(1, 36)), r"the plan's A for layer down_proj is \(1, 36\): \(0, 36\) is right"),
        (Allocation(13, 1.0), r"the plan's rank 13 does not fit layer down_proj \(12, 36\): allowed are 0 to 12"),
        (Allocation(-1, 1.0), r"the plan's rank -1 does not fit layer down_proj \(12, 36\): allowed are 0 to 12"),
        (Allocation(2.5, 1.0), r"the plan's rank 2.5 does not fit layer down_proj \(12, 36\): allowed are 0 to 12"),
        (Allocation(24, 1.0, torch.zeros(24, 36)), r"the plan's rank 24 does not fit layer down_proj"),
    ],
)
def test_a_plan_is_checked_whole_before_the_first_layer_is_replaced(wrong, words):
    model = transformer()
    plan = calibrate(model, TARGETS, examples(), loss_fn, rank=2)
    plan["down_proj"] = wrong  # the fifth layer
    with pytest.raises(ValueError, match=f"^{words}"):
        inject(model, TARGETS, plan=plan)
    assert not any(isinstance(m, TaskTLoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    plan["down_proj"] = Allocation(12, 1.0, torch.zeros(12, 36))  # the largest rank there is
    assert "down_proj" in inject(model, TARGETS, plan=plan)


def test_an_allocation_of_a_rank_and_a_scaling_says_nothing_else():
    assert vars(Allocation(3, 2.0)) == {"rank": 3, "scaling": 2.0, "A": None, "score": 0.0, "share": 0.0, "spectrum": ()}


def test_the_defaults_are_the_documented_ones():
    """Those of train.py's flags too, which it takes from the signatures."""
    defaults = [
        {p.name: p.default for p in inspect.signature(verb).parameters.values() if p.default is not p.empty}
        for verb in (calibrate, inject)
    ]
    assert defaults == [
        {"exclude": (), "rank": 8, "alpha": 16.0, "samples": 32, "init": "wc", "svd": "fast", "adapt_rank": True,
         "adapt_scale": True, "center": False, "spectrum": True, "memory": 2 * 1024**3, "progress": iter},
        {"exclude": (), "plan": None, "rank": 8, "alpha": 16.0, "train_a": False, "dropout": 0.0},
    ]  # fmt: skip


def test_every_option_has_a_help_line_and_shared_ones_one_meaning():
    documented = {}
    for verb in (calibrate, inject):
        keywords = [p for p in inspect.signature(verb).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = verb.__doc__.split("Options:\n")[1]
        helps = dict(re.findall(r"^        (\w+): (.*(?:\n            .*)*)", options, re.M))
        flags = [p for p in keywords if p.annotation is not p.empty]
        assert list(helps) == [p.name for p in flags]
        assert {p.name for p in keywords} - set(helps) == ({"plan"} if verb is inject else {"spectrum", "memory", "progress"})
        for p in flags:
            assert p.annotation in (int, float, bool) or typing.get_origin(p.annotation) is typing.Literal
            entry = (p.annotation, p.default, helps[p.name])
            assert documented.setdefault(p.name, entry) == entry
    assert {"rank", "alpha"} < set(documented) and len(documented) == 10


def test_the_demo_shows_that_a_computed_A_beats_a_random_one(capsys):
    task_tlora.main()
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"step 100  loss ([\d.]+)", printed)]
    assert len(losses) == 2 and losses[1] < 0.8 * losses[0]
    assert printed.count("unchanged at the start: True") == 2


def test_loading_changes_nothing_but_the_numbers_unless_ranks_differ():
    model, _, names = adapted()
    train(model)
    layer = model.get_submodule(names[0])
    tensors = {"A": layer.A, "B": layer.B}
    where = {key: (id(t), t.data_ptr()) for key, t in tensors.items()}
    grad = layer.B.grad
    state = {key: value + 1 for key, value in model.state_dict().items() if torch.is_tensor(value)}
    model.load_state_dict(state)
    assert {key: (id(t), t.data_ptr()) for key, t in (("A", layer.A), ("B", layer.B))} == where
    assert layer.B.grad is grad is not None and torch.equal(layer.A, state[f"{names[0]}.A"])
    other = {"A": torch.randn(layer.rank + 1, layer.in_features), "B": torch.randn(layer.out_features, layer.rank + 1)}
    B = layer.B
    model.load_state_dict({f"{names[0]}.{key}": t for key, t in other.items()}, strict=False)
    assert layer.B is B and layer.B.grad is None and layer.rank == len(other["A"])  # an optimizer holds B still
    assert torch.equal(layer.A, other["A"].double()) and torch.equal(layer.B, other["B"].double())


@pytest.mark.parametrize("case", ["no B", "no A", "B of another rank", "A of another width", "A of three dimensions"])
def test_a_load_that_is_refused_destroys_nothing(case):
    model, _, names = adapted()
    train(model)
    layer = model.get_submodule(names[0])
    r = layer.rank + 1
    A, B = torch.ones(r, layer.in_features), torch.ones(layer.out_features, r)
    state = {
        "no B": {"A": A},
        "no A": {"B": B},
        "B of another rank": {"A": A, "B": B[:, 1:]},
        "A of another width": {"A": A[:, 1:], "B": B},
        "A of three dimensions": {"A": A[None], "B": B},
    }[case]
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    wrong = [key for key in "AB" if key in state and state[key].shape != before[key].shape]
    with pytest.raises(RuntimeError, match=f"size mismatch for {names[0]}.{wrong[0]}"):
        model.load_state_dict({f"{names[0]}.{key}": t for key, t in state.items()}, strict=False)
    after = layer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in set("AB") & set(wrong))
    assert layer.A.shape[0] == layer.B.shape[1] == r - 1 and layer.scaling == before["_extra_state"].item()


def test_the_demo_shows_how_near_the_bound_each_choice_of_a_is_and_what_merging_changes(capsys):
    task_tlora.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "J(A) / its upper bound, W0 for the ideal update".split()
    assert lines[1].split() == "layer importance rank scaling A of W0 C A at random".split()
    rows = [line.split() for line in lines[2:4]]
    assert [row[0] for row in rows] == ["0", "2"]
    shares, ranks, scalings, ours, random = ([float(row[i]) for row in rows] for i in range(1, 6))
    assert abs(sum(shares) - 1) < 2e-3 and sum(ranks) == 8
    assert all(abs(s - 4 * 2 * share / 4) < 2e-3 for s, share in zip(scalings, shares))  # alpha x layers x share / rank
    assert all(0.85 < a <= 1 and 0.3 < b < 0.6 for a, b in zip(ours, random))
    words, difference = lines[-1].split(": largest difference ")
    assert words.startswith("merged into Linear(") and 0 < float(difference) < 1e-5
