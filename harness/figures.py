"""The figures of a run: curves.png, a heat map per quantity a method watches, histograms, eigenvalues.

matplotlib is imported when something is drawn.
"""

import json
import math
import os
import re

import torch


def pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "savefig.dpi": 130})
    return plt


def place(name):
    """(block, matrix) of a dotted layer name: ("blocks.0", "q_proj"). Without a number the block is ""."""
    match = re.match(r"^(.*?\d+)(?:\.(.*))?$", name)
    return (match[1], match[2] or "") if match else ("", name)


def save(fig, out, name):
    fig.tight_layout()
    fig.set_layout_engine("none")  # the layout is done; an engine would make savefig draw everything twice
    fig.savefig(os.path.join(out, name))
    pyplot().close(fig)


def draw(run, progress, compared=None):
    """All figures of a run, into its folder. `compared` is (words, {layer: dW}) of another run, drawn along."""
    out, last = run.settings.out, progress.history[-1]
    curves(out, progress.history, next((name for name in run.task.metrics if name in last), None))
    watched = [row for row in progress.layers if "event" not in row]
    for quantity in [key for key in watched[-1] if key != "step"]:
        heat_map(out, quantity, [(row["step"], row[quantity]) for row in watched])
    if thin := [name for name in run.layers if low_rank(run.model.get_submodule(name))]:
        draw_updates(out, run.model, thin, compared)
    if os.path.exists(os.path.join(out, "plan.json")):
        draw_plan(out)


def low_rank(layer):
    """Whether the layer's update is a product of two thin factors: DoRA's is none, an adapter behind a layer neither."""
    try:
        return bool(layer.factors())
    except (AttributeError, ValueError):
        return False


def curves(out, history, headline):
    """Loss, the headline metric and, where it changes, the total rank, over the evaluations."""
    plt = pyplot()
    ranks = [row.get("rank_total") for row in history]
    panels = 1 + bool(headline) + (len(set(ranks)) > 1)
    fig, axes = plt.subplots(1, panels, figsize=(4 * panels, 3), squeeze=False)
    axes = list(axes[0])
    steps = [row["step"] for row in history]
    ax = axes.pop(0)
    ax.plot(steps, [row["train_loss"] for row in history], marker=".", color="tab:gray", label="training (mean since last)")
    ax.plot(steps, [row["dev_loss"] for row in history], marker=".", color="tab:red", label="development")
    ax.set(xlabel="step", title="loss")
    ax.legend(frameon=False)
    if headline:
        ax = axes.pop(0)
        ax.plot(steps, [row[headline] for row in history], marker=".", color="tab:blue")
        ax.set(xlabel="step", title=f"{headline} (development)")
        ax.grid(alpha=0.3)
    if axes:
        axes[0].plot(steps, ranks, marker=".", color="tab:green")
        axes[0].set(xlabel="step", title="total rank", ylim=(0, None))
    save(fig, out, "curves.png")


def heat_map(out, quantity, rows):
    """The last values as blocks x matrices and, if they changed, every layer over the evaluations."""
    plt = pyplot()
    last = rows[-1][1]
    places = {name: place(name) for name in last}
    blocks = list(dict.fromkeys(p[0] for p in places.values()))
    matrices = list(dict.fromkeys(p[1] for p in places.values()))
    table = torch.full((len(blocks), len(matrices)), float("nan"))
    for name, (block, matrix) in places.items():
        table[blocks.index(block), matrices.index(matrix)] = last[name]
    over_time = torch.tensor([[row[1][name] for name in last] for row in rows]).T  # (layers, evaluations)
    changed = bool((over_time != over_time[:, :1]).any())
    height = max(2.6, 0.3 * len(blocks) + 1.6, 0.13 * len(last) * changed)
    fig, axes = plt.subplots(
        1, 1 + changed, figsize=(2 + 0.7 * len(matrices) + 4.5 * changed, height), squeeze=False,
        width_ratios=[2 + 0.7 * len(matrices), 4.5][: 1 + changed],
    )  # fmt: skip
    ax = axes[0, 0]
    image = ax.imshow(table.numpy(), cmap="viridis", aspect="auto")
    whole = bool((table[~table.isnan()] % 1 == 0).all())
    middle = (image.norm.vmin + image.norm.vmax) / 2
    if table.numel() <= 400:
        for i in range(len(blocks)):
            for j in range(len(matrices)):
                value = table[i, j].item()
                if value == value:
                    ax.text(j, i, f"{value:.0f}" if whole else f"{value:.2g}", ha="center", va="center", fontsize=7,
                            color="white" if value < middle else "black")  # fmt: skip
    ax.set_xticks(range(len(matrices)), [".".join(m.split(".")[-2:]) for m in matrices], rotation=40, ha="right")
    ax.set_yticks(range(len(blocks)), blocks)
    ax.set_title(f"{quantity.replace('_', ' ')} at step {rows[-1][0]}")
    fig.colorbar(image, ax=ax)
    if changed:
        ax = axes[0, 1]
        image = ax.imshow(over_time.numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
        ax.set_yticks(range(len(last)), [" ".join(places[name]) for name in last], fontsize=5.5)
        ticks = sorted({round(i * (len(rows) - 1) / 5) for i in range(6)})
        ax.set_xticks(ticks, [rows[i][0] for i in ticks])
        ax.set(xlabel="step", title="over training")
        fig.colorbar(image, ax=ax)
    save(fig, out, f"{quantity}.png")


@torch.no_grad()
def draw_updates(out, model, names, compared=None):
    """histograms.png of W0, dW and each matrix of the adapters; eigenvalues.png of W0 and W0 + dW.

    Entries of all layers are pooled; eigenvalues are those of the square layers. `compared` is
    (words, {layer: dW}) of another run, drawn along.
    """
    layers = [model.get_submodule(name) for name in names]
    pools = {}
    for layer in layers:
        P, Q = (f.float().cpu() for f in layer.factors())
        own = {k: v for k, v in layer.state_dict().items() if re.fullmatch(r"[A-Z]0?", k)}  # the matrices, no statistics
        for key, value in {"W0": layer.base.weight, "dW": P @ Q, **own}.items():
            values = value.float().cpu().flatten()
            pools.setdefault(key, []).append(values[:: max(1, len(values) // 200_000)])  # enough for a histogram
    pools = {key: torch.cat(values) for key, values in pools.items()}
    plt = pyplot()
    fig, axes = plt.subplots(1, len(pools), figsize=(2.6 * len(pools), 2.6), squeeze=False)
    for ax, (key, values) in zip(axes[0], pools.items()):
        bound = max(4 * values.std().item(), 1e-12)
        ax.hist(values.numpy(), bins=80, range=(-bound, bound), density=True, color="tab:blue")
        grid = torch.linspace(-bound, bound, 200)
        gauss = torch.exp(-0.5 * ((grid - values.mean()) / values.std()) ** 2) / (values.std() * (2 * torch.pi) ** 0.5)
        ax.plot(grid, gauss, color="tab:red", lw=1, label="Gaussian,\nsame mean\nand std")
        ax.set(title=f"{key}  (std {values.std():.2g})", yticks=[])
    axes[0, 0].legend(frameon=False, fontsize=6, loc="upper right", handlelength=1)
    save(fig, out, "histograms.png")

    square = [name for name in names if len(set(model.get_submodule(name).base.weight.shape)) == 1]
    if sum(model.get_submodule(name).in_features for name in square) > 4096:  # eigenvalues cost n^3: six layers do
        square = square[:: math.ceil(len(square) / 6)]
    if square and all(model.get_submodule(name).in_features <= 1024 for name in square):
        series = {"W0": {}, "W0 + dW": {}}
        for name in square:
            layer = model.get_submodule(name)
            W0, (P, Q) = layer.base.weight.float().cpu(), (f.float().cpu() for f in layer.factors())
            series["W0"][name], series["W0 + dW"][name] = W0, W0 + P @ Q
            if compared:
                series.setdefault(f"W0 + dW of {compared[0]}", {})[name] = W0 + compared[1][name]
        fig, ax = plt.subplots(figsize=(5, 3))
        for words, weights in series.items():
            sizes = torch.cat([torch.linalg.eigvals(W).abs() for W in weights.values()])
            ax.hist(sizes.numpy(), bins=100, histtype="step", density=True, label=words)
        ax.set(xlabel="|eigenvalue|", ylabel="density", title=f"eigenvalues of {len(square)} square layers")
        ax.legend(frameon=False)
        save(fig, out, "eigenvalues.png")


def draw_plan(out):
    """spectrum.png: what each layer's start was made from, from plan.json: eigenvalues of the inputs' C (task_tlora, corda),
    singular values of the gradient (lora_ga). The largest = 1."""
    plt = pyplot()
    with open(os.path.join(out, "plan.json"), encoding="utf-8") as file:
        plan = json.load(file)
    matrices = list(dict.fromkeys(place(name)[1] for name in plan))
    fig, ax = plt.subplots(figsize=(5, 3))
    for name, given in plan.items():
        values = [v / given["spectrum"][0] for v in given["spectrum"] if v > 0]
        matrix = place(name)[1]
        ax.plot(range(1, len(values) + 1), values, lw=0.8, color=f"C{matrices.index(matrix)}", label=matrix)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))  # one for each kind of matrix
    ax.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    ax.set(yscale="log", ylim=(1e-8, 2), xlabel="eigenvalue, by size", title="spectrum behind each layer's start (largest = 1)")
    save(fig, out, "spectrum.png")
