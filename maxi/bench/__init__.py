"""Speed, measured on whatever device is there: `maxi bench kernels`, `maxi bench step`.

    kernels.py   every operation by every backend that can run here, beside jax's own
    step.py      a config's training step, timed on made-up rows or only compiled, also for hardware that is not here
    timing.py    clocks

Figures are wall time, and hold for an otherwise idle machine. Nothing is compiled from or into the cache of programs.
"""
