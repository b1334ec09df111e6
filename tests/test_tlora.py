"""TLoRA: its formula, what it draws, what it trains, and the paper's counts and quantities."""

import copy
import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tlora
from baselines import lora
from tlora import TLoRALinear, cosine_similarity, dropout, inject, merge, param_groups, watch


def moved(layer, seed=1):
    """Put the trained parts of a layer somewhere else than at their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator, dtype=torch.float64))
        layer.alpha.fill_(1.7)
    return layer


def adapted(m, n, rank, *, bias=True, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=dtype))
    inject(model, ["0"], rank=rank, dropout=dropout)
    return model


def dense_update(layer):
    A, B, C = (M.detach().double().numpy() for M in (layer.A, layer.B, layer.C))
    return layer.alpha.item() * (C @ B @ A)


# ------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("m, n, rank, bias", [(7, 12, 3, True), (12, 7, 7, False), (9, 9, 1, True)])
def test_output_is_that_of_the_dense_weight_W0_plus_alpha_C_B_A(m, n, rank, bias):
    layer = moved(adapted(m, n, rank, bias=bias)[0])
    x = torch.randn(2, 5, n, dtype=torch.float64)
    W = layer.weight.detach().numpy() + dense_update(layer)
    expected = np.einsum("bti,oi->bto", x.numpy(), W) + (layer.bias.detach().numpy() if bias else 0)
    difference = np.abs(layer(x).detach().numpy() - expected).max()
    print("largest difference", difference)
    assert np.abs(expected - layer.base(x).detach().numpy()).max() > 0.1
    assert difference < 1e-12


def test_factors_multiply_to_the_update():
    layer = moved(adapted(7, 12, 3)[0])
    P, Q = layer.factors()
    assert P.shape == (7, 3) and Q.shape == (3, 12)
    difference = np.abs((P @ Q).detach().numpy() - dense_update(layer)).max()
    print("largest difference", difference)
    assert np.abs(dense_update(layer)).max() > 0.1
    assert difference < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_at_the_start_is_the_base_layers_to_the_bit_with_dropout_too(dtype):
    model = nn.Sequential(nn.Linear(12, 7, dtype=dtype))
    x = torch.randn(50, 12, dtype=dtype)
    before = model(x)
    inject(model, ["0"], rank=4)
    assert model[0].training and model[0].dropout == 0.5
    assert model[0].A.abs().min() > 0 and model[0].C.abs().min() > 0
    assert torch.equal(model(x), before)
    moved(model[0])
    assert not torch.equal(model(x), before)


def test_A_and_C_are_kaiming_normal_over_n_and_r_and_B_is_zero_and_alpha_one():
    torch.manual_seed(0)
    m, n, r = 2000, 500, 50
    layer = TLoRALinear(nn.Linear(n, m), r, 0.5)
    gain = math.sqrt(2 / (1 + 5))
    for M, fan_in in ((layer.A, n), (layer.C, r)):
        error = abs(M.std().item() / (gain / math.sqrt(fan_in)) - 1)
        print("relative error of the std", error)
        assert error < 0.02  # 25,000 and 100,000 draws: the std is known to 0.5 % and 0.2 %
        # Normal, not uniform: 4.6 % of the entries lie beyond two standard deviations.
        assert 0.04 < (M.abs() > 2 * M.std()).float().mean() < 0.052
    assert torch.equal(layer.B, torch.zeros(r, r)) and layer.alpha.item() == 1.0


def test_stds_of_A_and_C_multiply_to_sqrt_of_m_over_n_times_the_authors():
    torch.manual_seed(0)
    m, n, r = 1600, 400, 50
    layer = TLoRALinear(nn.Linear(n, m), r, 0.5)
    # The author's layout: x A B C with A (n, r), C (r, m), each drawn by torch's own initialiser.
    A, C = torch.empty(n, r), torch.empty(r, m)
    nn.init.kaiming_normal_(A, a=math.sqrt(5))
    nn.init.kaiming_normal_(C, a=math.sqrt(5))
    ratio = (layer.A.std() * layer.C.std() / (A.std() * C.std())).item()
    print("ratio", ratio, "expected", math.sqrt(m / n))
    assert abs(ratio / math.sqrt(m / n) - 1) < 0.03


def test_two_layers_draw_different_matrices():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inject(model, ["0", "1"], rank=3)
    assert not torch.equal(model[0].A, model[1].A) and not torch.equal(model[0].C, model[1].C)


def test_gradients_are_those_computed_by_hand():
    layer = moved(adapted(7, 12, 3)[0])
    x = torch.randn(5, 12, dtype=torch.float64)
    y = layer(x)
    y.retain_grad()
    (y**3).sum().backward()
    G = y.grad.T @ x  # (m, n), the gradient that W0 would have
    A, B, C, alpha = layer.A, layer.B.detach(), layer.C, layer.alpha.item()
    by_hand = {"B": alpha * C.T @ G @ A.T, "alpha": (G * (C @ B @ A)).sum()}
    for name, expected in by_hand.items():
        error = ((getattr(layer, name).grad - expected).abs().max() / expected.abs().max()).item()
        print(name, "relative error", error)
        assert error < 1e-12


def test_dropout_zeroes_entries_of_the_updates_output_and_scales_the_rest():
    layer = moved(adapted(40, 30, 4, dropout=0.75)[0])
    x = torch.randn(100, 30, dtype=torch.float64)
    layer.eval()
    update = (layer(x) - layer.base(x)).detach()
    layer.train()
    dropped = (layer(x) - layer.base(x)).detach()
    zero = dropped.abs() < 1e-12
    print("share of zeros", zero.double().mean().item())
    assert update.abs().min() > 1e-6
    assert abs(zero.double().mean() - 0.75) < 0.03  # 4,000 entries: one standard deviation is 0.007
    # Entry by entry: on the output, not on the input or on the r numbers between.
    assert torch.allclose(dropped[~zero], 4 * update[~zero], rtol=1e-9, atol=1e-12)
    assert 0.5 < zero.double().mean(0).min() and zero.double().mean(0).max() < 1.0


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
def test_dropout_on_the_cpu_is_unbiased_and_its_gradient_the_same_mask(p):
    torch.manual_seed(0)
    steps = min(round(256 * p), 255)  # of 1/256: the probability that it has, and makes up for
    h = torch.ones(501, 803, dtype=torch.float64, requires_grad=True)  # no multiple of eight entries
    out = dropout(h, p)
    out.sum().backward()
    error = abs((out == 0).double().mean().item() - steps / 256)
    sd = math.sqrt(steps / 256 * (1 - steps / 256) / h.numel())
    print("share of zeros off by", error, "standard deviation", sd)
    assert error < 4 * sd
    assert set(out.unique().tolist()) == {0.0, 256 / (256 - steps)} and torch.equal(h.grad, out.detach())
    halves = (out[:, ::2] == 0).double().mean() - (out[:, 1::2] == 0).double().mean()
    assert abs(halves) < 8 * sd  # neighbours, which come from one draw, are dropped as often


def test_alpha_of_a_bfloat16_layer_is_float32_and_moves_by_small_steps():
    model = adapted(8, 8, 4, dtype=torch.bfloat16)
    layer = moved(model[0])
    assert layer.alpha.dtype == layer.B.dtype == torch.float32
    assert all(M.dtype == torch.float32 for M in layer.factors())
    before = layer.alpha.item()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, weight_decay=0.0))
    y = model(torch.randn(5, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    optimizer.step()
    print("alpha moved by", layer.alpha.item() - before)
    assert abs(abs(layer.alpha.item() - before) - 1e-4) < 1e-6


# -------------------------------------------------------------- what the paper looks at


def test_watch_gives_alpha_and_the_norms_that_numpy_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    inject(model, ["0", "2"], rank=4)
    moved(model[2], seed=5)
    seen = watch(model)
    assert list(seen) == ["alpha", "B_norm", "A_spectral", "B_spectral", "C_spectral"]
    for name, layer in (("0", model[0]), ("2", model[2])):
        singular = {k: np.linalg.svd(getattr(layer, k).detach().numpy(), compute_uv=False) for k in "ABC"}
        expected = {f"{k}_spectral": singular[k][0] for k in "ABC"}
        expected |= {"alpha": layer.alpha.item(), "B_norm": np.sqrt((singular["B"] ** 2).sum())}
        for quantity, number in expected.items():
            assert list(seen[quantity]) == ["0", "2"]
            print(name, quantity, seen[quantity][name], number)
            assert type(seen[quantity][name]) is float
            assert seen[quantity][name] == pytest.approx(number, rel=1e-5, abs=1e-12)
    assert seen["alpha"] == {"0": 1.0, "2": pytest.approx(1.7)} and seen["B_norm"]["0"] == 0.0


def test_watch_reads_bfloat16_layers():
    assert watch(adapted(8, 8, 4, dtype=torch.bfloat16))["A_spectral"]["0"] > 0


def test_cosine_from_the_factors_is_that_of_the_dense_updates():
    torch.manual_seed(0)
    common = torch.randn(9, 3), torch.randn(3, 6)
    P = torch.cat([common[0], torch.randn(9, 2)], 1)  # shares three of its five directions
    Q = torch.cat([common[1], torch.randn(2, 6)], 0)
    dW1, dW2 = ((P @ Q).double().numpy() for P, Q in (common, (P, Q)))
    expected = (dW1 * dW2).sum() / np.sqrt((dW1**2).sum() * (dW2**2).sum())
    cosine = cosine_similarity(common, (P, Q))
    print("cosine", cosine, "error", abs(cosine - expected))
    assert 0.3 < expected < 0.95
    assert abs(cosine - expected) < 1e-6  # the dense product here is rounded to float32
    assert cosine_similarity((P, Q), common) == pytest.approx(cosine, abs=1e-15)


def test_cosine_is_one_with_itself_in_other_factors_and_minus_one_with_its_opposite():
    P, Q = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    R = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
    assert cosine_similarity((P, Q), (5 * P @ R, torch.linalg.inv(R) @ Q)) == pytest.approx(1, abs=1e-12)
    assert cosine_similarity((P, Q), (-P, Q)) == pytest.approx(-1, abs=1e-12)
    assert math.isnan(cosine_similarity((P, Q), (0 * P, Q)))


def test_cosine_of_W0_plus_dW_as_in_the_authors_code_is_near_one_for_unrelated_updates():
    torch.manual_seed(0)
    W0 = torch.randn(64, 64)
    updates = [(0.05 * torch.randn(64, 4), torch.randn(4, 64)) for _ in range(2)]
    of_updates = cosine_similarity(*updates)
    of_sums = F.cosine_similarity(*((W0 + P @ Q).flatten() for P, Q in updates), dim=0).item()
    print("dW", of_updates, "W0 + dW", of_sums)
    assert abs(of_updates) < 0.1 and of_sums > 0.98


# ------------------------------------------------------------------------- the verbs


@pytest.mark.parametrize("rank, tlora_count, lora_count", [(8, 3120, 786432), (16, 12336, 1572864), (32, 49200, 3145728)])
def test_trained_numbers_on_roberta_large_are_the_papers(rank, tlora_count, lora_count):
    def trained(method):
        linears = {name: nn.Linear(1024, 1024, device="meta") for name in ("query", "value", "output")}
        model = nn.ModuleList([nn.ModuleDict(copy.deepcopy(linears)) for _ in range(24)])
        assert len(method.inject(model, ["query", "value"], rank=rank)) == 48
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert trained(tlora) == tlora_count == 48 * (rank**2 + 1)
    assert trained(lora) == lora_count == 48 * rank * 2048


def test_B_and_alpha_train_and_nothing_else_changes():
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    assert inject(model, ["0"], rank=4) == ["0"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.B", "0.alpha"}
    assert {name for name, _ in model.named_buffers()} == {"0.A", "0.C"}
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, weight_decay=0.0))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(20, 12)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"0.B", "0.alpha"}


def test_the_state_restores_the_layer_under_another_seed():
    model = adapted(9, 12, 4)
    moved(model[0])
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.manual_seed(99)
    other = nn.Sequential(nn.Linear(12, 9, dtype=torch.float64))
    inject(other, ["0"], rank=4, dropout=0.0)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_param_groups_hold_everything_trainable_at_one_rate_and_decay():
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 2))
    inject(model, ["0"], rank=4)
    model[1].requires_grad_(True)
    (group,) = param_groups(model, lr=0.3, weight_decay=0.2)
    expected = [model[0].B, model[0].alpha, model[1].weight, model[1].bias]
    assert {id(p) for p in group["params"]} == {id(p) for p in expected} and len(group["params"]) == 4
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_equals_unmerged_without_dropout(dtype, tolerance):
    model = adapted(9, 12, 4, dtype=dtype, dropout=0.5)
    moved(model[0]).eval()
    x = torch.randn(50, 12, dtype=dtype)
    before, base = model(x), model[0].base(x)
    assert merge(model) == ["0"]
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == dtype
    difference = (model(x) - before).abs().max().item()
    print("largest difference", difference)
    assert (before - base).abs().max() > 0.1
    assert difference < tolerance
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)


def test_bfloat16_merges_in_float32_and_is_cast_once():
    model = adapted(9, 12, 4, dtype=torch.bfloat16)
    layer = moved(model[0])
    A, B, C, W0 = (M.detach().float() for M in (layer.A, layer.B, layer.C, layer.base.weight))
    expected = (W0 + C @ (layer.alpha.detach() * B) @ A).to(torch.bfloat16)
    in_bfloat16 = (layer.base.weight + torch.matmul(*layer.factors())).detach()
    merge(model)
    assert not torch.equal(in_bfloat16, expected)
    assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize(
    "targets, options, message",
    [
        (["0"], {"rank": 0}, r"rank 0 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 6}, r"rank 6 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 4.0}, r"rank 4.0 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 2, "dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\)"),
        (["query"], {"rank": 2}, "target 'query' matches no nn.Linear"),
    ],
)
def test_a_mistake_is_refused_and_leaves_the_model_as_it_was(targets, options, message):
    model = nn.Sequential(nn.Linear(12, 5))
    with pytest.raises(ValueError, match=message):
        inject(model, targets, **options)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_the_modules_are_walked_by_the_same_lines_as_in_lora():
    for function in ("find_linears", "replace"):
        assert inspect.getsource(getattr(tlora, function)) == inspect.getsource(getattr(lora, function))


def test_the_demo_shows_the_loss_going_down(capsys):
    tlora.main()
    shown = capsys.readouterr().out
    print(shown)
    losses = [float(line.split("loss")[1].split()[0]) for line in shown.splitlines() if "loss" in line]
    assert "output unchanged at the start: True" in shown and "1025 numbers are trained" in shown
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2


# ------------------------------------------------------------------ what no wrong line may pass


def test_the_defaults_are_the_authors_rank_32_and_dropout_a_half():
    model = nn.Sequential(nn.Linear(40, 50))
    inject(model, ["0"])
    assert model[0].A.shape == (32, 40) and model[0].dropout == 0.5


def test_a_rank_of_the_smaller_side_is_allowed():
    model = nn.Sequential(nn.Linear(12, 5))
    assert inject(model, ["0"], rank=5, dropout=0.0) == ["0"] and model[0].dropout == 0.0


def test_dropout_beside_the_cpu_is_torchs():
    """The device without numbers stands for all that are not the CPU: there, shape and device are what is left to see."""
    h = torch.ones(3, 5, device="meta")
    out = dropout(h, 0.5)
    assert out.device.type == "meta" and out.shape == (3, 5) and out is not h


def test_cosine_is_computed_in_float64_whatever_the_factors_are():
    torch.manual_seed(0)
    one, two = ([torch.randn(90, 30), torch.randn(30, 60)] for _ in range(2))
    dW1, dW2 = (P.double().numpy() @ Q.double().numpy() for P, Q in (one, two))
    expected = (dW1 * dW2).sum() / np.sqrt((dW1**2).sum() * (dW2**2).sum())
    in_float32 = F.cosine_similarity((one[0] @ one[1]).flatten(), (two[0] @ two[1]).flatten(), dim=0).item()
    error = abs(cosine_similarity(one, two) - expected)
    print("cosine", expected, "error", error, "in float32", abs(in_float32 - expected))
    assert error < 1e-15 < 1e-10 < abs(in_float32 - expected)


def test_the_demo_tells_trained_from_frozen_and_merges_what_it_trained(capsys):
    tlora.main()
    shown = capsys.readouterr().out
    words = dict(re.findall(r"^  (\S+) +\(.*\) +(\w+)$", shown, re.M))
    trained = {"0.B", "0.alpha"}
    assert words == {
        name: "trained" if name in trained else "frozen"
        for name in (*trained, "0.A", "0.C", "0.base.weight", "0.base.bias", "2.weight", "2.bias")
    }
    assert "2.weight       (2, 256)" in shown and f"LoRA at rank 32 trains {32 * (64 + 256)}" in shown
    rows = re.findall(r"^  step +(\d+)  loss ([\d.]+)  alpha ([\d.]+)  norm of B ([\d.]+)$", shown, re.M)
    assert [int(row[0]) for row in rows] == [0, 100, 200, 300]
    assert rows[0][2:] == ("1.000", "0.000") and float(rows[-1][3]) > 0.1 and rows[-1][2] != "1.000"
    assert abs(float(rows[0][1]) - math.log(2)) < 0.1  # two classes, as many of the one as of the other
    merged, difference = re.search(r"^merged into (.*): largest difference (\S+)$", shown, re.M).groups()
    assert merged == "Linear(in_features=64, out_features=256, bias=True)" and 0 < float(difference) < 1e-5
