"""Codebooks: running means by hand, dead entries, k-means, the order of levels, and processes that equal one."""

import math
import threading

import pytest
import torch
from conftest import TINY
from torch import Tensor

from modeling_mimi import MimiConfig
from modeling_mimi.modeling_quantizer import MimiSplitResidualVectorQuantizer
from training import losses
from training.codebooks import CodebookTrainer, kmeans
from training.config import CodebookConfig

ENTRIES, WIDTH, LEVELS = 8, 2, 4


def quantizer(**fields) -> MimiSplitResidualVectorQuantizer:
    """One semantic and three acoustic levels of 8 entries in the plane, entry n at (n + 1, n + 1)."""
    sizes = {"codebook_size": ENTRIES, "vector_quantization_hidden_dimension": WIDTH, "num_quantizers": LEVELS}
    torch.manual_seed(0)
    module = MimiSplitResidualVectorQuantizer(MimiConfig(**(TINY | sizes | fields)))
    for layer in [
        *module.semantic_residual_vector_quantizer.layers,
        *module.acoustic_residual_vector_quantizer.layers,
    ]:
        number = torch.arange(1.0, len(layer.codebook.embed_sum) + 1)
        layer.codebook.embed_sum.copy_(number[:, None].expand(-1, WIDTH))
    return module


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observation(clips: int = 2, levels: int = LEVELS, frames: int = 5, seed: int = 0):
    """Random codes (B, K, T), residuals (B, K, T, Q), and a mask (B, T) with the last frame of clip 0 outside."""
    draw = generator(seed)
    mask = torch.ones(clips, frames, dtype=torch.bool)
    mask[0, -1] = False
    codes = torch.randint(ENTRIES, (clips, levels, frames), generator=draw)
    return codes, torch.randn(clips, levels, frames, WIDTH, generator=draw), mask


def buffers(trainer: CodebookTrainer) -> list[Tensor]:
    return [buffer.clone() for codebook in trainer.codebooks for buffer in codebook.buffers()]


def assert_same_buffers(one: CodebookTrainer, other: CodebookTrainer) -> None:
    for a, b in zip(buffers(one), buffers(other), strict=True):
        torch.testing.assert_close(a, b)


# ---- running means


def test_running_means_by_hand():
    trainer = CodebookTrainer(quantizer(), CodebookConfig(codebook_decay=0.9))
    codes = torch.zeros(1, LEVELS, 3, dtype=torch.int64)
    codes[0, 1] = torch.tensor([2, 2, 5])
    residuals = torch.zeros(1, LEVELS, 3, WIDTH)
    residuals[0, 1] = torch.tensor([[1.0, 10.0], [3.0, 30.0], [7.0, 7.0]])
    before = [codebook.embed_sum.clone() for codebook in trainer.codebooks]
    trainer.observe(codes, residuals, torch.ones(1, 3, dtype=torch.bool))
    assert trainer.update(0, generator()) == 0
    usage, sums = trainer.codebooks[1].cluster_usage, trainer.codebooks[1].embed_sum
    torch.testing.assert_close(usage, torch.tensor([0.9, 0.9, 1.1, 0.9, 0.9, 1.0, 0.9, 0.9]))
    expected = 0.9 * before[1]
    expected[2] += 0.1 * torch.tensor([4.0, 40.0])
    expected[5] += 0.1 * torch.tensor([7.0, 7.0])
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(trainer.codebooks[0].cluster_usage, torch.tensor([1.2, *[0.9] * 7]))


def test_masked_frames_do_not_count():
    codes, residuals, mask = observation()
    with_garbage, without = (
        CodebookTrainer(quantizer(), CodebookConfig()),
        CodebookTrainer(quantizer(), CodebookConfig()),
    )
    garbage = torch.where(mask[:, None, :, None], residuals, 1e6)
    with_garbage.observe(codes, garbage, mask)
    without.observe(codes, residuals, mask)
    for trainer in (with_garbage, without):
        trainer.update(4, generator())
    assert_same_buffers(with_garbage, without)
    assert abs(trainer.codebooks[0].cluster_usage.sum().item() - (0.99 * ENTRIES + 0.01 * 9)) < 1e-4


def test_levels_that_are_not_in_use_are_untouched():
    trainer = CodebookTrainer(quantizer(), CodebookConfig())
    before = buffers(trainer)
    trainer.observe(*observation(levels=2))
    trainer.update(4, generator())
    after = buffers(trainer)
    per_level = len(before) // LEVELS
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert any(changed[:per_level])
    assert any(changed[per_level : 2 * per_level])
    assert not any(changed[2 * per_level :])


@pytest.mark.parametrize("step", [0, 4])
def test_parts_equal_the_joined_batch(step):
    whole, halves = CodebookTrainer(quantizer(), CodebookConfig()), CodebookTrainer(quantizer(), CodebookConfig())
    for each in (whole, halves):
        make_dead(each)
    batch = observation(clips=4)
    whole.observe(*batch)
    for part in range(2):
        halves.observe(*(x[2 * part : 2 * part + 2] for x in batch))
    assert whole.update(step, generator()) == halves.update(step, generator()) == (2 if step == 4 else 0)
    assert_same_buffers(whole, halves)


def test_discarded_observations_do_not_count():
    trainer, other = CodebookTrainer(quantizer(), CodebookConfig()), CodebookTrainer(quantizer(), CodebookConfig())
    trainer.observe(*observation(seed=1))
    trainer.discard()
    for each in (trainer, other):
        each.observe(*observation())
        each.update(0, generator())
    assert_same_buffers(trainer, other)


def test_observing_keeps_no_graph():
    codes, residuals, mask = observation()
    trainer = CodebookTrainer(quantizer(), CodebookConfig())
    trainer.observe(codes, residuals.requires_grad_(), mask)
    trainer.update(4, generator())
    assert not any(buffer.requires_grad for buffer in buffers(trainer))


# ---- dead entries


def make_dead(trainer: CodebookTrainer, level: int = 1, entries: tuple[int, ...] = (3, 6)) -> None:
    trainer.codebooks[level].cluster_usage[list(entries)] = 0.01


def observation_of(code: int, frames: int = 50):
    """Every frame has the same code; residuals are random."""
    residuals = 5 + torch.randn(1, LEVELS, frames, WIDTH, generator=generator(7))
    codes = torch.arange(frames).remainder(ENTRIES).expand(1, LEVELS, -1).clone()
    codes[codes == 3] = code
    codes[codes == 6] = code
    return codes, residuals, torch.ones(1, frames, dtype=torch.bool)


def test_a_dead_entry_starts_again_on_a_vector_of_the_batch_with_the_mean_usage_and_lives():
    trainer = CodebookTrainer(quantizer(), CodebookConfig(codebook_decay=0.99))
    make_dead(trainer)
    batch = observation_of(code=0)
    trainer.observe(*batch)
    codebook = trainer.codebooks[1]
    mean = (0.99 * codebook.cluster_usage + 0.01 * torch.bincount(batch[0][0, 1], minlength=ENTRIES)).mean()
    assert trainer.update(4, generator()) == 2
    torch.testing.assert_close(codebook.cluster_usage[[3, 6]], torch.stack([mean, mean]))
    placed = codebook.centroids[[3, 6]]
    for centroid in placed:
        assert (batch[1][0, 1] - centroid).norm(dim=1).min() < 1e-5
    assert not torch.equal(placed[0], placed[1])
    for step in range(5, 15):  # nothing chooses them, and still they stay where they were put
        trainer.observe(*batch)
        assert trainer.update(step, generator(step)) == 0
    torch.testing.assert_close(codebook.centroids[[3, 6]], placed)


def test_a_replaced_entry_answers_the_vector_it_was_placed_on():
    module = quantizer()
    trainer = CodebookTrainer(module, CodebookConfig())
    make_dead(trainer)
    trainer.observe(*observation_of(code=0))
    trainer.update(4, generator())
    placed = trainer.codebooks[1].centroids[3]
    codes, *_ = module.acoustic_residual_vector_quantizer.quantize(placed[None, None], module.search_tables()[1:2])
    assert codes.item() == 3


def test_living_entries_are_left_alone():
    trainer, other = CodebookTrainer(quantizer(), CodebookConfig()), CodebookTrainer(quantizer(), CodebookConfig())
    for each, step in ((trainer, 4), (other, 3)):
        make_dead(each)
        each.observe(*observation_of(code=0))
        each.update(step, generator())
    living = [0, 1, 2, 4, 5, 7]
    assert torch.equal(trainer.codebooks[1].embed_sum[living], other.codebooks[1].embed_sum[living])
    assert torch.equal(trainer.codebooks[1].cluster_usage[living], other.codebooks[1].cluster_usage[living])


@pytest.mark.parametrize(("every", "steps"), [(5, [4, 9, 14]), (1, list(range(15))), (7, [6, 13])])
def test_dead_entries_are_looked_for_at_intervals(every, steps):
    trainer = CodebookTrainer(quantizer(), CodebookConfig(dead_check_every=every))
    found = []
    for step in range(15):
        make_dead(trainer)
        trainer.observe(*observation_of(code=0))
        if trainer.update(step, generator(step)):
            found.append(step)
    assert found == steps


@pytest.mark.parametrize(("usage", "dead"), [(0.09, 1), (0.11, 0)])
def test_the_threshold_is_a_share_of_the_mean(usage, dead):
    trainer = CodebookTrainer(quantizer(), CodebookConfig(codebook_decay=1.0, dead_threshold=0.1))
    others = (ENTRIES - usage) / (ENTRIES - 1)  # so that the mean is 1
    for codebook in trainer.codebooks:
        codebook.cluster_usage.fill_(5.0)
    trainer.codebooks[0].cluster_usage.copy_(torch.tensor([usage, *[others] * (ENTRIES - 1)]) * 5)
    trainer.observe(*observation())
    assert trainer.update(4, generator()) == dead


def test_vectors_outside_the_clips_never_become_entries():
    codes, residuals, mask = observation_of(code=0)
    mask[:, 1:] = False
    trainer = CodebookTrainer(quantizer(), CodebookConfig())
    make_dead(trainer)
    trainer.observe(codes, residuals, mask)
    assert trainer.update(4, generator()) == 2
    torch.testing.assert_close(trainer.codebooks[1].centroids[[3, 6]], residuals[0, 1, :1].expand(2, -1))


def test_a_batch_without_audio_replaces_nothing():
    codes, residuals, mask = observation()
    trainer = CodebookTrainer(quantizer(), CodebookConfig())
    make_dead(trainer)
    trainer.observe(codes, residuals, torch.zeros_like(mask))
    centroids = trainer.codebooks[0].centroids.clone()
    assert trainer.update(4, generator()) == 0
    torch.testing.assert_close(trainer.codebooks[0].centroids, centroids)


# ---- k-means


def clusters(per_cluster: int = 40) -> tuple[Tensor, Tensor]:
    centers = torch.tensor([[10.0, 10.0], [-10.0, 10.0], [10.0, -10.0], [-10.0, -10.0]])
    spread = 0.1 * torch.randn(4, per_cluster, 2, generator=generator(3))
    return centers, (centers[:, None] + spread).flatten(0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_well_separated_clusters(seed):
    """16 entries, so that each of 4 clusters is met at the start: no entry may then lie between two."""
    centers, vectors = clusters()
    centroids, counts = kmeans(vectors, 16, 50, generator(seed))
    distances = torch.cdist(centroids, centers)
    assert distances.min(1).values.max() < 0.5
    assert counts.sum() == 160
    owned = torch.zeros(4).index_add_(0, distances.argmin(1), counts)
    assert owned.tolist() == [40.0] * 4


def test_kmeans_converges_to_the_means_of_what_is_nearest():
    _, vectors = clusters()
    centroids, counts = kmeans(vectors, 8, 50, generator())
    nearest = torch.cdist(vectors, centroids).argmin(1)
    for entry in range(8):
        assert counts[entry] == (nearest == entry).sum()
        torch.testing.assert_close(centroids[entry], vectors[nearest == entry].mean(0))


def test_kmeans_lessens_the_error():
    vectors = torch.randn(500, 4, generator=generator())
    errors = []
    for iterations in (1, 2, 5, 50):
        centroids, _ = kmeans(vectors, 16, iterations, generator())
        errors.append(torch.cdist(vectors, centroids).min(1).values.square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]


def test_kmeans_with_fewer_vectors_than_entries_finds_them_all():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-3.0, 2.0]])
    centroids, counts = kmeans(vectors, 8, 10, generator())
    assert torch.isfinite(centroids).all()
    assert torch.cdist(vectors, centroids).min(1).values.max() < 1e-6
    assert counts.sum() == 3


def test_kmeans_without_vectors_says_so():
    with pytest.raises(ValueError, match="No frame of the batch is audio"):
        kmeans(torch.zeros(0, 2), 8, 10, generator())


# ---- the order of levels


def step(module, trainer: CodebookTrainer, latents: Tensor, number: int = 0) -> None:
    """Initialise from a batch, as the trainer does."""
    output = module(latents, module.search_tables(trainer.ready))
    trainer.observe(output.audio_codes, output.residuals, torch.ones(latents.shape[:2], dtype=torch.bool))
    trainer.initialize(generator(number))


def test_levels_are_initialised_one_after_the_other_in_each_branch():
    module = quantizer()
    trainer = CodebookTrainer(module, CodebookConfig())
    assert trainer.ready == LEVELS
    trainer.restart()
    flags, ready = [], []
    latents = torch.randn(2, 40, TINY["hidden_size"], generator=generator())
    for number in range(4):
        ready.append(trainer.ready)
        step(module, trainer, latents, number)
        flags.append([int(codebook.initialized) for codebook in trainer.codebooks])
        assert trainer.initialized == [bool(flag) for flag in flags[-1]]
    assert flags == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert ready == [2, 3, 4, 4]
    assert trainer.ready == LEVELS


def test_one_level_of_a_branch_is_initialised_at_a_time_however_many_are_observed():
    trainer = CodebookTrainer(quantizer(), CodebookConfig())
    trainer.restart()
    trainer.observe(*observation())
    trainer.initialize(generator())
    assert trainer.initialized == [True, True, False, False]


def test_only_levels_in_use_are_initialised():
    trainer = CodebookTrainer(quantizer(), CodebookConfig())
    trainer.restart()
    trainer.observe(*observation(levels=1))
    trainer.initialize(generator())
    assert trainer.initialized == [True, False, False, False]


def test_a_level_begins_with_the_kmeans_of_its_own_residuals():
    module = quantizer()
    trainer = CodebookTrainer(module, CodebookConfig())
    trainer.restart()
    latents = torch.randn(2, 40, TINY["hidden_size"], generator=generator())
    step(module, trainer, latents)
    branch = module.acoustic_residual_vector_quantizer
    vectors = branch.project_in(latents).detach()
    expected, counts = kmeans(vectors.flatten(0, 1), ENTRIES, 50, second_draw(vectors.flatten(0, 1)))
    torch.testing.assert_close(trainer.codebooks[1].centroids, expected)
    torch.testing.assert_close(trainer.codebooks[1].cluster_usage, counts)
    step(module, trainer, latents)
    _, residuals, _ = branch.quantize(vectors, module.search_tables()[1:3])
    expected, _ = kmeans(residuals[:, 1].flatten(0, 1), ENTRIES, 50, generator())
    torch.testing.assert_close(trainer.codebooks[2].centroids, expected)


def second_draw(vectors: Tensor) -> torch.Generator:
    """The generator as the first branch's k-means leaves it."""
    draws = generator()
    kmeans(vectors, ENTRIES, 1, draws)
    return draws


def test_initialisation_reads_only_frames_of_the_clips():
    module = quantizer()
    trainer = CodebookTrainer(module, CodebookConfig())
    trainer.restart()
    codes, residuals, mask = observation(levels=2, frames=40)
    mask[:, 20:] = False
    residuals[:, :, 20:] = 1e6
    trainer.observe(codes, residuals, mask)
    trainer.initialize(generator())
    assert all(codebook.centroids.abs().max() < 10 for codebook in trainer.codebooks[:2])
    assert trainer.codebooks[0].cluster_usage.sum() == 40


def test_an_initialised_level_is_not_initialised_again():
    module = quantizer()
    trainer = CodebookTrainer(module, CodebookConfig())
    before = buffers(trainer)
    step(module, trainer, torch.randn(2, 40, TINY["hidden_size"]))
    assert all(torch.equal(a, b) for a, b in zip(before, buffers(trainer), strict=True))


def test_what_is_initialised_is_read_from_a_checkpoint():
    module = quantizer()
    trainer = CodebookTrainer(module, CodebookConfig())
    trainer.codebooks[2].initialized.zero_()
    trainer.codebooks[3].initialized.zero_()
    trainer.refresh()
    assert trainer.initialized == [True, True, False, False]
    assert trainer.ready == 3
    assert CodebookTrainer(module, CodebookConfig()).ready == 3


def test_one_branch_of_all_levels_is_initialised_level_by_level():
    config = MimiConfig(**(TINY | {"codebook_size": ENTRIES, "num_semantic_quantizers": TINY["num_quantizers"]}))
    module = MimiSplitResidualVectorQuantizer(config)
    trainer = CodebookTrainer(module, CodebookConfig())
    trainer.restart()
    ready = []
    for number in range(4):
        ready.append(trainer.ready)
        step(module, trainer, torch.randn(2, 40, TINY["hidden_size"]), number)
    assert ready == [1, 2, 3, 4]
    assert trainer.initialized == [True] * 4


# ---- processes


class Processes:
    """Collectives between threads that play processes."""

    def __init__(self, count: int):
        self.count = count
        self.barrier = threading.Barrier(count)
        self.given: list[Tensor] = [torch.zeros(())] * count
        self.calls = [0] * count

    def total(self, rank: int):
        return lambda x: torch.stack(self.exchange(rank, x)).sum(0)

    def gather(self, rank: int):
        return lambda x: torch.cat(self.exchange(rank, x))

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.calls[rank] += 1
        self.given[rank] = x
        self.barrier.wait(timeout=20)
        everything = list(self.given)
        self.barrier.wait(timeout=20)
        return everything

    def run(self, work) -> list:
        results, errors = [None] * self.count, []

        def play(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=play, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        return results


@pytest.mark.parametrize("count", [2, 3])
def test_processes_equal_one_on_the_joined_batch(count):
    """Two parts a step, k-means first, then updates with dead entries among them."""
    modules = [quantizer() for _ in range(count + 1)]
    batches = [
        [observation(clips=2 * count, frames=6, seed=10 * number + part) for part in (0, 1)] for number in range(7)
    ]

    def train(trainer: CodebookTrainer, rows: slice) -> tuple[CodebookTrainer, list[int]]:
        trainer.restart()
        replaced = []
        for number, parts in enumerate(batches):
            if number < 3:
                for part in parts:
                    trainer.observe(*(x[rows] for x in part))
                trainer.initialize(generator(number))
            for part in parts:
                trainer.observe(*(x[rows] for x in part))
            make_dead(trainer, level=number % LEVELS)
            replaced.append(trainer.update(number, generator(number)))
        return trainer, replaced

    config = CodebookConfig(dead_check_every=2)
    alone, replaced = train(CodebookTrainer(modules[0], config), slice(None))
    processes = Processes(count)

    def work(rank: int):
        trainer = CodebookTrainer(
            modules[rank + 1], config, rank, count, processes.total(rank), processes.gather(rank)
        )
        return train(trainer, slice(2 * rank, 2 * rank + 2))

    assert sum(replaced) > 0
    for trainer, replaced_here in processes.run(work):
        assert_same_buffers(trainer, alone)
        assert replaced_here == replaced


def test_an_update_is_one_collective():
    processes = Processes(1)
    trainer = CodebookTrainer(quantizer(), CodebookConfig(), 0, 1, processes.total(0), processes.gather(0))
    trainer.observe(*observation())
    trainer.update(0, generator())
    assert processes.calls == [1]


# ---- what is reported, and training


def test_statistics_by_hand():
    trainer = CodebookTrainer(quantizer(), CodebookConfig(dead_threshold=0.1))
    trainer.codebooks[1].cluster_usage.copy_(torch.tensor([3.0, 1.0, *[0.0] * 6]))
    statistics = trainer.statistics()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert statistics["perplexity"] == pytest.approx([8.0, math.exp(entropy), 8.0, 8.0])
    assert statistics["usage"] == [1.0, 0.25, 1.0, 1.0]


def test_training_keeps_entries_in_use():
    """Latents that the commitment loss may move, from a start where all of them have the same code."""
    module = quantizer(codebook_size=16)
    trainer = CodebookTrainer(module, CodebookConfig(codebook_decay=0.9))
    trainer.restart()
    linear = torch.nn.Linear(6, TINY["hidden_size"])
    optimizer = torch.optim.Adam([*linear.parameters(), *module.parameters()], lr=1e-3)
    for number in range(30):
        latents = linear(torch.randn(2, 50, 6, generator=generator(number)))
        mask = torch.ones(2, 50, dtype=torch.bool)
        levels = trainer.ready
        if not all(trainer.initialized[:levels]):
            step(module, trainer, latents.detach(), number)
        output = module(latents, module.search_tables(levels))
        loss = losses.commitment(output.residuals, output.centroids, mask)
        loss = loss + (output.quantized - latents.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trainer.observe(output.audio_codes, output.residuals, mask)
        trainer.update(number, generator(number))
    for level in range(LEVELS):
        assert len(output.audio_codes[:, level].unique()) >= 8
    assert min(trainer.statistics()["perplexity"]) > 4
