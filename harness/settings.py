"""The settings of a run, each stated once, and the command line made of them.

A field of `Settings` is a flag: its name, type, default and help stand together. The methods' own options come from
their signatures (methods.py) and are kept in `Settings.options`.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import data
from harness.methods import BACKBONE_RATES, FROM_RUN, METHODS, NO_FACTORS, NO_MERGE, ONLY_WITH, options, takes_targets

# Passes over the rows of a generated task, where not EPOCHS: chosen with LoRA alone, on seed 100 (bench/rates.md).
EPOCHS = 6
TASK_EPOCHS = {"sst2": 3, "mrpc": 1, "qqp": 1, "stsb": 1, "mnli": 2, "qnli": 2, "rte": 2, "squad": 2, "math": 3}
FEW = ", ".join(f"{task} {n}" for task, n in TASK_EPOCHS.items())
MANY = data.MANY  # a field is called data, too
BY_METHOD = "default: the method's, in the table below"
HEAD_RATE = 1e-3  # of the task head beside any method: swept once, with LoRA (docs/rates.md)
# A standard stream that is closed becomes an empty one: Python has None for it, which no library expects.
CLOSED = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
for name in CLOSED:
    setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0")
    return value


def flag(default: object, help: str, **more):
    """A field with what argparse is to know of its flag; `group` begins a group of flags."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**make, metadata={"help": help, **more})


@dataclass
class Settings:
    """What a run is asked to be. None: decided when the run starts, or not asked for."""

    # fmt: off
    method: str = flag("triadapt", "; ".join(f"{name} = {METHODS[name][1]}" for name in METHODS) + " (default triadapt)",
                       choices=METHODS, metavar="METHOD", group="what to run")
    task: str | None = flag(None, f"{', '.join(data.TASKS)} (default cola); without --data: {', '.join(data.GENERATED)}",
                            choices=data.TASKS, metavar="TASK")
    seed: int = flag(0, "of everything random (default 0)", type=int)
    out: str | None = flag(None, "run folder (default out/TASK-METHOD-SEED)")
    overwrite: bool = flag(False, "replace another run in that folder")
    resume: bool = flag(False, "go on where this same command was stopped")

    data: str | None = flag(None, "a folder in the task's official layout, or your own CSV, TSV (no quoting) or JSONL file",
                            group="data")
    text: list[str] | None = flag(None, "your own file: its one or two columns of text", nargs="+", metavar="COLUMN")
    label: str | None = flag(None, "your own file: its column of labels", metavar="COLUMN")
    kind: str | None = flag(None, "your own file: whether labels are classes or scores (default: scores if one has a fraction)",
                            choices=("classification", "regression"))
    merge_labels: bool = flag(False, "your own file: labels that differ in case or surrounding spaces alone are one class")
    classes_ok: bool = flag(False, f"your own file: more than {MANY} classes are meant, or more than half as many as rows")
    dev: str | None = flag(None, "your own development file (default: a random tenth of --data)", metavar="FILE")
    prompt: list[str] | None = flag(None, "task sft: the columns of the prompt (default: as in the published sets)",
                                    nargs="+", metavar="COLUMN")
    answer: str | None = flag(None, "task sft: the column of the answer", metavar="COLUMN")
    template: str | None = flag(None, "task sft: a file with the columns' names in braces, or chat, the tokenizer's own template",
                                metavar="FILE")
    score: str | None = flag(None, "task sft: what the answers are judged by (default exact_match)",
                             choices=("exact_match", "last_number", "boxed", "choice", "loss"))
    # GLUE sentences are short; Table V of TriAdaptLoRA has 64 to 512.
    max_length: int = flag(128, "tokens, longer texts are cut (default 128)", type=count)
    rows: int | None = flag(None, "use the first ROWS training rows only", type=count)

    backbone: str | None = flag(None, "a Hugging Face checkpoint: folder or hub name (needs transformers)",
                                metavar="NAME", group="model")
    base: str | None = flag(None, "our own base (default assets/encoder.safetensors; for math and clm decoder.safetensors)",
                            metavar="FILE")
    scratch: bool = flag(False, "our own transformer with random weights")
    targets: list[str] | None = flag(
        None, "ends of the names of the linear layers to adapt (default: all in the transformer blocks)",
        nargs="+", metavar="NAME")
    exclude: list[str] | None = flag(None, "layers that --targets or its default names, but not to be adapted",
                                     nargs="+", metavar="NAME")
    freeze_head: bool = flag(False, "leave the task head alone (TLoRA's own runs do)")
    # With --scratch: about one million numbers, seconds per epoch on a laptop.
    width: int = flag(128, "scratch: width of a token's vector (default 128)", type=count)
    depth: int = flag(4, "scratch: blocks (default 4)", type=count)
    heads: int = flag(4, "scratch: attention heads (default 4)", type=count)
    hidden: int = flag(512, "scratch: width of the MLP (default 512)", type=count)

    # The papers run 3 to 50 epochs on GLUE's tasks; those of the generated ones take less than a minute here.
    epochs: int | None = flag(None, f"passes over the training rows (default {EPOCHS}; generated {FEW})", type=count,
                              group="training")
    max_steps: int | None = flag(None, "stop after this many optimizer steps, if that is sooner", type=count)
    batch_size: int = flag(32, "rows per batch (default 32, as three of the papers)", type=count)
    accumulate: int = flag(1, "batches per optimizer step (default 1)", type=count)
    lr: float | None = flag(None, f"peak learning rate ({BY_METHOD})", type=number)
    head_lr: float | None = flag(None, f"peak learning rate of the task head (default {HEAD_RATE:g}; --lr for method head)",
                                 type=number)
    schedule: str = flag("linear", "after the warm-up (default linear, as three of the papers)",
                         choices=("linear", "cosine", "constant"))
    # 6 % is RoBERTa's and TLoRA's.
    warmup: float = flag(0.06, "share of the steps with a rising rate (default 0.06)", type=number)
    weight_decay: float | None = flag(None, f"AdamW's ({BY_METHOD})", type=number)
    betas: list[float] = flag([0.9, 0.999], "AdamW's (default 0.9 0.999)", type=number, nargs=2)
    clip: float = flag(1.0, "largest norm of the gradient, 0 = no limit (default 1)", type=number)
    eval_every: int | None = flag(None, "optimizer steps between evaluations (default: each epoch)", type=count)
    save_every: int | None = flag(
        None, "optimizer steps between saved states (default: at evaluations, and as often as costs a hundredth of the time)",
        type=count)

    device: str = flag("auto", "default auto", choices=("auto", "cpu", "cuda", "mps"), group="machine")
    precision: str = flag("auto", "auto: bf16 autocast on CUDA, float32 elsewhere", choices=("auto", "float32", "bf16"))
    # On an H200 one function a layer was up to a fifth slower than the files' own way and took 0.8 to 0.9 of its memory
    # (bench/speed-cuda-bf16.md, bench/memory-cuda-bf16.md).
    fast: bool | None = flag(None, "compute each adapted layer in one autograd function, fast.py (default: on the CPU)")
    dtype: str = flag("float32", "of a backbone's frozen weights; what is trained stays float32 (default float32)",
                      choices=("float32", "bf16"))
    compile: bool = flag(False, "torch.compile the model")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory")
    threads: int | None = flag(None, "CPU threads (default: torch's choice)", type=count)

    save_base: str | None = flag(None, "write the trained weights as a base for --base", metavar="FILE",
                                 group="what comes out besides the run folder")
    export_peft: str | None = flag(None, "write a PEFT LoRA adapter (needs --backbone)", metavar="DIR")
    export_merged: str | None = flag(None, "write a checkpoint with the update folded in (needs --backbone)", metavar="DIR")
    compare: str | None = flag(None, "cosine similarity of each layer's update with that run's", metavar="RUN")
    no_figures: bool = flag(False, "draw nothing")
    # fmt: on

    options: dict = field(default_factory=dict)  # the method's own, by name


def typed(fields: Mapping[str, object], values: object, where: str) -> None:
    """ValueError in one line unless `values` is a dictionary with just these fields, {name: type}, each of its type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {shown(values)} is not an object with {len(fields)} keys")
    for name in fields.keys() | values.keys():
        if name not in values:
            raise ValueError(f"{where}: '{name}' is missing")
        if name not in fields:
            raise ValueError(f"{where}: '{name}' is unknown")
        if not fits(values[name], fields[name]):
            kind = getattr(fields[name], "__name__", None) or fields[name]
            raise ValueError(f"{where}: '{name}' is {shown(values[name])}, expected {kind}")


def fits(value, kind) -> bool:
    """Whether a value from JSON is of a type: int is no bool, float is finite and may be whole, tuples are lists."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in inside
    if origin is list:
        return isinstance(value, list) and all(fits(one, inside[0]) for one in value)
    if kind in (None, types.NoneType):
        return value is None
    if kind is tuple:
        return isinstance(value, list | tuple) and all(isinstance(one, str) or fits(one, tuple) for one in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def shown(value: object) -> str:
    return textwrap.shorten(repr(value), 60)


def read_settings(values: dict, where: str) -> Settings:
    """Settings from config.json. ValueError in one line for a wrong type, choice, or a missing or unknown key."""
    known = {f.name: f for f in dataclasses.fields(Settings)}
    typed({name: f.type for name, f in known.items()}, values, where)
    for name, f in known.items():
        if (allowed := f.metadata.get("choices")) and values[name] is not None and values[name] not in allowed:
            raise ValueError(f"{where}: '{name}' is {shown(values[name])}, expected one of {', '.join(allowed)}")
    typed({name: facts[0] for name, facts in options(values["method"]).items()}, values["options"], f"{where}: options")
    return Settings(**values)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line on stderr instead of the usage and a line."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """The flags on a line of an @FILE: words as in a shell, # begins a comment."""
        try:
            words = shlex.split(line, comments=True)
        except ValueError as e:
            self.error(f"{e} in the line {shown(line)} of an @FILE")
        if files := [word for word in words if word.startswith("@")]:
            self.error(f"{shown(files[0])} stands in an @FILE, which names no other")
        return words


class Help(argparse.HelpFormatter):
    """Tables keep their lines."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=110)

    def _fill_text(self, text, width, indent):
        return textwrap.indent(text, indent) if "\n" in text else super()._fill_text(text, width, indent)


def build_parser(description: str | None = None, method: str | None = None) -> Parser:
    """Flags of the run in groups, then the methods' own, or those of one `method`; a flag that is not given is None."""
    p = Parser(
        prog="train.py",
        usage="python train.py [@FILE] [--method METHOD] [--task TASK] [flags]",
        description=description,
        formatter_class=Help,
        allow_abbrev=False,
        add_help=False,
        fromfile_prefix_chars="@",
        epilog="@FILE stands for the flags in that file, as recipes/ has them of the papers' runs; flags behind it win.",
    )
    for f in dataclasses.fields(Settings):
        more = dict(f.metadata)
        if not more:
            continue
        if title := more.pop("group", None):
            group = p.add_argument_group(title)
        if f.type is bool:
            more["action"] = "store_true"
        elif f.type == bool | None:
            more["action"] = argparse.BooleanOptionalAction
        elif f.name != "method":  # whether that is given decides what --help shows
            more["default"] = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[operator]
        if method in METHODS and f.name in ("method", "lr", "weight_decay"):
            more["help"] = of_method(method, f.name)
        group.add_argument("--" + f.name.replace("_", "-"), **more)
        if f.name == "method":
            words = "this text; with --method METHOD, that method's options alone"
            group.add_argument("-h", "--help", action="store_true", help=words)
    shown = [method] if method else METHODS
    owners = {}  # option -> {method: (type, default, help)}
    for name in shown:
        for option, facts in options(name).items():
            owners.setdefault(option, {})[name] = facts
    shared = {option: of for option, of in owners.items() if len(of) > 1}
    if not method:
        group = p.add_argument_group("options that methods share", tables(shared))
        for option, of in shared.items():
            add_option(group, option, of)
    for name in shown:
        members = [option for option in owners if list(owners[option]) == [name]]
        group = p.add_argument_group(f"options of {name}") if members else None
        for option in members:
            add_option(group, option, owners[option])
    return p


def of_method(method: str, name: str) -> str:
    """The help of a flag whose default is the method's."""
    _, words, rate, decay = METHODS[method]
    real, source = BACKBONE_RATES[method]
    return {"method": words, "lr": f"peak learning rate (default {rate:g}; with --backbone {real:g}: {source})",
            "weight_decay": f"AdamW's (default {decay:g})"}[name].replace("%", "%%")  # fmt: skip


def default_of(option: str, facts: tuple) -> object:
    return FROM_RUN[option][0] if option in FROM_RUN else facts[1]


def tables(shared: Mapping[str, dict[str, tuple]], width: int = 106) -> str:
    """Defaults, a method a row: as many columns beside each other as there is room for, then the next."""
    columns = {"lr": {name: f"{facts[2]:g}" for name, facts in METHODS.items()},
               "lr (backbone)": {name: f"{rate:g}" for name, (rate, _) in BACKBONE_RATES.items()},
               "weight-decay": {name: f"{facts[3]:g}" for name, facts in METHODS.items()}}  # fmt: skip
    for option, owners in shared.items():
        cells = {name: "*" if option in FROM_RUN else facts[1] for name, facts in owners.items()}
        cells = {name: f"{x:g}" if type(x) in (int, float) else str(x or "by model") for name, x in cells.items()}
        columns[option.replace("_", "-")] = cells
    first = max(map(len, METHODS))
    blocks, room = [], 0
    for title, cells in columns.items():
        wide = 2 + max(map(len, [title, *cells.values()]))
        if room < wide:
            blocks, room = [*blocks, {}], width - first
        blocks[-1][title], room = wide, room - wide
    lines = ["Defaults (- where a method has no such option):"]
    for block in blocks:
        rows = {"method": {title: title for title in block}}
        rows |= {name: {title: columns[title][name] for title in block if name in columns[title]} for name in METHODS}
        lines += ["", *(name.ljust(first) + "".join(row.get(title, "-").rjust(wide) for title, wide in block.items())
                        for name, row in rows.items() if row)]  # fmt: skip
    shares = ", ".join(f"--{option.replace('_', '-')} {FROM_RUN[option][0]}" for option in shared if option in FROM_RUN)
    return "\n".join([*lines, "", f"* a share of the run: {shares}"])


def add_option(group, option: str, owners: Mapping[str, tuple]) -> None:
    """One flag for a method's option, or for several methods' that share the name: the yardstick's words, or the first's."""
    kind, default, text = owners.get("lora", next(iter(owners.values())))
    differ = len({facts[2] for facts in owners.values()}) > 1
    text += f" (default {default_of(option, (kind, default))})" if len(owners) == 1 else "; differs by method" if differ else ""
    more = {"action": argparse.BooleanOptionalAction} if kind is bool else {
        "type": kind if kind in (int, float) else str, "choices": typing.get_args(kind) or None}  # fmt: skip
    group.add_argument("--" + option.replace("_", "-"), help=text.replace("%", "%%"), **more)


def on_a_run(name: str, what: str, act: Callable[[str], str], argv: Sequence[str] | None = None) -> int:
    """The command line `python -m harness.NAME RUN`: act(RUN) does it and returns the words to print."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        print(f"usage: python -m harness.{name} RUN    ({what})", file=sys.stderr)
        return 2
    try:
        print(act(argv[0]))
    except (ValueError, OSError) as e:
        print(f"{name}: error: {in_words(e)}", file=sys.stderr)
        return 2
    return 0


def in_words(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'standard output'}: {error.strerror}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def drop_output(error: Exception) -> None:
    """After standard output failed: what waits in its buffer goes nowhere, or Python would try again at its end, and say so."""
    if isinstance(error, OSError) and error.strerror and not error.filename:
        with contextlib.suppress(ValueError):  # it has no number: not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: Sequence[str], description: str | None = None) -> Settings:
    """Settings from the command line; a method's flag with another method is refused."""
    parser = build_parser(description)
    values = vars(parser.parse_args(argv))
    if values.pop("help"):
        build_parser(description, values["method"]).print_help()
        parser.exit()
    values["method"] = values["method"] or Settings.method
    own = options(values["method"])
    known = {f.name for f in dataclasses.fields(Settings)}
    given = {option: values.pop(option) for option in list(values) if option not in known}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option not in own:
            takes = ", ".join(other for other in METHODS if option in options(other))
            parser.error(f"--{option.replace('_', '-')} is no option of {values['method']} (of: {takes})")
        if isinstance(given[option], float) and not math.isfinite(given[option]):
            parser.error(f"--{option.replace('_', '-')} {given[option]} is not a finite number")
        other, value = ONLY_WITH.get(option, (None, None))
        if other and given.get(other, own[other][1]) != value:
            parser.error(f"--{option.replace('_', '-')} goes with --{other} {value}")
    defaults = {option: None if option in FROM_RUN else facts[1] for option, facts in own.items()}
    settings = Settings(**values, options=defaults | given)
    try:
        check(settings)
        fill_in(settings)
        apart(settings)
    except ValueError as e:
        parser.error(str(e))
    return settings


def default_rate(s: Settings) -> tuple[float, str]:
    """(the learning rate where --lr names none, where it is from)."""
    if s.backbone:
        rate, source = BACKBONE_RATES[s.method]
        return rate, f"default for real checkpoints: {source}"
    return METHODS[s.method][2], "default of the generated tasks"


def check(s: Settings) -> None:
    """Refuse flags that do not go together; paths become absolute."""
    paths = "out data dev backbone base save_base export_peft export_merged compare"
    for name in f"{paths} label answer template".split():
        if getattr(s, name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty")
    if s.text is None and (s.kind or s.merge_labels or s.classes_ok):
        raise ValueError("--kind, --merge-labels and --classes-ok go with --text COLUMN, for a file of your own")
    if s.kind == "regression" and (s.merge_labels or s.classes_ok):
        raise ValueError("--merge-labels and --classes-ok are for classes, --kind regression has scores")
    if s.text is None and (s.label or s.dev and s.task != "sft"):
        raise ValueError("--label and --dev go with --text COLUMN, for a file of your own")
    if s.task != "sft" and (s.prompt or s.answer or s.template or s.score):
        raise ValueError("--prompt, --answer, --template and --score go with --task sft")
    if bool(s.prompt) != bool(s.answer) or s.template not in (None, "chat") and not s.prompt:
        raise ValueError("--prompt COLUMN and --answer COLUMN go together, and a --template FILE with them")
    if s.answer and s.answer in s.prompt:
        raise ValueError(f"--answer {s.answer} is among the columns of --prompt: the answer would stand in the question")
    if s.text is not None and (s.data is None or s.label is None):
        raise ValueError("--text goes with --data FILE and --label COLUMN")
    if s.text is not None and s.label in s.text:
        raise ValueError(f"--label {s.label} is among the columns of --text: the answer would stand in the question")
    if s.dev and s.data and os.path.realpath(s.dev) == os.path.realpath(s.data):
        raise ValueError("--dev is the same file as --data: the development score would be of rows trained on")
    if s.text is not None and s.task is not None:
        raise ValueError("--task is for known tasks: with --text the task comes from your file")
    if s.text is None and s.task is None:
        s.task = "cola"
    if s.data is None and s.task not in data.GENERATED:
        raise ValueError(f"task {s.task} needs --data DIR (generated are: {', '.join(data.GENERATED)})")
    check_model(s)
    for name in ("base", "backbone", "data", "dev", "compare"):  # so that the run folder can be used from anywhere
        path = getattr(s, name)
        if path and os.path.exists(path):
            setattr(s, name, os.path.abspath(path))
    for name, value in (("warmup", s.warmup), ("betas", max(s.betas))):
        if value >= 1:
            raise ValueError(f"--{name} {value} is not below 1")


def check_model(s: Settings) -> None:
    """Refuse flags of the model, the method and what is written at the end that do not go together."""
    if s.dtype == "bf16":
        if not s.backbone:
            raise ValueError("--dtype bf16 goes with --backbone: the tiny bases are small in float32")
        if s.method in ("full", "bitfit", "houlsby"):
            why = "trains the base's own weights or norms, whose small steps bf16 rounds away"
            raise ValueError(f"method {s.method} {why}: --dtype float32")
        if s.precision == "float32":
            raise ValueError("--dtype bf16 computes in bf16: leave --precision float32 out")
        s.precision = "bf16"
    if s.fast and s.compile:
        raise ValueError("--fast does not go with --compile, which joins the operations of a layer itself")
    if s.backbone and (s.base or s.scratch):
        raise ValueError("--backbone is a model of its own: leave --base and --scratch out")
    if not s.scratch and any(getattr(s, key) != getattr(Settings, key) for key in ("width", "depth", "heads", "hidden")):
        raise ValueError("--width, --depth, --heads and --hidden go with --scratch")
    if s.resume and s.overwrite:
        raise ValueError("--resume goes on with the run that --overwrite replaces: leave one out")
    if s.method in NO_FACTORS and (s.compare or s.export_peft and s.method != "dora"):
        raise ValueError(f"method {s.method} has no low-rank update for --compare or --export-peft")
    if s.freeze_head and s.head_lr is not None:
        raise ValueError("--head-lr is of the head that --freeze-head leaves alone: leave one out")
    if s.method in NO_MERGE and (s.save_base or s.export_merged):
        raise ValueError(f"method {s.method} cannot be merged: leave --save-base and --export-merged out")
    if s.scratch and s.base:
        raise ValueError("--scratch draws the weights, --base reads them: leave one out")
    if (s.targets or s.exclude) and not takes_targets(s.method):
        raise ValueError(f"method {s.method} wraps no layers: leave --targets and --exclude out")
    if s.save_base and os.path.isdir(s.save_base):
        raise ValueError(f"--save-base {s.save_base} is a folder: it names a file")
    if s.threads and s.threads > 8 * (os.cpu_count() or 1):
        raise ValueError(f"--threads {s.threads} is far more than the {os.cpu_count()} processors here")
    if (s.export_peft or s.export_merged) and not s.backbone:
        raise ValueError("--export-peft and --export-merged need --backbone: the tiny base is no Hugging Face model")
    if s.save_base and s.backbone:
        raise ValueError("--save-base is for our own transformer: a backbone goes out with --export-merged")


def apart(s: Settings) -> None:
    """Refuse a place to write to that another flag names."""
    written, seen = ("out", "save_base", "export_peft", "export_merged"), {}
    for name in ("data", "dev", "template", "backbone", "base", "compare", *written):
        if path := getattr(s, name):
            other = seen.setdefault(os.path.realpath(path), name)
            if other != name and name in written:
                flags = (word.replace("_", "-") for word in (name, other))
                raise ValueError("--{} and --{} are the same place: it would be written over".format(*flags))


def fill_in(s: Settings) -> None:
    """What was left to follow from the method, the task and the model."""
    if s.epochs is None:
        s.epochs = EPOCHS if s.data else TASK_EPOCHS.get(s.task, EPOCHS)
    if s.lr is None:
        s.lr = default_rate(s)[0]
    if s.head_lr is None:
        s.head_lr = s.lr if s.method == "head" else HEAD_RATE
    if s.weight_decay is None:
        s.weight_decay = METHODS[s.method][3]
    if s.out is None:
        s.out = os.path.join("out", f"{s.task or 'custom'}-{s.method}-{s.seed}")
