"""The page in headless Chromium, as a person uses it: by mouse, by keyboard, in light and in dark."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from streaming_endpoint import GOOD, Reply, StreamingEndpoint
from test_web import Page

from her_nemo.data.sources import read_rows

pytest.importorskip("websockets", reason="driving Chromium needs websockets")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
# Pictures are kept where a person can look at them: HER_NEMO_PICTURES=DIR.
PICTURES = os.environ.get("HER_NEMO_PICTURES")


def script(request, number: int) -> Reply:
    name = request["messages"][0]["content"].split(" from ")[0].removeprefix("You are ")
    return Reply(GOOD.replace("Kit Holt", name).replace("drum", f"drum {number}"), seconds=0.01)


class Seen:
    """The page, and what a test asks of it."""

    def __init__(self, browser: Browser, page: Page, endpoint: StreamingEndpoint, out: Path) -> None:
        self.browser, self.page, self.endpoint, self.out = browser, page, endpoint, out

    def picture(self, name: str) -> None:
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            self.browser.picture(Path(PICTURES) / f"{name}.png")

    def turns(self, count: int) -> list[str]:
        """What is to be read of each turn, once there are so many and nothing is coming in."""
        self.browser.wait(
            f"document.querySelectorAll('.turn').length === {count} && !document.querySelector('.coming')"
            " && !document.querySelector('#go').disabled && !document.querySelector('.editor')"
        )
        script = "[...document.querySelectorAll('.turn .body')].map(e => e.innerText)"
        return [" ".join(text.split()) for text in self.browser.run(script)]


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[Seen]:
    with StreamingEndpoint(script) as endpoint:
        page = Page(endpoint.url, tmp_path / "chat", "scene=0")
        try:
            with Browser(tmp_path) as browser:
                browser.scheme("light")
                browser.open(f"{page.base}/#{page.token}")
                yield Seen(browser, page, endpoint, tmp_path / "chat")
                assert browser.console == []  # no error, nothing that the content policy had to stop
        finally:
            page.close()


FOLDED = "▸ Plan · developer's view ▸ Thought nods Listen, the drum {} is mine."
FOLDED = FOLDED.replace("▸ ", "")  # the mark is drawn by the style sheet


def test_talking_folding_and_choosing_the_better_of_two(seen: Seen) -> None:
    browser = seen.browser
    assert seen.turns(2) == ["Tell me about the drum.", FOLDED.format(0)]
    assert browser.run("location.hash") == ""  # the token does not stay in the address
    assert browser.text("#cast") == "tiny plays Kit Holt, you are Pia Penn"
    seen.picture("1-folded")
    browser.click("#fold-thoughts")
    assert "I hide the mask." in seen.turns(2)[1]
    assert "Pia Penn pries." not in seen.turns(2)[1]
    browser.click("#fold-plans")
    assert "Pia Penn pries." in seen.turns(2)[1]
    assert "developer's view: no character knows them" in browser.text("#plan-note")
    seen.picture("2-unfolded")
    browser.click("#fold-thoughts")
    browser.click("#fold-plans")
    browser.click("details.role_thinking summary")  # one alone
    assert "I hide the mask." in seen.turns(2)[1]

    browser.run("document.querySelector('#text').focus()")
    browser.type("*bows* I only ask.")
    browser.key("Enter")
    assert seen.turns(4)[2:] == ["bows I only ask.", FOLDED.format(1)]
    told = seen.endpoint.requests[1]["messages"]
    assert told[-1]["content"] == "Pia Penn: <role_action>bows</role_action> I only ask."

    browser.click(".acts button", "A/B")
    browser.wait("document.querySelectorAll('#compare .primary').length === 2")
    seen.picture("3-compare")
    browser.scheme("dark")
    seen.picture("4-compare-dark")
    browser.scheme("light")
    shown = browser.run("[...document.querySelectorAll('#compare .body')].map(e => e.innerText)")
    second = next(index for index, text in enumerate(shown) if "drum 2" in text)
    browser.click("#compare .primary", f"{'AB'[second]} is better")
    browser.wait("document.querySelector('#compare').hidden")
    assert seen.turns(4)[3] == FOLDED.format(2)
    pairs, report = read_rows(seen.out / "pairs.jsonl", "pairs")
    assert report.total == 0
    assert ("drum 2" in pairs[0]["chosen"], "drum 1" in pairs[0]["rejected"], len(pairs)) == (True, True, 1)
    assert pairs[0]["messages"] == told


def test_both_sides_edits_and_the_way_back_by_keyboard_alone(seen: Seen) -> None:
    browser = seen.browser
    seen.turns(2)

    def tab_to(condition: str) -> None:
        """Tab until what has the focus fulfils a condition on `e`."""
        for _ in range(60):
            if browser.run(f"(e => Boolean({condition}))(document.activeElement)"):
                return
            browser.key("Tab")
        raise AssertionError(f"no way by Tab to {condition}")

    # The lead's turn by hand.
    tab_to("e.id === 'speaker'")
    browser.run("(e => { e.value = 'Kit Holt'; e.dispatchEvent(new Event('change')); })(document.activeElement)")
    tab_to("e.innerText === 'Thought'")
    browser.key("Enter")
    browser.type("Not yet.")
    assert browser.run("document.querySelector('#text').value") == "<role_thinking>Not yet.</role_thinking>"
    browser.run("(e => { e.selectionStart = e.selectionEnd = e.value.length; })(document.querySelector('#text'))")
    browser.type(" Wait.")
    browser.key("Enter")
    assert seen.turns(3)[2] == "Thought Wait."
    assert len(seen.endpoint.requests) == 1  # the model was not asked for what a person wrote

    # The other side by the model.
    tab_to("e.id === 'partner'")
    browser.key("Enter")
    assert seen.turns(4)[3] == FOLDED.format(1)
    assert "mask" not in json.dumps(seen.endpoint.requests[1]["messages"])

    # Mending what the model wrote.
    tab_to("e.dataset.key === '1:Edit'")
    browser.key("Enter")
    browser.wait("document.activeElement.tagName === 'TEXTAREA' && document.activeElement.id === ''")
    browser.run("document.activeElement.select()")
    browser.type("<system_thinking>p</system_thinking>Kit Holt: Mended.")
    seen.picture("5-edit")
    browser.key("Enter", modifiers=2)
    assert seen.turns(4)[1].endswith("Mended.")
    browser.wait("document.querySelector('[data-turn=\"1\"] .who').innerText.includes('edited by you')")

    # Back to what the model wrote, and the comparison of the two, by the keys.
    tab_to("e.dataset.key === '1:‹'")
    browser.key("Enter")
    browser.wait("document.querySelector('[data-turn=\"1\"] .acts').innerText.includes('1 of 2')")
    assert seen.turns(4)[1] == FOLDED.format(0)
    tab_to("e.dataset.key === '1:Compare'")
    browser.key("Enter")
    browser.wait("document.querySelectorAll('#compare .primary').length === 2")
    texts = browser.run("[...document.querySelectorAll('#compare .body')].map(e => e.innerText)")
    browser.key("ab"[next(index for index, text in enumerate(texts) if "Mended" in text)])
    browser.wait("document.querySelector('#compare').hidden")
    assert seen.turns(4)[1].endswith("Mended.")
    pairs, _ = read_rows(seen.out / "pairs.jsonl", "pairs")
    assert (pairs[0]["chosen_by"], pairs[0]["rejected_by"]) == ("edit", "model")

    # Export, and back.
    tab_to("e.id === 'export'")
    browser.key("Enter")
    browser.wait("document.querySelector('#status').innerText.includes('2 samples in')")
    seen.picture("6-export")
    rows, _ = read_rows(seen.out / "samples.jsonl", "sft")
    assert [row["written_by"] for row in rows] == ["edit", "person"]
    tab_to("e.id === 'back'")
    browser.key("Enter")
    seen.turns(3)


def test_a_reply_is_stopped_and_its_markup_stays_text(seen: Seen) -> None:
    browser = seen.browser
    seen.turns(2)
    evil = "Kit Holt: <img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> "
    seen.endpoint.script = lambda request, number: Reply(evil + "word " * 4000, seconds=0.02)
    browser.click("#go")
    browser.wait("document.querySelector('.coming .body')?.innerText.includes('word')")
    assert "onerror" in browser.text(".coming .body")
    browser.run("document.querySelector('#text').focus()")
    browser.key("Escape")
    seen.turns(3)
    assert browser.run("document.title") == "Kit Holt · her_nemo chat"
    assert "cut off before its end" in browser.text("[data-turn='2'] .problem")
    assert seen.endpoint.hung_up.wait(10)
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0


def test_scenes_are_searched_and_narrow_windows_are_served(seen: Seen) -> None:
    browser = seen.browser
    seen.turns(2)
    browser.click("#open-scenes")
    browser.wait("document.querySelector('#scenes').open")
    browser.type("lena marsh")
    browser.wait("document.querySelectorAll('#scene-list button').length === 1")
    browser.click("#scene-list button")
    seen.picture("7-scenes")
    browser.click("#begin .primary", "Begin")
    browser.wait("document.title.startsWith('Lena Marsh')")
    assert seen.turns(4)[2] == "I blame you for the sword."
    browser.resize(390, 780)
    browser.scheme("dark")
    seen.picture("8-narrow-dark")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    # A reload finds the conversation again, and a second tab that is older is told so.
    browser.open(seen.page.base)
    assert len(seen.turns(4)) == 4
    seen.page.session = seen.page.http.get("/api/state").json()["session"]
    seen.page.call("rewind", turns=1)
    browser.click("#back")
    browser.wait("document.querySelector('#status').innerText.includes('changed elsewhere')")
    seen.turns(1)
    browser.console.clear()  # the browser notes the 409


def test_without_the_token_the_page_says_what_is_missing(seen: Seen) -> None:
    seen.turns(2)
    seen.browser.run("sessionStorage.clear()")
    seen.browser.open(seen.page.base)
    seen.browser.wait("document.querySelector('#welcome').innerText.includes('whole address')")
    assert "turn" not in seen.browser.text("#turns")
    seen.browser.console.clear()  # the browser notes the 401
