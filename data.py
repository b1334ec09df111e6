"""The tasks and their data: what is predicted from what, rows for the model, batches.

A task is a row of TASKS. Its examples are generated (generated/suite.py), or read from files in the layouts of GLUE,
SQuAD 2.0 and GSM8K, from a table of your own (reading/files.py), or from prompts with answers (reading/instructions.py):

    examples = load("cola", "glue/CoLA", "train")            # list of Example
    task, examples = load_custom("my.csv", text=["review"], label="stars")
    tokenizer = Tokenizer()                                   # assets/tokenizer.json
    rows = features(task, examples, tokenizer, max_length=128)
    for batch in batches(rows, task, 32, tokenizer.pad_id, shuffle_seed=0): ...

`python data.py --task cola --show 5` prints examples; `--help` lists the rest.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from generated import suite
from reading import files, instructions
from reading.files import SPLITS, Example, bad, brief
from reading.tokenizer import Tokenizer, train_tokenizer

GENERATED = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "squad", "math", "lesson", "mlm", "clm")
TEXT_ROWS = {"train": 300_000, "dev": 1_000, "test": 1_000}  # of text to pretrain on
IGNORED = -100  # a label that the loss leaves out
MASKED = 0.2  # share of a text's tokens that are predicted
MANY = 100  # more classes than these are asked about
SALIENT = 0.6  # of the times that a text with salient words is met, these are masked and no others


@dataclass(frozen=True)
class Task:
    """What is predicted and how it is measured. The fields from `header` on say how its table is read."""

    name: str
    kind: str  # classification, regression, span, lm (next token), mlm (masked tokens)
    labels: tuple = ()  # class names in the order of their index
    metrics: tuple = ()  # the first is the headline
    pair: bool = False  # two texts, not one
    header: tuple = ()  # columns of the official train file
    columns: tuple = ()  # for each text, and last for the label: the names its column goes by
    codes: tuple = ()  # the class names that integer labels 0, 1, .. in a file mean
    headless: bool = False  # the official train file has no header line
    merge_labels: bool = False  # an own file's labels are compared without case and surrounding spaces
    id: str = ""  # the column of the rows' names, else index, idx or id
    template: str = ""  # of prompts: "" joins the columns line by line, "chat" is the tokenizer's own

    @property
    def pretraining(self) -> bool:
        """Whether it is text to pretrain on: always generated, and there is nothing to score but the loss."""
        return self.metrics == ("loss",) and self.name != "sft"


# ------------------------------------------------------------------------ the tasks


def _glue(name, header, columns, labels=(), metrics=("accuracy",), **more):
    columns = tuple(tuple(names.split("|")) for names in columns)
    kind = "classification" if labels else "regression"
    return Task(name, kind, labels, metrics, len(columns) == 3, tuple(header.split("|")), columns, **{"codes": labels, **more})


_RTE = "index|sentence1|sentence2|label"
_STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score"
_MNLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse"
_MNLI += "|sentence2_parse|sentence1|sentence2|label1|gold_label"
_ENTAILED = ("entailment", "not_entailment")

# GLUE's own column names first, then Hugging Face's, which also numbers MNLI's classes differently.
TASKS = [
    _glue("cola", "source|label|original|sentence", ["sentence", "label"],
          ("unacceptable", "acceptable"), ("matthews", "accuracy"), headless=True),
    _glue("sst2", "sentence|label", ["sentence", "label"], ("negative", "positive")),
    _glue("mrpc", "Quality|#1 ID|#2 ID|#1 String|#2 String",
          ["#1 String|sentence1", "#2 String|sentence2", "Quality|label"],
          ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    _glue("qqp", "id|qid1|qid2|question1|question2|is_duplicate",
          ["question1", "question2", "is_duplicate|label"],
          ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    _glue("stsb", _STSB, ["sentence1", "sentence2", "score|label"], (), ("pearson", "spearman")),
    _glue("mnli", _MNLI, ["sentence1|premise", "sentence2|hypothesis", "gold_label|label"],
          ("contradiction", "entailment", "neutral"), codes=("entailment", "neutral", "contradiction")),
    _glue("qnli", "index|question|sentence|label", ["question", "sentence", "label"], _ENTAILED),
    _glue("rte", _RTE, ["sentence1", "sentence2", "label"], _ENTAILED),
    _glue("wnli", _RTE, ["sentence1", "sentence2", "label"], ("0", "1")),
    Task("squad", "span", metrics=("f1", "em"), pair=True),
    Task("math", "lm", metrics=("em",)),
    Task("sft", "lm", metrics=("exact_match",)),
    Task("lesson", "mlm", metrics=("loss",)),
    Task("mlm", "mlm", metrics=("loss",)),
    Task("clm", "lm", metrics=("loss",)),
]  # fmt: skip
TASKS = {task.name: task for task in TASKS}


# ------------------------------------------------------------------------------ loading


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; tasks: {', '.join(TASKS)}")
    return TASKS[name]


def load(task: str | Task, source: str | Path | None = None, split: str = "train", seed: int = 0) -> list[Example]:
    """Examples of a task (its name or its Task).

    source: None = generated by suite.py from `seed`; a folder in the official layout; or one file.
    split: train, dev, test; for MNLI dev is dev_matched, and dev_mismatched, test_matched and
    test_mismatched are there too. Rows of a test split may be unlabelled.
    """
    task = find_task(task) if isinstance(task, str) else task
    if task.name == "sft":
        return load_prompts(task, source, labelled=split != "test")
    files.file_names(task, split)  # there is such a split
    if source is None:
        if task.name not in GENERATED:
            raise ValueError(f"task {task.name} needs --data DIR; generated are: {', '.join(GENERATED)}")
        if task.pretraining:  # a seed of its own for every split
            rows = suite.text(task.name, TEXT_ROWS[split], len(SPLITS) * seed + SPLITS.index(split))
            return [Example(str(i), text, salient and (salient,)) for i, (text, salient) in enumerate(rows)]
        rows = suite.examples(task.name, split, seed)
        return [Example(str(i), tuple(text), label) for i, (text, label) in enumerate(rows)]
    if task.pretraining:
        raise ValueError(f"task {task.name} is generated text, it reads no files: leave --data out")
    return files.read(task, source, split)


def load_prompts(task: Task, path: str | Path | None, labelled: bool = True) -> list[Example]:
    """Chats of a file of prompts and answers; `columns` of the task name the prompts' and, last, the answer's."""
    if path is None:
        raise ValueError("task sft needs --data FILE: prompts with their answers, as JSON lines or a JSON list")
    names = [name for (name,) in task.columns]
    template = "" if task.template == "chat" else task.template
    choosing = task.metrics == ("choice",)
    return instructions.read(path, tuple(names[:-1]), names[-1] if names else None, template, labelled, choosing)


def load_custom(
    path: str | Path, text: str | Sequence[str], label: str, *, kind=None, merge_labels=False, classes_ok=False
) -> tuple[Task, list[Example]]:  # fmt: skip
    """(Task, examples) of your own .csv, .tsv or .jsonl: `text` names one or two columns, `label` one.

    Labels are classes, their names trimmed, sorted and kept in task.labels; numbers of which some have a fraction are
    scores; `kind` decides otherwise. Labels that differ in case or spaces alone are one class with `merge_labels`, else an
    error. So are more classes than one means, unless `classes_ok`. `load` reads a second file with the Task of the first.
    """
    text = (text,) if isinstance(text, str) else tuple(text)
    if len(text) not in (1, 2):
        raise ValueError(f"text is one column or two, not {len(text)}: {', '.join(text)}")
    names = tuple((name,) for name in (*text, label))
    task = Task("custom", "classification", pair=len(text) == 2, columns=names, merge_labels=merge_labels)
    columns, rows = files.read_table(path, task)
    for name in names:
        files.find_column(path, task, columns, name)
    labels = [(line, files.label_text(path, line, files.get(path, line, row, label))) for line, row in rows]
    lines = {}  # each label -> the first line that has it
    for line, value in labels:
        lines.setdefault(value.strip(), line)
    if "" in lines:
        raise bad(path, lines[""], f"the label in {label!r} is empty")
    kind = kind or own_kind(path, lines)
    if kind == "regression":
        words = [value for value in lines if files.number(value) is None]
        if words:
            raise bad(path, lines[words[0]], f"label {brief(words[0])} is not a number, as --kind regression has them")
    if len(lines) == 1:
        raise ValueError(f"{path}: every row has the label {brief(*lines)}; at least two are needed")
    if kind == "regression":
        task = replace(task, kind=kind, metrics=("pearson", "spearman"))
    else:
        classes = own_classes(path, label, labels, merge_labels, classes_ok)
        task = replace(task, labels=classes, metrics=("accuracy", "macro_f1"))
    return task, files.to_examples(task, path, (columns, rows), labelled=True)


def own_kind(path: str | Path, lines: Mapping[str, int]) -> str:
    """What the labels of an own file are, {label: its first line}: scores where some number has a fraction, else classes."""
    numbers = {value: files.number(value) for value in lines}
    words = [value for value, x in numbers.items() if x is None]
    fractions = [value for value, x in numbers.items() if x is not None and not x.is_integer()]
    if words and all(files.number(value.replace(",", "")) is not None for value in words):
        raise bad(path, lines[words[0]], f"label {brief(words[0])} has a comma: a number has a decimal point and no comma "
                                         "(--kind classification takes it as a class's name)")  # fmt: skip
    if fractions and words:
        raise bad(path, lines[words[0]], f"label {brief(words[0])} is not a number, as {fractions[0]} is")
    return "regression" if fractions else "classification"


def own_classes(path: str | Path, column: str, labels: Sequence[tuple[int, str]], merge: bool, many_ok: bool) -> tuple[str, ...]:
    """The classes of an own file's [(line, label)], sorted. Many of them, or one a row, are a question."""
    found, rows = {files.same(value) for _, value in labels}, len(labels)
    scores = all(files.number(value) is not None for value in found)
    go_on = "--classes-ok goes on" + ", --kind regression takes them as scores" * scores
    if not many_ok and len(found) > max(5, rows // 2):
        raise ValueError(f"{path}: {column!r} has {len(found)} different labels in {rows} rows, as an id or a text has: "
                         f"is it the column of labels? ({go_on})")  # fmt: skip
    if not many_ok and len(found) > MANY:
        raise ValueError(f"{path}: {column!r} has {len(found)} different labels: is each meant as a class? ({go_on})")
    classes = sorted(files.own_classes(path, labels, merge), key=files.number if scores else None)  # type: ignore[arg-type]
    if scores and len(set(map(files.number, classes))) < len(classes):
        raise ValueError(f"{path}: {column!r} writes one number in two ways: {brief(', '.join(classes))}")
    return tuple(classes)


def empty(examples: Iterable[Example]) -> int:
    """How many examples have a text, or a chat whose last turn is, without a word."""
    lasts = (e.text if isinstance(e.text[0], str) else e.text[-1][1:] for e in examples)
    return sum(any(not text.strip() for text in texts) for texts in lasts)


# -------------------------------------------------------------------- features and batches


def features(task: Task, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, room: int = 0) -> list[dict]:
    """One dict for each example: input_ids, token_type_ids, and `labels` as `batches` describes
    (None if unlabelled). At most max_length tokens: of a pair the longer text is cut, for spans the
    context (a question keeps at most half), an answer that is cut off counts as no answer. sft: a prompt leaves
    `room` tokens for the answer, whatever its own is; 0 is what the longest of these examples needs.

    span rows also have `offsets` (None outside the context), math and sft rows `prompt`: how many of their
    tokens come before the answer, what generation starts from; mlm rows `noise` and `salient` (which tokens depend on
    both texts), for the masking. All have `cut`, whether something did not fit.
    """
    if max_length < 16:
        raise ValueError(f"max_length {max_length} is too short: 16 at least")
    if task.kind == "mlm" and tokenizer.mask_id is None:
        raise ValueError("task mlm needs a tokenizer with a mask token")
    texts = [e.text for e in examples]
    if task.kind == "span":
        questions = tokenizer.encode([text[:1] for text in texts], max_length // 2)
        ends = [max(end for _, end in row["offsets"]) for row in questions]
        texts = [(question[:end], context) for (question, context), end in zip(texts, ends)]
        rows = tokenizer.encode(texts, max_length, "only_second")
        rows = [{**row, "cut": row["cut"] or question["cut"]} for row, question in zip(rows, questions)]
    elif task.name == "math":
        rows = math_rows(examples, tokenizer, max_length)
    elif task.name == "sft":
        rows = instructions.encode(examples, tokenizer, max_length, task.template == "chat", room)
    else:
        rows = tokenizer.encode(texts, max_length)
    out = []
    for example, row in zip(examples, rows):
        ids = row["input_ids"]
        feature = {"input_ids": ids, "token_type_ids": row["token_type_ids"], "labels": example.label, "cut": row["cut"]}
        if task.kind == "span":
            places = zip(row["offsets"], row["sequence"])
            feature["offsets"] = [place if sequence == 1 else None for place, sequence in places]
            if example.label is not None:
                feature["labels"] = token_span(example, feature["offsets"])
        elif task.kind == "lm":
            feature["token_type_ids"] = [0] * len(ids)  # generated tokens have no second type
            start = row.get("prompt", 1)
            learn = row.get("learn", [t >= start for t in range(len(ids))])  # which tokens are predicted
            if "prompt" in row:
                feature["prompt"] = start
            if task.pretraining or example.label is not None:
                feature["labels"] = [i if yes else IGNORED for i, yes in zip(ids[1:], learn[1:])] + [IGNORED]
        elif task.kind == "mlm":
            feature["labels"] = [s is not None for s in row["sequence"]]  # which tokens may be masked
            feature["noise"] = (tokenizer.mask_id, tokenizer.vocab_size)  # for `mask_tokens`
            places = [place if sequence == 1 else None for place, sequence in zip(row["offsets"], row["sequence"])]
            first, last = token_span(example, places)
            feature["salient"] = [0 < first <= t <= last for t in range(len(ids))]
        out.append(feature)
    return out


def math_rows(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> list[dict]:
    """Question, then answer and sep_id; a question keeps at most half of max_length, and what is too
    long loses its end. A tokenizer that ends no text (a decoder's) gets a line end between the two."""
    prompts = tokenizer.encode([e.text for e in examples], max_length // 2)
    answers = tokenizer.encode([(e.label or "",) for e in examples])  # type: ignore[misc]
    newline = instructions.without_specials(tokenizer.encode([("\n",)])[0])
    out = []
    for example, prompt, answer in zip(examples, prompts, answers):
        ids = prompt["input_ids"] + newline * (prompt["sequence"][-1] is not None)
        start, cut = len(ids), prompt["cut"]
        if example.label is not None:
            ids = ids + instructions.without_specials(answer) + [tokenizer.sep_id]
            ids, cut = ids[:max_length], cut or len(ids) > max_length
        out.append({"input_ids": ids, "token_type_ids": None, "prompt": start, "cut": cut})
    return out


def token_span(example: Example, offsets: Sequence) -> tuple[int, int]:
    """(first, last) token of the first answer; (0, 0) if there is none or it was cut off."""
    if not example.label:
        return 0, 0
    answer, start = example.label[0]  # type: ignore[index]
    end = start + len(answer.rstrip())
    inside = [t for t, place in enumerate(offsets) if place and place[0] < end and place[1] > start]
    return (inside[0], inside[-1]) if inside and offsets[inside[-1]][1] >= end else (0, 0)


def batches(
    features: Sequence[dict], task: Task, batch_size: int, pad_id: int, shuffle_seed: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as dicts of CPU tensors, every row once, padded to the longest row of the batch:

    input_ids, attention_mask (1 = token), token_type_ids: (B, T) int64;  index: (B,) row numbers;
    labels, unless a row is unlabelled: classification (B,) int64, regression (B,) float32,
    span (B, 2) int64 first and last token with (0, 0) = no answer, lm and mlm (B, T) int64 where
    logits[:, t] predicts labels[:, t] and -100 is ignored.

    Without shuffle_seed the rows come by length (`index` restores their order). With it they come
    in an order that depends on the seed alone, rows of similar length together; so does the masking.
    """
    lengths = np.array([len(f["input_ids"]) for f in features])
    rng = np.random.default_rng(0 if shuffle_seed is None else shuffle_seed)
    order = np.arange(len(features)) if shuffle_seed is None else rng.permutation(len(features))
    pool = len(features) if shuffle_seed is None else 32 * batch_size  # sort within pools of 32 batches
    groups = []
    for i in range(0, len(order), max(pool, 1)):
        rows = order[i : i + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        groups += [rows[j : j + batch_size] for j in range(0, len(rows), batch_size)]
    if shuffle_seed is not None:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    for rows in groups:
        yield collate([features[i] for i in rows], rows, task, pad_id, rng)


def collate(
    rows: Sequence[dict], index: Sequence[int] | np.ndarray, task: Task, pad_id: int, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The batch of some feature rows; `index` are their numbers, rng draws the masking."""

    def padded(key, fill):
        width = max(len(row["input_ids"]) for row in rows)
        return torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in rows])  # (B, T)

    width = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {"input_ids": padded("input_ids", pad_id), "token_type_ids": padded("token_type_ids", 0)}
    batch["attention_mask"] = (torch.arange(width.max()) < width[:, None]).long()
    batch["index"] = torch.tensor(np.asarray(index))
    if any(row["labels"] is None for row in rows):
        return batch
    if task.kind == "mlm":
        ids, maskable = batch["input_ids"].numpy(), padded("labels", False).numpy()
        ids, labels = mask_tokens(ids, maskable, padded("salient", False).numpy(), *rows[0]["noise"], rng)  # type: ignore[call-arg]
        batch["input_ids"], batch["labels"] = torch.from_numpy(ids), torch.from_numpy(labels)
    elif task.kind == "lm":
        batch["labels"] = padded("labels", IGNORED)
    else:
        dtype = torch.float32 if task.kind == "regression" else torch.int64
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=dtype)
    return batch


def mask_tokens(
    ids: np.ndarray, maskable: np.ndarray, salient: np.ndarray, mask_id: int, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Masking after BERT (Devlin et al. 2019, Sec. 3.1): a share MASKED of each row's maskable tokens, at least one,
    are predicted; 40 % of those become mask_id, 30 % a random token, 30 % stay. BERT's are 80, 10 and 10: more words
    that may be wrong make the model compare what it sees with the other sentence, as ELECTRA does (Clark et al. 2020,
    arXiv 2003.10555). Where a row has salient tokens, a share SALIENT of the times those are masked and no others
    (salient span masking, Guu et al. 2020, arXiv 2002.08909). All (B, T)."""
    draw = np.where(maskable, rng.random(ids.shape), 2.0)
    rank = draw.argsort(axis=1, kind="stable").argsort(axis=1)
    count = maskable.sum(axis=1, keepdims=True)  # (B, 1)
    chosen = maskable & (rank < np.maximum(np.rint(MASKED * count), 1))
    focus = salient.any(axis=1, keepdims=True) & (rng.random((len(ids), 1)) < SALIENT)
    chosen = np.where(focus, salient, chosen)
    labels = np.where(chosen, ids, IGNORED)
    fate, noise = np.where(focus, 0.0, rng.random(ids.shape)), rng.integers(len(Tokenizer.SPECIALS), vocab_size, ids.shape)
    ids = np.where(chosen & (fate < 0.4), mask_id, ids)
    return np.where(chosen & (fate >= 0.4) & (fate < 0.7), noise, ids), labels


# -------------------------------------------------------------------- the command line


def describe(task: Task, label) -> str:
    if label is None:
        return "-"
    if task.kind == "classification":
        return task.labels[label]
    if task.kind == "span" or task.pretraining:
        return " | ".join(text for text, _ in label) or "(no answer)"
    return str(label)


def counts(task: Task, examples: Sequence[Example]) -> str:
    """How many rows, and of which labels."""
    labels = [e.label for e in examples if e.label is not None]
    parts = [f"{len(examples)} rows"]
    if not task.pretraining and len(labels) < len(examples):
        parts.append(f"{len(examples) - len(labels)} unlabelled")
    if task.kind == "classification" and labels:
        parts += [f"{name} {labels.count(i)}" for i, name in enumerate(task.labels)]
    elif task.kind == "regression" and labels:
        parts.append(f"{min(labels)} to {max(labels)}, mean {np.mean(labels):.2f}")  # type: ignore[arg-type, type-var]
    elif task.kind == "span" and labels:
        parts.append(f"{sum(map(bool, labels))} with an answer")
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Look at a task's data, write it, train the tokenizer.")
    parser.add_argument("--task", default="cola", help=f"one of {', '.join(TASKS)} (default: cola)")
    parser.add_argument("--data", metavar="DIR", help="official folder, or one file (default: generated)")
    parser.add_argument("--split", help="only this split (default: all there are)")
    parser.add_argument("--seed", type=int, default=0, help="seed of generated data (default: 0)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N examples")
    parser.add_argument("--write", metavar="DIR", help="write the splits to DIR in the official layout")
    parser.add_argument("--train-tokenizer", metavar="FILE", help="train the tokenizer on the generated text and write it")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the tokenizer (default: 2048)")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    if args.train_tokenizer:
        texts = (text for task in TASKS.values() if task.pretraining  # type: ignore[union-attr]
                 for e in load(task, seed=args.seed)[:100_000] for text in e.text)  # fmt: skip
        tokenizer = train_tokenizer(texts, args.vocab_size)
        tokenizer.save(args.train_tokenizer)
        print(f"{args.train_tokenizer}: {tokenizer.vocab_size} tokens")
        return
    task, folder = find_task(args.task), Path(args.data or "")
    chosen = [args.split] if args.split else files.splits(task) if args.data else SPLITS
    if args.data and not args.split:  # what is there; one file counts as train
        there = [s for s in chosen if any((folder / name).is_file() for name in files.file_names(task, s))]
        chosen = there or chosen[:1]
    for name in (files.file_names(task, split)[0] for split in chosen if args.write):
        if (path := Path(args.write) / name).exists():
            raise ValueError(f"{path} is there already: choose another folder")
    for split in chosen:
        examples = load(task, args.data, split, args.seed)
        print(f"{task.name} {split}: {counts(task, examples)}")
        for e in examples[: args.show]:
            print(f"  [{e.id}] {describe(task, e.label)}", *e.text, sep="\n      ")
        if args.write:
            print(f"  written to {files.write_split(task, examples, args.write, split)}")


if __name__ == "__main__":
    main()
