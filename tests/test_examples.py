"""The examples run, and what they say of the loop they stand in is so."""

import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples"))

import trainer  # noqa: E402

import triadapt  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, what was printed) of the example, once as it is and once resumed from its checkpoint of step 20."""
    whole, resumed = (tmp_path_factory.mktemp(name) for name in ("whole", "resumed"))
    with pytest.MonkeyPatch.context() as patch:
        printed = {whole: [], resumed: []}
        patch.setattr("builtins.print", lambda *words, **_: printed[folder].append(" ".join(map(str, words))))
        for folder, flags in ((whole, []), (resumed, ["--resume"])):
            if flags:
                shutil.copytree(whole / "checkpoint-20", resumed / "checkpoint-20")
            trainer.main(["--out", str(folder), *flags])
    return {folder.name.rstrip("0123456789"): (folder, "\n".join(lines)) for folder, lines in printed.items()}


def words_of(rows):
    return torch.stack([row["input_ids"] for row in rows])


def test_a_run_resumed_in_the_middle_of_growth_ends_with_the_same_bits(run):
    (whole, said), (resumed, said_then) = run["whole"], run["resumed"]
    events = [int(step) for step in re.findall(r"step (\d+): new ranks", said)]
    assert min(events) < 20 < max(events), "growth before and after the checkpoint"
    assert [int(step) for step in re.findall(r"step (\d+): new ranks", said_then)] == [e for e in events if e > 20]
    first, second = (triadapt.read_adapter(folder / "adapter.safetensors", "triadapt") for folder in (whole, resumed))
    assert first[1] == second[1] and first[0].keys() == second[0].keys()
    assert all(torch.equal(t, second[0][key]) for key, t in first[0].items())


def test_the_example_learns_grows_to_its_budget_and_merges(run):
    _, said = run["whole"]
    ranks = [int(r) for r in re.search(r"ranks \[([\d, ]+)\]", said)[1].split(",")]
    assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1
    accuracies = [float(a) for a in re.findall(r"accuracy .*?(\d\.\d\d)", said)]
    assert len(accuracies) == 2 and min(accuracies) > 0.95


def test_the_adapter_on_a_fresh_base_and_the_merged_model_give_what_was_trained(run):
    folder, _ = run["whole"]
    model, rows = trainer.build()
    words = words_of(rows)
    before = model.eval()(words).logits
    triadapt.load(model, folder / "adapter.safetensors")
    adapted = model(words).logits
    merged = transformers.RobertaForSequenceClassification.from_pretrained(folder / "merged").eval()(words).logits
    assert (adapted - before).abs().max() > 1
    error = (merged - adapted).abs().max().item()
    print("largest difference of the merged model", error)
    assert error < 1e-4
    assert model.classifier.dense.weight.requires_grad and not model.roberta.embeddings.word_embeddings.weight.requires_grad


def test_the_penalty_is_no_part_of_what_evaluation_sees(tmp_path):
    model, rows = trainer.build()
    triadapt.inject(model.roberta, trainer.TARGETS, orth=0.5)
    loop = trainer.trainer_for(model, rows[:16], str(tmp_path))
    found = loop.evaluate(rows[:16])["eval_loss"]
    labels = torch.stack([row["labels"] for row in rows[:16]])
    wanted = torch.nn.functional.cross_entropy(model.eval()(words_of(rows[:16])).logits, labels).item()
    assert abs(found - wanted) < 1e-5 and triadapt.penalty(model).item() > 0.1


def test_several_processes_are_refused_at_the_first_step():
    with pytest.raises(ValueError, match="layers cannot grow under the Trainer in several processes: train in one"):
        trainer.Grow().on_step_end(SimpleNamespace(world_size=2), None, None, None, None)


def test_loss_and_penalty_count_once_a_step_however_many_batches_it_has(tmp_path):
    """Gradients of one batch of 16 and of two of 8, without dropout: equal, the penalty's part included."""
    gradients = []
    for batch, accumulated, orth in ((16, 1, 0.5), (8, 2, 0.5), (16, 1, 0.0)):
        model, rows = trainer.build()
        model.eval()
        model.train = lambda mode=True: model  # no dropout: the batches draw other masks
        torch.manual_seed(1)
        triadapt.inject(model.roberta, trainer.TARGETS, orth=orth, t0=100)
        seen = {}

        class See(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, **others):
                seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        settings = {
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 1,
            "max_grad_norm": 0.0, "save_strategy": "no",
        }  # fmt: skip
        loop = trainer.trainer_for(model, rows[:16], str(tmp_path), **settings)
        loop.callback_handler.callbacks = [c for c in loop.callback_handler.callbacks if not isinstance(c, trainer.Grow)]
        loop.add_callback(See())
        loop.train()
        gradients.append(seen)
    whole, halves, without = gradients
    assert whole.keys() == halves.keys() and len(whole) >= 4 * 12
    scale = max((whole[key] - without[key]).abs().max().item() for key in whole)
    error = max((whole[key] - halves[key]).abs().max().item() for key in whole)
    print("largest difference", error, "the penalty's part of the gradients is up to", scale)
    assert error < 1e-5 < 1e-2 < scale
