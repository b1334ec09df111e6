"""The behaviour that every low-rank method must have, on our encoder, our decoder and a plain nn.Sequential."""

import ast
import copy
import importlib
import inspect
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import checkpoint
from model import Config, Transformer

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
            self.model = nn.Sequential(
                nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3)
            )
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
    state = checkpoint.adapter_state(case.model)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "adapter.safetensors")
    expected = case.model(case.inputs)

    fresh = Case(kind)  # the same base, but whatever the method draws comes from another seed
    torch.manual_seed(12345)
    module.inject(fresh.model, case.names, rank=2)
    fresh.model.get_submodule(fresh.head).requires_grad_(True)
    fresh.model.eval()
    assert not torch.equal(fresh.model(fresh.inputs), expected)
    checkpoint.load_adapter_state(fresh.model, load_file(tmp_path / "adapter.safetensors"))
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
    "find_linears", "match", "experts_share", "replace", "at_least_float32", "check_called", "write_adapter",
    "read_adapter", "find_saved", "place_saved", "own_state",
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
            module.after_step(model, optimizer, step, steps)
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
