"""TLoRA+: its formula, its configurations, and the derivation of its learning rates."""

import copy
import inspect
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tlora_plus
from baselines import lora
from tlora_plus import (
    TLoRAPlusLinear,
    estimated_changes,
    gradient_sizes,
    gradients,
    inject,
    learning_rates,
    loss_change,
    merge,
    param_groups,
    parse_ratio,
    rate_ratios,
)

RATIOS = ["1", "4", "paper", "summed"]


def adapted(m, n, r1, r2, *, bias=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=dtype))
    inject(model, ["0"], rank1=r1, rank2=r2, **{"init_b": "lecun", **options})
    return model


def dense_update(layer):
    A, B, C = (M.detach().double().numpy() for M in (layer.A, layer.B, layer.C))
    return C @ B @ A


def random_shapes(count, smallest=1):
    rng = random.Random(0)
    for _ in range(count):
        m, n = rng.randint(smallest, 4000), rng.randint(smallest, 4000)
        yield m, n, rng.randint(1, min(m, n, 64)), rng.randint(1, min(m, n, 64))


# ------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("m, n, r1, r2, bias", [(7, 12, 3, 5, True), (12, 7, 6, 2, False), (9, 9, 1, 1, 1)])
def test_output_is_that_of_the_dense_weight_W0_plus_C_B_A(m, n, r1, r2, bias):
    layer = adapted(m, n, r1, r2, bias=bias)[0]
    assert layer.A.shape == (r2, n) and layer.B.shape == (r1, r2) and layer.C.shape == (m, r1)
    x = torch.randn(2, 5, n, dtype=torch.float64)
    W = layer.weight.detach().numpy() + dense_update(layer)
    expected = np.einsum("bti,oi->bto", x.numpy(), W) + (layer.bias.detach().numpy() if bias else 0)
    difference = np.abs(layer(x).detach().numpy() - expected).max()
    print("largest difference", difference)
    assert np.abs(expected - layer.base(x).detach().numpy()).max() > 0.1
    assert difference < 1e-12


def test_factors_multiply_to_the_update():
    layer = adapted(7, 12, 3, 5)[0]
    P, Q = layer.factors()
    assert P.shape == (7, 5) and Q.shape == (5, 12)
    difference = np.abs((P @ Q).detach().numpy() - dense_update(layer)).max()
    print("largest difference", difference)
    assert np.abs(dense_update(layer)).max() > 0.1
    assert difference < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_at_the_start_is_the_base_layers_to_the_bit_unless_init_is_lecun(dtype):
    for init in ("zero", "lecun", "identity"):
        model = nn.Sequential(nn.Linear(12, 7, dtype=dtype))
        x = torch.randn(50, 12, dtype=dtype)
        before = model(x)
        inject(model, ["0"], rank=4, init_b=init)
        assert model[0].A.abs().min() > 0 and (model[0].C.abs().min() > 0) == (init != "identity")
        assert torch.equal(model(x), before) == (init != "lecun")


def test_an_identity_start_is_loras_and_its_first_gradient_is_that_of_C_alone():
    layer = adapted(7, 12, 3, 3, init_b="identity")[0]
    assert layer.B.tolist() == torch.eye(3).tolist() and not layer.C.any()
    x = torch.randn(20, 12, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert not layer.A.grad.any() and not layer.B.grad.any() and layer.C.grad.abs().min() > 0
    assert torch.equal(layer.A, adapted(7, 12, 3, 3, init_b="zero")[0].A), "drawn as for the other starts"
    assert adapted(7, 12, 3, 5, init_b="identity")[0].B.sum() == 3, "ones on the diagonal of any shape"


@pytest.mark.parametrize("train", ["abc", "b"])
def test_A_B_and_C_are_normal_with_variance_one_over_n_r2_and_r1(train):
    torch.manual_seed(0)
    m, n, r1, r2 = 800, 500, 160, 240
    layer = TLoRAPlusLinear(nn.Linear(n, m), r1, r2, train, "lecun", 4.0)
    for M, fan_in in ((layer.A, n), (layer.B, r2), (layer.C, r1)):
        error = abs(M.std().item() * math.sqrt(fan_in) - 1)
        print("relative error of the std", error)
        assert error < 0.02  # at least 38,400 draws: the std is known to 0.4 %
        # Normal, not uniform: 4.6 % of the entries lie beyond two standard deviations.
        assert 0.04 < (M.abs() > 2 * M.std()).float().mean() < 0.052
    zero = TLoRAPlusLinear(nn.Linear(n, m), r1, r2, train, "zero", 4.0)
    assert torch.equal(zero.B, torch.zeros(r1, r2)) and zero.A.std() > 0 and zero.C.std() > 0


def test_lecun_keeps_A_x_and_B_A_x_and_C_B_A_x_as_large_as_x():
    torch.manual_seed(0)
    layer = TLoRAPlusLinear(nn.Linear(500, 800), 160, 240, "abc", "lecun", 4.0)
    h = torch.randn(100, 500)
    for M in (layer.A, layer.B, layer.C):
        h = F.linear(h, M)
        size = h.square().mean().sqrt().item()
        print("size", size)
        assert abs(size - 1) < 0.15


# ------------------------------------------------------ the learning-rate ratios (Sec. 3.2)


def test_gradients_of_Eq_6_are_those_of_autograd():
    layer = adapted(7, 12, 3, 5)[0]
    x = torch.randn(20, 12, dtype=torch.float64)
    y = layer(x)
    y.retain_grad()
    (y**3).sum().backward()
    A, B, C = (M.detach() for M in (layer.A, layer.B, layer.C))
    by_hand = gradients(A, B, C, y.grad.T @ x)  # the layer's x is X^T, its y is Y^T
    for letter, expected in zip("ABC", by_hand):
        gradient = getattr(layer, letter).grad
        error = ((gradient - expected).abs().max() / expected.abs().max()).item()
        print(letter, "relative error", error)
        assert gradient.shape == expected.shape and error < 1e-12


def test_loss_change_is_the_rate_times_the_l1_norm_of_Eq_5():
    g = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    assert loss_change(g, 0.5).item() == -3.5
    assert loss_change(g, 2.0).item() == -14.0


def test_loss_change_is_that_of_a_step_of_Adam_without_memory_as_Eq_4_says():
    model = adapted(7, 12, 3, 5)
    layer, x = model[0], torch.randn(20, 12, dtype=torch.float64)
    optimizer = torch.optim.Adam([layer.A, layer.B, layer.C], lr=0.01, betas=(0.0, 0.0), eps=1e-30)
    (model(x) ** 3).sum().backward()
    before = {letter: getattr(layer, letter).detach().clone() for letter in "ABC"}
    optimizer.step()
    for letter, start in before.items():
        M = getattr(layer, letter)
        by_adam = (M.grad * (M.detach() - start)).sum().item()
        expected = loss_change(M.grad, 0.01).item()
        print(letter, by_adam, expected)
        assert expected < 0 and by_adam == pytest.approx(expected, rel=1e-10)


def test_loss_changes_add_up_to_the_first_order_change_of_the_loss_of_Eq_3():
    model = adapted(7, 12, 3, 5)
    layer, x = model[0], torch.randn(20, 12, dtype=torch.float64)
    loss = (model(x) ** 3).mean()
    loss.backward()
    rates, errors = {"A": 1.0, "B": 3.0, "C": 0.5}, []
    for tiny in (1e-4, 1e-5, 1e-6):
        moved = copy.deepcopy(model)
        changes = {k: loss_change(getattr(layer, k).grad, tiny * rate) for k, rate in rates.items()}
        with torch.no_grad():
            for k, rate in rates.items():
                getattr(moved[0], k).sub_(tiny * rate * getattr(layer, k).grad.sign())
            change = (moved(x) ** 3).mean() - loss
        errors.append(abs(change / sum(changes.values()) - 1).item())
        assert all(abs(change) > 0.01 * abs(sum(changes.values())) for change in changes.values())
    print("relative errors at ever smaller steps", errors)
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5 and errors[2] < 1e-4


def test_the_papers_estimates_are_those_it_prints():
    for m, n, r1, r2 in random_shapes(100):
        printed = (
            n * r2 * math.sqrt(1 / (r1 * r2)),
            r1 * r2 * math.sqrt(1 / (n * r1)),
            m * r1 * math.sqrt(1 / (n * r2)),
        )
        assert estimated_changes(m, n, r1, r2, "paper") == pytest.approx(printed, rel=1e-12)


def test_the_summed_estimates_are_n_sqrt_m_r2_and_r2_sqrt_m_r1_and_m_r1():
    for m, n, r1, r2 in random_shapes(100):
        expected = n * math.sqrt(m * r2), r2 * math.sqrt(m * r1), m * r1
        assert estimated_changes(m, n, r1, r2, "summed") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("m, n, r1, r2", [(60, 90, 6, 9), (90, 60, 9, 6), (40, 40, 4, 4)])
def test_the_summed_gradient_sizes_are_those_of_random_matrices_and_the_papers_are_not(m, n, r1, r2):
    generator = torch.Generator().manual_seed(0)
    squares, draws = torch.zeros(3), 400
    for _ in range(draws):
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        A, B, C = normal(r2, n) / n**0.5, normal(r1, r2) / r2**0.5, normal(m, r1) / r1**0.5
        squares += torch.stack([g.square().mean() for g in gradients(A, B, C, normal(m, n))]) / draws
    measured = squares.sqrt()  # G's entries have size 1
    summed = torch.tensor(gradient_sizes(m, n, r1, r2, "summed"))
    paper = torch.tensor(gradient_sizes(m, n, r1, r2, "paper"))
    print("measured / summed", (measured / summed).tolist(), "measured / paper", (measured / paper).tolist())
    assert ((measured / summed - 1).abs() < 0.05).all()
    assert ((measured / paper) > 5).all()


def test_paper_ratios_are_those_above_Eq_7():
    for m, n, r1, r2 in random_shapes(100):
        _, B, C = rate_ratios("paper", m, n, r1, r2)
        assert 1 / B == pytest.approx(r1 * math.sqrt(r2) / (n * math.sqrt(n)), rel=1e-12)
        assert B / C == pytest.approx(m * math.sqrt(r1) / (r2 * math.sqrt(r2)), rel=1e-12)


def test_summed_ratios_are_one_and_n_over_sqrt_r1_r2_and_n_sqrt_r2_over_r1_sqrt_m():
    for m, n, r1, r2 in random_shapes(100):
        expected = 1, n / math.sqrt(r1 * r2), n * math.sqrt(r2) / (r1 * math.sqrt(m))
        assert rate_ratios("summed", m, n, r1, r2) == pytest.approx(expected, rel=1e-12)


def test_paper_ratios_with_rank_one_are_Eq_7_for_any_shape():
    for m, n, _, _ in random_shapes(100):
        assert rate_ratios("paper", m, n, 1, 1) == pytest.approx((1, n**1.5, n**1.5 / m), rel=1e-12)


def test_a_number_gives_the_ratios_of_Eq_8():
    assert rate_ratios(4.0, 768, 3072, 8, 2) == (1, 8, 2)
    assert rate_ratios(1.0, 768, 3072, 8, 2) == (1, 1, 1)
    for n in (2, 5, 768):  # Eq. 8 is Eq. 7 for a square layer
        assert rate_ratios(n, n, n, 1, 1) == pytest.approx(rate_ratios("paper", n, n, 1, 1), rel=1e-12)


def test_vectors_for_768_and_rank_8():
    assert [round(r, 3) for r in rate_ratios("paper", 768, 768, 8, 8)] == [1, 940.604, 9.798]
    assert [round(r, 3) for r in rate_ratios("summed", 768, 768, 8, 8)] == [1, 96, 9.798]


@pytest.mark.parametrize("estimate", ["paper", "summed"])
def test_the_rates_balance_the_loss_changes_of_their_own_estimate(estimate):
    for shape in random_shapes(100):
        rates = learning_rates(1e-3, estimate, *shape)
        A, B, C = (r * c for r, c in zip(rates.values(), estimated_changes(*shape, estimate)))
        assert A == pytest.approx(B, rel=1e-12) and C == pytest.approx(B, rel=1e-12)
        other = "summed" if estimate == "paper" else "paper"
        A, B, C = (r * c for r, c in zip(rates.values(), estimated_changes(*shape, other)))
        assert shape[1] == shape[2] or A != pytest.approx(B, rel=1e-6)  # n = r1 has nothing to sum


def test_the_paper_overshoots_B_by_sqrt_n_over_r1_and_C_by_sqrt_n_r2_over_m_r1():
    for m, n, r1, r2 in random_shapes(100):
        paper, summed = (rate_ratios(estimate, m, n, r1, r2) for estimate in ("paper", "summed"))
        assert paper[1] / summed[1] == pytest.approx(math.sqrt(n / r1), rel=1e-12)
        assert paper[2] / summed[2] == pytest.approx(math.sqrt(n * r2 / (m * r1)), rel=1e-12)


def test_lr_is_As_rate_for_a_number_and_Bs_for_the_estimates():
    shape = (768, 768, 8, 8)
    assert learning_rates(1e-4, 4.0, *shape) == {"A": 1e-4, "B": 8e-4, "C": 2e-4}
    assert learning_rates(1e-4, 1.0, *shape) == {"A": 1e-4, "B": 1e-4, "C": 1e-4}
    for ratio, B in (("paper", 940.604), ("summed", 96)):
        for lr in (0.1, 0.3, 1e-3, 1e-4, 3e-5):
            rates = learning_rates(lr, ratio, *shape)
            assert list(rates) == ["A", "B", "C"] and rates["B"] == lr  # to the bit
            assert rates["A"] == pytest.approx(lr / B, rel=1e-6)
            assert rates["C"] == pytest.approx(lr / B * 9.79796, rel=1e-6)


def sign_descent_shares(m, n, r1, r2, kind, tokens=64, layers=5):
    """{ratio: (B's loss change, C's) as multiples of A's}, the mean over random layers at the LeCun start."""
    shares = {ratio: [] for ratio in ("1", "paper", "summed")}
    for seed in range(layers):
        torch.manual_seed(seed)
        A, B, C = torch.randn(r2, n) / n**0.5, torch.randn(r1, r2) / r2**0.5, torch.randn(m, r1) / r1**0.5
        X = torch.randn(n, tokens)
        Y = C @ B @ A @ X
        if kind == "unstructured":
            G = torch.randn(m, n)
        elif kind == "random signal":
            G = torch.randn(m, tokens) @ X.T
        elif kind == "cross-entropy":
            G = (Y.softmax(0) - F.one_hot(torch.randint(m, (tokens,)), m).T) @ X.T
        elif kind == "squared error":
            G = (Y - torch.randn(m, n) / n**0.5 @ X) @ X.T
        for ratio, found in shares.items():
            rates = rate_ratios(parse_ratio(ratio), m, n, r1, r2)
            a, b, c = (loss_change(g, rate).item() for g, rate in zip(gradients(A, B, C, G), rates))
            found.append((b / a, c / a))
    return {ratio: np.mean(found, 0) for ratio, found in shares.items()}


def assert_within(kind, shares, ratio, B, C):
    b, c = shares[ratio]
    print(f"{kind:14s} ratio {ratio:6s} B {b:.3f} in {B}, C {c:.3f} in {C} (A is 1)")
    assert B[0] <= b <= B[1] and C[0] <= c <= C[1]


@pytest.mark.parametrize("kind", ["unstructured", "random signal", "cross-entropy"])
def test_measured_loss_changes_at_equal_paper_and_summed_rates(kind):
    shares = sign_descent_shares(768, 768, 8, 8, kind)
    assert_within(kind, shares, "1", (0.007, 0.02), (0.03, 0.11))
    assert_within(kind, shares, "paper", (7, 16), (0.3, 1.1))
    assert_within(kind, shares, "summed", (0.6, 2.3), (0.15, 1.1))


@pytest.mark.parametrize("m, n, r1, r2", [(3072, 768, 8, 8), (768, 3072, 8, 8), (768, 768, 16, 4), (768, 768, 4, 16)])
def test_summed_balances_other_shapes_and_ranks_where_the_paper_overshoots_by_the_formula(m, n, r1, r2):
    shares = sign_descent_shares(m, n, r1, r2, "random signal")
    assert_within("random signal", shares, "summed", (0.8, 1.3), (0.85, 1.15))
    B, C = math.sqrt(n / r1), math.sqrt(n * r2 / (m * r1))
    assert_within("random signal", shares, "paper", (0.8 * B, 1.3 * B), (0.85 * C, 1.15 * C))


@pytest.mark.parametrize("tokens, paper, summed", [(64, (17, 26), (1.7, 2.6)), (1024, (49, 64), (5.0, 6.5))])
def test_a_squared_error_overshoots_more_because_it_contains_the_updates_own_output(tokens, paper, summed):
    shares = sign_descent_shares(768, 768, 8, 8, "squared error", tokens)
    assert_within("squared error", shares, "paper", paper, (0.25, 0.85))
    assert_within("squared error", shares, "summed", summed, (0.25, 0.85))


# ------------------------------------------------------------------------- the verbs


@pytest.mark.parametrize("train", ["abc", "ab", "bc", "b"])
def test_each_configuration_trains_its_matrices_and_nothing_else_changes(train):
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    assert inject(model, ["0"], rank1=3, rank2=4, train=train, ratio="1") == ["0"]
    trained = {f"0.{letter}" for letter in train.upper()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert {name for name, _ in model.named_buffers()} == {"0.A", "0.B", "0.C"} - trained
    sizes = {"a": 4 * 12, "b": 3 * 4, "c": 9 * 3}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(sizes[k] for k in train)
    start = copy.deepcopy(model.state_dict())
    assert {"0.A", "0.B", "0.C"} < set(start)  # frozen ones are saved as well
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, weight_decay=0.0))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(20, 12)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == trained


def two_shapes(**options):
    model = nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8), "head": nn.Linear(8, 2)})
    model["up2"] = nn.Linear(8, 32)
    inject(model, ["up", "down", "up2"], **options)
    model["head"].requires_grad_(True)
    return model


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("train", ["abc", "ab", "bc", "b"])
def test_every_trained_matrix_is_in_one_group_with_the_rate_of_its_kind_and_shape(ratio, train):
    model = two_shapes(rank1=2, rank2=4, train=train, ratio=ratio)
    groups = param_groups(model, lr=0.01, weight_decay=0.1)
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    expected = {id(p): 0.01 for p in model["head"].parameters()}
    for name, (m, n) in {"up": (32, 8), "up2": (32, 8), "down": (8, 32)}.items():
        multiples = rate_ratios(parse_ratio(ratio), m, n, 2, 4)
        lr_A = 0.01 / multiples[1] if ratio in ("paper", "summed") else 0.01
        for letter, multiple in zip("abc", multiples):
            if letter in train:
                expected[id(getattr(model[name], letter.upper()))] = lr_A * multiple
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(group["weight_decay"] == 0.1 for group in groups)
    # One group for the head, one for each trained kind; the estimates split A and C by shape.
    split = len(set(train) - {"b"}) if ratio in ("paper", "summed") else 0
    assert len(groups) == 1 + len(train) + split


def trained_by(groups_of, ratio, steps=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2))
    inject(model, ["0", "2"], rank1=3, rank2=4, ratio=ratio)
    model[4].requires_grad_(True)
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(20, 12)).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def test_ratio_one_is_plain_AdamW_to_the_bit():
    plain = trained_by(lambda model: [p for p in model.parameters() if p.requires_grad], "1")
    one, four = (trained_by(lambda model: param_groups(model, 1e-2, 0.1), ratio) for ratio in ("1", "4"))
    trained = [name for name in plain if name[-1] in "ABC" or name.startswith("4.")]
    assert len(trained) == 8
    for name in plain:
        assert torch.equal(one[name], plain[name])
        assert torch.equal(four[name], plain[name]) == (name not in trained)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_equals_unmerged(dtype, tolerance):
    model = adapted(9, 12, 4, 3, dtype=dtype)
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
    model = adapted(9, 12, 4, 3, dtype=torch.bfloat16)
    layer = model[0]
    A, B, C, W0 = (M.detach().float() for M in (layer.A, layer.B, layer.C, layer.base.weight))
    expected = (W0 + C @ B @ A).to(torch.bfloat16)
    in_bfloat16 = (layer.base.weight + torch.matmul(*layer.factors())).detach()
    merge(model)
    assert not torch.equal(in_bfloat16, expected)
    assert torch.equal(model[0].weight, expected)


def test_the_state_restores_the_layer_under_another_seed():
    model = adapted(9, 12, 4, 3, train="bc")
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.manual_seed(99)
    other = nn.Sequential(nn.Linear(12, 9, dtype=torch.float64))
    inject(other, ["0"], rank1=4, rank2=3, train="bc")
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_rank1_and_rank2_default_to_rank():
    for options, r1, r2 in (({}, 3, 3), ({"rank1": 2}, 2, 3), ({"rank2": 5}, 3, 5)):
        model = nn.Sequential(nn.Linear(12, 9))
        inject(model, ["0"], rank=3, **options)
        assert model[0].B.shape == (r1, r2)


def test_ratio_is_read_from_text_or_number():
    assert [parse_ratio(r) for r in ("4", "2.5", 8, 1.0)] == [4.0, 2.5, 8.0, 1.0]
    assert [parse_ratio(r) for r in ("paper", "summed")] == ["paper", "summed"]
    for wrong in ("0", "-4", "nan", "inf", "Paper", "", None):
        with pytest.raises(ValueError, match="is not one of paper, summed or a number above 0"):
            parse_ratio(wrong)


@pytest.mark.parametrize(
    "targets, options, message",
    [
        (["0"], {"rank": 0}, r"rank 0 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 6}, r"rank 6 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 4.0}, r"rank 4.0 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 2, "rank1": 7}, r"rank 7 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 2, "rank2": -1}, r"rank -1 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        (["0"], {"rank": 2, "train": "ac"}, "train 'ac' is not one of abc, ab, bc, b"),
        (["0"], {"rank": 2, "init_b": "ones"}, "init_b 'ones' is not one of zero, lecun, identity"),
        (["0"], {"rank": 2, "train": "ab", "init_b": "identity"}, "so C has to be trained, and train is 'ab'"),
        (["0"], {"rank": 2, "ratio": "loud"}, "ratio 'loud' is not one of paper, summed or a number above 0"),
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
        assert inspect.getsource(getattr(tlora_plus, function)) == inspect.getsource(getattr(lora, function))


def test_the_demo_shows_that_ratio_4_learns_faster_than_ratio_1(capsys):
    tlora_plus.main()
    shown = capsys.readouterr().out
    print(shown)
    losses = [float(line.split("loss")[1]) for line in shown.splitlines() if "step" in line]
    assert shown.count("output unchanged at the start: True") == 2
    assert len(losses) == 6 and losses[0] == losses[3] and losses[5] < losses[2] < losses[0]


# ------------------------------------------------------------------ what no wrong line may pass


def test_the_defaults_are_rank_8_ratio_4_and_all_three_trained_from_zero():
    model = nn.Sequential(nn.Linear(40, 50))
    inject(model, ["0"])
    layer = model[0]
    assert layer.A.shape == (8, 40) and layer.B.shape == (8, 8) and layer.C.shape == (50, 8)
    assert layer.ratio == 4.0 and not layer.B.any()
    assert all(getattr(layer, letter).requires_grad for letter in "ABC")


def test_ranks_of_the_smaller_side_are_allowed():
    model = nn.Sequential(nn.Linear(12, 5))
    assert inject(model, ["0"], rank1=5, rank2=5) == ["0"] and model[0].B.shape == (5, 5)


def demos_first_part(shown):
    """[(ratio, rates, changes)] of the demo's first table."""
    numbers = r"([\d.e+-]+) : ([\d.e+-]+) : ([\d.e+-]+)"
    rows = re.findall(rf"^  ratio (\w+) +{numbers} +{numbers}$", shown, re.M)
    return [(row[0], [float(x) for x in row[1:4]], [float(x) for x in row[4:]]) for row in rows]


def test_the_demos_table_is_that_of_its_matrices_in_numpy(capsys):
    tlora_plus.main()
    shown = capsys.readouterr().out
    torch.manual_seed(0)
    A, B, C = torch.randn(8, 768) / 768**0.5, torch.randn(8, 8) / 8**0.5, torch.randn(768, 8) / 8**0.5
    A, B, C, G = (M.double().numpy() for M in (A, B, C, torch.randn(768, 64) @ torch.randn(64, 768)))
    sizes = [np.abs(g).sum() for g in (B.T @ C.T @ G, C.T @ G @ A.T, G @ A.T @ B.T)]  # Eq. 5 at rate 1
    rows = demos_first_part(shown)
    assert [row[0] for row in rows] == RATIOS
    for ratio, rates, changes in rows:
        expected = rate_ratios(parse_ratio(ratio), 768, 768, 8, 8)
        assert rates == pytest.approx(expected, rel=1e-3)
        shares = [size * rate / sizes[0] for size, rate in zip(sizes, expected)]
        print(ratio, changes, shares)
        assert changes == pytest.approx(shares, abs=0.006, rel=1e-4)


def test_the_demo_says_the_layer_and_merges_what_it_trained(capsys):
    tlora_plus.main()
    shown = capsys.readouterr().out
    assert "layer 768 x 768, rank 8" in shown
    rows = re.findall(r"^    step +(\d+)  loss ([\d.]+)$", shown, re.M)
    assert [int(step) for step, _ in rows] == [0, 100, 200] * 2
    # A sum of 64 times 4 products of normal numbers, divided by 16, is a normal number: its square is 1 on average.
    assert 0.7 < float(rows[0][1]) < 1.3
    merged, difference = re.search(r"^merged into (.*): largest difference (\S+)$", shown, re.M).groups()
    assert merged == "Linear(in_features=64, out_features=48, bias=True)" and 0 < float(difference) < 1e-5
