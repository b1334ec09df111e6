"""harness/figures.py: the PNGs that a run leaves."""

import os

from short import TINY

import train


def test_figures_are_drawn_for_what_a_method_watches(csv, tmp_path):
    argv = ["--data", csv, "--text", "text", "--label", "label", "--epochs", "3"]
    argv += [flag for flag in TINY if flag != "--no-figures"]
    for method, names in {
        "triadapt": {"ranks.png", "importance.png"},
        "tlora": {"alpha.png", "B_norm.png"},
        "task_tlora": {"ranks.png", "importance.png", "scaling.png", "spectrum.png"},
        "head": set(),
    }.items():
        out = tmp_path / method
        rank = ["--rank", "4"] * (method == "tlora")
        assert train.main([*argv, *rank, "--method", method, "--out", str(out)]) == 0
        made = {name for name in os.listdir(out) if name.endswith(".png")}
        assert names | {"curves.png"} <= made
        assert ("histograms.png" in made) == (method != "head")
        assert all((out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in made)
