"""The front page and that of the API in a real browser, on the running platform."""

from __future__ import annotations

import subprocess
from io import BytesIO
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import expect

from tests.e2e.chromium import chromium

#: How long a result may take to arrive on the page, in ms.
PATIENCE_MS = 30_000

#: What Chromium says of every answer that is an error, also of those that are shown.
STATUS = "Failed to load resource: the server responded with a status of"

#: Returns every visible text whose contrast with its ground is below WCAG's AA.
LOW_CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const [a, b] = [light(style.color), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) low.push(`${element.textContent.trim()}: ${ratio}`);
  }
  return low;
}"""

#: Returns every form control without a name that assistive technology could say.
UNNAMED = """() => [...document.querySelectorAll("input, textarea, select, button, canvas")]
  .filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim())
  .map((e) => e.outerHTML)"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser, platform):
    """Open the page; at the end, nothing may have gone wrong in it."""
    contexts, complaints, hosts = [], [], set()

    def opened(path="/", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(platform.url + path)
        if path == "/":
            expect(page.locator("#connection")).to_have_text("live")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith(STATUS)] == []
    assert hosts - {""} <= {urlsplit(platform.url).netloc}, "the page needs no other host"


@pytest.fixture
def page(open_page):
    return open_page()


def card(page, model):
    return page.locator(f".card[data-model={model}]")


def run(card, button="Run"):
    card.get_by_role("button", name=button).click()
    expect(card.locator(".pill[data-state=queued]")).to_have_count(0, timeout=PATIENCE_MS)
    return card.locator(".result")


def test_page_shows_every_model_and_that_it_is_ready(page):
    names = page.locator(".card h2").all_text_contents()
    assert {"digits", "echo", "embed", "mock", "sentiment"} <= set(names)
    for state in page.locator(".state .word").all():
        expect(state).to_have_text("ready")
    expect(page.locator("#ready-count")).to_have_text(str(len(names)))


def test_policy_allows_nothing_inline_and_no_other_host(page):
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy


def test_text_is_classified(page):
    sentiment = card(page, "sentiment")
    sentiment.get_by_label("text").fill("What a lovely day, I am so happy!")
    result = run(sentiment)
    expect(result.locator(".pill")).to_have_text("✓ done")
    expect(result.locator(".verdict")).to_have_text("positive")
    expect(result.locator(".bars .bar")).to_have_count(2)
    expect(result.locator(".legend")).to_contain_text("inference")
    expect(result).to_contain_text("Rode in a batch of")
    expect(page.get_by_role("status")).to_contain_text("sentiment: positive")


def test_drawn_digit_is_recognised(page):
    digits = card(page, "digits")
    box = digits.locator("canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.15)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.85, steps=8)
    page.mouse.up()
    expect(run(digits).locator(".verdict")).to_have_text("1")


def test_chosen_picture_is_shown_and_recognised(page):
    picture = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(picture).ellipse((18, 8, 46, 56), outline=0, width=8)
    file = BytesIO()
    picture.save(file, "PNG")
    digits = card(page, "digits")
    digits.locator("input[type=file]").set_input_files(
        {"name": "zero.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    expect(digits.get_by_alt_text("The chosen picture")).to_be_visible()
    expect(run(digits).locator(".verdict")).to_have_text("0")


def test_missing_picture_is_said_before_anything_is_sent(page):
    result = run(card(page, "digits"))
    expect(result).to_contain_text("Draw a digit or choose a picture first.")


def test_numbers_are_given_as_json(page):
    digits = card(page, "digits")
    digits.get_by_label("pixels", exact=True).check()
    expect(run(digits).locator(".verdict")).to_have_text("0")
    digits.get_by_label("pixels as JSON").fill("[1, 2")
    expect(run(digits)).to_contain_text("pixels is not valid JSON")
    digits.get_by_label("pixels as JSON").fill("[1, 2]")
    expect(run(digits)).to_contain_text("shape")


def test_version_can_be_chosen(page):
    digits = card(page, "digits")
    digits.get_by_role("button", name="Sample").click()
    digits.get_by_label("version").select_option("1")
    expect(run(digits)).to_contain_text("version 1")


def test_embedding_is_drawn(page):
    result = run(card(page, "embed"))
    expect(result.locator(".verdict")).to_have_text("384 dimensions")
    expect(result.locator(".plot rect")).to_have_count(96)


def test_whatever_comes_back_is_shown_as_text(page):
    evil = "<img src=x onerror=\"document.title='taken'\"><script>alert(1)</script>"
    echo = card(page, "echo")
    echo.get_by_label("text").fill(evil)
    result = run(echo)
    expect(result).to_contain_text(evil)
    expect(result.locator("img, script")).to_have_count(0)
    assert page.title() == "Inferno"


def test_failure_is_explained(page):
    mock = card(page, "mock")
    mock.get_by_label("text").fill("poison!")
    result = run(mock)
    expect(result.locator(".pill")).to_have_text("✗ failed")
    assert result.locator(".answer.error").text_content()


def test_sixty_four_at_once_show_the_batches_they_rode_in(page):
    result = run(card(page, "mock"), "Send 64 at once")
    expect(result).to_contain_text("64 tasks rode in")
    expect(result.locator(".swarm i[data-done]")).to_have_count(64)
    sizes = [int(size) for size in result.locator(".batches li").all_text_contents()]
    assert sum(sizes) == 64
    assert max(sizes) > 1


def test_result_arrives_after_the_socket_was_lost(page):
    page.evaluate("results.socket.close()")
    expect(page.locator("#connection")).to_have_text("lost")
    expect(run(card(page, "echo")).locator(".pill")).to_have_text("✓ done")
    expect(page.locator("#connection")).to_have_text("live")


def test_same_request_as_curl_gets_the_same_answer(page):
    echo = card(page, "echo")
    echo.get_by_label("text").fill('it\'s "quoted"')
    echo.get_by_role("button", name="Copy as curl").click()
    command = echo.get_by_label("The request as a curl command").input_value()
    answer = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60
    )
    assert '"it\'s \\"quoted\\""' in answer.stdout
    assert '"status":"succeeded"' in answer.stdout


def test_keyboard_is_enough(page):
    text = card(page, "echo").get_by_label("text")
    text.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Typed.")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(card(page, "echo").locator(".result")).to_contain_text("Typed.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_controls_have_names(open_page, scheme):
    page = open_page(color_scheme=scheme)
    run(card(page, "sentiment"))
    run(card(page, "mock"), "Send 64 at once")
    run(card(page, "digits"))
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.evaluate(UNNAMED) == []


def test_narrow_screen_needs_no_scrolling_sideways(open_page):
    page = open_page(viewport={"width": 320, "height": 640})
    for model in ("sentiment", "embed", "echo"):
        run(card(page, model))
    run(card(page, "mock"), "Send 64 at once")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


# The page of the API


def operation(page, name):
    """Open one operation of the page."""
    block = page.locator(f"#operations-{name}")
    block.locator(".opblock-summary-control").click()
    return block


def try_out(block):
    """Execute an operation, and return the answer that is shown."""
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table .response").first
    expect(answer.locator(".response-col_status")).to_contain_text("200")
    return answer


def test_front_page_leads_to_a_page_on_which_routes_can_be_tried(page):
    page.get_by_role("link", name="API").click()
    expect(page).to_have_title("Inferno API")

    predict = operation(page, "infer-infer_predict_echo")
    predict.get_by_role("button", name="Try it out").click()
    predict.locator("textarea.body-param__text").fill('{"inputs": {"text": "from the page"}}')
    expect(try_out(predict)).to_contain_text("from the page")

    active = operation(page, "models-models_active")
    active.get_by_role("button", name="Try it out").click()
    active.get_by_placeholder("name").fill("digits")
    expect(try_out(active)).to_contain_text('"name": "digits"')


def test_page_of_the_api_can_be_read_in_both_schemes_and_on_a_narrow_screen(open_page):
    page = open_page("/docs")
    predict = operation(page, "infer-infer_predict_sentiment")
    predict.get_by_role("button", name="Try it out").click()
    expect(predict.locator("textarea.body-param__text")).to_contain_text("inputs")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        dark = page.locator("html.dark-mode")
        expect(dark).to_have_count(1 if scheme == "dark" else 0)
        assert page.evaluate(LOW_CONTRAST) == [], scheme
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
