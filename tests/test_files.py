"""reading/files.py: official layouts and their traps, own files, hostile ones, and writing back."""

import csv
import io
import json
import os
import random
import re
import stat
from collections import Counter

import numpy as np
import pytest

import data
from data import TASKS, Example
from reading import files

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only_line(error):
    """The message of an error, which must be one line."""
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


# ---------------------------------------------------------------- the official layouts

MNLI_ROW = '0\t63735\t63735n\tslate\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tA "new" right\tA benefit \t'
MNLI_HEAD = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
    "\tsentence2_parse\tsentence1\tsentence2"
)
MNLI_LABELS = "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label"
STSB_HEAD = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB_ROW = "7\tmain-news\tMSRvid\t2012\t0001\tnone\tnone\tA plane.\tAn air plane."
OFFICIAL = [  # task, split, file name, content, expected (id, text, label) of the last row, number of rows
    ("cola", "train", "train.tsv", "gj04\t1\t\tIt is.\ngj04\t0\t*\tIt are .\n", ("1", ("It are .",), 0), 2),
    ("cola", "test", "test.tsv", "index\tsentence\n0\tBill whistled.\n", ("0", ("Bill whistled.",), None), 1),
    ("sst2", "dev", "dev.tsv", "sentence\tlabel\ncharming . \t1\n", ("0", ("charming . ",), 1), 1),
    ("sst2", "test", "test.tsv", "index\tsentence\n5\tuneasy .\n", ("5", ("uneasy .",), None), 1),
    (
        "mrpc", "train", "train.tsv",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t"He said\tHe, "too\r\n',
        ("0", ('"He said', 'He, "too'), 1), 1,
    ),
    (
        "mrpc", "test", "test.tsv", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n3\t7\t8\ta\tb",
        ("3", ("a", "b"), None), 1,
    ),
    (
        "qqp", "dev", "dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n201359\t3\t4\tWhy?\tHow?\t0\n",
        ("201359", ("Why?", "How?"), 0), 1,
    ),
    ("qqp", "test", "test.tsv", "id\tquestion1\tquestion2\n0\ta?\tb?\n", ("0", ("a?", "b?"), None), 1),
    (
        "stsb", "train", "train.tsv",
        f"{STSB_HEAD}\tscore\n{STSB_ROW}\t5.000\n{STSB_ROW}\t4.2\n{STSB_ROW}\t3\n",
        ("7", ("A plane.", "An air plane."), 3.0), 3,
    ),
    ("stsb", "test", "test.tsv", f"{STSB_HEAD}\n{STSB_ROW}\n", ("7", ("A plane.", "An air plane."), None), 1),
    (
        "mnli", "train", "train.tsv", f"{MNLI_HEAD}\tlabel1\tgold_label\n{MNLI_ROW}entailment\tneutral\n",
        ("0", ('A "new" right', "A benefit "), 2), 1,
    ),
    (
        "mnli", "dev", "dev_matched.tsv",
        f"{MNLI_HEAD}{MNLI_LABELS}\n{MNLI_ROW}neutral\t\t\t\t\tcontradiction\n",
        ("0", ('A "new" right', "A benefit "), 0), 1,
    ),
    (
        "mnli", "dev_mismatched", "dev_mismatched.tsv",
        f"{MNLI_HEAD}{MNLI_LABELS}\n{MNLI_ROW}neutral\t\t\t\t\tentailment\n",
        ("0", ('A "new" right', "A benefit "), 1), 1,
    ),
    (
        "mnli", "test_mismatched", "test_mismatched.tsv", f"{MNLI_HEAD}\n{MNLI_ROW[:-1]}\n",
        ("0", ('A "new" right', "A benefit "), None), 1,
    ),
    (
        "qnli", "train", "train.tsv", "index\tquestion\tsentence\tlabel\n0\tWhen?\tNow.\tnot_entailment\n",
        ("0", ("When?", "Now."), 1), 1,
    ),
    ("qnli", "test", "test.tsv", "index\tquestion\tsentence\n0\ta?\tb.\n", ("0", ("a?", "b."), None), 1),
    (
        "rte", "dev", "dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
        ("0", ("A.", "B."), 0), 1,
    ),
    ("rte", "test", "test.tsv", "index\tsentence1\tsentence2\n0\tA.\tB.\n", ("0", ("A.", "B."), None), 1),
    (
        "wnli", "train", "train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t0\n1\tC.\tD.\t1\n",
        ("1", ("C.", "D."), 1), 2,
    ),
    ("wnli", "test", "test.tsv", "index\tsentence1\tsentence2\n0\tA.\tB.\n", ("0", ("A.", "B."), None), 1),
]  # fmt: skip


@pytest.mark.parametrize("task, split, name, content, last, rows", OFFICIAL, ids=[f"{t}-{s}" for t, s, *_ in OFFICIAL])
def test_official_layout_is_read(tmp_path, task, split, name, content, last, rows):
    write(tmp_path / name, content)
    examples = data.load(task, tmp_path, split)
    assert len(examples) == rows
    assert (examples[-1].id, examples[-1].text, examples[-1].label) == last
    assert data.load(TASKS[task], tmp_path / name, split) == examples


def test_labels_stand_in_their_usual_order():
    assert {name: TASKS[name].labels for name in GLUE} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "qqp": ("not_duplicate", "duplicate"),
        "stsb": (),
        "mnli": ("contradiction", "entailment", "neutral"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "wnli": ("0", "1"),
    }


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_hugging_face_exports_are_read_by_column_name(tmp_path, ending):
    rows = [
        {"label": 1, "idx": 9, "sentence2": 'a "b", c', "sentence1": "d"},
        {"label": 0, "idx": 10, "sentence2": "e", "sentence1": ""},
    ]
    if ending == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif ending == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = out.getvalue()
    else:
        content = "\t".join(rows[0]) + "\n" + "".join("\t".join(map(str, row.values())) + "\n" for row in rows)
    write(tmp_path / f"train.{ending}", content)
    for task in ("mrpc", "rte", "wnli"):
        got = data.load(task, tmp_path, "train")
        assert got == [Example("9", ("d", 'a "b", c'), 1), Example("10", ("", "e"), 0)]


def test_mnli_integers_mean_what_hugging_face_means_and_are_refused_elsewhere(tmp_path):
    write(tmp_path / "train.tsv", "premise\thypothesis\tlabel\tidx\na\tb\t0\t0\na\tb\t1\t1\na\tb\t2\t2\n")
    labels = [TASKS["mnli"].labels[e.label] for e in data.load("mnli", tmp_path, "train")]
    assert labels == ["entailment", "neutral", "contradiction"]
    write(tmp_path / "train.tsv", "sentence1\tsentence2\tlabel\na\tb\t0\n")
    with pytest.raises(ValueError, match=r"train.tsv:2: label '0' is not one of 'contradiction, entailment, neutral'$"):
        data.load("mnli", tmp_path, "train")


def test_minus_one_means_unlabelled_in_a_test_split_only(tmp_path):
    path = write(tmp_path / "x.tsv", "sentence1\tsentence2\tlabel\tidx\na\tb\t-1\t0\nc\td\t1\t1\n")
    assert [e.label for e in data.load("rte", path, "test")] == [None, 1]
    with pytest.raises(ValueError, match="x.tsv:2: label '-1'"):
        data.load("rte", path, "dev")


def test_split_names(tmp_path):
    for name in ("dev_matched", "dev_mismatched"):
        write(tmp_path / f"{name}.tsv", f"sentence1\tsentence2\tgold_label\n{name}\tb\tneutral\n")
    firsts = [data.load("mnli", tmp_path, s)[0].text[0] for s in ("dev", "dev_matched", "dev_mismatched")]
    assert firsts == ["dev_matched", "dev_matched", "dev_mismatched"]
    with pytest.raises(ValueError, match="mnli has no split 'validation'; splits: train, dev_matched,"):
        data.load("mnli", tmp_path, "validation")
    with pytest.raises(ValueError, match="cola has no split 'dev_matched'; splits: train, dev, test"):
        data.load("cola", tmp_path, "dev_matched")
    with pytest.raises(ValueError, match="no train.tsv there; found: 'dev_matched.tsv, dev_mismatched.tsv'"):
        data.load("cola", tmp_path, "train")


# ------------------------------------------------------------------------- the traps


def test_quotes_are_text_in_tsv(tmp_path):
    texts = ['"open', 'close"', '""', 'a "b" c', '"', "it's"]
    write(tmp_path / "train.tsv", "sentence\tlabel\n" + "".join(f"{t}\t1\n" for t in texts))
    assert [e.text[0] for e in data.load("sst2", tmp_path)] == texts


def test_a_byte_order_mark_is_dropped_at_the_start_and_kept_in_a_text(tmp_path):
    write(tmp_path / "train.tsv", "\ufeffsentence\tlabel\n\ufeffa\ufeff\t1\n")
    assert data.load("sst2", tmp_path)[0].text == ("\ufeffa\ufeff",)


def test_line_ends_are_lf_or_crlf_and_nothing_else(tmp_path):
    odd = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\rj"
    assert len(odd.splitlines()) == 10
    for end in ("\n", "\r\n"):
        for last in ("", end, 3 * end):
            write(tmp_path / "train.tsv", f"sentence\tlabel{end}{odd}\t1{end}{odd}\r\t0{last}")
            assert data.load("sst2", tmp_path) == [Example("0", (odd,), 1), Example("1", (odd + "\r",), 0)]


def test_spaces_empty_columns_and_duplicate_rows_are_kept(tmp_path):
    write(tmp_path / "train.tsv", "\t1\t\t  a  \n\t1\t\t  a  \n\t0\t\t\n")
    examples = data.load("cola", tmp_path)
    assert [(e.text[0], e.label) for e in examples] == [("  a  ", 1), ("  a  ", 1), ("", 0)]


def test_labels_are_words_integers_or_floats(tmp_path):
    for task, head, words, expected in [
        ("mrpc", "Quality", ["equivalent", "0", "1", "not_equivalent"], [1, 0, 1, 0]),
        ("rte", "label", ["entailment", "1", "0", "not_entailment"], [0, 1, 0, 1]),
        ("stsb", "score", ["5.000", "4.2", "3", ".5", "1e0"], [5.0, 4.2, 3.0, 0.5, 1.0]),
    ]:
        rows = "".join(f"a\tb\t{word}\n" for word in words)
        write(tmp_path / "train.tsv", f"sentence1\tsentence2\t{head}\n{rows}")
        assert [e.label for e in data.load(task, tmp_path)] == expected


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HEAD = "sentence\tlabel\n"
DEFECTS = [  # content of an SST-2 train.tsv, line, what the message says
    ("", 1, "empty"),
    ("\ufeff", 1, "empty"),
    ("\r\n\n", 1, "empty"),
    (HEAD, 1, "a header and no rows"),
    (HEAD + "a\t1\nb\t1\t2\n", 3, "3 columns, expected 2: 'sentence, label'"),
    (HEAD + "a\t1\nb 1\n", 3, "1 columns, expected 2"),
    (HEAD + "a\t1\n\nb\t1\n", 3, "a blank line"),
    (HEAD + "a\t1\r\n\r\nb\t1\r\n", 3, "a blank line"),
    (HEAD + "a\t1\nb\t2\n", 3, "label '2' is not one of 'negative, positive' (or 0 to 1)"),
    (HEAD + "a\t1\nb\t1 \n", 3, "label '1 '"),
    (HEAD + "a\t1\nb\t\n", 3, "label ''"),
    (HEAD + "a\t\u2028\n", 2, r"label '\u2028'"),
    (HEAD + f"a\t{'long ' * 99}\n", 2, "label 'long long"),
    ("sentence\tsentence\tlabel\na\tb\t1\n", 1, "two columns are named 'sentence'"),
    ("phrase\tlabel\na\t1\n", 1, "no column 'sentence'; found: 'phrase, label'"),
    ("sentence\tgold\na\t1\n", 1, "no column 'label'; found: 'sentence, gold'"),
    (LFS, 1, "a Git-LFS pointer"),
    (HEAD.encode() + b"a\t1\nb\xff\t1\n", 3, "not UTF-8 (byte 0xff)"),
    ((HEAD + "a\t1\n").encode("utf-16"), 1, "not UTF-8 (byte 0xff)"),
    (HEAD.encode() + b"a\t1\nb\xc3", 3, "not UTF-8 (byte 0xc3)"),
    (HEAD + "a\t1\nb\0\t1\n", 3, "a NUL byte"),
]


@pytest.mark.parametrize("content, line, words", DEFECTS)
def test_a_defect_is_one_error_with_file_and_line(tmp_path, content, line, words):
    path = write(tmp_path / "train.tsv", content)
    with pytest.raises(ValueError) as error:
        data.load("sst2", tmp_path)
    message = only_line(error)
    assert message.startswith(f"{path}:{line}: ") and words in message and len(message) < 400, message


def test_defects_of_files_without_a_header_and_of_scores(tmp_path):
    path = write(tmp_path / "train.tsv", "gj04\t1\t\ta\ngj04\t1\tb\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: 3 columns, expected 4")):
        data.load("cola", path)
    path = write(tmp_path / "train.tsv", "gj04\t1\ta\ngj04\t1\ta\n")
    with pytest.raises(ValueError, match=r":1: no column 'sentence' \(or 4 columns without a header\); found: 'gj04, 1, a'"):
        data.load("cola", path)
    for score in ("5.1", "-0.5", "nan", "inf", "1_0", "1e999", "x", "", "٣"):
        path = write(tmp_path / "dev.tsv", f"sentence1\tsentence2\tscore\na\tb\t1\na\tb\t{score}\n")
        with pytest.raises(ValueError, match="dev.tsv:3: label '.*' is not a number from 0 to 5"):
            data.load("stsb", path)


def test_a_missing_file_or_an_unknown_task_is_one_error(tmp_path):
    for call, words in [
        (lambda: data.load("cola", tmp_path / "gone"), "gone: No such file or directory"),
        (lambda: data.load("squad", tmp_path / "gone.json"), "gone.json: No such file"),
        (lambda: data.load("nope"), "unknown task 'nope'; tasks: cola, sst2,"),
        (lambda: data.load("wnli"), "task wnli needs --data DIR; generated are: cola, sst2, mrpc, qqp, stsb"),
        (lambda: data.load("mlm", tmp_path), "generated text, it reads no files"),
        (lambda: data.load_custom(tmp_path, ["a"], "b"), "Is a directory"),
        (
            lambda: data.load_custom(tmp_path / "x.csv", ["a", "b", "c"], "d"),
            "one column or two, not 3: a, b, c",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert words in only_line(error)


# ------------------------------------------------------------------ SQuAD and GSM8K


def squad(context="In 1066, Zoë sold ten apples.", spans=(("ten apples", 18),), **qa):
    answers = [{"text": text, "answer_start": start} for text, start in spans]
    qa = {"id": "q1", "question": "What?", "is_impossible": not spans, "answers": answers} | qa
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [qa]}]}]}


def test_squad_is_read_with_all_answers_and_no_answer(tmp_path):
    document = squad(spans=(("ten apples", 18), ("apples", 22)))
    context = document["data"][0]["paragraphs"][0]["context"]
    document["data"][0]["paragraphs"][0]["qas"].append(squad(spans=())["data"][0]["paragraphs"][0]["qas"][0])
    write(tmp_path / "train-v2.0.json", json.dumps(document))
    examples = data.load("squad", tmp_path)
    assert examples[0] == Example("q1", ("What?", context), (("ten apples", 18), ("apples", 22)))
    assert examples[1].label == ()
    del document["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"]  # as in SQuAD 1.1
    write(tmp_path / "train-v2.0.json", json.dumps(document))
    assert data.load("squad", tmp_path) == examples
    del document["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    write(tmp_path / "test.json", json.dumps(document))
    assert [e.label for e in data.load("squad", tmp_path, "test")] == [None, ()]


PLACE = "data[0].paragraphs[0].qas[0]: "
SQUAD_DEFECTS = [
    ("[1, 2", ":1: not JSON: Expecting ',' delimiter"),
    ('{"data":\n\n tru}', ":3: not JSON: Expecting value at column 2"),
    ("[" * 100_000, ":1: not JSON: "),
    ("9" * 5000, ":1: not JSON: "),
    (LFS, "a Git-LFS pointer"),
    ("3", ": top level: 'data' is None, expected a list"),
    ('{"data": []}', ": no questions"),
    ('{"data": [], "data": []}', "a key is given twice among ['data', 'data']"),
    ('{"data": NaN}', ":1: not JSON: NaN is not JSON"),
    (json.dumps(squad(context="a \ud800 b", spans=())), ":1: not JSON: 'utf-8' codec can't encode"),
    (json.dumps(squad(context=3)), "data[0].paragraphs[0]: 'context' is 3, expected a str"),
    (json.dumps(squad(id=7)), PLACE + "'id' is 7, expected a str"),
    (json.dumps(squad(spans=(("ten apples", 17),))), PLACE + "'ten apples' is not in the context at 17"),
    (json.dumps(squad(spans=(("apples.", -7),))), PLACE + "'apples.' is not in the context at -7"),
    (json.dumps(squad(spans=(("", 3),))), PLACE + "'' is not"),
    (json.dumps(squad(spans=(("ten", 18.0),))), PLACE + "'answer_start' is 18.0, expected a int"),
    (json.dumps(squad(is_impossible=True)), PLACE + "is_impossible True, answers (('ten apples', 18),)"),
    (json.dumps(squad(answers=None)), PLACE + "'answers' is None, expected a list"),
]


@pytest.mark.parametrize("content, words", SQUAD_DEFECTS)
def test_a_defect_of_squad_is_one_error_that_names_the_place(tmp_path, content, words):
    path = write(tmp_path / "dev-v2.0.json", content)
    with pytest.raises(ValueError) as error:
        data.load("squad", tmp_path, "dev")
    assert str(path) in only_line(error) and words in only_line(error)


def test_gsm8k_is_read_and_its_defects_are_named(tmp_path):
    row = {"question": "How many?", "answer": "1,000 + 1 = <<1000+1=1001>>1,001\u2028\n#### 1,001"}
    path = write(tmp_path / "train.jsonl", json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row))
    examples = data.load("math", tmp_path)
    assert examples == [
        Example("0", ("How many?",), row["answer"]),
        Example("1", ("How many?",), row["answer"]),
    ]
    path.rename(tmp_path / "test.jsonl")
    assert data.load("math", tmp_path, "dev") == data.load("math", tmp_path, "test") == examples
    unlabelled = write(tmp_path / "x.jsonl", '{"question": "q"}')
    assert data.load("math", unlabelled, "test") == [Example("0", ("q",), None)]
    for bad, words in [
        ('{"question": "q"}', "does not end in '#### N'"),
        ('{"question": "q", "answer": "#### x"}', "does not end in '#### N' with a number N: '#### x'"),
        ('{"question": "q", "answer": "#### 7x2"}', "does not end in"),
        ('{"question": "q", "answer": 7}', "does not end in"),
        ('{"question": 3, "answer": "#### 7"}', "'question' is 3, expected a text"),
        ('{"answer": "#### 7"}', "no 'question'; found: 'answer'"),
        ("[1]", "expected a JSON object, found [1]"),
        ('{"question": "q",', "not JSON: "),
        ("", "a blank line"),
    ]:
        path = write(tmp_path / "y.jsonl", f"{json.dumps(row)}\n{bad}\n{json.dumps(row)}\n")
        with pytest.raises(ValueError) as error:
            data.load("math", path)
        assert only_line(error).startswith(f"{path}:2: ") and words in only_line(error)


# ------------------------------------------------------------------------ your own file


def test_custom_classes_are_found_sorted_and_kept(tmp_path):
    path = write(
        tmp_path / "my.csv",
        '\ufeffid,review,stars\r\n7,"good, ""very""\r\ngood",up\r\n8,bad,down\r\n9,so so,even\r\n\r\n',
    )
    task, examples = data.load_custom(path, ["review"], "stars")
    assert (task.kind, task.labels, task.metrics, task.pair) == (
        "classification",
        ("down", "even", "up"),
        ("accuracy", "macro_f1"),
        False,
    )
    assert examples == [
        Example("7", ('good, "very"\r\ngood',), 2),
        Example("8", ("bad",), 0),
        Example("9", ("so so",), 1),
    ]
    dev = write(tmp_path / "dev.tsv", "stars\treview\nup\tfine\n")
    assert data.load(task, dev) == [Example("0", ("fine",), 2)]
    new = write(
        tmp_path / "new.jsonl",
        '{"review": "?"}\n{"review": "!", "stars": "up"}\n{"review": "!", "stars": null}',
    )
    with pytest.raises(ValueError, match="no column 'stars'; found: 'review'"):
        data.load(task, new, "dev")
    new = write(tmp_path / "new.jsonl", '{"review": "?", "stars": null}\n{"review": "!", "stars": "up"}')
    assert [e.label for e in data.load(task, new, "test")] == [None, 2]
    assert [e.label for e in data.load(task, write(tmp_path / "new.csv", "review\nhm\n"), "test")] == [None]
    other = write(tmp_path / "other.csv", "review,stars\nhm,sideways\n")
    with pytest.raises(ValueError, match="other.csv:2: label 'sideways' is not one of 'down, even, up'$"):
        data.load(task, other)
    other = write(tmp_path / "other.csv", "review,stars\nhm,0\n")  # an integer is no code for a class of yours
    with pytest.raises(ValueError, match="label '0' is not one of"):
        data.load(task, other)


@pytest.mark.parametrize(
    "values, kind, labels",
    [
        (["10", "9", "10"], "classification", ("9", "10")),
        (["1.0", "0.0"], "classification", ("0.0", "1.0")),
        (["10", "9", "x"], "classification", ("10", "9", "x")),
        (["1", "2.5"], "regression", ()),
        (["1e-3", "-2"], "regression", ()),
    ],
)
def test_custom_numbers_are_scores_only_where_some_have_a_fraction(tmp_path, values, kind, labels):
    for ending, separator in ((".csv", ","), (".tsv", "\t")):
        path = write(
            tmp_path / f"my{ending}",
            f"a{separator}b{separator}y\n" + "".join(f"p{separator}q{separator}{v}\n" for v in values),
        )
        task, examples = data.load_custom(path, ["b", "a"], "y")
        assert (task.kind, task.labels, task.pair) == (kind, labels, True)
        assert {e.text for e in examples} == {("q", "p")}
        assert [e.label for e in examples] == [labels.index(v) if labels else float(v) for v in values]


def test_custom_jsonl_labels_may_be_numbers_and_booleans(tmp_path):
    path = write(tmp_path / "my.jsonl", '{"t": "a", "y": true}\n{"y": false, "t": "b", "more": 1}\n')
    assert data.load_custom(path, "t", "y")[0].labels == ("false", "true")
    path = write(tmp_path / "my.jsonl", '{"t": "a", "y": 2}\n{"t": "b", "y": "3"}\n')
    assert data.load_custom(path, "t", "y")[0].labels == ("2", "3")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("my.csv", "text,label\na,1\n", ":1: no column 't'; found: 'text, label'"),
        ("my.csv", "t,label\na,1\n", ":1: no column 'y'; found: 't, label'"),
        ("my.csv", "t,y\na,1\nb\n", ":3: 1 columns, expected 2"),
        ("my.csv", 't,y\n"a\nb",1\nc,1,1\n', ":4: 3 columns, expected 2"),
        ("my.csv", 't,y\na,1\n"b,1\nc,1\n', ":3: not CSV: unexpected end of data"),
        ("my.csv", 't,y\na,1\n"b"c,1\n', ":3: not CSV: ',' expected after '\"'"),
        ("my.csv", "t,y\na,1\n\nb,2\n", ":3: a blank line"),
        ("my.csv", "t,y\na,1\nb,\n", ":3: the label in 'y' is empty"),
        ("my.csv", "t,y\na,1\nb,1\n", ": every row has the label '1'; at least two are needed"),
        ("my.csv", "t,y\na,1\nb,1.0\n", ": 'y' writes one number in two ways: '1, 1.0'"),
        ("my.csv", "t,y\na,1.5\nb,2\nc,n/a\n", ":4: label 'n/a' is not a number, as 1.5 is"),
        ("my.csv", "t,t,y\na,b,1\n", ":1: two columns are named 't'"),
        ("my.tsv", "t\ty\na\t1\tb\n", ":2: 3 columns, expected 2"),
        ("my.jsonl", '{"t": "a", "y": 1}\n{"t": "b"}\n', ":2: no 'y'; found: 't'"),
        ("my.jsonl", '{"t": "a", "y": 1}\n{"t": 3, "y": 2}\n', ":2: 't' is 3, expected a text"),
        ("my.jsonl", '{"t": "a", "y": 1}\n{"t": "b", "y": [2]}\n', ":2: label [2] is not a word or a number"),
        ("my.jsonl", '{"t": "a", "y": 1}\n{"t": "b", "y": null}\n', ":2: the label in 'y' is empty"),
        ("my.jsonl", '{"t": "a", "y": 1}\n{"t": "b", "t": "c"}\n', ":2: not JSON: a key is given twice"),
    ],
)  # fmt: skip
def test_a_defect_of_a_custom_file_is_one_error(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        data.load_custom(path, ["t"], "y")
    assert only_line(error).startswith(f"{path}{words}")


# ------------------------------------------------------------------------------- fuzz


def mutated(content, rng):
    """Bytes with one to three random defects."""
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        kind = rng.randrange(8)
        if kind == 0 and content:  # a byte becomes another
            i = min(i, len(content) - 1)
            content = content[:i] + bytes([rng.randrange(256)]) + content[i + 1 :]
        elif kind == 1:  # cut
            content = content[:i]
        elif kind == 2:  # a piece is lost
            content = content[:i] + content[min(j, i + 9) :]
        elif kind == 3:  # a piece comes twice
            content = content[:i] + content[i:j][:40] * 2 + content[j:] if j - i <= 40 else content
        elif kind == 4:  # a tab more or fewer, a comma, a quote
            content = content[:i] + rng.choice([b"\t", b",", b'"', b"\n", b"\r", b"\xe2\x80\xa8", b"}", b"\\"]) + content[i:]
        elif kind == 5:
            content = content.replace(rng.choice([b"\t", b",", b'"', b"\n"]), b"", 1)
        else:  # lines are lost, doubled, swapped
            lines = content.split(b"\n")
            a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[a], lines[b] = rng.choice([(lines[b], lines[a]), (lines[a], lines[a]), (b"", lines[b])])
            content = b"\n".join(lines)
    return content


def fuzz(path, content, read, reference, rounds, seed):
    """Reads mutations: each gives exactly the reference's rows, or one line that names the file."""
    rng, outcomes = random.Random(seed), Counter()
    for _ in range(rounds):
        write(path, mutated(content, rng))
        try:
            examples = read()
        except ValueError as error:
            message = str(error)
            assert message.startswith(str(path)) and len(message.splitlines()) == 1, message
            outcomes["error"] += 1
        else:
            assert [(e.text, e.label) for e in examples] == reference(path.read_bytes())
            outcomes["rows"] += 1
    print(outcomes)
    assert min(outcomes["error"], outcomes["rows"]) > rounds // 10


def tsv_lines(content):
    """Fields of a TSV, found in its bytes; blank lines left out."""
    lines = [line[:-1] if line.endswith(b"\r") else line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return [[field.decode() for field in line.split(b"\t")] for line in lines if line]


def test_fuzz_tsv_with_and_without_a_header(tmp_path):
    rows = [('He said "no', 'a "b" c', 1), ("Zoë,\u2028 x ", "\ufeff", 0), ("", "b", 1), ("d", "e", 0)]
    content = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(f"{y}\t1\t2\t{a}\t{b}\n" for a, b, y in rows)

    def mrpc(content):
        head, *lines = tsv_lines(content)
        if head[0] in ("0", "1"):  # the header line is lost: the official order holds
            head, lines = ["Quality", "", "", "#1 String", "#2 String"], [head, *lines]
        a, b, y = (head.index(name) for name in ("#1 String", "#2 String", "Quality"))
        return [((line[a], line[b]), int(line[y])) for line in lines]

    fuzz(tmp_path / "a.tsv", content.encode(), lambda: data.load("mrpc", tmp_path / "a.tsv"), mrpc, 1000, 0)
    content = "".join(f"gj04\t{y}\t*\t{a}\r\n" for a, _, y in rows)

    def cola(content):
        return [((line[3],), int(line[1])) for line in tsv_lines(content)]

    fuzz(tmp_path / "b.tsv", content.encode(), lambda: data.load("cola", tmp_path / "b.tsv"), cola, 1000, 1)


def test_fuzz_csv(tmp_path):
    content = b'id,t,y\r\n1,"He ""said"", twice",up\r\n2,"two\r\nlines",down\r\n3,a 5" disk,up\r\n4,,down\r\n'

    def reference(content):
        text = re.sub(r"\r(?!\n|\Z)", "\0", content.decode("utf-8-sig"))  # csv takes every \r for a line end
        head, *rows = [[field.replace("\0", "\r") for field in row] for row in csv.reader(io.StringIO(text, newline="")) if row]
        labels = sorted({row[head.index("y")].strip() for row in rows})
        return [((row[head.index("t")],), labels.index(row[head.index("y")].strip())) for row in rows]

    fuzz(
        tmp_path / "a.csv",
        content,
        lambda: data.load_custom(tmp_path / "a.csv", "t", "y")[1],
        reference,
        1000,
        2,
    )


def test_fuzz_jsonl(tmp_path):
    rows = [{"question": f'How "many" \u2028 {i}?', "answer": f"é = {i}\n#### {i}"} for i in range(4)]
    content = "".join(json.dumps(row, ensure_ascii=i % 2) + "\n" for i, row in enumerate(rows)).encode()

    def reference(content):
        lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b"\r")]
        return [((row["question"],), row["answer"]) for row in map(json.loads, lines)]

    fuzz(tmp_path / "a.jsonl", content, lambda: data.load("math", tmp_path / "a.jsonl"), reference, 1000, 3)


def test_fuzz_squad(tmp_path):
    document = squad(spans=(("ten apples", 18), ("apples", 22)))
    document["data"][0]["paragraphs"] *= 2
    document["data"][0]["paragraphs"].append(squad(spans=())["data"][0]["paragraphs"][0])
    content = json.dumps(document, ensure_ascii=False, indent=1).encode()

    def reference(content):
        found = []
        for article in json.loads(content.decode("utf-8-sig"))["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    label = tuple((answer["text"], answer["answer_start"]) for answer in qa["answers"])
                    assert all(paragraph["context"][start : start + len(text)] == text for text, start in label)
                    found.append(((qa["question"], paragraph["context"]), label))
        return found

    fuzz(tmp_path / "a.json", content, lambda: data.load("squad", tmp_path / "a.json"), reference, 1000, 4)


def test_tabs_and_lines_that_move_never_lose_a_row(tmp_path):
    rng, outcomes, path = random.Random(5), Counter(), tmp_path / "a.tsv"
    for _ in range(1000):
        lines = [f"{''.join(rng.choices('ab c', k=rng.randrange(9)))}\t{rng.randrange(2)}" for _ in range(rng.randint(1, 9))]
        for _ in range(rng.randrange(3)):
            i = rng.randrange(len(lines))
            j = rng.randrange(len(lines[i]) + 1)
            change = rng.randrange(5)
            if change == 0:
                lines[i] = lines[i][:j] + "\t" + lines[i][j:]
            elif change == 1:
                lines[i] = lines[i].replace("\t", "", 1)
            elif change == 2:
                lines.insert(i, "")
            elif change == 3:
                lines.insert(i, lines[i])
            else:
                lines[i] = "\t".join([*lines[i].split("\t"), lines[i].split("\t")[-1]])
        write(path, "sentence\tlabel\n" + "\n".join(lines) + rng.choice(["", "\n", "\n\n"]))
        try:
            examples = data.load("sst2", path)
        except ValueError as error:
            line = int(re.match(re.escape(str(path)) + r":(\d+): ", str(error))[1]) - 2
            assert line < 0 or lines[line].count("\t") != 1 or lines[line].split("\t")[1] not in ("0", "1"), error
            outcomes["error"] += 1
        else:
            assert len(examples) == sum(line != "" for line in lines)
            outcomes["rows"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 100


# ------------------------------------------------------------------------- writing back


def random_text(rng, alphabet="abc \"',;é\u2028\x85\x0c\ufeff日𝄞#"):
    return "".join(rng.choices(alphabet, k=rng.randrange(12)))


def random_examples(task, rng, n=30):
    examples = []
    for i in range(n):
        text = tuple(random_text(rng) for _ in range(1 + task.pair))
        if task.kind == "classification":
            label = rng.randrange(len(task.labels))
        elif task.kind == "regression":
            label = rng.choice([round(5 * rng.random(), 3), 5 * rng.random(), 3.0])
        elif task.kind == "span":
            label = () if len(text[1]) < 3 or i % 3 == 0 else ((text[1][1:3], 1), (text[1][:2], 0))
        else:
            label = f"{random_text(rng)}\n#### {rng.randrange(10**4):,}"
        examples.append(Example(str(i), text, label))
    return examples


@pytest.mark.parametrize("name", [*GLUE, "squad", "math"])
def test_what_is_written_reads_back_identically(tmp_path, name):
    task = TASKS[name]
    for split in ("train", "dev", "test"):
        examples = random_examples(task, random.Random(f"{name} {split}"))
        path = files.write_split(task, examples, tmp_path / "new", split)
        assert data.load(name, tmp_path / "new", split) == examples
        assert sorted(p.name for p in path.parent.iterdir() if p.suffix == ".tmp") == []
    unlabelled = [Example(e.id, e.text) for e in examples]
    files.write_split(task, unlabelled, tmp_path, "test")
    assert data.load(name, tmp_path, "test") == unlabelled


def test_a_device_a_pipe_and_a_link_stay_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "pipe", "some rows\n")
    assert os.read(reader, 100) == b"some rows\n" and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    os.close(reader)
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "target"]


def test_written_tables_have_the_official_columns(tmp_path):
    for name, first in [("cola", "\t1\t\ta"), ("sst2", "sentence\tlabel"), ("stsb", f"{STSB_HEAD}\tscore")]:
        example = Example("0", ("a", "b")[: 1 + TASKS[name].pair], 1)
        path = files.write_split(TASKS[name], [example], tmp_path, "train")
        assert path.name == "train.tsv" and path.read_text().split("\n")[0] == first
    path = files.write_split(TASKS["mrpc"], [Example("0", ("a", "b"))], tmp_path, "test")
    assert path.read_text() == "index\t#1 String\t#2 String\n0\ta\tb\n"


def test_a_text_that_a_tsv_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    for text in ("a\tb", "a\nb", "a\rb", "a\0b"):
        with pytest.raises(ValueError, match="example 3 holds a tab or a line end"):
            files.write_split(TASKS["sst2"], [Example("3", (text,), 1)], tmp_path, "train")
    with pytest.raises(ValueError, match="task mlm has no official layout"):
        files.write_split(TASKS["mlm"], [Example("3", ("a",))], tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_submissions_have_glues_format(tmp_path):
    for name, predictions, lines in [
        ("cola", [1, 0], ["1", "0"]),
        ("qqp", np.array([0, 1]), ["0", "1"]),
        ("wnli", [1, 0], ["1", "0"]),
        ("mnli", [0, 1, 2], ["contradiction", "entailment", "neutral"]),
        ("qnli", [0, 1], ["entailment", "not_entailment"]),
        ("rte", [1, 0], ["not_entailment", "entailment"]),
        ("stsb", [2.5, -0.1, 5.2, 3], ["2.500", "0.000", "5.000", "3.000"]),
    ]:
        files.write_submission(TASKS[name], predictions, tmp_path / "out" / "x.tsv")
        rows = "".join(f"{i}\t{line}\n" for i, line in enumerate(lines))
        assert (tmp_path / "out" / "x.tsv").read_bytes().decode() == "index\tprediction\n" + rows


def test_a_record_that_a_line_end_broke_in_two_is_one_again(tmp_path):
    """QQP's train.tsv has such records (nyu-mll/GLUE-baselines, issue 5)."""
    head, path = "\t".join(data.TASKS["qqp"].header), tmp_path / "train.tsv"
    rows = ["1\t2\t3\twho\twhat\t0", '4\t5\t6\t"was he', '"\twas he real ?\t1', "7\t8\t9\twhy\thow\t0"]
    path.write_text("\n".join([head, *rows]) + "\n")
    found = data.load("qqp", path)
    assert [(e.text, e.label) for e in found] == [(("who", "what"), 0), (('"was he "', "was he real ?"), 1), (("why", "how"), 0)]
    path.write_text("\n".join([head, rows[0], rows[1], rows[3]]) + "\n")
    whole = rows[0].replace("1\t2", "0\t2")
    for broken, line, words in [
        ([whole, rows[0], rows[1], rows[2].replace("\t1", "\t7")], 4, "label '7'"),  # the line where the record begins
        ([whole, rows[0], "more", rows[3]], 4, "1 columns, expected 6"),  # behind a whole record nothing is joined
        ([whole, "more", rows[0], rows[3]], 3, "1 columns, expected 6"),
        ([rows[1], rows[1], rows[2]], 2, "4 columns, expected 6"),
    ]:
        path.write_text("\n".join([head, *broken]) + "\n")
        with pytest.raises(ValueError) as error:
            data.load("qqp", path)
        assert f"{path}:{line}: " in str(error.value) and words in str(error.value)
    path.write_text("\n".join([head, rows[0], rows[1], rows[3]]) + "\n")
    with pytest.raises(ValueError) as error:  # no advice to name an official file .csv
        data.load("qqp", path)
    assert str(error.value).startswith(f"{path}:3: 4 columns, expected 6: ") and "quot" not in str(error.value)


def test_a_table_of_your_own_may_be_one_json_list(tmp_path):
    rows = [{"text": f"w{i}\n", "label": "ab"[i % 2]} for i in range(4)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [data.load_custom(tmp_path / name, "text", "label") for name in ("list.json", "lines.jsonl")]
    assert found[0] == found[1] and len(found[0][1]) == 4
    good = '{"text": "a",\n "label": "x"},'
    for text, words in [
        ('\n[{"text": "a", "label": "x"},\n {"text": "b"}]', "3: no 'label'; found: 'text'"),
        (f'[{good}\n{good}\n{good}\n\n{{"text": "b"}}]\n \n', "8: no 'label'; found: 'text'"),
        (f"[{good}\n{good}\n 3]", "5: expected a JSON object, found 3"),
        (f"[{good}\n{good}\n {{]", "5: not JSON: Expecting property name enclosed in double quotes"),
        (f"[{good}\n" + '{"text": "a", "text": "b"}]', "3: not JSON: a key is given twice among"),
        (f"[{good}\n{good} x", "4: not JSON: Expecting value"),
        (f"[{good}\n{good}\n", "4: the list does not end behind its last row"),
        (f"[{good}\n{good}] x", "4: the list does not end behind its last row"),
        (" [ ]", "1: a list without rows"),
    ]:
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(ValueError) as error:
            data.load_custom(tmp_path / "list.json", "text", "label")
        assert str(error.value).startswith(f"{tmp_path / 'list.json'}:{words}"), text
