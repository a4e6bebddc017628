"""A first meeting with a tokenizer.json, in a child process: it may hang, ask for all memory or abort, as any program may.

A tokenizer holds regular expressions, replacements and tables that its library runs as they are: an expression that
backtracks for ever, padding to a million million ids, a replacement that multiplies, and damage that makes the library
panic are all in its power, and the last two end the process that asked. So a child with bounded memory loads it first and
encodes a few awkward texts. What a tokenizer does to other texts is not known after that, but it is no trap to open.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from maxi.errors import ModelFolderError
from maxi.paths import inside

MOST_BYTES = {
    "tokenizer.json": 100_000_000,
    "vocab.json": 100_000_000,
    "merges.txt": 100_000_000,
    "tokenizer.model": 100_000_000,
}
"""Of the files with the vocabulary; the rest, which says how to use it, has SMALL."""
SMALL = 16_000_000
_SMALL = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
SECONDS = 20.0
"""How long loading and the texts may take; the largest tokenizers in use load in 2 s."""
MEMORY = 2 << 30
"""Bytes of address space beyond what the child starts with."""
MOST_IDS = 8
"""Ids a byte of text may become, and 1,000 more; a tokenizer of bytes makes one."""

_CHILD = f"""
import signal
import sys
signal.alarm(60)  # should nobody be there any more to end it
sys.path += sys.argv[2:]
import resource
from tokenizers import Tokenizer
limits = [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)]
if sys.platform == 'linux':  # other systems do not hold a process to RLIMIT_AS
    pages = int(open('/proc/self/statm').read().split()[0])
    limits.append((resource.RLIMIT_AS, pages * resource.getpagesize() + {MEMORY}))
for limit, value in limits:
    resource.setrlimit(limit, (value, value))
backend = Tokenizer.from_file(sys.argv[1])
backend.no_truncation()
backend.no_padding()
runs = [chr(c) * 40 for c in range(32, 127)]
runs += [c * 1500 for c in ('a', ' ', '1', '.', chr(10), chr(233), chr(0x3042), 'ab ', 'x=1;')]
for text in ['', 'One and one? Two.' + chr(0) + chr(0x1f600), *runs, *(run + '!b' for run in runs)]:
    ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    if len(ids) > {MOST_IDS} * len(text.encode()) + 1000:
        sys.exit(f'{{len(text)}} characters become {{len(ids)}} ids')
    backend.decode(ids)
"""

_passed: set[str] = set()


def check_files(folder: Path) -> None:
    """What a tokenizer may be read from lies in the folder itself and is of a size that it can have; links that lead out
    would end in exports, which are copies. Raises ModelFolderError."""
    for name in (*MOST_BYTES, *_SMALL):
        try:
            if (folder / name).exists() or (folder / name).is_symlink():
                size, most = inside(folder, name).stat().st_size, MOST_BYTES.get(name, SMALL)
                if size > most:
                    raise ValueError(f"{name} is over {most // 1_000_000} MB")
        except ValueError as error:
            raise ModelFolderError(str(error), str(folder), "copy the file that belongs there") from None


def begin(file: Path) -> Callable[[], None]:
    """Starts the child, once for each content of a tokenizer.json; what is returned waits for it, so that something else
    can be done meanwhile, and raises ModelFolderError if the file cannot be loaded, or does not end, in bounds."""
    with file.open("rb") as opened:
        known = hashlib.file_digest(opened, "sha256").hexdigest()
    if known in _passed:
        return lambda: None
    paths = [str(Path(path).absolute()) for path in sys.path if path]
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    environment |= {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-I", "-S", "-B", "-c", _CHILD, str(file.absolute()), *paths]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=pipe, env=environment, cwd="/")

    def finish() -> None:
        where = str(file.parent)
        try:
            _, said = child.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            what, fix = f"the tokenizer takes longer than {SECONDS:g} s for a few texts", "take one from somebody you trust"
            raise ModelFolderError(what, where, fix) from None
        if child.returncode:
            lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if not line.startswith((" ", "note:"))), "")
            what = f"the tokenizer cannot be used, {reason[-300:] or f'it ended its process (status {child.returncode})'}"
            raise ModelFolderError(what, where, "check tokenizer.json")
        _passed.add(known)

    return finish
