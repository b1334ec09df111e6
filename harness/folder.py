"""What a run leaves behind, and the only place that writes it.

A run folder holds

    config.json            every setting, the layers adapted, versions, the command
    metrics.jsonl          a line per evaluation
    layers.jsonl           a line per evaluation: what the method's `watch` shows, layer by layer
    adapter.safetensors    what was trained and what the method drew at random, task head included
    state.pt               while training: all that --resume needs (tensors and numbers, loaded without pickle's code)

and the figures. Nothing else in a folder is ever removed or replaced.

Every file is written under a temporary name, flushed to disk, then renamed: a kill at any moment
leaves the previous good file.
"""

import contextlib
import json
import os
import random
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reading.files import replace_file, write_text

# What a run may leave, and beside these a PNG for each quantity that its method watches.
FILES = {
    "config.json", "metrics.jsonl", "layers.jsonl", "adapter.safetensors", "state.pt", "plan.json", "cosine.json",
    "curves.png", "histograms.png", "eigenvalues.png", "spectrum.png",
}  # fmt: skip


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path, rows):
    """JSON lines. The file is small (a line per evaluation) and written as a whole each time."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_config(run):
    """config.json of a run folder. ValueError in one line if that is no run folder."""
    path = os.path.join(run, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
    except FileNotFoundError:
        raise ValueError(f"{run} is not a run folder: it has no config.json") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} line {e.lineno}: not JSON ({e.msg})") from None
    if not isinstance(config, dict) or not {"settings", "layers", "command"} <= config.keys():
        raise ValueError(f"{run} is not a run folder: its config.json was not written by train.py")
    return config


def written(out):
    """Names of the files in folder `out` that a run wrote there. ValueError if any is somebody else's.

    A folder is a run's if its config.json is; what is in it beside the files of a run makes it unfit for another.
    """
    names = os.listdir(out) if os.path.isdir(out) else []
    if set(names) <= {"config.json.tmp"}:  # new, or stopped before its first file was whole
        return names
    read_config(out)
    figures = set()
    with contextlib.suppress(OSError, ValueError), open(os.path.join(out, "layers.jsonl"), encoding="utf-8") as f:
        figures = {f"{quantity}.png" for line in f for quantity in json.loads(line)}  # a heat map each
    foreign = [name for name in sorted(names) if name.removesuffix(".tmp") not in FILES | figures]
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]}, which no run wrote: choose another --out, or move that away")
    return names


@dataclass
class Progress:
    """What a run has come to."""

    step: int = 0  # optimizer steps done
    history: list = field(default_factory=list)  # rows of metrics.jsonl
    layers: list = field(default_factory=list)  # rows of layers.jsonl


def save(run, progress, optimizer):
    """All files of the run's folder, after an evaluation. The state comes last: what it needs is there."""
    out = run.settings.out
    info = {"method": run.settings.method, "options": run.settings.options, "layers": run.layers, "task": asdict(run.task)}
    save_adapter(run.model, os.path.join(out, "adapter.safetensors"), info, run.keep)
    write_lines(os.path.join(out, "metrics.jsonl"), progress.history)
    write_lines(os.path.join(out, "layers.jsonl"), progress.layers)
    state = {
        **vars(progress), "names": run.layers, "adapter": adapter_state(run.model, run.keep),
        "optimizer": optimizer.state_dict(), "rng": rng_state(),
    }  # fmt: skip
    save_state(out, state)


def restore(state, optimizer):
    """Put a saved state back into the optimizer and the random generators; returns the Progress."""
    optimizer.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"])
    return Progress(state["step"], state["history"], state["layers"])


def state_to_resume(settings, config):
    """The state to go on from, or None to start anew; ValueError if that would lose something.

    A finished run of the same settings is run again; another run is replaced only with --overwrite, and a
    folder with anything else in it never.
    """
    out = settings.out
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out} is a file, not a folder")
    if settings.resume:
        before, state = read_config(out), load_state(out)
    elif settings.overwrite | ("config.json" not in written(out)):
        return None
    elif os.path.exists(os.path.join(out, "state.pt")):
        raise ValueError(f"{out} holds a run that was stopped: --resume goes on, --overwrite starts anew")
    else:
        before, state = read_config(out), None
    differ = differences(before, config)
    if differ:
        way = "give the flags it was started with" if settings.resume else "--overwrite replaces it, --out goes elsewhere"
        raise ValueError(f"{out} holds another run ({differ}): {way}")
    return state


def differences(before, now):
    """The first setting in which two runs' configs differ, in words; flags that change no result do not count."""
    free = {"resume", "overwrite", "out", "no_figures", "compare", "save_base", "export_peft", "export_merged", "options"}
    before, now = ({**c["settings"], **c["settings"]["options"], "base": c["base_sha256"]} for c in (before, now))
    for key in sorted(set(before) | set(now)):
        if key not in free and json.dumps(before.get(key)) != json.dumps(now.get(key)):
            return f"{key} {before.get(key)}, now {now.get(key)}"


def clear(out, config):
    """Make `out` the folder of a new run: its config.json, and none of the files of an earlier run."""
    os.makedirs(out, exist_ok=True)
    for name in written(out):
        if name != "config.json":  # it marks the folder as a run's until the new one takes its place
            os.remove(os.path.join(out, name))
    write_json(os.path.join(out, "config.json"), config)


def adapter_state(model, keep=()):
    """{name: tensor}: every trained parameter, all that an adapted layer holds besides its base, and all of the
    modules named in `keep` ("" is the whole model): a random head that stays frozen cannot be had again."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name in keep:
        tensors = model.get_submodule(name).state_dict()
        state.update({f"{name}.{k}".lstrip("."): v for k, v in tensors.items()})
    for prefix, layer in model.named_modules():
        if hasattr(layer, "factors"):
            own = {k: v for k, v in layer.state_dict().items() if not k.startswith("base.")}
            state.update({f"{prefix}.{k}": v for k, v in own.items()})
    return state


def load_adapter_state(model, state, keep=()):
    """Put `adapter_state` back into a model with the same layers wrapped. ValueError if names differ."""
    expected = set(adapter_state(model, keep))
    if expected != set(state):
        odd = sorted(expected ^ set(state))
        raise ValueError(f"adapter and model do not fit: {len(odd)} names differ, such as {odd[0]}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as e:  # a shape: torch's message has one line for each
        raise ValueError("adapter and model do not fit: " + str(e).splitlines()[-1].strip()) from None


def save_adapter(model, path, metadata, keep=()):
    """adapter.safetensors, with {key: JSON text} of `metadata` in its header."""
    # a copy: tied parameters share memory, which safetensors refuses
    state = {name: t.to("cpu", copy=True).contiguous() for name, t in adapter_state(model, keep).items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    replace_file(path, lambda temporary: save_file(state, temporary, metadata=header))


def read_adapter(path):
    """(state, metadata) of an adapter file. ValueError in one line if it cannot be read."""
    try:
        with safe_open(path, "pt") as f:
            metadata = {key: json.loads(value) for key, value in (f.metadata() or {}).items()}
            return {name: f.get_tensor(name) for name in f.keys()}, metadata
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the run has not finished") from None
    except Exception as e:
        raise ValueError(f"{path} cannot be read as safetensors: {e}".splitlines()[0]) from None


def rng_state():
    """The state of every random generator a run draws from."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state):
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_state(run, state):
    """state.pt, for --resume."""
    replace_file(os.path.join(run, "state.pt"), lambda temporary: torch.save(state, temporary))


def load_state(run):
    """The state of a run that did not finish. ValueError in one line if there is none."""
    path = os.path.join(run, "state.pt")
    if not os.path.exists(path):
        raise ValueError(f"nothing to resume: {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {type(e).__name__}") from None
