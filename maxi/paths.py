"""Paths that somebody else wrote down: can there be such a file, does it lead out of its folder, and what does it hold,
within bounds?

A named pipe or a device where a file should be would be read for ever, so only regular files are opened. What the bytes
mean is the callers' matter, and so is the error that the user sees: here it is a ValueError or an OSError in few words.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def well_formed(text: str) -> str:
    """`text` as it is, if the system could have a file of that name. Raises ValueError that says why not."""
    if not text:
        raise ValueError("the path is empty")
    try:
        text.encode()
        Path(text).expanduser().stat()
    except UnicodeEncodeError:
        raise ValueError("the path is not UTF-8") from None
    except RuntimeError:
        raise ValueError("the path begins with ~ and a name that has no home folder") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise ValueError(f"the path cannot be, {(error.strerror or '').lower()}") from None
    except ValueError:  # what Python says of a NUL
        raise ValueError("the path holds a NUL") from None
    return text


def inside(folder: Path, name: str) -> Path:
    """The real path of a file that somebody else's folder holds: a link may lead within the folder or, in a Hugging Face
    cache (snapshots/REVISION/NAME), to the `blobs` of the same repository, and nowhere else. Raises ValueError."""
    try:
        home, target = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        raise ValueError(f"{name} is missing") from None
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not (cached or target.is_relative_to(home)):
        raise ValueError(f"{name} is a link out of the folder")
    if not target.is_file():
        raise ValueError(f"{name} is not a file")
    return target


def open_file(path: Path) -> BufferedReader:
    """A regular file, for reading. Raises OSError, also for a folder, a pipe or a device."""
    # without O_NONBLOCK the opening of a pipe waits for somebody to write into it
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 (the caller's)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_file(path: Path, most: int) -> bytes:
    """A regular file of at most `most` bytes, whole. Raises OSError."""
    with open_file(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"it is over {most / 1e6:.0f} MB", str(path))
    return raw
