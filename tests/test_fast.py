"""fast.py computes what the layers compute, and the same gradients, in every method, shape, precision and mode."""

import ast
import copy
import importlib
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fast
import model as modelling
import tlora
import triadapt

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

METHODS = {
    "lora": ("baselines.lora", {"rank": 3}),
    "tlora": ("tlora", {"rank": 3}),  # dropout 0.5 of the output
    "tlora, no dropout": ("tlora", {"rank": 3, "dropout": 0.0}),
    "tlora_plus": ("tlora_plus", {"rank1": 2, "rank2": 3}),
    "tlora_plus, B alone": ("tlora_plus", {"rank": 3, "train": "b"}),
    "task_tlora": ("task_tlora", {"rank": 3}),
    "task_tlora, A trained": ("task_tlora", {"rank": 3, "train_a": True}),
    "triadapt": ("triadapt", {"rank": 3}),
}
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest entry; others by rounding, as stated there

methods = pytest.mark.parametrize("method", METHODS)
precisions = pytest.mark.parametrize("dtype", BOUNDS)


def adapted(method, dtype=torch.float64, shapes=((12, 20, True), (20, 8, False)), **options):
    """A model of linear layers (n, m, bias) with tanh between, adapted, its adapters moved away from zero."""
    torch.manual_seed(0)
    layers = [part for n, m, bias in shapes for part in (nn.Linear(n, m, bias=bias), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    name, defaults = METHODS[method]
    importlib.import_module(name).inject(model, [str(i) for i in range(0, len(layers), 2)], **{**defaults, **options})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def fast_copy(model):
    other = copy.deepcopy(model)
    assert fast.speed_up(other)
    return other


def run(model, x, call=None, seed=1):
    """The output and every gradient, {name: tensor}. The same seed draws the same zeros."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = (call or model)(x)
    (y.float() if y.dtype in (torch.bfloat16, torch.float16) else y).sin().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def error(a, b):
    """The largest difference of all tensors, each relative to its largest entry."""
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    return max(((a[k].double() - b[k].double()).abs().max() / a[k].double().abs().max()).item() for k in a)


def without_adapter(model, x):
    """The output with the adapters at rest: to see that they matter."""
    plain = nn.Sequential(*[getattr(layer, "base", layer) for layer in model])
    return plain(x)


@methods
@precisions
@pytest.mark.parametrize("lead", [(), (1,), (5,), (64,), (3, 7), (2, 3, 11)])
def test_outputs_and_gradients_are_the_plain_ones(method, dtype, lead):
    model = adapted(method, dtype)
    other = fast_copy(model)
    x = torch.randn(*lead, 12, dtype=dtype)
    for training in (True, False):
        model.train(training), other.train(training)
        plain, quick = run(model, x), run(other, x)
        assert (plain["y"] - without_adapter(model, x)).abs().max() > 1e-2 and len(plain) >= 4
        e = error(plain, quick)
        print("relative error", e)
        assert e < BOUNDS[dtype]


@methods
def test_both_forms_are_used_and_agree(method, monkeypatch):
    """12 x 20 folds from 15 tokens on: each form gives the other's numbers with the threshold moved."""
    assert fast.fold_from(12, 20) == 15 and fast.fold_from(20, 8) == 12 and fast.fold_from(7, 7) == 7
    model = adapted(method).eval()
    other, x = fast_copy(model), torch.randn(14, 12, dtype=torch.float64)
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda a, b, c: seen.append(a.shape) or addmm(a, b, c))
    thin = run(other, x)
    assert torch.Size([20, 12]) not in seen and torch.Size([8, 20]) in seen  # 14 tokens: the second layer alone
    monkeypatch.setattr(fast, "fold_from", lambda m, n: 0)
    folded = run(other, x)
    assert torch.Size([20, 12]) in seen
    assert not torch.equal(thin["y"], folded["y"])  # other sums, else this would compare a thing with itself
    e = max(error(thin, folded), error(run(model, x), folded))
    print("relative error", e)
    assert e < 1e-12


@methods
def test_first_output_is_the_base_layers_to_the_bit(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24))
    model = copy.deepcopy(base)
    name, options = METHODS[method]
    importlib.import_module(name).inject(model, ["0", "2"], **options)
    fast.speed_up(model)
    for tokens in (3, 100):
        x = torch.randn(tokens, 24)
        assert torch.equal(model(x), base(x)) and torch.equal(model.eval()(x), base(x))
        model.train()


@pytest.mark.parametrize("method", ["lora", "task_tlora", "task_tlora, A trained", "triadapt"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_the_adapters_input(method, p, monkeypatch):
    """The zeros are others than torch's. With those of fast.py in its place, the plain path gives the same numbers."""
    model = adapted(method, dropout=p)
    other, x = fast_copy(model), torch.randn(9, 12, dtype=torch.float64)
    assert not torch.equal(run(model, x)["y"], run(model, x, seed=2)["y"])

    def dropout(x, p, training):
        if not training:
            return x
        bits, scale = fast.draw_bits(x.numel(), p, x.device)
        return x * fast.mask(bits, x) * scale

    monkeypatch.setattr(F, "dropout", dropout)
    plain, quick = run(model, x), run(other, x)
    e = error(plain, quick)
    print("relative error", e)
    assert e < 1e-12 and not torch.equal(plain["y"], run(model.eval(), x)["y"])
    assert error(run(model, x), run(other.eval(), x)) < 1e-12


@pytest.mark.parametrize("p,count", [(0.5, 10**6), (0.25, 10**6), (0.1, 999_937), (0.999, 10**6), (1 / 512, 10**6)])
def test_bits_are_zero_with_the_probability_that_the_scale_makes_up_for(p, count):
    torch.manual_seed(0)
    bits, scale = fast.draw_bits(count, p, "cpu")
    steps = min(max(round(256 * p), 1), 255)
    assert scale == 256 / (256 - steps) and bits.numel() * 64 - count in range(64)
    keep = fast.mask(bits, torch.empty(count, dtype=torch.float64))
    assert set(keep.unique().tolist()) <= {0.0, 1.0}
    e, sd = abs(keep.mean().item() - 1 / scale), (steps / 256 * (1 - steps / 256) / count) ** 0.5
    print("share off by", e, "standard deviation", sd)
    assert e <= 4 * sd
    neighbours = (keep[1:] * keep[:-1]).mean() - keep.mean() ** 2  # one draw makes 64 entries, and they are independent
    assert abs(neighbours) < 5 * sd + 1e-6


def test_bits_and_masks_by_hand(monkeypatch):
    """Bit j of byte i is entry j * bytes + i; 1 - p = 0.11 in binary is w1 or w2, and 0.01 is w1 and w2."""
    bits = torch.tensor([0x0302010080402010], dtype=torch.int64) & 0x7FFFFFFFFFFFFFFF
    value = bits.item()
    flat = [(value >> (8 * i) & 255) >> j & 1 for j in range(8) for i in range(8)]
    assert 0 < sum(flat) < 64 and fast.mask(bits, torch.empty(7, 9)).flatten().tolist() == flat[:63]
    words = iter([0b1100, 0b1010] * 2)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor([next(words)]))
    assert fast.draw_bits(4, 0.25, "cpu")[0].item() == 0b1100 | 0b1010
    assert fast.draw_bits(4, 0.75, "cpu")[0].item() == 0b1100 & 0b1010


def test_tlora_draws_the_same_zeros_by_the_same_code():
    assert inspect.getsource(tlora.draw_bits) == inspect.getsource(fast.draw_bits)
    h = torch.randn(5, 13, dtype=torch.float64)
    torch.manual_seed(3)
    bits, scale = fast.draw_bits(h.numel(), 0.3, "cpu")
    torch.manual_seed(3)
    dropped = tlora.dropout(h, 0.3)
    assert torch.equal(dropped, h * fast.mask(bits, h) * scale) and 0 < (dropped == 0).sum() < h.numel()


def saved(model, x):
    """{storage address: (bytes, dtype, shape)} of what backward keeps besides parameters and buffers and x itself."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return kept


@methods
def test_what_is_kept_for_backward(method):
    """T x k numbers where Q is frozen, nothing but x where it is trained; a bit an entry of dropout; never m x n or T x m."""
    m, n, T = 160, 96, 640
    model = adapted(method, torch.float32, shapes=((n, m, True),))
    fast.speed_up(model)
    x = torch.randn(T, n, requires_grad=True)
    sizes = sorted((size for size, _ in saved(model, x).values()), reverse=True)
    k = model[0].factors()[1].shape[0]
    small = 4 * k * (m + n)  # P and the factors that make it, up to a few times
    frozen_q = not model[0].A.requires_grad
    expected = ([4 * T * k] if frozen_q else []) + ([T * m // 8] if method == "tlora" else [])
    assert [size for size in sizes if size > small] == sorted(expected, reverse=True)
    assert sum(size for size in sizes if size <= small) < 8 * small < 4 * T * n
    plain = sum(size for size, _ in saved(adapted(method, torch.float32, shapes=((n, m, True),)), x).values())
    print("bytes kept", sum(sizes), "plain", plain)
    assert sum(sizes) < (plain / 4 if method == "tlora" else plain + small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@methods
def test_half_precision_never_folds_and_errs_as_the_plain_path_does(method, dtype, monkeypatch):
    model = adapted(method, torch.float64, shapes=((48, 64, True), (64, 48, True))).eval()
    half = copy.deepcopy(model).to(dtype)
    other = copy.deepcopy(half)
    words = fast.speed_up(other)
    assert all(w.startswith("two thin products (") for w in words.values())
    x = torch.randn(80, 48, dtype=torch.float64)
    monkeypatch.setattr(fast, "fold_from", lambda m, n: 0)
    truth, plain, quick = run(model, x), run(half, x.to(dtype)), run(other, x.to(dtype))
    assert quick["y"].dtype == dtype and all(quick[k].dtype == plain[k].dtype for k in plain)
    norms = lambda got: {k: ((got[k].double() - truth[k]).norm() / truth[k].norm()).item() for k in truth}  # noqa: E731
    plain, quick = norms(plain), norms(quick)
    print("error of plain and fast", plain, quick)
    assert all(quick[k] < 1.5 * plain[k] + torch.finfo(dtype).eps for k in truth)


def test_a_small_update_of_a_half_layer_is_not_rounded_away():
    """dW of 1e-4 beside weights of 1: bfloat16's steps there are 0.004."""
    model = adapted("lora", torch.bfloat16, shapes=((64, 64, False),), alpha=3.0)
    layer = model[0]
    with torch.no_grad():
        layer.base.weight.copy_(torch.eye(64))
        layer.A.copy_(torch.ones(3, 64))
        layer.B.fill_(1e-4)
    x = torch.zeros(128, 64, dtype=torch.bfloat16)
    x[:, 1] = 1  # output 0 gets 3e-4 from the update and nothing from W0
    fast.speed_up(model)
    assert abs(model(x)[0, 0].item() / 3e-4 - 1) < 0.01
    x[:, 1:] = 1  # and the diagonal's 1 + 64 * 3e-4 is seen too
    assert model(x)[0, 5].item() > 1.01


@methods
def test_float32_factors_of_a_half_layer_are_cast(method):
    model = adapted(method, torch.bfloat16, shapes=((16, 24, True),)).eval()
    other = fast_copy(model)
    P, Q = other[0].factors()
    other[0].factors = lambda: (P.float(), Q.float())
    x = torch.randn(10, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        y = fast_copy(model)(x)
        assert other(x).dtype == torch.bfloat16 and torch.equal(other(x), y) and y.abs().max() > 0.1


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast(method, dtype):
    model = adapted(method, dtype, shapes=((48, 64, True), (64, 48, True))).eval()
    other, x = fast_copy(model), torch.randn(80, 48, dtype=dtype)

    def half(model):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return call

    truth, plain, quick = run(model, x), run(model, x, half(model)), run(other, x, half(other))
    assert plain["y"].dtype == quick["y"].dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    for k in truth:
        assert quick[k].dtype == plain[k].dtype
        a, b = (((got[k].double() - truth[k].double()).norm() / truth[k].norm()).item() for got in (plain, quick))
        print(k, "error of plain", a, "fast", b)
        assert b < (1.5 * a + 0.01 if dtype == torch.float32 else 1e-12)


@methods
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(method, reentrant):
    model = adapted(method)
    other, x = fast_copy(model), torch.randn(2, 9, 12, dtype=torch.float64)
    direct = run(other, x)
    again = run(other, x, lambda x: checkpoint(other, x, use_reentrant=reentrant))
    e = error(run(model, x), again)
    print("relative error", e)
    assert e < 1e-12 and all(torch.equal(direct[k], again[k]) for k in direct)


@methods
def test_without_gradients_and_where_the_input_needs_none(method):
    model = adapted(method)
    other, x = fast_copy(model), torch.randn(30, 12, dtype=torch.float64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            got = other(x)
        e = (expected - got).abs().max().item()
        print("error", e)
        assert not got.requires_grad and e < 1e-12
    model(x).sum(), other.eval()(x).sum().backward()  # x has no gradient to give
    model.eval()(x).sum().backward()
    assert all(torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12) for p, q in zip(model.parameters(), other.parameters())
               if p.requires_grad)  # fmt: skip


@methods
def test_compiled(method):
    model = adapted(method)  # in train mode: TLoRA's zeros are drawn in the compiled graph too
    other, x = fast_copy(model), torch.randn(30, 12, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    e = error(run(model, x), run(other, x, compiled))
    print("relative error", e)
    assert e < 1e-12


@methods
def test_gradients_are_those_of_finite_differences(method):
    model = fast_copy(adapted(method, shapes=((5, 4, True),))).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    for tokens in (2, 6):  # thin, and folded
        x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *p: model(x), (x, *trained))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        grad.sum().backward()


def test_growth_changes_the_layer_and_the_fast_path_follows():
    model = adapted("triadapt")
    other = fast_copy(model)
    x = torch.randn(20, 12, dtype=torch.float64)
    for layer, twin in zip(model, other):
        if hasattr(layer, "grow"):
            torch.manual_seed(2)
            layer.grow(4)
            torch.manual_seed(2)
            twin.grow(4)
    assert other[0].A.shape == (7, 12)
    plain, quick = run(model, x), run(other, x)
    assert quick["0.A"].shape == (7, 12)
    e = error(plain, quick)
    print("relative error", e)
    assert e < 1e-12


@methods
def test_survives_deepcopy_and_pickle_and_is_undone(method):
    model = adapted(method).eval()
    classes = [type(layer) for layer in model]
    x = torch.randn(20, 12, dtype=torch.float64)
    plain = model(x)
    words = fast.speed_up(model)
    y = model(x)
    assert list(words) == ["0", "2"] and fast.speed_up(model) == words  # a second time changes nothing
    assert all(isinstance(model[i], (fast.Fast, classes[i])) and type(model[i]) is not classes[i] for i in (0, 2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(layer) for layer in other] == [type(layer) for layer in model]
        assert torch.equal(other(x), y) and other[0].base is not model[0].base
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    module = importlib.import_module(METHODS[method][0])
    merged = copy.deepcopy(model)
    assert module.merge(merged) == ["0", "2"] and type(merged[0]) is nn.Linear
    assert (merged(x) - y).abs().max() < 1e-12
    fast.slow_down(model)
    assert [type(layer) for layer in model] == classes and torch.equal(model(x), plain)


@methods
@pytest.mark.parametrize("lead", [(5,), (2, 0), (3, 4)])
def test_its_output_may_be_changed_in_place(method, lead):
    model = adapted(method)
    model[1] = nn.ReLU(inplace=True)
    x = torch.randn(*lead, 12, dtype=torch.float64)
    plain, quick = run(model, x), run(fast_copy(model), x)
    if not x.numel():
        assert plain["y"].shape == quick["y"].shape == (2, 0, 8) and plain["x"].shape == quick["x"].shape
        return
    e = error(plain, quick)
    print("relative error", e)
    assert e < BOUNDS[torch.float64] and plain["x"].abs().max() > 1e-3


def test_a_base_whose_forward_was_replaced_is_called():
    model = adapted("lora")
    plain = model[0](x := torch.randn(20, 12, dtype=torch.float64))
    fast.speed_up(model)
    of_the_class = model[0].base.forward
    model[0].base.forward = lambda x: of_the_class(x) + 1.0  # as accelerate does
    assert (model[0](x) - plain - 1.0).abs().max() < 1e-12


def test_what_it_does_not_know_stays_plain():
    """A base that is no plain nn.Linear, is trained, or has a hook that wants to be called."""
    model = adapted("lora")
    model[0].base = nn.Sequential(model[0].base)
    assert list(fast.speed_up(model)) == ["2"]
    assert fast.speed_up(nn.Sequential(nn.Linear(2, 2))) == {}

    model = adapted("lora")
    fast.speed_up(model)
    model[0].base.weight.requires_grad_()
    model[2].base.register_forward_hook(lambda layer, args, y: y + 1.0)
    x = torch.randn(20, 12, dtype=torch.float64)
    expected = model[2].base(model[1](model[0].base(x)))
    model(x).sum().backward()
    assert model[0].base.weight.grad.abs().max() > 0
    for layer in (model[0], model[2]):
        with torch.no_grad():
            layer.B.zero_()
    assert torch.equal(model(x), expected) and not torch.equal(expected, without_adapter(adapted("lora"), x))


def test_tf32_does_not_fold(monkeypatch):
    assert fast.can_fold(torch.float32) and fast.can_fold(torch.float64) and not fast.can_fold(torch.float16)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not fast.can_fold(torch.float32) and fast.can_fold(torch.float64)
    finally:
        torch.set_float32_matmul_precision(before)


class Count(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return func(*args, **kwargs or {})


def test_tf32_set_by_the_newer_names_is_not_folded_into():
    """In a process of its own: the older name cannot be read in it any more."""
    code = """
import torch, torch.nn as nn
from baselines import lora
from fast import can_fold, speed_up
assert can_fold(torch.float32)
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
try:
    torch.get_float32_matmul_precision()
except RuntimeError:
    print("unreadable")
assert not can_fold(torch.float32) and can_fold(torch.float64)
model = nn.Sequential(nn.Linear(8, 8)).double()
lora.inject(model, ["0"], rank=2)
speed_up(model)
model(torch.randn(64, 8, dtype=torch.float64)).sum().backward()
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("unreadable\n", 0), ended.stderr


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_triadapts_penalty_under_autocast_is_the_same(form):
    model = adapted("triadapt", orth=0.3, orth_form=form).float()
    trained = [p for layer in model if hasattr(layer, "grow") for p in (layer.A, layer.B)]
    plain = triadapt.penalty(model)
    with torch.autocast("cpu", torch.bfloat16):
        within = triadapt.penalty(model)
        assert (trained[0] @ trained[0].T).dtype == torch.bfloat16  # autocast does round there
    gradients = [torch.autograd.grad(value, trained) for value in (plain, within)]
    assert torch.equal(plain, within) and all(map(torch.equal, *gradients)) and plain > 0


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_triadapts_penalty_is_one_batch_of_products_per_shape_and_the_sum_over_layers(form):
    shapes = ((12, 20, True), (20, 12, False), (12, 20, True), (20, 12, True), (12, 20, True))
    model = adapted("triadapt", shapes=shapes, orth=0.3, orth_form=form)
    model[4].grow(2)  # a rank of its own is a shape of its own
    layers = [layer for layer in model if hasattr(layer, "grow")]
    parts = []
    for layer in layers:
        for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):
            parts.append((gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum())
    expected = 0.3 * (sum(parts) if form == "sum" else sum(p.sqrt() for p in parts) / len(parts))
    trained = [p for layer in layers for p in (layer.A, layer.B)]
    gradients = torch.autograd.grad(expected, trained)
    with Count() as count:
        got = triadapt.penalty(model)
    e = abs((got - expected).item()) / expected.item()
    print("relative error", e)
    assert e < 1e-14 and count.products == 2 * 3  # 20 x 12, 12 x 20, and the grown one
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(torch.autograd.grad(got, trained), gradients))


def test_tloras_own_dropout_keeps_a_byte_an_entry():
    h = torch.randn(64, 96, requires_grad=True)
    kept = [size for size, t in saved(nn.Identity(), h).values()]
    assert kept == []
    drop = nn.Module()
    drop.forward = lambda h: tlora.dropout(h, 0.5)
    sizes = sorted(size for size, t in saved(drop, h).values())
    print("bytes kept", sizes)
    assert sizes == [64 * 96]


def test_a_layer_that_scores_its_update_in_forward_is_left_as_it_is():
    from baselines import increlora

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))
    increlora.inject(model, ["0", "2"], rank=2)
    assert fast.speed_up(model) == {}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model(torch.randn(3, 12)).sum().backward()
    assert all(layer.seen > 0 for layer in (model[0], model[2]))


# ------------------------------------------------------------------- the benches that measure it


def test_ratios_are_taken_to_the_neighbour_in_time():
    speed = importlib.import_module("bench.speed")
    times = {"PEFT LoRA": [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)], "x": [(0.5, 1.0), (1.5, 2.0), (4.0, 4.0)],
             "floor": [(0.5, 2.0), (0.5, 2.0), (1.0, 2.0)]}  # fmt: skip
    rows = {row["contestant"]: row for row in speed.rows_of(times, {"width": 7})}
    assert rows["x"] == {"contestant": "x", "width": 7, "seconds": 1.5, "to_peft": 0.75,
                         "to_peft_quartiles": [0.625, 0.875], "to_floor": 3.0}  # fmt: skip
    assert rows["PEFT LoRA"]["to_peft_quartiles"] == [1.0, 1.0]


def test_the_floor_goes_back_through_every_layer_and_trains_the_head_alone():
    speed = importlib.import_module("bench.speed")
    model = modelling.Transformer(modelling.Config(40, 16, 2, 2, 24), "classification", 2)
    ids, labels = torch.randint(40, (3, 5)), torch.tensor([0, 1, 0])
    contestant, reached = speed.floor(model), []
    for name, layer in contestant.model.named_modules():
        if name.endswith(tuple(speed.SIX)):
            layer.register_forward_hook(
                lambda layer, args, y, name=name: y.register_hook(lambda g: reached.append(name)) and None
            )
    contestant.step(ids, labels, False)
    assert len(set(reached)) == 12 and "blocks.0.q_proj" in reached
    changed = [n for n, p in contestant.model.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])]
    assert changed == ["head.weight", "head.bias"]


def test_peak_and_what_backward_keeps_by_hand():
    memory = importlib.import_module("bench.memory")
    model = nn.Linear(100, 100, bias=False)  # 40,000 bytes
    speed = importlib.import_module("bench.speed")
    contestant = speed.Contestant(model, model.parameters(), fused=True)
    x = torch.randn(50, 100)

    def step(x):
        a = torch.empty(25_000)  # 100 kB
        del a
        b, c = torch.empty(10_000), torch.empty(20_000)  # 120 kB at once
        del b, c

    contestant.step = step
    assert 120_000 <= memory.peak_bytes(contestant, x) < 121_000
    contestant.loss = lambda x: model(x).sigmoid().sum()
    assert memory.saved_bytes(contestant, x) == 2 * 50 * 100 * 4  # x and the sigmoid's output, not the weight
    contestant.loss(x).backward()
    contestant.optimizer.step()
    assert memory.optimizer_bytes(contestant) == 2 * 40_000 and memory.adapter_bytes(contestant) == 40_000


def test_it_needs_torch_alone():
    for node in ast.walk(ast.parse(inspect.getsource(fast))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert all(n.split(".")[0] == "torch" or n in sys.stdlib_module_names for n in names), names


def test_the_words_follow_the_arithmetic_of_autocast():
    model = nn.Sequential(nn.Linear(8, 8))
    triadapt.inject(model, ["0"])
    assert fast.speed_up(model)["0"].startswith("W0 + PQ in one product from ")
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.speed_up(model)["0"].startswith("two thin products (bfloat16 arithmetic would round the update away")
    model.double()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert fast.speed_up(model)["0"].startswith("W0 + PQ in one product from ")
