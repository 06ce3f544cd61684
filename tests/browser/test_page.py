"""The chat page in headless Chromium, with its display of drafts."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from support.pictures import encoded
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
    assert float(page.text("#first")) > 0
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


def test_answers_of_other_clients_are_counted(page: Page, url: str) -> None:
    endless = {"prompt": "x = ", "max_tokens": 3900, "ignore_eos": True, "stream": True}
    with ExitStack() as others:
        posts = [httpx.stream("POST", f"{url}/v1/completions", json=endless, timeout=60) for _ in range(2)]
        # A connection closes when its iterator is dropped.
        lines = [others.enter_context(post).iter_lines() for post in posts]
        assert all(next(each) for each in lines)
        page.ask(PROMPT)
        # The answer of the page itself may have ended before the page asks.
        page.until(lambda: page.text("#running") in ("2", "3"))
        assert page.text("#waiting") == "0"
        assert int(page.text("#rows")) >= 2
        assert int(page.text("#parked")) >= 0
    page.until(page.is_ready)
    page.ask(PROMPT)
    page.until(lambda: page.text("#running") == "0")


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
        # The page must not ask a server that has ended.
        chromium.get("about:blank")


# This hands files to the page as a paste or a drop does, and keeps the bodies of its requests.
HAND_OVER = """
const [event, selector, files] = arguments, transfer = new DataTransfer();
for (const [name, type, text] of files)
  transfer.items.add(new File([Uint8Array.from(atob(text), letter => letter.charCodeAt(0))], name, {type}));
window.bodies ??= [];
window.realFetch ??= window.fetch;
window.fetch = (url, options) => { if (options?.body) bodies.push(options.body); return realFetch(url, options); };
const made = event === "paste" ? new ClipboardEvent(event, {clipboardData: transfer, bubbles: true, cancelable: true})
  : new DragEvent(event, {dataTransfer: transfer, bubbles: true, cancelable: true});
document.querySelector(selector).dispatchEvent(made);
return made.defaultPrevented;
"""


def hand_over(page: Page, event: str, selector: str, *files: tuple[str, str, bytes]) -> None:
    given = [(name, kind, base64.b64encode(data).decode()) for name, kind, data in files]
    assert page.driver.execute_script(HAND_OVER, event, selector, given)


def test_pictures_and_sounds_are_attached(
    chromium: Chrome, tiny_media: Callable[[str], Path], tmp_path: Path, url: str
) -> None:
    chromium.get_log("browser")  # type: ignore[no-untyped-call]
    picture = encoded(Image.new("RGB", (30, 20), "red"), "PNG")
    stream = BytesIO()
    soundfile.write(stream, np.sin(np.arange(4000) / 6), 16_000, format="WAV")
    sound = stream.getvalue()
    with process("--model", str(tiny_media("12b")), "--temp", "0") as (address, _):
        page = Page(chromium, address)
        page.until(lambda: page.driver.find_element(By.ID, "attach").is_displayed())
        page.fill("#max-tokens", "8")
        hand_over(page, "paste", "#prompt", ("red.png", "image/png", picture))
        page.until(lambda: page.all("#attached img") != [])
        hand_over(page, "drop", "#messages", ("a.wav", "audio/wav", sound), ("b.pdf", "application/pdf", b"%PDF"))
        page.until(lambda: page.text("#status") == "b.pdf: the model does not read such files")
        page.until(lambda: len(page.all("#attached li")) == 2)
        # The other way is the button, which opens this field.
        file = tmp_path / "other.png"
        file.write_bytes(picture)
        page.driver.find_element(By.ID, "files").send_keys(str(file))
        page.until(lambda: len(page.all("#attached li")) == 3)
        page.driver.find_element(By.CSS_SELECTOR, "#attached [aria-label='Remove other.png']").click()
        names = [found.get_attribute("alt") for found in page.driver.find_elements(By.CSS_SELECTOR, "#attached img")]
        assert names == ["red.png"]
        page.ask("What is this?")
        page.until(page.is_ready)
        assert page.all("#attached li") == []
        shown = page.driver.find_element(By.CSS_SELECTOR, ".message.user img")
        assert page.driver.execute_script("return arguments[0].naturalWidth", shown) == 30
        assert "♪ a.wav" in page.text(".message.user")
        assert page.text(".message.user").endswith("What is this?")
        (body,) = page.driver.execute_script("return bodies")
        (message,) = json.loads(body)["messages"]
        assert message["content"] == [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}},
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode()}},
            {"type": "text", "text": "What is this?"},
        ]
        assert int(page.text("#prompt-tokens")) > 200
        assert page.all(".error") == []
        assert page.errors() == []
        # The page must not ask a server that has ended.
        chromium.get("about:blank")
    # The demo pair reads only text.
    page = Page(chromium, url)
    page.until(lambda: page.driver.title == "demo · mlx-mtp")
    assert not page.driver.find_element(By.ID, "attach").is_displayed()
    hand_over(page, "drop", "#messages", ("red.png", "image/png", picture))
    page.until(lambda: page.text("#status") == "red.png: the model does not read such files")


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
