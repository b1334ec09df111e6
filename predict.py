"""Predictions of a finished run on a file, from the run folder alone.

    python predict.py out/sst2-triadapt-0 dev.tsv                     # a TSV with probabilities on the screen
    python predict.py out/sst2-triadapt-0 test.tsv --submission SST-2.tsv
    echo "what a lovely film" | python predict.py out/sst2-triadapt-0 - --format jsonl
    python predict.py out/sft-lora-0 prompts.jsonl --temperature 0.7 --top-p 0.9 --max-new 200

A file is read as the run's training data was: GLUE's, SQuAD's or GSM8K's layout, or your own columns. With - every
line of standard input is a text, a blank line an empty one, the two texts of a pair with a tab between them. The rows come
in the file's order, with its column index, idx or id as their id. If the file has labels, the metrics go to standard error.
A run that writes text (math, sft) shows it as it comes where standard output is a terminal.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

import data
from harness import folder, generation, metrics
from harness.run import Run, positions
from harness.settings import CLOSED, Parser, count, drop_output, in_words, number
from reading import files


def read(task: data.Task, source: str) -> list[data.Example]:
    """Examples of `source`, labels where it has them."""
    if source != "-":
        return data.load(task, source, "test")
    name = task.columns[0][0] if task.template not in ("", "chat") else ""  # that the template of prompts frames
    if name:
        try:
            task.template.format_map({name: ""})
        except (LookupError, TypeError, ValueError, AttributeError):
            words = f"the run's template takes more than column {name!r}, standard input has one text a line: give a file"
            raise ValueError(words) from None
    content = files.decode("<stdin>", sys.stdin.buffer.read())
    if not content:
        raise files.bad("<stdin>", 1, "there is no line")
    examples = []
    for i, text in enumerate(content.removesuffix("\n").split("\n"), 1):
        text = text.removesuffix("\r")
        parts = tuple(text.split("\t"))
        if len(parts) != 1 + task.pair:
            wanted = "two texts with a tab between them" if task.pair else "one text without a tab"
            raise files.bad("<stdin>", i, f"{len(parts)} texts, expected {wanted}")
        if task.name == "sft":
            parts = (("user", task.template.format_map({name: text}) if name else text),)
        examples.append(data.Example(str(i - 1), parts))
    return examples


def texts_of(example: data.Example) -> dict[str, str]:
    """{"text": ..}, of a pair {"text1": .., "text2": ..}; of a chat, line by line, the words of its turns."""
    parts = example.text if isinstance(example.text[0], str) else ["\n".join(words for _, words in example.text)]
    return {"text" + str(i) * (len(parts) > 1): part for i, part in enumerate(parts, 1)}


def rows_of(task: data.Task, examples: Sequence[data.Example], found: dict, text: bool = False) -> Iterator[dict]:
    """One dict per example: id, its text if asked, prediction in words, and a probability for each class or for the span."""
    for example, answer, p in zip(examples, found["answers"], found["probabilities"]):
        row = {"id": example.id} | (texts_of(example) if text else {})
        row["prediction"] = task.labels[answer] if task.labels else answer
        if task.labels:
            row.update({f"p({label})": round(x, 6) for label, x in zip(task.labels, p)})
        elif p is not None:
            row["probability"] = round(p, 6)
        yield row


def write_texts(run: Run, features: Sequence[dict], args: argparse.Namespace, watched: bool) -> dict:
    """The texts that a language model writes behind each prompt, one after the other, shown as they come if `watched`."""
    pick, texts = generation.sampler(args.temperature, args.top_p, args.seed), []
    for row in tqdm(features, "writing", leave=False, disable=watched or None):
        prompt = row["input_ids"][: row["prompt"]]
        with run.autocast():
            ids = generation.tokens(run.model, prompt, run.max_new, run.stop_id, pick)
            parts = []
            for part in generation.text_as_it_comes(run.tokenizer, ids):
                parts.append(part)
                if watched:
                    print(part, end="", flush=True)
        if watched:
            print()
        texts.append("".join(parts))
    return {"answers": texts, "probabilities": [None] * len(texts)}


def show(task: data.Task, examples: Sequence[data.Example], found: dict, args: argparse.Namespace) -> None:
    """The rows on standard output."""
    writer = None
    for row in rows_of(task, examples, found, args.text):
        if args.format == "jsonl":
            print(json.dumps(row, ensure_ascii=False))
            continue
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), delimiter="\t", lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)


def remark(run: Run, examples: Sequence[data.Example], features: Sequence[dict]) -> None:
    """Empty texts and texts that were cut, counted, on standard error."""
    empty, cut = data.empty(examples), sum(row["cut"] for row in features)
    if empty:
        print(f"predict.py: {empty:,} of {len(examples):,} rows have an empty text", file=sys.stderr)
    if cut:
        print(f"predict.py: {cut:,} of {len(examples):,} texts do not fit in the run's {run.settings.max_length} tokens: "
              "cut", file=sys.stderr)  # fmt: skip


def predict(args: argparse.Namespace) -> None:
    run = Run.open(args.run, args.device, args.force)
    if run.settings.threads:
        torch.set_num_threads(run.settings.threads)
    task = run.task
    if os.path.exists(folder.state_path(args.run)) and not folder.read_config(args.run)["finished"]:
        print("predict.py: the run has not finished: this is its last saved state", file=sys.stderr)
    if args.submission and not task.header:
        raise ValueError(f"GLUE takes no submission for task {task.name}")
    writes = task.kind == "lm" and task.metrics != ("choice",)
    if task.pretraining:
        raise ValueError(f"task {task.name} is text to train on: there is nothing to predict")
    if task.metrics == ("choice",) and args.file == "-":
        raise ValueError("the run chooses among a row's options, which a line of standard input has not: give a file")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p:g} is not above 0 and at most 1")
    if not args.temperature and (args.top_p != 1 or args.seed):
        raise ValueError("--top-p and --seed are of draws, which --temperature 0 makes none of")
    if not writes and (args.max_new or args.temperature or args.top_p != 1 or args.seed):
        raise ValueError("--max-new, --temperature, --top-p and --seed go with a run that writes text")
    if args.submission and (args.text or args.id or args.format):
        raise ValueError("--text, --id and --format do not go with --submission, which has GLUE's two columns")
    if args.id and (args.file == "-" or not task.columns or task.name == "sft"):
        raise ValueError("--id names a column of a table, of which this run reads none")
    run.max_new = args.max_new or run.max_new
    examples = read(replace(task, id=args.id or ""), args.file)
    features = run.features(examples)
    remark(run, examples, features)
    if writes and max(row["prompt"] for row in features) + run.max_new - 1 > (most := positions(run.model)):
        raise ValueError(f"--max-new {run.max_new} is too much: the model has {most} positions for prompt and answer")
    watched = writes and sys.stdout.isatty() and args.format != "jsonl" and not args.text
    live = watched or args.temperature > 0
    found = write_texts(run, features, args, watched) if live else run.predict(examples, features)
    if args.submission:
        files.write_submission(task, found["answers"], args.submission)
    elif not watched:  # else shown already
        show(task, examples, found, args)
    if all(example.label is not None for example in examples) and task.metrics != ("loss",):
        scores = metrics.score(task, examples, found["answers"])
        print(", ".join(f"{name} {value:.6f}" for name, value in scores.items()), file=sys.stderr)
    sys.stdout.flush()  # a closed pipe is noticed here


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("file", help="a file, or - for standard input")
    parser.add_argument("--format", choices=("tsv", "jsonl"), help="default tsv, with the quoting of a .csv")
    parser.add_argument("--text", action="store_true", help="show the text beside its prediction")
    parser.add_argument("--id", metavar="COLUMN", help="the file's column of ids (default: index, idx, id, else row numbers)")
    parser.add_argument("--submission", metavar="FILE", help="write GLUE's submission file instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--max-new", type=count, help="text: tokens at most (default: as in training)")
    parser.add_argument("--temperature", type=number, default=0.0, help="text: 0 takes the likeliest token (default), 1 draws")
    parser.add_argument("--top-p", type=number, default=1.0, help="text: draw among the likeliest that sum to this (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="text: of the draws (default 0)")
    parser.add_argument("--force", action="store_true", help="take another base than the run was trained on")
    args = parser.parse_args(argv)
    if "stdout" in CLOSED and not args.submission:
        parser.error("standard output is closed")
    if hasattr(sys.stdout, "reconfigure"):  # whatever the console's code page
        sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)
    try:
        predict(args)
    except BrokenPipeError:  # | head: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as e:
        print(f"predict.py: error: {in_words(e)}", file=sys.stderr)
        drop_output(e)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
