"""How jax is set up in this process: compiled programs are kept on disk, so that a second start takes seconds."""

import logging
import os
from pathlib import Path

log = logging.getLogger("maxi")


def keep_compiled_programs() -> None:
    """Uses the folder that jax was told (JAX_COMPILATION_CACHE_DIR), else maxi/xla under $XDG_CACHE_HOME or ~/.cache."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maxi" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    log.info("compiled programs: %s", jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
