"""When each phone of an English corpus is spoken, for ABX: transcripts aligned with the audio by PocketSphinx.

    python -m training.evaluation.phones DATASET --split test --where language=en -o test.item

The file is in the format of the ZeroSpeech challenges: a line per phone with file, onset and offset in seconds, the
phone, the phones before and after it, and the speaker. Clips with words unknown to the dictionary are left out.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from num2words import num2words
from pocketsphinx import Decoder
from tqdm import tqdm

from modeling_mimi.audio_files import atomic
from training.config import SourceConfig

from .clips import Clip, choose, decode

RATE = 16_000
FRAME_S = 0.01
SILENCES = {"SIL", "+SPN+", "+NSN+"}
HEADER = "#file onset offset #phone prev-phone next-phone speaker"
WORST_SCORE = -1000
"""Log-likelihood below which a phone is taken to be misplaced."""


class Phone(NamedTuple):
    """A stretch of speech."""

    label: str
    onset_s: float
    offset_s: float


def spelled(text: str) -> list[str]:
    """The words of a transcript as a dictionary has them: lower case, numbers spelled out."""
    text = re.sub(r"\d+", lambda number: f" {num2words(int(number[0]))} ", text.lower())
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text)


def align(decoder: Decoder, audio: np.ndarray, text: str) -> list[Phone]:
    """The phones of a clip (L,) at 16 kHz with silences between.

    Raises:
        ValueError: The dictionary lacks a word, or text and audio do not fit.
    """
    words = spelled(text)
    if not words or (missing := [word for word in words if decoder.lookup_word(word) is None]):
        raise ValueError(f"no pronunciation of {', '.join(missing)}" if words else "no text")
    pcm = (32767 * audio).astype(np.int16).tobytes()
    decoder.set_align_text(" ".join(words))
    try:
        _process(decoder, pcm)
        decoder.set_alignment()  # words are placed; now the phones in them
        _process(decoder, pcm)
    except RuntimeError as error:
        raise ValueError("text and audio do not fit") from error
    phones = [phone for word in decoder.get_alignment() for phone in word]
    if any(phone.score / max(phone.duration, 1) < WORST_SCORE for phone in phones):
        raise ValueError("text and audio do not fit")
    return [Phone(p.name, p.start * FRAME_S, (p.start + p.duration) * FRAME_S) for p in phones]


def _process(decoder: Decoder, pcm: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()


def item_lines(name: str, phones: list[Phone], speaker: str) -> Iterator[str]:
    """Lines of an item file for the phones of a clip, silences left out."""
    labels = ["SIL", *(phone.label for phone in phones), "SIL"]
    for before, phone, after in zip(labels, phones, labels[2:], strict=False):
        if phone.label not in SILENCES:
            yield f"{name} {phone.onset_s:.2f} {phone.offset_s:.2f} {phone.label} {before} {after} {speaker}"


def main() -> None:
    """Align a corpus and write its item file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--speaker-column", default="speaker")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    where = {column: [value] for column, _, value in (condition.partition("=") for condition in args.where)}
    source = SourceConfig(args.dataset, split=args.split, where=where)
    decoder, lines, left_out = Decoder(lm=None, loglevel="FATAL"), [HEADER], 0
    for clip in tqdm(decode(choose(source, None), RATE, 60.0), desc="align", unit="clip"):
        if not isinstance(clip, Clip):
            continue
        try:
            phones = align(decoder, clip.audio, str(clip.row[args.text_column] or ""))
        except ValueError as reason:
            left_out += 1
            tqdm.write(f"Left out {clip.name}: {reason}.", file=sys.stderr)
            decoder = Decoder(lm=None, loglevel="FATAL")  # one that has failed stays in the middle of its clip
            continue
        lines += item_lines(clip.name, phones, str(clip.row[args.speaker_column]))
    with atomic(args.output) as part:
        part.write_text("\n".join(lines) + "\n")
    print(f"{len(lines) - 1} phones in {args.output}; {left_out} clips left out.")


if __name__ == "__main__":
    main()
