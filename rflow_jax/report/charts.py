"""The layout of line charts; ``page.html`` draws them as SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rflow_jax.report.curves import value

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One run's curve.

    Attributes:
        run: its index, for the colour.
        name: its name, for the label.
        values: one for each number of images; None where there is nothing to show.
    """

    run: int
    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Label:
    """A text and where it stands: over its middle, or right of a point if it is ``beside`` one."""

    x: int | float
    y: int | float
    text: str
    run: int = 0  # gives the colour of a curve's label
    beside: bool = False


@dataclass(frozen=True)
class Line:
    """A curve: the points that are marked, and the path through them."""

    run: int
    name: str
    points: tuple[Point, ...]
    path: str


@dataclass(frozen=True)
class Chart:
    """A drawing of ``width`` by ``height``; the plot lies between left, right, top and bottom.

    Attributes:
        summary: the chart in one sentence, for those who cannot see it.
        x_ticks, y_ticks: labels of the axes.
        labels: of the curves: values at the points for a single one, name and last value at the end of several.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    summary: str
    x_ticks: tuple[Label, ...]
    y_ticks: tuple[Label, ...]
    x_title: Label | None
    lines: tuple[Line, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Style:
    """The size of a chart and of what surrounds its plot."""

    width: int
    height: int
    left: int = 44
    right: int = 24
    top: int = 24
    bottom: int = 44
    ticks: int = 5
    named: int = 0  # letters of a run's name at the end of its curve
    line: int = 15  # between two labels


WIDE = Style(600, 348, named=18)
NARROW = Style(356, 276, named=11, ticks=4)
SMALL = Style(184, 146, left=36, right=42, top=10, bottom=22, ticks=4, line=12)


def ticks(values: Iterable[float], about: int, decides: bool = False) -> list[float]:
    """Round numbers, evenly spaced, the first at or below all values and the last at or above; at least two.

    Args:
        about: how many, roughly.
        decides: the values are shares, so that nothing lies outside 0 to 1.
    """
    values = list(values) or [0.0, 1.0]
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-6 * max(size, 1.0) else max(0.2 * size, 1e-3)
    raw = span / max(about - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    found = [round(k * step, 12) for k in range(first, last + 1)]
    inside = [tick for tick in found if 0 <= tick <= 1] if decides else found
    return inside if len(inside) > 1 else [0.0, 1.0]


def chart(
    title: str,
    numbers: Sequence[int],
    series: Sequence[Series],
    y_values: Sequence[float],
    style: Style,
    decides: bool = False,
) -> Chart:
    """Places the curves over the numbers of images, on a logarithmic axis, at the height of ``y_values``' axis."""
    several = len(series) > 1
    at_ends = several or not style.named
    room = 8 + 7 * (min(max(len(one.name) for one in series), style.named) + 6) if several and style.named else 0
    left, right, top, bottom = style.left, style.width - max(style.right, room), style.top, style.height - style.bottom
    inset = 20 if style.named else 5  # keeps marks and their labels off the axis
    levels = ticks(y_values, style.ticks, decides)
    digits = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9))
    span = math.log2(numbers[-1]) or 1.0

    def x(number: int) -> float:
        return round(left + inset + (right - left - 2 * inset) * math.log2(number) / span, 1)

    def y(level: float) -> float:
        return round(bottom - (bottom - top) * (level - levels[0]) / (levels[-1] - levels[0]), 1)

    lines = []
    for one in series:
        points = tuple((x(n), y(v)) for n, v in zip(numbers, one.values, strict=True) if v is not None)
        lines.append(Line(one.run, one.name, points, "M" + " L".join(f"{px},{py}" for px, py in points)))
    # The largest number need not be a power of two, and may then be close to one.
    kept = [n for n in numbers[:-1] if x(numbers[-1]) - x(n) > 28] if style.named else [numbers[0]][: len(numbers) - 1]
    kept.append(numbers[-1])
    labels = _at_ends(series, lines, style, decides) if at_ends else []
    if not at_ends:
        values = {n: v for n, v in zip(numbers, series[0].values, strict=True) if v is not None and n in kept}
        labels = [Label(x(n), y(v) - 10, value(v, decides), series[0].run) for n, v in values.items()]
    return Chart(
        width=style.width,
        height=style.height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        summary=_summary(title, numbers, series, decides),
        x_ticks=tuple(Label(x(n), bottom + 17, str(n)) for n in kept),
        y_ticks=tuple(
            Label(left - 8, y(level), f"{100 * level:g} %" if decides else f"{level:.{digits}f}") for level in levels
        ),
        x_title=Label((left + right) / 2, style.height - 4, "number of images") if style.named else None,
        lines=tuple(line for line in lines if line.points),
        labels=tuple(labels),
    )


def _at_ends(series: Sequence[Series], lines: Sequence[Line], style: Style, decides: bool) -> list[Label]:
    """Labels right of the curves' ends, pushed apart where they would touch."""
    labels = []
    for one, line in zip(series, lines, strict=True):
        if line.points:
            px, py = line.points[-1]
            name = one.name if len(one.name) <= style.named else one.name[: style.named - 1] + "…"
            name = f"{name} " if style.named else ""
            last = next(v for v in reversed(one.values) if v is not None)
            labels.append(Label(px + 8, py, name + value(last, decides), one.run, beside=True))
    labels.sort(key=lambda label: label.y)
    ys = _apart([label.y for label in labels], style.line)
    return [replace(label, y=y) for label, y in zip(labels, ys, strict=True)]


def _apart(ys: Sequence[int | float], gap: int) -> list[float]:
    """The rising numbers, moved as little as makes them ``gap`` apart: each crowd stays around its middle."""
    crowds: list[list[int | float]] = []
    for y in ys:
        crowds.append([y])
        while len(crowds) > 1 and _start(crowds[-1], gap) < _start(crowds[-2], gap) + gap * len(crowds[-2]):
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    return [round(_start(crowd, gap) + gap * k, 1) for crowd in crowds for k in range(len(crowd))]


def _start(crowd: Sequence[int | float], gap: int) -> float:
    return sum(crowd) / len(crowd) - gap * (len(crowd) - 1) / 2


def _summary(title: str, numbers: Sequence[int], series: Sequence[Series], decides: bool) -> str:
    parts = []
    for one in series:
        points = [f"{value(v, decides)} at {n}" for n, v in zip(numbers, one.values, strict=True) if v is not None]
        parts.append(f"{one.name}: {', '.join(points) or 'no score'}")
    return f"{title}. {'; '.join(parts)}."
