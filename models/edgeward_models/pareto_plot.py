"""Accuracy against latency as an SVG picture, readable without a script, a font or a library. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Kind = Literal["chosen", "front", "other", "excluded"]

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 62, 56
_TITLE = 96
_STYLES: dict[Kind, tuple[str, float]] = {
    "excluded": ("#b8b8b8", 3.5),
    "other": ("#7f9fbf", 4.0),
    "front": ("#1f5f9f", 5.0),
    "chosen": ("#c0392b", 7.0),
}


@dataclass(frozen=True)
class Dot:
    """One candidate."""

    ratio: float
    """Latency over FP32's."""
    sqnr_db: float
    kind: Kind
    title: str


def draw(dots: Sequence[Dot], title: str) -> str:
    """The picture. FP32 is the line at a ratio of 1; nothing is drawn outside of the frame."""
    most = max([1.05, *(min(dot.ratio, 1.5) for dot in dots)]) * 1.02
    ratios = _ticks(min([0.9, *(dot.ratio for dot in dots)]) * 0.95, most)
    levels = _ticks(
        min([0.0, *(dot.sqnr_db for dot in dots)]), max([20.0, *(dot.sqnr_db for dot in dots)]) + 2
    )
    frame = _Frame(ratios[0], max(ratios[-1], most), levels[0], levels[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title[:_TITLE])}</text>',
        *_grid(frame, ratios, levels),
        *_front(frame, dots),
        *(_dot(frame, dot) for kind in _STYLES for dot in dots if dot.kind == kind),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class _Frame:
    low: float
    high: float
    bottom: float
    top: float

    def x(self, ratio: float) -> float:
        share = (min(ratio, self.high) - self.low) / (self.high - self.low)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, level: float) -> float:
        share = (level - self.bottom) / (self.top - self.bottom)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers that span the range."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _grid(frame: _Frame, ratios: Sequence[float], levels: Sequence[float]) -> list[str]:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for ratio in ratios:
        if ratio <= frame.high:
            x = frame.x(ratio)
            parts.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{floor}" stroke="#e5e5e5"/>')
            parts.append(f'<text x="{x}" y="{floor + 18}" text-anchor="middle">{ratio:g}</text>')
    for level in levels:
        y = frame.y(level)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{level:g}</text>')
    x = frame.x(1.0)
    parts.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{floor}" stroke="#444" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{x - 6}" y="{_TOP + 14}" text-anchor="end" fill="#444">FP32</text>')
    middle, centre = (_TOP + floor) / 2, (_LEFT + right) / 2
    parts.append(
        f'<text x="{centre}" y="{floor + 40}" text-anchor="middle">latency / FP32, less is faster</text>'
    )
    turned = f'text-anchor="middle" transform="rotate(-90 18 {middle})"'
    parts.append(f'<text x="18" y="{middle}" {turned}>SQNR in dB</text>')
    return parts


def _front(frame: _Frame, dots: Sequence[Dot]) -> list[str]:
    """A staircase: what is on or below it is beaten."""
    members = sorted((dot for dot in dots if dot.kind in ("front", "chosen")), key=lambda dot: dot.ratio)
    steps: list[str] = []
    for before, dot in zip([None, *members], members, strict=False):
        if before is not None:
            steps.append(f"{frame.x(dot.ratio)},{frame.y(before.sqnr_db)}")
        steps.append(f"{frame.x(dot.ratio)},{frame.y(dot.sqnr_db)}")
    return (
        [f'<polyline points="{" ".join(steps)}" fill="none" stroke="#1f5f9f" stroke-opacity="0.5"/>']
        if steps
        else []
    )


def _dot(frame: _Frame, dot: Dot) -> str:
    colour, radius = _STYLES[dot.kind]
    label = f"{dot.title}: {dot.sqnr_db:.1f} dB, {dot.ratio:.3f}"
    return (
        f'<circle cx="{frame.x(dot.ratio)}" cy="{frame.y(dot.sqnr_db)}" r="{radius}" fill="{colour}">'
        f"<title>{escape(label)}</title></circle>"
    )


def _legend() -> list[str]:
    parts = []
    for k, (kind, (colour, radius)) in enumerate(reversed(_STYLES.items())):
        x = _LEFT + 8 + 90 * k
        parts.append(f'<circle cx="{x}" cy="44" r="{radius}" fill="{colour}"/>')
        parts.append(f'<text x="{x + 12}" y="48">{kind}</text>')
    return parts
