"""``rflow score`` with a verifier that answers at once."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import yaml

import tests.kit.searching as kit
from rflow_jax.commands.main import main
from rflow_jax.errors import InputError
from rflow_jax.scoring import judging
from rflow_jax.scoring.judging import scores_follow_from
from rflow_jax.scoring.results import ImageResult, Results
from rflow_jax.scoring.targets import Target
from rflow_jax.testing.openai_server import OpenAIServer, score_of
from rflow_jax.utils import cli
from rflow_jax.utils.images import png_bytes, read_image
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import VERIFIERS, RewardVerifierConfig
from tests.kit.asking import pictures
from tests.kit.searching import HashVerifier

HASH = "--verifier.name=tests.kit.searching:config_verifier"


@pytest.fixture
def asked(monkeypatch):
    """The verifiers that were made."""
    made = []
    make = kit.config_verifier

    def remembered(config, meter):
        made.append(make(config, meter))
        return made[-1]

    monkeypatch.setattr(kit, "config_verifier", remembered)
    return made


@pytest.fixture
def folder(tmp_path):
    """Three prompts as GenEval lays them out, two images each."""
    for number, image in enumerate(pictures(6)):
        prompt = tmp_path / f"run/{number // 2:05d}"
        (prompt / "samples").mkdir(parents=True, exist_ok=True)
        (prompt / "metadata.jsonl").write_text(json.dumps({"prompt": f"prompt {number // 2}", "tag": "colors"}) + "\n")
        image.save(prompt / f"samples/{number % 2:05d}.png")
    return tmp_path / "run"


def call(*argv):
    return cli.run(lambda: main(["score", *map(str, argv)]))


def lines(capsys):
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def score(path):
    with PIL.Image.open(path) as image:
        return score_of(png_bytes(image))


def stored(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_against_a_prompt_a_line_each(folder, asked, capsys):
    files = sorted(folder.glob("*/samples/*"))
    assert call(*files, "--prompt", "an owl", HASH) == 0
    said = capsys.readouterr()
    assert said.out == "".join(f"{score(file):.6g}\t-\t{file}\n" for file in files)
    mean = sum(map(score, files)) / 6
    assert said.err.startswith(f"6 of 6 images scored, mean {mean:.4g}, 6 questions, 42 tokens ($0.0600); ")
    assert asked[0].closed


def test_a_folder_of_images_against_a_prompt(folder, asked, capsys):
    assert call(folder / "00001/samples", "--prompt", "an owl", HASH) == 0
    assert [line[2] for line in lines(capsys)] == [str(folder / f"00001/samples/0000{k}.png") for k in range(2)]


def test_a_pattern_that_no_shell_has_expanded(folder, asked, capsys):
    assert call(f"{folder}/*/samples/00001.png", "--prompt", "an owl", HASH) == 0
    assert [line[2] for line in lines(capsys)] == sorted(map(str, folder.glob("*/samples/00001.png")))


def test_every_sample_of_a_folder_against_its_own_prompt(folder, asked, tmp_path, capsys):
    assert call(folder, HASH, "--out", tmp_path / "o.jsonl") == 0
    assert [(float(line[0]), line[2]) for line in lines(capsys)] == [
        (score(file), str(file)) for file in sorted(folder.glob("*/samples/*"))
    ]
    for number, line in enumerate(stored(tmp_path / "o.jsonl")):
        assert line["item"] == {"prompt": f"prompt {number // 2}", "tag": "colors"}
        assert line["verdict"]["explanation"] == f"as prompt {number // 2}"
        assert line["verdict"]["raw"] == {"of": "colors"}


def test_other_images_of_a_folder(folder, asked, capsys):
    (folder / "00001/samples").rename(folder / "00001/samples_best")
    assert call(folder, "--samples=samples_best", HASH) == 0
    assert len(lines(capsys)) == 2


def test_images_and_prompts_from_a_list(folder, asked, tmp_path, capsys):
    entries = [
        {"image": "run/00000/samples/00000.png", "prompt": "a", "tag": "x"},
        {"image": "run/00000/samples/00001.png"},
        {"image": "none.png", "prompt": "c"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert call("--prompts", tmp_path / "list.jsonl", HASH, "--out", tmp_path / "o.jsonl") == 1
    first, second, third = lines(capsys)
    assert first[:2] == [f"{score(folder / '00000/samples/00000.png'):.6g}", "-"]
    assert second == ["-", "-", str(folder / "00000/samples/00001.png"),
                      f"no prompt: {tmp_path}/list.jsonl:2 has none"]  # fmt: skip
    assert third == ["-", "-", str(tmp_path / "none.png"), "cannot read the file (No such file or directory)"]
    assert [line["verdict"]["raw"] for line in stored(tmp_path / "o.jsonl")] == [{"of": "x"}, None, None]


def test_what_cannot_be_scored_is_said_and_the_others_keep_their_scores(folder, asked, capsys):
    whole = {str(file): score(file) for file in folder.glob("*/samples/*")}
    cut, text = folder / "00000/samples/00001.png", folder / "00001/samples/00000.png"
    cut.write_bytes(cut.read_bytes()[:-300])
    text.write_text("no image")
    (folder / "00002/metadata.jsonl").unlink()
    assert call(folder, HASH) == 1
    said = capsys.readouterr()
    found = {line.split("\t")[2]: line.split("\t") for line in said.out.splitlines()}
    assert "cannot be decoded" in found.pop(str(cut))[3]
    assert found.pop(str(text))[3] == "cannot read this image (not a PNG, JPEG, WebP, GIF, TIFF or BMP file)"
    for number in range(2):
        why = found.pop(str(folder / f"00002/samples/0000{number}.png"))[3]
        assert why == f"no prompt: {folder}/00002/metadata.jsonl: cannot read the prompt (No such file or directory)"
    assert {path: float(line[0]) for path, line in found.items()} == {path: whole[path] for path in found}
    assert len(found) == 2
    assert said.err.startswith("2 of 6 images scored, mean ")
    assert "4 could not be scored" in said.err


def test_a_score_that_is_no_number_is_an_error_of_its_own(folder, asked, tmp_path, monkeypatch, capsys):
    right = HashVerifier.score

    def broken(self, images, items):
        return [Verdict(float("nan"), raw=[float("nan")]) if items[0]["prompt"] == "prompt 1" else v
                for v in right(self, images, items)]  # fmt: skip

    monkeypatch.setattr(HashVerifier, "score", broken)
    assert call(folder, HASH, "--out", tmp_path / "o.jsonl") == 1
    assert [line[3:] for line in lines(capsys)] == [[], [], ["the score is nan"], ["the score is nan"], [], []]
    assert "NaN" not in (tmp_path / "o.jsonl").read_text()


def test_what_is_scored_is_not_asked_again(folder, asked, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    assert call(folder, HASH, "--out", out) == 0
    before, said = out.read_bytes(), capsys.readouterr().out
    assert call(folder, HASH, "--out", out, "--verifier.concurrency=3") == 0
    assert capsys.readouterr().out == said
    assert out.read_bytes() == before
    assert len(asked) == 1
    # Other bytes, another prompt, another verifier: asked. The same bytes in another place: not.
    PIL.Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "00000/samples/00000.png")
    (folder / "00001/metadata.jsonl").write_text('{"prompt": "other"}\n')
    (folder / "00003/samples").mkdir(parents=True)
    (folder / "00003/metadata.jsonl").write_text((folder / "00002/metadata.jsonl").read_text())
    (folder / "00003/samples/00000.png").write_bytes((folder / "00002/samples/00000.png").read_bytes())
    assert call(folder, HASH, "--out", out) == 0
    assert sum(asked[1].seen.values()) == 3
    assert call(folder, HASH, "--out", out, "--verifier.temperature=0.5") == 0
    assert sum(asked[2].seen.values()) == 7
    assert call(folder, HASH, "--out", out, "--again") == 0
    assert sum(asked[3].seen.values()) == 7
    kept = stored(out)
    assert len({line["settings"] for line in kept}) == 2
    assert len(kept) == 2 * 7 + 2  # what stood there of the prompt that is another now is kept


@pytest.mark.parametrize(
    ("verifier", "settings"),
    [
        ({"name": "openai", "model": "gpt-4o", "temperature": 0.0, "concurrency": 3}, "56d89deaae04c8e7"),
        ({"name": "yesno", "model": "m", "template": "raw"}, "80911edd7ceb6a0c"),
        ({"name": "reward", "model": "m", "step": 3}, "0e1726f123a78184"),
    ],
    ids=["openai", "yesno", "reward"],
)
def test_scores_of_earlier_versions_are_known(verifier, settings):
    """What they stored as ``settings``: an answer that was paid for is not asked for again."""
    assert Results(None, scores_follow_from(VERIFIERS.parse(verifier)))._settings == settings


def test_another_model_in_the_environment_is_another_verifier(folder, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    with OpenAIServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        for model, asked in (("one", 6), ("one", 6), ("two", 12)):
            monkeypatch.setenv("OPENAI_MODEL", model)
            assert call(folder, "--out", out, "--no-probe") == 0
            assert len(server.calls) == asked


def test_what_failed_is_asked_again_and_its_line_replaced(folder, asked, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    right = HashVerifier.score
    monkeypatch.setattr(
        HashVerifier,
        "score",
        lambda self, images, items: (
            [Verdict(None, error="gone")] if items[0]["prompt"] == "prompt 0" else right(self, images, items)
        ),
    )
    assert call(folder, HASH, "--out", out) == 1
    monkeypatch.setattr(HashVerifier, "score", right)
    assert call(folder, HASH, "--out", out) == 0
    assert sum(asked[1].seen.values()) == 2
    assert [line["verdict"]["score"] for line in stored(out)] == [
        score(file) for file in sorted(folder.glob("*/samples/*"))
    ]


def test_a_killed_run_has_lost_no_line(folder, asked, tmp_path, monkeypatch, capsys):
    """A bug in the verifier stands for the kill; the line that was being written is cut."""
    out = tmp_path / "o.jsonl"
    right, count = HashVerifier.score, iter(range(99))

    def dies(self, images, items):
        if next(count) == 3:
            raise RuntimeError("killed")
        return right(self, images, items)

    monkeypatch.setattr(HashVerifier, "score", dies)
    with pytest.raises(RuntimeError, match="killed"):
        call(folder, HASH, "--out", out, "--verifier.concurrency=1")
    assert len(stored(out)) == 3
    out.write_text(out.read_text() + '{"image": "half')
    assert call(folder, HASH, "--out", out) == 0
    assert sum(asked[1].seen.values()) == 3
    assert [line["image"] for line in stored(out)] == sorted(map(str, folder.glob("*/samples/*")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no images: give files with --prompt"),
        (["none.png", "--prompt=x"], "none.png: no such file or folder"),
        (["*/none*.png", "--prompt=x"], "*/none*.png: no such file or folder"),
        (["{run}/00000", "--prompt=x"], "00000: no image there"),
        (["{run}/00000/samples/00000.png"], "no prompt to score it against"),
        (["{run}/00000/samples"], "for a folder of images give --prompt"),
        (["{run}", "--samples=none"], "run: no image there"),
        (["{run}", "--prompts=list"], "prompts names images and their prompts"),
        (["--prompts=none.jsonl"], "none.jsonl: cannot read the list of images"),
        (["{run}", "--prompt= "], "prompt is empty"),
        (["{run}", "--verifier.name=none"], "verifier.name is none"),
        (["{run}", "--verifier.nam=x"], "did you mean verifier.name?"),
        (["{run}", "--out={run}/00000/metadata.jsonl"], "metadata.jsonl:1: not a line of rflow score"),
    ],
)
def test_bad_input_is_one_line(folder, asked, capsys, argv, message):
    flags = [] if any("verifier.name" in word for word in argv) else [HASH]
    assert call(*[word.format(run=folder) for word in argv], *flags) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out
    assert not any(verifier.seen for verifier in asked)


def test_lines_of_a_list_that_are_none_are_said(tmp_path, asked, capsys):
    for content, message in (
        ("", "the list of images is empty"),
        ("{half", ":1: not a JSON object"),
        ('{"prompt": "x"}', ":1: exp"),
    ):
        (tmp_path / "l").write_text(content)
        assert call("--prompts", tmp_path / "l", HASH) == 2
        assert message in capsys.readouterr().err


def test_another_process_that_writes_into_the_file_is_noticed(folder, asked, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    code = (
        f"import fcntl; f = open({str(out)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert call(folder, HASH, "--out", out) == 2
    assert "another process is writing into it" in capsys.readouterr().err
    holder.communicate("\n")
    assert call(folder, HASH, "--out", out) == 0


def test_the_configuration_of_a_search_gives_its_verifier(folder, asked, tmp_path, capsys):
    content = {"model": "m", "out": str(tmp_path), "prompts": "p", "verifier": {"name": HASH.partition("=")[2]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    assert call(folder, "--config", tmp_path / "c.yaml") == 0
    assert call(folder, f"--config={tmp_path / 'c.yaml'}", "--verifier.concurrency=2") == 0
    assert [verifier.concurrency for verifier in asked] == [8, 2]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**content, "verifier": {"nam": "x"}}))
    capsys.readouterr()
    assert call(folder, "--config", tmp_path / "c.yaml") == 2
    assert "did you mean verifier.name?" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"verifier": content["verifier"], "imagess": ["x"]}))
    assert call("--config", tmp_path / "c.yaml") == 2
    assert "did you mean images?" in capsys.readouterr().err


def test_batches_are_filled_across_folders(folder):
    verifier = HashVerifier(concurrency=1, batch_size=4)
    sizes = []
    right = verifier.score
    verifier.score = lambda images, items: sizes.append(len(images)) or right(images, items)
    targets = {k: Target(file, {"prompt": "x"}) for k, file in enumerate(sorted(folder.glob("*/samples/*")))}
    found = dict(judging.judge(verifier, targets))
    assert sorted(sizes) == [2, 4]  # which of them is read first is not said
    assert {k: found[k].verdict.score for k in found} == {k: score(target.path) for k, target in targets.items()}


def test_as_many_calls_at_once_as_the_verifier_takes_and_no_more(folder):
    everyone = threading.Barrier(3, timeout=20)
    verifier = HashVerifier(concurrency=3, wait=lambda: everyone.wait() and time.sleep(0.01))
    targets = {k: Target(file, {"prompt": "x"}) for k, file in enumerate(sorted(folder.glob("*/samples/*")))}
    assert len(dict(judging.judge(verifier, targets))) == 6
    assert verifier.most_at_once == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score-")]


def test_an_interrupted_judge_asks_no_more_and_leaves_no_thread(folder):
    verifier = HashVerifier(concurrency=1, batch_size=1)
    targets = {k: Target(file, {"prompt": "x"}) for k, file in enumerate(sorted(folder.glob("*/samples/*")))}
    verifier.wait = lambda: time.sleep(0.2)
    judged = judging.judge(verifier, targets)
    next(judged)
    judged.close()
    assert verifier.seen.total() <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score-")]


def test_a_second_writer_is_refused_as_long_as_the_first_writes(tmp_path):
    out, found = tmp_path / "o.jsonl", ImageResult(Target(tmp_path / "a.png", {"prompt": "x"}), "0", Verdict(1.0))
    with Results(out, {}) as first:
        first.add(found)
        for _ in range(2):
            with pytest.raises(InputError, match="another process is writing into it"):
                Results(out, {})
        first.add(found)
    with Results(out, {}) as second:
        assert second.known(found.target, "0") == found


@pytest.mark.parametrize(
    "content",
    [
        b"a note",
        b"{",
        b'{"image": "a.png", "prompt": "a cat"}',
        b'{"image": "a.png", "prompt": "a cat"}\n{"image": "b.png", "prompt": "a d',
        b"\xff\xfe",
        b"[1]\n",
        b'{"image": "a", "settings": "b", "item": {}, "sha256": "c", "verdict": {"score": "high"}}\n',
        b'{"image": "a", "settings": "b", "item": {}, "sha256": "c", "verdict": [1]}\n',
    ],
)
def test_a_file_of_another_kind_stays_as_it_is(folder, asked, tmp_path, capsys, content):
    out = tmp_path / "o"
    out.write_bytes(content)
    if content == b"{":  # can be the first byte of a line
        assert call(folder, HASH, "--out", out) == 0
        return
    assert call(folder, HASH, "--out", out) == 2
    assert "not a line of rflow score" in capsys.readouterr().err
    assert out.read_bytes() == content


def test_a_first_line_cut_anywhere_is_one_of_ours(tmp_path):
    out = tmp_path / "o"
    with Results(out, {}) as results:
        results.add(ImageResult(Target(tmp_path / 'ü"\\.png', {"prompt": "x"}), "0", Verdict(1.0)))
    line = out.read_bytes()
    for end in range(len(line)):
        out.write_bytes(line[:end])
        with Results(out, {}):
            assert out.read_bytes() == b""


def test_an_out_that_is_no_file_of_its_own_is_refused(folder, asked, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for out in ("/dev/null", tmp_path / "pipe", tmp_path):
        assert call(folder, HASH, "--out", out) == 2
        assert "is not a regular file" in capsys.readouterr().err
    (tmp_path / "list").write_text('{"image": "a.png", "prompt": "x"}')
    (tmp_path / "link").symlink_to("list")
    assert call("--prompts", tmp_path / "list", "--out", tmp_path / "link", HASH) == 2
    assert "out is the list of prompts" in capsys.readouterr().err


def test_a_link_as_out_stays_one(folder, asked, tmp_path):
    (tmp_path / "link").symlink_to("real")
    assert call(folder, HASH, "--out", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert len(stored(tmp_path / "real")) == 6


def test_numbers_of_numpy_are_written_down(folder, asked, tmp_path, monkeypatch, capsys):
    def gives(score, raw):
        verdict = Verdict(None, raw=raw)
        object.__setattr__(verdict, "score", score)  # a class of one's own is not checked as ours are in tests
        monkeypatch.setattr(HashVerifier, "score", lambda self, images, items: [verdict for _ in items])

    gives(np.float32(0.5), {"all": np.ones(2), "n": np.int64(3)})
    assert call(folder, HASH, "--out", tmp_path / "o") == 0
    assert {line["verdict"]["score"] for line in stored(tmp_path / "o")} == {0.5}
    assert [line["verdict"]["raw"] for line in stored(tmp_path / "o")] == [{"all": [1.0, 1.0], "n": 3}] * 6
    gives("high", None)
    assert call(folder, HASH, "--out", tmp_path / "o", "--again") == 1
    assert "the score is 'high'" in capsys.readouterr().out


def test_what_pillow_raises_of_its_own_is_an_error_of_that_image(folder, asked, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("bad header")

    monkeypatch.setattr(PIL.Image, "open", broken)
    assert call(folder, HASH) == 1
    assert {line[3] for line in lines(capsys)} == {"cannot read this image (bad header)"}
    with pytest.raises(InputError, match=r"00000.png: cannot read this image \(bad header\)"):
        read_image(folder / "00000/samples/00000.png")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a", "prompt": ' + "[" * 100_000, "not a JSON object"),
        ('{"image": "a", "prompt": "x", "n": ' + "1" * 5000 + "}", "not a JSON object"),
        (r'{"image": "a", "prompt": "\ud800"}', "contains an unpaired surrogate"),
        (r'{"image": "a\udcff", "prompt": "x"}', "contains an unpaired surrogate"),
        (r'{"image": "a\u0000", "prompt": "x"}', "image contains a NUL"),
    ],
)
def test_what_no_file_can_hold_is_said_with_its_line(folder, tmp_path, asked, capsys, line, message):
    (tmp_path / "l").write_text('{"image": "a", "prompt": "x"}\n' + line)
    assert call("--prompts", tmp_path / "l", HASH) == 2
    said = capsys.readouterr().err
    assert f"l:2: {message}" in said
    assert said.count("\n") == 1
    if "image contains" not in message and "udcff" not in line:
        (folder / "00000/metadata.jsonl").write_text(line)
        assert call(folder, HASH) == 1
        assert "no prompt: " in capsys.readouterr().out


def test_a_prompt_that_is_no_text(folder, asked, capsys):
    assert call(folder / "00000/samples", "--prompt=\udcff", HASH) == 2
    assert "prompt: contains an unpaired surrogate" in capsys.readouterr().err


def test_a_path_that_the_terminal_cannot_show_is_no_crash(folder, asked, monkeypatch):
    (folder / "00000/samples/00000.png").rename(folder / "00000/samples/ü.png")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert call(folder, HASH) == 0
    assert b"\\xfc.png" in ascii_only.buffer.getvalue()


def test_a_verifier_in_this_process_gets_several_batches_a_call(folder):
    sizes = []

    class Local(HashVerifier):
        batches_a_call = 4

        def score(self, images, items):
            sizes.append(len(images))
            return [Verdict(1.0) for _ in images]

    targets = {k: Target(file, {"prompt": "x"}) for k, file in enumerate(sorted(folder.glob("*/samples/*")))}
    assert len(dict(judging.judge(Local(concurrency=1, batch_size=1), targets))) == 6
    assert sorted(sizes) == [2, 4]


def test_scores_follow_from_the_checkpoint_that_is_the_latest(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    latest = RewardVerifierConfig(str(tmp_path))
    members = [{"name": "reward", "model": str(tmp_path)}, {"name": "clip"}]
    ensemble = VERIFIERS.parse({"name": "ensemble", "members": members})
    before = [scores_follow_from(one) for one in (latest, ensemble)]
    assert before[0] == scores_follow_from(replace(latest, step=10))
    (tmp_path / "checkpoint-20").mkdir()
    now = [scores_follow_from(one) for one in (latest, ensemble)]
    assert before[0] == scores_follow_from(replace(latest, step=10))
    assert now[0]["step"] == 20
    assert [member.get("step") for member in now[1]["members"]] == [20, None]
    assert before[1]["members"][0]["step"] == 10


def test_a_line_names_its_verifier_and_older_ones_are_read(folder, asked, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    assert call(folder, HASH, "--out", out) == 0
    said = capsys.readouterr().out
    assert {line["verifier"] for line in stored(out)} == {"hash"}
    older = [{key: value for key, value in line.items() if key != "verifier"} for line in stored(out)]
    out.write_text("".join(json.dumps(line) + "\n" for line in older))
    assert call(folder, HASH, "--out", out) == 0
    assert capsys.readouterr().out == said
    assert len(asked) == 1


def test_a_failed_start_leaves_no_file(folder, tmp_path, capsys):
    out = tmp_path / "new/o.jsonl"
    assert call(folder, "--verifier.name=tests.kit.searching:no_such", "--out", out) == 2
    assert not out.parent.exists()
    assert call(folder, HASH, "--out", folder / "00000/metadata.jsonl/o.jsonl") == 2
    assert "is not a writable folder" in capsys.readouterr().err


def test_the_share_of_yes_is_among_those_that_say_yes_or_no(folder, asked, monkeypatch, capsys):
    labels = iter(["good", "yes", "no", "good", "yes", "yes"])
    verdicts = [Verdict(1.0, label) for label in labels]
    monkeypatch.setattr(HashVerifier, "score", lambda self, images, items: [verdicts.pop() for _ in images])
    assert call(folder, HASH) == 0
    assert ", 75% yes" in capsys.readouterr().err
    verdicts = [Verdict(1.0, "good")] * 6
    assert call(folder, HASH) == 0
    assert "yes" not in capsys.readouterr().err


def test_no_more_large_images_are_held_than_fill_a_batch(folder, monkeypatch):
    verifier, sizes = HashVerifier(concurrency=1, batch_size=2), []
    verifier.batches_a_call = 3
    verifier.score = lambda images, items: (
        sizes.append(len(images)) or list(map(verifier._verdict, map(png_bytes, images), items))
    )
    targets = {k: Target(file, {"prompt": "x"}) for k, file in enumerate(sorted(folder.glob("*/samples/*")))}
    small = dict(judging.judge(verifier, targets))
    monkeypatch.setattr(judging, "PIXELS_AT_ONCE", 1)
    large = dict(judging.judge(verifier, targets))
    assert sizes == [6, 2, 2, 2]
    assert large == small


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda images: None, "verifier hash: score returned NoneType; expected a list of Verdict, one for each of 1"),
        (lambda images: [], "verifier hash: score returned 0 results"),
        (lambda images: [0.5], "verifier hash: score returned a list with float"),
    ],
)
def test_what_is_no_verdict_is_said_with_the_verifier_that_gave_it(folder, asked, monkeypatch, capsys, gives, said):
    monkeypatch.setattr(HashVerifier, "score", lambda self, images, items: gives(images))
    assert call(folder, HASH) == 1
    assert f"error: {said}" in capsys.readouterr().err


def test_a_verifier_that_changes_what_it_is_given_changes_no_record(folder, asked, tmp_path, monkeypatch):
    right = HashVerifier.score
    monkeypatch.setattr(
        HashVerifier,
        "score",
        lambda self, images, items: [items[0].pop("tag"), right(self, images, items)][1],
    )
    assert call(folder, HASH, "--out", tmp_path / "o.jsonl") == 0
    assert {line["item"]["tag"] for line in stored(tmp_path / "o.jsonl")} == {"colors"}


def test_an_input_error_of_one_image_leaves_the_others_their_scores(folder, asked, monkeypatch, capsys):
    right = HashVerifier.score

    def refuses(self, images, items):
        if any(item["prompt"] == "prompt 1" for item in items):
            raise InputError("not this one")
        return right(self, images, items)

    monkeypatch.setattr(kit, "config_verifier", lambda config, meter: HashVerifier(concurrency=1, batch_size=4))
    monkeypatch.setattr(HashVerifier, "score", refuses)
    assert call(folder, HASH) == 1
    assert [line[3:] for line in lines(capsys)] == [[], [], ["not this one"], ["not this one"], [], []]
