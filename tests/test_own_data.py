"""Files of your own, as people have them: labels, ids, scores, separators, quotes, empty and long texts, few rows.

Every question stops train.py before anything is written, in one line and with exit code 2.
"""

import csv
import io
import json
import sys

import pytest
from short import TINY

import data
import predict
import train
from data import Example
from harness import folder
from harness.run import Run, split
from harness.settings import Settings


def write(path, rows, header="id,text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def go(path, out, *more):
    argv = ["--data", str(path), "--text", "text", "--label", "label", "--method", "lora", "--epochs", "1", "--out", str(out)]
    return train.main([*argv, *TINY, *more])


def refused(path, tmp_path, capsys, words, *more):
    """The run stops with these words behind the path, and there is no run folder."""
    assert go(path, tmp_path / "out", *more) == 2
    screen = capsys.readouterr()
    assert (screen.out, screen.err) == ("", f"train.py: error: {path}{words}\n")
    assert not (tmp_path / "out").exists()


def kept(out):
    """The task that a run folder keeps."""
    return json.loads((out / "config.json").read_text())["task"]


# ---------------------------------------------------------------------------- labels


TOPICS = [f"{i},a text about {i},{('billing', 'refund')[i % 2]}" for i in range(20)]
ALIKE = (
    ":22: label {} and 'billing' of line 2 differ only in case, spaces or Unicode form: correct one, or "
    "--merge-labels takes them as one class"
)


@pytest.mark.parametrize("spelling", ["billing ", " billing", "Billing", "BILLING", "\tBilling  "])
def test_labels_that_differ_in_case_or_spaces_are_an_error_or_one_class_by_a_flag(tmp_path, capsys, spelling):
    path = write(tmp_path / "my.csv", [*TOPICS, f"20,another,{spelling}"])
    refused(path, tmp_path, capsys, ALIKE.format(repr(spelling)))
    assert go(path, tmp_path / "out", "--merge-labels") == 0
    assert (kept(tmp_path / "out")["labels"], kept(tmp_path / "out")["merge_labels"]) == (["billing", "refund"], True)
    assert "classification (billing, refund)" in capsys.readouterr().out


def test_an_accent_in_two_unicode_forms_is_one_label(tmp_path):
    path = write(tmp_path / "my.csv", ["0,a,caf\u00e9", "1,b,tea", "2,c,cafe\u0301", "3,d,cafe\u0301"])
    with pytest.raises(ValueError, match="my.csv:4: label '.*' and '.*' of line 2 differ only in case, spaces or Unicode form"):
        data.load_custom(path, "text", "label")
    task, examples = data.load_custom(path, "text", "label", merge_labels=True)
    assert task.labels == ("cafe\u0301", "tea")  # the commonest spelling
    assert [e.label for e in examples] == [0, 1, 0, 0]


def test_a_merged_class_has_its_commonest_spelling_and_other_files_follow(tmp_path, capsys):
    path = write(tmp_path / "my.csv", ["0,a,Yes", "1,b,no", "2,c,yes ", "3,d, yes", "4,e,NO", "5,f,no"])
    task, examples = data.load_custom(path, "text", "label", merge_labels=True)
    assert task.labels == ("no", "yes") and [e.label for e in examples] == [1, 0, 1, 1, 0, 0]
    dev = write(tmp_path / "dev.csv", ["0,a,YES", "1,b, No"])
    assert [e.label for e in data.load(task, dev, "dev")] == [1, 0]
    assert go(path, tmp_path / "out", "--merge-labels", "--dev", str(dev)) == 0
    capsys.readouterr()
    assert predict.main([str(tmp_path / "out"), str(dev)]) == 0
    screen = capsys.readouterr()
    assert "accuracy" in screen.err and {line.split("\t")[1] for line in screen.out.splitlines()[1:]} <= {"yes", "no"}


def test_without_the_flag_another_file_is_trimmed_and_its_case_is_an_error_that_says_so(tmp_path, capsys):
    path = write(tmp_path / "my.csv", [*TOPICS[:8], "8,t, maybe", "9,t, maybe"])
    task, _ = data.load_custom(path, "text", "label")
    assert task.labels == ("billing", "maybe", "refund")
    dev = write(tmp_path / "dev.csv", ["0,a,billing ", "1,b,maybe", "2,c, refund"])
    assert [e.label for e in data.load(task, dev, "dev")] == [0, 1, 2]
    write(dev, ["0,a,Billing"])
    assert go(path, tmp_path / "out", "--dev", str(dev)) == 2
    assert capsys.readouterr().err == (f"train.py: error: {dev}:2: label 'Billing' is not one of 'billing, maybe, refund' "
                                       "(a run with --merge-labels takes it as 'billing')\n")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_label_of_spaces_is_empty(tmp_path, capsys):
    refused(write(tmp_path / "my.csv", [*TOPICS, "20,x,  "]), tmp_path, capsys, ":22: the label in 'label' is empty")


def test_minus_one_is_a_class_of_an_own_file_that_has_it(tmp_path):
    task, _ = data.load_custom(write(tmp_path / "my.csv", ["0,a,-1", "1,b,1", "2,c,0"]), "text", "label")
    new = write(tmp_path / "new.csv", ["0,a,-1", "1,b,"])
    assert task.labels == ("-1", "0", "1") and [e.label for e in data.load(task, new, "test")] == [0, None]


# --------------------------------------------------------------- how many classes, and scores


MANY = ": 'label' has 300 different labels: is each meant as a class? (--classes-ok goes on)"
ONE_EACH = ": 'label' has {} different labels in {} rows, as an id or a text has: is it the column of labels? ({})"
NUMBERS = "--classes-ok goes on, --kind regression takes them as scores"


def test_300_labels_are_a_question(tmp_path, capsys):
    path = write(tmp_path / "my.csv", [f"{i},t,topic {i % 300}" for i in range(1200)])
    refused(path, tmp_path, capsys, MANY)
    task, _ = data.load_custom(path, "text", "label", classes_ok=True)
    assert len(task.labels) == 300
    path = write(tmp_path / "my.csv", [f"{i},t,{i % 300}" for i in range(1200)])
    refused(path, tmp_path, capsys, MANY.replace("goes on", "goes on, --kind regression takes them as scores"))
    path = write(tmp_path / "my.csv", [f"{i},t,topic {i % 100}" for i in range(1200)])
    assert len(data.load_custom(path, "text", "label")[0].labels) == 100


def test_an_id_or_a_text_as_the_label_is_a_question(tmp_path, capsys):
    path = write(tmp_path / "my.csv", [f"t{i},text {i},{i}" for i in range(12)])
    refused(path, tmp_path, capsys, ONE_EACH.format(12, 12, NUMBERS))
    assert go(path, tmp_path / "out", "--classes-ok") == 0
    assert kept(tmp_path / "out")["labels"] == [str(i) for i in range(12)]
    path = write(tmp_path / "ids.csv", [f"t{i},text {i},ticket {min(i, 10)}" for i in range(20)])  # nearly every row
    capsys.readouterr()
    assert go(path, tmp_path / "other") == 2
    assert capsys.readouterr().err == f"train.py: error: {path}{ONE_EACH.format(11, 20, '--classes-ok goes on')}\n"
    assert not (tmp_path / "other").exists()


def test_stars_are_classes_or_scores_as_kind_says(tmp_path, capsys):
    path = write(tmp_path / "my.csv", [f"{i},text {i},{1 + i % 5}" for i in range(40)])
    assert data.load_custom(path, "text", "label")[0].labels == ("1", "2", "3", "4", "5")
    assert go(path, tmp_path / "out", "--kind", "regression") == 0
    task = kept(tmp_path / "out")
    assert (task["kind"], task["labels"], task["metrics"]) == ("regression", [], ["pearson", "spearman"])
    run = Run.open(str(tmp_path / "out"))
    assert [e.label for e in data.load(run.task, write(tmp_path / "new.csv", ["0,a, 4 ", "1,b,-1"]), "test")] == [4.0, -1.0]
    capsys.readouterr()
    assert predict.main([str(tmp_path / "out"), str(path)]) == 0
    assert capsys.readouterr().err.startswith("pearson ")
    path = write(tmp_path / "my.csv", ["0,a,1.5", "1,b,1.5", "2,c,2"])
    assert data.load_custom(path, "text", "label")[0].kind == "regression"
    assert data.load_custom(path, "text", "label", kind="classification")[0].labels == ("1.5", "2")


def test_words_are_no_scores(tmp_path, capsys):
    path = write(tmp_path / "my.csv", ["0,a,1", "1,b,good", "2,c,3"])
    refused(path, tmp_path, capsys, ":3: label 'good' is not a number, as --kind regression has them", "--kind", "regression")


def test_a_decimal_comma_is_no_name_of_a_class(tmp_path, capsys):
    path = write(tmp_path / "my.csv", ["0;a;4,5", "1;b;3", "2;c;2,5"], "id;text;label")
    words = ":2: label '4,5' has a comma: a number has a decimal point and no comma "
    refused(path, tmp_path, capsys, words + "(--kind classification takes it as a class's name)")
    assert data.load_custom(path, "text", "label", kind="classification")[0].labels == ("2,5", "3", "4,5")


# ----------------------------------------------------------------- separators and quotes


@pytest.mark.parametrize("separator", ";\t,")
def test_a_csv_has_the_separator_with_which_its_header_has_the_columns(tmp_path, separator):
    out = io.StringIO()
    rows = [["7", 'a; "b", \t c', "yes"], ["8", "two\nlines", "no"]]
    csv.writer(out, delimiter=separator).writerows([["id", "text", "label"], *rows])
    (tmp_path / "my.csv").write_text(out.getvalue(), newline="")
    task, examples = data.load_custom(tmp_path / "my.csv", "text", "label")
    assert examples == [Example("7", ('a; "b", \t c',), 1), Example("8", ("two\nlines",), 0)]
    new = write(tmp_path / "new.csv", ["hm;,"], "text;more")  # another file of the run has its own
    assert data.load(task, new, "test") == [Example("0", ("hm",))]


@pytest.mark.parametrize(
    "name,header,words",
    [
        ("my.csv", "titel;klasse", "semicolons"),
        ("my.csv", "titel\tklasse", "tabs"),
        ("my.csv", "text|label", "'|': save it with commas"),
        ("my.tsv", "text,label", "commas: name it .csv"),
        ("my.tsv", "text;label", "semicolons: name it .csv"),
        ("my.txt", "text|label", "'|': save it with commas"),
    ],
)
def test_another_separator_is_named(tmp_path, capsys, name, header, words):
    words = f":1: no column 'text'; found: {header!r}; its columns seem to be separated by {words}"
    refused(write(tmp_path / name, ["a", "b"], header), tmp_path, capsys, words)


NO_QUOTING = "; in a TSV a quote is text and no field holds a tab or a line end: name a file with quoting .csv"


@pytest.mark.parametrize(
    "content,words",
    [
        ('text\tlabel\n"a\tb"\tyes\nc\tno\n', ":2: 3 columns, expected 2: 'text, label'"),
        ('text\tlabel\n"a\nb"\tyes\nc\tno\n', ":2: 1 columns, expected 2: 'text, label'"),
        ('"text"\t"label"\n"a"\t"yes"\n', """:1: no column 'text'; found: '"text", "label"'"""),
    ],
)
def test_quotes_in_a_tsv_say_how_quoting_works_and_the_way_out_works(tmp_path, capsys, content, words):
    (tmp_path / "my.tsv").write_text(content)
    refused(tmp_path / "my.tsv", tmp_path, capsys, words + NO_QUOTING)
    path = tmp_path / "my.csv"
    path.write_text(content + '"d"\t"no"\n')
    assert data.load_custom(path, "text", "label")[1][-1].text == ("d",)


def test_quotes_in_a_csv_say_how_quoting_works(tmp_path, capsys):
    path = write(tmp_path / "my.csv", ["0,fine,yes", '1,"a "b" c",no'])
    how = "a field with a separator, a quote or a line end stands in quotes, and a quote in it is doubled"
    refused(path, tmp_path, capsys, f":3: not CSV: ',' expected after '\"'; {how}")


@pytest.mark.parametrize(
    "rows,texts",
    [
        ('"a\rb",yes\nc,no\n', ["a\rb", "c"]),
        ("a\rb,yes\nc,no\n", ["a\rb", "c"]),  # as csv.writer and pandas write it where lines end with \n
        ("a\r,yes\r\nc\r\r,no\r\n", ["a\r", "c\r\r"]),
        ('"a\r\n\rb",yes\r\nc,no\r', ["a\r\n\rb", "c"]),
        ('"\r""\r",yes\nc,no\n', ['\r"\r', "c"]),
    ],
)
def test_a_lone_carriage_return_is_text_in_a_csv(tmp_path, rows, texts):
    (tmp_path / "my.csv").write_text("text,label\n" + rows, newline="")
    _, examples = data.load_custom(tmp_path / "my.csv", "text", "label")
    assert [e.text[0] for e in examples] == texts and [e.label for e in examples] == [1, 0]


def test_a_csv_round_trips_whatever_its_texts_hold(tmp_path):
    texts = ["a\rb", "\r", "\n\r\n", '"', '""\r""', ";\t,|", " a ", "", "x" * 200_000, "\u2028\x85\x0b"]
    for separator in ",;\t":
        for end in ("\n", "\r\n"):
            out = io.StringIO()
            writer = csv.writer(out, delimiter=separator, lineterminator=end)
            writer.writerows([["text", "label"], *([text, "no" if i % 2 else "yes"] for i, text in enumerate(texts))])
            (tmp_path / "my.csv").write_text(out.getvalue(), newline="")
            assert [e.text[0] for e in data.load_custom(tmp_path / "my.csv", "text", "label")[1]] == texts


def test_lines_that_end_with_a_carriage_return_alone_are_named(tmp_path, capsys):
    (tmp_path / "my.csv").write_text("text,label,\ra,yes,\rb,no,\r", newline="")
    refused(tmp_path / "my.csv", tmp_path, capsys, r":1: a header and no rows: its lines end with \r alone, save it with \n")


# ------------------------------------------------------- what is counted, and few rows


def lines_of(out, word):
    return [line for line in out.splitlines() if line.startswith(word)]


def test_empty_and_long_texts_are_counted(tmp_path, capsys):
    rows = [f"{i},{('a river', '', '  ', 'word ' * 200)[i % 4]},{'yes' if i % 2 else 'no'}" for i in range(40)]
    path, dev = write(tmp_path / "my.csv", rows), write(tmp_path / "dev.csv", rows[:12])
    assert go(path, tmp_path / "out", "--dev", str(dev)) == 0
    out = capsys.readouterr().out
    words = "rows have an empty text"
    assert lines_of(out, "empty") == [f"empty   20 of 40 training {words}", f"empty   6 of 12 development {words}"]
    assert lines_of(out, "cut") == ["cut     10 of 40 training texts do not fit in --max-length 128 tokens"]
    assert lines_of(out, "note    a dev") == []
    assert predict.main([str(tmp_path / "out"), str(dev), "--format", "jsonl"]) == 0
    screen = capsys.readouterr()
    assert screen.err.splitlines()[:2] == [
        f"predict.py: 6 of 12 {words}",
        "predict.py: 3 of 12 texts do not fit in the run's 128 tokens: cut",
    ]
    assert len(screen.out.splitlines()) == 12


@pytest.mark.parametrize("n,words", [(5, "1 says nothing"), (90, "9 says little"), (100, None)])
def test_a_development_set_of_a_few_rows_is_warned_of(tmp_path, capsys, n, words):
    path = write(tmp_path / "my.csv", [f"{i},text {i},{'yes' if i % 2 else 'no'}" for i in range(n)])
    assert go(path, tmp_path / "out") == 0
    expected = [f"note    a development set of {words}: give more rows, or --dev FILE"] if words else []
    assert lines_of(capsys.readouterr().out, "note    a dev") == expected


def test_one_row_alone_is_refused():
    words = "^my.jsonl: one row is too few: one is held out for development, --dev FILE gives others$"
    with pytest.raises(ValueError, match=words):
        split(Settings(data="my.jsonl"), [Example("0", ("a",), 1)], None)


# ---------------------------------------------------------------------------- predict.py


class Input:
    def __init__(self, text):
        self.buffer = io.BytesIO(text.encode())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    assert go(write(root / "my.csv", TOPICS), root / "out") == 0
    return str(root / "out")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    path = write(root / "my.csv", [f"a {i},b,{'yes' if i % 2 else 'no'}" for i in range(20)], "text,other,label")
    assert go(path, root / "out", "--text", "text", "other") == 0
    return str(root / "out")


TICKETS = ["T-9,long " + "word " * 90, 'T-2,"two\nlines, ""quoted"""', "T-7,short", "T-2,again"]


def predicted(argv, capsys):
    """(rows that predict.py shows, standard error)."""
    assert predict.main(argv) == 0
    screen = capsys.readouterr()
    if "jsonl" in argv:
        return [json.loads(line) for line in screen.out.splitlines()], screen.err
    return list(csv.DictReader(io.StringIO(screen.out, newline=""), delimiter="\t")), screen.err


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
@pytest.mark.parametrize("column", ["id", "idx", "index", "ID", "ticket"])
def test_predictions_keep_id_text_and_order(run, tmp_path, capsys, form, column):
    path = write(tmp_path / "new.csv", TICKETS, f"{column},text")
    flags = ["--format", form, "--text"] + ["--id", "ticket"] * (column == "ticket")
    rows, _ = predicted([run, str(path), *flags], capsys)
    assert [row["id"] for row in rows] == ["T-9", "T-2", "T-7", "T-2"]
    assert [row["text"] for row in rows] == ["long " + "word " * 90, 'two\nlines, "quoted"', "short", "again"]
    assert list(rows[0]) == ["id", "text", "prediction", "p(billing)", "p(refund)"]
    assert list(predicted([run, str(path)], capsys)[0][0]) == ["id", "prediction", "p(billing)", "p(refund)"]


def test_an_id_column_that_is_missing_or_means_nothing_is_named(run, tmp_path, capsys):
    path = write(tmp_path / "new.csv", TICKETS, "ticket,text")
    for argv, words in [
        ([run, str(path), "--id", "tikcet"], f"{path}:1: no column 'tikcet'; found: 'ticket, text'"),
        ([run, "-", "--id", "ticket"], "--id names a column of a table, of which this run reads none"),
    ]:
        assert predict.main(argv) == 2
        screen = capsys.readouterr()
        assert (screen.out, screen.err) == ("", f"predict.py: error: {words}\n")


def test_a_blank_line_on_standard_input_is_an_empty_text(run, capsys, monkeypatch):
    for given, texts in [
        ("one\n\ntwo\n", ["one", "", "two"]),
        ("\n", [""]),
        ("one\r\n\r\n", ["one", ""]),
        ("\n\nlast", ["", "", "last"]),
    ]:
        monkeypatch.setattr(sys, "stdin", Input(given))
        rows, err = predicted([run, "-", "--text", "--format", "jsonl"], capsys)
        assert [(row["id"], row["text"]) for row in rows] == [(str(i), text) for i, text in enumerate(texts)]
        assert err == f"predict.py: {texts.count('')} of {len(texts)} rows have an empty text\n"
    monkeypatch.setattr(sys, "stdin", Input(""))
    assert predict.main([run, "-"]) == 2
    assert capsys.readouterr().err == "predict.py: error: <stdin>:1: there is no line\n"


def test_pairs_show_both_texts(pair, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Input("a\tb\n\t\nc\t\n"))
    rows, err = predicted([pair, "-", "--text"], capsys)
    assert [(row["text1"], row["text2"]) for row in rows] == [("a", "b"), ("", ""), ("c", "")]
    assert err == "predict.py: 2 of 3 rows have an empty text\n"
    monkeypatch.setattr(sys, "stdin", Input("a\tb\n\nc\td\n"))
    assert predict.main([pair, "-"]) == 2
    assert capsys.readouterr().err == "predict.py: error: <stdin>:2: 1 texts, expected two texts with a tab between them\n"


def test_what_the_flags_decided_is_part_of_the_run(tmp_path, capsys):
    path = write(tmp_path / "my.csv", [f"{i},text {i},{1 + i % 5}" for i in range(40)])
    assert go(path, tmp_path / "out", "--kind", "regression") == 0
    settings = folder.read_config(tmp_path / "out")["settings"]
    assert (settings.kind, settings.merge_labels, settings.classes_ok) == ("regression", False, False)
    capsys.readouterr()
    assert go(path, tmp_path / "out") == 2
    assert f"{tmp_path / 'out'} holds another run (kind regression, now None)" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_lone_carriage_return_in_a_field_is_text(tmp_path, ending):
    path = tmp_path / "rows.csv"
    path.write_bytes(ending.join(["text,label", "a\rb,yes", '"c\rd, e",no', "f,yes", ""]).encode())
    task, examples = data.load_custom(str(path), ["text"], "label", classes_ok=True)
    assert [e.text for e in examples] == [("a\rb",), ("c\rd, e",), ("f",)]
