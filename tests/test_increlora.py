"""IncreLoRA: a training in plain loops with the authors' rules beside ours, growth, reserve, loading and resuming."""

import copy
import math

import parity
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import increlora

SETTINGS = {
    "rank_target": 5, "alpha": 6.0, "delta": 2, "top": 1, "interval": 4, "t0": 5, "beta1": 0.8, "beta2": 0.7, "orth": 0.2,
}  # fmt: skip


def made(dtype=torch.float64, model=None, **options):
    model = model or parity.network(dtype)
    increlora.inject(model, parity.LAYERS, **SETTINGS | options)
    return model


class Plain:
    """Lists of rows, loops over them, a group of the optimizer for whatever is new: the paper and the authors' rules."""

    def __init__(self, ours):
        self.net = parity.network(torch.float64).requires_grad_(False)
        self.rows, self.rank, self.mean, self.spread, self.events = {}, {}, {}, {}, []
        for name in parity.LAYERS:
            layer = ours.get_submodule(name)
            self.rows[name] = [tuple(t.detach().clone().requires_grad_() for t in (layer.A0, layer.E0, layer.B0))]
            self.rank[name], self.mean[name], self.spread[name] = 1, 0.0, 0.0
        self.optimizer = parity.adamw([t for rows in self.rows.values() for row in rows for t in row], lr=3e-2)

    def forward(self, x):
        self.updates = {}
        for i, part in enumerate(self.net):
            if str(i) in self.rows:
                update = sum(B @ (E * A) for A, E, B in self.rows[str(i)]) * 6.0 / (self.rank[str(i)] + 1e-5)
                update.retain_grad()
                self.updates[str(i)] = update
                x = x @ (part.weight + update).T + part.bias
            else:
                x = part(x)
        return x

    def step(self, step, total, ours):
        x, y = parity.batch(step, torch.float64)
        loss = F.cross_entropy(self.forward(x), y)
        norms = []
        for rows in self.rows.values():
            for A, _, B in rows:
                norms += [(A @ A.T - torch.eye(len(A))).norm(), (B.T @ B - torch.eye(len(A))).norm()]
        self.optimizer.zero_grad()
        (loss + 0.2 * sum(norms) / len(norms)).backward()
        left = 5 * len(self.rank) - sum(self.rank.values())
        if left > 0:
            for name, update in self.updates.items():
                score = (update * update.grad).abs().sum().item() / math.sqrt(update.numel())
                self.mean[name] = 0.8 * self.mean[name] + 0.2 * score
                self.spread[name] = 0.7 * self.spread[name] + 0.3 * abs(score - self.mean[name])
        self.optimizer.step()
        if left > 0 and step == 1:
            for name in self.rows:
                self.reserve(name, ours)
        elif left > 0 and step > 5 and step % 4 == 0 and step < total:
            scores = {name: self.mean[name] * self.spread[name] for name in self.rows}
            name = max(scores, key=scores.get)
            for _, E, _ in self.rows[name][-2:]:
                E.requires_grad_(True)
                self.optimizer.add_param_group({"params": [E]})
            self.rank[name] += 2
            self.reserve(name, ours)
            self.events.append((step, name, self.rank[name]))
            if sum(self.rank.values()) >= 10:
                for rows in self.rows.values():
                    for _, E, _ in rows[-2:]:
                        E.data.zero_()
        return loss.item()

    def reserve(self, name, ours):
        """Two rows; what is drawn is taken from ours."""
        layer = ours.get_submodule(name)
        for i in range(len(self.rows[name]), len(self.rows[name]) + 2):
            A, B = (layer.entries(letter)[i].detach().clone().requires_grad_() for letter in "AB")
            self.rows[name].append((A, torch.full((1, 1), 1e-5, dtype=torch.float64), B))
            self.optimizer.add_param_group({"params": [A, B]})


def test_losses_ranks_and_rows_equal_a_training_in_plain_loops():
    total = 40
    model = made()
    plain = Plain(model)
    optimizer = torch.optim.AdamW(increlora.param_groups(model, 3e-2, 0.1))
    theirs, events = [], []

    def after(step):
        event = increlora.after_step(model, optimizer, step, total)
        if event:
            events.append((step, *next(iter(event["grown"].items()))))
            assert set(event["scores"]) == set(parity.LAYERS) and len(event["grown"]) == 1
        theirs.append(plain.step(step, total, model))
        ours = {name: model.get_submodule(name) for name in parity.LAYERS}
        assert {name: layer.rank for name, layer in ours.items()} == plain.rank
        for name, layer in ours.items():
            score = plain.mean[name] * plain.spread[name]
            assert abs(increlora.watch(model)["importance"][name] - score) <= 1e-6 * score  # kept in float32
            assert layer.count == len(plain.rows[name])

    ours = parity.train(
        model, optimizer, torch.float64, penalty=lambda: increlora.penalty(model),
        before=lambda step: increlora.before_step(model, step, total), after=after, steps=total,
    )  # fmt: skip
    print("growth", events)
    parity.assert_equal(ours, theirs, 1e-10)
    assert events == plain.events and [step for step, *_ in events] == [8, 12, 16, 20]
    assert len({name for _, name, _ in events}) == 2, "not always the same layer"
    for name in parity.LAYERS:
        layer = model.get_submodule(name)
        for i, row in enumerate(plain.rows[name]):
            for mine, his in zip((layer.entries(letter)[i] for letter in "AEB"), row):
                assert (mine - his).abs().max() < 1e-9
    assert sum(plain.rank.values()) == 10 and not any(E.any() for E in model[0].entries("E")[-2:])


def test_forward_factors_and_merge():
    model = made(rank=2)
    layer, original = model[0], copy.deepcopy(model[0].base)
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(layer(x), original(x)) and not layer.E0.any() and layer.A0.any() and layer.B0.any()
    layer.append(1, layer.A0, 0.7, trained=False)
    nn.init.normal_(layer.E0)
    E = torch.cat(layer.entries("E"))[:, 0]
    assert layer.rank == 2 and E[2] == 0.7
    update = 6.0 / (2 + 1e-5) * torch.cat(layer.entries("B"), 1) @ torch.diag(E) @ torch.cat(layer.entries("A"))
    y = layer(x)
    assert (y - original(x) - x @ update.T).abs().max() < 1e-13 and update.abs().max() > 1e-3
    P, Q = layer.factors()
    assert P.shape == (24, 3) and (P @ Q - update).abs().max() < 1e-15
    assert increlora.merge(model) == parity.LAYERS
    assert (model[0].weight - original.weight - update).abs().max() < 1e-15


def test_what_starts_gaussian_of_deviation_0_02_and_what_the_reserve_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(900, 700))
    increlora.inject(model, ["0"], rank=4)
    layer = model[0]
    layer.append(3, layer.A0, increlora.RESERVE, trained=False)
    for matrix in (layer.A0, layer.B0, layer.A1, layer.B1):
        assert abs(matrix.std().item() / 0.02 - 1) < 0.05 and matrix.requires_grad
    assert torch.equal(layer.E1, torch.full((3, 1), 1e-5)) and not layer.E1.requires_grad and layer.E0.requires_grad
    assert layer.settings["delta"] == 4, "half of the target 8"


def run(model, optimizer, steps, total=30):
    first, last = steps
    losses = []
    for step in range(first, last + 1):
        x, y = parity.batch(step, torch.float64)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + increlora.penalty(model)).backward()
        increlora.before_step(model, step, total)
        optimizer.step()
        increlora.after_step(model, optimizer, step, total)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stop", [1, 10, 25])
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one_to_the_bit(stop):
    torch.manual_seed(7)
    model = made()
    optimizer = parity.adamw(increlora.param_groups(model, 1e-2, 0.1))
    run(model, optimizer, (1, stop))
    state, moments, random = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    expected = run(model, optimizer, (stop + 1, 30))
    fresh = made()
    fresh.load_state_dict(state)
    names = {p: name for name, p in fresh.named_parameters()}
    resumed = parity.adamw(increlora.param_groups(fresh, 1e-2, 0.1))
    resumed.load_state_dict(moments)
    assert all(resumed.state[p]["exp_avg"].shape == p.shape for p in resumed.state)
    reserve = [name for p, name in names.items() if ".E" in name and not p.requires_grad]
    print("stopped after", stop, "ranks", increlora.watch(fresh)["ranks"], "in reserve", reserve)
    assert len(reserve) == 4
    torch.set_rng_state(random)
    assert run(fresh, resumed, (stop + 1, 30)) == expected
    assert increlora.watch(fresh) == increlora.watch(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values()))


def test_new_parameters_join_their_layers_group_in_the_models_order():
    model = made()
    model[4].requires_grad_(True)
    head = list(model[4].parameters())
    rest = [p for p in parity.trained(model) if all(p is not h for h in head)]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-3}, {"params": rest, "lr": 1e-2}])
    run(model, optimizer, (1, 9))
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[0]["params"] == head
    expected = [p for p in parity.trained(model) if all(p is not h for h in head)]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in expected] and len(expected) > len(rest)


def test_growth_stops_at_the_budget_the_layers_size_and_before_the_last_step():
    narrow = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 9)).double()
    model = made(model=narrow, rank_target=4, interval=1, t0=1)
    optimizer = parity.adamw(increlora.param_groups(model, 1e-2, 0.0))
    ranks = []
    for step in range(1, 12):
        model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
        increlora.before_step(model, step, 12)
        event = increlora.after_step(model, optimizer, step, 12)
        ranks.append(tuple(increlora.watch(model)["ranks"].values()))
        assert ranks[-1][0] <= 3 and sum(ranks[-1]) <= 8 + 1
        if event:
            assert event["budget"] == max(0, 8 - sum(ranks[-1]))
    print(ranks)
    assert sum(ranks[-1]) >= 8 and ranks[-1] == ranks[-2]
    model = made(model=nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 9)), rank_target=4, interval=1, t0=1)
    optimizer = parity.adamw(increlora.param_groups(model, 1e-2, 0.0))
    model[0].smoothed.fill_(1.0)  # the highest score, of a layer that has three directions
    events = [increlora.after_step(model, optimizer, step, 9) for step in (1, 1, 2, 3)]
    assert events[:2] == [None, None] and [event["grown"] for event in events[2:]] == [{"0": 3}, {"2": 3}]
    model = made(interval=5, t0=0)
    optimizer = parity.adamw(increlora.param_groups(model, 1e-2, 0.0))
    run(model, optimizer, (1, 5), total=5)
    assert set(increlora.watch(model)["ranks"].values()) == {1}, "what grows at the last step is never trained"


def test_the_highest_scores_grow_and_of_equal_ones_the_first_no_more_than_the_budget_has_room_for():
    for top, target, scores, expected in [
        (1, 5, (1.0, 2.0), {"2"}),
        (1, 5, (2.0, 2.0), {"0"}),
        (2, 5, (1.0, 2.0), {"0", "2"}),
        (3, 2, (1.0, 2.0), {"0", "2"}),  # room for two
    ]:
        model = made(top=top, rank_target=target, t0=1, interval=2)
        optimizer = parity.adamw(increlora.param_groups(model, 1e-2, 0.0))
        assert increlora.after_step(model, optimizer, 1, 9) is None
        for name, score in zip(parity.LAYERS, scores):
            model.get_submodule(name).smoothed.fill_(score**0.5)
        assert set(increlora.after_step(model, optimizer, 2, 9)["grown"]) == expected
    model = made(top=2, rank=2, rank_target=3, t0=1, interval=2)
    optimizer = parity.adamw(increlora.param_groups(model, 1e-2, 0.0))
    increlora.after_step(model, optimizer, 1, 9)
    model[0].ranknum += 1  # a budget of one is left
    assert len(increlora.after_step(model, optimizer, 2, 9)["grown"]) == 1


def test_scores_of_several_batches_are_added_and_evaluation_leaves_none():
    model, twice = made(), made()
    twice.load_state_dict(model.state_dict())
    for m in (model, twice):
        nn.init.ones_(m[0].E0)
    x, y = parity.batch(1, torch.float64)
    F.cross_entropy(model(x), y).backward()
    for _ in range(2):
        F.cross_entropy(twice(x), y).backward()
    with torch.no_grad():
        twice(x)
    assert model[0].seen > 0 and abs(twice[0].seen / model[0].seen - 2) < 1e-6
    increlora.before_step(model, 1, 9)
    assert model[0].seen == 0.0


def test_an_optimizer_of_before_inject_is_refused():
    model = parity.network()
    optimizer = torch.optim.AdamW(model.parameters())
    made(model=model)
    with pytest.raises(ValueError, match="the optimizer does not hold the parameters of an IncreLoRA layer"):
        increlora.after_step(model, optimizer, 1, 9)
    assert model[0].count == 1


@pytest.mark.parametrize(
    "option,value",
    [("rank_target", 1), ("delta", -1), ("top", 0), ("interval", 0), ("t0", -1), ("beta1", 0.0), ("beta1", 1.0),
     ("beta2", 0.0), ("beta2", 1.0), ("orth", -0.1)],
)  # fmt: skip
def test_options_out_of_range_are_refused_in_one_line(option, value):
    model = parity.network()
    with pytest.raises(ValueError, match=f"{option} {value} is out of range: allowed are") as error:
        increlora.inject(model, ["0"], **{"rank": 2, option: value})
    assert "\n" not in str(error.value) and type(model[0]) is nn.Linear


def test_a_score_that_is_not_finite_leaves_the_averages_as_they_are():
    model = made()
    layer = model[0]
    layer.seen = 2.0
    increlora.before_step(model, 1, 100)
    before = layer.smoothed.clone()
    layer.seen = torch.tensor(float("nan"))
    increlora.before_step(model, 2, 100)
    assert before[0] > 0 and layer.smoothed.tolist() == pytest.approx([before[0].item(), 0.7 * before[1].item()], rel=1e-5)
    layer.seen = 2.0
    increlora.before_step(model, 3, 100)
    assert layer.smoothed[0] > before[0]
