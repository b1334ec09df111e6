"""Take a run elsewhere: a LoRA adapter in PEFT's format, or an ordinary Hugging Face checkpoint.

    python export.py out/mrpc-triadapt-0 --peft DIR       # PeftModel.from_pretrained(base, DIR)
    python export.py out/mrpc-triadapt-0 --merged DIR     # AutoModel...from_pretrained(DIR)

Every method whose layers have factors(), dW = P Q, is a LoRA to PEFT: lora_B = P, lora_A = Q, with
lora_alpha = r in each layer so that PEFT's own scaling is 1. Both need a run with --backbone.
"""

import argparse
import os
import sys

import torch
from safetensors.torch import save_file

import backbones
import checkpoint
from model import head_modules

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "span": "QUESTION_ANS", "lm": "CAUSAL_LM"}


@torch.no_grad()
def export_peft(model, config, path):
    """Write adapter_config.json and adapter_model.safetensors; `config` is the run's config.json.

    Ranks differ by layer, so each layer stands in rank_pattern and alpha_pattern. ValueError for a method
    whose change is not low rank.
    """
    names, settings = config["layers"], config["settings"]
    layers = [model.get_submodule(name) for name in names]
    if not names:
        raise ValueError(f"method {settings['method']} has no low-rank update: only --export-merged takes it")
    heads = head_modules(model)  # a frozen one too: it was drawn at random
    ranks, state = {}, {}
    for name, layer in zip(names, layers):
        P, Q = layer.factors()
        ranks[name] = P.shape[1]
        state[f"base_model.model.{name}.lora_A.weight"] = Q
        state[f"base_model.model.{name}.lora_B.weight"] = P
    for head in heads:
        for key, value in model.get_submodule(head).state_dict().items():
            state[f"base_model.model.{head}.{key}"] = value
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {name: rank for name, rank in ranks.items() if rank != common}
    adapter = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[config["task"]["kind"]],
        "base_model_name_or_path": settings["backbone"],
        "target_modules": names,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "modules_to_save": heads or None,
        "lora_dropout": 0.0,
        "bias": "none",
        # GPT-2's Conv1D keeps its weight the other way round
        "fan_in_fan_out": any(getattr(layer.base, "was_conv1d", False) for layer in layers),
        "inference_mode": True,
    }
    os.makedirs(path, exist_ok=True)
    tensors = {key: value.to("cpu", copy=True).contiguous() for key, value in state.items()}
    file = os.path.join(path, "adapter_model.safetensors")
    checkpoint.replace_file(file, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    checkpoint.write_json(os.path.join(path, "adapter_config.json"), adapter)
    print(f"PEFT adapter in {path}: {len(names)} layers, ranks {min(ranks.values())} to {max(ranks.values())}")


def export_merged(model, method, tokenizer, path):
    """Fold every dW into its weight and write a checkpoint for `from_pretrained`; `model` is changed by it."""
    if any(hasattr(m, "factors") for m in model.modules()):
        method.merge(model)
    backbones.delinearize(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    print(f"merged checkpoint in {path}")


def main(argv=None):
    import train

    parser = train.Parser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--peft", metavar="DIR", help="write a PEFT LoRA adapter there")
    parser.add_argument("--merged", metavar="DIR", help="write a Hugging Face checkpoint there")
    args = parser.parse_args(argv)
    if not args.peft and not args.merged:
        parser.error("give --peft DIR or --merged DIR")
    try:
        config = checkpoint.read_config(args.run)
        if not config["settings"]["backbone"]:
            raise ValueError(f"{args.run} has no --backbone: the tiny base is no Hugging Face model")
        model, tokenizer, _, settings = train.restore(args.run)
        if args.peft:
            export_peft(model, config, args.peft)
        if args.merged:
            export_merged(model, train.method_of(settings), tokenizer.source, args.merged)
    except (ValueError, OSError) as e:
        print(f"export.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
