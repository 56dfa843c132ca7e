"""Reports in a real browser: what a reader can do with the page, and what the page may not do."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_report import EVIL, name_with_markup

from analysis import load_trials, write_report

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not ((DRIVER and BROWSER) or os.environ.get("CI")),  # CI installs both: if it did not, that is an error
    reason="needs Chromium and its driver (on Debian: apt-get install chromium chromium-driver)",
)
A4 = 718  # pixels of a page's width within Chromium's margins
CONTRAST = """
  const luminance = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const linear = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const background = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!color.endsWith(", 0)")) { return color; }
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("h1, h2, h3, p, dt, dd, th, td, figcaption, li, code, label, button")]
    .filter((node) => node.offsetParent && node.textContent.trim())
    .map((node) => {
      const pair = [luminance(getComputedStyle(node).color), luminance(background(node))].sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), node.tagName, node.textContent.slice(0, 40)];
    })
    .sort((a, b) => a[0] - b[0])[0];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("browsed") / "run"
    shutil.copytree(finished_run, run)
    return write_report([run], top=2, device="cpu")


@pytest.fixture
def page(browser: webdriver.Chrome, report: Path) -> webdriver.Chrome:
    return visit(browser, report)


def visit(browser: webdriver.Chrome, file: Path, width: int = 1280, **media: str) -> webdriver.Chrome:
    for name in ("browser", "performance"):
        browser.get_log(name)  # what was said of the page before
    size: dict[str, Any] = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": media.pop("scheme", "light")}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", ""), "features": features})
    browser.get(file.as_uri())
    return browser


def column(page: webdriver.Chrome, title: str) -> list[str]:
    """The texts of a column of the table of trials, of the rows that are shown."""
    heads = [head.text.strip(" ▲▼") for head in page.find_elements(By.CSS_SELECTOR, "#trial-table thead th")]
    cells = page.find_elements(By.CSS_SELECTOR, f"#trial-table tbody td:nth-child({heads.index(title) + 1})")
    return [cell.text for cell in cells if cell.is_displayed()]


def head(page: webdriver.Chrome, title: str) -> Any:
    heads = page.find_elements(By.CSS_SELECTOR, "#trial-table thead th")
    return next(head for head in heads if head.text.strip(" ▲▼") == title)


def test_the_page_asks_for_nothing_and_complains_of_nothing(page: webdriver.Chrome, report: Path) -> None:
    assert [entry["message"] for entry in page.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}
    pictures = page.find_elements(By.TAG_NAME, "img")
    assert len(pictures) >= 5
    assert all(page.execute_script("return arguments[0].naturalWidth > 0", picture) for picture in pictures)


def test_trials_are_sorted_by_a_click_and_by_the_keyboard(page: webdriver.Chrome) -> None:
    best_first = column(page, "Validation")
    assert best_first == sorted(best_first, key=lambda text: -float(text.split()[0]))
    assert head(page, "Validation").get_attribute("aria-sort") == "descending"
    head(page, "Validation").find_element(By.TAG_NAME, "button").click()
    assert column(page, "Validation") == best_first[::-1]
    assert head(page, "Validation").get_attribute("aria-sort") == "ascending"
    button = head(page, "lr").find_element(By.TAG_NAME, "button")
    page.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    rates = [float(text) for text in column(page, "lr")]
    assert rates == sorted(rates)  # as numbers: 1e-07 before 0.05
    assert len(set(rates)) == 2
    assert head(page, "Validation").get_attribute("aria-sort") == "none"
    head(page, "lr").find_element(By.TAG_NAME, "button").click()
    assert [float(text) for text in column(page, "lr")] == rates[::-1]


def test_what_is_not_known_comes_last_whichever_way(page: webdriver.Chrome) -> None:
    """Two of four trials were tested."""
    for _ in range(2):
        head(page, "Test").find_element(By.TAG_NAME, "button").click()
        shown = column(page, "Test")
        assert [text == "–" for text in shown] == [False, False, True, True]
    numbers = [float(text.split()[0]) for text in shown[:2]]
    assert numbers == sorted(numbers)


def test_trials_are_filtered_by_words(page: webdriver.Chrome) -> None:
    box = page.find_element(By.ID, "filter")
    assert page.find_element(By.ID, "shown").text == "4 of 4 trials"
    box.send_keys("COMPLETED")
    assert set(column(page, "Status")) == {"completed"}
    assert page.find_element(By.ID, "shown").text == "2 of 4 trials"
    box.send_keys(" flip+crop")
    assert column(page, "augmentation") == ["flip+crop"]
    box.clear()
    box.send_keys("nothing has this")
    assert column(page, "Trial") == []
    assert page.find_element(By.ID, "shown").text == "0 of 4 trials"
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.BACKSPACE)
    assert len(column(page, "Trial")) == 4


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_not_wider_than_the_screen(browser: webdriver.Chrome, report: Path, width: int) -> None:
    page = visit(browser, report, width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    won = page.find_element(By.CLASS_NAME, "won")
    assert won.location["y"] + won.size["height"] < 900
    how_sure = page.find_element(By.XPATH, "//dt[text()='How sure']")
    assert how_sure.location["y"] < 900  # on the first screen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_readers_need(browser: webdriver.Chrome, report: Path, scheme: str) -> None:
    page = visit(browser, report, scheme=scheme)
    dark = page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    assert dark == (scheme == "dark")
    ratio, *where = page.execute_script(CONTRAST)
    assert ratio >= 4.5, where  # WCAG 2.2, 1.4.3


def test_a_screen_reader_finds_its_way(page: webdriver.Chrome) -> None:
    levels = [int(node.tag_name[1]) for node in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(node.get_attribute("alt") for node in page.find_elements(By.TAG_NAME, "img"))
    assert all(node.get_attribute("scope") for node in page.find_elements(By.TAG_NAME, "th"))
    for node in page.find_elements(By.CSS_SELECTOR, "[aria-labelledby]"):
        assert page.find_elements(By.ID, str(node.get_attribute("aria-labelledby")))
    assert page.find_element(By.CSS_SELECTOR, "label[for=filter]").text
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    assert len(page.find_elements(By.TAG_NAME, "main")) == 1


def test_on_paper_there_is_no_search_box_and_tables_are_whole(browser: webdriver.Chrome, report: Path) -> None:
    page = visit(browser, report, A4, media="print")
    assert not page.find_element(By.ID, "tools").is_displayed()
    for scroll in page.find_elements(By.CSS_SELECTOR, ".scroll"):
        right = page.execute_script(
            "return Math.max(...[...arguments[0].children].map((c) => c.getBoundingClientRect().right))", scroll
        )
        assert right <= A4, scroll.get_attribute("aria-label")


def test_markup_from_outside_does_nothing(
    browser: webdriver.Chrome, finished_run: Path, pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    name_with_markup(run, pictures, tmp_path / "pictures")
    page = visit(browser, write_report([run], top=2, device="cpu"))  # an alert would raise at the next command
    assert EVIL in page.find_element(By.TAG_NAME, "h1").text
    assert "<img src=x onerror=alert(1)>" in page.find_element(By.XPATH, "//h2[@id='classes']/..").text
    # And if some markup did get in, the page's policy would not run it.
    page.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
    refused = " ".join(entry["message"] for entry in page.get_log("browser"))
    assert "Content Security Policy" in refused
    assert page.execute_script("return window.ran") is None


def test_five_hundred_trials_can_be_sorted_and_filtered(
    browser: webdriver.Chrome, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "many"
    shutil.copytree(finished_run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    first = manifest["trials"][0]
    manifest["trials"] += [{**first, "trial_id": f"more-{i}"} for i in range(500)]
    (run / "manifest.json").write_text(json.dumps(manifest))
    page = visit(browser, write_report([run], top=0))
    assert len(load_trials(run)) == 504
    page.find_element(By.ID, "filter").send_keys("more-49")
    assert page.find_element(By.ID, "shown").text == "11 of 504 trials"
    head(page, "Trial").find_element(By.TAG_NAME, "button").click()
    assert column(page, "Trial")[:2] == ["more-49", "more-490"]
