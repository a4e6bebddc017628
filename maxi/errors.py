"""The errors a user may meet, each with the exit code that schedulers and scripts act on.

Contract: `maxi` prints exactly one line on stderr, `maxi: error[CODE] what (where): fix`, and exits with CODE.
Faults of our own (broken invariants) are `assert`s and never pass through here.
"""


class MaxiError(ValueError):
    """A fault that the user can mend. `what` went wrong, `where` (file, line, key), and how to `fix` it."""

    code = 1

    def __init__(self, what: str, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = (" ".join(str(part).split()) for part in (what, where, fix))
        super().__init__(self.line())

    def line(self) -> str:
        where = f" ({self.where})" if self.where else ""
        fix = f": {self.fix}" if self.fix else ""
        return f"maxi: error[{self.code}] {self.what}{where}{fix}"


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


class Preempted(MaxiError):
    """Asked to stop; the state is saved. Running the same command again goes on."""

    code = 75
