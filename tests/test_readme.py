"""README.md holds: its map is the tree, its commands parse, its keys and configs exist, its rows are read, its losses are the
config's, its notebook example runs."""

import hashlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
import numpy as np
import pytest

from maxi import config, data, errors, hf, objectives, params, sections
from maxi.__main__ import parser
from maxi.data import bpe, messages
from maxi.data.examples import READERS as ROWS
from maxi.data.formats import READERS
from maxi.models import FAMILIES, from_hf_config
from maxi.objectives.dpo import LOSSES
from maxi.run import Run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
KEYS = [key for key, _, _ in config.documentation()]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def section(title: str) -> str:
    """The text under `## title`."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no section {title!r}"
    return found.group(1)


def blocks(text: str, language: str = "[a-z]*") -> list[str]:
    """What stands in fenced blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def inline() -> list[str]:
    """What stands in backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE))


def first_column(text: str) -> list[str]:
    """What stands in backticks, or bare, in the first cell of each row of a table."""
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    return [cell.strip("`") for cell in rows[2:]]


def table(text: str, head: str) -> list[list[str]]:
    """The cells of each row of the table under a line that begins with `head`."""
    rows = text[text.index(f"\n{head}") :].strip().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def mapped() -> list[str]:
    """The files of the architecture map, in order."""
    folders: list[str] = []
    files = []
    for line in blocks(section("Architecture"))[0].splitlines():
        depth, (name, *words) = (len(line) - len(line.lstrip())) // 2, line.split()
        assert depth <= len(folders), line
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert words, f"{name} is not described"
            files.append("".join(folders) + name)
    return files


def commands() -> list[str]:
    """Every `maxi ...` in blocks of shell and in backticks."""
    shell = [line.strip() for block in blocks(README, "sh") for line in block.splitlines()]
    return [text for text in [*shell, *inline()] if re.match(r"maxi [a-z]", text)]


def test_the_map_is_the_tree() -> None:
    tree = [str(path.relative_to(ROOT)) for path in (ROOT / "maxi").rglob("*") if path.is_file()]
    assert sorted(mapped()) == sorted(path for path in tree if "__pycache__" not in path)


def test_the_map_follows_the_layers() -> None:
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    height = {name: number for number, layer in enumerate(layers) for name in layer.split(" | ")}
    order = [height[name] for path in mapped() if (name := path.split("/")[1].removesuffix(".py")) != "__init__"]
    assert order == sorted(order)


def test_every_config_is_named_and_loads() -> None:
    assert CONFIGS
    for path in CONFIGS:
        assert f"configs/{path.name}" in README
        config.load(path)


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[1:]
    if "--help" in words or len(words) == 1:  # `maxi eval` in a sentence is the command's name
        with pytest.raises(SystemExit) as ended:
            parser().parse_args([words[0], "--help"])
        assert ended.value.code == 0 and "usage" in capsys.readouterr().out
        return
    args = parser().parse_args(words)
    if "config" in args:
        config.load(args.config, args.overrides)


def test_every_command_is_shown() -> None:
    known: Any = next(action for action in parser()._actions if action.dest == "command").choices
    assert {command.split()[1] for command in commands()} == set(known)


def test_keys_exist() -> None:
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    checked = 0
    for text in inline():
        name, assigned, _ = text.partition("=")
        if not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9\[\]]+)*(\.\*)?", name) or text == "dotted.key=value":
            continue
        dotted = "." in name and name.split(".")[0] in sections and not name.endswith((".json", ".safetensors"))
        if (assigned and "CONFIG" not in text) or dotted:
            prefix = name.removesuffix("*")
            assert name in KEYS or (prefix != name and any(key.startswith(prefix) for key in KEYS)), text
            checked += 1
    assert checked > 15


def test_examples_of_values_are_accepted() -> None:
    """`optim.lr=1e-3` and the like load, one by one, with an objective that has them."""
    for text in inline():
        key, equals, _ = text.partition("=")
        if equals and key in KEYS:
            name = "dpo" if key.startswith("objective.loss_type") else "sft" if key.startswith("chat.") else "pretrain"
            kind = "prefix" if key == "adapter.projection" else "lora"
            beside = {"adapter": ["model.init_from=MODEL", f"adapter={kind}"], "freeze": ["model.init_from=MODEL"]}
            needed = beside.get(key.split(".")[0], [])
            config.load(ROOT / "configs/quickstart.yaml", ["batch_size=8", f"objective={name}", *needed, text])


def test_rows_that_it_reads_are_read() -> None:
    """Each example, and each other name that its cell gives to a field."""
    shown = set()
    for objective, cell in table(section("Rows it reads"), "| Objective |"):
        example, *others = re.findall(r"`([^`]+)`", cell.partition("; ")[0])
        row = json.loads(example)
        kind = objectives.OBJECTIVES[objective.strip("`")].rows  # type: ignore[attr-defined]
        names = [name for name in row if name not in ("prompt", "instruction", "input", "history", "question", "label")]
        renamed = dict(zip(names, others, strict=False)) if " also as " in cell else {}
        found = [ROWS[kind](record, "a:1", {}, None) for record in (row, {renamed.get(name, name): row[name] for name in row})]
        assert found[0] == found[1], cell
        shown |= {name for record in (row, renamed.values()) for name in record}
    layouts = (*messages._CONVERSATIONS, *messages._PAIRS)
    assert {name for layout in layouts for name in layout} <= shown, "a layout is not shown"


def test_roles_are_those_that_are_understood() -> None:
    rows = table(section("Rows it reads"), "| Role |")
    told = {name: role.strip("`") for role, names in rows for name in re.findall(r"`(\w+)`", names.partition("; or")[0])}
    assert told == messages._ROLES


def test_losses_are_those_of_the_config_and_their_sources_those_of_the_code() -> None:
    rows = table(section("Preferences"), "| Loss |")
    assert [name.strip("`") for name, _, _ in rows] == list(get_args(sections.DPOLoss))
    for name, _, source in rows:
        if loss := LOSSES.get(name.strip("`")):
            told, known = (
                set(re.findall(r"arXiv:\d+\.\d+|equation \d+(?:\.\d+)?", text)) for text in (source, loss.__doc__ or "")
            )
            assert told == known, name
    for name in get_args(get_type_hints(sections.KTOConfig)["loss_type"]):
        assert f"`{name}`" in section("Preferences")


def test_metrics_exist() -> None:
    goldens = [path.read_text("utf-8").split() for path in (ROOT / "tests/goldens").glob("metric_names*.txt")]
    known = {name for names in goldens for name in names} | {"perf/mfu"}  # of devices whose peak is known
    told = {text for text in inline() if re.fullmatch(r"(train|eval|rewards|logps|perf|optim)/\w+", text)}
    assert len(told) > 10 and told <= known, told - known


def test_the_path_of_data_names_every_file() -> None:
    files = {path.name for path in (ROOT / "maxi/data").iterdir() if path.is_file()} - {"__init__.py"}
    assert set(re.findall(r"\w+\.(?:py|jinja)", data.__doc__ or "")) == files


def test_extras_are_those_of_the_package() -> None:
    assert first_column(section("Install as a package")) == list(PYPROJECT["project"]["optional-dependencies"])


def test_exit_codes_are_those_of_the_errors() -> None:
    ours = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MaxiError)}
    assert {int(code) for code in first_column(section("Exit codes"))} == ours | {0, 130}


def test_the_error_line_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(errors.ConfigError) as caught:
        config.load("configs/quickstart.yaml", ["optim.lrr=1"])
    assert blocks(section("Exit codes")) == [caught.value.line() + "\n"]


def test_families_and_formats() -> None:
    assert sorted(first_column(section("Model families"))) == sorted(FAMILIES)
    assert {f"`{suffix}`" for suffix in READERS} <= set(re.findall(r"`\.[a-z]+`", section("I want to ...")))


def test_the_run_folder_is_that_of_the_code() -> None:
    run = Run("")
    paths = {str(path) for path in vars(run).values() if path != run.folder} | {"processes", "xla"}
    listed = {line.split()[0].rstrip("/") for line in blocks(section("A run folder"))[0].splitlines()}
    assert listed == paths | {
        "lock",
        "check.html",
        "report.html",
        "report_files",
        "stacks-0.txt",
    }  # what other commands put there


def test_the_split_pattern_has_the_digest_that_ollama_calls_qwen2() -> None:
    digest = hashlib.sha256(bpe.QWEN2_SPLIT.encode()).hexdigest()
    assert digest == "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e"


def test_links_lead_somewhere() -> None:
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target[1:] in anchors if target.startswith("#") else (ROOT / target).is_file(), target


def test_the_notebook_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "The file object has a name, and the file object can be read line by line until the file ends. " * 20
    tokenizer = bpe.train([text], 290, tmp_path / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = from_hf_config({"model_type": "qwen3", "vocab_size": 290, "head_dim": 8, **sizes})
    hf.write(model, params.init(model.table, jax.random.key(0)), tmp_path / "runs/quickstart/hf", tokenizer=tokenizer)
    names: dict[str, Any] = {}
    exec(blocks(README, "python")[0], names)
    assert np.isfinite(names["maxi"].logits(names["model"], [[1, 2, 3]])).all()
    assert (tmp_path / "runs/copy/model.safetensors").is_file()
