"""Tensors on disk that notice damage: safetensors whose header says what each tensor must hash to.

safetensors checks that a file is whole, not that its numbers are the ones written. Here the header has one entry,
"sealed": the sha256 of a JSON text, and that text: whatever the writer has to say, and a sha256 of each tensor, its
name, type and shape included. One flipped bit anywhere is refused. No pickle, and the same content gives the same bytes.
Bases have it too; those of assets/, which are older, have their sha256 in SHA256SUMS beside them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save

import model as modelling
from harness.settings import typed
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


def write(path: str, tensors: Mapping[str, torch.Tensor], about: dict, beside: dict[str, str] | None = None) -> str:
    """Write {name: tensor} and a dictionary for JSON; returns the seal, which stands for all of it.

    `beside`, strings of `about` by name, also stand in the header as other readers look for them. The file is read back
    before it takes the place of an earlier one.
    """
    # a copy: tied parameters share memory, which safetensors refuses
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    sums = {name: digest(tensors[name]) for name in sorted(tensors)}
    # Only the outer keys are sorted: what is within keeps its order, which tables and figures have.
    text = json.dumps(dict(sorted({**about, "sha256": sums}.items())))
    seal = hashlib.sha256(text.encode()).hexdigest()

    content = save(tensors, metadata={**(beside or {}), "sealed": f"{seal} {text}"})
    if beside:  # which the library writes in any order
        n = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:n])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        content = len(text).to_bytes(8, "little") + text + content[n:]

    def whole(temporary):
        with open(temporary, "wb") as f:
            f.write(content)
        read(temporary)

    replace_file(path, whole)
    return seal


def raw(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """({name: tensor}, {name: string} of the header) of any safetensors file. ValueError in one line if it is none."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as e:  # safetensors and torch raise several kinds
        raise ValueError(f"{path} cannot be read as safetensors: {e}".splitlines()[0]) from None


def read(path: str) -> tuple[dict[str, torch.Tensor], dict, str]:
    """({name: tensor}, what the writer said, seal) of a file of `write`. ValueError in one line if it is not as written."""
    tensors, beside = raw(path)
    seal, _, text = beside.pop("sealed", "").partition(" ")
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise ValueError(f"{path} is damaged, or was not written here: its header is not the one that was sealed")
    about = json.loads(text)
    if not beside.items() <= about.items():
        raise ValueError(f"{path} is damaged: its header says {min(beside)} otherwise than what was sealed")
    wanted = about.pop("sha256")
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or digest(tensors[name]) != wanted.get(name):
            raise ValueError(f"{path} is damaged: tensor {name} is not the one that was written")
    return tensors, about, seal


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """What others' libraries raise when a disk is full, as an OSError in one line."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as e:  # safetensors and tokenizers each have their own
        raise OSError(f"{path}: {e}".splitlines()[0]) from None


def save_base(model: torch.nn.Module, path: str) -> None:
    """model.py's save_base, then the file again with its checksums."""
    with writing(path):
        modelling.save_base(model, path)
    tensors, beside = raw(path)
    write(path, tensors, beside, beside)


def check_base(path: str) -> None:
    """`check` of a base, and that its config is that of its weights, before a model of these sizes is made. ValueError."""
    check(path)
    tensors, beside = raw(path)
    try:
        config = modelling.Config(**json.loads(beside.get("transformer", "")))
        typed({f.name: f.type for f in dataclasses.fields(config)}, vars(config), path)
        blocks = sum(name.endswith(".norm1.weight") for name in tensors)
        sizes = [*tensors["embed.weight"].shape, *tensors["blocks.0.up_proj.weight"].shape[:1], blocks]
        fits = sizes == [config.vocab_size, config.width, config.hidden, config.depth] and config.heads > 0
    except (TypeError, ValueError, KeyError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: not written by save_base, or its weights are not those of its config")


def check(path: str) -> None:
    """ValueError in one line if a file is not as written, so far as that is known: by SHA256SUMS beside it, or by its seal."""
    place, name = os.path.split(path)
    sums = os.path.join(place, "SHA256SUMS")
    if os.path.exists(sums):
        with open(sums, errors="replace") as f:
            listed = {line[66:].rstrip("\n"): line[:64] for line in f}
        if name in listed and listed[name] != of_file(path):
            raise ValueError(f"{path} is not the file that {sums} lists: damaged, or changed without it")
    if not name.endswith(".json") and "sealed" in raw(path)[1]:
        read(path)


def of_file(path: str) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
