"""The command line. Every command is a few lines here and a public function elsewhere, imported when it is needed.

A fault that the user can mend ends in one line on stderr, `maxi: error[CODE] what (where): fix`, and exits with CODE:
2 config, 3 data, 4 checkpoint or model folder, 5 numerics, 6 environment, 75 stopped with all saved. `--debug` shows
the traceback.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from maxi import __version__, processes
from maxi.errors import ConfigError, EnvironmentFault, MaxiError, Preempted, StoppedTogether, escaped, is_fault
from maxi.paths import well_formed
from maxi.runtime import expect_no_tpu

if TYPE_CHECKING:
    from maxi.models.sampling import Sampling


PATHS = ("config", "data", "dump_hlo", "files", "hf_dir", "html", "json", "model", "out", "png", "prompts", "run_dir", "runs")
"""Arguments that name files or folders."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, "command line", f"`{self.prog} --help` shows how")


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = _Parser(prog="maxi", description="Raw text in, a Hugging Face model out.")
    top.add_argument("--version", action="version", version=f"maxi {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, what: str, run: object, **options: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what, **options)  # type: ignore[arg-type]
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        return command

    for name, what, run in (
        ("train", "train as a config says; the same command again resumes", _train),
        ("config", "print the resolved configuration", _config),
        ("quickstart", "tokenizer, pretraining, export and a continuation, all from text that Python carries", _quickstart),
    ):
        command = add(name, what, run, formatter_class=_KeysHelp, epilog=METHODS if name == "train" else None)
        command.add_argument("config", metavar="CONFIG.yaml", help="the configuration; its keys are listed below")
        command.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optim.lr=1e-4 data.train.0.path=a.txt")
        if name == "train":
            _add_resume(command)

    command = add("check", "show what a config would train on, each token with its mask", _check)
    command.add_argument("config", metavar="CONFIG.yaml", help="the configuration, as for train")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="as for train")
    command.add_argument("--rows", type=int, default=2, help="rows of each source to print (default: 2)")
    command.add_argument("--html", metavar="OUT", help="the page to write (default: check.html in the run folder)")
    command.add_argument("--json", metavar="OUT", help="write the figures to this file too; - prints them alone")

    command = add("export", "write a run's weights as a Hugging Face folder, or its adapter as peft does", _export)
    command.add_argument("run_dir", metavar="RUN", help="a run folder")
    command.add_argument("out", metavar="OUT", help="the folder to write")
    command.add_argument("--step", type=int, help="of which checkpoint (default: the newest)")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the run's export_dtype")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="an adapter as part of the weights (the default)")
    form.add_argument("--adapter", action="store_true", help="the adapter alone, in peft's format, float32")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")

    command = add("convert", "import a Hugging Face folder and export it again, every tensor the same bytes", _convert)
    command.add_argument("hf_dir", metavar="HF_DIR", help="a folder with config.json and safetensors")
    command.add_argument("out", metavar="OUT", help="the folder to write")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")

    _add_eval(add("eval", "loss, perplexity and bits per byte of a model on files, scores of its generations", _eval))
    _add_generate(add("generate", "continue texts", _generate))
    _add_chat(add("chat", "talk with a model", _chat))

    command = add("report", "write curves, samples and configuration of runs as one HTML file", _report)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folders, and .csv or .jsonl files of published numbers")
    command.add_argument("--out", metavar="FILE.html", help="default: RUN/report.html, for several runs ./report.html")
    command.add_argument("--png", metavar="DIR", help="folder for the curves as PNG (default: FILE_files, beside it)")
    command.add_argument("--goodput", action="store_true", help="print what share of the time became steps instead")
    command.add_argument("--json", metavar="OUT", help="with --goodput: write the figures to this file; - prints them alone")

    _add_checkpoint(add("checkpoint", "list, verify or adopt the checkpoints of a run", None))
    _add_bench(add("bench", "time kernels, or a config's training step, on the devices that are here", None))

    _add_plan(add("plan", "whether a config fits hardware, how long it takes and what it costs, before it is paid for", _plan))

    command = add("tokenizer", "train a byte-level BPE tokenizer of Qwen2's kind", _tokenizer)
    command.add_argument("files", metavar="FILES", nargs="+", help="sources, as data.train takes them")
    command.add_argument("--vocab-size", type=int, required=True, help="ids in all, special tokens included")
    command.add_argument("--out", required=True, help="the folder to write")
    command.add_argument("--field", default="text", help="column or JSON field of the text (default: text)")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return top


def _add_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="go on although this key (or section) changed"
    )
    command.add_argument("--rewind", metavar="R[:S]", help="go back R steps and leave out the next S batches (default: R)")
    command.add_argument("--reset-optimizer", action="store_true", help="go on with a new optimizer and any optim settings")
    command.add_argument(
        "--verify-step", metavar="N", type=int, help="train nothing; compute step N again and compare every bit"
    )


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(
        dest="checkpoint", metavar="WHAT", required=True, parser_class=_Parser, help="list, verify or adopt"
    )
    for name, what in (
        ("list", "which checkpoints a run has"),
        ("verify", "hash every file of them; exit code 4 when one is damaged"),
        ("adopt", "trust checkpoints that have no manifest, such as an earlier version's, as they are"),
    ):
        kind = kinds.add_parser(name, help=what, description=what)
        kind.add_argument("--debug", action="store_true", help="show the traceback of an error")
        kind.add_argument("run_dir", metavar="RUN", help="a run folder")
        kind.set_defaults(run=_checkpoint)


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a run folder or a Hugging Face folder")
    command.add_argument("--data", metavar="FILE", nargs="+", default=[], help="sources, as data.train takes them")
    command.add_argument("--field", default="text", help="column or JSON field of the text (default: text)")
    command.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="continue this; may be repeated")
    command.add_argument("--prompts", metavar="FILE", help="a .txt of one a line, or a .jsonl with `prompt` or `messages`")
    command.add_argument("--chat", action="store_true", help="prompts are what a user says, the model answers")
    command.add_argument("--max-new-tokens", type=int, default=256, help="of a generation (default: 256)")
    command.add_argument("--json", metavar="OUT", help="write the figures to this file too")
    command.add_argument("--rows", action="store_true", help="figures of every document, and the generations, as well")
    command.add_argument("--seq-len", type=int, help="longest context (default: 1024, or what the model has)")
    command.add_argument("--batch-size", type=int, default=8, help="rows or prompts at a time (default: 8)")


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a run folder or a Hugging Face folder")
    command.add_argument("--prompt", metavar="TEXT", action="append", required=True, help="repeat it for several at once")
    command.add_argument("--chat", action="store_true", help="prompts are what a user says, the model answers")
    command.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    _add_sampling(command, max_new_tokens=128, temperature=1.0, top_p=1.0)


def _add_chat(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a run folder or a Hugging Face folder, with a chat template")
    command.add_argument("--system", metavar="TEXT", help="what the model is told first")
    _add_sampling(command, max_new_tokens=512, temperature=0.7, top_p=0.9)


def _add_bench(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(
        dest="bench", metavar="WHAT", required=True, parser_class=_Parser, help="what to time: kernels or step"
    )

    def add(name: str, what: str, run: object) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=what, description=what)
        kind.add_argument("--debug", action="store_true", help="show the traceback of an error")
        kind.add_argument("--json", metavar="OUT", help="write the figures to this file too")
        kind.set_defaults(run=run)
        return kind

    kind = add("kernels", "every operation by every backend that runs here, beside jax's own", _bench_kernels)
    kind.add_argument("--only", metavar="NAME", nargs="+", help="of attention, head, linear, norm, swiglu, rotary")
    kind.add_argument(
        "--shape", metavar="LETTER=SIZE", nargs="+", help="one shape for all, e.g. T=8192 N=14 K=2 H=64 documents=512"
    )
    kind.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on CPU float32")
    kind = add("step", "the step that train would take, on made-up rows", _bench_step)
    kind.add_argument("config", metavar="CONFIG.yaml", help="the configuration, as for train; no data is read")
    kind.add_argument("overrides", metavar="key=value", nargs="*", help="as for train")
    kind.add_argument("--steps", type=int, default=10, help="how many to time (default: 10)")
    kind.add_argument("--document-tokens", type=int, default=512, help="mean length of made-up items (default: 512)")
    kind.add_argument("--topology", metavar="NAME", help="compile for these TPUs, e.g. v5e:4x4, and run nothing")
    kind.add_argument("--dump-hlo", metavar="DIR", help="write the optimized program and its memory into this folder")


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG.yaml", help="the configuration, as for train; no data is read")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="as for train")
    command.add_argument("--topology", metavar="NAME", help="v5e:4x4, v5p-128, 2xv5e:16x16, h100:8 or cpu (default: cpu)")
    command.add_argument("--search", action="store_true", help="look for the best mesh, micro_batches and remat there")
    command.add_argument("--goal", metavar="hours=N", help="the cheapest topology that ends the run in time")
    command.add_argument("--budget", metavar="DOLLARS", type=float, help="the cheapest topology that ends it within a budget")
    command.add_argument("--price", metavar="DOLLARS", type=float, help="of a chip and hour, in place of the list's")
    command.add_argument("--tokens", metavar="N", type=float, help="how many the data has, where the config says epochs")
    command.add_argument("--json", metavar="OUT", help="write the figures to this file too")
    command.add_argument("--dump-hlo", metavar="DIR", help="write the optimized program and its memory into this folder")


def _add_sampling(command: argparse.ArgumentParser, max_new_tokens: int, temperature: float, top_p: float) -> None:
    def add(option: str, default: float, what: str) -> None:
        command.add_argument(option, type=type(default), default=default, help=f"{what} (default: {default:g})")

    add("--max-new-tokens", max_new_tokens, "length limit")
    add("--temperature", temperature, "0: always the likeliest token")
    add("--top-k", 0, "only the k likeliest tokens; 0: all")
    add("--top-p", top_p, "only the likeliest tokens that make up p; 1: all")
    add("--min-p", 0.0, "only tokens of at least this share of the likeliest's")
    add("--repetition-penalty", 1.0, "above 1: tokens already there count less")
    add("--seed", 0, "of the sampling")


METHODS = """\
which method for which memory (GiB of a step of SFT at Qwen2.5-0.5B's shape, 1 x 512 tokens in float32; see maxi plan):
  all weights                 9.20  the default; most is learned
  adapter.kind=lora           3.51  where the weights fit once (with adapter.dora=true 4.59, with compute.remat=full 2.62)
  adapter.kind=ia3            3.06  very few numbers; as much as freeze=["*", "!*norm*"]
  adapter.kind=adalora        2.66  with compute.remat=full, as the next two: the rank goes where it matters
  adapter.kind=prefix         2.47  virtual tokens before each text, as keys and values (with adapter.projection=true)
  adapter.kind=prompt         2.46  ... as embeddings
  adapter.quantise=int8       1.63  LoRA or IA3 beside weights of 8 bits
  adapter.quantise=nf4        1.46  ... of 4 bits (QLoRA); with compute.head=chunked 1.17"""


class _KeysHelp(argparse.RawDescriptionHelpFormatter):
    """Help that ends with every configuration key; built when asked for, since it loads the config's types."""

    def format_help(self) -> str:
        from maxi.config import documentation

        keys = [
            f"  {key} ({default})\n{textwrap.indent(textwrap.fill(text, 96), '      ')}"
            for key, default, text in documentation()
        ]
        return super().format_help() + "\nkeys of the configuration (default):\n" + "\n".join(keys) + "\n"


def _train(args: argparse.Namespace) -> None:
    from maxi.signals import StopRequest

    with StopRequest(where=args.config):  # loading what it needs takes seconds
        from maxi.config import load
        from maxi.run import Resume
        from maxi.train import train, verify

        config = load(args.config, args.overrides)
    if args.verify_step is not None:
        verify(config, args.verify_step)
        return
    summary = train(config, Resume(tuple(args.allow_change), args.rewind, args.reset_optimizer))
    if not processes.is_first():
        return
    parts = [f"{summary.steps} steps"]
    names = {"loss": "held-out loss", "bits_per_byte": "bits per byte", "rewards/accuracies": "accuracy"}
    for name in (name for name in names if name in summary.after):
        parts += [f"{names[name]} {summary.before[name]:.4f} -> {summary.after[name]:.4f}"]
    print(f"done: {', '.join(parts)}; model: {summary.export or summary.run_dir}")


def _config(args: argparse.Namespace) -> None:
    from maxi.config import load, to_yaml

    print(to_yaml(load(args.config, args.overrides)), end="")


def _check(args: argparse.Namespace) -> None:
    from maxi.check import run_check
    from maxi.config import load

    run_check(load(args.config, args.overrides), rows=args.rows, html_out=args.html, json_out=args.json)


def _quickstart(args: argparse.Namespace) -> None:
    from maxi.config import load
    from maxi.quickstart import quickstart

    quickstart(load(args.config, args.overrides), args.config, args.overrides)


def _export(args: argparse.Namespace) -> None:
    from maxi.export import export

    options = {"step": args.step, "dtype": args.dtype, "adapter": args.adapter, "force": args.force}
    print(export(args.run_dir, args.out, **options))


def _convert(args: argparse.Namespace) -> None:
    from maxi.hf import convert

    print(convert(args.hf_dir, args.out, force=args.force))


def _eval(args: argparse.Namespace) -> None:
    from maxi.evaluate import run_eval
    from maxi.runtime import set_up

    set_up()
    run_eval(
        args.model,
        args.data,
        field=args.field,
        prompts=args.prompt,
        prompts_file=args.prompts,
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        json_out=args.json,
        rows=args.rows,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        out=sys.stdout,
    )


def _generate(args: argparse.Namespace) -> None:
    from maxi.chat import run_generate
    from maxi.runtime import set_up

    set_up()
    run_generate(args.model, args.prompt, _sampling(args), chat=args.chat, system=args.system, out=sys.stdout)


def _chat(args: argparse.Namespace) -> None:
    from maxi.chat import run_chat
    from maxi.runtime import set_up

    set_up()
    run_chat(args.model, _sampling(args), system=args.system, source=sys.stdin, out=sys.stdout)


def _sampling(args: argparse.Namespace) -> "Sampling":
    from maxi.models.sampling import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(args, name) for name in names})


def _report(args: argparse.Namespace) -> None:
    if args.goodput:
        from maxi.goodput import run_goodput

        if args.out or args.png:
            raise ConfigError("--goodput writes no page", "command line", "leave out --out and --png")
        run_goodput(args.runs, args.json, sys.stdout)
        return
    if args.json:
        raise ConfigError("--json goes with --goodput", "command line", "add --goodput, or leave it out")
    from maxi.report import report

    print(report(args.runs, args.out, png=args.png))


def _checkpoint(args: argparse.Namespace) -> None:
    from maxi import checkpoint_table as table

    kinds = {"list": table.list_checkpoints, "verify": table.verify_checkpoints, "adopt": table.adopt_checkpoints}
    kinds[args.checkpoint](args.run_dir, sys.stdout)


def _bench_kernels(args: argparse.Namespace) -> None:
    from maxi.bench.kernels import bench_kernels

    bench_kernels(only=args.only, shape=args.shape, dtype=args.dtype, json_out=args.json)


def _bench_step(args: argparse.Namespace) -> None:
    from maxi.bench.step import bench_step
    from maxi.config import load

    bench_step(
        load(args.config, args.overrides),
        timed_steps=args.steps,
        document_tokens=args.document_tokens,
        topology=args.topology,
        dump_hlo=args.dump_hlo,
        json_out=args.json,
    )


def _plan(args: argparse.Namespace) -> None:
    from maxi.config import load
    from maxi.plan.command import plan

    plan(
        load(args.config, args.overrides),
        topology=args.topology,
        search=args.search,
        goal=args.goal,
        budget=args.budget,
        price=args.price,
        tokens=args.tokens,
        json_out=args.json,
        dump_hlo=args.dump_hlo,
    )


def _tokenizer(args: argparse.Namespace) -> None:
    from maxi.data.bpe import train
    from maxi.data.documents import Budget, read
    from maxi.sections import Source

    sources = [Source(path=path, field=args.field) for path in args.files]
    texts = (document.text for source in sources for document in read(source, Budget(0)))
    made = train(texts, args.vocab_size, Path(args.out), force=args.force)
    print(f"{made.folder}: {made.vocab_size:,} ids")


class _Escaped(logging.Formatter):
    """File names, samples and settings that others wrote stand in these lines too."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def _set_up_logging(level: int) -> None:
    """maxi's own lines of `level` go to stdout as they are; other libraries only speak up when something is wrong."""
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(_Escaped("%(message)s"))
    log = logging.getLogger("maxi")
    log.handlers, log.propagate = [lines], False
    log.setLevel(level)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, on stderr
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # and says of a damaged folder what our own line says
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of a full disk in thousands of lines, we in one
    logging.getLogger("orbax").setLevel(logging.ERROR)


def _explain(error: BaseException) -> MaxiError:
    """What to tell the user about an error that nobody foresaw."""
    if isinstance(error, MaxiError):
        return error
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name) if isinstance(error, OSError) else ""
    if isinstance(error, OSError) and error.errno and (where or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return EnvironmentFault((error.strerror or "disk error").lower(), where, "check the path, its rights and the disk")
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # Python tried to write into each
        return EnvironmentFault("no temporary directory can be written", "TMPDIR", "make room, or let it name another folder")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return EnvironmentFault(
            "out of memory", type(error).__name__, "raise micro_batches, set compute.remat, or lower seq_len"
        )
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return MaxiError(f"unexpected {type(error).__name__}, {first}", "", "run again with --debug and report it")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; argparse alone takes overrides only where they stand right behind the config."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(text.startswith("-") for text in rest):
        args.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    for name, value in vars(args).items():
        given = value if isinstance(value, list) else [] if value is None else [value]
        for text in given if name in PATHS else ():
            try:
                well_formed(text)
            except ValueError as error:
                top.error(f"{name}: {error}, {text[:200]!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    expect_no_tpu()
    try:
        args = _parse(argv)
        _set_up_logging(logging.INFO if args.run in (_train, _quickstart, _bench_step) else logging.WARNING)
        args.run(args)
    except KeyboardInterrupt:
        print("maxi: interrupted", file=sys.stderr)
        processes.leave(130)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except BaseException as error:
        if not is_fault(error):
            raise
        fault = _explain(error)
        if debug:
            traceback.print_exc()
        else:
            print(fault.line(), file=sys.stderr)
        if not isinstance(fault, StoppedTogether):
            processes.leave(fault.code)
        return fault.code
    return 0


def command() -> int:
    """`main` for a process of its own: one that was asked to stop and has saved ends with 75, whoever asks again."""
    code = main()
    if code == Preempted.code:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(command())
