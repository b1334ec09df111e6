"""AdaLoRA: its formula, its penalty, its budget, its masks against plain loops, and PEFT's on the same weights."""

import copy
from types import SimpleNamespace

import numpy as np
import parity
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import adalora


def made(dtype=torch.float64, **options):
    model = parity.network(dtype)
    adalora.inject(model, parity.LAYERS, **{"rank": 4, "rank_target": 2, "alpha": 6.0} | options)
    return model


def test_forward_factors_and_merge_are_alpha_over_r_b_e_a():
    model = made()
    layer, original = model[0], copy.deepcopy(model[0].base)
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(layer(x), original(x)) and not layer.E.any()
    nn.init.normal_(layer.A), nn.init.normal_(layer.B), nn.init.normal_(layer.E)
    update = 6.0 / (4 + 1e-5) * layer.B @ torch.diag(layer.E[:, 0]) @ layer.A
    y = layer(x)
    assert (y - original(x) - x @ update.T).abs().max() < 1e-13 and update.abs().max() > 1
    P, Q = layer.factors()
    assert P.shape == (24, 4) and Q.shape == (4, 16) and (P @ Q - update).abs().max() < 1e-13
    assert adalora.merge(model) == parity.LAYERS
    assert (model[0].weight - original.weight - update).abs().max() < 1e-13


def test_a_and_b_start_gaussian_of_deviation_0_02():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300))
    adalora.inject(model, ["0"], rank=100)
    for matrix in (model[0].A, model[0].B):
        assert abs(matrix.std().item() / 0.02 - 1) < 0.02 and abs(matrix.mean().item()) < 5e-4
        assert matrix.abs().max() > 0.06, "not uniform"
    assert adalora.penalty(model) > 0, "of one layer too"


def test_the_penalty_is_the_mean_of_norms_that_are_not_squared():
    model = made(orth=0.3)
    norms = []
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.A), nn.init.normal_(layer.B)
        for rows in (layer.A.detach().numpy(), layer.B.detach().numpy().T):
            total = 0.0
            for i in range(4):
                for j in range(4):
                    total += (rows[i] @ rows[j] - (i == j)) ** 2
            norms.append(total**0.5)
    value = adalora.penalty(model)
    assert abs(value.item() - 0.3 * sum(norms) / 4) < 1e-12 and len(set(norms)) == 4
    value.backward()
    assert model[0].A.grad.any() and model[0].E.grad is None
    assert adalora.penalty(made(orth=0.0)).item() == 0


def test_the_penalty_under_autocast_is_the_same():
    model = made(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        within = adalora.penalty(model)
    assert torch.equal(within, adalora.penalty(model)) and within > 0 and within.dtype == torch.float32


def test_a_gradient_that_is_not_finite_leaves_the_averages_as_they_are():
    layer = made()[0]
    gradient = {name: torch.randn_like(getattr(layer, name)) for name in "AEB"}
    for _ in range(2):  # E is zero at the start: look at A
        for name, value in gradient.items():
            getattr(layer, name).grad = value.clone()
        layer.observe()
        gradient["A"][0, 0], gradient["A"][1, 1] = float("nan"), float("inf")
    before, spread = layer.importance_A.clone(), layer.uncertainty_A.clone()
    layer.A.grad = gradient["A"].clone()
    layer.observe()
    assert layer.importance_A.isfinite().all() and layer.scores().isfinite().all()
    assert layer.importance_A[0, 0] == before[0, 0] > 0 and layer.importance_A[0, 1] != before[0, 1]
    assert layer.uncertainty_A[0, 0] == 0.85 * spread[0, 0]


def test_the_budget_falls_in_a_cubic_curve():
    curve = [adalora.budget_at(t, 100, 48, 16, 20, 40) for t in range(101)]
    assert curve[:21] == [48] * 21 and curve[60:] == [16] * 41
    assert curve[40] == 16 + 32 // 8 and curve[30] == int(16 + 32 * 0.75**3) == 29  # half way, a quarter of the way
    assert curve[21] == 45, "16 + 32 * 0.975^3 = 45.66, floored"
    assert all(a >= b for a, b in zip(curve, curve[1:]))


class ByHand:
    """The allocator in numpy and loops over entries, from the paper's equations."""

    def __init__(self, names, total, interval, t_init, t_final, target):
        self.mean = {name: 0.0 for name in names}
        self.spread = {name: 0.0 for name in names}
        self.total, self.interval, self.t_init, self.t_final, self.target = total, interval, t_init, t_final, target

    def step(self, t, weights, gradients):
        """{layer: list of kept} or None; weights and gradients {(layer, letter): array}."""
        if t < self.total - self.t_final:
            for key, w in weights.items():
                now = np.abs(w * gradients[key])  # Eq. 8
                self.mean[key] = 0.8 * self.mean[key] + 0.2 * now  # Eq. 9
                self.spread[key] = 0.7 * self.spread[key] + 0.3 * np.abs(now - self.mean[key])  # Eq. 10
        layers = sorted({layer for layer, _ in weights})
        start = sum(len(weights[layer, "E"]) for layer in layers)
        target = self.target * len(layers)
        falling = self.total - self.t_final - self.t_init
        budget = int(target + (start - target) * (1 - (t - self.t_init) / falling) ** 3)  # Eq. 12
        if t <= self.t_init:
            return None
        if t >= self.total - self.t_final:
            budget = target
        elif t % self.interval:
            return None
        scores = {}
        for layer in layers:
            s = {letter: self.mean[layer, letter] * self.spread[layer, letter] for letter in "AEB"}  # Eq. 11
            for i in range(len(s["E"])):  # Eq. 7
                scores[layer, i] = s["E"][i, 0] + sum(s["A"][i]) / s["A"].shape[1] + sum(s["B"][:, i]) / len(s["B"])
        best = sorted(scores, key=scores.get, reverse=True)[:budget]
        return {layer: [(layer, i) in best for i in range(len(weights[layer, "E"]))] for layer in layers}


def test_the_masks_equal_those_of_plain_loops_at_every_step():
    total, dtype = 30, torch.float64
    model = made(t_init=4, t_final=9, mask_interval=3, beta1=0.8, beta2=0.7)
    hand = ByHand([(n, k) for n in parity.LAYERS for k in "AEB"], total, 3, 4, 9, 2)
    events = []

    def before(t):
        layers = {name: model.get_submodule(name) for name in parity.LAYERS}
        parts = {(n, k): getattr(layer, k) for n, layer in layers.items() for k in "AEB"}
        kept = hand.step(
            t, {key: p.detach().numpy() for key, p in parts.items()}, {key: p.grad.numpy() for key, p in parts.items()}
        )
        E = {name: layer.E.detach().clone() for name, layer in layers.items()}
        event = adalora.before_step(model, t, total)
        assert (event is None) == (kept is None)
        for (name, letter), mean in hand.mean.items():
            for found, value in (("importance", mean), ("uncertainty", hand.spread[name, letter])):
                error = np.abs(getattr(layers[name], f"{found}_{letter}").numpy() - value).max()
                assert error <= 1e-12 * np.abs(value).max(), (name, letter, found, error)
        if kept:
            for name, layer in layers.items():
                assert layer.kept.tolist() == kept[name]
                assert torch.equal(layer.E, E[name] * torch.tensor(kept[name])[:, None]), "zero or as it was"
            assert event["ranks"] == {name: sum(k) for name, k in kept.items()} == adalora.watch(model)["ranks"]
            assert event["budget"] == sum(event["ranks"].values())
        else:
            assert all(torch.equal(layer.E, E[name]) for name, layer in layers.items())
        events.append(event and event["ranks"])

    parity.train(model, parity.adamw(parity.trained(model)), dtype, before=before, steps=total)
    masked = [t for t, event in enumerate(events, 1) if event]
    assert masked == [6, 9, 12, 15, 18] + list(range(21, 31))
    assert events[5] != events[-1] and sum(events[-1].values()) == 4
    print("ranks at the maskings", [tuple(event.values()) for event in events if event])
    assert len({tuple(event.values()) for event in events if event}) > 2


def test_watch_gives_the_mean_score_of_a_layer_and_everything_kept_at_the_start():
    model = made()
    assert adalora.watch(model) == {"ranks": {"0": 4, "2": 4}, "importance": {"0": 0.0, "2": 0.0}}
    assert model[0].kept.dtype == torch.bool
    for name in "AEB":
        getattr(model[0], f"importance_{name}").fill_(2.0)
        getattr(model[0], f"uncertainty_{name}").fill_(3.0)
    assert abs(adalora.watch(model)["importance"]["0"] - 3 * 6.0) < 1e-12


def test_a_parameter_without_gradient_counts_as_zero_and_the_averages_are_part_of_the_state():
    model = made()
    parity.train(model, parity.adamw(parity.trained(model)), torch.float64, steps=2,
                 before=lambda t: adalora.before_step(model, t, 40))  # fmt: skip
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert before["0.importance_B"].any() and before["0.uncertainty_E"].any()
    model.zero_grad(set_to_none=True)
    adalora.before_step(model, 3, 40)
    assert torch.equal(model[0].importance_B, 0.85 * before["0.importance_B"])
    fresh = made()
    fresh.load_state_dict(model.state_dict())
    assert adalora.watch(fresh) == adalora.watch(model) and adalora.watch(model)["importance"]["0"] > 0


def test_nothing_is_masked_where_the_target_is_the_start():
    model = made(rank_target=4, mask_interval=1)
    parity.train(model, parity.adamw(parity.trained(model)), torch.float64, steps=5,
                 before=lambda t: adalora.before_step(model, t, 5))  # fmt: skip
    assert all(layer.E.all() and layer.kept.all() for layer in (model[0], model[2]))


@pytest.mark.parametrize(
    "option,value,allowed",
    [("rank_target", 0, "1 to rank 4"), ("rank_target", 5, "1 to rank 4"), ("t_init", -1, "0 and up"),
     ("t_final", -1, "0 and up"), ("mask_interval", 0, "1 and up"), ("beta1", 0.0, "between 0 and 1"),
     ("beta1", 1.0, "between 0 and 1"),
     ("beta2", 0.0, "between 0 and 1"), ("beta2", 1.0, "between 0 and 1"), ("orth", -0.1, "0 and up")],
)  # fmt: skip
def test_options_out_of_range_are_refused_in_one_line(option, value, allowed):
    model = parity.network()
    with pytest.raises(ValueError) as error:
        adalora.inject(model, ["0"], **{"rank": 4, "rank_target": 2, option: value})
    assert str(error.value) == f"{option} {value} is out of range: allowed are {allowed}" and type(model[0]) is nn.Linear
    assert adalora.inject(model, ["0"], rank=4, rank_target=1) == ["0"]


def test_a_run_without_steps_for_the_masking_is_refused():
    model = made(t_init=20, t_final=20)
    with pytest.raises(ValueError, match="t_init 20 and t_final 20 leave none of the 40 steps"):
        adalora.before_step(model, 1, 40)
    assert adalora.before_step(made(t_init=20, t_final=19), 1, 40) is None


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("t_init,t_final", [(3, 6), (0, 0)])
def test_losses_equal_pefts_over_twenty_steps(dtype, bound, t_init, t_final):
    peft = pytest.importorskip("peft")

    class WithLoss(nn.Module):  # PEFT adds its penalty to what a model calls its loss
        def __init__(self):
            super().__init__()
            self.net = parity.network(dtype)

        def forward(self, x, y):
            return SimpleNamespace(loss=F.cross_entropy(self.net(x), y))

    ours = made(dtype, t_init=t_init, t_final=t_final, mask_interval=4, orth=0.2)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, tinit=t_init, tfinal=t_final, deltaT=4, orth_reg_weight=0.2, total_step=20,
        target_modules=["net.0", "net.2"], lora_dropout=0.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(WithLoss(), config, autocast_adapter_dtype=False).to(dtype)  # its r + 1e-5 too
    for name in parity.LAYERS:
        layer, other = ours.get_submodule(name), theirs.base_model.model.net.get_submodule(name)
        assert other.lora_A.default.dtype == dtype
        other.ranknum.default.requires_grad_(False)  # PEFT means it to be frozen, but where the dtype is cast it is not
        other.lora_A.default.data.copy_(layer.A.data)
        other.lora_B.default.data.copy_(layer.B.data)
    optimizers = parity.adamw(parity.trained(ours)), parity.adamw(parity.trained(theirs))
    losses, ranks = ([], []), []
    for step in range(1, 21):
        x, y = parity.batch(step, dtype)
        ours_loss = F.cross_entropy(ours(x), y) + adalora.penalty(ours)
        theirs_loss = theirs.base_model(x, y).loss  # PeftModel's own forward leaves the penalty out
        for optimizer, loss, kept in zip(optimizers, (ours_loss, theirs_loss), losses):
            optimizer.zero_grad()
            loss.backward()
            kept.append(loss.item())
        adalora.before_step(ours, step, 20)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.step()
        ranks.append(sum(adalora.watch(ours)["ranks"].values()))
    print("total ranks", ranks)
    assert ranks[0] == 8 and ranks[-1] == 4 and len(set(ranks)) > 2
    parity.assert_equal(*losses, bound)
    pattern = theirs.peft_config["default"].rank_pattern
    for name in parity.LAYERS:
        key = next(key for key in pattern if f"net.{name}." in key)
        assert ours.get_submodule(name).kept.tolist() == pattern[key]
