"""Configuration: what loads, what is refused and in which words; the resolved form as a golden text."""

from pathlib import Path

import pytest

from maxi import config
from maxi.errors import ConfigError
from tests import golden

MINIMAL = "run_dir: runs/x\nsteps: 10\ntokenizer: tok\nmodel: {config: {model_type: qwen3}}\ndata: {train: [{path: a.txt}]}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    return file


def test_resolved_config_is_golden_and_reads_back(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path, ["optim.lr=1e-4", "data.train.0.weight=2", "objective=pretrain"])
    text = config.to_yaml(loaded)
    golden.check("config.yaml", text)
    (tmp_path / "again.yaml").write_text(text)
    assert config.load(tmp_path / "again.yaml") == loaded
    assert loaded.optim.lr == 1e-4 and loaded.data.train[0].weight == 2.0


def test_every_key_is_documented() -> None:
    keys = config.documentation()
    assert all(len(text) > 10 for _, _, text in keys)
    golden.check("config_keys.txt", "\n".join(f"{key} ({default})" for key, default, _ in keys))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=3", "unknown key 'optim.lrr'.*did you mean 'optim.lr'"),
        ("stepz=3", "unknown key 'stepz'.*did you mean 'steps'"),
        ("data.train.0.pth=x", "unknown key 'data.train.0.pth'"),
        ("optim.lr=-1", "optim.lr: .*greater than or equal to 0"),
        ("optim.lr=.nan", "optim.lr: .*finite"),
        ("optim.lr=.inf", "optim.lr: .*finite"),
        ("optim.lr=fast", "optim.lr: .*number, not 'fast'"),
        ("optim.b1=1.0", "optim.b1: .*less than 1"),
        ("optim.warmup_steps=11", "warmup_steps 11 is over steps 10"),
        ("export_hf=no", "export_hf: .*boolean, not 'no'"),
        ("steps=0", "steps: .*greater than or equal to 1"),
        ("steps=null", "either steps or epochs"),
        ("epochs=1", "either steps or epochs, not both"),
        ("seed=1.5", "seed: .*integer"),
        ("steps=true", "steps: .*integer"),
        ("micro_batches=5", "batch_size 32 does not divide into 5"),
        ("model.config=null", "there is no model"),
        ("tokenizer=null", "there is no tokenizer"),
        ("data.train=[]", "data.train is empty"),
        ("data.train.0.weight=0", "weight: .*greater than 0"),
        ("mesh={replica: -1, fsdp: -1}", "more than one mesh axis is -1"),
        ("mesh.tensor=0", "a mesh axis is 0"),
        ("objective.name=grpo", "objective.name: .*'grpo'.*'pretrain', 'sft', 'dpo', 'kto'"),
        ("objective={name: dpo, betaa: 1}", "unknown key 'objective.betaa'.*did you mean 'objective.beta'"),
        ("objective={name: sft, beta: 1}", "unknown key 'objective.beta'"),
        ("objective={name: dpo, loss_type: [sigmoyd]}", "objective.loss_type.0: .*'sigmoid'"),
        ("objective={name: dpo, loss_type: [ipo], loss_weights: [1.0, 2.0]}", "loss_weights and .* differ in length"),
        ("objective={name: dpo, loss_type: [exo_pair]}", "exo_pair needs objective.label_smoothing above 0"),
        ("objective={name: dpo, label_smoothing: 0.5}", "objective.label_smoothing: .*less than 0.5"),
        ("model.reference=folder", "model.reference has no meaning for pretrain"),
        ("chat.train_on_prompt=true", "chat.train_on_prompt has no meaning for pretrain"),
        ("chat.system_prompts={code: You code.}", "set chat.system_by"),
        ("data.train.7.path=x", "there is nothing at '7'"),
        ("steps", "write dotted.key=value"),
    ],
)
def test_refused_values(path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        config.load(path, [override])
    assert caught.value.code == 2 and "\n" not in caught.value.line()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "steps: 11\n", r"'steps' is given twice \(.*config.yaml:6\)"),
        ("a: &x 1\nb: *x\n", r"aliases are not allowed \(.*:1\)"),
        ("a: !!python/object/apply:os.system ['true']\n", "tags are not allowed"),
        ("a: [1, 2\n", r"malformed YAML, .*\(.*:\d+\)"),
        ("- 1\n", "the config is a list, not a mapping"),
        ("", "the config is empty"),
        ("[" * 500_000, r"error\[2\] the YAML is nested too deeply"),
        ("- 1\n" * 30_000, r"the YAML has over 20,000 parts \(.*config.yaml:\d+\)"),
        ("# " + "x" * (1 << 20), "over 1 MB"),
    ],
)
def test_refused_files(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        config.load(path)


def test_missing_and_undecodable_files(path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(path.with_name("none.yaml"))
    path.write_bytes(b"run_dir: x\nseed: \xff\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 \(.*:2\)"):
        config.load(path)


def test_byte_order_mark_and_yaml_1_2_numbers(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode() + b"optim: {lr: 1e-4, eps: 1E-9}\n")
    loaded = config.load(path)
    assert loaded.optim.lr == 1e-4 and loaded.optim.eps == 1e-9


def test_octal_looking_numbers_are_decimal(path: Path) -> None:
    assert config.load(path, ["seed=012"]).seed == 12
    assert config.load(path, ["seed=0o12"]).seed == 10
