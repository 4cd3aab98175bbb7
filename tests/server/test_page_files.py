"""The files of the chat page and the inspector over HTTP: types, headers, caching, and what they may contain."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from page_server import PageServer

from nanovllm.server import page


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with PageServer() as running:
        yield running.url


@pytest.mark.parametrize("path", list(page.FILES))
def test_every_file_is_served_with_strict_headers(url, path):
    with urllib.request.urlopen(url + path.removeprefix("/")) as answer:
        body = answer.read()
    assert answer.headers["content-type"] == page.FILES[path][1] and len(body) == int(answer.headers["content-length"])
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "trusted-types 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        request = urllib.request.Request(url + path.removeprefix("/"), headers={"if-none-match": answer.headers["etag"]})
        urllib.request.urlopen(request)
    assert refusal.value.code == 304
    refusal.value.close()


@pytest.mark.parametrize("name", ["chat", "inspector"])
def test_a_page_has_nothing_inline_and_nothing_from_elsewhere(name):
    folder = page.resources.files(page.__name__)
    html, script, style = (folder.joinpath(f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "js", "css"))
    script = script.replace('"http://www.w3.org/2000/svg"', "")  # the name of a namespace, which nobody fetches
    assert not re.search(r"<script(?! src=)|<style|\son\w+=|\sstyle=", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    for text in (html, script, style):
        assert not re.search(r"https?://|//\w+\.\w|@import|url\(", text)
