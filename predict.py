"""Predictions of a finished run on a file, from the run folder alone.

    python predict.py out/sst2-triadapt-0 dev.tsv                     # a TSV with probabilities on the screen
    python predict.py out/sst2-triadapt-0 test.tsv --submission SST-2.tsv
    echo "what a lovely film" | python predict.py out/sst2-triadapt-0 - --format jsonl

A file is read as the run's training data was: GLUE's, SQuAD's or GSM8K's layout, or your own columns. With - every
line of standard input is a text, the two texts of a pair with a tab between them. If the file has labels, the
metrics go to standard error.
"""

import argparse
import csv
import json
import os
import sys

import torch

import data
from harness import metrics
from harness.run import Run
from harness.settings import Parser, in_words
from reading import files


def read(task, source):
    """Examples of `source`, labels where it has them."""
    if source != "-":
        return data.load(task, source, "test")
    examples = []
    for i, text in enumerate(files.split_lines("<stdin>", files.decode("<stdin>", sys.stdin.buffer.read())), 1):
        parts = tuple(text.split("\t"))
        if len(parts) != 1 + task.pair:
            wanted = "two texts with a tab between them" if task.pair else "one text without a tab"
            raise files.bad("<stdin>", i, f"{len(parts)} texts, expected {wanted}")
        examples.append(data.Example(str(i - 1), parts))
    return examples


def rows_of(task, examples, answers, probabilities):
    """One dict per example: id, prediction in words, and a probability for each class or for the span."""
    for example, answer, p in zip(examples, answers, probabilities):
        row = {"id": example.id, "prediction": task.labels[answer] if task.labels else answer}
        if task.labels:
            row.update({f"p({label})": round(x, 6) for label, x in zip(task.labels, p)})
        elif p is not None:
            row["probability"] = round(p, 6)
        yield row


def main(argv=None):
    parser = Parser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("file", help="a file, or - for standard input")
    parser.add_argument("--format", choices=("tsv", "jsonl"), default="tsv")
    parser.add_argument("--submission", metavar="FILE", help="write GLUE's submission file instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--force", action="store_true", help="take another base than the run was trained on")
    args = parser.parse_args(argv)
    try:
        run = Run.open(args.run, args.device, args.force)
        if run.settings.threads:
            torch.set_num_threads(run.settings.threads)
        task = run.task
        if args.submission and not task.header:
            raise ValueError(f"GLUE takes no submission for task {task.name}")
        examples = read(task, args.file)
        found = run.predict(examples)
        if args.submission:
            files.write_submission(task, found["answers"], args.submission)
        elif args.format == "jsonl":
            for row in rows_of(task, examples, found["answers"], found["probabilities"]):
                print(json.dumps(row, ensure_ascii=False))
        else:
            writer = None
            for row in rows_of(task, examples, found["answers"], found["probabilities"]):
                if writer is None:
                    writer = csv.DictWriter(sys.stdout, list(row), delimiter="\t", lineterminator="\n")
                    writer.writeheader()
                writer.writerow(row)
        if all(example.label is not None for example in examples):
            scores = metrics.score(task, examples, found["answers"])
            print(", ".join(f"{name} {value:.6f}" for name, value in scores.items()), file=sys.stderr)
        sys.stdout.flush()  # a closed pipe is noticed here
    except BrokenPipeError:  # | head: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as e:
        print(f"predict.py: error: {in_words(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
