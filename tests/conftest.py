"""Tests run from anywhere: the repository root is where the modules are."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from generated import suite

examples, made = suite.examples, {}


def once(task, split, seed=0):
    """Ten tasks of 6,000 rows are made once for all tests; a test that makes the splits smaller gets its own."""
    key = task, split, seed, suite.SPLITS.get(split)
    if key not in made:
        made[key] = examples(task, split, seed)
    return made[key]


suite.examples = once


@pytest.fixture
def csv(tmp_path):
    """A table of our own: 60 short sentences of two classes that one word tells apart."""
    words = ["river", "stone", "cloud", "tree", "house"]
    rows = ["text,label"]
    for i in range(60):
        rows.append(f"a {words[i % 5]} is {'warm' if i % 2 else 'cold'} and {words[i // 5 % 5]},{'yes' if i % 2 else 'no'}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(rows) + "\n")
    return str(path)
