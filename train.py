"""Fine-tune a transformer with any of the methods: one loop, one command line.

    python train.py                                        # triadapt on cola, the tiny base of assets/
    python train.py --method lora --task sst2 --rank 4
    python train.py --task cola --data path/to/CoLA        # real files in GLUE's layout
    python train.py @recipes/triadapt-deberta-rte.txt --data path/to/RTE       # a run of the papers, flags from a file
    python train.py --method full --task mlm --scratch --save-base base.safetensors

A method is a module with the verbs inject, param_groups, merge and, where it has them, calibrate (looks at data before
training) with describe (what it found, for a JSON file), penalty (a term of the loss), before_step and after_step (act
while training) and watch (numbers per layer worth seeing). This loop calls the verbs and knows nothing else of a method;
the flags of a method are the keyword arguments of its inject and calibrate, with their defaults and their docstrings' words.
"""

import contextlib
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from tqdm import tqdm

import data
import model as modelling
from harness import backbones, exports, figures, folder, parallel, report, sealed
from harness.run import Run, choose_device, to_device
from harness.settings import default_rate, drop_output, in_words, parse
from harness.stop import Stop, Stopped
from tlora import cosine_similarity

# The only numbers that differ between two runs of one command.
TIMES = ("seconds", "tokens_per_s")


# ------------------------------------------------------------------------- the loop


def train(run: Run, optimizer: torch.optim.Optimizer, progress: folder.Progress, stop: Stop) -> None:
    """Batch, gradient, step, growth, evaluation, until the steps are done. FloatingPointError at a NaN or an infinity."""
    s, method = run.settings, run.method
    saver = folder.Saver(run, progress, optimizer)
    tokens, clock = 0, time.perf_counter()
    evaluated(run, progress, saver, stop, None)  # a run that was stopped while it evaluated goes on there
    unread, looked = [], clock
    for batches, labelled, n, length, bar in steps(run, progress.step):
        with stop.after():  # no signal leaves half a step
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(progress.step, run.total_steps, run.warmup_steps, s.schedule)
            optimizer.zero_grad(set_to_none=True)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            with parallel.drawing(s.seed, progress.step):
                loss = backward(run, batches, labelled, n)
            parallel.add_up(params, loss)
            if hasattr(method, "penalty") and (penalty := method.penalty(run.model)).requires_grad:
                penalty.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, s.clip or math.inf)
            unread.append((progress.step + 1, torch.stack((loss, norm.to(loss)))))
            if run.device.type == "cpu" or time.perf_counter() > looked + 0.3:
                read(run, progress, unread, bar)
                looked = time.perf_counter()
            events = []
            if hasattr(method, "before_step"):
                events.append(method.before_step(run.model, progress.step + 1, run.total_steps))
            optimizer.step()
            progress.step += 1
            if hasattr(method, "after_step"):
                events.append(method.after_step(run.model, optimizer, progress.step, run.total_steps))
            progress.layers += [{"step": progress.step, "event": event} for event in events if event]
            if (save := saver.due() or stop.code) or due(run, progress.step):
                read(run, progress, unread, bar)  # what is no number is not kept
            if save:
                saver.save()
        tokens += length
        if evaluated(run, progress, saver, stop, tokens / (time.perf_counter() - clock)):
            tokens, clock = 0, time.perf_counter()


def read(run: Run, progress: folder.Progress, unread: list[tuple[int, torch.Tensor]], bar: tqdm) -> None:
    """Keep the losses of the steps since the last reading. FloatingPointError at a NaN or an infinity, which names the step.

    On a GPU reading waits for everything it was asked to do, so it is done at the progress bar's pace.
    """
    for step, (loss, norm) in [(step, numbers.tolist()) for step, numbers in unread]:
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} at step {step}")
        if not math.isfinite(norm):
            where = culprit(run.model) if step == unread[-1][0] else ""
            raise FloatingPointError(f"gradient of norm {norm} at step {step}{where}")
        progress.losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    unread.clear()


def due(run: Run, step: int) -> bool:
    """Whether an evaluation follows the step."""
    return step % (run.settings.eval_every or run.steps_per_epoch) == 0 or step == run.total_steps


def evaluated(run: Run, progress: folder.Progress, saver: folder.Saver, stop: Stop, speed: float | None) -> bool:
    """Evaluate if it is time to, keep the row and save; whether it was."""
    if not progress.losses or not due(run, progress.step):
        return False
    try:
        row = {"step": progress.step, "epoch": progress.step / run.steps_per_epoch,
               "train_loss": sum(progress.losses) / len(progress.losses), **run.evaluate()}  # fmt: skip
    except Stopped:
        saver.save()
        raise
    if not math.isfinite(row["dev_loss"]):
        raise FloatingPointError(f"development loss {row['dev_loss']} after step {progress.step}")
    row["trained"], watched = run.count()[0], run.watch()
    if "ranks" in watched:
        row["rank_total"] = sum(watched["ranks"].values())
    row |= {"tokens_per_s": round(speed or 0), "seconds": round(run.seconds(), 2)}
    with stop.after():
        progress.history.append(row)
        progress.layers.append({"step": progress.step, **watched})
        progress.losses.clear()
        tqdm.write(line(row), file=sys.stdout)
        saver.save()
    return True


def culprit(model: torch.nn.Module) -> str:
    """The first parameter whose gradient is not finite, in words."""
    names = (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
    return f", in {name}" if (name := next(names, None)) else ""


def steps(run: Run, done: int) -> Iterator[tuple[list[dict], Sequence[int], int, int, tqdm]]:
    """(batches of one optimizer step on the device, labels in each, labels and tokens of all processes, progress bar), in the
    seeded order of each epoch, after `done` steps. What stands in a batch is counted before a GPU has it: to ask it would
    be to wait for it."""
    s, per_epoch = run.settings, run.steps_per_epoch
    for epoch in range(done // per_epoch, math.ceil(run.total_steps / per_epoch)):
        first, last = max(done - epoch * per_epoch, 0), min(per_epoch, run.total_steps - epoch * per_epoch)
        batches = data.batches(run.train_features, run.task, s.batch_size, run.tokenizer.pad_id,
                               shuffle_seed=s.seed * 100_003 + epoch)  # fmt: skip
        groups = itertools.islice(grouped(batches, s.accumulate), first, last)
        bar = tqdm(groups, f"epoch {epoch + 1}", last, initial=first, leave=False, disable=None)
        for group in bar:
            tokens = sum(int(batch["attention_mask"].sum()) for batch in group)
            mine, labelled = zip(*(parallel.part(batch, run.labelled) for batch in group))
            yield [to_device(batch, run.device) for batch in mine], labelled, sum(map(run.labelled, group)), tokens, bar


def backward(run: Run, batches: Sequence[dict], labelled: Sequence[int], n: int) -> torch.Tensor:
    """Add the gradient of the mean loss over all n labels of a step; returns these batches' part of that loss, on the device."""
    total = 0.0
    for batch, labels in zip(batches, labelled):
        part = labels / n * run.forward(batch)
        part.backward()
        total = total + part.detach()
    return total  # type: ignore[return-value]


def grouped(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def rate(step: int, total: int, warmup: int, schedule: str) -> float:
    """The learning rate at optimizer step 0, 1, .. total - 1, as a share of its peak.

    Rises linearly over `warmup` steps, (step + 1) / warmup, then falls to 0 at `total`, or stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


# ------------------------------------------------------------------------- before and after it


def fine_tune(s, command: str, stop: Stop) -> dict:
    """Train as the settings ask and leave the run folder; returns the last evaluation."""
    theirs = exports.look_ahead(s)
    run = Run.start(s, command)
    print(f"base    {run.base}, {run.count()[1]:,} numbers")
    print(f"task    {run.task.name} from {s.data or 'the generated world'}: {len(run.train):,} training rows, "
          f"{len(run.dev):,} for development, {run.task.kind}"
          + (f" ({', '.join(run.task.labels)})" if run.task.labels else ""))  # fmt: skip
    remark(run)
    state = folder.state_to_resume(run)
    if state is None:
        run.adapt()
    else:
        run.wrap(state[2]["names"])
        run.load(state[0])
    run.check_comparable(theirs)
    run.model.to(run.device).train()
    for words, n in run.speed_up().items():
        print(f"fast    {n} layers: {words}")
    if s.gradient_checkpointing:
        backbones.set_checkpointing(run.model)
    optimizer = torch.optim.AdamW(groups_of(run), lr=s.lr, betas=tuple(s.betas), fused=True)
    parallel.wait()  # every process has looked into the folder before the first changes it
    with folder.lock(s.out) if parallel.first() else contextlib.nullcontext():
        progress = folder.Progress() if state is None else folder.restore(optimizer, *state[1:])
        introduce(run, progress)
        if state is None and parallel.first():
            folder.clear(s.out, run.config())
            if run.plan is not None:
                folder.write_json(os.path.join(s.out, "plan.json"), run.method.describe(run.plan))
        train(run, optimizer, progress, stop)
        if not parallel.first():
            return progress.history[-1]
        folder.finish(run, progress)
        show(run, progress, theirs)
        os.remove(folder.state_path(s.out))  # last: what fails until here can be resumed
    print(f"{run.seconds():.1f} s; {s.out}: {', '.join(sorted(os.listdir(s.out)))}")
    return progress.history[-1]


def groups_of(run: Run) -> list[dict]:
    """The method's parameter groups, with the task head's parameters in groups of their own, of --head-lr."""
    s, groups = run.settings, []
    heads = {p for name in modelling.head_modules(run.model) for p in run.model.get_submodule(name).parameters()}
    for group in run.method.param_groups(run.model, s.lr, s.weight_decay):
        for params, lr in (([p for p in group["params"] if p not in heads], group["lr"]),
                           ([p for p in group["params"] if p in heads], s.head_lr)):  # fmt: skip
            groups += [{**group, "params": params, "lr": lr, "peak": lr}] if params else []
    return groups


def remark(run: Run) -> None:
    """What one should know of the rows before waiting for a result."""
    s = run.settings
    if s.data and not (s.backbone or s.scratch):
        print("note    the tiny bases know their generated world only: on real text use --backbone")
    if s.data and len(run.dev) < 10:
        print(f"note    a development set of {len(run.dev)} says {'nothing' if len(run.dev) == 1 else 'little'}: "
              "give more rows, or --dev FILE")  # fmt: skip
    for name, rows in (("training", run.train), ("development", run.dev)):
        if n := data.empty(rows):
            print(f"empty   {n:,} of {len(rows):,} {name} rows have an empty text")
    if cut := sum(row["cut"] for row in run.train_features):
        print(f"cut     {cut:,} of {len(run.train):,} training texts do not fit in --max-length {s.max_length} tokens")


def introduce(run: Run, progress: folder.Progress) -> None:
    """What is trained, where and how long, with the reason of every choice."""
    s, (trained, everything) = run.settings, run.count()
    where = f"{len(run.layers)} layers" if run.layers else "no layer wrapped"
    heads = [] if s.freeze_head else modelling.head_modules(run.model)
    print(f"method  {s.method}, {where}, head {', '.join(heads) or 'not trained'}: "
          f"{trained:,} trained of {everything:,} ({100 * trained / everything:.2f} %)")  # fmt: skip
    print(f"device  {run.device} ({choose_device(s.device)[1]}), {s.precision}, {torch.get_num_threads()} threads"
          + (f" in each of {parallel.count()} processes" if parallel.count() > 1 else ""))  # fmt: skip
    default, source = default_rate(s)
    source = source if s.lr == default else "as asked"
    print(f"steps   {run.total_steps:,} of {s.accumulate} x {s.batch_size} rows, lr {s.lr:g} ({source}; head {s.head_lr:g}) "
          f"{s.schedule}, {run.warmup_steps} warm-up"
          + (f"; resumed after step {progress.step}" if progress.step else ""))  # fmt: skip


def line(row: dict) -> str:
    """An evaluation as one line on screen."""
    skip = {"step", "epoch", "trained", *TIMES}
    parts = [f"epoch {row['epoch']:5.2f}  step {row['step']:5d}"]
    for key, value in row.items():
        if key not in skip:
            parts.append(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4f}")
    return "  ".join(parts) + f"  {row['tokens_per_s']:,} tokens/s"


def show(run: Run, progress: folder.Progress, theirs: Mapping[str, tuple]) -> None:
    """Figures, exports and the result. `theirs`: the factors of the run that --compare names."""
    s, last = run.settings, progress.history[-1]
    other = (s.compare, compare(run, theirs)) if s.compare else None
    if not s.no_figures:
        figures.draw(run, progress, other)
        report.write(s.out)
    if s.save_base:
        if run.layers:
            run.method.merge(run.model)
        sealed.save_base(run.model, s.save_base)
        print(f"base written to {s.save_base}")
    if s.export_peft:
        exports.export_peft(run, s.export_peft)
    if s.export_merged:
        exports.export_merged(run, s.export_merged)
    names = [name for name in run.task.metrics if name in last] or ["dev_loss"]
    best = report.best_of(progress.history, names[0])
    print(", ".join(f"{name} {last[name]:.4f}" for name in names)
          + f" (best {names[0]} {best[names[0]]:.4f} at epoch {best['epoch']:.3g})"
          + (f", rank total {last['rank_total']}" if "rank_total" in last else ""))  # fmt: skip


def compare(run: Run, theirs: Mapping[str, tuple]) -> dict[str, torch.Tensor]:
    """Cosine similarity of each layer's dW with that of another run on the same layers, printed and kept.

    `theirs`: {layer: (P, Q)} of the other run. Returns {layer: its dW (m, n)}.
    """
    other, cosine, updates = run.settings.compare, {}, {}
    for name in run.layers:
        P, Q = theirs[name]
        updates[name] = P @ Q
        cosine[name] = cosine_similarity(run.model.get_submodule(name).factors(), (P, Q))
    width = max(map(len, cosine))
    print(f"cosine similarity of dW with {other}:")
    for name, value in cosine.items():
        print(f"  {name:{width}s} {value:+.4f}")
    folder.write_json(os.path.join(run.settings.out, "cosine.json"), {"with": other, "cosine": cosine})
    return updates


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    settings = parse(argv, description=__doc__.split("\n\n")[0])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # whatever the console lacks; into a pipe too
    with Stop() as stop:
        try:
            with stop.interruptible():
                parallel.start()
                fine_tune(settings, "python train.py " + shlex.join(argv), stop)
        except (FloatingPointError, parallel.Ended) as e:
            if parallel.first():
                advice = "" if isinstance(e, parallel.Ended) else f"; it would come again: try a --lr below {settings.lr:g}"
                print(f"train.py: {e}: stopped; {folder.kept(settings.out)}{advice}", file=sys.stderr)
            return 1
        except Stopped as e:
            print(f"train.py: stopped; {folder.kept(settings.out)}", file=sys.stderr)
            return e.code
        except BrokenPipeError:  # | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"train.py: standard output was closed: stopped; {folder.kept(settings.out)}", file=sys.stderr)
            return 1
        except (ValueError, OSError) as e:
            print(f"train.py: error: {in_words(e)}", file=sys.stderr)
            drop_output(e)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
