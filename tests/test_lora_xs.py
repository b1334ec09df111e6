"""LoRA-XS: its frozen matrices, its formula, and a training by hand in numpy."""

import copy

import numpy as np
import parity
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import lora_xs


def made(dtype=torch.float64, m=20, n=12, rank=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m).to(dtype))
    original = copy.deepcopy(model[0])
    lora_xs.inject(model, ["0"], rank=rank, alpha=6.0, **options)
    return model, original


def test_the_outer_matrices_are_the_first_singular_directions_and_only_r_is_trained():
    model, original = made()
    layer, W = model[0], original.weight.detach()
    values, vectors = np.linalg.eigh((W.T @ W).numpy())  # not by an SVD
    V = torch.from_numpy(vectors[:, ::-1][:, :3].copy())
    assert (layer.C @ layer.A - W @ V @ V.T).abs().max() < 1e-13
    assert (layer.A @ layer.A.T - torch.eye(3)).abs().max() < 1e-14, "S stands in C alone"
    assert (layer.C.norm(dim=0) - torch.from_numpy(values[::-1][:3].copy()).sqrt()).abs().max() < 1e-13
    assert [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad] == [("0.R", (3, 3))]
    assert set(layer.state_dict()) == {"A", "C", "R", "base.weight", "base.bias"}
    assert layer.A.is_contiguous() and layer.C.is_contiguous(), "row-major, as a loaded one is: products round as theirs"


def test_forward_factors_and_merge_are_alpha_over_r_c_r_a():
    model, original = made()
    layer, x = model[0], torch.randn(4, 12, dtype=torch.float64)
    nn.init.normal_(layer.R)
    update = 6.0 / 3 * layer.C @ layer.R @ layer.A
    y = model(x)
    assert (y - original(x) - x @ update.T).abs().max() < 1e-13 and update.abs().max() > 0.1
    P, Q = layer.factors()
    assert P.shape == (20, 3) and Q.shape == (3, 12) and (P @ Q - update).abs().max() < 1e-14
    assert lora_xs.merge(model) == ["0"]
    assert (model[0].weight - original.weight - update).abs().max() < 1e-14


def test_r_starts_at_zero_or_as_the_authors_draw_it():
    model, original = made(dtype=torch.float32)
    x = torch.randn(4, 12)
    assert torch.equal(model(x), original(x)) and not model[0].R.any()
    model, _ = made(m=200, n=200, rank=200, std=1e-5)
    assert abs(model[0].R.std().item() / 1e-5 - 1) < 0.02 and abs(model[0].R.mean().item()) < 3e-7
    with pytest.raises(ValueError, match="std -1 is below 0"):
        made(std=-1)


def test_losses_equal_a_training_in_numpy():
    """One layer, twenty steps of SGD on a mean squared error, every gradient by hand."""
    model, original = made()
    optimizer = torch.optim.SGD([model[0].R], lr=0.1)
    W, b = original.weight.detach().numpy(), original.bias.detach().numpy()
    U, S, Vh = np.linalg.svd(W)
    C, A, R = U[:, :3] * S[:3], Vh[:3], np.zeros((3, 3))  # the signs of singular vectors cancel in C and A
    R_ours = []
    ours, theirs = [], []
    for step in range(20):
        x, _ = parity.batch(step, torch.float64)
        x = x[:, :12]
        y = torch.sin(x.sum(1, keepdim=True) + torch.arange(20))
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.append(loss.item())
        R_ours.append(model[0].R.detach().clone())
        X = x.numpy()
        error = X @ (W + 2 * C @ R @ A).T + b - y.numpy()
        theirs.append((error**2).mean())
        G = (2 * error / error.size).T @ X  # dL/dW
        R = R - 0.1 * 2 * C.T @ G @ A.T
    parity.assert_equal(ours, theirs, 1e-12)
    assert (R_ours[-1] - R_ours[0]).abs().max() > 0.01
