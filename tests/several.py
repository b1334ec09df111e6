"""What the processes do in tests/test_parallel.py, started by torchrun: one run after another, from a file of argument lists.

several.py FILE [STEP NUMBER]      # process NUMBER is killed before its STEP-th backward pass
"""

import json
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train

backward, steps = train.backward, []


def killed(*arguments):
    steps.append(arguments)
    if len(steps) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*arguments)


if sys.argv[3:] == [os.environ["RANK"]]:
    train.backward = killed
with open(sys.argv[1]) as f:
    codes = [train.main(argv) for argv in json.load(f)]
sys.exit(max(codes))
