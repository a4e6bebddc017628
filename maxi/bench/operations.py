"""The operations of `maxi.kernels` as `maxi bench kernels` computes them: arguments, every way, and the definition.

A way is a backend of maxi's or a function of jax's own. Where a backend `reference` is nothing but plain jax (norm,
rotary, swiglu), that is the comparison.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxi.kernels import attention, linear, logprobs, norm, rotary, swiglu
from maxi.kernels.dispatch import Backend
from maxi.kernels.platform import platform
from maxi.made_up import lengths

EPS = 1e-6
NO_SEGMENTS = "it ignores that rows hold several documents"
"""Why cuDNN is not measured on packed rows."""


@dataclass(frozen=True)
class Sizes:
    """Letters as in `maxi.dims`. `documents`: mean length of those in a row; 0: a row is one document."""

    B: int = 8
    T: int = 4096
    N: int = 16
    K: int = 8
    H: int = 128
    D: int = 1024
    F: int = 3072
    V: int = 151_936
    documents: int = 0


@dataclass(frozen=True)
class Way:
    """One way to compute an operation: `run(arguments, given)` of what is differentiated and what is only given, or the
    reason why not. `chosen`: whether it is what `auto` takes. `prepare(given)`, once a step, is `given` with more."""

    name: str
    run: Callable[[Any, Any], Any] | None = None
    why_not: str | None = None
    chosen: bool = False
    prepare: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Operation:
    """A case of an operation. `arguments` are differentiated, `given` are not. `exact` is the definition, run in float32."""

    name: str
    shape: str
    arguments: tuple[jax.Array, ...]
    given: tuple[jax.Array, ...]
    exact: Callable[[Any, Any], Any]
    ways: Sequence[Way] = field(repr=False)


def _ways(backends: Sequence[Backend], asked: Callable[[str], tuple[Any, ...]], way: Callable[[Backend], Way]) -> list[Way]:
    """A way for each backend; `asked(wanted)` are the arguments of `why_not`."""
    chosen = next(b.name for b in backends if b.why_not(*asked("auto")) is None)
    found = []
    for backend in backends:
        reason = backend.why_not(*asked(backend.name))
        made = way(backend) if reason is None else Way(backend.name, why_not=reason)
        found.append(replace(made, chosen=backend.name == chosen))
    return found


def _random(rng: np.random.Generator, dtype: Any, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype)


def places(rng: np.random.Generator, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments, int32 [B, T], of rows that are full."""
    B, T = sizes.B, sizes.T
    segments, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for row in range(B if sizes.documents else 0):
        documents = lengths(rng, sizes.documents, T, T)
        segments[row] = np.repeat(np.arange(1, len(documents) + 1), documents)[:T]
        positions[row] = np.concatenate([np.arange(n) for n in documents])[:T]
    return positions, segments


def attentions(sizes: Sizes, dtype: Any, rng: np.random.Generator) -> list[Operation]:
    """softmax(q k^T) v; jax's own are `dot_product_attention`, by XLA and by cuDNN, and on TPU splash attention."""
    B, T, N, K, H = sizes.B, sizes.T, sizes.N, sizes.K, sizes.H
    positions, segments = places(rng, sizes)
    arguments = tuple(_random(rng, dtype, B, T, heads, H) for heads in (N, K, K))
    given = (jnp.asarray(positions), jnp.asarray(segments))
    call = attention.Call(B, T, T, N, K, H, jnp.dtype(dtype), False, None)

    def way(backend: Backend) -> Way:
        run = partial(_attend, backend.name)
        if backend.name == "cudnn" and sizes.documents:
            return Way(backend.name, why_not=NO_SEGMENTS)
        if backend.prepare is None:
            return Way(backend.name, run)
        return Way(backend.name, run, prepare=lambda given: (*given, backend.prepare(call, *given, None)))  # type: ignore[misc]

    ways = [*_ways(attention.BACKENDS, lambda _: (call,), way), *_jax_attentions(sizes, call)]
    rows = f"documents of {sizes.documents}" if sizes.documents else "one document"
    shape = f"{B} x {T}, {N}/{K} heads of {H}, {rows}"
    exact = partial(_attend, "reference")
    return [Operation("attention", shape, arguments, given, exact, ways)]


def _attend(backend: str, arguments: Any, given: Any) -> jax.Array:
    (q_BTNH, k_BTKH, v_BTKH), (positions_BT, segments_BT, *prepared) = arguments, given
    return attention.attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_positions=positions_BT,
        k_positions=positions_BT,
        q_segments=segments_BT,
        k_segments=segments_BT,
        prepared=prepared[0] if prepared else None,
        backend=backend,
    )


def _jax_attentions(sizes: Sizes, call: attention.Call) -> list[Way]:
    def dot_product(implementation: str, arguments: Any, given: Any) -> jax.Array:
        segments_BT = given[1]
        mask = (segments_BT[:, None, :, None] == segments_BT[:, None, None, :]) if sizes.documents else None
        return jax.nn.dot_product_attention(*arguments, mask=mask, is_causal=True, implementation=implementation)  # type: ignore[call-overload]

    def splash(arguments: Any, given: Any) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        blocks: dict[str, Any] = {
            f"block_{name}": min(512, sizes.T)
            for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        }
        mask = masks.MultiHeadMask([masks.CausalMask((sizes.T, sizes.T))] * sizes.N)
        sized = kernels.BlockSizes(**blocks)
        kernel: Any = kernels.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sized)
        q, k, v = (a.swapaxes(1, 2) for a in arguments)

        def one_row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
            return kernel(q, k, v, segment_ids=kernels.SegmentIds(segments, segments))

        return jax.vmap(one_row)(q * jnp.asarray(sizes.H**-0.5, q.dtype), k, v, given[1]).swapaxes(1, 2)

    no_cudnn = attention.cudnn.why_not(call) or (NO_SEGMENTS if sizes.documents else None)
    no_splash = f"it is made for TPU, not {platform()}" if platform() != "tpu" else None
    return [
        Way("jax: dot_product_attention, XLA", partial(dot_product, "xla")),
        Way("jax: dot_product_attention, cuDNN", None if no_cudnn else partial(dot_product, "cudnn"), no_cudnn),
        Way("jax: splash attention", None if no_splash else splash, no_splash),
    ]


def heads(sizes: Sizes, dtype: Any, rng: np.random.Generator) -> list[Operation]:
    """Hidden states to log-probabilities, and to a sum of them; jax's own is log_softmax over all logits."""
    B, T, D, V = sizes.B, sizes.T, sizes.D, sizes.V
    arguments = (_random(rng, dtype, B, T, D), _random(rng, dtype, V, D, scale=D**-0.5))
    given = (jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), jnp.asarray(rng.random((B, T)), jnp.float32))

    def token_logprobs(backend: str, arguments: Any, given: Any) -> Any:
        h_BTD, w_VD = arguments
        return logprobs.token_logprobs(h_BTD, w_VD, given[0], backend)

    def cross_entropy(backend: str, arguments: Any, given: Any) -> Any:
        (h_BTD, w_VD), (targets_BT, weight_BT) = arguments, given
        return logprobs.cross_entropy(h_BTD, w_VD, targets_BT, weight_BT, backend=backend)[0]  # the others have no gradient

    def plain(arguments: Any, given: Any) -> Any:
        logits_BTV = jnp.einsum("BTD,VD->BTV", *arguments, preferred_element_type=jnp.float32)
        picked_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), given[0][..., None], axis=-1)[..., 0]
        return picked_BT, jax.nn.logsumexp(logits_BTV, axis=-1)

    def plain_loss(arguments: Any, given: Any) -> Any:
        return -(given[1] * plain(arguments, given)[0]).sum()

    shape = f"{B} x {T}, hidden {D}, vocabulary {V:,}"
    found = []
    for ours, theirs in ((token_logprobs, plain), (cross_entropy, plain_loss)):
        ways = _ways(
            logprobs.BACKENDS, lambda wanted: (*arguments, wanted, False), lambda b, run=ours: Way(b.name, partial(run, b.name))
        )
        ways.append(Way("jax: log_softmax", theirs))
        found.append(Operation(f"head, {ours.__name__}", shape, arguments, given, theirs, ways))
    return found


def linears(sizes: Sizes, dtype: Any, rng: np.random.Generator) -> list[Operation]:
    """Two projections of a layer, weights in float32 as they are kept; jax's own is einsum."""
    B, T, N, H, D, F = sizes.B, sizes.T, sizes.N, sizes.H, sizes.D, sizes.F
    found = []
    for pattern, x, w in (("BTD,DF->BTF", (D,), (D, F)), ("BTNH,NHD->BTD", (N, H), (N, H, D))):
        arguments = (_random(rng, dtype, B, T, *x), _random(rng, "float32", *w, scale=D**-0.5))

        def ours(backend: str, arguments: Any, _: Any, pattern: str = pattern) -> jax.Array:
            return linear.linear(pattern, arguments[0], arguments[1], backend)

        def theirs(arguments: Any, _: Any, pattern: str = pattern) -> jax.Array:
            return jnp.einsum(pattern, arguments[0], arguments[1].astype(arguments[0].dtype))

        ways = _ways(linear.BACKENDS, lambda _: (), lambda b, ours=ours: Way(b.name, partial(ours, b.name)))
        shape = f"{pattern}, {B} x {T}, {' x '.join(map(str, w))}"
        found.append(Operation("linear", shape, arguments, (), theirs, [*ways, Way("jax: einsum", theirs)]))
    return found


def norms(sizes: Sizes, dtype: Any, rng: np.random.Generator) -> list[Operation]:
    """RMSNorm of hidden states."""
    B, T, D = sizes.B, sizes.T, sizes.D
    arguments = (_random(rng, dtype, B, T, D), _random(rng, "float32", D))

    def run(backend: str, arguments: Any, _: Any) -> jax.Array:
        return norm.rms_norm(arguments[0], arguments[1], EPS, backend)

    ways = _ways(norm.BACKENDS, lambda _: (), lambda b: Way(b.name, partial(run, b.name)))
    return [Operation("norm", f"{B} x {T}, hidden {D}", arguments, (), partial(run, "reference"), ways)]


def swiglus(sizes: Sizes, dtype: Any, rng: np.random.Generator) -> list[Operation]:
    """silu(gate) * up."""
    B, T, F = sizes.B, sizes.T, sizes.F
    arguments = (_random(rng, dtype, B, T, F), _random(rng, dtype, B, T, F))

    def run(backend: str, arguments: Any, _: Any) -> jax.Array:
        return swiglu.swiglu(arguments[0], arguments[1], backend)

    ways = _ways(swiglu.BACKENDS, lambda _: (), lambda b: Way(b.name, partial(run, b.name)))
    return [Operation("swiglu", f"{B} x {T}, {F}", arguments, (), partial(run, "reference"), ways)]


def rotaries(sizes: Sizes, dtype: Any, rng: np.random.Generator) -> list[Operation]:
    """Heads normed and rotated, as Qwen3 has it."""
    B, T, N, H = sizes.B, sizes.T, sizes.N, sizes.H
    arguments = (_random(rng, dtype, B, T, N, H), _random(rng, "float32", H))
    angles = np.arange(T)[None, :, None] * 10_000.0 ** (-np.arange(H // 2) / (H // 2))
    angles = np.broadcast_to(np.concatenate([angles, angles], -1), (B, T, H))
    given = (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))

    def run(backend: str, arguments: Any, given: Any) -> jax.Array:
        return rotary.rotary(arguments[0], given[0], given[1], arguments[1], EPS, backend)

    ways = _ways(rotary.BACKENDS, lambda _: (arguments[0],), lambda b: Way(b.name, partial(run, b.name)))
    return [Operation("rotary", f"{B} x {T}, {N} heads of {H}", arguments, given, partial(run, "reference"), ways)]


Make = Callable[[Sizes, Any, np.random.Generator], list[Operation]]
OPERATIONS: Mapping[str, Make] = {
    "attention": attentions,
    "head": heads,
    "linear": linears,
    "norm": norms,
    "swiglu": swiglus,
    "rotary": rotaries,
}
"""Name -> its cases at some sizes. One for every folder of `maxi.kernels`; logprobs is called head, as in the config."""
