"""Matmuls with weights: values and gradients against the definition's, in every pattern of the decoder."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi import mesh
from maxi.errors import ConfigError
from maxi.kernels import cpu
from maxi.kernels.linear import linear
from maxi.kernels.platform import compiling_for
from maxi.sections import MeshConfig

SIZES = dict(zip("BTDNKHFV", (2, 15, 32, 4, 2, 8, 24, 33), strict=True))
PATTERNS = ("BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD", "BTD,VD->BTV")


def _inputs(pattern: str, dtype: str = "float32", rows: int = 15) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng, sizes = np.random.default_rng(0), SIZES | {"T": rows}
    x, w, out = (rng.normal(size=[sizes[d] for d in dims]) for dims in pattern.replace("->", ",").split(","))
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(out, dtype)


def _gradients(pattern: str, backend: str, x: Any, w: Any, dout: Any) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(lambda x, w: linear(pattern, x, w, backend), x, w)
    return out, *pull(dout)


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_float32_is_the_definition(pattern: str, rows: int) -> None:
    """Few rows have a form of their own."""
    arrays = _inputs(pattern, rows=rows)
    got, wanted = (_gradients(pattern, backend, *arrays) for backend in ("cpu", "reference"))
    exact = np.einsum(pattern, *(np.asarray(a, np.float64) for a in arrays[:2]))
    np.testing.assert_allclose(got[0], exact, atol=2e-5)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["multiplies bfloat16", "widens"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_errs_at_most_twice_the_definition(pattern: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda _: fast)
    x, w, dout = _inputs(pattern, "bfloat16", rows=16)
    exact = _gradients(pattern, "reference", x.astype(jnp.float32), w, dout.astype(jnp.float32))
    got, reference = (_gradients(pattern, backend, x, w, dout) for backend in ("cpu", "reference"))
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b, c in zip(got, reference, exact, strict=True):
        error, allowed = (float(jnp.abs(each.astype(jnp.float32) - c).max()) for each in (a, b))
        assert error <= 2 * allowed


def test_both_operands_of_every_dot_have_one_dtype() -> None:
    """Autodiff of a dot with a float32 result would multiply bfloat16 with float32."""
    text = jax.jit(partial(_gradients, "BTD,DF->BTF", "cpu")).lower(*_inputs("BTD,DF->BTF", "bfloat16")).as_text()
    dots = [line.partition(" : ")[2] for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 3
    for line in dots:
        left, right = line.partition("->")[0].strip(" ()").split(", ")
        assert left.removesuffix(">").rpartition("x")[2] == right.removesuffix(">").rpartition("x")[2], line


def test_a_result_may_be_wider() -> None:
    x, w, _ = _inputs("BTD,VD->BTV", "bfloat16")
    for backend in ("cpu", "reference"):
        assert linear("BTD,VD->BTV", x, w, backend, jnp.float32).dtype == jnp.float32


def test_what_chooses_the_form() -> None:
    x, w, _ = _inputs("BTD,DF->BTF")
    with compiling_for("tpu"), pytest.raises(ConfigError, match="made for CPU, not tpu"):
        linear("BTD,DF->BTF", x, w, "cpu")
    split = mesh.build(MeshConfig(tensor=2, fsdp=1), jax.devices()[:2])
    with jax.set_mesh(split), pytest.raises(ConfigError, match="the mesh splits arrays"):
        jax.eval_shape(lambda: linear("BTD,DF->BTF", x, w, "cpu"))
    with jax.set_mesh(mesh.build(MeshConfig(), jax.devices()[:1])):
        assert cpu.why_not() is None


@pytest.mark.parametrize(
    ("info", "fast"),
    [
        ("vendor_id : GenuineIntel\nflags : fpu avx512_bf16 avx512_fp16", False),
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16 amx_tile", True),
        ("vendor_id : AuthenticAMD\nflags : avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("", False),
    ],
)
def test_which_processors_multiply_bfloat16(info: str, fast: bool) -> None:
    assert cpu.multiplies_bfloat16(info) is fast


@pytest.mark.parametrize("rows", [16, 15])
def test_products_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an odd number of rows, which no two equal parts make up."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda _: True)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(1, rows, n)), jnp.bfloat16) for n in (5, 3))
    wanted = np.einsum("BTV,BTD->VD", *(np.asarray(x, np.float64) for x in (a, b)))
    np.testing.assert_allclose(cpu.product_of_rows(a, b), wanted, atol=1e-5)


def test_what_is_computed_once_stays_the_same() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    assert (cpu.computed_once(x) == x).all()
    assert "dot_general" in jax.jit(cpu.computed_once).lower(x).as_text()


def test_what_is_kept_comes_back() -> None:
    tree = (jnp.asarray([1.5, -2.0], jnp.bfloat16), jnp.asarray([1.1], jnp.float32), None)
    assert [a.dtype for a in jax.tree.leaves(cpu.kept(tree))] == [jnp.uint16, jnp.float32]
    for a, b in zip(jax.tree.leaves(cpu.restored(cpu.kept(tree))), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype and (a == b).all()
