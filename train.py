"""Fine-tune a transformer with any of the methods: one loop, one command line.

    python train.py                                        # triadapt on cola, the tiny base of assets/
    python train.py --method lora --task sst2 --rank 4
    python train.py --task cola --data path/to/CoLA        # real files in GLUE's layout
    python train.py --method full --task mlm --scratch --save-base base.safetensors

A method is a module with the verbs inject, param_groups, merge and, where it has them, calibrate (looks at
data before training), penalty (a term of the loss), after_step (acts while training) and watch (numbers per
layer worth seeing). This loop calls the verbs and knows nothing else of a method; the flags of a method are
the keyword arguments of its inject and calibrate, with their defaults and their docstrings' words.
"""

import argparse
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import typing

import torch
import torch.nn.functional as F
from tqdm import tqdm

import backbones
import checkpoint
import data
import export
import figures
import model as modelling
from tlora import cosine_similarity

HERE = os.path.dirname(os.path.abspath(__file__))
ASSETS = os.path.join(HERE, "assets")

# method: (module, what it is, learning rate, weight decay). The rates were chosen on seeds that no table uses
# (bench/rates.md); the decays are the papers' where a paper names one.
METHODS = {
    "triadapt": ("triadapt", "TriAdaptLoRA: B (L+U) A, ranks grow under a budget", 8e-3, 0.0),
    "tlora": ("tlora", "TLoRA: alpha C B A, only B and the scale alpha trained", 1e-2, 0.01),
    "tlora_plus": ("tlora_plus", "TLoRA+: C B A, each matrix with its own learning rate", 2e-3, 0.1),
    "task_tlora": ("task_tlora", "Task-aware TLoRA: A from the data, frozen; ranks by sensitivity", 2e-3, 0.0),
    "lora": ("baselines.lora", "LoRA, the yardstick", 4e-3, 0.0),
    "full": ("baselines.full", "full fine-tuning", 5e-4, 0.01),
    "bitfit": ("baselines.bitfit", "biases only", 4e-2, 0.0),
    "head": ("baselines.head", "the task head only", 1e-2, 0.0),
}

# Passes over the rows of a generated task, where not EPOCHS: chosen with LoRA alone, on seed 100 (bench/rates.md).
EPOCHS = 6
TASK_EPOCHS = {"sst2": 3, "mrpc": 1, "qqp": 1, "stsb": 1, "mnli": 2, "qnli": 2, "rte": 2, "squad": 2, "math": 3}

# Method options whose natural default is a share of the run: in words, and as a function of (warm-up steps, all steps).
FROM_RUN = {
    "t0": ("the warm-up steps", lambda warmup, total: warmup),
    "interval": ("a fifteenth of the steps", lambda warmup, total: max(1, total // 15)),
}

# The only numbers that differ between two runs of one command.
TIMES = ("seconds", "tokens_per_s")


# ------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line on stderr instead of the usage and a line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def method_options(name):
    """{option: (type, default, help)} of a method: the keyword arguments of its inject and calibrate."""
    module = importlib.import_module(METHODS[name][0])
    options = {}
    for verb in ("inject", "calibrate"):
        function = getattr(module, verb, None)
        if function is None:
            continue
        words = dict(re.findall(r"^ {8}(\w+): ((?:.+\n)(?: {9,}.+\n)*)", (function.__doc__ or "") + "\n", re.M))
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.annotation is not parameter.empty:
                text = " ".join(words[parameter.name].split())
                options[parameter.name] = (parameter.annotation, parameter.default, text)
    return options


def method_of(settings):
    return importlib.import_module(METHODS[settings["method"]][0])


def count(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def number(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0")
    return value


def build_parser():
    """Flags of the run in groups, then the methods' own; every default has its reason beside it."""
    p = Parser(
        prog="train.py",
        usage="python train.py [--method METHOD] [--task TASK] [flags]",
        description=__doc__.split("\n\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
    )
    g = p.add_argument_group("what to run")
    g.add_argument("--method", choices=METHODS, default="triadapt", metavar="METHOD",
                   help="; ".join(f"{name} = {METHODS[name][1]}" for name in METHODS) + " (default triadapt)")
    g.add_argument("--task", choices=data.TASKS, metavar="TASK",
                   help=f"{', '.join(data.TASKS)} (default cola); without --data: {', '.join(data.GENERATED)}")
    g.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    g.add_argument("--out", help="run folder (default out/TASK-METHOD-SEED)")
    g.add_argument("--overwrite", action="store_true", help="replace another run in that folder")
    g.add_argument("--resume", action="store_true", help="go on where this same command was stopped")

    g = p.add_argument_group("data")
    g.add_argument("--data", help="a folder in the task's official layout, or your own CSV, TSV or JSONL file")
    g.add_argument("--text", nargs="+", metavar="COLUMN", help="your own file: its one or two columns of text")
    g.add_argument("--label", metavar="COLUMN", help="your own file: its column of labels")
    g.add_argument("--dev", metavar="FILE", help="your own development file (default: a random tenth of --data)")
    # GLUE sentences are short; Table V of TriAdaptLoRA has 64 to 512.
    g.add_argument("--max-length", type=count, default=128, help="tokens, longer texts are cut (default 128)")
    g.add_argument("--rows", type=count, help="use the first ROWS training rows only")

    g = p.add_argument_group("model")
    g.add_argument("--backbone", metavar="NAME", help="a Hugging Face checkpoint: folder or hub name (needs transformers)")
    g.add_argument("--base", metavar="FILE", help="our own base (default assets/encoder.safetensors; for math and clm decoder.safetensors)")
    g.add_argument("--scratch", action="store_true", help="our own transformer with random weights")
    g.add_argument("--targets", nargs="+", metavar="NAME",
                   help="ends of the names of the linear layers to adapt (default: all in the transformer blocks)")
    g.add_argument("--freeze-head", action="store_true", help="leave the task head alone (TLoRA's own runs do)")
    # With --scratch: about one million numbers, seconds per epoch on a laptop.
    g.add_argument("--width", type=count, default=128, help="scratch: width of a token's vector (default 128)")
    g.add_argument("--depth", type=count, default=4, help="scratch: blocks (default 4)")
    g.add_argument("--heads", type=count, default=4, help="scratch: attention heads (default 4)")
    g.add_argument("--hidden", type=count, default=512, help="scratch: width of the MLP (default 512)")

    g = p.add_argument_group("training")
    # The papers run 3 to 50 epochs on GLUE's tasks; those of the generated ones take less than a minute here.
    few = ", ".join(f"{task} {n}" for task, n in TASK_EPOCHS.items())
    g.add_argument("--epochs", type=count, help=f"passes over the training rows (default {EPOCHS}; generated {few})")
    g.add_argument("--max-steps", type=count, help="stop after this many optimizer steps, if that is sooner")
    g.add_argument("--batch-size", type=count, default=32, help="rows per batch (default 32, as three of the papers)")
    g.add_argument("--accumulate", type=count, default=1, help="batches per optimizer step (default 1)")
    rates = ", ".join(f"{name} {METHODS[name][2]:g}" for name in METHODS)
    g.add_argument("--lr", type=number, help=f"peak learning rate (default: {rates})")
    g.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear",
                   help="after the warm-up (default linear, as three of the papers)")
    # 6 % is RoBERTa's and TLoRA's.
    g.add_argument("--warmup", type=number, default=0.06, help="share of the steps with a rising rate (default 0.06)")
    decays = ", ".join(f"{name} {METHODS[name][3]:g}" for name in METHODS)
    g.add_argument("--weight-decay", type=number, help=f"AdamW's (default: {decays})")
    g.add_argument("--betas", type=number, nargs=2, default=[0.9, 0.999], help="AdamW's (default 0.9 0.999)")
    g.add_argument("--clip", type=number, default=1.0, help="largest norm of the gradient, 0 = no limit (default 1)")
    g.add_argument("--eval-every", type=count, help="optimizer steps between evaluations (default: each epoch)")

    g = p.add_argument_group("machine")
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")
    g.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                   help="auto: bf16 autocast on CUDA, float32 elsewhere")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    g.add_argument("--threads", type=count, help="CPU threads (default: torch's choice)")

    g = p.add_argument_group("what comes out besides the run folder")
    g.add_argument("--save-base", metavar="FILE", help="write the trained weights as a base for --base")
    g.add_argument("--export-peft", metavar="DIR", help="write a PEFT LoRA adapter (needs --backbone)")
    g.add_argument("--export-merged", metavar="DIR", help="write a checkpoint with the update folded in (needs --backbone)")
    g.add_argument("--compare", metavar="RUN", help="cosine similarity of each layer's update with that run's")
    g.add_argument("--no-figures", action="store_true", help="draw nothing")

    owners = {}  # option -> {method: (type, default, help)}
    for name in METHODS:
        for option, facts in method_options(name).items():
            owners.setdefault(option, {})[name] = facts
    for title, members in [("options that methods share", [o for o in owners if len(owners[o]) > 1])] + [
        (f"options of {name}", [o for o in owners if list(owners[o]) == [name]]) for name in METHODS
    ]:
        g = p.add_argument_group(title) if members else None
        for option in members:
            add_option(g, option, owners[option])
    return p


def add_option(group, option, owners):
    """One flag for a method's option, or for several methods' that share the name."""
    kind = next(iter(owners.values()))[0]
    texts = {name: facts[2] for name, facts in owners.items()}
    defaults = {name: FROM_RUN[option][0] if option in FROM_RUN else facts[1] for name, facts in owners.items()}
    text = in_words(texts, "; ") + f" (default {in_words(defaults, ', ')})"
    flag = "--" + option.replace("_", "-")
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text.replace("%", "%%"))
        return
    group.add_argument(flag, type=kind if kind in (int, float) else str, choices=typing.get_args(kind) or None,
                       help=text.replace("%", "%%"))  # fmt: skip


def in_words(values, separator):
    """One value if all methods share it, else each with its methods: "lora, tlora: 8; triadapt: 1"."""
    owners = {}
    for name, value in values.items():
        owners.setdefault(value, []).append(name)
    if len(owners) == 1:
        return str(next(iter(owners)))
    return separator.join(f"{value} for {' and '.join(names)}" if separator == ", " else f"{', '.join(names)}: {value}"
                          for value, names in owners.items())  # fmt: skip


def parse(argv):
    """(settings, method options) from the command line; a method's flag with another method is refused."""
    parser = build_parser()
    settings = vars(parser.parse_args(argv))
    name = settings["method"]
    own = method_options(name)
    given = {}
    for other in METHODS:
        for option in method_options(other):
            if option in settings:
                value = settings.pop(option)
                if value is not None:
                    given[option] = value
    for option in given:
        if option not in own:
            takes = ", ".join(other for other in METHODS if option in method_options(other))
            parser.error(f"--{option.replace('_', '-')} is no option of {name} (of: {takes})")
    if settings["text"] is None and (settings["label"] or settings["dev"]):
        parser.error("--label and --dev go with --text COLUMN, for a file of your own")
    if settings["text"] is not None and (settings["data"] is None or settings["label"] is None):
        parser.error("--text goes with --data FILE and --label COLUMN")
    if settings["text"] is not None and settings["task"] is not None:
        parser.error("--task is for known tasks: with --text the task comes from your file")
    if settings["text"] is None and settings["task"] is None:
        settings["task"] = "cola"
    if settings["data"] is None and settings["task"] not in data.GENERATED:
        parser.error(f"task {settings['task']} needs --data DIR (generated are: {', '.join(data.GENERATED)})")
    if settings["backbone"] and (settings["base"] or settings["scratch"]):
        parser.error("--backbone is a model of its own: leave --base and --scratch out")
    if (settings["export_peft"] or settings["export_merged"]) and not settings["backbone"]:
        parser.error("--export-peft and --export-merged need --backbone: the tiny base is no Hugging Face model")
    if settings["save_base"] and settings["backbone"]:
        parser.error("--save-base is for our own transformer: a backbone goes out with --export-merged")
    for flag in ("base", "backbone", "data", "dev"):  # so that the run folder can be used from anywhere
        if settings[flag] and os.path.exists(settings[flag]):
            settings[flag] = os.path.abspath(settings[flag])
    for flag, top in (("warmup", 1), ("betas", 1)):
        values = settings[flag] if isinstance(settings[flag], list) else [settings[flag]]
        if max(values) >= top:
            parser.error(f"--{flag} {max(values)} is not below {top}")
    if settings["epochs"] is None:
        settings["epochs"] = EPOCHS if settings["data"] else TASK_EPOCHS.get(settings["task"], EPOCHS)
    if settings["lr"] is None:
        settings["lr"] = METHODS[name][2]
    if settings["weight_decay"] is None:
        settings["weight_decay"] = METHODS[name][3]
    if settings["out"] is None:
        settings["out"] = os.path.join("out", f"{settings['task'] or 'custom'}-{name}-{settings['seed']}")
    return settings, {option: given.get(option, facts[1]) for option, facts in own.items()}, set(given)


# ------------------------------------------------------------------------- building blocks


def choose_device(wanted):
    """(torch device, the reason in words). ValueError if what was asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        if there["cuda"]:
            return torch.device("cuda"), f"{torch.cuda.get_device_name()} found"
        return torch.device("cpu"), "no CUDA found" + ("; --device mps would try Apple's" if there["mps"] else "")
    if not there[wanted]:
        raise ValueError(f"--device {wanted}: torch finds no such device here")
    return torch.device(wanted), "as asked"


def load_task(settings):
    """(task, training examples, development examples)."""
    if settings["text"]:
        task, rows = data.load_custom(settings["data"], settings["text"], settings["label"])
        if settings["dev"] is None:  # a tenth at random, the same for every seed of the run
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
            dev = set(order[: max(1, len(rows) // 10)])
            train = [r for i, r in enumerate(rows) if i not in dev]
            return task, train[: settings["rows"]], [rows[i] for i in sorted(dev)]
        return task, rows[: settings["rows"]], data.load(task, settings["dev"], "dev")
    task = data.TASKS[settings["task"]]
    train, dev = (data.load(task, settings["data"], split) for split in ("train", "dev"))
    return task, train[: settings["rows"]], dev


def build_model(settings, task):
    """(model, tokenizer, words about it) as the settings ask; new weights are drawn from torch's generator."""
    if settings["backbone"]:
        model, tokenizer = backbones.load(settings["backbone"], task.kind, task.labels)
        places = getattr(model.config, "max_position_embeddings", None) or math.inf
        places -= 2 * ("roberta" in model.config.model_type)  # which counts positions from 2
        if settings["max_length"] > places:
            raise ValueError(f"--max-length {settings['max_length']} is more than the backbone's {places} positions")
        return model, data.Tokenizer(tokenizer), settings["backbone"]
    tokenizer = data.Tokenizer(os.path.join(ASSETS, "tokenizer.json"))
    kind = "lm" if task.kind == "mlm" else task.kind
    causal = task.kind == "lm"
    if settings["scratch"]:
        sizes = {key: settings[key] for key in ("width", "depth", "heads", "hidden")}
        config = modelling.Config(vocab_size=tokenizer.vocab_size, causal=causal, **sizes)
        return modelling.Transformer(config, kind, len(task.labels)), tokenizer, "random weights"
    path = base_of(settings)
    model = modelling.load_base(path, kind, len(task.labels))
    if model.config.causal < causal:
        raise ValueError(f"{path} is an encoder, task {task.name} needs a decoder: --backbone, --base or --scratch")
    return model, tokenizer, os.path.relpath(path)


def base_of(settings):
    """The file of our own base: the decoder for tasks that generate text, else the encoder."""
    causal = settings["task"] is not None and data.TASKS[settings["task"]].kind == "lm"
    return settings["base"] or os.path.join(ASSETS, "decoder.safetensors" if causal else "encoder.safetensors")


def train_head(model, freeze):
    """Turn gradients of the task head on, or off; returns the names of the modules that are trained."""
    heads = modelling.head_modules(model)
    for name in heads:
        model.get_submodule(name).requires_grad_(not freeze)
    return [] if freeze else heads


def base_digest(settings):
    """sha256 of our own base's file, None for random weights and backbones: a run belongs to its base."""
    if settings["scratch"] or settings["backbone"]:
        return None
    with open(base_of(settings), "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def loss_of(logits, labels, kind):
    """Mean loss of a batch, a scalar; shapes as `data.batches` and `model.logits` give them."""
    logits = logits.float()
    if kind == "regression":
        return F.mse_loss(logits, labels)
    if kind == "span":  # (B, T, 2) and (B, 2): the mean over start and end
        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten())
    if kind == "classification":
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=data.IGNORED)


def forward(model, batch, kind):
    """Loss of a batch. A language model computes logits at the labelled places only."""
    if kind in ("lm", "mlm"):
        where = batch["labels"] != data.IGNORED
        return loss_of(modelling.logits(model, batch, where), batch["labels"][where], kind)
    return loss_of(modelling.logits(model, batch), batch["labels"], kind)


def rate(step, total, warmup, schedule):
    """The learning rate at optimizer step 0, 1, .. total - 1, as a share of its peak.

    Rises linearly over `warmup` steps, (step + 1) / warmup, then falls to 0 at `total`, or stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def to_device(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def autocast_of(settings, device):
    """A function that gives the autocast context of the run; the weights stay float32."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16")


@torch.no_grad()
def predict(model, task, features, examples, tokenizer, settings, device, autocast):
    """What the model says of every row, in the rows' order, in eval mode:

    {"answers": class indices, scores or texts, "probabilities": lists over classes, or a span's, or None,
    "loss": the mean over labels, None where a row has none}.
    """
    was_training = model.training
    model.eval()
    generates = task.kind == "lm" and "prompt" in features[0]
    answers, probabilities = [None] * len(features), [None] * len(features)
    loss, labelled = 0.0, 0
    size = settings["batch_size"] * (1 if task.kind == "lm" else 8)  # logits over a vocabulary are large
    batches = list(data.batches(features, task, size, tokenizer.pad_id))
    for batch in tqdm(batches, desc="evaluating", leave=False, disable=None):
        rows = batch.pop("index").tolist()
        batch = to_device(batch, device)
        with autocast():
            if "labels" in batch:
                n = int((batch["labels"] != data.IGNORED).sum()) if task.kind in ("lm", "mlm") else len(rows)
                loss, labelled = loss + n * forward(model, batch, task.kind).item(), labelled + n
            if generates:
                texts, ends = [features[i]["input_ids"] for i in rows], [features[i]["prompt"] for i in rows]
                prompts, labels = [ids[:n] for ids, n in zip(texts, ends)], [ids[n:] for ids, n in zip(texts, ends)]
                found = modelling.generate(model, prompts, settings["max_new"], tokenizer.sep_id, drafts=labels)
                found = [tokenizer.decode(ids) for ids in found]
            elif task.kind in ("lm", "mlm"):
                continue
            else:
                logits = modelling.logits(model, batch).float()
                found = data.predictions(task, features, examples, rows, logits)
        for i, answer in zip(rows, found):
            answers[i] = answer
        if task.kind == "classification":
            for i, p in zip(rows, logits.softmax(-1).tolist()):
                probabilities[i] = p
        elif task.kind == "span":
            p = logits.softmax(1)  # (B, T, 2), over the tokens
            for i, row, p in zip(rows, logits, p):
                _, first, last = data.best_span(features[i]["offsets"], examples[i].text[1], row.cpu().numpy())
                probabilities[i] = (p[first, 0] * p[last, 1]).item()
    model.train(was_training)
    return {"answers": answers, "probabilities": probabilities, "loss": loss / labelled if labelled else None}


def evaluate(model, task, features, examples, *rest):
    """{"dev_loss": mean over labels, metric: value, ...}, the task's headline metric first."""
    found = predict(model, task, features, examples, *rest)
    metrics = {} if task.name in data.TEXT_TASKS else data.score(task, examples, found["answers"])
    return {"dev_loss": found["loss"], **metrics}


def restore(run):
    """(model in eval mode, tokenizer, task, settings) from a run folder alone."""
    config = checkpoint.read_config(run)
    settings = config["settings"]
    task = data.Task(**tupled(config["task"]))
    model, tokenizer, words = build_model(settings, task)
    if config["base_sha256"] != base_digest(settings):
        raise ValueError(f"{run} was trained on another base than what {words} is now")
    wrap(model, config)
    state, _ = checkpoint.read_adapter(os.path.join(run, "adapter.safetensors"))
    checkpoint.load_adapter_state(model, state, config["keep"])
    return model.eval(), tokenizer, task, settings


def tupled(value):
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {key: tupled(v) for key, v in value.items()}
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def wrap(model, config):
    """Inject the method of a run's config.json into a fresh model, on the layers it had; returns the heads trained."""
    method = method_of(config["settings"])
    options = accepted(method.inject, config["options"])
    if hasattr(method, "calibrate"):
        options["rank"] = 1  # the real ones differ by layer and come with the weights
    method.inject(model, config["layers"], **options)
    return train_head(model, config["settings"]["freeze_head"])


def accepted(function, options):
    """Those of the options that a verb takes."""
    return {key: value for key, value in options.items() if key in inspect.signature(function).parameters}


# ------------------------------------------------------------------------- the run


def run(settings, options, given, command):
    """Train as asked and leave the run folder; returns the last evaluation."""
    started = time.perf_counter()
    if settings["compare"]:
        checkpoint.read_config(settings["compare"])  # now, not after the training
    for path in (settings["save_base"], settings["export_peft"], settings["export_merged"]):
        if path:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device, reason = choose_device(settings["device"])
    if settings["precision"] == "auto":
        settings["precision"] = "bf16" if device.type == "cuda" else "float32"
    autocast = autocast_of(settings, device)
    method = method_of(settings)
    checkpoint.seed_everything(settings["seed"])

    task, train, dev = load_task(settings)
    model, tokenizer, words = build_model(settings, task)
    encode = lambda rows: data.features(task, rows, tokenizer, settings["max_length"])  # noqa: E731
    train_features, dev_features = encode(train), encode(dev)
    per_epoch = math.ceil(math.ceil(len(train) / settings["batch_size"]) / settings["accumulate"])
    total = min(settings["epochs"] * per_epoch, settings["max_steps"] or math.inf)
    every = settings["eval_every"] or per_epoch
    settings["warmup_steps"] = round(settings["warmup"] * total)
    answers = [len(row["input_ids"]) - row["prompt"] for row in train_features if "prompt" in row]
    if answers:  # a generated answer is no longer than the longest of training, whatever the labels of dev are
        settings["max_new"] = min(max(answers), settings["max_length"] // 2)
    for option, (_, share) in FROM_RUN.items():
        if option in options and option not in given:
            options[option] = share(settings["warmup_steps"], total)
    print(f"base    {words}, {sum(p.numel() for p in model.parameters()):,} numbers")
    print(f"task    {task.name} from {settings['data'] or 'the generated world'}: {len(train):,} training rows, "
          f"{len(dev):,} for development, {task.kind}" + (f" ({', '.join(task.labels)})" if task.labels else ""))

    config = {"settings": settings, "options": options, "task": vars(task), "base_sha256": base_digest(settings)}
    config |= {"command": command, "versions": versions()}
    if settings["text"] and not settings["dev"]:
        config["held_out"] = [example.id for example in dev]
    config["keep"] = [""] if settings["scratch"] else modelling.head_modules(model)  # random, so saved in any case
    out, state, extra = settings["out"], look_into_folder(settings, config), {}
    if state is None:
        targets = settings["targets"] or modelling.default_targets(model)
        if hasattr(method, "calibrate"):
            extra["plan"] = calibrate(method, model, targets, train_features, task, tokenizer, settings, options, device)
        config["layers"] = method.inject(model, targets, **extra, **accepted(method.inject, options))
        heads = train_head(model, settings["freeze_head"])
        if not config["layers"] and (settings["compare"] or settings["export_peft"]):
            raise ValueError(f"method {settings['method']} has no low-rank update for --compare or --export-peft")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"nothing to train: method {settings['method']} with --freeze-head")
    else:
        config["layers"] = state["layers"]
        heads = wrap(model, config)
        checkpoint.load_adapter_state(model, state["adapter"], config["keep"])
    model.to(device).train()
    if settings["gradient_checkpointing"]:
        backbones.set_checkpointing(model)

    optimizer = torch.optim.AdamW(
        method.param_groups(model, settings["lr"], settings["weight_decay"]),
        lr=settings["lr"], betas=tuple(settings["betas"]),
    )  # fmt: skip
    peaks = [group["lr"] for group in optimizer.param_groups]
    step, history, layers, curve = 0, [], [], []
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        checkpoint.set_rng_state(state["rng"])
        step, history, layers = state["step"], state["history"], state["watch"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    where = f"{len(config['layers'])} layers" if config["layers"] else "no layer wrapped"
    print(f"method  {settings['method']}, {where}, head {', '.join(heads) or 'not trained'}: "
          f"{trained:,} trained of {everything:,} ({100 * trained / everything:.2f} %)")
    print(f"device  {device} ({reason}), {settings['precision']}, {torch.get_num_threads()} threads")
    print(f"steps   {total:,} of {settings['accumulate']} x {settings['batch_size']} rows, lr {settings['lr']:g} {settings['schedule']}, "
          f"{settings['warmup_steps']} warm-up" + (f"; resumed after step {step}" if step else ""))

    if state is None:
        checkpoint.clear(out, config)
        if "plan" in extra:
            checkpoint.write_json(os.path.join(out, "plan.json"), method.describe(extra["plan"]))
    compiled = compile_model(model) if settings["compile"] else model
    stopped = f"stopped; {out} keeps the last evaluated state"
    tokens, clock = 0, time.perf_counter()
    for epoch in range(step // per_epoch, math.ceil(total / per_epoch)):
        first, last = step - epoch * per_epoch, min(per_epoch, total - epoch * per_epoch)  # first > 0 when resumed
        batches = data.batches(train_features, task, settings["batch_size"], tokenizer.pad_id,
                               shuffle_seed=settings["seed"] * 100_003 + epoch)  # fmt: skip
        steps = itertools.islice(grouped(batches, settings["accumulate"]), first, last)
        bar = tqdm(steps, f"epoch {epoch + 1}", last, initial=first, leave=False, disable=None)
        for group in bar:
            for g, peak in zip(optimizer.param_groups, peaks):
                g["lr"] = peak * rate(step, total, settings["warmup_steps"], settings["schedule"])
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            group = [to_device(batch, device) for batch in group]
            for batch, share in zip(group, shares(group, task.kind)):
                with autocast():
                    part = share * forward(compiled, batch, task.kind)
                part.backward()
                loss += part.item()
                tokens += int(batch["attention_mask"].sum())
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss {loss} at step {step + 1}: {stopped}")
            if hasattr(method, "penalty") and (extra_loss := method.penalty(model)).requires_grad:
                extra_loss.backward()
            params = [p for g in optimizer.param_groups for p in g["params"]]
            norm = torch.nn.utils.clip_grad_norm_(params, settings["clip"] or math.inf)
            if not norm.isfinite():
                raise FloatingPointError(f"gradient of norm {norm} at step {step + 1}: {stopped}")
            optimizer.step()
            step += 1
            curve.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}")
            if hasattr(method, "after_step"):
                event = method.after_step(model, optimizer, step, total)
                if event:
                    layers.append({"step": step, "event": event})
            if step % every == 0 or step == total:
                speed = round(tokens / (time.perf_counter() - clock))
                values = evaluate(model, task, dev_features, dev, tokenizer, settings, device, autocast)
                if not math.isfinite(values["dev_loss"]):
                    raise FloatingPointError(f"development loss {values['dev_loss']} after step {step}: {stopped}")
                row = {"step": step, "epoch": step / per_epoch, "train_loss": sum(curve) / len(curve), **values}
                row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                watched = watch(method, model)
                layers.append({"step": step, **watched})
                if "ranks" in watched:
                    row["rank_total"] = sum(watched["ranks"].values())
                row["tokens_per_s"] = speed
                row["seconds"] = round(time.perf_counter() - started, 2)
                history.append(row)
                tqdm.write(line(row), file=sys.stdout)
                curve, tokens, clock = [], 0, time.perf_counter()
                save(model, config, out, history, layers, optimizer, step)
    finish(model, method, tokenizer, task, settings, config, history, layers, started)
    os.remove(os.path.join(out, "state.pt"))  # last: what fails until here can be resumed
    return history[-1]


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def look_into_folder(settings, config):
    """The state to resume from, or None to start anew; ValueError if that would lose something.

    A finished run of the same settings is run again; another run is replaced only with --overwrite, and a
    folder with anything else in it never.
    """
    out = settings["out"]
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out} is a file, not a folder")
    if not settings["resume"]:
        checkpoint.written(out)
    unfinished = os.path.exists(os.path.join(out, "state.pt"))
    if settings["resume"]:
        before, state = checkpoint.read_config(out), checkpoint.load_state(out)
    elif settings["overwrite"] or not os.path.exists(os.path.join(out, "config.json")):
        return None
    elif unfinished:
        raise ValueError(f"{out} holds a run that was stopped: --resume goes on, --overwrite starts anew")
    else:
        before, state = checkpoint.read_config(out), None
    differ = differences(
        {**before["settings"], **before["options"], "base": before["base_sha256"]},
        {**settings, **config["options"], "base": config["base_sha256"]},
    )
    if differ:
        way = "give the flags it was started with" if settings["resume"] else "--overwrite replaces it, --out goes elsewhere"
        raise ValueError(f"{out} holds another run ({differ}): {way}")
    return state


def differences(before, now):
    """The first setting in which two runs differ, in words; flags that change no result do not count."""
    free = {"resume", "overwrite", "out", "no_figures", "compare", "save_base", "export_peft", "export_merged"}
    for key in sorted(set(before) | set(now)):
        if key not in free and json.dumps(before.get(key)) != json.dumps(now.get(key)):
            return f"{key} {before.get(key)}, now {now.get(key)}"


def calibrate(method, model, targets, features, task, tokenizer, settings, options, device):
    """Show the method the first rows of the seeded shuffle, one at a time, without padding."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(settings["seed"])).tolist()
    chosen = [features[i] for i in order[: options["samples"]]]
    rows = [next(iter(data.batches([f], task, 1, tokenizer.pad_id, shuffle_seed=settings["seed"]))) for f in chosen]
    bar = tqdm([to_device(row, device) for row in rows], desc="calibrating", leave=False, disable=None)
    loss = lambda m, batch: forward(m, batch, task.kind)  # noqa: E731
    return method.calibrate(model.to(device), targets, bar, loss, **accepted(method.calibrate, options))


def compile_model(model):
    """torch.compile for changing lengths; a rank growth compiles anew, so allow more than the usual eight."""
    torch._dynamo.config.cache_size_limit = 256
    return torch.compile(model, dynamic=True)


def grouped(items, size):
    """Lists of `size` items, the last one shorter."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def shares(group, kind):
    """What each batch's mean loss weighs in an optimizer step, so that the sum is the mean over all labels."""
    counts = [int((b["labels"] != data.IGNORED).sum()) if kind in ("lm", "mlm") else len(b["labels"]) for b in group]
    return [n / sum(counts) for n in counts]


def watch(method, model):
    return method.watch(model) if hasattr(method, "watch") else {}


def line(row):
    """An evaluation as one line on screen."""
    skip = {"step", "epoch", "trained", *TIMES}
    parts = [f"epoch {row['epoch']:5.2f}  step {row['step']:5d}"]
    for key, value in row.items():
        if key not in skip:
            parts.append(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4f}")
    return "  ".join(parts) + f"  {row['tokens_per_s']:,} tokens/s"


def save(model, config, out, history, layers, optimizer, step):
    """All files of the run folder, after an evaluation. The state comes last: what it needs is there."""
    info = {key: config[key] for key in ("options", "layers", "keep", "task")} | {"method": config["settings"]["method"]}
    checkpoint.save_adapter(model, os.path.join(out, "adapter.safetensors"), info, config["keep"])
    checkpoint.write_lines(os.path.join(out, "metrics.jsonl"), history)
    checkpoint.write_lines(os.path.join(out, "layers.jsonl"), layers)
    state = {
        "step": step, "layers": config["layers"], "adapter": checkpoint.adapter_state(model, config["keep"]),
        "optimizer": optimizer.state_dict(), "rng": checkpoint.rng_state(), "history": history, "watch": layers,
    }  # fmt: skip
    checkpoint.save_state(out, state)


def finish(model, method, tokenizer, task, settings, config, history, layers, started):
    """Figures, exports and the last lines on screen."""
    out = settings["out"]
    made = ["config.json", "metrics.jsonl", "adapter.safetensors"]
    other = None
    if settings["compare"]:
        other = settings["compare"], compare(model, config["layers"], settings["compare"], out)
        made.append("cosine.json")
    if not settings["no_figures"]:
        headline = task.metrics[0] if task.metrics and task.metrics[0] in history[-1] else None
        made += figures.draw(out, history, layers, headline)
        if config["layers"]:
            made += figures.draw_updates(out, model, config["layers"], other)
        if os.path.exists(os.path.join(out, "plan.json")):
            made += figures.draw_plan(out)
    if settings["save_base"]:
        if config["layers"]:
            method.merge(model)
        modelling.save_base(model, settings["save_base"])
        print(f"base written to {settings['save_base']}")
    if settings["export_peft"]:
        export.export_peft(model, config, settings["export_peft"])
    if settings["export_merged"]:
        export.export_merged(model, method, tokenizer.source, settings["export_merged"])
    last = history[-1]
    names = [name for name in (task.metrics or ()) if name in last] or ["dev_loss"]
    best = (min if names[0] == "dev_loss" else max)(history, key=lambda row: row[names[0]])
    print(", ".join(f"{name} {last[name]:.4f}" for name in names)
          + f" (best {names[0]} {best[names[0]]:.4f} at epoch {best['epoch']:.3g})"
          + (f", rank total {last['rank_total']}" if "rank_total" in last else ""))
    print(f"{time.perf_counter() - started:.1f} s; {out}: {', '.join(made)}")


def compare(model, names, other, out):
    """Cosine similarity of each layer's dW with that of another run on the same layers, printed and kept.

    Returns {layer: the other run's dW (m, n)}.
    """
    theirs = dict(restore(other)[0].named_modules())
    cosine, updates = {}, {}
    for name in names:
        if not hasattr(theirs.get(name), "factors"):
            raise ValueError(f"--compare {other}: that run has no update in layer {name}")
        P, Q = theirs[name].factors()
        updates[name] = (P @ Q).detach()
        cosine[name] = cosine_similarity(model.get_submodule(name).factors(), (P, Q))
    width = max(map(len, cosine))
    print(f"cosine similarity of dW with {other}:")
    for name, value in cosine.items():
        print(f"  {name:{width}s} {value:+.4f}")
    checkpoint.write_json(os.path.join(out, "cosine.json"), {"with": other, "cosine": cosine})
    return updates


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    settings, options, given = parse(argv)
    try:
        run(settings, options, given, "python train.py " + shlex.join(argv))
    except (ValueError, OSError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = os.path.exists(os.path.join(settings["out"], "state.pt"))
        what = f"the same command with --resume goes on from {settings['out']}" if saved else "nothing was saved yet"
        print(f"train.py: stopped; {what}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
