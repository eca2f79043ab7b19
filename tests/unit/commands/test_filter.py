"""``rflow filter``."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.commands.filter import FilterConfig, best_of_first, filter_nfe
from rflow_jax.errors import InputError
from rflow_jax.search.prompt_folder import read_records
from rflow_jax.search.run_folder import CONFIG
from rflow_jax.verifiers.base import Verdict
from tests.kit.searching import drive, models, prompt_run

verdicts = st.lists(
    st.builds(Verdict, st.sampled_from([None, 0.0, 5.0, 10.0]), st.sampled_from([None, "yes", "no"])), min_size=1
)


@given(verdicts, st.integers(1, 40))
def test_the_best_of_the_first_is_the_first_of_the_best(found, k):
    best = best_of_first(found, k)
    looked_at = found[:k]
    assert best < len(looked_at)
    assert all(verdict.rank < found[best].rank for verdict in looked_at[:best])
    assert all(verdict.rank <= found[best].rank for verdict in looked_at)


@pytest.fixture
def run(tmp_path):
    (tmp_path / CONFIG).write_text("strategy: reflect\n")
    drive(prompt_run(tmp_path), models(), random.Random(0))
    return tmp_path


def chosen(run, k):
    return (run / f"00005/nfe{k}/00000.png").read_bytes()


def content(run, records):
    best = max(records, key=lambda record: record["verdict"]["score"])
    return (run / "00005" / best["file"]).read_bytes()


def test_for_any_k_the_best_of_the_first_k_in_the_order_made(run, capsys):
    ks = [*range(1, 12), 32]
    assert filter_nfe(FilterConfig(str(run), ks)) == 0
    assert capsys.readouterr().out == f"{run}: nfe{', nfe'.join(map(str, ks))} of 1 prompts\n"
    records = read_records(run / "00005")
    for k in ks:
        assert chosen(run, k) == content(run, records[:k])
    before = {k: chosen(run, k) for k in ks}
    assert filter_nfe(FilterConfig(str(run), ks)) == 0
    assert before == {k: chosen(run, k) for k in ks}


def test_corrections_only_leaves_out_what_came_before_them(run):
    assert filter_nfe(FilterConfig(str(run), [1, 3, 32], corrections_only=True)) == 0
    records = read_records(run / "00005")[4:]
    for k in (1, 3, 32):
        assert chosen(run, k) == content(run, records[:k])


def test_a_prompt_that_was_done_before_its_first_correction_keeps_its_images(tmp_path):
    (tmp_path / CONFIG).write_text("")
    drive(prompt_run(tmp_path, kind="noise"), models("noise"), random.Random(0))
    assert filter_nfe(FilterConfig(str(tmp_path), [2], corrections_only=True)) == 0
    assert chosen(tmp_path, 2) == content(tmp_path, read_records(tmp_path / "00005")[:2])


def test_unscored_images_are_chosen_only_among_their_like(tmp_path):
    (tmp_path / CONFIG).write_text("")
    asked = models("noise")
    seen = []
    asked.verifier.fails = lambda png: seen.append(png) or len(seen) == 1
    drive(prompt_run(tmp_path, kind="noise"), asked, random.Random(0))
    records = read_records(tmp_path / "00005")
    (failed,) = [record for record in records if record["verdict"]["score"] is None]
    assert filter_nfe(FilterConfig(str(tmp_path), [1, 2, 3, 4])) == 0
    for k in range(1, 5):
        scored = [record for record in records[:k] if record is not failed]
        expected = content(tmp_path, scored) if scored else (tmp_path / "00005" / failed["file"]).read_bytes()
        assert chosen(tmp_path, k) == expected


def test_prompts_that_are_not_done_are_counted(run, capsys):
    (run / "00006").mkdir()
    (run / "notes").mkdir()
    assert filter_nfe(FilterConfig(str(run), [1])) == 0
    assert capsys.readouterr().out.endswith("nfe1 of 1 prompts; 1 prompts are not done yet\n")


def test_folders_that_cannot_be_filtered_are_said(tmp_path):
    with pytest.raises(InputError, match=r"not the folder of a search \(config\.yaml is missing\)"):
        filter_nfe(FilterConfig(str(tmp_path)))
    (tmp_path / CONFIG).write_text("")
    with pytest.raises(InputError, match="none of its 0 prompts is done yet"):
        filter_nfe(FilterConfig(str(tmp_path)))
    drive(prompt_run(tmp_path, kind="noise", verified=False), models("noise"), random.Random(0))
    with pytest.raises(InputError, match="00005: its images have no verdicts"):
        filter_nfe(FilterConfig(str(tmp_path)))


@pytest.mark.parametrize(("k", "message"), [([], "give numbers of images"), ([0], "from 1 to"), ([4, -1], "from 1 to")])
def test_numbers_that_are_none_are_said(k, message):
    with pytest.raises(InputError, match=f"^k is .*{message}"):
        FilterConfig("x", k)
