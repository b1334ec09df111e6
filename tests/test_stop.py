"""harness/stop.py: a signal saves the run and says how to go on; it goes on to the bit; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from short import TINY, adapter_of, equal, go, rows_of

import train
from harness import folder
from harness.stop import Stop, Stopped

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_the_first_signal_waits_for_what_must_be_whole():
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(Stopped) as stopped, Stop() as stop:
        with stop.after():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("whole")
        done.append("never")
    assert done == ["whole"] and stopped.value.code == 143
    with pytest.raises(Stopped) as stopped, Stop():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("never")
    assert done == ["whole"] and stopped.value.code == 130
    assert signal.getsignal(signal.SIGTERM) is before


class Signalled:
    """Python drops what a `__del__` raises."""

    def __init__(self, action):
        self.action = action

    def __del__(self):
        self.action()


def test_a_signal_within_a_del_ends_the_run_after_it(monkeypatch):
    done, seen = [], []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: seen.append(what.exc_type))
    with pytest.raises(Stopped) as stopped, Stop() as stop:
        Signalled(lambda: 1 / 0)  # what is no signal is shown as ever
        Signalled(lambda: os.kill(os.getpid(), signal.SIGTERM))
        done.append("dropped")
        with stop.after():
            done.append("whole")
        done.append("never")
    assert done == ["dropped", "whole"] and stopped.value.code == 143 and seen == [ZeroDivisionError]


def begin(csv, out, *more):
    flags = "--text text --label label --method triadapt --dropout 0.2 --epochs 60".split()
    flags += "--interval 7 --t0 3 --delta 1 --save-every 10 --eval-every 25".split()
    command = [sys.executable, "train.py", "--data", csv, *TINY, *flags, "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_goes_on_to_the_bit(csv, tmp_path, number, code):
    whole = begin(csv, tmp_path / "whole")
    part = begin(csv, tmp_path / "part")
    until = time.monotonic() + 120
    while not os.path.exists(folder.state_path(tmp_path / "part")) and part.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    part.send_signal(number)
    _, err = part.communicate()
    assert part.returncode == code, err
    step = folder.load_state(tmp_path / "part")[2]["step"]
    assert 0 < step < 120
    if number != signal.SIGKILL:
        assert err.endswith(f"keeps the state after step {step}, the same command with --resume goes on from it\n")
        assert err.count("\n") == 1
    again = begin(csv, tmp_path / "part", "--resume")
    assert again.wait() == 0 and whole.wait() == 0, again.stderr.read()
    assert f"resumed after step {step}" in again.stdout.read()
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole") and len(rows_of(tmp_path / "whole")) == 5
    assert equal(adapter_of(tmp_path / "part"), adapter_of(tmp_path / "whole"))
    assert rows_of(tmp_path / "part", "layers.jsonl") == rows_of(tmp_path / "whole", "layers.jsonl")
    # what a run leaves is the same byte for byte, however often it was stopped
    paths = [tmp_path / name / "adapter.safetensors" for name in ("part", "whole")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_signal_within_a_step_saves_that_step(csv, tmp_path, capsys, monkeypatch):
    backward, calls = train.backward, []

    def signalled(run, *more):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(run, *more)

    monkeypatch.setattr(train, "backward", signalled)
    assert go(csv, tmp_path / "run", "--method", "lora", "--save-every", "1000")[0] == 143
    assert "keeps the state after step 3, the same command with --resume goes on from it" in capsys.readouterr().err
    assert folder.load_state(tmp_path / "run")[2]["step"] == 3


def test_a_signal_after_the_state_has_gone_says_that_the_run_is_finished(csv, tmp_path, capsys, monkeypatch):
    remove = os.remove
    monkeypatch.setattr(train.os, "remove", lambda path: (remove(path), os.kill(os.getpid(), signal.SIGTERM)))
    assert go(csv, tmp_path / "run", "--method", "lora")[0] == 143
    assert capsys.readouterr().err == f"train.py: stopped; {tmp_path / 'run'} holds a finished run\n"
    assert folder.read_run(tmp_path / "run")[0]["finished"] and not os.path.exists(folder.state_path(tmp_path / "run"))


def test_a_signal_does_not_cut_off_the_last_words(csv, tmp_path, capsys, monkeypatch):
    """torchrun sends SIGTERM to the first process while that says that another has ended."""

    def fails(*_):
        raise FloatingPointError("the loss is nan")

    kept, asked = folder.kept, []
    monkeypatch.setattr(train, "backward", fails)
    monkeypatch.setattr(folder, "kept", lambda out: asked.append(os.kill(os.getpid(), signal.SIGTERM)) or kept(out))
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append("too early"))  # what a signal would meet without
    try:
        assert go(csv, tmp_path / "run", "--method", "lora")[0] == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = "train.py: the loss is nan: stopped; nothing was saved yet; it would come again: try a --lr below 0.00562\n"
    assert asked == [None] and capsys.readouterr().err == said
