"""The balancer's shares by hand, and what they may not depend on."""

import pytest
import torch

from training.balancer import Balancer


def mean(x: torch.Tensor) -> torch.Tensor:
    return x


def losses_of(x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Two losses, means over clips, with gradients along the first and the second sample of each clip."""
    return {"first": scale * 3 * x[:, 0, 0].mean(), "second": 0.01 * x[:, 0, 1].mean()}


def balanced(balancer: Balancer, batch_size: int = 2, scale: float = 1.0, steps: int = 2) -> torch.Tensor:
    """What the balancer gives after so many steps of the same losses."""
    for step in range(steps):
        x = torch.zeros(batch_size, 1, 4, requires_grad=True)
        gradient = balancer.balance(losses_of(x, scale), x)
        if step < steps - 1:
            balancer.update(mean)
    return gradient


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e6])
@pytest.mark.parametrize("total_norm", [1.0, 0.3])
def test_each_loss_gets_its_share_whatever_its_scale_and_the_batch(batch_size, scale, total_norm):
    """Per clip: total_norm * w / sum of w, along each loss's own direction; as a mean over clips, 1 / B of it."""
    gradient = balanced(Balancer({"first": 3.0, "second": 1.0}, total_norm), batch_size, scale)
    expected = torch.tensor([0.75, 0.25, 0.0, 0.0]) * total_norm / batch_size
    torch.testing.assert_close(gradient, expected.expand(batch_size, 1, 4))


def test_each_clip_gets_its_own_direction_and_the_mean_norm_is_the_share():
    """Norms are averaged over clips: a clip with three times the gradient of the other has three times its part."""
    balancer = Balancer({"loss": 2.0})
    for _ in range(2):
        x = torch.zeros(2, 1, 2, requires_grad=True)
        gradient = balancer.balance({"loss": (1.0 * x[0, 0, 0] - 3.0 * x[1, 0, 1]) / 2}, x)
        balancer.update(mean)
    assert balancer.norms() == {"loss": 2.0}
    torch.testing.assert_close(2 * gradient, torch.tensor([[[0.5, 0.0]], [[0.0, -1.5]]]))


def test_the_first_step_is_only_measured():
    balancer = Balancer({"first": 1.0, "second": 1.0})
    x = torch.zeros(2, 1, 4, requires_grad=True)
    assert balancer.balance(losses_of(x), x).abs().max() == 0
    assert balancer.norms() == {}
    balancer.update(mean)
    assert balancer.norms() == pytest.approx({"first": 3.0, "second": 0.01})


def test_a_loss_that_begins_later_is_first_measured_while_the_others_act():
    balancer = Balancer({"first": 3.0, "second": 1.0})
    x = torch.zeros(1, 1, 4, requires_grad=True)
    first = {"first": losses_of(x)["first"]}
    balancer.balance(first, x)
    balancer.update(mean)
    torch.testing.assert_close(balancer.balance(first, x)[0, 0], torch.tensor([1.0, 0, 0, 0]))  # alone: all of it
    balancer.discard()
    torch.testing.assert_close(balancer.balance(losses_of(x), x)[0, 0], torch.tensor([0.75, 0, 0, 0]))
    balancer.update(mean)
    torch.testing.assert_close(balancer.balance(losses_of(x), x)[0, 0], torch.tensor([0.75, 0.25, 0, 0]))


def test_norms_act_one_step_later():
    balancer = Balancer({"loss": 1.0}, norm_decay=0.5)
    given = []
    for size in (2.0, 8.0, 8.0):
        x = torch.zeros(1, 1, 1, requires_grad=True)
        given.append(balancer.balance({"loss": size * x.sum()}, x).item())
        balancer.update(mean)
    running = [2.0, (0.5 * 2 + 8) / 1.5, (0.25 * 2 + 0.5 * 8 + 8) / 1.75]
    assert given == pytest.approx([0.0, 8 / running[0], 8 / running[1]])
    assert balancer.norms()["loss"] == pytest.approx(running[2])


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    """Parts are averaged by who adds them up, as losses are."""
    inputs = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))

    def run(parts: int) -> list[torch.Tensor]:
        balancer, steps = Balancer({"square": 1.0, "absolute": 2.0}, norm_decay=0.9), []
        for step in range(3):
            gradients = []
            for part in ((step + 1) * inputs).chunk(parts):
                x = part.clone().requires_grad_()
                values = {"square": x.square().mean(), "absolute": (x - 1).abs().mean()}
                gradients.append(balancer.balance(values, x) / parts)
            balancer.update(mean)
            steps.append(torch.cat(gradients))
        return steps

    for whole, halves, singles in zip(run(1), run(2), run(4), strict=True):
        torch.testing.assert_close(halves, whole)
        torch.testing.assert_close(singles, whole)


def test_norms_are_averaged_over_processes():
    balancer = Balancer({"first": 1.0, "second": 1.0})
    x = torch.zeros(1, 1, 4, requires_grad=True)
    balancer.balance(losses_of(x), x)
    asked = []

    def mean_with_another(own: torch.Tensor) -> torch.Tensor:
        asked.append(own)
        return (own + 1.0) / 2

    balancer.update(mean_with_another)
    assert len(asked) == 1, "one collective per step"
    assert balancer.norms() == pytest.approx({"first": 2.0, "second": 0.505})


def test_a_discarded_step_leaves_no_trace():
    balancer = Balancer({"first": 1.0, "second": 1.0})
    balanced(balancer, steps=3)
    balancer.discard()
    before = balancer.norms()
    x = torch.zeros(1, 1, 4, requires_grad=True)
    balancer.balance(losses_of(x, float("nan")), x)
    balancer.discard()
    balancer.update(mean)
    assert balancer.norms() == before


def test_state_goes_on_where_it_was():
    balancer = Balancer({"first": 3.0, "second": 1.0}, norm_decay=0.9)
    balanced(balancer, scale=5.0, steps=4)
    balancer.update(mean)
    again = Balancer({"first": 3.0, "second": 1.0}, norm_decay=0.9)
    again.load_state_dict(balancer.state_dict())
    assert again.norms() == balancer.norms()
    for each in (balancer, again):
        balanced(each, scale=7.0, steps=3)
    assert again.norms() == balancer.norms()


def test_state_of_other_losses_is_dropped_and_new_ones_are_measured_first():
    balancer = Balancer({"first": 1.0, "second": 1.0})
    balanced(balancer, steps=3)
    other = Balancer({"second": 1.0, "third": 1.0})
    other.load_state_dict(balancer.state_dict())
    assert other.norms() == {"second": balancer.norms()["second"]}


def test_a_loss_without_gradient_gives_none():
    balancer = Balancer({"loss": 1.0})
    for _ in range(3):
        x = torch.zeros(2, 1, 4, requires_grad=True)
        assert balancer.balance({"loss": 0 * x.sum()}, x).abs().max() == 0
        balancer.update(mean)


def test_a_loss_without_weight_is_refused():
    x = torch.zeros(1, 1, 4, requires_grad=True)
    with pytest.raises(KeyError, match="second"):
        Balancer({"first": 1.0, "second": 0.0}).balance(losses_of(x), x)


def test_the_graph_is_left_for_the_backward_pass():
    balancer = Balancer({"first": 1.0, "second": 1.0})
    weight = torch.ones(1, requires_grad=True)
    x = weight * torch.ones(1, 1, 4)
    balancer.balance(losses_of(x), x)
    x.sum().backward()
    assert weight.grad == 4
