"""DoRA: its formula, its start, what is detached, merging, and PEFT's on the same weights."""

import copy

import parity
import pytest
import torch
import torch.nn as nn

from baselines import dora, lora


def randomised(dtype=torch.float64, bias=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias).to(dtype))
    dora.inject(model, ["0"], rank=3, alpha=6.0, **options)
    nn.init.normal_(model[0].B)
    nn.init.normal_(model[0].magnitude)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_forward_is_the_magnitude_times_the_unit_rows_of_w0_plus_sba(bias, dropout):
    model = randomised(bias=bias, dropout=dropout)
    layer, x = model[0], torch.randn(4, 7, dtype=torch.float64)
    V = layer.base.weight + 6.0 / 3 * layer.B @ layer.A
    W = torch.stack([m * row / sum(v * v for v in row) ** 0.5 for m, row in zip(layer.magnitude, V)])
    b = layer.base.bias if bias else 0
    assert ((x @ W.T + b) - layer.base(x)).abs().max() > 0.1
    assert (model.eval()(x) - (x @ W.T + b)).abs().max() < 1e-13
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, dropout, True)
    torch.manual_seed(5)
    # as the authors' code: what the magnitude and the update add sees the dropped input, W0 itself does not
    expected = layer.base(x) + dropped @ (W - layer.base.weight).T
    assert (model.train()(x) - expected).abs().max() < 1e-13


def test_the_norm_is_a_constant_to_the_gradient():
    model = randomised()
    layer, x = model[0], torch.randn(4, 7, dtype=torch.float64)
    weights = torch.randn(4, 5, dtype=torch.float64)
    (model(x) * weights).sum().backward()
    V = (layer.base.weight + 2 * layer.B @ layer.A).detach()
    g = weights.T @ x  # dL/dW', (m, n)
    norm = V.norm(dim=1, keepdim=True)
    expected = (layer.magnitude[:, None] / norm * g).detach()  # dL/dV with the norm constant
    with_norm = expected - layer.magnitude[:, None] * V * (g * V).sum(1, keepdim=True) / norm**3
    assert (with_norm - expected).abs().max() > 0.1, "detaching changes the gradient here"
    assert (layer.B.grad - 2 * expected @ layer.A.T).abs().max() < 1e-12
    assert (layer.A.grad - 2 * layer.B.T @ expected).abs().max() < 1e-12
    assert (layer.magnitude.grad - (g * V / norm).sum(1)).abs().max() < 1e-12


def test_a_starts_as_loras_under_the_same_seed_and_the_magnitude_as_the_row_norms():
    models = [nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 5)) for _ in range(2)]
    for method, model in zip((lora, dora), models):
        torch.manual_seed(3)
        method.inject(model, ["0", "1"], rank=2)
    for a, b in zip(*models):
        assert torch.equal(a.A, b.A) and not b.B.any()
        assert (b.magnitude - b.base.weight.norm(dim=1)).abs().max() < 1e-6
    assert sum(p.numel() for p in parity.trained(models[1])) == 2 * (7 + 5) + 5 + 2 * (5 + 5) + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_output_at_the_start_is_untouched_to_the_bit_even_with_a_zero_row(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30).to(dtype))
    model[0].weight.data[3] = 0
    x = torch.randn(8, 40, dtype=dtype)
    before = model(x)
    dora.inject(model, ["0"], rank=4, dropout=0.3)
    assert torch.equal(model(x), before) and torch.equal(model.eval()(x), before)
    assert model[0].magnitude.dtype == torch.promote_types(dtype, torch.float32)
    model(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in parity.trained(model))


def test_small_changes_of_a_length_count_in_bfloat16():
    model = nn.Sequential(nn.Linear(40, 30, bias=False).bfloat16())
    x = torch.randn(64, 40).bfloat16()
    before = model(x).float()
    dora.inject(model, ["0"], rank=4)
    model[0].magnitude.data *= 1.003  # next to 1 bfloat16 has steps of 0.0078
    ratio = ((model(x).float() * before).sum() / before.square().sum()).item()
    print("mean ratio", ratio)
    assert abs(ratio - 1.003) < 5e-4


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_merged_equals_unmerged(dtype, bound):
    model = randomised(dtype)
    x = torch.randn(9, 7, dtype=dtype)
    adapted, original = model(x), model[0].base(x)
    assert (adapted - original).abs().max() > 0.1
    assert dora.merge(model) == ["0"] and type(model[0]) is nn.Linear
    error = (model(x) - adapted).abs().max().item()
    print("merge error", error)
    assert error < bound
    with pytest.raises(ValueError, match="nothing to merge"):
        dora.merge(model)


def test_merging_casts_once():
    model = randomised(torch.bfloat16)
    layer = copy.deepcopy(model[0])
    V = layer.base.weight.float() + 2 * layer.B.float() @ layer.A.float()
    expected = layer.magnitude[:, None] / V.norm(dim=1, keepdim=True) * V
    dora.merge(model)
    assert model[0].weight.dtype == torch.bfloat16
    # equal to the bit, or the neighbour where the last bit of the float32 product falls on the edge
    assert (model[0].weight.float() - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert torch.equal(model[0].bias, layer.base.bias)


def test_it_has_no_factors_and_says_what_to_do_instead():
    model = randomised()
    with pytest.raises(ValueError, match="not of low rank.*--export-merged") as error:
        model[0].factors()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_losses_equal_pefts_over_twenty_steps(dtype, bound):
    peft = pytest.importorskip("peft")
    ours, theirs = parity.network(dtype), parity.network(dtype)
    dora.inject(ours, parity.LAYERS, rank=4, alpha=6.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=parity.LAYERS, lora_dropout=0.0, use_dora=True)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    for name in parity.LAYERS:
        layer, other = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        other.lora_A.default.weight.data.copy_(layer.A.data)
        assert (other.lora_magnitude_vector.default.weight - layer.magnitude).abs().max() < bound
    start = ours[0].magnitude.detach().clone()
    parity.assert_equal(
        parity.train(ours, parity.adamw(parity.trained(ours)), dtype),
        parity.train(theirs, parity.adamw(parity.trained(theirs)), dtype),
        bound,
    )
    assert ours[0].B.abs().max() > 1e-2 and (ours[0].magnitude - start).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_lengths_are_measured_in_float32_at_least_under_autocast_too(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    dora.inject(model, ["0"], rank=2)
    layer = model[0]
    nn.init.normal_(layer.B)
    W0, delta = layer.base.weight.double(), layer.scaling * layer.B.double() @ layer.A.double()
    with torch.autocast("cpu", torch.bfloat16):
        V, norms = layer.direction(), layer.row_norms()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert V.dtype == norms.dtype == wide
    error = (norms.double() - (W0 + delta).norm(dim=1)).abs().max().item()
    print(dtype, error)
    assert error < 1e-5 and delta.abs().max() > 0.1


def test_dropout_is_of_training_alone():
    model, x = randomised(dropout=0.5), torch.randn(4, 7, dtype=torch.float64)
    plain = randomised()
    assert (model.eval()(x) - plain(x)).abs().max() < 1e-12
    assert (model.train()(x) - plain.train()(x)).abs().max() > 1e-2
    model[0].dropout = 0.0
    assert (model(x) - plain(x)).abs().max() < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_the_output_is_in_half_precision_with_a_bias_too(training):
    model = nn.Sequential(nn.Linear(16, 12))
    dora.inject(model, ["0"], rank=2, dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train(training)(torch.randn(3, 16)).dtype == torch.bfloat16
