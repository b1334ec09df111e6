"""The run folder: what a run leaves behind, and the state that it can go on from.

    config.json            every setting, the layers adapted, versions, the command; `finished` marks a whole run
    metrics.jsonl          a line per evaluation
    layers.jsonl           a line per evaluation, of what the method's `watch` shows layer by layer, and one per event
    adapter.safetensors    what was trained and what the method drew at random, task head included
    state.safetensors      only while training: all of the above and all that --resume needs, in one file

and the figures. While a run trains, its one state file is all there is beside config.json, so that whatever is found
after a kill belongs to one step; the other files are made of it at the end. Every file is written under a temporary name,
flushed to disk, then renamed. Nothing is ever removed or replaced but files that a run wrote, by name.
"""

import contextlib
import dataclasses
import json
import os
import random
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

from harness import parallel, sealed
from harness.settings import read_settings, typed
from reading.files import write_text

# What a run may leave, and beside these a PNG for each quantity that its method watches.
FILES = {
    "config.json", "metrics.jsonl", "layers.jsonl", "adapter.safetensors", "state.safetensors", "plan.json", "cosine.json",
    "curves.png", "histograms.png", "eigenvalues.png", "spectrum.png", "report.html",
}  # fmt: skip
TABLES = ("metrics.jsonl", "layers.jsonl", "plan.json")  # what pages and figures are made from
# Settings that change no number of a run.
FREE = {
    "resume", "overwrite", "out", "save_every", "no_figures", "compare", "save_base", "export_peft", "export_merged", "options",
}  # fmt: skip
CONFIG = {
    "settings": dict, "task": dict, "layers": list[str], "max_new": int, "base": str | None, "tokenizer": str, "rows": str,
    "held_out": list[str] | None, "command": str, "versions": dict, "finished": dict | None,
}  # fmt: skip


def write_json(path: str, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: str, rows: Iterable[dict]) -> None:
    """JSON lines, written as a whole."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path):
    """The value of a JSON file. ValueError in one line."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} line {e.lineno}: not JSON ({e.msg})") from None
    except (UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({type(e).__name__})") from None


# ------------------------------------------------------------------------- config.json


def read_config(out: str) -> dict:
    """config.json of a run folder, its settings as Settings, its task's fields checked. ValueError in one line."""
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        raise ValueError(f"{out} is not a run folder: it has no config.json")
    config = read_json(path)
    if not isinstance(config, dict) or not {"settings", "layers", "command"} <= config.keys():
        raise ValueError(f"{out} is not a run folder: its config.json was not written by train.py")
    typed(CONFIG, config, path)
    config["settings"] = read_settings(config["settings"], f"{path}: settings")
    return config


def essence(config: dict) -> dict:
    """{name: value} of all in a config that a run's numbers depend on."""
    settings = config["settings"]
    settings = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings  # type: ignore[arg-type]
    task = {f"task {key}": value for key, value in config["task"].items()}
    kept = {key: value for key, value in settings.items() if key not in FREE}
    return {**kept, **settings["options"], **task, **{key: config[key] for key in ("base", "tokenizer", "rows", "max_new")}}


def difference(before: dict, now: dict) -> str | None:  # type: ignore[return]
    """The first thing in which two essences differ, in words, or None."""
    for key in sorted(before.keys() | now.keys()):
        a, b = (json.dumps(e.get(key)) for e in (before, now))  # tuples and lists are the same in JSON
        if a != b:
            return f"{key} {shorten(before.get(key))}, now {shorten(now.get(key))}"


def shorten(value: object) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else textwrap.shorten(str(value), 60)  # a sha256


# ------------------------------------------------------------------------- whose folder it is


def written(out: str) -> list[str]:
    """Names of the files in folder `out` that a run wrote there. ValueError if any is somebody else's.

    A folder is a run's if its config.json is; what is in it beside the files of a run makes it unfit for another.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out} is a file, not a folder")
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


@contextlib.contextmanager
def lock(out: str) -> Iterator[None]:
    """Keep other runs out of the folder meanwhile; a process that dies frees it too. ValueError if one is in it."""
    os.makedirs(out, exist_ok=True)
    if fcntl is None:
        yield
        return
    held = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is in use: another run is training there") from None
        yield
    finally:
        os.close(held)


def clear(out: str, config: dict) -> None:
    """Make `out` the folder of a new run: its config.json, and none of the files of an earlier run."""
    for name in written(out):
        if name != "config.json":  # it marks the folder as a run's until the new one takes its place
            os.remove(os.path.join(out, name))
    write_json(os.path.join(out, "config.json"), config)


# ------------------------------------------------------------------------- the state


@dataclass
class Progress:
    """What a run has come to."""

    step: int = 0  # optimizer steps done
    history: list = field(default_factory=list)  # rows of metrics.jsonl
    layers: list = field(default_factory=list)  # rows of layers.jsonl
    losses: list = field(default_factory=list)  # of the steps since the last evaluation


def state_path(out: str) -> str:
    return os.path.join(out, "state.safetensors")


def save(run, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
    """The state of the run, whole or not at all."""
    groups = optimizer.state_dict()
    tensors = {f"adapter.{name}": t for name, t in adapter_state(run.model, run.keep).items()}
    for i, values in groups["state"].items():
        tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in values.items()}
    version, keys, gauss = random.getstate()
    name, words, *rest = np.random.get_state()
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    about = {
        **vars(progress), "names": run.layers, "essence": essence(run.config()), "groups": groups["param_groups"],
        "python": [version, list(keys), gauss], "numpy": [name, words.tolist(), *rest],  # type: ignore[attr-defined]
    }  # fmt: skip
    sealed.write(state_path(run.settings.out), tensors, about)


class Saver:
    """Saves the state every `save_every` steps or, by default, as often as costs a hundredth of the time."""

    def __init__(self, run, progress: Progress, optimizer: torch.optim.Optimizer):
        self.parts, self.cost, self.last = (run, progress, optimizer), 0.0, time.perf_counter()

    def due(self) -> bool:
        run, progress, _ = self.parts
        if not parallel.first():
            return False
        if run.settings.save_every:
            return progress.step % run.settings.save_every == 0
        return time.perf_counter() - self.last > 100 * self.cost

    def save(self) -> None:
        if not parallel.first():
            return
        start = time.perf_counter()
        save(*self.parts)
        self.last = time.perf_counter()
        self.cost = self.last - start


def kept(out: str) -> str:
    """What a run that stopped has left, in words."""
    with contextlib.suppress(ValueError, OSError):
        return f"{out} keeps the state after step {load_state(out)[2]['step']}, the same command with --resume goes on from it"
    with contextlib.suppress(ValueError, OSError):
        if read_config(out)["finished"]:
            return f"{out} holds a finished run"
    return "nothing was saved yet"


def complete(about: dict, wanted: Iterable[str], path: str) -> None:
    """ValueError if a sealed file lacks what is read of it."""
    if missing := set(wanted) - about.keys():
        raise ValueError(f"{path} does not say {min(missing)}: another version wrote it")


def load_state(out: str) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """(adapter, optimizer state_dict, the rest) of a run that did not finish. ValueError in one line if there is none."""
    if not os.path.exists(state_path(out)):
        raise ValueError(f"nothing to resume: {state_path(out)} does not exist")
    tensors, about, _ = sealed.read(state_path(out))
    complete(
        about, [f.name for f in dataclasses.fields(Progress)] + ["names", "essence", "groups", "python", "numpy"], state_path(out)
    )
    adapter, states = {}, {}
    for name, t in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "adapter":
            adapter[rest] = t
        elif kind == "optimizer":
            i, key = rest.split(".")
            states.setdefault(int(i), {})[key] = t
    about["random"] = {name: tensors[f"random.{name}"] for name in ("torch", "cuda") if f"random.{name}" in tensors}
    return adapter, {"state": states, "param_groups": about.pop("groups")}, about


def restore(optimizer: torch.optim.Optimizer, state: dict, about: dict) -> Progress:
    """Put a saved state into the optimizer and the random generators; returns the Progress."""
    optimizer.load_state_dict(state)
    torch.set_rng_state(about["random"]["torch"])
    if "cuda" in about["random"]:
        torch.cuda.set_rng_state(about["random"]["cuda"])
    version, keys, gauss = about["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = about["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    return Progress(*(about[f.name] for f in dataclasses.fields(Progress)))


def state_to_resume(run) -> tuple[dict[str, torch.Tensor], dict, dict] | None:
    """What `load_state` gives, to go on from, or None to start anew; ValueError if that would lose something.

    A finished run of the same settings is run again; another run is replaced only with --overwrite, and a
    folder with anything else in it never.
    """
    s, out, state = run.settings, run.settings.out, None
    if s.resume:
        read_config(out)  # which says what is wrong with the folder
        state = load_state(out)
        before = state[2]["essence"]
    elif "config.json" not in written(out) or s.overwrite:
        return None
    elif os.path.exists(state_path(out)):
        raise ValueError(f"{out} holds a run that was stopped: --resume goes on, --overwrite starts anew")
    else:
        before = essence(read_config(out))
    differ = difference(before, essence(run.config()))
    if differ:
        way = "give the flags it was started with" if s.resume else "--overwrite replaces it, --out goes elsewhere"
        raise ValueError(f"{out} holds another run ({differ}): {way}")
    return state


def finish(run, progress: Progress) -> None:
    """The files of a finished run, and the mark that it is one. The state goes when all else is done."""
    out = run.settings.out
    about = {"essence": essence(run.config()), "names": run.layers, "step": progress.step}
    seal = sealed.write(os.path.join(out, "adapter.safetensors"), adapter_state(run.model, run.keep), about)
    write_lines(os.path.join(out, "metrics.jsonl"), progress.history)
    write_lines(os.path.join(out, "layers.jsonl"), progress.layers)
    sums = {name: sealed.of_file(os.path.join(out, name)) for name in TABLES if os.path.exists(os.path.join(out, name))}
    config = {**run.config(), "finished": {"step": progress.step, "adapter": seal, **sums}}
    write_json(os.path.join(out, "config.json"), config)


def evaluations(out: str) -> list[dict]:
    """The rows of metrics.jsonl. ValueError where there is none, as in a run made of an adapter from elsewhere."""
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    if not rows:
        raise ValueError(f"{out} has no evaluation to show: its adapter was trained elsewhere")
    return rows


def finished(out: str) -> dict:
    """config.json of a run that finished and whose tables are as it left them. ValueError in one line."""
    config = read_config(out)
    if not config["finished"]:
        raise ValueError(f"{out} holds a run that did not finish: it has no metrics.jsonl yet")
    for name in TABLES:
        if config["finished"].get(name) and config["finished"][name] != sealed.of_file(os.path.join(out, name)):
            raise ValueError(f"{out}: its {name} is not the one that this run finished with")
    return config


def read_run(out: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, adapter) of a run folder that belong together: of the finished run, or of the last state of a stopped one."""
    config = read_config(out)
    if config["finished"]:
        adapter, about, seal = sealed.read(os.path.join(out, "adapter.safetensors"))
        complete(about, ["names", "essence"], os.path.join(out, "adapter.safetensors"))
        if config["finished"].get("adapter") != seal:
            raise ValueError(f"{out}: its adapter.safetensors is not the one that this run finished with")
    elif os.path.exists(state_path(out)):
        adapter, _, about = load_state(out)
    else:
        raise ValueError(f"{out} holds no adapter: the run has not come to its first save")
    differ = difference(about["essence"], essence(config)) or difference({"layers": about["names"]}, {"layers": config["layers"]})
    if differ:
        raise ValueError(f"{out}/config.json is not what its adapter was trained with: {differ}")
    return config, adapter


# ------------------------------------------------------------------------- the adapter


def adapter_state(model: torch.nn.Module, keep: Iterable[str] = ()) -> dict[str, torch.Tensor]:
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


def load_adapter_state(model: torch.nn.Module, state: dict[str, torch.Tensor], keep: Collection[str] = ()) -> None:
    """Put `adapter_state` back into a model with the same layers wrapped.

    ValueError if names, types or shapes differ, or a number is not finite.
    """
    expected = adapter_state(model, keep)
    for name, t in state.items():
        if name in expected and t.dtype != expected[name].dtype:
            raise ValueError(f"adapter and model do not fit: {name} is {t.dtype}, expected {expected[name].dtype}")
        if not t.isfinite().all():
            raise ValueError(f"the adapter's {name} holds NaN or infinity")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as e:  # a shape: torch's message has one line for each
        raise ValueError("adapter and model do not fit: " + str(e).splitlines()[-1].strip()) from None
    expected = adapter_state(model, keep)  # a layer may have grown to what it was
    if expected.keys() != state.keys():
        odd = sorted(expected.keys() ^ state.keys())
        raise ValueError(f"adapter and model do not fit: {len(odd)} names differ, such as {odd[0]}")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
