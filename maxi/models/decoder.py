"""The forward pass of any `Model`: tokens to hidden states, hidden states to log-probabilities or logits.

What a layer does is read from the weights it has (biases, q/k norms) and from its `LayerKind` (window), never from a
family's name. Training rows go through the layers by one scan per block (see `model.blocks`) or unrolled; decoding
goes layer by layer with a key/value cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from maxi.kernels.attention import attention
from maxi.kernels.logprobs import token_logprobs
from maxi.models.model import Block, LayerKind, Model, blocks
from maxi.models.rope import cos_sin, rotate
from maxi.params import Tree
from maxi.sharding import constrain, einsum

UNROLL_AT_MOST = 12
"""On CPU, unrolled layers run some percent faster than scanned ones; beyond this depth compiling costs more."""


@dataclass(frozen=True)
class Compute:
    """How to compute, not what: see the `compute` section of the config for the choices."""

    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"
    unroll: bool = False
    attention: str = "auto"
    head: str = "auto"


class Cache(NamedTuple):
    """Keys and values [B, S, K, H] of each layer, and where each of the S slots stands; segment 0 marks a free slot."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions_BS: jax.Array
    segments_BS: jax.Array


class _Places(NamedTuple):
    """What attention and RoPE need to know about the tokens, the same in every layer."""

    cos: jax.Array
    sin: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array
    contexts_BT: jax.Array | None = None


def hidden(
    model: Model,
    params: Tree,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    compute: Compute = Compute(),
    contexts_BT: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states [B, T, D] in `compute.dtype` of packed rows; tokens, positions, segments int32 [B, T], and
    where answers share prompts contexts too (see `maxi.kernels.attention`)."""
    x_BTD = _embed(params, tokens_BT, compute)
    places = _Places(*cos_sin(model.rope, positions_BT), positions_BT, segments_BT, contexts_BT)

    def layer(x_BTD: jax.Array, weights: Tree, kind: LayerKind) -> jax.Array:
        return _layer(model, weights, kind, x_BTD, places, compute)[0]

    if compute.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if compute.remat == "dots" else None
        layer = jax.checkpoint(layer, policy=policy, static_argnums=(2,))
    for block in blocks(model.layers):
        if compute.unroll or block.repeats == 1:
            for number, kind in _numbered(block):
                x_BTD = layer(x_BTD, _weights_of(model, params, kind, number), kind)
        else:
            x_BTD = _scan(model, params, block, x_BTD, layer)
    return rms_norm(x_BTD, params["final_norm"], model.norm_eps)


def hidden_with_cache(
    model: Model,
    params: Tree,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Cache,
    slot: jax.Array,
    compute: Compute = Compute(),
) -> tuple[jax.Array, Cache]:
    """Hidden states [B, T, D] of new tokens that also see the cache, and the cache with them in slots [slot, slot + T).

    Slots may be filled in any order: what a token sees is decided by positions and segments, not by slots.
    """
    place = (jnp.int32(0), slot)
    k_positions = jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, place)
    k_segments = jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, place)
    x_BTD = _embed(params, tokens_BT, compute)
    places = _Places(*cos_sin(model.rope, positions_BT), positions_BT, segments_BT)
    keys, values = [], []
    for block in blocks(model.layers):
        for number, kind in _numbered(block):
            weights = _weights_of(model, params, kind, number)
            slots = (cache.k[number], cache.v[number], k_positions, k_segments, slot)
            x_BTD, (k, v) = _layer(model, weights, kind, x_BTD, places, compute, slots)
            keys.append(k)
            values.append(v)
    x_BTD = rms_norm(x_BTD, params["final_norm"], model.norm_eps)
    return x_BTD, Cache(tuple(keys), tuple(values), k_positions, k_segments)


def empty_cache(model: Model, B: int, S: int, dtype: Any) -> Cache:
    """A cache with S free slots."""
    shape = (B, S, model.table.sizes["K"], model.table.sizes["H"])
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in model.layers)  # noqa: E731
    places = lambda: jnp.zeros((B, S), jnp.int32)  # noqa: E731  (no buffer twice: a cache is donated whole)
    return Cache(zeros(), zeros(), places(), places())


def logprobs(
    model: Model, params: Tree, batch: dict[str, jax.Array], compute: Compute = Compute()
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and log-normaliser, float32 [B, T], of a batch as `maxi.data` makes it."""
    places = batch["positions"], batch["segments"]
    h_BTD = hidden(model, params, batch["tokens"], *places, compute, batch.get("contexts"))
    return token_logprobs(h_BTD, _head(params, compute), batch["targets"], compute.head)


def logits(params: Tree, h_BTD: jax.Array, compute: Compute = Compute()) -> jax.Array:
    """Float32 logits [B, T, V] of hidden states."""
    return einsum("BTD,VD->BTV", h_BTD, _head(params, compute), preferred_element_type=jnp.float32)


def rms_norm(x_BTD: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last dimension, computed in float32 (Zhang and Sennrich, arXiv:1910.07467)."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * weight.astype(jnp.float32)).astype(x_BTD.dtype)


def unstack(model: Model, params: Tree, dtype: Any) -> Tree:
    """The tree with each stack as a tuple of per-layer dicts, in `dtype`: for decoding, where slicing costs every token."""
    stacks = {
        stack: tuple({name: w[i].astype(dtype) for name, w in params[stack].items()} for i in range(len(layers)))
        for stack, layers in model.table.stacks.items()
    }
    return {name: stacks[name] if name in stacks else weight.astype(dtype) for name, weight in params.items()}


def _embed(params: Tree, tokens_BT: jax.Array, compute: Compute) -> jax.Array:
    # D is gathered first: a lookup in a table split both ways has no efficient partition
    embed_VD = constrain(params["embed"].astype(compute.dtype), "VD")
    return constrain(embed_VD[tokens_BT], "BTD")


def _head(params: Tree, compute: Compute) -> jax.Array:
    return params.get("lm_head", params["embed"]).astype(compute.dtype)


def _numbered(block: Block) -> Iterator[tuple[int, LayerKind]]:
    """(layer number, kind) of a block's layers, in order."""
    return enumerate(block.kinds * block.repeats, block.start)


def _weights_of(model: Model, params: Tree, kind: LayerKind, number: int) -> Tree:
    """One layer's weights, from a stacked or an unstacked tree."""
    index, stack = model.table.stacks[kind.stack].index(number), params[kind.stack]
    return stack[index] if isinstance(stack, tuple) else {name: weight[index] for name, weight in stack.items()}


def _scan(model: Model, params: Tree, block: Block, x_BTD: jax.Array, layer: Any) -> jax.Array:
    """The block by `lax.scan` over its repeats; a step runs one period of kinds."""
    slices: Tree = {}
    for stack in {kind.stack for kind in block.kinds}:
        layers = model.table.stacks[stack]
        each = sum(kind.stack == stack for kind in block.kinds)
        first = sum(number < block.start for number in layers)
        total = each * block.repeats
        slices[stack] = {
            name: (w if total == len(layers) else w[first : first + total]).reshape(block.repeats, each, *w.shape[1:])
            for name, w in params[stack].items()
        }

    def period(x_BTD: jax.Array, weights: Tree) -> tuple[jax.Array, None]:
        used = dict.fromkeys(slices, 0)
        for kind in block.kinds:
            x_BTD = layer(x_BTD, {name: w[used[kind.stack]] for name, w in weights[kind.stack].items()}, kind)
            used[kind.stack] += 1
        return x_BTD, None

    return jax.lax.scan(period, x_BTD, slices)[0]


def _layer(
    model: Model, w: Tree, kind: LayerKind, x_BTD: jax.Array, places: _Places, compute: Compute, slots: Any = None
) -> tuple[jax.Array, Any]:
    """One pre-norm layer; with `slots` (keys, values, positions, segments, slot) also the updated keys and values."""
    w = {name: weight.astype(compute.dtype) for name, weight in w.items()}
    h_BTD = rms_norm(x_BTD, w["attn_norm"], model.norm_eps)
    a_BTD, kept = _attend(model, w, kind, h_BTD, places, compute, slots)
    x_BTD = x_BTD + a_BTD
    h_BTD = rms_norm(x_BTD, w["mlp_norm"], model.norm_eps)
    gate_BTF = _bias(einsum("BTD,DF->BTF", h_BTD, w["w_gate"]), w.get("b_gate"))
    up_BTF = _bias(einsum("BTD,DF->BTF", h_BTD, w["w_up"]), w.get("b_up"))
    m_BTD = einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, w["w_down"])
    return x_BTD + _bias(m_BTD, w.get("b_down")), kept


def _attend(
    model: Model, w: Tree, kind: LayerKind, h_BTD: jax.Array, places: _Places, compute: Compute, slots: Any
) -> tuple[jax.Array, Any]:
    q_BTNH = _bias(einsum("BTD,DNH->BTNH", h_BTD, w["w_q"]), w.get("b_q"))
    k_BSKH = _bias(einsum("BTD,DKH->BTKH", h_BTD, w["w_k"]), w.get("b_k"))
    v_BSKH = _bias(einsum("BTD,DKH->BTKH", h_BTD, w["w_v"]), w.get("b_v"))
    if "q_norm" in w:
        q_BTNH, k_BSKH = rms_norm(q_BTNH, w["q_norm"], model.norm_eps), rms_norm(k_BSKH, w["k_norm"], model.norm_eps)
    q_BTNH, k_BSKH = rotate(q_BTNH, places.cos, places.sin), rotate(k_BSKH, places.cos, places.sin)
    k_positions, k_segments = places.positions_BT, places.segments_BT
    if slots is not None:
        k_cache, v_cache, k_positions, k_segments, slot = slots
        k_BSKH = jax.lax.dynamic_update_slice(k_cache, k_BSKH.astype(k_cache.dtype), (0, slot, 0, 0))
        v_BSKH = jax.lax.dynamic_update_slice(v_cache, v_BSKH.astype(v_cache.dtype), (0, slot, 0, 0))
    a_BTNH = attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        q_positions=places.positions_BT,
        k_positions=k_positions,
        q_segments=places.segments_BT,
        k_segments=k_segments,
        q_contexts=places.contexts_BT,
        window=kind.window,
        backend=compute.attention if slots is None else "reference",
    )
    if slots is None:
        o_BTD = einsum("BTNH,NHD->BTD", a_BTNH, w["w_o"])
    else:  # one contracting dimension: with two, XLA:CPU copies the weight into another order for every token
        o_BTD = constrain(a_BTNH.reshape(*h_BTD.shape[:2], -1) @ w["w_o"].reshape(-1, h_BTD.shape[-1]), "BTD")
    return _bias(o_BTD, w.get("b_o")), (k_BSKH, v_BSKH)


def _bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias
