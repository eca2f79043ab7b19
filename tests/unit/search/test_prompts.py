"""Prompt files and slices of them."""

import pytest

from rflow_jax.errors import InputError
from rflow_jax.search.inputs import read_prompts, slice_prompts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', ":3: not a JSON object"),
        ('["a"]', ":3: not a JSON object such as"),
        (r'{"prompt": "\ud800"}', ":3: contains an unpaired surrogate"),
        ('{"tag": "counting"}', ":3: 'prompt' must be"),
        ('{"prompt": "  "}', ":3: 'prompt' must be"),
        ('{"prompt": "a", "tag": 3}', ":3: 'tag' must be"),
        ('{"prompt": "a", "include": "cat"}', ":3: 'include' must be"),
        ('{"prompt": "a", "exclude": ["cat"]}', ":3: 'exclude' must be"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "ok"}}\n\n{line}\n')
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert f"{path}{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="cannot read the prompt file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="prompt file is empty"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(tmp_path / "binary.jsonl")


def test_line_separators_inside_a_prompt_do_not_end_the_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028two"}\r\n{"prompt": "three"}', encoding="utf-8")
    assert [entry["prompt"] for entry in read_prompts(tmp_path / "p.jsonl")] == ["one\u2028two", "three"]


def test_slices_keep_the_index_of_the_file():
    entries = [{"prompt": str(number)} for number in range(5)]
    assert list(slice_prompts(entries, 0, None)) == list(slice_prompts(entries, 0, -1)) == [0, 1, 2, 3, 4]
    assert slice_prompts(entries, 3, 9) == {3: {"prompt": "3"}, 4: {"prompt": "4"}}
    with pytest.raises(InputError, match=r"^--start 5 leaves none of the 5 prompts"):
        slice_prompts(entries, 5, None)
    for start, end in [(5, -1), (3, 3), (-1, -1), (0, -2), (2, 1)]:
        with pytest.raises(InputError, match=f"--start {start} --end {end}"):
            slice_prompts(entries, start, end)


def test_the_shipped_prompts_cover_the_tags_of_geneval():
    tags = {entry["tag"] for entry in read_prompts("configs/prompts_debug.jsonl")}
    assert tags == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
