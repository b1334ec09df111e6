"""LoRA-GA: mean gradients, its start by numpy, a training by hand, and PEFT's variant on the same weights."""

import copy

import numpy as np
import parity
import pytest
import torch
import torch.nn as nn
from test_corda import batches, loss_fn
from test_pissa import same_from_the_start

from baselines import lora_ga, pissa, start


def plan_of(model, samples=6, **options):
    given = batches(6, model[0].weight.dtype)
    return lora_ga.calibrate(model, parity.LAYERS, given, loss_fn, **{"rank": 4, "samples": samples} | options)


def gradients(model, count=6):
    """The mean gradient of each layer's weight, by autograd alone."""
    loss = sum(loss_fn(model, batch) for batch in batches(count, model[0].weight.dtype)) / count
    grads = torch.autograd.grad(loss, [model.get_submodule(name).weight for name in parity.LAYERS])
    return dict(zip(parity.LAYERS, grads))


def test_the_gradient_is_the_mean_over_the_samples_and_the_model_is_left_alone():
    model = parity.network(torch.float64).train()
    model[2].bias.requires_grad_(False)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for samples in (2, 6, 100):
        linears = {name: model.get_submodule(name) for name in parity.LAYERS}
        ours = lora_ga.mean_gradients(model, linears, batches(6, torch.float64), loss_fn, samples)
        theirs = gradients(model, min(samples, 6))
        error = max((ours[name] - theirs[name]).abs().max().item() for name in parity.LAYERS)
        print(samples, "samples, largest difference", error, "of", theirs["0"].abs().max().item())
        assert error < 1e-15 and theirs["0"].abs().max() > 1e-3
    plan_of(model)
    assert model.training and not model[2].bias.requires_grad and model[0].bias.requires_grad
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def test_one_gradient_at_a_time_is_alive():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    alive = []
    for layer in model:  # when a layer's gradient comes, no other weight has one
        layer.register_full_backward_hook(lambda *_: alive.append(sum(p.grad is not None for p in model.parameters())))
    linears = {str(i): layer for i, layer in enumerate(model)}
    x = torch.randn(4, 8, requires_grad=True)
    lora_ga.mean_gradients(model, linears, [x], lambda m, x: m(x).square().sum(), 1)
    assert len(alive) == 5 and max(alive) <= 1


def test_old_gradients_gradients_off_and_excluded_layers():
    model = parity.network(torch.float64)
    plan = plan_of(model)
    for name in parity.LAYERS:
        weight = model.get_submodule(name).weight
        weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        again = plan_of(model)
    assert all(torch.equal(given.B, again[name].B) and given.B.any() for name, given in plan.items())
    assert list(plan_of(model, exclude=parity.LAYERS[1:])) == parity.LAYERS[:1] != list(plan)


@pytest.mark.parametrize("variant", ["authors", "peft"])
def test_the_start_is_the_first_and_second_r_singular_vectors_of_the_gradient(variant):
    model = parity.network(torch.float64)
    plan, G = plan_of(model, variant=variant, gamma=9.0), gradients(model)
    assert len(plan_of(model, rank=2, gamma=0.5)["0"].spectrum) == 8, "4 r values are sought"
    for name, given in plan.items():
        m, n = G[name].shape
        U, S, Vh = np.linalg.svd(G[name].numpy())
        scale = m**0.25 / 3
        A, B = given.A.numpy(), given.B.numpy()
        assert A.shape == (4, n) and B.shape == (m, 4)
        # signs are free: each row (column) is the singular vector or its negative
        for i in range(4):
            length = scale if variant == "authors" else 1.0
            a = A[i] * np.sign(A[i] @ Vh[i])
            assert np.abs(a - length * Vh[i]).max() < 1e-7
            length = scale if variant == "authors" else scale * S[4 + i]
            b = B[:, i] * np.sign(B[:, i] @ U[:, 4 + i])
            assert np.abs(b - length * U[:, 4 + i]).max() < 1e-6 * scale
        assert (given.spectrum[:4] - torch.from_numpy(S[:4])).abs().max() < 1e-10
    assert start.describe is lora_ga.describe


def test_the_same_samples_give_the_same_plan_whatever_the_seed_and_other_ones_another(monkeypatch):
    model, plans = parity.network(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the generators of GPUs are seeded"))
    for seed, samples in ((1, 6), (2, 6), (1, 3)):
        torch.default_generator.manual_seed(seed)
        plans.append(plan_of(model, samples=samples))
    assert torch.equal(plans[0]["2"].B, plans[1]["2"].B) and not torch.equal(plans[0]["2"].B, plans[2]["2"].B)


def test_wrong_use_is_refused_in_one_line_and_changes_nothing():
    model = parity.network()
    unused = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(16, 4)})
    nan = lambda m, b: (m[0](b[0]) * torch.tensor([float("nan")] + 23 * [1.0])).sum()  # noqa: E731  # of one output
    for call, words in [
        (lambda: plan_of(model, variant="ours"), "variant 'ours' is not one of authors, peft"),
        (lambda: plan_of(model, gamma=0), "gamma 0 is not above 0"),
        (lambda: plan_of(model, rank=9), "rank 9 does not fit layer 0 (24, 16): allowed are 1 to 8"),
        (lambda: plan_of(model, rank=0), "rank 0 does not fit layer 0"),
        (lambda: lora_ga.calibrate(model, ["0"], [], loss_fn), "the gradient of layer 0 on the 0 samples is zero: "),
        (lambda: lora_ga.calibrate(model, ["0"], batches(), nan), "the gradient of layer 0 on the 6 samples has NaN or infinity"),
        (lambda: lora_ga.calibrate(unused, ["a", "b"], batches(), lambda m, b: m["a"](b[0]).sum(), rank=1),
         "the gradient of layer b on the 6 samples is zero"),
        (lambda: lora_ga.inject(model, ["0"], plan=plan_of(model)), "the plan is for other layers: 2"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)
        assert all(p.requires_grad and p.grad is None for p in model.parameters()) and type(model[0]) is nn.Linear
    assert plan_of(model, rank=8)["0"].B.shape == (24, 8)


def test_the_start_leaves_the_output_and_the_first_step_follows_the_gradient():
    """To first order B0 dA + dB A0 is G projected on both spaces; so is the first step of SGD here."""
    model, original = parity.network(torch.float64), parity.network(torch.float64)
    G = gradients(model)["2"]
    lora_ga.inject(model, parity.LAYERS, plan=plan_of(model), alpha=4.0)
    x = torch.randn(5, 16, dtype=torch.float64)
    assert torch.equal(model(x), original(x)) and isinstance(model[0], pissa.ResidualLinear)
    loss = sum(loss_fn(model, batch) for batch in batches(6, torch.float64)) / 6
    loss.backward()
    layer = model[2]
    step = (layer.B @ layer.A.grad + layer.B.grad @ layer.A).detach()
    A, B = layer.A.detach(), layer.B.detach()
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    expected = 24**0.5 / 16 * (P_B @ G + G @ P_A)  # scale^2 in both
    error = (step - expected).abs().max().item()
    print("first step against the projected gradient", error, "of", expected.abs().max().item())
    assert error < 1e-8 * expected.abs().max().item() or error < 1e-12
    S = torch.linalg.svdvals(G)
    captured = (P_B @ G + G @ P_A).norm() / S[:8].norm()
    assert abs(captured.item() - 1) < 1e-9, "the best there is of rank 2 r"


def test_losses_equal_a_training_in_numpy():
    """The authors' start, twenty steps of SGD on one layer, every gradient by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12).double())
    W, b = model[0].weight.detach().clone().numpy(), model[0].bias.detach().numpy()
    target = lambda x: torch.sin(x.sum(1, keepdim=True) + torch.arange(12))  # noqa: E731
    mse = lambda m, x: (m(x) - target(x)).square().mean()  # noqa: E731
    samples = [x for x, _ in batches(4, torch.float64)]
    plan = lora_ga.calibrate(model, ["0"], samples, mse, rank=3, samples=4)

    def gradient(weight, x):
        X, error = x.numpy(), x.numpy() @ weight.T + b - target(x).numpy()
        return (error**2).mean(), (2 * error / error.size).T @ X

    G = sum(gradient(W, x)[1] for x in samples) / 4
    U, _, Vh = np.linalg.svd(G)
    B, A = 12**0.25 / 4 * U[:, 3:6], 12**0.25 / 4 * Vh[:3]
    # the signs of singular vectors are free: take ours where they differ
    B *= np.sign((B * plan["0"].B.numpy()).sum(0))
    A *= np.sign((A * plan["0"].A.numpy()).sum(1))[:, None]
    lora_ga.inject(model, ["0"], plan=plan, alpha=6.0)
    optimizer = torch.optim.SGD(parity.trained(model), lr=0.05)
    residual = W - 2 * B @ A
    ours, theirs = [], []
    for step in range(20):
        x, _ = parity.batch(step, torch.float64)
        loss = mse(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.append(loss.item())
        value, g = gradient(residual + 2 * B @ A, x)
        theirs.append(value)
        B, A = B - 0.05 * 2 * g @ A.T, A - 0.05 * 2 * B.T @ g
    parity.assert_equal(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_losses_equal_pefts_over_twenty_steps(dtype, bound, monkeypatch):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    ours, theirs, original = parity.network(), parity.network(), parity.network()
    # B has the gradient's size here: so that it is worth a comparison
    louder = lambda m, b: 300 * loss_fn(m, b)  # noqa: E731
    plan = lora_ga.calibrate(ours, parity.LAYERS, batches(), louder, rank=4, variant="peft")
    lora_ga.inject(ours, parity.LAYERS, plan=plan, alpha=6.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=parity.LAYERS, init_lora_weights="lora_ga",
                             lora_ga_config=LoraGAConfig())  # fmt: skip
    preprocess_loraga(theirs, config, lambda: [louder(theirs, batch).backward() for batch in batches()])
    decompose = torch.svd_lowrank

    def seeded(*args, **kwargs):  # signs come from the random start: the same for both
        torch.manual_seed(0)
        return decompose(*args, **kwargs)

    monkeypatch.setattr(torch, "svd_lowrank", seeded)
    theirs = peft.get_peft_model(theirs, config)
    same_from_the_start(ours, theirs, original, dtype)
    parity.assert_equal(
        parity.train(ours, parity.adamw(parity.trained(ours)), dtype),
        parity.train(theirs, parity.adamw(parity.trained(theirs)), dtype),
        bound,
    )
