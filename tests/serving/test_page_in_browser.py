"""The page in a real browser: what a visitor types, moves, gives and takes. Skipped where there is no Chromium."""

import csv
import json
import os
import shutil
import socket
from threading import Event
from urllib.parse import urlparse

import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fastbert_hf.serving import page_actions
from fastbert_hf.serving.loading import load_pipeline
from fastbert_hf.serving.page import EXAMPLES, show_page
from fastbert_hf.serving.page_figures import percent


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# So long a slow machine may take for one answer.
PATIENCE = 60
HARD_TEXT = "A long and slow film about nothing, and yet I liked it."
HOSTILE = (
    '<img src=x onerror="window.hit=1"> ${window.hit=2} {{constructor}} <script>window.hit=3</script> a dull film'
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs a browser: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def classifier():
    return load_pipeline()


@pytest.fixture(scope="module")
def address(classifier, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = show_page(classifier, host="127.0.0.1", port=port)
        yield page.local_url
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):  # which is closed before the page is
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("browser")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root has not
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={folder}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """A page as its visitor sees it."""

    def __init__(self, browser, address, theme="light"):
        self.browser = browser
        self.resize(1400, 1000)
        browser.get("about:blank")  # the page before tells that it was left
        browser.get_log("browser")
        browser.get(f"{address}?__theme={theme}")
        self.see("#fb-result", "left after layer")

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def wait(self, what):
        # While the page is laid out, elements go and lie above each other.
        passing = [ElementClickInterceptedException, StaleElementReferenceException]
        return WebDriverWait(self.browser, PATIENCE, 0.05, passing).until(lambda _: what())

    def find(self, selector):
        return self.wait(lambda: next(iter(self.all(selector)), None))

    def all(self, selector):
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return [element for element in found if element.is_displayed()]

    def press(self, selector, text=""):
        """Press what is there, as soon as nothing lies above it."""

        def is_pressed():
            for found in self.all(selector):
                if found.is_enabled() and text in found.text:
                    found.click()
                    return True
            return False

        self.wait(is_pressed)

    def text_of(self, selector):
        """Return the text, which may be replaced while it is read."""
        text = self.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        return text.replace("\xa0", " ")

    def see(self, selector, text):
        self.wait(lambda: text in self.text_of(selector))
        return self.text_of(selector)

    def see_answer(self, answer):
        """Wait until the page shows what the pipeline answers."""
        self.see("#fb-result .fb-label b", answer["label"])
        self.see("#fb-result .fb-label em", percent(answer["score"]).replace("&nbsp;", " "))
        self.see("#fb-result .fb-depth", f"left after layer {answer['exit_layer']} of 6")
        self.see(".fb-left .fb-name", f"Layer {answer['exit_layer']}")

    def type(self, text):
        box = self.find("#fb-text textarea")
        box.send_keys(Keys.CONTROL, "a")
        self.browser.execute_cdp_cmd("Input.insertText", {"text": text})  # at once, as from the clipboard
        box.send_keys(Keys.ENTER)

    def give(self, path):
        self.press("button[role=tab]", "A file")
        self.see("#fb-file-result", "Give a file")
        self.browser.find_element(By.CSS_SELECTOR, "#fb-file input[type=file]").send_keys(str(path))

    def overflow(self):
        """Return by how many pixels the page is wider than its window."""
        return self.browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")

    def assert_quiet(self):
        """Nothing went wrong in the browser, and nothing was asked of another host."""
        assert [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        assert len(asked) > 10
        assert {urlparse(url).hostname for url in asked if url.startswith(("http", "ws"))} == {"127.0.0.1"}
        assert self.browser.execute_script("return window.hit") is None


def test_a_text_is_typed_and_the_speed_is_moved(browser, address, classifier):
    page = Page(browser, address)
    page.see_answer(classifier(EXAMPLES[0])[0])
    page.see("#fb-result", "ms at speed 0")  # its time was measured
    page.type(HARD_TEXT)
    page.see_answer(classifier(HARD_TEXT, speed=0.49)[0])
    slider = page.find("input[type=range]")
    answers = {speed: classifier(HARD_TEXT, speed=speed)[0] for speed in (0.0, 0.49, 1.0)}
    assert len({answer["exit_layer"] for answer in answers.values()}) == 3
    slider.send_keys(Keys.HOME)
    page.see_answer(answers[0.0])
    page.see("#fb-result", "of the model")
    slider.send_keys(Keys.END)
    page.see_answer(answers[1.0])
    page.see("#fb-result", "ms at speed 0")
    slider.send_keys(Keys.HOME)  # where its time is known
    page.see_answer(answers[0.0])
    slider.send_keys(Keys.END)
    page.see_answer(answers[1.0])
    assert len(page.all(".fb-exit")) == 6 and len(page.all(".fb-not-run")) == 6 - answers[1.0]["exit_layer"]
    page.press("input[type=radio][value=Agreement]")
    page.see_answer(classifier(HARD_TEXT, max_disagreement=0.01)[0])
    page.see("#fb-result", "leaves below 0.")
    page.press("button", EXAMPLES[1])
    page.see_answer(classifier(EXAMPLES[1], max_disagreement=0.01)[0])
    page.type(HOSTILE)
    page.see_answer(classifier(HOSTILE, max_disagreement=0.01)[0])
    page.type("good " * 600)
    assert "602 tokens" in page.see("#fb-result", "Cut it")
    page.press("input[type=checkbox]")
    page.see_answer(classifier("good " * 600, max_disagreement=0.01, truncation=True)[0])
    for width in (1400, 390):
        page.resize(width, 900)
        page.wait(lambda: page.overflow() <= 0)
    page.assert_quiet()


def test_a_file_is_given_and_its_answers_are_taken(browser, address, classifier, tmp_path):
    texts = [*EXAMPLES, HARD_TEXT, HOSTILE, "", "=1+1, a formula of a film"]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", HOSTILE), *((text, "positive", HOSTILE) for text in texts)])
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page = Page(browser, address, theme="dark")
    page.give(tmp_path / "rows.csv")
    page.see("#fb-file-result", "The first of 9 rows")
    page.press("button", "Answer all")
    page.see("#fb-file-result", "Where texts leave")

    slider = page.find("input[type=range]")
    slider.send_keys(Keys.END)
    expected = classifier([text for text in texts if text], speed=1.0)
    shown = page.see("#fb-file-result", "speed 1\n")
    layers = sum(answer["exit_layer"] for answer in expected) / len(expected)
    right = sum(answer["label"] == "positive" for answer in expected) / len(expected)
    assert f"{layers:.2f}" in shown and f"{100 * right:.1f} %" in shown
    assert "1 row without an answer" in shown and HOSTILE[:40] in shown
    bars = page.all(".fb-bar")
    counts = [sum(answer["exit_layer"] == layer for answer in expected) for layer in range(1, 7)]
    assert [round(int(bar.text.split()[0]) * len(expected) / 100) for bar in bars] == counts

    written = tmp_path / "answers_speed_1.csv"
    page.press("button", "Download the answers")
    page.wait(written.is_file)
    rows = list(csv.DictReader(written.open(newline="")))
    assert [row["text"] for row in rows] == texts and rows[7]["predicted_error"] == "has no text in 'text'"
    answered = [row for row in rows if row["text"]]
    for row, answer in zip(answered, expected, strict=True):
        assert (row["predicted_label"], int(row["predicted_exit_layer"])) == (answer["label"], answer["exit_layer"])
        assert float(row["predicted_score"]) == pytest.approx(answer["score"], abs=1e-5)
    for width in (1400, 390):
        page.resize(width, 900)
        page.wait(lambda: page.overflow() <= 0)
    page.assert_quiet()


def test_a_file_is_stopped_and_visitors_do_not_see_each_other(browser, address, classifier, tmp_path, monkeypatch):
    stopped, in_steps = Event(), page_actions.record_in_steps

    def watched(*arguments):
        try:
            yield from in_steps(*arguments)
        except GeneratorExit:
            stopped.set()
            raise

    monkeypatch.setattr(page_actions, "record_in_steps", watched)
    path = tmp_path / "long.csv"
    path.write_text("text\n" + ("A film that goes on and on and on. " * 10 + "\n") * 4000)
    page = Page(browser, address)
    page.type(HARD_TEXT)
    page.see_answer(classifier(HARD_TEXT, speed=0.49)[0])
    page.give(path)
    page.see("#fb-file-result", "The first of 4,000 rows")
    page.press("button", "Answer all")
    page.see("#fb-file-result", "of 4,000 texts")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    Page(browser, address).see_answer(classifier(EXAMPLES[0])[0])  # meanwhile
    browser.close()
    browser.switch_to.window(first)
    page.press("button", "Stop")
    page.see("#fb-file-result", "Stopped.")
    assert stopped.wait(PATIENCE)
    page.wait(lambda: any(button.text == "Answer all" and button.is_enabled() for button in page.all("button")))
    page.press("button[role=tab]", "One text")
    page.find("input[type=range]").send_keys(Keys.END)
    page.see_answer(classifier(HARD_TEXT, speed=1.0)[0])
    page.assert_quiet()
