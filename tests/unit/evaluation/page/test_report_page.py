"""The page of ``report``: what it says of which file, in both languages, and that it is sound HTML without loads."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.evaluation.page.svg import SYMBOLS

VOID = {"meta", "br", "link", "img", "input", "hr", "use", "path", "rect"}
LOADS = ("src", "href", "data", "poster", "srcset", "action", "background")


class Checked(HTMLParser):
    """Checks that tags are balanced and ids unique, and keeps text and what would be loaded."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.language: str | None = None
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), (tag, attrs)
        self.tags.add(tag)
        self.loads += [str(found[name]) for name in LOADS if name in found]
        self.loads += re.findall(r"url\(([^)]*)\)", str(found.get("style", "")))
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag == "html":
            self.language = found.get("lang")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:  # as in SVG
            return
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def checked(page: str) -> Checked:
    """The page, whose soundness is checked."""
    found = Checked(page)
    assert len(set(found.ids)) == len(found.ids)
    assert all(load.startswith("#") and load[1:] in found.ids for load in found.loads), found.loads
    assert "script" not in found.tags and not re.search(r"https?:|@import|//[a-z]", page)
    assert found.headings[0] == "h1" and found.headings.count("h1") == 1
    return found


@pytest.mark.smoke
def test_every_part_is_on_the_page_with_its_figures_and_files(files: Any) -> None:
    page = files.page(*files.all())
    text = checked(page).text
    assert page.startswith("<!DOCTYPE html>") and checked(page).language == "en"
    for expected in (
        "Early exit with tiny",
        "1.21×",  # the speed of the certificate's setting, not that of the fastest
        "−5.0 points",
        "at most 5%",
        "Guaranteed with 90% confidence: on average at most 5% of the answers differ from full mode's",
        "Of 100 calibrations like this one, at most 10 on average would state a bound that does not hold.",
        "about 95 of 100 intervals made like this would contain the true difference",
        "In them the speed of certified thresholds was between 1.00× and 1.50×.",
        "The measured speed varied much, from 1.00× to 1.50×.",
        "no group given",
        "384 texts, 20,483 tokens that count",
        "1 h 7 min",
        "processes: 2, on: CPU, 1 threads",
        "2.8 kWh",
        "9 March 2026",
        "These groups carry more risk than the others (Loss): south",
        "Too small to be judged: few (3).",
        "With certified thresholds, 3 of 4 answers differ from full mode's.",
        "Of these, 1 lost a right answer and 1 gained one.",
        "They differ from token 4 on.",
        "Alarm (1): in 200 audited requests the loss seems to be above the allowed 5%.",
        "25.0% of full mode's answers were cut at 24 tokens.",
        str(files.path("eval") / "tasks.json"),
        str(files.path("run") / "log.jsonl"),
    ):
        assert expected in text, expected
    assert page.count('<div role="img" aria-label="') == 4  # trade, agreement while tuning, tests, groups
    legends = re.findall(r'<svg class="swatch s(\d)"[^>]*><path d="([^"]+)"/></svg>([^<]+)</li>', page)
    assert [(name, int(series), path) for series, path, name in legends] == [
        (name, series, SYMBOLS[mark])
        for name, series, mark in [
            ("after layer 2", 1, "o"),
            ("thresholds", 1, "o"),
            ("the setting this page looks at", 2, "D"),
            ("other settings", 3, "s"),
            ("passed", 1, "o"),
            ("failed", 2, "X"),
            ("allowed loss", 2, "--"),
            ("mean and interval", 1, "o"),
            ("worse than the others", 2, "D"),
        ]
    ]


def test_every_file_is_listed_with_its_digest(files: Any) -> None:
    page = files.page(*files.all())
    listed = page[page.index('id="files"') :]
    read = ["run/config.json", "run/status.json", "run/log.jsonl", "train.json", "eval/answers.jsonl"]
    read += ["run/adapter-best/exits.json", "run/adapter-best/exits.safetensors", "eval/answers.jsonl.info.json"]
    for name in (*read, "eval/tasks.json", "evaluation.json", "certificate.json", "drift.json", "plan.json"):
        assert f"{files.path(name)}</" in listed and file_sha256(files.path(name))[:16] in listed, name


def test_the_page_is_in_japanese_too(files: Any) -> None:
    found = checked(files.page(*files.all(), "--language", "ja"))
    assert found.language == "ja"
    for expected in (
        "tiny の早期終了：効果とリスク",
        "1.21 倍",
        "信頼度 90% の保証：フルモードと違う回答の割合は、平均で 5% 以下です",
        "このような較正を 100 回行った場合、成り立たない上限を示してしまうのは、平均して多くても 10 回です。",
        "95% 信頼区間とは：",
        "2026年3月9日",
        "1 時間 7 分",
        "「保証付きのしきい値」では、4 件の回答のうち 3 件がフルモードと異なります。",
        "次のグループは、ほかよりリスクが大きくなっています（損失）：south",
    ):
        assert expected in found.text, expected
    assert "損失 (%)" not in found.text  # brackets are full width
    words = set(re.findall(r"[A-Za-z]{4,}", re.sub(r"(/[\w.-]+)+|--\w+", "", found.text)))
    english = {"speed", "quality", "answer", "answers", "setting", "full", "with", "Group", "Loss", "exit", "layer"}
    assert not words & english - {"full"}, words


def test_an_example_marks_the_first_word_that_differs(files: Any) -> None:
    page = files.page("--evaluation", files.path("eval"))
    assert re.search(r"The capital is <mark>.*?</span>Lima</mark>", page)
    assert re.search(r"The capital is <mark>.*?</span>Quito</mark><span class=\"rest\">, I think\.</span>", page)
    assert re.search(r"首都はパリで<mark>.*?</span>す</mark>", page)
    lost, gained = page.index('<bdi dir="auto">q1</bdi>'), page.index('<bdi dir="auto">q3</bdi>')
    assert lost < gained < page.index('<bdi dir="auto">q2</bdi>') and "q4</bdi>" not in page


@pytest.mark.parametrize("part", ["run", "eval", "certificate.json"])
def test_what_is_missing_is_left_out_and_the_page_says_how_to_get_it(files: Any, part: str) -> None:
    option = {"run": "--run", "eval": "--evaluation", "certificate.json": "--calibration"}[part]
    files.path("eval/answers.jsonl.info.json").unlink()  # which names a certificate: then it is asked for that one
    page = files.page(option, files.path(part))
    text = checked(page).text
    commands = {
        "run": "megatron-ee report --run RUN_DIRECTORY",
        "eval": "--tasks questions.jsonl",
        "certificate.json": "--data questions.jsonl --risk 0.05",
    }
    shown = {each for each in commands if commands[each] in text}
    # with a run or an evaluation alone, their own command is not needed; groups need no command where they are there
    assert part not in shown and shown == set(commands) - {part}


HOSTILE = {
    "tag": "</script></style><script>alert(1)</script><img src=x onerror=alert(1)>",
    "template": "{{ 7 * 7 }}{% raw %} {0} {name}",
    "direction": "\u202eevil\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "control": "a\x00\x1b[31mb\u0007\r",
    "long": "x" * 50_000,
    "empty": "",
    "math": "$\\frac{1}{0}$ &amp; <b>",
}


FAST = ("tag", "direction")


@pytest.mark.parametrize(
    "kind", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in HOSTILE]
)
def test_hostile_texts_stay_texts(files: Any, kind: str) -> None:
    text = HOSTILE[kind]
    content = json.loads(files.path("eval/tasks.json").read_text())
    for row in content["rows"]:
        row["prompt"], row["references"] = text, [text]
    for name in ("model", "adapter"):
        content[name] = text or "m"
    content["tasks"] = {text or "t": content["tasks"]["facts"], "more": content["tasks"]["more"]}
    for group in content["groups"]["calibrated"]["groups"]:
        group["name"] = text + group["name"]
    files.path("eval/tasks.json").write_text(json.dumps(content))
    lines = [json.loads(line) for line in files.path("eval/answers.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        if "answer" in line:
            line["answer"]["text"] = text + line["setting"]
    files.path("eval/answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files.change("certificate.json", task=text or "t")
    drift: dict[str, Any] = {"certificates": None}
    files.change("drift.json", **drift)
    page = files.page(*files.all(), *(("--title", text.replace("\x00", "")) if kind != "control" else ()))
    found = checked(page)
    assert found.tags.isdisjoint({"script", "img", "b"}) and "\u202e" not in page
    assert not re.search("[\x00-\x08\x0b\r\x1b]", page) and len(page) < 400_000
    if kind == "template":
        assert "{{ 7 * 7 }}{% raw %} {0} {name}" in found.text
    if kind == "direction":
        assert "\\u202eevil" in found.text and "\u05e9\u05dc\u05d5\u05dd" in found.text


@pytest.mark.slow
def test_a_page_has_the_same_bytes_each_time(files: Any) -> None:
    first = files.page(*files.all())
    assert files.page(*files.all()) == first
