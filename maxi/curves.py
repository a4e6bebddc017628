"""The numbers of a run as curves: read from its records or from a published table, thinned out, drawn.

A record is one JSON object a line with a `step`; a line that a kill cut short ends it. Drawings are the same bytes for
the same numbers: no dates, and ids that come from what is drawn. Which charts there are is decided here, what stands
around them in `report.py`.
"""

import codecs
import csv
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxi.errors import DataError, EnvironmentFault

SMOOTH_OVER = 200
"""Points beyond which the values are faint and their running mean is what one sees."""
SMOOTH_SHARE = 50
"""The running mean is over a 50th of the points."""
MARKED_UP_TO = 30
"""Points that are few enough to be seen one by one."""
STRETCHES = 500
"""A longer series is drawn as this many stretches, about one a pixel column, each by its least and greatest value."""

_READ_AT_ONCE = 1 << 16  # more rows than this outlive young garbage collections, and take twice the time
_INK = "#010203"  # of text and axes: near black in a PNG, the page's own colour in an SVG
COLOURS = ("#3b82d6", "#e0762f", "#2f9e62", "#c8508a", "#8b6fd6", "#a8862a", "#27a3b4", "#868e96")
_BEYOND = 1e100  # the margins of an axis that goes further than this overflow
_STYLES = ("-", ":", "-.")

Row = dict[str, Any]


class Series(NamedTuple):
    """One metric: float64 [n] each, steps ascending; what was not finite, or no number, is nan or inf."""

    steps: np.ndarray
    values: np.ndarray


class Curves(NamedTuple):
    """All metrics of one run under the name that legends show. `published`: somebody's table, not a run of ours."""

    name: str
    series: Mapping[str, Series]
    published: bool = False


class Chart(NamedTuple):
    """What shares one pair of axes."""

    section: str
    title: str
    names: tuple[str, ...]
    smooth: bool = True
    log: bool = False


def _preferences(prefix: str, word: str) -> tuple[Chart, ...]:
    return (
        Chart("Preferences", f"Rewards{word}", (f"{prefix}rewards/chosen", f"{prefix}rewards/rejected")),
        Chart("Preferences", f"Reward margin{word}", (f"{prefix}rewards/margins",)),
        Chart("Preferences", f"Share of pairs with the chosen answer ahead{word}", (f"{prefix}rewards/accuracies",)),
        Chart("Preferences", f"Log-probabilities{word}", (f"{prefix}logps/chosen", f"{prefix}logps/rejected")),
    )


CHARTS = (
    Chart("Loss", "Training loss", ("train/loss",)),
    Chart("Loss", "Held-out loss", ("eval/loss",)),
    Chart("Loss", "Held-out bits per byte", ("eval/bits_per_byte",)),
    Chart("Loss", "Held-out perplexity", ("eval/perplexity",), log=True),
    *_preferences("", ""),
    *_preferences("eval/", ", held out"),
    Chart("Generated text", "Repetition", ("eval/repeated_4grams", "eval/distinct_1", "eval/distinct_2")),
    Chart("Generated text", "Longest loop, tokens", ("eval/longest_loop",)),
    Chart("Generated text", "Share that stopped by itself", ("eval/stopped",)),
    Chart("Optimizer", "Learning rate", ("optim/lr",), smooth=False),
    Chart("Optimizer", "Gradient norm", ("optim/grad_norm",), log=True),
    Chart("Optimizer", "Skipped steps", ("train/skipped",), smooth=False),
    Chart("Speed", "Tokens per second", ("perf/tokens_per_s",)),
    Chart("Speed", "MFU, share of the devices' peak", ("perf/mfu",)),
    Chart("Speed", "Memory, GiB", ("perf/memory_gib",), smooth=False),
    Chart("Speed", "Seconds per step, and of them waiting for data", ("perf/step_s", "perf/data_wait_s")),
)
"""The charts of the metrics we know, in the order of the page. Every other metric gets one of its own."""


def charts_of(runs: Sequence[Curves]) -> list[Chart]:
    """The charts for which there is something to draw; none of skipped steps when no step was.

    Metrics not in CHARTS follow; those with more than two parts (`eval/loss/code`) share a chart with their siblings.
    """
    drawable: dict[str, None] = {}
    for run in runs:
        drawable |= {name: None for name, series in run.series.items() if np.isfinite(series.values).any()}
    if not any((run.series["train/skipped"].values > 0).any() for run in runs if "train/skipped" in run.series):
        drawable.pop("train/skipped", None)
    known = [chart._replace(names=tuple(n for n in chart.names if n in drawable)) for chart in CHARTS]
    rest: dict[str, list[str]] = {}
    for name in sorted(drawable.keys() - {name for chart in CHARTS for name in chart.names}):
        rest.setdefault(name.rpartition("/")[0] if name.count("/") > 1 else name, []).append(name)
    others = [Chart("Other metrics", f"{key}/…" * (key not in names) or key, tuple(names)) for key, names in rest.items()]
    return [chart for chart in known if chart.names] + others


def read_rows(path: Path) -> Iterator[tuple[Sequence[int], list[Row]]]:
    """Stretches of a .jsonl, as line numbers (from 1) and objects. Raises DataError for a line that is no JSON object.

    A last line without an end is dropped if it cannot be read: a kill cut it short, or it is being written.
    """
    after = 1
    with path.open("rb") as file:
        while lines := file.readlines(_READ_AT_ONCE):
            numbers: Sequence[int] = range(after, after + len(lines))
            after += len(lines)
            try:  # all at once takes half the time of line by line
                rows = json.loads(b"[%s]" % b",".join(lines))
            except (ValueError, RecursionError):
                rows = []
            if len(rows) != len(lines) or not all(type(row) is dict for row in rows):
                found = [(n, _row(line, f"{path}:{n}")) for n, line in zip(numbers, lines, strict=True)]
                numbers, rows = [n for n, row in found if row is not None], [row for _, row in found if row is not None]
            yield numbers, rows


def _row(line: bytes, where: str) -> Row | None:
    try:
        row = json.loads(line) if line.strip() else None
    except (ValueError, RecursionError):
        if not line.endswith(b"\n"):
            return None
        row = ()
    if row is not None and type(row) is not dict:
        raise DataError("this line is not a JSON object", where, "remove it, or restore the file")
    return row


def read_jsonl(path: Path) -> dict[str, Series]:
    """Every metric of a .jsonl; values that are no numbers are nan. Raises DataError for a line without a step."""
    parts: dict[str, list[Series]] = {}
    for numbers, rows in read_rows(path):
        alike: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        for row in rows:
            alike.setdefault(tuple(row), []).append(tuple(row.values()))
        for names, values in alike.items():
            columns = {name: _numbers(column) for name, column in zip(names, zip(*values, strict=True), strict=True)}
            steps = columns.pop("step", np.array([math.nan]))
            if not np.isfinite(steps).all():
                lacking = (n for n, row in zip(numbers, rows, strict=True) if not math.isfinite(_number(row.get("step"))))
                raise DataError("this line has no step", f"{path}:{next(lacking)}", 'write {"step": 10, "train/loss": 2.5}')
            for name, column in columns.items():
                parts.setdefault(name, []).append(Series(steps, column))
    return {name: _joined(series) for name, series in parts.items()}


def read_csv(path: Path) -> dict[str, Series]:
    """Every column of a table with a header such as `step,train/loss`; empty cells and lines of # are passed over.

    Raises DataError, with the line, for text that is not UTF-8, a header without `step` or with a name given twice, a
    row of another length, and a cell that is no number.
    """
    lines = _csv_lines(path)
    where, header = next(lines, (f"{path}:1", []))
    if "step" not in header or len(set(header)) < len(header):
        raise DataError("the header needs a column step, and no name twice", where, "e.g. step,train/loss")
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in header if name != "step"}
    for where, cells in lines:
        if len(cells) != len(header):
            raise DataError(f"{len(cells)} cells under a header of {len(header)}", where, "give each column its cell")
        row = dict(zip(header, cells, strict=True))
        try:
            step = float(row.pop("step"))
            for name, cell in row.items():
                points[name] += [(step, float(cell))] if cell else []
        except ValueError as error:
            raise DataError(f"a cell is not a number, {error}", where, "write e.g. 2.83, or nothing") from None
        if not math.isfinite(step):
            raise DataError("the step is not finite", where, "write a number")
    return {name: _joined([Series(*np.array(found).T)]) for name, found in points.items() if found}


def _csv_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        where = f"{path}:{number}"
        try:
            if line.strip() and not line.startswith(b"#"):
                yield where, [cell.strip() for cell in next(csv.reader([line.decode()], strict=True, skipinitialspace=True))]
        except UnicodeDecodeError:
            raise DataError("this line is not UTF-8", where, "save the table as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"malformed csv, {error}", where, "check the quotes") from None


def _numbers(column: tuple[Any, ...]) -> np.ndarray:
    """Float64 [n]; `metrics.py` writes what is not finite as "nan", "inf" and "-inf"."""
    try:
        found = np.array(column, np.float64)
        if found.ndim == 1:
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    return np.array([_number(value) for value in column])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _joined(parts: Iterable[Series]) -> Series:
    steps, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(steps, kind="stable")
    return Series(steps[order], values[order])


def thinned(series: Series) -> Series:
    """At most 2 x STRETCHES points, the least and the greatest of each stretch, so that no spike is lost."""
    n = len(series.values)
    if n <= 2 * STRETCHES:
        return series
    finite = np.isfinite(series.values)
    low, high = np.where(finite, series.values, np.inf), np.where(finite, series.values, -np.inf)
    bounds = np.linspace(0, n, STRETCHES + 1).astype(int)
    chosen = [(a + low[a:b].argmin(), a + high[a:b].argmax()) for a, b in pairwise(bounds)]
    keep = np.unique(np.array(chosen))
    return Series(series.steps[keep], series.values[keep])


def running_mean(series: Series) -> Series:
    """The mean over a SMOOTH_SHARE-th of the points around each, of fewer at the ends, at most STRETCHES of them.

    The window shrinks from both sides towards the ends, down to a third: one that only loses a side would show the
    first, steepest losses too low, and one that shrinks to a point would end in noise.
    """
    n = len(series.values)
    at, most = np.linspace(0, n - 1, min(n, STRETCHES)).astype(int), n // SMOOTH_SHARE // 2
    half = np.clip(np.minimum(at, n - 1 - at), most // 3, most)
    finite = np.isfinite(series.values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(a)]) for a in (np.where(finite, series.values, 0.0), finite))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, n)
    with np.errstate(invalid="ignore"):
        return Series(series.steps[at], (sums[last] - sums[first]) / (counts[last] - counts[first]))


def needs_matplotlib() -> None:
    """Raises EnvironmentFault when it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise EnvironmentFault("matplotlib is not installed", "report", 'pip install "maxi[report]"') from None


def draw(chart: Chart, runs: Sequence[Curves], key: str) -> tuple[str, bytes]:
    """The chart as an <svg> element and as a PNG; `key`: what its ids begin with, so that one page can hold many."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    settings |= {"svg.hashsalt": key, "svg.fonttype": "none", "text.parse_math": False}  # $ in a name is a $
    settings |= {"font.size": 9, "font.sans-serif": ["DejaVu Sans"], "axes.formatter.useoffset": False}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": "#808080", "grid.alpha": 0.25}
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the PNG's font lacks; the SVG has the text itself
        matplotlib.rcdefaults()  # not the user's own matplotlibrc
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(6, 3.2), layout="constrained")  # no pyplot: no window, no backend of the user's
        axes = figure.add_subplot()
        lines = _plot(axes, chart, runs)
        _dress(axes, chart)
        if len(runs) > 1 or len(chart.names) > 1:
            _legend(figure, lines)
        figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
        figure.set_layout_engine("none")  # to lay it out a second time takes as long as to draw it
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'(<\w+ id="|url\(#|xlink:href="#)', rf"\g<1>{key}-", text), png.getvalue()


def _plot(axes: Any, chart: Chart, runs: Sequence[Curves]) -> dict[str, Any]:
    """Draws, and returns a line per label. Runs differ by colour and metrics by style, or by colour in a single run."""
    lines: dict[str, Any] = {}
    many = len(runs) > 1
    for (number, run), (metric, name) in product(enumerate(runs), enumerate(chart.names)):
        steps, values = run.series.get(name, Series(np.empty(0), np.empty(0)))
        if not (finite := np.isfinite(values)).any():
            continue
        series = Series(steps, np.where(finite, values.clip(-_BEYOND, _BEYOND), np.nan))
        colour = COLOURS[(number if many else metric) % len(COLOURS)]
        style = _STYLES[metric % len(_STYLES) if many else 0]
        look: dict[str, Any] = {"color": colour, "linestyle": "--" if run.published else style}
        if len(values) <= MARKED_UP_TO:
            look |= {"marker": "o", "markersize": 5 if run.published else 3}
        if chart.smooth and len(values) > SMOOTH_OVER:
            axes.plot(*thinned(series), color=colour, alpha=0.3, linewidth=0.7)
            series = running_mean(series)
        label = " ".join([run.name] * many + [name.split("/")[-1]] * (len(chart.names) > 1))
        (lines[label],) = axes.plot(*thinned(series), linewidth=1.5, **look)
    return lines


def _dress(axes: Any, chart: Chart) -> None:
    """Title, scales and grid, once the lines are there."""
    from matplotlib import ticker

    low, high = axes.dataLim.intervaly
    if chart.log and low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if high < 300 * low else ticker.NullFormatter())
    elif high - low < 1e-6 * abs(high):  # rounding is not worth a scale
        axes.set_ylim(*sorted((0.9 * high, 1.1 * high)))
    first, last = axes.dataLim.intervalx
    if first == last:
        axes.set_xlim(first - 1, last + 1)
    axes.set_title(_printable(chart.title), loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.grid(True)
    axes.margins(x=0.02)


def _legend(figure: Any, lines: Mapping[str, Any]) -> None:
    """Below the axes, where it covers nothing; the figure grows by what it takes."""
    labels = [label if len(label) <= 36 else f"{label[:14]}…{label[-21:]}" for label in map(_printable, lines)]
    labels = [f" {label}" for label in labels]  # one that begins with _ would be left out
    figure.legend(lines.values(), labels, loc="outside lower left", ncols=2, frameon=False)
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / 2))


def _printable(text: str) -> str:
    """Half a surrogate pair, which a JSON key or a file name may hold, would stop matplotlib."""
    return "".join(c if c.isprintable() else "?" for c in text)
