"""Requests that the page does not answer: those of another web site in the same browser."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from training.page.guard import refusal
from training.page.state import Page


@pytest.fixture
def address(page: Page) -> Iterator[str]:
    """The page with the tab Blind, served without a password."""
    pytest.importorskip("gradio")
    from training.page.blind import blind_tab
    from training.page.interface import build, launch

    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    blocks = launch(build(page, {"Blind": blind_tab}), "127.0.0.1", port, None)
    yield f"127.0.0.1:{port}"
    blocks.close(verbose=False)


def status(address: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    named = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): text for name, text in headers.items()
    }
    request = urllib.request.Request(f"http://{address}{path}", data, named)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_another_web_site_can_neither_read_the_page_nor_ask_it(address: str) -> None:
    question = {"data": [16, 0, 0.9, 0], "fn_index": 0, "session_hash": "abc"}
    assert status(address, "/config")[0] == 200
    assert status(address, "/gradio_api/queue/join", question, Origin=f"http://{address}")[0] == 200
    for headers in (
        {"Host": "evil.example"},  # its address was changed to 127.0.0.1
        {"Host": "evil.example", "Origin": "http://evil.example", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1", "Sec_Fetch_Site": "same-site"},  # another program of this machine
    ):
        for path, body in (("/config", None), ("/gradio_api/queue/join", question)):
            code, words = status(address, path, body, **headers)
            assert code == 403, (path, headers)
            assert "This page answers at 127.0.0.1" in words or "another web site" in words


@pytest.mark.parametrize(
    ("method", "headers", "any_name", "answered"),
    [
        ("GET", {"host": "localhost:7860"}, False, True),
        ("GET", {"host": "[::1]:7860"}, False, True),
        ("GET", {"host": "evil.example"}, False, False),
        ("GET", {"host": "evil.example"}, True, True),
        ("GET", {"host": "127.0.0.1.evil.example"}, False, False),
        ("GET", {}, False, False),
        # A link from another site to the page, and a form of another site.
        ("GET", {"host": "x", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True, True),
        ("POST", {"host": "x", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True, False),
        ("GET", {"host": "x", "sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}, True, False),
        # Behind a proxy with TLS, whose name only the browser knows; and in a network without TLS.
        ("POST", {"host": "10.0.0.1", "origin": "https://w", "sec-fetch-site": "same-origin"}, True, True),
        ("POST", {"host": "10.0.0.1:7860", "origin": "http://10.0.0.1:7860"}, True, True),
        ("POST", {"host": "10.0.0.1", "x-forwarded-host": "w", "origin": "http://w"}, True, True),
        ("POST", {"host": "10.0.0.1", "origin": "http://evil.example"}, True, False),
        ("POST", {"host": "10.0.0.1", "origin": "null"}, True, False),
    ],
)
def test_only_the_pages_own_requests_are_answered(
    method: str, headers: dict[str, str], any_name: bool, answered: bool
) -> None:
    assert (refusal(method, headers, any_name) is None) == answered
