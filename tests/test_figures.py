"""harness/figures.py: what the PNGs of a run show, to the number, and that all of it can be read."""

import itertools
import json
import os

import pytest
import torch
from short import TINY

import train
from harness import figures, folder

BERT = [f"bert.encoder.layer.{i}.{m}" for i in (0, 1) for m in ("attention.self.query", "attention.output.dense", "output.dense")]
OURS = ["blocks.0.q_proj", "blocks.0.up_proj", "blocks.1.q_proj", "blocks.1.up_proj"]


@pytest.fixture
def kept(monkeypatch):
    """{file name: figure} of all that is drawn, to be looked at."""
    found, save, plt = {}, figures.save, figures.pyplot()

    def keep(fig, out, name, title, caption):
        found[name] = fig
        return save(fig, out, name, title, caption)

    monkeypatch.setattr(figures, "save", keep)
    monkeypatch.setattr(plt, "close", lambda fig: None)
    monkeypatch.setitem(plt.rcParams, "figure.max_open_warning", 0)
    yield found
    monkeypatch.undo()
    plt.close("all")


def events(names=OURS):
    """Two growths, of the first and the third layer, then of the third; an evaluation after each, and a drift at the end."""

    def event(grown, scores):
        return {"grown": grown, "scores": dict(zip(names, scores)), "budget": 4}

    def watched(ranks):
        return {"ranks": dict(zip(names, ranks)), "importance": dict.fromkeys(names, 9.0)}

    return [
        {"step": 10, "event": event({names[0]: 3, names[2]: 3}, (0.4, -0.1, 0.2, 0.0))},
        {"step": 15, **watched((3, 1, 3, 1))},
        {"step": 20, "event": event({names[2]: 5}, (-0.3, -0.2, 0.1, 0.05))},
        {"step": 30, **watched((3, 1, 5, 1))},
    ]


def words(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def legible(fig):
    """A title that is a sentence; nothing of it, nor of any other text, outside; no tick label twice or on another."""
    renderer = fig.canvas.get_renderer()
    page = fig.bbox
    assert fig._suptitle.get_text()[0].isupper() and len(fig._suptitle.get_text().split()) >= 5
    for text in (fig._suptitle, fig._supxlabel):
        assert text.get_text() and page.x0 <= text.get_window_extent(renderer).x0
        assert text.get_window_extent(renderer).x1 <= page.x1, text.get_text()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            labels = [label for label in axis.get_ticklabels(which="major") if label.get_text() and label.get_visible()]
            low, high = sorted(axis.get_view_interval())
            labels = [label for label, at in zip(labels, axis.get_majorticklocs()) if low <= at <= high]
            assert len({label.get_text() for label in labels}) == len(labels), [label.get_text() for label in labels]
            boxes = [label.get_window_extent(renderer) for label in labels]
            for box, label in zip(boxes, labels):
                assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, label.get_text()
                assert all(not box.overlaps(t.get_window_extent(renderer)) for t in (fig._suptitle, fig._supxlabel))
            if not any(label.get_rotation() for label in labels):  # boxes of slanted words overlap where the words do not
                assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)), [label.get_text() for label in labels]
            for one, other in itertools.product(labels, [t for o in fig.axes if o is not ax for t in o.get_yticklabels()]):
                if other.get_text() and not one.get_rotation() and axis is ax.yaxis:
                    assert not one.get_window_extent(renderer).overlaps(other.get_window_extent(renderer))


def test_the_rank_history_is_that_of_the_events():
    history = [(step, list(ranks.values())) for step, ranks in figures.rank_history(events(), 1)]
    assert history == [(0, [1, 1, 1, 1]), (10, [3, 1, 3, 1]), (20, [3, 1, 5, 1])]
    unchanged = [{"step": s, "ranks": {"a": 4, "b": 2}} for s in (5, 10)]  # allotted before training, not grown from --rank
    assert figures.rank_history(unchanged, 8) == [(5, {"a": 4, "b": 2})]
    masked = [{"step": 4, "event": {"ranks": {"a": 2, "b": 1}, "budget": 3}}, *unchanged[:1]]
    assert [step for step, _ in figures.rank_history(masked, 8)] == [4, 5]
    assert figures.rank_history([{"step": 5}], None) == []


def test_growth_shows_which_layer_went_from_which_rank_to_which(kept, tmp_path):
    assert figures.growth(str(tmp_path), figures.rank_history(events(), 1)) == "ranks.png"
    fig = kept["ranks.png"]
    left, right, *_ = fig.axes
    assert left.images[0].get_array().tolist() == [[3, 1], [5, 1]]
    assert words(left.xaxis) == ["q_proj", "up_proj"] and words(left.yaxis) == ["blocks.0", "blocks.1"]
    assert right.images[0].get_array().tolist() == [[1, 3, 3], [1, 1, 1], [1, 3, 5], [1, 1, 1]]
    assert words(right.xaxis) == ["start", "10", "20"]
    assert words(right.yaxis) == ["blocks.0 q_proj", "blocks.0 up_proj", "blocks.1 q_proj", "blocks.1 up_proj"]
    marks = {t.get_position(): t.get_text() for t in right.texts if t.get_text()}
    assert marks == {(1, 0): "1→3", (1, 2): "1→3", (2, 2): "3→5"}
    assert left.images[0].norm is right.images[0].norm  # one colour, one rank, in both
    title = " ".join(fig._suptitle.get_text().split())
    assert title == "Ranks grew at 2 steps, from 4 to 10 in all; highest in the end: blocks.1 q_proj, at 5"
    legible(fig)


def test_importance_is_centred_at_zero_at_each_event_and_marks_what_grew_then(kept, tmp_path):
    rows = [(row["step"], row["event"]) for row in events() if "event" in row]
    figures.importance(str(tmp_path), rows, figures.meaning("triadapt", "importance"))
    fig = kept["importance.png"]
    ax = fig.axes[0]
    image = ax.images[0]
    assert image.get_array().tolist() == [[0.4, -0.3], [-0.1, -0.2], [0.2, 0.1], [0.0, 0.05]]  # no drift of the evaluations
    assert image.get_cmap().name == "RdBu_r" and image.norm.vmin == -0.4 and image.norm.vmax == 0.4
    assert [float(image.norm(v)) for v in (-0.4, -0.1, 0.0, 0.1, 0.4)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ax.collections[0].get_offsets().tolist() == [[0, 0], [0, 2], [1, 2]]
    assert words(ax.xaxis) == ["10", "20"]
    title = " ".join(fig._suptitle.get_text().split())
    most = "The score that decides what grows was highest in blocks.0 q_proj at step 10 (0.4)"
    assert title == f"{most}; 3 of 8 scores were negative"
    assert "||L + U||_F / r" in fig._supxlabel.get_text()
    legible(fig)
    for _, event in rows:
        event["scores"] = dict.fromkeys(OURS, 0.0)
    figures.importance(str(tmp_path), rows, "score")
    assert "the same score at every event, 0" in " ".join(kept["importance.png"]._suptitle.get_text().split())


def test_no_two_columns_of_a_heat_map_have_one_name(kept, tmp_path):
    assert figures.short(["attention.self.query", "attention.output.dense", "output.dense", "dense"]) == {
        "attention.self.query": "query", "attention.output.dense": "attention.output.dense", "output.dense": "output.dense",
        "dense": "dense"}  # fmt: skip
    t5 = ["encoder.block.0", "decoder.block.0"]
    assert list(figures.short(t5, 2).values()) == t5
    values = dict(zip(BERT, (0.5, -0.25, 1.5, 2.0, 1.0, 0.125)))
    figures.heat_map(str(tmp_path), "alpha", [(5, dict.fromkeys(BERT, 1.0)), (9, values)], figures.meaning("tlora", "alpha"))
    fig = kept["alpha.png"]
    left, right, *_ = fig.axes
    assert words(left.xaxis) == ["query", "attention.output.dense", "output.dense"]
    assert words(left.yaxis) == ["layer.0", "layer.1"]
    assert left.images[0].get_array().tolist() == [[0.5, -0.25, 1.5], [2.0, 1.0, 0.125]]
    assert [t.get_text() for t in left.texts] == ["0.5", "-0.25", "1.5", "2", "1", "0.12"]
    assert left.images[0].get_cmap().name == "RdBu_r" and right.images[0].norm(0.0) == 0.5  # there is a negative one
    assert right.images[0].get_array()[:, 1].tolist() == list(values.values())
    title = " ".join(fig._suptitle.get_text().split())
    assert title == "The factor alpha is highest in layer.1 query (2) and lowest in layer.0 attention.output.dense (-0.25)"
    assert "dW = alpha C B A" in fig._supxlabel.get_text()
    legible(fig)


def test_seventy_two_layers_over_twenty_events_are_legible(kept, tmp_path):
    names = [f"roberta.encoder.layer.{i}.{m}" for i in range(12) for m in
             ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
              "intermediate.dense", "output.dense")]  # fmt: skip
    ranks = [(100 * i, {name: 1 + (i * (j % 5)) // 4 for j, name in enumerate(names)}) for i in range(21)]
    figures.growth(str(tmp_path), ranks)
    assert len(words(kept["ranks.png"].axes[1].yaxis)) == 72
    legible(kept["ranks.png"])
    scores = [(step, {"scores": {n: (r - 9) / 7 for n, r in row.items()}, "grown": {names[0]: 2}}) for step, row in ranks]
    figures.importance(str(tmp_path), scores, "score")
    legible(kept["importance.png"])


def test_curves_step_with_the_events(kept, tmp_path):
    history = [{"step": s, "train_loss": 1 / s, "dev_loss": 2 / s, "f1": f} for s, f in ((15, 0.75), (30, 0.5))]
    figures.curves(str(tmp_path), history, "f1", figures.rank_history(events(), 1))
    loss, score, total = kept["curves.png"].axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[1 / 15, 1 / 30], [2 / 15, 2 / 30]]
    assert score.lines[0].get_ydata().tolist() == [0.75, 0.5]
    assert total.lines[0].get_xydata().tolist() == [[0, 4], [10, 8], [20, 10], [30, 10]]
    assert total.lines[0].get_drawstyle() == "steps-post"
    title = " ".join(kept["curves.png"]._suptitle.get_text().split())
    assert title == ("After 30 steps the development loss is 0.0667 and f1 is 0.5 (best 0.75 at step 15); "
                     "the total rank went from 4 to 10")  # fmt: skip
    legible(kept["curves.png"])


class Layer(torch.nn.Module):
    """W0 and an update P Q beside it."""

    def __init__(self, W0, P, Q):
        super().__init__()
        self.base = torch.nn.Linear(*W0.shape, bias=False)
        self.base.weight = torch.nn.Parameter(W0)
        self.in_features = W0.shape[1]
        self.A, self.B = torch.nn.Parameter(Q), torch.nn.Parameter(P)

    def factors(self):
        return self.B, self.A


def test_histograms_name_their_symbols_and_say_how_large_the_update_is(kept, tmp_path):
    torch.manual_seed(0)
    W0, eye = torch.randn(40, 40), torch.eye(40)
    figures.histograms(str(tmp_path), {"a": Layer(W0, 0.25 * W0, eye)}, "LoRA: B A")
    fig = kept["histograms.png"]
    assert [ax.get_title().split(",")[0] for ax in fig.axes] == ["W0", "dW", "A", "B"]
    assert "entries of 25\u00a0% of the size of those of the weights W0" in fig._suptitle.get_text().replace("\n", " ")
    counts = [patch.get_height() for patch in fig.axes[0].patches]
    expected = torch.histc(W0.flatten(), 60, W0.mean() - 4 * W0.std(correction=0), W0.mean() + 4 * W0.std(correction=0))
    assert counts == pytest.approx((expected / expected.sum() / (8 * W0.std(correction=0) / 60)).tolist(), abs=0.02)
    assert "LoRA: B A" in " ".join(fig._supxlabel.get_text().split())
    legible(fig)


def test_eigenvalues_are_drawn_only_where_they_show_something(kept, tmp_path):
    torch.manual_seed(0)
    W0, eye = torch.randn(40, 40), torch.eye(40)
    assert figures.eigenvalues(str(tmp_path), {"a": Layer(W0, 0.01 * torch.randn(40, 40), eye)}) is None
    assert figures.eigenvalues(str(tmp_path), {"a": Layer(torch.randn(20, 40), torch.randn(20, 2), torch.randn(2, 40))}) is None
    assert not kept
    assert figures.eigenvalues(str(tmp_path), {"a": Layer(W0, W0, eye)}, ("out/other", {"a": 0 * W0})) == "eigenvalues.png"
    first, second, third = kept["eigenvalues.png"].axes[0].lines
    sizes = torch.linalg.eigvals(W0).abs().sort().values
    assert torch.allclose(torch.tensor(first.get_xdata()), sizes) and first.get_ydata()[-1] == 1
    assert torch.allclose(torch.tensor(second.get_xdata()), 2 * sizes, rtol=1e-3) and third.get_label() == "W0 + dW of out/other"
    legible(kept["eigenvalues.png"])


def test_the_spectrum_has_a_line_for_each_kind_of_matrix(kept, tmp_path):
    halves, tenths = [8.0, 4.0, 2.0, 1.0], [10.0, 1.0, 0.1, 0.0]
    plan = {f"blocks.{i}.{m}": {"spectrum": [(i + 1) * v for v in values]} for i in range(2) for m, values in
            (("q_proj", halves), ("k_proj", halves), ("up_proj", tenths))}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    figures.spectrum(str(tmp_path), "task_tlora")
    ax = kept["spectrum.png"].axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["q_proj, k_proj", "up_proj"]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 0.5, 0.25, 0.125], [1, 0.1, pytest.approx(0.01)]]
    title = kept["spectrum.png"]._suptitle.get_text().replace("\n", " ")
    assert title == "In the median layer the largest 3 of 4 eigenvalues make up 90\u00a0% of their sum"
    assert "C, the second moment of a layer's input" in kept["spectrum.png"]._supxlabel.get_text().replace("\n", " ")
    legible(kept["spectrum.png"])
    figures.spectrum(str(tmp_path), "lora_ga")
    assert "singular values" in kept["spectrum.png"]._suptitle.get_text()


def test_colours_are_those_that_all_eyes_tell_apart():
    assert figures.CYCLE[:3] == ["#0072B2", "#D55E00", "#009E73"]
    assert figures.scale(torch.tensor([1.0, 2.0]))["cmap"] == "cividis"
    assert figures.scale(torch.tensor([-1.0]))["cmap"] == "RdBu_r"


def argv(csv, out, method):
    more = {"tlora": ["--rank", "4"], "triadapt": ["--interval", "1", "--rank-ref", "3", "--delta", "1"]}.get(method, [])
    flags = [flag for flag in TINY if flag != "--no-figures"]
    table = ["--data", csv, "--text", "text", "--label", "label", "--epochs", "3"]
    return [*table, *flags, *more, "--method", method, "--out", str(out)]


def test_a_run_draws_what_its_method_watches_and_redraws_it_to_the_byte(csv, kept, tmp_path, capsys):
    for method, names in {
        "triadapt": {"ranks.png", "importance.png"},
        "tlora": {"alpha.png", "B_norm.png"},
        "task_tlora": {"ranks.png", "importance.png", "scaling.png", "spectrum.png"},
        "head": set(),
    }.items():
        kept.clear()
        out = tmp_path / method
        assert train.main(argv(csv, out, method)) == 0
        made = {name: (out / name).read_bytes() for name in os.listdir(out) if name.endswith(".png")}
        assert names | {"curves.png"} <= made.keys() == kept.keys()
        assert ("histograms.png" in made) == (method != "head")
        for fig in kept.values():
            legible(fig)
        if method == "triadapt":
            rows = [json.loads(line) for line in (out / "layers.jsonl").read_text().splitlines()]
            steps = [row["step"] for row in rows if "event" in row]
            assert steps and words(kept["importance.png"].axes[0].xaxis) == [str(step) for step in steps]
        (out / "curves.png").write_bytes(b"")
        (out / "eigenvalues.png").write_bytes(b"of an earlier version")
        assert figures.main([str(out)]) == 0
        assert {name: (out / name).read_bytes() for name in os.listdir(out) if name.endswith(".png")} == made
        assert sorted(capsys.readouterr().out.splitlines()[-1].split(": ")[1].split(", ")) == sorted(made)


def test_redrawing_says_in_one_line_what_is_wrong(csv, tmp_path, capsys):
    assert figures.main([]) == 2 and "usage: python -m harness.figures RUN" in capsys.readouterr().err
    assert figures.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"figures: error: {tmp_path} is not a run folder: it has no config.json\n"
    out = tmp_path / "run"
    assert train.main([*argv(csv, out, "lora"), "--max-steps", "1"]) == 0
    config = json.loads((out / "config.json").read_text())
    folder.write_json(out / "config.json", {**config, "finished": None})
    capsys.readouterr()
    assert figures.main([str(out)]) == 2
    assert capsys.readouterr().err.startswith("figures: error: ")
