"""harness/run.py: losses by hand, predictions that labels do not change, a run opened from its folder."""

import dataclasses
import math

import pytest
import torch
from short import METHODS, TINY, go

import data
import fast
import train
from harness import folder, methods
from harness import run as running
from harness.run import Run
from harness.settings import Settings, parse
from model import Config, Transformer


def loss(logits, labels, kind, monkeypatch):
    monkeypatch.setattr(running.modelling, "logits", lambda model, batch, where: logits if where is None else logits[where])
    return running.loss_of(None, {"labels": labels}, kind).item()


def test_losses_by_hand(monkeypatch):
    logits, labels = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert abs(loss(logits, labels, "classification", monkeypatch) - expected) < 1e-6
    assert loss(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]), "regression", monkeypatch) == (1 + 4) / 2
    span = torch.zeros(1, 4, 2)
    span[0, 2, 0], span[0, 3, 1] = 5.0, 7.0
    expected = (math.log(1 + 3 * math.exp(-5)) + math.log(1 + 3 * math.exp(-7))) / 2
    assert abs(loss(span, torch.tensor([[2, 3]]), "span", monkeypatch) - expected) < 1e-6
    words = torch.randn(2, 3, 5)
    labels = torch.tensor([[-100, 4, -100], [0, -100, -100]])
    expected = -(words[0, 1].log_softmax(0)[4] + words[1, 0].log_softmax(0)[0]) / 2
    assert abs(loss(words, labels, "lm", monkeypatch) - expected.item()) < 1e-6


def test_a_language_models_loss_is_the_same_from_the_labelled_places_alone():
    torch.manual_seed(0)
    model = Transformer(Config(30, 16, 1, 2, 16, causal=True)).double()
    batch = {"input_ids": torch.randint(30, (3, 7)), "attention_mask": torch.ones(3, 7).long()}
    batch["labels"] = torch.where(torch.rand(3, 7) < 0.4, batch["input_ids"], -100)
    whole = torch.nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    assert (batch["labels"] == -100).any()
    assert abs((running.loss_of(model, batch, "lm") - whole).item()) < 1e-6


def test_the_labels_of_the_rows_change_no_generated_answer():
    torch.manual_seed(1)
    tokenizer = data.Tokenizer()
    task, rows = data.TASKS["math"], data.load("math", split="dev")[:6]
    model = Transformer(Config(tokenizer.vocab_size, 16, 1, 2, 16, causal=True))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=2.0)  # so that the choice depends on the text
    run = Run(Settings(batch_size=4, precision="float32"), task, model, tokenizer, "", max_new=40)

    def answers(rows):
        return run.predict(rows)["answers"]

    known = answers(rows)
    assert len(set(known)) > 1 and max(map(len, known)) > max(len(row.label) for row in rows)
    assert known == answers([dataclasses.replace(row, label=None) for row in rows])


def test_a_run_belongs_to_its_base(csv, tmp_path, capsys):
    base = str(tmp_path / "base.safetensors")
    assert go(csv, tmp_path / "a", "--method", "full", "--save-base", base)[0] == 0
    argv = ["--data", csv, "--text", "text", "--label", "label", "--base", base, "--out", str(tmp_path / "b"), "--epochs", "1"]
    argv += ["--no-figures", "--threads", "1", "--device", "cpu", "--method", "lora"]
    assert train.main(argv) == 0
    Run.open(str(tmp_path / "b"))
    assert go(csv, tmp_path / "c", "--method", "full", "--seed", "1", "--save-base", base)[0] == 0
    with pytest.raises(ValueError, match="was trained on another base than what"):
        Run.open(str(tmp_path / "b"))


def test_a_frozen_head_is_frozen_with_every_method(csv, tmp_path):
    for method in METHODS:
        if method == "head":
            continue
        assert go(csv, tmp_path / method, "--method", method, "--freeze-head", "--lr", "0.02")[0] == 0
        before = Run.open(str(tmp_path / method)).model.head.weight
        folder.seed_everything(0)
        settings = folder.read_config(tmp_path / method)["settings"]
        task, _, _ = running.load_task(settings)
        fresh, _, _ = running.build_model(settings, task)
        assert torch.equal(before, fresh.head.weight), method


@pytest.mark.parametrize("size", [1, 3, 100])
def test_every_row_is_answered_in_every_batch_whatever_the_answers_before(csv, tmp_path, size):
    go(csv, tmp_path / "run", "--method", "full", "--epochs", "12", "--lr", "0.01")
    run = Run.open(str(tmp_path / "run"))
    examples = data.load(run.task, csv)[:40]
    alone = [run.predict([example])["answers"][0] for example in examples]
    run.settings.batch_size = size  # eight times as many are answered at once
    assert run.predict(examples)["answers"] == alone and len(examples) > 24 and set(alone) == {0, 1}


@pytest.mark.parametrize("method", ["task_tlora", "corda", "lora_ga"])
def test_calibrating_shows_a_bar_over_samples_and_one_over_layers(csv, tmp_path, monkeypatch, method):
    bars = []

    def bar(items, desc, **more):
        bars.append([desc, len(items), 0])
        for item in items:
            bars[-1][2] += 1
            yield item

    monkeypatch.setattr(running, "tqdm", bar)
    argv = ["--data", csv, "--text", "text", "--label", "label", "--out", str(tmp_path / "run"), *TINY]
    run = Run.start(parse([*argv, "--method", method, "--rank", "4", "--samples", "5"]))
    run.adapt()
    assert bars == [["calibrating", 5, 5], ["initialising", 6, 6]]


def test_of_a_known_task_in_one_file_a_tenth_is_held_out(tmp_path):
    words = [f"a film {i}\t{i % 2}" for i in range(40)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *words]) + "\n")
    _, train_rows, dev = running.load_task(parse(["--task", "sst2", "--data", str(tmp_path / "train.tsv")]))
    texts = [{example.text for example in rows} for rows in (train_rows, dev)]
    assert [len(rows) for rows in texts] == [36, 4] and not texts[0] & texts[1]


def test_what_has_no_factors_and_cannot_be_merged_is_named_so(csv, tmp_path):
    for method in METHODS:
        run = Run.start(parse(["--data", csv, "--text", "text", "--label", "label", *TINY, "--method", method,
                               *["--rank", "4"] * (method == "tlora")]))  # fmt: skip
        run.adapt()
        layers = [run.model.get_submodule(name) for name in run.layers]
        assert (bool(layers) and all(map(fast.has_factors, layers))) == (method not in methods.NO_FACTORS), method
        if method in methods.NO_MERGE:
            with pytest.raises(ValueError, match="cannot be merged"):
                run.method.merge(run.model)
        elif layers:
            assert run.method.merge(run.model) == run.layers
