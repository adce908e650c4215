"""Training with 8-bit AdamW, Adafactor and Muon: they learn, are resumed exactly, and what they need is told."""

import io
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import toy
from torch import nn

from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.training import muon, offload, optimizer, resume
from fastdiff.training.method import Phase
from fastdiff.training.player import Player
from fastdiff.training.run import Run

needs_8bit = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes: fastdiff[8bit]")
KINDS = ["adamw", "adafactor", "muon", pytest.param("adamw8bit", marks=needs_8bit)]


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
    # Six steps of --lr 0.01, whatever the optimiser and the weight's size. Muon's are a fifth, less where a gradient lacks rank.
    assert all((0.004 if kind == "muon" else 0.01) < m < 0.1 for m in moved), moved


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


@pytest.mark.parametrize("kind", KINDS)
def test_offload_changes_no_bit_and_holds_the_moments_elsewhere_between_updates(kind, tmp_path):
    """Also through phases, an average, skipped steps, previews, and a state with offload that is gone on from without."""

    class Phased(toy.Toy):
        _phases = [Phase("a", 3), Phase("b", 4)]

    runs = {}
    for name, steps, moving in [("plain", 7, False), ("moved", 7, True), ("parts", 4, True), ("parts", 7, False)]:
        bad, drawn = {(1, "judge"): float("nan")}, []
        options = dict(optimizer=kind, width=512, offload=moving, preview_every=2)
        trainer = toy.trainer_of(tmp_path / name, bad, method=Phased, **options)
        trainer.preview = lambda step, trainer=trainer, drawn=drawn: drawn.append(trainer.method.student[0].weight.sum().item())
        toy.go_on(trainer)
        if steps == 7:
            trainer.fit()
        else:
            for _ in range(steps):
                stepped(trainer)
            trainer.save()
        runs[name] = toy.result(trainer), drawn, trainer
    assert toy.same(runs["plain"][0], runs["moved"][0])
    assert toy.same(runs["plain"][0], runs["parts"][0])
    assert runs["plain"][1] == runs["moved"][1] != []
    player = runs["moved"][2].players["student"]
    moments = [v for row in player.optimizer.state.values() for v in row.values() if isinstance(v, torch.Tensor) and v.ndim]
    assert len(moments) >= 4
    places = {place.data_ptr() for place in player.parking.places.values()}
    assert {t.data_ptr() for t in (*moments, *player.ema.shadow)} == places
    player.parking.fetch()  # as an update begins: everything is on the device, in memory of its own
    assert not {t.data_ptr() for t in (*moments, *player.ema.shadow)} & places


def stepped(trainer):
    """One step of a trainer that goes to its next phase in time."""
    if trainer.step == trainer.end:
        trainer.leave()
        trainer.enter(trainer.index + 1)
    trainer.train_step()
    trainer.step += 1


def test_networks_that_no_loss_uses_are_set_aside_and_the_others_stay(monkeypatch):
    vae, decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    method = nn.Sequential(nn.Linear(2, 2), nn.Sequential(decoder))  # a loss that decodes
    moved = []
    monkeypatch.setattr(nn.Linear, "to", lambda self, device: moved.append((self, device)))
    offload.set_aside([vae, decoder], [method])
    assert moved == [(vae, "cpu")]
    with pytest.raises(UsageError, match="`offload`: cannot move what `shard` splits"):
        toy.Config(offload=True, shard=True)


def test_a_state_of_another_optimizer_is_refused(tmp_path):
    toy.trainer_of(tmp_path, steps=2).fit()
    with pytest.raises(InputRefused, match="its optimiser was adamw"):
        toy.go_on(toy.trainer_of(tmp_path, steps=3, optimizer="adafactor"))
    run, config = Run(tmp_path / "run", "toy"), toy.Config(optimizer="adafactor", lr=0.5)
    begun = {"command": "toy", "config": resume.values_of(toy.Config())}
    with pytest.raises(UsageError, match="begun with") as failure:
        resume.refuse_changes(run, config, begun)
    assert "to go on with the new ones" not in failure.value.hint  # only where that is possible
    with pytest.raises(UsageError, match="begun with") as failure:
        resume.refuse_changes(run, replace(config, optimizer="adamw"), begun)
    assert "to go on with the new ones" in failure.value.hint


@pytest.mark.parametrize("shape", [(24, 216), (96, 8), (40, 40)])
def test_muon_takes_every_singular_value_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 0, min(shape))
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    found = muon.orthogonal(torch.stack([left @ spread.diag() @ right, 100 * left @ right]))  # any scale, several at once
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    turned = left.mT @ found[0] @ right.mT  # diagonal where the singular vectors are kept
    assert torch.allclose(turned, turned.diag().diag(), atol=1e-4)


def test_muon_steps_as_torchs_own():
    """torch's takes matrices alone and rounds to bf16; its decay, momentum and scale are Liu's too."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(24, 64), (24, 64), (64, 8)]]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    how = dict(lr=0.01, weight_decay=0.1)
    mine = muon.Muon(ours, betas=(0.9, 0.999), fused=True, **how)
    stock = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **how)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step(), stock.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert torch.nn.functional.cosine_similarity((p - before).flatten(), (q - before).flatten(), 0) > 0.9999
        assert (p - before).norm().item() == pytest.approx((q - before).norm().item(), rel=0.01)


def test_muon_trains_what_is_no_matrix_as_adamw():
    """Convolutions count as matrices (out, in * k * k); biases move as under AdamW, to the bit."""
    generator = torch.Generator().manual_seed(0)
    kernel, bias = torch.randn(8, 4, 3, 3, generator=generator), torch.randn(8, generator=generator)
    flat, twin = nn.Parameter(kernel.flatten(1).clone()), nn.Parameter(bias.clone())
    kernel, bias = nn.Parameter(kernel), nn.Parameter(bias)
    how = dict(lr=0.01, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    optimizers = [muon.Muon([kernel, bias], **how), muon.Muon([flat], **how), torch.optim.AdamW([twin], **how)]
    for _ in range(3):
        kernel.grad, bias.grad = torch.randn(8, 4, 3, 3, generator=generator), torch.randn(8, generator=generator)
        flat.grad, twin.grad = kernel.grad.flatten(1).clone(), bias.grad.clone()
        for one in optimizers:
            one.step()
    assert torch.equal(bias, twin)
    torch.testing.assert_close(kernel.flatten(1), flat)


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
