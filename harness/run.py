"""A run as one object: task, model, tokenizer, method, device, precision and settings, which belong together.

    run = Run.start(settings)           # data and model as asked; `run.adapt()` injects the method
    run = Run.open("out/cola-lora-0")   # a finished run from its folder alone, in eval mode
    run.forward(batch)                  # the loss of a batch
    run.predict(examples)               # what the model says of every row
    run.evaluate()                      # loss and metrics on the development set

Training, predicting, exporting and the benches all use it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import fast
import model as modelling
from harness import backbones, folder, methods, metrics, parallel, sealed
from harness.settings import Settings
from reading import instructions

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")


@dataclass
class Run:
    settings: Settings
    task: data.Task
    model: torch.nn.Module
    tokenizer: data.Tokenizer
    base: str  # words about the base
    device: torch.device = torch.device("cpu")
    layers: list = field(default_factory=list)  # names of the adapted layers
    max_new: int = 0  # tokens that a generated answer may have
    train: list = field(default_factory=list)  # Examples, of a run that trains
    dev: list = field(default_factory=list)
    plan: dict | None = None  # what a method with `calibrate` found
    command: str = ""
    fingerprint: str | None = None  # of the base, None if it was drawn at random
    started: float = field(default_factory=time.perf_counter)

    # ------------------------------------------------------------ from settings

    @classmethod
    def start(cls, settings: Settings, command: str = "") -> "Run":
        """A run as the settings ask, before the method is injected. Everything random depends on the seed alone."""
        started = time.perf_counter()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        device, _ = choose_device(settings.device)
        if settings.precision == "auto":
            settings.precision = "bf16" if device.type == "cuda" else "float32"
        folder.seed_everything(settings.seed)
        task, train, dev = load_task(settings)
        run = cls(settings, task, *build_model(settings, task), device, train=train, dev=dev, command=command, started=started)
        run.fingerprint = base_fingerprint(run.model, settings)
        answers = [len(row["input_ids"]) - row["prompt"] for row in run.train_features if "prompt" in row]
        if answers:  # a generated answer is no longer than the longest of training, whatever the labels of dev are
            run.max_new = min(max(answers), settings.max_length // 2)
        for option, (_, share) in methods.FROM_RUN.items():
            if option in settings.options and settings.options[option] is None:
                settings.options[option] = share(run.warmup_steps, run.total_steps)
        return run

    def features(self, examples: Sequence[data.Example]) -> list[dict]:
        return data.features(self.task, examples, self.tokenizer, self.settings.max_length, self.max_new)

    @functools.cached_property
    def train_features(self) -> list[dict]:
        return self.features(self.train)

    @functools.cached_property
    def dev_features(self) -> list[dict]:
        return self.features(self.dev)

    @property
    def method(self):
        return methods.module(self.settings.method)

    @functools.cached_property
    def stop_id(self) -> int:
        return instructions.stop_id(self.tokenizer, self.task.template == "chat")

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(math.ceil(len(self.train) / self.settings.batch_size) / self.settings.accumulate)

    @property
    def total_steps(self) -> int:
        return min(self.settings.epochs * self.steps_per_epoch, self.settings.max_steps or math.inf)  # type: ignore[return-value]

    @property
    def warmup_steps(self) -> int:
        return round(self.settings.warmup * self.total_steps)

    def adapt(self) -> None:
        """Calibrate where the method looks at data first, inject it, and make the head trainable."""
        s, method = self.settings, self.method
        extra = {"exclude": s.exclude} if s.exclude else {}
        targets = s.targets or modelling.default_targets(self.model)
        if hasattr(method, "calibrate"):
            extra["plan"] = self.plan = self.calibrate(targets, **extra)  # type: ignore[assignment]
        self.layers = method.inject(self.model, targets, **extra, **methods.accepted(method.inject, s.options))
        heads = tuple(name + "." for name in modelling.head_modules(self.model))
        if inside := [name for name in self.layers if f"{name}.".startswith(heads)]:
            raise ValueError(f"layer {inside[0]} is part of the task head: leave it out with --exclude {' '.join(inside)}")
        self.train_head()
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(f"nothing to train: method {s.method} with --freeze-head")

    def check_comparable(self, theirs: Mapping[str, tuple]) -> None:
        """ValueError unless the run that --compare names has an update of the same shape, as P and Q, in each layer."""
        for name in self.layers if self.settings.compare else []:
            shape = (len(theirs[name][0]), theirs[name][1].shape[1]) if name in theirs else None
            if shape != tuple(self.model.get_submodule(name).base.weight.shape):
                raise ValueError(f"--compare {self.settings.compare}: that run has no update like this one's in layer {name}")

    def calibrate(self, targets: Sequence[str], **extra) -> dict:
        """Show the method the first rows of the seeded shuffle, one at a time, without padding."""
        s, features = self.settings, self.train_features
        if s.options["samples"] < 1:
            raise ValueError(f"--samples {s.options['samples']} is below 1")
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(s.seed)).tolist()
        chosen = [features[i] for i in order[: s.options["samples"]]]
        rows = [next(data.batches([f], self.task, 1, self.tokenizer.pad_id, shuffle_seed=s.seed)) for f in chosen]
        bar = functools.partial(tqdm, leave=False, disable=None)
        rows = bar([to_device(row, self.device) for row in rows], desc="calibrating")
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=s.dtype == "bf16")  # a bf16 base has a float32 head

        def loss(model, batch):
            with half:
                return loss_of(model, batch, self.task.kind)

        options = methods.accepted(self.method.calibrate, s.options)
        more = {**extra, "progress": functools.partial(bar, desc="initialising")}
        plan = self.method.calibrate(self.model.to(self.device), targets, rows, loss, **options, **more)
        return parallel.agreed(plan)

    def wrap(self, layers: list[str]) -> None:
        """Inject the method on the layers that an earlier run adapted; what it trained is loaded afterwards."""
        options = methods.accepted(self.method.inject, self.settings.options)
        if hasattr(self.method, "calibrate"):
            options["rank"] = 1  # the real ones differ by layer and come with the weights
        self.layers = layers
        self.method.inject(self.model, layers, **options)
        self.train_head()

    def speed_up(self) -> Mapping[str, int]:
        """Let layers compute by fast.py, as --fast says, in training and afterwards: {words: how many layers}."""
        s = self.settings
        wanted = self.device.type == "cpu" and not s.compile if s.fast is None else s.fast
        with self.autocast():  # the words depend on it
            return Counter(fast.speed_up(self.model).values()) if wanted else {}

    def train_head(self) -> None:
        for name in modelling.head_modules(self.model):
            self.model.get_submodule(name).requires_grad_(not self.settings.freeze_head)

    # ------------------------------------------------------------ from a folder, and into it

    @classmethod
    def open(cls, out: str, device: str = "cpu", force: bool = False) -> "Run":
        """A run from its folder alone, in eval mode. `force` takes another base or tokenizer than it was trained on."""
        config, adapter = folder.read_run(out)
        settings, task = config["settings"], data.Task(**tupled(config["task"]))
        model, tokenizer, words = build_model(settings, task)
        run = cls(settings, task, model, tokenizer, words, choose_device(device)[0], max_new=config["max_new"])
        run.fingerprint = base_fingerprint(model, settings)
        for what, now in (("base", run.fingerprint), ("tokenizer", tokenizer.digest)):
            if config[what] != now and not force:
                raise ValueError(f"{out} was trained on another {what} than what {words} is now (--force goes on)")
        run.wrap(config["layers"])
        run.load(adapter)
        run.model.to(run.device).eval()
        run.speed_up()
        return run

    @property
    def keep(self) -> list[str]:
        """Modules whose numbers were drawn at random, so that they are saved trained or not; "" is the whole model."""
        return [""] if self.settings.scratch else modelling.head_modules(self.model)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        folder.load_adapter_state(self.model, state, self.keep)

    @functools.cached_property
    def rows_digest(self) -> str:
        return hashlib.sha256(repr([self.train, self.dev]).encode()).hexdigest()

    def config(self) -> dict:
        """What config.json says: enough to run it again, and to know its base, tokenizer and rows."""
        own = self.settings.text or self.task.name == "sft"
        held_out = [example.id for example in self.dev] if own and not self.settings.dev else None
        return {
            "settings": dataclasses.asdict(self.settings), "task": dataclasses.asdict(self.task), "layers": self.layers,
            "max_new": self.max_new, "base": self.fingerprint, "tokenizer": self.tokenizer.digest, "rows": self.rows_digest,
            "held_out": held_out, "command": self.command, "versions": versions(), "finished": None,
        }  # fmt: skip

    # ------------------------------------------------------------ what it does

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    @functools.cached_property
    def compiled(self):
        """The model, compiled for changing lengths if asked; a rank growth compiles anew: more than the usual eight times."""
        if not self.settings.compile:
            return self.model
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # not back to eager without a word
        return torch.compile(self.model, dynamic=True)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of a batch on the run's device, a scalar."""
        with self.autocast():
            return loss_of(self.compiled if self.model.training else self.model, batch, self.task.kind)

    def labelled(self, batch: dict[str, torch.Tensor]) -> int:
        """How many labels the mean loss of a batch is the mean of."""
        return int((batch["labels"] != data.IGNORED).sum()) if self.task.kind in ("lm", "mlm") else len(batch["labels"])

    @torch.no_grad()
    def predict(self, examples: Sequence[data.Example], features: Sequence[dict] | None = None, answering: bool = True) -> dict:
        """What the model says of every row, in the rows' order, in eval mode:

        {"answers": class indices, scores or texts, "probabilities": lists over classes, or a span's, or None,
        "loss": the mean over labels, None where a row has none}. Without `answering` only the loss is computed.
        """
        features = self.features(examples) if features is None else features
        was_training = self.model.training
        self.model.eval()
        said, loss, labelled = {}, 0.0, 0  # said: {row: (answer, probabilities)}
        size = self.settings.batch_size * (1 if self.task.kind == "lm" else 8)  # logits over a vocabulary are large
        batches = list(data.batches(features, self.task, size, self.tokenizer.pad_id))
        mine = batches[parallel.number() :: parallel.count()]
        for batch in tqdm(mine, desc="evaluating", leave=False, disable=None):
            rows = batch.pop("index").tolist()
            batch = to_device(batch, self.device)
            logits = None
            if self.task.kind not in ("lm", "mlm"):  # these write, or look at all words for the loss alone
                with self.autocast():
                    logits = modelling.logits(self.model, batch).float()
            if "labels" in batch:
                part = self.forward(batch) if logits is None else loss_from(logits, batch["labels"], self.task.kind)
                n = self.labelled(batch)
                loss, labelled = loss + n * part.item(), labelled + n
            if not answering or self.task.pretraining:
                continue
            if self.task.metrics == ("choice",):
                found, sure = self.choose([examples[i] for i in rows]), [None] * len(rows)
            elif "prompt" in features[0]:
                found, sure = self.generate([features[i] for i in rows]), [None] * len(rows)
            else:
                found, sure = metrics.predictions(self.task, [(features[i], examples[i]) for i in rows], logits)
            said |= zip(rows, zip(found, sure))
        self.model.train(was_training)
        parts = parallel.gather((said, loss, labelled))
        said = {i: both for part, *_ in parts for i, both in part.items()}
        loss, labelled = (sum(values) for values in list(zip(*parts))[1:])
        answers, probabilities = zip(*(said.get(i, (None, None)) for i in range(len(features)))) if features else ((), ())
        return {"answers": list(answers), "probabilities": list(probabilities), "loss": loss / labelled if labelled else None}

    def generate(self, features: Sequence[dict]) -> list[str]:
        """The texts that a language model writes behind some rows' prompts. The labels are drafts: they change none."""
        prompts = [row["input_ids"][: row["prompt"]] for row in features]
        drafts = [row["input_ids"][row["prompt"] :] for row in features]
        with self.autocast():
            found = modelling.generate(self.model, prompts, self.max_new, self.stop_id, drafts=drafts)
        return [self.tokenizer.decode(ids) for ids in found]

    def choose(self, examples: Sequence) -> list[str]:
        """Of each example's options the one that the model finds likeliest behind the prompt, by the sum over its tokens."""
        rows = [replace(e, label=option) for e in examples for option in e.options]
        features, scores = self.features(rows), torch.empty(len(rows))
        for batch in data.batches(features, self.task, self.settings.batch_size, self.tokenizer.pad_id):
            index, batch = batch.pop("index"), to_device(batch, self.device)
            where = batch["labels"] != data.IGNORED
            begins = torch.tensor([features[i]["prompt"] - 1 for i in index], device=self.device)  # of the last answer
            where &= torch.arange(where.shape[1], device=self.device) >= begins[:, None]
            with self.autocast():
                logits = modelling.logits(self.model, batch, where).float()  # (N, V)
            p = logits.log_softmax(-1).gather(1, batch["labels"][where][:, None])[:, 0]
            scores[index] = torch.stack([part.sum() for part in p.split(where.sum(1).tolist())]).cpu()
        parts = scores.split([len(e.options) for e in examples])
        return [e.options[int(part.argmax())] if len(part) else "" for e, part in zip(examples, parts)]

    def evaluate(self) -> dict:
        """{"dev_loss": mean over labels, metric: value, ...} on the development set, the task's headline metric first."""
        scored = self.task.metrics != ("loss",)
        found = self.predict(self.dev, self.dev_features, scored)
        scores = {} if not scored else metrics.score(self.task, self.dev, found["answers"])
        return {"dev_loss": found["loss"], **scores}

    def watch(self) -> dict[str, dict[str, float]]:
        return self.method.watch(self.model) if hasattr(self.method, "watch") else {}

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def count(self) -> tuple[int, int]:
        """(trained numbers, all numbers)."""
        params = list(self.model.parameters())
        return sum(p.numel() for p in params if p.requires_grad), sum(p.numel() for p in params)


@torch.no_grad()
def factors_of(other: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (P, Q)} of the run in folder `other`, for --compare. ValueError if its method has none."""
    if folder.read_run(other)[0]["settings"].method in methods.NO_FACTORS:
        raise ValueError(f"--compare {other}: that run has no low-rank update")
    run = Run.open(other)
    return {name: run.model.get_submodule(name).factors() for name in run.layers}


# ---------------------------------------------------------------------- its parts


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """(torch device, the reason in words). ValueError if what was asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        if there["cuda"]:
            return torch.device("cuda"), f"{torch.cuda.get_device_name()} found"
        return torch.device("cpu"), "no CUDA found" + ("; --device mps would try Apple's" if there["mps"] else "")
    if not there[wanted]:
        raise ValueError(f"--device {wanted}: torch finds no such device here")
    return torch.device(wanted), "as asked"


def load_task(s: Settings) -> tuple[data.Task, list[data.Example], list[data.Example]]:
    """(task, training examples, development examples)."""
    if s.text:
        flags = {"kind": s.kind, "merge_labels": s.merge_labels, "classes_ok": s.classes_ok}
        task, rows = data.load_custom(s.data, s.text, s.label, **flags)
        return task, *split(s, rows, data.load(task, s.dev, "dev") if s.dev else None)
    task = data.TASKS[s.task]
    if s.task == "sft":
        columns = tuple((name,) for name in [*s.prompt, s.answer]) if s.prompt else ()
        template = s.template if s.template in (None, "chat") else instructions.read_template(s.template)
        task = replace(task, columns=columns, template=template or "", metrics=(s.score or task.metrics[0],))
        return task, *split(s, data.load(task, s.data), data.load(task, s.dev) if s.dev else None)
    if s.data and os.path.isfile(s.data):  # which has no splits
        return task, *split(s, data.load(task, s.data), None)
    train, dev = (data.load(task, s.data, split) for split in ("train", "dev"))
    return task, train[: s.rows], dev


def split(s: Settings, rows: list[data.Example], dev: list[data.Example] | None) -> tuple[list[data.Example], list[data.Example]]:
    """(training, development) rows; without `dev` a tenth at random, the same for every seed of the run."""
    if dev is None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held = set(order[: max(1, len(rows) // 10)])
        rows, dev = [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
        if not rows:
            raise ValueError(f"{s.data}: one row is too few: one is held out for development, --dev FILE gives others")
    return rows[: s.rows], dev


def build_model(s: Settings, task: data.Task) -> tuple[torch.nn.Module, data.Tokenizer, str]:
    """(model, tokenizer, words about it) as the settings ask; new weights are drawn from torch's generator."""
    if s.backbone:
        dtype = torch.bfloat16 if s.dtype == "bf16" else torch.float32
        model, tokenizer = backbones.load(s.backbone, task.kind, task.labels, dtype)
        if s.max_length > (most := positions(model)):
            raise ValueError(f"--max-length {s.max_length} is more than the backbone's {most} positions")
        return model, data.Tokenizer(tokenizer), s.backbone
    words = os.path.join(ASSETS, "tokenizer.json")
    sealed.check(words)
    tokenizer = data.Tokenizer(words)
    kind = "lm" if task.kind == "mlm" else task.kind
    causal = task.kind == "lm"
    if s.scratch:
        sizes = {key: getattr(s, key) for key in ("width", "depth", "heads", "hidden")}
        config = modelling.Config(vocab_size=tokenizer.vocab_size, causal=causal, **sizes)
        return modelling.Transformer(config, kind, len(task.labels)), tokenizer, "random weights"
    path = base_of(s)
    if os.path.isfile(path):  # load_base says what else it is
        sealed.check_base(path)
    model = modelling.load_base(path, kind, len(task.labels))
    if model.config.causal < causal:
        raise ValueError(f"{path} is an encoder, task {task.name} needs a decoder: --backbone, --base or --scratch")
    with contextlib.suppress(ValueError):  # Windows: there is no way from one drive to another
        path = os.path.relpath(path)
    return model, tokenizer, path


def positions(model: torch.nn.Module) -> float:
    """How many tokens the model has positions for. RoBERTa and its kin count them from behind the padding's."""
    most = getattr(model.config, "max_position_embeddings", None) or math.inf
    most = most if most > 0 else math.inf  # XLNet's -1
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return most - (padding[0] + 1 if padding else 0)


def base_of(s: Settings) -> str:
    """The file of our own base: the decoder for tasks that generate text, else the encoder."""
    causal = s.task is not None and data.TASKS[s.task].kind == "lm"
    return s.base or os.path.join(ASSETS, "decoder.safetensors" if causal else "encoder.safetensors")


def base_fingerprint(model: torch.nn.Module, s: Settings) -> str | None:
    """sha256 of the base's numbers, without a task head; None for random weights, which are the run's own."""
    heads = tuple(name + "." for name in modelling.head_modules(model))
    base = {name: t for name, t in model.state_dict().items() if not name.startswith(heads)} if heads else model.state_dict()
    return None if s.scratch else sealed.fingerprint(base)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device; a GPU copies it from pinned memory while it still computes on the one before."""
    pin = torch.device(device).type == "cuda"
    return {key: (value.pin_memory() if pin else value).to(device, non_blocking=True) for key, value in batch.items()}


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """Mean loss of a batch (data.batches), a scalar. A language model computes logits at the labelled places only."""
    labels = batch["labels"]
    where = labels != data.IGNORED if kind in ("lm", "mlm") else None
    return loss_from(modelling.logits(model, batch, where).float(), labels if where is None else labels[where], kind)


def loss_from(logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean loss of float32 logits: (B, C), (B,), (B, T, 2), or (N, V) at the labelled places."""
    if kind == "regression":
        return F.mse_loss(logits, labels)
    if kind == "span":  # (B, T, 2) and (B, 2): the mean over start and end
        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten())
    return F.cross_entropy(logits, labels)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def tupled(value):
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {key: tupled(v) for key, v in value.items()}
    return tuple(map(tupled, value)) if isinstance(value, list) else value
