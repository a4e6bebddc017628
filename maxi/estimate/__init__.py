"""What a step costs, counted and not compiled: bytes and seconds of a layout on hardware that need not be here.

    work.py      what has to be computed, and the layouts it may be computed in
    memory.py    bytes a device holds, by part
    speed.py     seconds a step takes, by what takes them
    layouts.py   every layout that fits together, and the best one

The state's bytes and the model's FLOPs are exact. Activations and seconds are a model with the few constants that stand
in these files, fitted to programs that libtpu compiled; `maxi plan` compiles where it can and marks the rest "analytic".
"""
