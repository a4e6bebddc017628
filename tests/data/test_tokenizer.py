"""Ids and text, what a tokenizer folder must hold, and training one that is Qwen2's but for its vocabulary."""

import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from maxi.data import bpe
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError, ModelFolderError

Prose = Callable[[int, int], str]
ODD = [
    "",
    " ",
    "  two\n\n\n lines\r\n",
    "naïve Ωμέγα 日本語 한국어 🎉👩‍👩‍👧‍👦",
    "\x00\x01\x7f\u2028\ufeff",
    "it's 1234567 DON'T",
    "a <tool_call> b",
]


def test_round_trip(tokenizer: Tokenizer) -> None:
    pick = random.Random(0)
    noise = "".join(chr(pick.choice([pick.randrange(32, 1000), pick.randrange(0x4E00, 0x9FFF)])) for _ in range(200))
    for text in [*ODD, noise]:
        text = unicodedata.normalize("NFC", text)
        ids = tokenizer.encode([text])[0]
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
        assert "".join(tokenizer.stream(ids)) == text


def test_token_bytes_sum_to_the_text(tokenizer: Tokenizer, prose: Prose) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes is not None and sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32
    for text in [unicodedata.normalize("NFC", text) for text in [*ODD, prose(500, 1)]]:
        assert sizes[tokenizer.encode([text])[0]].sum() == len(text.encode())
    assert sizes[tokenizer.eos_id] == 0


def test_token_bytes_of_sentencepiece_like_vocabularies(tmp_path: Path) -> None:
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ä", "▁a"]
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    sizes = tokenizer.token_bytes()
    assert sizes is not None
    for text in ("a b ä", "🎉 ab", "zz"):
        assert sizes[tokenizer.encode([text])[0]].sum() == len(text.encode())


def test_stream_never_breaks_a_character(tokenizer: Tokenizer) -> None:
    ids = [int(i) for i in tokenizer.encode(["日本🎉é"])[0]]
    assert len(ids) > 6
    assert list(tokenizer.stream(ids)) == ["日", "本", "🎉", "é"]
    assert "".join(tokenizer.stream(ids[:1])) == "\ufffd"  # cut off: shown at the end, not swallowed
    assert "".join(tokenizer.stream([*ids[:3], tokenizer.eos_id], skip_special_tokens=True)) == "日"


def test_split_pattern_is_qwen2s(tokenizer: Tokenizer) -> None:
    known = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    known += r"|\s+(?!\S)|\s+"
    tree = json.loads((tokenizer.folder / "tokenizer.json").read_text("utf-8"))
    split, byte_level = tree["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": known} and split["behavior"] == "Isolated"
    assert (byte_level["add_prefix_space"], byte_level["use_regex"]) == (False, False)
    assert tree["normalizer"] == {"type": "NFC"}
    assert [a["content"] for a in tree["added_tokens"]] == [*bpe.SPECIAL, *bpe.MARKERS]
    assert [a["id"] for a in tree["added_tokens"]] == list(range(300 - 22, 300))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (300, 278, 278)


def test_training_is_deterministic_and_guards_its_folder(tmp_path: Path, tokenizer: Tokenizer, prose: Prose) -> None:
    texts = [prose(3000, 0), "Ωμέγα 日本語 🎉"]
    again = bpe.train(iter(texts), 300, tmp_path / "again")
    names = sorted(path.name for path in again.folder.iterdir())
    assert names == ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert all((again.folder / name).read_bytes() == (tokenizer.folder / name).read_bytes() for name in names)
    with pytest.raises(ConfigError, match="already exists"):
        bpe.train(texts, 300, tmp_path / "again")
    assert bpe.train(texts, 290, tmp_path / "again", force=True).vocab_size == 290
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    with pytest.raises(ConfigError, match="too small"):
        bpe.train(texts, bpe.MIN_VOCAB - 1, tmp_path / "b")
    with pytest.raises(DataError, match=r"support a vocabulary of .*, not 5000"):
        bpe.train(texts, 5000, tmp_path / "b")


def test_transformers_and_backend_agree_in_every_form(tmp_path: Path, tokenizer: Tokenizer, prose: Prose) -> None:
    tokenizer.save(tmp_path / "saved")
    slow_form = tmp_path / "vocab_and_merges"
    slow_form.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tokenizer.folder / name, slow_form / name)
    texts = [*ODD, prose(200, 2)]
    expected = [ids.tolist() for ids in tokenizer.encode(texts)]
    for folder in (tokenizer.folder, tmp_path / "saved", slow_form):
        assert AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False)["input_ids"] == expected
        assert Tokenizer.load(folder).fingerprint() == tokenizer.fingerprint()
    Tokenizer.load(slow_form).save(tmp_path / "completed")
    raw = Backend.from_file(str(tmp_path / "completed" / "tokenizer.json"))
    assert [e.ids for e in raw.encode_batch(texts, add_special_tokens=False)] == expected


def test_save_copies_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "same")
    for path in tokenizer.folder.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 cannot read what 5 writes")
def test_save_mends_what_other_readers_trip_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tokenizer.folder, odd)
    config = json.loads((odd / "tokenizer_config.json").read_text())
    for key in ("chat_template", "additional_special_tokens", "added_tokens_decoder"):
        del config[key]
    config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>"]}
    (odd / "tokenizer_config.json").write_text(json.dumps(config))
    (odd / "chat_template.jinja").write_bytes("{{ messages[0].content }} ü\n\n".encode())
    loaded = Tokenizer.load(odd)
    loaded.save(tmp_path / "mended")
    mended = json.loads((tmp_path / "mended" / "tokenizer_config.json").read_text("utf-8"))
    assert mended["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert mended["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in mended
    assert mended["chat_template"] == loaded.chat_template == "{{ messages[0].content }} ü\n\n"
    assert (tmp_path / "mended" / "chat_template.jinja").read_bytes() == (odd / "chat_template.jinja").read_bytes()
    assert Tokenizer.load(tmp_path / "mended").fingerprint() == tokenizer.fingerprint()


def test_fingerprint_sees_what_decides_ids(tmp_path: Path, tokenizer: Tokenizer, prose: Prose) -> None:
    assert bpe.train([prose(3000, 9)], 300, tmp_path / "other").fingerprint() != tokenizer.fingerprint()
    altered = tmp_path / "altered"
    shutil.copytree(tokenizer.folder, altered)
    path = altered / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"<|file_sep|>"', '"<|file_end|>"'), "utf-8")
    config = altered / "tokenizer_config.json"
    config.write_text(config.read_text("utf-8").replace("<|file_sep|>", "<|file_end|>"), "utf-8")
    assert Tokenizer.load(altered).fingerprint() != tokenizer.fingerprint()


def test_generation_config_adds_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copytree(tokenizer.folder, tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [280, 278]}')
    assert Tokenizer.load(tmp_path / "t").eos_ids == (280, 278) and tokenizer.eos_ids == (278,)


def test_folders_that_are_no_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelFolderError, match=r"error\[4\] the tokenizer folder does not exist"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(ModelFolderError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    shutil.copytree(tokenizer.folder, tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_bytes((tokenizer.folder / "tokenizer.json").read_bytes()[:999])
    with pytest.raises(ModelFolderError, match=r"the tokenizer cannot be used, .*EOF"):
        Tokenizer.load(tmp_path / "cut")
    shutil.copytree(tokenizer.folder, tmp_path / "endless")
    config = json.loads((tokenizer.folder / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Tokenizer.load(tmp_path / "endless")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "2."},
]
RENDERED = """<|im_start|>user
1+1?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
2
</tool_response>
<tool_response>
2
</tool_response><|im_end|>
<|im_start|>assistant
2.<|im_end|>
"""


def test_chat_template_is_chatml_from_both_places(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def render(folder: Path, messages: list, **more: object) -> str:
        return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **more)

    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    for removed in ("chat_template.jinja", "tokenizer_config.json"):
        folder = tmp_path / removed
        shutil.copytree(tokenizer.folder, folder)
        if removed == "chat_template.jinja":
            (folder / removed).unlink()
        else:
            config = json.loads((folder / removed).read_text())
            del config["chat_template"]
            (folder / removed).write_text(json.dumps(config))
        assert render(folder, CHAT) == system + RENDERED
        assert render(folder, CHAT[1:]) == RENDERED  # no system prompt is made up
        assert (
            render(folder, CHAT[1:2], add_generation_prompt=True) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        )
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    told = render(tokenizer.folder, CHAT, tools=tools)
    assert told.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n") and told.endswith(RENDERED)
    assert '<tools>\n{"type": "function", "function": {"name": "add", "parameters": {}}}\n</tools>' in told
    with pytest.raises(Exception, match="unknown role"):
        render(tokenizer.folder, [{"role": "boss", "content": "x"}])


def test_unknown_kinds_of_vocabulary_have_no_bytes(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    monkeypatch.setattr(tokenizer, "backend", backend)
    assert tokenizer.token_bytes() is None
