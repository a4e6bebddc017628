"""`maxi report`: what came of one or several runs, as one HTML file that needs nothing else.

The page holds no script and asks the network for nothing; whatever a model, a config or a file name says is escaped on
its way in. It is the same bytes for the same runs. The curves lie beside it once more as PNG. Nothing here computes a
metric: what a run wrote down is shown, and `curves.py` reads and draws its numbers.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from maxi import __version__
from maxi.curves import (
    COLOURS,
    SMOOTH_OVER,
    SMOOTH_SHARE,
    Chart,
    Curves,
    Row,
    charts_of,
    draw,
    needs_matplotlib,
    read_csv,
    read_jsonl,
    read_rows,
)
from maxi.errors import ConfigError, DataError, ModelFolderError
from maxi.models import from_hf_config
from maxi.params import count
from maxi.run import Run
from maxi.whole import write_whole
from maxi.yaml_file import read_text, read_yaml

SAMPLES_SHOWN = 40
"""Of the continuations of one prompt in one run; more are thinned out evenly."""
PROMPTS_OPEN = 4
"""Tables of samples that are open when the page is."""


@dataclass(frozen=True)
class Subject:
    """What a RUN on the command line is: a run folder, or a file of published numbers, which has curves alone."""

    path: Path
    curves: Curves
    run: Run | None = None
    config: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """config.yaml by dotted key."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""
    notes: tuple[str, ...] = ()
    """Comments of a published table."""


def report(runs: Sequence[str | Path], out: str | Path | None = None, *, png: str | Path | None = None) -> Path:
    """Writes the page to `out` and the curves as PNG to the folder `png`; returns `out`.

    runs: run folders, and .csv or .jsonl files of published numbers to lay beside them (`curves.read_csv` says how they
    look). out: by default RUN/report.html for one run folder, ./report.html otherwise. png: by default NAME_files beside
    NAME.html. Raises EnvironmentFault without matplotlib, ModelFolderError for what is no run or has no metrics yet,
    DataError for a malformed line, ConfigError for an `out` or `png` that cannot be, or a config.yaml that is not YAML.
    """
    needs_matplotlib()
    subjects = [_open(path, name) for path, name in _named(runs)]
    folders = [subject.path for subject in subjects if subject.run]
    target = Path(out) if out else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if target.is_dir():
        raise ConfigError("--out is a folder", str(target), "name a file, such as report.html")
    pictures = Path(png) if png else target.with_name(f"{target.stem}_files")
    curves = [subject.curves for subject in subjects]
    charts = charts_of(curves)
    drawn = [(chart, *draw(chart, curves, key), key) for chart, key in zip(charts, _keys(charts), strict=True)]
    page = "\n".join(_page(subjects, [(chart, svg) for chart, svg, _, _ in drawn])) + "\n"
    page = page.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON can spell but no file can hold
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError("there is a file where a folder should be", str(error.filename), "name another") from None
    for _, _, picture, key in drawn:
        write_whole(pictures / f"{key}.png", picture)
    write_whole(target, page)
    return target


def _keys(charts: Sequence[Chart]) -> list[str]:
    """A file name and id for each chart: its first metric's name, numbered where another's comes to the same."""
    keys: list[str] = []
    for chart in charts:
        key = re.sub(r"\W+", "_", chart.names[0], flags=re.ASCII)[:80]
        keys.append(key if key not in keys else f"{key}_{len(keys)}")
    return keys


# ---- what there is to tell ----


def _named(runs: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """Every path once, with as much of its end as tells it from the others."""
    paths = {Path(run).resolve(): Path(run) for run in runs}
    named = []
    for whole, given in paths.items():
        tails = [whole.parts[-n:] for n in range(1, len(whole.parts))] or [whole.parts]
        shared = [tail for tail in tails if sum(other.parts[-len(tail) :] == tail for other in paths) > 1]
        named.append((given, "/".join(tails[min(len(shared), len(tails) - 1)])))
    return named


def _open(path: Path, name: str) -> Subject:
    """Raises ModelFolderError or DataError."""
    if path.is_file() and path.suffix in (".csv", ".jsonl"):
        series = read_csv(path) if path.suffix == ".csv" else read_jsonl(path)
        if not series:
            raise DataError("there are no numbers in it", str(path), "write a header step,train/loss and a line per step")
        lines = path.read_text("utf-8-sig", "replace").splitlines() if path.suffix == ".csv" else []
        notes = tuple(line.lstrip("# ") for line in lines if line.startswith("#"))
        return Subject(path, Curves(name, series, published=True), notes=notes)
    if not Run.is_run(path):
        what = "neither a run folder nor a .csv or .jsonl file" if path.exists() else "there is no such file or folder"
        raise ModelFolderError(what, str(path), "name the run_dir of a `maxi train`")
    run = Run(path)
    series = {n: s for file in (run.metrics, run.perf) if file.is_file() for n, s in read_jsonl(file).items()}
    if not series:
        raise ModelFolderError("this run has no metrics yet", str(path), "train it for log.every steps first")
    try:
        facts = json.loads(run.facts.read_text(encoding="utf-8"))
    except ValueError:
        raise ModelFolderError("run.json cannot be read", str(run.facts), "restore it") from None
    config = read_text(run.config)
    settings = dict(_flat(read_yaml(config, str(run.config))))
    return Subject(path, Curves(name, series), run, config, settings, facts if isinstance(facts, dict) else {})


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and scalars, of lists too: data.train.0.path."""
    nodes = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not nodes:
        yield prefix, tree
    for key, node in nodes:
        yield from _flat(node, f"{prefix}.{key}" if prefix else str(key))


def _summary(subject: Subject) -> list[str]:
    """The run in a line."""
    series = subject.curves.series
    if subject.run is None:
        return [f"published numbers: {len(s.values):,} of {name}" for name, s in list(series.items())[:3]]
    last, planned = int(max(s.steps[-1] for s in series.values())), subject.settings.get("steps")
    parts = [f"{last:,} of {planned:,} steps" if isinstance(planned, int) and planned > last else f"{last:,} steps"]
    if parameters := _parameters(subject.run):
        parts += [f"{parameters:,} parameters"]
    if "eval/loss" in series:
        losses = series["eval/loss"].values
        parts += [f"held-out loss {losses[0]:.4f}" + (f" → {losses[-1]:.4f}" if len(losses) > 1 else "")]
    if "eval/bits_per_byte" in series:
        parts += [f"{series['eval/bits_per_byte'].values[-1]:.4f} bits per byte"]
    if "perf/step_s" in series:  # each tells of the steps since the one before
        steps, seconds = series["perf/step_s"]
        parts += [f"{_duration(float(np.nansum(seconds * np.diff(steps, prepend=0))))} in training steps"]
    if "perf/tokens_per_s" in series:
        parts += [f"{np.median(series['perf/tokens_per_s'].values):,.0f} tokens/s"]
    if "train/skipped" in series and (skipped := int((series["train/skipped"].values > 0).sum())):
        parts += [f"{skipped:,} of {len(series['train/skipped'].values):,} logged steps skipped"]
    if "train/loss" in series and len(lost := series["train/loss"].steps[~np.isfinite(series["train/loss"].values)]):
        parts += [f"training loss not finite in {len(lost):,} logged steps, first in {lost[0]:,.0f}"]
    return parts


def _parameters(run: Run) -> int | None:
    try:
        return count(from_hf_config(json.loads((run.model / "config.json").read_text(encoding="utf-8"))).table)
    except (OSError, ValueError):  # of a version that knows other families, or not written yet
        return None


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


# ---- the page ----


def _page(subjects: Sequence[Subject], drawn: Sequence[tuple[Chart, str]]) -> Iterator[str]:
    names = [subject.curves.name for subject in subjects]
    yield _HEAD.format(title=_text(", ".join(names)), css=_CSS)
    yield f"<h1>{_text(names[0]) if len(names) == 1 else f'{len(names)} runs'}</h1>"
    for number, subject in enumerate(subjects):
        colour = COLOURS[number % len(COLOURS)]
        head = f'<b class=swatch style="background:{colour}"></b><strong>{_text(names[number])}</strong><br>'
        yield f"<p>{head if len(names) > 1 else ''}{_text(' · '.join(_summary(subject)))}</p>"
    yield from _curves(drawn)
    runs = [subject for subject in subjects if subject.run]
    yield from _samples(runs)
    yield from _configuration(runs)
    yield from _origin(subjects)
    yield f"<footer>maxi {__version__}</footer>\n</main>\n</body>\n</html>"


def _curves(drawn: Sequence[tuple[Chart, str]]) -> Iterator[str]:
    for section, charts in groupby(drawn, key=lambda pair: pair[0].section):
        yield f"<h2>{_text(section)}</h2>\n<div class=charts>"
        yield from (f'<figure role=img aria-label="{_text(chart.title)}">{svg}</figure>' for chart, svg in charts)
        yield "</div>"
    yield (
        f"<p class=note>Of more than {SMOOTH_OVER} points the values are faint (of many, the least and the greatest of each "
        f"stretch) and their mean over a {SMOOTH_SHARE}th of the points is strong. Published numbers are dashed.</p>"
    )


def _samples(runs: Sequence[Subject]) -> Iterator[str]:
    """For each prompt a table of what the runs made of it, steps going down."""
    prompts: dict[str, dict[str, list[Row]]] = {}
    for subject in runs:
        for row in _sample_rows(subject):
            prompts.setdefault(_shown(row.get("prompt")), {}).setdefault(subject.curves.name, []).append(row)
    if prompts:
        yield "<h2>Samples</h2>"
    for number, (prompt, of_runs) in enumerate(prompts.items()):
        rows = [{"run": name, **row} for name, found in of_runs.items() for row in _spread(found, SAMPLES_SHOWN)]
        rows.sort(key=lambda row: row["step"])
        fields = dict.fromkeys(key for row in rows for key in row if key not in ("step", "run", "prompt", "text"))
        header = ["step", *["run"] * (len(runs) > 1), "text", *fields]
        yield f"<details{' open' * (number < PROMPTS_OPEN)}><summary>{_text(prompt)}</summary>"
        yield from _table(header, ([_shown(row.get(key, "")) for key in header] for row in rows))
        if len(rows) < (every := sum(map(len, of_runs.values()))):
            yield f"<p class=note>{len(rows)} of {every:,} are shown.</p>"
        yield "</details>"


def _sample_rows(subject: Subject) -> Iterator[Row]:
    assert subject.run
    for numbers, rows in read_rows(subject.run.samples) if subject.run.samples.is_file() else ():
        for number, row in zip(numbers, rows, strict=True):
            if not isinstance(row.get("step"), int):
                raise DataError("this line has no step", f"{subject.run.samples}:{number}", "remove it, or restore the file")
            yield {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` of them, the first and the last among them."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]


def _configuration(runs: Sequence[Subject]) -> Iterator[str]:
    """The keys that differ, where there are several runs, and every config whole."""
    if runs:
        yield "<h2>Configuration</h2>"
    if len(runs) > 1:
        keys = dict.fromkeys(key for subject in runs for key in subject.settings)
        rows = [[key, *(_shown(subject.settings.get(key, "—")) for subject in runs)] for key in keys]
        yield from _table(["key", *(subject.curves.name for subject in runs)], (r for r in rows if len(set(r[1:])) > 1))
    for subject in runs:
        summary = f"all keys of {subject.curves.name}" if len(runs) > 1 else "config.yaml"
        yield f"<details{' open' * (len(runs) == 1)}><summary>{_text(summary)}</summary>"
        yield f"<pre>{_text(subject.config)}</pre></details>"


def _origin(subjects: Sequence[Subject]) -> Iterator[str]:
    """run.json as it is, fingerprints, versions and what the data were; the comments of a published table."""
    yield "<h2>Where it came from</h2>"
    for subject in subjects:
        yield f"<h3>{_text(subject.curves.name)}</h3>"
        rows = [["path", str(subject.path)], *(["note", note] for note in subject.notes)]
        for key, value in subject.facts.items():
            if isinstance(value, list):
                rows += [[key, "\n".join(map(_shown, value))]]
            else:
                rows += [[name.replace(".", " "), _shown(leaf)] for name, leaf in _flat(value, key)]
        yield from _table([], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "<div class=wide><table>"
    yield "".join(["<tr>", *(f"<th>{_text(name)}</th>" for name in header), "</tr>"]) if header else ""
    for row in rows:
        cells = (f"<td dir=auto{' class=long' * (len(cell) > 30)}>{_text(cell)}</td>" for cell in row)
        yield "".join(["<tr>", *cells, "</tr>"])
    yield "</table></div>"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(text: str) -> str:
    """As text that can be nothing but text, also inside of quotes; control characters as their pictures."""
    return escape(text.translate(_PICTURES))


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), 0xFFFD)

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>"""

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --faint: #6a737d; --line: #d8dee4; --code: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d6dbe1; --paper: #14171b; --faint: #8b949e; --line: #30363d; --code: #1c2127 }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 1rem }
h1, strong, summary, td, th { overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }
figure { margin: 0 }
figure svg { display: block; width: 100%; height: auto }
.note, footer { color: var(--faint); font-size: .85rem }
details { margin: .75rem 0 }
summary { cursor: pointer; font-weight: 600; white-space: pre-wrap }
.wide, pre { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: start; vertical-align: top }
td { white-space: pre-wrap; min-width: 3rem; font-variant-numeric: tabular-nums }
td.long { min-width: 15rem; overflow-wrap: anywhere }
pre { padding: .75rem; background: var(--code); font-size: .85rem }
"""
