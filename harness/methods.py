"""The methods by name: where each is, its words, its defaults, and the options that its signature declares."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping

# method: (module, what it is, learning rate, weight decay). The rates were chosen on seeds that no table uses (docs/rates.md),
# the decays are the papers' where named.
METHODS = {
    "triadapt": ("triadapt", "TriAdaptLoRA: B (L+U) A, ranks grow under a budget", 1.78e-2, 0.0),
    "tlora": ("tlora", "TLoRA: alpha C B A, only B and the scale alpha trained", 3.16e-2, 0.01),
    "tlora_plus": ("tlora_plus", "TLoRA+: C B A, each matrix with its own learning rate", 3.16e-3, 0.1),
    "task_tlora": ("task_tlora", "Task-aware TLoRA: A from the data, frozen; ranks by sensitivity", 1.78e-3, 0.0),
    "lora": ("baselines.lora", "LoRA, the yardstick", 5.62e-3, 0.0),
    # What the papers compare with.
    "lora_plus": ("baselines.lora_plus", "LoRA+: LoRA, B with a rate of its own", 1e-3, 0.0),
    "dora": ("baselines.dora", "DoRA: LoRA's direction, rows of a trained length", 5.62e-3, 0.0),
    "pissa": ("baselines.pissa", "PiSSA: LoRA from the principal part of W0", 3.16e-3, 0.0),
    "olora": ("baselines.olora", "OLoRA: LoRA from a QR of W0", 1.78e-3, 0.0),
    "lora_ga": ("baselines.lora_ga", "LoRA-GA: LoRA from the SVD of the gradient", 3.16e-3, 0.0),
    "corda": ("baselines.corda", "CorDA: LoRA from the SVD of W0 times the input covariance", 1.78e-3, 0.0),
    "lora_xs": ("baselines.lora_xs", "LoRA-XS: U S R V^T of the SVD of W0, only R trained", 5.62e-3, 0.0),
    "adalora": ("baselines.adalora", "AdaLoRA: B diag(E) A, the budget shrinks", 3.16e-2, 0.0),
    "increlora": ("baselines.increlora", "IncreLoRA: AdaLoRA's form, ranks grow", 1.78e-2, 0.0),
    "houlsby": ("baselines.houlsby", "bottleneck adapters behind attention and MLP", 5.62e-3, 0.0),
    "pfeiffer": ("baselines.pfeiffer", "bottleneck adapters behind the MLP", 1.78e-2, 0.0),
    "full": ("baselines.full", "full fine-tuning", 1e-3, 0.01),
    "bitfit": ("baselines.bitfit", "biases only", 3.16e-2, 0.0),
    "head": ("baselines.head", "the task head only", 3.16e-2, 0.0),
}

# With --backbone the rates above are far too high. method: (learning rate for a real checkpoint, where it is from): the best
# for two tasks with a real encoder (docs/rates.md), to one digit, or a paper's.
CHOSEN = "chosen on all-MiniLM-L6-v2"
AS_LORA = f"LoRA's, {CHOSEN}"
BACKBONE_RATES = {
    "triadapt": (3e-3, CHOSEN),  # the paper's: 5e-4 to 2.2e-3
    "tlora": (3e-3, CHOSEN),  # the author's: 1e-3
    "tlora_plus": (3e-4, CHOSEN),  # of A; B's is 8 times that with the default ratio of 4; the paper's: 1e-4
    "task_tlora": (3e-4, CHOSEN),  # and the paper's on GLUE
    "lora": (3e-4, CHOSEN),
    "lora_plus": (5e-5, "its authors' for RoBERTa"),  # of A, theirs with a ratio of 80
    "dora": (3e-4, AS_LORA),
    "pissa": (3e-4, AS_LORA),
    "olora": (3e-4, AS_LORA),
    "lora_ga": (3e-4, AS_LORA),
    "corda": (3e-4, AS_LORA),
    "lora_xs": (3e-3, f"TLoRA's, {CHOSEN}"),  # trains an (r, r) matrix between frozen ones, as TLoRA does
    "adalora": (8e-4, "its paper's on CoLA"),
    "increlora": (1e-3, "its authors' on CoLA"),
    "houlsby": (3e-4, AS_LORA),
    "pfeiffer": (3e-4, AS_LORA),
    "full": (2e-5, "BERT's and RoBERTa's, the lower end of 2e-5 to 5e-5"),
    "bitfit": (1e-3, "its paper's"),
    "head": (1e-3, "that of the head beside any method"),
}

# Methods whose update is no product P Q of thin factors (DoRA's goes to PEFT as DoRA), and that cannot be merged.
NO_FACTORS, NO_MERGE = ("dora", "houlsby", "pfeiffer", "full", "bitfit", "head"), ("houlsby", "pfeiffer")

# Method options whose natural default is a share of the run: in words, and as a function of (warm-up steps, all steps).
FROM_RUN = {
    "t0": ("the warm-up steps", lambda warmup, total: warmup),
    "interval": ("a fifteenth of the steps", lambda warmup, total: max(1, total // 15)),
    "t_init": ("12 % of the steps", lambda warmup, total: round(0.12 * total)),  # the authors' share on CoLA
    "t_final": ("52 % of the steps", lambda warmup, total: round(0.52 * total)),  # likewise
}

# Method options that mean something only where another has a certain value.
ONLY_WITH = {"fixed_k": ("mode", "fixed")}


def module(name: str):
    """The module of a method, with its verbs."""
    return importlib.import_module(METHODS[name][0])


def options(name: str) -> dict[str, tuple]:
    """{option: (type, default, help)} of a method: the keyword arguments of its inject and calibrate."""
    found = {}
    for verb in ("inject", "calibrate"):
        function = getattr(module(name), verb, None)
        if function is None:
            continue
        words = dict(re.findall(r"^ {8}(\w+): ((?:.+\n)(?: {9,}.+\n)*)", (function.__doc__ or "") + "\n", re.M))
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.annotation is not parameter.empty:
                text = " ".join(words[parameter.name].split())
                found[parameter.name] = (parameter.annotation, parameter.default, text)
    return found


def accepted(function: Callable, values: Mapping[str, object]) -> dict:
    """Those of the options that a verb takes."""
    return {key: value for key, value in values.items() if key in inspect.signature(function).parameters}


def takes_targets(name: str) -> bool:
    """Whether the method wraps layers; those that do not have a default for the targets that they never look at."""
    return inspect.signature(module(name).inject).parameters["targets"].default is inspect.Parameter.empty
