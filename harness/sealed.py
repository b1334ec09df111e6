"""Tensors on disk that notice damage: safetensors whose header says what each tensor must hash to.

safetensors checks that a file is whole, not that its numbers are the ones written. Here the header has one entry,
"sealed": the sha256 of a JSON text, and that text: whatever the writer has to say, and a sha256 of each tensor, its
name, type and shape included. One flipped bit anywhere is refused. No pickle, and the same content gives the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save

from reading.files import replace_file


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def fingerprint(tensors: Mapping[str, torch.Tensor], most: int = 2**31) -> str:
    """sha256 of many tensors by name, {name: tensor}. Above `most` bytes it reads evenly spaced numbers of each."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    every = -(-size // most)
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {tuple(t.shape)} {digest(t if every < 2 else t.reshape(-1)[::every])}".encode())
    return found.hexdigest()


def write(path: str, tensors: Mapping[str, torch.Tensor], about: dict) -> str:
    """Write {name: tensor} and a dictionary for JSON; returns the seal, which stands for all of it.

    The file is read back before it takes the place of an earlier one.
    """
    # a copy: tied parameters share memory, which safetensors refuses
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    text = json.dumps({**about, "sha256": {name: digest(t) for name, t in tensors.items()}}, sort_keys=True)
    seal = hashlib.sha256(text.encode()).hexdigest()

    content = save(tensors, metadata={"sealed": f"{seal} {text}"})

    def whole(temporary):
        with open(temporary, "wb") as f:
            f.write(content)
        read(temporary)

    replace_file(path, whole)
    return seal


def read(path: str) -> tuple[dict[str, torch.Tensor], dict, str]:
    """({name: tensor}, what the writer said, seal) of a file of `write`. ValueError in one line if it is not as written."""
    try:
        with safe_open(path, "pt") as f:
            sealed = (f.metadata() or {}).get("sealed", "")
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as e:  # safetensors and torch raise several kinds
        raise ValueError(f"{path} cannot be read as safetensors: {e}".splitlines()[0]) from None
    seal, _, text = sealed.partition(" ")
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise ValueError(f"{path} is damaged, or was not written here: its header is not the one that was sealed")
    about = json.loads(text)
    wanted = about.pop("sha256")
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or digest(tensors[name]) != wanted.get(name):
            raise ValueError(f"{path} is damaged: tensor {name} is not the one that was written")
    return tensors, about, seal
