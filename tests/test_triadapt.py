"""TriAdaptLoRA against hand-computed values, autograd and the properties its paper claims."""

import copy
import inspect
import math
import random
import re
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import triadapt
from triadapt import (
    EPS,
    STD,
    after_step,
    budget_left,
    choose_growth,
    event_steps,
    inject,
    lower,
    matrices_to_grow,
    merge,
    orthogonality,
    param_groups,
    penalty,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are no work for several threads, which only wait for each other, long if cores are few."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted(rank=1, m=5, n=7, dtype=torch.float64, seed=0, trained=True, **options):
    """A one-layer model under the method; `trained` gives B values, so that the update is not zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m, dtype=dtype))
    inject(model, ["0"], rank=rank, **{"rank_ref": 64, **options})
    layer = model[0]
    if trained:
        with torch.no_grad():
            for p in (layer.A, layer.B, layer.L, layer.U):
                p.copy_(torch.randn_like(p))
    return model, layer


def dense(layer):
    """L and U as matrices, built entry by entry from the packed numbers."""
    r = layer.rank
    L, U = torch.zeros(r, r, dtype=layer.A.dtype), torch.zeros(r, r, dtype=layer.A.dtype)
    k = 0
    for i in range(r):  # L row by row, U column by column
        for j in range(i + 1):
            L[i, j], U[j, i] = layer.L[k].item(), layer.U[k].item()
            k += 1
    return L, U


# ------------------------------------------------------------------- Eqs. 4 and 5


def test_eq4_packed_triangles_are_lower_and_upper_with_their_diagonals():
    assert lower(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 3).tolist() == [[1, 0, 0], [2, 3, 0], [4, 5, 6]]
    _, layer = adapted(rank=4)
    L, U = dense(layer)
    assert torch.equal(L, L.tril()) and torch.equal(U, U.triu()) and (L.diag() != 0).all() and (U.diag() != 0).all()
    assert torch.equal(layer.D, L + U)
    assert (layer.D != 0).all(), "D = L + U is dense"


def test_eq5_forward_is_w0x_plus_scaled_b_l_plus_u_a_x():
    model, layer = adapted(rank=3, alpha=16.0)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    L, U = dense(layer)
    dW = 16.0 / (3 + 1e-5) * layer.B @ (L + U) @ layer.A
    expected = x @ (layer.base.weight + dW).T + layer.base.bias
    assert (expected - layer.base(x)).abs().max() > 1  # the update matters
    error = (model(x) - expected).abs().max().item()
    P, Q = layer.factors()
    print("forward error", error)
    assert error < 1e-12
    assert (P @ Q - dW).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [1, 4])
def test_starts_with_b_zero_and_gaussian_a_l_u(rank):
    model, layer = adapted(rank=rank, m=300, n=400, trained=False)
    assert not layer.B.any() and STD == 0.02 and EPS == 1e-5
    x = torch.randn(9, 400, dtype=torch.float64)
    assert torch.equal(model(x), layer.base(x))
    _, wide = adapted(rank=200, m=300, n=400, trained=False, rank_ref=200)
    for p in (wide.A, wide.L, wide.U):
        # the deviation of N numbers of deviation s is s within s / sqrt(2 N) (one sigma)
        assert abs(p.std().item() / STD - 1) < 5 / math.sqrt(2 * p.numel())
        assert abs(p.mean().item()) < 5 * STD / math.sqrt(p.numel())


@pytest.mark.parametrize("r,added", [(1, 1), (1, 4), (3, 2)])
def test_with_an_identity_start_l_plus_u_is_i_where_nothing_is_trained_yet(r, added):
    model, layer = adapted(rank=r, trained=False, start="identity")
    assert layer.D.tolist() == torch.eye(r).tolist() and layer.A.std() > 0 and not layer.B.any()
    assert layer.L.requires_grad and layer.L.dtype == layer.A.dtype
    with torch.no_grad():
        layer.L.normal_()
        layer.B.normal_()
    L, U = dense(layer)
    layer.grow(added)
    L2, U2 = dense(layer)
    grown = torch.eye(r + added, dtype=L.dtype) / 2  # half of I each, but for what was there
    grown[:r, :r] = L
    assert torch.equal(L2, grown) and torch.equal(U2, torch.eye(r + added, dtype=L.dtype) / 2)
    assert layer.B[:, r:].std() > 0 and layer.A[r:].std() > 0
    x = torch.randn(9, 7, dtype=torch.float64)
    assert (model(x) - layer.base(x)).abs().max() > 0.01
    old = adapted(rank=2, trained=False)[1]  # a file of before this setting has growth without it
    del old.growth["start"]
    old.grow(1)
    assert (old.L != 0).all()


def test_trained_numbers_are_r_m_plus_n_plus_r_r_plus_1():
    for m, n, r in [(5, 7, 1), (5, 7, 4), (8, 3, 2), (6, 6, 6)]:
        model, _ = adapted(rank=r, m=m, n=n)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == r * (m + n) + r * (r + 1)


def test_a_layer_shows_the_base_to_whoever_looks_at_it():
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(7, 5, bias=bias, dtype=torch.float64))
        base = model[0]
        inject(model, ["0"])
        layer = model[0]
        assert layer is not base and layer.base is base
        assert layer.weight is base.weight and layer.bias is base.bias
        assert (layer.in_features, layer.out_features) == (7, 5)


def test_training_mode_of_each_layer_is_kept():
    for modes in ([True, False], [False, True]):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for layer, mode in zip(model, modes):
            layer.train(mode)
        inject(model, ["0", "1"])
        assert [layer.training for layer in model] == [layer.base.training for layer in model] == modes


def test_a_target_is_a_whole_part_of_a_name():
    model = nn.Module()
    model.layer = nn.ModuleDict({"proj": nn.Linear(3, 3), "q_proj": nn.Linear(3, 3), "proj_out": nn.Linear(3, 3)})
    assert inject(model, ["proj"], rank_ref=2) == ["layer.proj"]
    assert type(model.layer["q_proj"]) is type(model.layer["proj_out"]) is nn.Linear


def test_param_groups_are_one_with_the_rate_and_the_decay_given():
    model, layer = adapted()
    model.append(nn.Linear(5, 2))
    (group,) = param_groups(model, 3e-4, 0.7)
    assert (group["lr"], group["weight_decay"]) == (3e-4, 0.7) and len(group) == 3
    expected = [layer.A, layer.B, layer.L, layer.U, model[1].weight, model[1].bias]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    optimizer = torch.optim.AdamW([group], lr=1.0, weight_decay=0.1)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (3e-4, 0.7)


def test_dropout_is_on_the_adapters_input():
    model, layer = adapted(rank=3, dropout=0.5)
    x = torch.randn(6, 7, dtype=torch.float64)
    P, Q = layer.factors()
    torch.manual_seed(5)
    got = model(x)
    torch.manual_seed(5)
    kept = F.dropout(x, 0.5)
    assert not torch.equal(kept, x)
    assert (got - (layer.base(x) + kept @ Q.T @ P.T)).abs().max() < 1e-12
    model.eval()
    assert (model(x) - (layer.base(x) + x @ Q.T @ P.T)).abs().max() < 1e-12


# ------------------------------------------------------------------- Eqs. 6 to 9


@pytest.mark.parametrize("r,added", [(1, 1), (1, 4), (3, 2), (2, 3)])
def test_eqs6_to_9_growth_keeps_old_entries_in_their_places(r, added):
    _, layer = adapted(rank=r)
    A, B, (L, U) = layer.A.clone(), layer.B.clone(), dense(layer)
    torch.manual_seed(1)
    layer.grow(added)
    L2, U2 = dense(layer)
    assert layer.rank == r + added
    assert torch.equal(layer.A[:r], A) and layer.A.shape == (r + added, 7)  # Eq. 6: rows
    assert torch.equal(layer.B[:, :r], B) and layer.B.shape == (5, r + added)  # Eq. 7: columns
    assert torch.equal(L2[:r, :r], L) and not L2[:r, r:].any()  # Eq. 8: [[L, 0], [L_down, L_aug]]
    assert torch.equal(U2[:r, :r], U) and not U2[r:, :r].any()  # Eq. 9: [[U, U_up], [0, U_aug]]
    assert (L2[r:, :r] != 0).all() and (U2[:r, r:] != 0).all(), "L_down and U_up are dense"
    L_aug, U_aug = L2[r:, r:], U2[r:, r:]
    assert torch.equal(L_aug, L_aug.tril()) and torch.equal(U_aug, U_aug.triu())
    assert (L_aug.diag() != 0).all() and (U_aug.diag() != 0).all()


def test_new_entries_are_gaussian_in_all_four_b_included():
    _, layer = adapted(rank=1, m=300, n=400)
    torch.manual_seed(2)
    changes = layer.grow(99)
    for (old, new, dim), name in zip(changes, "ABLU"):
        fresh = new.narrow(dim, old.shape[dim], new.shape[dim] - old.shape[dim])
        assert abs(fresh.std().item() / STD - 1) < 5 / math.sqrt(2 * fresh.numel()), name


@pytest.mark.parametrize("preserve", [False, True])
def test_growth_draws_a_b_l_u_in_this_order_and_preserve_zeroes_b_aug_and_u_up_alone(preserve):
    r, added = 2, 3
    _, layer = adapted(rank=r, preserve=preserve)
    old_L, old_U = layer.L.clone(), layer.U.clone()
    torch.manual_seed(4)
    layer.grow(added)
    torch.manual_seed(4)
    A, B, L, U = (0.02 * torch.randn(*shape).double() for shape in ((added, 7), (5, added), (12,), (12,)))
    factor = (5 + 1e-5) / (2 + 1e-5) if preserve else 1.0
    if preserve:
        B.zero_()
        U[[0, 1, 3, 4, 7, 8]] = 0.0  # the columns of U have 3, 4 and 5 entries: the first two of each are U_up
    assert torch.equal(layer.A[r:], A) and torch.equal(layer.B[:, r:], B)
    assert torch.equal(layer.L[3:], L) and torch.equal(layer.U[3:], U)
    assert (layer.U[3:] != 0).sum() == (6 if preserve else 12)
    assert torch.equal(layer.L[:3], old_L * factor) and torch.equal(layer.U[:3], old_U * factor)
    assert abs(layer.rescale.item() / factor - 1) < 1e-7


def test_growth_keeps_what_is_frozen_frozen():
    _, layer = adapted(rank=2)
    layer.A.requires_grad_(False), layer.U.requires_grad_(False)
    changes = layer.grow(1)
    assert [p.requires_grad for p in (layer.A, layer.B, layer.L, layer.U)] == [False, True, True, False]
    assert all(type(p) is nn.Parameter and p.is_leaf for p in (layer.A, layer.B, layer.L, layer.U))
    expected = [(layer.A, 0), (layer.B, 1), (layer.L, 0), (layer.U, 0)]
    assert [(id(new), dim) for _, new, dim in changes] == [(id(p), dim) for p, dim in expected]
    assert not layer.base.weight.requires_grad and not layer.base.bias.requires_grad


def test_papers_growth_shrinks_the_old_update_by_the_new_divisor():
    """alpha / (r + eps): from rank 1 to 5 the old update is multiplied by (1 + eps) / (5 + eps)."""
    model, layer = adapted(rank=1, n=40, m=30)
    with torch.no_grad():  # as large as trained entries are, so that new ones of 0.02 hardly count
        layer.A.mul_(10), layer.B.mul_(10)
    P, Q = layer.factors()
    before = P @ Q
    layer.grow(4)
    P, Q = layer.factors()
    after, expected = P @ Q, before * (1 + EPS) / (5 + EPS)
    jump = ((after - expected).norm() / expected.norm()).item()
    print("relative size of the Gaussian entries' own change:", jump)
    assert 0 < jump < 0.05
    assert abs((after.norm() / before.norm()).item() - 0.2) < 0.01


@pytest.mark.parametrize("r,steps", [(1, [4]), (1, [4, 4, 3]), (3, [1, 2])])
def test_preserve_leaves_the_function_as_it_was(r, steps):
    model, layer = adapted(rank=r, n=40, m=30, preserve=True)
    x = torch.randn(11, 40, dtype=torch.float64)
    before = model(x)
    assert (before - layer.base(x)).abs().max() > 1
    norm = layer.D.norm().item()
    divided = layer.normalised_norm() * r
    assert abs(divided - norm) < 1e-5
    for added in steps:
        layer.grow(added)
        error = ((model(x) - before).abs().max() / before.abs().max()).item()
        print("change of the output", error)
        assert error < 1e-13
    assert layer.rank == r + sum(steps)
    # importance sees D without the accumulated factor (new rows of L_down and the new blocks add 0.02's)
    factor = (layer.rank + EPS) / (r + EPS)
    assert abs(layer.rescale.item() / factor - 1) < 1e-6
    assert abs(layer.normalised_norm() * layer.rank / norm - 1) < 0.01
    # the new entries can learn: the first step after growth moves B's new columns
    model(x).square().sum().backward()
    assert layer.B.grad[:, r:].abs().max() > 0


def test_preserve_without_rescaled_importance_would_favour_the_grown():
    _, layer = adapted(rank=1, n=40, m=30, preserve=True)
    before = layer.normalised_norm()
    layer.grow(4)
    assert layer.D.norm().item() / layer.rank > 0.99 * before  # undivided: as large as ever
    assert abs(layer.normalised_norm() / before - 0.2) < 0.01  # as for a paper's growth, 1/5


# ------------------------------------------------------------------- Eq. 10


def test_eq10_orthogonality_by_hand_and_zero_for_orthonormal_factors():
    A = torch.tensor([[1.0, 2.0]])  # A A^T = 5
    B = torch.tensor([[3.0], [0.0], [1.0]])  # B^T B = 10
    assert orthogonality(A, B).item() == (5 - 1) ** 2 + (10 - 1) ** 2
    Q = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))[0]
    assert orthogonality(Q.T, Q).item() < 1e-28


def test_eq10_as_the_loss_term_in_both_forms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    for form in ("sum", "mean"):
        inject(model, ["0", "1"], rank=2, orth=0.3, orth_form=form)
        for layer in model:
            nn.init.normal_(layer.B)
        parts = []
        for layer in model:
            for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):
                parts.append((gram - torch.eye(2)).square().sum())
        expected = 0.3 * (sum(parts) if form == "sum" else sum(p.sqrt() for p in parts) / 4)
        got = penalty(model)
        assert got > 0 and abs((got - expected).item()) < 1e-12
        got.backward()
        assert all(layer.A.grad.abs().sum() > 0 and layer.B.grad.abs().sum() > 0 for layer in model)
        merge(model)
    inject(model, ["0", "1"], rank=2, orth=0.0)
    assert penalty(model).item() == 0.0 and penalty(model).shape == () and not penalty(model).requires_grad


@pytest.mark.parametrize("form,expected", [("sum", 0.5 * (16 + 81)), ("mean", 0.5 * (4 + 9) / 2)])
def test_eq10_of_one_layer_by_hand(form, expected):
    model, layer = adapted(rank=1, m=3, n=2, orth=0.5, orth_form=form)
    with torch.no_grad():
        layer.A.copy_(torch.tensor([[1.0, 2.0]]))  # A A^T - 1 = 4
        layer.B.copy_(torch.tensor([[3.0], [0.0], [1.0]]))  # B^T B - 1 = 9
    assert penalty(model).item() == expected and penalty(model).shape == ()
    model, _ = adapted(orth=0)
    assert penalty(model).item() == 0.0


# ------------------------------------------------------------------- Eqs. 11 to 14


@pytest.mark.parametrize("normalise,divisor", [("r", 3.0), ("sqrt", 3.0**0.5), ("none", 1.0)])
def test_eq11_importance_is_the_change_of_the_normalised_norm(normalise, divisor):
    model, layer = adapted(rank=3, normalise=normalise, t0=0, interval=10, delta=1, trained=False)
    start = layer.D.norm().item() / divisor
    with torch.no_grad():
        layer.L.normal_()
        layer.U.normal_()
    now = layer.D.norm().item() / divisor
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
    event = after_step(model, optimizer, 10, 100)
    assert now > start  # so the score is not trivially zero
    assert abs(event["scores"]["0"] - (now - start)) < 1e-6  # norms are kept in float32
    # At the next event: before any growth of that event, with the rank it has then.
    assert layer.rank == 4
    later = layer.D.norm().item() / {"r": 4.0, "sqrt": 2.0, "none": 1.0}[normalise]
    event = after_step(model, optimizer, 20, 100)
    assert abs(event["scores"]["0"] - (later - now)) < 1e-6


def test_events_come_when_t_is_past_t0_at_the_interval_and_before_the_end():
    for total, expected in ((100, [8, 11, 14, 17]), (17, [8, 11, 14]), (18, [8, 11, 14, 17])):
        model, _ = adapted(t0=5, interval=3, delta=1)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
        events = [t for t in range(1, 20) if after_step(model, optimizer, t, total) is not None]
        assert events == expected
    rng = random.Random(0)
    for _ in range(300):
        t0, interval, total = rng.randint(0, 20), rng.randint(1, 12), rng.randint(21, 60)
        steps = [t for t in range(1, total + 1) if t0 < t < total and (t - t0) % interval == 0]
        assert list(event_steps(t0, interval, total)) == steps


def test_nothing_grows_at_the_last_step_for_it_would_never_be_trained():
    """With the defaults and a hundred steps the only event would be the last step; growing there undoes the training."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])
    x = torch.randn(32, 8)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for layer in teacher:
            layer.weight += 0.2 * torch.randn(8, 1) @ torch.randn(1, 8)
        y = teacher(x)
    inject(model, [str(i) for i in range(12)])
    optimizer = torch.optim.AdamW(param_groups(model, 2e-2, 0.0))
    losses = []
    with pytest.warns(UserWarning, match=r"no layer will grow: .* at t0 \+ interval = 100, the run ends at 100"):
        for step in range(1, 101):
            losses.append(loss := F.mse_loss(model(x), y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trained = F.mse_loss(model(x), y).item()
            assert after_step(model, optimizer, step, 100) is None
    assert F.mse_loss(model(x), y).item() == trained < 0.2 * losses[0].item()
    assert all(layer.rank == 1 for layer in model)
    for layer in model[:4]:
        layer.grow(4)
    print("loss before", losses[0].item(), "trained", trained, "grown", F.mse_loss(model(x), y).item())
    assert F.mse_loss(model(x), y).item() > 2 * trained, "the growth that is left out would have shown"


def test_watch_tells_ranks_and_what_the_importance_would_be_now():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, ["0", "1"], rank=2)
    assert triadapt.watch(model) == {"ranks": {"0": 2, "1": 2}, "importance": {"0": 0.0, "1": 0.0}}
    with torch.no_grad():
        for layer, value in zip(model, (3.0, 1.0)):
            layer.L.fill_(value), layer.U.zero_()
            layer.reference.fill_(0.25)
    model[1].grow(1)
    with torch.no_grad():
        model[1].L.fill_(1.0), model[1].U.zero_()
    watched = triadapt.watch(model)
    assert watched["ranks"] == {"0": 2, "1": 3}
    # three entries of 3 and six of 1: norms sqrt(27) and sqrt(6), divided by the ranks
    assert abs(watched["importance"]["0"] - (math.sqrt(27) / 2 - 0.25)) < 1e-6
    assert abs(watched["importance"]["1"] - (math.sqrt(6) / 3 - 0.25)) < 1e-6


def test_a_layer_that_just_grew_scores_low_for_its_norm_is_divided_by_more():
    model, layer = adapted(rank=2, n=9, m=9, t0=0, interval=1, delta=3)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
    with torch.no_grad():
        layer.reference.zero_()
    first = after_step(model, optimizer, 1, 10)["scores"]["0"]
    second = after_step(model, optimizer, 2, 10)["scores"]["0"]
    print("scores", first, second)
    assert first > 0 and abs(second / (first * (2 / 5 - 1)) - 1) < 0.01  # the same norm over 5, less that over 2


def test_the_last_one_of_the_budget_is_spent_too():
    model, layer = adapted(rank=1, rank_ref=2, delta=4, t0=0, interval=1)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
    event = after_step(model, optimizer, 1, 10)
    assert event["grown"] == {"0": 2} and event["budget"] == 0 and layer.rank == 2


def test_no_growth_once_the_budget_is_spent():
    model, layer = adapted(rank=1, rank_ref=3, delta=2, t0=0, interval=1)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
    assert after_step(model, optimizer, 1, 10)["budget"] == 0 and layer.rank == 3 < min(layer.base.weight.shape)
    reference = layer.reference.item()
    with torch.no_grad():
        layer.L.mul_(2)
    assert [after_step(model, optimizer, t, 10) for t in range(2, 10)] == [None] * 8
    assert layer.reference.item() == reference and layer.rank == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_growth_on_a_score_that_is_no_number(value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, ["0", "1"], t0=0, interval=5)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
    with torch.no_grad():
        model[0].L.fill_(3.0)
        model[1].U.fill_(value)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"^score (nan|inf) of layer 1 at step 5: its L \+ U is not finite$"):
        after_step(model, optimizer, 5, 100)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items() if name != "1.U"), "references included"
    model[1].U.data.zero_()
    assert after_step(model, optimizer, 5, 100)["grown"], "and it would have grown"


def test_eq12_budget_is_reference_less_what_is_there():
    assert budget_left(8, [1] * 12) == 84  # r_ref M - r M
    assert budget_left(8, [5] * 9 + [1] * 3) == 84 - 9 * 4


def test_eqs12_and_13_the_test_vector_of_a_whole_growth():
    """M = 12, r = 1, r_ref = 8, dr = 4, t0 = 100, T = 1100, every 100 steps, linear: done at t = 400."""
    ranks, seen = [1] * 12, []
    for t in range(200, 1101, 100):
        budget = budget_left(8, ranks)
        if budget == 0:
            break
        k = matrices_to_grow(budget, t, 100, 1100, "linear")
        chosen = choose_growth([0.0] * 12, ranks, [768] * 12, budget, k, 4)
        seen.append((t, budget, k, len(chosen)))
        for i, added in chosen:
            ranks[i] += added
    assert seen == [(200, 84, 9, 9), (300, 48, 10, 10), (400, 8, 3, 2)]
    assert sum(ranks) == 96


def test_eq13_linear_threshold_is_the_exact_ceiling():
    assert matrices_to_grow(100, 11, 0, 20, "linear") == 55  # in floats 100 * (11 / 20) is above 55
    assert math.ceil(100 * (11 / 20)) == 56
    for _ in range(2000):
        R, t0, T = random.randint(1, 500), random.randint(0, 50), random.randint(60, 5000)
        t = random.randint(t0 + 1, T)
        k = matrices_to_grow(R, t, t0, T, "linear")
        assert (k - 1) * (T - t0) < R * (t - t0) <= k * (T - t0)  # k = ceil, in whole numbers


def test_eq14_nonlinear_threshold():
    assert matrices_to_grow(84, 200, 100, 1100, "nonlinear") == 2  # 84^0.1 = 1.557
    assert matrices_to_grow(84, 600, 100, 1100, "nonlinear") == 10  # 84^0.5 = 9.165
    assert matrices_to_grow(81, 600, 100, 1100, "nonlinear") == 9  # exactly 9
    assert matrices_to_grow(125, 4, 1, 10, "nonlinear") == 5  # 125^(1/3): 4.999.. or 5.000..1 in floats
    assert matrices_to_grow(32, 4, 0, 5, "nonlinear") == 16  # 32^0.8 is 16.000000000000004 in floats
    assert math.ceil(32 ** (4 / 5)) == 17
    assert matrices_to_grow(84, 1100, 100, 1100, "nonlinear") == 84
    assert matrices_to_grow(1000_001, 11, 1, 21, "nonlinear") == 1001  # 1000.0005 is above 1000: 1e-9 hides no number
    assert matrices_to_grow(84, 200, 100, 1100, "fixed", 7) == 7
    for mode in ("linear", "nonlinear"):
        assert matrices_to_grow(1, 2, 1, 10**9, mode) == 1, "at least one"


def test_the_highest_scores_grow_ties_in_order_and_full_ones_are_skipped():
    assert choose_growth([3.0, 9.0, 3.0, 3.0], [1] * 4, [9] * 4, 99, 3, 2) == [(0, 2), (1, 2), (2, 2)]
    assert choose_growth([3.0, 9.0, 3.0, 5.0], [1, 9, 8, 1], [9] * 4, 99, 2, 2) == [(0, 2), (3, 2)]
    assert choose_growth([1.0, 2.0], [1, 8], [9] * 2, 99, 2, 2) == [(0, 2), (1, 1)], "a nearly full one by what fits"
    assert choose_growth([1.0, 2.0], [1, 1], [9] * 2, 3, 2, 4) == [(1, 3)], "the last growth takes what is left"
    assert choose_growth([1.0, 2.0], [1, 1], [9] * 2, 1, 2, 4) == [(1, 1)], "be it one"
    assert choose_growth([1.0, 2.0], [9, 9], [9] * 2, 3, 2, 4) == []
    assert choose_growth([1.0, 2.0], [1, 1], [9] * 2, 0, 2, 4) == []


def test_property_the_budget_is_never_exceeded_and_nearly_always_used():
    rng = random.Random(0)
    used = grown = 0
    for _ in range(400):
        M, r = rng.randint(1, 20), rng.randint(1, 4)
        r_ref, delta = r + rng.randint(0, 8), rng.randint(1, 6)
        t0, interval = rng.randint(0, 30), rng.randint(1, 20)
        T = t0 + rng.randint(1, 300)
        mode = rng.choice(["linear", "nonlinear", "fixed"])
        limits = [rng.choice([r, r + 1, r + 3, 64]) for _ in range(M)]
        ranks = [r] * M
        for t in event_steps(t0, interval, T):
            budget = budget_left(r_ref, ranks)
            k = matrices_to_grow(budget, t, t0, T, mode, rng.randint(1, 5)) if budget else 1
            chosen = choose_growth([rng.choice([0.0, rng.gauss(0, 1)]) for _ in ranks], ranks, limits, budget, k, delta)
            assert len(chosen) <= k and len({i for i, _ in chosen}) == len(chosen)
            for i, added in chosen:
                assert added >= 1
                ranks[i] += added
            assert sum(ranks) <= r_ref * M
            assert all(rank <= limit for rank, limit in zip(ranks, limits))
        grown += sum(ranks) > r * M
        used += sum(ranks) == r_ref * M
    print("grown", grown, "of 400, whole budget used", used)
    assert grown > 250 and used > 100


def test_property_the_budget_holds_in_real_training_with_every_mode():
    for mode in ("linear", "nonlinear", "fixed"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 9), nn.Linear(9, 3))
        inject(model, ["0", "1", "2"], rank_ref=4, delta=3, interval=2, t0=3, mode=mode, fixed_k=2)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
        x = torch.randn(8, 6)
        for step in range(1, 41):
            optimizer.zero_grad()
            (model(x).square().mean() + penalty(model)).backward()
            optimizer.step()
            after_step(model, optimizer, step, 40)
            assert sum(layer.rank for layer in model) <= 12
        ranks = [layer.rank for layer in model]
        print(mode, ranks)
        assert sum(ranks) == min(12, 3 + 5 + 5) and ranks[2] <= 3


# ------------------------------------------------------------------- Eqs. 15 and 16


def test_eqs15_and_16_gradients_against_autograd():
    model, layer = adapted(rank=3, alpha=5.0)
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    target = torch.randn(4, 6, 5, dtype=torch.float64)
    h = model(x)
    h.retain_grad()
    (h - target).pow(3).sum().backward()
    g, X = h.grad.reshape(-1, 5), x.reshape(-1, 7)  # one row per token
    s, D, A, B = layer.scaling, layer.D, layer.A, layer.B
    dW = g.T @ X  # Eq. 15: g x^T, summed over tokens
    expected = {
        "B": s * g.T @ (X @ A.T @ D.T),  # g (D A x)^T
        "A": s * D.T @ B.T @ dW,  # D^T B^T g x^T
    }
    both = s * B.T @ g.T @ (X @ A.T)  # B^T g (A x)^T
    i, j = torch.tril_indices(3, 3)
    expected["L"] = both[i, j]  # tril, row by row
    expected["U"] = both.T[i, j]  # triu, column by column
    for name, value in expected.items():
        grad = getattr(layer, name).grad
        error = (grad - value).abs().max().item()
        print(name, "largest", grad.abs().max().item(), "error", error)
        assert grad.abs().max() > 1 and error < 1e-9


# ------------------------------------------------------------------- growth and the optimizer


def problem(*, hidden=6, **options):
    """Two adapted layers, a trained head in front of them, and (loss of step t)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, hidden), nn.Tanh(), nn.Linear(hidden, 5))
    inject(model, ["1", "3"], **{"rank_ref": 4, "delta": 2, "interval": 3, "t0": 0, "orth": 0.01, **options})
    model[0].requires_grad_(True)

    def loss(t):
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(t))
        return (model(x) - x[:, :5]).square().mean() + penalty(model)

    return model, loss


def train(model, loss, optimizer, steps, total=15):
    for t in steps:
        optimizer.zero_grad()
        loss(t).backward()
        optimizer.step()
        after_step(model, optimizer, t, total)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "plain sgd": (torch.optim.SGD, {}),
    "adamw": (torch.optim.AdamW, {"foreach": False}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adamax": (torch.optim.Adamax, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_under_every_optimizer_whose_state_has_the_shape_of_the_parameter(name):
    kind, options = OPTIMIZERS[name]
    model, loss = problem()
    optimizer = kind(param_groups(model, 1e-2, 0.0), **options)
    train(model, loss, optimizer, [1, 2])
    loss(3).backward()
    optimizer.step()
    before = {n: (p.detach().clone(), copy.deepcopy(dict(optimizer.state.get(p, {})))) for n, p in model.named_parameters()}
    assert after_step(model, optimizer, 3, 15)["grown"]
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}, "nothing of the old ones is kept"
    larger = 0
    for n, p in model.named_parameters():
        old, state = before[n]
        inside = tuple(slice(size) for size in old.shape)
        assert torch.equal(p[inside], old)
        larger += p.shape != old.shape
        assert optimizer.state.get(p, {}).keys() == state.keys()
        for key, value in state.items():
            now = optimizer.state[p][key]
            if not torch.is_tensor(value) or value.ndim == 0:
                assert now == value
            else:
                assert now.shape == p.shape and torch.equal(now[inside], value)
                rest = now.clone()
                rest[inside] = 0
                assert not rest.any()
    assert larger >= 4
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, loss, optimizer, [4, 5])
    assert all((p != frozen[n]).any() for n, p in model.named_parameters() if p.requires_grad)


def test_foreach_and_fused_adamw_grow_and_train_as_the_simple_one():
    states = []
    for name in ("adamw", "foreach", "fused"):
        kind, options = OPTIMIZERS[name]
        model, loss = problem()
        model.double()
        start = model.state_dict()["3.base.weight"].clone()
        optimizer = kind(param_groups(model, 1e-2, 0.01), **options)
        torch.manual_seed(1)
        train(model, lambda t: loss64(model, t), optimizer, range(1, 13))
        assert model[1].rank + model[3].rank == 8 and torch.equal(model[3].base.weight, start)
        states.append(model.state_dict())
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        error = max((t - states[0][n]).abs().max().item() for n, t in other.items())
        print("difference", error)
        assert error < 1e-12


def loss64(model, t):
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(t)).double()
    return (model(x) - x[:, :5]).square().mean() + penalty(model)


def test_an_optimizer_that_cannot_grow_is_refused_before_anything_grows():
    def without(letter):
        def make(groups):
            left_out = getattr(model[3], letter)
            return torch.optim.AdamW([p for p in groups[0]["params"] if p is not left_out], lr=1e-2)

        return make

    words = "layer 1 cannot grow under Adafactor: its row_var for A (1, 7) is of shape (1, 1); take one with a state of"
    for make, text in [
        *((without(x), f"the optimizer does not hold {x} of layer 3: make a new one after inject") for x in "ABLU"),
        (lambda groups: torch.optim.Adafactor(groups, lr=1e-2), words),
        # its state lies at the first parameter: that of the head, then that of a layer
        (lambda groups: torch.optim.LBFGS(groups[0]["params"], max_iter=2), "layers cannot grow under LBFGS"),
        (lambda groups: torch.optim.LBFGS(groups[0]["params"][2:], max_iter=2), "layer 1 cannot grow under LBFGS: its "),
    ]:
        model, loss = problem()
        optimizer = make(param_groups(model, 1e-2, 0.0))
        for t in (1, 2, 3):  # refused at the first step and at the event
            optimizer.zero_grad()
            if isinstance(optimizer, torch.optim.LBFGS):
                loss(t).backward()
                optimizer.step(lambda: loss(t))
            else:
                loss(t).backward()
                optimizer.step()
            before = {n: p.clone() for n, p in model.state_dict().items()}
            if t == 2:
                assert after_step(model, optimizer, t, 15) is None
                continue
            with pytest.raises(ValueError) as error:
                after_step(model, optimizer, t, 15)
            assert text in str(error.value) and "\n" not in str(error.value)
            after = model.state_dict()
            assert all(torch.equal(after[n], p) for n, p in before.items()), "references and ranks as they were"


def test_a_state_in_a_list_is_refused_and_frozen_matrices_need_no_optimizer():
    model, loss = problem()
    model[1].L.requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
    train(model, loss, optimizer, [1, 2, 3])
    assert model[1].rank == 3 and not model[1].L.requires_grad
    optimizer.state[model[3].B]["history"] = [torch.zeros(2)]
    with pytest.raises(ValueError, match=r"layer 3 cannot grow under AdamW: its history for B \(5, \d\) is a list"):
        after_step(model, optimizer, 6, 15)


def test_what_grew_stands_in_its_place_and_group_of_the_optimizer():
    model, loss = problem()
    own = [p for layer in (model[1], model[3]) for p in (layer.B, layer.L)]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in own)]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1e-2}, {"params": own, "lr": 2e-2, "weight_decay": 0.3}])
    names = {id(p): n for n, p in model.named_parameters()}
    places = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert len(places[0]) == 6 and len(places[1]) == 4
    train(model, loss, optimizer, [1, 2, 3])
    assert model[1].rank + model[3].rank > 2
    names = {id(p): n for n, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == places
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-2, 1e-2), (2e-2, 0.3)]


def test_lists_captured_before_a_growth_are_stale():
    model, loss = problem()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
    captured = [p for p in model.parameters() if p.requires_grad]
    train(model, loss, optimizer, [1, 2, 3])
    now = [p for p in model.parameters() if p.requires_grad]
    stale = sum(all(p is not q for q in now) for p in captured)
    grown = [layer for layer in (model[1], model[3]) if layer.rank > 1]
    assert stale == 4 * len(grown) > 0
    assert "stale" in triadapt.__doc__ and "stale" in after_step.__doc__


def test_growth_under_adam_leaves_old_moments_in_place_and_starts_new_ones_at_zero():
    model, layer = adapted(rank=2, delta=3, interval=5, t0=0, rank_ref=5)
    head = nn.Parameter(torch.randn(5, dtype=torch.float64))
    model.head = nn.ParameterList([head])
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.1))
    x = torch.randn(8, 7, dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        (layer(x) * head).square().sum().backward()
        optimizer.step()

    for _ in range(5):
        step()
    old = {n: (getattr(layer, n), {k: v.clone() for k, v in optimizer.state[getattr(layer, n)].items()}) for n in "ABLU"}
    assert after_step(model, optimizer, 5, 100)["grown"] == {"0": 5}
    for name, (parameter, state) in old.items():
        new, dim = getattr(layer, name), 1 if name == "B" else 0
        assert new is not parameter and new.shape[dim] > parameter.shape[dim]
        now = optimizer.state[new]
        size = parameter.shape[dim]
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].abs().max() > 0
            assert torch.equal(now[key].narrow(dim, 0, size), state[key])
            assert not now[key].narrow(dim, size, new.shape[dim] - size).any()
        assert now["step"] == state["step"] == 5
    assert len(optimizer.state) == 5, "nothing of the old parameters is kept"
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters() if p.requires_grad}
    values = [p.detach().clone() for p in owned]
    step()
    assert all((p != v).any() for p, v in zip(owned, values)), "what grew is trained on"


@pytest.mark.parametrize("steps,claim", [(10, 0.48), (100, 0.98), (1_000, 2.5), (100_000, 3.2)])
def test_first_update_of_a_new_entry_is_what_the_docstring_says(steps, claim):
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=1.0, weight_decay=0.0)
    p.grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step()
    optimizer.state[p]["step"].fill_(steps - 1)  # the moments of zero gradients are zero after any number of steps
    new = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    triadapt.extend_in_optimizer(optimizer, p, new, 0)
    new.grad = torch.tensor([0.0, 0.5], dtype=torch.float64)
    optimizer.step()
    formula = 0.1 / (1 - 0.9**steps) / math.sqrt(0.001 / (1 - 0.999**steps))
    print("update", -new[1].item(), "formula", formula)
    assert new[0].item() == 0.0 and abs(-new[1].item() - formula) < 1e-6 * formula
    assert abs(formula / claim - 1) < 0.015 and formula < 0.1 / 0.001**0.5 + 1e-12
    text = triadapt.extend_in_optimizer.__doc__
    assert "0.48 of the rate\n    after 10 steps, 0.98 after 100, 2.5 after 1,000" in text and "= 3.2 late" in text


def test_a_grown_layer_continues_as_if_it_had_been_that_large(tmp_path):
    """With the new entries at zero and held there, training after growth is training without it."""
    runs = []
    for grows in (False, True):
        model, layer = adapted(rank=2, preserve=True, seed=3, orth=0.0)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
        torch.manual_seed(7)
        x = torch.randn(8, 7, dtype=torch.float64)
        for step in range(6):
            if step == 3 and grows:
                for old, new, dim in layer.grow(2):
                    triadapt.extend_in_optimizer(optimizer, old, new, dim)
                with torch.no_grad():
                    # undo the rescale, keep alpha / r as it was, and zero what is new
                    layer.alpha *= (4 + EPS) / (2 + EPS)
                    layer.L.div_((4 + EPS) / (2 + EPS)), layer.U.div_((4 + EPS) / (2 + EPS))
                    layer.A[2:], layer.B[:, 2:], layer.L[3:], layer.U[3:] = 0, 0, 0, 0
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        runs.append((layer.A[:2], layer.B[:, :2], model(x)))
    for a, b in zip(*runs):
        error = (a - b).abs().max().item()
        print("error", error)
        assert error < 1e-12


def test_scores_are_taken_before_any_growth_and_only_k_grow_with_ties():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    inject(model, ["0", "1", "2", "3"], rank_ref=3, delta=2, interval=1, t0=0, mode="fixed", fixed_k=2)
    with torch.no_grad():
        for layer in model:  # equal scores everywhere
            layer.L.fill_(1.0), layer.U.fill_(1.0)
            layer.reference.fill_(0.0)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
    event = after_step(model, optimizer, 1, 10)
    assert set(event["scores"].values()) == {2.0}
    assert event["grown"] == {"0": 3, "1": 3} and event["budget"] == 8 - 4


# ------------------------------------------------------------------- saving and refusing


def test_what_does_not_fit_is_refused_at_loading():
    model, layer = adapted(rank=1, n=7)
    layer.grow(2)
    fresh, _ = adapted(rank=1, n=8)
    with pytest.raises(RuntimeError, match="size mismatch for 0.A"):
        fresh.load_state_dict(model.state_dict())


def test_a_grown_state_loads_into_the_parameters_an_optimizer_holds_and_training_goes_on_to_the_bit():
    model, loss = problem()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.01))
    train(model, loss, optimizer, range(1, 8))  # events at 3 and 6
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    assert model[1].rank + model[3].rank > 4
    train(model, loss, optimizer, range(8, 15))  # and one at 9
    assert model[1].rank + model[3].rank == 8

    fresh, loss = problem()
    held = torch.optim.AdamW(param_groups(fresh, 1e-2, 0.01))
    train(fresh, loss, held, [1])  # it has gradients and moments of the old shapes
    parameters = {n: p for n, p in fresh.named_parameters()}
    graph = loss(2)  # is alive while the state is loaded, as the last loss of a loop is
    fresh.load_state_dict(saved[0][0])
    held.load_state_dict(saved[0][1])
    torch.set_rng_state(saved[1])
    assert {n: id(p) for n, p in fresh.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(p.grad is None for layer in (fresh[1], fresh[3]) if layer.rank > 1 for p in (layer.A, layer.B, layer.L, layer.U))
    assert any(not torch.equal(t, saved[0][0][n]) for n, t in model.state_dict().items()), "training changes something"
    at_resume = {n: p.detach().clone() for n, p in parameters.items()}
    train(fresh, loss, held, [8])
    assert all((p != at_resume[n]).any() for n, p in parameters.items() if p.requires_grad), "every parameter is trained"
    train(fresh, loss, held, range(9, 15))
    del graph
    assert (fresh[1].rank, fresh[3].rank) == (model[1].rank, model[3].rank)
    now = fresh.state_dict()
    assert all(torch.equal(t, now[n]) for n, t in model.state_dict().items())


def test_loading_a_state_of_the_same_ranks_touches_no_gradient_and_no_parameter():
    model, layer = adapted(rank=2)
    layer(torch.randn(3, 7, dtype=torch.float64)).sum().backward()
    places = [(id(p), p.data_ptr(), id(p.grad)) for p in (layer.A, layer.B, layer.L, layer.U)]
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()})
    assert places == [(id(p), p.data_ptr(), id(p.grad)) for p in (layer.A, layer.B, layer.L, layer.U)]
    part = {"0.B": torch.full((5, 2), 7.0)}
    kept = layer.A.clone()
    missing, unexpected = model.load_state_dict(part, strict=False)
    assert (layer.B == 7).all() and torch.equal(layer.A, kept) and len(missing) == 7 and not unexpected


@pytest.mark.parametrize("grown", [0, 2])
@pytest.mark.parametrize("damage", ["n", "m", "L", "U", "no B", "no U", "flat"])
def test_a_refused_load_destroys_nothing(grown, damage):
    model, layer = adapted(rank=2, n={"n": 8}.get(damage, 7), m={"m": 6}.get(damage, 5))
    if grown:
        layer.grow(grown)
    state = {n: t for n, t in model.state_dict().items() if "base" not in n}
    name = {"n": "0.A", "m": "0.B", "flat": "0.A"}.get(damage, "0." + damage[-1])
    if damage in ("L", "U"):
        state[name] = state[name][:-1]
    if damage.startswith("no"):
        del state[name]
    if damage == "flat":
        state[name] = state[name].flatten()
    fresh, other = adapted(rank=2, seed=1)
    x = torch.randn(3, 7, dtype=torch.float64)
    other(x).sum().backward()
    parameters = [other.A, other.B, other.L, other.U]
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    gradients = [p.grad.clone() for p in parameters]
    if damage.startswith("no") and not grown:  # of the same rank: nothing to refuse, what is missing stays
        assert fresh.load_state_dict(state, strict=False).missing_keys.count(name) == 1
        assert torch.equal(getattr(other, name[-1]), before[name]) and torch.equal(other.A, state["0.A"])
        return
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}: .*right is \("):
        fresh.load_state_dict(state, strict=False)
    assert all(p is q for p, q in zip((other.A, other.B, other.L, other.U), parameters))
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients))


def test_loading_a_grown_state_keeps_what_is_frozen_frozen():
    model, layer = adapted(rank=1)
    layer.grow(2)
    fresh, other = adapted(rank=1, seed=1)
    other.A.requires_grad_(False), other.U.requires_grad_(False)
    fresh.load_state_dict(model.state_dict())
    assert other.rank == 3 and torch.equal(other.U, layer.U) and other.U.dtype == torch.float64
    assert [p.requires_grad for p in (other.A, other.B, other.L, other.U)] == [False, True, True, False]
    shrunk, small = adapted(rank=1, seed=2)
    fresh.load_state_dict(shrunk.state_dict())  # back to fewer, as when the best state is taken again
    assert other.rank == 1 and torch.equal(other.B, small.B)


def test_a_layer_that_has_not_moved_scores_exactly_zero():
    model, layer = adapted(rank=2, trained=False, t0=0, interval=1)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
    assert after_step(model, optimizer, 1, 10)["scores"] == {"0": 0.0}


def test_a_grown_layer_loads_into_a_fresh_one():
    model, layer = adapted(rank=1, seed=0)
    layer.grow(4)
    fresh, other = adapted(rank=1, seed=0)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(3, 7, dtype=torch.float64)
    assert other.rank == 5 and torch.equal(fresh(x), model(x))
    assert all(p.requires_grad for p in (other.A, other.B, other.L, other.U))


@pytest.mark.parametrize(
    "options,words",
    [
        ({"rank": 0}, "rank 0 does not fit layer 0 (5, 7): allowed are 1 to 5"),
        ({"rank": 6}, "rank 6 does not fit layer 0 (5, 7): allowed are 1 to 5"),
        ({"rank": 3, "rank_ref": 2}, "rank_ref 2 is below the start rank 3"),
        ({"mode": "cubic"}, "mode 'cubic' is not one of linear, nonlinear, fixed"),
        ({"normalise": "x"}, "normalise 'x' is not one of r, sqrt, none"),
        ({"start": "zero"}, "start 'zero' is not one of gaussian, identity"),
        ({"orth_form": "x"}, "orth_form 'x' is not one of sum, mean"),
        ({"mode": None}, "mode 'None' is not one of linear, nonlinear, fixed"),
        ({"delta": 0}, "delta 0 is below 1"),
        ({"interval": 0}, "interval 0 is below 1"),
        ({"t0": -1}, "t0 -1 is below 0"),
        ({"fixed_k": 0}, "fixed_k 0 is below 1"),
        ({"orth": -0.1}, "orth -0.1 is below 0"),
        ({"orth": float("nan")}, "orth nan is not a finite number"),
        ({"alpha": float("inf")}, "alpha inf is not a finite number"),
        ({"alpha": "16"}, "alpha '16' is not a finite number"),
        ({"alpha": True}, "alpha True is not a finite number"),
        ({"dropout": 1.0}, "dropout 1.0 is not in [0, 1)"),
        ({"dropout": -0.1}, "dropout -0.1 is not in [0, 1)"),
        ({"rank": True}, "rank True is not a whole number"),
        ({"rank_ref": 8.5}, "rank_ref 8.5 is not a whole number"),
        ({"rank_ref": 8.0}, "rank_ref 8.0 is not a whole number"),
        ({"interval": 2.5}, "interval 2.5 is not a whole number"),
        ({"interval": True}, "interval True is not a whole number"),
        ({"t0": "50"}, "t0 '50' is not a whole number"),
        ({"delta": None}, "delta None is not a whole number"),
        ({"fixed_k": 1.0}, "fixed_k 1.0 is not a whole number"),
        ({"preserve": "no"}, "preserve 'no' is not True or False"),
        ({"preserve": 1}, "preserve 1 is not True or False"),
    ],
)
def test_bad_options_are_refused_and_the_model_is_left_alone(options, words):
    model = nn.Sequential(nn.Linear(7, 5))
    with pytest.raises(ValueError) as error:
        inject(model, ["0"], **options)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_the_least_of_each_option_is_allowed_and_the_defaults_are_those_of_the_docstring():
    least = {"rank": 1, "rank_ref": 1, "delta": 1, "interval": 1, "fixed_k": 1, "t0": 0, "orth": 0, "dropout": 0, "alpha": 16}
    model = nn.Sequential(nn.Linear(7, 5))
    assert inject(model, ["0"], **least) == ["0"]
    settings = {k: v for k, v in least.items() if k not in ("rank", "alpha", "dropout")}
    assert {k: model[0].growth[k] for k in settings} == settings
    model = nn.Sequential(nn.Linear(7, 5))
    inject(model, "0")
    assert model[0].growth == {
        "rank_ref": 8, "delta": 4, "interval": 50, "t0": 50, "mode": "linear", "fixed_k": 4,
        "normalise": "r", "start": "gaussian", "preserve": False, "orth": 0.1, "orth_form": "sum",
    }  # fmt: skip
    assert (model[0].rank, model[0].alpha, model[0].dropout) == (1, 16.0, 0.0)
    described = re.findall(r"^ {8}(\w+): ", inspect.getdoc(inject).replace("\n    ", "\n        "), re.M)
    assert described == list(inspect.signature(inject).parameters)[3:], "each option once, in its order"


def test_a_run_that_could_not_grow_is_said_at_once():
    def first(step=1, total=100, **options):
        model, layer = adapted(**options)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
        return after_step(model, optimizer, step, total)

    for options, words in [
        ({"t0": 100}, "t0 100 is not below the 100 steps of the run"),
        ({"t0": 101}, "t0 101 is not below the 100 steps of the run"),
        ({"total": 99.0}, "total 99.0 is not a whole number"),
        ({"step": 1.0}, "step 1.0 is not a whole number"),
        ({"step": True}, "step True is not a whole number"),
    ]:
        with pytest.raises(ValueError) as error:
            first(**options)
        assert words in str(error.value) and "\n" not in str(error.value)
    short = {"t0": 60, "interval": 40}
    with pytest.warns(UserWarning, match=r"no layer will grow: .* t0 \+ interval = 100, the run ends at 100") as seen:
        assert first(**short) is None
    assert seen[0].filename.endswith("test_triadapt.py"), "the warning points at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first(total=101, **short) is None  # grows at 100
        assert first(step=2, **short) is None  # said once
        assert first(t0=200, rank_ref=1) is None  # no growth is wanted
        assert first(t0=200, rank=5) is None  # and none possible


@pytest.mark.parametrize("verb", [penalty, triadapt.watch, lambda model: after_step(model, None, 1, 10)])
def test_a_model_without_the_method_is_refused_in_words(verb):
    with pytest.raises(ValueError, match="the model holds no TriAdaptLinear"):
        verb(nn.Sequential(nn.Linear(3, 3)))


def test_a_reference_rank_above_the_layer_is_allowed_and_capped():
    model, layer = adapted(rank=1, rank_ref=64, delta=4, interval=1, t0=0, mode="fixed")
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.0))
    events = [after_step(model, optimizer, t, 100) for t in range(1, 8)]
    assert layer.rank == 5 == min(layer.base.weight.shape)
    assert events[0]["grown"] == {"0": 5} and events[1:] == [None] * 6, "growth ends when none can grow"


# ------------------------------------------------------------------- the demo


def test_the_demo_shows_the_function_kept_the_growth_and_the_low_scores_of_the_grown(capsys):
    triadapt.main()
    text = capsys.readouterr().out
    assert "output unchanged at the start: True" in text
    losses = [float(v) for v in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 7 and losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
    ranks, left, grown = {"0": 1, "2": 1, "4": 1}, 9, {}
    events = re.findall(r"step (\d+)  scores  (.*)  -> new ranks (.*), budget left (\d+)", text)
    for step, scores, new, budget in events:
        scores = dict(re.findall(r"(\d\*?): ([+-][\d.]+)", scores))
        assert {name[0] for name in scores if name.endswith("*")} == set(grown)
        marked = [float(v) for name, v in scores.items() if name.endswith("*")]
        assert all(a < float(b) for a in marked for name, b in scores.items() if not name.endswith("*"))
        grown = {name: int(rank) for name, rank in re.findall(r"'(\d)': (\d)", new)}
        left -= sum(rank - ranks[name] for name, rank in grown.items())
        assert int(budget) == left and int(step) % 60 == 0
        ranks.update(grown)
    assert len(events) >= 3 and left == 0
    assert f"ranks {ranks}; * grew at the event before" in text and ranks["2"] == max(ranks.values())
    assert 0 < float(re.search(r"merged into Linear\(.*largest difference (.*)", text)[1]) < 1e-5


# ------------------------------------------------------------------- several processes


class Both:
    """Stands for torch.distributed in the second of two processes, whose first has `there` and Parameters of 0.5."""

    def __init__(self, there=None, count=2):
        self.there, self.count, self.sent = there, count, []

    def is_available(self):
        return self.count > 0

    def is_initialized(self):
        return self.count > 0

    def get_world_size(self):
        return self.count

    def all_gather_object(self, found, value):
        assert len(found) == self.count
        found[:] = [self.there or value, value]

    def broadcast(self, tensor, source):
        assert source == 0
        self.sent.append(tensor)
        tensor.fill_(0.5)


def test_a_tower_that_never_runs_does_not_grow_and_gives_no_budget():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for name in ("text", "image")})
    image, x = copy.deepcopy(model["image"]), torch.randn(4, 8)
    before = model["text"](x).detach()
    inject(model, ["0", "1"], rank_ref=4, interval=1, t0=0, delta=1)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    grown = {}
    for step in range(1, 40):
        loss = model["text"](x).square().sum() + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        event = after_step(model, optimizer, step, total=40)
        grown |= event["grown"] if event else {}
    assert grown == {"text.0": 4, "text.1": 4}  # rank_ref times the two layers that ran
    assert torch.equal(model["image"](x), image(x)) and not torch.allclose(model["text"](x), before)


def test_of_several_processes_another_may_run_what_this_one_does_not(monkeypatch):
    monkeypatch.setattr(triadapt, "several", lambda: True)
    monkeypatch.setattr(triadapt, "check_alike", lambda value: None)
    monkeypatch.setattr(triadapt, "share", lambda parameter: None)
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8)) for name in ("text", "image")})
    inject(model, ["0"], rank_ref=4, interval=1, t0=0, delta=1, mode="fixed", fixed_k=2)
    model["text"](torch.ones(2, 8)).sum().backward()
    event = after_step(model, torch.optim.SGD(param_groups(model, lr=1e-2, weight_decay=0.0)), 1, total=9)
    assert event["grown"] == {"text.0": 2, "image.0": 2} and event["budget"] == 2 * 4 - 2 * 2


def test_parts_with_other_settings_grow_each_by_itself():
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8)) for name in ("enc", "dec")})
    inject(model["enc"], ["0"], rank_ref=2, interval=1, t0=0, orth=0.0)
    inject(model["dec"], ["0"], rank_ref=3, interval=1, t0=0, orth=0.5)
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-2, weight_decay=0.0))
    words = "layer dec.0 has other settings than the first: take each injected part of the model by itself"
    for refused in (lambda: penalty(model), lambda: after_step(model, optimizer, 1, 9)):
        with pytest.raises(ValueError, match=words):
            refused()
    assert penalty(model["enc"]) == 0 < penalty(model["dec"])
    assert [after_step(model[part], optimizer, 1, 9)["grown"] for part in ("enc", "dec")] == [{"0": 2}, {"0": 3}]


def test_several_processes_grow_alike_or_are_told(monkeypatch):
    model, loss = problem(rank_ref=6, delta=1)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
    monkeypatch.setattr(triadapt, "dist", both := Both())
    before = [layer.rank for layer in triadapt.wrapped_layers(model).values()]
    train(model, loss, optimizer, range(1, 4))
    after = [layer.rank for layer in triadapt.wrapped_layers(model).values()]
    assert sum(after) > sum(before)
    grown = [layer for layer, r in zip(triadapt.wrapped_layers(model).values(), before) if layer.rank > r]
    held = {p for layer in grown for p in (layer.A, layer.B, layer.L, layer.U)}
    assert {t.data_ptr() for t in both.sent} == {p.data_ptr() for p in held}
    assert all((p == 0.5).all() for p in held)  # the first process's, moments and all else their own
    monkeypatch.setattr(triadapt, "dist", Both(there=([0.0], [1])))
    ranks = [layer.rank for layer in triadapt.wrapped_layers(model).values()]
    with pytest.raises(ValueError, match="the processes have drifted apart"):
        train(model, loss, optimizer, range(4, 7))
    assert [layer.rank for layer in triadapt.wrapped_layers(model).values()] == ranks


@pytest.mark.parametrize("count", [0, 1])
def test_one_process_asks_nobody(monkeypatch, count):
    monkeypatch.setattr(triadapt, "dist", both := Both(there="somebody else", count=count))
    triadapt.check_alike("mine")
    triadapt.share(nn.Parameter(torch.ones(2)))
    assert not both.sent


def test_distributed_data_parallel_is_refused_for_what_grows_is_unknown_to_it(tmp_path):
    model, _ = problem()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="give after_step its module"):
            after_step(nn.parallel.DistributedDataParallel(model), optimizer, 1, 9)
    finally:
        torch.distributed.destroy_process_group()
