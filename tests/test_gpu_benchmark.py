"""`tests/benchmarks/gpu.py` as it runs on a CPU: every part, what it counts, and what it refuses to time."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import gpu
import gpu_bench
import gpu_clips
import gpu_floor
import gpu_streams

from modeling_mimi import MimiConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
WAYS = ("eager", "CUDA graph", "compiled", "compiled, CUDA graph")


@pytest.fixture
def bench(tmp_path):
    with torch.inference_mode():
        made = gpu_bench.Bench(argparse.Namespace(device="cpu", tiny=True, half="bf16"), tmp_path)
        made.deadline = time.monotonic() + 600
        yield made


def test_every_part_runs(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--minutes", "20", "--output", str(path)])
    results = json.loads(path.read_text())
    assert list(results) == ["device", "notes", "floor", "clips", "cost", "agreement", "streams"]
    assert results["notes"] == []
    for way in ("stock bf16, eager", *(f"ours bf16, {way}" for way in WAYS)):
        assert all(speed > 0 for found in results["clips"]["speeds"][way].values() for speed in found.values())
    stock = results["agreement"]["stock fp32"]
    assert min(stock["same_codes_per_level"]) > 0.9
    assert stock["decoder_snr_db"] > 80
    assert results["agreement"].keys() >= {"ours bf16", "ours bf16, CUDA graph", "ours bf16, compiled", "small bf16"}
    assert results["streams"]["one_ms"].keys() >= {f"ours bf16, {way}" for way in (WAYS[0], WAYS[1], WAYS[3])}
    assert results["streams"]["many_ms"]["ours"].keys() == {"1", "2"}
    printed = capsys.readouterr().out
    assert "| SEANet encoder |" in printed
    assert "| all of decode |" in printed


def test_what_does_not_fit_is_left_out_and_said(capsys):
    results = gpu.main(["--device", "cpu", "--tiny", "--minutes", "0", "--only", "clips", "streams", "cost"])
    assert results["clips"]["speeds"] == {}
    assert results["streams"]["one_ms"] == {}
    assert "ours bf16, eager, encode of 1 clips: not measured, the part's time was over" in results["notes"]
    assert "- cost: needs the part `clips`" in capsys.readouterr().out


def test_a_machine_without_a_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_operations_and_bytes_of_the_released_architecture():
    config = MimiConfig()
    costs = gpu_floor.count(config, "bf16", 125)  # 10 s
    encode, decode = (
        sum(costs[part].whole.operations for part in parts) for parts in (gpu_floor.ENCODE, gpu_floor.DECODE)
    )
    assert encode / 10 == pytest.approx(5.4e9, rel=0.03)  # the products of the codec, per second of audio
    assert decode / 10 == pytest.approx(5.4e9, rel=0.03)
    first = costs["SEANet encoder"].layers[0]  # a convolution of 7 samples to 64 channels
    assert first.operations == 2 * 7 * 64 * 240_000
    assert first.weights == 2 * (7 * 64 + 64)
    assert first.activations == 2 * 240_000 * (1 + 64)
    attention, mlp = costs["encoder transformer"].layers[:2]  # 250 steps, all in the window
    assert attention.operations == 2 * 250 * 4 * 512**2 + 4 * (250 * 251 // 2) * 512
    assert mlp.operations == 2 * 250 * 2 * 512 * 2048
    assert costs["codebook search"].whole.precision == "fp32"
    longer = gpu_floor.count(config, "bf16", 250)["encoder transformer"].layers[0]
    assert longer.operations == 2 * 500 * 4 * 512**2 + 4 * (250 * 251 // 2 + 250 * 250) * 512


def test_a_graph_that_does_not_read_its_input_has_no_time(bench, monkeypatch):
    class Stale(gpu_bench.Graph):
        def __init__(self, call, device):
            super().__init__(call, device)
            self.first = call()

        def __call__(self):
            return self.first

    monkeypatch.setattr(gpu_clips, "Graph", Stale)
    assert gpu_clips._at_each_batch(bench, "ours", "fp32", "CUDA graph", "encode", (1,)) == {}
    assert gpu_clips._at_each_batch(bench, "ours", "fp32", "CUDA graph", "decode", (1,)) == {}
    assert [note.split(": ")[1] for note in bench.notes] == ["Unfaithful", "Unfaithful"]
    assert gpu_clips._at_each_batch(bench, "ours", "fp32", "eager", "encode", (1,)).keys() == {1}


def test_a_step_that_forgets_has_no_time(bench, monkeypatch):
    recorded = gpu_streams.recorded_step(bench, "fp32", 2)
    assert all(not state.position.any() for state in recorded.states), "begins anew after it was checked"

    class Forgetful(gpu_bench.Graph):
        def __call__(self):
            for state in self.call.__self__.states:
                state.reset()
            return super().__call__()

    monkeypatch.setattr(gpu_streams, "Graph", Forgetful)
    with pytest.raises(gpu_bench.Unfaithful):
        gpu_streams.recorded_step(bench, "fp32", 2)


def test_time_is_up_inside_a_measurement(bench):
    bench.deadline = time.monotonic() + 0.2
    with bench.attempt("something slow"):
        time.sleep(30)
    assert bench.notes == ["something slow: OutOfTime: the part's time was over"]
    assert bench.is_over("what comes after")


def test_percentile():
    assert gpu_bench.percentile(list(range(1, 101)), 0.99) == 99
    assert gpu_bench.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert gpu_bench.percentile([5.0], 0.99) == 5.0
