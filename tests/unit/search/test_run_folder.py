"""The folder of a run: the same search goes on, and one process with each index."""

import errno
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from rflow_jax.errors import InputError
from rflow_jax.scoring.judging import scores_follow_from
from rflow_jax.search import run_folder
from rflow_jax.search.run_folder import claim, require_same, write_config
from rflow_jax.utils import atomic_io as files
from rflow_jax.utils import output_folder
from rflow_jax.utils.output_folder import usable_folder
from rflow_jax.verifiers import VERIFIERS
from rflow_jax.verifiers.config import OpenAIVerifierConfig

ROOT = Path(__file__).parents[3]
CONFIG = {
    "model": "m",
    "seed": 0,
    "process_index": 0,
    "process_count": 1,
    "budget": None,
    "noise": {"search_rounds": 2},
    "sampling": {"batch_size": 4, "k": [1, 2]},
    "verifier": {"name": "openai", "model": "gpt", "timeout": 60.0, "base_url": "http://a"},
    "reflector": {"model": "gpt", "concurrency": 8},
}


def changed(**changes):
    """The configuration with other values; a dotted name with _ for the dot."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}
    for name, value in changes.items():
        head, _, tail = name.partition("__")
        if tail:
            config[head][tail] = value
        else:
            config[head] = value
    return config


def begin(out, config, process_index=0):
    """The claim of a search that has begun."""
    held = claim(out, process_index)
    try:
        write_config(out, config)
    except InputError:
        held.close()
        raise
    return held


@pytest.fixture
def run(tmp_path):
    """A folder that holds a run, and no process."""
    begin(tmp_path, CONFIG, 0).close()
    return tmp_path


def test_the_configuration_is_written_once_and_reads_as_it_was(run):
    assert yaml.safe_load((run / "config.yaml").read_text()) == CONFIG
    before = (run / "config.yaml").read_bytes()
    begin(run, changed(budget=3.0), 0).close()
    assert (run / "config.yaml").read_bytes() == before
    assert [file.name for file in run.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 now;"),
        ({"noise__search_rounds": 3}, "noise.search_rounds is 2 there and 3 now;"),
        ({"sampling__batch_size": 8}, "sampling.batch_size is 4 there and 8 now;"),
        ({"sampling__k": [1]}, "sampling.k is [1, 2] there and [1] now;"),
        ({"verifier__model": "other"}, "verifier.model is gpt there and other now;"),
        ({"seed": 1, "model": "n", "sampling__k": []}, "(and 2 more)"),
        ({"new": 1}, "new is None there and 1 now;"),
    ],
)
def test_a_changed_setting_is_named(run, change, message):
    before = (run / "config.yaml").read_bytes()
    for check in (require_same, lambda out, config: begin(out, config, 0)):
        with pytest.raises(InputError) as caught:
            check(run, changed(**change))
        assert message in str(caught.value)
        assert str(run) in str(caught.value)
    assert (run / "config.yaml").read_bytes() == before


def test_a_changed_option_of_a_users_class_is_named_without_its_value(tmp_path):
    was, now = (changed(verifier={"name": "mine:Mine", "options": {"password": word}}) for word in ("old", "new"))
    begin(tmp_path, was, 0).close()
    with pytest.raises(InputError, match=r"verifier\.options\.password differs; set it so again"):
        require_same(tmp_path, now)


def test_what_changes_no_result_may_change(run):
    require_same(run, CONFIG)
    free = {"process_index": 1, "process_count": 2, "budget": 5.0, "prompts": "p", "out": "o"}
    free |= {"start": 3, "end": 4, "prompts_in_flight": 2}
    models = {"verifier__timeout": 1.0, "verifier__base_url": "http://b", "reflector__concurrency": 1}
    require_same(run, changed(**free, **models, verifier__price_input=1.0, reflector__max_retries=0))


def test_a_run_of_an_earlier_version_goes_on_under_the_new_names_of_keys(tmp_path):
    old = changed(noise__closeness=0.95, share="1/2", end=-1, reflect={"include_initial_images": True})
    for key in ("process_index", "process_count"):
        del old[key]
    old["settings"] = old.pop("sampling")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    now = {"noise__noise_similarity": 0.95, "end": None, "reflect": {"include_initial_images": True}}
    require_same(tmp_path, changed(**now))
    for key, value, message in [
        ("noise__noise_similarity", 0.5, r"noise\.noise_similarity is 0\.95 there and 0\.5 now; "),
        ("reflect", {"include_initial_images": False}, r"include_initial_images is True there and False now; "),
        ("sampling__batch_size", 8, r"sampling\.batch_size is 4 there and 8 now; "),
    ]:
        with pytest.raises(InputError, match=message):
            require_same(tmp_path, changed(**now | {key: value}))


def test_a_folder_without_a_run_is_any(tmp_path):
    require_same(tmp_path, CONFIG)


def test_a_configuration_that_cannot_be_read_is_said(tmp_path):
    for content in ("a: [", "- 1"):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(InputError, match=r"config\.yaml.*: .*; give another folder"):
            require_same(tmp_path, CONFIG)


def test_a_folder_with_other_files_is_refused_and_a_runs_own_is_not(tmp_path):
    out = tmp_path / "new/run"
    with usable_folder(out):
        claim(out, 0).close()
        (out / "kept.txt").write_text("x")
    with pytest.raises(InputError, match=r"contains files, but no search \(config\.yaml is missing\)"):
        claim(out, 0)
    (out / "config.yaml").write_text("seed: 1")
    claim(out, 0).close()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied")

    # Not by permissions: they do not hold for root.
    monkeypatch.setattr(output_folder.tempfile, "TemporaryFile", refused)
    with pytest.raises(InputError, match=r"cannot use this folder \(Permission denied\)"), usable_folder(tmp_path):
        pass


def test_of_two_processes_that_begin_at_once_the_firsts_configuration_stays(tmp_path):
    """The other one saw no configuration, and writes its own a moment later: it must not take the file away."""
    first = begin(tmp_path, CONFIG, 0)
    inode = (tmp_path / "config.yaml").stat().st_ino
    run_folder._write_first(tmp_path / "config.yaml", "seed: 7\n")
    assert (tmp_path / "config.yaml").stat().st_ino == inode
    require_same(tmp_path, CONFIG)
    first.close()
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_without_links_the_configuration_is_written_all_the_same(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(run_folder.os, "link", refused)
    begin(tmp_path, CONFIG, 0).close()
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    require_same(tmp_path, CONFIG)


def test_one_process_a_share_until_it_dies(run):
    """Claims are held between processes, so another one is needed: it claims index 2 and waits to be killed."""
    code = (
        "import sys, pathlib; from rflow_jax.search.run_folder import claim\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "held = claim(out, 2)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is using this folder"):
            begin(run, CONFIG, 2)
        with begin(run, CONFIG, 1):
            pass
        other.kill()
        other.wait(timeout=30)
        with begin(run, CONFIG, 2):
            pass
    finally:
        other.kill()
        other.communicate()


def test_a_claim_outlives_readers_of_the_configuration(tmp_path):
    for place in (0, 2):
        with begin(tmp_path, CONFIG, place):
            require_same(tmp_path, CONFIG)
            with pytest.raises(InputError, match="another process is using this folder"):
                begin(tmp_path, CONFIG, place)
        begin(tmp_path, CONFIG, place).close()
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_disk_without_locks_is_not_another_process(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "flock", refused)
    with pytest.raises(InputError, match=r"cannot be locked \(No locks available\)"):
        begin(tmp_path, CONFIG, 0)


def test_only_beginnings_of_the_file_itself_are_removed(tmp_path):
    (tmp_path / "sub").mkdir()
    kept = [tmp_path / ".a[1].b.12.tmp", tmp_path / ".a1.12.tmp", tmp_path / "sub/.a[1].12.tmp"]
    for file in (*kept, tmp_path / ".a[1].12.tmp"):
        file.touch()
    files.remove_beginnings(tmp_path, "a[1]")
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted(kept)
    files.remove_beginnings(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["sub"]


def test_what_changes_no_score_of_a_local_model_may_change():
    def affecting(name, **settings):
        return VERIFIERS.results_follow_from({"name": name, **settings})

    for name in ("nvila", "reward", "clip"):
        one, other = {"name": name, "batch_size": 1}, {"name": name, "devices": [1], "options": {"batch_size": 2}}
        assert affecting(**one) == affecting(**other) != affecting(name, dtype="x")
        assert affecting("ensemble", members=[one]) == affecting("ensemble", members=[other])
    own = affecting("package.module:Class", options={"batch_size": 2, "devices": [1]})
    assert own["options"] == {"batch_size": 2, "devices": [1]}


MAY_CHANGE = {
    "base_url": "http://b/v1",
    "api_key_env": "OTHER_KEY",
    "timeout": 5.0,
    "concurrency": 2,
    "max_retries": 9,
    "patience": 1.0,
    "price_input": 1.0,
    "price_output": 1.0,
    "extra_headers": {"X-Team": "a"},
}
MAY_NOT = {
    "model": "other",
    "temperature": 0.5,
    "max_tokens": 9,
    "structured": "text",
    "reasoning_effort": "low",
    "extra_body": {"top_k": 20},
    "prompts": "other/prompts",
}


@pytest.mark.parametrize("name", [one.name for one in fields(OpenAIVerifierConfig) if one.name != "name"])
def test_what_may_change_between_runs_of_a_search_and_of_a_score_file(tmp_path, name):
    price = {"price_input": 1.0, "price_output": 1.0} if name.startswith("price") else {}
    config = VERIFIERS.parse({"model": "gpt", **price})
    other = VERIFIERS.parse({"model": "gpt", **price} | {name: (MAY_CHANGE | MAY_NOT)[name]})
    was, now = (changed(verifier=run_folder.public_section(one)) for one in (config, other))
    begin(tmp_path, was, 0).close()
    if name in MAY_CHANGE:
        require_same(tmp_path, now)
    else:
        with pytest.raises(InputError, match=rf"verifier\.{name}(\.top_k)? is .* there and .* now"):
            require_same(tmp_path, now)
    assert (scores_follow_from(config) == scores_follow_from(other)) == (name in MAY_CHANGE)


@pytest.mark.parametrize("later", ["patience", "reasoning_effort", "extra_body", "extra_headers"])
def test_a_run_from_before_a_setting_goes_on_where_it_is_left_alone(tmp_path, later):
    now = run_folder.public_section(VERIFIERS.parse({"model": "gpt"}))
    assert later in now
    begin(tmp_path, changed(verifier={key: value for key, value in now.items() if key != later}), 0).close()
    require_same(tmp_path, changed(verifier=now))
