"""What goes wrong around a run ends in one line, a code that says so and the last good files; nothing shows a traceback."""

import builtins
import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from short import TINY, adapter_of, equal, go, rows_of

import train
from harness import folder, sealed

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OPEN = open
SAVES = ["--method", "lora", "--rank", "2", "--epochs", "2", "--save-every", "1"]  # two steps an epoch


class Fault:
    """The n-th operation that writes below `place` fails with an error number; counts them all."""

    def __init__(self, monkeypatch, place, number, n):
        self.place, self.number, self.n, self.count = str(place), number, n, 0
        for name in ("fsync", "replace", "remove"):
            monkeypatch.setattr(os, name, self.failing(getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self.failing(OPEN))

    def failing(self, f):
        def call(what, *args, **more):
            writes = f is not OPEN or set("wax+") & set(args[0] if args else more.get("mode", "r"))
            if writes and (isinstance(what, int) or str(what).startswith(self.place)):
                self.count += 1
                if self.count == self.n:
                    raise OSError(self.number, os.strerror(self.number), *[what][: not isinstance(what, int)])
            return f(what, *args, **more)

        return call


def one_line(capsys, *words):
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: ") and err.count("\n") == 1 and all(word in err for word in words), err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only_at_any_write_leaves_the_last_good_state(csv, tmp_path, capsys, number):
    def run(out, n, *more):
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, out, number, n)
            code, _ = go(csv, out, *SAVES, *more)
        return code, fault.count

    code, count = run(tmp_path / "whole", 0)
    expected = rows_of(tmp_path / "whole"), adapter_of(tmp_path / "whole")
    assert code == 0 and count > 30
    out, steps = tmp_path / "run", []
    for n in range(1, count + 1, 1 if number == errno.ENOSPC else 7):
        capsys.readouterr()
        assert run(out, n)[0] == 2, n
        one_line(capsys, os.strerror(number), str(out))
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
        if os.path.exists(folder.state_path(out)):
            steps.append(folder.load_state(out)[2]["step"])
        if n % 9 == 1 or n == count:
            assert go(csv, out, *SAVES, *["--resume"] * os.path.exists(folder.state_path(out)))[0] == 0
            assert rows_of(out) == expected[0] and equal(adapter_of(out), expected[1])
        shutil.rmtree(out)
    print(f"{count} writes, failed with {os.strerror(number)}")
    assert steps == sorted(steps) and {2, 4} <= set(steps) <= {1, 2, 3, 4}  # never an older one than was there


@contextlib.contextmanager
def file_size_limit(size):
    """No file of this process gets longer than `size` bytes: writing fails halfway, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_get_so_long_is_named_and_the_run_goes_on_once_it_can(csv, tmp_path, capsys):
    out, base = tmp_path / "run", tmp_path / "base.safetensors"
    argv = [
        "--data",
        csv,
        "--text",
        "text",
        "--label",
        "label",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--method",
        "lora",
        "--rank",
        "1",
    ]
    argv += ["--epochs", "1", "--out", str(out), "--save-base", str(base)]
    named = []
    for size in (0, 1000, 20_000, 100_000, 200_000, 2_000_000, 2_117_560):  # the last two: the base, without and with its seal
        if os.path.exists(out):
            shutil.rmtree(out)
        capsys.readouterr()
        with file_size_limit(size):
            assert train.main([*argv, *["--no-figures"] * (size != 200_000)]) == 2
        err = capsys.readouterr().err
        assert "File too large" in err and err.count("\n") == 1 and err.startswith(f"train.py: error: {tmp_path}"), err
        named.append(os.path.basename(err.split(": ")[2]))
        assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".tmp")]
    assert named == ["config.json"] * 2 + ["state.safetensors"] * 2 + ["base.safetensors"] * 3
    sealed.check(str(base))  # the last: written whole, but without its seal
    assert train.main([*argv, "--no-figures", "--resume"]) == 0 and not os.path.exists(folder.state_path(out))
    assert "sealed" in sealed.raw(str(base))[1]


def test_a_place_where_no_folder_can_be_is_one_line(csv, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    for more in (["--out", tmp_path / "file" / "run"], ["--out", tmp_path / "run", "--save-base", tmp_path / "file" / "base"]):
        assert train.main(["--data", csv, "--text", "text", "--label", "label", *TINY, *map(str, more)]) == 2
        one_line(capsys, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "text" and not (tmp_path / "run").exists()


def test_a_folder_that_is_removed_while_its_run_trains_is_one_line(csv, tmp_path, capsys, monkeypatch):
    save, out = folder.save, tmp_path / "run"

    def gone(run, progress, optimizer):
        if progress.step == 3:
            shutil.rmtree(out)
        save(run, progress, optimizer)

    monkeypatch.setattr(folder, "save", gone)
    assert go(csv, out, *SAVES)[0] == 2
    one_line(capsys, f"{out}/state.safetensors", "No such file or directory")
    assert not out.exists()


# ------------------------------------------------------------------- standard streams

PROGRAM = """
import importlib, json, os, sys
sys.path[:0] = [{root!r}]
import torch
torch.set_num_threads(1)
import numpy, safetensors.torch, tokenizers, torch._dynamo, torch.utils.checkpoint, tqdm  # here once, not in every child
def run(script, argv, closed, out, err):
    for place, number in ((out, 1), (err, 2)):
        if place == "pipe":  # whose reader has gone
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open(place, os.O_WRONLY | os.O_CREAT)
        os.dup2(writer, number)
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    sys.exit(importlib.import_module(script).main(argv))
for line in sys.stdin:
    if not (child := os.fork()):
        run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_standard_streams_that_are_closed_or_full(csv, tmp_path):
    flags = [
        "--data",
        csv,
        "--text",
        "text",
        "--label",
        "label",
        *TINY,
        "--method",
        "lora",
        "--epochs",
        "1",
        "--overwrite",
        "--out",
    ]
    jobs, seen = [], []

    def job(script, argv, code, words, closed=(), out=None, err=None):
        n = len(jobs)
        jobs.append([script, list(map(str, argv)), closed, out or str(tmp_path / f"{n}.out"), err or str(tmp_path / f"{n}.err")])
        seen.append((code, words))

    run, full = tmp_path / "run", "/dev/full"
    job("train", [*flags, run], 0, "")
    job("train", [*flags, tmp_path / "a"], 0, "", closed=[0, 1, 2])
    job("train", [*flags, tmp_path / "b"], 1, "standard output was closed: stopped; nothing was saved yet\n", out="pipe")
    job("predict", [run, csv], 2, "predict.py: error: standard output is closed\n", closed=[1])
    job("predict", [run, csv, "--submission", "x"], 2, "GLUE takes no submission", closed=[1])
    job("predict", [run, csv], 0, "", closed=[2])
    job("predict", [run, "-"], 2, "predict.py: error: <stdin>:1: there is no line\n", closed=[0])
    job("predict", [run, csv], 0, "", out="pipe")
    if os.path.exists(full):
        job("train", [*flags, tmp_path / "c"], 2, "train.py: error: standard output: No space left on device\n", out=full)
        job("predict", [run, csv], 2, "predict.py: error: standard output: No space left on device\n", out=full)
        job("train", [*flags, tmp_path / "d"], 0, "", err=full)
    given = "".join(json.dumps(one) + "\n" for one in jobs)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as most users' Python is
    program = [sys.executable, "-c", PROGRAM.format(root=ROOT)]
    result = subprocess.run(program, input=given, capture_output=True, text=True, env=buffered)
    codes = list(map(int, result.stdout.split()))
    for n, (code, words) in enumerate(seen):
        err = (tmp_path / f"{n}.err").read_text() if (tmp_path / f"{n}.err").exists() else ""
        assert codes[n] == code and words in err and err.count("\n") <= 1 and "Traceback" not in err, (jobs[n], codes[n], err)
    assert equal(adapter_of(run), adapter_of(tmp_path / "a"))
    assert len((tmp_path / "5.out").read_text().splitlines()) == 61
