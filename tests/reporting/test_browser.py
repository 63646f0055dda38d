"""The report in headless Chromium: used by mouse and keyboard, printed, on a phone, with a thousand images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browsing import PATIENCE, browser, complaints, screen
from made_up_runs import MadeUpRun
from PIL import Image
from test_page import HOSTILE

from histoseg_fast.reporting.page import write_report

IMAGES = 12
MOST_DECODED = 160
"""Images in the document at once (two a card) on a screen of 1280 x 900: those on it, and some above and below."""

CONTRASTS = """
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const style = getComputedStyle(document.documentElement);
    const light = (name) => {
        canvas.fillStyle = style.getPropertyValue(name);
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const pairs = ["ink paper", "ink card", "soft paper", "soft card", "accent paper", "accent card",
        "accent-ink accent", "bad paper", "bad card", "ink bad-paper"].map((pair) => pair.split(" "));
    return pairs.map(([a, b]) => [a, b, light(`--${a}`), light(`--${b}`)]).map(([a, b, x, y]) =>
        [a, b, (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05)]);"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen images, one shown by its mask alone, one failed."""
    run = MadeUpRun(tmp_path_factory.mktemp("run"))
    for i in range(IMAGES):
        run.done(f"image_{i}.png", seed=7 * i % IMAGES, stem=f"image_{i}", height=30 + 40 * (i % 3), width=60)
    (run.images / "image_4.png").unlink()
    run.failed("torn.png", "torn.png: is no image")
    run.end()
    return write_report(run.out).path


@pytest.fixture
def page(chromium, report: Path) -> Iterator:
    """The report just opened on a desktop's screen; nothing may have complained when the test is over."""
    opened(chromium, report)
    yield chromium
    assert complaints(chromium) == []


def opened(driver, path: Path) -> None:
    screen(driver, 1280, 900)
    driver.get(path.as_uri())
    complaints(driver)
    driver.refresh()


def css(driver, selector: str) -> list:
    return driver.find_elements("css selector", selector)


def one(driver, selector: str):
    (found,) = css(driver, selector)
    return found


def choose(driver, name: str, value: str) -> None:
    """Pick a radio button by its label, as a mouse does."""
    one(driver, f"input[name={name}][value={value}]").click()


def column(driver, place: int) -> list[str]:
    """The first lines of a table column."""
    return [cell.text.partition("\n")[0] for cell in css(driver, f"#table tbody tr > :nth-child({place})")]


def decoded(driver) -> int:
    """Waits for two frames, then counts the images in the document; all must be decodable."""
    return driver.execute_async_script("""
        const done = arguments[0];
        requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(async () => {
            const images = [...document.images];
            const all = await Promise.allSettled(images.map((image) => image.decode()));
            done(all.some((a) => a.status === "rejected") ? -1 : images.length);
        }, 100)));""")


def opacity(driver, selector: str) -> float:
    return float(
        driver.execute_script("return getComputedStyle(document.querySelector(arguments[0])).opacity", selector)
    )


def test_opens(page, report: Path) -> None:
    assert page.title == "out – histoseg-fast report"
    assert len(css(page, ".card")) == IMAGES + 1 and len(css(page, ".histogram")) == 5
    assert one(page, "#shown").text == "13 of 13 shown"
    assert "torn.png: is no image" in one(page, "#failures").text
    page.execute_script("document.querySelector('.card').scrollIntoView()")
    assert decoded(page) > 2


def test_sorts_by_every_column(page) -> None:
    choose(page, "as", "table")
    heads = css(page, "#table thead button")
    for place, head in enumerate(heads[1:-1], start=2):
        head.click()
        high = [float(value) for value in column(page, place)[:IMAGES]]
        assert high == sorted(high, reverse=True), head.text
        assert one(page, "#table [aria-sort=descending]").text == head.text.rstrip(" ▼▲")
        head.click()
        assert [float(v) for v in column(page, place)[:IMAGES]] == sorted(high)
        assert column(page, 1)[-1] == "torn.png"  # without a value, so last both ways
    heads[0].click()
    assert column(page, 1) == [*(f"image_{i}.png" for i in range(IMAGES)), "torn.png"]
    heads[0].click()
    assert column(page, 1)[:3] == ["torn.png", "image_11.png", "image_10.png"]
    choose(page, "as", "gallery")
    assert css(page, ".card .name")[1].text == "image_11.png"


def test_filters(page) -> None:
    def names() -> list[str]:
        return [name.text for name in css(page, ".card .name")]

    one(page, "#search").send_keys("IMAGE_1")
    assert names() == ["image_1.png", "image_10.png", "image_11.png"]
    assert one(page, "#shown").text == "3 of 3 shown, filtered from 13"
    one(page, "#clear").click()
    status = one(page, "#status")
    images = [f"image_{i}.png" for i in range(IMAGES)]
    for value, expected in (
        ("failed", ["torn.png"]),
        ("notes", ["image_4.png"]),
        ("done", images),
        ("all", [*images, "torn.png"]),
    ):
        one(status, f"option[value={value}]").click()
        assert names() == expected
    one(page, "#sort option[value=size]").click()
    assert names()[0] == "image_0.png" and names()[IMAGES - 1] == "image_11.png"
    one(page, "#direction").click()
    assert names()[0] == "image_2.png" and one(page, "#direction").get_attribute("aria-pressed") == "true"
    one(page, "#column option[value=confidence]").click()
    one(page, "#low").send_keys("52")
    one(page, "#high").send_keys("54")
    assert sorted(names()) == ["image_2.png", "image_9.png"]  # their seeds, 7 i mod 12, are 2 and 3
    one(page, "#clear").click()
    assert len(names()) == IMAGES + 1


def test_a_bar_of_a_histogram_shows_its_images(page) -> None:
    bar = css(page, ".bar[data-column=confidence]")[0]
    count = int(bar.find_element("tag name", "title").get_attribute("textContent").rpartition(" ")[2])
    page.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", bar)
    assert len(css(page, ".card")) == count and "chosen" in bar.get_attribute("class")
    assert one(page, "#low").get_attribute("value") == "50"


def test_the_slider_blends(page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.querySelector('.card').scrollIntoView()")
    decoded(page)
    assert opacity(page, ".card .blend") == 0.4
    slider = one(page, "#tools .tint")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert opacity(page, ".card .blend") == 0.5 and one(page, "#tools output").text == "50 %"
    choose(page, "view", "image")
    assert opacity(page, ".card .blend") == 0
    choose(page, "view", "mask")
    assert opacity(page, ".card .blend") == 1
    slider.send_keys(Keys.HOME)
    assert opacity(page, ".card .blend") == 0 and page.execute_script(
        "return document.documentElement.className"
    ).count("view-overlay")


def test_blended_pixels_are_the_plans_colours(page) -> None:
    """In the mask view the screen shows nothing but the plan's colours."""
    choose(page, "view", "mask")
    page.execute_script("document.querySelector('.card').click()")
    box = page.execute_script("return document.querySelector('#viewer .stack').getBoundingClientRect().toJSON()")
    decoded(page)
    shot = np.asarray(Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB"))
    x, y, width, height = (round(box[side]) for side in ("x", "y", "width", "height"))
    inner = shot[y + 2 : y + height - 2, x + 2 : x + width - 2].reshape(-1, 3)
    pure = (inner == (0, 0, 0)).all(1) | (inner == (255, 0, 0)).all(1) | (inner == (0, 255, 0)).all(1)
    assert len(inner) > 10_000 and pure.mean() > 0.99
    assert len(np.unique(inner[pure], axis=0)) == 3


def test_an_image_that_vanished_is_its_mask_alone(page) -> None:
    one(page, "#search").send_keys("image_4")
    choose(page, "view", "image")
    decoded(page)
    assert len(css(page, ".card img")) == 1 and opacity(page, ".card .blend") == 1
    assert one(page, ".card .note").text == "the image is no longer where it was read"


def test_by_keyboard_alone(page) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def press(*keys: str) -> None:
        page.switch_to.active_element.send_keys(*keys)

    def focused() -> str:
        element = page.switch_to.active_element
        names = element.find_elements("css selector", ".name")
        return (names[0] if names else element).text

    press(Keys.TAB)
    assert focused() == "Skip to the images"
    press(Keys.ENTER)
    for _ in range(40):
        press(Keys.TAB)
        if "card" in (page.switch_to.active_element.get_attribute("class") or ""):
            break
    assert focused() == "image_0.png"
    press(Keys.ARROW_RIGHT)
    assert focused() == "image_1.png"
    press(Keys.ARROW_DOWN)
    assert focused() not in ("image_0.png", "image_1.png")
    press(Keys.END)
    assert focused() == "torn.png"
    press(Keys.HOME, Keys.ENTER)
    title = one(page, "#viewer-title")
    assert title.text == "image_0.png" and page.execute_script("return document.querySelector('dialog').open")
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, "3")
    assert title.text == "image_2.png" and opacity(page, "#viewer .blend") == 1
    press("1")
    assert opacity(page, "#viewer .blend") == 0
    press("2")
    assert 0 < opacity(page, "#viewer .blend") < 1
    press(Keys.ESCAPE)
    assert not page.execute_script("return document.querySelector('dialog').open")
    WebDriverWait(page, PATIENCE).until(lambda _: focused() == "image_2.png")  # back where the eye was


def test_every_control_has_a_name(page) -> None:
    for part in ("#tools", "#gallery", "#viewer"):
        if part == "#viewer":
            page.execute_script("document.querySelector('.card').click()")
        for control in css(page, f"{part} button, {part} input, {part} select"):
            shown = control.is_displayed() or control.get_attribute("type") == "radio"
            assert not shown or control.accessible_name, control.get_attribute("outerHTML")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("as_", ["gallery", "table"])
def test_a_phone_never_scrolls_sideways(page, as_: str, dark: bool) -> None:
    screen(page, 360, 740, dark=dark)
    page.execute_script("document.querySelector(`input[name=as][value=${arguments[0]}]`).click()", as_)
    assert page.execute_script("return document.documentElement.scrollWidth") == 360
    page.execute_script("document.querySelector('.card, tbody button').click()")
    assert page.execute_script(
        "const d = document.querySelector('dialog'); return [d.open, d.scrollWidth <= d.clientWidth]"
    ) == [True, True]


def test_text_stands_out_from_its_ground(page) -> None:
    """WCAG AA: contrast of at least 4.5 for text, in light and dark."""
    for dark in (False, True):
        screen(page, 1280, 900, dark=dark)
        assert [pair for pair in page.execute_script(CONTRASTS) if pair[2] < 4.5] == []


def test_prints_gallery_and_table_without_the_tools(page) -> None:
    done = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(done["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    assert len(css(page, ".card")) == IMAGES + 1  # afterwards the page is as it was
    screen(page, 800, 1100, media="print")
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert len(css(page, "#table tbody tr")) == IMAGES + 1 and decoded(page) == 2 * IMAGES - 1
    assert one(page, "#table-box").is_displayed() and one(page, "#gallery").is_displayed()
    assert not one(page, "#tools").is_displayed() and not one(page, "nav").is_displayed()


def test_clean_glass_has_no_confidence_and_comes_last(chromium, tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    for name, seed in (("b", 20), ("c", 3)):
        run.done(name, seed=seed)
    run.done("a", {"mean_confidence": None})
    run.end()
    opened(chromium, write_report(run.out).path)
    assert [("nothing but glass" in card.text) for card in css(chromium, ".card")] == [True, False, False]
    choose(chromium, "as", "table")
    (head,) = (head for head in css(chromium, "#table thead button") if head.text.startswith("confidence"))
    head.click()
    assert column(chromium, 1) == ["b", "c", "a"] and "–" in css(chromium, "tbody tr")[-1].text
    assert complaints(chromium) == []


def test_hostile_names_do_nothing(chromium, tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    for i, name in enumerate(HOSTILE):
        run.done(name, {"warnings": [name]}, stem=f"{i}")
        run.failed(f"failed {name}", name)
    run.end(plan=HOSTILE[0], arguments={"inputs": HOSTILE})
    opened(chromium, write_report(run.out).path)
    for as_ in ("table", "gallery"):
        choose(chromium, "as", as_)
        css(chromium, "tbody button, .card")[0].click()
        for _ in range(2 * len(HOSTILE)):
            chromium.execute_script("document.querySelector('#next').click()")
        chromium.execute_script("document.querySelector('#close').click()")
    assert chromium.title == "out – histoseg-fast report"
    assert len(css(chromium, "script:not([type])")) == 1 and css(chromium, "#data ~ b, bdi b, dd b, p b") == []
    shown = {element.text for element in css(chromium, ".card .name")}
    assert HOSTILE[0] in shown and "photo\\u202egnp.exe \\u2066x\\u2069.png" in shown
    assert complaints(chromium) == []


def test_the_policy_stops_what_would_slip_through(chromium, report: Path, tmp_path: Path) -> None:
    """The last line of defence, shown to hold: markup put into the page on purpose does not run or load."""
    evil = "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x' onerror=\"document.title='owned'\">"
    page = report.read_text("utf-8").replace("<main>", f"<main>{evil}", 1)
    (tmp_path / "evil.html").write_text(page, "utf-8")
    screen(chromium, 1280, 900)
    chromium.get((tmp_path / "evil.html").as_uri())
    assert chromium.title == "out – histoseg-fast report" and len(css(chromium, ".card")) == IMAGES + 1
    said = complaints(chromium)
    assert len(said) >= 2 and all("Content Security Policy" in line for line in said)


def test_a_thousand_images_stay_light(chromium, tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    for i in range(1000):
        run.done(f"image_{i:04}.png", seed=i % 50, stem=f"image_{i:04}")
    run.end()
    opened(chromium, write_report(run.out).path)
    assert len(css(chromium, ".card")) < 100 and decoded(chromium) <= MOST_DECODED
    assert one(chromium, "#everything").text == "Show all 1,000"
    one(chromium, "#more").click()
    assert one(chromium, "#shown").text == "120 of 1,000 shown"
    one(chromium, "#everything").click()
    assert len(css(chromium, ".card")) == 1000
    seen = set()
    for i in range(0, 1000, 90):
        chromium.execute_script("document.querySelectorAll('.card')[arguments[0]].scrollIntoView()", i)
        assert 0 < decoded(chromium) <= MOST_DECODED
        seen.add(
            chromium.execute_script("return !!document.querySelectorAll('.card')[arguments[0]].querySelector('img')", i)
        )
    assert seen == {True}
    choose(chromium, "as", "table")
    assert len(css(chromium, "#table tbody tr")) == 200 and decoded(chromium) == 0
    one(chromium, "#search").send_keys("image_0777")
    assert column(chromium, 1) == ["image_0777.png"]
    assert complaints(chromium) == []
