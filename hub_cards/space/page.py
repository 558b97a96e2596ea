"""The page itself: what is where, and what happens when something is pressed."""

import html
import random
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import gradio as gr

from hub_cards.space.player import letter, notice, show_answer, show_blind, show_take
from hub_cards.space.studio import MAX_SECONDS, ClipError, Source, Studio, Track

STATIC = Path(__file__).parent / "static"
CLIP = Path(__file__).parents[2] / "tests" / "data" / "nathalie_1110.flac"
KEEP_S = 600
"""How long a visitor's clip stays in memory after its last use."""
FONTS = ["system-ui", "sans-serif"]


def theme() -> gr.themes.ThemeClass:
    """Colours of Gradio, fonts of the system: the page needs nothing from elsewhere."""
    return gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"])


def scripts() -> str:
    """What the players need, for the head of the page."""
    return "".join(f"<script>{path.read_text(encoding='utf-8')}</script>" for path in sorted(STATIC.glob("*.js")))


def fragment(file: str, **facts: object) -> gr.HTML:
    """A piece of the page that is a file, with facts filled in."""
    text = Template((STATIC / file).read_text(encoding="utf-8"))
    escaped = {key: fact if key == "options" else html.escape(str(fact)) for key, fact in facts.items()}
    return gr.HTML(text.substitute(escaped), apply_default_css=False)


def build(studio: Studio) -> gr.Blocks:
    """Make the page for a studio."""
    config = studio.config
    most, rate = config.num_quantizers, config.bitrate(config.num_quantizers) / 1000
    with gr.Blocks(title="Mimi", analytics_enabled=False, delete_cache=(60, 60)) as page:
        frame_ms = f"{1000 / config.frame_rate:g}"
        fragment("head.html", frame_ms=frame_ms, codebooks=most, kbits=f"{rate:.1f}", name=studio.name)
        source = gr.State(time_to_live=KEEP_S)
        with gr.Tab("Listen"):
            _listen(studio, source, page)
        with gr.Tab("Compare"):
            _compare(studio, source)
        with gr.Tab("Live"):
            options = "".join(
                f'<option value="{level}"{" selected" * (level == most)}>{level} codebook{"s" * (level > 1)}</option>'
                for level in range(config.least_quantizers, most + 1)
            )
            fragment("live.html", options=options)
    return page.queue(max_size=32, default_concurrency_limit=2)


def _empty(name: str) -> gr.HTML:
    return gr.HTML(elem_id=name, apply_default_css=False)


def _listen(studio: Studio, source: gr.State, page: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            record = gr.Audio(sources=["microphone"], type="filepath", label="Record", elem_id="record")
            text = f"Upload, up to {MAX_SECONDS} s"
            upload = gr.File(label=text, height=160, elem_id="upload")
            bundled = gr.Button("Take the bundled clip", elem_id="bundled")
            least, most = studio.config.least_quantizers, studio.config.num_quantizers
            slider = gr.Slider(least, most, value=most, step=1, label="Codebooks", elem_id="codebooks")
        with gr.Column(scale=3, min_width=320):
            message, result = _empty("notice"), _empty("result")

    unchanged = gr.skip(), gr.skip(), gr.skip(), None  # and room for the next file

    def show(found: Source, level: int) -> tuple[Any, ...]:
        return found, "", show_take(studio, studio.process(found, level)), None

    def take(path: str | None, level: int) -> tuple[Any, ...]:
        if path is None:
            return unchanged
        try:
            return show(studio.read(Path(path)), level)
        finally:
            Path(path).unlink(missing_ok=True)

    def again(found: Source | None, level: int) -> tuple[Any, ...]:
        return show(found or studio.read(CLIP), level)

    outputs = [source, message, result, upload]
    for event, function, inputs in (
        (record.stop_recording, take, [record, slider]),
        (upload.upload, take, [upload, slider]),
        (bundled.click, lambda level: show(studio.read(CLIP), level), [slider]),
        (slider.release, again, [source, slider]),
        (page.load, again, [source, slider]),
    ):
        event(_spoken(function, unchanged), inputs, outputs, api_visibility="private", show_progress_on=result)


def _compare(studio: Studio, source: gr.State) -> None:
    gr.Markdown(
        "The clip of the first tab through several codecs, in an order that nobody knows. Choose what sounds best, "
        "then see which it was."
    )
    answer = gr.State(time_to_live=KEEP_S)
    begin = gr.Button("Shuffle", variant="primary", elem_id="shuffle")
    message, blind = _empty("blind-notice"), _empty("blind")
    choice = gr.Radio([], label="Sounds best", visible=False, elem_id="choice")
    reveal = gr.Button("Reveal", visible=False, elem_id="reveal")
    revealed = _empty("revealed")

    def shuffle(found: Source | None) -> tuple[Any, ...]:
        tracks, missing = studio.rivals(found or studio.read(CLIP), random.randrange(2**31))
        letters = [letter(index) for index in range(len(tracks))]
        radio = gr.update(choices=letters, value=None, visible=True)
        return tracks, notice(" ".join(missing)), show_blind(studio, tracks), radio, gr.update(visible=True), ""

    def show(tracks: list[Track] | None, chosen: str | None) -> str:
        return show_answer(tracks, chosen) if tracks else notice("Shuffle again: too much time has passed.")

    outputs = [answer, message, blind, choice, reveal, revealed]
    begin.click(
        _spoken(shuffle, (gr.skip(),) * 6), [source], outputs, api_visibility="private", show_progress_on=blind
    )
    reveal.click(show, [answer, choice], revealed, api_visibility="private")


def _spoken(function: Callable[..., tuple[Any, ...]], unchanged: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """The same, but what is wrong with a clip is said on the page, in the second output; the others stay."""

    def speak(*inputs: Any) -> tuple[Any, ...]:
        try:
            return function(*inputs)
        except ClipError as error:
            return unchanged[0], notice(str(error)), *unchanged[2:]

    return speak
