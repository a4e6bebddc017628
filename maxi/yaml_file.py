"""YAML 1.2, strictly: `1e-4` is a number and `no` a string, and no anchors, aliases, tags or keys given twice.

Size and depth are bounded, and nothing in a file can name code, so that a hostile one costs a line.
"""

import errno
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from maxi.errors import ConfigError
from maxi.paths import read_file

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_EVENTS = 20_000
"""Keys, values, beginnings and ends of lists: what the parser reads in a second."""


def read_text(path: Path) -> str:
    """A file of at most MAX_BYTES in UTF-8, a byte order mark dropped. Raises ConfigError."""
    try:
        raw = read_file(path, MAX_BYTES)
    except OSError as error:
        too_long = error.errno == errno.EFBIG
        fix = "a config holds settings, data goes into files" if too_long else "check the path"
        raise ConfigError(f"cannot read the config, {error.strerror}", str(path), fix) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError("the config is not UTF-8", f"{path}:{line}", "save it as UTF-8") from None


def read_yaml(text: str, where: str) -> Any:
    """Dicts, lists and scalars. Raises ConfigError with the line of what is malformed or refused."""
    try:
        depth = 0
        for number, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            line = f"{where}:{event.start_mark.line + 1}"
            if number > MAX_EVENTS:
                raise ConfigError(f"the YAML has over {MAX_EVENTS:,} parts", line, "settings are fewer, data goes into files")
            if depth > MAX_DEPTH:
                raise ConfigError("the YAML is nested too deeply", line, f"{MAX_DEPTH} levels are enough")
            if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError("YAML anchors and aliases are not allowed", line, "write the value out")
            if str(getattr(event, "tag", None) or "").strip("!"):
                raise ConfigError("YAML tags are not allowed", line, "write a plain value")
        return YAML(typ="safe", pure=True).load(text)
    except ConfigError:
        raise
    except DuplicateKeyError as error:
        first, second = (mark.line + 1 if mark else 0 for mark in (error.context_mark, error.problem_mark))
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "?"
        raise ConfigError(f"the key {key!r} is given twice", f"{where}:{second}", f"keep one (block at line {first})") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            f"malformed YAML, {error.problem}", f"{where}:{mark.line + 1 if mark else 1}", "check indentation and quotes"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"malformed YAML, {str(error)[:80]}", where, "write a number that is meant") from None
    except YAMLError as error:
        raise ConfigError(f"malformed YAML, {type(error).__name__}", where, "check indentation and quotes") from None
