"""Tests run from anywhere: the repository root is where the modules are."""

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import suite  # noqa: E402

suite.examples = functools.cache(suite.examples)  # ten tasks of 6,000 rows: made once for all tests
