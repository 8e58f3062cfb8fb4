"""What optimisation did to a file, as one HTML page that needs nothing else: no network, no script.

Invariants: everything that comes out of a file or from a person is escaped; it reads in the light and in
the dark; bars are inline SVG with their numbers beside them as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from edgeward_models import machine
from edgeward_models.fusions import Fusion
from edgeward_models.optimise import AFTER, BEFORE, UNOPTIMISED, OptimiseReport
from edgeward_models.race import Timing
from edgeward_runtime.plans import TIE

_MOST_OPERATORS = 24
_WIDTH = 360
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5b6675; --line: #d9dee5; --ground: #fff;
  --card: #f5f7fa; --before: #9aa7b8; --after: #2563a8; --bad: #b3261e; --good: #1e7a46; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #98a3b3; --line: #323a46;
  --ground: #14181e; --card: #1c222b; --before: #66748a; --after: #6ea8e6; --bad: #ff8a80;
  --good: #6fcf97; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .6rem; }
p { margin: .4rem 0; } .dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .75rem .9rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .85rem; display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
.note { border-left: 3px solid var(--bad); background: var(--card); padding: .6rem .9rem; margin: .75rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: middle; }
th { color: var(--dim); font-weight: 600; font-size: .85rem; }
.n { text-align: right; white-space: nowrap; }
code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; } .b { fill: var(--before); } .a { fill: var(--after); }
.key i { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin: 0 .35rem 0 1rem;
  background: var(--before); } .key i.a { background: var(--after); } .key i:first-child { margin-left: 0; }
"""


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure: what it is, its value, what stood there before."""

    what: str
    value: str
    was: str
    mood: str = ""
    """good, bad or nothing."""


def page(report: OptimiseReport) -> str:
    """The whole page."""
    name = escape(report.model.name)
    parts = [
        f"<h1>{name}, optimised at level {report.level}</h1>",
        f'<p class="dim">{escape(report.out.name)} · treated as a {report.kind} · compared on'
        f" {escape(report.inputs)}</p>",
        _tiles(tiles(report)),
        *(f'<p class="note">{escape(note)}</p>' for note in _notes(report)),
        _section("Fusions", _fusions(report)),
        _section("Operators", _operators(report)),
        *([_section("Latency", _latency(report))] if report.timings else []),
        _section("Outputs, before and after", _outputs(report)),
        _section("Measured on", _table(("", ""), machine.lines(report.machine))),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: optimised</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _notes(report: OptimiseReport) -> list[str]:
    if not report.fault:
        return list(report.notes)
    return [f"It does not load as a device loads it: {report.fault} Do not use it.", *report.notes]


def tiles(report: OptimiseReport) -> list[Tile]:
    """The figures at the top, for the page and for the terminal."""
    before, after = report.before, report.after
    bound = "≥ " if after.peak.unknown or before.peak.unknown else ""
    found = [
        Tile("nodes", str(after.nodes), f"{before.nodes} before{_change(after.nodes, before.nodes)}"),
        Tile("file", size(after.bytes), f"{size(before.bytes)} before{_change(after.bytes, before.bytes)}"),
        Tile("parameters", count(after.parameters), f"{count(before.parameters)} before"),
        Tile(
            "peak of activations",
            bound + size(after.peak.bytes),
            f"{bound}{size(before.peak.bytes)} before{_change(after.peak.bytes, before.peak.bytes)}",
        ),
        Tile("constants folded", str(report.folded), "nodes whose result never changes"),
    ]
    timing = report.timed.get(AFTER)
    if timing is not None and timing.ratio is not None and timing.interval is not None:
        low, high = timing.interval
        mood = "good" if high < 1 / TIE else "bad" if low > TIE else ""
        found.append(Tile("latency", f"{timing.ratio:.3f} ×", f"of before ({low:.3f} to {high:.3f})", mood))
    worst = max(report.differences, key=lambda d: d.worst, default=None)
    if worst is not None:
        told = f"worst element off by {number(worst.worst)}"
        found.append(
            Tile("outputs", "the same" if report.same else "differ", told, "good" if report.same else "bad")
        )
    return found


def size(amount: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= step:
            return f"{amount / step:.{1 if amount >= 10 * step else 2}f} {unit}"
    return f"{amount:.0f} B"


def count(amount: float) -> str:
    """A large count for people."""
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= step:
            return f"{amount / step:.2f} {unit}"
    return f"{amount:.0f}"


def number(value: float) -> str:
    """A small number for people."""
    if not math.isfinite(value):
        return "infinitely much"
    return "0" if value == 0 else f"{value:.2g}"


def fusion_rows(report: OptimiseReport) -> list[tuple[str, str, str, str]]:
    """(what was fused, how often, what stands there now, when): in the file, then by the runtime at load."""

    def rows(found: Iterable[Fusion], when: str) -> list[tuple[str, str, str, str]]:
        return [(fusion.name, str(fusion.count), fusion.left, when) for fusion in found]

    return rows(report.fusions, "in the file") + rows(report.at_load, "by ONNX Runtime, at load")


def at_load_line(report: OptimiseReport) -> str:
    """What optimisation at load does for the original, by its own paired ratio."""
    timing = report.timed.get(UNOPTIMISED)
    if timing is None or timing.ratio is None:
        return ""
    share = 100 / timing.ratio
    return f"Optimised at load, the original takes {share:.0f} % of the time that it takes as written."


def could_rows(report: OptimiseReport) -> list[tuple[str, str]]:
    """What the original graph holds that can be fused, as (pattern, how often)."""
    could = report.could
    named = {
        "Conv + BatchNormalization": could.conv_bn,
        "Conv + activation": could.conv_activation,
        "attention": could.attention,
        "LayerNorm": could.layer_norm,
        "GELU": could.gelu,
    }
    return [(name, str(amount)) for name, amount in named.items() if amount]


# --- sections


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _tiles(found: Sequence[Tile]) -> str:
    cells = (
        f'<div class="tile"><span>{escape(tile.what)}</span><b class="{tile.mood}">{escape(tile.value)}</b>'
        f"<span>{escape(tile.was)}</span></div>"
        for tile in found
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _fusions(report: OptimiseReport) -> str:
    rows, could = fusion_rows(report), could_rows(report)
    there = ", ".join(f"{amount} × {name}" for name, amount in could)
    lead = f"<p>The original holds {escape(there)}.</p>" if there else "<p>Nothing that is usually fused.</p>"
    if not rows:
        return f'{lead}<p class="dim">Nothing was fused, and nothing is at load.</p>'
    return lead + _table(("what", "how often", "now", "where"), rows, right={1})


def _operators(report: OptimiseReport) -> str:
    before, after = report.before.operators, report.after.operators
    names = sorted(before.keys() | after.keys(), key=lambda n: (-max(before.get(n, 0), after.get(n, 0)), n))
    most = max([*before.values(), *after.values()], default=1)
    counts = [(name, before.get(name, 0), after.get(name, 0)) for name in names[:_MOST_OPERATORS]]
    rows = (
        f'<tr><td><code>{escape(name)}</code></td><td class="n">{had}</td><td class="n">{has}</td>'
        f"<td>{_pair(had, has, most)}</td></tr>"
        for name, had, has in counts
    )
    more = len(names) - _MOST_OPERATORS
    rest = f'<p class="dim">and {more} more operators</p>' if more > 0 else ""
    return (
        '<p class="key dim"><i></i>before<i class="a"></i>after</p><div class="wide"><table>'
        '<tr><th>operator</th><th class="n">before</th><th class="n">after</th><th></th></tr>'
        f"{''.join(rows)}</table></div>{rest}"
    )


def _latency(report: OptimiseReport) -> str:
    shown = [report.timed[name] for name in (UNOPTIMISED, BEFORE, AFTER) if name in report.timed]
    most = max((timing.p99_ms or 0.0 for timing in shown), default=0.0) or 1.0
    rows = "".join(_timing(timing, most) for timing in shown)
    threads = "One thread" if report.threads == 1 else f"{report.threads} threads"
    return (
        f'<p class="dim">{threads}, in turn, {shown[0].runs} runs each; bar to p50, line to p99.'
        " “As written” has all optimisation off; the other two are loaded as a device loads them,"
        f" which optimises them once more.</p><p>{escape(at_load_line(report))}</p>"
        '<div class="wide"><table>'
        '<tr><th></th><th class="n">p50</th><th class="n">p90</th><th class="n">p99</th>'
        f'<th class="n">ratio</th><th></th></tr>{rows}</table></div>'
    )


def _timing(timing: Timing, most: float) -> str:
    if timing.p50_ms is None or timing.p90_ms is None or timing.p99_ms is None:
        return f'<tr><td>{escape(timing.name)}</td><td colspan="5">{escape(timing.reason)}</td></tr>'
    ratio = "" if timing.ratio is None else f"{timing.ratio:.3f}"
    figures = "".join(
        f'<td class="n">{value:.3g} ms</td>' for value in (timing.p50_ms, timing.p90_ms, timing.p99_ms)
    )
    kind = "a" if timing.name == AFTER else "b"
    half, end = (_WIDTH * value / most for value in (timing.p50_ms, timing.p99_ms))
    bar = (
        f'<svg width="{_WIDTH}" height="14" role="img" aria-label="p50 {timing.p50_ms:.3g} ms">'
        f'<rect class="{kind}" width="{half:.1f}" height="12" rx="2"/>'
        f'<rect class="{kind}" x="{half:.1f}" y="5" width="{max(0.0, end - half):.1f}" height="2"/></svg>'
    )
    return f'<tr><td>{escape(timing.name)}</td>{figures}<td class="n">{ratio}</td><td>{bar}</td></tr>'


def _outputs(report: OptimiseReport) -> str:
    rows = [
        (
            d.output,
            number(d.worst),
            "" if not d.worst else f"[{', '.join(map(str, d.where))}]",
            f"{d.largest:.4g}",
            f"{d.cosine:.7f}",
        )
        for d in report.differences
    ]
    verdict = (
        f"Every output has a cosine of at least {report.gate} with the original's."
        if report.same
        else f"They differ: a cosine of at least {report.gate} is asked for. Do not use the file."
    )
    heads = ("output", "worst element off by", "at", "largest element", "cosine")
    return f"<p>{escape(verdict)}</p>" + _table(heads, rows, right={1, 3, 4})


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    numeric = set(right)

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="n"' if k in numeric else "" for k in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _pair(before: int, after: int, most: int) -> str:
    bars = "".join(
        f'<rect class="{kind}" y="{y}" width="{_WIDTH * amount / most:.1f}" height="7" rx="1.5"/>'
        for kind, y, amount in (("b", 0, before), ("a", 8, after))
        if amount
    )
    return f'<svg width="{_WIDTH}" height="16" aria-hidden="true">{bars}</svg>'


def _change(after: float, before: float) -> str:
    percent = round(100 * (after - before) / before) if before else 0
    return f" ({percent:+d}\u00a0%)".replace("-", "−") if percent else ""
