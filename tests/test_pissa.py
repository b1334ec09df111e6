"""PiSSA: its start, its update against the original W0, what is saved, and PEFT's on the same weights."""

import copy

import numpy as np
import parity
import pytest
import torch
import torch.nn as nn

from baselines import lora, pissa


def made(dtype=torch.float64, m=20, n=12, rank=3, alpha=6.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m).to(dtype))
    original = copy.deepcopy(model[0])
    pissa.inject(model, ["0"], rank=rank, alpha=alpha, **options)
    return model, original


@pytest.mark.parametrize("m,n", [(20, 12), (12, 20), (12, 12)])
def test_it_starts_in_the_principal_part_of_w0_split_evenly(m, n):
    model, original = made(m=m, n=n)
    layer, W = model[0], original.weight.detach().numpy()
    values, vectors = np.linalg.eigh(W.T @ W)  # not by an SVD
    V = vectors[:, ::-1][:, :3]
    error = np.abs(layer.scaling * (layer.B @ layer.A).detach().numpy() - W @ V @ V.T).max()
    print("distance from W0 projected on its first singular directions", error)
    assert error < 1e-12 and np.abs(W @ V @ V.T).max() > 0.1
    S = np.sqrt(values[::-1][:3])
    for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):  # sqrt(S/s) in each
        assert np.abs(gram.detach().numpy() - np.diag(S / 2)).max() < 1e-12


def test_the_randomised_svd_spans_the_same_where_the_spectrum_has_a_gap():
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(30, 30).double()).Q * (0.5 ** torch.arange(30.0))
    (B, A), (B2, A2) = pissa.principal(W, 8, 2.0), pissa.principal(W, 8, 2.0, niter=16)
    error = (B @ A - B2 @ A2).abs().max().item()
    print("randomised against exact", error, "of", (B @ A).abs().max().item())
    assert error < 1e-12 and not torch.equal(A, A2)
    models = [made(niter=niter)[0] for niter in (0, 16)]
    assert not torch.equal(models[0][0].A, models[1][0].A)
    with pytest.raises(ValueError, match="niter -1 is below 0"):
        made(niter=-1)
    with pytest.raises(ValueError, match="alpha 0.0 is not above 0: the start is divided by its root"):
        made(alpha=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_output_at_the_start_is_untouched_to_the_bit_and_w0_stays(dtype):
    model, original = made(dtype, dropout=0.4)
    x = torch.randn(8, 12, dtype=dtype)
    assert model[0].B.any() and model[0].A.any(), "the trained part is not zero"
    for training in (True, False):
        assert torch.equal(model.train(training)(x), original(x))
    assert torch.equal(model[0].base.weight, original.weight)


@pytest.mark.parametrize("given", [torch.zeros(3, 12), torch.zeros(12, 3, dtype=torch.float64).T])
def test_a_start_is_copied_row_major_in_the_types_of_lora(given):
    model = nn.Sequential(nn.Linear(12, 12))
    names = lora.inject(model, ["0"], rank=3)
    pissa.begin(model, names, lambda name, plain: (given.T, given))
    layer = model[0]
    tensors = [layer.A, layer.B, layer.A0, layer.B0]
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
    assert len({t.data_ptr() for t in [given, *tensors]}) == 5, "each has numbers of its own"


def test_a_start_taken_from_parameters_keeps_no_graph():
    model = nn.Sequential(nn.Linear(12, 12))
    pissa.begin(model, lora.inject(model, ["0"]), lambda name, plain: (plain.B, plain.A))
    assert not model[0].A0.requires_grad and not model[0].B0.requires_grad and model[0].A.is_leaf
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    assert pissa.wide(weight).dtype == torch.float32 and not pissa.wide(weight).requires_grad


def test_the_update_against_the_original_w0_is_s_ba_minus_s_b0a0():
    model, original = made()
    layer = model[0]
    nn.init.normal_(layer.A), nn.init.normal_(layer.B)
    expected = 2 * (layer.B @ layer.A - layer.B0 @ layer.A0)
    P, Q = layer.factors()
    assert P.shape == (20, 6) and Q.shape == (6, 12)
    assert (P @ Q - expected).abs().max() < 1e-13 and expected.abs().max() > 1
    x = torch.randn(5, 12, dtype=torch.float64)
    y = model(x)
    error = (y - original(x) - x @ expected.T).abs().max().item()
    print("forward against the formula", error)
    assert error < 1e-12
    pissa.merge(model)
    assert (model[0].weight - original.weight - expected).abs().max() < 1e-13
    assert (model(x) - y).abs().max() < 1e-12


def test_a_saved_rank_is_taken_and_a_state_that_does_not_fit_destroys_nothing():
    (saved, original), (fresh, _) = made(rank=4, alpha=8.0), made(rank=1, alpha=8.0)
    nn.init.normal_(saved[0].A)
    state = {key: value for key, value in saved.state_dict().items() if ".base." not in key}
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    parameter = fresh[0].A
    with pytest.raises(RuntimeError):
        fresh.load_state_dict(state | {"0.B0": state["0.B0"][:, :2]}, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items() if key != "0.B0")
    fresh.load_state_dict(state, strict=False)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(fresh(x), saved(x)) and fresh[0].A is parameter, "an optimizer that holds it goes on"
    assert (fresh(x) - original(x)).abs().max() > 0.1


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_losses_equal_pefts_over_twenty_steps(dtype, bound):
    against_peft("pissa", pissa, dtype, bound)


def against_peft(name, method, dtype, bound):
    """PEFT starts in float32 alone: for float64 both are cast, and the residual is subtracted once more, exactly."""
    peft = pytest.importorskip("peft")
    ours, theirs = parity.network(), parity.network()
    original = parity.network()
    method.inject(ours, parity.LAYERS, rank=4, alpha=6.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=parity.LAYERS, init_lora_weights=name)
    theirs = peft.get_peft_model(theirs, config)
    same_from_the_start(ours, theirs, original, dtype)
    parity.assert_equal(
        parity.train(ours, parity.adamw(parity.trained(ours)), dtype),
        parity.train(theirs, parity.adamw(parity.trained(theirs)), dtype),
        bound,
    )
    return ours


def same_from_the_start(ours, theirs, original, dtype):
    """Both to `dtype`, after comparing A, B and the residual that PEFT wrote over W0."""
    ours.to(dtype), theirs.to(dtype)
    for name in parity.LAYERS:
        layer, other = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        A, B = other.lora_A.default.weight, other.lora_B.default.weight
        assert (layer.A - A).abs().max() < 1e-6 and (layer.B - B).abs().max() < 1e-6 and A.any() and B.any()
        W0 = original.get_submodule(name).weight.to(dtype)
        residual = (W0 - layer.scaling * layer.B @ layer.A).detach()
        assert (other.base_layer.weight - residual).abs().max() < 1e-6
        assert torch.equal(layer.base.weight, W0) and (residual - W0).abs().max() > 0.01
        if dtype == torch.float64:
            A.data.copy_(layer.A.data), B.data.copy_(layer.B.data)
            other.base_layer.weight.data = residual
