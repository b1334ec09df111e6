"""Tests run from anywhere: the repository root is where the modules are."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
