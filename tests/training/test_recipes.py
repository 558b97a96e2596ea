"""Recipes: each resolves, says what it says it says, and differs from its neighbour in nothing else; mistakes exit."""

from pathlib import Path

import draccus
import pytest
import torch
import yaml
from conftest import TINY

from modeling_mimi import MimiConfig, MimiModel
from training.codec import PARTS, build_codec, part_parameters
from training.config import ModelConfig, RecipeError, TrainingConfig, checked, merged, parse, read_recipe
from training.draws import draw

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
ABLATIONS = RECIPES / "ablations"
NAMES = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))
SOURCES = "--data.sources=[{path: speech}]"


def resolved(name: str, *overrides: str) -> TrainingConfig:
    return parse([str(RECIPES / name), SOURCES, *overrides])


def flat(fields: dict, prefix: str = "") -> dict[str, object]:
    """Fields by their dotted names."""
    found = {}
    for key, value in fields.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences(name: str, other: str) -> dict[str, object]:
    """What the first recipe says of the fields in which it differs from the second."""
    ours, theirs = (flat(draccus.encode(resolved(recipe))) for recipe in (name, other))
    assert theirs.keys() <= ours.keys()
    changed = {field: value for field, value in ours.items() if theirs.get(field) != value}
    changed.pop("output_dir")
    return changed


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def sentence(*arguments: str) -> str:
    """What the parser says as it exits."""
    with pytest.raises(SystemExit) as exit_info:
        parse(arguments)
    return str(exit_info.value.code)


# ---- all recipes


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_to_a_codec(name):
    config = resolved(name)
    assert config.data.sources[0].path == "speech"
    codec = MimiConfig(**config.model.config)
    assert codec.frame_rate == 12.5
    assert codec.sampling_rate == 24_000
    assert config.data.segment_s * codec.sampling_rate >= max(config.discriminator.windows)
    crop_s = config.discriminator.crop_s or config.data.segment_s
    assert crop_s * codec.sampling_rate >= max(config.discriminator.windows)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_every_recipe_is_named_in_the_resolved_one(name):
    """Nothing that a file says is lost on the way."""
    said, known = flat(read_recipe(RECIPES / name)), flat(draccus.encode(resolved(name)))
    for field, value in said.items():
        if not field.endswith("sources"):  # whose own fields are filled in
            assert known[field] == value, field


def test_every_recipe_begins_with_what_it_is_for():
    for name in NAMES:
        assert (RECIPES / name).read_text().startswith("# "), name


def test_recipes_write_to_folders_of_their_own():
    folders = [resolved(name).output_dir for name in NAMES]
    assert folders == [f"runs/{name.removesuffix('.yaml')}" for name in NAMES]


# ---- the paper's recipe


def test_mimi_24khz_is_the_paper_field_by_field():
    fields = flat(draccus.encode(resolved("mimi_24khz.yaml")))
    paper = {
        "steps": 4_000_000,
        "weights_decay": 0.99,
        "data.batch_size": 128,
        "data.segment_s": 12.0,
        "model.pretrained": None,
        "model.trainable": ["encoder", "quantizer", "decoder"],
        "model.without": [],
        "model.weight_norm": True,
        "codebooks.codebook_decay": 0.99,
        "codebooks.kmeans_iterations": 50,
        "codebooks.dead_threshold": 0.1,
        "codebooks.dead_check_every": 5,
        "teacher.pretrained": "microsoft/wavlm-large",
        "teacher.layer": None,
        "objective.weights.adversarial": 4.0,
        "objective.weights.feature_matching": 4.0,
        "objective.weights.mel": 0.0,
        "objective.weights.waveform": 0.0,
        "objective.weights.feature_reconstruction": 0.0,
        "objective.weights.commitment": 1.0,
        "objective.balancer": True,
        "objective.norm_decay": 0.999,
        "objective.adversarial_start_step": 0,
        "discriminator.windows": [1024, 2048, 512, 256, 128],
        "discriminator.num_filters": 32,
        "discriminator.crop_s": None,
        "optimizer.learning_rate": 8e-4,
        "optimizer.betas": [0.5, 0.9],
        "optimizer.weight_decay": 5e-2,
        "optimizer.warmup_steps": 0,
        "optimizer.schedule": "constant",
        "optimizer.max_gradient_norm": None,
        "discriminator_optimizer.learning_rate": 3e-4,
        "discriminator_optimizer.betas": [0.5, 0.9],
        "discriminator_optimizer.weight_decay": 0.0,
        "discriminator_optimizer.schedule": "constant",
    }
    assert {field: fields[field] for field in paper} == paper
    assert fields["objective.weights.distillation"] > 0
    codec = MimiConfig(**resolved("mimi_24khz.yaml").model.config).to_dict()
    default = MimiConfig().to_dict()
    assert codec == default
    quantizer = {
        "codebook_size": 2048,
        "codebook_dim": 256,
        "num_quantizers": 8,
        "num_semantic_quantizers": 1,
        "quantizer_dropout": True,
        "unquantized_rate": 0.5,
    }
    assert {field: codec[field] for field in quantizer} == quantizer


def test_the_baseline_adds_encodecs_reconstruction_losses():
    assert differences("mimi_24khz_reconstruction.yaml", "mimi_24khz.yaml") == {
        "objective.weights.mel": 2.0,
        "objective.weights.waveform": 0.1,
    }


# ---- ablations, Table 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "no_distillation_no_split",
            {"model.config.num_semantic_quantizers": 8, "objective.weights.distillation": 0.0},
        ),
        ("no_split", {"model.config.num_semantic_quantizers": 8}),
        ("no_encoder_transformer", {"model.without": ["encoder_transformer"]}),
        ("no_decoder_transformer", {"model.without": ["decoder_transformer"]}),
        ("always_quantized", {"model.config.unquantized_rate": 0.0}),
        ("adversarial_only", {"objective.weights.mel": 0.0, "objective.weights.waveform": 0.0}),
    ],
)
def test_each_ablation_changes_exactly_what_it_says(name, expected):
    assert differences(f"ablations/{name}.yaml", "ablations/baseline.yaml") == expected


def test_every_row_of_the_table_is_an_ablation():
    rows = {}
    for path in ABLATIONS.glob("*.yaml"):
        comment = path.read_text().splitlines()[0]
        rows[int(comment.split("row ")[1][0])] = path.stem
    assert rows == {
        1: "no_distillation_no_split",
        2: "no_split",
        3: "no_encoder_transformer",
        4: "no_decoder_transformer",
        5: "always_quantized",
        6: "baseline",
        7: "adversarial_only",
    }


def test_the_first_and_the_last_ablation_are_the_recipes_beside_them():
    assert differences("ablations/baseline.yaml", "mimi_24khz_reconstruction.yaml") == {}
    assert differences("ablations/adversarial_only.yaml", "mimi_24khz.yaml") == {}


@pytest.mark.parametrize("name", ["encoder_transformer", "decoder_transformer"])
def test_a_model_without_a_transformer_has_the_identity_there(name):
    torch.manual_seed(0)
    model = build_codec(ModelConfig(config=TINY | {"layer_scale_initial_scale": 0.5}, without=(name,)))
    other = {"encoder_transformer": "decoder_transformer", "decoder_transformer": "encoder_transformer"}[name]
    x = torch.randn(2, 30, TINY["hidden_size"])
    assert torch.equal(getattr(model, name)(x).last_hidden_state, x)
    assert not torch.allclose(getattr(model, other)(x).last_hidden_state, x, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in getattr(model, name).parameters())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(parameter.startswith(f"{name}.") for parameter in frozen)


def draws_of(codec: MimiConfig, steps: int = 200) -> list:
    return [draw(codec, 0, step, (1, 2, 8), codec.num_quantizers) for step in range(steps)]


def test_a_rate_of_zero_always_decodes_quantized_latents():
    config = resolved("ablations/always_quantized.yaml")
    assert not any(given.unquantized.any() for given in draws_of(MimiConfig(**config.model.config)))
    torch.manual_seed(0)
    model = build_codec(ModelConfig(config=TINY | config.model.config))
    audio = 0.1 * torch.randn(4, 1, 960)
    output = model(audio, num_quantizers=4)
    always = model(audio, num_quantizers=4, unquantized=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(output.audio_values, always.audio_values)


def test_half_of_the_sequences_are_unquantized_otherwise():
    share = torch.stack([given.unquantized for given in draws_of(MimiConfig())]).float().mean()
    assert 0.46 < share < 0.54


def test_quantizer_dropout_keeps_one_acoustic_level_or_more():
    """The semantic level and U{1..K-1} acoustic ones, one draw for all processes."""
    counts = torch.bincount(torch.tensor([given.num_quantizers for given in draws_of(MimiConfig(), 700)]))
    assert counts[:2].sum() == 0
    assert len(counts) == 9
    assert (counts[2:] > 60).all()
    assert {given.num_quantizers for given in draws_of(MimiConfig(quantizer_dropout=False), 5)} == {8}


def test_draws_are_a_function_of_seed_and_step():
    def values(seed: int, step: int):
        given = draw(MimiConfig(), seed, step, (2, 2, 4), 8)
        return given.num_quantizers, given.unquantized.tolist(), given.crop.tolist(), given.generator.initial_seed()

    assert values(1, 7) == values(1, 7)
    assert len({str(values(seed, step)) for seed in range(3) for step in range(3)}) == 9


# ---- the small recipe


def test_small_has_mimis_tokens_and_at_most_five_million_numbers():
    codec = MimiConfig(**resolved("small.yaml").model.config)
    assert (codec.sampling_rate, codec.frame_rate, codec.num_quantizers, codec.codebook_size) == (
        24_000,
        12.5,
        8,
        2048,
    )
    with torch.device("meta"):
        model = MimiModel(codec)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    entries = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("embed_sum"))
    assert entries == 8 * 2048 * codec.codebook_dim
    assert parameters + entries <= 5_000_000
    text = (RECIPES / "small.yaml").read_text()
    assert f"{parameters / 1e6:.1f} M parameters and {entries / 1e6:.1f} M codebook entries" in " ".join(text.split())


# ---- fine-tuning


def test_fine_tuning_the_decoder_freezes_the_rest_and_asks_nothing_of_it():
    config = resolved("finetune_decoder.yaml")
    weights = config.objective.weights
    assert (weights.commitment, weights.distillation) == (0.0, 0.0)
    assert config.model.config == {"unquantized_rate": 0.0}
    model = build_codec(ModelConfig(config=TINY, trainable=config.model.trainable))
    for part in PARTS:
        assert {p.requires_grad for p in part_parameters(model, part)} == {part == "decoder"}


# ---- how recipes are read


def test_nested_fields_are_merged_one_by_one_and_lists_as_wholes():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": [1, 2]}}, "g": {"h": 1}}
    changes = {"a": 5, "b": {"d": {"f": [9]}, "i": 7}, "g": None}
    assert merged(base, changes) == {"a": 5, "b": {"c": 2, "d": {"e": 3, "f": [9]}, "i": 7}, "g": None}
    assert base == {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": [1, 2]}}, "g": {"h": 1}}


def test_a_recipe_is_a_difference_from_its_base(tmp_path):
    write(tmp_path, "steps: 10\ndata: {batch_size: 4, segment_s: 3.0}\nmodel: {config: {num_filters: 8}}", "one.yaml")
    (tmp_path / "deep").mkdir()
    write(
        tmp_path / "deep", "base: ../one.yaml\ndata: {segment_s: 2.0}\nmodel: {config: {hidden_size: 32}}", "two.yaml"
    )
    path = write(tmp_path / "deep", "base: two.yaml\nsteps: 11", "three.yaml")
    config = parse([path, SOURCES])
    assert (config.steps, config.data.batch_size, config.data.segment_s) == (11, 4, 2.0)
    assert config.model.config == {"num_filters": 8, "hidden_size": 32}


def test_the_command_line_wins(tmp_path):
    path = write(tmp_path, "steps: 10\ndata: {sources: [{path: a}]}\nobjective: {weights: {mel: 2.0}}")
    config = parse(
        [path, "--steps=7", "--objective.weights.mel=3", "--data.sources=[{path: b}, {path: c, weight: 2}]"]
    )
    assert (config.steps, config.objective.weights.mel) == (7, 3.0)
    assert [(source.path, source.weight) for source in config.data.sources] == [("b", 1.0), ("c", 2.0)]
    assert config.objective.weights.commitment == 1.0
    assert parse([path, "--model.config={unquantized_rate: 0.25}"]).model.config == {"unquantized_rate": 0.25}


def test_a_run_may_be_described_on_the_command_line_alone():
    config = parse([SOURCES, "--steps=3"])
    assert config == TrainingConfig(steps=3, data=config.data)


def test_resolved_recipes_read_back_as_they_are(tmp_path):
    """What is saved with a checkpoint starts the same run."""
    for name in ("small.yaml", "ablations/no_encoder_transformer.yaml"):
        config = resolved(name)
        assert parse([write(tmp_path, draccus.dump(config))]) == config


@pytest.mark.parametrize("override", ["--discriminator_optimizer.max_gradient_norm=5", None])
def test_one_field_of_the_discriminators_optimizer_leaves_the_others_at_their_defaults(override, tmp_path):
    path = write(tmp_path, "{}" if override else "discriminator_optimizer: {max_gradient_norm: 5.0}")
    optimizer = parse([path, SOURCES, *([override] if override else [])]).discriminator_optimizer
    assert optimizer.max_gradient_norm == 5.0
    assert (optimizer.learning_rate, optimizer.weight_decay) == (3e-4, 0.0)


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stesp: 3", "`stesp`"),
        ("data: {segment: 2.0}", "`segment`"),
        ("objective: {weights: {melody: 1.0}}", "`melody`"),
        ("validation: {sources: [{paht: x}]}", "`paht`"),
        ("steps: many", "`steps`"),
        ("steps: 3.5", "`steps`"),
        ("objective: {weights: {mel: high}}", "`objective.weights.mel`"),
        ("data: {gain_db: [1.0]}", "`data.gain_db`"),
        ("data: {short_clips: cut}", "`data.short_clips`"),
        ("model: {trainable: [head]}", "`model.trainable"),
        ("model: {without: [encoder]}", "`model.without"),
        ("precision: fp16", "`precision`"),
        ("steps: null", "steps"),
    ],
)
def test_a_mistake_in_a_recipe_exits_and_names_the_field(tmp_path, text, named):
    path = write(tmp_path, text)
    said = sentence(path, SOURCES)
    assert said.startswith(f"{path}: ")
    assert named in said
    assert len(said) < 300 + len(path)


@pytest.mark.parametrize("text", ["data: [", "- steps", "steps"])
def test_a_file_that_is_no_recipe_exits_with_its_name(tmp_path, text):
    path = write(tmp_path, text)
    assert path in sentence(path, SOURCES)


@pytest.mark.parametrize("argument", ["--data.segment=2", "--segment_s=2", "--objective.weights.melody=1", "steps=3"])
def test_an_unknown_field_on_the_command_line_exits_and_is_named(argument, capsys):
    sentence(SOURCES, argument)
    assert argument in capsys.readouterr().err


def test_a_wrong_type_on_the_command_line_exits_and_names_the_field():
    assert "`data.batch_size`" in sentence(SOURCES, "--data.batch_size=big")


def test_an_unknown_field_of_the_codec_is_refused_too():
    """It would otherwise train something else than what was asked for."""
    with pytest.raises((ValueError, TypeError, SystemExit), match="unquantised_rate"):
        build_codec(parse([SOURCES, f"--model.config={TINY | {'unquantised_rate': 0.0}}"]).model)


def test_a_recipe_that_is_not_there_exits_and_names_those_that_are(tmp_path):
    said = sentence(str(tmp_path / "missing.yaml"))
    assert "missing.yaml" in said
    assert "mimi_24khz.yaml" in said
    path = write(tmp_path, "base: nowhere.yaml")
    assert "nowhere.yaml" in sentence(path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data.sources=[]"], "data.sources"),
        (["--data.batch_size=0"], "data.batch_size"),
        (["--steps=-1"], "steps"),
        (["--data.segment_s=0.25"], "data.min_duration_s"),
        (["--objective.weights.mel=-1"], "objective.weights"),
        (["--model.trainable=[]"], "model.trainable"),
        (["--objective.weights.adversarial=0", "--objective.weights.feature_matching=0"], "objective.weights"),
    ],
)
def test_fields_that_make_no_sense_together_exit_with_a_sentence(arguments, named):
    assert named in sentence(SOURCES, *arguments)


def test_a_frozen_decoder_needs_no_loss_of_its_own():
    parse([SOURCES, "--model.trainable=[quantizer]", "--objective.weights.adversarial=0", "--objective.weights.mel=0"])


def test_what_is_checked_raises_a_recipe_error():
    with pytest.raises(RecipeError, match=r"data\.sources"):
        checked(TrainingConfig())


def test_recipes_are_plain_yaml():
    for name in NAMES:
        assert isinstance(yaml.safe_load((RECIPES / name).read_text()), dict)
