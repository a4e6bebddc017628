"""Random, damaged and ill-meant inputs for what reads files that others wrote.

`python -m tests.fuzzing [TARGET...] [--examples N] [--random SEED]` prints one line of JSON a target.

Whatever a target is given, it accepts it or raises a MaxiError that is one line; it takes less than SECONDS, and the process
grows by less than MEMORY. Inputs are derandomised unless a seed is given, so that a run of the tests says the same each time;
with a seed it is a search for new ones, and what it finds belongs into `test_fuzz.py`.
"""

import argparse
import gzip
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from maxi import config
from maxi.data import bpe, documents, tokenizer_trial
from maxi.data.chat_template import ChatTemplate
from maxi.data.documents import Budget
from maxi.data.messages import conversation_of, labelled_of, preference_of
from maxi.data.records import document_of
from maxi.data.tokenizer import Tokenizer
from maxi.errors import MaxiError, escaped
from maxi.hf import folder as hf_folder
from maxi.models import from_hf_config, rope
from maxi.pretrained import resolve_config
from maxi.sections import Source

SECONDS = 2
MEMORY = 512 << 20

EXAMPLES = {
    "config": 150,
    "override": 150,
    "config_json": 300,
    "safetensors": 300,
    "index": 150,
    "rows": 300,
    "archives": 150,
    "json_list": 150,
    "parquet": 120,
    "template": 40,
    "conversation": 100,
    "tokenizer": 50,
}
"""How many inputs each target is given by the tests."""


class Hang(BaseException):
    """An input took longer than SECONDS."""


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hang

    # time of the processor, which a busy machine does not stretch; and ten times as much by the clock, for what only waits
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 10 * seconds))
    before = [signal.signal(number, late) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def accepted_or_refused(read: Callable[[], Any], *codes: int) -> None:
    """Runs `read`; a MaxiError must be one line with one of the codes. Anything else goes through."""
    try:
        with bounded():
            read()
    except MaxiError as error:
        line = error.line()
        assert error.code in codes and "\n" not in line and escaped(line) == line and len(line) < 2000, line


# --- inputs ---

NASTY = (
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\\ud800", b"\x1b[31m", b"NaN", b"-Infinity", b"1e999"),
    *(b"-1", b"9" * 4400, b"null", b"true", b"[" * 2000, b'{"a":' * 2000, b"&a ", b"*a", b"!!python/name:os.system "),
    *(b"<<: ", b"..", b"/", b"18446744073709551616", b"0.5", b'""', b"{}", b"[]", b"{{", b"{%", b"%}", b",", b":"),
    *(b"'", b'"', b"\t", "\u2028é😀".encode()),
)  # fmt: skip


def mutated(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """One of the seeds with a few of its bytes cut out, doubled, or replaced by something nasty or random."""

    @st.composite
    def made(draw: Any) -> bytes:
        raw = draw(st.sampled_from(seeds))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(raw)))
            stop = min(len(raw), start + draw(st.sampled_from((0, 1, 2, 5, 20, 10_000))))
            piece = draw(st.one_of(st.sampled_from(NASTY), st.binary(max_size=6), st.just(raw[start:stop] * 2)))
            raw = raw[:start] + piece + raw[stop:]
        return raw

    return made()


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from((2**31, 2**63, 10**30, -(2**63), 1.5, -0.0, 1e308, 1e-300, 0.5, 1e6, 10_000.0)),
    st.text(max_size=8),
    st.sampled_from(
        ("silu", "full_attention", "sliding_attention", "yarn", "llama3", "dynamic", "linear", "user", "assistant")
    ),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4))
)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FIELDS = (
    *SIZES,
    *("model_type", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "tie_word_embeddings", "hidden_act", "rms_norm_eps", "attention_bias"),
    *(
        "initializer_range",
        "auto_map",
        "quantization_config",
        "attention_dropout",
        "mlp_bias",
        "eos_token_id",
        "pretraining_tp",
    ),
)
ROPE = st.dictionaries(
    st.sampled_from(
        (
            *("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "rope_theta"),
        )
    ),
    SCALARS,
)
YAML = b"""run_dir: runs/x
steps: 10
tokenizer: tok
model: {config: {model_type: qwen3, vocab_size: 300}}
data:
  train:
    - {path: a.txt, weight: 1.5}
optim:
  lr: 1e-4
objective: {name: dpo, loss_type: [sigmoid, ipo]}
mesh: {fsdp: -1}
"""
KEYS = tuple(key.replace("[]", ".0") for key, _, _ in config.documentation())
CALL = '{"type": "function", "function": {"name": "f", "arguments": "{}"}}'
SAID = '{"role": "user", "content": [{"type": "text", "text": "a"}]}'
TOOLS = (
    f'{{"messages": [{SAID}, {{"role": "assistant", "tool_calls": [{CALL}]}}, {{"role": "tool", "content": "4"}}]}}\n'.encode()
)
ROWS = (
    b'{"text": "the sea was calm"}\n{"text": "and dark"}\n',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "completion": "b", "label": true}\n',
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]", "system": "s"}\n',
    TOOLS,
)
ROLES = st.sampled_from(("user", "assistant", "system", "tool", "robot", ""))
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": st.one_of(st.text(max_size=12), JSON)})
RECORD = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=5)}),
    st.dictionaries(
        st.sampled_from(
            ("messages", "prompt", "chosen", "rejected", "completion", "label", "tools", "system", "question", "answer")
        ),
        st.one_of(JSON, st.lists(MESSAGE, max_size=3)),
    ),
)
HEADER = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'
PIECES = (
    *("{% for m in messages %}", "{% endfor %}", "{% if m.role == 'assistant' %}", "{% endif %}", "{{ m.content }}"),
    *("{{ m.role }}", "<|im_start|>", "<|im_end|>", "\n", "{{ messages }}", "{{ 'a' * 999999 }}"),
    *("{% for i in range(99999) %}", "{% set x = 1 %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    *("{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{% macro f() %}", "{% endmacro %}", "{{ f() }}"),
    *("{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}"),
    *("{{ x | tojson(indent=9) }}", "{% set ns = namespace(a=1) %}", "{% set ns.a = ns %}", "{{ '%s' | format(1) }}"),
    *("{{ 9 ** 9 }}", "{{ 9 ** 9 ** 9 }}", "{{ x | attr('__class__') }}", "{{ strftime_now('%Y') }}", "{% break %}"),
    *("{{ lipsum(999999) }}", "{%", "}}", "{{ self }}", "{{ m.content | replace('', m.content) }}"),
    *("{{ range(10 ** 9) | list }}", "{{ x | pprint }}", "{{ [].pop() }}", "{% generation %}", "{% endgeneration %}"),
    *("{{ messages[0]['content'].format(a=1) }}", "{{ add_generation_prompt }}"),
)  # fmt: skip


# --- targets: (strategy, what is done with it) by the folder that they may use ---


def _config(here: Path) -> Any:
    def read(raw: bytes) -> None:
        (here / "c.yaml").write_bytes(raw)
        accepted_or_refused(lambda: config.to_yaml(config.load(here / "c.yaml")), 2)

    return mutated(YAML, YAML.replace(b"\n", b"\r\n"), json.dumps({"run_dir": "x", "steps": 1}).encode()), read


def _override(here: Path) -> Any:
    (here / "o.yaml").write_bytes(YAML)
    values = st.one_of(
        mutated(b"1", b"[1, 2]", b"{a: 1}", b"x").map(lambda raw: raw.decode("utf-8", "surrogateescape")), st.text()
    )
    keys = st.one_of(
        st.sampled_from(KEYS), st.text(max_size=12), st.sampled_from(("data.train.0", "data.train.1.path", "model.config.a"))
    )

    def read(given: tuple[str, str]) -> None:
        accepted_or_refused(lambda: config.to_yaml(config.load(here / "o.yaml", ["=".join(given)])), 2)

    return st.tuples(keys, values), read


def _config_json(_: Path) -> Any:
    def use(fields: dict[str, Any]) -> None:
        model = from_hf_config(json.loads(json.dumps(fields)))
        rope.cos_sin(model.rope, _positions())
        own = {"rope_scaling": fields.get("rope_scaling")} | fields
        accepted_or_refused(lambda: resolve_config(None, own, 300, {}), 2)

    def read(given: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
        kind, fields, scaling = given
        extra = {"rope_scaling": scaling} if scaling else {}
        accepted_or_refused(lambda: use({"model_type": kind, **SIZES, **extra, **fields}), 4)

    kinds = st.sampled_from(("qwen2", "qwen3", "llama"))
    return st.tuples(kinds, st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), ROPE), read


def _positions() -> Any:
    import jax.numpy as jnp

    return jnp.arange(4)[None]


def _safetensors(here: Path) -> Any:
    def read(given: tuple[bytes, bytes, int | None]) -> None:
        header, data, length = given
        length = len(header) if length is None else length
        (here / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
        accepted_or_refused(
            lambda: [t.open().sum() for t in hf_folder.tensors(here).values() if t.dtype in hf_folder.DTYPES], 4
        )

    lengths = st.one_of(st.none(), st.none(), st.sampled_from((0, 1, 10**6, 2**63, 2**64 - 1)))
    return st.tuples(mutated(HEADER), st.sampled_from((b"12345678", b"", b"1234567", b"123456789")), lengths), read


def _index(here: Path) -> Any:
    seed = b'{"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    (here / "model-00001-of-00001.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + b"12345678")

    def read(raw: bytes) -> None:
        (here / hf_folder.INDEX).write_bytes(raw)
        accepted_or_refused(lambda: hf_folder.tensors(here), 4)

    maps = st.dictionaries(st.text(max_size=4), JSON, max_size=4).map(lambda tree: json.dumps({"weight_map": tree}).encode())
    return st.one_of(mutated(seed), maps), read


MAKES = (partial(document_of, "text"), conversation_of, preference_of, labelled_of)


def _all_of(path: Path, *makes: Callable[[Any, str], Any]) -> None:
    for make in makes or MAKES:
        for _ in documents.records(Source(path=str(path)), make, Budget(5)):
            pass


def _rows(here: Path) -> Any:
    def read(raw: bytes) -> None:
        (here / "a.jsonl").write_bytes(raw)
        accepted_or_refused(lambda: _all_of(here / "a.jsonl"), 3)

    records = st.lists(RECORD, max_size=3).map(lambda rows: b"\n".join(json.dumps(row).encode() for row in rows))
    return st.one_of(mutated(*ROWS), records), read


def _archives(here: Path) -> Any:
    packed = [
        gzip.compress(ROWS[0], mtime=0),
        gzip.compress(ROWS[0], mtime=0) * 3,
        zstandard.ZstdCompressor().compress(ROWS[0] * 99),
    ]
    packed += [gzip.compress(b"\n" * 10**6, mtime=0), zstandard.ZstdCompressor().compress(bytes(10**7))]

    def read(given: tuple[bytes, str]) -> None:
        raw, suffix = given
        (here / f"a.jsonl{suffix}").write_bytes(raw)
        accepted_or_refused(lambda: _all_of(here / f"a.jsonl{suffix}", *MAKES[:1]), 3)

    return st.tuples(mutated(*packed), st.sampled_from((".gz", ".zst"))), read


def _json_list(here: Path) -> Any:
    def read(raw: bytes) -> None:
        (here / "a.json").write_bytes(raw)
        accepted_or_refused(lambda: _all_of(here / "a.json"), 3)

    seeds = [b"[" + row.strip().replace(b"\n", b",\n ") + b"]" for row in ROWS]
    return mutated(*seeds, b"[" + b"[]," * 10**5 + b"[]]"), read


def _parquet(here: Path) -> Any:
    def read(raw: bytes) -> None:
        (here / "a.parquet").write_bytes(raw)
        accepted_or_refused(lambda: _all_of(here / "a.parquet"), 3)

    seeds = []
    for rows in (
        [{"text": "the sea"}] * 3,
        [{"messages": [{"role": "user", "content": "a"}]}],
        [{"text": None, "label": True}],
    ):
        for compression in ("none", "zstd"):
            out = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), out, compression=compression)
            seeds.append(out.getvalue())
    return mutated(*seeds), read


def _template(here: Path) -> Any:
    tokenizer = Tokenizer.load(here / "tok")

    def use(text: str) -> None:
        with ChatTemplate(tokenizer, text + "{# #}") as template:
            template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    def read(pieces: list[str]) -> None:
        try:
            with bounded(3 * SECONDS):  # twice the two seconds that a template has, and the start of its process
                use("".join(pieces))
        except MaxiError as error:
            assert error.code in (2, 3) and "\n" not in error.line() and len(error.line()) < 2000

    return st.lists(st.sampled_from(PIECES), max_size=9), read


def _conversation(here: Path) -> Any:
    """Any messages, by a template that runs in a child."""
    tokenizer = Tokenizer.load(here / "tok")
    template = ChatTemplate(tokenizer, f"{tokenizer.chat_template}{{# another #}}")

    def read(messages: list[Any]) -> None:
        accepted_or_refused(lambda: template.render(messages, where="a.jsonl:1"), 3)

    return st.lists(MESSAGE, max_size=6), read


def _tokenizer(here: Path) -> Any:
    whole = (here / "tok" / "tokenizer.json").read_bytes()
    tree = json.loads(whole)
    small = {key: value for key, value in tree.items() if key != "model"} | {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    }
    (here / "other").mkdir(exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (here / "other" / name).write_bytes((here / "tok" / name).read_bytes())

    def read(raw: bytes) -> None:
        (here / "other" / "tokenizer.json").write_bytes(raw)
        tokenizer_trial.SECONDS = 1.5
        accepted_or_refused(lambda: Tokenizer.load(here / "other").encode(["the sea"]), 2, 3, 4)

    return mutated(whole, json.dumps(small).encode()), read


TARGETS: dict[str, Callable[[Path], Any]] = {name: globals()[f"_{name}"] for name in EXAMPLES}


def run(name: str, here: Path, examples: int, seed: int | None) -> dict[str, Any]:
    """What came of a target: how many inputs it got, by how much the process grew, and what went wrong."""
    strategy, read = TARGETS[name](here)
    count = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(value: Any) -> None:
        nonlocal count
        count += 1
        read(value)

    held = settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much),
        phases=[Phase.generate, Phase.shrink] if seed is not None else [Phase.generate],
        print_blob=False,
    )
    test = held(given(strategy)(one))
    fault = None
    try:
        (test if seed is None else seeded(seed)(test))()
    except (Exception, Hang) as error:
        fault = "".join(traceback.format_exception(error)[-12:]) + "".join(getattr(error, "__notes__", []))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return {"target": name, "inputs": count, "grown": grown, "fault": fault}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("targets", nargs="*", default=list(TARGETS))
    arguments.add_argument("--examples", type=int)
    arguments.add_argument("--random", type=int)
    args = arguments.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        bpe.train(["the sea was calm and the rain was dark over home and bread in the wind " * 20], 300, here / "tok")
        os.chdir(here)
        os.environ["XDG_CACHE_HOME"] = folder  # nothing is remembered there, so transformers is imported now, once
        Tokenizer.load(here / "tok")
        for name in args.targets:
            (here / name).mkdir()
            (here / name / "tok").symlink_to(here / "tok")
            print(json.dumps(run(name, here / name, args.examples or EXAMPLES[name], args.random)), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
