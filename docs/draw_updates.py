"""Draws docs/updates.png: the four updates beside W0, what is trained in one colour and what is frozen in another.

python docs/draw_updates.py
"""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Polygon, Rectangle

FROZEN, TRAINED = "#c9ced6", "#e69f00"  # apart for the colour-blind, and in grey
M, R = 3.0, 0.7  # a side of W0, and the rank


def box(ax, x, height, width, label, colour):
    """A matrix of these sizes at x, in the middle; returns where the next begins."""
    ax.add_patch(Rectangle((x, -height / 2), width, height, facecolor=colour, edgecolor="black", linewidth=0.8))
    ax.text(x + width / 2, 0, label, ha="center", va="center", fontsize=11)
    return x + width + 0.18


def triangles(ax, x):
    """L + U of rank R: two packed triangles."""
    y = R / 2
    ax.add_patch(Polygon([(x, y), (x, -y), (x + R, -y)], facecolor=TRAINED, edgecolor="black", linewidth=0.8))
    ax.add_patch(Polygon([(x, y), (x + R, y), (x + R, -y)], facecolor=TRAINED, edgecolor="black", linewidth=0.8, hatch="//"))
    ax.text(x + R / 2, -y - 0.1, "L+U", ha="center", va="top", fontsize=10)
    return x + R + 0.18


def plus(ax, x, text="+"):
    ax.text(x + 0.12, 0, text, ha="center", va="center", fontsize=13)
    return x + 0.42


def panel(ax, title, note, draw):
    x = plus(ax, box(ax, 0, M, M, "W0", FROZEN))
    draw(ax, x)
    ax.set_title(title, fontsize=11, loc="left", fontweight="bold")
    ax.text(0, -M / 2 - 0.25, note, fontsize=9, va="top")
    ax.set_xlim(-0.1, 9.3)
    ax.set_ylim(-M / 2 - 1.0, M / 2 + 0.15)
    ax.set_aspect("equal")
    ax.axis("off")


def task_tlora(ax, x):
    x = plus(ax, x + 0.08, "s ·")
    box(ax, box(ax, x, M, R, "B", TRAINED), R, M, "A", FROZEN)


def tlora(ax, x):
    ax.add_patch(Rectangle((x, -0.22), 0.44, 0.44, facecolor=TRAINED, edgecolor="black", linewidth=0.8))
    ax.text(x + 0.22, 0, "α", ha="center", va="center", fontsize=11)
    x = box(ax, x + 0.62, M, R, "C", FROZEN)
    box(ax, box(ax, x, R, R, "B", TRAINED), R, M, "A", FROZEN)


def tlora_plus(ax, x):
    x = box(ax, x, M, R, "C", TRAINED)
    box(ax, box(ax, x, R, R, "B", TRAINED), R, M, "A", TRAINED)


def triadapt(ax, x):
    x = box(ax, x, M, R, "B", TRAINED)
    box(ax, triangles(ax, x), R, M, "A", TRAINED)


def main():
    fig, axes = plt.subplots(2, 2, figsize=(9.6, 5.0))
    words = "A from the SVD of W0 times the input's covariance;\nrank and scale s of each layer by sensitivity"
    panel(axes[0, 0], "task_tlora", words, task_tlora)
    panel(axes[0, 1], "tlora", "C and A random and frozen;\nthe middle and one scale are trained", tlora)
    panel(axes[1, 0], "tlora_plus", "all three trained,\neach with its own learning rate", tlora_plus)
    panel(axes[1, 1], "triadapt", "two triangles that let the rank grow\nwhere it matters, under a budget", triadapt)
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="black", linewidth=0.8) for c in (FROZEN, TRAINED)]
    fig.legend(handles, ["frozen", "trained"], loc="upper center", ncols=2, frameon=False, fontsize=10)
    fig.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.01, wspace=0.02, hspace=0.12)
    fig.savefig(os.path.join(os.path.dirname(os.path.abspath(__file__)), "updates.png"), dpi=110)


if __name__ == "__main__":
    main()
