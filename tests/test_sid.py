"""Score identity distillation: its loss against autograd in float64, its roles, and a world with exact scores."""

from itertools import pairwise

import pytest
import torch
from exact import World
from playing import moves_everybody, play, trained
from test_dmd import batch_for, disturb

from fastdiff.checkpoints import checkpoint
from fastdiff.methods.sid import SiD
from fastdiff.options.sid import Config
from fastdiff.runtime.errors import UsageError


def method(path, **config):
    base = checkpoint.load(str(path))
    torch.manual_seed(0)
    return SiD(base, Config(**(dict(lora_rank=4, lora_alpha=8, guidance=1.5, fake_guidance=1.5) | config))), base


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_v", "tiny_sdxl"])
def test_where_both_scores_agree_the_student_loses_nothing_and_does_not_move(family, request):
    m, base = method(request.getfixturevalue(family))
    (turn,) = play(m, batch_for(base))
    assert turn["student"]["identity"].abs() < 1e-6
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(turn["student"]["identity"], trained(m, "student")))
    assert method(request.getfixturevalue(family), num_steps=2)[0].recipe.timesteps == (625, 312)


@pytest.mark.parametrize("identity", [0.0, 1.0, 1.2])
def test_the_loss_and_its_gradient_are_those_of_the_equation(tiny_sd, identity):
    """Gradients flow through x, and through x_t into both scores; the scale has none."""
    m, base = method(tiny_sd, identity=identity, guidance=3.0, fake_guidance=2.0)
    disturb(m)
    batch = batch_for(base)
    x = batch.latents.clone().requires_grad_(True)
    torch.manual_seed(1)
    seen = m.noised(x, 0.02, 0.98)
    (found,) = torch.autograd.grad(m.identity_loss(seen, batch), x)

    y = batch.latents.clone().requires_grad_(True)
    x_t = m.schedule.add_noise(y, seen.eps, seen.t)
    guided = lambda role, w: (lambda c, u: u + w * (c - u))(role(x_t, seen.t, batch.cond).x0, role(x_t, seen.t, batch.uncond).x0)
    f, g = guided(m.teacher, 3.0), guided(m.fake, 2.0)
    scale = (y - f).abs().mean((1, 2, 3), keepdim=True).detach()
    second = (1 - identity) * (f - g).square()
    expected = ((second + (f - g) * (g - y)) / scale).mean()
    torch.testing.assert_close(found, torch.autograd.grad(expected, y)[0], atol=1e-5, rtol=1e-3)
    assert found.abs().max() > 1e-5


def test_the_fake_score_learns_its_guided_answer_at_every_noise_level(tiny_sd):
    m, base = method(tiny_sd)
    disturb(m)
    batch = batch_for(base)
    torch.manual_seed(2)
    loss = m.fake_loss(batch.latents, batch)
    torch.manual_seed(2)
    seen = m.noised(batch.latents, 0, 1)
    c, u = (m.fake(seen.x_t, seen.t, cond).x0 for cond in (batch.cond, batch.uncond))
    alpha = m.schedule.alpha[seen.t].reshape(-1, 1, 1, 1)
    expected = (alpha * (u + 1.5 * (c - u) - batch.latents)).square().mean()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
    assert max(m.noised(torch.zeros(20_000, 1, 1, 1), 0, 1).t) == 999


def test_a_few_step_student_trains_at_a_step_of_its_own_trajectory(tiny_sd, monkeypatch):
    """From z at the first timestep; further on, its x0 with fresh noise. The recipe has the same timesteps."""
    m, base = method(tiny_sd, num_steps=4)
    disturb(m)
    batch, calls, steps = batch_for(base), [], []
    real = m.student.forward
    monkeypatch.setattr(m.student, "forward", lambda x, t, cond: (calls.append((x, int(t.flatten()[0]))), real(x, t, cond))[1])
    for seed in range(6):
        calls.clear()
        torch.manual_seed(seed)
        next(play(m, batch))
        steps.append(len(calls))
        assert [t for _, t in calls] == list(m.recipe.timesteps[: len(calls)]) == [625, 469, 312, 155][: len(calls)]
        for (x, t), (later, u) in pairwise(calls):
            with torch.no_grad():
                x0 = real(x, torch.tensor(t), batch.cond).x0
            alpha, sigma = m.schedule.coefficients(torch.tensor(u), x)
            noise = (later - alpha * x0) / sigma
            assert noise.std().item() == pytest.approx(1, abs=0.15)
            assert torch.cosine_similarity(noise.flatten(), x.flatten(), 0).abs() < 0.15
    assert len(set(steps)) > 2


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_v", "tiny_sdxl"])
def test_gradients_are_those_without_checkpointing_and_the_student_rests_between_its_updates(family, request):
    found = []
    for checkpointing in (False, True):
        m, base = method(request.getfixturevalue(family), gradient_checkpointing=checkpointing, fake_steps_per_gen=2)
        torch.manual_seed(1)
        disturb(m)
        batch = batch_for(base)
        assert [sorted(next(play(m, batch, step))) for step in range(3)] == [["fake", "student"], ["fake"], ["fake", "student"]]
        torch.manual_seed(2)
        (turn,) = play(m, batch)
        found.append([torch.autograd.grad(sum(turn[who].values()), trained(m, who), retain_graph=True) for who in sorted(turn)])
    for plain, again in zip(*found, strict=True):
        assert sum(g.norm() for g in plain) > 0
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_zero_terminal_snr(tiny_v):
    base = checkpoint.load(str(tiny_v))
    base.scheduler_config["rescale_betas_zero_snr"] = True
    m = SiD(base, Config(lora_rank=4, lora_alpha=8, guidance=3.0, t_first=999, t_max=1.0))
    assert m.schedule.zero_terminal_snr
    disturb(m)
    moves_everybody(m, batch_for(base, n=8))


def test_steps_that_do_not_fit_below_the_first_timestep_are_refused():
    with pytest.raises(UsageError, match="t_first=2"):
        Config(t_first=2, num_steps=4)


def test_one_step_reaches_the_mean_and_covariance_of_exact_scores():
    world = World()
    config, first = Config(guidance=1.0), torch.tensor([625])
    student = world.train(SiD, config, 1200, timesteps=first)
    with torch.no_grad():
        before, after = (world.errors(net(torch.randn(40_000, 2), first).x0) for net in (world.net, student))
    print(f"{before:.3f} before, {after:.3f} after")
    assert before > 0.3
    assert after < 0.05
