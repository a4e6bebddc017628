"""Damaged, incomplete and hostile model folders: each is one ModelFolderError that names the thing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maxi import hf
from maxi.errors import ModelFolderError
from maxi.hf import folder as hf_folder
from tests import tiny

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00004.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny.save(tmp_path / "model", "qwen2")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny.save(tmp_path / "model", "qwen2", shard="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    return tmp_path / "model"


def refused(folder: Path, *parts: str) -> None:
    """Reading gives one line, with exit code 4, that holds all `parts`."""
    with pytest.raises(ModelFolderError) as caught:
        hf.read(folder)
    line = str(caught.value)
    assert line.startswith("maxi: error[4] ") and "\n" not in line and len(line) < 700, line
    for part in (*parts, str(folder)):
        assert part in line, (part, line)


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def edit_config(folder: Path, **fields: Any) -> None:
    edit_json(folder / "config.json", lambda tree: tree.update(fields))


def edit_index(folder: Path, **entries: str) -> None:
    edit_json(folder / INDEX, lambda tree: tree["weight_map"].update(entries))


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)


# The folder


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such model folder")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json is missing")


def test_pickles_are_never_opened(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, "no weights")
    (single / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refused(single, "safetensors only", "pytorch_model.bin")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not an object"),
        ('{"model_type": "qwen2", "hidden_size": 1, "hidden_size": 2}', "'hidden_size' occurs twice"),
        ('{"model_type": "qwen2", "rms_norm_eps": NaN}', "NaN"),
        ('{"model_type": "qwen2", "rms_norm_eps": 1e999}', "1e999 is not JSON"),
        ("[" * 100_000, "config.json"),
        (" " * (1 << 20) + "{}", "over 1 MB"),
        ('{"model_type": "gpt2"}', "unsupported: model_type 'gpt2'"),
        ("{}", "unsupported: model_type None"),
    ],
)
def test_config_json(text: str, said: str, single: Path) -> None:
    (single / "config.json").write_text(text)
    refused(single, said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unsupported: auto_map"),
        ({"quantization_config": {"bits": 4}}, "unsupported: quantization_config"),
        ({"alibi": True}, "unsupported: alibi"),
        ({"hidden_act": "gelu"}, "unsupported: hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "unsupported: rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' needs 'factor'"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0 in one place and 10000.0 in another"),
        ({"layer_types": ["chunked_attention"] * 3}, "unsupported: layer type 'chunked_attention'"),
        ({"max_window_layers": "all"}, "max_window_layers is 'all'"),
        ({"num_key_value_heads": 3}, "do not divide"),
    ],
)
def test_config_fields(fields: dict[str, Any], said: str, single: Path) -> None:
    edit_config(single, **fields)
    refused(single, said)


# Names, shapes, dtypes, values


def test_all_that_does_not_fit_is_said_at_once(single: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for number in range(3):
            del tensors[f"model.layers.{number}.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["score.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(31)

    edit_weights(single, edit)
    refused(single, "4 missing: model.norm.weight, model.layers.0.mlp.up_proj.weight", ", ...; 1 unexpected: score.weight")
    refused(single, "1 wrong shape: model.layers.0.self_attn.q_proj.bias [31] instead of [32]")


def test_a_model_of_another_depth(single: Path) -> None:
    edit_config(single, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    refused(single, "12 unexpected: model.layers.2.")


def test_an_untied_model_needs_its_head(single: Path) -> None:
    edit_weights(single, lambda tensors: tensors.pop("lm_head.weight"))
    refused(single, "1 missing: lm_head.weight", "tie_word_embeddings")


def test_a_tied_model_may_store_its_head_only_as_the_embedding(single: Path) -> None:
    edit_config(single, tie_word_embeddings=True)
    refused(single, "lm_head.weight differs")
    edit_weights(single, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head" not in hf.read(single)[1]


def test_rotary_buffers_of_old_folders_are_passed_over(single: Path) -> None:
    edit_weights(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    hf.read(single)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, single: Path) -> None:
    edit_weights(single, lambda tensors: tensors[UP].__setitem__((3, 4), value))
    refused(single, f"{UP} holds NaN or Inf")


def test_a_cast_that_overflows(single: Path) -> None:
    edit_weights(single, lambda tensors: tensors[UP].__setitem__((3, 4), 1e6))
    with pytest.raises(ModelFolderError, match=rf"{UP} holds values that float16 cannot"):
        hf.read(single, dtype="float16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_dtypes_that_are_no_weights(dtype: torch.dtype, single: Path) -> None:
    edit_weights(single, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refused(single, "1 unsupported dtype", UP)


def test_layers_of_different_dtypes(single: Path) -> None:
    edit_weights(single, lambda tensors: tensors.update({UP: tensors[UP].half()}))
    refused(single, f"{UP} is F16 but model.layers.0.mlp.up_proj.weight is F32", "dtype=float32")
    hf.read(single, dtype="float32")


# Files


HEADER = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("header", "data", "length", "said"),
    [
        (b"", b"", None, "model.safetensors"),
        (HEADER, b"", 1 << 60, "ends within its header"),
        (HEADER, b"1234", None, "damaged"),
        (HEADER, b"12345678abcd", None, "damaged"),
        (HEADER.replace(b"}}", b'},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'), b"x" * 12, None, "damaged"),
        (HEADER.replace(b"[0,8]", b"[-8,0]"), b"12345678", None, "damaged"),
        (HEADER.replace(b"[2]", b"[4]"), b"12345678", None, "damaged"),
        (HEADER.replace(b"}}", b'},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), b"12345678", None, "occurs twice"),
        (b"not json", b"", None, "not valid JSON"),
    ],
)  # fmt: skip
def test_damaged_files(header: bytes, data: bytes, length: int | None, said: str, single: Path) -> None:
    raw(single, header, data, length)
    refused(single, said)


def test_a_truncated_file(single: Path) -> None:
    whole = (single / "model.safetensors").read_bytes()
    for keep in (0, 5, 100, len(whole) - 1):
        (single / "model.safetensors").write_bytes(whole[:keep])
        refused(single, "model.safetensors is damaged")


def test_a_huge_header_is_not_read(single: Path) -> None:
    with (single / "model.safetensors").open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    refused(single, "over 100 MB")


def test_a_huge_index_is_not_read(sharded: Path) -> None:
    with (sharded / INDEX).open("r+b") as file:
        file.truncate(hf_folder.MAX_HEADER_BYTES + 1)
    refused(sharded, "over 100 MB")


# The index


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/model.safetensors", "file:///x.safetensors", "a/b.safetensors", "x.bin", ".."]
)
def test_shard_names_are_plain(shard: str, sharded: Path) -> None:
    edit_index(sharded, **{UP: shard})
    refused(sharded, repr(shard), "not a plain")


def test_an_index_without_a_map(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda tree: tree.update(weight_map=[]))
    refused(sharded, "no weight_map")


def test_a_key_twice_in_the_index(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{UP}": "{FIRST}", '))
    refused(sharded, f"'{UP}' occurs twice")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    refused(sharded, f"{FIRST} is missing")


def test_a_tensor_listed_in_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    wrong = FIRST if index[UP] != FIRST else FIRST.replace("1-", "2-")
    edit_index(sharded, **{UP: wrong})
    refused(sharded, f"tensor {UP} is in {index[UP]} but the index says {wrong}")


def test_a_tensor_that_no_shard_holds(sharded: Path) -> None:
    edit_index(sharded, extra=FIRST)
    refused(sharded, f"lists extra in {FIRST}, which does not hold it")


def test_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda tree: tree["weight_map"].pop(UP))
    refused(sharded, f"tensor {UP} is in", "does not list it")


def test_a_shard_that_the_index_does_not_list(sharded: Path) -> None:
    (sharded / "model-00005-of-00005.safetensors").write_bytes((sharded / FIRST).read_bytes())
    refused(sharded, "model-00005-of-00005.safetensors is not in the index")


# Links


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json"])
def test_a_link_out_of_the_folder(name: str, sharded: Path) -> None:
    (sharded / name).rename(sharded.parent / "elsewhere")
    (sharded / name).symlink_to("../elsewhere")
    refused(sharded, f"{name} is a link out of the folder")


def test_links_that_lead_nowhere(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to("absent")
    refused(single, "model.safetensors is missing")
    (single / "absent").symlink_to("model.safetensors")
    refused(single, "model.safetensors is missing")


def test_a_hugging_face_cache_is_read(sharded: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/NAME is a link to ../../blobs/HASH there."""
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    for number, file in enumerate(sharded.iterdir()):
        file.rename(tmp_path / f"models--a--b/blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    hf.read(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    hf.read(tmp_path / "link")
    (snapshot / "config.json").unlink()
    os.link(tmp_path / "models--a--b/blobs/0", tmp_path / "outside.json")
    (snapshot / "config.json").symlink_to("../../../outside.json")
    refused(snapshot, "config.json is a link out of the folder")
