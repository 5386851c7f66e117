"""The demo in Chromium, served as a Hugging Face Space would serve it: the files of the Space, and `python app.py`."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from ports import free_port

import dspark_hf
from dspark_hf.evaluation.prompts import encode

gr = pytest.importorskip("gradio", reason="the demo needs the extra `demo`")
playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")

from dspark_hf.demo.load import LONGEST_SECONDS  # noqa: E402  (imports gradio)

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> ${1 + 1} {{value}}"
SHORT, LONG = "What is 3 times 4?", "Tom has 3 boxes with 12 pencils each. How many pencils has he?"
# What a visitor may have to wait for on a busy machine.
SECONDS = 60
# How often something is tried that chance may spoil.
ATTEMPTS = 6


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> str:
    """Address of the running Space."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(ROOT / "demo", folder, dirs_exist_ok=True)
    for package in (ROOT / "dspark_hf", ROOT / "kernels" / "torch-ext" / "dspark_kernels"):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    port = free_port()
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": ""}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield _answering(f"http://127.0.0.1:{port}", server, folder / "log")
        finally:
            server.terminate()
            server.wait()
    assert "Traceback" not in (folder / "log").read_text()


def _answering(address: str, server: subprocess.Popen, log: Path) -> str:
    for _ in range(10 * SECONDS):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address)
            return address
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        playwright.expect.set_options(timeout=1000 * SECONDS)
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, space):
    """Opens the page as a new visitor. What the page complains about to its console is an error of the test."""
    contexts, complaints = [], []

    def open_page(tab: str = "Race", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(space)
        page.get_by_role("tab", name=tab).click()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def send(page, text: str) -> None:
    page.fill("#chat-input textarea", text)
    page.click("#chat-send")


def wait_for(page, selector: str, *words: str) -> str:
    """The text of an element once it holds one of the words."""
    page.wait_for_function(
        "([selector, words]) => words.some(word => document.querySelector(selector)?.innerText.includes(word))",
        arg=[selector, words],
    )
    return page.inner_text(selector)


def figure(page, numbers: str, name: str) -> str:
    """A number of a row of numbers, once it is there."""
    cell = page.locator(f"{numbers} .figures > div", has=page.locator(f"span:text-is('{name}')"))
    playwright.expect(cell.locator("b")).not_to_have_text("-")
    return cell.locator("b").inner_text()


def figures_reach(page, numbers: str, least: dict[str, int]) -> None:
    """Wait until numbers of a row of numbers are at least so large, all at once."""
    page.wait_for_function(
        "([numbers, least]) => { const shown = Object.fromEntries("
        "[...document.querySelectorAll(`${numbers} .figures > div`)]"
        ".map(cell => [cell.querySelector('span').innerText, Number(cell.querySelector('b').innerText)]));"
        "return Object.entries(least).every(([name, number]) => shown[name] >= number) }",
        arg=[numbers, least],
    )


def words(text: str) -> list[str]:
    return text.split()


@pytest.fixture(scope="module")
def answers():
    """What plain generate says to a prompt."""
    model, _, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)

    def answer(prompt: str) -> str:
        inputs = encode([prompt], tokenizer, model.device)
        ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True)

    return answer


def test_the_page_asks_nobody_else(visit, space):
    """It works without the network: nothing is asked of other servers."""
    page = visit()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_selector("#race-start")
    page.wait_for_timeout(500)
    assert asked and all(url.startswith((space, "data:", "blob:")) for url in asked)


def test_race(visit):
    page = visit()
    page.click("#race-start")
    verdict = wait_for(page, "#race-verdict", "identical", "BROKEN", "rounding")
    speedup = re.search(r"identical: the same \d+ tokens, one by one, at ([\d.]+)x", verdict).group(1)
    assert float(speedup) > 1
    wait_for(page, "#race-verdict", "Replay")
    assert wait_for(page, "#race-verdict", "identical").endswith(verdict.splitlines()[-1])
    assert figure(page, "#race-dspark-numbers", "speed-up") == f"{speedup}x"
    assert float(figure(page, "#race-dspark-numbers", "tau")) > 1
    texts = [page.input_value(f"#{side} textarea") for side in ("race-plain", "race-dspark")]
    assert texts[0] == texts[1] and len(texts[0]) > 100


def test_chat_of_two_turns(visit, answers):
    page = visit("Chat")
    send(page, SHORT)
    first = page.locator("#chat-history .bot.message")
    playwright.expect(first).to_have_count(1)
    wait_for(page, "#chat-history", words(answers(SHORT))[-1])
    assert words(answers(SHORT)) == words(first.first.inner_text())
    send(page, "And what is 5 times 4?")
    playwright.expect(first).to_have_count(2)
    playwright.expect(page.locator("#chat-history .user.message")).to_have_count(2)
    assert float(figure(page, "#chat-numbers", "tau")) >= 1


def test_the_stop_button_stops(visit):
    page = visit("Chat")
    page.locator("input[type=number]:visible").nth(0).fill("1.5")
    page.locator("input[type=number]:visible").nth(2).fill("504")
    page.keyboard.press("Tab")
    told = page.get_by_text("Stopped.")

    def stop() -> bool:
        playwright.expect(told).to_have_count(0)
        page.click("#chat-clear")
        playwright.expect(page.locator("#chat-history .bot.message")).to_have_count(0)
        send(page, LONG)
        try:
            page.wait_for_function("document.querySelector('#chat-history .bot.message')?.innerText.length > 20")
            page.click("#chat-stop")
            told.first.wait_for(timeout=5000)
        except playwright.TimeoutError:
            return False
        return True

    # A sample may end by itself before it is stopped.
    assert any(stop() for _ in range(ATTEMPTS))
    count = figure(page, "#chat-numbers", "tokens")
    assert 0 < int(count) < 504
    page.wait_for_timeout(600)
    assert figure(page, "#chat-numbers", "tokens") == count


def heights(page, plot: str, color: str) -> list[float]:
    """Of the points of a line, from left to right."""
    path = page.get_attribute(f"#{plot} .mark-line path[stroke='{color}']", "d")
    return [-float(y) for y in re.findall(r"[ML][-\d.]+,([-\d.]+)", path)]


def test_ten_requests_join_and_leave_and_the_chart_rises(visit):
    page = visit("Load")
    page.fill("#load-level input[type=number]", "10")
    page.press("#load-level input[type=number]", "Enter")
    page.click("#load-start")
    # As one, two, four and eight users came before.
    page.wait_for_function("document.querySelectorAll('#load-batch .row').length === 10")
    # Between two of its requests a user has none in the batch.
    figures_reach(page, "#load-numbers", {"in the batch": 8})
    joined, left = (int(figure(page, "#load-numbers", name)) for name in ("joined", "left"))
    figures_reach(page, "#load-numbers", {"joined": joined + 10, "left": left + 10})
    line = "document.querySelector(\"#load-speeds .mark-line path[stroke='#12a150']\").getAttribute('d')"
    page.wait_for_function(f"{line}.split('L').length === 5")
    speeds = heights(page, "load-speeds", "#12a150")
    assert speeds[-1] > speeds[0] and max(speeds) == max(speeds[2:])
    assert float(figure(page, "#load-numbers", "tau")) > 1
    assert float(figure(page, "#load-numbers", "DSpark tokens/s")) > 0
    assert float(figure(page, "#load-numbers", "plain tokens/s")) > 0
    assert len(heights(page, "load-lengths", "#e8833a")) == 5
    page.click("#load-stop")
    wait_for(page, "#load-batch", "Stopped.")


def test_chat_decodes_beside_the_load(visit, answers):
    """In one batch, and says the same."""
    busy, page = visit("Load"), visit("Chat")
    busy.click("#load-start")
    # One user alone may be between two requests when the answer is over.
    busy.wait_for_function("document.querySelectorAll('#load-batch .row').length >= 4")
    send(page, SHORT)
    wait_for(page, "#chat-history", words(answers(SHORT))[-1])
    assert int(figure(page, "#chat-numbers", "others in the batch")) >= 1
    assert words(answers(SHORT)) == words(page.locator("#chat-history .bot.message").inner_text())
    assert busy.locator("#load-batch .row").count() >= 1
    busy.click("#load-stop")


def test_two_visitors_get_their_own_texts(visit, answers):
    pages = {prompt: visit("Chat") for prompt in (SHORT, LONG)}
    for prompt, page in pages.items():
        send(page, prompt)
    for prompt, page in pages.items():
        wait_for(page, "#chat-history", "####")
        page.wait_for_timeout(500)
        assert words(page.locator("#chat-history .bot.message").inner_text()) == words(answers(prompt))
        assert page.locator("#chat-history .user.message").inner_text().strip() == prompt


def test_a_closed_tab_frees_the_model(visit):
    """Long before what runs in it would have ended by itself."""
    busy, next_one = visit("Load"), visit()
    started = time.monotonic()
    busy.click("#load-start")
    busy.wait_for_selector("#load-batch .row")
    next_one.click("#race-start")
    next_one.wait_for_timeout(500)
    assert "Measuring" not in next_one.inner_text("#race-verdict")
    busy.context.close()
    wait_for(next_one, "#race-verdict", "Measuring")
    assert time.monotonic() - started < LONGEST_SECONDS


@pytest.mark.parametrize("tab, field, button", [
    ("Race", "#race-prompt textarea", "#race-start"),
    ("Chat", "#chat-input textarea", "#chat-send"),
    ("Inside a round", "#rounds-prompt textarea", "#rounds-start"),
])  # fmt: skip
def test_a_prompt_that_is_too_long_gets_the_message(visit, tab, field, button):
    page = visit(tab)
    page.fill(field, "many words " * 1000)
    page.click(button)
    message = page.get_by_test_id("toast-body")
    message.wait_for()
    assert "takes 512 tokens" in message.inner_text() and "Traceback" not in page.inner_text("body")


def test_rounds_are_shown_and_gone_through(visit):
    page = visit("Inside a round")
    page.click("#rounds-start")
    page.wait_for_selector("#rounds-strips .strip")
    count = page.locator("#rounds-strips .strip").count()
    assert figure(page, "#rounds-numbers", "rounds") == str(count) and count > 3
    page.wait_for_selector("#rounds-plot .mark-line path")
    correction = page.locator("#rounds-text span.correction").first
    correction.hover()
    tip = correction.get_attribute("data-tip")
    assert re.fullmatch(r"round \d+: correction by the target, instead of .+", tip)
    page.fill("#rounds-count input[type=number]", "2")
    page.keyboard.press("Tab")
    playwright.expect(page.locator("#rounds-strips .strip")).to_have_count(2)


def test_prompts_are_text(visit):
    """In every tab that shows a prompt, markup is neither run nor rendered."""
    page = visit()
    page.fill("#race-prompt textarea", HOSTILE)
    page.click("#race-start")
    wait_for(page, "#race-verdict", "identical")
    page.get_by_role("tab", name="Chat").click()
    send(page, HOSTILE)
    page.wait_for_selector("#chat-history .bot.message")
    assert page.locator("#chat-history .user.message").inner_text().strip() == HOSTILE
    page.get_by_role("tab", name="Inside a round").click()
    page.fill("#rounds-prompt textarea", HOSTILE)
    page.click("#rounds-start")
    page.wait_for_selector("#rounds-strips .strip")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[onerror], img[src=x]").count() == 0


def test_outputs_are_text(browser):
    """The same for what a model writes, with components as the tabs use them and tokens that spell markup."""
    from dspark_hf.demo import chat, rounds

    _, _, tokenizer = dspark_hf.embedded_pair()
    tokens = tokenizer.encode(HOSTILE)
    one = rounds.Round(tokens, [0.5] * len(tokens), len(tokens), len(tokens), tokens[0])
    told = rounds.Trace(tokens[0], [one], [1.0], len(tokens))

    class DemoSession:
        pass

    session = DemoSession()
    session.tokenizer = tokenizer
    with gr.Blocks(analytics_enabled=False) as app:
        gr.HTML(rounds.text(session, told, 1) + rounds.strips(session, told, 1), elem_id="html")
        gr.Chatbot(chat.shown([{"role": "assistant", "content": HOSTILE}]), **chat.AS_TEXT, elem_id="bot")
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#bot .bot.message")
        page.wait_for_timeout(300)
        assert page.locator("#bot .bot.message").inner_text().strip() == HOSTILE
        assert "<script>window.hacked = 1</script>" in page.inner_text("#html .tokens")
        assert "${1 + 1} {{value}}" in page.inner_text("#html .tokens")
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[onerror], img[src=x]").count() == 0
        page.close()
    finally:
        app.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows(visit, width):
    """No tab is wider than the window."""
    page = visit(viewport={"width": width, "height": 900})
    for tab in ("Race", "Chat", "Inside a round", "Load"):
        if not page.get_by_role("tab", name=tab).is_visible():
            page.locator("button.overflow-menu, .overflow-menu button").first.click()
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
