"""The same faults for a run of train.py and for one of Hugging Face's Trainer with PEFT's LoRA.

    python bench/faults.py            # seven minutes on one core
    python bench/faults.py --write    # also writes bench/faults.md

Both train LoRA of rank 2 with dropout on a transformer of two small blocks for 12 steps and save every 3, or every step where
that is said, each run in a process of its own. What is counted is what one sees: the exit code, the lines on standard error,
what the command to go on does, and whether the adapter in the end is that of an undisturbed run, to the bit. Trainer goes on
with resume_from_checkpoint=True, and from nothing where it finds no checkpoint. Needs requirements-optional.txt.
"""

import argparse
import collections
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import peft  # noqa: E402
import speed  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  the first optimizer imports it: here once, not in every child
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import train  # noqa: E402
from harness import folder, sealed  # noqa: E402
from harness.run import Run  # noqa: E402
from model import Config, Transformer  # noqa: E402

ROWS = [
    (f"a {'river stone cloud tree house'.split()[i % 5]} is {'warm' if i % 2 else 'cold'}", i % 2) for i in range(53)
]  # 48 to train on


class Ours:
    """`at` is an empty folder; a run in it is named."""

    def __init__(self, at):
        self.at = at
        for i in range(2):
            torch.manual_seed(i)
            sealed.save_base(Transformer(Config(2048, 16, 2, 2, 24)), f"{at}/base{i}")
        self.put(0)

    def put(self, base):
        shutil.copy(f"{self.at}/base{base}", f"{self.at}/base")

    def train(self, name, resume=False, other=False, each=None, save=3, seed=0):
        with open(f"{self.at}/rows.csv", "w") as f:
            f.write("text,label\n" + "".join(f"{text},{label ^ (other and i == 5)}\n" for i, (text, label) in enumerate(ROWS)))
        rate = train.rate  # the first thing that a step asks for
        train.rate = lambda step, *more: (each and each(step), rate(step, *more))[1]
        flags = "--text text --label label --method lora --rank 2 --dropout 0.1 --lr 0.01 --batch-size 8 --epochs 2 --threads 1"
        flags += f" --device cpu --no-figures --base {self.at}/base --data {self.at}/rows.csv --out {self.at}/{name}"
        flags += f" --save-every {save} --seed {seed}"
        return train.main([*flags.split(), *["--resume"] * (resume and os.path.exists(folder.state_path(f"{self.at}/{name}")))])

    def saved(self, name):
        """(files to go on from, the step they belong to)"""
        path = folder.state_path(f"{self.at}/{name}")
        return [path], folder.load_state(f"{self.at}/{name}")[2]["step"]

    def adapter(self, name):
        return f"{self.at}/{name}/adapter.safetensors"

    def load(self, name, base=0):
        self.put(base)
        try:
            run = Run.open(f"{self.at}/{name}")
        finally:
            self.put(0)
        return {key: t.clone() for key, t in folder.adapter_state(run.model, run.keep).items()}


class Theirs:
    def __init__(self, at):
        self.at = at
        transformers.logging.set_verbosity_error()

    def model(self, base):
        torch.manual_seed(base)
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 40,
        }
        return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=300, **sizes))

    def train(self, name, resume=False, other=False, each=None, save=3, seed=0):
        class Each(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **more):
                each(state.global_step)

        rows = [
            {"input_ids": list(text.ljust(24).encode()), "labels": label ^ (other and i == 5)}
            for i, (text, label) in enumerate(ROWS[:48])
        ]
        model = self.model(0)
        transformers.set_seed(seed)
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=["query", "value"])
        )
        args = transformers.TrainingArguments(
            f"{self.at}/{name}", max_steps=12, save_steps=save, per_device_train_batch_size=8, learning_rate=0.01, seed=seed,
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[Each()] if each else [])
        there = os.path.isdir(args.output_dir) and transformers.trainer_utils.get_last_checkpoint(args.output_dir)
        trainer.train(resume_from_checkpoint=bool(resume and there))
        trainer.save_model(f"{self.at}/{name}/final")
        return 0

    def saved(self, name):
        place = transformers.trainer_utils.get_last_checkpoint(f"{self.at}/{name}")
        return [f"{place}/adapter_model.safetensors", f"{place}/optimizer.pt"], int(place.rpartition("-")[2])

    def adapter(self, name):
        return f"{self.at}/{name}/final/adapter_model.safetensors"

    def load(self, name, base=0):
        model = peft.PeftModel.from_pretrained(self.model(base), f"{self.at}/{name}/final")
        return {key: t.clone() for key, t in peft.get_peft_model_state_dict(model).items()}


# ----------------------------------------------------------------------------------- processes


def begin(act, side, name):
    """A process that does act(name); what it says on standard error is kept."""
    if not (child := os.fork()):
        said = os.open(f"{side.at}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        try:
            code = act(name)
        except BaseException:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2
            )  # `full_disk` is for the run, not for its last words
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    return child


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def go(side, name, **more):
    """The exit code of a run in a process of its own."""
    return end(begin(lambda name: side.train(name, **more), side, name))


def lines(side, name):
    """How many lines it left on standard error, warnings about later versions aside."""
    with open(f"{side.at}/{name}.log") as f:
        found = [line for line in f if line.strip() and "FutureWarning" not in line and "warnings.warn" not in line]
    return f"{len(found)} line{'s' * (len(found) != 1)} on standard error"


def same(side, name):
    a, b = ({key: t.clone() for key, t in load_file(side.adapter(one)).items()} for one in (name, "whole"))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ended(side, name, save=3):
    """What a run that was gone on with came to."""
    code = go(side, name, resume=True, save=save)
    return "refused" if code else "equal to the bit" if same(side, name) else "other numbers"


def at(step, act):
    """A function of the steps done that acts once, when there are so many."""
    left = [act]
    return lambda done: left.pop()() if left and done == step else None


def told(counts):
    return ", ".join(f"{n} {words}" for words, n in sorted(counts.items(), key=lambda pair: -pair[1]))


# ----------------------------------------------------------------------------------- the faults, each told in words


def stopped(side, _):
    go(side, "stopped", each=at(8, lambda: os._exit(9)))
    return ended(side, "stopped")


def killed(side, rng):
    begun, counts = time.monotonic(), collections.Counter()
    go(side, "timed", save=1)
    seconds = time.monotonic() - begun
    for i in range(60):
        child = begin(lambda name: side.train(name, save=1), side, f"killed{i}")
        time.sleep(rng.uniform(0.2, 1) * seconds)
        os.kill(child, signal.SIGKILL)
        end(child)
        counts[ended(side, f"killed{i}", save=1)] += 1
    return told(counts)


def terminated(side, _):
    code = go(side, "terminated", each=at(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    words = f"code {code}, {lines(side, 'terminated')}, step {side.saved('terminated')[1]} is saved"
    return f"{words}; then {ended(side, 'terminated')}"


def flipped(path, rng):
    with open(path, "rb") as f:
        good = f.read()
    bad = bytearray(good)
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    with open(path, "wb") as f:
        f.write(bad)
    return good


def adapter_flips(side, rng):
    expected, counts, path = side.load("whole"), collections.Counter(), side.adapter("whole")
    for _ in range(200):
        good = flipped(path, rng)
        try:
            found = side.load("whole")
            fits = found.keys() == expected.keys() and all(torch.equal(found[key], t) for key, t in expected.items())
            counts["without effect" if fits else "loaded as other numbers"] += 1
        except Exception:
            counts["refused"] += 1
        with open(path, "wb") as f:
            f.write(good)
    return told(counts)


def state_flips(side, rng):
    counts = collections.Counter()
    go(side, "torn", each=at(8, lambda: os._exit(9)))
    for i in range(60):
        shutil.copytree(f"{side.at}/torn", f"{side.at}/torn{i}")
        flipped(rng.choice(side.saved(f"torn{i}")[0]), rng)
        counts[ended(side, f"torn{i}")] += 1
    return told(counts)


def other_rows(side, _):
    go(side, "rows", each=at(8, lambda: os._exit(9)))
    code = go(side, "rows", resume=True, other=True)
    return f"refused, {lines(side, 'rows')}" if code else "goes on without a word"


def other_base(side, _):
    try:
        side.load("whole", base=1)
        return "loaded without a word"
    except Exception as e:
        return f"refused, {str(e).strip().count(chr(10)) + 1} line"


def two_runs(side, _):
    def second():
        with open(f"{side.at}/second", "w") as f:
            f.write(str(go(side, "two", seed=1)))

    code = go(side, "two", each=at(6, second))
    with open(f"{side.at}/second") as f:
        words = "the second trains there too" if f.read() == "0" else "the second is refused"
    return f"{words}; the first ends with code {code}, {'equal to the bit' if same(side, 'two') else 'other numbers'}"


def full_disk(side, _):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))  # noqa: E731
    code = go(side, "full", each=at(5, limit))
    return f"code {code}, {lines(side, 'full')}; then {ended(side, 'full')}"


FAULTS = {  # words: (how often, function)
    "stopped at once behind step 8, gone on with": (1, stopped),
    "SIGKILL at a random moment of a run that saves every step, gone on with": (60, killed),
    "SIGTERM behind step 8": (1, terminated),
    "one flipped bit in the adapter, loaded": (200, adapter_flips),
    "one flipped bit in what was saved at step 6, gone on with": (60, state_flips),
    "a label of the training rows changed between stop and going on": (1, other_rows),
    "the adapter loaded onto another base of the same shape": (1, other_base),
    "a second run in the folder of one that trains": (1, two_runs),
    "a disk that is full from step 5 on (no file longer than 2,000 bytes), gone on with when it is not": (1, full_disk),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/faults.md too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, begun = {words: [] for words in FAULTS}, time.monotonic()
    for kind in (Ours, Theirs):
        with tempfile.TemporaryDirectory() as place:
            side = kind(place)
            assert go(side, "whole") == 0, open(f"{place}/whole.log").read()
            for words, (_, act) in FAULTS.items():
                found[words].append(act(side, random.Random(0)))
                print(kind.__name__, words, found[words][-1], sep=": ", flush=True)
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    head = f"`python {shlex.join(sys.argv)}`: {speed.hardware('cpu')}, {versions}, {time.monotonic() - begun:.0f} s.\n"
    rows = [f"| {words} | {FAULTS[words][0]} | {ours} | {theirs} |" for words, (ours, theirs) in found.items()]
    text = "\n".join([head, "| fault | how often | train.py | Trainer with PEFT |", "|---|--:|---|---|", *rows]) + "\n"
    print(text)
    if args.write:
        with open(os.path.join(ROOT, "bench", "faults.md"), "w", encoding="utf-8") as f:
            f.write(text)


if __name__ == "__main__":
    main()
