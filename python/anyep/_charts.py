"""How the pictures of anyep.plot look: panels of curves over tokens, and bars of load. matplotlib is imported here, and only
when something is drawn; its global state is left as it is."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import textwrap
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from .errors import ArgumentError

# Okabe and Ito's colours, told apart with every common kind of colour blindness; black and greys are for peers and limits.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
PEER_COLOURS = ("#444444", "#757575")
PEER_DASHES = ((0, (4, 2)), (0, (7, 1.5, 1.5, 1.5)), (0, (1.5, 1.5)))
PEER_MARKERS = ("x", "+", "1", "2")
LIMIT_COLOUR = "#000000"

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "svg.fonttype": "none",  # text stays text: small files, searchable
    "svg.hashsalt": "anyep",  # equal input gives equal files
}
LABEL_SIZE = 8
PANEL = (3.1, 2.6)  # inches
LOG_FROM = 8  # an axis is logarithmic if its values span at least this factor


class Series:
    """One curve: points (tokens, value, value at p99 or None), and whose it is: "ours", "peer" or "limit"."""

    def __init__(self, name: str, role: str) -> None:
        self.name, self.role = name, role
        self._points: Dict[int, Tuple[float, Optional[float]]] = {}

    def add(self, tokens: int, value: float, p99: Optional[float]) -> None:
        self._points[tokens] = (value, p99)

    def columns(self) -> Tuple[List[int], List[float], List[float]]:
        """tokens ascending, values, values at p99 (the value itself where there is none)."""
        rows = sorted(self._points.items())
        return ([tokens for tokens, _ in rows], [value for _, (value, _) in rows],
                [value if p99 is None else p99 for _, (value, p99) in rows])


Panel = Tuple[str, List[Series]]


def draw_curves(grid: Sequence[Sequence[Optional[Panel]]], lines: Sequence[str], what: str,
                out: Union[str, pathlib.Path]) -> List[pathlib.Path]:
    """A figure of panels with common axes. `what` is "time" (values in us) or "rate" (GB/s); `lines` are the title and what
    stands under it."""
    paths = _paths(out)
    with _style() as matplotlib:
        rows, columns = len(grid), max(len(row) for row in grid)
        panels = [panel for row in grid for panel in row]
        drawn = [series for panel in panels if panel for series in panel[1]]
        # Inches. Beside every panel its curves are named: room for the longest name and a value of eight characters.
        names = 0.25 + 0.064 * (8 + max(len(series.name) for series in drawn))
        width = 0.95 + columns * PANEL[0] + (columns - 1) * (names + 0.3) + names
        lines = _wrapped(lines, width)
        head = 0.6 + 0.2 * len(lines)
        height = head + rows * PANEL[1] + (rows - 1) * 0.75 + 0.6
        figure = matplotlib.figure.Figure(figsize=(width, height))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        figure.subplots_adjust(left=0.95 / width, right=1 - names / width, top=1 - head / height, bottom=0.6 / height,
                               wspace=(names + 0.3) / PANEL[0], hspace=0.75 / PANEL[1])
        unit = _scale_axes(axes, drawn, what)
        styles = _styles(drawn)
        for number, (axis, panel) in enumerate(zip(axes.flat, panels)):
            if panel is None:
                axis.set_visible(False)
                continue
            _draw_panel(axis, panel, styles, (number, unit))
        _label_axes(axes, f"time per call, {unit[1]}" if what == "time" else "wire rate, GB/s")
        _titles(figure, lines)
        return _save(figure, paths, lines[0])


def _scale_axes(axes: Any, drawn: Sequence[Series], what: str) -> Tuple[float, str]:
    """Sets scales and limits of all panels. Returns the unit: what divides a value, and its name."""
    tokens = sorted({t for series in drawn for t in series.columns()[0]})
    curves = [series.columns() for series in drawn if series.role != "limit"]
    values = [v for _, medians, p99s in curves for v in (*medians, *p99s) if v > 0]
    limits = [v for series in drawn if series.role == "limit" for v in series.columns()[1]]
    # A floor of few bytes lies decades below what any call takes: it may leave the panel.
    values += [max(v, min(values) / 3) for v in limits]
    unit = (1000.0, "ms") if what == "time" and min(values) >= 1000 else (1.0, "µs" if what == "time" else "GB/s")
    axis = axes[0][0]  # the others share
    if tokens[-1] >= LOG_FROM / 2 * max(tokens[0], 1) and tokens[0] > 0:
        axis.set_xscale("log", base=2)
        axis.set_xlim(tokens[0] / 1.25, tokens[-1] * 1.25)
    step = -(-len(tokens) // 6)  # labels of more than six would touch; the largest is among them
    shown = tokens[::-1][::step]
    axis.set_xticks(shown, [f"{t:,}" if t < 10000 or t % 1024 else f"{t // 1024}k" for t in shown])
    axis.set_xticks([], minor=True)
    if max(values) >= LOG_FROM * min(values) and what == "time":
        axis.set_yscale("log")
        axis.set_ylim(min(values) / unit[0] / 1.25, max(values) / unit[0] * 1.15)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        if max(values) < 100 * min(values):  # at most two decades: a mark at each power of ten would be too few
            axis.yaxis.set_major_locator(_log_locator())
        axis.yaxis.set_minor_formatter(lambda value, _: "")
    else:  # rates start at zero: lengths compare
        axis.set_ylim(0, max(values) / unit[0] * 1.08)
    return unit


def _label_axes(axes: Any, quantity: str) -> None:
    """Names the axes at the left and lower rim; where a panel is missing there, its neighbour is the rim."""
    for row in axes:
        first = next((axis for axis in row if axis.get_visible()), None)
        if first is not None:
            first.set_ylabel(quantity)
            first.tick_params(labelleft=True)
    for column in axes.T:
        last = next((axis for axis in column[::-1] if axis.get_visible()), None)
        if last is not None:
            last.set_xlabel("tokens per rank")
            last.tick_params(labelbottom=True)


def _log_locator() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))


def _styles(drawn: Sequence[Series]) -> Dict[Tuple[str, str], Dict[str, Any]]:
    """One look for each name, the same in all panels."""
    styles: Dict[Tuple[str, str], Dict[str, Any]] = {}
    for role in ("ours", "peer", "limit"):
        names = sorted({series.name for series in drawn if series.role == role})
        for i, name in enumerate(names):
            if role == "ours":
                look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
                        "linestyle": "-" if i < len(COLOURS) else "-.", "linewidth": 1.8, "markersize": 5}
            elif role == "peer":
                look = {"color": PEER_COLOURS[i % 2], "marker": PEER_MARKERS[i % 4], "linestyle": PEER_DASHES[i // 2 % 3],
                        "linewidth": 1.3, "markersize": 5}
            else:
                look = {"color": LIMIT_COLOUR, "linestyle": ":", "linewidth": 1.4,
                        "marker": "_" if i == 0 else ".", "markersize": 5}
            styles[role, name] = look
    return styles


def _draw_panel(axis: Any, panel: Panel, styles: Dict[Tuple[str, str], Dict[str, Any]], which: Tuple[int, Any]) -> None:
    number, (divisor, unit) = which
    title, curves = panel
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ends = []
    for i, series in enumerate(curves):
        look = styles[series.role, series.name]
        tokens, values, p99 = series.columns()
        values = [value / divisor for value in values]
        p99 = [value / divisor for value in p99]
        name = re.sub(r"[^a-z0-9]+", "-", series.name.lower()).strip("-")
        axis.plot(tokens, values, gid=f"series-{number}-{i}-{series.role}-{name}", zorder=3, **look)
        if values != p99:
            alpha = 0.13 if series.role == "ours" else 0.05
            if len(tokens) == 1:  # a band over one point is a bar
                axis.vlines(tokens, values, p99, color=look["color"], alpha=2 * alpha, linewidth=4, gid=f"band-{number}-{i}")
            else:
                axis.fill_between(tokens, values, p99, color=look["color"], alpha=alpha, linewidth=0, zorder=2,
                                  gid=f"band-{number}-{i}")
        ends.append((tokens[-1], values[-1], f"{series.name}  {_short(values[-1])}", look["color"]))
    _label_ends(axis, ends)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _label_ends(axis: Any, ends: Sequence[Tuple[float, float, str, str]]) -> None:
    """Names curves beside their last points, moved apart where they would overlap."""
    to_axes = axis.transData + axis.transAxes.inverted()
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    heights = [to_axes.transform((ends[i][0], ends[i][1]))[1] for i in order]
    inches = axis.get_window_extent().height / axis.figure.dpi
    gap = (LABEL_SIZE + 2.5) / 72 / inches
    for i, height in zip(order, spread(heights, gap, 0.0, 1.0)):
        x, y, text, colour = ends[i]
        axis.annotate(text, xy=(x, y), xytext=(1.045, height), textcoords="axes fraction", fontsize=LABEL_SIZE, color=colour,
                      va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1,
                                  "shrinkB": 4})


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> List[float]:
    """Moves ascending heights apart to at least `gap`, inside low..high as far as there is room, order kept."""
    moved: List[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap if moved else low))
    limit = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


class Load:
    """What draw_load draws: choices of every expert; the first expert of every rank, then their number; choices and rows of
    every rank."""

    def __init__(self, per_expert: Sequence[int], starts: Sequence[int], pairs: Sequence[int], rows: Sequence[int]) -> None:
        self.per_expert, self.starts, self.pairs, self.rows = list(per_expert), list(starts), list(pairs), list(rows)


def draw_load(load: Load, title: str, out: Union[str, pathlib.Path]) -> List[pathlib.Path]:
    """Two panels: choices per expert, coloured in turn by rank; choices and rows per rank."""
    paths = _paths(out)
    with _style() as matplotlib:
        num_ranks = len(load.pairs)
        height = 4.6 if num_ranks <= 6 else min(1.9 + 0.42 * num_ranks, 7.0)
        figure = matplotlib.figure.Figure(figsize=(11.5, height))
        experts, ranks = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.7, 1)})
        figure.subplots_adjust(left=0.075, right=0.945, top=1 - 1.2 / height, bottom=0.55 / height, wspace=0.22)
        _draw_experts(experts, load)
        _draw_ranks(ranks, load)
        _titles(figure, [title, "A choice is a (token, expert) pair; a row is a token at a rank, however many of its experts "
                                "live there."])
        return _save(figure, paths, title)


def _draw_experts(axis: Any, load: Load) -> None:
    counts, starts = load.per_expert, load.starts
    num_experts, most = len(counts), max(counts)
    mean = sum(counts) / num_experts
    colours = [COLOURS[0], COLOURS[5]]
    for rank, (begin, end) in enumerate(zip(starts, starts[1:])):
        if begin == end:  # a rank without experts
            continue
        axis.bar(range(begin, end), counts[begin:end], width=1.0 if num_experts > 32 else 0.85, color=colours[rank % 2],
                 gid=f"experts-of-rank-{rank}", linewidth=0)
        if len(starts) <= 17:
            axis.text((begin + end - 1) / 2, 1.01, f"rank {rank}" if len(starts) <= 9 else str(rank), ha="center", va="bottom",
                      fontsize=LABEL_SIZE, color=colours[0], transform=axis.get_xaxis_transform())
        if begin and len(starts) <= 17:
            axis.axvline(begin - 0.5, color="#bbbbbb", linewidth=0.6, zorder=0)
    axis.set_xlim(-0.5, num_experts - 0.5)
    axis.set_ylim(0, max(most, 1) * 1.14)
    axis.axhline(mean, color=LIMIT_COLOUR, linestyle=":", linewidth=1.4)
    axis.annotate(f"mean\n{_short(mean)}", xy=(1.008, mean), xycoords=axis.get_yaxis_transform(), fontsize=LABEL_SIZE,
                  va="center", annotation_clip=False)
    if most:
        peak = counts.index(most)
        right = peak > num_experts / 2  # the text goes to the side with more room
        axis.annotate(f"expert {peak}: {most:,} = {most / mean:.2f} x mean", xy=(peak, most), fontsize=LABEL_SIZE,
                      xytext=(-4 if right else 4, 5), textcoords="offset points", ha="right" if right else "left",
                      fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.set_xlabel("expert")
    axis.set_ylabel("choices per expert, tokens")
    axis.set_title("per expert", loc="left", fontsize=10, fontweight="bold", pad=18)
    axis.grid(axis="x", visible=False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _draw_ranks(axis: Any, load: Load) -> None:
    num_ranks, most = len(load.pairs), max(*load.pairs, *load.rows, 1)
    heads = []
    for i, (name, counts, colour) in enumerate((("choices (compute)", load.pairs, COLOURS[0]),
                                                ("rows (network)", load.rows, COLOURS[1]))):
        places = [rank - 0.2 + 0.4 * i for rank in range(num_ranks)]
        axis.barh(places, counts, height=0.37, color=colour, gid=f"ranks-{name.split()[0]}", linewidth=0)
        mean = sum(counts) / num_ranks
        if num_ranks <= 16:
            for place, count in zip(places, counts):
                axis.annotate(f"{count:,}", xy=(count, place), xytext=(3, 0), textcoords="offset points", va="center",
                              fontsize=LABEL_SIZE, color=colour)
        heads.append((f"{name}: max {max(counts) / mean:.2f} x mean" if mean else f"{name}: none", colour))
    for i, (text, colour) in enumerate(heads):
        axis.annotate(text, xy=(0, 1), xycoords="axes fraction", xytext=(62, 20 - 13 * i), textcoords="offset points",
                      fontsize=LABEL_SIZE + 0.5, color=colour, fontweight="bold", va="bottom")
    axis.set_xlim(0, most * 1.14)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(num_ranks - 0.5, -0.5)  # rank 0 on top
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_xlabel("per rank, tokens")
    axis.set_ylabel("rank")
    axis.set_title("per rank", loc="left", fontsize=10, fontweight="bold", pad=18)
    axis.grid(axis="y", visible=False)


def _wrapped(lines: Sequence[str], width: float) -> List[str]:
    """The title, and the lines under it broken to fit a figure of `width` inches."""
    return [lines[0]] + [part for line in lines[1:] for part in textwrap.wrap(line, int((width - 0.4) / 0.078))]


def _titles(figure: Any, lines: Sequence[str]) -> None:
    height = figure.get_figheight()
    left = 0.2 / figure.get_figwidth()
    size = min(13.0, 13.0 * (figure.get_figwidth() - 0.4) / (0.125 * len(lines[0])))  # one line, smaller if it is long
    figure.text(left, 1 - 0.12 / height, lines[0], fontsize=size, fontweight="bold", va="top")
    for i, line in enumerate(lines[1:]):
        figure.text(left, 1 - (0.42 + 0.2 * i) / height, line, fontsize=9, color="#444444", va="top")


@contextlib.contextmanager
def _style() -> Iterator[Any]:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(f"anyep.plot draws with matplotlib, which cannot be imported ({error}). Install it: "
                          "pip install matplotlib") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        yield matplotlib


def _paths(out: Union[str, pathlib.Path]) -> List[pathlib.Path]:
    path = pathlib.Path(out)
    if path.suffix in (".png", ".svg"):
        return [path]
    if path.suffix or not path.name:
        raise ArgumentError(f"out = {str(out)!r}, allowed: a path that ends in .png or .svg, or one without an ending. Leave "
                            "the ending away to get both.", argument="out")
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def _save(figure: Any, paths: Sequence[pathlib.Path], title: str) -> List[pathlib.Path]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Title": title, "Date": None}, facecolor="white")
            # Without the indentation and trailing blanks of matplotlib: smaller, and version control has nothing to remark.
            lines = (line.strip() for line in text.getvalue().splitlines())
            path.write_text("".join(f"{line}\n" for line in lines if line), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150, metadata={"Title": title}, facecolor="white")
    return list(paths)
