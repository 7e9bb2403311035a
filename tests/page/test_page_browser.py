"""The page in a real Chromium: streaming, stop, a blind vote with the keyboard, two users, and no foreign request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTJForCausalLM, PreTrainedTokenizerBase

from tests.page.conftest import RIVER, SCRIPT, save_run
from training.page.__main__ import PASSWORD_VARIABLE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PASSWORD = "correct horse"
RUN = "offspring <img src=x onerror='window.attacked = true'>"  # the name of a folder is shown, too


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium. In CI a missing one fails the tests; elsewhere it skips them."""
    if not os.environ.get("DOLLY_CI"):
        pytest.importorskip("playwright.sync_api")
    from playwright import sync_api

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        words = "needs Chromium. Type sudo apt-get install chromium"
        if os.environ.get("DOLLY_CI"):
            pytest.fail(words)
        pytest.skip(words)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


def started(folder: Path, *words: object, **environment: str) -> tuple[subprocess.Popen, str]:
    """The command of the page and its address, once it answers."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    log = folder / "server.log"
    command = [
        sys.executable,
        "-m",
        "training.page",
        "--votes",
        folder / "votes.jsonl",
        "--port",
        port,
        *words,
    ]
    # A proxy for everything: a request to another machine would fail, one to this page must not use it.
    environment = (
        os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"} | environment
    )
    with open(log, "w") as stream:
        server = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=stream,
            # A shell lets commands in the background ignore Ctrl-C, and so would the page.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 180
    while "in a browser" not in log.read_text():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return server, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def folder(
    endless_model: GPTJForCausalLM,
    brief_model: GPTJForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of "ancestor", a base that never ends, and "offspring", a run from it that answers "AB"."""
    folder = tmp_path_factory.mktemp("page")
    endless_model.save_pretrained(folder / "ancestor")
    tokenizer.save_pretrained(folder / "ancestor")
    save_run(folder / RUN, brief_model, tokenizer, folder / "ancestor", folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The page, whose server would have to use a proxy for any other machine."""
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        server, address = started(folder, "--model", folder / RUN, HTTP_PROXY=url, HTTPS_PROXY=url)
        yield address
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, "Ctrl-C"
        log = (folder / "server.log").read_text()
        assert log.endswith("The page is closed.\n")
        assert "Traceback" not in log
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.fixture(autouse=True)
def no_tab_left(chromium: Any) -> Iterator[None]:
    """A test that failed leaves no question to the models, which the next one would wait for."""
    yield
    for context in chromium.contexts:
        context.close()


class Tab:
    """A tab of its own session, and the requests that it made."""

    def __init__(self, browser: Any, address: str, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#ask")

    def text(self, name: str) -> str:
        return self.page.input_value(f"#{name} textarea")

    def fill(self, name: str, text: str) -> None:
        self.page.fill(f"#{name} textarea", text)

    def wait(self, name: str, part: str, seconds: float = 30) -> str:
        condition = "([name, part]) => document.querySelector(`#${name} textarea`)?.value.includes(part)"
        self.page.wait_for_function(condition, arg=[name, part], timeout=1000 * seconds)
        return self.text(name)

    def set_new_tokens(self, count: int) -> None:
        self.page.get_by_role("button", name="How the models answer").click()
        field = self.page.get_by_label("max_new_tokens")
        field.wait_for()
        self.page.wait_for_timeout(500)  # gradio sets the default of a field that it has just shown
        field.fill(str(count))
        field.press("Tab")

    def close(self) -> None:
        """Also: no request has left this machine, and no script of the page has failed."""
        hosts = {
            urllib.parse.urlsplit(url).hostname
            for url in self.requests
            if not url.startswith(("data:", "blob:"))
        }
        self.context.close()
        assert hosts == {"127.0.0.1"}
        assert not self.errors


def test_answers_stream_side_by_side_and_stop_ends_them(chromium: Any, address: str) -> None:
    tab = Tab(chromium, address)
    assert [tab.page.inner_text(f"#answer-{n} [data-testid=block-info]") for n in (0, 1)] == [
        "ancestor (base)",
        RUN,
    ]
    tab.set_new_tokens(30_000)
    tab.fill("instruction", "Say A.")
    tab.page.click("#ask")
    assert tab.wait("note-1", "tokens in").startswith("3 tokens in")
    assert tab.text("answer-1") == "AB"
    lengths = []
    while len(set(lengths)) < 3:
        lengths.append(len(tab.text("answer-0")))
    assert tab.text("note-0").endswith("so far"), "it is still being generated"
    tab.page.click("#stop")
    note = tab.wait("note-0", "Stopped after")
    assert int(note.split()[2]) < 30_000
    tab.fill("instruction", "Say A again.")
    tab.page.click("#ask")
    tab.wait("note-0", "so far")  # the model is free again
    tab.page.click("#stop")
    tab.wait("note-0", "Stopped after")
    tab.close()


def test_two_users_ask_at_once_and_a_closed_tab_frees_the_models(chromium: Any, address: str) -> None:
    first, second = Tab(chromium, address), Tab(chromium, address)
    first.set_new_tokens(30_000)
    second.set_new_tokens(6)
    for tab in (first, second):
        tab.fill("instruction", "Say A.")
    first.page.click("#ask")
    first.wait("note-0", "so far")
    second.page.click("#ask")
    second.wait("note-0", "Waiting")
    assert second.wait("note-1", "tokens in").startswith("3 tokens"), "the other model does not wait"
    assert "so far" in first.text("note-0")
    first.close()
    assert second.wait("note-0", "Cut off at max_new_tokens", 10) == "Cut off at max_new_tokens, 6 tokens"
    assert second.text("answer-0") == "A A A"
    third = Tab(chromium, address)
    third.set_new_tokens(30_000)
    third.page.get_by_role("tab", name="Blind").click()
    third.page.click("#next")
    third.wait("status", "The models answer")
    second.fill("instruction", "Say A.")
    second.page.click("#ask")
    second.wait("note-0", "Waiting")
    third.close()
    second.wait("note-0", "Cut off", 10)
    second.close()


def test_a_script_is_shown_and_not_run(chromium: Any, address: str) -> None:
    tab = Tab(chromium, address)
    tab.set_new_tokens(6)
    tab.fill("instruction", SCRIPT)
    tab.page.click("#ask")
    tab.wait("note-0", "Cut off")
    assert tab.text("conversation-0") == f"Question: {SCRIPT}"
    tab.page.get_by_role("tab", name="Blind").click()
    tab.page.click("#next")
    tab.wait("status", "Which answer")
    assert SCRIPT in tab.text("question"), "a row"
    tab.page.get_by_role("button", name="A question of your own").click()
    tab.fill("own-instruction", SCRIPT)
    tab.page.click("#own")
    while tab.text("question") != SCRIPT:
        tab.page.wait_for_timeout(50)
    tab.wait("status", "Which answer")
    assert tab.page.evaluate("window.attacked") is None
    tab.page.get_by_role("tab", name="Ask").click()
    tab.fill("instruction", "   ")
    tab.page.click("#ask")
    assert tab.wait("problem", "empty") == "The instruction is empty. Type one"
    tab.close()


def test_a_follow_up_needs_no_mouse_and_each_user_has_a_conversation_of_their_own(
    chromium: Any, address: str
) -> None:
    tab, other = Tab(chromium, address), Tab(chromium, address)
    page = tab.page
    for user in (tab, other):
        user.set_new_tokens(6)
    other.fill("instruction", "Say B.")
    other.page.click("#ask")
    other.wait("note-0", "Cut off")

    def ask(text: str) -> None:
        press_until(page, "Shift+Tab", "#instruction textarea")
        page.keyboard.type(text)
        press_until(page, "Tab", "#ask")
        page.keyboard.press("Enter")
        tab.wait("conversation-1", f"Question: {text}")
        tab.wait("note-0", "Cut off")
        tab.wait("note-1", "3 tokens in")

    assert page.get_by_label("Instruction", exact=True).is_visible()
    assert not page.locator("#conversation-1").is_visible()
    ask("Say A.")
    assert page.get_by_label("Next instruction. It continues the conversation").input_value() == ""
    ask("And now?")
    assert tab.text("conversation-0") == "Question: Say A.\n\nAnswer: A A A\n\nQuestion: And now?"
    assert tab.text("conversation-1") == "Question: Say A.\n\nAnswer: AB\n\nQuestion: And now?"
    assert (tab.text("answer-0"), tab.text("answer-1")) == ("A A A", "AB")
    other.fill("instruction", "And?")
    other.page.click("#ask")
    assert other.wait("conversation-1", "And?") == "Question: Say B.\n\nAnswer: AB\n\nQuestion: And?"
    press_until(page, "Tab", "#new")
    page.keyboard.press("Enter")
    page.wait_for_selector("#conversation-1", state="hidden")
    assert page.get_by_label("Instruction", exact=True).is_visible()
    assert [tab.text(name) for name in ("answer-0", "answer-1", "note-0", "note-1")] == [""] * 4
    ask("Say C.")
    assert tab.text("conversation-1") == "Question: Say C."
    other.wait("note-0", "Cut off")
    tab.close()
    other.close()


def test_a_new_conversation_ends_the_former_one_and_what_is_typed_meanwhile_stays(
    chromium: Any, address: str
) -> None:
    tab = Tab(chromium, address)
    tab.set_new_tokens(30_000)
    tab.fill("instruction", "Say A.")
    tab.page.click("#ask")
    tab.wait("note-0", "so far")
    tab.fill("instruction", "typed mean")
    length = len(tab.text("answer-0"))
    while len(tab.text("answer-0")) < length + 20:
        tab.page.wait_for_timeout(50)
    assert tab.text("instruction") == "typed mean"
    tab.page.click("#new")
    tab.page.wait_for_selector("#conversation-0", state="hidden")
    tab.page.wait_for_timeout(1000)  # a late view of the former conversation would come now
    assert not tab.page.locator("#conversation-0").is_visible()
    assert tab.text("answer-0") == tab.text("note-0") == ""
    tab.close()


def test_a_saved_answer_is_shown_with_its_example(chromium: Any, address: str) -> None:
    tab = Tab(chromium, address)
    tab.page.get_by_role("button", name="Name a river.").click()
    assert tab.wait("note-1", "Saved") == "Saved by the training run at step 60, greedy"
    assert tab.text("instruction") == RIVER
    assert tab.page.evaluate("window.attacked") is None
    assert [tab.text("answer-0"), tab.text("answer-1")] == ["A A A", "The Rhine"]
    tab.close()


def press_until(page: Any, key: str, selector: str) -> None:
    """Presses a key until the element has the focus, as somebody without a mouse does."""
    for _ in range(40):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press(key)
    pytest.fail(f"the keyboard does not reach {selector}")


def test_a_blind_vote_needs_no_mouse_and_says_whose_the_answers_were_only_afterwards(
    chromium: Any, address: str, folder: Path
) -> None:
    tab, streams = Tab(chromium, address), []
    page = tab.page

    def read(route: Any) -> None:
        response = route.fetch()
        streams.append(response.text())
        route.fulfill(response=response)

    page.route("**/queue/data?*", read)
    press_until(page, "Tab", "[role=tab]:nth-of-type(2)")
    page.keyboard.press("Enter")
    page.wait_for_selector("#next", state="visible")
    press_until(page, "Tab", "#next")
    page.keyboard.press("Enter")
    tab.wait("status", "Which answer")
    panel = page.locator("[role=tabpanel]:has(#next)")
    before = panel.evaluate(
        "panel => panel.outerHTML + [...panel.querySelectorAll('textarea')].map(e => e.value)"
    )
    assert "AB" in before
    assert any("AB" in stream for stream in streams)
    for name in ("ancestor", "offspring", "run-1", str(folder)):
        assert name not in before
        assert not any(name in stream for stream in streams)
    answers = {side: tab.text(f"blind-{side}") for side in "ab"}
    press_until(page, "Tab", "#vote-b")
    page.keyboard.press("Enter")
    status = tab.wait("status", "Your vote")
    b = RUN if answers["b"] == "AB" else "ancestor (base)"
    assert f"B is {b}" in status
    assert "1 vote " in tab.wait("rates", f"{RUN} against ancestor (base)")
    [vote] = map(json.loads, (folder / "votes.jsonl").read_text().splitlines())
    assert (vote["vote"], vote["b"]["name"]) == ("b", b)
    press_until(page, "Shift+Tab", "#next")
    page.reload()
    page.get_by_role("tab", name="Blind").click()
    tab.wait("rates", "1 vote ")  # the page is built once, before the first vote
    assert status.endswith(tab.wait("status", "held-out rows have no vote yet"))
    tab.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_screen(chromium: Any, address: str, width: int, tmp_path: Path) -> None:
    tab = Tab(chromium, address, width)
    tab.set_new_tokens(6)
    for question in ("Say A.", "And a long question. " * 60):
        tab.fill("instruction", question)
        tab.page.click("#ask")
        tab.wait("conversation-0", question)
        tab.wait("note-0", "Cut off")
        tab.wait("note-1", "3 tokens in")
    tab.page.wait_for_timeout(500)
    hidden = "box => box.scrollHeight - box.clientHeight - box.scrollTop"
    assert tab.page.locator("#conversation-0 textarea").evaluate(hidden) < 20, "the last question is in view"
    for button in ("#ask", "#stop", "#new"):
        assert tab.page.locator(button).evaluate("button => button.scrollWidth <= button.clientWidth"), button
    widths = []
    for name in ("Ask", "Blind"):
        tab.page.get_by_role("tab", name=name).click()
        tab.page.wait_for_timeout(300)
        tab.page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)  # to look at
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width, name
        widths.append(tab.page.locator("main").bounding_box()["width"])
    assert widths[0] == widths[1] > 0.8 * min(width, 1100)
    tab.close()


def test_a_password_is_asked_for_before_anything_is_shown(folder: Path) -> None:
    words = ["--model", folder / RUN, "--no-base", "--host", "0.0.0.0"]
    server, address = started(folder, *words, **{PASSWORD_VARIABLE: PASSWORD})
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor()
    )

    def config() -> str:
        return opener.open(f"{address}/config").read().decode()

    def log_in(password: str) -> int:
        data = urllib.parse.urlencode({"username": "any", "password": password}).encode()
        try:
            return opener.open(f"{address}/login", data).status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            config()
        assert log_in("wrong") == 400
        with pytest.raises(urllib.error.HTTPError, match="401"):
            config()
        assert log_in(PASSWORD) == 200
        assert "offspring" in config()
        assert PASSWORD not in (folder / "server.log").read_text()
    finally:
        server.terminate()
        server.wait(30)
