"""Kernels: one folder an operation, one file a backend, chosen at trace time and said once.

    dispatch.py   Backend, and the choice between backends
    platform.py   which platform programs are being compiled for
    attention/    softmax(q k^T) v over packed rows, one file a backend
    logprobs/     hidden states to token log-probabilities: full, chunked

Kernels take arrays and numbers, never a config or a model.
"""
