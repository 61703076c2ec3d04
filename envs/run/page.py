"""report.html: a run, or several, as one self-contained page. It needs no script and asks nobody for anything.

Everything that comes from a run, its name included, is escaped; whatever slipped through could load nothing, because
the page forbids it to itself (Content-Security-Policy).
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from envs.run.files import read_metrics

LARGEST = 16 * 2**20  # bytes of a figure
POINTS = 300  # of a curve, at most
# That can be told apart on white and on black
COLOURS = ("#2f7fd6", "#d9622b", "#1f9e77", "#c04f9b", "#b8860b", "#5aa9b8", "#8a6fd1", "#8a8a8a")
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # the second eight curves are dashed, and so on

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #5d6672; --back: #ffffff; --line: #d8dee4; --panel: #f5f7f9;
  --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --dim: #9aa4b0; --back: #14171b; --line: #363d46;
  --panel: #1e2329; --good: #5cc98f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.verdict { display: inline-block; font-weight: 700; border: 2px solid; border-radius: .4rem; padding: .3rem .7rem; }
.passed { color: var(--good); } .failed { color: var(--bad); } .open { color: var(--dim); }
ul { padding-left: 1.2rem; } ul.criteria { list-style: none; padding: 0; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); max-width: 42vw;
  white-space: normal; min-width: 8rem; }
thead th, thead th:first-child { background: var(--panel); white-space: normal; vertical-align: bottom; }
thead th { min-width: 6.5rem; } tbody tr:last-child td { border-bottom: 0; }
table.facts td { text-align: left; white-space: normal; } table.facts td:first-child { white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; color: var(--dim); }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; display: block; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } .key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; }
.key svg { display: inline; width: 2rem; height: .8rem; margin-right: .3rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value) -> str:
    """`value` as text of a page."""
    return html.escape(str(value))


def page(title: str, *parts: str) -> str:
    """A whole page of these parts, which are HTML already; `title` is text."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{text(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def table(header: Sequence[str], body: Iterable[Sequence]) -> str:
    """A table that scrolls sideways where the screen is narrow; its first column stays."""
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    rows = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def facts(values: Mapping) -> str:
    """Names and values, one pair a line."""
    rows = "\n".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in values.items())
    return f'<div class="wide"><table class="facts"><tbody>\n{rows}\n</tbody></table></div>'


def verdict(words: str, passed: bool | None) -> str:
    """The verdict as a badge; `passed` is None where there is none."""
    kind = {True: "passed", False: "failed", None: "open"}[passed]
    return f'<p class="verdict {kind}">{text(words)}</p>'


def folded(title: str, *parts: str, opened: bool = False) -> str:
    """Parts under a title that unfolds them."""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def figures(folder: Path) -> str:
    """The figures of a run folder. Links are left out: what they point to is not the run's."""
    found = []
    for path in sorted(folder.glob("*.png")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            continue
        data = path.read_bytes()
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            name = text(path.stem.replace("_", " "))
            source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            found.append(f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>')
    return "\n".join(found)


def run_parts(folder: Path, args: Mapping, origin: Sequence[Mapping]) -> list[str]:
    """What a page has of every run beside its benchmark: figures, learning curves, arguments, and where it was made.

    Args:
        folder: with the run's figures and its metrics.csv.
        args: the flags of the run.
        origin: `envs.run.provenance.provenance` of each command that had a part in the run.
    """
    curve = read_metrics(folder / "metrics.csv")
    return [
        "<h2>Figures</h2>" if any(folder.glob("*.png")) else "",
        figures(folder),
        "<h2>Learning curves</h2>" + curves({"this run": curve}) if curve else "",
        "<h2>Where it was made</h2>",
        *(facts(entry) for entry in origin),
        folded("Arguments", facts(args)),
    ]


# LEARNING CURVES


def curves(runs: Mapping[str, list[dict]]) -> str:
    """Every metric of these runs over environment steps, one chart each: label → rows of its metrics.csv."""
    names = dict.fromkeys(name for rows in runs.values() for row in rows for name in row)
    names = [name for name in names if name != "global_step"]
    keys = [f"<span>{_line_sample(i)}{text(label)}</span>" for i, label in enumerate(runs)]
    parts = ['<div class="key">' + "".join(keys) + "</div>"] if len(runs) > 1 else []
    for group, own in groupby(sorted(names, key=_group), key=_group):
        charts = [_chart(name, runs) for name in own]
        grid = '<div class="grid">' + "\n".join(chart for chart in charts if chart) + "</div>"
        parts.append(grid if group == "charts" else folded(group, grid))
    return "\n".join(parts)


def _group(name: str) -> str:
    return name.split("/")[0]


def _stroke(i: int) -> str:
    dash = DASHES[i // len(COLOURS) % len(DASHES)]
    return f'fill="none" stroke-width="1.6" stroke="{COLOURS[i % len(COLOURS)]}" stroke-dasharray="{dash}"'


def _line_sample(i: int) -> str:
    return f'<svg viewBox="0 0 32 12"><path d="M0 6H32" {_stroke(i)}/></svg>'


WIDTH, HEIGHT = 340, 190  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 52, 330, 10, 160  # of its axes


def _chart(name: str, runs: Mapping[str, list[dict]]) -> str:
    """One metric of all runs that have it, as SVG; empty if it is nowhere finite.

    The vertical axis is that of the last four fifths of the training: early values can be far away from all others.
    """
    lines = {}
    for i, rows in enumerate(runs.values()):
        points = [(row["global_step"], row[name]) for row in rows if name in row and "global_step" in row]
        points = [point for point in points if all(map(math.isfinite, point))]
        if points:
            every = -(-len(points) // POINTS)
            lines[i] = points[::every] if (len(points) - 1) % every == 0 else [*points[::every], points[-1]]
    if not lines:
        return ""
    last = max(x for points in lines.values() for x, _ in points)
    late = [y for points in lines.values() for x, y in points if x >= 0.2 * points[-1][0]]
    everything = [y for points in lines.values() for _, y in points]
    margin = 0.15 * (max(late) - min(late))
    low = max(min(everything), min(late) - margin)
    high = min(max(everything), max(late) + margin)
    if not low < high:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * x / (last or 1.0)

    def up(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * max(-9.0, min(9.0, (y - low) / (high - low)))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(name)}">']
    for tick in _ticks(low, high):
        parts.append(f'<path class="axis" d="M{LEFT} {up(tick):.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in _ticks(0.0, last / 1e6):
        parts.append(f'<text x="{across(1e6 * tick):.1f}" y="{BOTTOM + 15}" text-anchor="middle">{tick:.4g}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">million steps</text>')
    # An inner svg cuts off what is beyond the axes
    parts.append(f'<svg x="{LEFT}" y="{TOP - 2}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP + 4}" ')
    parts.append(f'viewBox="{LEFT} {TOP - 2} {RIGHT - LEFT} {BOTTOM - TOP + 4}">')
    labels = list(runs)
    for i, points in lines.items():
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        what = f"{labels[i]}: {points[-1][1]:.6g} at the end"
        parts.append(f'<polyline points="{path}" {_stroke(i)}><title>{text(what)}</title></polyline>')
    parts.append("</svg></svg>")
    return f"<figure>{''.join(parts)}<figcaption>{text(name)}</figcaption></figure>"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, three to six of them."""
    if not low < high:
        return [low]
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(step * share for share in (1.0, 0.5, 0.2) if (high - low) / (step * share) >= 2.5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
