"""The forward pass of any `Model`: tokens to hidden states, hidden states to log-probabilities or logits.

What a layer does is read from the weights it has (biases, q/k norms) and from its `LayerKind` (window), never from a
family's name. Training rows go through the layers by one scan per block (see `model.blocks`) or unrolled; decoding
goes layer by layer with a key/value cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from maxi import fsdp
from maxi.adapters import virtual
from maxi.adapters.weight import Adapted, cast, linear, rows, split_axes, whole
from maxi.kernels.attention import attention, prepare, ring
from maxi.kernels.linear import linear as product
from maxi.kernels.logprobs import cross_entropy, token_logprobs
from maxi.kernels.norm import rms_norm
from maxi.kernels.rotary import rotary
from maxi.kernels.swiglu import swiglu
from maxi.models.model import Block, LayerKind, Model, blocks
from maxi.models.rope import cos_sin
from maxi.params import Tree
from maxi.sharding import constrain, local, shards

UNROLL_AT_MOST = 12
"""On CPU, unrolled layers run some percent faster than scanned ones; beyond this depth compiling costs more."""


_OF_TOKENS = ("tokens", "targets", "positions", "segments", "contexts", "loss_weight")
"""What a model needs of a batch."""


@dataclass(frozen=True)
class Compute:
    """How to compute, not what: see the `compute` section of the config for the choices."""

    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"
    unroll: bool = False
    attention: str = "auto"
    head: str = "auto"


class Cache(NamedTuple):
    """Keys and values [B, K, S, H] of each layer, and where each of the S slots stands; segment 0 marks a free slot."""

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
    prepared: tuple[Any, ...] = ()
    """What attention made of these rows beforehand, for each of `_windows`."""


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
    x_BTD = _embed(model, params, tokens_BT, positions_BT, compute)
    prepared = _prepare(model, positions_BT, segments_BT, contexts_BT, compute)
    places = _Places(*cos_sin(model.rope, positions_BT), positions_BT, segments_BT, contexts_BT, prepared)
    axes = split_axes(model.table, params)
    for block in blocks(model.layers):
        if compute.unroll or block.repeats == 1:
            # jax traces, differentiates and lowers a jitted layer once for all that are alike, which the compiler inlines
            layers = {kind: jax.jit(_remat(model, (kind,), (_axes_of(axes, kind),), compute)) for kind in block.kinds}
            for number, kind in _numbered(block):
                x_BTD = layers[kind](x_BTD, (_weights_of(model, params, kind, number),), places)
        else:
            weights, split = _slices(model, params, block), tuple(_axes_of(axes, kind) for kind in block.kinds)
            x_BTD = _scan(model, block, weights, split, x_BTD, places, compute)
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
    x_BTD = _embed(model, params, tokens_BT, positions_BT, compute)
    places = _Places(*cos_sin(model.rope, positions_BT), positions_BT, segments_BT)
    keys, values = [], []
    for block in blocks(model.layers):
        layers = {kind: jax.jit(partial(_layer, model, kind, compute)) for kind in block.kinds}  # see `hidden`
        for number, kind in _numbered(block):
            slots = (cache.k[number], cache.v[number], k_positions, k_segments, slot)
            x_BTD, (k, v) = layers[kind](_weights_of(model, params, kind, number), x_BTD, places, slots)
            keys.append(k)
            values.append(v)
    x_BTD = rms_norm(x_BTD, params["final_norm"], model.norm_eps)
    return x_BTD, Cache(tuple(keys), tuple(values), k_positions, k_segments)


def empty_cache(model: Model, B: int, S: int, dtype: Any) -> Cache:
    """A cache with S free slots."""
    shape = (B, model.table.sizes["K"], S, model.table.sizes["H"])
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in model.layers)  # noqa: E731
    places = lambda: jnp.zeros((B, S), jnp.int32)  # noqa: E731  (no buffer twice: a cache is donated whole)
    return Cache(zeros(), zeros(), places(), places())


def logprobs(
    model: Model, params: Tree, batch: dict[str, jax.Array], compute: Compute = Compute()
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and log-normaliser, float32 [B, T], of a batch as `maxi.data` makes it."""
    return Logprobs(model, compute)(params, batch)


@dataclass(frozen=True)
class Logprobs:
    """The model as objectives see it: `logprobs`, and the weighted sum of them that most objectives are."""

    model: Model
    compute: Compute = Compute()

    def __call__(self, params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """See `logprobs`."""
        batch = _laid_out(batch)
        h_BTD, head_VD, by_vocabulary = self._head(params, batch)
        logprob_BT, norm_BT = token_logprobs(h_BTD, head_VD, batch["targets"], self.compute.head, by_vocabulary)
        return ring.straight(logprob_BT), ring.straight(norm_BT)

    def cross_entropy(self, params: Tree, batch: dict[str, jax.Array], z_loss: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `maxi.kernels.logprobs.cross_entropy`; the weights are the batch's `loss_weight`."""
        batch = _laid_out(batch)
        h_BTD, head_VD, by_vocabulary = self._head(params, batch)
        return cross_entropy(h_BTD, head_VD, batch["targets"], batch["loss_weight"], z_loss, self.compute.head, by_vocabulary)

    def _head(self, params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, bool]:
        """Final hidden states; the head, or this device's part of it; and whether that is part of the vocabulary."""
        places = batch["positions"], batch["segments"]
        h_BTD = hidden(self.model, params, batch["tokens"], *places, self.compute, batch.get("contexts"))
        name, dtype = "embed" if self.model.tied else "lm_head", self.compute.dtype
        head, _ = virtual.apart(params[name])
        axes = split_axes(self.model.table.only([name]), {name: head})[name]
        by_parts = fsdp.by_hand() and not isinstance(head, Adapted) and axes == 0
        if by_parts and shards("T") == 1 and self.compute.head in ("auto", "split"):
            return h_BTD, whole(head, dtype), True
        return h_BTD, whole(fsdp.all_whole(head, axes, dtype), dtype), False


def logits(params: Tree, h_BTD: jax.Array, compute: Compute = Compute()) -> jax.Array:
    """Float32 logits [B, T, V] of hidden states."""
    head, _ = virtual.apart(params.get("lm_head", params["embed"]))
    head_VD = whole(head, compute.dtype) if isinstance(head, Adapted) else head
    return product("BTD,VD->BTV", h_BTD.astype(compute.dtype), head_VD, dtype=jnp.float32)


def unstack(model: Model, params: Tree, dtype: Any) -> Tree:
    """The tree with each stack as a tuple of per-layer dicts, in `dtype`: for decoding, where slicing costs every token."""
    stacks = {
        stack: tuple(cast(jax.tree.map(itemgetter(i), params[stack]), dtype) for i in range(len(layers)))
        for stack, layers in model.table.stacks.items()
    }
    return {name: stacks[name] if name in stacks else cast(weight, dtype) for name, weight in params.items()}


def _laid_out(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a model needs of a batch, its tokens in the order in which devices hold them."""
    return {name: ring.zigzag(batch[name]) for name in _OF_TOKENS if name in batch}


def _windows(model: Model) -> tuple[int | None, ...]:
    """The windows that its layers have, each once."""
    return tuple(dict.fromkeys(kind.window for kind in model.layers))


def _prepare(
    model: Model, positions_BT: jax.Array, segments_BT: jax.Array, contexts_BT: jax.Array | None, compute: Compute
) -> tuple[Any, ...]:
    sizes = model.table.sizes
    heads = (sizes["N"], sizes["K"], sizes["H"])
    places = (positions_BT, segments_BT, contexts_BT)
    return tuple(prepare(heads, compute.dtype, *places, window, compute.attention) for window in _windows(model))


def _embed(model: Model, params: Tree, tokens_BT: jax.Array, positions_BT: jax.Array, compute: Compute) -> jax.Array:
    axes = split_axes(model.table.only(["embed"]), params)["embed"]
    embed, prompt_SD = virtual.apart(fsdp.all_whole(params["embed"], axes, compute.dtype))
    return constrain(virtual.put(_rows_of(embed, tokens_BT, compute), prompt_SD, positions_BT), "BTD")


def _rows_of(embed: Any, tokens_BT: jax.Array, compute: Compute) -> jax.Array:
    if isinstance(embed, Adapted):
        return rows(embed, tokens_BT, compute.dtype)
    embed_VD = embed.astype(compute.dtype)
    if not fsdp.by_hand():  # the partitioner has no efficient lookup in a table that is split both ways
        embed_VD = constrain(embed_VD, "VD")
    elif shards("V") > 1 and shards("T") > 1:  # the partitioner of jax 0.12 aborts on this lookup, split both ways by it
        return local(_own_rows, ["VD", "BT"], "BTD")(embed_VD, tokens_BT)
    return embed_VD[tokens_BT]


def _own_rows(embed_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Embeddings of tokens on a device that has a part of the vocabulary, with the others' help."""
    V = embed_VD.shape[0]
    at_BT = tokens_BT - jax.lax.axis_index("tensor") * V
    mine_BT = (at_BT >= 0) & (at_BT < V)
    return jax.lax.psum(jnp.where(mine_BT[..., None], embed_VD[jnp.where(mine_BT, at_BT, 0)], 0), "tensor")


def _numbered(block: Block) -> Iterator[tuple[int, LayerKind]]:
    """(layer number, kind) of a block's layers, in order."""
    return enumerate(block.kinds * block.repeats, block.start)


def _weights_of(model: Model, params: Tree, kind: LayerKind, number: int) -> Tree:
    """One layer's weights, from a stacked or an unstacked tree."""
    index, stack = model.table.stacks[kind.stack].index(number), params[kind.stack]
    return stack[index] if isinstance(stack, tuple) else jax.tree.map(itemgetter(index), stack)


def _axes_of(axes: Tree, kind: LayerKind) -> Tree:
    """Along which axis one layer's weights are split; -1: not."""
    return jax.tree.map(lambda axis: max(axis - 1, -1), axes[kind.stack])


def _slices(model: Model, params: Tree, block: Block) -> tuple[Tree, ...]:
    """The weights of each kind of the block's period, stacked along its repeats."""
    slices, used = [], dict.fromkeys(model.table.stacks, 0)
    for kind in block.kinds:
        layers, each = model.table.stacks[kind.stack], sum(kind.stack == other.stack for other in block.kinds)
        first = sum(number < block.start for number in layers)
        end = first + each * block.repeats
        at = used[kind.stack]
        is_whole = each == 1 and end - first == len(layers)
        part = slice(first + at, end, each)
        slices.append(params[kind.stack] if is_whole else jax.tree.map(itemgetter(part), params[kind.stack]))
        used[kind.stack] += 1
    return tuple(slices)


def _period(model: Model, kinds: tuple[LayerKind, ...], compute: Compute) -> Any:
    """The layers of these kinds one after the other, as a function of x, their whole weights and the places."""

    def run(x_BTD: jax.Array, weights: tuple[Tree, ...], places: _Places) -> jax.Array:
        for kind, w in zip(kinds, weights, strict=True):
            x_BTD = _layer(model, kind, compute, w, x_BTD, places)[0]
        return x_BTD

    return run


def _remat(model: Model, kinds: tuple[LayerKind, ...], axes: tuple[Tree, ...], compute: Compute) -> Any:
    """`_period` on weights that may be split, keeping for the backward pass what `compute.remat` says and never a
    gathered weight."""
    run = _period(model, kinds, compute)

    def gather_and_run(x_BTD: jax.Array, weights: tuple[Tree, ...], places: _Places) -> jax.Array:
        return run(x_BTD, fsdp.all_whole(weights, axes, compute.dtype), places)

    policies = jax.checkpoint_policies
    if compute.remat == "none":
        keep = policies.save_anything_except_these_names(fsdp.GATHERED)
        return jax.checkpoint(gather_and_run, policy=keep) if fsdp.by_hand() else gather_and_run
    return jax.checkpoint(gather_and_run, policy=policies.dots_with_no_batch_dims_saveable if compute.remat == "dots" else None)


def _scan(
    model: Model, block: Block, weights: tuple[Tree, ...], axes: Any, x_BTD: jax.Array, places: _Places, compute: Compute
) -> jax.Array:
    """The block by a scan over its repeats; a step runs one period of kinds."""
    if fsdp.by_hand() and compute.remat == "full":
        return fsdp.scan_ahead(_period(model, block.kinds, compute), weights, axes, x_BTD, places, compute.dtype)
    layer = _remat(model, block.kinds, axes, compute)
    return jax.lax.scan(lambda x_BTD, w: (layer(x_BTD, w, places), None), x_BTD, weights)[0]


def _layer(
    model: Model, kind: LayerKind, compute: Compute, w: Tree, x_BTD: jax.Array, places: _Places, slots: Any = None
) -> tuple[jax.Array, Any]:
    """One pre-norm layer; with `slots` (keys, values, positions, segments, slot) also the updated keys and values."""
    h_BTD = rms_norm(x_BTD, w["attn_norm"], model.norm_eps)
    a_BTD, kept = _attend(model, w, kind, h_BTD, places, compute, slots)
    x_BTD = x_BTD + a_BTD
    h_BTD = rms_norm(x_BTD, w["mlp_norm"], model.norm_eps)
    gate_BTF = _bias(linear("BTD,DF->BTF", h_BTD, w["w_gate"]), w.get("b_gate"))
    up_BTF = _bias(linear("BTD,DF->BTF", h_BTD, w["w_up"]), w.get("b_up"))
    m_BTD = (jax.checkpoint(_down) if isinstance(w["w_down"], Adapted) else _down)(gate_BTF, up_BTF, w["w_down"])
    return x_BTD + _bias(m_BTD, w.get("b_down")), kept


def _down(gate_BTF: jax.Array, up_BTF: jax.Array, w_down: Any) -> jax.Array:
    """The MLP's second half. Beside a frozen weight only the adapter needs what is between, which is computed again instead."""
    return linear("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), w_down)


def _attend(
    model: Model, w: Tree, kind: LayerKind, h_BTD: jax.Array, places: _Places, compute: Compute, slots: Any
) -> tuple[jax.Array, Any]:
    q_BTNH = _bias(linear("BTD,DNH->BTNH", h_BTD, w["w_q"]), w.get("b_q"))
    k_BSKH = _bias(linear("BTD,DKH->BTKH", h_BTD, w["w_k"]), w.get("b_k"))
    v_BSKH = _bias(linear("BTD,DKH->BTKH", h_BTD, w["w_v"]), w.get("b_v"))
    q_BTNH = rotary(q_BTNH, places.cos, places.sin, w.get("q_norm"), model.norm_eps)
    k_BSKH = rotary(k_BSKH, places.cos, places.sin, w.get("k_norm"), model.norm_eps)
    k_BSKH, v_BSKH = (
        virtual.put(x, virtual.apart(w[name])[1], places.positions_BT) for x, name in ((k_BSKH, "w_k"), (v_BSKH, "w_v"))
    )
    k_positions, k_segments, kept = places.positions_BT, places.segments_BT, None
    if slots is not None:
        k_cache, v_cache, k_positions, k_segments, slot = slots
        k_cache, v_cache = _placed(k_cache, k_BSKH, slot), _placed(v_cache, v_BSKH, slot)
        k_BSKH, v_BSKH, kept = k_cache.swapaxes(1, 2), v_cache.swapaxes(1, 2), (k_cache, v_cache)
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
        prepared=places.prepared[_windows(model).index(kind.window)] if slots is None else None,
        backend=compute.attention if slots is None else "auto",
    )
    return _bias(linear("BTNH,NHD->BTD", a_BTNH, w["w_o"]), w.get("b_o")), kept


def _placed(cache_BKSH: jax.Array, new_BTKH: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache with new keys or values in slots [slot, slot + T)."""
    return jax.lax.dynamic_update_slice(cache_BKSH, new_BTKH.swapaxes(1, 2).astype(cache_BKSH.dtype), (0, 0, slot, 0))


def _bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias.astype(x.dtype)
