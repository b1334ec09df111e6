"""The whole job a user runs: MRPC with a Hugging Face encoder, ours against transformers' Trainer with PEFT's LoRA.

    python bench/end_to_end.py --backbone DIR --data GLUE/MRPC                 # whole MRPC, three epochs
    python bench/end_to_end.py --backbone DIR --data GLUE/MRPC --rows 1000 --epochs 1 --write

Both start from nothing, a fresh process: imports, loading the model, tokenising, training, an evaluation after each epoch,
the adapter on disk. The same model, rows, rank 8 on the same layers, batch, epochs, rate, linear schedule and seed; each
with its own defaults for the rest: the Trainer draws rows at random, train.py puts rows of similar length together. They take
turns; seconds are of the wall, and of all CPU threads where no GPU is used, which other programs do not stop.
Needs transformers, peft and accelerate (requirements-optional.txt).
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
TARGETS = ["query", "key", "value", "dense"]


def theirs(args):
    """transformers' Trainer with PEFT's LoRA, as its documentation has it; prints the last evaluation as JSON."""
    import numpy as np
    import peft
    import transformers

    import data
    from harness import metrics

    transformers.set_seed(args.seed)
    transformers.logging.set_verbosity_error()
    task = data.TASKS["mrpc"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.backbone, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.backbone)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=r".*encoder.*\.(query|key|value|dense)")
    model = peft.get_peft_model(model, config)

    def rows(split, count=None):
        examples = data.load(task, args.data, split)[:count]
        return [{**tokenizer(*e.text, truncation=True, max_length=128), "labels": e.label} for e in examples]

    settings = transformers.TrainingArguments(
        args.out, num_train_epochs=args.epochs, per_device_train_batch_size=32, per_device_eval_batch_size=256,
        learning_rate=args.lr, lr_scheduler_type="linear", warmup_steps=0.06, weight_decay=0.0, eval_strategy="epoch",
        save_strategy="no", report_to="none", disable_tqdm=True, seed=args.seed, bf16=args.device == "cuda",
        use_cpu=args.device == "cpu")  # fmt: skip
    trainer = transformers.Trainer(
        model, settings, transformers.DataCollatorWithPadding(tokenizer), rows("train", args.rows), dev := rows("dev")
    )
    trainer.train()
    answers = np.argmax(trainer.predict(dev).predictions, -1).tolist()
    model.save_pretrained(args.out)
    print(json.dumps(metrics.score(task, data.load(task, args.data, "dev"), answers)))


def ours(args, method):
    """The command of train.py."""
    command = ["train.py", "--method", method, "--task", "mrpc", "--data", args.data, "--backbone", args.backbone, "--rank", "8",
               "--epochs", args.epochs, "--lr", args.lr, "--head-lr", args.lr, "--seed", args.seed, "--out", args.out,
               "--device", args.device, "--threads", args.threads, "--targets", *targets(args.backbone), "--weight-decay", 0,
               "--no-figures"]  # fmt: skip
    return [sys.executable, *map(str, command), *(["--rows", str(args.rows)] if args.rows else [])]


def targets(backbone):
    """Names of the encoder's layers alone: BERT's pooler ends in "dense" too."""
    with open(os.path.join(backbone, "config.json")) as f:
        depth = json.load(f)["num_hidden_layers"]
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    return [f"layer.{i}.{part}" for i in range(depth) for part in [*parts, "intermediate.dense", "output.dense"]]


def timed(command, read):
    """(wall seconds, CPU seconds, score) of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{result.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu, read(result.stdout)


def table(rows):
    yard = [row for row in rows if row["who"] == "Trainer + PEFT LoRA"]
    lines = ["| | seconds | CPU seconds | CPU seconds / Trainer + PEFT | accuracy | F1 |", "|---|--:|--:|--:|--:|--:|"]
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = [row for row in rows if row["who"] == who]
        ratio = statistics.median(a["cpu"] / b["cpu"] for a, b in zip(mine, yard))
        middle = {key: statistics.median(row[key] for row in mine) for key in ("seconds", "cpu", "accuracy", "f1")}
        lines.append(f"| {who} | {middle['seconds']:.1f} | {middle['cpu']:.1f} | {ratio:.2f} "
                     f"| {middle['accuracy']:.3f} | {middle['f1']:.3f} |")  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", required=True, help="MRPC's folder")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--methods", nargs="+", default=["lora", "tlora", "tlora_plus", "task_tlora"])
    parser.add_argument("--write", action="store_true", help="write bench/end_to_end-DEVICE.md and .jsonl")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        return theirs(args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows = []
    for turn in range(args.turns):
        args.seed = turn
        for who in ["Trainer + PEFT LoRA", *args.methods]:
            with tempfile.TemporaryDirectory() as folder:
                args.out = os.path.join(folder, "run")
                if who in args.methods:
                    command, read = ours(args, who), lambda _: last(args.out)
                else:
                    asked = ["--epochs", args.epochs, "--lr", args.lr, "--seed", turn, "--out", args.out, "--device", args.device]
                    asked += ["--backbone", args.backbone, "--data", args.data, *(["--rows", args.rows] if args.rows else [])]
                    command = [sys.executable, "bench/end_to_end.py", "--theirs", *map(str, asked)]
                    read = lambda text: json.loads(text.splitlines()[-1])  # noqa: E731
                seconds, cpu, score = timed(command, read)
            rows.append({"who": who, "turn": turn, "seconds": seconds, "cpu": cpu, **{k: score[k] for k in ("accuracy", "f1")}})
            print(rows[-1], flush=True)
    report(args, rows)


def last(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return json.loads(f.readlines()[-1])


def report(args, rows):
    import speed
    import torch

    torch.set_num_threads(args.threads)
    shown = shlex.join(["python", *sys.argv]).replace(args.backbone, "BACKBONE").replace(args.data, "MRPC")
    with open(os.path.join(args.backbone, "config.json")) as f:
        config = json.load(f)
    model = f"{config['model_type']} of {config['num_hidden_layers']} layers, {config['hidden_size']} wide"
    machine = f"{speed.hardware(args.device)}, torch {torch.__version__}, medians of {args.turns} turns"
    text = f"`{shown}`: {model}; {machine}.\n\n{table(rows)}\n"
    print(text)
    if args.write:
        where = os.path.join(ROOT, "bench", f"end_to_end-{args.device}")
        with open(where + ".md", "w") as f:
            f.write(text)
        with open(where + ".jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
