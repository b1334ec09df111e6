"""What is exported gives our logits in PEFT and in plain transformers."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from test_backbones import build_model, build_tokenizer  # noqa: E402
from test_faults import file_size_limit  # noqa: E402

import data  # noqa: E402
import export  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
from harness import backbones, exports, figures, folder, report  # noqa: E402
from harness.run import Run, base_fingerprint  # noqa: E402
from harness.run import build_model as build  # noqa: E402
from harness.settings import Settings, in_words, parse  # noqa: E402
from harness.stop import Stopped  # noqa: E402
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
    argv += "--max-length 32 --interval 1 --t0 0 --epochs 2 --lr 0.05 --no-figures --device cpu".split()
    argv += ["--out", str(tmp_path / "run"), "--export-peft", str(tmp_path / "a"), "--export-merged", str(tmp_path / "b")]
    assert train.main([*argv, "--max-length", "64"]) == 2
    assert "--max-length 64 is more than the backbone's 39 positions" in capsys.readouterr().err
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


def test_an_export_writes_over_nothing_but_an_earlier_export(folders, csv, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(folders["roberta"], base)
    argv = ["--backbone", str(base), "--data", csv, "--text", "text", "--label", "label", "--method", "lora"]
    argv += "--max-length 32 --epochs 1 --no-figures --device cpu".split()
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    for kind in ("--peft", "--merged"):
        for place, words in [
            ("run", "would be written over"),
            ("base", "would be written over"),
            ("mine", "holds README.md and no"),
        ]:
            before = {file: file.read_bytes() for file in (tmp_path / place).rglob("*") if file.is_file()}
            capsys.readouterr()
            assert export.main([str(tmp_path / "run"), kind, str(tmp_path / place)]) == 2
            err = capsys.readouterr().err
            assert words in err and err.count("\n") == 1
            assert before == {file: file.read_bytes() for file in (tmp_path / place).rglob("*") if file.is_file()} != {}
        for _ in range(2):
            assert export.main([str(tmp_path / "run"), kind, str(tmp_path / kind[2:])]) == 0
    # Where an adapter lies beside a merged checkpoint, transformers loads it on top.
    assert export.main([str(tmp_path / "run"), "--merged", str(tmp_path / "peft")]) == 2
    assert "peft holds an adapter, which would count once more" in capsys.readouterr().err
    assert train.main([*argv, "--out", str(tmp_path / "other"), "--export-merged", str(tmp_path / "peft")]) == 2
    assert not (tmp_path / "other").exists() and not (tmp_path / "peft" / "model.safetensors").exists()
    assert train.main([*argv, "--out", str(tmp_path / "other"), "--export-peft", str(tmp_path / "other" / "peft")]) == 2
    assert "peft lies within " in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert export.main([str(tmp_path / "run"), "--merged", str(tmp_path / "run" / "merged")]) == 2
    assert not (tmp_path / "run" / "merged").exists()
    assert train.main([*argv, "--out", str(tmp_path / "other"), "--export-peft", str(tmp_path / "mine")]) == 2
    assert "holds README.md and no README.md of an export" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("size", [100, 5_000])
def test_an_export_to_a_full_disk_is_one_line(folders, tmp_path, size):
    run = trained(folders["roberta"], "lora")
    for act in (exports.export_peft, exports.export_merged):
        with pytest.raises(OSError, match="File too large") as error, file_size_limit(size):
            act(run, str(tmp_path / "out"))
        assert str(error.value).count("\n") == 0 and "out" in in_words(error.value)


def test_mistakes_end_in_one_line(csv, tmp_path, capsys):
    argv = ["--data", csv, "--text", "text", "--label", "label", "--scratch", "--width", "16", "--heads", "2", "--depth", "1"]
    assert train.main([*argv, "--out", str(tmp_path / "run"), "--no-figures", "--epochs", "1"]) == 0
    capsys.readouterr()
    for out, words in [(tmp_path / "run", "has no --backbone"), ("nowhere", "is not a run folder")]:
        assert export.main([str(out), "--peft", "x"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    alone = [["--backbone", "x"], ["--task", "cola"], ["--labels", "a", "b"], ["--text", "t"], ["--max-length", "9"]]
    refused = [(["--peft", "x", *flags], f"{flags[0]} goes with --from-peft") for flags in alone]
    refused += [(["--from-peft", "x", "--task", "cola", "--text", "t"], "--text goes with --labels")]
    for flags, words in refused:
        with pytest.raises(SystemExit) as stop:
            export.main(["run", *flags])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        export.main(["run"])
    assert stop.value.code == 2 and "give --peft DIR or --merged DIR" in capsys.readouterr().err


# ------------------------------------------------------------------- folders that stand alone


def execute(folder, monkeypatch, capsys):
    """(names, what was printed) of the Python in a folder's README.md, run there."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    names = {}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names, capsys.readouterr().out.strip()


def check_cards(run, tmp_path, monkeypatch, capsys, answer):
    """Both folders of a run give its logits by their README's lines alone, and print the `answer` to the README's text."""
    with torch.no_grad():
        ours = logits(run.model, batch())
        exports.export_peft(run, tmp_path / "peft")
        assert "made by" not in (tmp_path / "peft" / "README.md").read_text().lower()  # an opened run knows no command
        exports.export_merged(run, tmp_path / "merged")
        for folder in (tmp_path / "peft", tmp_path / "merged"):
            names, printed = execute(folder, monkeypatch, capsys)
            model = getattr(names["model"], "base_model", None) if folder.name == "peft" else None
            model = model.model if model else names["model"]
            assert not model.training and (logits(model, batch()) - ours).abs().max() < BOUND * max(1, ours.abs().max())
            assert printed == answer or float(printed.strip("[]")) == pytest.approx(float(answer), abs=1e-4)
            for file in folder.iterdir():  # nothing but the base lies on this machine
                assert str(tmp_path) not in file.read_bytes().decode("latin1"), file
            assert names["tokenizer"]("w5")["input_ids"] == run.tokenizer.encode([("w5",)])[0]["input_ids"]
    return names["model"]


def write_csv(path, labels):
    rows = [f"w{3 + i % 30} w{4 + i % 7} w{9 + i % 5},{labels[i % len(labels)]}" for i in range(40)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return str(path)


def train_run(tmp_path, base, labels, *more):
    """A run of the real loop on rows with these labels; it leaves tmp_path/run."""
    argv = ["--backbone", base, "--data", write_csv(tmp_path / "rows.csv", labels), "--text", "text", "--label", "label"]
    argv += ["--max-length", "32", "--epochs", "4", "--lr", "0.05", "--head-lr", "0.1", "--no-figures", "--device", "cpu"]
    assert train.main([*argv, "--out", str(tmp_path / "run"), *more]) == 0
    return str(tmp_path / "run")


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """A base that brings a head of its own, for three classes."""
    place = str(tmp_path_factory.mktemp("three"))
    torch.manual_seed(0)
    config = build_model("roberta").config
    config.num_labels = 3
    transformers.RobertaForSequenceClassification(config).save_pretrained(place)
    build_tokenizer("roberta").save_pretrained(place)
    return place


@pytest.mark.parametrize("labels", [("no", "yes"), ('a "b"', "c", "d", "it's")], ids=["two", "four"])
@pytest.mark.parametrize("own_head", [False, True])
def test_the_lines_of_a_classifiers_card_give_its_logits_and_names(
    folders, three_classes, tmp_path, monkeypatch, capsys, labels, own_head
):
    base = three_classes if own_head else folders["roberta"]
    out = train_run(tmp_path, base, labels, "--method", "triadapt", "--interval", "1", "--t0", "0")
    assert export.main([out, "--peft", str(tmp_path / "a"), "--merged", str(tmp_path / "b")]) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| accuracy | {last['accuracy']:.4f} |" in card and f"| dev_loss | {last['dev_loss']:.4f} |" in card
    assert f"python train.py --backbone {base} --data rows.csv " in card
    assert " --out run --method triadapt " in card and "- data: rows.csv" in card
    assert f"- task: custom, classification ({', '.join(labels)})" in card
    yaml = pytest.importorskip("yaml")  # transformers needs it
    front = yaml.safe_load(card.split("---\n")[1])
    tags = ["triadapt", "lora"]
    assert front == {"base_model": base, "library_name": "peft", "pipeline_tag": "text-classification", "tags": tags}
    run = Run.open(out)
    (found,) = run.predict([data.Example("0", ("a text",))])["answers"]
    model = check_cards(run, tmp_path, monkeypatch, capsys, str([labels[found]]))
    assert model.config.id2label == dict(enumerate(labels))
    for options in [{"num_labels": len(labels)}] + [{}] * (len(labels) == 2 and not own_head):  # PEFT's own way, without names
        auto = peft.AutoPeftModelForSequenceClassification
        alone = auto.from_pretrained(tmp_path / "peft", ignore_mismatched_sizes=own_head, **options)
        with torch.no_grad():
            assert (logits(alone.eval().base_model.model, batch()) - logits(run.model, batch())).abs().max() < BOUND


def test_the_lines_of_a_card_give_token_types_only_where_the_run_did(folders, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folders["bert"], base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": ["input_ids", "attention_mask"]}))
    out = train_run(tmp_path, str(base), ("no", "yes"), "--method", "lora")
    run = Run.open(out)
    assert run.model.config.type_vocab_size > 1 and not run.tokenizer.typed
    assert "return_token_type_ids=False" in exports.ask(run)
    run.tokenizer.typed = True
    assert "return_token_type_ids=True" in exports.ask(run)


@pytest.mark.parametrize("method", ["task_tlora", "lora_ga", "corda"])
def test_a_base_in_bf16_is_calibrated_as_one_in_float32(folders, csv, tmp_path, method):
    spaces = []
    for dtype in ("float32", "bf16"):
        argv = ["--backbone", folders["roberta"], "--data", csv, "--text", "text", "--label", "label", "--method", method]
        run = Run.start(parse([*argv, "--dtype", dtype, "--max-length", "32", "--rank", "4", "--out", str(tmp_path / dtype)]))
        run.adapt()
        Q = run.model.get_submodule(run.layers[0]).factors()[1].detach().float()
        spaces.append(torch.linalg.qr(Q.T)[0])
    overlap = (spaces[0].T @ spaces[1]).square().sum().item() / spaces[0].shape[1]
    print("overlap of the spaces", overlap)
    assert overlap > 0.85 > 0.6 > spaces[0].shape[1] / len(spaces[0])  # the latter is that of two random ones


@pytest.mark.parametrize("family", ["roberta", "bert", "deberta-v3", "gpt2"])
def test_with_its_base_an_adapter_of_four_classes_stands_alone(folders, three_classes, tmp_path, monkeypatch, capsys, family):
    labels = ("a", "b", "c", "d")
    base = three_classes if family == "roberta" else folders[family]  # one that brings a head, for three
    out, place = train_run(tmp_path, base, labels, "--method", "triadapt", "--interval", "1", "--t0", "0"), tmp_path / "peft"
    assert export.main([out, "--peft", str(place), "--with-base"]) == 0
    run = Run.open(out)
    (found,) = run.predict([data.Example("0", ("a text",))])["answers"]
    alone = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(place))
    assert alone.config.id2label == dict(enumerate(labels))
    with torch.no_grad():
        theirs, ours = logits(alone.eval().base_model.model, batch()), logits(run.model, batch())
        with alone.disable_adapter():
            plain = logits(alone.base_model.model, batch())
    print((theirs - ours).abs().max(), (plain - ours).abs().max())
    assert (theirs - ours).abs().max() < BOUND < 0.01 < (plain - ours).abs().max()
    capsys.readouterr()
    _, printed = execute(place, monkeypatch, capsys)
    assert printed.strip() == str([labels[found]])
    assert export.main([str(tmp_path / "back"), "--from-peft", str(place)]) == 0  # the same base to `from_peft` as well
    with torch.no_grad():
        assert (logits(Run.open(str(tmp_path / "back")).model, batch()) - ours).abs().max() < BOUND
    with pytest.raises(SystemExit):
        export.main([out, "--merged", str(tmp_path / "m"), "--with-base"])


def test_the_lines_of_a_regressions_card_give_its_scores(folders, tmp_path, monkeypatch, capsys):
    run = Run.open(train_run(tmp_path, folders["bert"], ("0.5", "1.25", "3"), "--method", "lora"))
    (score,) = run.predict([data.Example("0", ("a text",))])["answers"]
    check_cards(run, tmp_path, monkeypatch, capsys, str(score))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_lines_of_a_decoders_card_classify_with_its_padding(folders, tmp_path, monkeypatch, capsys, family):
    run = trained(folders[family], "lora")
    run.settings.max_length = 32
    (found,) = run.predict([data.Example("0", ("a text",))])["answers"]
    padding = run.model.config.pad_token_id
    pair = [data.Example(str(i), (text,)) for i, text in enumerate(["w5", "w7 w8 w9"])]  # of two lengths, in one batch
    expected = torch.tensor(run.predict(pair)["probabilities"])
    assert check_cards(run, tmp_path, monkeypatch, capsys, str([LABELS[found]])).config.pad_token_id == padding
    for place in ("peft", "merged"):
        names, _ = execute(tmp_path / place, monkeypatch, capsys)
        rows = names["tokenizer"](["w5", "w7 w8 w9"], padding=True, return_token_type_ids=False, return_tensors="pt")
        with torch.no_grad():
            assert (names["model"](**rows).logits.softmax(-1) - expected).abs().max() < BOUND


def language_model(folder, task=data.TASKS["math"], dtype="float32"):
    """A run of a causal language model whose adapter matters."""
    torch.manual_seed(0)
    settings = Settings(method="lora", backbone=folder, max_length=32, dtype=dtype)
    run = Run(settings, task, *build(settings, task), max_new=5)
    run.fingerprint = base_fingerprint(run.model, settings)
    model = run.model
    run.layers = run.method.inject(model, default_targets(model), rank=2)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    model.eval()
    return run


CHAT = "{% for m in messages %}w7 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("template", ["math", "", "chat", "w5 {question}"])
def test_the_lines_of_a_language_models_card_write_what_the_run_writes(folders, tmp_path, monkeypatch, capsys, template, dtype):
    task = data.TASKS["math"] if template == "math" else dataclasses.replace(data.TASKS["sft"], template=template)
    run = language_model(folders["llama"], task, dtype)
    run.tokenizer.source.chat_template = CHAT if template == "chat" else None
    asked = ("a question",) if template == "math" else (("user", "a question"),)
    (text,) = run.predict([data.Example("0", asked)])["answers"]
    exports.export_peft(run, tmp_path / "peft")
    names, printed = execute(tmp_path / "peft", monkeypatch, capsys)
    assert text and printed == text and names["ids"] == run.features([data.Example("0", asked)])[0]["input_ids"]
    assert names["model"].base_model.model.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    exports.from_peft(tmp_path / "peft", Settings(method="lora", out=str(tmp_path / "new")))
    back = Run.open(str(tmp_path / "new"))
    assert back.task == task and (back.settings.dtype, back.max_new) == (dtype, 5)
    if template != "chat":  # which the base itself has not
        assert back.predict([data.Example("0", asked)])["answers"] == [text]
    if dtype == "float32" and template != "chat":
        check_cards(run, tmp_path, monkeypatch, capsys, text)


def test_the_lines_of_a_span_readers_card_run(folders, tmp_path, monkeypatch, capsys):
    run = trained(folders["roberta"], "lora", "span")
    exports.export_peft(run, tmp_path / "peft")
    names, _ = execute(tmp_path / "peft", monkeypatch, capsys)
    with torch.no_grad():
        assert (logits(names["model"].base_model.model, batch()) - logits(run.model, batch())).abs().max() < BOUND


def test_a_command_keeps_no_folder_but_the_bases():
    command = "python train.py --backbone '/a b/base' --data=/x/y/rows.csv --text a/b --out /x/run/ --lr 1e-3"
    assert exports.portable(command) == "python train.py --backbone '/a b/base' --data rows.csv --text a/b --out run --lr 1e-3"
    assert exports.portable("python export.py /home/me/run --from-peft /a/adapter") == "python export.py run --from-peft adapter"


# ------------------------------------------------------------------- and back


def test_a_lora_goes_to_peft_and_comes_back(folders, tmp_path, capsys):
    out, new = train_run(tmp_path, folders["roberta"], LABELS, "--method", "lora", "--rank", "3"), str(tmp_path / "new")
    assert export.main([out, "--peft", str(tmp_path / "a")]) == 0
    assert export.main([new, "--from-peft", str(tmp_path / "a"), "--peft", str(tmp_path / "b")]) == 0
    assert Run.open(new).settings.options == {"rank": 3, "alpha": 3.0, "dropout": 0.0}
    for page in (report, figures):  # such a run has no evaluation
        capsys.readouterr()
        assert page.main([new]) == 2 and "has no evaluation to show" in capsys.readouterr().err
    rows = data.load(Run.open(new).task, str(tmp_path / "rows.csv"), "test")
    before, after = (torch.tensor(Run.open(place).predict(rows)["probabilities"]) for place in (out, new))
    assert (before - after).abs().max() < BOUND
    plain = Run.open(new)
    for name in plain.layers:
        plain.model.get_submodule(name).B.data.zero_()
    assert (torch.tensor(plain.predict(rows)["probabilities"]) - after).abs().max() > 0.01
    said = []
    for place in (out, new):
        capsys.readouterr()
        assert predict.main([place, str(tmp_path / "rows.csv"), "--device", "cpu"]) == 0
        said.append([line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1] and len(said[0]) == 41
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < BOUND for key in a)


@pytest.mark.parametrize("family, name", [("gpt2", "triadapt"), ("bert", "triadapt"), ("t5", "pissa"), ("llama", "task_tlora")])
def test_any_export_but_doras_comes_back_as_lora(folders, tmp_path, family, name):
    run = trained(folders[family], name)
    run.settings.max_length, run.settings.out = 32, None
    exports.export_peft(run, tmp_path / "a")
    exports.from_peft(tmp_path / "a", Settings(method="lora", out=str(tmp_path / "new")))
    back = Run.open(str(tmp_path / "new"))
    with torch.no_grad():
        ours, theirs = logits(run.model, batch()), logits(back.model, batch())
    assert back.settings.max_length == 32 and back.task == run.task
    assert (ours - theirs).abs().max() < BOUND * max(1, ours.abs().max())


@pytest.fixture(scope="module")
def foreign(folders, tmp_path_factory):
    """(folder of an adapter that PEFT itself wrote, its logits)."""
    torch.manual_seed(3)
    base = plain(folders["roberta"])
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value", "output.dense"],
                             lora_dropout=0.1, rank_pattern={"query": 2},
                             alpha_pattern={"layer.1.attention.self.value": 3, "value": 5})  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.5)
    place = tmp_path_factory.mktemp("foreign")
    model.save_pretrained(place)
    with torch.no_grad():
        return place, logits(model.base_model.model, batch())


def test_a_foreign_adapter_comes_in_once_its_classes_are_said(folders, foreign, tmp_path, capsys):
    place, theirs = foreign
    new, asked = str(tmp_path / "new"), ["--from-peft", str(place), "--max-length", "32"]
    for more, words in [
        ([], "has no task.json, which an export from here has: give --task or --labels"),
        (["--labels", "a", "b"], "adapter and model do not fit"),
        (["--labels", "a", "a", "b"], "--labels are two different ones"),
        (["--task", "math"], "is an adapter for SEQ_CLS, task math is lm"),
    ]:
        assert export.main([new, *asked, *more]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and not (tmp_path / "new").exists()
    assert export.main([new, *asked, "--labels", *LABELS]) == 0
    run = Run.open(new)
    assert run.settings.options == {"rank": 4, "alpha": 8.0, "dropout": 0.1} and run.task.labels == LABELS
    with torch.no_grad():
        ours = logits(run.model, batch())
        assert (ours - theirs).abs().max() < BOUND * max(1, theirs.abs().max())
        for name in run.layers:
            run.model.get_submodule(name).B.zero_()
        assert (logits(run.model, batch()) - theirs).abs().max() > 0.05
    assert export.main([new, *asked, "--labels", *LABELS]) == 2
    assert "holds a run already" in capsys.readouterr().err


A = "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight"
WRONG = [
    ({"use_dora": True}, "use_dora is true: only a plain LoRA is read"),
    ({"use_rslora": True}, "use_rslora is true"),
    ({"bias": "all"}, 'bias is "all"'),
    ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
    ({"target_parameters": ["x"]}, "target_parameters is"),
    ({"a_key_of_a_later_peft": {"x": 1}}, "a_key_of_a_later_peft is"),
    ({"lora_alpha": "8"}, "'lora_alpha' is '8', expected float"),
    ({"alpha_pattern": {"nothing": 2}}, "alpha_pattern names nothing"),
    ({"base_model_name_or_path": None}, "names no base: give --backbone"),
    ({A: None}, "are no A (r, n) and B (m, r)"),
    ({A: torch.ones(3, 16)}, "are no A (r, n) and B (m, r)"),
    ({A: torch.full((2, 16), torch.nan)}, "holds NaN or infinity"),
    ({"base_model.model.roberta.pooler.dense.weight": torch.ones(16, 16)}, "is neither a LoRA matrix nor of the head"),
    ({f"base_model.model.nowhere.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, "target 'nowhere'"),
]


@pytest.mark.parametrize("change, words", WRONG)
def test_other_adapters_are_refused_in_one_line(foreign, tmp_path, capsys, change, words):
    tensors = load_file(foreign[0] / "adapter_model.safetensors")
    adapter = json.loads((foreign[0] / "adapter_config.json").read_text())
    for key, value in change.items():
        if key.startswith("base_model.model"):
            tensors[key] = value
        else:
            adapter[key] = value
    save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    argv = [str(tmp_path / "new"), "--from-peft", str(tmp_path), "--labels", *LABELS, "--max-length", "32"]
    assert export.main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_no_pickle_is_read_and_another_base_is_noticed(folders, three_classes, foreign, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text((foreign[0] / "adapter_config.json").read_text())
    torch.save(load_file(foreign[0] / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.bin")
    argv = [str(tmp_path / "new"), "--from-peft", str(tmp_path / "a"), "--labels", *LABELS, "--max-length", "32"]
    assert export.main(argv) == 2 and "does not exist, and no other format is read" in capsys.readouterr().err
    (tmp_path / "a" / "adapter_model.bin").rename(tmp_path / "a" / "adapter_model.safetensors")
    assert export.main(argv) == 2 and "cannot be read as safetensors" in capsys.readouterr().err
    out = train_run(tmp_path, folders["roberta"], LABELS, "--method", "lora", "--export-peft", str(tmp_path / "b"))
    argv = [str(tmp_path / "new"), "--from-peft", str(tmp_path / "b"), "--backbone", three_classes]
    capsys.readouterr()
    assert out and export.main(argv) == 2 and "was trained on another base" in capsys.readouterr().err
    assert export.main([*argv, "--force"]) == 0


def test_another_backbone_of_the_same_shape_is_noticed_by_predict_resume_and_export(folders, tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(folders["roberta"], base)
    save = folder.save

    def once(*parts):
        save(*parts)
        raise Stopped(130)

    out = train_run(tmp_path, str(base), LABELS, "--method", "lora")
    rows = str(tmp_path / "rows.csv")
    argv = ["--backbone", str(base), "--data", rows, "--text", "text", "--label", "label", "--max-length", "32", "--epochs", "2"]
    argv += ["--no-figures", "--device", "cpu", "--method", "lora", "--save-every", "1", "--out", str(tmp_path / "stopped")]
    monkeypatch.setattr(folder, "save", once)
    assert train.main(argv) == 130
    monkeypatch.undo()
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] = weights[name] * (1 + 1e-6)  # the least that one could miss
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    for command, words in (
        (lambda: predict.main([out, rows]), "was trained on another base"),
        (lambda: predict.main([str(tmp_path / "stopped"), rows]), "was trained on another base"),
        (lambda: export.main([out, "--merged", str(tmp_path / "merged")]), "was trained on another base"),
        (lambda: train.main([*argv, "--resume"]), "holds another run (base "),
    ):
        assert command() == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert predict.main([out, rows, "--force"]) == 0
