"""A language model of 135M parameters on this machine: how long calibrating, training and answering take.

    python bench/language_model.py            # SmolLM-135M's shape with random weights; some minutes on one core
    python bench/language_model.py --write    # also writes bench/language_model.md

`train.py --task sft` on prompts of 64 and answers of 64 random words: calibration of Task-aware TLoRA with 8 rows, ten steps of
two rows, an evaluation with four generated answers of up to 64 tokens. Random weights cost what trained ones cost. Below it,
what models of three sizes need on a GPU, computed, not measured: see `needs`. Needs transformers (requirements-optional.txt).
"""

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import speed  # noqa: E402

import train  # noqa: E402
from harness.run import Run  # noqa: E402
from model import default_targets  # noqa: E402

# name: hidden, intermediate, layers, heads, key-value heads, vocabulary, words tied: SmolLM, Llama 3.2 and Llama 2.
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1.2B": (2048, 8192, 16, 32, 8, 128256, True),
    "6.7B": (4096, 11008, 32, 32, 32, 32000, False),
}


def config(name):
    import transformers

    hidden, inner, layers, heads, keys, words, tied = SHAPES[name]
    return transformers.LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip


def checkpoint(folder):
    """A random model of SHAPES' first in `folder`, with our tokenizer's words."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config("135M")).save_pretrained(folder)
    words = tokenizers.Tokenizer.from_file(os.path.join(ROOT, "assets", "tokenizer.json"))
    names = {"pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder


def timed(owner, name, times):
    """Let `owner.name` add its seconds to times[name]."""
    function = getattr(owner, name)

    def wrapped(*args, **options):
        start = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            times[name] = times.get(name, 0.0) + time.perf_counter() - start

    setattr(owner, name, wrapped)


def measured(args):
    """{what: seconds} of one run."""
    rng, times = random.Random(0), {}
    with tempfile.TemporaryDirectory() as folder:
        base = checkpoint(os.path.join(folder, "base"))
        text = lambda: " ".join(rng.choice(["dog", "house", "sees", "old", "the"]) for _ in range(64))  # noqa: E731
        data = os.path.join(folder, "rows.jsonl")
        with open(data, "w") as f:
            f.writelines(json.dumps({"query": text(), "response": text()}) + "\n" for _ in range(40))
        for name in ("calibrate", "generate"):
            timed(Run, name, times)
        timed(train, "backward", times)
        argv = ["--task", "sft", "--data", data, "--backbone", base, "--method", "task_tlora", "--samples", 8, "--max-steps", 10,
                "--batch-size", 2, "--out", os.path.join(folder, "run"), "--no-figures", "--threads", args.threads,
                "--dtype", args.dtype]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            start = time.perf_counter()
            if train.main([*map(str, argv)]):
                raise SystemExit(screen.getvalue())
    return times | {"all": time.perf_counter() - start}


def needs(name, rank=8, rows=8, length=512):
    """GB on a GPU with bf16 weights, float32 LoRA adapters of `rank`, AdamW and gradient checkpointing: what is held, by formula.

    Weights 2 bytes a number. An adapter's number has a weight, a gradient and two moments, 16 bytes. Checkpointing keeps the
    input of each block, 2 bytes x tokens x hidden, and one block's inside while it is recomputed: about 2 bytes x tokens x
    (10 hidden + 4 inner). Logits in bf16 and float32 with their gradient, 10 bytes x tokens x vocabulary, at all places.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config(name))
    hidden, inner, layers, _, _, words, _ = SHAPES[name]
    numbers = sum(p.numel() for p in model.parameters())
    adapter = sum(rank * sum(model.get_submodule(target).weight.shape) for target in default_targets(model))
    tokens = rows * length
    inside = 2 * tokens * (layers * hidden + 10 * hidden + 4 * inner)
    return {"numbers": numbers, "adapter": adapter, "weights": 2 * numbers / 1e9, "trained": 16 * adapter / 1e9,
            "activations": inside / 1e9, "logits": 10 * tokens * words / 1e9}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--write", action="store_true", help="write bench/language_model.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = measured(args)
    lines = [f"`python bench/language_model.py`: {speed.hardware('cpu')}, torch {torch.__version__}, {args.dtype}.\n",
             "| LLaMA of 135M parameters, random weights | seconds |", "|---|--:|",
             f"| calibrating Task-aware TLoRA, 8 rows of about 130 tokens | {times['calibrate']:.1f} |",
             f"| ten steps of 2 rows, forward and backward | {times['backward']:.1f} |",
             f"| four answers of 64 tokens, keys and values kept | {times['generate']:.1f} |",
             f"| the whole command | {times['all']:.1f} |", "",
             "Computed, not measured: GB with bf16 weights (`--dtype bf16`), LoRA of rank 8 on all linear layers in float32,",
             "AdamW, `--gradient-checkpointing`, 8 rows of 512 tokens (formula: `needs` of the script).\n",
             "| model | numbers | adapter | weights | adapter, gradient, moments | activations | logits | sum |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for name in SHAPES:
        n = needs(name)
        parts = [n[key] for key in ("weights", "trained", "activations", "logits")]
        gigabytes = " | ".join(f"{x:.2f}" for x in [*parts, sum(parts)])
        lines.append(f"| {name} | {n['numbers']:,} | {n['adapter']:,} | {gigabytes} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        with open(os.path.join(ROOT, "bench", "language_model.md"), "w") as f:
            f.write(text)


if __name__ == "__main__":
    main()
