"""Several processes, one training: torchrun starts them, each computes its part of every batch.

    torchrun --nproc_per_node=2 train.py --method triadapt

All of them build the same model from the same seed, calibrate on the same samples, take the same rows in the same order and
grow alike, so that only sums travel between them: of gradients and losses. Rows to evaluate are dealt out and the
answers put together. What is drawn while a batch is computed (dropout) differs by process, all else is drawn alike. The
first process alone prints, writes and listens to signals: when it ends, the others' next sum fails and they end too.
In a single process everything here does nothing.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch
import torch.distributed as dist

BUCKET = 2**25  # numbers that are summed at once


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    return number() == 0


def start() -> None:
    """Join the processes that torchrun started, if it did. All but the first fall silent on standard output."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or count() > 1:
        return
    if torch.cuda.is_available():
        here = int(os.environ["LOCAL_RANK"])
        if here >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes here than there are GPUs ({torch.cuda.device_count()})")
        torch.cuda.set_device(here)
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)
    if not first():
        sys.stdout, sys.stderr = open(os.devnull, "w"), Plain(sys.stderr)


class Plain:
    """A stream that is no terminal: no progress bar is drawn on it."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return False


class Ended(Exception):
    """Another process has ended, so that this one cannot go on."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done with the other processes."""
    try:
        yield
    except RuntimeError as e:
        raise Ended(f"another process of this training has ended ({str(e).splitlines()[0]})") from e


def wait() -> None:
    """Until every process has come here."""
    gather(None)


def gather(value: Any) -> list:
    """What each process gives, as a list by number. The values are pickled: lists and numbers."""
    if count() == 1:
        return [value]
    found: list = [None] * count()
    with together():
        dist.all_gather_object(found, value)
    return found


def agreed(value: Any) -> Any:
    """What the first process has, for all of them."""
    if count() == 1:
        return value
    held = [value]
    with together():
        dist.broadcast_object_list(held)
    return held[0]


def part(batch: dict, labelled: Callable[[dict], int]) -> tuple[dict, int]:
    """(this process's rows of a batch, how many labels they have). If that is none, the whole batch and 0."""
    if count() == 1:
        return batch, labelled(batch)
    mine = {key: value[number() :: count()] for key, value in batch.items()}
    n = labelled(mine) if len(mine["index"]) else 0
    return (mine, n) if n else (batch, 0)


@contextlib.contextmanager
def drawing(*seed: int) -> Iterator[None]:
    """What is drawn inside differs by process and depends on these whole numbers alone."""
    if count() == 1:
        yield
        return
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(hash((*seed, number())))
        yield


def add_up(params: list[torch.Tensor], loss: torch.Tensor) -> None:
    """Sum the gradients, in few large buckets, and the loss, a scalar, over the processes, in place."""
    if count() == 1:
        return
    with together():
        there = torch.tensor([float(p.grad is not None) for p in params])  # an expert may have had no token here
        dist.all_reduce(there)
        for p in (p for p, n in zip(params, there) if n and p.grad is None):
            p.grad = torch.zeros_like(p)
        for bucket in buckets([loss] + [p.grad for p in params if p.grad is not None]):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for t, total in zip(bucket, flat.split([t.numel() for t in bucket])):
                t.copy_(total.view_as(t))


def buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Lists of tensors of one type, of at most BUCKET numbers or one tensor each."""
    full: list[torch.Tensor] = []
    for t in sorted(tensors, key=lambda t: str(t.dtype)):
        if full and (t.dtype != full[0].dtype or sum(map(torch.Tensor.numel, full)) + t.numel() > BUCKET):
            yield full
            full = []
        full.append(t)
    yield full
