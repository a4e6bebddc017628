"""Hugging Face folders in and out: same logits, same bytes, and every damage is one line."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from maxi import hf, mesh, params
from maxi.data import bpe
from maxi.errors import EnvironmentFault, ModelFolderError, NumericsError
from maxi.models import Model, from_hf_config
from maxi.sections import MeshConfig
from tests import tiny
from tests.models.test_parity import CASES

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 21))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def small(**fields: Any) -> tuple[Model, params.Tree]:
    model = from_hf_config({"model_type": "qwen2", **tiny.SIZES, **fields})
    rng = np.random.default_rng(0)
    return model, model.table.map(lambda path, _: jnp.asarray(rng.normal(size=model.table.shape(path)), jnp.float32))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_tree(a: params.Tree, b: params.Tree) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.all(same)


# What leaves is what came


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_we_convert(name: str, tmp_path: Path) -> None:
    family, fields = CASES[name]
    source = tiny.save(tmp_path / "in", family, **fields)
    out = hf.convert(tmp_path / "in", tmp_path / "out")
    auto: Any = AutoModelForCausalLM
    loaded, info = auto.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert np.array_equal(tiny.logits(loaded, TOKENS), tiny.logits(source, TOKENS))
    assert same_bytes(weights(out), weights(tmp_path / "in"))
    says_the_same_to_transformers_4(out)
    assert hf.read_config(out).layers == hf.read_config(tmp_path / "in").layers


def says_the_same_to_transformers_4(folder: Path) -> None:
    """transformers 4 looks for rope_theta, and for rope_scaling beside it, and knows no rope_parameters."""
    config, rope = config_of(folder), hf.read_config(folder).rope
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == rope.theta
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert {"head_dim", "num_key_value_heads", "tie_word_embeddings", "architectures"} <= config.keys()
    del config["rope_parameters"]
    assert from_hf_config(config).rope == rope
    if rope.kind in ("llama3", "yarn"):
        assert isinstance(config["rope_scaling"]["original_max_position_embeddings"], int)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conversion_keeps_every_byte(dtype: str, tied: bool, tmp_path: Path) -> None:
    tiny.save(tmp_path / "in", "qwen2", dtype, shard="20KB", tie_word_embeddings=tied)
    assert (tmp_path / "in/model.safetensors.index.json").is_file()
    out = hf.convert(tmp_path / "in", tmp_path / "out")
    assert same_bytes(weights(out), weights(tmp_path / "in"))
    assert ("lm_head.weight" in weights(out)) is not tied
    assert config_of(out)["dtype"] == dtype


def test_conversion_keeps_mixed_dtypes_denormals_and_signed_zeros(tmp_path: Path) -> None:
    tiny.save(tmp_path / "in", "qwen3", "bfloat16", head_dim=16)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "norm" in name:
                tensors[name] = tensor.float() * 1.00001
        tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[0, :4] = torch.tensor([1, -32768, -32767, 127])
        tensors["model.norm.weight"][:3] = torch.tensor([1e-45, -0.0, -1e-40])

    edit_weights(tmp_path / "in", edit)
    out = hf.convert(tmp_path / "in", tmp_path / "out")
    assert same_bytes(weights(out), weights(tmp_path / "in"))
    assert config_of(out)["dtype"] == "bfloat16"


def test_first_weights_return_bitwise_in_one_file_and_in_shards(tmp_path: Path) -> None:
    model = small()[0]
    tree = params.init(model.table, jax.random.key(0))
    hf.write(model, tree, tmp_path / "one")
    hf.write(model, tree, tmp_path / "many", max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 2
    assert all((tmp_path / "many" / shard).stat().st_size < 24_000 for shard in shards)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * params.count(model.table)
    for folder in ("one", "many"):
        assert same_tree(hf.read(tmp_path / folder)[1], tree)
    auto: Any = AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.lm_head.weight, torch.tensor(np.asarray(tree["lm_head"])))


def test_dtypes_are_cast_on_request(tmp_path: Path) -> None:
    model, tree = small()
    out = hf.write(model, tree, tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert config_of(out)["torch_dtype"] == "bfloat16"
    expected = jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree)
    assert same_tree(hf.read(out)[1], expected)
    assert same_tree(hf.read(out, dtype="float32")[1], jax.tree.map(lambda w: w.astype(jnp.float32), expected))


def test_reading_onto_a_mesh_gives_the_same_values_where_the_table_puts_them(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2", shard="20KB")
    devices = mesh.build(MeshConfig(replica=2, fsdp=2, tensor=2))
    model, sharded = hf.read(tmp_path, mesh=devices)
    assert same_tree(sharded, hf.read(tmp_path)[1])
    expected = params.shardings(model.table, devices)
    assert jax.tree.all(jax.tree.map(lambda w, s: w.sharding.is_equivalent_to(s, w.ndim), sharded, expected))
    out = hf.write(model, sharded, tmp_path / "out")
    assert same_bytes(weights(out), weights(tmp_path))


def test_the_host_holds_a_few_tensors_at_a_time(tmp_path: Path) -> None:
    model, tree = small(hidden_size=256, intermediate_size=512, num_hidden_layers=12, vocab_size=512)
    tracemalloc.start()
    hf.write(model, tree, tmp_path / "out")
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    hf.read(tmp_path / "out")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tensor, whole = 4 * 256 * 512, 4 * params.count(model.table)
    assert whole > 30 * tensor
    assert max(written, read) < 5 * tensor


# config.json and the files beside it


def test_fields_of_the_source_survive(tmp_path: Path) -> None:
    tiny.save(tmp_path / "in", "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    edit_config(tmp_path / "in", eos_token_id=5, bos_token_id=3, pretraining_tp=1)
    (tmp_path / "in/generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.7, "do_sample": true}')
    out = hf.convert(tmp_path / "in", tmp_path / "out")
    before, after = config_of(tmp_path / "in"), config_of(out)
    assert {key: after[key] for key in before} == before
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [5, 7], "temperature": 0.7, "do_sample": True}
    assert hf.read_config(out).layers == hf.read_config(tmp_path / "in").layers


def test_the_tokenizer_and_its_ids_are_carried_over(tmp_path: Path) -> None:
    tokenizer = bpe.train(["the sea was calm and every lamp on board shone"], 280, tmp_path / "tokenizer")
    model, tree = small(vocab_size=tokenizer.vocab_size, eos_token_id=2, bos_token_id=1)
    out = hf.write(model, tree, tmp_path / "out", tokenizer=tokenizer)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("the lamp<|im_end|>")["input_ids"] == tokenizer.encode(["the lamp<|im_end|>"])[0].tolist()
    assert loaded.chat_template == tokenizer.chat_template
    config = config_of(out)
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    assert config["bos_token_id"] is None
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    again = hf.convert(out, tmp_path / "again")
    for file in out.iterdir():
        assert file.name == "README.md" or (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_card(tmp_path: Path) -> None:
    model, tree = small()
    text = (hf.write(model, tree, tmp_path / "first") / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and f"{params.count(model.table):,} parameters" in text
    assert (hf.write(model, tree, tmp_path / "second", card="mine") / "README.md").read_text() == "mine"


def test_the_notebook_calls(tmp_path: Path) -> None:
    tiny.save(tmp_path / "in", "qwen2", "bfloat16")
    loaded = hf.load_hf(tmp_path / "in")
    assert loaded.tokenizer is None and loaded.params["embed"].dtype == jnp.float32
    out = hf.save_hf(loaded, tmp_path / "out", dtype="bfloat16")
    assert same_bytes(weights(out), weights(tmp_path / "in"))


# An export is whole or not there


def test_an_existing_target_is_refused_without_force(tmp_path: Path) -> None:
    model, tree = small()
    out = hf.write(model, tree, tmp_path / "out")
    (out / "mark").touch()
    with pytest.raises(ModelFolderError, match="the target exists"):
        hf.write(model, tree, out)
    with pytest.raises(ModelFolderError, match="the target exists"):
        hf.convert(out, out)
    assert (out / "mark").exists()
    hf.write(model, tree, out, force=True)
    assert not (out / "mark").exists() and names(tmp_path) == ["out"]


def test_force_replaces_nothing_but_model_folders(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").touch()
    with pytest.raises(ModelFolderError, match="no model folder"):
        hf.write(*small(), tmp_path / "home", force=True)
    assert (tmp_path / "home/thesis.txt").exists()


def test_a_folder_is_converted_onto_itself_with_force(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", "llama")
    before = weights(tmp_path / "model")
    hf.convert(tmp_path / "model", tmp_path / "model", force=True)
    assert same_bytes(weights(tmp_path / "model"), before) and "rope_theta" in config_of(tmp_path / "model")


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["maxi.hf.exporter._write_header", "maxi.hf.exporter.write_json", "maxi.hf.exporter._flush"])
def test_an_interrupted_export_leaves_the_old_one(fault: BaseException, when: str, tmp_path: Path, monkeypatch: Any) -> None:
    model, tree = small()
    out = hf.write(model, tree, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other = jax.tree.map(lambda w: w + 1, tree)

    def fail(*_: Any) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(when, fail)
        for target in (out, tmp_path / "new"):
            with pytest.raises(EnvironmentFault if isinstance(fault, OSError) else KeyboardInterrupt):
                hf.write(model, other, target, force=True)
    assert names(tmp_path) == ["out"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_what_a_killed_export_left_is_mended(tmp_path: Path) -> None:
    model, tree = small()
    hf.write(model, tree, tmp_path / "out").rename(tmp_path / ".out.old")  # killed between the renames
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(ModelFolderError, match="the target exists"):
        hf.write(model, tree, tmp_path / "out")
    hf.write(model, tree, tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    model, tree = small()
    tree["layers"]["w_up"] = tree["layers"]["w_up"].at[1, 0, 0].set(1e6)
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that float16 cannot"):
        hf.write(model, tree, tmp_path / "out", dtype="float16")
    tree["layers"]["w_up"] = tree["layers"]["w_up"].at[1, 0, 0].set(np.nan)
    with pytest.raises(NumericsError, match="NaN"):
        hf.write(model, tree, tmp_path / "out")
    assert names(tmp_path) == []
