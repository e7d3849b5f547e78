"""The page, driven in headless Chromium as a person would: a file or the camera, questions, labels, on any width.

EMOLLAMA_SCREENSHOTS names a folder for pictures of it.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.serve.conftest import serving

WIDTHS = {1280: 900, 390: 844}
FLAGS = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
WAIT_MS = 180_000
MESSAGES = "#chat [data-testid=user], #chat [data-testid=bot]"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'emollama_jax[test]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(engine):
    pytest.importorskip("gradio", reason="no gradio: pip install 'emollama_jax[serve]'")
    with serving(engine, with_demo=True) as server:
        yield server.url


@pytest.fixture
def shoot(tmp_path):
    folder = Path(os.environ.get("EMOLLAMA_SCREENSHOTS") or tmp_path)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png", full_page=True)


@pytest.fixture(params=WIDTHS)
def page(browser, address, request):
    size = {"width": request.param, "height": WIDTHS[request.param]}
    context = browser.new_context(viewport=size, permissions=["camera", "microphone"])
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.hosts = set()
    page.on("request", lambda asked: page.hosts.add(asked.url.split("/")[2] if "://" in asked.url else "local"))
    page.goto(address)
    page.wait_for_selector("#emotion")
    yield page
    assert page.hosts <= {address.removeprefix("http://"), "local"}  # nothing comes from elsewhere
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


def messages(page) -> list[str]:
    return page.locator(MESSAGES).all_inner_texts()


def type_words(page, words: str) -> None:
    """What is said in the clip; a new clip empties the field, which a machine may do late."""
    for _ in range(20):
        page.fill("#subtitle textarea", words)
        page.wait_for_timeout(2000)
        if page.input_value("#subtitle textarea") == words:
            return


def wait_for_messages(page, count: int) -> list[str]:
    """What is said, once the last of so many messages is whole."""
    page.wait_for_function(
        f"count => document.querySelectorAll('{MESSAGES}').length >= count"
        " && !document.querySelector('#emotion').disabled",
        arg=count,
    )
    return messages(page)


@pytest.mark.slow
def test_an_upload_is_asked_about(page, engine, videos, shoot):
    page.set_input_files("#clip input[type=file]", videos[0])
    page.wait_for_selector("#clip video")
    type_words(page, "Oh no.")
    page.click("#emotion")
    said = wait_for_messages(page, 2)
    expected = engine.replace(orders=3).label(videos[0], subtitle="Oh no.")
    assert said[1].strip() == f"{expected.label} ({expected.probabilities[expected.label]:.0%})"
    page.wait_for_selector("#seen >> text=/frame [0-9]+ of/")  # the last to come
    bars = page.get_attribute("#bars .emo-bars", "aria-label")
    assert bars == ", ".join(f"{label} {p:.0%}" for label, p in expected.probabilities.items())
    assert page.locator("#bars .emo-spread").count() == len(expected.probabilities)
    assert page.locator(".emo-seen img").count() == 2 and page.locator(".emo-seen svg").count() == 1
    page.wait_for_selector("#seen >> text=“Oh no.” (typed)")
    page.fill("#question textarea", "Are you sure?")
    page.press("#question textarea", "Enter")
    assert wait_for_messages(page, 4)[2].strip() == "Are you sure?"
    page.wait_for_function("document.querySelector('#question textarea').value === ''")
    page.click("#reason")
    assert len(wait_for_messages(page, 6)) == 6
    shoot(page, f"upload-{page.viewport_size['width']}")


@pytest.mark.slow
def test_labels_are_typed_and_an_example_is_taken(page, shoot):
    page.click("#emotion")
    page.wait_for_selector("text=no clip yet")
    page.locator("button.gallery-item").first.click()
    page.wait_for_selector("#clip video")
    page.fill("#labels input", "calm, tense")
    page.press("#labels input", "Enter")
    page.click("#emotion")
    wait_for_messages(page, 2)
    page.wait_for_selector("#seen >> text=/frame [0-9]+ of/")
    bars = page.get_attribute("#bars .emo-bars", "aria-label")
    assert {part.split()[0] for part in bars.split(", ")} == {"calm", "tense"}
    shoot(page, f"example-{page.viewport_size['width']}")


@pytest.mark.slow
def test_a_recording_of_the_camera_is_asked_about(page, shoot):
    for seconds in (3, 6, 12):  # a busy machine's made-up camera and microphone may give nothing for some time
        page.goto(page.url)
        page.click("#clip button[aria-label='Capture from camera']")
        page.click("#clip button:has-text('Access Webcam')")
        page.click("#clip button:has-text('Record')")
        page.wait_for_timeout(1000 * seconds)
        page.click("#clip button:has-text('Stop')")
        page.wait_for_selector("#clip video[src*='/file=']")
        page.click("#emotion")
        wait_for_messages(page, 2)
        page.wait_for_selector("#seen .emo-seen")
        seen = page.inner_text("#seen")
        if "s of sound" in seen and re.search("frame [0-9]+ of", seen):
            return shoot(page, f"recording-{page.viewport_size['width']}")
    pytest.fail(f"no picture or no sound: {seen}")
