"""A stacked bar chart as SVG, with nothing but the standard library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from html import escape
from math import ceil, floor, log10

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 84, 32, 112, 56
INK, FAINT, GRID = "#1f2933", "#6b7680", "#e4e7eb"
FONT = 'font-family="system-ui, sans-serif" font-size="14"'
GRID_LINES = 5


@dataclass(frozen=True)
class Scale:
    """From amounts to pixels: `step` from one grid line to the next, `first` and `last` of them."""

    first: float
    last: float
    step: float

    @classmethod
    def around(cls, least: float, most: float) -> Scale:
        """Round steps (1, 2, 2.5 or 5 times a power of ten) that hold everything, and zero."""
        raw = ((most - least) or 1) / GRID_LINES
        power = 10 ** floor(log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
        return cls(floor(least / step) * step, ceil(most / step) * step, step)

    def y(self, amount: float) -> float:
        height = HEIGHT - TOP - BOTTOM
        return TOP + height * (self.last - amount) / (self.last - self.first)

    def lines(self) -> Iterator[float]:
        for i in range(round((self.last - self.first) / self.step) + 1):
            yield self.first + i * self.step


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """One bar for each month (`2025-03`), stacked from its parts; what is negative hangs below zero."""
    parts = list(next(iter(bars.values())))
    colours = {part: COLOURS[i % len(COLOURS)] for i, part in enumerate(parts)}
    tops = [sum(amount for amount in bar.values() if amount > 0) for bar in bars.values()]
    bottoms = [sum(amount for amount in bar.values() if amount < 0) for bar in bars.values()]
    scale = Scale.around(min(*bottoms, 0), max(*tops, 0))
    slot = (WIDTH - LEFT - RIGHT) / len(bars)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT} role="img">',
        f"<title>{escape(title)}: revenue by month and region</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 44, title, font_size=24, font_weight=600),
        *legend(colours),
        *grid(scale),
    ]
    for i, (month, bar) in enumerate(bars.items()):
        lines += column(LEFT + i * slot, slot, bar, colours, scale)
        lines.append(
            text(LEFT + (i + 0.5) * slot, HEIGHT - BOTTOM + 26, label(month, i), text_anchor="middle", fill=FAINT)
        )
    zero = scale.y(0)
    lines += [f'<path d="M{LEFT} {zero:.1f}H{WIDTH - RIGHT}" stroke="{INK}"/>', "</svg>"]
    return "\n".join(lines) + "\n"


def column(x: float, slot: float, bar: Mapping[str, float], colours: Mapping[str, str], scale: Scale) -> Iterator[str]:
    width = min(slot * 0.68, 96)
    left = x + (slot - width) / 2
    up = down = 0.0
    for part, amount in bar.items():
        if amount == 0:
            continue
        # What is positive grows upwards from zero, what is negative downwards.
        start = up if amount > 0 else down
        end = start + amount
        up, down = (end, down) if amount > 0 else (up, end)
        top, height = scale.y(max(start, end)), abs(scale.y(start) - scale.y(end))
        yield (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colours[part]}"'
            f' stroke="#ffffff"><title>{escape(part)}: {amount:,.2f}</title></rect>'
        )
    yield text(x + slot / 2, scale.y(up) - 8, f"{sum(bar.values()):,.0f}", text_anchor="middle", font_size=12)


def legend(colours: Mapping[str, str]) -> Iterator[str]:
    x = float(LEFT)
    for part, colour in colours.items():
        yield f'<rect x="{x:.1f}" y="62" width="14" height="14" rx="3" fill="{colour}"/>'
        yield text(x + 22, 74, part, fill=FAINT)
        # No font's measures are known here; 8 pixels a letter is enough for most.
        x += 52 + 8 * len(part)


def grid(scale: Scale) -> Iterator[str]:
    for amount in scale.lines():
        y = scale.y(amount)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>'
        yield text(LEFT - 12, y + 5, f"{amount:,.10g}", text_anchor="end", fill=FAINT)


def label(month: str, position: int) -> str:
    """`Mar`; with the year where a reader needs it."""
    day = date.fromisoformat(f"{month}-01")
    return f"{day:%b %Y}" if position == 0 or day.month == 1 else f"{day:%b}"


def text(x: float, y: float, words: str, **style: str | int) -> str:
    """One line of text; `style` holds SVG attributes, `_` for `-`."""
    attributes = {"fill": INK, **style}
    styled = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{styled}>{escape(words)}</text>'
