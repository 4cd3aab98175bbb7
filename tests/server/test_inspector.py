"""The inspector: its routes on a real server, and its page in a real browser (Chromium, headless)."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from live_server import Reply, live_server, write_tiny_model
from selenium.webdriver import Keys

ROOT = Path(__file__).parents[2]
LECTURE = ROOT / "docs/inspector-lecture.json"
USER, ADMIN, SECRET = "user-key-of-this-test", "admin-key-of-this-test", "xylophone"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A tiny model with few rows and blocks, keys, and a flight recorder as `serve` has it by default."""
    folder = tmp_path_factory.mktemp("inspected")
    model = write_tiny_model(folder / "model")
    options = ["--model", str(model), "--max-num-seqs", "2", "--num-kv-blocks", "24", "--max-model-len", "300"]
    lifecycle = folder / "lifecycle.jsonl"
    options += ["--flight-recorder-dir", str(folder), "--lifecycle-file", str(lifecycle), "--num-threads", "1"]
    options += ["--cpu-compute", "torch"]  # slow enough for a page to see what runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOVLLM_ADMIN_KEYS", ADMIN)
        patch.setenv("NANOVLLM_API_KEYS", USER)
        with live_server(*options) as running:
            running.lifecycle = lifecycle
            yield running


def ask(server, path, body=None, key=ADMIN, method=None) -> Reply:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    return server._send(urllib.request.Request(server.url + path, body, headers, method=method))


def complete(server, num_tokens=20, n=1) -> None:
    body = {"prompt": f"{SECRET} " * 12, "max_tokens": num_tokens, "ignore_eos": True, "n": n}
    assert ask(server, "/v1/completions", json.dumps(body).encode(), USER).status == 200


# --- the routes


def test_the_page_is_open_and_its_data_are_not(server):
    page = ask(server, "/inspector", key=None)
    assert page.status == 200 and b"inspector.js" in page.body and b"xylophone" not in page.body
    for path, method in (("/admin/inspector", "GET"), ("/admin/inspector/film", "POST")):
        assert ask(server, path, key=None, method=method).status == 401
        assert ask(server, path, key=USER, method=method).status == 403
        assert ask(server, path, key="wrong-key-123", method=method).status == 401
    assert ask(server, "/inspector", b"", key=None).status == 401
    assert ask(server, "/inspector/", key=None).status == 401


def test_news_tell_of_steps_with_their_costs_and_of_no_text(server):
    first = ask(server, "/admin/inspector").json
    assert first["facts"]["num_blocks"] == 24 and first["facts"]["hardware"]["h200"] == [4800e9, 989e12]
    complete(server)
    reply = ask(server, f"/admin/inspector?after={first['cursor']}")
    entries = reply.json["entries"]
    steps = [entry for entry in entries if entry[0] == "step"]
    assert len(steps) >= 20 and all(step[11] > 0 and step[12] > 0 for step in steps)
    assert {"add", "admit", "step", "result", "finish"} == {entry[0] for entry in entries}
    assert "facts" not in reply.json and len(reply.json["state"]["blocks"]) == 24 and reply.json["door"] == 0
    assert SECRET.encode() not in reply.body
    assert ask(server, f"/admin/inspector?after={reply.json['cursor']}").json["entries"] == []


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 16, "%C2%B2"])
def test_a_wrong_cursor_is_named(server, after):
    reply = ask(server, f"/admin/inspector?after={after}")
    assert reply.status == 400 and reply.error["param"] == "after"


def test_who_waits_has_a_reason(server):
    def look():
        news = ask(server, "/admin/inspector").json
        return {**news["state"]["reasons"], **({"door": news["door"]} if news["door"] else {})}

    threads = [threading.Thread(target=complete, args=(server, 150)) for _ in range(9)]
    for thread in threads:
        thread.start()
    seen: set[str] = set()
    while any(thread.is_alive() for thread in threads):
        seen |= set(look())
    for thread in threads:
        thread.join()
    assert {"rows", "behind", "door"} <= seen


def test_what_the_engine_has_just_done_becomes_a_film(server):
    complete(server, n=2)
    film = ask(server, "/admin/inspector/film", method="POST")
    assert film.status == 200 and SECRET.encode() not in film.body
    assert "every decision is the same" in film.json["report"] and len(film.json["frames"]) > 20
    assert film.json["facts"]["dtype"] and film.json["frames"][-2]["entries"]


def test_a_record_of_the_body_becomes_a_film(server):
    film = ask(server, "/admin/inspector/film", LECTURE.read_bytes())
    assert film.status == 200 and film.json["facts"]["num_blocks"] == 40
    (step,) = [entry for entry in film.json["frames"][5]["entries"] if entry[0] == "step"]
    assert step[11] > 2e8, "SmolLM2's weights, and not those of the model that is served"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda record: record.update(version=0), "version"),
        (lambda record: record.pop("entries"), "damaged"),
        (lambda record: record.update(facts=[1]), "damaged"),
        (lambda record: record["facts"]["spec"].update(head_dim="wide"), "damaged"),
        (lambda record: record.update(num_blocks=10**12), ""),  # more memory than a film may take
        (lambda record: record["keyframe"]["limits"].update(max_num_seqs=-1), "max_num_seqs"),
    ],
)
def test_a_bad_record_is_refused_and_harms_nobody(server, change, text):
    record = json.loads(LECTURE.read_bytes())
    change(record)
    reply = ask(server, "/admin/inspector/film", json.dumps(record).encode())
    assert reply.status == 400 and text in reply.error["message"] and "Traceback" not in reply.error["message"]
    assert ask(server, "/health", key=None).status == 200


def test_without_a_flight_recorder_the_answer_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOVLLM_ADMIN_KEYS", ADMIN)
    model = write_tiny_model(tmp_path / "model")
    with live_server("--model", str(model), "--flight-recorder-steps", "0", "--num-kv-blocks", "24") as blind:
        reply = ask(blind, "/admin/inspector")
        assert reply.status == 404 and "flight_recorder_steps" in reply.error["message"]
        assert ask(blind, "/admin/inspector/film", method="POST").status == 404


# --- the page


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with browser.open_chrome(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


class Inspector(browser.Page):
    """What a person does with the inspector."""

    def texts(self, selector: str) -> list[str]:
        """At one moment: live, the page makes its nodes anew twice a second."""
        return self.chrome.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
        )

    def number(self, name: str) -> str:
        return dict(zip(self.texts("#numbers dt"), self.texts("#numbers dd")))[name]

    def open(self, path: Path, num_frames: int) -> None:
        self.find("#file").send_keys(str(path))
        self.wait(lambda: self.script("return film ? film.frames.length : 0") >= num_frames)

    def script(self, code: str):
        return self.chrome.execute_script(code)

    def go_to(self, step: int) -> None:
        self.script(f"goTo(film.steps.find(one => one.number === {step}).frame, false)")


@pytest.fixture
def page(chrome, server) -> Iterator[Inspector]:
    chrome.set_window_size(1300, 900)
    chrome.get(f"{server.url}/inspector")
    chrome.execute_script("localStorage.clear(); sessionStorage.clear()")
    chrome.get_log("browser")
    yield Inspector(chrome, f"{server.url}/inspector")
    assert not browser.complaints(chrome)


@pytest.fixture
def lecture(page) -> Inspector:
    page.find("#key").send_keys(ADMIN)
    page.open(LECTURE, 334)
    return page


@browser.needs_chromium
class TestPage:
    def test_a_key_is_asked_for_refused_and_kept_in_the_tab(self, page):
        page.click("#live")
        page.wait(lambda: "admin key" in page.find("#notice").text)
        for wrong in ("wrong-key-123", USER):
            page.find("#key").clear()
            page.find("#key").send_keys(wrong)
            page.click("#live")
            page.wait(lambda: "refused the key" in page.find("#notice").text)
            page.script("complain('')")
        page.find("#key").clear()
        page.find("#key").send_keys(ADMIN)
        page.click("#live")
        page.wait(lambda: "live: " in page.find("#source").text)
        local, session = page.script("return [Object.values(localStorage).join(), Object.values(sessionStorage).join()]")
        assert ADMIN not in local and ADMIN in session and not page.find("#notice").is_displayed()

    def test_live_numbers_follow_the_engine_and_can_be_stepped_back(self, page, server):
        page.find("#key").send_keys(ADMIN)
        page.click("#live")
        page.wait(lambda: page.texts("#numbers dd"))
        threads = [threading.Thread(target=complete, args=(server, 200)) for _ in range(30)]  # some seconds of work
        for thread in threads:
            thread.start()
        page.wait(lambda: page.number("Running") == "2" and "rows" in page.texts("#reasons")[0])
        assert len(page.all("#batch tr")) == 2 and page.all("#timeline .decode") and page.all("#strips .decode")
        for thread in threads:
            thread.join()
        page.wait(lambda: page.number("Running") == "0")
        assert re.search(r"p50 [\d.]+ · p99 [\d.]+ ms · n \d+", page.texts("#histograms")[0])
        page.wait(lambda: page.script("return film.frames.length") > 4)
        page.click("#first")
        place = page.script("return film.place")
        frames = page.script("return film.frames.length")
        page.wait(lambda: page.script("return film.frames.length") > frames)
        assert place == page.script("return film.place") == 0, "it stays where it was put"
        page.click("#last")
        frames = page.script("return film.frames.length")
        page.wait(lambda: page.script("return film.place") >= frames)

    def test_the_last_steps_become_a_film(self, page, server):
        complete(server)
        page.find("#key").send_keys(ADMIN)
        page.click("#recent")
        page.wait(lambda: "every decision is the same" in page.find("#source").text)
        assert page.script("return film.frames.every((frame, i) => i === 0 || frame.state.codes.length === 24)")

    def test_a_record_is_stepped_forwards_and_backwards(self, lecture):
        lecture.go_to(176)
        assert lecture.number("preemptions") == "1" and "step 176" in lecture.find("#where").text
        assert len(lecture.all("#batch tr")) == 5 and lecture.all("#timeline .lost")
        shown = [lecture.texts(part) for part in ("#numbers dd", "#reasons li", "#batch tr", "#legend span")]
        lecture.click("#back")
        assert lecture.number("preemptions") == "0" and len(lecture.all("#batch tr")) == 6
        lecture.click("#next")
        assert shown == [lecture.texts(part) for part in ("#numbers dd", "#reasons li", "#batch tr", "#legend span")]
        lecture.click("#first")
        assert lecture.number("Running") == "0" and lecture.find("#back")
        lecture.script("document.activeElement.blur()")
        lecture.find("body").send_keys(Keys.ARROW_RIGHT)
        assert lecture.number("Running") == "1"
        lecture.click("#play")
        lecture.wait(lambda: lecture.script("return film.place") > 5)
        lecture.click("#play")
        place = lecture.script("return film.place")
        assert lecture.script("return [player, film.place]") == [0, place]

    def test_the_map_shows_sharing_and_who_holds_a_block(self, lecture):
        lecture.go_to(111)
        codes = lecture.script("return [...film.frames[film.place].state.codes]")
        shared = [place for place, code in enumerate(codes) if code >= 4]
        assert len(shared) == 5 and {codes[place] // 2 for place in shared} == {6}
        assert "shared, with its number of holders: 5" in lecture.texts("#legend span")
        where = f"[({shared[0]} % grid.columns + 0.5) * grid.size, (Math.floor({shared[0]} / grid.columns) + 0.5) * grid.size]"
        lecture.script(f"const [x, y] = {where}; tellBlock({{offsetX: x, offsetY: y}})")
        assert lecture.find(
            "#block"
        ).text == f"block {shared[0]}: shared, with its number of holders; in the table of " + ", ".join(
            f"#{number}" for number in range(8, 14)
        )
        lecture.click("#batch tr:first-child button")
        assert lecture.find("#batch tr.chosen button").get_attribute("aria-pressed") == "true"
        assert lecture.chrome.switch_to.active_element.text == "#8"

    def test_the_roof_is_that_of_the_chosen_machine(self, lecture):
        lecture.go_to(150)
        on_cpu = lecture.find("#reached").text
        assert "ridge is at 14.3" in on_cpu and re.match(r"[\d.]+ GB/s, \d+ %", on_cpu)
        lecture.find("#hardware").send_keys("h200")
        assert "ridge is at 206" in lecture.find("#reached").text

    def test_a_film_needs_no_key_and_a_lifecycle_file_shows_what_it_has(self, page, server, tmp_path):
        from nanovllm.observability.film import write_film

        write_film(str(tmp_path / "film.json"), str(LECTURE))
        page.open(tmp_path / "film.json", 334)
        complete(server)
        page.wait(lambda: server.lifecycle.stat().st_size > 0)
        page.find("#file").send_keys(str(server.lifecycle))
        page.wait(lambda: page.script("return !film.frames[0].state"))
        page.click("#last")
        assert page.all("#timeline .prompt") and len(re.findall(r"p50 [\d.]+", page.texts("#histograms")[0])) == 2, "TTFT, TPOT"
        assert page.find("#reasons").text == "not in this file"

    def test_what_is_no_record_is_refused_and_hostile_names_are_text(self, page, tmp_path):
        (tmp_path / "bad.json").write_text('{"a": 1}')
        page.find("#file").send_keys(str(tmp_path / "bad.json"))
        page.wait(lambda: "neither a flight record" in page.find("#notice").text)
        stages = ("received", "tokenized", "queued", "scheduled", "prefill_done", "first_token", "decode_done")
        name = "<img src=x onerror=document.title='hacked'>"
        lines = [{"request_id": name, "stage": one, "timestamp_ms": i * 10.0, "metadata": {}} for i, one in enumerate(stages)]
        (tmp_path / "life.jsonl").write_text("\n".join(map(json.dumps, lines)))
        page.open(tmp_path / "life.jsonl", len(stages))
        page.click("#last")
        assert name in page.script("return document.getElementById('timeline').textContent")
        assert not page.all("img") and page.chrome.title == "nanovllm inspector"

    def test_both_languages_and_both_colours(self, lecture):
        def colour() -> str:
            return lecture.script("return getComputedStyle(document.body).backgroundColor")

        assert lecture.script("return Object.values(TEXT).every(pair => pair.length === 2 && pair[0] && pair[1])")
        used = set(re.findall(r'data-(?:text|hint|label)="(\w+)"', (ROOT / "nanovllm/server/page/inspector.html").read_text()))
        assert used <= set(lecture.script("return Object.keys(TEXT)"))
        seen = {}
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            lecture.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            seen[scheme] = colour()
        lecture.click("#theme")
        assert colour() == seen["light"] != seen["dark"]
        lecture.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        lecture.click("#language")
        assert "运行中" in lecture.texts("#numbers dt") and lecture.find("html").get_attribute("lang") == "zh-CN"

    def test_every_control_has_a_name_and_a_narrow_window_does_not_scroll_sideways(self, lecture):
        nameless = lecture.script(
            """return [...document.querySelectorAll('button, input, select, canvas, svg[role=img]')].filter(node =>
                !node.textContent.trim() && !node.getAttribute('aria-label') && !(node.labels && node.labels.length)
            ).map(node => node.outerHTML)"""
        )
        assert not nameless
        lecture.chrome.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        )
        lecture.script("dispatchEvent(new Event('resize'))")
        assert lecture.script("return document.documentElement.scrollWidth") <= 400
        lecture.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
