"""CorDA: second moments, directions and damping against numpy, and PEFT's on the same weights and samples."""

import copy
import dataclasses
import importlib.util
import sys

import numpy as np
import parity
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_pissa import same_from_the_start

from baselines import corda, lora


def batches(count=6, dtype=torch.float32):
    return [parity.batch(1000 + i, dtype) for i in range(count)]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def plan_of(model, **options):
    return corda.calibrate(model, parity.LAYERS, batches(dtype=model[0].weight.dtype), loss_fn, rank=3, **options)


def by_numpy(model, name, count=6):
    """C and W of a layer, in float64."""
    inputs = [x for x, _ in batches(count, torch.float64)]
    with torch.no_grad():
        inputs = [model[: int(name)](x).numpy() for x in inputs]
    C = sum((X / abs(X.max())).T @ (X / abs(X.max())) for X in inputs) / len(inputs)
    return C, model.get_submodule(name).weight.detach().numpy()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_start_is_the_part_of_w0_in_the_first_or_last_directions_of_w0_c(mode):
    model = parity.network(torch.float64)
    plan = plan_of(model, directions=mode)
    assert list(plan) == parity.LAYERS
    for name, given in plan.items():
        C, W = by_numpy(model, name)
        D = C + 0.01 * np.diag(C).mean() * np.eye(len(C))
        values, vectors = np.linalg.eigh((W @ D) @ (W @ D).T)  # of the left singular vectors, not by an SVD
        rank_W = min(W.shape)
        order = np.argsort(values)[::-1][:rank_W]
        U = vectors[:, order[:3] if mode == "ipm" else order[-3:]]
        expected = U @ U.T @ W  # U U^T (W D) D^-1
        error = np.abs((given.B @ given.A).numpy() - expected).max()
        print(mode, name, "B A against W0 projected on the directions of W0 C", error)
        assert error < 1e-10 and np.abs(expected).max() > 0.01
        S = np.sqrt(values[order[:3] if mode == "ipm" else order[-3:]])
        gram = (given.B.T @ given.B).numpy()
        assert np.abs(gram - np.diag(S)).max() < 1e-9 * S.max(), "sqrt(S) in B"
        assert np.abs(given.spectrum.numpy() - np.linalg.eigvalsh(C)[::-1].clip(0)).max() < 1e-12
        plain = np.linalg.svd(W)[0][:, :3]
        assert np.abs(plain @ plain.T @ W - expected).max() > 0.01, "the samples matter"


def test_alpha_is_divided_out_so_the_residual_does_not_depend_on_it():
    plan = plan_of(parity.network())
    products = []
    for alpha in (3.0, 12.0):
        model = parity.network()
        corda.inject(model, parity.LAYERS, plan=plan, alpha=alpha)
        assert model[0].rank == 3 and model[0].scaling == alpha / 3
        products.append(model[0].scaling * model[0].B @ model[0].A)
    assert (products[0] - products[1]).abs().max() < 1e-6 and products[0].abs().max() > 0.1


def test_the_damping_doubles_until_the_inverse_is_one_in_floats():
    torch.manual_seed(0)
    x = torch.randn(1, 64)
    flat = x.T @ x + 1e-3 * torch.eye(64)
    D, inverse = corda.damped(flat)
    assert (D - flat - 0.01 * flat.diagonal().mean() * torch.eye(64)).abs().max() < 1e-6
    steep = torch.diag(torch.cat([torch.tensor([1e9]), torch.rand(63) * 1e-3]))
    Q = torch.linalg.qr(torch.randn(64, 64)).Q
    steep = Q @ steep @ Q.T
    assert torch.dist((steep + 1e-10 * steep.diagonal().mean() * torch.eye(64)).inverse() @ steep, torch.eye(64)) > 0.05
    scripted = []
    inverse_of = torch.linalg.inv

    def bad_twice(M):
        scripted.append(M)
        return inverse_of(M) * (2 if len(scripted) < 3 else 1)

    torch.linalg.inv = bad_twice
    try:
        D, inverse = corda.damped(flat)
    finally:
        torch.linalg.inv = inverse_of
    damp = (D - flat).diagonal().mean() / flat.diagonal().mean()
    print("damping after two doublings", damp.item())
    assert abs(damp.item() - 0.04) < 1e-5 and len(scripted) == 3 and torch.dist(D @ inverse, torch.eye(64)) < 0.05
    with pytest.raises(ValueError, match="a second moment of the inputs cannot be inverted"):
        corda.damped(torch.full((2, 2), torch.nan))  # and does not try for ever


def test_an_input_is_divided_by_its_largest_entry_if_there_is_a_positive_one():
    model = nn.Sequential(nn.Linear(2, 2).double())
    moments = {}
    for key, X in {"both": [[2.0, -4.0]], "negative": [[-2.0, -4.0]], "none": [[0.0, -4.0]]}.items():
        X = torch.tensor(X, dtype=torch.float64)
        linears = {"0": model[0]}
        moments[key] = corda.second_moments(model, linears, [X], lambda m, x: m(x), 5)["0"].tolist()
    assert moments["both"] == [[1.0, -2.0], [-2.0, 4.0]]  # by 2
    assert moments["negative"] == [[1.0, 2.0], [2.0, 4.0]]  # by |-2|
    assert moments["none"] == [[0.0, 0.0], [0.0, 16.0]]  # not by 0
    with torch.autocast("cpu", torch.bfloat16):
        C = corda.second_moments(model.float(), linears, [torch.tensor([[3.0, 1.0]])], lambda m, x: m(x), 1)["0"]
    assert C.dtype == torch.float32 and abs(C[0, 1].item() - 1 / 3) < 1e-7, "not in bfloat16"


def test_calibration_counts_samples_leaves_the_model_alone_and_works_in_eval_mode():
    model = nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.5), nn.Linear(24, 3))
    model.train()
    model[0].bias.requires_grad_(False)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seen = []

    def look(m, batch):
        seen.append(m.training or any(p.requires_grad for p in m.parameters()))
        return torch.rand(()) + loss_fn(m, batch)  # what it draws is given back

    plans = [corda.calibrate(model, ["0", "2"], batches(6), look, rank=2, samples=k) for k in (3, 3, 6)]
    assert len(seen) == 12 and not any(seen)
    assert not any(t.requires_grad for t in (plans[0]["2"].A, plans[0]["2"].B, plans[0]["2"].spectrum))
    part = corda.calibrate(model, ["0", "2"], batches(6), look, exclude=["2"])
    assert torch.equal(plans[0]["2"].B, plans[1]["2"].B) and not torch.equal(plans[0]["2"].B, plans[2]["2"].B)
    assert model.training and model[1].training and not model[0].bias.requires_grad and model[2].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert list(part) == corda.inject(model, ["0", "2"], plan=part, exclude=["2"]) == ["0"]


def test_a_layer_called_by_keyword_is_seen():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(input=x)

    x = torch.rand(5, 4)
    plan = corda.calibrate(ByKeyword(), ["layer"], [x], lambda m, x: m(x), rank=2)
    assert plan["layer"].A.shape == (2, 4)


def test_wrong_use_is_refused_in_one_line_and_changes_nothing():
    model = parity.network()
    nan = [(torch.tensor([[float("nan")] + 15 * [1.0]]), torch.zeros(1, dtype=torch.long))]  # one of sixteen
    huge = [(torch.tensor([[1e-30] + 15 * [-1.0]]), torch.zeros(1, dtype=torch.long))]  # divided by its largest entry
    unused = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(16, 4)})
    run_a = lambda m, b: m["a"](b[0])  # noqa: E731
    for call, words in [
        (lambda: plan_of(model, directions="opm"), "directions 'opm' is not one of ipm, kpm"),
        (lambda: corda.calibrate(model, ["0"], batches(), loss_fn, rank=17),
         "rank 17 does not fit layer 0 (24, 16): allowed are 1 to 16"),
        (lambda: corda.calibrate(model, ["0"], nan, loss_fn), "layer 0 gets NaN or infinity as input"),
        (lambda: corda.calibrate(model, ["0"], huge, loss_fn), "or what overflows when it is squared"),
        (lambda: corda.calibrate(model, ["0"], [], loss_fn), "layer 0 saw no input but zeros on the samples: leave it out"),
        (lambda: corda.calibrate(unused, ["a", "b"], batches(), run_a, rank=2), "layer b saw no input"),
        (lambda: corda.inject(model, ["0"], plan=plan_of(model)), "the plan is for other layers: 2"),
        (lambda: corda.inject(model, ["0", "2"], plan=plan_of(model), alpha=-1.0), "alpha -1.0 is not above 0"),
        (lambda: corda.inject(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(24, 24)), ["0", "2"],
                              plan=plan_of(model)), "the plan is for other layers: 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)
        assert all(p.requires_grad for p in model.parameters()) and type(model[0]) is nn.Linear


def test_without_a_plan_the_start_is_loras():
    models = [parity.network() for _ in range(2)]
    for method, model in zip((lora, corda), models):
        torch.manual_seed(4)
        method.inject(model, parity.LAYERS, rank=3)
    for name in parity.LAYERS:
        a, b = (model.get_submodule(name) for model in models)
        assert torch.equal(a.A, b.A) and not b.B.any() and not b.B0.any() and not b.A0.requires_grad


def test_describe_is_what_a_json_file_takes():
    plan = plan_of(parity.network())
    words = corda.describe(plan)
    assert words["2"]["rank"] == 3 and words["2"]["spectrum"] == plan["2"].spectrum.tolist()
    assert len(words["0"]["spectrum"]) == 16 and words["0"]["spectrum"][0] == max(words["0"]["spectrum"]) > 0


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_losses_equal_pefts_over_twenty_steps(dtype, bound, mode, monkeypatch):
    peft = pytest.importorskip("peft")
    if importlib.util.find_spec("attr") is None:  # PEFT takes its `dataclass` from attrs, which it does not require
        monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    ours, theirs, original = parity.network(), parity.network(), parity.network()
    plan = plan_of(ours, directions=mode)
    corda.inject(ours, parity.LAYERS, plan=plan, alpha=6.0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=parity.LAYERS, init_lora_weights="corda",
                             corda_config=CordaConfig(corda_method=mode))  # fmt: skip
    preprocess_corda(theirs, config, run_model=lambda: [loss_fn(theirs, batch) for batch in batches()])
    theirs = peft.get_peft_model(theirs, config)
    same_from_the_start(ours, theirs, original, dtype)
    parity.assert_equal(
        parity.train(ours, parity.adamw(parity.trained(ours)), dtype),
        parity.train(theirs, parity.adamw(parity.trained(theirs)), dtype),
        bound,
    )
