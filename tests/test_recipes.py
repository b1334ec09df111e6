"""recipes/: every file says what the paper's table says, typed here a second time, and trains a small model of its family."""

import json
import os
import re
import shlex

import pytest
from short import TINY
from short import rows_of as rows_of_run

import data
import train
from harness import folder, methods
from harness.settings import parse
from reading import files

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "recipes")
FILES = sorted(name[:-4] for name in os.listdir(FOLDER))

# Rows of GLUE's and SQuAD's training files: by them a number of warm-up steps is a share of the run.
ROWS = {
    "mnli": 392_702, "sst2": 67_349, "cola": 8_551, "qqp": 363_846, "qnli": 104_743, "rte": 2_490, "mrpc": 3_668, "stsb": 5_749,
    "squad": 130_319,
}  # fmt: skip
ROBERTA, LARGE = "FacebookAI/roberta-base", "FacebookAI/roberta-large-mnli"
DEBERTA, T5 = "microsoft/deberta-v3-base", "google-t5/t5-base"
LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "o_proj", "gate_proj"]

# The columns of TriAdaptLoRA's Tables V and VI: batch, epochs, rate, increment, decay, warm-up steps, alpha, dropout, length,
# interval, orthogonality. In all, growth begins after the warm-up (t0 is None) and the reference rank is 8. The "default" dropout
# of three columns is PEFT's, 0.
TABLE_V = {
    "mnli": (32, 7, 5e-4, 1, 0, 1000, 16, 0, 256, 1000, 0.1),
    "sst2": (32, 24, 8e-4, 4, 0.01, 1000, 16, 0.3, 128, 1000, 0.1),
    "cola": (32, 25, 1e-3, 4, 0, 100, 32, 0, 64, 100, 0.1),
    "qqp": (32, 7, 6e-4, 4, 0.01, 1000, 16, 0, 320, 1000, 0.1),
    "qnli": (32, 5, 9e-4, 4, 0.01, 500, 32, 0, 512, 500, 0.1),
    "rte": (32, 50, 1.2e-3, 4, 0.01, 100, 32, 0, 320, 100, 0.3),
    "mrpc": (32, 30, 1e-3, 4, 0.01, 100, 32, 0.3, 320, 100, 0.1),
    "stsb": (32, 25, 2.2e-3, 4, 0.1, 100, 32, 0, 128, 100, 0.3),
    "squad": (16, 14, 1e-3, 1, 0, 1000, 16, 0.1, 384, 1000, 0.1),
}


def triadapt(task):
    batch, epochs, lr, delta, decay, steps, alpha, dropout, length, interval, orth = TABLE_V[task]
    return {
        "method": "triadapt", "backbone": DEBERTA, "batch_size": batch, "epochs": epochs, "lr": lr, "head_lr": lr,
        "schedule": "linear", "weight_decay": decay, "warmup_steps": steps, "max_length": length, "targets": None,
        "options": {
            "rank": 1, "rank_ref": 8, "alpha": alpha, "dropout": dropout, "delta": delta, "interval": interval, "t0": None,
            "mode": "linear", "orth": orth, "orth_form": "mean", "normalise": "r", "preserve": False,
            "start": "gaussian",
        },
    }  # fmt: skip


def plus(backbone, rank, lr, ratio):
    return {
        "method": "tlora_plus", "backbone": backbone, "batch_size": 16, "epochs": 30, "lr": lr, "head_lr": lr,
        "schedule": "linear", "weight_decay": 0.1, "warmup": 0.1, "max_length": 128, "targets": None,
        "options": {"rank": rank, "rank1": 0, "rank2": 0, "ratio": ratio, "train": "abc", "init_b": "zero"},
    }  # fmt: skip


def task_tlora(backbone, rank, lr, schedule, batch, epochs, targets, **more):
    """Tables 8, 9 and 10; `batch` counts the rows of one optimizer step."""
    options = {
        "rank": rank, "alpha": rank, "dropout": 0, "samples": 32, "init": "wc", "adapt_rank": True, "adapt_scale": True,
        "train_a": False, "center": False,
    }  # fmt: skip
    return {
        "method": "task_tlora", "backbone": backbone, "rows_per_step": batch, "epochs": epochs, "lr": lr, "schedule": schedule,
        "warmup": 0.03, "weight_decay": 0, "seed": 42, "targets": targets, "options": options, **more,
    }  # fmt: skip


def table_8():
    return task_tlora(T5, 32, 3e-4, "cosine", 32, 3, ["q", "k", "v", "o", "wi", "wo"], head_lr=3e-4, max_length=128)


def table_10(backbone):
    return task_tlora(backbone, 128, 2e-5, "cosine", 128, 1, LLAMA, max_length=512, rows=100_000, score="loss")


PAPERS = {  # file: (task, what the settings have to be)
    "tlora-roberta-large-mrpc": ("mrpc", {
        "method": "tlora", "backbone": LARGE, "batch_size": 32, "epochs": 30, "lr": 1e-3, "schedule": "linear", "warmup": 0.06,
        "weight_decay": 0.01, "max_length": 512, "freeze_head": True, "targets": ["query", "value"], "clip": 0,
        "options": {"rank": 32, "dropout": 0.5},
    }),
    "tlora-plus-roberta-large-mrpc": ("mrpc", plus(LARGE, 16, 1e-4, "1")),
    "tlora-plus-ratio-roberta-base-cola": ("cola", plus(ROBERTA, 8, 5e-5, "4")),
    **{f"task-tlora-t5-{task}": (task, table_8()) for task in ("mrpc", "cola", "rte", "sst2", "qnli")},
    "task-tlora-llama2-7b-commonsense": ("sft", task_tlora(
        "meta-llama/Llama-2-7b-hf", 32, 1e-4, "linear", 32, 1, LLAMA, max_length=256, rows=None, score="loss")),
    **{f"task-tlora-llama2-7b-{kind}": ("sft", table_10("meta-llama/Llama-2-7b-hf")) for kind in ("math", "code", "chat")},
    "task-tlora-mistral-7b-math": ("sft", table_10("mistralai/Mistral-7B-v0.1")),
    "task-tlora-llama2-13b-math": ("sft", table_10("meta-llama/Llama-2-13b-hf")),
    "task-tlora-llama3-8b-math": ("sft", table_10("meta-llama/Meta-Llama-3-8B")),
    **{f"triadapt-deberta-{task}": (task, triadapt(task)) for task in TABLE_V},
}  # fmt: skip
# The rest is the same in all: AdamW's betas, the clipping of Hugging Face's Trainer, all rows, and one batch a step unless said.
SAME = {
    "clip": 1.0, "betas": [0.9, 0.999], "seed": 0, "freeze_head": False, "rows": None, "exclude": None, "max_steps": None,
}  # fmt: skip


def recipe(name):
    return "@" + os.path.join(FOLDER, name + ".txt")


def test_every_file_has_its_row_here_and_in_the_docs():
    assert FILES == sorted(PAPERS)
    with open(os.path.join(ROOT, "docs", "recipes.md"), encoding="utf-8") as f:
        page = f.read()
    listed = re.findall(r"^\| \[([\w-]+)\.txt\]\(\.\./recipes/\1\.txt\) \|", page, re.M)
    assert sorted(listed) == FILES
    for command in re.findall(r"^python train\.py (.*)$", page, re.M):
        words = shlex.split(command)
        if not any(word.startswith("@") for word in words):
            continue
        parse([word.replace("@", "@" + ROOT + "/") for word in words])


@pytest.mark.parametrize("name", PAPERS)
def test_settings_are_the_papers_numbers(name):
    settings = parse([recipe(name), "--data", "somewhere"])
    got = vars(settings) | {"rows_per_step": settings.batch_size * settings.accumulate}
    task, want = PAPERS[name]
    want = SAME | {"task": task} | ({} if "rows_per_step" in want else {"rows_per_step": want["batch_size"]}) | want
    if "warmup_steps" in want:
        total = settings.epochs * -(-ROWS[task] // settings.batch_size)
        got["warmup_steps"] = round(settings.warmup * total)  # as Run.warmup_steps
    for key, value in want.items():
        if key == "options":
            assert {option: got["options"][option] for option in value} == value
            assert value.keys() >= methods.options(settings.method).keys() - {"fixed_k", "svd"}
        else:
            assert got[key] == value, key


@pytest.mark.parametrize("name", PAPERS)
def test_files_say_what_they_are_of_and_name_no_data(name):
    with open(recipe(name)[1:], encoding="utf-8") as f:
        text = f.read()
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("--")]
    assert re.match(r"# [\w -]*TLoRA\+?, arXiv \d{4}\.\d{5}|# TriAdaptLoRA, arXiv 2501\.08008, Table VI?, ", text)
    assert len(set(flags)) == len(flags) and "--data" not in flags and "--out" not in flags
    assert all(not line or line[0] == "#" or line.startswith("--") for line in text.splitlines())
    assert "Left open" in text and max(map(len, text.splitlines())) <= 130


# ------------------------------------------------------------------------------ @FILE


def test_flags_behind_the_file_win_and_those_before_it_do_not(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("# a comment\n--method lora --rank 3   # two on a line\n\n--lr 2e-3\n--targets 'a b' c\n")
    assert parse([f"@{path}"]).options["rank"] == 3
    assert parse([f"@{path}"]).targets == ["a b", "c"]
    assert parse([f"@{path}", "--lr", "0.5"]).lr == 0.5
    assert parse(["--lr", "0.5", f"@{path}"]).lr == 2e-3
    rte = recipe("triadapt-deberta-rte")
    settings = parse([rte, "--data", "x", "--mode", "nonlinear", "--backbone", "other/name"])
    assert settings.options["mode"] == "nonlinear" and settings.backbone == "other/name" and settings.options["orth"] == 0.3


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "No such file or directory: '"),
        ("--metod lora", "unrecognized arguments: --metod lora"),
        ("--lr fast", "argument --lr: invalid number value: 'fast'"),
        ("--method lora\n--orth 1", "--orth is no option of lora"),
        ("--out 'a b\n--lr 1", 'No closing quotation in the line "--out \'a b" of an @FILE'),
        ("@again.txt", "'@again.txt' stands in an @FILE, which names no other"),
    ],
)
def test_a_missing_file_or_a_bad_flag_in_it_ends_in_one_line_and_exit_code_2(text, words, tmp_path, capsys):
    path = tmp_path / "flags.txt"
    if text is not None:
        path.write_text(text)
    for argument in [f"@{path}"] + ["@", f"@{tmp_path}"] * (text is None):
        with pytest.raises(SystemExit) as stop:
            train.main([argument])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        assert words in err or argument != f"@{path}"


def test_a_run_from_a_file_is_resumed_by_the_same_command(csv, tmp_path, monkeypatch):
    path, out = tmp_path / "flags.txt", tmp_path / "run"
    path.write_text("--method lora --lr 1e-3 --max-steps 4 --eval-every 2\n" + " ".join(TINY))
    argv = [f"@{path}", "--data", csv, "--text", "text", "--label", "label", "--out", str(out)]

    def stopped(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "finish", stopped)
        assert train.main(argv) == 2
    assert train.main([*argv, "--lr", "2e-3", "--resume"]) == 2  # another run
    assert train.main([*argv, "--resume"]) == 0
    with open(out / "config.json") as f:
        config = json.load(f)
    assert config["settings"]["lr"] == 1e-3 and config["finished"] and f"@{path}" in config["command"]
    assert [row["step"] for row in rows_of_run(out)] == [2, 4]


# ------------------------------------------------------------------------------ rates


def test_every_method_has_a_rate_for_real_checkpoints_and_the_generated_tasks_keep_theirs():
    assert methods.BACKBONE_RATES.keys() == methods.METHODS.keys()
    for method, (rate, source) in methods.BACKBONE_RATES.items():
        assert parse(["--method", method]).lr == methods.METHODS[method][2]
        assert parse(["--method", method, "--backbone", "x"]).lr == rate <= methods.METHODS[method][2]
        assert parse(["--method", method, "--backbone", "x", "--lr", "0.5"]).lr == 0.5
        assert source and "\n" not in source


@pytest.mark.parametrize("flags, words, noted", [
    (["--lr", "0.5"], "lr 0.5 (as asked; head 0.001)", True),
    ([], "lr 0.00562 (default of the generated tasks; head 0.001)", True),
    (TINY, "default of the generated tasks", False),
])  # fmt: skip
def test_the_run_says_where_its_rate_is_from_and_what_the_tiny_bases_do_not_know(flags, words, noted, csv, tmp_path, capsys):
    argv = ["--method", "lora", "--data", csv, "--text", "text", "--label", "label", "--out", str(tmp_path / "run")]
    assert train.main([*argv, "--max-steps", "1", "--threads", "1", "--device", "cpu", "--no-figures", *flags]) == 0
    printed = capsys.readouterr().out
    assert words in printed
    assert ("the tiny bases know their generated world only: on real text use --backbone" in printed) == noted


# ------------------------------------------------------------------------------ three steps of each


FAMILY = {ROBERTA: "roberta", LARGE: "roberta", DEBERTA: "deberta-v3", T5: "t5"}
WIDER = {  # 32 wide, so that TLoRA's rank of 32 fits; with as many places as the longest row of a recipe
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48},
    "": {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 520},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> a folder with random weights and a tokenizer of the families in tests/test_backbones.py."""
    transformers = pytest.importorskip("transformers")
    import torch
    from test_backbones import FAMILIES, build_tokenizer

    folders = {}

    def get(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            name, config = FAMILIES[family][:2]
            torch.manual_seed(0)
            model_class = getattr(transformers, name)
            model_class(model_class.config_class(**config | WIDER.get(family, WIDER[""]))).save_pretrained(folders[family])
            build_tokenizer(family).save_pretrained(folders[family])
        return folders[family]

    return get


def rows_of(task, folder):
    """A few rows in the task's official layout, or a file of instructions; what --data names."""
    texts = [(f"w{i} w{i + 1} w{i + 2}", f"w{i + 1} w{i + 3}") for i in range(3, 33)]
    if task == "sft":
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps({"query": a, "response": b}) + "\n" for a, b in texts))
        return path
    task = data.TASKS[task]
    for split, some in (("train", texts[:24]), ("dev", texts[24:])):
        labels = [i / 8 if task.kind == "regression" else i % max(len(task.labels), 1) for i in range(len(some))]
        if task.kind == "span":
            some, labels = [(b, a) for a, b in some], [[(a.split()[0], 0)] for a, _ in some]
        rows = [data.Example(str(i), text if task.pair else text[:1], label) for i, (text, label) in enumerate(zip(some, labels))]
        files.write_split(task, rows, folder, split)
    return folder


@pytest.mark.filterwarnings("ignore:.*rank")  # 128 is more than the small model has: the allocation caps and says so
@pytest.mark.parametrize("name", PAPERS)
def test_three_steps_on_a_small_model_of_its_family(name, checkpoint, tmp_path, capsys):
    task, want = PAPERS[name]
    family = FAMILY.get(want["backbone"], "mistral" if "istral" in want["backbone"] else "llama")
    argv = [recipe(name), "--data", str(rows_of(task, tmp_path)), "--backbone", str(checkpoint(family))]
    few = ["--batch-size", "4"] + ["--accumulate", "2"] * (task == "sft")  # else the few rows are one step
    few += ["--interval", "1"] * (want["method"] == "triadapt")  # so that it grows in them
    code = train.main([*argv, *few, "--epochs", "9", "--max-steps", "3", "--out", str(tmp_path / "run"), "--threads", "1",
                       "--device", "cpu", "--no-figures"])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "steps   3 of " in printed.out
    with open(tmp_path / "run" / "config.json") as f:
        config = json.load(f)
    assert config["finished"]
    same = {option: value for option, value in want["options"].items() if option not in ("t0", "interval")}
    assert config["settings"]["options"].items() >= same.items()
    assert (rows_of_run(tmp_path / "run")[-1].get("rank_total", 0) > 12) == (want["method"] in ("triadapt", "task_tlora"))
    of_a_block = {"tlora": 2, "tlora_plus": 6, "triadapt": 6}  # query and value; all six
    if want["method"] in of_a_block:
        assert len(config["layers"]) == 2 * of_a_block[want["method"]]
    else:  # a layer of importance 0 gets no rank: T5's first cross attention on such a model, for one
        assert {layer.rpartition(".")[2] for layer in config["layers"]} <= set(want["targets"])
