"""What transformers made of a folder is asked once for each content of the folder, and is the same from memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maxi.data import tokenizer_memory
from maxi.data.tokenizer import Tokenizer
from tests import small

ASK = """
import sys
from maxi.data.tokenizer import Tokenizer
from tests import small
found = Tokenizer.load(sys.argv[1])
ids = [ids.tolist() for ids in found.encode(["two\\n words", "<|im_end|> 12"])]
print("transformers" in sys.modules, "torch" in sys.modules)
print(found.fingerprint(), ids, found.eos_ids, found.pad_id, found.special_tokens, found.named_tokens, found.chat_template)
"""


def ask(folder: Path, home: Path) -> tuple[str, str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", ASK, folder], env=env, capture_output=True, text=True, check=True)
    imported, _, made = done.stdout.partition("\n")
    return imported, made


def test_remembered_without_transformers_until_a_byte_changes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer.folder, folder)
    imported, first = ask(folder, tmp_path)
    assert imported.startswith("True") and ask(folder, tmp_path) == ("False False", first)
    (kept,) = (tmp_path / "maxi" / "tokenizers").iterdir()

    damaged = bytearray(kept.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept.write_bytes(damaged)
    imported, mended = ask(folder, tmp_path)
    assert imported.startswith("True") and mended == first

    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    imported, other = ask(folder, tmp_path)
    assert imported.startswith("True") and other != first and "{{ messages }}" in other


def test_no_more_than_a_few_are_kept(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tokenizer_memory, "MOST", 2)
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer.folder, folder)
    for n in range(4):
        (folder / "extra.json").write_text(str(n))
        Tokenizer.load(folder)
        assert tokenizer_memory.recall(folder) is not None
    assert len(list((tmp_path / "maxi" / "tokenizers").iterdir())) == 2


def test_a_home_that_cannot_be_written_is_no_matter(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Tokenizer.load(tokenizer.folder).fingerprint() == tokenizer.fingerprint()


def test_the_second_run_with_a_tokenizer_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    small.prepare(tmp_path)
    env = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "PYTHONPATH": os.pathsep.join([str(tmp_path / "traps"), *sys.path])}
    for name, size in (("one", 24), ("two", 32)):
        config = small.configure(tmp_path, tmp_path / name, steps=1)
        process = small.start(config, "eval.prompts=[]", f"model.config.intermediate_size={size}", **env)
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
        for module in ("torch", "transformers"):
            trap = tmp_path / "traps" / module / "__init__.py"
            trap.parent.mkdir(parents=True, exist_ok=True)
            trap.write_text(f"raise AssertionError('{module} was imported')\n")
    assert list((tmp_path / "two" / "run" / "tensorboard").iterdir())
