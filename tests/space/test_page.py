"""The page of `mimi app` in a real browser, whose microphone is a file, as a visitor uses it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import soundfile
import soxr
from conftest import lacking, speech

pytestmark = pytest.mark.slow
PLAYER = "#result .mimi-player"
ROOT = Path(__file__).parents[2]
CLIP = ROOT / "tests" / "data" / "nathalie_1110.flac"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_S = 120


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of `mimi app`, and the folder for everything that it writes."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_mimi.cli", "app", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_TEMP_DIR": str(folder / "gradio")}
    process = subprocess.Popen(command, cwd=folder, env=environment)
    address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + START_S
    try:
        while True:
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.5)
        yield address, folder
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Debian's chromium, which hears the sample clip whenever a page asks for the microphone."""
    if CHROMIUM is None:
        lacking("needs chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    microphone = tmp_path_factory.mktemp("microphone") / "clip.wav"
    audio, rate = soundfile.read(CLIP)
    soundfile.write(microphone, soxr.resample(audio, rate, 48_000), 48_000)
    switches = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    switches += [f"--use-file-for-fake-audio-capture={microphone}", "--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Open the page as a new visitor; an error in its scripts fails the test."""
    contexts, errors = [], []

    def open_page(width: int = 1280, height: int = 900):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server[0])
        page.wait_for_selector("#result .mimi-player[data-track='4']")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def clip(path, seconds: float, seed: int = 5):
    soundfile.write(path, speech(int(seconds * 24_000), seed=seed)[0, 0].numpy(), 24_000)
    return str(path)


def durations(page, player: str = PLAYER) -> list[float]:
    """Seconds that the audio elements hold, once they know."""
    found = f"[...document.querySelectorAll('{player} audio')].map((sound) => sound.duration)"
    page.wait_for_function(f"(() => {{ const all = {found}; return all.length && all.every(isFinite); }})()")
    return page.evaluate(found)


def upload(page, path: str, seconds: float) -> None:
    page.set_input_files("#upload input[type=file]", path)
    wanted = f"Math.abs(document.querySelector('{PLAYER} audio')?.duration - {seconds}) < 0.01"
    page.wait_for_function(wanted)


def picture(page) -> str:
    return page.get_attribute(f"{PLAYER} .chosen img", "src")


def test_upload_codebooks_pictures_sound_and_download(visit, tmp_path):
    page = visit()
    before = picture(page)
    upload(page, clip(tmp_path / "talk.wav", 6.0), 6.0)
    assert durations(page) == pytest.approx([6.0] * 5, abs=0.01)
    assert picture(page) != before
    full = picture(page)
    page.click(f"{PLAYER} .tracks button >> text=1 codebook")
    assert picture(page) != full
    assert page.get_attribute(f"{PLAYER} .codes i", "style") == "height: 87.5%;"
    # switching while it plays goes on at the same instant
    page.click(f"{PLAYER} .play")
    page.wait_for_function(f"document.querySelectorAll('{PLAYER} audio')[1].currentTime > 0.4")
    page.click(f"{PLAYER} .tracks button >> text=Original")
    instant = page.evaluate(f"document.querySelectorAll('{PLAYER} audio')[0].currentTime")
    stopped = page.evaluate(f"document.querySelectorAll('{PLAYER} audio')[1].currentTime")
    assert -0.05 < instant - stopped < 0.5  # a browser rounds where it sets a sound down
    assert (
        page.evaluate(f"[...document.querySelectorAll('{PLAYER} audio')].map((s) => s.paused)") == [False] + [True] * 4
    )
    # fewer codebooks
    slider = page.locator("#codebooks input[type=range]")
    slider.focus()
    for _ in range(6):
        slider.press("ArrowLeft")
    slider.dispatch_event("pointerup")
    page.wait_for_selector(f"{PLAYER}[data-track='2']")
    with page.expect_download() as download:
        page.click(f"{PLAYER} .downloads a >> text=Codes")
    codes = tmp_path / download.value.suggested_filename
    download.value.save_as(codes)
    page.set_input_files("#upload input[type=file]", str(codes))  # there is room for it
    page.wait_for_selector(f"{PLAYER}[data-track='1']")  # of codes there is no original
    assert durations(page) == pytest.approx([6.0] * 2, abs=0.01)


def test_recording(visit):
    page = visit()
    before = picture(page)
    page.click("#record button:has-text('Record')")
    page.wait_for_timeout(2000)
    page.click("#record button:has-text('Stop')")
    page.wait_for_function(f"document.querySelector('{PLAYER} .chosen img').src !== {before!r}")
    assert 1 < durations(page)[0] < 5


def test_a_wrong_file_gets_a_sentence_and_nothing_is_lost(visit, tmp_path):
    page = visit()
    shown = picture(page)
    (tmp_path / "essay.wav").write_text("this is not a wave")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "essay.wav"))
    page.wait_for_selector("#notice .notice")
    text = page.inner_text("#notice")
    assert text.startswith("essay.wav is neither speech nor codes that can be read here")
    assert "Traceback" not in page.content()
    assert picture(page) == shown
    page.set_input_files("#upload input[type=file]", clip(tmp_path / "long.wav", 61))
    page.wait_for_selector("#notice .notice >> text=this page takes up to 60 s")
    page.click("#bundled")
    page.wait_for_selector("#notice .notice", state="hidden")


def test_a_blind_comparison(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.click("#shuffle")
    page.wait_for_selector("#blind .mimi-player[data-track='0']")
    assert durations(page, "#blind .mimi-player") == pytest.approx([4.0] * 7, abs=0.05)
    assert "codec2" not in page.inner_html("#blind").split("base64")[0]
    page.get_by_label("C", exact=True).check()
    page.click("#reveal")
    page.wait_for_selector("#revealed table")
    answers = page.inner_text("#revealed")
    assert all(
        name in answers for name in ("Original", "8 codebooks", "opus 6 kbit/s", "codec2 1200 bit/s", "your choice")
    )


def test_live_gives_sound_and_its_latency(visit):
    page = visit()
    page.get_by_role("tab", name="Live").click()
    page.click(".mimi-live button")
    page.wait_for_function("document.querySelector('.mimi-live').dataset.frames > 25")
    assert float(page.evaluate("document.querySelector('.mimi-live').dataset.loudness")) > 0.005
    assert page.inner_text("[data-fact=delay]").endswith(" ms")
    assert "real time" in page.inner_text("[data-fact=speed]")
    page.click(".mimi-live button")
    page.wait_for_selector(".mimi-live[data-state=off]")


def test_two_visitors_do_not_mix_and_nothing_is_kept(visit, server, tmp_path):
    anna, bert = visit(), visit()
    upload(anna, clip(tmp_path / "anna.wav", 1.5, seed=1), 1.5)
    upload(bert, clip(tmp_path / "bert.wav", 2.0, seed=2), 2.0)
    for page, level in ((anna, 1), (bert, 2)):
        slider = page.locator("#codebooks input[type=range]")
        slider.focus()
        for _ in range(8 - level):
            slider.press("ArrowLeft")
        slider.dispatch_event("pointerup")
    anna.wait_for_selector(f"{PLAYER}[data-track='1']")
    bert.wait_for_selector(f"{PLAYER}[data-track='2']")
    assert durations(anna) == pytest.approx([1.5] * 2, abs=0.01)
    assert durations(bert) == pytest.approx([2.0] * 3, abs=0.01)
    time.sleep(0.5)
    left = [path.name for path in server[1].rglob("*") if path.is_file() and path.suffix != ".json"]
    assert not [name for name in left if name.endswith((".wav", ".flac", ".safetensors", ".webm"))], left


def test_on_a_phone_nothing_is_wider_than_the_screen(visit):
    page = visit(390, 844)
    for name in ("Listen", "Compare", "Live"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
