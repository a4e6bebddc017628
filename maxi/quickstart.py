"""The front door: from text that every Python carries to a model that answers in a chat, in one command.

A list of stages, each an ordinary command of maxi with its result shown: tokenizer, pretraining, and for every config beside
the first whose name goes on with _sft or _dpo one more run, which starts from the run before it. What is done already is
not done again, so the same command resumes.
"""

import importlib.util
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxi import hf, processes
from maxi.config import Config, load
from maxi.data import bpe
from maxi.data.documents import Budget, read
from maxi.errors import ConfigError, ModelFolderError
from maxi.generation import complete, conversation, ids_of, open_chat, visible
from maxi.hf import Loaded
from maxi.models.sampling import Sampling
from maxi.run import Run
from maxi.train import Summary, train

log = logging.getLogger("maxi")

NEW_TOKENS = 48
EVERYWHERE = ("log.", "mesh.", "compute.", "data.cache_dir")
"""Overrides that hold for every stage."""
STAGES = {"sft": "supervised fine-tuning", "dpo": "preference optimisation"}


@dataclass(frozen=True)
class Stage:
    """A run of the list, and what came of it."""

    name: str
    config: Config
    summary: Summary


def quickstart(config: Config, config_path: str, overrides: Sequence[str] = ()) -> None:
    """Tokenizer, pretraining, the stages beside the config, and a turn of chat with the last export; then what came of it.

    The tokenizer goes to `config.tokenizer` with as many ids as `model.config.vocab_size` says; it and the model read
    `data.train`. `overrides` hold for the first config, those of EVERYWHERE for all; later stages add their name to
    its `run_dir`. Raises ConfigError when the config names neither tokenizer nor vocabulary, or for several processes.
    """
    if processes.expected():
        raise ConfigError("quickstart is for one process", "quickstart", "`maxi train` runs on several")
    begin = time.monotonic()
    log.info("== tokenizer ==")
    _make_tokenizer(config)
    log.info("== pretraining ==")
    stages = [Stage("pretraining", config, train(config))]
    for key, name in STAGES.items():
        path = Path(config_path).with_name(f"{Path(config_path).stem}_{key}.yaml")
        if path.is_file():
            log.info("== %s ==", name)
            run_dir = f"{config.run_dir}_{key}"
            own = [f"run_dir={run_dir}", f"model.init_from={stages[-1].config.run_dir}"]
            stage = load(path, own + [text for text in overrides if text.startswith(EVERYWHERE)])
            stages.append(Stage(name, stage, train(stage)))
    last = stages[-1].config
    log.info("== the exported model ==")
    _say(Run(last.run_dir).hf, last.eval.prompts or ("The",), chat=len(stages) > 1, system=last.chat.system)
    log.info("== summary ==")
    for line in _summary(stages, time.monotonic() - begin, config_path):
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


def _say(folder: Path, prompts: Sequence[str], *, chat: bool, system: str | None) -> None:
    """Loads the export the way its users will, and continues or answers the prompts.

    Config and tokenizer go through transformers, weights through maxi; with torch installed transformers generates too,
    and must say the same. Raises ModelFolderError when it does not.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    log.info("transformers reads %s: %s, %s ids", folder, type(config).__name__, f"{len(tokenizer):,}")
    loaded = hf.load_hf(folder)
    prompt_ids = _prompt_ids(loaded, tokenizer, prompts, chat, system)
    made = complete(loaded, prompt_ids, Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0))
    if importlib.util.find_spec("torch") is not None:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for prompt, ids, mine in zip(prompts, prompt_ids, made, strict=True):
            given = torch.tensor([ids])
            out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False)[0]
            theirs = tokenizer.decode(out[len(ids) :], skip_special_tokens=True)
            if theirs != mine.text:
                what = f"transformers continues {prompt!r} with {theirs!r}, maxi with {mine.text!r}"
                raise ModelFolderError(what, str(folder), "report it")
        log.info("transformers generates the same texts with torch")
    for prompt, each in zip(prompts, made, strict=True):
        said = visible(each.text.strip())
        log.info("%s", f"user: {prompt}\nassistant: {said}" if chat else f"{prompt!r} -> {said!r}")


def _prompt_ids(loaded: Loaded, tokenizer: Any, prompts: Sequence[str], chat: bool, system: str | None) -> list[Sequence[int]]:
    """Raises ModelFolderError when transformers renders the exported template in another way."""
    if not chat:
        return [ids_of(loaded, prompt, None, "eval.prompts") for prompt in prompts]
    found = []
    with open_chat(loaded) as template:
        for prompt in prompts:
            said = conversation(prompt, system)
            ids = ids_of(loaded, said, template, "eval.prompts")
            theirs = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            if tokenizer.encode(theirs, add_special_tokens=False) != list(ids):
                what = f"transformers renders {prompt!r} as {theirs!r}"
                raise ModelFolderError(what, str(loaded.folder), "report it")
            found.append(ids)
    return found


def _summary(stages: Sequence[Stage], seconds: float, config_path: str) -> list[str]:
    first = stages[0].summary
    lines = [f"model         {first.parameters:,} parameters"]
    names = {
        "loss": "held-out loss",
        "bits_per_byte": "bits per byte",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "repeated_4grams": "repetition",
        "stopped": "stops by itself",
    }
    for stage in stages:
        run = stage.summary
        speed = f", {run.tokens_per_s:,.0f} tokens/s" if run.tokens_per_s else ""
        lines.append(f"{stage.name}: {run.steps} steps{speed}")
        lines += [f"  {names[name]:<16}{run.before[name]:.3f} -> {run.after[name]:.3f}" for name in names if name in run.after]
    maxi = "maxi" if shutil.which("maxi") else sys.argv[0]
    last = stages[-1].summary
    runs = " ".join(stage.config.run_dir for stage in stages)
    tries = [f"{maxi} chat {last.run_dir}"] if len(stages) > 1 else []
    tries += [f'{maxi} generate {first.run_dir} --prompt "Return the" --temperature 0.8 --top-p 0.9']
    tries += [f"{maxi} train {config_path} run_dir=runs/longer steps={4 * first.steps}"]
    tries += [f"{maxi} report {runs}"] if importlib.util.find_spec("matplotlib") else []
    return [
        *lines,
        f"time          {seconds:.0f} s",
        f"export        {last.export} (Hugging Face format)",
        *(f"{'try next' if number == 0 else 'or':<14}{text}" for number, text in enumerate(tries)),
    ]
