"""Evaluations beside a model: its own rows, how it stands beside others, and the Hub's two forms of results."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from hub_cards.facts import CardError, Fact, Facts, derive, get, get_value, origin, value

HEADLINE = ("stoi", "pesq_wb", "visqol", "distillmos", "speaker_similarity", "wer")
"""What the first table of a card shows, as far as it was measured."""


class Evaluation(NamedTuple):
    """A folder that `mimi evaluate` wrote."""

    name: str
    """Of the folder."""
    title: Fact
    """The same, to be shown."""
    results: Fact
    """`results.json`."""
    table: Fact
    """`table.md`."""
    own: dict[int, Fact]
    """The model's rows by the number of codebooks, fewest first."""
    pictures: list[Fact]
    """Paths from the model's directory."""

    @property
    def best(self) -> tuple[int, Fact]:
        """The number of codebooks and the row with the most of them."""
        return list(self.own.items())[-1]


class Comparison(NamedTuple):
    """The model with the most codebooks beside another codec, in the same run: labels of scores."""

    codec: Fact
    better: list[Fact]
    worse: list[Fact]
    """Better or worse where the intervals do not overlap ..."""
    alike: list[Fact]
    """... and alike where they do."""


def find_evaluations(facts: Facts, config: Fact) -> list[Evaluation]:
    """The evaluations in `evaluation/`, that of the most clips first.

    Args:
        facts: of the model's directory.
        config: `config.json`.

    Raises:
        CardError: a file lacks something, is of another model, or a table does not show the results beside it.
    """
    found = []
    for path in sorted(facts.directory.glob("evaluation/*/results.json")):
        folder = f"evaluation/{path.parent.name}"
        results, table = facts.read(f"{folder}/results.json"), facts.read(f"{folder}/table.md")
        _check_table(folder, results, value(table))
        pictures = [derive(f"{folder}/{picture.name}", results) for picture in sorted(path.parent.glob("*.png"))]
        name, own = path.parent.name, _own(results, config)
        found.append(Evaluation(name, derive(name, results), results, table, own, pictures))
    return sorted(found, key=lambda evaluation: -value(evaluation.results.data.clips))


def estimate(score: Mapping[str, Any]) -> str:
    """A score with its interval, as `table.md` shows it."""
    if score["mean"] is None:
        return "-"
    spread = max(score["high"] - score["mean"], score["mean"] - score["low"])
    return f"{score['mean']:.3g} ± {spread:.2g}"


def codebook_bitrate(codec: Fact) -> float:
    """Of one codebook, in bit/s."""
    return value(codec.frame_rate) * (value(codec.codebook_size) - 1).bit_length()


def _own(results: Fact, config: Fact) -> dict[int, Fact]:
    """`mimi evaluate` puts the model last, after the codecs that it is beside of."""
    family, most = value(results.codecs[-1].family), value(config.num_quantizers)
    rows = {}
    for codec in results.codecs:
        if value(codec.family) == family:
            bitrate = value(codec.bitrate)
            count = bitrate / codebook_bitrate(config)
            if count not in range(1, most + 1):
                raise CardError(
                    f"{family} in {origin(results)} is not the model of config.json: no number of its codebooks, "
                    f"1 to {most}, has {bitrate:g} bit/s. Run `mimi evaluate` on this one."
                )
            rows[int(count)] = codec
    return dict(sorted(rows.items()))


def _check_table(folder: str, results: Fact, table: str) -> None:
    for codec in value(results.codecs):
        line = next((line for line in table.splitlines() if line.startswith(f"| {codec['name']} |")), "")
        for name, score in codec["scores"].items():
            if estimate(score) not in line:
                raise CardError(
                    f"{folder}/table.md does not show {name} of {codec['name']} as {folder}/results.json has it: "
                    "run `mimi evaluate` again."
                )


def compare(evaluation: Evaluation) -> Iterator[Comparison]:
    """The model beside every other codec of the run; originals and its own rows aside."""
    results, (_, own) = evaluation.results, evaluation.best
    for codec in results.codecs:
        if value(codec.measured_bitrate) is None or value(codec.family) == value(own.family):
            continue
        sorted_in: dict[str, list[Fact]] = {"better": [], "worse": [], "alike": []}
        for name in map(value, results.scores):
            higher = value(results.scores[name].higher_is_better)
            if higher is None or name not in own.scores or name not in codec.scores:
                continue
            difference = _difference(value(own.scores[name]), value(codec.scores[name]))
            if difference is not None:
                side = "alike" if not difference else "better" if (difference > 0) == higher else "worse"
                sorted_in[side].append(results.scores[name].label)
        yield Comparison(codec, **sorted_in)


def _difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> int | None:
    """1 if all of one interval is above all of the other, -1 below, 0 if they overlap; None if there is none."""
    if None in (own["low"], own["high"], other["low"], other["high"]):
        return None
    return (own["low"] > other["high"]) - (own["high"] < other["low"])


# ---- for the Hub


def data_set(evaluation: Evaluation, declared: Fact | None) -> str | None:
    """The id on the Hub of what was evaluated on, if `card.yaml` names one."""
    return get_value(get(get(declared, "evaluations"), evaluation.name), "dataset")


def model_index(evaluation: Evaluation, declared: Fact | None) -> Iterator[EvalResult]:
    """The scores with all codebooks, for `model-index`."""
    (count, own), data = evaluation.best, value(evaluation.results.data)
    parts = [data["name"], *(f"{column}={'|'.join(values)}" for column, values in data["where"].items())]
    for name, mean in _means(own):
        yield EvalResult(
            task_type="audio-to-audio",
            task_name=f"Speech coding with {count} codebooks",
            dataset_type=data_set(evaluation, declared) or "audiofolder",  # the builder of local files
            dataset_name=data["path"],
            dataset_config=", ".join(filter(None, parts)) or None,
            dataset_split=data["split"],
            metric_type=name,
            metric_name=value(evaluation.results.scores[name].label),
            metric_value=mean,
            metric_args={"num_quantizers": count},
        )


def entries(evaluation: Evaluation, dataset_id: str, repo_id: str | None) -> str:
    """The scores with all codebooks as a file of `.eval_results/`: a task of the data set is a score."""
    (count, own), data = evaluation.best, value(evaluation.results.data)
    url = f"https://huggingface.co/{repo_id}/blob/main/evaluation/{evaluation.name}/results.json"
    found = [
        EvalResultEntry(
            dataset_id=dataset_id,
            task_id=name,
            value=mean,
            source_url=url if repo_id else None,
            source_name="mimi evaluate" if repo_id else None,
            notes=f"{count} codebooks, {data['clips']} clips, fingerprint {data['fingerprint']}",
        )
        for name, mean in _means(own)
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True)


def _means(row: Fact) -> Iterator[tuple[str, float]]:
    for name, score in value(row.scores).items():
        if score["mean"] is not None and math.isfinite(score["mean"]):
            yield name, float(f"{score['mean']:.4g}")
