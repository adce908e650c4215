"""Training with 8-bit AdamW and Adafactor: they learn, are resumed exactly, and what they need is told."""

import io
from importlib.util import find_spec

import pytest
import torch
import toy
from torch import nn

from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.training import optimizer
from fastdiff.training.player import Player

needs_8bit = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes: fastdiff[8bit]")
KINDS = ["adamw", "adafactor", pytest.param("adamw8bit", marks=needs_8bit)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_whole_one(kind, tmp_path):
    options = dict(optimizer=kind, steps=6, width=256)  # 256 * 8: bitsandbytes keeps 8-bit moments from 4096 entries on
    whole = toy.trainer_of(tmp_path / "whole", **options)
    before = [p.detach().clone() for p in whole.players["student"].params]
    whole.fit()
    parts = toy.trainer_of(tmp_path / "parts", **{**options, "steps": 3})
    parts.fit()
    resumed = toy.trainer_of(tmp_path / "parts", **options)
    assert toy.go_on(resumed) == 3
    resumed.fit()
    assert toy.same(toy.result(whole), toy.result(resumed))
    moved = [(p - b).abs().mean() for p, b in zip(whole.players["student"].params, before, strict=True)]
    assert all(0.01 < m < 0.1 for m in moved), moved  # six steps of --lr 0.01, whatever the optimiser and the weight's size


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_state_is_known(kind):
    """state_bytes of a player against the file, whose own entries take some 30 KiB."""
    config = toy.Config(optimizer=kind, ema=0.9)
    params = [nn.Parameter(torch.randn(shape)) for shape in [(256, 320), (8, 24, 3, 3), (64,)]]
    player = Player(params, config, torch.device("cpu"), lr=0.1, betas=(0.9, 0.999), averaged=True, fp16=False)
    for p in params:
        p.grad = torch.randn_like(p)
    player.clip(), player.step(), player.finish()
    file = io.BytesIO()
    torch.save(player.state_dict(), file)
    assert player.state_bytes - 4096 < len(file.getvalue()) < player.state_bytes + 32 * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_goes_with_every_optimizer(kind):
    """fp16 training: a step after an overflow is made as without a scale, and the state comes back."""
    config = toy.Config(optimizer=kind)

    def made(fp16, seed=0):
        torch.manual_seed(seed)
        params = [nn.Parameter(torch.randn(80, 64)), nn.Parameter(torch.zeros(64, 3))]
        return Player(params, config, torch.device("cpu"), lr=0.1, betas=(0.9, 0.999), averaged=False, fp16=fp16)

    def step(player, factor=1.0):
        loss = factor * sum((p - 1).square().mean() for p in player.params)
        player.backward(loss, [player])
        if player.clip().isfinite():
            player.step()
        player.finish()

    plain, scaled = made(False), made(True)
    for player in (plain, scaled):
        step(player), step(player, float("inf")), step(player)
    assert scaled.scaler.get_scale() < made(True).scaler.get_scale()
    for p, q in zip(plain.params, scaled.params, strict=True):
        torch.testing.assert_close(p, q)
    resumed = made(True, seed=1)
    file = io.BytesIO()
    torch.save(scaled.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    step(scaled), step(resumed)
    assert all(torch.equal(p, q) for p, q in zip(scaled.params, resumed.params, strict=True))


def test_a_state_of_another_optimizer_is_refused(tmp_path):
    toy.trainer_of(tmp_path, steps=2).fit()
    with pytest.raises(InputRefused, match="its optimiser was adamw"):
        toy.go_on(toy.trainer_of(tmp_path, steps=3, optimizer="adafactor"))


def test_what_an_optimizer_lacks_is_told_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="`optimizer=adamw8bit`: bitsandbytes is not installed") as caught:
        toy.trainer_of(tmp_path, optimizer="adamw8bit")
    assert "fastdiff[8bit]" in caught.value.hint
    monkeypatch.setattr(optimizer, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match="does not run on mps"):
        optimizer.check(toy.Config(optimizer="adamw8bit"), torch.device("mps"))
    with pytest.raises(UsageError, match="`optimizer=adafactor`: does not train what `shard` splits"):
        toy.Config(optimizer="adafactor", shard=True)
