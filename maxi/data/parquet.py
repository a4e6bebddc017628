"""Parquet files to rows, a few at a time and within bounds.

A page of a few bytes can stand for gigabytes: a text that is stored once and repeated in every row, a list of a million
million nulls, zeros that compress to nothing. What the file says of its own sizes decides how many rows are decoded at once,
and what came out of it is held to the same rule as other archives (`streams.py`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxi.data import streams
from maxi.data.json_text import MOST_VALUES
from maxi.data.records import missing
from maxi.errors import DataError
from maxi.paths import open_file

ROWS = 256
"""Decoded at once, unless they may take over BYTES."""
BYTES = 1 << 28

_PAGE_RATIO = 100
"""What a page of a dictionary may expand to unless its column says that it expands more."""


def rows(path: Path, only: str | None) -> Iterator[tuple[Any, str]]:
    """(row, where) of a file, without columns of times; with `only`, that column alone, refused at once when it is not text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, name, size = 0, str(path), 0
    try:
        with open_file(path) as raw, pq.ParquetFile(raw) as file:
            columns = _columns(file.schema_arrow, only, name)
            at_once = _rows_at_once(file.metadata, columns, name)
            for batch in file.iter_batches(at_once, columns=columns):
                size += sum(_decoded(batch.column(i)).nbytes for i in range(batch.num_columns))
                streams.check_ratio(size, path.stat().st_size, f"{name}, after row {number}")
                found = batch.to_pylist() if only is None else ({only: text} for text in batch.column(0).to_pylist())
                for row in found:
                    number += 1
                    yield row, f"{name}, row {number}"
    except DataError:
        raise
    except UnicodeDecodeError:
        column, where = "a column" if only is None else f"the column {only!r}", f"{name}, rows {number + 1} to {number + ROWS}"
        raise DataError(f"{column} is not UTF-8", where, "write it again as UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        what = f"the parquet file is truncated or damaged, {str(error)[:200]}"
        raise DataError(what, f"{name}, after row {number}", "copy or download it again") from None
    except (ValueError, OverflowError, RecursionError) as error:
        what = f"a value cannot be read, {str(error)[:200]}"
        raise DataError(what, f"{name}, after row {number}", "drop its column") from None


def _decoded(column: Any) -> Any:
    """A column of an Arrow writer may come as numbers and what they stand for; bytes count once a row, as rows have them."""
    from pyarrow import types

    return column.dictionary_decode() if types.is_dictionary(column.type) else column


def _columns(schema: Any, only: str | None, where: str) -> list[str]:
    """`only`, which must be text; or all but times, which say nothing to a model and do not all fit into Python's."""
    from pyarrow import types

    if only is None:
        return [field.name for field in schema if not types.is_temporal(field.type)]
    if only not in schema.names:
        raise missing(only, schema.names, where)
    kind = schema.field(only).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view)):
        raise DataError(f"the column {only!r} holds {kind}, not text", where, "name a column of text with field:")
    return [only]


def _rows_at_once(metadata: Any, columns: list[str], where: str) -> int:
    """How many rows fit into BYTES, by what the file says of itself. Raises DataError for what no row may hold."""
    wanted, fewest = set(columns), ROWS
    for n in range(metadata.num_row_groups):
        group = metadata.row_group(n)
        for i in range(group.num_columns):
            chunk = group.column(i)
            if chunk.path_in_schema.split(".")[0] in wanted or chunk.path_in_schema in wanted:
                fewest = min(fewest, max(1, BYTES // max(1, _largest(chunk, group.num_rows, f"{where}, row group {n + 1}"))))
    return fewest


def _largest(chunk: Any, count: int, where: str) -> int:
    """Bytes that one row may come to in a column of a row group of `count` rows."""
    whole, packed, name = chunk.total_uncompressed_size, chunk.total_compressed_size, chunk.path_in_schema
    streams.check_ratio(whole, packed, where)
    if whole > streams.MAX_LINE_BYTES * max(1, count):
        what = f"the column {name!r} holds over {streams.MAX_LINE_BYTES // 1_000_000} MB a row"
        raise DataError(what, where, "split it into rows")
    if chunk.num_values > MOST_VALUES * max(1, count):
        raise DataError(f"the column {name!r} holds over {MOST_VALUES:,} values a row", where, "split it into rows")
    mean = whole // max(1, count)
    if not chunk.has_dictionary_page:
        return mean
    dictionary = chunk.data_page_offset - (chunk.dictionary_page_offset or 0)
    return max(mean, whole if whole > _PAGE_RATIO * packed else min(whole, _PAGE_RATIO * max(1, dictionary)))
