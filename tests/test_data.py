"""The data stream: what windows are, every epoch shared out exactly, resuming bit for bit, broken items skipped."""

import io
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from datasets import Audio, Features, Value

from modeling_mimi import MimiFeatureExtractor
from training.config import DataConfig, SourceConfig
from training.data import Clip, DataError, WindowLoader, load_clips
from training.sources import Share, keyed, open_source, read_piece
from training.windows import Reader

ROOT = Path(__file__).parent.parent

SPEECH = Path(__file__).parent / "data"
RATE = 24_000


def write_clip(path: Path, number: int, seconds: float = 0.25, rate: int = RATE, channels: int = 1) -> Path:
    """A clip that can be recognised: every sample of clip `number` is (number + 10) / 1000."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full((round(seconds * rate), channels), (number + 10) / 1000), rate, subtype="PCM_24")
    return path


def numbers_in(audio) -> list[int]:
    """Which clips of `write_clip` windows hold, by their first samples."""
    return [round(float(window.reshape(-1)[0]) * 1000) - 10 for window in audio]


def write_folder(folder: Path, count: int = 10, seconds: float = 0.25) -> Path:
    """Clips of two speakers, one after the other, and their metadata."""
    names = [f"{'ab'[number * 2 // count]}/{number}.wav" for number in range(count)]
    for number, name in enumerate(names):
        write_clip(folder / name, number, seconds)
    rows = [f"{name},{name[0]},{number % 3}" for number, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,speaker,group", *rows]) + "\n")
    return folder


def encoded(number: int, seconds: float = 0.25) -> bytes:
    file = io.BytesIO()
    audio = np.full(round(seconds * RATE), (number + 10) / 1000)
    soundfile.write(file, audio, RATE, subtype="PCM_24", format="WAV")
    return file.getvalue()


def write_parquet(folder: Path, files: int = 3, per_file: int = 4, row_group: int = 2) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"audio": Audio(), "speaker": Value("string"), "other": Audio()})
    for file in range(files):
        numbers = range(file * per_file, (file + 1) * per_file)
        audio = [{"bytes": encoded(number), "path": "audio.wav"} for number in numbers]
        columns = {"audio": audio, "speaker": ["ab"[number % 2] for number in numbers], "other": audio}
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=row_group)
    return str(folder / "*.parquet")


def write_tars(folder: Path, files: int = 2, per_file: int = 5) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        with tarfile.open(folder / f"{file}.tar", "w") as tar:
            for number in range(file * per_file, (file + 1) * per_file):
                for ending, content in (("wav", encoded(number)), ("json", b'{"speaker": "a"}')):
                    member = tarfile.TarInfo(f"{number:03}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")


KINDS = {  # how to write it, its audio column, its number of clips
    "folder": (lambda path: str(write_folder(path)), "audio", 10),
    "bare folder": (lambda path: str(write_clip(path / "test_0.wav", 0).parent), "audio", 1),
    "parquet": (write_parquet, "audio", 12),
    "one row group": (lambda path: write_parquet(path, 1, 5, 5), "audio", 5),
    "tars": (write_tars, "wav", 10),
}


def make_source(kind: str, path: Path, **options) -> tuple[SourceConfig, int]:
    write, column, count = KINDS[kind]
    return SourceConfig(write(path), audio_column=column, **options), count


def data_config(*sources: SourceConfig, **options) -> DataConfig:
    defaults: dict[str, Any] = {"segment_s": 0.1, "min_duration_s": 0.05, "shuffle_clips": 3, "num_workers": 0}
    return DataConfig(sources=sources, **(defaults | options))


def reader(source: SourceConfig, part: int = 0, parts: int = 1, opened=None, **options) -> Reader:
    opened = opened or open_source(source, parts)
    return Reader(opened, 0, data_config(source, **options), RATE, 0, part, parts)


def windows_until(reader: Reader, epoch: int) -> Counter:
    """How often each clip is given in each epoch before `epoch`."""
    found = Counter()
    for window in reader:
        if reader.epoch >= epoch:
            return found
        (number,) = numbers_in([window])
        found[reader.epoch, number] += 1
    raise AssertionError("windows ended")


# ---- sharing out


@pytest.mark.parametrize("parts", [1, 3, 7, 14])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_share_every_epoch_exactly(kind, parts, tmp_path):
    """Two windows of every clip in every epoch, whichever part gives them; also with more parts than clips."""
    source, count = make_source(kind, tmp_path)
    opened = open_source(source, parts)
    each = [windows_until(reader(source, part, parts, opened), 4) for part in range(parts)]
    assert sum(each, Counter()) == Counter({(epoch, clip): 2 for epoch in range(4) for clip in range(count)})
    assert all(set(each[a]).isdisjoint(each[b]) for a in range(parts) for b in range(a))


@pytest.mark.parametrize("kind", ["folder", "parquet", "tars"])
def test_order_changes_with_epoch_and_seed(kind, tmp_path):
    source, count = make_source(kind, tmp_path)
    opened = open_source(source)

    def order(epoch, seed=0):
        blocks = opened.blocks((seed,), Share(epoch, 0, 1), 100)
        clips = next(blocks)[1]
        return [numbers_in([read_piece(clip, 10, MimiFeatureExtractor())])[0] for clip in clips]

    orders = [order(epoch, seed) for epoch in range(6) for seed in range(3)]
    assert all(sorted(found) == list(range(count)) for found in orders)
    assert len(set(map(tuple, orders))) > 1
    assert order(3) == order(3)
    if kind == "folder":
        assert len(set(map(tuple, orders))) == len(orders)


def test_the_first_windows_mix_speakers(tmp_path):
    source = SourceConfig(str(write_folder(tmp_path, count=60)))
    first = numbers_in(next(iter(WindowLoader(data_config(source, shuffle_clips=8), RATE, 16))).audio)
    assert 4 <= sum(number < 30 for number in first) <= 12


def test_a_window_does_not_depend_on_who_reads_it(tmp_path):
    """Position and gain are keyed by the clip: one part or three, blocks of 3 or 100, the windows are the same."""
    for name in ("nathalie_662", "nathalie_1010", "nathalie_1110"):
        (tmp_path / f"{name}.flac").write_bytes((SPEECH / f"{name}.flac").read_bytes())
    source = SourceConfig(str(tmp_path))

    def epoch_of(part, parts, blocks, epoch=0):
        given = reader(source, part, parts, segment_s=0.5, gain_db=(-6.0, 0.0), shuffle_clips=blocks)
        found = set()
        for window in given:
            if given.epoch > epoch:
                break
            if given.epoch == epoch:
                found.add(window.tobytes())
        return found

    alone = epoch_of(0, 1, 100)
    assert len(alone) > 10
    assert epoch_of(0, 1, 1) == alone
    assert alone.isdisjoint(epoch_of(0, 1, 100, epoch=1))
    assert set.union(*(epoch_of(part, 3, 2) for part in range(3))) == alone


@pytest.mark.parametrize("short_clips", ["pad", "join"])
def test_a_clip_that_is_listed_twice_is_given_twice(short_clips, tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text("file_name\na/0.wav\na/0.wav\nb/1.wav\n")
    given = reader(SourceConfig(str(tmp_path)), short_clips=short_clips)
    assert windows_until(given, 1) == Counter({(0, 0): 4, (0, 1): 2})


def test_sources_are_drawn_by_weight_and_loop_on_their_own(tmp_path):
    a = SourceConfig(str(write_folder(tmp_path / "a", 4)), weight=3)
    b = SourceConfig(str(write_clip(tmp_path / "b" / "x.wav", 99).parent))
    loader = WindowLoader(data_config(a, b), RATE, 400)
    numbers = numbers_in(next(iter(loader)).audio)
    assert numbers.count(99) == pytest.approx(100, abs=30)
    assert max(numbers[: numbers.index(99)], default=0) < 4
    assert loader.report()["epochs"] == [pytest.approx(300 / 8, abs=5), pytest.approx(100 / 2, abs=15)]


# ---- what a window is


def test_windows_hold_audio_then_padding(tmp_path):
    write_clip(tmp_path / "short.wav", 0, 0.06)
    write_clip(tmp_path / "long.wav", 1, 0.35)
    batch = next(iter(WindowLoader(data_config(SourceConfig(str(tmp_path))), RATE, 40)))
    assert batch.audio.shape == (40, 1, 2400)
    assert batch.audio.dtype == torch.float32
    assert batch.mask.shape == (40, 2400)
    assert batch.mask.dtype == torch.bool
    short = [number == 0 for number in numbers_in(batch.audio)]
    assert 8 <= sum(short) <= 12  # three windows of the long one for each of the short one
    assert (batch.mask.sum(-1) == torch.where(torch.tensor(short), 1440, 2400)).all()
    assert (batch.audio[:, 0].bool() == batch.mask).all()
    assert (batch.mask.int().diff(dim=-1) <= 0).all()


def test_short_clips_are_joined_to_fill_windows(tmp_path):
    for number in range(8):
        write_clip(tmp_path / f"{number}.wav", number, 0.06)
    write_clip(tmp_path / "long.wav", 50, 0.1)
    source = SourceConfig(str(tmp_path))
    windows = list(islice(reader(source, short_clips="join", shuffle_clips=9), 5))
    assert [len(window) for window in windows] == [2400] * 5
    inside = [[round(float(value) * 1000) - 10 for value in window[[0, 1439, 1440, -1]]] for window in windows]
    assert sorted(number for first, *_, last in inside for number in {first, last}) == [*range(8), 50]
    assert all(first == middle and after == last for first, middle, after, last in inside)
    left = list(islice(reader(source, short_clips="join", shuffle_clips=1), 9))
    assert sorted(map(len, left)) == [1440] * 8 + [2400]  # nothing to join a clip with in its block


@pytest.mark.parametrize(("rate", "ending"), [(48_000, "flac"), (44_100, "wav"), (16_000, "ogg"), (22_050, "flac")])
def test_a_piece_equals_the_same_part_of_the_whole_resampled(rate, ending, tmp_path):
    speech, _ = soundfile.read(SPEECH / "nathalie_1010.flac", dtype="float32")
    speech = MimiFeatureExtractor(sampling_rate=rate)([speech], sampling_rate=RATE)["input_values"][0][0]
    soundfile.write(tmp_path / f"x.{ending}", np.stack([speech, 0.5 * speech], 1), rate)
    decoded, _ = soundfile.read(tmp_path / f"x.{ending}", dtype="float32")
    extractor = MimiFeatureExtractor()
    whole = extractor([decoded.mean(1)], sampling_rate=rate)["input_values"][0][0]
    source = open_source(SourceConfig(str(tmp_path / f"x.{ending}")))
    _, (clip,) = next(source.blocks((0,), Share(0, 0, 1), 1))
    starts = []
    for draw in (0.0, 0.3, 0.77, 0.9 if ending == "ogg" else 0.999999):  # Vorbis seeks coarsely at its end
        piece = read_piece(clip, 5000, extractor, draw)
        assert len(piece) == 5000
        starts.append(int(draw * (len(whole) - 5000)))
        near = [np.abs(whole[start : start + 5000] - piece).max() for start in near_starts(starts[-1], whole)]
        assert min(near) < 2e-4
    assert len(read_piece(clip, 10**9, extractor)) == pytest.approx(len(whole), abs=1)


def near_starts(start: int, whole: np.ndarray) -> range:
    """Windows begin at samples that both rates have, at most every 320th."""
    return range(max(0, start - 330), min(start + 330, len(whole) - 5000) + 1)


def test_a_long_file_is_decoded_only_where_it_is_needed(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 60 * RATE), RATE)
    read, frames = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n, **options: frames.append(n) or read(self, n, **options)
    )
    given = reader(SourceConfig(str(tmp_path)), segment_s=1.0)
    positions = {window.tobytes() for window in islice(given, 60)}
    assert given.epoch == 0
    assert len(positions) == 60
    assert max(frames) <= 1.1 * RATE


def test_gain_is_drawn_and_full_scale_never_exceeded(tmp_path):
    write_clip(tmp_path / "a.wav", 90, 0.5)
    soundfile.write(tmp_path / "loud.wav", np.tile([1.7, -0.4], 6000), RATE, subtype="FLOAT")
    source = SourceConfig(str(tmp_path))
    plain = list(islice(reader(source), 10))
    assert {round(float(np.abs(window).max()), 4) for window in plain} == {0.1, 1.0}
    loud = next(window for window in plain if np.abs(window).max() > 0.5)
    assert sorted({round(float(value), 3) for value in loud}) == [round(-0.4 / 1.7, 3), 1.0]
    peaks = [float(np.abs(window).max()) for window in islice(reader(source, gain_db=(-12.0, 30.0)), 60)]
    assert max(peaks) <= 1.0
    quiet = 20 * np.log10([peak / 0.1 for peak in peaks if peak < 0.999])
    assert -12 <= min(quiet) < -6
    assert 12 < max(quiet) <= 20
    assert len(set(peaks)) > 20


# ---- resuming


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_reader_resumes_after_any_window(kind, parts, tmp_path):
    source, _ = make_source(kind, tmp_path)
    opened = open_source(source, parts)
    for part in {0, parts - 1}:
        run = reader(source, part, parts, opened, short_clips="join", gain_db=(-3.0, 0.0))
        windows, states = [], [run.state_dict()]
        for window in islice(run, 30):
            windows.append(window.tobytes())
            states.append(json.loads(json.dumps(run.state_dict())))
        assert run.epoch > 0
        for place in range(0, 25, 3):
            again = reader(source, part, parts, opened, short_clips="join", gain_db=(-3.0, 0.0))
            again.load_state_dict(states[place])
            assert [window.tobytes() for window in islice(again, 6)] == windows[place : place + 6], place


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.audio, other.audio)
        assert torch.equal(batch.mask, other.mask)


@pytest.mark.parametrize("short_clips", ["pad", "join"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_bit_for_bit(workers, short_clips, tmp_path):
    """Three sources, over several epochs, stopped after an odd number of batches so that the workers' order turns."""
    a, _ = make_source("folder", tmp_path / "a", weight=2)
    b, _ = make_source("parquet", tmp_path / "b", where={"speaker": ["a"]})
    c, _ = make_source("tars", tmp_path / "c", weight=1.5)
    options = {"num_workers": workers, "short_clips": short_clips, "segment_s": 0.4, "gain_db": (-6.0, 0.0)}

    def loader():
        return WindowLoader(data_config(a, b, c, **options), RATE, 6, seed=5)

    whole = loader()
    expected = list(islice(whole, 12))
    assert min(whole.report()["epochs"]) >= 1
    assert len({tuple(numbers_in(batch.audio)) for batch in expected}) == 12
    for stop in (1, 7):
        first = loader()
        batches = list(islice(first, stop))
        state = json.loads(json.dumps(first.state_dict()))
        rest = loader()
        rest.load_state_dict(state)
        assert_same([*batches, *islice(rest, 12 - stop)], expected)
    assert_same(islice(first, 12 - stop), expected[stop:])  # the same loader goes on where it was left
    assert len(json.dumps(state)) < 5000


def test_one_worker_gives_what_the_process_itself_gives(tmp_path):
    source, _ = make_source("folder", tmp_path)
    own, worker = (WindowLoader(data_config(source, num_workers=count), RATE, 3) for count in (0, 1))
    assert_same(islice(worker, 5), list(islice(own, 5)))
    worker.load_state_dict(own.state_dict())
    assert_same(islice(worker, 2), list(islice(own, 2)))


def test_a_position_of_another_layout_begins_the_next_epoch(tmp_path, caplog):
    a, _ = make_source("folder", tmp_path / "a")
    b, _ = make_source("parquet", tmp_path / "b")
    first = WindowLoader(data_config(a, b), RATE, 60)
    list(islice(first, 1))
    seen = first.report()["epochs"]
    assert min(seen) >= 1
    for loader, changed in [
        (WindowLoader(data_config(a, b), RATE, 8, rank=1, world_size=2), "world_size, rank"),
        (WindowLoader(data_config(a, b, num_workers=3), RATE, 8), "num_workers"),
        (WindowLoader(data_config(a, b, shuffle_clips=5), RATE, 8, seed=1), "seed, shuffle_clips"),
    ]:
        caplog.clear()
        loader.load_state_dict(first.state_dict())
        assert f"another {changed}:" in caplog.text
        assert loader.report()["epochs"] == [epoch + 1 for epoch in seen]
    (tmp_path / "a" / "metadata.csv").write_text("file_name\na/0.wav\nb/9.wav\n")
    loader = WindowLoader(data_config(a, b), RATE, 8)
    loader.load_state_dict(first.state_dict())
    assert "another sources:" in caplog.text
    assert loader.report()["epochs"] == [0, seen[1] + 1]
    batches = iter(loader)
    next(batches)
    same = WindowLoader(data_config(a, b, gain_db=(-1.0, 0.0), prefetch_batches=1), RATE, 8)
    caplog.clear()
    same.load_state_dict(loader.state_dict())
    assert not caplog.records


# ---- what goes wrong


def write_broken(folder: Path) -> None:
    """One of every kind of broken file, beside two good clips."""
    write_folder(folder, 2, 0.2)
    (folder / "metadata.csv").unlink()
    (folder / "empty.wav").touch()
    (folder / "corrupt.flac").write_bytes(b"not audio at all" * 50)
    soundfile.write(folder / "no_frames.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(3000, np.nan), RATE, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.full(3000, 1e-4), RATE)
    write_clip(folder / "brief.wav", 7, 0.04)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * RATE)
    soundfile.write(folder / "whole.flac", noise, RATE)
    (folder / "cut.flac").write_bytes((folder / "whole.flac").read_bytes()[:9000])
    (folder / "whole.flac").unlink()
    (folder / "headerless.raw").write_bytes(b"1234" * 1000)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_clips_are_skipped_and_counted(workers, tmp_path, caplog):
    write_broken(tmp_path)
    loader = WindowLoader(data_config(SourceConfig(str(tmp_path)), num_workers=workers), RATE, 4)
    batches = list(islice(loader, 1 if workers else 6))
    assert {0, 1} <= {number for batch in batches for number in numbers_in(batch.audio)}
    assert all(torch.isfinite(batch.audio).all() for batch in batches)
    if workers:
        return
    skipped = loader.report()["skipped"]
    expected = {
        "empty": {"empty.wav", "no_frames.wav"},
        "undecodable": {"corrupt.flac", "headerless.raw", "cut.flac"},  # the windows behind the cut
        "not finite": {"nan.wav"},
        "silent": {"silent.wav"},
        "too short": {"brief.wav"},
    }
    assert {reason: set(found["names"]) for reason, found in skipped.items()} == expected
    assert skipped["too short"]["count"] >= 2
    assert "Skipped nan.wav: not finite." in caplog.text
    assert caplog.text.count("too short") <= 5
    report = loader.report()
    assert report["windows"] == 24
    assert report["seconds"] == pytest.approx(2.4)
    assert report["wait_s"] > 0


def test_missing_files_and_rows_without_audio_are_skipped(tmp_path):
    write_folder(tmp_path / "a", 3)
    (tmp_path / "a" / "a" / "0.wav").unlink()
    given = reader(SourceConfig(str(tmp_path / "a")))
    assert {clip for _, clip in windows_until(given, 1)} == {1, 2}
    assert ("missing file", "a/0.wav") in given.skipped
    table = pa.table({"audio": [{"bytes": encoded(4), "path": None}, None, {"bytes": b"", "path": "x"}]})
    pq.write_table(table, tmp_path / "x.parquet")
    given = reader(SourceConfig(str(tmp_path / "x.parquet")))
    assert {clip for _, clip in windows_until(given, 1)} == {4}
    assert set(given.skipped) == {("no audio", "row 1"), ("empty", "x")}


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 4), (1, 1)])
def test_nothing_usable_is_an_error_with_the_counts(workers, world_size, tmp_path):
    write_clip(tmp_path / "brief.wav", 0, 0.01)
    (tmp_path / "empty.wav").touch()
    config = data_config(SourceConfig(str(tmp_path)), num_workers=workers)
    loader = WindowLoader(config, RATE, 2, rank=world_size - 1, world_size=world_size)
    with pytest.raises(DataError, match=r"no usable window in a whole epoch: 1 .*1 ") as error:
        next(iter(loader))
    assert "1 too short (brief.wav)" in str(error.value)
    assert "1 empty (empty.wav)" in str(error.value)
    with pytest.raises(DataError, match=r"1 too short \(brief.wav\)"):
        load_clips(config.sources, RATE, 2, 1.0)


def test_a_part_whose_clips_are_all_broken_goes_on(tmp_path):
    """The only good clip comes to every part in some epoch."""
    path = write_parquet(tmp_path, 1, 5, 5)
    table = pq.read_table(tmp_path / "0.parquet").to_pylist()
    rows = [dict(row, audio={"bytes": b"broken", "path": None}) if row is not table[3] else row for row in table]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    opened = open_source(SourceConfig(path), 5)
    each = [windows_until(reader(SourceConfig(path), part, 5, opened), 10) for part in range(5)]
    assert sum(each, Counter()) == Counter({(epoch, 3): 2 for epoch in range(10)})
    assert min(map(len, each)) == 2


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_where_keeps_rows_with_a_listed_value(kind, tmp_path):
    source, _ = make_source(kind, tmp_path, where={"speaker": ["b", "c"]})
    kept = {"folder": set(range(5, 10)), "parquet": set(range(1, 12, 2))}[kind]
    assert {clip for _, clip in windows_until(reader(source), 1)} == kept
    with pytest.raises(DataError, match=r"no column 'licence', which `where` names; it has audio, speaker"):
        open_source(SourceConfig(source.path, where={"licence": ["CC0"]}))
    with pytest.raises(DataError, match=r"left out (all of its 10 rows|by `where`)"):
        next(iter(reader(SourceConfig(source.path, where={"speaker": ["x"]}))))


def test_numbers_and_labels_can_be_filtered(tmp_path):
    numbered = SourceConfig(str(write_folder(tmp_path / "x")), where={"group": ["1"], "speaker": ["a"]})
    assert {clip for _, clip in windows_until(reader(numbered), 1)} == {1, 4}
    (tmp_path / "x" / "metadata.csv").unlink()
    by_folder = SourceConfig(str(tmp_path / "x"), where={"label": ["b"]})
    assert {clip for _, clip in windows_until(reader(by_folder), 1)} == set(range(5, 10))


def test_where_a_source_may_lie(tmp_path, monkeypatch):
    write_folder(tmp_path / "corpus" / "train", 4)
    write_clip(tmp_path / "corpus" / "test" / "9.wav", 9)
    write_clip(tmp_path / "corpus" / "a [b]" / "train_or_test.wav", 8)
    write_parquet(tmp_path / "tables" / "data", 1, 2)

    def clips(path, **options):
        return {clip for _, clip in windows_until(reader(SourceConfig(str(path), **options)), 1)}

    corpus = tmp_path / "corpus"
    assert clips(corpus) == clips(corpus / "train") == {0, 1, 2, 3}
    assert clips(corpus, split="test") == clips(corpus / "test") == {9}
    assert clips(corpus / "a [b]") == clips(corpus / "a [b]" / "train_or_test.wav") == {8}
    assert clips(corpus / "t*" / "**" / "*.wav") == {0, 1, 2, 3, 9}
    assert clips(tmp_path / "tables") == {0, 1}
    monkeypatch.chdir(tmp_path)
    assert clips("corpus/test/9.wav") == {9}
    for path in ("nowhere/*.flac", "./nowhere", str(tmp_path / "x.tar")):
        with pytest.raises(DataError, match="There is nothing at"):
            open_source(SourceConfig(path))
    with pytest.raises(DataError, match=r"no column 'sound', which `audio_column` names"):
        open_source(SourceConfig(str(corpus), audio_column="sound"))
    with pytest.raises(DataError, match="cannot be opened"):
        open_source(SourceConfig(str(tmp_path / "tables"), split="validation"))
    with pytest.raises(DataError, match=r"data\.sources"):
        WindowLoader(data_config(), RATE, 1)


# ---- the loader as a process


def test_an_abandoned_loader_leaves_no_workers(tmp_path):
    source, _ = make_source("folder", tmp_path)
    loader = WindowLoader(data_config(source, num_workers=2), RATE, 2)
    next(iter(loader))  # the iterator is dropped at once
    batches = iter(loader)
    next(batches)
    assert multiprocessing.active_children()
    loader.close()
    assert list(batches) == []
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_workers_outlive_an_interrupt_that_the_run_handles(tmp_path):
    source, _ = make_source("folder", tmp_path)
    loader = WindowLoader(data_config(source, num_workers=1, prefetch_batches=1), RATE, 2)
    batches = iter(loader)
    next(batches)
    for worker in multiprocessing.active_children():
        assert worker.pid
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(islice(batches, 5))) == 5
    loader.close()


def test_starting_the_loader_draws_nothing_from_the_global_generators(tmp_path):
    source, _ = make_source("folder", tmp_path)
    before = torch.get_rng_state(), str(np.random.get_state())
    next(iter(WindowLoader(data_config(source), RATE, 2)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]


def test_draws_depend_on_every_part_of_their_key():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**63, 1), (-1, 1)]
    assert len({keyed(*key).random() for key in keys}) == len(keys)
    assert keyed(3, 4).random() == keyed(3, 4).random()


# ---- validation clips


def test_clips_for_validation(tmp_path, caplog):
    a = SourceConfig(str(write_folder(tmp_path / "a", 6, 0.7)), weight=2)
    b, _ = make_source("tars", tmp_path / "b")
    (tmp_path / "a" / "a" / "0.wav").write_bytes(b"broken")
    real = SourceConfig(str(SPEECH / "*.flac"))
    clips = load_clips([a, real], RATE, 6, 2.0)
    assert [clip.name.split("_")[0] for clip in clips if clip.name.startswith("nathalie")] == ["nathalie"] * 2
    assert len(clips) == 6
    assert all(isinstance(clip, Clip) and clip.audio.dtype == torch.float32 for clip in clips)
    assert {len(clip.audio) for clip in clips} == {16_800, 48_000}
    again = load_clips([a, real], RATE, 6, 2.0)
    assert all(
        one.name == two.name and torch.equal(one.audio, two.audio) for one, two in zip(clips, again, strict=True)
    )
    assert [clip.name for clip in load_clips([a, real], RATE, 3, 2.0)] == [clip.name for clip in clips[:3]]
    assert len(load_clips([a, real], RATE, 100, 2.0)) == 5 + 3
    assert "a/0.wav: undecodable" in caplog.text
    with caplog.at_level(logging.ERROR), pytest.raises(DataError, match="10 too short"):
        load_clips([b], RATE, 1, 1.0)


def test_workers_die_with_a_run_that_is_killed(tmp_path):
    """After SIGKILL nobody tells them: they must notice."""
    script = f"""
import multiprocessing
from multiprocessing import forkserver
from training.config import DataConfig, SourceConfig
from training.data import WindowLoader

if __name__ == "__main__":
    config = DataConfig(sources=(SourceConfig({str(ROOT / "tests" / "data")!r}),), segment_s=0.5, num_workers=1)
    loader = WindowLoader(config, 24_000, 2)
    batches = iter(loader)
    next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    print(*workers, forkserver._forkserver._forkserver_pid, flush=True)
    input()
"""
    (tmp_path / "run.py").write_text(script)
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with run:
        left = [int(pid) for pid in run.stdout.readline().split()]
        assert len(left) == 2
        run.kill()
    deadline = time.monotonic() + 20
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = [pid for pid in left if is_alive(pid)]
    assert not left


def is_alive(pid: int) -> bool:
    """Not a zombie that nobody has collected yet."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
