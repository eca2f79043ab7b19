"""Files that would wait, grow, or mean two things: each is one line that names file and place, in bounded memory."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rflow_jax.commands import main as commands
from rflow_jax.data.sources.chats import ChatFile
from rflow_jax.data.sources.preferences import PairFile
from rflow_jax.errors import InputError
from rflow_jax.report.runs import read_run
from rflow_jax.scoring.results import Results
from rflow_jax.search.inputs import read_prompts
from rflow_jax.search.prompt_folder import Journal, check_entry, has_end, json_line
from rflow_jax.search.run_folder import require_same
from rflow_jax.tokenizers.flux import load_tokenizer
from rflow_jax.training.checkpoints import ChecksumStore
from rflow_jax.utils import cli
from rflow_jax.utils.files import open_regular, read_text, sha256_of
from rflow_jax.utils.json_files import LONGEST_LINE, parse_json, parse_json_line, read_json, read_records
from rflow_jax.utils.shown import LONGEST, one_line
from rflow_jax.utils.yaml_files import LARGEST, parse_yaml, read_yaml
from rflow_jax.writers.prompt_template import read_prompt

OTHERS = ("folder", "pipe", "zeros", "loop", "missing")


def other(path: Path, kind: str) -> Path:
    """Something in place of a file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    return path


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    "read",
    [open_regular, read_text, sha256_of, read_json, read_yaml, read_prompts, read_prompt, ChatFile.open, PairFile.open],
)
def test_what_is_no_file_is_one_line_at_once(tmp_path, read, kind):
    path = other(tmp_path / "a", kind)
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        read(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("kind", ["folder", "pipe", "zeros"])
def test_files_of_a_run_that_are_none(tmp_path, kind):
    (tmp_path / "00000").mkdir()
    metadata = other(tmp_path / "00000/metadata.jsonl", kind)
    journal, config = other(tmp_path / "j", kind), other(tmp_path / "config.yaml", kind)
    tokenizer = other(tmp_path / "tokenizer.json", kind)
    assert not has_end(other(tmp_path / "a.png", kind))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checksums").mkdir()
    other(tmp_path / "checksums/1.json", kind)
    assert not ChecksumStore(tmp_path / "checksums", tmp_path / "checkpoints").read(1).whole
    for path, read in (
        (metadata, lambda: check_entry(tmp_path, 0, {"prompt": "x"})),
        (journal, lambda: Journal(journal)),
        ("regular file", lambda: Results(journal, {})),
        (config, lambda: require_same(tmp_path, {})),
        (tokenizer, lambda: load_tokenizer(tmp_path)),
    ):
        with pytest.raises(InputError, match=str(path)):
            read()
    with pytest.raises(InputError, match=r"config\.yaml"):
        read_run(tmp_path)


@pytest.mark.parametrize("kind", OTHERS[:4])
@pytest.mark.parametrize("flag", ["--config", "--sampling", "--verifier"])
def test_no_command_waits_for_its_configuration(tmp_path, monkeypatch, capsys, kind, flag):
    path = other(tmp_path / "c.yaml", kind)
    argv = ["noise", f"{flag}={path}", "--model=m", "--prompts=p", "--out=o"]
    assert cli.run(lambda: commands.main(argv)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands there twice"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("[" * 10**6, "nested more than 100 deep"),
        ("9" * 5000, "a number of 5,000 digits"),
        ("1e999", "too large"),
        ("NaN", "NaN is no number in JSON"),
        ("[-Infinity]", "-Infinity is no number"),
        ('{"a":\n1,}', "f.json:2: "),
        ("", "f.json:1: "),
        (b"\xff\xfe{\x00}\x00", "UTF-16; save it as UTF-8"),
        (b'{"a": "\xe9"}', "not UTF-8 text (byte 7)"),
        (b'{"a": "\x00"}', "byte 7 is a NUL"),
    ],
)
def test_json_is_read_strictly(text, reason):
    with pytest.raises(InputError) as raised:
        parse_json(text, "f.json")
    assert str(raised.value).startswith("f.json:")
    assert reason in str(raised.value)


def test_what_json_allows_is_read():
    nested = "[" * 100 + "1.5e3" + "]" * 100
    assert parse_json(b"\xef\xbb\xbf" + nested.encode(), "f")
    assert parse_json_line('{"loss": NaN}', "f", nan=True)["loss"] != 0


def test_a_run_writes_no_number_that_it_does_not_read():
    line = json_line({"raw": {"score": float("nan"), "all": (1.0, float("inf"))}, "error": None})
    assert json.loads(line, parse_constant=pytest.fail) == {"raw": {"score": None, "all": [1.0, None]}, "error": None}


def test_a_line_of_any_length_is_bounded_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n')
    os.truncate(path, 2**33)  # sparse: nothing but zeros from the second line on
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{LONGEST_LINE:,} bytes"):
        list(read_records(path, "list"))
    assert time.monotonic() - began < 5


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "more than 100,000 values"),
        (MERGES.replace("*k0", "*a"), "more than 100,000 values"),
        ("a: &a {b: *a}", "contains itself"),
        ("a: &a [*a]", "contains itself"),
        ("a: 1\nb: 2\na: 3", "f.yaml:3: the key a stands there twice"),
        ("[" * 200, "nested more than 100 deep"),
        ("- " * 5000, "nested more than 100 deep"),
        ("a: " + "9" * 5000, "5,000 digits"),
        ("a: !!python/object/apply:os.system [id]", "f.yaml:1: not YAML"),
        ("a: 2020-13-45", "month must be in 1..12"),
        ("a: [1\nb: 2", "f.yaml:2: not YAML"),
        ("{[]: 1}", "f.yaml:1: not YAML"),
        ("x" * (LARGEST + 1), "characters"),
        ("a: \x07", "not YAML"),
    ],
)
def test_yaml_is_read_strictly(text, reason):
    with pytest.raises(InputError) as raised:
        parse_yaml(text, "f.yaml")
    assert str(raised.value).startswith("f.yaml")
    assert reason in str(raised.value)


def test_an_alias_of_reasonable_size_is_read():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "f") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


def test_a_bomb_in_a_configuration_is_one_line_in_bounded_memory(tmp_path):
    for section in ("", "sampling:\n", "verifier:\n"):
        indented = "".join(f"  {line}\n" for line in BOMB.splitlines()) if section else BOMB
        (tmp_path / f"{section[:1]}.yaml").write_text(section + indented)
    code = (
        "import sys, resource; from rflow_jax.commands.main import main; from rflow_jax.utils import cli\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))\n"
        "for name in ['', 's', 'v']:\n"
        "    assert cli.run(lambda: main(['noise', f'--config={sys.argv[1]}/{name}.yaml'])) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("\n") == 3
    assert done.stderr.count("values") == 3


@pytest.mark.parametrize(
    ("yaml", "key"),
    [
        ("sampling: null", "sampling"),
        ("prompts_in_flight: null", "prompts"),
    ],
)
def test_null_where_something_belongs_names_the_key(tmp_path, capsys, yaml, key):
    (tmp_path / "c.yaml").write_text(f"{yaml}\nmodel: m\nprompts: p\nout: {tmp_path}/o\n")
    status = cli.run(lambda: commands.main(["noise", f"--config={tmp_path}/c.yaml"]))
    said = capsys.readouterr().err
    assert status == 2
    assert key in said


def test_messages_are_bounded_and_without_escapes(capsys):
    def failing() -> None:
        raise InputError("a\x1b[2J\u202eb\n" + "x" * 10**6 + " the end")

    assert cli.run(failing) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a\\x1b[2J\\u202eb x")
    assert said.endswith(" the end\n")
    assert said.count("\n") == 1
    assert len(said) < LONGEST + 50
    assert one_line("short é 星") == "short é 星"


def test_with_few_descriptors_no_image_counts_as_torn(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 5, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            has_end(path)
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
