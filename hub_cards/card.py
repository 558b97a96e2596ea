"""Cards of models, data sets of codes, and metrics, rendered from what runs wrote.

Every figure of a card comes from a file beside it: `config.json`, `summary.json`, `evaluation/*/results.json`,
`benchmark.json`, `tokens.json`. A section whose file is missing is left out. What no run can know, people declare in
`card.yaml`, all of it optional:

    name: Mimi small                     # heading; the last part of the repository's name if not given
    license: apache-2.0                  # as the Hub spells it
    language: [de, nl]
    base_model: kyutai/mimi
    datasets: [owner/name]               # on the Hub, for its metadata
    recipe: training/recipes/small.yaml
    notes: Text without figures.
    sources:                             # of the training data
    - source: owner/name                 # the path, or a value of `where`, that the run's recipe has
      license: CC0-1.0
      description: German, one voice
    evaluations:
      quality:                           # the folder below evaluation/
        note: Speakers that are not in the training data.
        dataset: owner/name              # its benchmark on the Hub, for .eval_results/
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    ModelCard,
    ModelCardData,
    RepoCard,
    SpaceCard,
    SpaceCardData,
    constants,
)

from hub_cards.evaluations import (
    HEADLINE,
    Evaluation,
    codebook_bitrate,
    data_set,
    entries,
    find_evaluations,
    model_index,
)
from hub_cards.facts import CardError, Fact, Facts, derive, get, get_value, value
from hub_cards.rendering import checked, declared_facts, render

__all__ = ["CardError", "dataset_card", "eval_results_files", "metric_card", "model_card", "validate"]

TAGS = ["mimi", "audio-codec", "neural-codec", "speech"]
GRADIO = "3.50.2"
"""The last with the interface that `evaluate.utils.launch_gradio_widget` calls."""
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
"""How the Hub counts the rows of a data set."""


class Rate(NamedTuple):
    """What a number of codebooks costs and gives."""

    num_quantizers: Fact
    bitrate: Fact
    """bit/s."""
    scores: Fact | None
    """If it was measured."""


class Source(NamedTuple):
    """A part of the training data."""

    names: Sequence[Fact]
    weight: Fact | None
    """Its share of the mix, up to 1."""
    license: Fact | None
    description: Fact | None


def model_card(directory: str | Path, repo_id: str | None = None) -> ModelCard:
    """The card of a model.

    Args:
        directory: a model directory with what its training and its evaluations wrote beside the weights, or a folder
            of a training run, which has the model in `model/`.
        repo_id: where it is published, `owner/name`; without, the card's code names the directory.

    Raises:
        CardError: a file lacks what the card needs, or a text has figures that no file backs.
    """
    directory = Path(directory).resolve()
    facts = Facts(directory)
    folder = _model_folder(facts)
    config = facts.read(f"{folder}config.json")
    declared, summary = declared_facts(facts), facts.optional("summary.json")
    evaluations = find_evaluations(facts, config)
    name = repo_id.rsplit("/", 1)[-1] if repo_id else directory.name
    data = ModelCardData(
        license=get_value(declared, "license"),
        language=get_value(declared, "language"),
        library_name="transformers",
        pipeline_tag="audio-to-audio",
        tags=TAGS,
        base_model=get_value(declared, "base_model"),
        datasets=get_value(declared, "datasets"),
        metrics=list(dict.fromkeys(name for e in evaluations for name in value(e.results.scores))) or None,
        eval_results=[result for e in evaluations for result in model_index(e, declared)] or None,
        model_name=name if evaluations else None,
    )
    body = render(
        "model.md.jinja",
        facts=facts,
        name=get(declared, "name") or derive(name, config),
        model=repo_id or f"{name}/{folder}".rstrip("/"),
        config=config,
        frame_ms=derive(1000 / value(config.frame_rate), config.frame_rate),
        rates=list(_rates(config, evaluations)),
        headline=[name for name in HEADLINE if evaluations and name in evaluations[0].results.scores],
        evaluations=evaluations,
        declared=declared,
        summary=summary,
        sources=list(_sources(summary, declared)),
        benchmark=facts.optional("benchmark.json"),
        travels="custom_pipelines" in config and facts.has(f"{folder}pipeline_mimi.py"),
    )
    return checked(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def eval_results_files(directory: str | Path, repo_id: str | None = None) -> dict[str, str]:
    """The files of `.eval_results/`, the Hub's form of results on benchmarks, by their path in the repository.

    An evaluation has one if `card.yaml` names its benchmark: the form is for data sets on the Hub only.

    Args:
        directory: as of `model_card`.
        repo_id: where it is published, to link the results.

    Raises:
        CardError: a file lacks what is needed.
    """
    facts = Facts(Path(directory).resolve())
    config = facts.read(f"{_model_folder(facts)}config.json")
    declared = declared_facts(facts)
    return {
        f"{constants.EVAL_RESULTS_FOLDER}/{evaluation.name}.yaml": entries(evaluation, dataset_id, repo_id)
        for evaluation in find_evaluations(facts, config)
        if (dataset_id := data_set(evaluation, declared))
    }


def dataset_card(directory: str | Path, repo_id: str | None = None) -> DatasetCard:
    """The card of a data set of codes.

    Args:
        directory: what `mimi tokenize` wrote: `data/SPLIT-*.parquet` and `tokens.json`, with `codec` (`model`,
            `fingerprint`, `num_quantizers`, `dtype`, `sampling_rate`, `frame_rate`, `codebook_size`), `source`
            (`dataset`, `name`, `revision`, `split`, `where`), `clips`, `hours`, `frames`, `shards`, `bytes`, `errors`,
            `features` and `libraries`. `card.yaml` may have `name`, `license`, `language`, `datasets` (the source on
            the Hub) and `notes`.
        repo_id: where it is published; without, the card's code names the directory.

    Raises:
        CardError: a file lacks what the card needs, or a text has figures that no file backs.
    """
    directory = Path(directory).resolve()
    facts = Facts(directory)
    tokens, declared = facts.read("tokens.json"), declared_facts(facts)
    split = value(tokens.source.split)
    name = repo_id.rsplit("/", 1)[-1] if repo_id else directory.name
    data = DatasetCardData(
        license=get_value(declared, "license"),
        language=get_value(declared, "language"),
        size_categories=[SIZES[max(len(str(value(tokens.clips))) - 3, 0)]],
        source_datasets=get_value(declared, "datasets"),
        tags=[*TAGS, "tokens"],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.parquet"}]}],
    )
    body = render(
        "dataset.md.jinja",
        facts=facts,
        name=get(declared, "name") or derive(name, tokens),
        repo=repo_id or name,
        tokens=tokens,
        codec=tokens.codec,
        bitrate=derive(value(tokens.codec.num_quantizers) * codebook_bitrate(tokens.codec), tokens.codec),
        failed=derive(sum(value(tokens.errors).values()), tokens.errors),
        columns=[
            (derive(c, tokens.features), derive(_type(f), tokens.features)) for c, f in value(tokens.features).items()
        ],
        declared=declared,
    )
    return checked(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def metric_card(directory: str | Path, repo_id: str | None = None) -> SpaceCard:
    """The card of a module of evaluate, which is the front page of its Space.

    Args:
        directory: the metric's folder, with a module of the folder's name.
        repo_id: where it is published; without, the card's code names the folder.

    Raises:
        CardError: there is no such module, or it has no description.
    """
    directory = Path(directory).resolve()
    module = f"{directory.name}.py"
    if not (directory / module).is_file():
        raise CardError(f"{directory / module} is missing: a metric is a module of the same name as its folder.")
    try:
        import evaluate

        metric = evaluate.load(str(directory), module_type="metric", keep_in_memory=True)
    except ImportError as error:
        raise CardError(f"The card of a metric needs all that the metric needs: {error}") from error
    facts = Facts(directory)
    info = Fact({field: getattr(metric.info, field) for field in ("description", "citation")}, module, "", facts.used)
    inputs = _arguments(metric.info.inputs_description)
    requirements = facts.optional("requirements.txt")
    title = directory.name.replace("_", " ")
    summary, _, description = value(info.description).partition("\n")
    data = SpaceCardData(
        title=title,
        short_description=textwrap.shorten(summary.partition(":")[0].rstrip("."), 60, placeholder=" ..."),
        sdk="gradio",
        sdk_version=GRADIO,
        app_file="app.py",
        pinned=False,
        license=get_value(declared_facts(facts), "license") or "apache-2.0",
        tags=["evaluate", "metric"],
    )
    body = render(
        "metric.md.jinja",
        title=derive(title, info),
        metric=repo_id or directory.name,
        summary=derive(summary, info.description),
        description=derive(description.strip(), info.description),
        inputs=[derive(line, info.description) for line in inputs],
        citation=info.citation,
        requirements=value(requirements).split() if requirements else [],
    )
    return checked(SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def validate(card: RepoCard) -> None:
    """Let huggingface_hub check a card: here what it can, and, unless `HF_HUB_OFFLINE` is set, by the Hub's own rules.

    Raises:
        CardError: it does not pass.
    """
    checked(card)
    if constants.HF_HUB_OFFLINE:
        return
    try:
        card.validate()
    except ValueError as error:
        raise CardError(f"The Hub refuses the card: {' '.join(str(error).split())}") from error


# ---- what the templates show


def _model_folder(facts: Facts) -> str:
    """Where `config.json` is: a run has its model in a folder."""
    return "model/" if facts.has("model/config.json") and not facts.has("config.json") else ""


def _rates(config: Fact, evaluations: Sequence[Evaluation]) -> Iterator[Rate]:
    """The numbers of codebooks that were evaluated, or powers of two and all."""
    most = value(config.num_quantizers)
    measured = evaluations[0].own if evaluations else {}
    for count in measured or sorted({2**power for power in range(most.bit_length())} | {most}):
        bitrate = derive(count * codebook_bitrate(config), config.codebook_size)
        yield Rate(derive(count, config.num_quantizers), bitrate, measured[count].scores if measured else None)


def _sources(summary: Fact | None, declared: Fact | None) -> Iterator[Source]:
    """The training data as the recipe mixed it, with what is declared of each part; if nothing ran, the latter."""
    known = {value(entry.source): entry for entry in get(declared, "sources") or ()}
    if summary is None:
        for entry in known.values():
            yield Source([entry.source], None, get(entry, "license"), get(entry, "description"))
        return
    parts = summary.recipe.data.sources
    total = sum(value(part.weight) for part in parts)
    for part in parts:
        names = [choice for column in part.where for choice in part.where[value(column)]] or [part.path]
        entry = next((known[name] for name in map(value, [part.path, *names]) if name in known), None)
        share = derive(value(part.weight) / total, part.weight)
        yield Source(names, share, get(entry, "license"), get(entry, "description"))


def _type(feature: Any) -> str:
    """A column's type in few words."""
    if isinstance(feature, list):
        return f"list of {_type(feature[0])}"
    if "feature" in feature:
        return f"list of {_type(feature['feature'])}"
    return feature.get("dtype") or feature.get("_type", "struct")


def _arguments(description: str) -> list[str]:
    """The entries of the section `Args:`, each a line with its name as code."""
    joined = re.sub(r"\n {5,}", " ", description.partition("Args:\n")[2])
    return [
        f"`{name.strip()}`: {text}" for name, _, text in (line.partition(": ") for line in joined.splitlines()) if text
    ]
