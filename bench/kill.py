"""Runs that are killed at random moments, gone on with until they finish, and compared with one that was left alone.

    python bench/kill.py                       # 50 kills; three minutes on one core
    python bench/kill.py --kills 500 --seed 1
    python bench/kill.py --write               # also writes bench/kill.md and .jsonl

A run is `train.py` on sixty rows in a process of its own. Three of four signals are SIGKILL, the others SIGTERM, each after a
time drawn evenly between nothing and what the whole run takes. What was killed is started again by the same command, with
--resume where a state was saved, and may be killed again. In the end every file must be that of the undisturbed run, byte
for byte but for the seconds and tokens per second in metrics.jsonl; config.json, which has these files' checksums, aside.
"""

import argparse
import collections
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import speed  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  the first optimizer imports it: here once, not in every child

import train  # noqa: E402
from harness import folder  # noqa: E402

RUNS = {
    "triadapt": "--dropout 0.2 --interval 5 --t0 2 --delta 1 --save-every 3",  # grows at 14 steps
    "task_tlora": "--save-every 3",
    "adalora": "--rank 6 --rank-target 3 --t-init 2 --t-final 5 --mask-interval 4 --save-every 3",
    "lora": "--save-base BASE",  # saves as often as costs a hundredth of the time
}
FLAGS = (
    "--text text --label label --scratch --width 16 --depth 1 --heads 2 --hidden 16 --threads 1 "
    "--device cpu --no-figures --epochs 20 --batch-size 16"
)


def begin(flags, out, log):
    """A process that trains; what it says goes to the file `log`."""
    if not (child := os.fork()):
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        flags = [*flags, "--out", out, *["--resume"] * os.path.exists(folder.state_path(out))]
        code = train.main([os.path.join(out, "..", "base") if flag == "BASE" else flag for flag in flags])
        sys.stdout.flush()
        os._exit(code)
    return child


def end(child, seconds, number):
    """(exit code, whether it was signalled) of a process that gets the signal after a time, if it is still there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1]), False
        time.sleep(0.001)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), True


def files(place):
    """{name: content} of all that a run left, config.json aside."""
    found = {}
    for at, _, names in os.walk(place):
        for name in names:
            with open(os.path.join(at, name), "rb") as f:
                found[name] = f.read()
    rows = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    found["metrics.jsonl"] = [[(key, value) for key, value in row.items() if key not in train.TIMES] for row in rows]
    return {name: content for name, content in found.items() if name != "config.json"}


def trial(method, place, whole, rng, most):
    """A row: one run, killed at most so many times until it finishes."""
    expected, seconds, flags = whole
    out, log, kills = os.path.join(place, "run"), place + ".log", []
    while True:
        number = signal.SIGKILL if rng.random() < 0.75 else signal.SIGTERM
        after = rng.uniform(0, seconds) if len(kills) < most else 1e9
        code, killed = end(begin(flags, out, log), after, number)
        if not killed:
            break
        names = os.listdir(out) if os.path.isdir(out) else []
        state = (
            folder.load_state(out)[2]["step"] if "state.safetensors" in names else None
        )  # read: a damaged one would end this here
        kills.append({"signal": number.name, "after": round(after, 3), "code": code, "step": state,
                      "writing": sorted(name for name in names if name.endswith(".tmp"))})  # fmt: skip
        if code == 0:  # a SIGTERM that came when all was done
            break
    left = files(place)
    differ = sorted(name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name))
    return {"method": method, "kills": kills, "code": code, "differ": differ, "equal": code == 0 and not differ}


def table(rows):
    heads = ["run", "runs", "SIGKILL", "SIGTERM", "before the first save", "while a file was written", "most in one run"]
    lines = ["| " + " | ".join([*heads, "finished, equal to the bit"]) + " |", "|---|" + "--:|" * 7]
    for method in [*RUNS, "all"]:
        mine = [row for row in rows if method in (row["method"], "all")]
        kills = [kill for row in mine for kill in row["kills"]]
        count = collections.Counter(kill["signal"] for kill in kills)
        early, writing = (sum(map(bool, found)) for found in ([k["step"] is None for k in kills], [k["writing"] for k in kills]))
        words = f"`{method}` {RUNS[method]}" if method in RUNS else method
        most = max((len(row["kills"]) for row in mine), default=0)
        lines.append(f"| {words} | {len(mine)} | {count['SIGKILL']} | {count['SIGTERM']} | {early} | {writing} | {most} "
                     f"| {sum(row['equal'] for row in mine)} |")  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    parser.add_argument("--write", action="store_true", help="write the files beside this one too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, rows, left, begun = random.Random(args.seed), [], args.kills, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        data = os.path.join(place, "rows.csv")
        with open(data, "w") as f:
            f.write(
                "text,label\n"
                + "".join(
                    f"a {'river stone cloud tree house'.split()[i % 5]} is {'warm' if i % 2 else 'cold'},{i % 2}\n"
                    for i in range(60)
                )
            )
        wholes = {}
        for method, more in RUNS.items():
            flags = ["--data", data, *FLAGS.split(), "--method", method, *more.split()]
            start, whole = time.monotonic(), os.path.join(place, f"whole-{method}")
            os.mkdir(whole)
            code, _ = end(begin(flags, os.path.join(whole, "run"), whole + ".log"), 1e9, 0)
            assert code == 0, f"{method}: see {whole}.log"
            wholes[method] = files(whole), time.monotonic() - start, flags
        while left > 0:
            method = list(RUNS)[len(rows) % len(RUNS)]
            at = os.path.join(place, str(len(rows)))
            os.mkdir(at)
            rows.append(trial(method, at, wholes[method], rng, left))
            left -= len(rows[-1]["kills"])
            print(
                len(rows),
                method,
                [kill["signal"] for kill in rows[-1]["kills"]],
                "equal" if rows[-1]["equal"] else rows[-1],
                flush=True,
            )
    seconds = f"{time.monotonic() - begun:.0f} s"
    head = f"`python {shlex.join(sys.argv)}`: {speed.hardware('cpu')}, torch {torch.__version__}, {seconds}.\n"
    text = "\n".join([head, table(rows)]) + "\n"
    print(text)
    if args.write:
        for kind, content in (("md", text), ("jsonl", "".join(json.dumps(row) + "\n" for row in rows))):
            with open(os.path.join(ROOT, "bench", f"kill.{kind}"), "w", encoding="utf-8") as f:
                f.write(content)
    sys.exit(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    main()
