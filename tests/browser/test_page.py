"""The chat page in headless Chromium, with its display of drafts."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from support.serving import process

PROMPT = "def read_config(path):"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,800",
)
DRAFTED = ("--num-draft-tokens", "3", "--temp", "0")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with process(*DRAFTED) as (address, _):
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options=options, service=ChromeService("/usr/bin/chromedriver")) as driver:
        yield driver


@pytest.fixture
def page(url: str, chromium: Chrome) -> "Page":
    return Page(chromium, url)


class Page:
    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.fill("#max-tokens", "60")

    def until(self, holds: Callable[[], Any], seconds: float = 20) -> Any:
        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda _: holds())

    def text(self, selector: str) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def all(self, selector: str) -> list[str]:
        return [found.text for found in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def fill(self, selector: str, text: str) -> None:
        field = self.driver.find_element(By.CSS_SELECTOR, selector)
        field.clear()
        field.send_keys(text)

    def ask(self, text: str) -> None:
        self.driver.find_element(By.ID, "prompt").send_keys(text, Keys.ENTER)

    def is_ready(self) -> bool:
        return self.text("#status") == "Ready" and self.driver.find_element(By.ID, "send").is_enabled()

    def errors(self) -> list[Any]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]  # type: ignore[no-untyped-call]


def test_a_conversation_shows_speculation_at_work(page: Page) -> None:
    page.until(lambda: page.driver.title == "demo · mlx-mtp")
    page.ask(PROMPT)
    page.until(page.is_ready)
    (asked, answer) = page.all(".message")
    assert asked.endswith(PROMPT)
    assert "def read_config" in answer
    assert page.all(".assistant .draft")
    assert page.all(".assistant .own")
    assert int(page.text("#accepted")) > 0
    assert int(page.text("#drafted")) >= int(page.text("#accepted"))
    assert float(page.text("#length")) > 1
    assert float(page.text("#tps")) > 0
    assert [share.endswith(" %") for share in page.all("#positions .share")] == [True] * 3
    page.ask("import os")
    page.until(page.is_ready)
    assert len(page.all(".message")) == 4
    assert int(page.text("#cached")) > 0
    assert page.errors() == []


def test_text_grows_while_it_comes_and_stop_stops_it(page: Page, url: str) -> None:
    page.fill("#max-tokens", "3000")
    page.fill("#temperature", "1.5")
    lengths = set()

    def has_grown() -> bool:
        lengths.add(len(page.text("#messages")))
        return len(lengths) > 4

    # With such sampling, an answer can be short and end before it is stopped. The question is then repeated.
    for _ in range(20):
        page.ask("x = {")
        page.until(lambda: has_grown() or page.is_ready())
        page.driver.find_element(By.ID, "stop").click()
        page.until(lambda: page.text("#status") in ("Ready", "Stopped"))
        if len(lengths) > 4 and page.text("#status") == "Stopped":
            break
        page.driver.find_element(By.ID, "new").click()
        lengths.clear()
    assert page.text("#status") == "Stopped"
    end = time.monotonic() + 10
    while httpx.get(f"{url}/health").json()["running"]:
        assert time.monotonic() < end
    stopped_at = page.text("#messages")
    assert page.text("#messages") == stopped_at
    page.driver.find_element(By.ID, "new").click()
    assert page.all(".message") == []


def test_markup_is_text(page: Page) -> None:
    markup = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
    page.ask(markup)
    page.until(page.is_ready)
    assert page.all(".message.user")[0].endswith(markup)
    assert page.driver.find_elements(By.CSS_SELECTOR, "#messages img, #messages b") == []
    assert page.driver.title == "demo · mlx-mtp"


def test_errors_are_shown_and_the_conversation_goes_on(page: Page) -> None:
    # Typing each key would take long.
    page.driver.execute_script("document.getElementById('prompt').value = 'x '.repeat(4200)")
    page.ask("")
    page.until(lambda: page.text("#status") == "Failed")
    assert "the context holds 4096" in page.text(".error")
    page.ask(PROMPT)
    page.until(page.is_ready)
    assert "def read_config" in page.all(".message.assistant")[-1]


def test_the_key_is_asked_for(chromium: Chrome) -> None:
    with process(*DRAFTED, "--api-key", "s3cret") as (url, _):
        page = Page(chromium, url)
        page.until(lambda: page.driver.find_element(By.ID, "key-form").is_displayed())
        page.fill("#key", "s3cret")
        page.driver.find_element(By.CSS_SELECTOR, "#key-form button").click()
        page.until(lambda: page.driver.title == "demo · mlx-mtp")
        page.ask(PROMPT)
        page.until(page.is_ready)
        assert "def read_config" in page.text(".message.assistant")
        assert not page.driver.find_element(By.ID, "key-form").is_displayed()


def test_a_narrow_window(page: Page) -> None:
    page.driver.set_window_size(500, 900)
    try:
        width = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 500
    finally:
        page.driver.set_window_size(1200, 800)


def screenshot(page: Page, file: Path) -> None:
    page.ask(PROMPT)
    page.until(page.is_ready)
    page.driver.save_screenshot(str(file))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot(page: Page, tmp_path: Path, scheme: str, request: pytest.FixtureRequest) -> None:
    """This test makes the picture in docs/: pytest tests/browser --screenshots docs/images."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    folder = request.config.getoption("--screenshots") or tmp_path
    screenshot(page, Path(folder) / f"chat-page-{scheme}.png")
    back = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, back[4:-1].split(","))) < 60) == (scheme == "dark")
