"""A run in other formats: a LoRA adapter as PEFT reads it, or an ordinary Hugging Face checkpoint.

Every method whose layers have factors(), dW = P Q, is a LoRA to PEFT: lora_B = P, lora_A = Q, with
lora_alpha = r in each layer so that PEFT's own scaling is 1.
"""

import os

import torch
from safetensors.torch import save_file

from harness import backbones
from harness.folder import write_json
from model import head_modules
from reading.files import replace_file

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "span": "QUESTION_ANS", "lm": "CAUSAL_LM"}


@torch.no_grad()
def export_peft(run, path):
    """Write adapter_config.json and adapter_model.safetensors.

    Ranks differ by layer, so each layer stands in rank_pattern and alpha_pattern. ValueError for a method
    whose change PEFT has no form for.
    """
    model, names, dora = run.model, run.layers, run.settings.method == "dora"
    layers = [model.get_submodule(name) for name in names]
    if not names or not all(hasattr(layer, "factors") for layer in layers):
        raise ValueError(f"method {run.settings.method} has no low-rank update: PEFT's LoRA cannot hold it")
    heads = head_modules(model)  # a frozen one too: it was drawn at random
    ranks, state = {}, {}
    for name, layer in zip(names, layers):
        P, Q = (layer.scaling * layer.B, layer.A) if dora else layer.factors()
        ranks[name] = P.shape[1]
        state[f"base_model.model.{name}.lora_A.weight"] = Q
        state[f"base_model.model.{name}.lora_B.weight"] = P
        if dora:
            state[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude
    for head in heads:
        for key, value in model.get_submodule(head).state_dict().items():
            state[f"base_model.model.{head}.{key}"] = value
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {name: rank for name, rank in ranks.items() if rank != common}
    adapter = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[run.task.kind],
        "base_model_name_or_path": run.settings.backbone,
        "target_modules": names,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "modules_to_save": heads or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora,
        # GPT-2's Conv1D keeps its weight the other way round
        "fan_in_fan_out": any(getattr(layer.base, "was_conv1d", False) for layer in layers),
        "inference_mode": True,
    }
    os.makedirs(path, exist_ok=True)
    tensors = {key: value.to("cpu", copy=True).contiguous() for key, value in state.items()}
    file = os.path.join(path, "adapter_model.safetensors")
    replace_file(file, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    write_json(os.path.join(path, "adapter_config.json"), adapter)
    print(f"PEFT adapter in {path}: {len(names)} layers, ranks {min(ranks.values())} to {max(ranks.values())}")


def export_merged(run, path):
    """Fold every dW into its weight and write a checkpoint for `from_pretrained`; the run's model is changed by it."""
    if run.layers:
        run.method.merge(run.model)
    backbones.delinearize(run.model)
    run.model.save_pretrained(path)
    run.tokenizer.source.save_pretrained(path)
    print(f"merged checkpoint in {path}")
