"""The average of the weights, what decays and how fast it learns, means between log entries, and checkpoints."""

import math

import pytest
import torch
from conftest import TINY, assert_same_codes, draw_codebooks, speech
from torch import nn
from transformers import MimiModel as StockMimiModel

from modeling_mimi import MimiModel
from training.checkpoints import Checkpoints
from training.codec import averaged_codec, build_codec
from training.config import ModelConfig, OptimizerConfig
from training.ema import WeightAverage
from training.meters import Meters
from training.optimization import build_optimizer, gradient_norm, learning_rate, scale_gradients, set_learning_rate


def same(x: torch.Tensor) -> torch.Tensor:
    return x


# ---- the average of the weights


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.scalar = nn.Parameter(torch.zeros(1))
        self.sums = nn.Buffer(torch.zeros(2))
        self.flag = nn.Buffer(torch.zeros(1))

    def become(self, value: float) -> "Small":
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(value)
        return self


def test_the_average_in_closed_form():
    """After t updates step s counts by decay ** (t - s), and the weights before the first not at all."""
    module = Small().become(100.0)
    average, decay = WeightAverage(module, 0.9), 0.9
    values = [2.0, -1.0, 5.0, 0.5]
    for t in range(1, len(values) + 1):
        average.update(module.become(values[t - 1]))
        shares = [decay ** (t - s) for s in range(1, t + 1)]
        expected = sum(share * value for share, value in zip(shares, values, strict=False)) / sum(shares)
        for name in ("weight", "scalar", "sums"):
            torch.testing.assert_close(average.average[name], torch.full_like(average.average[name], expected))
        assert average.average["flag"] == values[t - 1], "flags are copied"


def test_after_the_first_update_the_average_is_the_weights():
    module = Small()
    average = WeightAverage(module, 0.99)
    average.update(module.become(7.0))
    assert all((value == 7.0).all() for value in average.average.values())


def test_the_average_is_a_copy():
    module = Small().become(1.0)
    average = WeightAverage(module, 0.5)
    average.update(module)
    module.become(9.0)
    assert all((value == 1.0).all() for value in average.average.values())
    assert not any(value.requires_grad for value in average.average.values())


def test_the_average_goes_on_from_its_state():
    module = Small()
    average = WeightAverage(module, 0.8)
    for value in (1.0, 4.0):
        average.update(module.become(value))
    state = {
        "total": average.total,
        "average": {name: v.clone() for name, v in average.state_dict()["average"].items()},
    }
    again = WeightAverage(Small(), 0.8)
    again.load_state_dict(state)
    for each in (average, again):
        each.update(module.become(-3.0))
    assert all(torch.equal(average.average[name], again.average[name]) for name in average.average)


def test_an_average_of_another_model_is_refused():
    average = WeightAverage(Small(), 0.9)
    state = average.state_dict()
    renamed = {"total": 1.0, "average": {f"module.{name}": value for name, value in state["average"].items()}}
    with pytest.raises(ValueError, match=r"of another model.*flag"):
        average.load_state_dict(renamed)


@pytest.fixture(scope="module")
def trained():
    """A codec with weight norm after three "steps", the average, and the states that it went through."""
    torch.manual_seed(0)
    codec = build_codec(ModelConfig(config=TINY))
    draw_codebooks(codec, speech(12_000))
    average, states = WeightAverage(codec, 0.9), []
    for step in range(3):
        with torch.no_grad():
            for parameter in codec.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
            for name, buffer in codec.named_buffers():
                if "initialized" not in name:
                    buffer.mul_(1 + 0.1 * torch.rand_like(buffer))
                else:
                    buffer.fill_(step % 2)
        average.update(codec)
        states.append({name: value.clone() for name, value in codec.state_dict().items()})
    return codec, average, states


def test_everything_of_a_codec_is_averaged_codebooks_too(trained):
    codec, average, states = trained
    assert average.average.keys() == codec.state_dict().keys()
    shares = torch.tensor([0.81, 0.9, 1.0]) / 2.71
    for name, value in average.average.items():
        if name.endswith("initialized"):
            assert value == states[-1][name]
            continue
        expected = sum(share * state[name] for share, state in zip(shares, states, strict=True))
        torch.testing.assert_close(value, expected, msg=name)
    assert sum(name.endswith("embed_sum") for name in average.average) == TINY["num_quantizers"]


def test_the_averaged_codec_is_the_average_folded(trained):
    codec, average, _ = trained
    model = averaged_codec(codec, average.average)
    assert not model.training
    state = model.state_dict()
    assert not any("parametrizations" in name for name in state)
    folded = 0
    for name, value in average.average.items():
        if name.endswith("original1"):
            magnitude = average.average[name[:-1] + "0"]
            norm = value.flatten(1).norm(dim=1).view(-1, 1, 1)
            expected = magnitude * value / norm
            torch.testing.assert_close(state[name.replace("parametrizations.weight.original1", "weight")], expected)
            folded += 1
        elif not name.endswith("original0"):
            assert torch.equal(state[name], value), name
    assert folded == 2 * (2 + 3 * len(TINY["upsampling_ratios"]))


def test_the_averaged_codec_sounds_like_a_model_loaded_with_the_average(trained):
    codec, average, states = trained
    audio = speech(4800)
    model = averaged_codec(codec, average.average)
    loaded = MimiModel(codec.config)
    loaded.apply_weight_norm()
    loaded.load_state_dict(average.average)
    last = MimiModel(codec.config)
    last.apply_weight_norm()
    last.load_state_dict(states[-1])
    with torch.no_grad():
        ours, theirs, other = model(audio), loaded.eval()(audio), last.eval()(audio)
    assert_same_codes(model, model.encode(audio, output_latents=True).latents, ours.audio_codes, theirs.audio_codes)
    torch.testing.assert_close(ours.audio_values, theirs.audio_values, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(ours.audio_values, other.audio_values, rtol=1e-3, atol=1e-5)


def test_averaging_leaves_the_trained_codec_as_it_is(trained):
    codec, average, states = trained
    averaged_codec(codec, average.average)
    assert codec.training
    assert all(torch.equal(value, states[-1][name]) for name, value in codec.state_dict().items())


def test_an_average_of_something_else_is_an_error(trained):
    codec, average, _ = trained
    odd = dict(average.average)
    odd.pop(next(name for name in odd if name.endswith("embed_sum")))
    with pytest.raises(RuntimeError, match="embed_sum"):
        averaged_codec(codec, odd)


def test_the_averaged_codec_loads_in_stock_transformers_with_equal_codes(trained, tmp_path):
    codec, average, _ = trained
    model = averaged_codec(codec, average.average)
    model.save_pretrained(tmp_path)
    stock, loading = StockMimiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    audio = speech(9600)
    with torch.no_grad():
        encoded = model.encode(audio, output_latents=True)
        theirs = stock.eval().encode(audio).audio_codes
    assert_same_codes(model, encoded.latents, encoded.audio_codes, theirs)
    assert encoded.audio_codes.unique().numel() > 8


# ---- the first weights


def test_the_initial_gain_widens_convolutions_and_nothing_else():
    built = []
    for gain in (1.0, 3.0):
        torch.manual_seed(0)
        built.append(dict(build_codec(ModelConfig(config=TINY, initial_gain=gain, weight_norm=False)).state_dict()))
    plain, wide = built
    convolutions = {name for name in plain if plain[name].dim() == 3 and name.endswith("weight")}
    assert len(convolutions) > 10
    for name, values in plain.items():
        torch.testing.assert_close(wide[name], values * (3.0 if name in convolutions else 1.0))


# ---- the optimizer


def test_only_matrices_of_the_transformers_decay():
    codec = build_codec(ModelConfig(config=TINY))
    head = nn.Linear(4, 4)
    optimizer = build_optimizer([codec, head], OptimizerConfig(weight_decay=0.05))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in codec.named_parameters() if decays.pop(id(p)) == 0.05}
    weights = [f"self_attn.{name}_proj.weight" for name in "qkvo"] + ["mlp.fc1.weight", "mlp.fc2.weight"]
    assert decayed == {
        f"{half}_transformer.layers.{layer}.{weight}"
        for half in ("encoder", "decoder")
        for layer in range(TINY["num_hidden_layers"])
        for weight in weights
    }
    assert set(decays.values()) == {0.0}
    assert len(decays) == len(list(head.parameters())), "every parameter is in one group"


def test_what_is_frozen_is_not_optimised():
    codec = build_codec(ModelConfig(config=TINY, trainable=("decoder",)))
    optimizer = build_optimizer([codec], OptimizerConfig())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {
        id(p) for part in (codec.upsample, codec.decoder_transformer, codec.decoder) for p in part.parameters()
    }


def test_adamw_takes_its_fields():
    optimizer = build_optimizer([nn.Linear(2, 2)], OptimizerConfig(learning_rate=0.25, betas=(0.1, 0.2)))
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.1, 0.2), 0.0)
    set_learning_rate(optimizer, 0.125)
    assert group["lr"] == 0.125


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({}, {0: 1.0, 7: 1.0, 99: 1.0}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 99: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0.0, 500: 0.0}),
        (
            {"schedule": "cosine", "warmup_steps": 20, "final_learning_rate": 0.2},
            {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.6, 100: 0.2, 101: 0.2},
        ),
    ],
)
def test_learning_rates_by_hand(fields, rates):
    config = OptimizerConfig(learning_rate=1.0, **fields)
    assert {step: learning_rate(step, 100, config) for step in rates} == pytest.approx(rates)


def test_the_norm_of_gradients_is_that_of_all_together():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(5))]
    assert gradient_norm(parameters) == 0
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([[6.0]])
    assert gradient_norm(parameters) == 7.0
    parameters[1].grad.fill_(math.nan)
    assert gradient_norm(parameters).isnan()


def test_gradients_are_scaled_in_place():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    scale_gradients(parameters, 0.5)
    parameters[0].grad = torch.tensor([2.0, -8.0])
    scale_gradients(parameters, 0.5)
    assert parameters[0].grad.tolist() == [1.0, -4.0]
    assert parameters[1].grad is None


# ---- meters


def test_meters_give_means_since_the_last_take():
    meters = Meters()
    assert meters.take(same) == {}
    for value in (1.0, 2.0, 6.0):
        meters.add({"a": torch.tensor(value, requires_grad=True)})
        meters.add({"b": 2 * value} if value < 5 else {})
        meters.commit()
    assert meters.take(same) == {"a": 3.0, "b": 3.0}
    assert meters.take(same) == {}


def test_meters_average_the_parts_of_a_step():
    meters = Meters()
    for value in (1.0, 3.0):
        meters.add({"loss": torch.tensor(value)})
    meters.commit()
    assert meters.take(same) == {"loss": 2.0}


def test_a_discarded_step_is_in_no_mean():
    meters = Meters()
    meters.add({"loss": 1.0})
    meters.commit()
    meters.add({"loss": math.nan, "other": 1.0})
    meters.discard()
    assert meters.take(same) == {"loss": 1.0}


def test_meters_average_over_processes_in_one_collective():
    meters, asked = Meters(), []

    def mean(own: torch.Tensor) -> torch.Tensor:
        asked.append(own.tolist())
        return own + 10

    meters.add({"b": 2.0, "a": 1.0})
    meters.commit()
    assert meters.take(mean) == {"a": 11.0, "b": 12.0}
    assert asked == [[1.0, 2.0]], "in an order that all processes share"


def test_meters_go_on_from_their_state(tmp_path):
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0)})
    meters.commit()
    torch.save(meters.state_dict(), tmp_path / "state.pt")
    again = Meters()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (meters, again):
        each.add({"loss": 4.0})
        each.commit()
    assert again.take(same) == meters.take(same) == {"loss": 2.5}


# ---- checkpoints


def save(checkpoints: Checkpoints, step: int, rank: int = 0, **options) -> None:
    checkpoints.save(step, {"step": step}, {"rank": rank, "step": step}, rank, lambda: None, **options)


def test_a_checkpoint_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints", keep=3)
    assert checkpoints.load(0) is None
    assert checkpoints.steps() == []
    save(checkpoints, 5, extra=lambda folder: (folder / "note.txt").write_text("hello"))
    save(checkpoints, 123_456_789)
    assert checkpoints.steps() == [5, 123_456_789]
    assert checkpoints.load(0) == ({"step": 123_456_789}, {"rank": 0, "step": 123_456_789})
    assert (checkpoints.path(5) / "note.txt").read_text() == "hello"


def test_each_process_has_its_own_state_and_a_new_one_gets_the_first_ones(tmp_path):
    """Played in turn: the second process writes while the first waits."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    waits = iter([None, lambda: checkpoints.save(7, {}, {"rank": 1}, 1, lambda: None), None])

    def wait() -> None:
        other = next(waits)
        if other is not None:
            other()

    # the second process writes its own file between the first two waits of the first one
    checkpoints.save(7, {"step": 7}, {"rank": 0}, 0, wait)
    assert checkpoints.load(0) == ({"step": 7}, {"rank": 0})
    assert checkpoints.load(1) == ({"step": 7}, {"rank": 1})
    assert checkpoints.load(2) == ({"step": 7}, {"rank": 0})


def test_an_interrupted_save_leaves_the_older_checkpoint_and_the_next_one_cleans_up(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)

    def fail(folder) -> None:
        (folder / "half.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2, extra=fail)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", ".unfinished"}
    assert checkpoints.steps() == [1]
    assert checkpoints.load(0)[0] == {"step": 1}
    save(checkpoints, 3)
    assert checkpoints.steps() == [1, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}
    assert {path.name for path in checkpoints.path(3).iterdir()} == {"state.pt", "process-0.pt"}


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(4, {"step": 4, "old": True}, {}, 0, lambda: None)
    save(checkpoints, 4)
    assert checkpoints.load(0)[0] == {"step": 4}


@pytest.mark.parametrize(
    ("keep", "best", "kept"), [(2, None, [4, 5]), (2, 1, [1, 4, 5]), (1, 5, [5]), (9, 2, [1, 2, 3, 4, 5])]
)
def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path, keep, best, kept):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(1, 6):
        save(checkpoints, step, best=best)
    assert checkpoints.steps() == kept


def test_a_best_that_is_no_longer_best_goes(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        save(checkpoints, step, best=best)
    assert checkpoints.steps() == [3, 4]
