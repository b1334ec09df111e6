"""report.html: a run on one page, in one file that needs no server and no network: its result, figures, metrics, settings.

`python -m harness.report RUN` writes it into the folder of a finished run.
"""

import base64
import html
import os
import sys
from collections.abc import Mapping, Sequence

from harness import folder
from harness.methods import METHODS
from harness.settings import on_a_run
from reading.files import write_text

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
pre { padding: .8rem; overflow-x: auto; border: 1px solid #8886; border-radius: 6px; }
figure { margin: 1.2rem 0; } img { max-width: 100%; background: white; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884; }
.metrics td, .metrics th { text-align: right; }
.best { font-weight: bold; }
"""
FIRST = ["curves.png", "ranks.png", "importance.png"]  # then the quantities watched, then the rest
LATER = ["histograms.png", "eigenvalues.png", "spectrum.png"]


def text(value: object) -> str:
    """Any value as escaped text."""
    if value is None or isinstance(value, bool):
        value = {None: "–", True: "yes", False: "no"}[value]
    elif isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return html.escape(str(value))


def pairs(values: Mapping[str, object]) -> str:
    """{name: value} as a table of two columns."""
    rows = "\n".join(f"<tr><th scope='row'>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in values.items())
    return f"<div class='wide'><table>\n{rows}\n</table></div>"


def metrics(history: Sequence[dict], headline: str) -> str:
    """A row per evaluation; the best of the headline metric is bold."""
    names = list(dict.fromkeys(name for row in history for name in row))
    best = best_of(history, headline)
    head = "".join(f"<th scope='col'>{text(name)}</th>" for name in names)
    lines = []
    for row in history:
        cells = "".join(f"<td>{text(row.get(name))}</td>" for name in names)
        lines.append(f"<tr class='best'>{cells}</tr>" if row is best else f"<tr>{cells}</tr>")
    rows = "\n".join(lines)
    return f"<div class='wide'><table class='metrics'>\n<tr>{head}</tr>\n{rows}\n</table></div>"


def best_of(history: Sequence[dict], headline: str) -> dict:
    return (min if headline == "dev_loss" else max)(history, key=lambda row: row[headline])


def figure(path: str) -> str:
    """A PNG inline; the sentence that it carries as its title describes it to those who do not see it."""
    from PIL import Image  # matplotlib brings it

    with Image.open(path) as image:
        words = image.text.get("Title", os.path.basename(path))  # type: ignore[attr-defined]
    with open(path, "rb") as file:
        coded = base64.b64encode(file.read()).decode()
    return f"<figure><img alt='{text(words)}' src='data:image/png;base64,{coded}'></figure>"


def write(out: str) -> str:
    """Write report.html of the finished run in `out`, from what is in that folder; returns its path."""
    config = folder.finished(out)
    s, task = config["settings"], config["task"]
    history = folder.evaluations(out)
    names = {name for name in os.listdir(out) if name.endswith(".png")}
    names = [n for n in FIRST if n in names] + sorted(names - {*FIRST, *LATER}) + [n for n in LATER if n in names]
    headline = next((name for name in task["metrics"] if name in history[-1]), "dev_loss")
    last, best = history[-1], best_of(history, headline)
    settings = {key: value for key, value in vars(s).items() if key not in ("options", "method")}
    body = f"""<h1>{text(s.method)} on {text(task["name"])}, seed {text(s.seed)}</h1>
<p>{text(METHODS[s.method][1])}. After {last["step"]} steps {text(headline)} is <strong>{text(last[headline])}</strong>
(best {text(best[headline])} at step {best["step"]}).
{last["trained"]:,} numbers were trained; adapted layers: {len(config["layers"])}.</p>
<pre>{text(config["command"])}</pre>
<h2>Figures</h2>
{chr(10).join(figure(os.path.join(out, name)) for name in names) or "<p>None were drawn.</p>"}
<h2>Metrics</h2>
<p>One row for each evaluation on the development set; the best {text(headline)} is bold.</p>
{metrics(history, headline)}
<h2>Settings of the method</h2>
{pairs({"method": s.method, **s.options})}
<h2>Settings of the run</h2>
{pairs(settings)}
<h2>Versions and fingerprints</h2>
{pairs({**config["versions"], **{key: config[key] for key in ("base", "tokenizer", "rows")}})}"""
    title = text(f"{s.method} on {task['name']}")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
    path = os.path.join(out, "report.html")
    write_text(path, page)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    return on_a_run("report", "writes RUN/report.html", write, argv)


if __name__ == "__main__":
    sys.exit(main())
