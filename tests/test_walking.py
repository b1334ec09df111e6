"""What every method file does in lines of its own copy: wrapping, merging, naming a layer that does not fit, the demo."""

import importlib
import runpy

import pytest
import torch
import torch.nn as nn

METHODS = ["baselines.lora", "triadapt", "tlora", "tlora_plus", "task_tlora"]
methods = pytest.mark.parametrize("method", METHODS)


def wrapped(method, model, targets, **options):
    module = importlib.import_module(method)
    return module, module.inject(model, targets, rank=2, **options)


@methods
def test_an_adapted_layer_answers_what_its_linear_would(method):
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(12, 7, bias=bias))
        linear = model[0]
        wrapped(method, model, ["0"])
        assert model[0] is not linear
        assert model[0].weight is linear.weight and model[0].bias is linear.bias and (linear.bias is None) == (not bias)
        assert (model[0].in_features, model[0].out_features) == (12, 7)


@methods
def test_a_layer_in_eval_mode_stays_in_it(method):
    for training in (True, False):
        model = nn.Sequential(nn.Linear(12, 7)).train(training)
        wrapped(method, model, ["0"])
        assert model[0].training is training and model[0].base.training is training


@methods
def test_one_name_is_a_target_and_the_end_of_another_name_is_not(method):
    model = nn.ModuleDict({"a": nn.ModuleDict({"proj": nn.Linear(6, 6), "q_proj": nn.Linear(6, 6)}), "p": nn.Linear(6, 6)})
    assert wrapped(method, model, "proj")[1] == ["a.proj"]  # neither a.q_proj nor, letter by letter, p


@methods
def test_a_merged_weight_is_frozen_and_keeps_no_graph(method):
    model = nn.Sequential(nn.Linear(12, 7))
    module, _ = wrapped(method, model, ["0"])
    assert any(p.requires_grad for p in model.parameters())
    module.merge(model)
    for p in model.parameters():
        assert p.is_leaf and not p.requires_grad


@methods
def test_of_many_layers_that_do_not_fit_the_first_by_name_is_named(method):
    tied = nn.ModuleDict({f"l{i:02}": nn.Linear(6, 6) for i in range(40)})
    for layer in tied.values():
        layer.weight = tied["l00"].weight
    with pytest.raises(ValueError, match=r"^layer l00 is not adapted: \['l00', 'l01', "):
        wrapped(method, tied, list(tied)[::-1])


@methods
def test_a_layers_full_name_does_not_hide_that_another_target_matches_it_too(method):
    model = nn.ModuleDict({"proj": nn.Linear(6, 6), "a": nn.ModuleDict({"proj": nn.Linear(6, 6)})})
    assert wrapped(method, model, ["proj", "a.proj", "proj"])[1] == ["proj", "a.proj"]


@pytest.mark.parametrize("method", ["baselines.lora", "tlora", "tlora_plus"])
def test_the_layer_is_made_where_its_linear_is(method):
    model = nn.Sequential(nn.Linear(12, 7, device="meta"))
    wrapped(method, model, ["0"])
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@methods
def test_as_a_script_the_file_shows_its_demo_the_same_each_time_and_imported_it_shows_nothing(method, capsys):
    module = importlib.import_module(method)
    runpy.run_path(module.__file__, run_name="another")
    assert capsys.readouterr().out == ""
    torch.manual_seed(1)
    runpy.run_path(module.__file__, run_name="__main__")
    shown = capsys.readouterr().out
    torch.manual_seed(2)
    module.main()
    assert capsys.readouterr().out == shown and shown.count("\n") > 5
