"""The methods by name: where each is, its words, its defaults, and the options that its signature declares."""

import importlib
import inspect
import re

# method: (module, what it is, learning rate, weight decay). The rates were chosen on seeds that no table uses
# (bench/rates.md); the decays are the papers' where a paper names one.
METHODS = {
    "triadapt": ("triadapt", "TriAdaptLoRA: B (L+U) A, ranks grow under a budget", 8e-3, 0.0),
    "tlora": ("tlora", "TLoRA: alpha C B A, only B and the scale alpha trained", 1e-2, 0.01),
    "tlora_plus": ("tlora_plus", "TLoRA+: C B A, each matrix with its own learning rate", 2e-3, 0.1),
    "task_tlora": ("task_tlora", "Task-aware TLoRA: A from the data, frozen; ranks by sensitivity", 2e-3, 0.0),
    "lora": ("baselines.lora", "LoRA, the yardstick", 4e-3, 0.0),
    # What the papers compare with. Their rates here are not chosen yet: LoRA's, or the authors' where that is said.
    "lora_plus": ("baselines.lora_plus", "LoRA+: LoRA, B with a rate of its own", 5e-4, 0.0),
    "dora": ("baselines.dora", "DoRA: LoRA's direction, rows of a trained length", 4e-3, 0.0),
    "pissa": ("baselines.pissa", "PiSSA: LoRA from the principal part of W0", 1e-3, 0.0),
    "olora": ("baselines.olora", "OLoRA: LoRA from a QR of W0", 1e-3, 0.0),
    "lora_ga": ("baselines.lora_ga", "LoRA-GA: LoRA from the SVD of the gradient", 1e-3, 0.0),
    "corda": ("baselines.corda", "CorDA: LoRA from the SVD of W0 times the input covariance", 1e-3, 0.0),
    "lora_xs": ("baselines.lora_xs", "LoRA-XS: U S R V^T of the SVD of W0, only R trained", 1e-2, 0.0),
    "adalora": ("baselines.adalora", "AdaLoRA: B diag(E) A, the budget shrinks", 4e-3, 0.0),
    "increlora": ("baselines.increlora", "IncreLoRA: AdaLoRA's form, ranks grow", 4e-3, 0.0),
    "houlsby": ("baselines.houlsby", "bottleneck adapters behind attention and MLP", 1e-3, 0.0),
    "pfeiffer": ("baselines.pfeiffer", "bottleneck adapters behind the MLP", 1e-3, 0.0),
    "full": ("baselines.full", "full fine-tuning", 5e-4, 0.01),
    "bitfit": ("baselines.bitfit", "biases only", 4e-2, 0.0),
    "head": ("baselines.head", "the task head only", 1e-2, 0.0),
}

# Method options whose natural default is a share of the run: in words, and as a function of (warm-up steps, all steps).
FROM_RUN = {
    "t0": ("the warm-up steps", lambda warmup, total: warmup),
    "interval": ("a fifteenth of the steps", lambda warmup, total: max(1, total // 15)),
    "t_init": ("12 % of the steps", lambda warmup, total: round(0.12 * total)),  # the authors' share on CoLA
    "t_final": ("52 % of the steps", lambda warmup, total: round(0.52 * total)),  # likewise
}

# Method options that mean something only where another has a certain value.
ONLY_WITH = {"fixed_k": ("mode", "fixed")}


def module(name):
    """The module of a method, with its verbs."""
    return importlib.import_module(METHODS[name][0])


def options(name):
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


def accepted(function, values):
    """Those of the options that a verb takes."""
    return {key: value for key, value in values.items() if key in inspect.signature(function).parameters}


def takes_targets(name):
    """Whether the method wraps layers; those that do not have a default for the targets that they never look at."""
    return inspect.signature(module(name).inject).parameters["targets"].default is inspect.Parameter.empty
