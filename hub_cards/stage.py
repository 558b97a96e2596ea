"""What goes up, file for file, in a folder of its own: what is published can be looked at first."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hub_cards.card import dataset_card, eval_results_files, metric_card, model_card
from hub_cards.publish import PublishError
from modeling_mimi import MimiConfig, MimiFeatureExtractor, MimiModel
from modeling_mimi.audio_files import ReconstructFiles
from modeling_mimi.conversion import convert
from modeling_mimi.pipeline_mimi import save_pipelines

RESULTS = (
    *("summary.json", "benchmark.json", "card.yaml", "curves.png"),
    *("evaluation/**/results.json", "evaluation/**/table.md", "evaluation/**/*.png"),
)
"""What the card reads or shows beside the model."""
LEFT_OUT = ("__pycache__", "parts")
"""Folders that never go up; neither does what begins with a dot."""
ROOT = Path(__file__).parents[1]
CLIP = ROOT / "tests" / "data" / "nathalie_1110.flac"
PAGE = Path(__file__).parent / "space"
PAGE_FILES = ("README.md", "app.py", "requirements.txt")
PAGE_NEEDS = ("hub_cards", "modeling_mimi", "training", "checkpoints/mimi_small", "tests/data")
"""What the page takes along of the repository, so that a Space needs nothing else."""
LEVELS = (1, 2, 4, 8)
SAMPLES = """\
# What it sounds like

`original.flac`: "De dader is een man uit Bangladesh die al enkele jaren in Amerika woont." Read by Nathalie for
`rhasspy/dataset-voice-nathalie`, and dedicated to the public domain:
[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/). The others are what this model makes of it.

| file | codebooks | kbit/s |
| --- | --- | --- |
"""


def stage_model(source: Path, staged: Path, repo_id: str, native: bool = False) -> list[str]:
    """Lay out a model repository.

    Args:
        source: a model directory with the trainer's and the evaluation's results beside the weights, or a folder of a
            run that has it as `model/`.
        staged: an empty folder.
        repo_id: for the card.
        native: add Kyutai's format.

    Returns:
        What its user should know, a sentence each.

    Raises:
        PublishError: there is no such model, or it has no native form.
        hub_cards.card.CardError: its results do not make a card.
    """
    folder = source if (source / "config.json").exists() else source / "model"
    model, features = _load(folder)
    model.save_pretrained(staged)  # with the code of its classes beside it
    features.save_pretrained(staged)
    try:
        save_pipelines(staged)
    except ValueError as error:
        raise PublishError(str(error)) from error
    for path in sorted(path for pattern in RESULTS for path in source.glob(pattern)):
        target = staged / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    notes = []
    if not CLIP.exists():
        notes.append("Without audio samples: their clip is part of the repository, not of the package.")
    elif model.config.encoder_config is None or model.config.decoder_config is None:
        notes.append("Without audio samples: this is half a model.")
    else:
        _add_samples(model, staged / "samples")
    for name, text in eval_results_files(staged, repo_id).items():
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    (staged / "README.md").write_text(str(model_card(staged, repo_id)), encoding="utf-8")
    return notes + (_add_native(staged) if native else [])


def stage_files(source: Path, staged: Path, repo_id: str, repo_type: str) -> None:
    """Lay out a data set or a Space: the folder as it is, its files linked and not copied, and a card if it has none.

    The card of a data set of codes is always made anew, from its `tokens.json`. The page to try the codec brings the
    packages, the bundled checkpoint and the sample speech along.

    Raises:
        PublishError: there is no such folder.
        hub_cards.card.CardError: it does not make a card.
    """
    if not source.is_dir():
        raise PublishError(f"There is no folder {source}.")
    if source.resolve() == PAGE.resolve():
        _link([PAGE / name for name in PAGE_FILES], PAGE, staged)
        _link([file for part in PAGE_NEEDS for file in (ROOT / part).rglob("*")], ROOT, staged)
    else:
        _link(source.rglob("*"), source, staged)
    readme = staged / "README.md"
    if (repo_type == "dataset" and (source / "tokens.json").exists()) or not readme.exists():
        readme.unlink(missing_ok=True)  # the link
        card = {"dataset": dataset_card, "space": metric_card}[repo_type](source, repo_id)
        readme.write_text(str(card), encoding="utf-8")


def _link(paths: Iterable[Path], root: Path, staged: Path) -> None:
    for path in sorted(paths):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") or part in LEFT_OUT for part in name.parts):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).symlink_to(path.resolve())


def _load(folder: Path) -> tuple[MimiModel, MimiFeatureExtractor]:
    """The model and its feature extractor, or one sentence on why not."""
    if not (folder / "config.json").exists():
        raise PublishError(f"There is no model in {folder.parent if folder.name == 'model' else folder}.")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != MimiConfig.model_type:
            raise ValueError(f"it is of the type {kind!r}, not a Mimi")
        model, report = MimiModel.from_pretrained(folder, output_loading_info=True)
        if missing := report["missing_keys"]:
            raise ValueError(f"{len(missing)} of its weights are missing")
        if (folder / "preprocessor_config.json").exists():
            return model.eval(), MimiFeatureExtractor.from_pretrained(folder)
    except (AssertionError, OSError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise PublishError(f"Could not load the model in {folder}: {' '.join(str(error).split())}") from error
    return model.eval(), MimiFeatureExtractor(model.config.audio_channels, model.config.sampling_rate)


def _add_native(staged: Path) -> list[str]:
    """Kyutai's format under a name like theirs: `tokenizer-<of what is in it>-checkpoint<steps>.safetensors`."""
    path = staged / "native.safetensors"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            convert(staged, path)
        except ValueError as error:
            raise PublishError(f"Without --native, please: {error}.") from error
    _sort_metadata(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    summary = staged / "summary.json"
    steps = json.loads(summary.read_text(encoding="utf-8")).get("steps") if summary.exists() else None
    name = f"tokenizer-{digest}" + (f"-checkpoint{steps}" if steps else "")
    path.rename(staged / f"{name}.safetensors")
    return [f"{name}.safetensors: {warning.message}." for warning in caught]


def _sort_metadata(path: Path) -> None:
    """Make equal weights equal files: safetensors writes the entries of its metadata in any order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


@torch.inference_mode()
def _add_samples(model: MimiModel, folder: Path) -> None:
    """The clip and what the model makes of it, bit for bit alike whatever the machine's number of threads."""
    folder.mkdir()
    levels = [level for level in LEVELS if model.config.least_quantizers <= level <= model.config.num_quantizers]
    task = ReconstructFiles(model, "flac", levels)
    clip = task.read(CLIP)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        [waves] = task.run([clip])
    finally:
        torch.set_num_threads(threads)
    task.write(folder / "original.flac", clip.data, clip)
    table = SAMPLES
    for level, wave in zip(levels, waves, strict=True):
        task.write(folder / f"codebooks_{level}.flac", wave, clip)
        table += f"| `codebooks_{level}.flac` | {level} | {model.config.bitrate(level) / 1000:.2f} |\n"
    (folder / "README.md").write_text(table, encoding="utf-8")
