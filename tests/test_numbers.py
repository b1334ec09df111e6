"""Numbers in README and docs are those that the kept rows give."""

import collections
import gzip
import json
import os
import re
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import memory  # noqa: E402
import mutate  # noqa: E402
import speed  # noqa: E402
import sweep  # noqa: E402

import model  # noqa: E402
from harness.methods import BACKBONE_RATES, CHOSEN, METHODS  # noqa: E402


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return f.read()


def rows_of(name):
    return [json.loads(line) for line in read("bench", f"{name}.jsonl").splitlines()]


def kept(name):
    return sorted(
        f.removesuffix(".jsonl") for f in os.listdir(os.path.join(ROOT, "bench")) if re.fullmatch(name + r"-[\w-]+\.jsonl", f)
    )


@pytest.mark.parametrize("name,table", [(name, bench.table) for bench in (speed, memory) for name in kept(bench.__name__)])
def test_a_benchs_page_has_the_numbers_of_its_rows(name, table):
    page, rows = read("bench", f"{name}.md"), rows_of(name)
    shapes = list(dict.fromkeys((row["width"], row["blocks"]) for row in rows))
    for width, blocks in shapes:
        mine = [row for row in rows if (row["width"], row["blocks"]) == (width, blocks)]
        assert f"Width {width}, {blocks} blocks:\n\n{table(mine)}\n" in page
    assert page.count("Width ") == len(shapes)


def test_the_readme_has_the_numbers_of_the_rows():
    text = read("README.md")
    assert speed.readme(rows_of("speed-cpu")) in text
    peak = {row["contestant"]: row["peak_bytes"] for row in rows_of("memory-cuda-bf16")}
    assert f"saves memory, {peak['task_tlora, fast'] / peak['PEFT LoRA']:.2f} of PEFT's LoRA with Task-aware TLoRA" in " ".join(
        text.split()
    )
    world = " ".join(read("docs", "tiny_world.md").split())
    for base in ("encoder", "decoder"):
        whole = model.load_base(os.path.join(ROOT, "assets", f"{base}.safetensors"), "lm")
        assert f"of {sum(p.numel() for p in whole.parameters()):,} numbers each" in world


def test_the_defaults_have_the_best_mean_over_the_five_tasks():
    found = sweep.table(sweep.read(sweep.ROWS), "rates", [])
    means = {method: sweep.on_all(found, method) for method in METHODS}
    for method in METHODS:
        assert means[method] and not sweep.asked_of_all(found, method), method  # the search is over
        assert METHODS[method][2] == sweep.rate(max(means[method], key=means[method].get)), method


def test_the_rates_for_real_checkpoints_have_the_best_mean_over_the_real_encoders_tasks():
    found = sweep.table(sweep.read(sweep.ROWS), "encoder", [])
    asked = {"tasks": ["cola", "sst2"], "study": "encoder"}
    for method in {method for method, _ in found}:
        means = sweep.on_all(found, method, **asked)
        assert means and not sweep.asked_of_all(found, method, **asked), method  # the search is over
        assert BACKBONE_RATES[method] == (float(f"{sweep.rate(max(means, key=means.get)):.0e}"), CHOSEN), method
    assert {method for method, (_, source) in BACKBONE_RATES.items() if source == CHOSEN} == {method for method, _ in found}


def test_what_words_alone_tell_is_what_the_bench_found():
    table, text = read("bench", "cues.md"), " ".join(read("docs", "tiny_world.md").split())
    (claims,) = re.findall(r"on `qnli` they give (\S+) of 100 \(chance is (\S+)\), on `mnli` (\S+) \(chance is (\S+)\)", text)
    for task, words, chance in (("qnli", *claims[:2]), ("mnli", *claims[2:])):
        assert f"| {task} | accuracy | {chance} | {words} |" in table


def test_the_page_of_mutants_has_the_numbers_of_the_kept_verdicts():
    """Of the runs it was written from: an edit makes some of them old, which is no reason to run an hour of mutants."""
    with gzip.open(mutate.KEPT, "rt") as f:
        verdicts = collections.Counter((row["file"], row["result"]) for row in map(json.loads, f) if row["source"])
    lines = re.findall(r"^\| `([\w/.]+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) % \|$", read("bench", "mutants.md"), re.M)
    assert len(lines) >= 3
    for file, mutants, killed, equivalent, share in lines:
        assert verdicts[file, "killed"] == int(killed) and verdicts[file, "killed"] + verdicts[file, "survived"] == int(mutants)
        assert f"{100 * int(killed) / (int(mutants) - int(equivalent)):.1f}" == share
