"""data.py: features, batches, masking, generated tasks, command line."""

import random
import string
import types
from collections import Counter

import pytest
import torch

import data
from data import TASKS, Example
from generated import suite
from reading import files

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
TEXTS = [
    "the cat sees the dog .",
    "two big dogs bought seven apples in the old museum yesterday .",
    "the film was long , dull and without charm .",
    "who sold the small red boat to the farmer ?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS * 3, 350)


# ------------------------------------------------------------------ features and batches


def test_features_carry_labels_and_at_most_max_length_tokens(tokenizer):
    rng = random.Random(0)
    for name in [*GLUE, "squad", "math", "mlm", "clm"]:
        task = TASKS[name]
        pool = string.ascii_lowercase + " " * 9
        examples = [
            Example("0", tuple("".join(rng.choices(pool, k=rng.randrange(150))) for _ in range(1 + task.pair))) for _ in range(20)
        ]
        for e in examples:
            e.label = {"classification": 1, "regression": 2.5, "span": ()}.get(
                task.kind, "x " * rng.randrange(60) if name == "math" else None
            )
        rows = data.features(task, examples, tokenizer, 24)
        assert len(rows) == 20 and max(len(row["input_ids"]) for row in rows) == 24
        for row in rows:
            assert len(row["token_type_ids"]) == len(row["input_ids"])
        if task.kind in ("classification", "regression"):
            assert [row["labels"] for row in rows] == [e.label for e in examples]
    with pytest.raises(ValueError, match="max_length 15 is too short: 16 at least"):
        data.features(TASKS["cola"], examples, tokenizer, 15)


def test_every_row_comes_once_and_the_order_depends_on_the_seed_alone(tokenizer):
    rng = random.Random(1)
    for n, size in [(1, 4), (3, 4), (8, 4), (37, 4), (600, 8)]:
        examples = [Example(str(i), ("the cat " * rng.randrange(1, 30),), i % 2) for i in range(n)]
        rows = data.features(TASKS["cola"], examples, tokenizer, 64)

        def order(seed):
            return [batch["index"].tolist() for batch in data.batches(rows, TASKS["cola"], size, 0, seed)]

        for seed in (None, 0, 1):
            sizes = Counter(map(len, order(seed)))
            assert sorted(sum(order(seed), [])) == list(range(n))
            assert sizes == Counter([size] * (n // size) + [n % size] * (n % size > 0))
        assert order(3) == order(3) and order(None) == order(None)
        if n > 4:
            assert order(3) != order(4) and order(3) != order(None)


def test_batches_group_similar_lengths(tokenizer):
    rng = random.Random(2)
    examples = [Example(str(i), ("the cat " * rng.randrange(1, 30),), 0) for i in range(1000)]
    rows = data.features(TASKS["cola"], examples, tokenizer, 64)
    real = sum(len(row["input_ids"]) for row in rows)
    plain = sum(max(len(row["input_ids"]) for row in rows[i : i + 8]) * 8 for i in range(0, 1000, 8))
    padded = {seed: sum(b["input_ids"].numel() for b in data.batches(rows, TASKS["cola"], 8, 0, seed)) for seed in (None, 0)}
    print("padding per token: in file order", plain / real - 1, {s: n / real - 1 for s, n in padded.items()})
    assert padded[None] < 1.01 * real and padded[0] < 1.05 * real and plain > 1.4 * real
    lengths = [b["input_ids"].shape[1] for b in data.batches(rows, TASKS["cola"], 8, 0)]
    assert lengths == sorted(lengths)
    lengths = [b["input_ids"].shape[1] for b in data.batches(rows, TASKS["cola"], 8, 0, 0)]
    rises = sum(a < b for a, b in zip(lengths, lengths[1:]))
    falls = sum(a > b for a, b in zip(lengths, lengths[1:]))
    print("batches longer, shorter than the one before:", rises, falls)
    assert min(rises, falls) > 40


def test_batches_are_padded_tensors_of_the_right_kinds(tokenizer):
    examples = {
        "cola": [Example("0", ("the cat",), 1), Example("1", ("the cat sees the dog",), 0)],
        "stsb": [Example("0", ("the cat", "the dog"), 2.5), Example("1", ("the cat sees the dog", "a"), 0.0)],
        "squad": [
            Example("0", ("who ?", "the cat"), ()),
            Example("1", ("who sold ?", "the cat sees the dog"), (("dog", 17),)),
        ],
        "math": [Example("0", ("who ?",), "a #### 1"), Example("1", ("who sold ?",), "the cat #### 2")],
        "clm": [Example("0", ("the cat",)), Example("1", ("the cat", "sees the dog"))],
        "mlm": [Example("0", ("the cat",)), Example("1", ("the cat", "sees the dog"))],
    }
    for name, pair in examples.items():
        rows = data.features(TASKS[name], pair, tokenizer, 64)
        (batch,) = data.batches(rows, TASKS[name], 2, 0)
        width = max(len(row["input_ids"]) for row in rows)
        for b, i in enumerate(batch["index"].tolist()):
            n = len(rows[i]["input_ids"])
            if name != "mlm":
                assert batch["input_ids"][b].tolist() == rows[i]["input_ids"] + [0] * (width - n)
            assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (width - n)
            assert batch["token_type_ids"][b].tolist() == rows[i]["token_type_ids"] + [0] * (width - n)
        assert {batch[k].dtype for k in ("input_ids", "attention_mask", "token_type_ids", "index")} == {torch.int64}
        shape = {"cola": (2,), "stsb": (2,), "squad": (2, 2)}.get(name, (2, width))
        assert tuple(batch["labels"].shape) == shape
        assert batch["labels"].dtype == (torch.float32 if name == "stsb" else torch.int64)
        if name in ("cola", "stsb"):
            assert batch["labels"].tolist() == [pair[i].label for i in batch["index"].tolist()]
        if name not in ("clm", "mlm"):
            pair[0].label = None
            rows = data.features(TASKS[name], pair, tokenizer, 64)
            assert "labels" not in next(data.batches(rows, TASKS[name], 2, 0))


def test_next_token_labels_are_aligned_with_the_logits(tokenizer):
    rows = data.features(TASKS["clm"], [Example("0", ("the cat", "sees the dog"))], tokenizer, 64)
    ids = rows[0]["input_ids"]
    assert rows[0]["labels"] == ids[1:] + [-100] and ids[-1] == tokenizer.sep_id
    example = Example("0", ("who sold the boat ?",), "the farmer sold it \n#### 1,001")
    row = data.features(TASKS["math"], [example], tokenizer, 64)[0]
    ids, labels, start = row["input_ids"], row["labels"], row["prompt"]
    assert ids[:start] == tokenizer.encode([example.text])[0]["input_ids"]
    assert labels == [-100] * (start - 1) + ids[start:] + [-100]
    assert tokenizer.decode(ids[start:]) == example.label and ids[-1] == tokenizer.sep_id
    unlabelled = data.features(TASKS["math"], [Example("0", example.text)], tokenizer, 64)[0]
    assert unlabelled["input_ids"] == ids[:start] and unlabelled["labels"] is None
    long = Example("0", ("the cat " * 40,), "the dog " * 40 + "#### 2")
    row = data.features(TASKS["math"], [long], tokenizer, 32)[0]
    assert (row["prompt"], len(row["input_ids"])) == (16, 32)
    assert row["input_ids"][15] == tokenizer.sep_id and row["input_ids"][-1] != tokenizer.sep_id


def test_salient_words_are_masked_alone_in_their_share_of_the_rows(tokenizer):
    texts = ("the cat sees two big apples", "so the apples are seen by the cat")
    examples = [Example(str(i), texts, (("so", 0),)) for i in range(2000)]
    rows = data.features(TASKS["mlm"], examples, tokenizer, 64)
    salient = torch.tensor(rows[0]["salient"])
    assert tokenizer.decode(torch.tensor(rows[0]["input_ids"])[salient]) == "so"
    alone = 0
    for batch in data.batches(rows, TASKS["mlm"], 50, 0, 7):
        chosen = batch["labels"] != data.IGNORED
        alone += int((chosen == salient).all(1).sum())
    print(alone / 2000)
    assert abs(alone / 2000 - data.SALIENT) < 0.045  # four standard deviations
    assert not any(data.features(TASKS["mlm"], [Example("0", texts)], tokenizer, 64)[0]["salient"])


def test_masking_takes_20_percent_of_each_row_and_never_a_special_token(tokenizer):
    rng = random.Random(3)
    examples = [Example(str(i), ("the cat sees two big apples " * rng.randrange(1, 6),) * (1 + i % 2)) for i in range(500)]
    examples += [Example("short", ("the",)), Example("empty", ("",))]
    rows = data.features(TASKS["mlm"], examples, tokenizer, 64)
    fates = Counter()
    for batch in data.batches(rows, TASKS["mlm"], 16, 0, 7):
        for b, i in enumerate(batch["index"].tolist()):
            ids, n = rows[i]["input_ids"], len(rows[i]["input_ids"])
            new, labels = batch["input_ids"][b].tolist(), batch["labels"][b].tolist()
            chosen = [t for t, label in enumerate(labels) if label != -100]
            special = [t for t, token in enumerate(ids) if token < 4]
            words = n - len(special)
            assert len(chosen) == (max(1, round(0.2 * words)) if words else 0)
            assert not set(chosen) & set(special)
            assert [labels[t] for t in chosen] == [ids[t] for t in chosen]
            assert [x for t, x in enumerate(new[:n]) if t not in chosen] == [x for t, x in enumerate(ids) if t not in chosen]
            assert new[n:] == [0] * (len(new) - n)
            fates.update("mask" if new[t] == 3 else "same" if new[t] == ids[t] else "noise" for t in chosen)
            assert min((new[t] for t in chosen), default=3) >= 3
    shares = {name: count / fates.total() for name, count in fates.items()}
    print(shares, fates.total())
    assert all(abs(shares[name] - share) < 0.03 for name, share in (("mask", 0.4), ("noise", 0.3), ("same", 0.3)))

    def drawn(seed):
        return [batch["input_ids"].tolist() for batch in data.batches(rows, TASKS["mlm"], 16, 0, seed)]

    assert drawn(7) == drawn(7) and drawn(None) == drawn(None) and drawn(7) != drawn(8)


# -------------------------------------------------------------------- the command line


@pytest.fixture
def generated(monkeypatch):
    """A stand-in for suite.py."""

    def examples(task, split, seed):
        return [((f"{task} {split} {seed} {i}",), i % 3 % 2) for i in range(7)]

    def text(kind, n, seed):
        return (((f"{kind} {seed} {i} the cat",), None) for i in range(n))

    monkeypatch.setattr(data, "suite", types.SimpleNamespace(examples=examples, text=text))
    monkeypatch.setattr(data, "TEXT_ROWS", {"train": 30, "dev": 5, "test": 5})


def test_generated_examples_come_from_the_suite(generated):
    assert data.load("cola", split="dev", seed=4)[2] == Example("2", ("cola dev 4 2",), 0)
    seeds = {data.load("mlm", split=split, seed=seed)[0].text[0] for split in data.SPLITS for seed in range(4)}
    assert len(seeds) == 12 and len(data.load("clm")) == 30


@pytest.mark.parametrize("name", [name for name in data.GENERATED if not TASKS[name].pretraining])
def test_every_generated_task_is_written_in_its_layout_and_reads_back_identically(name, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "SPLITS", {"train": 60, "dev": 30, "test": 30})
    for split in data.SPLITS:
        examples = data.load(name, split=split)
        files.write_split(TASKS[name], examples, tmp_path, split)
        assert len(examples) >= 30 and data.load(name, tmp_path, split) == examples


def test_command_shows_counts_and_writes_what_reads_back(generated, tmp_path, capsys):
    data.main(["--task", "sst2", "--show", "1", "--write", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert "sst2 train: 7 rows, negative 5, positive 2\n  [0] negative\n      sst2 train 0 0\n" in out
    for split in data.SPLITS:
        assert data.load("sst2", tmp_path / "new", split) == data.load("sst2", split=split)
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    with pytest.raises(SystemExit):
        data.main(["--task", "sst2", "--seed", "1", "--write", str(tmp_path / "new")])
    assert "is there already: choose another folder" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    data.main(["--task", "sst2", "--data", str(tmp_path / "new")])
    assert capsys.readouterr().out.count(": 7 rows, negative 5, positive 2\n") == 3
    data.main(["--train-tokenizer", str(tmp_path / "t.json"), "--vocab-size", "270"])
    assert data.Tokenizer(tmp_path / "t.json").vocab_size == 270


@pytest.mark.parametrize(
    "arguments",
    [
        ["--task", "nope"],
        ["--task", "wnli"],
        ["--data", "gone"],
        ["--unknown"],
        ["--split", "x"],
        ["--task", "mlm", "--write", "x"],
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(generated, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        data.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(("data.py: ", "usage: ")) or "unrecognized arguments" in error
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []
