"""Trajectory distribution matching: its formulas, its roles on one network, and a world with exact scores."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact import SD, World
from playing import entered, moves_everybody, now, play, trained, trainees
from test_dmd import batch_for, disturb

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.commands.train import train
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.samplers import SOLVERS, jump
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction
from fastdiff.methods.dmd import DMD
from fastdiff.methods.dmd import Config as DMDConfig
from fastdiff.methods.tdm import TDM, Config
from fastdiff.quality.ways import ladder_of
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling.settings import Settings, asked
from fastdiff.training.card import usage_of_recipe
from fastdiff.training.previews import Measured


def method(path, **config):
    base = checkpoint.load(str(path))
    torch.manual_seed(0)
    return TDM(base, Config(**(dict(lora_rank=4, lora_alpha=8, guidance=1.0) | config))), base


# ---- noise from one level on to another


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(("start", "t"), [(-1, 20), (-1, 989), (249, 249), (249, 489), (499, 739), (749, 989)])
def test_noise_that_goes_on_has_the_law_of_the_forward_process(start, t, zero_snr):
    """Mean and variance of x_t given x_start, and of x_t given x0, within 1e-3: by formula and from a million samples."""
    schedule = NoiseSchedule.from_config({**SD, "rescale_betas_zero_snr": zero_snr})
    n, g = 1_000_000, torch.Generator().manual_seed(0)
    eps, noise = torch.randn(2, n, generator=g).double()
    eps, noise = ((v - v.mean()) / v.std(correction=0) for v in (eps, noise))
    noise -= (noise * eps).mean() * eps  # samples whose first two moments are exact
    noise /= noise.std(correction=0)
    x0, at = torch.full((n,), 0.7), lambda v: torch.full((n,), v)
    seen = losses.diffused_on(schedule, Prediction(x0, eps.float()), at(start), at(t), noise.float())
    alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
    assert seen.x_t.mean().item() == pytest.approx(0.7 * alpha, abs=1e-3)
    assert seen.x_t.std().item() == pytest.approx(sigma, abs=1e-3)
    torch.testing.assert_close(seen.x_t, alpha * seen.x + sigma * seen.eps)
    a, s = (schedule.alpha[start].item(), schedule.sigma[start].item()) if start >= 0 else (1.0, 0.0)
    x_start = (a * x0 + s * eps).float()
    rest = seen.x_t - alpha / a * x_start  # what is added to the point of the trajectory
    assert rest.mean().item() == pytest.approx(0, abs=1e-3)
    assert rest.std().item() == pytest.approx(max(0.0, sigma**2 - (alpha * s / a) ** 2) ** 0.5, abs=1e-3)
    assert (rest * eps).mean().item() == pytest.approx(0, abs=1e-3)


def test_from_the_clean_latent_it_is_add_noise_and_over_no_distance_the_ddim_step():
    schedule = NoiseSchedule.from_config(SD)
    x0, eps, noise = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, p = torch.tensor([20, 300, 700, 980]), Prediction(x0, eps)
    clean = losses.diffused_on(schedule, p, torch.full((4,), -1), t, noise)
    assert torch.equal(clean.x_t, schedule.add_noise(x0, noise, t))
    torch.testing.assert_close(clean.eps, noise)
    torch.testing.assert_close(losses.diffused_on(schedule, p, t, t, noise).x_t, jump(schedule, p, t), atol=2e-3, rtol=0)


# ---- the method on a network


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_rows_walk_the_students_own_euler_steps_and_share_the_steps_evenly(tiny_sd, num_steps):
    m, base = method(tiny_sd, num_steps=num_steps)
    disturb(m)
    batch = batch_for(base, n=8)
    state = torch.random.get_rng_state()
    x_t, t, end = m.start(batch, m._grid())
    torch.random.set_rng_state(state)
    noise = torch.randn_like(batch.latents)
    grid = Settings(scheduler="euler", num_steps=num_steps).grid(m.schedule, base.scheduler_config)
    visited = []

    def spy(x, at):
        visited.append(x)
        return m.student(x, at, batch.cond)

    with torch.no_grad():
        SOLVERS["euler"].run(spy, noise, grid, None)
    for row in range(8):
        k = grid.t.tolist().index(int(t[row]))
        torch.testing.assert_close(x_t[row], visited[k][row], atol=1e-5, rtol=1e-5)
        assert end[row] == (grid.t[k + 1] if k + 1 < num_steps else -1)
    assert sorted(t.tolist()) == sorted(grid.t.tolist() * (8 // num_steps))


def test_any_steps_draws_their_number_and_trains_what_its_recipe_draws(tiny_sd):
    """Each number of steps is trained at the timesteps that Euler's sampler, named by the recipe, calls with that number."""
    m, base = method(tiny_sd, num_steps=8, any_steps=True)
    batch, firsts = batch_for(base, n=8), set()
    for _ in range(16):
        _, t, end = m.start(batch, m._grid())
        firsts.add(len(t.unique()))
        pairs = dict(zip(t.tolist(), end.tolist(), strict=True))
        assert all(e == -1 or e in pairs for e in pairs.values())
        grid = m.settings(len(t.unique())).grid(m.schedule, base.scheduler_config)
        assert sorted(set(t.tolist()), reverse=True) == grid.t.tolist()
    assert firsts == {1, 2, 4, 8}
    recipe = Recipe.from_metadata(m.recipe.to_metadata())
    assert (recipe.own_counts, recipe.scheduler, recipe.num_steps) == ((1, 2, 4, 8), "euler", 8)
    assert [settings.num_steps for settings in ladder_of(recipe, base.family, None)] == [1, 2, 4, 8]
    card = usage_of_recipe(Path("tdm.safetensors"), base, recipe)
    assert "in 1, 2, 4 or 8 steps" in card.title
    assert "num_inference_steps=8 (or 1, 2, 4)" in card.sampling
    assert all("1, 2, 4 or 8 steps" in line for line in card.elsewhere)
    one = Recipe.from_metadata(method(tiny_sd)[0].recipe.to_metadata())
    assert (one.own_counts, one.steps_text) == ((4,), "4 steps")


@pytest.mark.parametrize(
    ("steps", "warned"), [(1, ""), (4, ""), (3, "for exactly 1, 2 or 4 steps"), (8, "for exactly 1, 2 or 4 steps")]
)
def test_steps_that_were_not_trained_are_warned_of(steps, warned, capsys):
    recipe = Recipe(scheduler="euler", num_steps=4, step_counts=(1, 2, 4))
    assert asked(recipe, Settings(), num_steps=steps).num_steps == steps
    told = capsys.readouterr().err
    assert warned in told if warned else not told


def test_measurements_of_several_numbers_of_steps_are_their_mean(tiny_sd, monkeypatch):
    m, _ = method(tiny_sd, any_steps=True)
    monkeypatch.setattr(Measured, "in_steps", lambda self, method, n: {"score": float(n)})
    measured = Measured.__new__(Measured)
    assert measured.measure(m) == {"score": (1 + 2 + 4) / 3}


@pytest.mark.parametrize("num_steps", [1, 4])
def test_following_learns_the_teachers_own_walk_and_no_fake_score_trains(tiny_sd, num_steps):
    """From pure noise the goal lies on the teacher's DDIM walk; the loss is the squared distance of the student's own step."""
    m, base = method(tiny_sd, num_steps=num_steps, steps=12, follow=0.25, follow_steps=8, guidance=3.0)
    assert [(phase.name, phase.steps, phase.exports) for phase in m.phases()] == [("follow", 3, False), ("match", 9, True)]
    disturb(m)
    batch = batch_for(base)
    torch.manual_seed(1)
    (turn,) = play(m, batch, 2)
    assert set(turn) == {"student"}
    torch.manual_seed(1)
    x_t, t, end = m.start(batch, m._grid())
    goal = m.teacher_walk(x_t, t, end, batch, 8 // num_steps)
    mine = jump(m.schedule, m.student(x_t, t, batch.cond), end)
    torch.testing.assert_close(turn["student"]["follow"], (mine - goal).square().mean())
    grid = Settings(scheduler="euler", num_steps=8).grid(m.schedule, base.scheduler_config)
    rows = torch.tensor([i for i in range(4) if t[i] == 999])
    assert len(rows) == 4 // num_steps
    walked, visited = x_t[rows], []

    def spy(x, at):
        visited.append(x)
        return m.teacher.guided(x, at, batch.cond[rows], batch.uncond[rows], 3.0)

    with torch.no_grad():
        last = SOLVERS["ddim"].run(spy, walked, replace(grid, final_index=None), None)
    torch.testing.assert_close(goal[rows], [*visited, last][8 // num_steps], atol=1e-3, rtol=1e-3)
    assert [phase.steps for phase in method(tiny_sd, steps=3, follow=0.99)[0].phases()] == [2, 1]  # matching is never left out
    assert set(trainees(m)) == {"student"}
    entered(m, "match")
    assert set(trainees(m)) == set(next(play(m, batch, 3))) == {"student", "fake"}


def test_any_steps_takes_numbers_of_steps_that_it_trains():
    for wrong in (1, 3, 6):
        with pytest.raises(UsageError, match=f"`num_steps={wrong}`: must be 2, 4, 8 or 16 with `any_steps`"):
            Config(any_steps=True, num_steps=wrong)


def test_the_fake_score_rests_while_the_student_follows_and_then_begins_as_the_student(tiny_sd):
    m, base = method(tiny_sd, steps=4, follow=0.5, align_fake=0.5)
    student, fake = (list(m.trains[who].params) for who in ("student", "fake"))
    before = [p.detach().clone() for p in fake]
    with torch.no_grad():
        for p in student:
            p.add_(0.1)
    m.after_update(now(entered(m, "follow"), 1))
    assert all(torch.equal(a, b) for a, b in zip(fake, before, strict=True))
    entered(m, "match")
    assert all(torch.equal(a, b) for a, b in zip(fake, student, strict=True))
    with torch.no_grad():
        student[0].add_(0.1)
    next(play(m, batch_for(base), 3))
    assert not torch.equal(fake[0], student[0])


def test_a_share_that_is_no_step_to_follow_in_is_refused():
    with pytest.raises(UsageError, match="`follow=0.001`: is no step of `steps=100`"):
        Config(follow=0.001, steps=100)
    assert Config(follow=0.01, steps=100).follows == 1


PICTURES = ["max_images", "buckets", "random_crops", "flip", "background", "min_size", "caption_column"]


@pytest.mark.parametrize("option", ["pairs", *PICTURES])
def test_options_of_pictures_are_not_there(option, capsys):
    assert cli.main(["tdm", f"--{option.replace('_', '-')}", "2", "--dry-run"]) == 2
    assert "No such option" in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"`{option}`: not an option of tdm"):
        train("tdm", **{option: 2})


def test_the_load_counts_the_calls_of_a_step(tiny_sd):
    """Also those of the phase that follows the teacher: its guided steps, and the student's walk up to them."""
    for options in (dict(follow=0.5, follow_steps=8), dict(num_steps=2, fake_steps_per_gen=2)):
        m, base = method(tiny_sd, steps=8, guidance=3.0, **options)
        disturb(m)
        batch, calls = batch_for(base, n=4), []
        base.unet.register_forward_pre_hook(lambda net, args, calls=calls: calls.append(len(args[0]) / 4))
        for phase in m.phases():
            entered(m, phase.name)
            for step in range(4):
                list(play(m, batch, step))
        load = TDM.load(m.config, base)
        assert sum(calls) / (4 * len(m.phases())) == pytest.approx(load.grad + load.free), options


def test_a_random_end_lies_in_the_step_and_the_gradient_moves_the_point_there(tiny_sd, monkeypatch):
    m, base = method(tiny_sd, random_ends=True)
    nominal, diffused, moved = [], [], []
    spy = lambda real, where, keep: lambda *a: (where.append(keep(a, out := real(*a))), out)[1]
    monkeypatch.setattr(m, "start", spy(m.start, nominal, lambda a, out: out[1:]))
    monkeypatch.setattr(m, "further", spy(m.further, diffused, lambda a, out: (a[2], out.t)))
    monkeypatch.setattr(m, "matching", spy(m.matching, moved, lambda a, out: a[4]))
    next(play(m, batch_for(base, n=64)))
    (((t, lowest),), ((end, level),), (there,)) = nominal, diffused, moved
    assert torch.equal(end, there)
    assert (end >= lowest).all()
    assert (end < t - 19).all()
    assert (level >= end).all()
    assert (end > lowest).float().mean() > 0.8


@pytest.mark.parametrize("weighting", ["dmd", "none"])
def test_the_huber_distance_is_of_the_difference_of_the_scores_and_the_weight_outside_of_it(tiny_sd, weighting):
    m, _ = method(tiny_sd, distance="huber", moved="x0", weighting=weighting)
    x, real, fake, eps = torch.randn(4, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, t = (0.01 * x).requires_grad_(True), torch.tensor([100, 600])  # a small x, of which the difference takes no digits
    fake = real + 2e-3 * fake  # differences near c, where the distance bends
    seen = Noised(x.detach(), eps, t, m.schedule.add_noise(x.detach(), eps, t))
    loss = m.matching(Prediction(x, eps), seen, Prediction(real, eps), Prediction(fake, eps), torch.tensor([-1, -1]))
    difference = fake - real
    expected = difference / (difference.square() + 1e-6).sqrt() / x.numel()
    if weighting == "dmd":
        expected = expected / (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("match", ["segment", "above"])
def test_a_step_is_matched_at_the_noise_levels_that_it_crosses(tiny_sd, match):
    m, _ = method(tiny_sd, match=match)
    grid = m.schedule.grid(4)
    t, end = grid.repeat(5000), torch.cat([grid[1:], torch.tensor([-1])]).repeat(5000)
    p = Prediction(*torch.zeros(2, len(t), 1, 1, 1))
    level = m.further(p, t, end, torch.zeros(len(t), 1, 1, 1)).t
    for k, (first, last) in enumerate(zip(grid, [*grid[1:], torch.tensor(20)], strict=True)):
        mine = level[k::4]
        assert mine.min() >= max(20, int(last))
        assert mine.min() <= int(last) + 2
        assert mine.max() == (989 if match == "above" else int(first) - 11)


@pytest.mark.parametrize(
    ("family", "distance", "moved"),
    [("tiny_sd", "squared", "point"), ("tiny_sd", "huber", "x0"), ("tiny_v", "squared", "x0"), ("tiny_sdxl", "huber", "point")],
)
def test_without_guidance_nothing_moves_the_student_at_the_start_and_its_difference_does(family, distance, moved, request):
    """Fake score and teacher are equal then, so the gradient is exactly 0; it is not once the fake score differs."""
    m, base = method(request.getfixturevalue(family), distance=distance, moved=moved)
    batch = batch_for(base)
    grads = []
    for _ in range(2):
        (turn,) = play(m, batch)
        grads.append(torch.autograd.grad(turn["student"]["matching"], trained(m, "student")))
        disturb(m, ("fake",))
    assert all(g.abs().max() == 0 for g in grads[0])
    assert max(g.abs().max() for g in grads[1]) > 1e-5


def test_one_step_over_all_noise_levels_has_the_gradient_of_dmd(tiny_sd):
    m, base = method(tiny_sd, num_steps=1, match="above", guidance=3.0)
    disturb(m)
    batch = batch_for(base)
    x_t, t, end = m.start(batch, m._grid())
    p = m.student(x_t, t, batch.cond)
    noise = torch.randn_like(x_t)
    seen = m.further(p, t, end, noise)
    assert torch.equal(seen.x_t, m.schedule.add_noise(p.x0.detach(), noise, seen.t))
    fake = m.fake(seen.x_t, seen.t, batch.cond)
    loss = m.matching(p, seen, m.real_score(seen, batch), fake, end)

    other = checkpoint.load(str(tiny_sd))
    torch.manual_seed(0)
    d = DMD(other, DMDConfig(lora_rank=4, lora_alpha=8, guidance=3.0, lambda_reg=0.0))
    other.unet.load_state_dict(base.unet.state_dict())
    x = d.student(x_t, torch.tensor(999), batch.cond).x0
    noised = Noised(x.detach(), noise, seen.t, d.schedule.add_noise(x.detach(), noise, seen.t))
    same = d.fake(noised.x_t, noised.t, batch.cond)
    expected = losses.along(x, d.gradient(noised, d.real_score(noised, batch), same))
    for a, b in zip(
        torch.autograd.grad(loss, trained(m, "student")), torch.autograd.grad(expected, trained(d, "student")), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_the_point_moves_by_the_chain_rule(tiny_sd):
    """With x_t fixed, the point is x_t's eps put back: a change of x0 moves it by 1 - ratio of the noise scales."""
    schedule = NoiseSchedule.from_config(SD)
    m, base = method(tiny_sd)
    x_t, eps, g = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, end = torch.tensor([999, 249]), torch.tensor([749, -1])
    x0 = schedule.predict(eps, x_t, t, "epsilon").x0.requires_grad_(True)
    alpha, sigma = schedule.coefficients(t, x_t)
    seen = Noised(x0.detach(), eps, t, x_t)
    m.gradient = lambda *_: g
    loss = m.matching(Prediction(x0, (x_t - alpha * x0) / sigma), seen, None, None, end)
    (found,) = torch.autograd.grad(loss, x0)
    left = torch.tensor([schedule.noise_scale(torch.tensor(749)) / schedule.noise_scale(torch.tensor(999)), 0.0])
    torch.testing.assert_close(found * g.numel(), (1 - left).reshape(-1, 1, 1, 1) * g, atol=1e-4, rtol=1e-4)


def test_the_fake_score_loses_the_weighted_error_of_x0(tiny_sd):
    m, _ = method(tiny_sd)
    n = 4
    x, eps, noise = torch.randn(3, n, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 249, 600, 980])
    seen, fake = Noised(x, eps, t, m.schedule.add_noise(x, eps, t)), Prediction(x + 0.1, eps)
    snr = (m.schedule.alpha[t] / m.schedule.sigma[t]).square().clamp(max=5)
    likely = torch.exp(-eps.square().mean((1, 2, 3)) / 2) / torch.exp(-noise.square().mean((1, 2, 3)) / 2)
    assert m.fake_loss(seen, fake, noise).item() == pytest.approx((0.01 * snr * likely).mean().item(), rel=1e-4)
    m.config.importance_weights = False
    assert m.fake_loss(seen, fake, noise).item() == pytest.approx((0.01 * snr).mean().item(), rel=1e-4)


def test_guidance_goes_evenly_from_low_to_high_noise(tiny_sd, monkeypatch):
    m, base = method(tiny_sd, guidance=5.0, noise_guidance=2.0)
    batch, given = batch_for(base, n=3), []
    real = m.teacher.guided
    monkeypatch.setattr(m.teacher, "guided", lambda x, t, c, u, w: (given.append(w), real(x, t, c, u, w))[1])
    x = torch.zeros(3, 4, 8, 8)
    m.real_score(Noised(x, x, torch.tensor([0, 333, 999]), x), batch)
    torch.testing.assert_close(given[0], torch.tensor([5.0, 4.0, 2.0]))


def test_each_row_has_the_guidance_of_its_noise_level(tiny_sd, monkeypatch):
    m, base = method(tiny_sd, guidance=5.0, noise_guidance=2.0)
    disturb(m)
    given, real = [], m.teacher.guided
    monkeypatch.setattr(m.teacher, "guided", lambda x, t, c, u, w: (given.append((t, w)), real(x, t, c, u, w))[1])
    next(play(m, batch_for(base, n=8)))
    ((t, w),) = given
    torch.testing.assert_close(w, 5.0 - 3.0 * t / 999)
    assert len(t.unique()) > 4


def test_the_student_rests_between_updates_and_adam_has_the_published_betas(tiny_sd):
    m, base = method(tiny_sd, fake_steps_per_gen=3)
    batch = batch_for(base)
    assert [sorted(next(play(m, batch, step))) for step in range(4)] == [
        ["fake", "student"],
        ["fake"],
        ["fake"],
        ["fake", "student"],
    ]
    assert m.cycle(m.config) == 3
    assert {one.betas for one in m.played.values()} == {(0.0, 0.95)}
    assert set(trainees(m)) == {"student", "fake"}


def test_an_aligned_fake_score_begins_as_the_student_and_is_pulled_towards_it(tiny_sd):
    m, _ = method(tiny_sd, align_fake=0.25, fake_steps_per_gen=2)
    student, fake = (trained(m, who) for who in ("student", "fake"))
    assert all(torch.equal(a, b) for a, b in zip(student, fake, strict=True))
    disturb(m, ("student",))
    before = [p.detach().clone() for p in fake]
    m.after_update(now(m, 1))  # the student rested
    assert all(torch.equal(a, b) for a, b in zip(fake, before, strict=True))
    m.after_update(now(m, 2))
    for p, old, goal in zip(fake, before, student, strict=True):
        torch.testing.assert_close(p, old + 0.25 * (goal - old))
    assert max((p - old).abs().max() for p, old in zip(fake, before, strict=True)) > 1e-3


def test_zero_terminal_snr(tiny_v):
    base = checkpoint.load(str(tiny_v))
    base.scheduler_config["rescale_betas_zero_snr"] = True
    m = TDM(base, Config(lora_rank=4, lora_alpha=8, guidance=3.0))
    assert m.schedule.zero_terminal_snr
    disturb(m)
    moves_everybody(m, batch_for(base, n=8))


# ---- a world with exact scores


@pytest.fixture(scope="module")
def world():
    return World()


@torch.no_grad()
def drawn(student, num_steps):
    """40,000 samples (40000, 2) by Euler's steps."""
    grid = Settings(scheduler="euler", num_steps=num_steps).grid(student.schedule, {})
    return SOLVERS["euler"].run(student, torch.randn(40_000, 2), grid, None)


@pytest.mark.parametrize("num_steps", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_students_trajectory_reaches_the_mean_and_covariance_of_exact_scores(world, num_steps):
    before = world.errors(drawn(world.net, num_steps))
    after = world.errors(drawn(world.train(TDM, Config(num_steps=num_steps), 1200), num_steps))
    print(f"{num_steps} steps: {before:.3f} before, {after:.3f} after")
    assert before > 0.3
    assert after < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 4])
def test_without_a_fake_score_the_students_samples_collapse(world, num_steps):
    student = world.train(TDM, Config(num_steps=num_steps), 300 * num_steps, with_fake=False)
    assert world.spread(drawn(student, num_steps)) < 0.01
