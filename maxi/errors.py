"""The errors a user may meet, each with the exit code that schedulers and scripts act on.

Contract: `maxi` prints exactly one line on stderr, `maxi: error[CODE] what (where): fix`, and exits with CODE.
Faults of our own (broken invariants) are `assert`s and never pass through here. File names, keys and whatever else others
wrote stand in such a line too: it is bounded, and nothing in it steers a terminal or begins another line.
"""

import unicodedata

LONGEST = 600
"""Characters of each of the three parts."""


class MaxiError(ValueError):
    """A fault that the user can mend. `what` went wrong, `where` (file, line, key), and how to `fix` it."""

    code = 1

    def __init__(self, what: str, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = map(_in_line, (what, where, fix))
        super().__init__(self.line())

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:  # as it travels from a worker process
        return type(self), (self.what, self.where, self.fix)

    def line(self) -> str:
        where = f" ({self.where})" if self.where else ""
        fix = f": {self.fix}" if self.fix else ""
        return f"maxi: error[{self.code}] {self.what}{where}{fix}"


def is_fault(error: BaseException) -> bool:
    """Whether a library's own failure raised this: panics of Rust are no Exception, but no wish to stop either."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException, most: int = 200) -> str:
    """What a library's error says in its first line, at most so many characters of it; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def escaped(text: str) -> str:
    """`text` with all that is not there to be seen as an escape, but for tab and newline: controls such as \\x1b, which
    terminals obey, marks that turn the direction of writing (CVE-2021-42574), half surrogate pairs."""
    if text.isprintable():
        return text
    return "".join(c if c in "\t\n" or unicodedata.category(c) not in _UNSEEN else _escape(c) for c in text)


_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories: controls, formatting, surrogates, the separators of lines and of paragraphs."""
_JOINERS = "\u200c\u200d"
"""Formatting that scripts need, and that joins emoji."""


def _escape(c: str) -> str:
    code = ord(c)
    if c in _JOINERS:
        return c
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def _in_line(part: object) -> str:
    """A part of an error line; of what is too long, the beginning and the end."""
    text = escaped(" ".join(str(part).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class ConfigError(MaxiError):
    """The command line, the YAML, or a combination of settings that cannot work."""

    code = 2


class DataError(MaxiError):
    """A data file that cannot be read, or holds nothing to train on."""

    code = 3


class ModelFolderError(MaxiError):
    """A checkpoint, a run folder or a Hugging Face folder that cannot be used."""

    code = 4


class NumericsError(MaxiError):
    """The numbers went wrong: the loss or the gradient is not finite."""

    code = 5


class EnvironmentFault(MaxiError):
    """The machine, its devices, its disk, or another process in the way."""

    code = 6


class ProcessLost(MaxiError):
    """Another process of the run is gone. Running the same command again on all of them goes on."""

    code = 75


class Preempted(MaxiError):
    """Asked to stop; the state is saved. Running the same command again goes on."""

    code = 75


class StoppedTogether(Preempted):
    """All processes of the run stop at this step, so none has to be told."""


class StorageFault(MaxiError):
    """Storage that does not answer for the moment. Running the same command again goes on."""

    code = 75
