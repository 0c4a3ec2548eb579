"""The web page in a real browser, against a real server with a tiny model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.testing.project import Project, make_project
from megatron_ee.testing.ranks import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
sync_api = pytest.importorskip("playwright.sync_api")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


KEYS = {"website": "5c1f" * 8, "lab": "77b0" * 8}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("project"))
    (project.model / "chat_template.jinja").write_text(TEMPLATE)
    exits, adapter = json.dumps([{"layer": 1}, {"layer": 3}]), project.model.parent / "adapter"
    project.run("convert", "--input", project.model, "--to", "adapter", "--exits", exits, "--output", adapter)
    return project


@contextlib.contextmanager
def served(project: Project, *options: object) -> Iterator[str]:
    """The address of a server."""
    port = free_port()
    model = ("--model", project.model, "--adapter", project.model.parent / "adapter", "--model-name", "tiny")
    with project.start("serve", *model, "--port", port, *options) as command:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert command.running, command.wait().stderr
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield address


@pytest.fixture(scope="module")
def url(project: Project) -> Iterator[str]:
    with served(project) as address:
        yield address


@pytest.fixture(scope="module")
def keyed_url(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with keys, of which one must name a task, and answers of at most 100 tokens."""
    root = tmp_path_factory.mktemp("keys")
    keys, rules = root / "keys.yaml", root / "rules.yaml"
    keys.write_text("".join(f'{name}: {{key: "{key}"}}\n' for name, key in KEYS.items()))
    keys.chmod(0o600)
    rules.write_text(
        "tasks: {a: {mode: threshold, threshold: 0.3}, b: {mode: full}, c: {mode: full}}\n"
        "keys: {lab: {tasks: [a, b]}}\n"
    )
    with served(project, "--api-key-file", keys, "--rules", rules, "--max-tokens", 100) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(locale="en-GB")
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    elsewhere: list[str] = []
    opened.on("request", lambda request: None if request.url.startswith(url) else elsewhere.append(request.url))
    opened.add_init_script(STALL)
    opened.goto(url)
    opened.wait_for_selector("#mode option:nth-child(4)", state="attached")
    yield opened
    context.close()
    # A refused request, which one of the tests provokes, is an error in the browser's log.
    assert [each for each in problems if "status of 400" not in each] == []
    assert elsewhere == []


STALL = """
  const fetched = window.fetch;
  window.fetch = async (url, options) => {
    const response = await fetched(url, options);
    if (!window.stalled || options.method !== "POST") return response;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    const first = () => /^[^]*?"layers":\\[\\d[^]*?\\n\\n/.exec(text);
    while (!first()) {
      const { value, done } = await reader.read();
      if (done) throw new Error("there is no token");
      text += value;
    }
    const body = new ReadableStream({
      start(controller) {
        controller.enqueue(new TextEncoder().encode(first()[0]));
        options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
      },
    });
    return new Response(body, { status: response.status, headers: response.headers });
  };
"""
"""While ``window.stalled`` is set, an answer stops after its first token until it is aborted."""


def event(text: str) -> str:
    """A token of a stream."""
    details = {"layers": [4], "confidences": [0.5], "pieces": [text]}
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "early_exit": details}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


DONE = "data: [DONE]\n\n"


def stream(page: Any, body: str) -> None:
    """Have the next answers be this stream."""
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=body),
    )


def inside(page: Any, selector: str) -> bool:
    """Whether the last element lies in the window, and above the form unless it belongs to it."""
    return bool(
        page.evaluate(
            """selector => {
              const found = [...document.querySelectorAll(selector)].at(-1), box = found.getBoundingClientRect();
              const form = document.querySelector("#form").getBoundingClientRect();
              const end = found.closest("form, aside") ? innerHeight : form.top;
              return box.height > 0 && box.top >= 0 && box.bottom <= end + 1;
            }""",
            selector,
        )
    )


def offered(page: Any, selector: str) -> list[str]:
    """Values of a select."""
    values: list[str] = page.eval_on_selector_all(f"{selector} option", "options => options.map(each => each.value)")
    return values


def ask(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def send(page: Any, text: str, tokens: int = 24) -> None:
    # Also where the settings are folded.
    page.locator("#max-tokens").evaluate("(field, value) => { field.value = value; }", str(tokens))
    ask(page, text)
    page.wait_for_selector("#log > li:last-child .answer .facts:not(:empty)")


def layers(page: Any) -> set[str]:
    """Tints of the tokens of the last answer."""
    return set(page.eval_on_selector_all("#log > li:last-child .text span", "s => s.map(e => e.style.cssText)"))


def test_an_answer_is_streamed_and_tinted_and_counted(page: Any) -> None:
    page.select_option("#mode", "threshold")
    page.fill("#threshold", "0.3")
    send(page, "Hello <b>there</b>")
    assert page.inner_text("#log .question") == "Hello <b>there</b>"
    assert page.locator("#log .text span").count() == 24
    assert re.search(r"24 tokens in [\d.]+ s .*of 4 layers per token", page.inner_text("#log .facts"))
    counts = [int(text.split()[0]) for text in page.locator("#histogram td.count").all_inner_texts()]
    assert sum(counts) == 24
    assert len(counts) == 3
    assert page.locator("#legend li").count() == 3


def test_a_threshold_that_nothing_reaches_leaves_no_token_to_the_exits(page: Any) -> None:
    page.select_option("#mode", "threshold")
    page.fill("#threshold", "1")
    send(page, "Hello")
    assert layers(page) == {"--tint: 0;"}
    page.fill("#threshold", "0.3")
    assert page.inner_text("#threshold-value") == "0.30"


def test_full_modes_answer_is_shown_beside_it_with_differences_marked(page: Any) -> None:
    page.select_option("#mode", "threshold")
    page.fill("#threshold", "0.3")
    send(page, "Compare")
    page.click("text=Compare with full mode")
    page.wait_for_selector(".verdict")
    boxes = page.locator("#log .answer")
    assert boxes.count() == 2
    early, full = (boxes.nth(index).locator(".text").inner_text() for index in (0, 1))
    marked = page.locator("#log .text span.differs").count()
    verdict = page.inner_text(".verdict")
    if early == full:
        assert (marked, verdict) == (0, "The answer is the same as full mode's.")
    else:
        assert marked > 0
        assert "Differs from full mode's from token" in verdict


def test_speculative_modes_answer_is_full_modes(page: Any) -> None:
    page.select_option("#mode", "speculative")
    send(page, "Compare")
    page.click("text=Compare with full mode")
    page.wait_for_selector(".verdict")
    assert page.inner_text(".verdict") == "The answer is the same as full mode's."


def test_tokens_are_reached_by_keyboard_and_pointer(page: Any) -> None:
    send(page, "Keys")
    page.focus("#log .text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#log .text span.current").count() == 1
    assert "confidence" in page.inner_text("#detail")
    page.locator("#log .text span:not(:empty)").last.hover()
    assert "layer" in page.inner_text("#detail")


def test_escape_stops_an_answer_and_the_conversation_goes_on(page: Any) -> None:
    def without_end(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route("**/v1/chat/completions", without_end)
    page.fill("#max-tokens", "100")
    page.evaluate("window.stalled = true")
    ask(page, "Long")
    page.wait_for_selector("#log .text span", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#log .facts:not(:empty)")
    assert "stopped" in page.inner_text("#log .facts")
    count = page.locator("#log .text span").count()
    assert count < 100
    # Full mode's answer has the same tokens and goes on.
    page.evaluate("window.stalled = false")
    page.click("text=Compare with full mode")
    page.wait_for_selector(".verdict")
    assert page.inner_text(".verdict") == f"The answer is the same as full mode's as far as both go ({count} tokens)."
    assert page.locator("#log .text span").count() > 2 * count and not page.locator(".differs").count()
    send(page, "Again", 4)
    assert page.locator("#log > li").count() == 2
    page.click("#clear")
    assert page.locator("#log > li").count() == 0


def test_a_new_conversation_forgets_the_answer_that_is_being_written(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # the server does not answer
    page.fill("#message", "Old")
    page.press("#message", "Enter")
    page.fill("#message", "Too early")
    page.press("#message", "Enter")
    assert page.locator("#log > li").count() == 1 and page.input_value("#message") == "Too early"
    page.click("#clear")
    page.wait_for_selector("#send:not([hidden])")
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "New", 4)
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "New"}]
    assert page.locator("#log > li").count() == 1


def test_the_end_of_an_answer_stays_in_view_until_the_reader_scrolls_away(page: Any) -> None:
    page.set_viewport_size({"width": 700, "height": 380})
    for text in ("a", "b"):  # short ones: the model has few positions
        send(page, text, tokens=16)
        page.wait_for_selector("#log > li:last-child button")
        end, form = (page.locator(each).bounding_box() for each in ("#log > li:last-child", "#form"))
        assert end["y"] + end["height"] <= form["y"] + 1, text
    assert page.evaluate("scrollY") > 0
    ask(page, "c")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_selector("#log > li:nth-child(3) button")
    assert page.evaluate("scrollY") == 0


def test_a_refused_request_is_explained_and_the_message_is_kept(page: Any) -> None:
    page.fill("#max-tokens", "4")
    page.fill("#message", "x" * 5000)
    with page.expect_response(lambda response: response.status == 400):
        page.press("#message", "Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "messages: has at least" in page.inner_text("#error")
    assert page.input_value("#message") == "x" * 5000


def test_the_page_speaks_japanese(browser: Any, url: str) -> None:
    context = browser.new_context(locale="ja-JP")
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#mode option:nth-child(4)", state="attached")
    assert page.get_attribute("html", "lang") == "ja"
    assert page.inner_text("#send") == "送信"
    assert "出口" in page.inner_text("#state")
    page.select_option("#language", "en")
    assert page.inner_text("#send") == "Send"
    context.close()


def test_it_fits_a_phone(browser: Any, url: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#mode option:nth-child(4)", state="attached")
    send(page, "Is a very-long-word-" + "that-goes-on-" * 4 + "cut?", 12)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    send_, clear_ = (page.locator(each).bounding_box() for each in ("#send", "#clear"))
    assert send_["y"] == clear_["y"]
    stream(page, event("word ") * 200 + DONE)
    ask(page, "Long")
    page.wait_for_selector("#log > li:nth-child(2) .facts:not(:empty)")
    page.click("summary")
    assert inside(page, "#mode") and page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("summary")
    assert not page.is_visible("#mode")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    context.close()


@pytest.mark.parametrize("rule", [{}, {"mode": "full"}])
def test_a_task_is_asked_with_the_settings_of_a_certificate_that_decides(
    browser: Any, url: str, rule: dict[str, str]
) -> None:
    page, bodies = browser.new_page(), []
    with urllib.request.urlopen(f"{url}/v1/exits") as response:
        found = json.load(response)
    found["rules"]["default"] = {"task": "faq"}
    found["rules"]["tasks"] = {"faq": {**rule, "certificate": {"decoding": {"max_tokens": 20}}}}
    page.route("**/v1/exits", lambda route: route.fulfill(json=found))
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.goto(url)
    page.wait_for_selector("#mode option:nth-child(2)", state="attached")
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    page.wait_for_selector("#log > li:last-child .answer .facts:not(:empty)")
    page.select_option("#mode", "threshold")
    send(page, "Again", 4)
    assert bodies[1]["early_exit"] == {"mode": "threshold", "threshold": 0.8, "uncertified": True}
    assert (bodies[0]["max_tokens"] == 20) == (not rule)
    assert bodies[0].get("temperature") == (0 if rule else None)
    page.close()


@pytest.mark.parametrize(
    "rules", [{"may_choose": False}, {"priority": "important"}, {"may_choose": False, "default": None}]
)
def test_thresholds_are_offered_to_keys_that_may_choose_them(browser: Any, url: str, rules: dict[str, Any]) -> None:
    page = browser.new_page()
    with urllib.request.urlopen(f"{url}/v1/exits") as response:
        found = json.load(response)
    found["rules"] |= rules
    page.route("**/v1/exits", lambda route: route.fulfill(json=found))
    page.goto(url)
    page.wait_for_selector("#mode option:nth-child(2)", state="attached")
    assert offered(page, "#mode") == ["default", "full", "speculative"]
    page.close()


def test_a_browser_asks_for_the_key(browser: Any, keyed_url: str) -> None:
    context = browser.new_context(http_credentials={"username": "me", "password": KEYS["website"]})
    page = context.new_page()
    page.goto(keyed_url)
    page.wait_for_selector("#mode option:nth-child(2)", state="attached")
    assert page.input_value("#max-tokens") == page.get_attribute("#max-tokens", "max") == "100"
    assert offered(page, "#task") == [
        "",
        "a",
        "b",
        "c",
    ]
    send(page, "Hello", 4)
    context.close()


def test_the_key_may_be_in_the_address(browser: Any, keyed_url: str) -> None:
    page = browser.new_page()
    page.goto(keyed_url.replace("//", f"//me:{KEYS['website']}@"))
    page.wait_for_selector("#mode option:nth-child(2)", state="attached")
    send(page, "Hello", 4)
    page.close()


def test_a_key_that_must_name_a_task_chooses_one(browser: Any, keyed_url: str) -> None:
    context = browser.new_context(http_credentials={"username": "me", "password": KEYS["lab"]})
    page, bodies = context.new_page(), []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.goto(keyed_url)
    page.wait_for_selector("#mode option:nth-child(2)", state="attached")
    assert offered(page, "#task") == ["a", "b"]
    send(page, "Hello", 8)
    page.select_option("#task", "b")
    send(page, "Hello", 8)
    assert layers(page) == {"--tint: 0;"}
    page.click("#log > li:last-child button")
    page.wait_for_selector(".verdict:not(:empty)")
    tasks = [{"task": "a"}, {"task": "b"}, {"task": "b", "mode": "full"}]
    assert [body["early_exit"] for body in bodies] == tasks
    context.close()


def test_a_long_conversation_leaves_detail_and_settings_in_view(page: Any) -> None:
    stream(page, event("word     ") * 300 + DONE)
    page.set_viewport_size({"width": 1280, "height": 720})
    for number in range(1, 4):
        ask(page, "Long")
        page.wait_for_selector(f"#log > li:nth-child({number}) button:enabled")
    assert inside(page, "#mode") and inside(page, "#histogram")
    page.evaluate("scrollTo(0, 0)")
    page.locator("#log > li:first-child .text span").first.hover()
    assert "layer 4" in page.inner_text("#detail") and inside(page, "#detail")
    page.locator("#log > li:first-child .text").focus()
    for key, times in (("ArrowLeft", 1), ("ArrowRight", 299)):
        for _ in range(times):
            page.keyboard.press(key)
    assert page.locator("#log > li:first-child .text span").last.get_attribute("class") == "current"
    assert inside(page, ".text span.current")
    beyond = """spans => spans.filter(each =>
      each.getBoundingClientRect().right > each.closest(".answer").getBoundingClientRect().right).length"""
    assert page.eval_on_selector_all(".text span", beyond) == 0


def test_screen_readers_hear_of_ends_and_the_focus_is_kept(page: Any) -> None:
    focus = "document.activeElement.id || document.activeElement.className"
    page.select_option("#mode", "threshold")
    page.evaluate("window.stalled = true")
    ask(page, "One")
    page.wait_for_selector("#log .text span", state="attached")
    assert page.get_attribute("#log .facts:empty", "role") == "status"
    page.focus("#threshold")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not([hidden])")
    assert page.evaluate(focus) == "threshold"
    page.evaluate("window.stalled = false")
    page.focus("#log button")
    page.keyboard.press("Enter")
    page.wait_for_selector(".verdict:not(:empty)")
    page.wait_for_function("document.activeElement.matches('.verdict[role=status]')")
    for name in ("Answer", "Full mode's answer"):
        assert page.get_by_role("group", name=name, exact=True).count() == 1
    page.fill("#message", "Two")
    page.click("#send")
    page.wait_for_selector("#log > li:nth-child(2) button:enabled")
    assert page.evaluate(focus) == "message"


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ('data: {"error": {"message": "too late", "code": "timeout"}}\n\n', "The server refused the request: too late"),
        ("data: <html>\n\n", "The answer broke off before its end."),
        ("", "The answer broke off before its end."),
    ],
)
def test_half_an_answer_belongs_to_the_conversation(page: Any, end: str, message: str) -> None:
    stream(page, event("Half ") + event("of it") + end)
    ask(page, "My name is Ann.")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == message and inside(page, "#error")
    assert re.search(r"^2 tokens .* stopped$", page.inner_text("#log .facts")) and page.input_value("#message") == ""
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "Who am I?", 4)
    assert [each["content"] for each in sent.value.post_data_json["messages"]] == [
        "My name is Ann.",
        "Half of it",
        "Who am I?",
    ]


def test_an_error_before_the_first_token_does_not_overwrite_what_is_typed(page: Any) -> None:
    held: list[Any] = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    for typed, kept in (("", "First"), ("Second", "Second")):
        ask(page, "First")
        page.fill("#message", typed)
        while not held:
            page.wait_for_timeout(20)
        held.pop().fulfill(status=200, headers={"content-type": "text/event-stream"}, body="data: <html>\n\n")
        page.wait_for_selector("#error:not([hidden])")
        assert page.input_value("#message") == kept and page.locator("#log > li").count() == 0
        assert page.is_visible("#introduction")
    page.click("#clear")
    assert not page.is_visible("#error")


def test_a_start_that_failed_is_made_up_for(browser: Any, url: str) -> None:
    page, problems = browser.new_page(locale="en-GB"), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    throws = "get() { throw new DOMException('', 'SecurityError'); }"
    page.add_init_script(f"Object.defineProperty(window, 'localStorage', {{ {throws} }})")
    busy = {"message": "512 requests are open", "type": "server_error", "param": None, "code": "too_many_requests"}
    page.route("**/v1/exits", lambda route: route.fulfill(status=503, json={"error": busy}))
    page.goto(url)
    page.wait_for_selector("#state:not(:empty)")
    ask(page, "Hello")
    page.wait_for_selector("#error:not([hidden])")
    assert "512 requests are open" in page.inner_text("#error") and page.input_value("#message") == "Hello"
    page.unroute("**/v1/exits")
    send(page, "Hello", 4)
    assert page.inner_text("#state") == "ready, 2 exits" and page.locator("#mode option").count() == 4
    page.select_option("#language", "ja")
    assert page.inner_text("#send") == "送信" and page.get_attribute("#histogram th", "title") == "第 1 層の後の出口"
    assert problems == []
    page.close()


def test_keys_of_a_japanese_composition_neither_send_nor_stop(page: Any) -> None:
    press = """([key, fields]) => document.querySelector("#message").dispatchEvent(
      new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...fields }))"""
    page.fill("#message", "こんにち")
    page.evaluate(press, ["Enter", {"keyCode": 229}])  # Safari's
    page.evaluate(press, ["Enter", {"isComposing": True}])
    assert page.locator("#log > li").count() == 0
    page.evaluate("window.stalled = true")
    page.press("#message", "Enter")
    page.wait_for_selector("#log .text span", state="attached")
    page.evaluate(press, ["Escape", {"isComposing": True}])
    page.evaluate(press, ["Escape", {"keyCode": 229}])
    assert page.is_visible("#stop")
    page.evaluate(press, ["Escape", {}])
    page.wait_for_selector("#send:not([hidden])")


def test_a_comparison_waits_its_turn_and_may_be_stopped(page: Any) -> None:
    send(page, "One", 4)
    page.route("**/v1/chat/completions", lambda route: None)  # the server does not answer
    ask(page, "Two")
    assert page.is_disabled("#log > li:first-child button")
    page.click("#stop")
    page.wait_for_selector("#log > li:nth-child(2) .facts:not(:empty)")
    assert page.locator("#log > li:nth-child(2) button").count() == 0, "there is nothing to compare"
    page.click("text=Compare with full mode")
    page.click("#stop")
    page.wait_for_selector("#log button:enabled")
    assert page.inner_text("#log button") == "Compare with full mode"
    assert page.locator("#log > li:first-child .answer").count() == 1 and page.locator(".verdict").count() == 0


def test_both_languages_have_the_same_texts() -> None:
    page = Path(__file__).resolve().parents[2] / "megatron_ee" / "serving" / "page" / "texts.js"
    english, japanese = re.split(r"\n  ja: \{", page.read_text(encoding="utf-8"))
    keys = [re.findall(r"^    (\w+):", part, re.MULTILINE) for part in (english, japanese)]
    assert len(keys[0]) > 30
    assert keys[0] == keys[1]
