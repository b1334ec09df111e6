"""Take a run elsewhere, as a LoRA adapter in PEFT's format or an ordinary Hugging Face checkpoint, and back.

    python export.py out/mrpc-triadapt-0 --peft DIR       # PeftModel.from_pretrained(base, DIR)
    python export.py out/four --peft DIR --with-base      # AutoPeftModel...from_pretrained(DIR), for any number of classes
    python export.py out/mrpc-triadapt-0 --merged DIR     # AutoModel...from_pretrained(DIR)
    python export.py out/new --from-peft DIR              # a plain LoRA of PEFT's as a run, for predict.py

The first two need a run that was trained with --backbone. Both folders get a README.md with the lines that load them. An
adapter that was not exported from here says nothing of its task: --task names one, --labels the classes of your own.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import data
from harness import folder
from harness.exports import export_merged, export_peft, from_peft
from harness.run import Run
from harness.settings import Parser, Settings, count, in_words


def own_task(labels: Sequence[str], text: Sequence[str]) -> data.Task:
    """The task of classes in your own words; predict.py reads the columns `text` and, if there is one, `label`."""
    if len(set(labels)) < max(2, len(labels)) or len(text) > 2:
        raise ValueError("--labels are two different ones or more, --text one column or two")
    columns = tuple((name,) for name in (*text, "label"))
    return data.Task("custom", "classification", tuple(labels), ("accuracy", "macro_f1"), len(text) == 2, columns=columns)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder (with --from-peft a new one)")
    parser.add_argument("--peft", metavar="DIR", help="write a PEFT LoRA adapter there")
    parser.add_argument("--with-base", action="store_true", help="with --peft: its base too, in DIR/base, with these classes")
    parser.add_argument("--merged", metavar="DIR", help="write a Hugging Face checkpoint there")
    parser.add_argument("--force", action="store_true", help="take another base than the run was trained on")
    back = parser.add_argument_group("reading an adapter")
    back.add_argument("--from-peft", metavar="DIR", help="read the PEFT LoRA adapter there")
    back.add_argument("--backbone", metavar="NAME", help="its base (default: the one that the adapter names)")
    back.add_argument("--task", choices=data.TASKS, metavar="TASK", help="its task (default: what an export from here says)")
    back.add_argument("--labels", nargs="+", metavar="NAME", help="its classes, in their order, for a task of your own")
    back.add_argument("--text", nargs="+", metavar="COLUMN", help="with --labels: its columns (default text)")
    back.add_argument("--max-length", type=count, help="with --task or --labels: tokens (default 128)")
    args = parser.parse_args(argv)
    named = {"--backbone": args.backbone, "--task": args.task, "--labels": args.labels, "--text": args.text,
             "--max-length": args.max_length}  # fmt: skip
    if not args.from_peft and (lost := [flag for flag, value in named.items() if value]):
        parser.error(f"{lost[0]} goes with --from-peft")
    if args.text and not args.labels:
        parser.error("--text goes with --labels")
    if args.with_base and not args.peft:
        parser.error("--with-base is for --peft DIR")
    if args.task and args.labels:
        parser.error("--task and --labels are two answers to one question: give one")
    if args.peft and args.merged and os.path.realpath(args.peft) == os.path.realpath(args.merged):
        parser.error("--peft and --merged are the same place")
    if not args.peft and not args.merged and not args.from_peft:
        parser.error("give --peft DIR or --merged DIR, or --from-peft DIR")
    try:
        if args.from_peft:
            task = own_task(args.labels, args.text or ["text"]) if args.labels else data.TASKS.get(args.task)  # type: ignore[union-attr]
            base = os.path.abspath(args.backbone) if args.backbone and os.path.exists(args.backbone) else args.backbone
            named = {"task": args.task, "out": args.run, "backbone": base, "max_length": args.max_length or 128}
            from_peft(args.from_peft, Settings(method="lora", precision="float32", **named), task, args.force)
        if not args.peft and not args.merged:
            return 0
        config = folder.read_config(args.run)
        if not config["settings"].backbone:
            raise ValueError(f"{args.run} has no --backbone: the tiny base is no Hugging Face model")
        run = Run.open(args.run, force=args.force)
        run.command, run.settings.out = config["command"], args.run
        if args.peft:
            export_peft(run, args.peft, args.with_base)
        if args.merged:
            export_merged(run, args.merged)
    except (ValueError, OSError) as e:
        print(f"export.py: error: {in_words(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
