"""Progressive adversarial distillation: its steps against stock schedulers, its stages, players and files."""

import re
import shutil
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from playing import entered, phases_of, play, trainees
from test_dmd import batch_for, disturb

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.data.batch import Encoded
from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.lora import adapters, apply
from fastdiff.methods.lightning import SHOWN, Config, Lightning
from fastdiff.methods.shared.stages import plan, timesteps
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.train import seconds
from fastdiff.runtime.errors import UsageError, with_flags
from fastdiff.training.method import Now
from fastdiff.training.run import Run
from fastdiff.training.session import open_accelerator
from fastdiff.training.trainer import Trainer

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def config(**given):
    quick = dict(steps=60, lora_rank=4, lora_alpha=4, lr=1e-2, adversarial_lr=1e-3, full_lr=1e-4, batch_size=2, device="cpu")
    return Config(**{**quick, **given})


def method(path, part=0, **given):
    """The method in one phase, by number or name, with all before it entered in order."""
    m = Lightning(checkpoint.load(str(path)), config(**given))
    names = list(phases_of(m))
    torch.manual_seed(0)
    for name in names[: (names.index(part) if isinstance(part, str) else part) + 1]:
        entered(m, name)
    return m


def data_for(base, n=12):
    batch = batch_for(base, n)
    moments = torch.cat([batch.latents, torch.zeros_like(batch.latents)], 1)
    return Encoded(moments, batch.cond, torch.arange(n)[:, None], torch.ones(1), batch.uncond[:1])


def trainer_of(path, folder, **given):
    c, run = config(**given), Run(folder, "lightning")
    torch.manual_seed(c.seed)
    base = checkpoint.load(str(path))
    m = Lightning(base, c)
    return Trainer(m, data_for(base), run, c, open_accelerator(c, run))


def weights(trainer):
    return {k: [p.detach().clone() for p in player.params] for k, player in trainer.players.items()}


# ---- the plan


def test_the_published_chain():
    parts = plan(Config(steps=1600))
    assert [p.name for p in parts] == [
        "32-mse",
        *(f"{b}-{kind}" for b in (8, 4, 2) for kind in ("cond", "uncond", "full")),
        *(f"1-{kind}" for kind in ("switch", "cond", "uncond", "full")),
    ]
    assert [p.name for p in parts if p.exports] == [
        "32-mse", "8-uncond", "8-full", "4-uncond", "4-full", "2-uncond", "2-full", "1-uncond", "1-full"
    ]  # fmt: skip
    assert sum(p.steps for p in parts) == 1600
    for stage in range(5):
        assert sum(p.steps for p in parts if p.stage == stage) == pytest.approx(320, abs=2)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (dict(stages="8:4"), ["4-cond", "4-uncond", "4-full"]),
        (dict(stages="8:4", lora_only=True), ["4-cond", "4-uncond"]),
        (dict(stages="2:1", phases="uncond"), ["1-switch", "1-uncond"]),
        (dict(stages="8:4,4:2,2:1", adversarial_below=1), ["4-mse", "2-mse", "1-switch", "1-mse"]),
        (dict(stages="2:1", phases="switch:3,mse,cond:2", lora_only=True), ["1-switch", "1-mse", "1-cond"]),
        (dict(stages="64:8,8:4", adversarial_below=8, phases="cond"), ["8-mse", "4-cond"]),
    ],
)
def test_any_start_and_end(given, names):
    parts = plan(Config(**given))
    assert [p.name for p in parts] == names
    assert all(p.exports for p in parts if p.kind == "full")
    assert all(p.kind in {"mse", "cond", "uncond", "full"} for p in parts if p.exports)
    assert {p.b for p in parts if p.exports and p.kind != "full"} == {p.b for p in parts}
    assert parts[-1].exports


def test_steps_are_shared_out_as_told():
    parts = plan(Config(stages="8:4:3,4:2", phases="cond,uncond", lora_only=True, steps=80))
    assert [p.steps for p in parts] == [30, 30, 10, 10]
    parts = plan(Config(stages="4:2,2:1", phases="switch:4,mse:3,cond,uncond:2", lora_only=True, steps=160))
    assert [p.steps for p in parts] == [40, 13, 27, 32, 24, 8, 16]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(stages="8:3"), "--stages 8:3"),
        (dict(stages="8:4,2:1"), "--stages 8:4,2:1"),
        (dict(stages="four"), "--stages four"),
        (dict(stages="4:8"), "--stages 4:8"),
        (dict(stages="2000:1000"), "--stages 2000:1000"),
        (dict(phases="uncond,cond"), "--phases uncond,cond"),
        (dict(phases="full"), "--phases full"),
        (dict(phases="mse,full"), "--phases mse,full"),
        (dict(phases="cond,cond"), "--phases cond,cond"),
        (dict(phases="cond:0"), "--phases cond:0"),
        (dict(phases="cond:many"), "--phases cond:many"),
        (dict(phases="both"), "--phases both"),
        (dict(phases="full", lora_only=True), "--phases full"),
        (dict(stages="8:4:0"), "--stages 8:4:0"),
        (dict(stages="8:4:1:1"), "--stages 8:4:1:1"),
        (dict(stages="8"), "--stages 8: not a chain"),
        (dict(steps=5), "--steps 5: too few for 14 phases"),
    ],
)
def test_a_chain_that_is_none_is_refused(given, told):
    with pytest.raises(UsageError) as error:
        Config(**given)
    assert told in with_flags(str(error.value))


# ---- steps


@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 128])
def test_places_are_the_trailing_timesteps_of_stock_euler(n):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    place = torch.tensor([1 - k / n for k in range(n)], dtype=torch.float64)
    assert timesteps(NoiseSchedule.from_config(SD), place).tolist() == scheduler.timesteps.long().tolist()


def test_the_published_table_of_timesteps():
    schedule = NoiseSchedule.from_config(SD)
    at = lambda *places: timesteps(schedule, torch.tensor(places, dtype=torch.float64)).tolist()
    assert at(1) == [999]
    assert at(1, 0.5) == [999, 499]
    assert at(1, 0.75, 0.5, 0.25) == [999, 749, 499, 249]
    assert at(*(1 - k / 8 for k in range(8))) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert at(0.0, -0.25) == [-1, -1]


@pytest.mark.parametrize(("stages", "guidance"), [("8:4", 1.0), ("8:2", 5.0), ("4:1", 1.0), ("8:1", 3.0), ("40:8", 2.0)])
def test_the_teachers_way_is_ddim_steps_of_stock_diffusers(tiny_sd, stages, guidance):
    from diffusers import DDIMScheduler

    m = method(
        tiny_sd, f"{stages.split(':')[1]}-mse" if stages != "4:1" else 1, stages=stages, guidance=guidance, adversarial_below=1
    )
    batch = batch_for(m.base_model, 8)
    a, b = (int(n) for n in stages.split(":"))
    with torch.no_grad():
        x_t, place = m.start(batch, m.current[0])
        found = m.teacher_steps(x_t, place, batch, m.current[0])
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(a)
    assert len(set(place.tolist())) > 1 or b == 1
    for i in range(len(x_t)):
        x, t = x_t[i : i + 1], int(timesteps(m.schedule, place)[i])
        for _ in range(a // b):
            if t < 0:
                break
            with torch.no_grad():
                eps = m.teacher.guided(x, torch.tensor(t), batch.cond[i : i + 1], batch.uncond[i : i + 1], guidance).eps
            x, t = scheduler.step(eps, t, x).prev_sample, t - 1000 // a
        assert (found[i] - x[0]).abs().max() < 1e-5 * max(1, x.abs().max())


def test_on_an_uneven_grid_the_way_is_stock_eulers(tiny_sd):
    """128 steps do not divide 1000: DDIMScheduler then steps beside its own timesteps, Euler does not."""
    from diffusers import EulerDiscreteScheduler

    m = method(tiny_sd, stages="128:32", guidance=6.0)
    batch = batch_for(m.base_model, 8)
    with torch.no_grad():
        x_t, place = m.start(batch, m.current[0])
        found = m.teacher_steps(x_t, place, batch, m.current[0])
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    for i in range(len(x_t)):
        scheduler.set_timesteps(128)
        scheduler._step_index = None
        first = round((1 - place[i].item()) * 128)
        alpha = m.schedule.alpha[timesteps(m.schedule, place)[i]]
        x = x_t[i : i + 1] / alpha
        for t in scheduler.timesteps[first : first + 4]:
            with torch.no_grad():
                eps = m.teacher.guided(
                    scheduler.scale_model_input(x, t), t.long(), batch.cond[i : i + 1], batch.uncond[i : i + 1], 6.0
                ).eps
            x = scheduler.step(eps, t, x).prev_sample
        s = timesteps(m.schedule, place - 1 / 32)[i]
        x = x * (m.schedule.alpha[s] if s >= 0 else 1.0)
        torch.testing.assert_close(found[i : i + 1], x, atol=1e-4, rtol=1e-4)


def test_at_the_last_timestep_the_student_meets_pure_noise_to_the_bit(tiny_sd, monkeypatch):
    m = method(tiny_sd, "4-cond", stages="8:4")
    batch = batch_for(m.base_model, 64)
    real, drawn = torch.randn_like, []
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(real(x)) or drawn[-1])
    x_t, place = m.start(batch, m.current[0])
    (eps,) = drawn
    last = place == 1
    assert 0 < last.sum() < 64
    assert torch.equal(x_t[last], eps[last])
    t = timesteps(m.schedule, place)
    torch.testing.assert_close(x_t[~last], m.schedule.add_noise(batch.latents, eps, t)[~last])


@pytest.mark.parametrize(
    ("part", "places"), [("4-cond", {0.25, 0.5, 0.75, 1}), ("2-cond", {0.25, 0.5, 0.75, 1}), ("1-cond", {0.25, 0.5, 0.75, 1})]
)
def test_where_students_train(tiny_sd, part, places):
    """Of four steps and fewer at four places, also where the sampler of fewer never calls them; no step ends below clean."""
    m = method(tiny_sd, part, stages="8:4,4:2,2:1")
    _, place = m.start(batch_for(m.base_model, 128), m.current[0])
    assert set(place.tolist()) == places
    assert timesteps(m.schedule, place - 1 / m.current[0].b).min() == -1


# ---- teachers


def outputs(net, batch, t=500):
    with torch.no_grad():
        return net(batch.latents, torch.tensor(t), batch.cond).eps


def test_the_teacher_of_a_stage_is_the_student_of_the_last(tiny_sd):
    m = Lightning(checkpoint.load(str(tiny_sd)), config(stages="8:4,4:2,2:1", guidance=4.0))
    batch, seen = batch_for(m.base_model), {}
    for p in m.phases():
        entered(m, p.name)
        net, steps, guidance = m.source
        seen[p.name] = (outputs(net, batch), steps, guidance)
        if p.name == "1-cond":
            assert torch.equal(outputs(m.role("teacher"), batch), outputs(m.role("student"), batch))
        if p.kind == "cond":
            disturb(m, ["student"])
            students = seen.setdefault("students", {})
            students[p.b] = outputs(m.role("student"), batch)
    base = outputs(m.teacher, batch)
    for name, source, steps, guidance in [
        ("4-cond", base, 8, 4.0),
        ("4-full", base, 8, 4.0),
        ("2-cond", seen["students"][4], 4, 1.0),
        ("2-uncond", base, 8, 4.0),  # skips to the teacher of the stage before
        ("1-cond", seen["students"][2], 2, 1.0),
        ("1-uncond", seen["students"][4], 4, 1.0),
        ("1-full", seen["students"][4], 4, 1.0),
    ]:
        assert seen[name][1:] == (steps, guidance), name
        assert torch.equal(seen[name][0], source), name


def test_without_skipping_every_phase_has_the_stages_own_teacher(tiny_sd):
    m = method(tiny_sd, "1-uncond", stages="4:2,2:1", skip_teacher=False)
    assert m.source[1:] == (2, 1.0)


def test_a_chain_starts_from_a_lora(tiny_sd, tmp_path):
    first = method(tiny_sd, "4-cond", stages="8:4")
    disturb(first, ["student"])
    lora.save(lora.Lora(adapters.factors(first.base_model.unet, 4.0), {}), tmp_path / "few.safetensors")
    m = method(tiny_sd, "4-cond", stages="8:4,4:2", init=str(tmp_path / "few.safetensors"))
    batch = batch_for(m.base_model)
    for net in (m.source[0], m.student):
        torch.testing.assert_close(outputs(net, batch), outputs(first.student, batch), atol=5e-4, rtol=1e-3)
    assert m.source[1:] == (8, 1.0)
    assert not torch.allclose(outputs(m.teacher, batch), outputs(m.student, batch), atol=1e-3)
    entered(m, "2-uncond")
    assert m.source[1:] == (8, 1.0)


# ---- discriminator


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_paired_discriminator_sees_what_belongs_together(tiny_sd, kind):
    batch = None
    for part, paired in (("4-cond", True), ("4-uncond", False)):
        m = method(tiny_sd, part, stages="8:4", discriminator=kind)
        batch = batch_for(m.base_model)
        for p in m.discriminator_params:
            torch.nn.init.normal_(p, std=0.05)
        t, s = torch.full((4,), 999), torch.full((4,), 749)
        judge = lambda x_t, x_s=batch.latents, c=batch.cond: m.discriminator(x_s, s, c, x_t, t)  # noqa: B023
        with torch.no_grad():
            right, wrong = judge(batch.noise), judge(batch.noise.flip(0))
            assert right.shape == (4, 1)
            assert torch.equal(right, wrong) != paired
            assert not torch.equal(right, judge(batch.noise, batch.latents.flip(0)))
            assert not torch.equal(right, judge(batch.noise, c=batch.cond[[1, 0, 3, 2]]))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_discriminator_is_the_base_again_at_every_stage(tiny_sd, kind):
    m = Lightning(checkpoint.load(str(tiny_sd)), config(stages="8:4,4:2", discriminator=kind))
    batch = batch_for(m.base_model)
    t = torch.full((4,), 500)
    features = lambda: m.discriminator.watched.bottleneck(batch.latents, t, batch.cond)
    with torch.no_grad():
        for p in m.phases():
            before = m.discriminator
            entered(m, p.name)
            fresh = p.kind != "full"
            assert (m.discriminator is before) != fresh
            if fresh:
                torch.testing.assert_close(features(), m.teacher.bottleneck(batch.latents, t, batch.cond), atol=1e-5, rtol=1e-5)
            for q in m.discriminator_params:
                q += 0.05
            assert (features() - m.teacher.bottleneck(batch.latents, t, batch.cond)).abs().max() > 1e-2


@pytest.mark.parametrize(("features", "maps"), [("mid", 1), ("every", 4)])
def test_any_picture_size_has_a_logit_for_each_map(tiny_sdxl, features, maps):
    """Three down blocks and the mid block, of which the published layout judges the last."""
    m = method(tiny_sdxl, "4-cond", stages="8:4", d_features=features)
    cond = batch_for(m.base_model, 2).cond
    for h, w in ((8, 8), (16, 8), (32, 24)):
        x = torch.randn(2, 4, h, w)
        assert m.discriminator(x, torch.full((2,), -1), cond, x, torch.full((2,), 249)).shape == (2, maps)


def test_features_are_those_of_the_blocks_before_they_halve(tiny_sdxl):
    m = method(tiny_sdxl)
    batch = batch_for(m.base_model, 2)
    with torch.no_grad():
        maps = m.teacher.encoded(batch.latents, torch.tensor(500), batch.cond)
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 8, 8), (32, 4, 4), (32, 2, 2), (32, 2, 2)]
    torch.testing.assert_close(maps[-1], m.teacher.bottleneck(batch.latents, torch.tensor(500), batch.cond))


def test_clean_latents_of_few_steps_are_shown_noised_alike(tiny_sd):
    m = method(tiny_sd, "1-cond", stages="4:2,2:1", late_detail_at=10)
    real, fake = torch.randn(2, 4000, 1, 2, 2)
    s = torch.full((4000,), -1)
    for done, share in ((9, 1 / 4), (10, 5 / 8)):
        at, show = m.presented(s, Now(0, m.current[0], done, 0.0), real)
        assert set(at.tolist()) == set(SHOWN)
        assert (at == SHOWN[0]).float().mean() == pytest.approx(share, abs=0.03)
        alpha, _ = m.schedule.coefficients(at, real)
        torch.testing.assert_close(show(real) - show(fake), alpha * (real - fake), atol=1e-5, rtol=1e-4)
    m = method(tiny_sd, "4-cond", stages="8:4")
    at, show = m.presented(s, Now(0, m.current[0], 0, 0.0), real)
    assert torch.equal(at, s)
    assert torch.equal(show(real), real)
    m = method(tiny_sd, "2-cond", stages="4:2")
    s[::2] = 499
    at, show = m.presented(s, Now(0, m.current[0], 0, 0.0), real)
    assert torch.equal(at[::2], s[::2])
    assert torch.equal(show(real)[::2], real[::2])
    assert set(at[1::2].tolist()) == set(SHOWN)


# ---- one step


def test_the_one_step_student_outputs_x0(tiny_sd):
    m = method(tiny_sd, "1-cond", stages="2:1")
    batch = batch_for(m.base_model)
    assert (m.student.kind, m.teacher.kind, m.recipe.prediction_type) == ("sample", "epsilon", "sample")
    with torch.no_grad(), adapters.using(m.base_model.unet, "student"):
        out = m.base_model.unet(batch.latents, torch.full((4,), 999), batch.cond.tokens).sample
        assert torch.equal(m.student(batch.latents, torch.tensor(999), batch.cond).x0, out)
        t, s = torch.full((4,), 999), torch.full((4,), -1)
        assert torch.equal(m.move(batch.latents, t, s, batch.cond), out)


def test_the_switch_teaches_x0_of_the_network_before(tiny_sd, tmp_path):
    trainer = trainer_of(tiny_sd, tmp_path, stages="2:1", steps=120, lr=2e-2, lora_rank=16, max_grad_norm=1e9)
    m = trainer.method
    assert trainer.phase.name == "1-switch"
    assert set(trainees(m)) == {"student"}
    batch = data_for(m.base_model).batch(64, torch.Generator().manual_seed(0))

    def distance():
        torch.manual_seed(0)
        with torch.no_grad():
            (turn,) = play(m, batch, 0)
        return turn["student"]["switch"].item()

    before = distance()
    for _ in range(10):
        trainer.train_step()
        trainer.step += 1
    assert distance() < 0.97 * before  # random weights cannot say more: the last layer, which has no adapter, is small
    with torch.no_grad():
        torch.manual_seed(0)
        x_t, place = m.start(batch, m.current[0])
        t = timesteps(m.schedule, place)
        expected = (m.student(x_t, t, batch.cond).x0 - m.teacher(x_t, t, batch.cond).x0).square().mean()
    assert distance() == pytest.approx(expected.item(), rel=1e-4)


# ---- players


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_in_every_phase_both_train_and_nothing_else_moves(tiny_sd, tmp_path, kind):
    trainer = trainer_of(tiny_sd, tmp_path, stages="4:2,2:1", steps=14, discriminator=kind, ema=0.0)
    net = trainer.method.base_model.unet
    for i, phase in enumerate(trainer.phases):
        if i:
            trainer.enter(i)
        adversarial = phase.kind in {"cond", "uncond", "full"}
        assert list(trainer.players) == (["student", "discriminator"] if adversarial else ["student"])
        mine = {id(p) for player in trainer.players.values() for p in player.params}
        others = [p for p in net.parameters() if id(p) not in mine]
        before, kept = weights(trainer), [p.clone() for p in others]
        for _ in range(2):
            trainer.train_step()
            trainer.step += 1
        for who, params in weights(trainer).items():
            assert any(not torch.equal(a, b) for a, b in zip(before[who], params, strict=True)), (phase.name, who)
        assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True)), phase.name


def test_the_discriminators_turn_comes_first_and_may_come_more_often(tiny_sd):
    m = method(tiny_sd, "4-cond", stages="8:4", d_steps_per_gen=3, d_warmup=4, r1=100.0)
    batch = batch_for(m.base_model)
    turns = [[who for turn in play(m, batch, step) for who in turn] for step in range(7)]
    both, alone = ["discriminator", "student"], ["discriminator"]
    assert turns == [alone, alone, alone, alone, alone, alone, both]
    first = next(play(m, batch, 0))["discriminator"]
    assert set(first) == {"gan", "r1"}
    assert first["r1"] > 0
    m = method(tiny_sd, "4-full", stages="8:4", d_warmup=4)  # its discriminator is trained already
    assert [who for turn in play(m, batch, m.current[1]) for who in turn] == both


def test_the_losses_of_both_pairs(tiny_sd):
    real, fake = torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.1])
    for kind, expected in (
        ("plain", -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()),
        ("paired", -(real - fake).sigmoid().log().mean()),
    ):
        m = method(tiny_sd, "4-cond", stages="8:4", gan=kind)
        logits = iter([real, fake])
        found = m.discriminator_losses(lambda x, logits=logits: next(logits), None, None)["gan"]
        torch.testing.assert_close(found, expected)
        assert m.logged()["d_right"] == 0.0


@pytest.mark.parametrize("kind", ["plain", "paired"])
def test_the_students_loss_falls_when_its_latents_look_more_real(tiny_sd, kind, monkeypatch):
    m = method(tiny_sd, "4-cond", stages="8:4", gan=kind)
    batch = batch_for(m.base_model)
    monkeypatch.setattr(m.discriminator, "forward", lambda x, s, cond, x_t=None, t=None: x.mean((1, 2, 3))[:, None])
    found, move = [], Lightning.move
    for shift in (0.0, 1.0):
        monkeypatch.setattr(m, "move", lambda *a, shift=shift: move(m, *a) + shift)
        torch.manual_seed(0)
        found.append(list(play(m, batch, 0))[1]["student"]["gan"].item())
    assert found[1] < found[0]


# ---- stages to files


def test_every_stages_lora_is_one_of_the_base(tiny_sd, tmp_path):
    """One chain: base + file alone draws what the student of that stage draws."""
    trainer = trainer_of(tiny_sd, tmp_path, stages="8:4,4:2", steps=12, phases="cond,full", ema=0.5)
    m, told = trainer.method, {}
    batch = batch_for(m.base_model)

    def finished(phase):
        m.export(trainer.run)
        told[trainer.run.outputs[-1].name] = outputs(m.student, batch)

    trainer.finished = finished
    trainer.fit()
    assert list(told) == [
        "lightning-4step.safetensors",
        "lightning-4step-full",
        "lightning-2step.safetensors",
        "lightning-2step-full",
    ]
    for name, eps in told.items():
        path = tmp_path / name
        base = checkpoint.load(str(path if path.is_dir() else tiny_sd))
        recipe = base.recipe if path.is_dir() else lora.load(path).recipe
        if not path.is_dir():
            apply.apply(base, [(lora.load(path), 1.0)])
        net = Denoiser(base.unet, base.schedule(), base.prediction_type)
        torch.testing.assert_close(outputs(net, batch), eps, atol=1e-4, rtol=1e-4)
        assert (recipe.method, recipe.scheduler, recipe.spacing, recipe.guidance) == ("lightning", "euler", "trailing", 0.0)
        assert recipe.num_steps == int(name[len("lightning-")])
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(told.values()))


def test_the_next_phase_goes_on_from_the_averaged_weights(tiny_sd, tmp_path):
    trainer = trainer_of(tiny_sd, tmp_path, stages="8:4", phases="cond,uncond", lora_only=True, steps=8, ema=0.9)
    seen = {}
    real = trainer.enter

    def enter(index):
        seen["raw"] = seen.get("left")
        real(index)
        seen["entered"] = weights(trainer)["student"]

    trainer.enter = enter
    leave = trainer.leave

    def leaving():
        seen.setdefault("left", [s.clone() for s in trainer.players["student"].ema.shadow])
        leave()

    trainer.leave = leaving
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(seen["left"], seen["entered"], strict=True))


# ---- resume

CHAIN = dict(stages="4:2:3,2:1:4", steps=14, ema=0.9, save_every=1)


@pytest.fixture(scope="module")
def uninterrupted(tiny_sd, tmp_path_factory):
    """The folder of a whole run with the state of every step kept."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(tiny_sd, folder / "run", **CHAIN)
    save = trainer.save

    def keep():
        save()
        shutil.copytree(trainer.run.state_folder, folder / str(trainer.step) / "state", dirs_exist_ok=True)

    trainer.save = keep
    trainer.fit()
    return folder


@pytest.mark.parametrize("at", [1, 2, 3, 5, 7, 9, 11, 12])
def test_a_resumed_run_equals_an_uninterrupted_one_in_every_phase(tiny_sd, uninterrupted, at):
    """Every phase has two steps: from the middle of each, and from between two, over into the next."""
    again = trainer_of(tiny_sd, uninterrupted / str(at), **CHAIN)
    again.restore(again.run.load_state())
    assert (again.step, again.index) == (at, (at - 1) // 2)

    class There(Exception):  # noqa: N818
        pass

    def save():
        if again.step == at + 2:
            raise There

    again.save = save
    with suppress(There):
        again.fit()
    expected = Run(uninterrupted / str(at + 2)).load_state()
    assert (again.step, again.index) == (at + 2, expected["phase"])
    for k, player in again.players.items():
        for a, b in zip(player.params, expected["players"][k]["params"], strict=True):
            assert torch.equal(a, b), k


# ---- time


def test_a_time_budget_is_shared_out_and_left_over_time_is_used(tiny_sd, tmp_path, monkeypatch, capsys):
    """A hundred seconds for two phases of which the second is the slower."""
    from fastdiff.training import trainer as module

    trainer = trainer_of(tiny_sd, tmp_path, stages="8:4", phases="cond,uncond", lora_only=True, steps=200, max_time="100s")
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def step():
        clock[0] += 1.0 if trainer.index == 0 else 2.0
        return {"step": trainer.step, "loss": 0.0}

    trainer.train_step = step
    trainer.fit()
    assert trainer.lengths == [50, 25]
    assert trainer.elapsed_s == 100
    assert "`max_time=100s`: 25 steps 4-uncond" in capsys.readouterr().err
    again = trainer_of(tiny_sd, tmp_path, stages="8:4", phases="cond,uncond", lora_only=True, steps=200, max_time="100s")
    again.restore(again.run.load_state())
    assert again.lengths == [50, 25]
    assert again.step == 75


@pytest.mark.parametrize(("text", "told"), [("10", 10), ("90s", 90), ("25m", 1500), ("1.5h", 5400)])
def test_a_time_in_seconds(text, told):
    assert seconds("max_time", text) == told


@pytest.mark.parametrize("text", ["soon", "-5m", "0s", "1d"])
def test_a_time_is_a_duration(text):
    with pytest.raises(UsageError, match=f"`max_time={re.escape(text)}`: not a duration"):
        seconds("max_time", text)
