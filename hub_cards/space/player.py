"""The player as HTML: tracks that switch at the same instant, and what they look like under one moving line.

Sound and pictures are in the page itself as data, so that no file of anybody's clip lies on the server.
"""

import base64
import html
import io
import json
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.image import imsave
from torch import Tensor

from hub_cards.space.studio import Studio, Take, Track

SCORES = ("kbit/s", "STOI ↑", '<span title="multi-scale mel distance">mel ↓</span>')
WIDEST = 1200
"""Columns of a spectrogram; a longer clip shares them."""
WINDOW, FLOOR_DB, TOP_DB = 1024, -75.0, -15.0


def show_take(studio: Studio, take: Take) -> str:
    """Everything about one clip: player, spectrograms, codes, facts, downloads."""
    has_original = take.tracks[0].bitrate is None
    spectra = [_url("image/png", spectrogram(studio, track.audio)) for track in take.tracks]
    strips = _strip("Original", spectra[0], "original") if has_original else ""
    strips += _strip("", spectra[-1], "chosen") + _strip("Codes", _url("image/png", code_image(studio, take)), "codes")
    body = (
        f'<div class="strips">{strips}<div class="line"></div></div>{_facts(studio, take)}{_downloads(studio, take)}'
    )
    return _player(studio, take.tracks, len(take.tracks) - 1, body, spectra, len(take.codes))


def show_blind(studio: Studio, tracks: Sequence[Track]) -> str:
    """Tracks under letters and nothing else."""
    named = [track._replace(label=letter(index)) for index, track in enumerate(tracks)]
    return _player(studio, named, 0, "", [], 0)


def show_answer(tracks: Sequence[Track], choice: str | None) -> str:
    """Which letter was which, with rates and scores."""
    rows = ""
    for index, track in enumerate(tracks):
        mark = ' class="best"' if letter(index) == choice else ""
        heart = " ♥ your choice" if letter(index) == choice else ""
        name = f"Mimi, {track.label}" if track.num_quantizers else track.label
        rows += f"<tr{mark}><th>{letter(index)}</th><td>{html.escape(name)}{heart}</td>{_scores(track)}</tr>"
    return _table(["", "codec", *SCORES], rows)


def letter(index: int) -> str:
    """A, B, C ... of a track in a blind test."""
    return chr(ord("A") + index)


def notice(text: str) -> str:
    """A sentence about what went wrong."""
    return f'<p class="notice" role="alert">{html.escape(text)}</p>' if text else ""


@torch.inference_mode()
def spectrogram(studio: Studio, audio: Tensor) -> bytes:
    """Log mel magnitudes of a wave (L,) as a PNG, low frequencies at the bottom."""
    mel = studio.mel_distance.mel(audio[None], WINDOW)[0]
    if len(mel) > WIDEST:
        mel = torch.nn.functional.adaptive_avg_pool1d(mel.T[None], WIDEST)[0].T
    level = 20 * mel.clamp(min=1e-9).log10()
    shade = ((level - FLOOR_DB) / (TOP_DB - FLOOR_DB)).clamp(0, 1)
    return _png(colormaps["magma"](shade.T.flip(0).numpy()))


def code_image(studio: Studio, take: Take) -> bytes:
    """Codes (K, T) as a PNG of as many pixels, the first codebook on top."""
    return _png(colormaps["viridis"](take.codes.numpy() / (studio.config.codebook_size - 1)))


def _player(
    studio: Studio, tracks: Sequence[Track], chosen: int, body: str, spectra: Sequence[str], num_quantizers: int
) -> str:
    buttons = "".join(
        f'<button type="button" role="radio" aria-checked="{str(index == chosen).lower()}" data-track="{index}">'
        f"<b>{html.escape(track.label)}</b>{_rate(track) if body else ''}</button>"
        for index, track in enumerate(tracks)
    )
    sounds = "".join(
        f'<audio preload="auto" data-track="{index}" src="{_url("audio/flac", studio.flac(track.audio))}"></audio>'
        for index, track in enumerate(tracks)
    )
    facts = {
        "chosen": chosen,
        "spectra": spectra,
        "levels": [track.num_quantizers for track in tracks],
        "codebooks": num_quantizers,
    }
    return (
        f'<section class="mimi-player" data-facts="{html.escape(json.dumps(facts))}">'
        '<div class="transport"><button type="button" class="play" aria-label="Play"><span></span></button>'
        '<output class="time"></output></div>'
        f'<div class="tracks" role="radiogroup" aria-label="What to hear">{buttons}</div>{body}{sounds}</section>'
    )


def _strip(title: str, url: str, kind: str) -> str:
    return f'<figure class="{kind}"><img alt="" src="{url}"><figcaption>{title}</figcaption><i></i></figure>'


def _rate(track: Track) -> str:
    return f"<small>{track.bitrate / 1000:.2f} kbit/s</small>" if track.bitrate else "<small>as it came</small>"


def _table(header: Sequence[str], rows: str) -> str:
    cells = "".join(f"<th>{cell}</th>" for cell in header)
    return f'<table class="facts"><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>'


def _scores(track: Track) -> str:
    rate = "&ndash;" if track.bitrate is None else f"{track.bitrate / 1000:.2f}"
    values = [
        "&ndash;" if value is None or np.isnan(value) else f"{value:.2f}" for value in (track.stoi, track.mel_distance)
    ]
    return "".join(f"<td>{value}</td>" for value in [rate, *values])


def _facts(studio: Studio, take: Take) -> str:
    rows = ""
    for track in take.tracks:
        if track.bitrate is not None:
            size = track.bitrate * take.codes.shape[1] / studio.config.frame_rate / 8
            rows += f"<tr><th>{track.label}</th>{_scores(track)}<td>{size:,.0f} B</td></tr>"
    original = 2 * take.seconds * studio.config.sampling_rate
    encoding = "" if take.encode_s is None else f"encoded in {1000 * take.encode_s:.0f} ms, "
    spent = (take.encode_s or 0) + take.decode_s
    return (
        _table(["", *SCORES, "size"], rows)
        + f'<p class="small">{take.seconds:.1f} s, {original:,.0f} B as 16-bit samples; {encoding}decoded in '
        f"{1000 * take.decode_s:.0f} ms: {take.seconds / spent:.0f} &times; real time. Live, a frame of "
        f"{1000 / studio.config.frame_rate:.0f} ms is all the codec waits for.</p>"
    )


def _downloads(studio: Studio, take: Take) -> str:
    level = len(take.codes)
    files = [
        ("codes.safetensors", f"Codes ({level})", _url("application/octet-stream", take.codes_file)),
        (f"codebooks_{level}.flac", "Audio", _url("audio/flac", studio.flac(take.tracks[-1].audio))),
    ]
    links = "".join(f'<a download="{name}" href="{url}">{text}</a>' for name, text, url in files)
    return f'<p class="downloads"><span>Download</span>{links}</p>'


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
