"""harness/sealed.py: what was written comes back, in the same bytes; damage is noticed, and hostile headers are refused."""

import json
import os
import pickle
import random
import struct

import pytest
import torch

from harness import sealed


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
