"""What is exported gives our logits in PEFT and in plain transformers."""

import json

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from test_backbones import build_model, build_tokenizer  # noqa: E402

import data  # noqa: E402
import export  # noqa: E402
import train  # noqa: E402
from harness import backbones, exports  # noqa: E402
from harness.run import Run  # noqa: E402
from harness.settings import Settings  # noqa: E402
from model import default_targets, head_modules, logits  # noqa: E402

METHODS = ["lora", "triadapt", "tlora", "tlora_plus", "task_tlora", "dora", "pissa", "adalora"]
FAMILIES = ["roberta", "llama", "t5", "gpt2", "deberta-v3", "bert"]
LABELS = ("no", "maybe", "yes")
BOUND = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family] = str(tmp_path_factory.mktemp(family))
        build_model(family).save_pretrained(made[family])
        build_tokenizer(family).save_pretrained(made[family])
    return made


def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 40, (5, 7))
    ids[:, -1] = 2  # T5 classifies at its end of text
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def trained(folder, name, kind="classification"):
    """A run of a method after four steps."""
    torch.manual_seed(0)
    model, tokenizer = backbones.load(folder, kind, LABELS)
    run = Run(Settings(method=name, backbone=folder), data.Task("custom", kind, LABELS), model, data.Tokenizer(tokenizer), folder)
    method, targets = run.method, default_targets(model)
    inputs, labels = batch(), torch.tensor([0, 1, 2, 0, 1])

    def loss(m, rows=slice(None)):
        rows = {k: v[rows] for k, v in inputs.items()}
        y = logits(m, rows)
        return F.cross_entropy(y, labels[: len(y)]) if kind == "classification" else y.square().mean()

    options = {"rank": 2, **({"rank_target": 1} if name == "adalora" else {})}
    if name == "task_tlora":
        plan = method.calibrate(model, targets, [slice(0, 1), slice(1, 2)], loss, rank=2)
        options["plan"] = plan
    run.layers = method.inject(model, targets, **options)
    run.train_head()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        if name == "triadapt":  # ranks of several sizes
            method.after_step(model, optimizer, 100 + 100 * step, 1000)
    model.eval()
    return run


def plain(folder, kind="classification"):
    """The checkpoint as its users load it, with the head for three classes."""
    classes = {"classification": "AutoModelForSequenceClassification", "lm": "AutoModelForCausalLM"}
    auto = getattr(transformers, classes[kind])
    options = {"num_labels": 3} if kind == "classification" else {}
    return auto.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_peft_and_plain_transformers_give_our_logits(folders, tmp_path, family, name):
    if family in ("deberta-v3", "bert") and name not in ("lora", "triadapt", "dora"):
        name = "lora"  # two methods are enough for these two
    run = trained(folders[family], name)
    model = run.model
    with torch.no_grad():
        ours = logits(model, batch())
        exports.export_peft(run, tmp_path / "peft")
        base = plain(folders[family])
        base.config.pad_token_id = model.config.pad_token_id
        untouched = logits(base, batch())
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        in_peft = logits(theirs.base_model.model, batch())
        merged = logits(theirs.merge_and_unload(), batch())
        assert (ours - untouched).abs().max() > 0.05
        exports.export_merged(run, tmp_path / "merged")
        our_merged = logits(model, batch()) if family != "gpt2" else ours
        loaded = plain(tmp_path / "merged")
        from_disk = logits(loaded, batch())
    size = max(1.0, ours.abs().max().item())  # float32 rounds a logit of 20 by 2e-6 at every step
    errors = [(a - b).abs().max().item() / size for a, b in ((in_peft, ours), (merged, our_merged), (from_disk, ours))]
    print("errors in PEFT, merged by PEFT, merged by us and loaded:", errors)
    assert max(errors) < BOUND
    assert len(loaded.config.id2label) == 3 and loaded.config.id2label[2] == "yes"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("w5 w6")["input_ids"]
    with open(tmp_path / "peft" / "adapter_config.json") as f:
        kept = json.load(f)
    assert kept["modules_to_save"] == head_modules(model) and kept["fan_in_fan_out"] == (family == "gpt2")
    if name == "triadapt":
        assert kept["rank_pattern"] == kept["alpha_pattern"] and kept["rank_pattern"], "ranks differ"


def test_a_causal_language_model_goes_out_with_its_embedding_tied(folders, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = backbones.load(folders["llama"], "lm")
    run = Run(Settings(method="lora", backbone=folders["llama"]), data.TASKS["math"], model, data.Tokenizer(tokenizer), "")
    run.layers = run.method.inject(model, default_targets(model), rank=2)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        ours = logits(model.eval(), batch())
        exports.export_peft(run, tmp_path / "peft")
        base = plain(folders["llama"], "lm")
        assert (logits(base, batch()) - ours).abs().max() > 0.05
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        assert (logits(theirs.base_model.model, batch()) - ours).abs().max() < BOUND
        exports.export_merged(run, tmp_path / "merged")
        loaded = plain(tmp_path / "merged", "lm")
        assert (logits(loaded, batch()) - ours).abs().max() < BOUND
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_method_without_factors_goes_out_merged_only(folders, tmp_path):
    run = trained(folders["roberta"], "lora")
    run.layers, run.settings.method = [], "full"
    with pytest.raises(ValueError, match="method full has no low-rank update"):
        exports.export_peft(run, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.fixture
def csv(tmp_path):
    rows = ["text,label"] + [f"w{3 + i % 30} w{4 + i % 7},{'yes' if i % 2 else 'no'}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    return str(tmp_path / "rows.csv")


def test_from_the_command_line_while_training_and_afterwards(folders, csv, tmp_path, capsys):
    argv = ["--backbone", folders["roberta"], "--data", csv, "--text", "text", "--label", "label", "--method", "triadapt"]
    argv += ["--max-length", "32", "--interval", "1", "--t0", "0", "--epochs", "2", "--lr", "0.05", "--no-figures", "--device", "cpu"]
    argv += ["--out", str(tmp_path / "run"), "--export-peft", str(tmp_path / "a"), "--export-merged", str(tmp_path / "b")]
    assert train.main([*argv, "--max-length", "64"]) == 2
    assert "--max-length 64 is more than the backbone's 38 positions" in capsys.readouterr().err
    assert train.main(argv) == 0
    assert "PEFT adapter in" in capsys.readouterr().out
    assert export.main([str(tmp_path / "run"), "--peft", str(tmp_path / "c"), "--merged", str(tmp_path / "d")]) == 0
    for name in ("a", "c"):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folders["roberta"], num_labels=2)
        model = peft.PeftModel.from_pretrained(base, tmp_path / name).eval()
        with torch.no_grad():
            a = logits(model.base_model.model, batch())
            b = logits(Run.open(str(tmp_path / "run")).model, batch())
        assert (a - b).abs().max() < BOUND
    for name in ("b", "d"):
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert (logits(loaded, batch()) - b).abs().max() < BOUND
        assert loaded.config.id2label == {0: "no", 1: "yes"}


def test_mistakes_end_in_one_line(csv, tmp_path, capsys):
    argv = ["--data", csv, "--text", "text", "--label", "label", "--scratch", "--width", "16", "--heads", "2", "--depth", "1"]
    assert train.main([*argv, "--out", str(tmp_path / "run"), "--no-figures", "--epochs", "1"]) == 0
    capsys.readouterr()
    for args, words in [([str(tmp_path / "run"), "--peft", "x"], "has no --backbone"), (["nowhere", "--peft", "x"], "is not a run folder")]:
        assert export.main(args) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        export.main(["run"])
    assert stop.value.code == 2 and "give --peft DIR or --merged DIR" in capsys.readouterr().err
