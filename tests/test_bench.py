"""`bench`: what it counts, that it refuses to compare what differs, and its gate. No figure of this machine is asserted."""

import json
import shutil
import sys
from dataclasses import asdict

import pytest
import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.commands import bench
from fastdiff.cost import measure, stock
from fastdiff.models import text
from fastdiff.models.fast import layers
from fastdiff.runtime.errors import GateFailed, UsageError
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings


def test_flop_and_bytes_are_those_of_the_work():
    x, w = torch.randn(8, 16), torch.randn(32, 16)
    found = measure.cost(lambda: torch.nn.functional.linear(x, w).relu())
    assert (found.flops, found.bytes) == (2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))
    picture, kernel = torch.randn(1, 4, 10, 10), torch.randn(6, 4, 3, 3)
    assert measure.cost(lambda: torch.nn.functional.conv2d(picture, kernel, padding=1)).flops == 2 * 100 * 6 * 4 * 9
    stored = layers.Stored({"c.weight": kernel, "c.bias": torch.randn(6)}, dtype=torch.float32, device="cpu")
    conv, other = layers.Conv(stored, "c"), torch.randn(1, 6, 10, 10)
    fused = measure.cost(lambda: (conv.relu(picture), conv.relu(picture, other)))
    assert fused.flops == 2 * 2 * 100 * 6 * 4 * 9
    assert torch.allclose(conv.relu(picture), conv(picture).relu(), atol=1e-5)
    assert torch.allclose(conv.relu(picture, other), (conv(picture) + other).relu(), atol=1e-5)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    assert measure.cost(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k)).flops == 4 * 2 * 5 * 7 * 8
    most = measure.Ceiling(flops=1e3, bytes=1e9)
    assert found.limit_s(most) == pytest.approx(found.flops / 1e3)
    assert found.limit_s(measure.Ceiling(1e12, 1e3)) == pytest.approx(found.bytes / 1e3)


def test_ways_take_turns():
    calls = []
    found = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {k: len(v) for k, v in found.items()} == {"a": 3, "b": 3}


def test_a_process_is_measured_and_its_failure_told():
    found = measure.process(["python3", "-c", "x = b'0' * 2**26"])
    assert found.peak_mib > 60
    assert found.wall_s > 0
    with pytest.raises(RuntimeError, match="ended with 1: ValueError: no"):
        measure.process(["python3", "-c", "raise ValueError('no')"])


def test_no_ratio_without_parity():
    a = torch.randn(100)
    assert bench.nearness("x", a, a + 1e-6, torch.float32) < 1e-5
    assert bench.nearness("x", a, a + 1e-3, torch.bfloat16) > 0.999
    for other, dtype in ((a + 1e-2, torch.float32), (torch.randn(100), torch.bfloat16)):
        with pytest.raises(GateFailed, match="no ratio"):
            bench.nearness("x", a, other, dtype)


def test_sample_against_the_pipeline(fastdiff):
    flags = ["--device", "cpu", "--calls", 2, "--rounds", 0, "--num-steps", 2]
    code, told = fastdiff("bench", "sample", *flags, "--guidance", 2)
    assert code == 0
    found = told["metrics"]
    assert found["parity"] < 1e-4
    assert found["ratio"] == pytest.approx(found["stock_ms"] / found["ours_ms"])
    assert found["gflop"] > 0.1
    assert found["of_limit"] > 0
    code, told = fastdiff("bench", "sample", *flags, "--null", "--assert-ratio", 1e6)
    assert (code, told["error"]["kind"]) == (5, "gate")
    assert told["metrics"]["ratio"] > 0


@pytest.mark.parametrize("num_steps", [1, 4])
def test_diffusers_does_not_clip_what_fastdiff_does_not(num_steps, tiny_sd, tmp_path):
    """A PNDM or Euler config need not say that x0 is not clipped, and the pipeline's DDIM scheduler then clips it to -1..1."""
    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "clip_sample"}))
    base, settings = checkpoint.load(str(folder)), Settings("ddim", num_steps, 2.0, "trailing")
    sampler, encode = Sampler(base, device="cpu", compile="off"), text.Prompts(base)
    ours = sampler.latents(encode([bench.PROMPT]), encode.unconditional(), [0], settings, (8, 8))
    pipe = stock.Pipeline(base, settings, 64, device="cpu")
    assert bench.nearness("latents", ours, pipe([bench.PROMPT], [0], output="latent"), torch.float32) < 1e-4
    assert ours.abs().max() > 1


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_familys_own_scheduler_config_says_that_nothing_is_clipped(family):
    """A checkpoint of one file gets it, and diffusers' schedulers take it from there."""
    home = FAMILIES[family].home / "scheduler" / "scheduler_config.json"
    assert json.loads(home.read_text())["clip_sample"] is False


def test_shapes_with_random_weights(fastdiff):
    flags = ["--random-weights", "--device", "cpu", "--calls", 1, "--num-steps", 1, "--decoder", "tiny", "--stock-embeds"]
    code, told = fastdiff("bench", "sample", *flags, "--layout", "sdxs-512", "--widths", "32,64,96", "--stock-decoder", "tiny")
    assert code == 0
    assert told["metrics"]["parity"] < 1e-4
    assert told["metrics"]["folded"] is True
    for args, word in ((["--widths", "32,48,64"], "multiples of 32"), (["--widths", "a"], "not whole numbers")):
        code, told = fastdiff("bench", "sample", *flags, "--layout", "sdxs-512", *args)
        assert code == 2
        assert word in told["error"]["message"]
    with pytest.raises(UsageError, match="no weights fit it"):
        bench.run(bench.Config(work="sample", layout="bk-tiny"))


@pytest.mark.slow
def test_three_ways_of_openvino(fastdiff):
    pytest.importorskip("openvino")
    flags = ["bench", "sample", "--random-weights", "--device", "cpu", "--calls", 1, "--num-steps", 2, "--decoder", "tiny"]
    flags += ["--layout", "sdxs-512", "--widths", "32,64,96", "--stock-decoder", "tiny", "--against", "openvino"]
    code, told = fastdiff(*flags)
    assert code == 0
    found = told["metrics"]
    assert found["parity"] < 1e-4
    assert found["openvino_ratio"] == pytest.approx(found["stock_ms"] / found["openvino_ms"])
    assert found["gflop"] > 0.1
    code, told = fastdiff(*flags, "--compile", "openvino")
    assert code == 0
    assert "openvino_ratio" not in told["metrics"]
    assert fastdiff(*flags, "--guidance", 2)[0] == 2


def test_a_training_step_of_both_ways_has_the_same_loss_and_trains(monkeypatch):
    """In this process; the slow test below also measures their memory, in a process each."""
    config = bench.Config(work="train", base="emoji", device="cpu", batch_size=1, resolution=32)
    device = torch.device("cpu")
    (ours, our_step, _), (stock, stock_step, _) = (bench.step_of(which, config, device) for which in ("ours", "stock"))
    stock.uncond = ours.batch.uncond
    torch.manual_seed(0)
    our_loss = ours.loss().item()
    torch.manual_seed(0)
    stock_loss = stock.loss(ours.batch.latents, ours.batch.cond).item()
    assert our_loss > 0
    assert our_loss == pytest.approx(stock_loss, rel=1e-4)
    for way, step in ((ours, our_step), (stock, stock_step)):
        before = [p.detach().clone() for p in way.trained]
        step()
        assert any(not torch.equal(p, old) for p, old in zip(way.trained, before, strict=True))
        assert all(p.grad is None for p in way.trained)
    # What the processes run that measure memory.
    monkeypatch.setattr(sys, "argv", ["-c", "ours", json.dumps(asdict(config))])
    exec(bench.PEAK, {})


@pytest.mark.slow
@pytest.mark.parametrize("base", ["emoji", "tiny_sdxl"])
def test_train_steps_have_the_same_loss(base, fastdiff, request):
    base = base if base == "emoji" else request.getfixturevalue(base)
    code, told = fastdiff("bench", "train", "--base", base, "--device", "cpu", "--calls", 1, "--batch-size", 2)
    assert code == 0
    found = told["metrics"]
    assert found["parity"] < 1e-4
    assert found["ours_peak_mib"] > 0
    assert found["ratio"] > 0


@pytest.mark.slow
def test_merge_gives_the_same_weights_as_diffusers(fastdiff):
    code, told = fastdiff("bench", "merge")
    assert code == 0
    assert told["metrics"]["parity"] < 1e-4
