"""The web page in a real browser, against a real server with a tiny model."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    project: Project = make_project(tmp_path_factory.mktemp("project"))
    (project.model / "chat_template.jinja").write_text(TEMPLATE)
    adapter, port = project.model.parent / "adapter", free_port()
    exits = json.dumps([{"layer": 1}, {"layer": 3}])
    project.run("convert", "--input", project.model, "--to", "adapter", "--exits", exits, "--output", adapter)
    arguments = ("--model", project.model, "--adapter", adapter, "--port", port, "--model-name", "tiny")
    with project.start("serve", *arguments) as command:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert command.running, command.wait().stderr
            try:
                urllib.request.urlopen(f"{address}/ready")
                break
            except OSError:
                time.sleep(0.5)
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
    opened.goto(url)
    opened.wait_for_selector("#mode option:nth-child(4)", state="attached")
    yield opened
    context.close()
    # A refused request, which one of the tests provokes, is an error in the browser's log.
    assert [each for each in problems if "status of 400" not in each] == []
    assert elsewhere == []


def send(page: Any, text: str, tokens: int = 24) -> None:
    page.fill("#max-tokens", str(tokens))
    page.fill("#message", text)
    page.press("#message", "Enter")
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
    page.fill("#message", "Long")
    # In the page, since the answer may end before a key that is pressed from here arrives.
    page.evaluate(
        """() => new MutationObserver((_, observer) => {
          if (!document.querySelector("#log .text span")) return;
          observer.disconnect();
          document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
        }).observe(document.querySelector("#log"), { childList: true, subtree: true })"""
    )
    page.press("#message", "Enter")
    page.wait_for_selector("#log .facts:not(:empty)")
    assert "stopped" in page.inner_text("#log .facts")
    count = page.locator("#log .text span").count()
    assert count < 100
    # Full mode's answer has the same tokens and goes on.
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
    page.fill("#max-tokens", "16")
    page.fill("#message", "c")
    page.press("#message", "Enter")
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
    page.wait_for_selector("#mode option", state="attached")
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
    page.wait_for_selector("#mode option", state="attached")
    offered = page.eval_on_selector_all("#mode option", "options => options.map(each => each.value)")
    assert offered == ["default", "full", "speculative"]
    page.close()


def test_both_languages_have_the_same_texts() -> None:
    page = Path(__file__).resolve().parents[2] / "megatron_ee" / "serving" / "page" / "texts.js"
    english, japanese = re.split(r"\n  ja: \{", page.read_text(encoding="utf-8"))
    keys = [re.findall(r"^    (\w+):", part, re.MULTILINE) for part in (english, japanese)]
    assert len(keys[0]) > 30
    assert keys[0] == keys[1]
