"""Hugging Face datasets: a folder written by `save_to_disk`, or `hf://owner/name[:config][@split]` from the hub.

Both need the optional package `datasets`; whatever it raises becomes one line.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxi.data.records import Budget, Make, T, made, missing
from maxi.errors import DataError, EnvironmentFault

PREFIX = "hf://"
_MARKS = ("dataset_info.json", "state.json", "dataset_dict.json")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / mark).is_file() for mark in _MARKS)


def files(path: str) -> list[Path]:
    """The arrow files behind a dataset, downloaded if need be; sorted. Raises as `read` does."""
    return sorted(Path(entry["filename"]) for entry in _open(path).cache_files)


def read(path: str, make: Make[T], budget: Budget, only: str | None) -> Iterator[T]:
    """Every row through `make`; with `only`, that column alone. Raises DataError when the dataset, the split or the column
    is not there, EnvironmentFault when the package `datasets` is missing."""
    dataset = _open(path)
    if only is not None:
        if only not in dataset.column_names:
            raise missing(only, dataset.column_names, path)
        dataset = dataset.select_columns([only])
    return made(((row, f"{path}, row {number}") for number, row in enumerate(dataset, 1)), make, budget)


def parse(path: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of `hf://owner/name[:config][@split]`; the split is train unless given."""
    name, _, split = path.removeprefix(PREFIX).partition("@")
    name, _, config = name.partition(":")
    if not name:
        raise DataError("the hub dataset has no name", path, "write hf://owner/name, hf://owner/name:config@split")
    return name, config or None, split or "train"


def _open(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        fix = 'pip install "maxi[datasets]"'
        raise EnvironmentFault("reading Hugging Face datasets needs the package datasets", path, fix) from None
    try:
        datasets.disable_progress_bars()
        if path.startswith(PREFIX):
            name, config, split = parse(path)
            return datasets.load_dataset(name, config, split=split)
        found = datasets.load_from_disk(path)
    except DataError:
        raise
    except Exception as error:  # the hub, its cache and the network raise dozens of kinds
        what = f"cannot open the dataset, {type(error).__name__}: {str(error)[:200]}"
        raise DataError(what, path, "check the name, the network and the access token") from None
    if isinstance(found, datasets.DatasetDict):
        split = "train" if "train" in found else next(iter(found), None) if len(found) == 1 else None
        if split is None:
            splits = ", ".join(map(str, found))
            raise DataError(f"the dataset has the splits {splits or 'none'}", path, "name one, as in FOLDER/validation")
        return found[split]
    return found
