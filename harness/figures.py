"""The figures of a run: curves.png, growth step by step, a heat map per quantity a method watches, histograms, spectra.

`python -m harness.figures RUN` draws those of a finished run again, from its folder. Each title is a sentence that says what
was found, and what a symbol means stands below the figure. matplotlib is imported when something is drawn.
"""

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch

from fast import has_factors
from harness import folder
from harness.methods import METHODS
from harness.run import Run, factors_of
from harness.settings import on_a_run

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's colours, which all eyes tell apart
CYCLE = [BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":"]
# What a quantity means, its name before the comma; of one method, where the methods differ. Others are called by their key.
WORDS = {
    "ranks": "rank r, the number of directions in which the update dW of a layer can act",
    "scaling": "scaling s, the factor in front of the update dW = s B A",
    "alpha": "factor alpha, which is trained, of the update dW = alpha C B A",
    "A_spectral": "largest singular value of A, which is drawn at random and frozen",
    "B_spectral": "largest singular value of B, which is trained from zero",
    "C_spectral": "largest singular value of C, which is drawn at random and frozen",
    "B_norm": "Frobenius norm of B, which is trained from zero",
    ("triadapt", "importance"): "score S, the rise of ||L + U||_F / r since the event before (L, U: triangles; r: rank)",
    ("increlora", "importance"): "score, |dW x its gradient| of a layer's update dW, averaged over steps, times its uncertainty",
    ("adalora", "importance"): "score, |weight x gradient| of a layer's triplets, averaged over steps, times its uncertainty",
    ("task_tlora", "importance"): "share p, a layer's part in the loss's sensitivity to all before training: sets rank, scaling",
    ("lora_ga", "spectrum"): "singular values of the gradient of the loss with respect to W0",
    "spectrum": "eigenvalues of C, the second moment of a layer's input on the task's own rows",
}  # fmt: skip


def pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9, "figure.dpi": 130,
        "figure.constrained_layout.use": True, "axes.prop_cycle": plt.cycler(color=CYCLE),
    })  # fmt: skip
    return plt


def meaning(method: str, quantity: str) -> str:
    return WORDS.get((method, quantity)) or WORDS.get(quantity) or quantity.replace("_", " ")


def sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def place(name: str) -> tuple[str, str]:
    """(block, matrix) of a dotted layer name: ("blocks.0", "q_proj"). Without a number the block is ""."""
    match = re.match(r"^(.*?\d+)(?:\.(.*))?$", name)
    return (match[1], match[2] or "") if match else ("", name)


def short(names: Iterable[str], least: int = 1) -> dict[str, str]:
    """{name: its last dotted parts, `least` of them or as many as no other name ends in}."""
    parts = {name: name.split(".") for name in names}

    def tail(name):
        for n in range(least, len(parts[name])):
            if not any(other[-n:] == parts[name][-n:] for key, other in parts.items() if key != name):
                return ".".join(parts[name][-n:])
        return name

    return {name: tail(name) for name in parts}


def layer_words(names: Iterable[str]) -> dict[str, str]:
    """{layer: block and matrix in as few words as tell them apart}."""
    places = {name: place(name) for name in names}
    blocks, matrices = short([p[0] for p in places.values()], 2), short([p[1] for p in places.values()])
    return {name: f"{blocks[block]} {matrices[matrix]}".strip() for name, (block, matrix) in places.items()}


def save(fig, out: str, name: str, title: str, caption: str) -> str:
    """The figure with a sentence above it and the meanings below; the sentence goes into the PNG too."""
    inches = fig.get_figwidth()
    title = title.replace(" %", "\u00a0%")  # not at the start of a line
    fig.suptitle(textwrap.fill(title, int(11.2 * inches)), x=0.01, ha="left", fontsize=10, weight="bold")
    fig.supxlabel(textwrap.fill(caption, int(15.5 * inches)), x=0.01, ha="left", fontsize=7.5, color="0.3")
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")  # the layout is done; an engine would make savefig draw everything twice
    fig.savefig(os.path.join(out, name), metadata={"Title": title})
    pyplot().close(fig)
    return name


def draw(run: Run, progress: folder.Progress, compared: tuple[str, dict[str, torch.Tensor]] | None = None) -> list[str]:
    """All figures of a run, into its folder; their names. `compared` is (words, {layer: dW}) of another run, drawn along."""
    out, method, last = run.settings.out, run.settings.method, progress.history[-1]
    watched = [row for row in progress.layers if "event" not in row]
    events = [(row["step"], row["event"]) for row in progress.layers if "event" in row]
    ranks = rank_history(progress.layers, run.settings.options.get("rank"))
    drawn = [curves(out, progress.history, next((name for name in run.task.metrics if name in last), None), ranks)]
    for quantity in [key for key in watched[-1] if key != "step"]:
        if quantity == "ranks" and len(ranks) > 1:
            drawn.append(growth(out, ranks))
        elif quantity == "importance" and any("scores" in event for _, event in events):
            drawn.append(importance(out, [e for e in events if "scores" in e[1]], meaning(method, quantity)))
        else:
            rows = [(row["step"], row[quantity]) for row in watched]
            drawn.append(heat_map(out, quantity, rows, meaning(method, quantity)))
    layers = {name: run.model.get_submodule(name) for name in run.layers}
    if thin := {name: layer for name, layer in layers.items() if has_factors(layer)}:
        drawn.append(histograms(out, thin, METHODS[method][1]))
        drawn.append(eigenvalues(out, thin, compared))
    if os.path.exists(os.path.join(out, "plan.json")):
        drawn.append(spectrum(out, method))
    return [name for name in drawn if name]


def rank_history(rows: Sequence[dict], start: int | None) -> list[tuple[int, dict[str, int]]]:
    """[(step, {layer: rank})]: the start, then whenever a rank changed: at events, or, of a method without, at evaluations.

    Methods whose events name what "grown" start every layer with the rank `start`, as step 0.
    """
    names = next((row["ranks"] for row in rows if "ranks" in row), {})
    history = [(0, dict.fromkeys(names, start))] if any("grown" in row.get("event", {}) for row in rows) else []
    for row in rows:
        event, now = row.get("event", row), history[-1][1] if history else {}
        ranks = {**now, **event.get("ranks", {}), **event.get("grown", {})}
        if ranks and ranks != now:
            history.append((row["step"], ranks))
    return history


def curves(out: str, history: Sequence[dict], headline: str | None, ranks: Sequence[tuple[int, dict[str, int]]]) -> str:
    """Loss, the headline metric and, where it changes, the total rank, over the steps."""
    plt, totals = pyplot(), [sum(row.values()) for _, row in ranks]
    panels = 1 + bool(headline) + (len(set(totals)) > 1)
    fig, axes = plt.subplots(1, panels, figsize=(max(3.6 * panels, 5), 3.2), squeeze=False)
    axes, steps, last = list(axes[0]), [row["step"] for row in history], history[-1]
    ax = axes.pop(0)
    ax.plot(steps, [row["train_loss"] for row in history], "o--", ms=4, color=BLUE, label="training")
    ax.plot(steps, [row["dev_loss"] for row in history], "s-", ms=4, color=ORANGE, label="development")
    ax.set_title("loss")
    ax.legend(frameon=False)
    title = f"After {last['step']} steps the development loss is {last['dev_loss']:.3g}"
    if headline:
        ax, best = axes.pop(0), max(history, key=lambda row: row[headline])
        ax.plot(steps, [row[headline] for row in history], "s-", ms=4, color=ORANGE)
        ax.set_title(f"{headline} (development)")
        title += f" and {headline} is {last[headline]:.3g}"
        title += ", its best" if best[headline] == last[headline] else f" (best {best[headline]:.3g} at step {best['step']})"
    if axes:
        axes[0].step([step for step, _ in ranks] + [last["step"]], [*totals, totals[-1]], where="post", color=GREEN)
        axes[0].set(title="total rank", ylim=(0, None))
        title += f"; the total rank went from {totals[0]} to {totals[-1]}"
    for ax in fig.axes:
        ax.set_xlabel("optimizer step")
        ax.xaxis.set_major_locator(plt.MaxNLocator(5, integer=True))
        ax.grid(alpha=0.3)
    return save(fig, out, "curves.png", title, "Training loss: mean over the steps since the last evaluation.")


def scale(values: torch.Tensor) -> dict:
    """How numbers become colours: dark to light or, if some are negative, blue to red, white at 0, by the root of their size."""
    from matplotlib import colors

    low, high = values.min().item(), values.max().item()
    if low >= 0:
        return {"cmap": "cividis", "norm": colors.Normalize(low, high)}
    bound = max(-low, high)
    root = (lambda x: torch.as_tensor(x).sign().mul(torch.as_tensor(x).abs().sqrt()).numpy(), lambda x: x * abs(x))
    return {"cmap": "RdBu_r", "norm": colors.FuncNorm(root, -bound, bound)}


def paint(ax, table: torch.Tensor, how: dict, cell: Callable[[int, int], str] | None = None):
    """A (rows, columns) table as colours; cell(i, j) is written inside, where there is one."""
    image = ax.imshow(table.numpy(), aspect="auto", interpolation="nearest", **how)
    for i, j in (~table.isnan()).nonzero().tolist() if cell else ():
        light = sum(c * w for c, w in zip(image.cmap(image.norm(table[i, j].item())), (0.3, 0.59, 0.11)))
        ax.text(j, i, cell(i, j), ha="center", va="center", fontsize=6.5, color="white" if light < 0.5 else "black")
    return image


def bar(ax, image) -> None:
    """The colour bar: whole numbers for ranks, zero in the middle where some numbers are negative."""
    low, high = image.norm.vmin, image.norm.vmax
    ticks = [low, low / 4, 0, high / 4, high] if image.cmap.name == "RdBu_r" else pyplot().MaxNLocator(6)
    ax.figure.colorbar(image, ax=ax, pad=0.02, ticks=ticks, format="%.3g")


def blocks_by_matrices(ax, values: Mapping[str, float], how: dict):
    """{layer: number} as blocks x matrices, each written into its cell if there are not too many."""
    places = {name: place(name) for name in values}
    blocks, matrices = (list(dict.fromkeys(p[i] for p in places.values())) for i in (0, 1))
    table = torch.full((len(blocks), len(matrices)), float("nan"))
    for name, (block, matrix) in places.items():
        table[blocks.index(block), matrices.index(matrix)] = values[name]
    digits = ".0f" if all(value == int(value) for value in values.values()) else ".2g"
    image = paint(ax, table, how, (lambda i, j: f"{table[i, j]:{digits}}") if table.numel() <= 400 else None)
    ax.set_xticks(range(len(matrices)), short(matrices).values(), rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(blocks)), short(blocks, 2).values())
    return image


def layers_by_steps(ax, rows: Sequence[tuple[int, dict[str, float]]], how: dict, cell: Callable | None = None) -> None:
    """[(step, {layer: number})] as layers x steps: ticks as many as there is room for, a line between blocks."""
    names, steps = list(rows[0][1]), [step or "start" for step, _ in rows]
    table = torch.tensor([[values[name] for _, values in rows] for name in names], dtype=torch.float64)
    image = paint(ax, table, how, cell and (lambda i, j: cell(rows, names[i], j)))
    words, every = list(layer_words(names).values()), math.ceil(len(names) / 160)
    ax.set_yticks(range(0, len(names), every), words[::every], fontsize=6)
    every = math.ceil(len(steps) / 16)
    ax.set_xticks(range(0, len(steps), every), steps[::every], fontsize=7)
    for i, (before, after) in enumerate(zip(names, names[1:])):
        if place(before)[0] != place(after)[0]:
            ax.axhline(i + 0.5, color="0.6", lw=0.6)
    bar(ax, image)


def tall(names: Collection[str]) -> float:
    """Inches for a row per layer."""
    return max(2.8, min(0.15 * len(names), 24.0) + 1.5)


def maps(rows: Sequence[tuple[int, dict]], cell: Callable | None = None) -> tuple:
    """(figure, axes): the last values as blocks x matrices and, if they changed, beside it every layer over the steps."""
    last, how = rows[-1][1], scale(torch.tensor([list(values.values()) for _, values in rows], dtype=torch.float64))
    changed = any(values != last for _, values in rows)
    blocks, matrices = (len({place(name)[i] for name in last}) for i in (0, 1))
    widths = [1.7 + 0.55 * matrices, min(max(0.55 * len(rows), 2.5), 9) + 1.8][: 1 + changed]
    size = max(sum(widths), 4.5), tall(last) if changed else max(2.4, 0.3 * blocks + 1.8)
    fig, axes = pyplot().subplots(1, 1 + changed, figsize=size, squeeze=False, width_ratios=widths)
    image = blocks_by_matrices(axes[0, 0], last, how)
    if changed:
        layers_by_steps(axes[0, 1], rows, how, cell if len(rows) <= 18 else None)
    else:
        bar(axes[0, 0], image)
    return fig, axes[0]


def growth(out: str, ranks: Sequence[tuple[int, dict[str, int]]]) -> str:
    """ranks.png: at each step where ranks changed, which layer from which rank to which; left, where that ended."""

    def change(rows, name, j):
        before, now = rows[max(j - 1, 0)][1][name], rows[j][1][name]
        return f"{before}→{now}" if before != now else ""

    first, last = ranks[0][1], ranks[-1][1]
    fig, axes = maps(ranks, change)
    axes[0].set_title(f"ranks at the end (sum {sum(last.values())})")
    axes[1].set(title="every layer's rank, and what changed", xlabel="step at which ranks changed")
    start, end, most = sum(first.values()), sum(last.values()), max(last.values())
    top = [word for name, word in layer_words(last).items() if last[name] == most]
    title = f"Ranks {'grew' if end >= start else 'shrank'} at {len(ranks) - 1} step{'s' * (len(ranks) > 2)}, "
    title += f"from {start} to {end} in all; "
    highest = f"highest in the end: {' and '.join(top)}" if len(top) < 3 else f"{len(top)} layers ended highest"
    title += f"{highest}, at {most}"
    caption = f"{sentence(meaning('', 'ranks'))}. 1→5: a rank of 1 became 5 at this step."
    return save(fig, out, "ranks.png", title, caption)


def importance(out: str, events: Sequence[tuple[int, dict]], words: str) -> str:
    """importance.png: every layer's score at each growth event, zero in white, with a dot where that layer then grew."""
    rows = [(step, event["scores"]) for step, event in events]
    names, steps = list(rows[0][1]), len(rows)
    table = torch.tensor([list(scores.values()) for _, scores in rows], dtype=torch.float64)
    fig, ax = pyplot().subplots(figsize=(min(max(0.42 * steps, 3.4), 9) + 2.6, tall(names)))
    layers_by_steps(ax, rows, scale(torch.cat([table, -table])))
    grown = [(j, names.index(name)) for j, (_, event) in enumerate(events) for name in event["grown"]]
    ax.scatter(*zip(*grown), s=14, color="black", edgecolors="white", linewidths=0.6)
    ax.set_xlabel("step of the growth event")
    j, i = divmod(table.argmax().item(), len(names))
    title = f"The score that decides what grows was highest in {layer_words(names)[names[i]]} at step {rows[j][0]} "  # type: ignore[index]
    title += f"({table.max():.2g}); {(table < 0).sum()} of {table.numel()} scores were negative"
    title = title if (table != table[0, 0]).any() else f"Every layer had the same score at every event, {table[0, 0]:.2g}"
    return save(fig, out, "importance.png", title, f"Colour: {words}. Dot: the layer grew at this event.")


def heat_map(out: str, quantity: str, rows: Sequence[tuple[int, dict[str, float]]], words: str) -> str:
    """A quantity that the method watches: maps of its values at the evaluations."""
    step, last = rows[-1]
    fig, axes = maps(rows)
    axes[0].set_title(f"at step {step}")
    if len(axes) > 1:
        axes[1].set(title="over training", xlabel="step of the evaluation")
    labels, low, high = layer_words(last), min(last, key=last.get), max(last, key=last.get)
    title = f"The {words.split(',')[0]} is "
    if last[low] == last[high]:
        title += f"{last[high]:.3g} in every layer"
    else:
        title += f"highest in {labels[high]} ({last[high]:.3g}) and lowest in {labels[low]} ({last[low]:.3g})"
    return save(fig, out, f"{quantity}.png", title, f"{sentence(words)}.")


@torch.no_grad()
def histograms(out: str, layers: Mapping[str, torch.nn.Module], form: str) -> str:
    """histograms.png of the entries of W0, dW and each matrix of the adapters, all layers pooled."""
    pools = {}
    for layer in layers.values():
        P, Q = (f.float().cpu() for f in layer.factors())
        own = {k: v for k, v in layer.state_dict().items() if re.fullmatch(r"[A-Z]0?", k)}  # the matrices, no statistics
        for key, value in {"W0": layer.base.weight, "dW": P @ Q, **own}.items():
            values = value.float().cpu().flatten()
            pools.setdefault(key, []).append(values[:: max(1, len(values) // 200_000)])  # enough for a histogram
    pools = {key: torch.cat(values) for key, values in pools.items()}  # type: ignore[arg-type]
    plt, columns = pyplot(), min(3, len(pools))
    rows = math.ceil(len(pools) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 1.9 * rows + 1.1), squeeze=False)
    for ax, (key, values) in zip(axes.flat, pools.items()):
        mean, std = values.mean().item(), max(values.std(correction=0).item(), 1e-12)
        ax.hist(values.numpy(), bins=60, range=(mean - 4 * std, mean + 4 * std), density=True, color=BLUE, alpha=0.75)
        line = torch.linspace(mean - 4 * std, mean + 4 * std, 200)
        ax.plot(line, torch.exp(-0.5 * ((line - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi)), "--", color=ORANGE, lw=1.2)
        ax.set(title=f"{key}, standard deviation {std:.2g}", yticks=[])
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
    for ax in axes.flat[len(pools) :]:
        ax.remove()
    sizes = {key: values.square().mean().sqrt().item() for key, values in pools.items()}
    share = 100 * sizes["dW"] / max(sizes["W0"], 1e-12)
    title = f"The update dW has entries of {share:.2g} % of the size of those of the weights W0 (root mean square)"
    caption = f"Entries of all {len(layers)} layers. W0: frozen weights; dW: what training adds to them; other letters: "
    caption += f"the matrices of {form}. Dashed: a Gaussian of the same mean and standard deviation."
    return save(fig, out, "histograms.png", title, caption)


@torch.no_grad()
def eigenvalues(
    out: str, layers: Mapping[str, torch.nn.Module], compared: tuple[str, dict[str, torch.Tensor]] | None = None
) -> str | None:
    """eigenvalues.png of the square layers' W0 and W0 + dW, if these are spread differently by more than chance would have it:
    the Kolmogorov-Smirnov distance is above its 5 % point. `compared` is (words, {layer: dW}) of another run, drawn along."""
    square = [name for name, layer in layers.items() if len(set(layer.base.weight.shape)) == 1]
    if sum(layers[name].in_features for name in square) > 4096:  # eigenvalues cost n^3: six layers do
        square = square[:: math.ceil(len(square) / 6)]
    if not square or any(layers[name].in_features > 1024 for name in square):
        return None
    weights = {name: layers[name].base.weight.float().cpu() for name in square}
    updates = {"W0": dict.fromkeys(square, 0.0), "W0 + dW": {}}
    for name in square:
        P, Q = (f.float().cpu() for f in layers[name].factors())
        updates["W0 + dW"][name] = P @ Q
    if compared:
        updates[f"W0 + dW of {compared[0]}"] = compared[1]  # type: ignore[assignment]
    sizes = {words: torch.cat([torch.linalg.eigvals(weights[n] + dW[n]).abs() for n in square]).sort().values
             for words, dW in updates.items()}  # fmt: skip
    count = len(sizes["W0"])
    share = torch.arange(1, count + 1) / count
    distance = max((share - torch.searchsorted(sizes["W0"], s, right=True) / count).abs().max() for s in sizes.values())
    if distance <= 1.36 * math.sqrt(2 / count):
        return None
    fig, ax = pyplot().subplots(figsize=(5.5, 3.6))
    for (words, values), style in zip(sizes.items(), STYLES):
        ax.step(values, share, style, where="post", label=words)
    ax.set(xlabel="|eigenvalue|", ylabel="share of eigenvalues up to there", ylim=(0, 1))
    ax.legend(frameon=False, loc="lower right")
    before, after = sizes["W0"].mean().item(), sizes["W0 + dW"].mean().item()
    title = f"The update moved the mean |eigenvalue| of {len(square)} square layers from {before:.3g} to {after:.3g}"
    return save(fig, out, "eigenvalues.png", title, "W0: frozen weights; dW: what training adds to them.")


def spectrum(out: str, method: str) -> str:
    """spectrum.png: what each layer's start was made from, from plan.json: a line for each kind of matrix, the median over
    the blocks, and a band from the least to the largest; kinds whose spectra are the same share one. The largest = 1."""
    with open(os.path.join(out, "plan.json"), encoding="utf-8") as file:
        plan = json.load(file)
    kinds, most = {}, []
    for name, given in plan.items():
        values = torch.tensor(given["spectrum"], dtype=torch.float64).clamp(min=0)
        kinds.setdefault(place(name)[1], []).append(values / values[0].clamp(min=1e-300))
        most.append((len(values), 1 + int((values.cumsum(0) < 0.9 * values.sum()).sum())))
    words, lines = short(list(kinds)), {}
    for kind, curves in kinds.items():
        n = min(map(len, curves))
        table = torch.stack([values[:n] for values in curves])
        same = next((key for key, other in lines.items() if other.shape == table.shape and torch.allclose(other, table)), None)
        lines[f"{same}, {words[kind]}" if same else words[kind]] = lines.pop(same) if same else table
    fig, ax = pyplot().subplots(figsize=(6.5, 3.8))
    for i, (label, table) in enumerate(lines.items()):
        middle, color = table.median(0).values, CYCLE[i % len(CYCLE)]
        seen = int((middle > 1e-8).sum())
        at = range(1, seen + 1)
        ax.fill_between(at, table.amin(0)[:seen].clamp(min=1e-8), table.amax(0)[:seen], color=color, alpha=0.15, lw=0)
        ax.plot(at, middle[:seen], STYLES[i % 4], color=color, label=label)
    low = max(1e-8, min(table[table > 0].min().item() for table in lines.values()) / 2)
    ax.set(yscale="log", ylim=(low, 2), xlabel="by size, from the largest", ylabel="relative to the largest")
    ax.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1))
    size, needed = sorted(most, key=lambda pair: pair[1] / pair[0])[len(most) // 2]
    meant = meaning(method, "spectrum")
    title = f"In the median layer the largest {needed} of {size} {meant.split(' of ')[0]} make up 90 % of their sum"
    return save(fig, out, "spectrum.png", title, f"{sentence(meant)}. Line: median over blocks; band: least to largest.")


def redraw(out: str) -> list[str]:
    """Draw the figures of a finished run again, from its folder; their names. A PNG of it that is no longer drawn goes."""
    run = Run.open(out)
    run.settings.out = out
    folder.finished(out)
    history = folder.evaluations(out)
    with open(os.path.join(out, "layers.jsonl"), encoding="utf-8") as file:
        layers = [json.loads(line) for line in file]
    compared = None
    if other := run.settings.compare:
        theirs = factors_of(other)
        compared = other, {name: theirs[name][0] @ theirs[name][1] for name in run.layers}
    before = {name for name in folder.written(out) if name.endswith(".png")}
    drawn = draw(run, folder.Progress(history=history, layers=layers), compared)
    for name in before - set(drawn):
        os.remove(os.path.join(out, name))
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    words = "draws the figures of a finished run again"
    return on_a_run("figures", words, lambda out: f"{out}: {', '.join(redraw(out))}", argv)


if __name__ == "__main__":
    sys.exit(main())
