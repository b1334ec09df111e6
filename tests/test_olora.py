"""OLoRA: its start is the QR decomposition of W0, the rest is PiSSA's; and PEFT's on the same weights."""

import copy

import pytest
import torch
import torch.nn as nn
from test_pissa import against_peft

from baselines import olora, pissa


@pytest.mark.parametrize("m,n", [(20, 12), (12, 20)])
def test_it_starts_in_the_first_columns_of_w0_made_orthonormal(m, n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m).double())
    W = model[0].weight.detach().clone()
    assert olora.inject(model, ["0"], rank=3, alpha=6.0) == ["0"]
    layer = model[0]
    assert (layer.B.T @ layer.B - torch.eye(3)).abs().max() < 1e-14
    assert (layer.A.tril(-1)).abs().max() == 0, "upper triangular"
    # Gram-Schmidt by hand: the first r columns of W0 are B0 A0's, in the rest it is W0 projected on their span
    basis = []
    for column in W.T[:3]:
        for b in basis:
            column = column - b * (b @ column)
        basis.append(column / column.norm())
    Q = torch.stack(basis, 1)
    error = (layer.B @ layer.A - Q @ Q.T @ W).abs().max().item()
    print("B0 A0 against Gram-Schmidt", error)
    assert error < 1e-14 and (layer.B @ layer.A)[:, :3].sub(W[:, :3]).abs().max() < 1e-14


def test_the_start_is_untouched_and_the_update_is_against_the_original_w0():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    original, x = copy.deepcopy(model), torch.randn(5, 12)
    olora.inject(model, ["0"], rank=3)
    assert torch.equal(model(x), original(x)) and isinstance(model[0], pissa.ResidualLinear)
    assert model[0].scaling == 16 / 3
    nn.init.normal_(model[0].A)
    y, P_Q = model(x), model[0].factors()
    olora.merge(model)
    assert torch.equal(model[0].weight, original[0].weight + P_Q[0] @ P_Q[1])
    error = (model(x) - y).abs().max().item()
    print("merge error", error)
    assert error < 1e-5 * y.abs().max().item() and (y - original(x)).abs().max() > 1


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_losses_equal_pefts_over_twenty_steps(dtype, bound):
    model = against_peft("olora", olora, dtype, bound)
    assert (model[0].B.T @ model[0].B - torch.eye(4)).abs().max() > 1e-2, "B has left its start"
