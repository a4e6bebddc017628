"""What a model is: its table, its layers, and the few numbers that weights do not carry.

A `Model` describes and holds no arrays. Layers of different kinds repeat with a period; `blocks` finds it, so that the
decoder compiles one period and scans it, however the kinds alternate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from maxi.models.rope import Rope
from maxi.params import Param, Table, matmul_flops_per_token


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes one layer's computation: where its weights are, and how far back it attends."""

    stack: str = "layers"
    window: int | None = None
    """Keys more than window - 1 positions back are not attended to; None: all are."""


@dataclass(frozen=True)
class Block:
    """`kinds` one after the other, `repeats` times, beginning with layer `start`."""

    start: int
    kinds: tuple[LayerKind, ...]
    repeats: int


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer. `hf_config` is the config.json it came from, which export writes back."""

    family: str
    table: Table
    layers: tuple[LayerKind, ...]
    rope: Rope
    norm_eps: float
    hf_config: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.table.sizes["V"]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head" not in self.table.params

    def train_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward FLOPs a token costs in a sequence: three times the forward matmuls, causal attention half.

        The usual model FLOPs (PaLM, arXiv:2204.02311, appendix B), with attention counted up to each layer's window.
        """
        heads = self.table.sizes["N"] * self.table.sizes["H"]
        spans = (min(layer.window or seq_len, seq_len) for layer in self.layers)
        mean_keys = sum(span - span * (span - 1) / (2 * seq_len) for span in spans)
        return 3 * (matmul_flops_per_token(self.table) + 4 * heads * mean_keys)


def restacked(model: Model, table: Table) -> Model:
    """The same model with its layers in the stacks of `table`."""
    stack_of = {layer: stack for stack, layers in table.stacks.items() for layer in layers}
    layers = tuple(replace(kind, stack=stack_of[number]) for number, kind in enumerate(model.layers))
    return replace(model, table=table, layers=layers)


def blocks(layers: tuple[LayerKind, ...]) -> tuple[Block, ...]:
    """Splits layers into runs of a repeating period, each as long as possible, the shortest period first.

    F F F W W -> (F) x 3, (W) x 2;  W F W F -> (W F) x 2.
    """
    found: list[Block] = []
    start = 0
    while start < len(layers):
        best = Block(start, layers[start : start + 1], 1)
        for period in range(1, (len(layers) - start) // 2 + 1):
            kinds, repeats = layers[start : start + period], 1
            while layers[start + repeats * period : start + (repeats + 1) * period] == kinds:
                repeats += 1
            if repeats > 1 and repeats * period > len(best.kinds) * best.repeats:
                best = Block(start, kinds, repeats)
        found.append(best)
        start += len(best.kinds) * best.repeats
    return tuple(found)


def decoder_table(
    sizes: Mapping[str, int],
    stacks: Mapping[str, tuple[int, ...]],
    *,
    init_std: float,
    tied: bool,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> Table:
    """The weights of a pre-norm decoder with gated MLPs, the shape that Llama, Qwen2 and Qwen3 share.

    The features say which weights exist; the decoder then does what the weights it finds ask for.
    """
    hf = "model.layers.{L}."
    layer = {
        "attn_norm": Param("LD", hf + "input_layernorm.weight", "D", "ones"),
        "w_q": Param("LDNH", hf + "self_attn.q_proj.weight", "(N H) D"),
        "w_k": Param("LDKH", hf + "self_attn.k_proj.weight", "(K H) D"),
        "w_v": Param("LDKH", hf + "self_attn.v_proj.weight", "(K H) D"),
        "w_o": Param("LNHD", hf + "self_attn.o_proj.weight", "D (N H)"),
        "mlp_norm": Param("LD", hf + "post_attention_layernorm.weight", "D", "ones"),
        "w_gate": Param("LDF", hf + "mlp.gate_proj.weight", "F D"),
        "w_up": Param("LDF", hf + "mlp.up_proj.weight", "F D"),
        "w_down": Param("LFD", hf + "mlp.down_proj.weight", "D F"),
    }
    if qkv_bias:
        layer["b_q"] = Param("LNH", hf + "self_attn.q_proj.bias", "(N H)", "zeros")
        layer["b_k"] = Param("LKH", hf + "self_attn.k_proj.bias", "(K H)", "zeros")
        layer["b_v"] = Param("LKH", hf + "self_attn.v_proj.bias", "(K H)", "zeros")
    if o_bias:
        layer["b_o"] = Param("LD", hf + "self_attn.o_proj.bias", "D", "zeros")
    if mlp_bias:
        layer["b_gate"] = Param("LF", hf + "mlp.gate_proj.bias", "F", "zeros")
        layer["b_up"] = Param("LF", hf + "mlp.up_proj.bias", "F", "zeros")
        layer["b_down"] = Param("LD", hf + "mlp.down_proj.bias", "D", "zeros")
    if qk_norm:
        layer["q_norm"] = Param("LH", hf + "self_attn.q_norm.weight", "H", "ones")
        layer["k_norm"] = Param("LH", hf + "self_attn.k_norm.weight", "H", "ones")
    params = {"embed": Param("VD", "model.embed_tokens.weight", "V D")}
    params |= {f"{stack}.{name}": param for stack in stacks for name, param in layer.items()}
    params |= {"final_norm": Param("D", "model.norm.weight", "D", "ones")}
    if not tied:
        params["lm_head"] = Param("VD", "lm_head.weight", "V D")
    return Table(params, sizes, stacks, init_std)
