"""The front door: from text that every Python carries to a model that transformers loads, in one command.

A list of stages, each an ordinary command of maxi with its result shown; later ones (SFT, DPO) are more entries. What
is done already is not done again, so the same command resumes.
"""

import importlib.util
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxi import hf
from maxi.config import Config
from maxi.data import bpe
from maxi.data.documents import Budget, read
from maxi.errors import ConfigError, ModelFolderError
from maxi.generation import generate
from maxi.train import Summary, train

log = logging.getLogger("maxi")

NEW_TOKENS = 40


def quickstart(config: Config, config_path: str) -> None:
    """Tokenizer, pretraining, export, and a continuation from the exported folder; then what came of it.

    The tokenizer goes to `config.tokenizer` with as many ids as `model.config.vocab_size` says; it and the model read
    `data.train`. Raises ConfigError when the config names neither.
    """
    begin = time.monotonic()
    log.info("== tokenizer ==")
    _make_tokenizer(config)
    log.info("== pretraining ==")
    pretrained = train(config)
    log.info("== the exported model ==")
    prompts = config.eval.prompts or ("The",)
    for prompt, text in zip(prompts, _continue(Path(config.run_dir) / "hf", prompts), strict=True):
        log.info("%r -> %r", prompt, text)
    log.info("== summary ==")
    for line in _summary(pretrained, time.monotonic() - begin, config_path):
        log.info(line)


def _make_tokenizer(config: Config) -> None:
    fields = config.model.config
    if config.tokenizer is None or not isinstance(fields, dict) or not isinstance(fields.get("vocab_size"), int):
        raise ConfigError("quickstart needs tokenizer and model.config.vocab_size", "config", "see configs/quickstart.yaml")
    folder = Path(config.tokenizer)
    if (folder / "tokenizer.json").is_file():
        log.info("%s is there already", folder)
        return

    def texts() -> Iterator[str]:
        for source in config.data.train:
            yield from (document.text for document in read(source, Budget(config.data.skip_bad)))

    made = bpe.train(texts(), fields["vocab_size"], folder)
    log.info("%s: %s ids", folder, f"{made.vocab_size:,}")


def _continue(folder: Path, prompts: tuple[str, ...]) -> list[str]:
    """Loads the export the way its users will, and continues the prompts.

    Config and tokenizer go through transformers, weights through maxi; with torch installed transformers generates too,
    and must say the same. Raises ModelFolderError when it does not.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    log.info("transformers reads %s: %s, %s ids", folder, type(config).__name__, f"{len(tokenizer):,}")
    texts = generate(hf.load_hf(folder), prompts, max_new_tokens=NEW_TOKENS)
    if importlib.util.find_spec("torch") is None:
        return texts
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, text in zip(prompts, texts, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        theirs = tokenizer.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if theirs != text:
            raise ModelFolderError(
                f"transformers continues {prompt!r} with {theirs!r}, maxi with {text!r}", str(folder), "report it"
            )
    log.info("transformers generates the same texts with torch")
    return texts


def _summary(run: Summary, seconds: float, config_path: str) -> list[str]:
    lines = [f"pretraining   {run.steps} steps of a model with {run.parameters:,} parameters"]
    if run.loss_before is not None and run.loss_after is not None:
        lines += [f"held-out loss {run.loss_before:.3f} -> {run.loss_after:.3f} nats per token"]
    if run.bits_per_byte is not None:
        lines += [f"held-out      {run.bits_per_byte:.3f} bits per byte"]
    if run.tokens_per_s is not None:
        lines += [f"speed         {run.tokens_per_s:,.0f} tokens/s"]
    maxi = "maxi" if shutil.which("maxi") else sys.argv[0]
    return [
        *lines,
        f"time          {seconds:.0f} s",
        f"model         {run.export} (Hugging Face format)",
        f'try next      {maxi} generate {run.run_dir} --prompt "Return the" --temperature 0.8 --top-p 0.9',
        f"or            {maxi} train {config_path} run_dir=runs/longer steps={4 * run.steps}",
    ]
