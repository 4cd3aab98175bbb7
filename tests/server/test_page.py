"""The chat page in a real browser (Chromium, headless), against a server whose answers are known."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import browser
import pytest
from browser import complaints, needs_chromium, open_chrome
from page_server import PageServer
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with PageServer() as running:
        yield running


@pytest.fixture(scope="module")
def chrome(tmp_path_factory) -> Iterator[Chrome]:
    with open_chrome(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


class Page(browser.Page):
    """What a person does with the chat page."""

    def __init__(self, chrome: Chrome, server: PageServer | SimpleNamespace) -> None:
        self.server = server
        super().__init__(chrome, server.url)

    def send(self, text: str, wait: bool = True) -> None:
        self.find("#message").send_keys(text, Keys.ENTER)
        if wait:
            self.wait(lambda: self.all(".assistant") and not self.is_busy())

    def is_busy(self) -> bool:
        return self.find("#stop").is_displayed()


@pytest.fixture
def page(chrome: Chrome, server: PageServer) -> Iterator[Page]:
    chrome.set_window_size(1200, 800)
    chrome.get(server.url)
    chrome.execute_script("localStorage.clear(); sessionStorage.clear()")
    chrome.get_log("browser")
    server.requests.clear()
    yield Page(chrome, server)
    assert not complaints(chrome)


def test_a_question_is_answered_with_counts_and_times(page):
    page.wait(lambda: page.texts("#model option") == ["test-model"])
    page.send("hello")
    assert page.texts(".user .body") == ["hello"]
    assert page.find(".assistant .body").text == "You said: hello"
    foot = page.find(".foot").text
    assert re.search(r"1 token\s+first after \d+\.\d\d s\s+prompt 7 \(4 cached\)", foot)
    assert page.find("#message").get_attribute("value") == ""
    assert page.chrome.switch_to.active_element.get_attribute("id") == "message"


def test_the_rate_is_shown_for_longer_answers(page):
    page.send("markdown")
    assert re.search(r"\d+ tokens\s+first after .* s\s+[\d.]+ tokens/s", page.find(".foot").text)


def test_the_conversation_and_the_settings_are_sent(page):
    for name, value in (("system", "Be short."), ("temperature", "0.75"), ("top_p", "0.9"), ("max_tokens", "50"), ("seed", "7")):
        page.find(f"#{name}").send_keys(value)
    page.send("one")
    page.send("two")
    (_, body) = page.server.requests
    assert body["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said: one"},
        {"role": "user", "content": "two"},
    ]
    assert (body["model"], body["stream"], body["temperature"], body["top_p"]) == ("test-model", True, 0.75, 0.9)
    assert (body["max_tokens"], body["seed"]) == (50, 7)


def test_settings_left_empty_are_not_sent_and_wrong_ones_are_explained(page):
    page.find("#temperature").send_keys("3")
    page.find("#message").send_keys("hello", Keys.ENTER)
    assert page.find("#notice").text == "Temperature must be a number from 0 to 2"
    assert page.find("#message").get_attribute("value") == "hello" and not page.server.requests
    page.find("#temperature").clear()
    page.send("")
    assert not {"temperature", "top_p", "max_tokens", "seed"} & set(page.server.requests[0])


def test_markdown_is_rendered_and_html_is_only_text(page):
    page.send("markdown")
    assert page.texts(".assistant h2") == ["Sorting"]
    assert page.texts(".assistant strong") == ["both"] and page.texts(".assistant em") == ["short"]
    assert page.texts(".assistant ol > li > ul > li") == ["returns a list", "keeps the order of equals"]
    code = page.find(".code pre code").get_attribute("textContent")
    assert code == "def first(items: list[int]) -> int:\n    return sorted(items)[0]  # <b>not bold</b>"
    assert page.find(".code .bar span").text == "python"
    assert "<script>" in page.find("blockquote").text and "onerror" in page.find(".assistant").text
    assert not page.all(".assistant script, .assistant img, .assistant a, .assistant b")
    assert page.chrome.title == "test-model - nanovllm"


def test_streamed_text_ends_as_text_rendered_at_once(page):
    """Only the last block is made anew while text grows; the result is that of the whole text."""
    page.send("markdown")
    grown, whole = page.chrome.execute_script(
        """const grown = document.querySelector('.assistant .body > div'), whole = document.createElement('div');
        new GrowingMarkdown(whole).show(answers.at(-1).text);
        return [grown.outerHTML, whole.outerHTML];"""
    )
    assert grown == whole


def test_hostile_markdown_takes_no_time(page):
    start = time.monotonic()
    page.send("stars")
    assert time.monotonic() - start < 30


def test_the_stop_button_ends_the_stream_and_keeps_the_text(page):
    before = page.server.num_aborted
    page.send("slow", wait=False)
    page.wait(lambda: "word3" in page.find(".assistant .body").text)
    assert page.find("#log").get_attribute("aria-busy") == "true"
    page.click("#stop")
    page.wait(lambda: not page.is_busy())
    page.wait(lambda: page.server.num_aborted > before)
    assert "stopped" in page.find(".foot").text and page.find("#log").get_attribute("aria-busy") == "false"
    page.send("next")
    assert page.server.requests[-1]["messages"][1]["content"].startswith("word0 word1")


def test_escape_stops_too_and_a_new_chat_forgets(page):
    page.send("slow", wait=False)
    page.wait(lambda: "word1" in page.find(".assistant .body").text)
    page.find("#message").send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.is_busy())
    page.click("#new")
    assert not page.all(".message") and page.find("#empty").is_displayed()
    page.send("fresh")
    assert [message["content"] for message in page.server.requests[-1]["messages"]] == ["fresh"]


def test_a_new_chat_during_an_answer_is_not_disturbed_by_it(page):
    page.send("slow", wait=False)
    page.wait(lambda: "word1" in page.find(".assistant .body").text)
    page.click("#new")
    page.wait(lambda: not page.is_busy())
    page.send("fresh")
    assert [message["content"] for message in page.server.requests[-1]["messages"]] == ["fresh"]


def test_reasoning_is_folded_and_not_sent_back(page):
    page.send("think")
    details = page.find("details.reasoning")
    assert details.get_attribute("open") is None
    details.find_element(By.TAG_NAME, "summary").click()
    assert "Let me think." in details.text
    page.send("and?")
    assert page.server.requests[-1]["messages"][1] == {"role": "assistant", "content": "So be it."}


def test_only_the_conversation_scrolls(page):
    for _ in range(3):
        page.send("markdown")
    overflow = "return document.documentElement.scrollHeight - document.documentElement.clientHeight"
    assert page.chrome.execute_script(overflow) == 0
    assert page.chrome.execute_script("return log.scrollHeight > log.clientHeight")
    assert page.find(".message:last-child .foot").is_displayed()


def test_the_token_limit_is_told(page):
    page.send("long")
    assert "ended by the token limit" in page.find(".foot").text


@pytest.mark.parametrize(
    ("text", "error", "kept"),
    [
        ("busy", "The server answered 429: the queue is full <b>now</b>", ""),
        ("break", "The answer broke off: the engine died", "Half an"),
        ("cut", "The answer broke off: the stream ended early", "You said: cut"),
    ],
)
def test_errors_are_shown_and_can_be_tried_again(page, text, error, kept):
    page.send(text)
    assert page.find(".assistant .error").text == error and kept in page.find(".assistant").text
    (again,) = [button for button in page.all(".foot button") if button.text == "Try again"]
    again.click()
    page.wait(lambda: len(page.server.requests) == 2 and not page.is_busy())
    assert page.server.requests[0]["messages"] == page.server.requests[1]["messages"]
    assert len(page.all(".user")) == len(page.all(".assistant")) == 1


def test_after_a_failure_the_next_message_takes_its_place(page):
    page.send("busy")
    page.send("hello")
    assert [message["content"] for message in page.server.requests[-1]["messages"]] == ["hello"]
    assert page.texts(".user .body") == ["hello"] and not page.all(".assistant .error")


def test_a_key_is_asked_for_and_stays_in_the_tab(chrome):
    with PageServer(key="sesame") as locked:
        page = Page(chrome, locked)
        page.wait(lambda: "wants an API key" in page.find("#notice").text)
        assert page.chrome.switch_to.active_element.get_attribute("id") == "key"
        page.find("#key").send_keys("wrong", Keys.TAB)
        page.wait(lambda: "refused the API key" in page.find("#notice").text)
        page.find("#key").clear()
        page.find("#key").send_keys("sesame", Keys.TAB)
        page.wait(lambda: page.texts("#model option") == ["test-model"])
        page.send("hello")
        assert page.find(".assistant .body").text == "You said: hello"
        stored = chrome.execute_script("return [Object.values(localStorage).join(), Object.values(sessionStorage).join()]")
        assert "sesame" not in stored[0] and "sesame" in stored[1]


def test_a_server_that_is_gone_is_told(chrome):
    with PageServer() as short:
        page = Page(chrome, short)
        page.wait(lambda: page.texts("#model option") == ["test-model"])
    page.send("hello")
    assert page.find(".assistant .error").text.startswith("The server cannot be reached")


def test_the_page_speaks_chinese(page):
    page.click("#language")
    assert page.find("#send").text == "发送" and page.find("html").get_attribute("lang") == "zh-CN"
    page.send("hello")
    assert "1 个词元" in page.find(".foot").text
    page.chrome.refresh()
    assert page.find("#new").text == "新对话"
    page.click("#language")
    assert page.find("#send").text == "Send"


def test_both_languages_have_the_same_strings_and_every_mark_has_one(page):
    english, chinese = page.chrome.execute_script("return [Object.keys(STRINGS.en), Object.keys(STRINGS.zh)]")
    assert english == chinese
    source = (Path(__file__).parents[2] / "nanovllm/server/page/chat.html").read_text(encoding="utf-8")
    assert set(re.findall(r'data-(?:text|hint|label)="(\w+)"', source)) <= set(english)


def test_colours_follow_the_system_and_the_switch(page):
    def background() -> str:
        return page.chrome.execute_script("return getComputedStyle(document.body).backgroundColor")

    seen = {}
    for scheme in ("light", "dark"):
        page.chrome.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        seen[scheme] = background()
    assert seen["light"] != seen["dark"]
    page.click("#theme")  # light, although the system is dark
    assert background() == seen["light"]
    page.click("#theme")
    assert background() == seen["dark"] and "dark" in page.find("#theme").get_attribute("aria-label")
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_control_has_a_name(page):
    nameless = page.chrome.execute_script(
        """return [...document.querySelectorAll('button, input, select, textarea')].filter(node =>
            !node.textContent.trim() && !node.getAttribute('aria-label') && !(node.labels && node.labels.length)
        ).map(node => node.outerHTML)"""
    )
    assert not nameless


def test_the_page_works_with_the_keyboard_alone(page):
    page.find("body").send_keys(Keys.TAB)
    seen = []
    for _ in range(18):
        active = page.chrome.switch_to.active_element
        seen.append(active.get_attribute("id"))
        active.send_keys(Keys.TAB)
    assert {"model", "new", "toggle-settings", "language", "theme", "message", "send", "system", "temperature", "key"} <= {*seen}
    page.find("#toggle-settings").send_keys(Keys.ENTER)
    assert not page.find("#settings").is_displayed()
    assert page.find("#toggle-settings").get_attribute("aria-expanded") == "false"
    page.find("#message").send_keys("two", Keys.SHIFT, Keys.ENTER, Keys.NULL, "lines", Keys.ENTER)
    page.wait(lambda: page.server.requests)
    assert page.server.requests[0]["messages"][0]["content"] == "two\nlines"


def test_a_phone_shows_everything_without_scrolling_sideways(page):
    page.chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    )
    page.chrome.refresh()
    assert not page.find("#settings").is_displayed()
    page.send("markdown")
    assert page.chrome.execute_script("return document.documentElement.scrollWidth") <= 360
    page.click("#toggle-settings")
    assert page.find("#key").is_displayed()
    page.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_real_server_and_model_answer(chrome, live):
    page = Page(chrome, SimpleNamespace(url=f"{live.url}/"))
    page.wait(lambda: page.texts("#model option") == ["SmolLM2-135M-Instruct"])
    page.find("#temperature").send_keys("0")
    page.find("#max_tokens").send_keys("8")
    page.send("Name three colors.")
    assert "Red" in page.find(".assistant .body").text
    foot = page.find(".foot").text
    assert "8 tokens" in foot and "tokens/s" in foot and "ended by the token limit" in foot
    chrome.execute_script("document.getElementById('system').value = 'word '.repeat(3000)")  # more than the context holds
    page.send("And?")
    assert "The server answered 400" in page.find(".assistant .error").text


def test_only_our_own_files_are_loaded(page):
    names = page.chrome.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.startswith(page.server.url) for name in names)
