"""What a recipe says: every field of a training run, with its unit and its default's reason.

A recipe is YAML with these fields; `base: other.yaml` makes it a difference from the recipe beside it. The command
line overrides both (`--data.segment_s=2`). Unknown fields are refused.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import draccus
import yaml

from modeling_mimi import MimiConfig

BALANCED = ("adversarial", "feature_matching", "mel", "waveform", "feature_reconstruction")
"""Losses of the reconstruction, which act through the balancer."""


@dataclass(frozen=True)
class SourceConfig:
    """One corpus, read as a `datasets` stream."""

    path: str
    """Hub id, folder of audio (with `metadata.csv` or `.jsonl`), or parquet, webdataset `.tar` or audio file names
    (globs allowed)."""
    name: str | None = None
    """Configuration of a Hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set, or the folder of that name inside a local one where there is one."""
    audio_column: str = "audio"
    """Column that holds the audio."""
    weight: float = 1.0
    """Share of the windows drawn from this source, relative to the other sources' weights."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """Keep the rows whose column has one of the values listed for it, such as `license: [CC0-1.0]`."""


@dataclass(frozen=True)
class DataConfig:
    """How sources become batches of windows."""

    sources: tuple[SourceConfig, ...] = ()
    """What to train on."""
    batch_size: int = 128
    """Windows per optimizer step, over all processes and accumulation steps (Moshi §3.3.5)."""
    segment_s: float = 12.0
    """Length of a window in seconds (Moshi §3.3.5)."""
    min_duration_s: float = 0.5
    """Clips shorter than this are skipped and counted."""
    short_clips: Literal["pad", "join"] = "pad"
    """Clips shorter than a window are padded, and the padding is masked out of the losses, or joined to fill it."""
    gain_db: tuple[float, float] = (0.0, 0.0)
    """Each window's gain is drawn from this range, in dB; no window is made to exceed full scale."""
    min_loudness_db: float = -60.0
    """Windows with a root mean square below this, in dB of full scale, are skipped and counted as silence."""
    shuffle_clips: int = 256
    """Clips whose windows are shuffled with one another; the order of a source's files is shuffled besides."""
    num_workers: int = 2
    """Worker processes per process that decode and resample; 0 does it between the steps."""
    prefetch_batches: int = 4
    """Batches each worker keeps ready."""


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from and what of it trains."""

    pretrained: str | None = None
    """Hub id or directory to fine-tune; a fresh model if not given."""
    revision: str | None = None
    """Commit, tag or branch of `pretrained`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `MimiConfig` that differ from Mimi's, or from those of `pretrained`."""
    initial_gain: float = 1.0
    """Width of a fresh model's convolution weights relative to PyTorch's, which Kyutai start from. Those let the
    signal fade from layer to layer; sqrt(3) keeps its variance, and a short run starts at once."""
    trainable: tuple[Literal["encoder", "quantizer", "decoder"], ...] = ("encoder", "quantizer", "decoder")
    """Parts that train: each half with its transformer and its resampling, the quantizer with its codebooks."""
    without: tuple[Literal["encoder_transformer", "decoder_transformer"], ...] = ()
    """Transformers held at the identity, for ablations: their layer scales are 0 and they do not train."""
    weight_norm: bool = True
    """Train SEANet's convolutions as direction and magnitude, as Kyutai do; folded on export."""
    gradient_checkpointing: bool = False
    """Recompute the transformers' activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the model and the discriminator."""


@dataclass(frozen=True)
class CodebookConfig:
    """How codebooks follow the latents (Moshi §3.3.3; statistics over all processes)."""

    codebook_decay: float = 0.99
    """Decay of the running sums, per step."""
    kmeans_iterations: int = 50
    """Iterations of k-means on the first batch that a level sees."""
    dead_threshold: float = 0.1
    """An entry is dead when its running usage falls below this share of the mean usage."""
    dead_check_every: int = 5
    """Steps between replacements of dead entries."""


@dataclass(frozen=True)
class TeacherConfig:
    """The speech encoder that the semantic codebook learns from (Moshi §3.3.3)."""

    pretrained: str = "microsoft/wavlm-large"
    """Hub id or directory of any speech encoder that `AutoModel` loads."""
    revision: str | None = None
    """Commit, tag or branch."""
    layer: int | None = None
    """Hidden state to learn from: 0 is before the first layer; the last if not given (the paper's choice)."""


@dataclass(frozen=True)
class WeightsConfig:
    """Weight of each loss; 0 switches it off. Those of `BALANCED` act through the balancer."""

    adversarial: float = 4.0
    """Hinge loss of the decoder, -mean(logit); 4 as in EnCodec's baseline."""
    feature_matching: float = 4.0
    """L1 between the discriminator's features of audio and reconstruction."""
    mel: float = 0.0
    """Multi-scale log-mel distance; 2 in the baseline with reconstruction losses."""
    waveform: float = 0.0
    """L1 between the waves; 0.1 in the baseline."""
    feature_reconstruction: float = 0.0
    """L1 between the teacher's features of audio and reconstruction; not in the paper."""
    commitment: float = 1.0
    """MSE between residuals and chosen entries, averaged over levels; outside the balancer."""
    distillation: float = 1.0
    """One minus the cosine to the teacher's features; outside the balancer. The paper does not state its weight: 1
    gives the semantic branch a gradient of the size of the balancer's `total_norm`."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Weight of each loss."""
    balancer: bool = True
    """Let each balanced loss contribute its weight's share of the gradient at the decoder's output, whatever its
    scale; otherwise losses are added as they are."""
    total_norm: float = 16.0
    """Norm of the balanced gradient at the decoder's output, per clip; so the share of commitment and distillation
    does not depend on the batch size. In EnCodec's trainer it grows with the clips that a device holds; 16 is what
    that gives for 128 clips on 8 devices. Too low, and the encoder hears commitment and distillation alone."""
    norm_decay: float = 0.999
    """Decay of the running gradient norms."""
    discriminator_start_step: int = 0
    """Step at which the discriminator begins to learn."""
    adversarial_start_step: int = 0
    """Step at which its two losses begin to act on the codec. Later than its own start in short runs and where a
    trained codec meets a new discriminator: the balancer would give full weight to one that knows nothing yet."""
    mel_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    """Window lengths of the mel distance, in samples."""
    mel_floor: float = 1e-5
    """Mel magnitudes, of full scale, below which differences do not count: -100 dB. A codec of a low rate spends
    itself on hiss and near-silence unless it is higher."""
    mel_magnitude_weight: float = 0.0
    """Weight, within the mel loss, of the relative L1 distance of magnitudes beside that of their logarithms: what is
    loud, such as formants and harmonics, then counts more. EnCodec's mel loss has such a part."""
    mel_bins: int = 64
    """Mel bands of the longest windows; shorter windows have an eighth of their length."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The multi-scale STFT discriminator (Moshi §3.3.4; EnCodec §3.4)."""

    windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    """STFT window of each sub-discriminator, in samples; hop is a quarter."""
    num_filters: int = 32
    """Channels of its convolutions."""
    crop_s: float | None = None
    """Judge a random crop of this many seconds instead of the whole window; for speed, not in the paper."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with a warm-up and a schedule."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """AdamW (Moshi §3.3.5); or Muon for what is a matrix and AdamW for the rest, which needs far fewer steps."""
    learning_rate: float = 8e-4
    """Peak learning rate (Moshi §3.3.5)."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay of the moments (Moshi §3.3.5)."""
    weight_decay: float = 0.05
    """Decay of transformer weights only (Moshi §3.3.5)."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the paper states none."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up; the paper states none."""
    final_learning_rate: float = 0.0
    """Learning rate that the cosine ends at."""
    max_gradient_norm: float | None = None
    """Gradients are scaled down to this norm; the paper states none."""


@dataclass(frozen=True)
class DiscriminatorOptimizerConfig(OptimizerConfig):
    """The same for the discriminator. The paper does not state it: the rate is EnCodec's."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """There is no transformer to decay."""


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured on the averaged weights."""

    sources: tuple[SourceConfig, ...] = ()
    """Clips to measure on; no validation if empty."""
    clips: int = 64
    """Number of clips, the first of the stream."""
    clip_s: float = 10.0
    """Longer clips are cut to this, in seconds."""
    examples: int = 4
    """Clips kept as audio and pictures each time."""
    every: int = 5000
    """Steps between validations."""


@dataclass(frozen=True)
class PushConfig:
    """Publishing on the Hub, with the token of `hf auth login` or `HF_TOKEN`. A push that fails stops nothing."""

    repo: str | None = None
    """`owner/name`, made if it is missing; nothing is published if not given."""
    every: int | None = None
    """Steps between pushes, each after the next checkpoint; only at the end if not given."""
    private: bool = False
    """Whether a repository that is made is for its owner's eyes only."""
    revision: str = "main"
    """Branch, made if it is missing."""


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run."""

    output_dir: str = "runs/mimi"
    """Everything the run writes; starting again with the same directory resumes."""
    seed: int = 0
    """Seed of weights, data order and draws."""
    steps: int = 4_000_000
    """Optimizer steps in all (Moshi §3.3.5)."""
    accumulation_steps: int = 1
    """Parts that each process takes its share of a batch in."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of networks; quantizer, spectra and losses stay in float32."""
    weights_decay: float = 0.99
    """Decay of the averaged weights, which are what is evaluated and published (Moshi §3.3.5)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    codebooks: CodebookConfig = field(default_factory=CodebookConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: DiscriminatorOptimizerConfig = field(default_factory=DiscriminatorOptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint_every: int = 5000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, beside the best."""
    best_metric: Literal["mel_distance", "si_sdr", "stoi"] = "mel_distance"
    """Validation score that names the best checkpoint."""
    log_every: int = 50
    """Steps between log entries."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the log goes besides `history.jsonl`."""
    push: PushConfig = field(default_factory=PushConfig)
    exploding_norm: float = 1e6
    """A gradient norm above this, or one that is not finite, skips the step."""
    max_skipped_steps: int = 20
    """Steps skipped in a row that end the run."""


class RecipeError(ValueError):
    """A recipe asks for what cannot be; the message says which field and what to do."""


def parse(arguments: Sequence[str]) -> TrainingConfig:
    """The configuration that a recipe and the overrides after it describe; exits with a sentence if they do not."""
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe, overrides = (arguments[0], arguments[1:]) if named else (None, arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            resolved = Path(folder) / "recipe.yaml"
            resolved.write_text(yaml.safe_dump(read_recipe(recipe) if recipe else {}))
            config = draccus.parse(TrainingConfig, config_path=resolved, args=overrides, prog="python -m training")
        return checked(config)
    except (draccus.utils.DecodingError, RecipeError, yaml.YAMLError) as error:
        sys.exit(f"{recipe or 'command line'}: {error}")


def read_recipe(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's fields, merged over those of its `base`; `above` are the recipes that it is the base of."""
    path = Path(path)
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in (Path(__file__).parent / "recipes").glob("*.yaml")))
        raise RecipeError(f"There is no recipe {path}. Shipped in training/recipes: {shipped}.")
    fields = yaml.safe_load(path.read_text()) or {}
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} holds no fields, but a {type(fields).__name__}.")
    base = fields.pop("base", None)
    if base is None:
        return fields
    if path.resolve() in above:
        raise RecipeError(f"{path} is its own base.")
    return merged(read_recipe(path.parent / base, (*above, path.resolve())), fields)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; nested fields one by one, lists as wholes."""
    both = {key: merged(base[key], value) for key, value in changes.items() if _nested(base.get(key), value)}
    return {**base, **changes, **both}


def _missing(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that are null and may not be, which draccus lets pass."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if value is None and type(None) not in get_args(entry.type):
            yield prefix + entry.name
        elif dataclasses.is_dataclass(value):
            yield from _missing(value, f"{prefix}{entry.name}.")


def _nested(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def checked(config: TrainingConfig) -> TrainingConfig:
    """The configuration, if its fields make sense together; `RecipeError` names the field that does not."""
    for name in _missing(config):
        raise RecipeError(f"{name}: must not be null")
    weights, data = config.objective.weights, config.data
    unknown = config.model.config.keys() - MimiConfig().to_dict().keys()
    problems = {
        "data.sources: name at least one data set to train on": not data.sources,
        "data.batch_size, data.segment_s, steps, accumulation_steps: must be positive": min(
            data.batch_size, data.segment_s, config.steps, config.accumulation_steps
        )
        <= 0,
        "data.min_duration_s: must not exceed data.segment_s": data.min_duration_s > data.segment_s,
        "objective.weights: none may be negative": min(vars(weights).values()) < 0,
        "model.trainable: nothing would train": not config.model.trainable,
        "objective.weights: the decoder trains, so give one of " + ", ".join(BALANCED) + " a weight": (
            "decoder" in config.model.trainable and not any(getattr(weights, name) for name in BALANCED)
        ),
        "objective.adversarial_start_step: must not lie before discriminator_start_step": (
            config.objective.adversarial_start_step < config.objective.discriminator_start_step
        ),
        "push.repo: must be owner/name": config.push.repo is not None and config.push.repo.count("/") != 1,
        "push.every: must be positive": config.push.every is not None and config.push.every <= 0,
        f"model.config: MimiConfig has no {', '.join(sorted(unknown))}": bool(unknown),
    }
    for problem, found in problems.items():
        if found:
            raise RecipeError(problem)
    return config
