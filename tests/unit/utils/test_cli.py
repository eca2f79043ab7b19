"""The command line with everything but a model."""

import errno
import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import PIL.Image
import pytest
import yaml

import rflow_jax.generation.pipeline
from rflow_jax.commands.main import COMMANDS, main
from rflow_jax.errors import InputError
from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer
from rflow_jax.utils import cli
from rflow_jax.verifiers.config import ClipVerifierConfig
from tests.kit.fake_pipeline import FakePipeline

ROOT = Path(__file__).parents[3]
SMALL = ["--height=32", "--width=32", "--condition_size=16"]


@pytest.fixture
def pipe(monkeypatch):
    """A pipeline without a model in place of the real one; remembers what it was loaded with."""
    fake = FakePipeline()

    def load(model, **more):
        fake.loaded = {"model": model} | more
        if model == "broken":
            raise InputError("broken: not a model")
        return fake

    monkeypatch.setattr(rflow_jax.generation.pipeline, "load_pipeline", load)
    return fake


def call(*argv: object) -> int:
    return cli.run(lambda: main([str(word) for word in argv]))


def error_of(capsys, *argv: object, status: int = 2) -> str:
    assert call(*argv) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# ---- errors ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "give a command: generate, noise, noise-prompt, reflect,"),
        ("nois", "unknown command nois: did you mean noise?"),
        ("convert flx", "unknown command convert flx: did you mean convert flux?"),
        ("noise --model=m --prompts=p --out=o --verifier.base_urll=secret", "did you mean verifier.base_url?"),
        ("noise --model=m --prompts=p --out=o --verifier.base_urll secret", "did you mean verifier.base_url?"),
        (
            "noise --verifier.name=nvila --verifier.timeout=3",
            "verifier.timeout: nvila has no such setting",
        ),
        ("noise --model=m --verifier.timeout", "verifier.timeout: give a value"),
        ("noise --verifier.name=nvila --verifier.devices=[1.5]", "verifier.devices[0]: Input should be a valid"),
        ("noise --model=m --verifier.base_url=http://u:secret@host/v1 -- x", "unrecognized arguments: -- x"),
        ("noise --config=", "config is empty"),
        ('noise --noise={"method":"foo"}', "noise.method is foo: give random or zero_order"),
        ('noise --mesh={"data":"x"}', "mesh.data is x: give a whole number"),
        ('train --model=m --out=o --validation={"shards":1}', "validation.shards is now called validation.path"),
        ("configs --x=3", "unknown key x: give no flags"),
        ("noise --model=m --verifier.timeout=never", "verifier.timeout: Input should be a valid number"),
        ("noise --model=m --prompts=p --out=o --heigth=64", "did you mean sampling.height?"),
        ("noise --model=m --prompts=p --out=o --search_branches=2", "search_branch?"),
        ("noise --model=m --prompts=p --out=o --share=0/4", "share is now called process_index and process_count"),
        ("noise --model=m --prompts=p --out=o --settings.height=64", "settings.height is now called sampling.height"),
        ('noise --model=m --prompts=p --out=o --noise={"closeness":0.9}', "is now called noise.noise_similarity"),
        ("train --model=m --out=o --trainable.rank=4", "trainable.rank is now called lora.rank"),
        ("train --model=m --out=o --data.patience.longest_pause 3", "is now called data.retry.max_backoff"),
        ("generate --model=m --prompt=x --out=o --num_inference_step=2", "did you mean sampling.num_inference_steps?"),
        ("generate --model=m --prompt=x --out=o junk", "junk"),
        ("generate --model=m --out=o", "missing: prompt"),
        ("generate --model=m --prompt=x --out=o --lora_alpha=3", "lora_alpha is given without a lora"),
        ("generate --model=m --prompt=x --out=o --reflection=y", "reflection says what to change in a condition"),
        (
            "generate --model=m --prompt=x --out=infer.py",
            "infer.py: a file, a pipe, a device or a broken link is in the place of this folder",
        ),
        ("generate --model=m --prompt=x --out=infer.py/x", "infer.py/x: cannot use this folder"),
        ("generate --model=m --prompt=x --out=o --num_inference_steps=1.5", "is 1.5: give a whole number or null"),
        ("generate --model=m --prompt=x --out=o --guidance_scale=nan", "guidance_scale is nan: give a number"),
        ("generate --model=m --prompt=x --out=o --vae_tiling=maybe", "vae_tiling is maybe: give true or false"),
        ("generate --model=m --prompt= --out=o", "prompt is empty"),
        ("generate --model=m --prompt=x --out=o --height=65", "height is 65"),
        ("generate --model=m --prompt=x --out=o --height=tall", "height is tall: give a whole number"),
        ("generate --model=m --prompt=\udcff --out=o", "prompt: contains an unpaired surrogate"),
        ("generate --model=m --prompt=x --out=o --dtype=int8", "give bfloat16 or float32"),
        ("generate --model=m --prompt=x --out=o --dtype=float16", "its largest number, 65504; use bfloat16"),
        ("noise --model=m --prompts=p --out=o --dtype=float16", "its largest number, 65504; use bfloat16"),
        ("generate --model=m --prompt=x --out=o --seed=-1", "seed is -1"),
        ("generate --model=m --prompt=x --out=o --num_images=0", "num_images is 0"),
        ("generate --prompt=x --out=o --num_images=0", "num_images is 0"),  # of the model that comes along
        ("reflect --out=o", "missing: prompts"),
        ("generate --model=m --prompt=x --out=o --condition=/none.png", "/none.png: cannot read this image"),
        ("generate --model=m --prompt=x --out=o --condition=infer.py", "infer.py: cannot read this image"),
        ("noise --config=/none.yaml", "/none.yaml"),
        ("reflect --model=m --prompts=p --out=o", "set lora"),
        ("reflect --model=m --lora=l --prompts=p --out=o --verifier.name=none", "verifier.name"),
        ("reflect --model=m --lora=l --prompts=p --out=o --reflect.search_branch=99", "search_branch is 99"),
        ("noise --model=m --prompts=/none.jsonl --out=o", "/none.jsonl"),
        ("noise --model=m --prompts=p --out=o --noise.search_rounds=0", "search_rounds"),
        ("noise --model=m --prompts=p --out=o --seed=-1", "seed is -1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv, message):
    error = error_of(capsys, *argv.split())
    assert message in error
    assert "secret" not in error


def test_a_command_has_a_recipe_of_its_own(capsys, monkeypatch, tmp_path):
    """Also where a folder is called so; a model or a LoRA stands for itself."""
    monkeypatch.chdir(tmp_path)
    Path("shapes").mkdir()
    with pytest.raises(SystemExit):
        main(["generate", "--prompt=x", "--print_config"])
    assert "model: shapes\nprompt: x" in capsys.readouterr().out
    assert "missing: model" in error_of(capsys, "generate", "--prompt=x", "--lora=l")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("verifier: {base_urk: secret}", "did you mean verifier.base_url?"),
        ("verifer: {model: secret}", "did you mean verifier.model?"),
        ("modle: secret", "did you mean model?"),
        ("settings: {height: 64}", "wrong.yaml: settings.height is now called sampling.height"),
        ("share: 0/4", "share is now called process_index and process_count"),
        ("noise: {closeness: 0.9}", "wrong.yaml: noise.closeness is now called noise.noise_similarity"),
        ("verifier: 3\nmodel: m\nprompts: p\nout: o", "verifier: expected keys with values"),
        ("- a", "wrong.yaml: expected keys with values"),
        ("hi", "wrong.yaml: expected keys with values"),
        ("verifier: [", "wrong.yaml"),
        (b"model: \xff", "wrong.yaml: the YAML file is not UTF-8 text"),
        ("model: &a {b: *a}", "wrong.yaml:1: a section that contains itself"),
        ("model: 2020-13-45", "wrong.yaml: month must be in 1..12"),
        ("model: m\nprompts: p\nout: o\nmesh: {data: null}", "mesh.data is null: give a value"),
        ("model: m\nprompts: p\nout: o\nseed: null", "seed is null: give a value"),
        ("verifier: {1: secret}", "unknown key verifier.1"),
        ("verifier.model: secret", "wrong.yaml: verifier.model: give it as a key of the section verifier"),
        ("? [a] : secret", "wrong.yaml"),
        ("modle: secret\nshare: 0/4", "did you mean model? (and 1 more)"),
    ],
)
def test_a_wrong_yaml_file_is_one_line_and_status_2(capsys, tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    error = error_of(capsys, "noise", "--config", tmp_path / "wrong.yaml")
    assert message in error
    assert "secret" not in error


def test_the_printed_configuration_contains_what_flags_say_of_components(capsys):
    with pytest.raises(SystemExit):
        call("noise", "--model=m", "--prompts=p", "--out=o", "--verifier.name=clip", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["verifier"] == asdict(ClipVerifierConfig())


def test_other_exit_statuses(capsys):
    def raises(error):
        raise error

    assert cli.run(lambda: None) == 0
    assert cli.run(lambda: 1) == 1
    assert cli.run(lambda: raises(KeyboardInterrupt())) == 130
    assert cli.run(lambda: raises(RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9G"))) == 1
    assert "lower batch_size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="other"):
        cli.run(lambda: raises(RuntimeError("other")))


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (errno.ENOSPC, 1, "/x/y: the disk is full; free some space"),
        (errno.EIO, 1, "/x/y: the device reports an error"),
        (errno.EACCES, 2, "/x/y: no permission"),
        (errno.ENOENT, 2, "/x/y: no such file or folder"),
        (errno.EISDIR, 2, "/x/y: a folder, where a file is expected"),
    ],
)
def test_errors_of_files_are_one_line(capsys, number, status, message):
    def fails():
        raise OSError(number, "as the system says it", "/x/y")

    assert cli.run(fails) == status
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_an_error_of_the_system_that_nobody_can_act_on_keeps_its_traceback():
    def fails():
        raise OSError("no number")

    with pytest.raises(OSError, match="no number"):
        cli.run(fails)


def test_output_that_nobody_reads_on_ends_quietly():
    code = "import sys; from rflow_jax.utils import cli; sys.exit(cli.run(lambda: print('x' * 10_000_000)))"
    command = f"{sys.executable} -c {shlex.quote(code)} | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("x", "")


def test_help_is_quick_and_loads_no_network():
    begin = time.monotonic()
    code = (
        "import sys\nfrom rflow_jax.commands.main import main\n"
        "try: sys.exit(main())\nexcept SystemExit as e: print(e.code, 'jax' in sys.modules)"
    )
    for words in (["--help"], ["reflect", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.endswith("0 False\n"), done.stdout + done.stderr
    assert time.monotonic() - begin < 15


# ---- words without a flag ----


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class OneWord:
    folder: str
    k: list[int] = field(default_factory=lambda: [1, 2])
    names: list[str] | None = None
    quick: bool = False
    inner: Inner = field(default_factory=Inner)


def parsed(words: str, *argv: str):
    seen = []
    cli.run_command(cli.Command((OneWord,), seen.append, (words,)), argv)
    return seen[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["x"], OneWord("x")),
        (["a b: [c", "--k=[3]"], OneWord("a b: [c", [3])),
        (["--k", "[3]", "x"], OneWord("x", [3])),
        (["x", "--k", "3", "4", "--quick"], OneWord("x", [3, 4], quick=True)),
        (["--k", "3", "x"], OneWord("x", [3])),
        (["--inner.size", "3", "x"], OneWord("x", inner=Inner(3))),
        (["--quick", "x"], OneWord("x", quick=True)),
        (["--quick", "false", "x"], OneWord("x")),
        (["x", "--quick"], OneWord("x", quick=True)),
        (["--folder", "x"], OneWord("x")),
        (["--folder=x", "--quick", "true"], OneWord("x", quick=True)),
    ],
)
def test_one_word_may_go_without_its_flag(argv, expected):
    assert parsed("folder", *argv) == expected


def test_a_list_takes_all_words():
    assert parsed("names", "--folder=x", "a", 'b "c"', "--k=[4]", "d") == OneWord("x", [4], ["a", 'b "c"', "d"])
    assert parsed("names", "--folder=x") == OneWord("x")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("filter a b", "b is too much; give one folder"),
        ("filter", "missing: folder"),
        ("filter /none", "/none: not the folder of a search"),
        ("filter --corrections_only /none", "/none: not the folder of a search"),
        ("filter /none --k=[]", "k is empty: give numbers of images"),
        ("filter /none --kk=[1]", "did you mean k?"),
        ("filter /none --k=x", "k is x: give a list"),
        ("pairs a b", "b is too much; give one file"),
        ("pairs /none --model=m --lora=l --out=o", "/none: cannot read the list of pairs"),
        ("pairs /none --model=m --out=o", "missing: lora"),
        ("noise word --model=m --prompts=p --out=o", "word"),
    ],
)
def test_words_that_cannot_be_used_are_one_line_and_status_2(capsys, argv, message):
    assert message in error_of(capsys, *argv.split())


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(capsys, command, flag):
    with pytest.raises(SystemExit) as caught:
        call(command, flag)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert COMMANDS[command].help in shown
    if command in ("noise", "noise-prompt", "reflect", "score"):
        assert re.search(
            r"--verifier\.name nvila: .*\n(  .*\n)*  --verifier\.rank \{word,margin\}\n +\"word\" ranks", shown
        )


# ---- generate ----


def test_generate_writes_images_with_records(pipe, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["generate", "--model=m", "--prompt=a: 'cat', \"{x}\"", "--out", out, "--seed=5", "--num_images=3", *SMALL]
    assert call(*argv, "--batch_size=2", "--lora=l", "--lora_alpha=8", "--latent_lora") == 0
    assert capsys.readouterr().out == f"3 images in {out}\n"
    assert sorted(file.name for file in out.iterdir()) == [f"seed_{n}.{e}" for n in (5, 6, 7) for e in ("json", "png")]
    record = json.loads((out / "seed_6.json").read_text())
    assert record["prompt"] == "a: 'cat', \"{x}\""
    assert record["seed"] == 6
    assert record["file"] == "seed_6.png"
    assert record["model"] == "m"
    assert record["lora"] == "l"
    assert record["lora_alpha"] == 8
    assert record["settings"]["num_inference_steps"] == 30
    assert record["settings"]["latent_lora"] is True
    assert pipe.loaded == {"model": "m", "lora": "l", "lora_alpha": 8.0, "dtype": "bfloat16"}


def test_generate_corrects_a_condition_and_takes_the_seed_of_a_search(pipe, tmp_path):
    PIL.Image.new("RGBA", (20, 10), "red").save(tmp_path / "bad.png")
    more = ["--condition", tmp_path / "bad.png", "--reflection=add: a cat", "--refined_prompt=one cat"]
    assert call("generate", "--model=m", "--prompt=x", "--out", tmp_path, "--seed=0-1-2-3", *more, *SMALL) == 0
    record = json.loads((tmp_path / "seed_0-1-2-3.json").read_text())
    assert (record["seed"], record["reflection"], record["refined_prompt"]) == ([0, 1, 2, 3], "add: a cat", "one cat")
    assert len(record["condition_sha256"]) == 64
    assert pipe.requests[0].condition.mode == "RGB"


def test_generate_does_not_replace_what_was_made_otherwise(pipe, tmp_path, capsys):
    argv = ["generate", "--model=m", "--out", tmp_path, *SMALL]
    assert call(*argv, "--prompt=cat") == 0
    before = (tmp_path / "seed_0.png").read_bytes()
    assert call(*argv, "--prompt=cat") == 0
    assert "prompt" in error_of(capsys, *argv, "--prompt=dog")[1:]
    assert "guidance_scale" in error_of(capsys, *argv, "--prompt=cat", "--guidance_scale=2")
    assert (tmp_path / "seed_0.png").read_bytes() == before
    (tmp_path / "seed_1.png").write_bytes(b"mine")
    assert "unknown settings" in error_of(capsys, *argv, "--prompt=cat", "--seed=1")
    assert (tmp_path / "seed_1.png").read_bytes() == b"mine"


def test_generate_and_pairs_read_the_recipe_of_a_search(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--config", "debug", "--prompt", "a cat", "--num_inference_steps", "2"]
    assert call(*argv) == 0
    recipe = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
    assert pipe.loaded == {"model": "tiny-flux", "lora": None, "lora_alpha": None, "dtype": "float32"}
    record = json.loads((tmp_path / "images/seed_0.json").read_text())
    assert record["settings"].items() >= (recipe["sampling"] | {"num_inference_steps": 2}).items()
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "bad.png")
    assert call(*argv, "--out=corrected", "--condition=bad.png") == 0
    assert pipe.loaded["lora"] == recipe["lora"]
    pair = {"bad_image": "bad.png", "good_image": "bad.png", "prompt": "a cat", "reflection": "add a cat"}
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    assert call("pairs", "pairs.json", "--config", "debug", "--out=pairs", "--height=32", "--width=32") == 0
    used = json.loads((tmp_path / "pairs/00000.json").read_text())["settings"]
    assert (used["height"], used["num_inference_steps"], used["batch_size"]) == (32, 4, 4)
    for wrong, meant in {"nois": "noise", "reflect": "reflect.search_branch", "sampling": "sampling.height"}.items():
        key = {"nois": 3, "reflect": {"search_branches": 2}, "sampling": {"heigth": 64}}[wrong]
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(recipe | {wrong: key}))
        assert f"did you mean {meant}" in error_of(capsys, "generate", "--config=wrong.yaml", "--prompt=x")


# ---- searches ----


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "picture {number}"}}\n' for number in range(4)))
    return path


def reflect_argv(prompts, out, base_url, *more):
    sizes = ["--noise.search_rounds=1", "--reflect.search_rounds=2", "--height=16", "--sampling.width=16"]
    urls = [f"--{role}.base_url={base_url}" for role in ("verifier", "reflector", "refiner")]
    retries = [f"--{role}.max_retries=1" for role in ("verifier", "reflector", "refiner")]
    return ["reflect", "--model=m", "--lora=l", "--prompts", prompts, "--out", out, *sizes, *urls, *retries, *more]


def test_reflect_writes_its_config_without_secrets_and_a_summary(pipe, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "run"
    with OpenAIServer([Fault("status", status=413, when=lambda call: "picture 2" in call.text)]) as server:
        url = server.base_url.replace("//", "//user:hidden@") + "?token=hidden&X-Amz-Signature=hidden-too"
        assert call(*reflect_argv(prompts, out, url, "--start=1", "--end=3")) == 1
    said = capsys.readouterr()
    assert re.fullmatch(
        r"2 prompts, 12 images, 6 scored, 6 without a score, 8 texts failed, [\d,]+ tokens; "
        rf"the best are in {out}/\*/samples_best\n",
        said.out,
    )
    service = f"verifier gpt-4o at {server.base_url}"
    assert said.err.startswith(f"the first failure was: score: {service}: HTTP 413: out of order, key Basic ***")
    assert said.err.endswith(f"; all are in {out}/*/records.jsonl\n")
    assert KEY not in said.err
    assert "hidden" not in said.err + said.out
    assert sorted(child.name for child in out.iterdir()) == ["00001", "00002", "config.yaml", "usage.json"]
    for file in out.rglob("*"):
        assert file.is_dir() or not any(word in file.read_bytes() for word in (KEY.encode(), b"hidden"))
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["verifier"]["base_url"] == server.base_url
    assert written["verifier"]["model"] == "gpt-4o"
    assert written["reflect"]["search_rounds"] == written["reflect"]["search_branch"] == 2
    assert written["strategy"] == "reflect"
    assert written["start"] == 1
    # What was written is a config again.
    with OpenAIServer() as server:
        again = reflect_argv(prompts, tmp_path / "again", server.base_url)
        assert call(*again[:1], "--config", out / "config.yaml", *again[5:]) == 0


def test_the_run_fails_if_nothing_could_be_scored(pipe, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("rflow_jax.openai_client.retry._FIRST_PAUSE", 0.01)
    with OpenAIServer([Fault("refusal", when=lambda call: "a red square" not in call.text)]) as server:
        assert call(*reflect_argv(prompts, tmp_path / "run", server.base_url)) == 1
    assert len(list((tmp_path / "run").glob("*/midimg/*.png"))) == 4 * 6


@pytest.mark.parametrize("status", [401, 402])
def test_a_refusal_of_everything_ends_the_run_and_the_same_command_goes_on(
    status, pipe, prompts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run, whole = tmp_path / "run", tmp_path / "whole"
    with OpenAIServer([Fault("status", status=status, when=lambda call: call.number >= 5)]) as server:
        assert call(*reflect_argv(prompts, run, server.base_url)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(rf"HTTP {status}: .*; mend it and give the same command again$", line)
    with OpenAIServer() as server:
        assert call(*reflect_argv(prompts, run, server.base_url)) == 0
        assert call(*reflect_argv(prompts, whole, server.base_url)) == 0
    for file in whole.glob("*/records.jsonl"):
        assert (run / file.relative_to(whole)).read_text() == file.read_text()


def test_another_runs_folder_is_left_alone(pipe, prompts, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/x").write_text("kept")
    argv = reflect_argv(prompts, tmp_path / "run", "http://localhost:1")
    assert "contains files, but no search (config.yaml is missing)" in error_of(capsys, *argv)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["x"]


def test_a_model_that_cannot_be_loaded_leaves_the_folder_free(pipe, prompts, tmp_path, capsys):
    argv = ["noise", "--prompts", prompts, "--out", tmp_path / "run", "--verifier.name=none"]
    assert "broken: not a model" in error_of(capsys, *argv, "--model=broken")
    assert call(*argv, "--model=m", "--noise.search_rounds=1", "--sampling.height=16", "--sampling.width=16") == 0
    assert "8 images; the images are in" in capsys.readouterr().out
    assert pipe.loaded["lora"] is None


def test_a_missing_key_is_said_before_anything_is_loaded(pipe, prompts, tmp_path, capsys, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    argv = ["noise", "--model=m", "--prompts", prompts, "--out", tmp_path / "run"]
    assert "OPENAI_API_KEY" in error_of(capsys, *argv)
    assert pipe.loaded == {}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["debug", "flux_dev_gpt"])
def test_shipped_configs_are_valid_and_begin_with_their_command(name, prompts, tmp_path, pipe, monkeypatch):
    path = ROOT / f"configs/{name}.yaml"
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Time:", "Result:"):
        assert any(word in line for line in head)
    with OpenAIServer() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        argv = ["reflect", "--config", path, "--prompts", prompts, "--out", tmp_path / "run", "--end=1"]
        assert call(*argv, "--reflect.search_rounds=1") == 0
