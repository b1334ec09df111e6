"""Files in and out: tables in GLUE's layouts, SQuAD 2.0, GSM8K, and your own CSV, TSV or JSONL.

A reader gives every row of its file, unchanged, or raises ValueError with one line that names the
file, the line, what was found and what would be right. It never skips a row. What `write_split` writes
reads back identically. A `task` is a Task of data.py, of which its columns and labels are read here.
"""

import csv
import functools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SPLITS = ("train", "dev", "test")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # of a .csv, found by its header
NO_QUOTING = "; in a TSV a quote is text and no field holds a tab or a line end: name a file with quoting .csv"
CSV_QUOTING = "; a field with a separator, a quote or a line end stands in quotes, and a quote in it is doubled"
csv.field_size_limit(2**31 - 1)  # a text may be longer than csv's 131,072
MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")


@dataclass
class Example:
    """One row. label: class index; float; tuple of (answer, start in text[1]), () = no answer, for
    spans; the answer's text for math; None where the file has no label. Text to pretrain on: as for spans, the
    words that depend on both texts."""

    id: str
    text: tuple  # one or two str
    label: object = None


# ------------------------------------------------------------------ from files to rows


def bad(path: str | Path, line: int, message: str) -> ValueError:
    return ValueError(f"{path}:{line}: {message}")


def brief(value: object, limit: int = 60) -> str:
    """repr of a value, cut so that an error stays one readable line."""
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= 2 * limit else text[: 2 * limit] + "..."


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file without its byte-order mark."""
    try:
        text = decode(path, Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if not text.strip("\r\n"):
        raise bad(path, 1, "the file is empty")
    return text


def decode(path: str | Path, content: bytes) -> str:
    """The text of a file's bytes; `path` is for the errors."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise bad(path, line, f"not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8") from None
    if text.startswith("version https://git-lfs"):
        raise bad(path, 1, "a Git-LFS pointer, not the data: fetch it with git lfs pull")
    if "\0" in text:
        raise bad(path, text[: text.index("\0")].count("\n") + 1, "a NUL byte: this is not a text file")
    return text


def split_lines(path: str | Path, text: str) -> list[str]:
    r"""The lines of a text. Only \n ends a line, and one \r before it goes with it: a lone \r, \f,
    \x85 or U+2028 is text. Blank lines at the end are nothing; one elsewhere is an error, because
    it may be a row that was lost."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while not lines[-1]:
        lines.pop()
    if "" in lines:
        raise bad(path, lines.index("") + 1, "a blank line between rows: remove it or restore its row")
    return lines


def csv_rows(path: str | Path, text: str, columns: Iterable[Sequence[str]]) -> list[tuple[int, list[str]]]:
    r"""[(line, fields)] of a .csv with its quoting; a quoted field may hold separators and line ends. The separator is that
    with which the header has most of `columns`, the names that each goes by.

    A \r that ends no line is text, though csv takes it for a line end: a NUL, which no text holds, stands for it.
    """
    lines = [line + "\n" for line in re.sub(r"\r(?!\n|\Z)", "\0", text).split("\n")]

    def found(separator):
        try:
            header = next(csv.reader(lines, delimiter=separator))
        except csv.Error:
            return 0
        return sum(any(name in header for name in names) for names in columns)

    reader = csv.reader(lines, delimiter=max(SEPARATORS, key=found), strict=True)
    rows, line = [], 1
    try:
        for fields in reader:
            rows.append((line, [field.replace("\0", "\r") for field in fields]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise bad(path, line, f"not CSV: {error}{CSV_QUOTING}") from None
    while not rows[-1][1]:
        rows.pop()
    for line, fields in rows:
        if not fields:
            raise bad(path, line, "a blank line between rows: remove it or restore its row")
    return rows


def parse_json(path: str | Path, line: int, text: str):
    """One JSON value. Also refused: a key given twice, NaN, a lone surrogate (no text holds one)."""

    def no_duplicates(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key is given twice among {brief([key for key, _ in pairs])}")
        return dict(pairs)

    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise bad(path, line + error.lineno - 1, f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise bad(path, line, f"not JSON: {error}") from None
    return value


def json_rows(path: str | Path, text: str) -> list[tuple[int, dict]]:
    """[(line, object)] of a file with one JSON object on each line, or with one JSON list of them."""
    if text.lstrip().startswith("["):
        rows = json_list(path, text)
    else:
        rows = [(i, parse_json(path, i, line)) for i, line in enumerate(split_lines(path, text), 1)]
    for line, row in rows:
        if not isinstance(row, dict):
            raise bad(path, line, f"expected a JSON object, found {brief(row)}")
    return rows


def json_list(path: str | Path, text: str) -> list[tuple[int, Any]]:
    """[(line, value)] of the values in a JSON list, each with the line where it begins."""
    rows, at, line = [], text.index("[") + 1, 1
    gap = re.compile(r"[\s,]*")
    while (start := gap.match(text, at).end()) < len(text) and text[start] != "]":  # type: ignore[union-attr]
        line = text.count("\n", 0, start) + 1 if not rows else line + text.count("\n", at, start)
        try:
            end = json.JSONDecoder().raw_decode(text, start)[1]
        except (json.JSONDecodeError, RecursionError) as error:
            raise bad(path, line, f"not JSON: {getattr(error, 'msg', 'nested too deep')}") from None
        rows.append((line, parse_json(path, line, text[start:end])))
        line, at = line + text.count("\n", start, end), end
    if not rows:
        raise bad(path, 1, "a list without rows")
    if text[start:].strip() != "]":
        raise bad(path, line, "the list does not end behind its last row")
    return rows


def rejoined(rows: Sequence[tuple[int, list[str]]], width: int) -> list[tuple[int, list[str]]]:
    """The rows with those made whole that a line end within a text broke in two, of which QQP's train.tsv has a few:
    it becomes a space."""
    whole = []
    for line, fields in rows:
        before = whole[-1][1] if whole else []
        if len(before) < width and len(fields) < width and len(before) + len(fields) - 1 == width:
            whole[-1] = whole[-1][0], [*before[:-1], f"{before[-1]} {fields[0]}", *fields[1:]]
        else:
            whole.append((line, fields))
    return whole


def read_table(path: str | Path, task) -> tuple[Sequence[str], list[tuple[int, dict]]]:
    """(columns, [(line, {column: value})]) of a .csv, a .jsonl or .json (an object per line, or a list of them), else a TSV.

    TSV fields have no quoting: a quote is text. A first line that is a row of `task` is no header. A .csv may have
    semicolons or tabs, if its header has the columns of `task` then.
    """
    text = read_text(path)
    ending = Path(path).suffix.lower()
    if ending in (".jsonl", ".json"):
        rows = json_rows(path, text)
        return list(rows[0][1]), rows
    if ending == ".csv":
        rows = csv_rows(path, text, task.columns)
    else:
        rows = [(i, line.split("\t")) for i, line in enumerate(split_lines(path, text), 1)]
    columns = rows[0][1]
    if is_row(task, columns):
        columns = task.header
    else:
        del rows[0]
    for name in columns:
        if columns.count(name) > 1:
            raise bad(path, 1, f"two columns are named {brief(name)}")
    if not rows:
        ends = ": its lines end with \\r alone, save it with \\n" if "\r" in text.strip("\r\n") else ""
        raise bad(path, 1, f"a header and no rows{ends}")
    official = list(columns) == list(task.header)
    rows = rejoined(rows, len(columns)) if official and task.name == "qqp" else rows
    for line, fields in rows:
        if len(fields) != len(columns):
            wanted = f"{len(columns)}: {brief(', '.join(columns))}"
            quoting = NO_QUOTING if ending != ".csv" and '"' in "".join(fields) and not official else ""
            raise bad(path, line, f"{len(fields)} columns, expected {wanted}{quoting}")
    return columns, [(line, dict(zip(columns, fields))) for line, fields in rows]


# -------------------------------------------------------------- from rows to examples


def number(value: str) -> float | None:
    """float of a plain decimal number, or None: no nan, inf, 1_000 or spaces, which float() takes."""
    plain = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value, re.ASCII)
    return float(value) if plain and math.isfinite(float(value)) else None


@functools.lru_cache(100_000)
def same(label: str) -> str:
    """What labels have in common that people take for one: no case, no spaces around it, single ones inside, one Unicode form."""
    return " ".join(unicodedata.normalize("NFC", label).casefold().split())


def parse_label(task, value: str) -> int | float | None:
    """Class index or score of a label as written in a file, or None if it is none."""
    if task.kind == "regression":
        score = number(value)
        return None if task.name == "stsb" and score is not None and not 0 <= score <= 5 else score
    if value in task.labels:
        return task.labels.index(value)
    if task.merge_labels and same(value) in map(same, task.labels):
        return [same(label) for label in task.labels].index(same(value))
    codes = [str(i) for i in range(len(task.codes))]
    return task.labels.index(task.codes[codes.index(value)]) if value in codes else None


def is_row(task, fields: Sequence[str]) -> bool:
    """Whether a first line is a row of the official layout, not a header: a label stands where labels do."""
    if len(fields) != len(task.header):
        return False
    return parse_label(task, fields[task.header.index(task.columns[-1][0])]) is not None


def label_text(path: str | Path, line: int, value: object) -> str:
    """A label as written: JSON's numbers and booleans become their text, null becomes ''."""
    if isinstance(value, (dict, list)):
        raise bad(path, line, f"label {brief(value)} is not a word or a number")
    return as_text(value)


def as_text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def own_classes(path: str | Path, labels: Iterable[tuple[int, str]], merge: bool) -> list[str]:
    """The names of the classes of [(line, label)]: trimmed, in the order of the file. Labels that people take for one are
    an error, or one class by `merge`, which has the commonest spelling."""
    alike = {}  # what spellings have in common -> {spelling: its lines}
    for line, label in labels:
        alike.setdefault(same(label), {}).setdefault(label, []).append(line)
    for spellings in alike.values():
        if len(spellings) > 1 and not merge:
            (a, first), (b, second) = list(spellings.items())[:2]
            raise bad(path, second[0], f"label {brief(b)} and {brief(a)} of line {first[0]} differ only in case, spaces or "
                                       "Unicode form: correct one, or --merge-labels takes them as one class")  # fmt: skip
    counts = [Counter() for _ in alike]
    for count, spellings in zip(counts, alike.values()):
        for label, lines in spellings.items():
            count[label.strip()] += len(lines)
    return [count.most_common(1)[0][0] for count in counts]


def find_column(path: str | Path, task, columns: Sequence[str], names: Iterable[str], required: bool = True) -> str | None:
    for name in names:
        if name in columns:
            return name
    if not required:
        return None
    wanted = " or ".join(repr(name) for name in names)
    headless = f" (or {len(task.header)} columns without a header)" if task.headless else ""
    raise bad(path, 1, f"no column {wanted}{headless}; found: {brief(', '.join(columns), 200)}{looks_like(path, columns)}")


def looks_like(path: str | Path, columns: Sequence[str]) -> str:
    """What a header without the wanted columns looks like: quotes in a TSV, another separator. Words for the error."""
    ending = Path(path).suffix.lower()
    if ending in (".jsonl", ".json"):
        return ""
    if ending != ".csv" and '"' in "".join(columns):
        return NO_QUOTING
    other = next((mark for mark in ";,\t|" if mark in columns[0]), None) if len(columns) == 1 else None
    if other is None:
        return ""
    advice = "" if ending == ".csv" and other in SEPARATORS else ": save it with commas" if other == "|" else ": name it .csv"
    return f"; its columns seem to be separated by {SEPARATORS.get(other, repr(other))}{advice}"


def get(path: str | Path, line: int, row: dict, name: str) -> object:
    if name not in row:
        raise bad(path, line, f"no {name!r}; found: {brief(', '.join(row), 200)}")
    return row[name]


def to_examples(task, path: str | Path, table: tuple[Sequence[str], list[tuple[int, dict]]], labelled: bool) -> list[Example]:
    """Examples of a table, its columns found by name. Without `labelled`, a missing label column, an empty label and
    Hugging Face's -1, where that is no label, mean unlabelled. Labels of an own file are trimmed."""
    columns, rows = table
    texts = [find_column(path, task, columns, names) for names in task.columns[:-1]]
    label_column = find_column(path, task, columns, task.columns[-1], required=labelled)
    ids = (task.id,) if task.id else ("index", "idx", "id") + ("Index", "ID", "Id") * (task.name == "custom")
    id_column = find_column(path, task, columns, ids, required=bool(task.id))
    if task.name == "mnli" and "premise" not in columns:
        task = replace(task, codes=())  # integers are unambiguous in Hugging Face's layout only
    examples = []
    for i, (line, row) in enumerate(rows):
        text = tuple(get(path, line, row, name) for name in texts)  # type: ignore[arg-type]
        for name, value in zip(texts, text):
            if not isinstance(value, str):
                raise bad(path, line, f"{name!r} is {brief(value)}, expected a text")
        label = None
        if label_column is not None:
            value = label_text(path, line, get(path, line, row, label_column))
            value = value.strip() if task.name == "custom" else value
            label = parse_label(task, value)
            if label is None and (labelled or value not in ("", "-1", "-1.0")):
                raise bad(path, line, f"label {brief(value)} is not {allowed_labels(task, value)}")
        examples.append(Example(as_text(row.get(id_column, str(i))), text, label))
    return examples


def allowed_labels(task, value: str) -> str:
    """What a label may be, in words, and which class `value` could be meant as."""
    if task.kind == "regression":
        return "a number from 0 to 5" if task.name == "stsb" else "a number"
    codes = f" (or 0 to {len(task.codes) - 1})" if task.codes else ""
    meant = [name for name in task.labels if task.name == "custom" and same(name) == same(value)]
    merged = f" (a run with --merge-labels takes it as {brief(meant[0])})" if meant else ""
    return "one of " + brief(", ".join(task.labels), 200) + codes + merged


def read_squad(path: str | Path, labelled: bool) -> list[Example]:
    """Examples (question, context) of a SQuAD 1.1 or 2.0 file. An answer must stand at its place."""
    document, examples = parse_json(path, 1, read_text(path)), []

    def field(holder, key, kind, place):
        value = holder.get(key) if isinstance(holder, dict) else None
        if type(value) is not kind:
            raise ValueError(f"{path}: {place}: '{key}' is {brief(value)}, expected a {kind.__name__}")
        return value

    for a, article in enumerate(field(document, "data", list, "top level")):
        for p, paragraph in enumerate(field(article, "paragraphs", list, f"data[{a}]")):
            context = field(paragraph, "context", str, f"data[{a}].paragraphs[{p}]")
            for q, qa in enumerate(field(paragraph, "qas", list, f"data[{a}].paragraphs[{p}]")):
                place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                text = (field(qa, "question", str, place), context)
                example = Example(field(qa, "id", str, place), text)
                examples.append(example)
                if not labelled and "answers" not in qa:
                    continue
                example.label = ()
                for span in field(qa, "answers", list, place):
                    answer, start = field(span, "text", str, place), field(span, "answer_start", int, place)
                    if start < 0 or not answer or not context.startswith(answer, start):
                        raise ValueError(f"{path}: {place}: {brief(answer)} is not in the context at {start}")
                    example.label += ((answer, start),)
                impossible = field({"is_impossible": False} | qa, "is_impossible", bool, place)
                if impossible == bool(example.label):
                    raise ValueError(f"{path}: {place}: is_impossible {impossible}, answers {example.label}")
    if not examples:
        raise ValueError(f"{path}: no questions")
    return examples


def read_math(path: str | Path, labelled: bool) -> list[Example]:
    """Examples of a GSM8K file: a question, and an answer that ends in '#### N'."""
    examples = []
    for i, (line, row) in enumerate(json_rows(path, read_text(path))):
        question, answer = get(path, line, row, "question"), row.get("answer")
        if not isinstance(question, str):
            raise bad(path, line, f"'question' is {brief(question)}, expected a text")
        if labelled or answer is not None:
            if not isinstance(answer, str) or not re.search(r"#### -?[\d.,]*\d[\d.,]*\s*$", answer, re.ASCII):
                raise bad(path, line, f"'answer' does not end in '#### N' with a number N: {brief(answer)}")
        examples.append(Example(as_text(row.get("id", str(i))), (question,), answer))
    return examples


def file_names(task, split: str) -> list[str]:
    """The names that a split's file goes by, the official one first."""
    if task.name == "mnli":
        split = {"dev": "dev_matched", "test": "test_matched"}.get(split, split)
    if split not in splits(task):
        raise ValueError(f"{task.name} has no split {split!r}; splits: {', '.join(splits(task))}")
    if task.name == "squad":
        return [f"{split}-v2.0.json", f"{split}.json"]
    if task.name == "math":  # GSM8K has no dev file, its test file is what everybody reports
        return [f"{split}.jsonl"] + ["test.jsonl"] * (split == "dev")
    return [split + ending for ending in (".tsv", ".csv", ".jsonl")]


def splits(task) -> tuple[str, ...]:
    return MNLI_SPLITS if task.name == "mnli" else SPLITS


def read(task, source: str | Path, split: str) -> list[Example]:
    """Examples of a split of a task, from its folder in the official layout or from one file."""
    names, path = file_names(task, split), Path(source)
    if path.is_dir():
        found = [name for name in names if (path / name).is_file()]
        if not found:
            there = ", ".join(sorted(entry.name for entry in path.iterdir()))
            raise ValueError(f"{path}: no {names[0]} there; found: {brief(there, 200)}")
        path = path / found[0]
    labelled = not split.startswith("test")
    if task.name == "squad":
        return read_squad(path, labelled)
    if task.name == "math":
        return read_math(path, labelled)
    return to_examples(task, path, read_table(path, task), labelled)


# ---------------------------------------------------------------------- from examples to files


def file_label(task, label) -> str:
    """A label as GLUE's files write it: a word for MNLI, QNLI and RTE, else a number."""
    return task.labels[label] if task.name in ("mnli", "qnli", "rte") else str(label)


def replace_file(path: str | Path, write: Callable[[str], object]) -> None:
    """Call write(temporary path), flush it to disk and rename it to `path`; a device or a pipe is written to as it is."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        write(os.fspath(path))
        return
    path = os.path.realpath(path)  # a link stays one
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        e.filename = e.filename or path  # a write to a full disk names none
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write one text file as a whole, its folder too if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)

    def write(temporary):
        with open(temporary, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)

    replace_file(path, write)


def write_split(task, examples: Sequence[Example], folder: str | Path, split: str) -> Path:
    """Write examples as the official file of a split; returns its path. `load` reads them back.

    A test file keeps its labels, if there are any, in a last column. ValueError for a text that a
    TSV cannot hold.
    """
    path = Path(folder) / file_names(task, split)[0]
    if task.name == "squad":
        paragraphs = []
        for e in examples:
            qa = {"id": e.id, "question": e.text[0]}
            if e.label is not None:
                answers = [{"text": text, "answer_start": start} for text, start in e.label]  # type: ignore[attr-defined]
                qa |= {"answers": answers, "is_impossible": not answers}
            paragraphs.append({"context": e.text[1], "qas": [qa]})
        text = json.dumps({"version": "v2.0", "data": [{"title": "examples", "paragraphs": paragraphs}]})
    elif task.name == "math":
        rows = [{"question": e.text[0]} | ({} if e.label is None else {"answer": e.label}) for e in examples]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif task.header:
        *texts, label = [names[0] for names in task.columns]
        columns = task.header
        if split.startswith("test"):
            columns = ("index", *texts) + (label,) * any(e.label is not None for e in examples)
        rows = [] if columns == task.header and task.headless else [columns]
        for e in examples:
            row = dict(zip(texts, e.text)) | {"index": e.id, "id": e.id}
            row[label] = "" if e.label is None else file_label(task, e.label)
            rows.append([row.get(name, "") for name in columns])
            if re.search(r"[\t\n\r\0]", "".join(rows[-1])):
                raise ValueError(f"{path}: example {e.id} holds a tab or a line end, a TSV cannot")
        text = "".join("\t".join(row) + "\n" for row in rows)
    else:
        raise ValueError(f"task {task.name} has no official layout to write")
    write_text(path, text)
    return path


def write_submission(task, predictions: Sequence[float], path: str | Path) -> None:
    """GLUE's submission file: one prediction (class index or score) per row of the test file, in order."""
    if task.kind == "regression":
        values = [f"{min(max(score, 0.0), 5.0):.3f}" for score in predictions]
    else:
        values = [file_label(task, int(label)) for label in predictions]
    write_text(path, "index\tprediction\n" + "".join(f"{i}\t{value}\n" for i, value in enumerate(values)))
