"""Hugging Face checkpoints for the same loop: RoBERTa, BERT, DeBERTa, OPT, T5, LLaMA, Mistral, GPT-2, ...

`load` gives a model and its tokenizer; `logits`, `generate`, `default_targets` and `head_modules` of model.py
then work on it as on our own. Needs the optional package `transformers`, and nothing else here does.
"""

import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec

import torch
import torch.nn as nn

from model import Transformer, default_targets, head_modules

CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "span": "AutoModelForQuestionAnswering",
    "lm": "AutoModelForCausalLM",
}


def load(name_or_dir: str, kind: str, labels: Sequence[str] = (), dtype: torch.dtype = torch.float32):
    """(model, tokenizer) of a checkpoint for a `kind` of task; `labels` are a classification's class names.

    In `dtype` (the head in float32) and in eval mode. Padding is on the right, with the end-of-text token where there is no
    other. Conv1D layers (GPT-2) come as nn.Linear: see `delinearize`. A head of the checkpoint's own is kept if it fits the
    task, else drawn at random. ValueError, in one line, if the checkpoint cannot serve.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{name_or_dir} needs the package transformers: pip install transformers") from None
    if kind not in CLASSES:
        raise ValueError(f"kind '{kind}' is unknown to backbones: use one of {', '.join(CLASSES)}")
    transformers.logging.set_verbosity_error()  # it reports new and unused weights: checked below
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_dir, trust_remote_code=False)
        if kind == "lm" and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(f"{config.model_type} is an encoder: take a decoder")
        theirs = [str(label).lower() for _, label in sorted(config.id2label.items())]
        if kind == "classification":
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
            config.problem_type = "single_label_classification"
        elif kind == "regression":
            config.num_labels = 1
            config.problem_type = "regression"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=False)
        options = {
            "config": config,
            "dtype": dtype,  # by default the checkpoint's: in float16 small steps round to nothing
            "ignore_mismatched_sizes": True,  # a head for other classes
            "output_loading_info": True,
            "trust_remote_code": False,  # else it asks on standard input whether to run the checkpoint's Python
        }
        model, report = getattr(transformers, CLASSES[kind]).from_pretrained(name_or_dir, **options)
        lacking = drawn(report)
        if lacking >= {name for name, _ in model.named_parameters()}:
            # LlamaForQuestionAnswering calls "transformer" what all other LLaMAs call "model".
            base, report = transformers.AutoModel.from_pretrained(name_or_dir, **options)
            prefix = model.base_model_prefix + "."
            lacking = {key for key in lacking if not key.startswith(prefix)}
            lacking |= {prefix + key for key in drawn(report)}
            setattr(model, model.base_model_prefix, base)
    except Exception as error:  # transformers raises nearly every kind
        place = "" if os.path.isdir(name_or_dir) else "no such directory; on the Hugging Face hub "
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if find_spec("sentencepiece") is None and ("tiktoken" in reason or "sentencepiece" in reason.lower()):
            reason = "its tokenizer needs two packages more: pip install sentencepiece protobuf"
        raise ValueError(f"{name_or_dir}: {place}not a checkpoint for {kind}: {reason}") from error

    accept_drawn(model, lacking, name_or_dir, kind)
    prepare(tokenizer, model, name_or_dir)
    linearize(model)
    for name in head_modules(model):
        model.get_submodule(name).float()
    ours = [label.lower() for label in labels]
    if theirs != ours and sorted(theirs) == sorted(ours):
        reorder_head(model, [theirs.index(label) for label in ours])
    return model, tokenizer


@torch.no_grad()
def reorder_head(model: nn.Module, order: list[int]) -> None:
    """Put the rows of a checkpoint's own head in the order of our class names: MNLI's classes come in three orders."""
    for name in head_modules(model):
        for layer in model.get_submodule(name).modules():
            if isinstance(layer, nn.Linear) and layer.out_features == len(order):
                layer.weight.copy_(layer.weight[order])
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias[order])


def drawn(report: dict) -> set[str]:
    """Names of what from_pretrained drew at random: not in the checkpoint, or of another shape there."""
    return set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}


def accept_drawn(model: nn.Module, names: Collection[str], place: str, kind: str) -> None:
    """What the checkpoint lacks was drawn at random. That must be the head, or a layer beside the blocks that counts as
    head then: BERT's pooler, when the checkpoint is a masked language model. Anything else would be noise in the
    middle of the model: ValueError."""
    heads, targets = head_modules(model), default_targets(model)
    names = sorted({key.rpartition(".")[0] for key in names})
    model.new_modules = [name for name in names if name.partition(".")[0] not in heads]
    for name in model.new_modules:
        if kind == "lm" or name in targets or not isinstance(model.get_submodule(name), nn.Linear):
            raise ValueError(f"{place}: not a checkpoint for {kind}: it lacks the weights of {name}")


def prepare(tokenizer, model: nn.Module, place: str) -> None:
    """Padding on the right, with a token for it. ValueError if the tokenizer is empty or not the model's."""
    # A checkpoint without tokenizer files gets an empty tokenizer from transformers, and no word.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{place}: holds no tokenizer")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(f"{place}: its tokenizer knows {len(tokenizer)} tokens, its embedding fewer")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{place}: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders find a row's last token by it


def linearize(model: nn.Module) -> None:
    """Turn every Conv1D (n, m), GPT-2's transposed linear layer, into an nn.Linear (m, n), in place."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":  # by name, so that other models need no import
            linear = nn.Linear(*module.weight.shape, device="meta").train(module.training)  # type: ignore[misc]
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            linear.was_conv1d = True
            model.set_submodule(name, linear)


def delinearize(model: nn.Module) -> None:
    """Undo `linearize`, in place: before save_pretrained, or transformers reads the weights transposed."""
    for name, module in list(model.named_modules()):
        if getattr(module, "was_conv1d", False):
            from transformers.pytorch_utils import Conv1D

            conv = Conv1D(module.out_features, module.in_features).train(module.training)
            conv.weight = nn.Parameter(module.weight.detach().T.contiguous())
            conv.bias = module.bias
            model.set_submodule(name, conv)


def set_checkpointing(model: nn.Module) -> None:
    """Recompute the blocks in backward instead of storing their activations; the gradients stay the same."""
    if isinstance(model, Transformer):
        model.checkpointing = True
    else:
        # transformers 5.23 has the first name and warns of the second, 5.17 has the second alone.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})  # the reentrant kind wants an input that needs gradients
