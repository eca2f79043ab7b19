"""The report in a browser: Debian's ``chromium``, driven by Playwright.

With RFLOW_SCREENSHOTS=runs/first, README's first search, the pictures of the documentation are drawn again.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from rflow_jax.report import write_report
from tests.kit.scenes import ENTRIES
from tests.kit.search_runs import Plan, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

DESKTOP, PHONE = (1280, 900), (390, 844)
HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>"

# The contrast of every text with the page, as WCAG defines it.
CONTRASTS = """() => {
  const part = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => part(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("p, b, small, dt, dd, summary, svg text")].map((node) => {
    const style = getComputedStyle(node);
    const ink = light(node.closest("svg") ? style.fill : style.color);
    return Math.max(ink, paper) / Math.min(ink, paper);
  });
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page from its file; whatever the browser complains of, or fetches from elsewhere, fails the test."""
    wrong, contexts = [], []

    def opened(path: Path, size=DESKTOP, scheme="light", fragment=""):
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
        page.goto(path.as_uri() + fragment)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Corrections, of which some have no score, and noise alone."""
    folder = tmp_path_factory.mktemp("runs")
    reflect = write_run(folder / "reflect", ENTRIES, Plan((2, 2), (4, 2), unscored=0.1), running=2)
    return reflect, write_run(folder / "noise", ENTRIES, Plan((6, 2), unscored=0.1))


@pytest.fixture(scope="module")
def one(runs):
    return write_report(runs[:1])


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("two"))


def open_prompt(page, number: int):
    page.locator(f"#p{number} > summary").click()
    page.locator(f"#p{number} .step").first.wait_for()
    return page.locator(f"#p{number}")


def shown(page) -> list[str]:
    return page.locator(".prompt:visible .text").all_text_contents()


def broken(page) -> int:
    """Scrolls over all pictures and counts those that do not load."""
    return page.evaluate(
        """async () => {
          let broken = 0;
          for (const img of document.images) {
            img.scrollIntoView();
            await img.decode().catch(() => broken++);
          }
          return broken;
        }"""
    )


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("which", ["one", "two"])
def test_all_can_be_seen_and_nothing_sticks_out(visit, request, which, size):
    page = visit(request.getfixturevalue(which), size)
    page.locator(".numbers > summary").click()
    for number in range(3):
        open_prompt(page, number)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    pictures = page.locator("img").count()
    assert pictures > 3 * 12
    assert broken(page) == 0
    attributes = page.evaluate("[...document.images].map(i => [i.loading, i.hasAttribute('width'), i.alt !== null])")
    assert attributes == [["lazy", True, True]] * pictures
    assert page.locator(".wide").is_visible() == (size == DESKTOP)
    assert page.locator(".narrow").is_visible() == (size == PHONE)


def test_an_open_prompt_tells_how_its_image_came_about(visit, one, runs):
    page = visit(one)
    records = [json.loads(line) for line in (runs[0] / "00000/records.jsonl").read_text().splitlines()]
    best = max((r for r in records if r["verdict"]["score"] is not None), key=lambda r: r["verdict"]["score"])
    chain = [best]
    while chain[0]["parent"] is not None:
        chain.insert(0, records[chain[0]["parent"]])
    prompt = open_prompt(page, 0)
    steps = prompt.locator(".step")
    assert steps.count() == len(chain)
    for k, record in enumerate(chain):
        assert steps.nth(k).locator("a").get_attribute("href").endswith(record["file"].replace("@", "%40"))
        for text in (record["reflection"], record["refined_prompt"]):
            assert text is None or text in steps.nth(k).inner_text()
    assert prompt.locator(".thumb.chosen").first.inner_text() == f"★ {best['verdict']['score']:.2f}"
    assert prompt.locator(".tree path").count() == sum(r["parent"] is not None for r in records)
    assert prompt.locator(".tree path.on").count() == len(chain) - 1

    prompt.locator("summary").first.click()
    assert not steps.first.is_visible()


def test_a_failed_score_says_why(visit, one, runs):
    where = [
        (number, k)
        for number in range(len(ENTRIES))
        for k, line in enumerate((runs[0] / f"{number:05d}/records.jsonl").read_text().splitlines())
        if json.loads(line)["verdict"]["score"] is None
    ]
    assert len(where) > 3
    number, k = where[0]
    prompt = open_prompt(visit(one), number)
    prompt.locator(f".thumb[data-k='{k}']").first.click()
    assert "the model refused: I cannot help with that." in prompt.locator(".step.last").inner_text()
    assert prompt.locator(".thumb.unscored").count() >= 1


def test_a_link_opens_its_prompt(visit, one):
    page = visit(one, fragment="#p7")
    page.locator("#p7 .step").first.wait_for()
    assert page.locator("details.prompt[open]").count() == 1


def test_prompts_are_found_and_ordered(visit, one, two):
    page = visit(one)
    all_texts = [entry["prompt"] for entry in ENTRIES]
    assert shown(page) == all_texts
    page.locator("[name=words]").fill("HOUSE  photo")
    assert shown(page) == [text for text in all_texts if "house" in text]
    assert page.locator("#shown").inner_text() == "3 of 12 prompts"
    page.locator("[name=tag]").select_option(label="position (2)")
    assert shown(page) == ["a photo of a tree left of a house"]
    page.locator("[name=words]").fill("")
    assert len(shown(page)) == 2
    page.locator("[name=tag]").select_option(label="All tags")

    def values(label: str, picked: str) -> list[float]:
        page.locator("[name=order]").select_option(label=label)
        return [float(text) for text in page.locator(f".prompt {picked} small").all_text_contents() if text != "–"]

    best = values("Best score, high first", ".look.best")
    assert best == sorted(best, reverse=True)
    assert values("Best score, low first", ".look.best") == sorted(best)
    page.locator("[name=order]").select_option(label="Gain over the first image")
    gains = []
    for row in page.locator(".prompt").all():
        numbers = row.locator(".look small").all_text_contents()
        gains.append(float(numbers[-1]) - float(numbers[0]) if numbers[0] != "–" else -1)
    assert gains == pytest.approx(sorted(gains, reverse=True), abs=0.011)
    page.locator("[name=order]").select_option(label="Prompt order")
    assert shown(page) == all_texts
    page = visit(two)
    page.locator("[name=order]").select_option(label="Best score, high first (noise)")
    column = page.locator(".prompt .run-1 .look.best small").all_text_contents()
    assert column == sorted(column, reverse=True)


def test_keys_are_enough(visit, one):
    page = visit(one)
    page.keyboard.press("/")
    page.keyboard.type("kites")
    assert shown(page) == ["a photo of three kites"]
    for _ in range(4):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.prompt > summary')"):
            break
    page.keyboard.press("Enter")
    page.locator("#p0 .step").first.wait_for()
    page.locator("#p0 .column .thumb[tabindex='0']").first.focus()
    focused = "Number(document.activeElement.dataset.k)"
    before = page.evaluate(focused)
    page.keyboard.press("ArrowLeft")
    after = page.evaluate(focused)
    assert after == before - 2  # the same branch of the round before
    assert page.locator("#p0 [aria-pressed=true]").first.get_attribute("data-k") == str(after)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == before


def test_runs_stand_side_by_side_and_on_a_phone_one_above_the_other(visit, two):
    for size in (DESKTOP, PHONE):
        page = visit(two, size)
        first, second = (one.bounding_box() for one in open_prompt(page, 0).locator(".search").all())
        assert (first["x"] + first["width"] <= second["x"]) == (size == DESKTOP)
        assert (first["y"] == second["y"]) == (size == DESKTOP)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(visit, two, scheme):
    page = visit(two, scheme=scheme)
    open_prompt(page, 0)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    assert min(contrasts) >= 4.5


def test_nothing_that_a_model_writes_is_run(visit, tmp_path):
    folder = write_run(tmp_path / "<img src=x onerror=hacked=1> #1 %41", ENTRIES[:1], Plan((1, 2), (1, 2)))
    prompt = folder / "00000"
    name = "midimg/\"'><img src=x onerror='hacked=1'>#1?x=%41.png".replace("/script", "")
    records = [json.loads(line) for line in (prompt / "records.jsonl").read_text().splitlines()]
    (prompt / records[0]["file"]).rename(prompt / name)
    records[0]["file"] = name
    for record in records:
        record |= {"prompt": HOSTILE, "reflection": HOSTILE, "refined_prompt": HOSTILE, "text_errors": [HOSTILE]}
        record["verdict"] |= {"explanation": HOSTILE, "error": HOSTILE, "label": HOSTILE}
        record["stage"] = HOSTILE
    (prompt / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (prompt / "metadata.jsonl").write_text(json.dumps({"tag": HOSTILE, "prompt": HOSTILE}))
    other = write_run(tmp_path / "other", ENTRIES[:1])
    page = visit(write_report([folder, other]))
    opened = open_prompt(page, 0)
    assert broken(page) == 0
    assert page.evaluate("typeof hacked") == "undefined"
    assert opened.locator(".text").inner_text() == HOSTILE
    assert opened.inner_text().count(HOSTILE) >= 6
    assert page.locator("script").count() == 2


def test_missing_pictures_are_said_and_not_broken(visit, tmp_path):
    folder = write_run(tmp_path / "run", ENTRIES[:1], Plan((2, 2)))
    for file in (folder / "00000/midimg").iterdir():
        file.unlink()
    page = visit(write_report([folder]))
    opened = open_prompt(page, 0)
    assert page.locator("img").count() == 0
    assert opened.locator(".thumb .missing").count() == 4


@pytest.mark.parametrize(
    "plan", [Plan((1, 1)), Plan((2, 2), verified=False), Plan((2, 2), unscored=1.0), Plan((2, 2), (2, 2), decides=True)]
)
def test_unusual_searches_have_pages_too(visit, tmp_path, plan):
    entries = [ENTRIES[0], {"prompt": "a free prompt"}]
    page = visit(write_report([write_run(tmp_path / "run", entries, plan)]))
    for number in range(2):
        assert open_prompt(page, number).locator(".step").count() >= 1
    if plan.decides:
        assert page.locator("#p0 .look.best small").last.inner_text().split()[0] in ("yes", "no")


def test_a_whole_geneval_opens_quickly(visit, tmp_path):
    """553 prompts with 32 images each, and as much text as GPT-4o writes about them."""
    entries = [ENTRIES[k % len(ENTRIES)] for k in range(553)]
    path = write_report([write_run(tmp_path / "run", entries, Plan((1, 2), (15, 2), talk=120))])
    assert path.stat().st_size < 8e6
    began = time.perf_counter()
    page = visit(path)
    assert page.locator("#shown").inner_text() == "553 prompts"
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    loaded = time.perf_counter() - began
    began = time.perf_counter()
    open_prompt(page, 550)
    opened = time.perf_counter() - began
    print(f"{path.stat().st_size / 1e6:.1f} MB, shown after {loaded:.2f} s, a prompt opened in {opened:.2f} s")
    assert page.locator("img").count() < 553 * 6 + 120  # details are made on demand
    assert loaded < 10
    assert opened < 5


@pytest.mark.skipif("RFLOW_SCREENSHOTS" not in os.environ, reason="RFLOW_SCREENSHOTS names no search")
def test_screenshots(visit, tmp_path):
    """Of README's first search: ``RFLOW_SCREENSHOTS=runs/first``; the pictures go into docs/."""
    page_file = write_report([Path(os.environ["RFLOW_SCREENSHOTS"])], tmp_path)
    for name, size in {"desktop": (1280, 1700), "phone": (390, 2300)}.items():
        page = visit(page_file, size)
        open_prompt(page, 1)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=Path(__file__).parents[2] / "docs" / f"search_report_{name}.png")
