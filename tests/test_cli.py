"""The command line: its surface as a golden text, what importing costs, and bad arguments in one line."""

import argparse
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maxi.__main__ import _explain, main, parser
from maxi.errors import Preempted, StoppedTogether
from tests import golden


def _surface(command: argparse.ArgumentParser, name: str) -> list[str]:
    lines = []
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                lines += _surface(sub, f"{name} {word}")
        elif not isinstance(action, argparse._HelpAction):
            spelled = " ".join(action.option_strings) or str(action.metavar or action.dest)
            kind = getattr(action.type, "__name__", "flag" if action.nargs == 0 else "text")
            lines += [f"{name} {spelled} [{kind}{', required' if action.required else ''}] = {action.default}"]
    return lines


def test_surface_is_golden() -> None:
    golden.check("cli.txt", "\n".join(_surface(parser(), "maxi")))


def test_every_option_is_explained() -> None:
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert command.description, name
        assert all(action.help for action in command._actions), name


@pytest.mark.parametrize("module", ["maxi", "maxi.__main__", "maxi.config", "maxi.data"])
def test_importing_starts_nothing(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('jax', 'transformers', 'grain', 'orbax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "optim.warmup_ratio (none)" in out and "Steps between checkpoints" in out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["trian"], 2, "trian"),
        ([], 2, "COMMAND"),
        (["train"], 2, "CONFIG.yaml"),
        (["train", "none.yaml"], 2, "No such file"),
        (["config", "none.yaml", "--frobnicate"], 2, "--frobnicate"),
        (["generate", "nowhere", "--prompt", "x"], 4, "there is no such folder (nowhere)"),
        (["generate", "{tmp}", "--prompt", "x"], 4, "neither a run folder nor a Hugging Face model"),
        (["generate", "nowhere", "--prompt", "x", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["generate", "nowhere", "--prompt", "x", "--top-p", "high"], 2, "--top-p"),
        (["eval", "nowhere", "--data", "x.txt"], 4, "nowhere"),
        (["export", "nowhere", "{tmp}/out"], 4, "nowhere"),
        (["convert", "nowhere", "{tmp}/out"], 4, "nowhere"),
        (["tokenizer", "nowhere.txt", "--vocab-size", "400", "--out", "{tmp}/out"], 3, "nowhere.txt"),
        (["tokenizer", "x.txt", "--vocab-size", "4", "--out", "{tmp}/out"], 2, "a vocabulary of 4 is too small"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_are_one_line(argv: list[str], code: int, words: str, tmp_path: Path, capsys: Any) -> None:
    assert main([part.format(tmp=tmp_path) for part in argv]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"maxi: error[{code}] ") and words in err, err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EFBIG, "File too large", "runs/a/run.json"), "file too large (runs/a/run.json)"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']"),
            "no temporary directory can be written",
        ),
    ],
)
def test_a_disk_that_takes_nothing_is_one_line(error: OSError, words: str) -> None:
    line = _explain(error).line()
    assert line.startswith("maxi: error[6] ") and words in line and "[" not in line.removeprefix("maxi: error[6]")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maxi", "config", str(tmp_path / "none.yaml"), "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "Traceback" in done.stderr and "maxi: error[2]" in done.stderr


@pytest.mark.parametrize(("kind", "leaves"), [(Preempted, [75]), (StoppedTogether, [])])
def test_who_stops_alone_does_not_wait_for_the_others(
    kind: type[Preempted], leaves: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's normal end waits for the other processes of a run, which for a stop of all is right and else for ever."""

    def stop(_: argparse.Namespace) -> None:
        raise kind("SIGTERM", "a run", "run the same command")

    left: list[int] = []
    monkeypatch.setattr("maxi.__main__._parse", lambda _: argparse.Namespace(run=stop))
    monkeypatch.setattr("maxi.processes.leave", left.append)
    assert main(["train"]) == 75 and left == leaves
    assert capsys.readouterr().err.count("\n") == 1
