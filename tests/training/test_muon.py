"""Muon: what counts as a matrix, steps by hand, and a state that goes on as if nothing had happened."""

import copy

import pytest
import torch
from conftest import TINY
from torch import nn

from training.codec import build_codec
from training.config import ModelConfig, OptimizerConfig
from training.muon import MuonAdamW, is_matrix, orthogonalized
from training.optimization import build_optimizer

MUON = OptimizerConfig(algorithm="muon", learning_rate=0.01, weight_decay=0.05)


@pytest.mark.parametrize("shape", [(4, 4), (3, 40), (40, 3)])
def test_all_directions_of_a_matrix_count_alike(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    strengths = torch.logspace(0, -1.5, len(v))
    result = orthogonalized(u @ torch.diag(strengths) @ v)
    found = u.T @ result @ v.T  # still the same directions, each with a strength of about 1
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-4
    assert 0.6 < found.diagonal().min() <= found.diagonal().max() < 1.3
    assert torch.isfinite(orthogonalized(torch.zeros(shape))).all()


def test_what_is_a_matrix_takes_muon_and_the_rest_adamw():
    codec = build_codec(ModelConfig(config=TINY, weight_norm=True))
    optimizer = build_optimizer([codec], MUON)
    names = {id(parameter): name for name, parameter in codec.named_parameters()}
    groups = [(group, {names.pop(id(p)) for p in group["params"]}) for group in optimizer.param_groups]
    assert not names, "every parameter is in one group, and in one only"
    muon = set().union(*(inside for group, inside in groups if group["muon"]))
    assert all(is_matrix(codec.get_parameter(name)) for name in muon)
    assert "encoder_transformer.layers.0.self_attn.q_proj.weight" in muon
    assert any(name.startswith("decoder.layers") and name.endswith("weight.original1") for name in muon)
    others = {name for name, _ in codec.named_parameters()} - muon
    assert {"upsample.conv.weight", "encoder_transformer.layers.0.input_layernorm.weight"} <= others
    assert all(
        (group["weight_decay"] == 0.05) == all("transformer." in name for name in inside)
        for group, inside in groups
        if group["muon"]
    )


def test_two_steps_of_a_convolution_by_hand():
    """A weight (O, I, W) moves as the matrix (O, I W), by AdamW's root mean square; its bias moves as in AdamW."""
    torch.manual_seed(0)
    convolution = nn.Conv1d(6, 4, 3)
    twin = copy.deepcopy(convolution)
    optimizer = MuonAdamW(
        [
            {"params": [convolution.weight], "muon": True, "weight_decay": 0.1},
            {"params": [convolution.bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.5, 0.9),
    )
    adamw = torch.optim.AdamW([twin.bias], lr=0.01, betas=(0.5, 0.9), weight_decay=0.0)
    weight, momentum = convolution.weight.detach().clone(), torch.zeros(4, 18)
    for _ in range(2):
        for parameter, other in zip(convolution.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        gradient = convolution.weight.grad.reshape(4, 18)
        momentum = 0.95 * momentum + gradient
        update = orthogonalized(gradient + 0.95 * momentum) * 0.2 * 18**0.5
        assert 0.1 < update.square().mean().sqrt() < 0.3
        weight = (1 - 0.01 * 0.1) * weight - 0.01 * update.reshape(4, 6, 3)
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(convolution.weight.detach(), weight)
    assert torch.equal(convolution.bias, twin.bias)


def test_a_restored_state_goes_on_bit_for_bit():
    def steps(network, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(5, 5))
    optimizer = build_optimizer([network], MUON)
    steps(network, optimizer, range(3))
    other = copy.deepcopy(network)
    restored = build_optimizer([other], MUON)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(network, optimizer, range(3, 6))
    steps(other, restored, range(3, 6))
    assert all(map(torch.equal, network.parameters(), other.parameters()))
    assert restored.state[other[0].weight]["step"] == 6
