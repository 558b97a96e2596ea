"""Which rows are done, whoever did them; and which clips go together."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.corpus.coverage import Coverage, CoverageError, as_runs
from training.corpus.names import Names, safe_stem
from training.corpus.windows import MAX_WASTE, group

ROWS = st.lists(st.integers(0, 60), unique=True).map(sorted)


def record(rows: dict[int, list[int]], ends: dict[int, int] | None = None) -> dict:
    """As a shard says it, through JSON."""
    found = {str(shard): as_runs(numbers) for shard, numbers in rows.items()}
    return {"rows": found, "ends": {str(shard): end for shard, end in (ends or {}).items()}}


@given(ROWS)
def test_runs_are_the_numbers(rows):
    assert [row for start, stop, step in as_runs(rows) for row in range(start, stop, step)] == rows
    assert len(as_runs(rows)) <= max(1, len(rows))


def test_every_so_many_th_row_is_one_run():
    assert as_runs(range(3, 4000, 8)) == [[3, 3996, 8]]
    assert as_runs(range(512)) == [[0, 512, 1]]


@given(ROWS, st.integers(0, 60), st.integers(0, 60))
def test_what_is_left_is_what_is_not_there(rows, start, stop):
    coverage = Coverage([record({0: rows[::2]}), record({0: rows[1::2]})])
    assert coverage.left(0, start, max(start, stop)).tolist() == sorted({*range(start, stop)} - {*rows})


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 6), st.data())
def test_portions_are_disjoint_and_leave_nothing(sizes, world_size, data):
    done = {shard: data.draw(st.lists(st.sampled_from(range(n)), unique=True) if n else st.just([])) for shard, n in
            enumerate(sizes)}  # fmt: skip
    known = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True))
    coverage = Coverage([record({s: sorted(rows) for s, rows in done.items()}, {s: sizes[s] for s in known})])
    taken, ends = [], []
    for rank in range(world_size):
        portion, passed = coverage.portion(len(sizes), rank, world_size), 0
        for shard in portion.shards:
            left = coverage.left(shard, 0, sizes[shard])
            mine = left[(np.arange(passed, passed + len(left)) % portion.step) == portion.first]
            passed += len(left)
            taken += [(shard, row) for row in mine.tolist()]
            ends += [shard] * portion.notes_ends
    before = [(shard, row) for shard, rows in done.items() for row in rows]
    assert sorted(taken + before) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert len(set(ends)) == len(ends)
    assert {*ends, *known} == {*range(len(sizes))}


def test_rows_that_are_there_twice_are_an_error():
    with pytest.raises(CoverageError, match="the same rows, among 4 to 8 of the source's shard 1"):
        Coverage([record({1: [1, 2, 8]}), record({1: [4, 6, 8]})])
    with pytest.raises(CoverageError, match="had 8 rows once and 9 another time"):
        Coverage([record({}, {1: 8}), record({}, {1: 9})])


def test_a_shard_is_complete_when_its_end_is_known():
    assert not Coverage([record({0: [0, 1]})]).is_whole(1)
    assert not Coverage([record({0: [0, 2]}, {0: 3})]).is_whole(1)
    assert Coverage([record({0: [0, 2]}, {0: 3}), record({0: [1]})]).is_whole(1)
    assert Coverage([record({}, {0: 0})]).is_whole(1)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 500), st.integers(100, 400))
def test_batches_waste_little_and_leave_nobody_out(lengths, batch_frames, long_frames):
    batches = group(dict(enumerate(lengths)), batch_frames, long_frames)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        frames = [lengths[index] for index in batch]
        assert len(batch) == 1 or len(batch) * max(frames) <= batch_frames
        assert len(batch) == 1 or max(frames) <= long_frames
        assert sum(frames) >= (1 - MAX_WASTE) * len(batch) * max(frames)


def test_like_lengths_fill_batches():
    lengths = np.random.default_rng(0).integers(125, 375, 2000)  # 10 to 30 s
    batches = group(dict(enumerate(lengths.tolist())), 3000, 1500)
    assert len(batches) < 1.15 * lengths.sum() / 3000
    padded = sum(len(batch) * max(lengths[batch]) for batch in batches)
    assert lengths.sum() > 0.95 * padded


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("anna/a.wav", "anna/a"),
        ("../../etc/passwd", "etc/passwd"),
        ("/abs/./a.flac", "abs/a"),
        ("C:\\clips\\b.mp3", "C_/clips/b"),
        ("hf://datasets/x@main/a b?.ogg", "hf/datasets/x@main/a_b_"),
        ("speaker.0001", "speaker.0001"),
        ("v1.0.flac/a.flac", "v1_0_flac/a"),
        (".hidden.wav", "hidden"),
        ("nul.wav", "_nul"),
        ("a~1", "a_1"),
        ("", "clip"),
        ("日本語/音.wav", "日本語/音"),
    ],
)
def test_names_are_safe(name, stem):
    assert safe_stem(name) == stem


@given(
    st.lists(st.text("aA0.~/\\: éé音", max_size=8) | st.sampled_from(["a.wav", "A.flac", "b/a", "a~0", "a", "é", "é"]))
)
def test_no_two_names_are_alike(given_names):
    names = Names(given_names)
    stems = [names.stem(name, number) for number, name in enumerate(given_names)]
    assert len({f"{stem}.flac".casefold() for stem in stems}) == len(stems)
    for stem in stems:
        parts = stem.split("/")
        assert all(part and part not in (".", "..") and not part.startswith(".") for part in parts)
        assert all(len(part.encode()) <= 120 for part in parts)
    folders = {"/".join(parts[:depth]).casefold() for parts in (s.split("/") for s in stems) for depth in
               range(1, len(parts))}  # fmt: skip
    assert not folders & {f"{stem}.flac".casefold() for stem in stems}
