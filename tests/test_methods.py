"""The contract of every training method, over the command table: a new method is picked up by its line there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.data.open import open_data
from fastdiff.methods.shared import cutting
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime.errors import Failed, InputRefused
from fastdiff.runtime.rng import seed_for
from fastdiff.training.run import Run
from fastdiff.training.session import open_accelerator
from fastdiff.training.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden"
SMALL = dict(steps=4, batch_size=4, seed=3, device="cpu", lr=1e-3)
CHAIN = {  # in four steps there is no time for all stages
    "lightning": dict(stages="8:4", phases="cond,uncond", d_warmup=0),
    "sdxs": dict(match_steps=0, gan_steps=1),
    "distill-vae": dict(gan_from=0, encoder=True, lambda_gan=0.004),
}
# Runs whose players change before and after the saved state, and whose student walks.
OPTIONS = [
    pytest.param("tdm", dict(follow=0.3, align_fake=0.2), marks=pytest.mark.slow),
    pytest.param("tdm", dict(follow=0.6), marks=pytest.mark.slow),
    ("sid", dict(num_steps=2)),
]
METHODS = {c.name: c.load().method for c in cli.COMMANDS if c.load().method}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The pictures, with noise that makes them pairs and controls, for the methods that want some."""
    base, pruned = checkpoint.load("emoji"), tmp_path_factory.mktemp("pruned") / "model"
    cutting.cut(base, cutting.layout_of(base, "bk-tiny"), pruned)
    CHAIN["distill-controlnet"] = dict(init=str(pruned))  # without it the student is the teacher, and loses nothing
    found = open_data(base, "emoji", prompts=None, resolution_px=64, pairs=0, seed=0, device="cpu")
    g = torch.Generator().manual_seed(0)
    found.noise = torch.randn(len(found), 4, 8, 8, generator=g)
    found.controls = torch.randint(2, (len(found), 1, 64, 64), generator=g, dtype=torch.uint8) * 255
    return found


def trainer_of(command, data, folder, **changes):
    cls = METHODS[command]
    preset = {k: v for k, v in cls.presets.get("emoji", {}).items() if k not in SMALL}
    config = cls.Config(**{**preset, **SMALL, **CHAIN.get(command, {}), **changes})
    base, run = checkpoint.load("emoji"), Run(folder, command)
    torch.manual_seed(config.seed)
    method = cls(base, config)
    return Trainer(method, data, run, config, open_accelerator(config, run)), base


def answer(net, z, cond):
    """What a network makes of latents: a denoiser at one noise level, a VAE as a picture."""
    return net(z, torch.tensor(500), cond).eps if isinstance(net, Denoiser) else net.decode(z).sample


def weights(trainer):
    return {k: [p.detach().clone() for p in player.params] for k, player in trainer.players.items()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", METHODS)
def test_losses_are_finite_players_move_and_the_teacher_does_not(command, data, tmp_path):
    trainer, base = trainer_of(command, data, tmp_path)
    with torch.no_grad():
        z, cond = torch.randn(2, 4, 8, 8), data.texts[:2]
        before = answer(trainer.method.teacher, z, cond)
    old = weights(trainer)
    for _ in range(2):
        row = trainer.train_step()
        trainer.step += 1
        assert all(torch.tensor(v).isfinite() for v in row.values())
    for k, params in weights(trainer).items():
        assert any(not torch.equal(a, b) for a, b in zip(old[k], params, strict=True)), f"{k} did not move"
    with torch.no_grad():
        assert torch.equal(answer(trainer.method.teacher, z, cond), before)


@pytest.mark.parametrize("command", METHODS)
def test_a_base_that_takes_guidance_as_an_input_is_refused_before_data_is_made(command):
    """All but consistency distillation would fail at their first step; a tiny decoder has no use for the UNet."""
    cls, base = METHODS[command], checkpoint.load("emoji")
    config = cls.Config(**cls.presets.get("emoji", {}))
    cls.check_base(config, base)
    base.unet_config["time_cond_proj_dim"] = 256
    if command in {"train-lcm-lora", "distill-vae"}:
        cls.check_base(config, base)
    else:
        with pytest.raises(InputRefused, match=f"`base=emoji`: its UNet takes the guidance as an input.*{command} trains"):
            cls.check_base(config, base)


@pytest.mark.parametrize("command", METHODS)
def test_only_the_yielding_player_gets_gradients(command, data, tmp_path):
    trainer, _ = trainer_of(command, data, tmp_path)
    batch = data.batch(4, torch.Generator().manual_seed(0))
    for who, losses in (pair for turn in trainer.method.losses(batch, trainer.now) for pair in turn.items()):
        mine = trainer.players[who].params
        others = [p for k, player in trainer.players.items() if k != who for p in player.params]
        sum(losses.values()).backward(inputs=mine)
        assert sum(p.grad.abs().sum() for p in mine if p.grad is not None) > 0
        assert all(p.grad is None for p in others)
        assert all(p.grad is None for p in trainer.method.base_model.unet.parameters() if not p.requires_grad)
        for p in mine:
            p.grad = None


@pytest.mark.parametrize(("command", "options"), [*((name, {}) for name in METHODS if name not in {"sid", "tdm"}), *OPTIONS])
def test_a_resumed_run_equals_an_uninterrupted_one(command, options, data, tmp_path, monkeypatch):
    """7 steps in one go, and a resume from a copy of the disk at step 5: weights, averages and metrics bit by bit.

    That copy is what kill -9 leaves: the state of step 3, and two steps more in the log.
    """
    changes = dict(steps=7, batch_size=2, ema=0.9, save_every=3, **options)
    whole, _ = trainer_of(command, data, tmp_path / "whole", **changes)
    train_step = whole.train_step

    def copied_at_step_5():
        if whole.step == 5:
            shutil.copytree(tmp_path / "whole", tmp_path / "parts")
        return train_step()

    monkeypatch.setattr(whole, "train_step", copied_at_step_5)
    whole.fit()
    second, _ = trainer_of(command, data, tmp_path / "parts", **changes)
    second.restore(second.run.load_state())
    assert second.step == 3
    second.fit()
    for k, params in weights(whole).items():
        for a, b in zip(params, weights(second)[k], strict=True):
            assert torch.equal(a, b)
    first_player = next(iter(whole.players))
    for a, b in zip(whole.players[first_player].ema.shadow, second.players[first_player].ema.shadow, strict=True):
        assert torch.equal(a, b)
    assert all(player.ema is None for k, player in whole.players.items() if k != first_player)
    timeless = lambda folder: [{k: v for k, v in row.items() if k not in {"time", "elapsed_s"}} for row in rows(folder)]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


@pytest.mark.parametrize("command", METHODS)
def test_accumulation_equals_one_large_batch(command, data, tmp_path, monkeypatch):
    """Two micro-batches of the halves give the gradient of the whole, up to summation order."""
    found = []
    for n in (1, 2):
        trainer, _ = trainer_of(command, data, tmp_path / str(n), grad_accum=n, batch_size=4 // n)
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))

        def losses(batch, now, trainer=trainer):
            out = answer(trainer.method.student, batch.latents, batch.cond)
            yield {next(iter(trainer.players)): {"plain": out.square().mean()}}

        parts = iter(x.chunk(n))
        monkeypatch.setattr(trainer.method, "losses", losses)
        real = trainer.data.batch
        table = real(4, torch.Generator().manual_seed(2))

        class Fixed:
            def batch(self, size, generator, shared, parts=parts, table=table, offset=[0]):  # noqa: B006  (a counter)
                from fastdiff.data.batch import Batch

                rows = slice(offset[0], offset[0] + size)
                offset[0] += size
                return Batch(next(parts), table.cond[rows], table.uncond[rows])

        trainer.data = Fixed()
        trainer.train_step()
        found.append(weights(trainer))
    for k in found[0]:
        for a, b in zip(found[0][k], found[1][k], strict=True):
            torch.testing.assert_close(a, b, atol=3e-4, rtol=0)  # Adam's first step is lr * sign for tiny gradients


@pytest.mark.parametrize("command", METHODS)
def test_golden_losses(command, data, tmp_path, request):
    """A refactor must not change the first losses. `pytest -k golden --write-golden` writes them anew."""
    trainer, _ = trainer_of(command, data, tmp_path)
    found = []
    for _ in range(3):
        found.append(trainer.train_step()["loss"])
        trainer.step += 1
    path = GOLDEN / f"{command}.txt"
    if request.config.getoption("--write-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{x:.6f}\n" for x in found))
    expected = [float(x) for x in path.read_text().split()]
    assert found == pytest.approx(expected, rel=2e-3)


def test_noise_differs_between_ranks_and_steps():
    seeds = {seed_for(s, r, t) for s in range(3) for r in range(8) for t in range(500)}
    assert len(seeds) == 3 * 8 * 500


def test_a_stop_signal_saves_a_state_and_says_how_to_go_on(data, tmp_path, monkeypatch):
    import signal

    from fastdiff.runtime.errors import Stopped

    trainer, _ = trainer_of("train-lcm-lora", data, tmp_path, steps=50)
    real = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda: (os.kill(os.getpid(), signal.SIGTERM), real())[1])
    with pytest.raises(Stopped, match="stopped at step 1 of 50") as stop:
        trainer.fit()
    assert stop.value.exit_code == 75
    assert stop.value.hint == f"go on with: fastdiff train-lcm-lora --config {tmp_path / 'config.toml'}"
    assert stop.value.result.next_command == f"fastdiff train-lcm-lora --config {tmp_path / 'config.toml'}"
    assert trainer.run.load_state()["step"] == 1


def test_bad_gradients_are_skipped_and_ten_in_a_row_end_the_run(data, tmp_path, monkeypatch):
    trainer, _ = trainer_of("train-lcm-lora", data, tmp_path, steps=50)
    old = weights(trainer)
    broken = lambda batch, now: iter([{"student": {"x": trainer.players["student"].params[0].sum() * float("nan")}}])
    monkeypatch.setattr(trainer.method, "losses", broken)
    with pytest.raises(Failed, match="10 bad steps of student in a row"):
        trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(old["student"], weights(trainer)["student"], strict=True))


# ---- measuring during training


def measured(trainer, scores):
    """Each measurement in turn gives the next of these."""
    left = iter(scores)
    trainer.measure = lambda: {"score": next(left)}


def test_the_best_weights_are_exported_and_survive_a_resume(data, tmp_path):
    trainer, _ = trainer_of("train-lcm-lora", data, tmp_path, steps=6, eval_every=2, keep="best", ema=0.5)
    measured(trainer, [0.5, 0.2, 0.9])
    seen = {}
    real = trainer.evaluate

    def spy():
        with trainer.averaged():
            seen[trainer.step] = weights(trainer)["student"]
        return real()

    trainer.evaluate = spy
    kept = []
    trainer.improved = lambda: kept.append((trainer.step, weights(trainer)["student"]))
    trainer.fit()
    assert [step for step, _ in kept] == [2, 4]
    assert all(torch.equal(a, b) for a, b in zip(kept[-1][1], seen[4], strict=True))
    assert (trainer.best["step"], trainer.best["score"], trainer.best["worse"]) == (4, 0.2, 1)
    second, _ = trainer_of("train-lcm-lora", data, tmp_path, steps=6, eval_every=2, keep="best", ema=0.5)
    second.restore(second.run.load_state())
    for one in (trainer, second):
        before = weights(one)["student"]
        with one.exported():
            assert all(torch.equal(a, b) for a, b in zip(seen[4], weights(one)["student"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, weights(one)["student"], strict=True))
    last, _ = trainer_of("train-lcm-lora", data, tmp_path, steps=6, eval_every=2, ema=0.5)
    last.restore(last.run.load_state())
    with last.exported():
        assert all(torch.equal(a, b) for a, b in zip(seen[6], weights(last)["student"], strict=True))
    assert [row["score"] for row in rows(tmp_path) if "score" in row] == [0.5, 0.2, 0.9]


def test_a_run_that_only_gets_worse_is_stopped(data, tmp_path, capsys):
    trainer, _ = trainer_of("train-lcm-lora", data, tmp_path, steps=50, eval_every=1, keep="best", patience=2)
    measured(trainer, [0.5, 0.6, 0.75, 0.1])
    trainer.fit()
    assert trainer.step == 3
    err = capsys.readouterr().err
    assert "score 0.750; best at 1, now worse by 50 %" in err
    assert "stopped at step 3" in err


def test_players_that_do_not_train_at_every_step_keep_their_last_figures_in_the_log(data, tmp_path):
    trainer, _ = trainer_of("dmd", data, tmp_path, steps=10, fake_steps_per_gen=7)
    trainer.fit()
    (row,) = rows(tmp_path)
    assert {"student/matching", "student/grad_norm", "fake/denoising", "x_std", "difference"} <= set(row)
