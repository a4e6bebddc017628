"""`maxi check CONFIG`: what a run would train on, token by token, before its first step.

The whole of every source is read, rendered, tokenised and audited (into the cache, so that training finds it there); the
figures are of all rows, and a few rows are shown with each token coloured by its weight, in the terminal and in one HTML
file; where there are no colours, what is learned stands between ⟦ and ⟧. The audit itself is `data/audit.py`'s. No weights
are read and nothing is compiled.
"""

import html
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from maxi import objectives, pretrained
from maxi.config import Config
from maxi.data.audit import wrong_mask
from maxi.data.documents import Budget
from maxi.data.examples import PHRASES, Examples
from maxi.data.loader import Opened, content_of, open_data, open_template
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError
from maxi.whole import write_whole

log = logging.getLogger("maxi")

IN_HTML = 20
"""Rows that the HTML file shows of each source."""
ON_SCREEN = 600
"""Tokens of a row that the terminal shows; the HTML file shows all."""


@dataclass(frozen=True)
class Shown:
    """A text to look at: which it is, and each of its tokens as (text, weight as a target)."""

    where: str
    tokens: list[tuple[str, float]]


def run_check(config: Config, *, rows: int = 2, html_out: str | None = None, json_out: str | None = None) -> None:
    """Checks the data of a config; `rows` of each source are printed.

    The page goes to `html_out`, by default check.html in the run folder; the figures as JSON to `json_out`, `-` for
    stdout in place of all else. Raises DataError when a mask is wrong, and what reading the data raises.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=json_out == "-")
    colours = console.color_system is not None and not console.no_color
    objective = objectives.build(**asdict(config.objective))
    tokenizer = pretrained.open_tokenizer(config.tokenizer, config.model.init_from)
    with open_template(objective.rows, config.chat, tokenizer) as template:
        virtual = getattr(config.adapter, "virtual_tokens", 0)
        content = content_of(objective.rows, config.data, config.chat, tokenizer, template, config.seq_len, virtual)
        say = (lambda _: None) if json_out == "-" else log.info
        batches, eval_rows = open_data(config.data, content, batch_size=config.batch_size, seed=config.seed, log=say)
        opened = [*batches.opened, *(eval_rows.opened if eval_rows else ())]
        shown = [list(islice(_shown(entry, tokenizer, config.data.skip_bad), IN_HTML)) for entry in opened]
    report = _report(config, opened)
    page = Path(html_out or Path(config.run_dir) / "check.html").expanduser()
    _write(page, _page(config, opened, shown, report))
    for entry, some in zip(opened, shown, strict=True):
        for line in entry.describe():
            console.print(line)
        for text in chain.from_iterable(some[:rows]):
            console.print(Text(f"\n{text.where}", style="bold"))
            console.print(_coloured(text.tokens, colours))
    for line in _verdict(report):
        console.print(line)
    console.print(f"page: {page}")
    if json_out == "-":
        print(json.dumps(report, indent=1, ensure_ascii=False))
    elif json_out:
        _write(Path(json_out).expanduser(), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for source in report["sources"]:
        if source["wrong"]:
            fix = "set chat.template to one that ends every turn, such as chatml"
            raise DataError(f"the mask is wrong, {source['wrong']}", source["counts"]["wrong_rows"][0], fix)


def _report(config: Config, opened: Sequence[Opened]) -> dict[str, Any]:
    """All figures, as JSON."""
    sources = []
    for entry in opened:
        meta = entry.cache.meta
        counts = meta["counts"]
        figures: dict[str, Any] = {
            "path": entry.source.path,
            "side": entry.side,
            "items": meta["items"],
            "tokens": meta["tokens"],
            "rows": len(entry.rows),
            "row_tokens": entry.rows.width,
            "real_tokens": entry.fill,
            "skipped": meta["skipped"],
            "wrong": None,
        }
        if entry.content.has_weights:
            share = counts["trained_answer_tokens"] / max(counts["answer_tokens"], 1)
            figures |= {"answer_tokens_trained": share, "counts": counts, "wrong": wrong_mask(counts)}
        sources.append(figures)
    return {"objective": config.objective.name, "seq_len": config.seq_len, "sources": sources}


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    """What the figures come to, in words."""
    paths = {source["path"] for source in report["sources"]}
    plain = len({Path(path).name for path in paths}) == len(paths)  # whether the names of files are enough
    for source in report["sources"]:
        if source["side"] == "held-out":
            continue
        name = Path(source["path"]).name if plain else source["path"]
        yield ""
        if (counts := source.get("counts")) is None:
            yield f"{name}: real tokens in rows: {source['real_tokens']:.1%}"
            continue
        same = counts["turns"] - counts["other_prefix"]
        yield f"{name}: answer tokens trained: {source['answer_tokens_trained']:.2%}"
        yield f"{name}: end token trained: {counts['ended_turns']:,} of {counts['turns']:,} answers"
        yield f"{name}: text before the answer as it will be served: {same:,} of {counts['turns']:,}"
        yield f"{name}: real tokens in rows: {source['real_tokens']:.1%}"
        for reason, rows in counts["dropped"].items():
            yield f"{name}: {PHRASES[reason]}: {counts[reason]:,}, such as {_named(rows)}"
        if source["wrong"]:
            yield f"{name}: WRONG: {source['wrong']}, such as in {_named(counts['wrong_rows'])}"
        else:
            yield f"{name}: the mask is right"


def _named(rows: Sequence[str]) -> str:
    return "; ".join(Path(where).name for where in rows)  # "a.parquet, row 2" has a comma of its own


def _shown(entry: Opened, tokenizer: Tokenizer, skip_bad: int) -> Iterator[list[Shown]]:
    """The rows of a source from its beginning: the conversations of each, or a packed row of documents. Of a source that
    is on two sides, the training side's only."""
    if entry.side == "held-out":
        return
    if isinstance(entry.content, Examples):
        sides = (", chosen", ", rejected") if entry.content.kind == "preferences" else ("",)
        for samples in entry.content.samples(entry.source, Budget(skip_bad)):
            pieces = [(s.conversation.where, _pieces(tokenizer, s.ids, s.weights)) for s in samples]
            yield [Shown(where + side, tokens) for (where, tokens), side in zip(pieces, sides, strict=True)]
        return
    for number in range(len(entry.rows)):
        row = entry.rows[number]
        # a row's weight stands with the token before the target
        weights = np.append(np.float32(0), row["loss_weight"][:-1])
        read = row["positions"] >= entry.rows.layout.get("virtual", 0)
        yield [Shown(f"{entry.source.path}, row {number}", _pieces(tokenizer, row["tokens"][read], weights[read]))]


def _pieces(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray) -> list[tuple[str, float]]:
    """The text of each token; one that holds a part of a character shows its bytes as U+FFFD."""
    return [(tokenizer.decode([i]), float(weight)) for i, weight in zip(ids.tolist(), weights.tolist(), strict=True)]


def _coloured(tokens: Sequence[tuple[str, float]], colours: bool) -> Text:
    text, learned = Text(), False
    for number, (piece, weight) in enumerate(tokens[:ON_SCREEN]):
        if not colours and (weight > 0) != learned:
            text.append("⟧" if learned else "⟦")
        learned = weight > 0
        style = ("black on green" if number % 2 else "black on bright_green") if learned else "dim"
        for position, line in enumerate(_visible(piece).split("\n")):
            text.append("\u21b5\n" if position else "", style="dim")
            text.append(line, style=style)
    if not colours and learned:
        text.append("⟧")
    if len(tokens) > ON_SCREEN:
        text.append(f" ... {len(tokens) - ON_SCREEN} more tokens", style="italic")
    return text


def _visible(piece: str) -> str:
    """Control characters but line breaks as \\x1b and the like: data must not steer the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in piece)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem; border: 1px solid #8886; border-radius: .4rem; }
pre span { color: #888; } pre .t { background: #9be7a5; color: #111; } pre .t:nth-child(even) { background: #66d17a; }
pre .w { background: #ffe08a; color: #111; } .wrong { color: #c00; font-weight: bold; }
:root { color-scheme: light dark; }
"""


def _page(config: Config, opened: Sequence[Opened], shown: Sequence[list[list[Shown]]], report: dict[str, Any]) -> str:
    parts = [
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>maxi check</title><style>{_STYLE}</style><h1>What {html.escape(config.objective.name)} trains on</h1>",
        "<p>Green: learned. Yellow: learned with another weight than 1. Grey: only read.</p><ul>",
        *(f"<li>{html.escape(line)}" for line in _verdict(report) if line),
        "</ul>",
    ]
    for entry, some in zip(opened, shown, strict=True):
        parts.append(f"<h2>{html.escape(entry.source.path)} ({entry.side})</h2><ul>")
        parts += [*(f"<li>{html.escape(line.strip())}" for line in entry.describe()), "</ul>"]
        for text in chain.from_iterable(some):
            parts.append(f"<h3>{html.escape(text.where)}</h3><pre>{''.join(map(_span, text.tokens))}</pre>")
    return "\n".join(parts) + "\n"


def _span(token: tuple[str, float]) -> str:
    piece, weight = token
    kind = "" if weight <= 0 else " class=t" if weight == 1 else " class=w"
    return f"<span{kind} title='{weight:g}'>{html.escape(_visible(piece))}</span>"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"cannot write {path.name}, {error.strerror}", str(path), "name another file") from None
