"""harness/report.py: a run on one page, which is whole, holds its figures and asks for nothing from outside."""

import base64
import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest
from PIL import Image
from short import TINY

import train
from harness import folder, report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
    """The page's elements; AssertionError where a tag is not closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.cell = [], [], [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def out(csv, tmp_path):
    flags = [flag for flag in TINY if flag != "--no-figures"]
    path = tmp_path / "a <run> & more"
    argv = ["--data", csv, "--text", "text", "--label", "label", "--epochs", "3", *flags, "--method", "triadapt"]
    assert train.main([*argv, "--interval", "1", "--rank-ref", "3", "--delta", "1", "--out", str(path)]) == 0
    return path


def test_the_report_holds_the_run_and_needs_nothing_else(out, capsys):
    assert report.main([str(out)]) == 0 and capsys.readouterr().out == f"{out}/report.html\n"
    text = (out / "report.html").read_text(encoding="utf-8")
    page, config = Page(text), json.loads((out / "config.json").read_text())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(not {"href", "style", "onload"} & given.keys() for _, given in page.tags)
    bare = re.sub(r"base64,[^']*", "", text)
    assert "http" not in bare and "url(" not in bare and "@import" not in bare
    images = [given for tag, given in page.tags if tag == "img"]
    pngs = ["curves.png", "ranks.png", "importance.png", "histograms.png"]
    assert set(pngs) == {name for name in os.listdir(out) if name.endswith(".png")}
    for given, name in zip(images, pngs, strict=True):
        start, coded = given["src"].split(",")
        assert start == "data:image/png;base64" and base64.b64decode(coded) == (out / name).read_bytes()
        assert given["alt"] == Image.open(out / name).text["Title"] and len(given["alt"].split()) >= 5
    cells = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert cells["out"] == str(out) and "a &lt;run&gt; &amp; more" in text and "<run>" not in text
    assert cells["method"] == "triadapt" and cells["rank_ref"] == "3" and cells["preserve"] == "no" and cells["backbone"] == "–"
    assert config["settings"].keys() - {"options"} <= cells.keys() and config["settings"]["options"].keys() <= cells.keys()
    assert cells["torch"] == config["versions"]["torch"] and config["command"].split()[0] in text
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    table = [row for row in page.rows if len(row) > 2]
    assert table[0] == list(rows[0]) and [row[0] for row in table[1:]] == [str(row["step"]) for row in rows]
    assert float(table[-1][table[0].index("dev_loss")]) == pytest.approx(rows[-1]["dev_loss"], rel=1e-5)
    assert [tag for tag, given in page.tags if given.get("class") == "best"] == ["tr"]
    if BROWSER:
        look(out)


def look(out):
    """The page in a browser: laid out, in more than a few colours, with the blue of the curves."""
    shot = out.parent / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1600",
               f"--user-data-dir={out.parent / 'browser'}", f"--screenshot={shot}", (out / "report.html").as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 100 and (0x00, 0x72, 0xB2) in {colour for _, colour in colours}
    assert max(n for n, _ in colours) < 0.95 * 1000 * 1600  # not one colour all over


def test_the_best_row_is_that_of_the_headline_metric():
    history = [{"step": 1, "dev_loss": 0.5, "f1": 0.75}, {"step": 2, "dev_loss": 0.25, "f1": 0.5}]
    assert report.best_of(history, "f1")["step"] == 1 and report.best_of(history, "dev_loss")["step"] == 2
    assert "<tr class='best'><td>1</td><td>0.5</td><td>0.75</td></tr>" in report.metrics(history, "f1")


def test_any_value_becomes_harmless_text():
    assert report.text("<script>'&\"") == "&lt;script&gt;&#x27;&amp;&quot;"
    values = {"–": None, "yes": True, "no": False, "0.123457": 0.1234567, "0.9, 0.999": [0.9, 0.999], "3": 3, "": []}
    assert [report.text(value) for value in values.values()] == list(values)


def test_what_cannot_be_reported_is_said_in_one_line(out, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no evaluation to show: its adapter was trained elsewhere"):
        folder.evaluations(str(tmp_path))
    assert report.main(["-h"]) == 2 and "usage: python -m harness.report RUN" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"report: error: {tmp_path} is not a run folder: it has no config.json\n"
    folder.write_json(out / "config.json", {**json.loads((out / "config.json").read_text()), "finished": None})
    assert report.main([str(out)]) == 2
    assert capsys.readouterr().err == f"report: error: {out} holds a run that did not finish: it has no metrics.jsonl yet\n"
