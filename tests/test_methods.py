"""The behaviour that every low-rank method must have, on our encoder, our decoder and a plain nn.Sequential."""

import ast
import contextlib
import copy
import importlib
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness import folder
from model import Config, Transformer, default_targets

# method: the parameters each of its layers trains
METHODS = {
    "baselines.lora": {"A", "B"},
    "triadapt": {"A", "B", "L", "U"},
    "tlora": {"B", "alpha"},
    "tlora_plus": {"A", "B", "C"},
    "task_tlora": {"B"},
}
MODELS = ["encoder", "decoder", "sequential"]
SIX = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]

methods = pytest.mark.parametrize("method", METHODS)
models = pytest.mark.parametrize("kind", MODELS)


class Case:
    """A model, what to adapt in it, its head, and a way to run it; the same seed gives the same weights."""

    def __init__(self, kind, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        if kind == "sequential":  # no bias in the first, m != n in all
            self.model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))
            self.targets, self.head = ["0", "2"], "4"
            self.inputs = torch.randn(6, 12, dtype=dtype)
        else:
            config = Config(vocab_size=40, width=16, depth=2, heads=2, hidden=24, causal=kind == "decoder")
            self.model = Transformer(config, "classification", 3)
            self.targets, self.head = SIX, "head"
            self.inputs = torch.randint(40, (6, 7))
            with torch.no_grad():  # initial values of deviation 0.02 hardly show an update
                for name, p in self.model.named_parameters():
                    p.mul_(5)
                    if name.endswith(("q_proj.weight", "k_proj.weight")):
                        p.normal_(std=0.1)  # theirs are larger: five times those, and attention is of 0 and 1
        self.model.to(dtype)
        self.labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(self, model, rows=None):
        rows = slice(None) if rows is None else rows
        return F.cross_entropy(model(self.inputs[rows]).float(), self.labels[rows])

    def adapt(self, method, targets=None, **options):
        """calibrate where the method has it, then inject; the head is trained too."""
        module = importlib.import_module(method)
        targets = targets or self.targets
        if hasattr(module, "calibrate"):
            plan = module.calibrate(self.model, targets, [[i] for i in range(6)], self.loss, rank=2, samples=4)
            options["plan"] = plan
        self.names = module.inject(self.model, targets, rank=2, **options)
        self.model.get_submodule(self.head).requires_grad_(True)
        return module

    def train(self, module, steps, optimizer=torch.optim.SGD, lr=0.5):
        optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        self.model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(self.model).backward()
            optimizer.step()
        self.model.eval()


def trained_case(kind, method, dtype=torch.float32, steps=12, **options):
    case = Case(kind, dtype)
    module = case.adapt(method, **options)
    case.train(module, steps, torch.optim.AdamW, 0.05)
    return case, module


@models
@methods
def test_output_is_untouched_at_the_start_and_changes_with_training(kind, method):
    case = Case(kind)
    case.model.eval()
    before = case.model(case.inputs)
    module = case.adapt(method)
    for training in (False, True):
        case.model.train(training)
        assert torch.equal(case.model(case.inputs), before)
    case.model.get_submodule(case.head).requires_grad_(False)  # what changes is the adapters' doing
    case.train(module, 5, torch.optim.AdamW, 0.05)
    change = (case.model(case.inputs) - before).abs().max().item()
    print("change", change)
    assert change > 1e-3


@models
@methods
def test_exactly_the_declared_parameters_get_gradients_and_every_one_after_two_steps(kind, method):
    case = Case(kind)
    module = case.adapt(method)
    declared = {f"{name}.{leaf}" for name in case.names for leaf in METHODS[method]}
    declared |= {f"{case.head}.{leaf}" for leaf in ("weight", "bias")}
    assert {name for name, p in case.model.named_parameters() if p.requires_grad} == declared
    case.train(module, 2, lr=0.1)  # a step of 0.5 can saturate the attention: then its gradients are zero
    got = {name for name, p in case.model.named_parameters() if p.grad is not None}
    assert got == declared
    assert all(p.grad.abs().max() > 0 for p in case.model.parameters() if p.requires_grad)


@models
@methods
def test_three_sgd_steps_change_all_trained_tensors_and_nothing_else(kind, method):
    case = Case(kind)
    module = case.adapt(method)
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    trained = {name for name, p in case.model.named_parameters() if p.requires_grad}
    case.train(module, 3)
    changed = {name for name, t in case.model.state_dict().items() if not torch.equal(t, before[name])}
    assert trained and changed == trained


@models
@methods
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merged_equals_unmerged_and_no_wrapper_is_left(kind, method, dtype, bound):
    case, module = trained_case(kind, method, dtype)
    base = Case(kind, dtype)
    with torch.no_grad():
        base.model.get_submodule(base.head).load_state_dict(case.model.get_submodule(case.head).state_dict())
    adapted = case.model(case.inputs)
    assert (adapted - base.model.eval()(base.inputs)).abs().max() > 1e-2, "the adapter changes the output"
    assert module.merge(case.model) == case.names
    error = (case.model(case.inputs) - adapted).abs().max().item()
    print("merge error", error)
    assert error < bound
    assert not any(hasattr(m, "factors") for m in case.model.modules())
    assert all(type(case.model.get_submodule(name)) is nn.Linear for name in case.names)
    assert list(case.model.state_dict()) == list(base.model.state_dict())
    with pytest.raises(ValueError, match="nothing to merge"):
        module.merge(case.model)


@methods
def test_bf16_merges_in_float32_and_casts_once(method):
    case, module = trained_case("sequential", method, torch.bfloat16)
    expected = {}
    for name in case.names:
        wide = copy.deepcopy(case.model.get_submodule(name)).float()
        P, Q = wide.factors()
        expected[name] = (wide.base.weight + P @ Q).bfloat16()
        assert not torch.equal(expected[name], case.model.get_submodule(name).base.weight)
    module.merge(case.model)
    for name, weight in expected.items():
        assert case.model.get_submodule(name).weight.dtype == torch.bfloat16
        assert torch.equal(case.model.get_submodule(name).weight, weight)


@methods
def test_merging_within_autocast_is_no_less_exact(method):
    case, module = trained_case("sequential", method)
    other = copy.deepcopy(case.model)
    module.merge(case.model)
    with torch.autocast("cpu", torch.bfloat16):
        P, Q = other.get_submodule(case.names[0]).factors()
        assert (P @ Q).dtype == torch.bfloat16, "autocast would round the product"
        module.merge(other)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in case.model.state_dict().items())


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adapters_are_float32_at_least_give_the_layers_dtype_and_train(method, dtype):
    case, module = trained_case("encoder", method, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for name in case.names:
        layer = case.model.get_submodule(name)
        assert layer.base.weight.dtype == dtype and {f.dtype for f in layer.factors()} == {wide}
        assert all(p.dtype == wide for key, p in layer.named_parameters() if not key.startswith("base."))
    logits = case.model(case.inputs)
    assert logits.dtype == dtype and logits.isfinite().all()
    first = Case("encoder", dtype)
    assert case.loss(case.model).item() < 0.8 * first.loss(first.model).item()


@models
@methods
def test_saved_and_loaded_under_another_seed_gives_the_same_output_to_the_bit(kind, method, tmp_path):
    case, module = trained_case(kind, method)
    state = folder.adapter_state(case.model)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "adapter.safetensors")
    expected = case.model(case.inputs)

    fresh = Case(kind)  # the same base, but whatever the method draws comes from another seed
    torch.manual_seed(12345)
    module.inject(fresh.model, case.names, rank=2)
    fresh.model.get_submodule(fresh.head).requires_grad_(True)
    fresh.model.eval()
    assert not torch.equal(fresh.model(fresh.inputs), expected)
    folder.load_adapter_state(fresh.model, load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(fresh.model(fresh.inputs), expected)
    base = {name for name in Case(kind).model.state_dict() if not name.startswith(case.head)}
    assert not base & set(state), "the frozen base is not in the file"


@methods
def test_layer_restriction_is_honoured(method):
    case = Case("encoder")
    case.adapt(method, ["blocks.1.q_proj", "v_proj"])
    # Task-aware TLoRA may give a layer rank 0 and leave it plain
    expected = ["blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj"]
    assert set(case.names) <= set(expected) and (method == "task_tlora" or case.names == expected)
    wrapped = [name for name, m in case.model.named_modules() if hasattr(m, "factors")]
    assert wrapped == case.names and wrapped


@methods
def test_a_full_name_means_that_layer_alone(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    module = importlib.import_module(method)
    assert module.inject(model, ["0"], rank=2) == ["0"]  # not 1.0
    module.merge(model)
    assert module.inject(model, ["1.0"], rank=2) == ["1.0"]


@methods
def test_wrong_use_is_refused_in_one_line_and_changes_nothing(method):
    module = importlib.import_module(method)
    case = Case("encoder")
    before = case.model.state_dict()
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    fast_path = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2)})  # in eval mode it calls no layer of its own
    twice = nn.ModuleDict({"a": nn.Linear(6, 6)})
    twice["b"] = twice["a"]
    tied = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    tied[1].weight = tied[0].weight
    for model, targets, options, words in [
        (case.model, ["query"], {}, "target 'query' matches no nn.Linear; names end in: down_proj, head, k_proj, o_proj"),
        (case.model, ["q_proj", "nope"], {}, "target 'nope' matches no"),
        (case.model, [], {}, "no targets given"),
        (attention, ["out_proj"], {}, "nn.MultiheadAttention reads its weight, not calling it"),
        (fast_path, ["linear1"], {}, "nn.TransformerEncoderLayer reads its weight, not calling it"),
        (tied, ["1"], {}, "share its weight"),
        (twice, ["a"], {}, "['a', 'b'] share its weight"),
    ]:
        with pytest.raises(ValueError) as error:
            module.inject(model, targets, **options)
        assert words in str(error.value) and "\n" not in str(error.value)
        assert not any(hasattr(m, "factors") for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    for rank in (0, 17):  # 16 is the smaller side
        with pytest.raises(ValueError) as error:
            module.inject(case.model, ["q_proj", "up_proj"], rank=rank)
        assert f"rank {rank}" in str(error.value) and "blocks.0.q_proj" in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in case.model.state_dict().items())
    module.inject(case.model, ["q_proj"], rank=2)
    with pytest.raises(ValueError, match="adapted already .blocks.0.q_proj.: merge it first"):
        module.inject(case.model, ["v_proj"], rank=2)


SHARED = [
    "find_linears", "match", "experts_share", "replace", "at_least_float32", "check_mergeable", "write_adapter",
    "read_adapter", "find_saved", "place_saved", "running_statistics", "own_state",
]  # fmt: skip


def test_the_walking_functions_are_the_same_in_every_file_and_no_file_needs_another():
    """They are copied so that each file stands alone: copied means equal. safetensors is used where it is installed."""
    sources = set()
    for method in METHODS:
        module = importlib.import_module(method)
        sources.add("".join(inspect.getsource(getattr(module, name)) for name in SHARED))
        tree = ast.parse(inspect.getsource(module))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                allowed = {"torch", *sys.stdlib_module_names} | ({"safetensors"} if node not in tree.body else set())
                assert all(n.split(".")[0] in allowed for n in names), (method, names)
    assert len(sources) == 1
    assert all(callable(getattr(importlib.import_module(method), verb)) for method in METHODS for verb in ("save", "load"))


# --------------------------------------------------------------------- bases in half precision

HALF = [torch.bfloat16, torch.float16]


def half_base(dtype, n=96):
    """A layer and rows of 8-bit numbers, the same in every dtype, and what the layer should learn: an update of rank 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, n)).bfloat16().float()
    x = torch.randn(64, n).bfloat16().float()
    y = model(x).detach() + x @ torch.randn(n, 4) @ torch.randn(4, n) / n
    return model.to(dtype), x.to(dtype), y


def adapt_half(method, dtype, **options):
    module = importlib.import_module(method)
    model, x, y = half_base(dtype)

    def loss(model, rows=slice(None)):  # a sum over the outputs: float16 needs no loss scale
        return (model(x[rows]).float() - y[rows]).square().sum(1).mean()

    if hasattr(module, "calibrate"):
        options["plan"] = module.calibrate(model, ["0"], [[i] for i in range(8)], loss)
    module.inject(model, ["0"], **options)
    return module, model, loss


def train_half(module, model, loss, lr, steps=200):
    optimizer = torch.optim.AdamW(module.param_groups(model, lr=lr, weight_decay=0.0))
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        losses.append(loss(model).item())
        extra = module.penalty(model) if hasattr(module, "penalty") else 0.0
        (loss(model) + extra).backward()
        optimizer.step()
        if hasattr(module, "after_step"):
            module.after_step(model, optimizer, step, max(steps, 60))  # growth begins at step 50, so a run is longer
    return losses


@methods
def test_training_on_a_half_precision_base_comes_within_noise_of_float32(method):
    """200 steps of AdamW: what the loss falls by differs by less than 1 %, less than between two draws of the adapter."""
    lr = {"tlora": 1e-2, "tlora_plus": 1e-4}.get(method, 1e-3)
    options = {"triadapt": {"t0": 20, "interval": 20}, "tlora": {"dropout": 0.0}}.get(method, {})

    falls = {}
    for dtype in (torch.float32, *HALF):
        losses = train_half(*adapt_half(method, dtype, **options), lr)
        falls[dtype] = losses[0] - losses[-1]
    wide = falls.pop(torch.float32)
    print(method, "float32's loss falls by", wide, "of", losses[0], "others differ by", [f / wide - 1 for f in falls.values()])
    assert wide > 0.05 * losses[0] and len(falls) == 2
    assert all(abs(f / wide - 1) < 0.01 for f in falls.values())


@methods
@pytest.mark.parametrize("dtype", HALF)
def test_on_a_half_precision_base_a_step_of_1e_4_moves_every_trained_number(method, dtype):
    """A bfloat16 number of 0.1 has its neighbour 0.0005 away."""
    module, model, loss = adapt_half(method, dtype)
    with torch.no_grad():  # away from zero, where all have gradients
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    loss(model).backward()
    optimizer.step()
    for name, p in before.items():
        new = dict(model.named_parameters())[name]
        assert p.dtype == new.dtype == new.grad.dtype == torch.float32
        error = ((new - p).abs() - 1e-4).abs()[new.grad != 0].max().item()
        print(name, "step off by", error, "without gradient", (new.grad == 0).float().mean().item())
        assert error < 2e-6 and (new.grad == 0).float().mean() < 0.01


@methods
@pytest.mark.parametrize("dtype", HALF)
def test_what_is_drawn_does_not_depend_on_the_bases_dtype(method, dtype):
    drawn = {}
    for d in (torch.float32, dtype):
        module = importlib.import_module(method)
        model, _, _ = half_base(d)
        torch.manual_seed(5)
        module.inject(model, ["0"])
        drawn[d] = module.own_state(model[0])
    assert any(t.any() for t in drawn[dtype].values()) and drawn[dtype].keys() == drawn[torch.float32].keys()
    assert all(torch.equal(t, drawn[torch.float32][key]) for key, t in drawn[dtype].items())


@methods
@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_a_cast_of_the_adapted_model_takes_the_base_and_leaves_the_update(method, cast):
    module, model, loss = adapt_half(method, torch.float32)
    train_half(module, model, loss, 1e-3, steps=3)
    before = {key: t.clone() for key, t in module.own_state(model[0]).items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    dtype = torch.float16 if cast == "half" else torch.bfloat16
    assert not torch.equal(model[0].A, model[0].A.to(dtype))  # a detour would be seen
    same = model.to(dtype) if cast == "to" else getattr(model, cast)()
    assert same is model and {p.dtype for p in model[0].base.parameters()} == {dtype}
    after = module.own_state(model[0])
    assert after.keys() == before.keys() and all(torch.equal(t, before[key]) for key, t in after.items())
    assert grads and all(torch.equal(dict(model.named_parameters())[name].grad, g) for name, g in grads.items())
    assert model(torch.randn(2, 96, dtype=dtype)).dtype == dtype
    model.double()
    wide = {key: t.dtype for key, t in module.own_state(model[0]).items()}
    statistics = {"rescale", "reference"} if method == "triadapt" else set()
    assert {key for key, d in wide.items() if d != torch.float64} == statistics & wide.keys()
    assert model(torch.randn(2, 96, dtype=torch.float64)).dtype == torch.float64
    model.to(torch.bfloat16)  # float64 to float32, not by way of bfloat16
    assert all(torch.equal(t, before[key]) for key, t in module.own_state(model[0]).items())


@methods
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("low", HALF)
def test_autocast_gives_its_own_dtype_and_float32_gradients_on_every_base(method, dtype, low):
    module, model, loss = adapt_half(method, dtype)
    train_half(module, model, loss, 1e-3, steps=2)
    wide = copy.deepcopy(model).float().eval()
    x = torch.randn(8, 96).to(dtype)
    with torch.autocast("cpu", low):
        y = model.eval()(x)
    assert y.dtype == low
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    error = (y.float() - wide(x.float())).abs().max().item() / y.abs().max().item()
    print("relative error under autocast", error)
    assert error < (0.02 if low == torch.bfloat16 else 0.003)


@methods
def test_merging_keeps_a_float32_bias_on_a_bfloat16_weight(method):
    module, model, loss = adapt_half(method, torch.bfloat16)
    train_half(module, model, loss, 1e-2, steps=3)
    linear = model[0].base
    linear.bias = nn.Parameter(torch.randn(96), requires_grad=False)
    weight, bias = linear.weight.clone(), linear.bias.clone()
    P, Q = model[0].factors()
    module.merge(model)
    assert model[0] is linear and linear.bias.dtype == torch.float32 and torch.equal(linear.bias, bias)
    assert not torch.equal(bias, bias.bfloat16())
    assert torch.equal(linear.weight, (weight.float() + P @ Q).bfloat16()) and not torch.equal(linear.weight, weight)


# ------------------------------------------------------------------ which layers, and what is refused


def inject_only(method, model, targets, exclude=(), **options):
    module = importlib.import_module(method)
    return module, module.inject(model, targets, exclude, **options)


@methods
def test_exclude_leaves_layers_plain_by_their_ends_or_full_names(method):
    case = Case("encoder")
    module, names = inject_only(method, case.model, SIX, ["k_proj", "blocks.0.up_proj"], rank=2)
    every = [f"blocks.{i}.{name}" for i in (0, 1) for name in SIX]
    left = {"blocks.0.k_proj", "blocks.1.k_proj", "blocks.0.up_proj"}
    assert names == [name for name in every if name not in left]
    assert {name for name in every if type(case.model.get_submodule(name)) is nn.Linear} == left
    case = Case("encoder")
    assert module.inject(case.model, SIX, exclude="k_proj", rank=2) == [name for name in every if "k_proj" not in name]
    for exclude, words in [(["nope"], "exclude 'nope' matches no nn.Linear; names end in: down_proj"),
                           (SIX, "every layer that the targets name is excluded")]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            inject_only(method, Case("encoder").model, SIX, exclude, rank=2)
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"rank 17 does not fit layer blocks.0.q_proj \(16, 16\): .* or exclude it"):
        inject_only(method, Case("encoder").model, ["q_proj"], rank=17)


def test_calibration_excludes_the_same_layers():
    module, case = importlib.import_module("task_tlora"), Case("encoder")
    plan = module.calibrate(case.model, SIX, [[0], [1]], case.loss, ["k_proj"], rank=2)
    assert set(plan) == {f"blocks.{i}.{name}" for i in (0, 1) for name in SIX if name != "k_proj"}
    assert set(module.inject(case.model, SIX, "k_proj", plan=plan)) == {name for name in plan if plan[name].rank}


def packed(kind):
    """A linear layer as quantisers leave it: bitsandbytes' classes of parameters, torchao's tensors, an int8 weight, float8."""
    linear = nn.Linear(8, 8)
    if kind == "Params4bit":  # half as many bytes as numbers, in one column

        class Params4bit(nn.Parameter):
            pass

        linear.weight = Params4bit(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    elif kind == "Int8Params":  # not yet quantised: that happens on the way to the GPU

        class Int8Params(nn.Parameter):
            pass

        linear.weight = Int8Params(torch.zeros(8, 8, dtype=torch.float16), requires_grad=False)
    elif kind == "QuantizedTensor":  # says that it is of float32

        class QuantizedTensor(torch.Tensor):
            pass

        linear.weight = nn.Parameter(torch.zeros(8, 8).as_subclass(QuantizedTensor), requires_grad=False)
        assert linear.weight.is_floating_point()
    elif kind == "Tensor":
        nn.utils.parametrizations.weight_norm(linear)
    else:
        linear.weight = nn.Parameter(torch.zeros(8, 8).to(getattr(torch, kind)), requires_grad=False)
    return linear


@methods
@pytest.mark.parametrize(
    "kind, dtype",
    [("Params4bit", "uint8"), ("Int8Params", "float16"), ("QuantizedTensor", "float32"), ("Tensor", "float32"),
     ("int8", "int8"), ("float8_e4m3fn", "float8_e4m3fn")],
)  # fmt: skip
def test_packed_weights_are_refused_in_words(method, kind, dtype):
    model = nn.Sequential(nn.Linear(8, 8), packed(kind))
    name = kind if kind != dtype else "Parameter"
    with pytest.raises(ValueError) as error:
        inject_only(method, model, ["0", "1"])
    assert f"layer 1 is not adapted: its weight is a {name} of {dtype}, not a plain Parameter" in str(error.value)
    assert "\n" not in str(error.value) and type(model[0]) is nn.Linear and model[0].weight.requires_grad
    assert inject_only(method, model, ["0", "1"], ["1"], rank=2)[1] == ["0"]


@methods
def test_a_layer_can_be_called_by_keyword(method):
    case = Case("sequential")
    plain = case.model[0]
    before = plain(input=case.inputs)
    inject_only(method, case.model, ["0"], rank=2)
    assert case.model[0] is not plain and torch.equal(case.model[0](input=case.inputs), before)


@methods
def test_a_model_on_the_meta_device_can_be_wrapped_to_count(method):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
    real = nn.Sequential(nn.Linear(8, 6))
    for m in (model, real):
        module, names = inject_only(method, m, ["0"], rank=2)
    count = {name: p.shape for name, p in real.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in model.named_parameters() if p.requires_grad} == count and count
    assert all(t.is_meta for t in model.state_dict().values() if t.dtype != torch.float64)  # the scaling is a number
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    assert torch.equal(model(torch.ones(2, 8)), real(torch.ones(2, 8)))


class Reader(nn.Module):
    """Mamba's way with dt_proj: computes with a layer's weight. `called` is called, after a look at its dtype as T5 does."""

    def __init__(self, width=8):
        super().__init__()
        self.called, self.dt_proj, self.unused = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        x = self.called(x.to(self.called.weight.dtype))
        return self.dt_proj.weight @ x.mT + self.dt_proj.bias[:, None]


@methods
def test_compiled_the_layer_is_called_as_well_and_is_not_compiled_twice(method):
    module, model, loss = adapt_half(method, torch.bfloat16)
    model.eval()
    x = torch.randn(4, 96).bfloat16()
    expected = model(x)
    model[0].called = False
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert all(torch.equal(compiled(x), expected) for _ in range(3))
    assert model[0].called


@methods
def test_a_layer_that_is_read_and_never_called_is_not_merged(method):
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(3, 8)
    module, _ = inject_only(method, model, ["called", "dt_proj", "unused"], rank=2)
    assert module.merge(model) == ["called", "dt_proj", "unused"]  # before any forward pass nothing is known
    module.inject(model, ["called", "dt_proj", "unused"], rank=2)
    model.dt_proj.weight.dtype  # a look from outside, before any call
    with pytest.warns(UserWarning, match="layer dt_proj was read and no adapted layer called: if the model has run, its update"):
        assert len(module.merge(copy.deepcopy(model))) == 3
    model(x)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        module.merge(model)
    assert str(error.value) == (
        "layer dt_proj is read and never called, so its update did nothing and is not to be merged: "
        "train with exclude=['dt_proj'], or put dt_proj.base in its place"
    )
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())  # `called` is not merged either
    model.dt_proj = model.dt_proj.base  # as the message says
    before = model(x)
    assert module.merge(model) == ["called", "unused"]  # an expert without a token is no mistake
    assert (model(x) - before).abs().max() < 1e-6


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@methods
def test_a_layer_whose_base_is_no_plain_product_trains_and_is_not_merged(method):
    torch.manual_seed(0)
    module = importlib.import_module(method)
    for model in (nn.Sequential(Tripled(8, 8)), nn.Sequential(nn.Linear(8, 8))):
        hook = model[0].register_forward_hook(lambda layer, args, y: 3 * y)
        if type(model[0]) is Tripled:
            hook.remove()
        module.inject(model, ["0"], rank=2)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"layer 0 is not to be merged: its base, a (Tripled|Linear), computes no W0 x \+ b"):
            module.merge(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    hook.remove()
    assert module.merge(model) == ["0"]


@methods
def test_a_hook_of_the_users_on_the_base_sees_a_batch_when_merging(method):
    torch.manual_seed(0)
    module, model, seen = importlib.import_module(method), nn.Sequential(nn.Linear(8, 8)), []
    model[0].register_forward_hook(lambda layer, args, y: seen.append(y[:, -1].mean().item()))
    module.inject(model, ["0"], rank=2)
    assert module.merge(model) == ["0"] and len(seen) == 1


@methods
def test_two_methods_in_one_model_are_saved_part_by_part(method, tmp_path):
    torch.manual_seed(0)
    module, other = (importlib.import_module(name) for name in (method, "tlora" if method != "tlora" else "triadapt"))
    model = nn.ModuleDict({part: nn.Sequential(nn.Linear(8, 8)) for part in ("enc", "dec")})
    base, x = copy.deepcopy(model), torch.randn(2, 8)
    module.inject(model["enc"], ["0"], rank=2)
    other.inject(model["dec"], ["0"], rank=2)
    with pytest.raises(ValueError, match="^layer dec.0 is adapted by another method: save each part of the model by itself$"):
        module.save(model, tmp_path / "all")
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        for p in model["enc"].parameters():
            p.add_(torch.randn_like(p) if p.requires_grad else 0)
    module.save(model["enc"], tmp_path / "enc")
    assert module.load(base["enc"], tmp_path / "enc") == ["0"]
    wanted = model["enc"].eval()(x)
    assert torch.equal(base["enc"].eval()(x), wanted) and not torch.allclose(base["enc"][0].base(x), wanted)


@methods
def test_a_target_of_another_class_is_named(method):
    class Conv1D(nn.Module):
        pass

    model = nn.ModuleDict({"c_attn": Conv1D(), "head": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="^target 'c_attn' is a Conv1D, no nn.Linear; names end in: head$"):
        importlib.import_module(method).inject(model, ["c_attn"])


@methods
def test_a_base_whose_weights_are_elsewhere_is_refused(method):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    before = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(
        ValueError, match="layer 0 is not adapted: accelerate keeps its weight elsewhere: load without offloading"
    ):
        importlib.import_module(method).inject(model, ["0"], rank=2)
    assert torch.equal(model(x), before) and type(model[0]) is nn.Linear


@methods
def test_mambas_dt_proj_is_found_out(method):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4)
    model = transformers.MambaForCausalLM(config)
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    module, names = inject_only(method, copy.deepcopy(model), targets, "dt_proj", rank=2)
    assert len(names) == 3
    inject_only(method, model, targets, rank=2)
    model(torch.randint(20, (2, 5)))
    with pytest.raises(ValueError, match="layers.0.mixer.dt_proj is read and never called"):
        module.merge(model)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.ones(4, 6, 5))


@methods
def test_experts_in_one_parameter_are_told_of_with_their_share(method, recwarn):
    blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(6, 10), "conv": nn.Conv1d(5, 2, 1, bias=False)})])
    model = nn.ModuleDict({"blocks": blocks, "outside": Experts()})
    inject_only(method, copy.deepcopy(model), ["proj"], rank=2)
    assert not recwarn.list  # a convolution's weight has three dimensions too; what is outside is no block's
    blocks[0]["experts"] = Experts()
    with pytest.warns(UserWarning, match="60% of the blocks' numbers are experts kept as 3-D parameters: .* not adapted"):
        inject_only(method, model, ["proj"], rank=2)
    assert 120 / (120 + 70 + 10) == 0.6


def test_default_targets_leave_out_what_has_one_output_and_say_so(recwarn):
    block = nn.ModuleDict({"proj": nn.Linear(4, 2), "gate": nn.Linear(4, 1), "scale": nn.Linear(1, 4), "fold": nn.Linear(2, 4)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block, copy.deepcopy(block)]), "head": nn.Linear(4, 1)})
    assert default_targets(model) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("proj", "fold")]
    assert [str(w.message) for w in recwarn.list] == ["too narrow for an adapter, left out: gate, scale"]
    model["blocks"] = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 2)})])
    assert default_targets(model) == ["blocks.0.proj"] and len(recwarn.list) == 1


@pytest.mark.parametrize("family, share", [("Mixtral", "84%"), ("Qwen2Moe", "65%")])
def test_mixtures_of_experts_of_transformers(family, share):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    own = {"num_local_experts": 4} if family == "Mixtral" else {
        "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2
    }  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes, **own))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        targets = default_targets(model)
    narrow = ["too narrow for an adapter, left out: shared_expert_gate"] if family == "Qwen2Moe" else []
    assert [str(w.message) for w in seen] == narrow and not any("gate" in t.split(".")[-1].split("_")[-1] for t in targets)
    with pytest.warns(UserWarning, match=f"{share} of the blocks' numbers are experts"):
        assert importlib.import_module("tlora").inject(model, targets, rank=8) == targets


# ---------------------------------------------------------------------- save and load, from one file


def saved_case(method, path, kind="encoder"):
    """A trained adapter at `path`: ranks that differ, where the method has such, and layers of rank 0."""
    options = {"triadapt": {"rank_ref": 4, "delta": 2, "interval": 2, "t0": 1, "preserve": True, "dropout": 0.1},
               "tlora_plus": {"rank1": 2, "rank2": 3, "train": "bc", "ratio": "summed"},
               "tlora": {"dropout": 0.25}, "baselines.lora": {"alpha": 5.0},
               "task_tlora": {"train_a": True}}[method]  # fmt: skip
    case = Case(kind)
    module = importlib.import_module(method)
    if method == "task_tlora":
        scores = torch.arange(len(SIX) * 2.0).tolist()
        ranks = module.allocate_ranks(scores, 30, [16] * 12)
        options["plan"] = {
            f"blocks.{i // 6}.{SIX[i % 6]}": module.Allocation(r, 0.1 + i / 7, share=i / 66) for i, r in enumerate(ranks)
        }
        assert 0 in ranks and len(set(ranks)) > 3
    else:
        options["rank"] = 2
    case.names = module.inject(case.model, case.targets, **options)
    case.model.head.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.param_groups(case.model, lr=0.02, weight_decay=0.0))
    for step in range(1, 7):
        optimizer.zero_grad()
        case.loss(case.model).backward()
        optimizer.step()
        if hasattr(module, "after_step"):
            module.after_step(case.model, optimizer, step, 20)
    case.model.eval()
    module.save(case.model, path)
    return module, case


def layers_of(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "factors")}


def with_its_blocks_compiled(model):
    for block in model.blocks:
        block.compile()  # in place: no name changes
    model.blocks[0] = torch.compile(model.blocks[0])  # blocks.0._orig_mod.q_proj
    return model


@methods
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel, with_its_blocks_compiled])
def test_an_adapter_saved_from_a_wrapped_model_fits_the_plain_base(method, wrap, tmp_path):
    module, case = saved_case(method, tmp_path / "plain")
    before = case.model(case.inputs)
    module.save(wrap(case.model), tmp_path / "wrapped")
    fresh = Case("encoder")
    assert module.load(fresh.model.eval(), tmp_path / "wrapped") == case.names
    assert torch.equal(fresh.model(fresh.inputs), before)


@methods
def test_what_a_batchnorm_counted_is_saved_with_the_adapter(method, tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    module, model, x = importlib.import_module(method), base(), torch.randn(32, 4) + 1
    module.inject(model, ["0"], rank=2)
    for _ in range(5):
        model(x)
    model.eval()
    assert (model(x) - base().eval()(x)).abs().max() > 0.05  # by what was counted alone: B is zero
    module.save(model, tmp_path / "adapter")
    fresh = base().eval()
    module.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x)) and fresh[1].num_batches_tracked == 5


@methods
def test_save_makes_the_folder_and_takes_no_folder_for_a_file(method, tmp_path, monkeypatch):
    module, case = saved_case(method, tmp_path / "new" / "folder" / "adapter")
    monkeypatch.chdir(tmp_path)
    module.save(case.model, "here")
    assert load_file("here").keys() == load_file(tmp_path / "new" / "folder" / "adapter").keys()
    with pytest.raises(ValueError, match="new is a folder: name a file in it$"):
        module.save(case.model, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "new"]


@methods
@pytest.mark.parametrize("installed", [True, False])
def test_an_adapter_is_saved_and_loaded_to_the_bit(method, installed, tmp_path, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "adapter.file"
    module, case = saved_case(method, path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.file"]
    assert (path.read_bytes()[:2] == b"PK") == (not installed)
    expected = case.model(case.inputs)
    fresh = Case("encoder")
    fresh.model.eval()
    assert not torch.equal(fresh.model(fresh.inputs), expected)
    torch.manual_seed(12345)
    assert module.load(fresh.model, path) == case.names
    assert torch.equal(fresh.model(fresh.inputs), expected)
    ours, theirs = layers_of(case.model), layers_of(fresh.model)
    assert [(name, m.options) for name, m in ours.items()] == [(name, m.options) for name, m in theirs.items()]
    if method in ("triadapt", "task_tlora"):
        assert len({m.rank for m in theirs.values()}) > 1
        assert module.watch(case.model) == module.watch(fresh.model)
    state, other = case.model.state_dict(), fresh.model.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in state.items())
    flags = {name: p.requires_grad for name, p in case.model.named_parameters()}
    assert {name: p.requires_grad for name, p in fresh.model.named_parameters()} == flags and flags["head.weight"]
    assert not any(m.training for m in theirs.values())  # as the layers were whose place they took
    rates = [[g["lr"] for g in module.param_groups(c.model, 0.1, 0.0)] for c in (case, fresh)]
    assert rates[0] == rates[1]  # TLoRA+'s ratio is known again
    for c in (case, fresh):  # and it trains on, the same way
        torch.manual_seed(3)
        c.train(module, 3, torch.optim.AdamW, 0.01)
    state, other = case.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(t, other[key]) for key, t in state.items())
    assert not torch.equal(case.model(case.inputs), expected)
    module.merge(case.model), module.merge(fresh.model)
    assert torch.equal(case.model(case.inputs), fresh.model(case.inputs))


@methods
@pytest.mark.parametrize("installed", [True, False])
def test_tensors_are_written_apart_from_their_memory_and_their_graph(method, installed, tmp_path, monkeypatch):
    module, path = importlib.import_module(method), tmp_path / "file"
    if not installed:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    large = torch.randn(1000, 1000, requires_grad=True)
    parts = {"a": large[:2], "b": large[1:3], "c": large[:3, :3].T, "d": large[:1] * 2}
    module.write_adapter(path, parts, {"method": "m", "layers": {}, "trained": []})
    assert path.stat().st_size < 50_000  # 24 kB of numbers, not the 4 MB that they are a view of
    tensors, _ = module.read_adapter(path, "m")
    assert tensors.keys() == parts.keys() and all(torch.equal(t, parts[key]) for key, t in tensors.items())
    assert all(t.is_contiguous() and not t.requires_grad for t in tensors.values())


@methods
def test_a_narrower_cast_of_a_float64_model_leaves_the_update_in_float32(method):
    model = nn.Sequential(nn.Linear(6, 6)).double()
    inject_only(method, model, ["0"], rank=2)
    assert {p.dtype for name, p in model[0].named_parameters() if not name.startswith("base.")} == {torch.float64}
    model.half()
    assert model[0].base.weight.dtype == torch.float16
    assert {p.dtype for name, p in model[0].named_parameters() if not name.startswith("base.")} == {torch.float32}


@methods
def test_a_layer_without_numbers_among_others_is_not_filled(method, tmp_path):
    module, model = importlib.import_module(method), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inject_only(method, model, ["0", "1"], rank=2)
    module.save(model, tmp_path / "file")
    fresh = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, device="meta"))
    with pytest.raises(ValueError, match="the model is on the meta device"):
        module.load(fresh, tmp_path / "file")


@methods
def test_what_is_in_the_file_is_what_was_trained_or_drawn_and_no_base(method, tmp_path):
    module, case = saved_case(method, tmp_path / "a")
    tensors, metadata = module.read_adapter(tmp_path / "a", method.rpartition(".")[2])
    base = {name for name in Case("encoder").model.state_dict() if not name.startswith("head")}
    trained = {name for name, p in case.model.named_parameters() if p.requires_grad}
    assert not base & {name.replace(".base.", ".") for name in tensors}
    assert trained <= set(tensors) and {"head.weight", "head.bias"} <= trained == set(metadata["trained"])
    drawn = {"tlora": {"A", "C"}, "tlora_plus": {"A"}}.get(method, set())
    assert {f"{name}.{key}" for name in case.names for key in drawn} <= set(tensors) - trained
    assert list(metadata["layers"]) == case.names
    with safe_open(tmp_path / "a", "pt") as f:
        assert f.metadata().keys() == {"method", "layers", "trained"}


@methods
@pytest.mark.parametrize("dtype", HALF)
def test_an_adapter_of_a_half_precision_base_with_a_trained_bias_is_the_same_again(method, dtype, tmp_path):
    module, model, loss = adapt_half(method, dtype)
    train_half(module, model, loss, 1e-2, steps=3)
    model[0].base.bias.requires_grad_(True).data.add_(0.5)
    module.save(model, tmp_path / "a")
    fresh, x, _ = half_base(dtype)
    assert not torch.equal(fresh[0].bias, model[0].bias)
    module.load(fresh, str(tmp_path / "a"))
    assert torch.equal(fresh(x), model(x)) or method == "tlora"  # it drops out
    assert torch.equal(fresh.eval()(x), model.eval()(x)) and fresh[0].A.dtype == torch.float32
    assert fresh[0].base.bias.requires_grad and not fresh[0].base.weight.requires_grad


@methods
def test_a_loaded_adapter_merges_without_a_forward_pass(method, tmp_path):
    module, case = saved_case(method, tmp_path / "a")
    fresh = Case("encoder")
    module.load(fresh.model.eval(), tmp_path / "a")
    assert module.merge(fresh.model) == case.names
    error = (fresh.model(case.inputs) - case.model(case.inputs)).abs().max().item()
    print("merge error", error)
    assert error < 1e-5


@methods
def test_a_file_that_does_not_fit_is_refused_in_one_line_before_anything_changes(method, tmp_path):
    path = tmp_path / "adapter"
    module, case = saved_case(method, path)
    name = method.rpartition(".")[2]
    tensors, metadata = module.read_adapter(path, name)
    other = next(m for m in METHODS if m != method)
    saved_case(other, tmp_path / "other")
    first = case.names[0]

    def variant(file, change=None, **more):
        kept = dict(tensors)
        if change:
            change(kept)
        module.write_adapter(tmp_path / file, kept, metadata | more)
        return tmp_path / file

    (tmp_path / "damaged").write_bytes(path.read_bytes()[:-20])
    (tmp_path / "text").write_text("hello, this is no adapter")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights")
    torch.save({"tensors": {"code": print}, "metadata": {}}, tmp_path / "code")
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain", {"format": "pt"})
    narrow = Transformer(Config(40, 32, 2, 2, 24), "classification", 3)
    classes = Transformer(Config(40, 16, 2, 2, 24), "classification", 4)
    meta = Case("encoder").model.to("meta")
    wrapped = Case("encoder").model
    module.inject(wrapped, ["q_proj"], rank=2)
    key = f"{first}.B"
    for model, file, words in [
        (None, tmp_path / "other", f"is an adapter of {other.rpartition('.')[2]}, not of {name}"),
        (None, tmp_path / "absent", "absent cannot be read: [Errno 2] No such file or directory"),
        (None, tmp_path / "damaged", "damaged cannot be read"),
        (None, tmp_path / "text", "text cannot be read"),
        (None, tmp_path / "weights", "weights is not a file that `save` wrote"),
        (None, tmp_path / "code", "code cannot be read: Weights only load failed"),
        (None, tmp_path / "plain", "plain is not a file that `save` wrote"),
        (narrow, path, "adapter does not fit: blocks.0.down_proj."),
        (classes, path, "adapter does not fit: head.bias is (3,) in the file, (4,) in the model"),
        (nn.Sequential(nn.Linear(4, 4)), path, f"it adapts {first}, and the model has no nn.Linear of that name"),
        (nn.ModuleDict({"more": Case("encoder").model}), path, f"it adapts {first}, and the model has no nn.Linear"),
        (wrapped, path, "the model is adapted already (blocks.0.q_proj): merge it first"),
        (meta, path, "the model is on the meta device"),
        (None, variant("lacks", lambda t: t.pop(key)), f"lacks does not fit: {key} is missing in the file"),
        (None, variant("odd", lambda t: t.update(odd=torch.zeros(2))), "odd is (2,) in the file, missing in the model"),
        (None, variant("head", lambda t: t.update({"head.bias": torch.zeros(2)})), "head.bias is (2,) in the file, (3,) in"),
    ]:
        model = model or Case("encoder").model
        before = {key: t.clone() for key, t in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError) as error:
            module.load(model, file)
        assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
        assert list(model.state_dict()) == list(before) and [p.requires_grad for p in model.parameters()] == flags
        assert model is meta or all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing to save"):
        module.save(Case("encoder").model, tmp_path / "x")
    with monkeypatched_without_safetensors(), pytest.raises(ValueError, match="cannot be read: .*safetensors"):
        module.load(Case("encoder").model, path)


@contextlib.contextmanager
def monkeypatched_without_safetensors():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        yield


@methods
def test_a_save_that_fails_leaves_the_file_of_before(method, tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    module, case = saved_case(method, path)
    before = path.read_bytes()
    case.train(module, 1, lr=0.1)
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.save(case.model, path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    module.save(case.model, path)
    assert path.read_bytes() != before


@methods
def test_a_copied_file_saves_and_loads_with_torch_and_the_standard_library_alone(method, tmp_path):
    """In a process that finds neither this project nor safetensors, nor numpy."""
    source = inspect.getsourcefile(importlib.import_module(method))
    (tmp_path / "copied.py").write_text(open(source, encoding="utf-8").read(), encoding="utf-8")
    code = """
import sys
sys.modules["safetensors"] = None
import torch, copied
build = lambda: (torch.manual_seed(0), torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)))[1]
model, x = build(), torch.ones(3, 6)
copied.inject(model, ["0"], rank=2)
model[1].requires_grad_(True)
optimizer = torch.optim.AdamW(copied.param_groups(model, 0.1, 0.0))
for _ in range(3):
    optimizer.zero_grad(); model(x).square().sum().backward(); optimizer.step()
copied.save(model, "adapter")
fresh = build()
assert not torch.equal(fresh.eval()(x), model.eval()(x))
copied.load(fresh, "adapter")
assert torch.equal(fresh(x), model(x))
assert not {"checkpoint", "model", "train", "tlora", "baselines"} & set(sys.modules)
print("copied")
"""
    result = subprocess.run([sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.')\n" + code],
                            cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert result.stdout == "copied\n", result.stderr
