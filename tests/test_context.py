"""Rows split over the mesh axis `context`: the same losses and gradients as on one device. A whole run is in test_train."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from maxi import mesh
from maxi.errors import ConfigError
from maxi.models import from_hf_config
from maxi.params import init
from maxi.sections import MeshConfig
from maxi.train import _check_fit
from tests import test_pairs
from tests.test_step import SIZES, WINDOWS, assert_same, train


def test_split_rows_are_whole_rows() -> None:
    """Packed rows with padding and a window, together with everything else that splits them."""
    model = WINDOWS | {"max_window_layers": 0}
    split = {
        "axes": {"fsdp": 2, "context": 2, "tensor": 2},
        "micro": 2,
        "remat": "full",
        "head": "chunked",
        "attention": "ring",
    }
    assert_same(train(steps=2, model=model), train(steps=2, model=model, devices=8, **split), 1e-5)


def test_pairs_that_share_a_prompt() -> None:
    family = from_hf_config(test_pairs.SMALL)
    params, reference = (init(family.table, jax.random.key(seed)) for seed in (0, 1))
    batch = test_pairs.batch_of(test_pairs.rows(), reference, family, size=6)
    wanted = test_pairs.evaluate("dpo", family, params, batch)
    with jax.set_mesh(mesh.build(MeshConfig(replica=2, fsdp=1, context=4))):
        got = test_pairs.evaluate("dpo", family, params, batch, "ring")
    for key, value in wanted[0].items():
        np.testing.assert_allclose(got[0][key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted[1]))
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


@pytest.mark.parametrize(("seq_len", "context", "divides"), [(24, 4, True), (24, 8, False), (20, 4, False), (21, 1, True)])
def test_rows_that_do_not_divide_are_refused(seq_len: int, context: int, divides: bool) -> None:
    config: Any = SimpleNamespace(seq_len=seq_len, batch_size=8, micro_batches=1)
    tokenizer: Any = SimpleNamespace(vocab_size=96)
    check = (config, tokenizer, from_hf_config(SIZES), mesh.build(MeshConfig(context=context)))
    if divides:
        _check_fit(*check)
        return
    with pytest.raises(ConfigError, match=rf"seq_len {seq_len} does not divide into {2 * context}, 2 x mesh.context"):
        _check_fit(*check)
