"""harness/sealed.py: what was written comes back, in the same bytes; damage is noticed, and hostile headers are refused."""

import json
import os
import pickle
import random
import re
import shutil
import struct

import pytest
import torch
from short import go

import train
from harness import folder, sealed
from harness import run as running
from harness.run import ASSETS, Run
from model import Config, Transformer, load_base, save_base


def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "empty": torch.zeros(0, 3), "one": torch.tensor(2.5),
        "words": torch.arange(6, dtype=torch.uint8), "turned": torch.randn(5, 3).T, "yes": torch.tensor([True, False]),
    }  # fmt: skip


def test_what_was_written_comes_back_and_the_bytes_are_the_same(tmp_path):
    about = {"method": "lora", "nested": {"x": [1, 2.5, None, "ß"]}, "rate": 0.1 + 0.2}
    seal = sealed.write(str(tmp_path / "a"), tensors(), about)
    found, said, again = sealed.read(str(tmp_path / "a"))
    assert said == about and again == seal
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors().items())
    for i in range(5):  # dictionaries in another order
        mixed = dict(random.Random(i).sample(list(tensors().items()), 7))
        assert sealed.write(str(tmp_path / "b"), mixed, dict(reversed(about.items()))) == seal
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert sealed.write(str(tmp_path / "b"), tensors(), {**about, "rate": 0.3}) != seal
    shared = torch.randn(4)
    sealed.write(str(tmp_path / "c"), {"x": shared, "y": shared}, {})  # tied weights
    assert torch.equal(sealed.read(str(tmp_path / "c"))[0]["y"], shared)


def test_a_digest_knows_type_shape_and_every_byte():
    x = torch.zeros(2, 3)
    others = [x.int(), x.T, x.reshape(6), -x, x + 1e-45]
    assert len({sealed.digest(t) for t in [x, *others]}) == 6
    assert sealed.digest(torch.arange(6).reshape(2, 3).T) == sealed.digest(torch.arange(6).reshape(2, 3).T.clone())


def test_a_fingerprint_knows_names_and_numbers_and_samples_what_is_large():
    a, b = torch.arange(1000.0), torch.arange(10.0)
    first = sealed.fingerprint({"a": a, "b": b})
    assert first == sealed.fingerprint({"b": b, "a": a})
    changed = a.clone()
    changed[1] += 1
    assert len({first, sealed.fingerprint({"a": changed, "b": b}), sealed.fingerprint({"a": b, "b": a})}) == 3
    assert sealed.fingerprint({"a": a}, most=400) == sealed.fingerprint({"a": changed}, most=400)  # every tenth: 0, 10, ...
    changed[10] += 1
    assert sealed.fingerprint({"a": a}, most=400) != sealed.fingerprint({"a": changed}, most=400)


def test_one_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a"
    expected = sealed.write(str(path), tensors(), {"step": 3, "essence": {"alpha": 16.0}})
    good, rng, noticed = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            found, about, seal = sealed.read(str(path))
        except ValueError as e:
            assert "\n" not in str(e) and str(path) in str(e)
            noticed += 1
        else:
            assert seal == expected and about == {"step": 3, "essence": {"alpha": 16.0}}
            assert all(torch.equal(found[k], t) for k, t in tensors().items())
    print("noticed", noticed, "of 400")
    assert noticed > 380


def safetensors(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 7, b"\xff" * 8, b"PK\x03\x04 a zip", pickle.dumps({"a": 1}),
        struct.pack("<Q", 10**15) + b"{}",  # a header larger than the file
        safetensors({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
        safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**12]}}, b"\0" * 16),
        safetensors({"../../a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors({"__metadata__": {"sealed": "x y"}}), safetensors({"__metadata__": {"sealed": ""}}),
        safetensors([]), safetensors({"a": 3}),
    ],
)  # fmt: skip
def test_hostile_files_end_in_one_line(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        sealed.read(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert os.listdir(tmp_path) == ["file"]


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="nothing does not exist"):
        sealed.read(str(tmp_path / "nothing"))


# ------------------------------------------------------------------- bases, and files listed in SHA256SUMS


def flipped(path, n, seed=0):
    """`n` times the file with one bit flipped somewhere; afterwards it is whole again."""
    good, rng = path.read_bytes(), random.Random(seed)
    for _ in range(n):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        yield
    path.write_bytes(good)


def test_a_base_with_a_flipped_bit_is_refused_or_the_same_and_one_without_checksums_is_read(tmp_path):
    model = Transformer(Config(30, 16, 1, 2, 16))
    path = tmp_path / "base"
    save_base(model, path)
    plain = load_base(path).state_dict()
    sealed.check(str(path))  # of before there were seals, or from outside
    sealed.save_base(model, str(path))
    content, noticed = path.read_bytes(), 0
    for _ in range(8):  # two entries in the header
        sealed.save_base(model, str(path))
        assert path.read_bytes() == content
    assert all(torch.equal(t, plain[name]) for name, t in load_base(path).state_dict().items())
    for _ in flipped(path, 200):
        try:
            sealed.check(str(path))
            found = load_base(path)
        except ValueError as e:
            assert "\n" not in str(e) and str(path) in str(e)
            noticed += 1
        else:
            assert found.config == model.config and all(torch.equal(t, plain[name]) for name, t in found.state_dict().items())
    assert noticed > 190


def test_a_file_that_SHA256SUMS_lists_must_be_that_file(tmp_path):
    with open(os.path.join(ASSETS, "SHA256SUMS")) as f:
        listed = f.read().split()[1::2]
    assert {*listed, "SHA256SUMS"} == set(os.listdir(ASSETS))
    shutil.copytree(ASSETS, tmp_path, dirs_exist_ok=True)
    for name in listed:
        sealed.check(str(tmp_path / name))
    for name in ("tokenizer.json", "encoder.safetensors"):
        for _ in flipped(tmp_path / name, 200 if name == "tokenizer.json" else 20):
            with pytest.raises(
                ValueError, match=f"{name} is not the file that .*SHA256SUMS lists: damaged, or changed without it"
            ):
                sealed.check(str(tmp_path / name))
        sealed.check(str(tmp_path / name))
    (tmp_path / "SHA256SUMS").unlink()
    with open(tmp_path / "tokenizer.json", "a") as f:
        f.write(" ")
    sealed.check(str(tmp_path / "tokenizer.json"))


def test_a_damaged_base_or_tokenizer_starts_no_run(csv, tmp_path, capsys, monkeypatch):
    base = tmp_path / "base.safetensors"
    assert go(csv, tmp_path / "a", "--method", "full", "--epochs", "1", "--save-base", base)[0] == 0
    argv = [
        "--data",
        csv,
        "--text",
        "text",
        "--label",
        "label",
        "--base",
        str(base),
        "--epochs",
        "1",
        "--no-figures",
        "--threads",
        "1",
    ]
    assert train.main([*argv, "--device", "cpu", "--out", str(tmp_path / "b")]) == 0
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(content)
    capsys.readouterr()
    for again in ([*argv, "--out", str(tmp_path / "c")], [*argv, "--out", str(tmp_path / "b"), "--overwrite"]):
        assert train.main(again) == 2
        err = capsys.readouterr().err
        assert "base.safetensors is damaged: tensor" in err and err.count("\n") == 1
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(running, "ASSETS", str(tmp_path))
    shutil.copy(os.path.join(ASSETS, "SHA256SUMS"), tmp_path)
    with open(os.path.join(ASSETS, "tokenizer.json")) as f:  # two words exchanged: the same tokens, other texts
        words = {'"Ġthe":': '"Ġwas":', '"Ġwas":': '"Ġthe":'}
        (tmp_path / "tokenizer.json").write_text(re.sub('"Ġ(the|was)":', lambda found: words[found[0]], f.read()))
    assert go(csv, tmp_path / "c")[0] == 2 and "tokenizer.json is not the file that" in capsys.readouterr().err
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="was trained on another tokenizer than what random weights is now"):
        Run.open(str(tmp_path / "a"))


def test_pages_and_figures_are_not_made_of_damaged_tables(csv, tmp_path):
    out = tmp_path / "run"
    assert go(csv, out, "--method", "task_tlora", "--epochs", "1")[0] == 0
    folder.finished(str(out))
    for name in folder.TABLES:
        for _ in flipped(out / name, 200):
            with pytest.raises(ValueError, match=f"its {name} is not the one that this run finished with"):
                folder.finished(str(out))
    folder.finished(str(out))
