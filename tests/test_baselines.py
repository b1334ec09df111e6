"""The behaviour that the baselines share, on our transformer and on tiny random RoBERTas, LLaMAs and T5s."""

import gc
import importlib
import inspect
import re
import typing

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from harness import folder
from model import Config, Transformer, default_targets, logits

# baseline: what each of its layers trains, options for layers of width 16, and how it is an exception:
#   "merges": it has no factors, for it is not of low rank; "refuses": it has neither factors nor a merge;
#   "nearly": it does not start exactly as the model was
BASELINES = {
    "dora": ({"A", "B", "magnitude"}, {"rank": 2}, {"merges"}),
    "pissa": ({"A", "B"}, {"rank": 2}, set()),
    "olora": ({"A", "B"}, {"rank": 2, "alpha": 4.0}, set()),
    "lora_plus": ({"A", "B"}, {"rank": 2}, set()),
    "lora_xs": ({"R"}, {"rank": 2}, set()),
    "adalora": ({"A", "E", "B"}, {"rank": 4, "rank_target": 2, "mask_interval": 2}, set()),
    "corda": ({"A", "B"}, {"rank": 2}, set()),
    "lora_ga": ({"A", "B"}, {"rank": 2}, set()),
    "houlsby": ({"W1", "b1", "W2", "b2"}, {"bottleneck": 4}, {"refuses", "nearly"}),
    "pfeiffer": ({"W1", "b1", "W2", "b2"}, {"reduction": 1}, {"refuses", "nearly"}),
    "increlora": ({"A0", "E0", "B0"}, {"rank": 1, "rank_target": 3, "interval": 1, "t0": 1, "delta": 1}, set()),
}
every = pytest.mark.parametrize("name", BASELINES)
of_low_rank = pytest.mark.parametrize("name", [n for n, (_, _, odd) in BASELINES.items() if not odd])
VERBS = {"inject", "param_groups", "merge"}


class Case:
    """A model with a head, a batch and labels; the same weights every time."""

    def __init__(self, name, family="ours", dtype=torch.float32):
        self.module = importlib.import_module(f"baselines.{name}")
        self.leaves, self.options, self.odd = BASELINES[name]
        torch.manual_seed(0)
        self.model = ours() if family == "ours" else hugging(family)
        with torch.no_grad():  # so large that an update shows
            for p in self.model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        self.model.to(dtype).eval()
        self.targets = default_targets(self.model)
        self.batch = {"input_ids": torch.randint(3, 40, (6, 7)), "attention_mask": torch.ones(6, 7, dtype=torch.long)}
        self.batch["input_ids"][:, -1] = 2  # T5 reads the end of the text
        self.labels = torch.tensor([0, 1, 2, 0, 1, 2])
        heads = ("head", "classifier", "score", "classification_head")
        self.head = next(child for child, _ in self.model.named_children() if child in heads)

    @torch.no_grad()  # for attention has other kernels, which round otherwise, where its bias wants a gradient
    def __call__(self):
        return logits(self.model, self.batch)

    def loss(self, model, rows=None):
        rows = slice(None) if rows is None else rows
        return F.cross_entropy(logits(model, {k: v[rows] for k, v in self.batch.items()}).float(), self.labels[rows])

    def adapt(self, targets=None):
        options, targets = dict(self.options), targets or self.targets
        if hasattr(self.module, "calibrate"):
            samples = [[i] for i in range(6)]
            options["plan"] = self.module.calibrate(self.model, targets, samples, self.loss, rank=2, samples=6)
        self.names = self.module.inject(self.model, targets, **options)
        self.model.get_submodule(self.head).requires_grad_(True)
        return self

    def train(self, steps, lr=0.02):
        optimizer = torch.optim.AdamW(self.module.param_groups(self.model, lr, 0.0))
        losses = []
        self.model.train()
        for step in range(1, steps + 1):
            loss = self.loss(self.model)
            optimizer.zero_grad()
            loss.backward()
            if hasattr(self.module, "penalty"):
                self.module.penalty(self.model).backward()
            if hasattr(self.module, "before_step"):
                self.module.before_step(self.model, step, steps)
            optimizer.step()
            if hasattr(self.module, "after_step"):
                self.module.after_step(self.model, optimizer, step, steps)
            losses.append(loss.item())
        self.model.eval()
        return losses


def ours():
    return Transformer(Config(vocab_size=40, width=16, depth=2, heads=2, hidden=24), "classification", 3)


def hugging(family):
    transformers = pytest.importorskip("transformers")
    bert = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3,
            "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
    t5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "num_labels": 3}
    gpt2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "num_labels": 3}
    kind, config = {
        "roberta": ("Roberta", bert | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        "bert": ("Bert", bert),
        "llama": ("Llama", bert),
        "t5": ("T5", t5 | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}),
        "gpt2": ("GPT2", gpt2 | {"pad_token_id": 0}),
    }[family]
    from harness import backbones

    model = getattr(transformers, f"{kind}ForSequenceClassification")(getattr(transformers, f"{kind}Config")(**config))
    backbones.linearize(model)
    return model


@every
def test_the_output_at_the_start_is_the_models_and_changes_with_training(name):
    case = Case(name)
    before = case()
    case.adapt()
    for training in (False, True):
        case.model.train(training)
        change = (case() - before).abs().max().item()
        print("change at the start", change, "of", before.abs().max().item())
        assert change < 1e-2 * before.abs().max().item() if "nearly" in case.odd else change == 0
    case.model.get_submodule(case.head).requires_grad_(False)  # what changes is the adapters' doing
    losses = case.train(12)
    assert (case() - before).abs().max() > 1e-2 and losses[-1] < losses[0]


DEFAULTS = {
    "dora": {"rank": 8, "alpha": 16.0, "dropout": 0.0},
    "pissa": {"rank": 8, "alpha": 8.0, "dropout": 0.0, "niter": 0},
    "olora": {"rank": 8, "alpha": 16.0, "dropout": 0.0},
    "lora_plus": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "lr_ratio": 20.0},
    "lora_xs": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "std": 0.0},
    "adalora": {"rank": 12, "rank_target": 8, "alpha": 16.0, "dropout": 0.0, "t_init": 0, "t_final": 0, "mask_interval": 10,
                "beta1": 0.85, "beta2": 0.85, "orth": 0.1},
    "corda": {"plan": None, "rank": 8, "alpha": 8.0, "dropout": 0.0, "samples": 256, "directions": "ipm", "progress": iter},
    "lora_ga": {"plan": None, "rank": 8, "alpha": 16.0, "dropout": 0.0, "samples": 128, "gamma": 16.0, "variant": "authors",
                "progress": iter},
    "houlsby": {"bottleneck": 64, "places": ""},
    "pfeiffer": {"reduction": 16, "zero": False, "places": ""},
    "increlora": {"rank": 1, "rank_target": 8, "alpha": 16.0, "dropout": 0.0, "delta": 0, "top": 3, "interval": 50, "t0": 50,
                  "beta1": 0.85, "beta2": 0.85, "orth": 0.1},
}  # fmt: skip


@every
def test_the_defaults_are_these(name):
    module, found = importlib.import_module(f"baselines.{name}"), {}
    for verb in (getattr(module, "calibrate", None), module.inject):
        options = inspect.signature(verb).parameters.values() if verb else ()
        found |= {option.name: option.default for option in options if option.default is not option.empty}
    assert found == DEFAULTS[name]


class Reader(nn.Module):
    """Calls one layer and computes with the weight of another, as Mamba does with its dt_proj."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


@pytest.mark.parametrize("name", [n for n, (_, _, odd) in BASELINES.items() if "refuses" not in odd])
def test_a_layer_that_is_read_and_never_called_is_not_merged(name):
    module, options = importlib.import_module(f"baselines.{name}"), BASELINES[name][1]
    model, x = Reader(), torch.randn(3, 8)
    module.inject(model, ["called", "read"], **options)
    model(x)
    with pytest.raises(ValueError, match="layer read is read and never called"):
        module.merge(model)
    model.read = model.read.base
    before = model(x)
    assert module.merge(model) == ["called"] and (model(x) - before).abs().max() < 1e-6
    assert all(p.is_leaf and p.grad_fn is None and not p.requires_grad for p in model.parameters())


@every
def test_a_forward_and_backward_pass_leaves_no_tensor_behind(name):
    case, alive = Case(name).adapt(), []
    for _ in range(4):
        case.loss(case.model.train()).backward()
        gc.collect()
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    print(alive)
    assert alive[1] == alive[2] == alive[3]


@every
def test_exactly_the_declared_parameters_are_trained_and_in_the_groups(name):
    case = Case(name).adapt()
    expected = {f"{layer}.{leaf}" for layer in case.names for leaf in case.leaves} | {"head.weight", "head.bias"}
    if name == "houlsby":
        expected |= {key for key, _ in case.model.named_parameters() if "norm" in key}
    trained = {key: p for key, p in case.model.named_parameters() if p.requires_grad}
    assert set(trained) == expected
    groups = case.module.param_groups(case.model, 1e-3, 0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in trained.values())
    before = {key: t.clone() for key, t in case.model.state_dict().items() if key not in trained}
    case.train(3)
    after = case.model.state_dict()
    bookkeeping = ("importance_", "uncertainty_", "kept", "smoothed", "ranknum")
    changed = {key for key, t in before.items() if not torch.equal(t, after[key])}
    assert all(key.rpartition(".")[2].startswith(bookkeeping) for key in changed), "the base and what is frozen stay"
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


@every
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_merged_equals_unmerged_or_is_refused_in_one_line(name, dtype, bound):
    case, base = Case(name, dtype=dtype).adapt(), Case(name, dtype=dtype)
    case.train(12)
    adapted = case()
    base.model.get_submodule(base.head).load_state_dict(case.model.get_submodule(case.head).state_dict())
    assert (adapted - base()).abs().max() > 1e-2, "the adapter changes the output"
    if case.odd & {"merges", "refuses"}:
        with pytest.raises(ValueError) as error:
            case.model.get_submodule(case.names[0]).factors()
        assert "\n" not in str(error.value)
    if "refuses" in case.odd:
        with pytest.raises(ValueError) as error:
            case.module.merge(case.model)
        assert "\n" not in str(error.value) and torch.equal(case(), adapted)
        return
    assert case.module.merge(case.model) == case.names
    error = (case() - adapted).abs().max().item()
    print("merge error", error)
    assert error < bound
    assert all(type(case.model.get_submodule(layer)) is nn.Linear for layer in case.names)
    assert list(case.model.state_dict()) == list(base.model.state_dict())
    with pytest.raises(ValueError, match="nothing to merge"):
        case.module.merge(case.model)


@of_low_rank
def test_factors_are_the_difference_from_the_original_weight(name):
    case, base = Case(name, dtype=torch.float64).adapt(), Case(name, dtype=torch.float64)
    case.train(6)
    for layer in case.names:
        adapted, original = case.model.get_submodule(layer), base.model.get_submodule(layer)
        assert torch.equal(adapted.base.weight, original.weight), "W0 is not written over"
        x = torch.randn(5, adapted.in_features, dtype=torch.float64)
        P, Q = adapted.factors()
        assert P.shape[1] == Q.shape[0] and (P @ Q).abs().max() > 1e-5
        assert (adapted(x) - original(x) - x @ (P @ Q).T).abs().max() < 1e-12
        if name != "lora_plus":  # whose layer is LoRA's own
            assert torch.equal(adapted(input=x), adapted(x)), "as nn.Linear's argument is called"


@of_low_rank
def test_dropout_is_on_the_updates_input_in_training_alone(name):
    case = Case(name, dtype=torch.float64)
    case.options = case.options | {"dropout": 0.5}
    case.adapt().train(6)
    for layer in case.names[:2]:
        adapted = case.model.get_submodule(layer)
        x = torch.randn(5, adapted.in_features, dtype=torch.float64)
        P, Q = adapted.factors()
        torch.manual_seed(1)
        dropped = F.dropout(x, 0.5, True)
        torch.manual_seed(1)
        update = adapted.train()(x) - adapted.base(x)
        assert (update - dropped @ (P @ Q).T).abs().max() < 1e-12 and update.abs().max() > 1e-6
        assert (adapted.eval()(x) - adapted.base(x) - x @ (P @ Q).T).abs().max() < 1e-12


@every
def test_a_frozen_layer_keeps_its_mode_and_the_groups_take_the_runs_rate_and_decay(name):
    for training in (False, True):
        case = Case(name)
        case.model.train(training)
        case.adapt()
        assert {m.training for m in case.model.modules()} == {training}
    groups = case.module.param_groups(case.model, 1e-3, 0.1)
    assert groups[0]["lr"] == 1e-3 and groups[0]["weight_decay"] == 0.1


@every
def test_the_adapter_alone_fits_the_untouched_base_to_the_bit(name, tmp_path):
    case = Case(name).adapt()
    case.train(6)
    expected = case()
    state = folder.adapter_state(case.model)
    assert not any(".base." in key for key in state)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "adapter.safetensors")
    fresh = Case(name)
    torch.manual_seed(12345)
    options = fresh.options | ({"rank": 1} if "rank" in fresh.options and hasattr(fresh.module, "calibrate") else {})
    fresh.module.inject(fresh.model, case.names, **options)  # without a plan and with any rank, as when a run is opened
    fresh.model.get_submodule(fresh.head).requires_grad_(True)
    assert not torch.equal(fresh(), expected)
    if name == "increlora":  # a frozen reserve and rows that are trained are there after loading only
        fresh.model.load_state_dict(load_file(tmp_path / "adapter.safetensors"), strict=False)
    folder.load_adapter_state(fresh.model, load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(fresh(), expected)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_computes_in_the_layers_dtype_and_under_autocast(name, dtype):
    case = Case(name, dtype=dtype).adapt()
    losses = case.train(10, lr=0.004)  # with more LoRA+ and its ratio of 20 are at the edge: rounding decides
    assert case().dtype == dtype and losses[-1] < losses[0]
    case = Case(name).adapt()
    case.train(2)
    exact = case()
    with torch.autocast("cpu", torch.bfloat16):
        half = case()
        case.loss(case.model).backward()
    error = (half.float() - exact).abs().max().item()
    print("autocast", error, "of", exact.abs().max().item())
    assert 0 < error < 0.1 * exact.abs().max().item()


@every
def test_wrong_use_is_refused_in_one_line_and_changes_nothing(name):
    case = Case(name)
    before = case.model.state_dict()
    calls = [(["query"], {}, "target 'query' matches no nn.Linear"), ([], {}, "no targets given")]
    if "rank" in case.options:
        calls += [(["q_proj"], {"rank": 0, "rank_target": 1}, "rank"), (["q_proj"], {"rank": 17}, "rank 17 does not fit layer")]
        calls += [(["q_proj"], {"rank": 2, "rank_target": 2, "dropout": 1.0}, "dropout 1.0 is not in [0, 1)")]
    for targets, options, words in calls:
        accepted = inspect.signature(case.module.inject).parameters
        options = {k: v for k, v in options.items() if k in accepted}
        if name == "increlora" and options.get("rank") == 17:
            options["rank_target"] = 17
        with pytest.raises(ValueError) as error:
            case.module.inject(case.model, targets, **options)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError, match="colour"):
        case.module.inject(case.model, case.targets, colour=1)
    assert not any(hasattr(m, "factors") for m in case.model.modules())
    assert all(p.requires_grad for p in case.model.parameters())
    assert all(torch.equal(t, before[key]) for key, t in case.model.state_dict().items())
    case.adapt()
    with pytest.raises(ValueError, match="adapted already"):
        case.module.inject(case.model, ["q_proj"], **case.options)


@every
def test_every_annotated_option_has_its_words_and_no_other(name):
    module = importlib.import_module(f"baselines.{name}")
    assert all(callable(getattr(module, verb)) for verb in VERBS)
    for verb in ("inject", "calibrate"):
        if function := getattr(module, verb, None):
            words = re.findall(r"^ {8}(\w+): ((?:.+\n)(?: {9,}.+\n)*)", function.__doc__ + "\n", re.M)
            options = {
                p.name: p for p in inspect.signature(function).parameters.values()
                if p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty
            }  # fmt: skip
            assert [option for option, _ in words] == list(options)
            for p in options.values():
                choices = typing.get_args(p.annotation)
                assert p.default in choices if choices else type(p.default) is p.annotation in (int, float, str, bool)


def test_options_that_share_a_name_share_a_type_for_they_share_a_flag():
    kinds = {}
    for path in ["triadapt", "tlora", "tlora_plus", "task_tlora", "baselines.lora"] + [f"baselines.{n}" for n in BASELINES]:
        module = importlib.import_module(path)
        for verb in ("inject", "calibrate"):
            for p in inspect.signature(getattr(module, verb, lambda: None)).parameters.values():
                if p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty:
                    assert kinds.setdefault(p.name, p.annotation) == p.annotation, (path, p.name)
    assert len(kinds) > 30


# -------------------------------------------------------------------------- other models


@every
@pytest.mark.parametrize("family", ["roberta", "llama", "t5"])
def test_inject_two_steps_and_merge_or_refuse_on_other_models(name, family):
    case = Case(name, family)
    before = case()
    case.adapt()
    change = (case() - before).abs().max().item()
    print("change at the start", change, "of", before.abs().max().item())
    assert change < 1e-2 * before.abs().max().item() if "nearly" in case.odd else change == 0
    case.model.get_submodule(case.head).requires_grad_(False)
    case.train(2)
    adapted = case()
    assert (adapted - before).abs().max() > 1e-5, "the adapters were trained"
    if "refuses" in case.odd:
        with pytest.raises(ValueError, match="cannot be merged"):
            case.module.merge(case.model)
    else:
        assert case.module.merge(case.model) == case.names
        error = (case() - adapted).abs().max().item()
        print("merge error", error)
        assert error < 2e-5 * max(1, adapted.abs().max().item())


@pytest.mark.parametrize(
    "family,attention,mlp",
    [
        ("ours", "blocks.{}.o_proj", "blocks.{}.down_proj"),
        ("roberta", "roberta.encoder.layer.{}.attention.output.dense", "roberta.encoder.layer.{}.output.dense"),
        ("bert", "bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
        ("llama", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
        ("gpt2", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    ],
)
def test_adapters_find_the_output_projections_of_every_family(family, attention, mlp):
    expected = {place: {place.format(i) for i in range(2)} for place in (attention, mlp)}
    assert set(Case("houlsby", family).adapt().names) == expected[attention] | expected[mlp]
    assert set(Case("pfeiffer", family).adapt().names) == expected[mlp]


def test_adapters_find_the_output_projections_of_t5():
    mlp = {"DenseReluDense.wo": 4}
    for name, counts in {"houlsby": {"SelfAttention.o": 4, "EncDecAttention.o": 2} | mlp, "pfeiffer": mlp}.items():
        case = Case(name, "t5").adapt()
        assert {end: sum(layer.endswith(end) for layer in case.names) for end in counts} == counts
        assert len(case.names) == sum(counts.values())


@pytest.mark.parametrize("family", ["ours", "roberta", "llama", "t5"])
def test_houlsby_trains_every_norm(family):
    case = Case("houlsby", family)
    case.adapt()
    norms = [m for m in case.model.modules() if "Norm" in type(m).__name__]
    assert len(norms) >= 5 and all(p.requires_grad for m in norms for p in m.parameters())
    assert any(not p.requires_grad for p in case.model.parameters())
