"""Reading searches, and the tables and pages made of them."""

import base64
import io
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from rich.console import Console

from rflow_jax.commands.report import ReportConfig, report
from rflow_jax.errors import InputError
from rflow_jax.report import summary_table, write_report
from rflow_jax.report.curves import OVERALL, curve
from rflow_jax.report.runs import read_run, read_runs
from tests.kit.scenes import ENTRIES
from tests.kit.search_runs import Plan, write_run

HOSTILE = "</script><img src=x onerror='hacked=1'> & \"{{ 7 * 7 }}\" \u2028 \ud800"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_run(tmp_path / "run", ENTRIES[:2], Plan((2, 2), (2, 2)), running=3)


def rewrite(file: Path, **changes) -> None:
    """Changes every record of a file."""
    records = [json.loads(line) | changes for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_is_read_in_the_order_it_was_made(folder):
    run = read_run(folder)
    assert (len(run.prompts), run.running, run.images, run.most) == (2, 3, 16, 8)
    for prompt, entry in zip(run.prompts, ENTRIES, strict=False):
        assert (prompt.text, prompt.tag) == (entry["prompt"], entry["tag"])
        assert [one.round for one in prompt.pictures] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [one.parent for one in prompt.pictures[6:]] == [4, 5]
        assert all(one.size == (64, 64) for one in prompt.pictures)
        assert all(one.reflection for one in prompt.pictures[4:])


def test_missing_files_are_no_reason_to_stop(folder):
    (folder / "00000/metadata.jsonl").unlink()
    lost = read_run(folder).prompts[0].pictures[0].file
    (folder / "00000" / lost).unlink()
    (folder / "00001/records.jsonl").write_text("")
    run = read_run(folder)
    assert (len(run.prompts), run.running) == (1, 4)
    assert run.prompts[0].tag is None
    assert run.prompts[0].pictures[0].size is None


def test_bad_folders_are_one_line(tmp_path, folder):
    with pytest.raises(InputError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not the folder of a search \(no config.yaml\)"):
        read_run(folder / "00000")
    with pytest.raises(InputError, match="no folder"):
        read_runs([])
    for file in folder.glob("*/records.jsonl"):
        file.unlink()
    with pytest.raises(InputError, match=r"no prompt is finished yet \(5 begun\)"):
        read_run(folder)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not a JSON object ("),
        ("[]", "not a JSON object"),
        ("{}", "no file"),
        ({"round": "one"}, "round is 'one'"),
        ({"verdict": {"score": "high"}}, "score is 'high'"),
        ({"parent": 2}, "parent is 2, which is not an earlier record"),
        ({"file": "../../x.png"}, "is not a file in this folder"),
        ({"file": "/etc/x.png"}, "is not a file in this folder"),
    ],
)
def test_an_unreadable_record_is_named_by_file_and_line(folder, line, why):
    file = folder / "00001/records.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = line if isinstance(line, str) else json.dumps(json.loads(lines[2]) | line)
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=re.escape(why)) as error:
        read_run(folder)
    assert str(error.value).startswith(f"{file}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "a: ["), ("config.yaml", "- a"), ("usage.json", "{")])
def test_other_unreadable_files_are_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=name):
        read_run(folder)


class Parsed(HTMLParser):
    """The tags of a page, and the texts of its scripts by type."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: dict[str | None, str] = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.setdefault(self.tags[-1][1].get("type"), data)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts["application/json"])


def unpacked(prompt: dict) -> list:
    return json.loads(zlib.decompress(base64.b64decode(prompt["packed"])))


def test_texts_stay_texts(tmp_path):
    folder = write_run(tmp_path / "<b> & 'run' #1 100%", ENTRIES[:2], Plan((1, 2), (1, 2)))
    (folder / "00000/metadata.jsonl").write_text(json.dumps({"tag": HOSTILE, "prompt": HOSTILE}))
    verdict = {"score": 1.0, "explanation": HOSTILE, "error": HOSTILE}
    rewrite(folder / "00000/records.jsonl", prompt=HOSTILE, reflection=HOSTILE, refined_prompt=HOSTILE, verdict=verdict)
    html = write_report([folder]).read_text()
    page, plain = (Parsed(text) for text in (html, write_report([folder], tmp_path / "out").read_text()))
    assert "<img" not in html
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    [hostile, harmless] = page.data["prompts"]
    assert (hostile["text"], hostile["tag"]) == (HOSTILE, HOSTILE)
    [[first, *_]] = unpacked(hostile)
    assert (first["reflection"], first["explanation"], first["problems"]) == (HOSTILE, HOSTILE, [HOSTILE])
    assert harmless["text"] == ENTRIES[1]["prompt"]


@pytest.mark.parametrize("verified", [True, False])
def test_images_that_could_not_be_made_say_why(tmp_path, verified):
    folder = write_run(tmp_path / "run", ENTRIES[:2], Plan((1, 2), verified=verified))
    verdict = {"score": None, "error": "its latents became NaN"} if verified else None
    rewrite(folder / "00001/records.jsonl", error="its latents became NaN", verdict=verdict)
    html = write_report([folder]).read_text()
    assert "<dt>Not made</dt><dd>2</dd>" in html
    [looks] = unpacked(Parsed(html).data["prompts"][1])
    assert [one["problems"] for one in looks] == [["could not be made: its latents became NaN"]] * 2


def test_pictures_are_found_from_the_page(tmp_path):
    runs = [write_run(tmp_path / name, ENTRIES[:2], Plan((1, 2))) for name in ("a #1 50% ü?", "javascript:b")]
    for out in (None, tmp_path / "else/where"):
        page = write_report(runs, out)
        assert page == (out or runs[0]) / "index.html"
        data = Parsed(page.read_text()).data
        for prompt in data["prompts"]:
            for about, pictures in zip(data["runs"], unpacked(prompt), strict=True):
                for one in pictures:
                    assert not re.match(r"[\w+]+:|/", about["base"] + one["src"])
                    assert (page.parent / unquote(about["base"] + one["src"])).is_file()


def test_a_page_needs_nothing_from_elsewhere(folder):
    html = write_report([folder]).read_text()
    assert set(re.findall(r"https?://[\w./]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|@import|url\(|src=\"", html)


def test_runs_meet_by_prompt(tmp_path):
    twice = [ENTRIES[0], ENTRIES[1], ENTRIES[0]]
    runs = [write_run(tmp_path / "a", twice), write_run(tmp_path / "b", ENTRIES[1:3])]
    prompts = Parsed(write_report(runs).read_text()).data["prompts"]
    assert [prompt["text"] for prompt in prompts] == [
        entry["prompt"] for entry in (ENTRIES[0], ENTRIES[1], ENTRIES[0], ENTRIES[2])
    ]
    assert [[run is not None for run in prompt["runs"]] for prompt in prompts] == [
        [True, False], [True, True], [True, False], [False, True]
    ]  # fmt: skip


def test_the_head_says_what_there_is(tmp_path):
    plan = Plan((4, 2), unscored=0.5, usage={"seconds": 125, "cost": 1.5})
    folder = write_run(tmp_path / "run", ENTRIES, plan, running=541)
    run = read_run(folder)
    html = write_report([folder]).read_text()
    for words in (
        "541 of 553 prompts still running",
        "<dd>96</dd>",
        f"<dd>{run.unscored}</dd>",
        "2 min",
        "$1.50",
        "gpt-4o",
    ):
        assert words in html
    assert 20 < run.unscored < 76


def rendered(folders: list[Path]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table(read_runs(folders)))
    return console.export_text()


def test_the_table_has_a_line_for_each_tag_and_run(tmp_path):
    entries = [ENTRIES[0], ENTRIES[1] | {"tag": "[red]mine"}]
    folders = [write_run(tmp_path / "a", entries, Plan((4, 2))), write_run(tmp_path / "[b]", entries, Plan((1, 2)))]
    lines = [line.split() for line in rendered(folders).splitlines() if line.split()[1:2] or line.strip()]
    cells = {tuple(line[:2]): line[2:] for line in lines if line[0] in ("counting", "[red]mine", OVERALL)}
    assert {run for _, run in cells} == {"a", "[b]"}
    runs = read_runs(folders)
    for tag in ("counting", "[red]mine", OVERALL):
        for name, run in zip(("a", "[b]"), runs, strict=True):
            found = curve(run, tag, [1, 2, 4, 8])
            means = ["–" if v is None else f"{v:.2f}" for v in found.values]
            assert cells[tag, name] == [str(found.prompts), str(found.images), *means, "0"]


def test_the_command_writes_prints_and_repeats(folder, capsys):
    assert report(ReportConfig([str(folder)])) == 0
    printed = capsys.readouterr().out
    page = folder / "index.html"
    assert f"{page}: 2 prompts" in printed
    assert "overall" in printed
    first = page.read_bytes()
    assert report(ReportConfig([str(folder)])) == 0
    assert page.read_bytes() == first
    with pytest.raises(InputError, match="nowhere: no such folder"):
        report(ReportConfig([str(folder), "nowhere"]))
