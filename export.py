"""Take a run elsewhere: a LoRA adapter in PEFT's format, or an ordinary Hugging Face checkpoint.

    python export.py out/mrpc-triadapt-0 --peft DIR       # PeftModel.from_pretrained(base, DIR)
    python export.py out/mrpc-triadapt-0 --merged DIR     # AutoModel...from_pretrained(DIR)

The run must have been trained with --backbone.
"""

import argparse
import sys

from harness import folder
from harness.exports import export_merged, export_peft
from harness.run import Run
from harness.settings import Parser, in_words


def main(argv=None):
    parser = Parser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--peft", metavar="DIR", help="write a PEFT LoRA adapter there")
    parser.add_argument("--merged", metavar="DIR", help="write a Hugging Face checkpoint there")
    parser.add_argument("--force", action="store_true", help="take another base than the run was trained on")
    args = parser.parse_args(argv)
    if not args.peft and not args.merged:
        parser.error("give --peft DIR or --merged DIR")
    try:
        if not folder.read_config(args.run)["settings"].backbone:
            raise ValueError(f"{args.run} has no --backbone: the tiny base is no Hugging Face model")
        run = Run.open(args.run, force=args.force)
        if args.peft:
            export_peft(run, args.peft)
        if args.merged:
            export_merged(run, args.merged)
    except (ValueError, OSError) as e:
        print(f"export.py: error: {in_words(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
