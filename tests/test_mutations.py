"""config.json and headers of safetensors changed by the thousand: refused in one line, or read as what they were."""

import copy
import functools
import json
import random
import struct

import pytest
import torch
from short import equal, go
from test_sealed import flipped

import data
from harness import folder, sealed
from harness.run import Run, build_model
from harness.settings import Settings
from harness.stop import Stopped
from model import Config, Transformer, save_base

VALUES = [
    None, True, False, 0, 1, -1, 2, 3.5, 1e308, 10**20, float("nan"), float("inf"), "", "x", "lora", "F32", "F64", "I64", "BOOL",
    "../../x",
    "a\nb", "\ud800", [], [1], [[]], ["x"], {}, {"x": 1}, [0, 0], [10**12], [-1, 4], "blocks.0.q_proj", "0" * 64,
]  # fmt: skip


def places(value, path=()):
    """The paths of all that is in a value of JSON."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutated(value, rng):
    """A copy of a dictionary of JSON with one thing in it changed."""
    value = copy.deepcopy(value)
    *path, last = rng.choice(list(places(value)))
    holder = functools.reduce(lambda held, key: held[key], path, value)
    old, kind = holder[last], rng.randrange(8)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "rank", "seed", last + "x", "__metadata__"])] = old
    elif kind == 2 and isinstance(holder, dict):  # renamed
        holder[rng.choice([last.upper(), last[:-1], f"../{last}"])] = holder.pop(last)
    elif kind == 3:
        holder[last] = rng.choice([[old], {"x": old}, str(old), [old, old]])
    elif kind == 4 and type(old) in (int, float):
        holder[last] = rng.choice([old + 1, -old, old * 2, old / 2, float(old), str(old), old + 10**15])
    elif kind == 5 and isinstance(old, str | list):
        holder[last] = rng.choice([old * 2, old[:-1], old[1:], old[::-1]])
    else:
        holder[last] = rng.choice(VALUES)
    return value


def torn(content, rng):
    """Bytes with one flipped bit, or some lost, doubled or put in, or all behind a place lost."""
    i, n = rng.randrange(len(content)), rng.randrange(1, 9)
    flip = bytes([content[i] ^ 1 << rng.randrange(8)])
    return rng.choice([
        content[:i] + flip + content[i + 1 :], content[:i] + content[i + n :], content[: i + n] + content[i:],
        content[:i] + rng.choice([b"\0", b"[", b"}", b'"', b"\xff", b"9"]) * n + content[i:], content[:i],
    ])  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """The tokenizer is read once."""
    monkeypatch.setattr(data, "Tokenizer", functools.cache(data.Tokenizer))


@pytest.fixture
def finished(csv, tmp_path):
    assert go(csv, tmp_path / "run", "--method", "lora", "--rank", "2", "--epochs", "1")[0] == 0
    return tmp_path / "run"


def refused(read, *where):
    """Whether read() refuses in one line. What else it raises ends the test."""
    try:
        read()
    except (ValueError, OSError) as e:
        assert type(e) in (ValueError, OSError) and "\n" not in str(e), repr(e)
        return True
    except Exception as e:
        raise AssertionError(f"{type(e).__name__}: {e}: {where}") from e
    return False


def test_configs(quick, csv, finished):
    path, rng, counts = finished / "config.json", random.Random(0), [0, 0]
    config = json.loads(path.read_text())
    run = Run.open(str(finished))
    examples = data.load(run.task, csv)[:3]
    expected = run.predict(examples)["probabilities"]
    for n in range(500):
        content = torn(path.read_bytes(), rng) if n % 3 == 0 else json.dumps(new := mutated(config, rng)).encode()
        path.write_bytes(content)
        found = []
        where = content if n % 3 == 0 else [k for k in config.keys() | new.keys() if config.get(k) != new.get(k)]
        counts[bad := refused(lambda: found.append(Run.open(str(finished))), where)] += 1
        if not bad:
            assert found[0].predict(examples)["probabilities"] == expected, where
        path.write_text(json.dumps(config))
    print("read, refused:", counts)
    assert counts[1] > 400


def header_of(content):
    n = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def packed(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def stopped(csv, tmp_path, monkeypatch):
    """A run that was stopped after its first step."""
    save = folder.save

    def once(*parts):
        save(*parts)
        raise Stopped(130)

    monkeypatch.setattr(folder, "save", once)
    assert go(csv, tmp_path / "stopped", "--method", "triadapt", "--epochs", "1", "--save-every", "1")[0] == 130
    monkeypatch.undo()
    return tmp_path / "stopped"


def changed(content, rng, n):
    """A safetensors file with its header changed, or torn somewhere."""
    header, rest = header_of(content)
    if n % 3 == 0:
        end = len(content) if n % 2 else len(content) - len(rest)  # the header has few of the bytes
        return torn(content[:end], rng) + content[end:]
    return packed(mutated(header, rng), rest)


@pytest.mark.parametrize("kind", ["adapter", "state"])
def test_headers_of_what_is_sealed(request, kind):
    path = request.getfixturevalue({"adapter": "finished", "state": "stopped"}[kind]) / f"{kind}.safetensors"
    good, rng, counts = path.read_bytes(), random.Random(1), [0, 0]
    tensors, *expected = sealed.read(str(path))
    tensors = {name: t.clone() for name, t in tensors.items()}  # they lie in the file
    flips = flipped(path, 200)
    for n in range(450):
        path.write_bytes(changed(good, rng, n)) if n < 250 else next(flips)
        found = []
        counts[bad := refused(lambda: found.append(sealed.read(str(path))), n)] += 1
        assert bad or equal(found[0][0], tensors) and [*found[0][1:]] == expected, n
        path.write_bytes(good)
    print("read, refused:", counts)
    assert counts[1] > 400


@pytest.mark.parametrize("seal", [True, False])
def test_headers_of_a_base(quick, tmp_path, seal):
    path, model = tmp_path / "base", Transformer(Config(30, 16, 1, 2, 16))
    (sealed.save_base if seal else save_base)(model, str(path))
    settings, task = Settings(base=str(path), task="cola"), data.TASKS["cola"]
    good, rng, counts = path.read_bytes(), random.Random(2), [0, 0]
    expected = build_model(settings, task)[0].state_dict()
    for n in range(200):
        header, rest = header_of(good)
        if n % 4 == 0:
            header["__metadata__"]["transformer"] = json.dumps(mutated(json.loads(header["__metadata__"]["transformer"]), rng))
        path.write_bytes(packed(header, rest) if n % 4 == 0 else changed(good, rng, n))
        found = []
        counts[bad := refused(lambda: found.append(build_model(settings, task)[0].state_dict()), n, path.read_bytes()[:300])] += 1
        if seal and not bad:
            assert all(torch.equal(found[0][name], t) for name, t in expected.items() if not name.startswith("head.")), n
    print("read, refused:", counts)
    assert counts[1] > 150


@pytest.mark.parametrize("kind", ["adapter", "state"])
def test_a_seal_does_not_make_nonsense_readable(request, quick, kind):
    """Sealed anew by somebody who knows how, or by another version: tensors and what is said of them are still looked at."""
    out = request.getfixturevalue({"adapter": "finished", "state": "stopped"}[kind])
    path, rng, counts = str(out / f"{kind}.safetensors"), random.Random(3), [0, 0]
    tensors, about, _ = sealed.read(path)
    tensors = {name: t.clone() for name, t in tensors.items()}
    config = json.loads((out / "config.json").read_text())
    dtypes = [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
    lacking = [{key: value for key, value in about.items() if key != left_out} for left_out in about]
    for n in range(100):
        new, said = dict(tensors), lacking[n // 2] if n // 2 < len(lacking) else about
        name = rng.choice(sorted(tensors))
        t = new[name]
        if said is about and n % 2:
            said = mutated({key: value for key, value in about.items() if key not in ("python", "numpy")}, rng)
        elif said is about:
            new[name] = rng.choice([
                t.float().to(rng.choice(dtypes)), t.reshape(-1), t[None], t.reshape(-1)[:0],
                torch.full_like(t, 0) + t.new_tensor(1).log().to(t.dtype),
                torch.full(t.shape, float("nan")).to(t.dtype), torch.zeros(1, 10**5).to(t.dtype),
                t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t,
            ])  # fmt: skip
        if said is about and n % 5 == 0:
            new[rng.choice(["x", name + "x", "../" + name, "optimizer.x.y", "optimizer.9", "random.torch"])] = new.pop(name)
        seal = sealed.write(path, new, said)
        if config["finished"]:
            (out / "config.json").write_text(json.dumps({**config, "finished": {**config["finished"], "adapter": seal}}))
        bad = refused(lambda: Run.open(str(out)), n, name, sorted(said))
        assert bad or said not in lacking or kind == "adapter", n
        counts[bad] += 1
    print("read, refused:", counts)
    assert counts[1] > 50
