"""Distribution matching: its formulas against closed forms, and the roles that share one network."""

import importlib.util
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from playing import entered, now, play, trained, trainees

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.samplers import simulate
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, timesteps_from
from fastdiff.lora import adapters, apply
from fastdiff.lora.kinds import Factors
from fastdiff.methods.dmd import DMD, PRESETS, Config
from fastdiff.methods.lightning import Config as LightningConfig
from fastdiff.methods.lightning import Lightning
from fastdiff.methods.shared.scores import fitted_guidance
from fastdiff.methods.sid import Config as SiDConfig
from fastdiff.methods.sid import SiD
from fastdiff.methods.tdm import TDM
from fastdiff.methods.tdm import Config as TDMConfig
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.discriminator import Head
from fastdiff.runtime.errors import InputRefused, UsageError

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
EXAMPLE = Path(__file__).parent.parent / "examples" / "dmd_pixel.py"


def example():
    spec = importlib.util.spec_from_file_location("dmd_pixel", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def method(path, **config):
    base = checkpoint.load(str(path))
    given = dict(lora_rank=4, lora_alpha=8, lpips_weights="embedded", lambda_reg=0.0) | config
    torch.manual_seed(0)
    return DMD(base, Config(**given)), base


def batch_for(base, n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    width = base.unet_config["cross_attention_dim"]
    sdxl = base.family.size_conditioned
    cond, uncond = (
        Cond(
            torch.randn(n, 6, width, generator=g),
            torch.randn(n, 32, generator=g) if sdxl else None,
            torch.full((n, 6), 64.0) if sdxl else None,
        )
        for _ in range(2)
    )
    latents, noise = torch.randn(2, n, 4, 8, 8, generator=g)
    return Batch(latents, cond, uncond, noise)


def disturb(m, names=("student", "fake")):
    """Adapters start as zero, where all roles agree: move them apart."""
    for name, p in m.base_model.unet.named_parameters():
        if "lora_B" in name and any(f".{who}." in name for who in names):
            torch.nn.init.normal_(p, std=0.05)


# ---- formulas


def test_the_loss_has_gradient_g_over_numel():
    x, g = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(True)
    losses.along(x, g).backward()
    torch.testing.assert_close(x.grad, g / x.numel(), atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["dmd", "eq8", "none", "sigma2"])
def test_each_weighting_is_the_score_difference_times_its_weight(weighting):
    """Sign and size from the scores s = -(x_t - alpha m) / sigma^2, in fp64; every weight is positive."""
    schedule = NoiseSchedule.from_config(SD)
    g = torch.Generator().manual_seed(0)
    x, x_t, e_r, e_f = torch.randn(4, 5, 4, 8, 8, generator=g)
    t = torch.tensor([20, 300, 500, 800, 980])
    seen = Noised(x, x_t, t, x_t)
    real, fake = (schedule.predict(e, x_t, t, "epsilon") for e in (e_r, e_f))
    a, s = (v.double()[t].reshape(-1, 1, 1, 1) for v in (schedule.alpha, schedule.sigma))
    scores = [-(x_t.double() - a * p.x0.double()) / s**2 for p in (fake, real)]
    difference = scores[0] - scores[1]  # (s_fake - s_real)
    norm = (x.double() - real.x0.double()).abs().mean((1, 2, 3), keepdim=True)
    weight = {"dmd": s**2 / a / norm, "eq8": s**2 / norm, "none": s**2 / a, "sigma2": s**3}[weighting]
    found = losses.score_difference(schedule, seen, real, fake, weighting).double()
    torch.testing.assert_close(found, weight * difference, atol=1e-3, rtol=1e-3)


def test_equation_8_is_algorithm_2_times_alpha():
    """w_t a_t (s_fake - s_real) with w_t = s_t^2 / a_t * CS / |m_r - x|_1 leaves a factor a_t over algorithm 2."""
    schedule = NoiseSchedule.from_config(SD)
    x, r, f = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 400, 700, 980])
    seen = Noised(x, x, t, x)
    both = [losses.score_difference(schedule, seen, Prediction(r, r), Prediction(f, f), w) for w in ("dmd", "eq8")]
    torch.testing.assert_close(both[1], schedule.alpha[t].reshape(-1, 1, 1, 1) * both[0])


def test_the_sign_identity():
    """m_f - m_r = sigma / alpha (eps_r - eps_f)."""
    schedule = NoiseSchedule.from_config(SD)
    x_t, e_r, e_f = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 300, 700, 980])
    real, fake = (schedule.predict(e, x_t, t, "epsilon") for e in (e_r, e_f))
    expected = (schedule.sigma / schedule.alpha)[t].reshape(-1, 1, 1, 1) * (e_r - e_f)
    torch.testing.assert_close(fake.x0 - real.x0, expected, atol=2e-5, rtol=1e-4)


def test_eps_and_v_networks_that_mean_the_same_give_the_same_gradient():
    schedule = NoiseSchedule.from_config(SD)
    x, eps, a, b = torch.randn(4, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 300, 700, 980])
    seen = Noised(x, eps, t, schedule.add_noise(x, eps, t))

    def answers(kind):
        meant = [schedule.predict(e, seen.x_t, t, "epsilon") for e in (a, b)]
        return [schedule.predict(schedule.output(p, t, kind), seen.x_t, t, kind) for p in meant]

    found = [losses.score_difference(schedule, seen, *answers(kind)) for kind in ("epsilon", "v_prediction")]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_fake_score_learns_in_its_own_terms(kind):
    """A network that answers the truth loses nothing; one that is off by d loses d^2 in what it predicts."""
    schedule = NoiseSchedule.from_config(SD)
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 300, 700, 999])
    x_t = schedule.add_noise(x0, eps, t)
    target = schedule.output(Prediction(x0, eps), t, kind)
    loss = lambda d: losses.denoising(schedule, kind, schedule.predict(target + d, x_t, t, kind), x0, eps, t).item()
    assert loss(0.0) < 1e-6
    assert loss(0.1) == pytest.approx(0.01, rel=1e-2)


# ---- a world with exact scores


@pytest.fixture(scope="module")
def plane():
    return example().plane(steps=1500, batch=512)


def test_the_student_of_an_exact_score_has_its_mean_and_covariance(plane):
    mixture, samples = plane
    mean, covariance = mixture.moments()
    scale = covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mean).abs() < 0.05 * scale).all()
    assert ((samples.T.cov() - covariance).abs() < 0.05 * torch.outer(scale, scale)).all()


def test_without_a_fake_score_it_collapses():
    mixture, samples = example().plane(steps=400, batch=256, with_fake=False)
    assert samples.T.cov().trace() < 0.05 * mixture.moments()[1].trace()


def test_the_exact_denoiser_of_the_example_is_exact():
    """Against the mean of samples from the posterior, drawn by weighting prior samples."""
    module, schedule = example(), NoiseSchedule.from_config(SD)
    mixture = module.Mixture(torch.tensor([[1.0, 0.0], [-0.5, 1.0]]), torch.tensor([0.6, 0.4]), 0.3, schedule)
    torch.manual_seed(0)
    t, x_t = torch.tensor([600]), torch.tensor([[0.2, 0.5]])
    x0 = mixture.sample(400_000)
    log = -((x_t - schedule.alpha[t] * x0) ** 2).sum(1) / (2 * schedule.sigma[t] ** 2)
    expected = (log.softmax(0)[:, None] * x0).sum(0)
    torch.testing.assert_close(mixture(x_t, t).x0[0], expected, atol=5e-3, rtol=0)


def test_heun_of_the_example_follows_the_flow_of_a_gaussian():
    """Where x0 is N(0, s^2), the flow takes x at sigma to s x / sqrt(s^2 + sigma^2). Heun's error falls with the square."""
    module, schedule = example(), NoiseSchedule.karras(1000, 0.002, 80.0)

    def gaussian(x, t, label):
        _, sigma = schedule.coefficients(t, x)
        return schedule.predict(x * 0.25 / (0.25 + sigma**2), x, t, "sample")

    gaussian.schedule = schedule
    z, label = module.noise(4, 2, seed=0)
    ways = {(kind, n): module.Way(tuple(schedule.grid(n).tolist()), kind) for kind in ("heun", "euler") for n in (18, 72)}
    expected = 80 * z * 0.5 / (0.25 + 80**2) ** 0.5
    error = {key: ((module.walk(gaussian, z, label, way) - expected).norm() / expected.norm()) for key, way in ways.items()}
    assert error["heun", 72] < 0.005
    assert error["heun", 72] < error["heun", 18] / 8
    assert error["euler", 72] > error["euler", 18] / 8
    assert ways["heun", 18].calls == 35


def test_the_yardstick_of_the_example_tells_a_collapsed_student():
    """One background per class: every picture is recognised, and the other columns fall."""
    module = example()
    data = module.pictures(3)
    label, shade = torch.arange(270) % 3, torch.arange(270) // 3 % 9
    dim = 0.02 * torch.randn(270, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    reference = data[label, shade] + dim.roll(1, 0)
    yardstick = module.Yardstick(data, reference, draws=20)
    full, collapsed = (yardstick.figures(data[label, which] + dim, label) for which in (shade, 0 * shade))
    assert full["recognised"][0] == collapsed["recognised"][0] == 1
    assert full["pictures of 27"][0] == pytest.approx(27, abs=0.01)
    assert collapsed["pictures of 27"][0] == pytest.approx(3, abs=0.01)
    assert collapsed["coverage"][1][1] < 0.5 < full["coverage"][1][0]
    assert collapsed["diversity"][1][1] < 0.5 * full["diversity"][1][0]
    for name in ("Frechet to real", "Frechet to teacher"):
        assert full[name][1][1] < collapsed[name][1][0]


def test_the_table_of_the_example_has_every_row_in_the_same_noise():
    module = example()
    rows, made = module.emoji_rows(2, 2, classes=2, samples=16, batch=4, draws=2, widths=(16, 16))
    assert list(rows) == list(made)
    assert [name.split(",")[0] for name in rows] == ["teacher"] * 4 + ["DMD with regression", "DMD without regression"]
    assert [name.split("calls: ")[1] for name in rows] == ["35", "1", "1", "2", "1", "1"]
    assert {images.shape for images in made.values()} == {(16, 3, 16, 16)}
    start, *students = (made[name] for name in list(rows)[1:2] + list(rows)[4:])
    for student in students:  # two steps from the teacher's one call of the same noise
        assert 0 < (student - start).norm() < 0.2 * start.norm()
    lines = module.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {8}


# ---- roles on one network


def test_the_gradient_is_zero_at_the_start_without_guidance_and_the_guidance_term_with_it(tiny_sd):
    m, base = method(tiny_sd, guidance=1.0)
    batch = batch_for(base)
    seen = m.noised(batch.latents, 0.02, 0.98)
    fake = m.fake(seen.x_t, seen.t, batch.cond)
    assert m.gradient(seen, m.real_score(seen, batch), fake).abs().max() == 0
    m.guidance = 3.0
    g = m.gradient(seen, m.real_score(seen, batch), fake)
    c, u = m.teacher(seen.x_t, seen.t, batch.cond), m.teacher(seen.x_t, seen.t, batch.uncond)
    real = c.guide(u, 3.0)
    expected = -2.0 * (c.x0 - u.x0) / (batch.latents - real.x0).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(g, expected, atol=2e-4, rtol=1e-3)


def test_both_scores_see_the_same_noised_sample_at_levels_in_range(tiny_sd, monkeypatch):
    m, base = method(tiny_sd, t_min=0.1, t_max=0.2)
    batch, seen = batch_for(base, n=64), []
    spy = lambda real: lambda x_t, t, *a: (seen.append((x_t, t)), real(x_t, t, *a))[1]
    monkeypatch.setattr(m.teacher, "guided", spy(m.teacher.guided))
    monkeypatch.setattr(m.fake, "forward", spy(m.fake.forward))
    next(play(m, batch, 0))
    (a, t_a), (b, t_b) = seen
    assert torch.equal(a, b)
    assert torch.equal(t_a, t_b)
    assert t_a.min() >= 100
    assert t_a.max() <= 200
    assert len(t_a.unique()) > 20


def test_with_fresh_noise_the_fake_score_learns_at_every_level_and_the_gradient_stays_the_same(tiny_sd, monkeypatch):
    found = {}
    for noise in ("same", "fresh"):
        m, base = method(tiny_sd, t_min=0.1, t_max=0.2, fake_noise=noise, fake_steps_per_gen=2, guidance=3.0)
        disturb(m)
        batch, calls = batch_for(base, n=64), []

        def spy(x_t, t, cond, calls=calls, forward=m.fake.forward):
            calls.append((t, torch.is_grad_enabled()))
            return forward(x_t, t, cond)

        monkeypatch.setattr(m.fake, "forward", spy)
        torch.manual_seed(3)
        (turn,) = play(m, batch)
        torch.manual_seed(4)
        (alone,) = play(m, batch, 1)
        assert set(alone) == {"fake"}
        found[noise] = turn["student"]["matching"], torch.autograd.grad(turn["student"]["matching"], trained(m, "student")), calls
    assert torch.equal(found["same"][0], found["fresh"][0])
    assert all(torch.equal(a, b) for a, b in zip(found["same"][1], found["fresh"][1], strict=True))
    assert [graph for _, graph in found["same"][2]] == [True, True]
    assert [graph for _, graph in found["fresh"][2]] == [False, True, True]
    inside, own, alone = (t for t, _ in found["fresh"][2])
    assert 100 <= inside.min() <= inside.max() <= 200
    for t in (own, alone):
        assert t.min() < 100
        assert t.max() > 900


def test_an_aligned_fake_score_follows_the_students_updates_alone(tiny_sd):
    """In the regression it rests; then it begins as the student, and is pulled after each of the student's updates."""
    m, _ = method(tiny_sd, align_fake=0.5, fake_steps_per_gen=2, reg_steps=3, lambda_reg=1.0)
    student, fake = (list(m.trains[who].params) for who in ("student", "fake"))
    disturb(m, ("student",))
    before = [p.detach().clone() for p in fake]
    assert set(trainees(entered(m, "regress"))) == {"student"}
    m.after_update(now(m, 0))
    assert all(torch.equal(a, b) for a, b in zip(fake, before, strict=True))
    assert set(trainees(entered(m, "match"))) == {"student", "fake"}
    assert all(torch.equal(a, b) for a, b in zip(student, fake, strict=True))
    before = [p.detach().clone() for p in fake]
    disturb(m, ("student",))
    m.after_update(now(m, 4))  # a step of the fake score alone
    assert all(torch.equal(a, b) for a, b in zip(fake, before, strict=True))
    m.after_update(now(m, 3))
    for p, old, goal in zip(fake, before, student, strict=True):
        torch.testing.assert_close(p, (old + goal) / 2)


def test_a_lora_has_no_precision_of_its_own():
    with pytest.raises(UsageError, match="fake_precision=fp32"):
        Config(fake_precision="fp32")


def test_a_lora_is_not_aligned_with_whole_weights():
    with pytest.raises(UsageError, match="align_fake=0.1"):
        Config(align_fake=0.1, student="full")


def test_noise_levels_reach_both_ends(tiny_sd):
    m, _ = method(tiny_sd)
    t = m.noised(torch.zeros(20_000, 1, 1, 1), m.config.t_min, m.config.t_max).t
    assert (t.min(), t.max()) == (20, 980)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_v", "tiny_sdxl"])
def test_gradients_reach_the_student_though_the_fake_score_was_worn_after_it(family, checkpointing, request):
    """peft's own switch would leave gradients of exactly zero here, or recompute the wrong network under checkpointing."""
    path = request.getfixturevalue(family)
    found = []
    for gc in (False, checkpointing):
        m, base = method(path, gradient_checkpointing=gc, guidance=3.0)
        for net in {m.student.net, m.fake.net}:
            net.train()  # diffusers checkpoints whenever gradients are on; dropout is 0
        disturb(m)
        torch.manual_seed(5)
        (turn,) = play(m, batch_for(base), 0)
        assert set(turn) == {"student", "fake"}
        for who, terms in turn.items():
            sum(terms.values()).backward(inputs=trained(m, who))
        grads = {k: [p.grad for p in net] for k, net in trainees(m).items()}
        assert all(g is not None and g.isfinite().all() for gs in grads.values() for g in gs)
        assert all(sum(g.norm() for g in gs) > 0 for gs in grads.values())
        found.append(grads)
    for k in found[0]:
        for a, b in zip(found[0][k], found[1][k], strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_pefts_own_switch_is_the_trap_that_wearing_avoids(tiny_sd):
    """Should this fail some day, peft has changed and the private attribute can go."""
    m, base = method(tiny_sd)
    disturb(m)
    batch = batch_for(base)
    x = m.student(batch.latents, torch.tensor(500), batch.cond).x0
    m.base_model.unet.set_adapter("fake")
    x.square().mean().backward()
    assert all(p.grad is None for p in trained(m, "student"))


def test_wearing_equals_pefts_own_switch(tiny_sd):
    m, base = method(tiny_sd)
    disturb(m)
    batch, t = batch_for(base), torch.tensor(500)
    unet = base.unet
    with torch.no_grad():
        ours = {k: role(batch.latents, t, batch.cond).eps for k, role in (("student", m.student), ("fake", m.fake))}
        bare = m.teacher(batch.latents, t, batch.cond).eps
        for name, found in ours.items():
            unet.set_adapter(name)
            assert torch.equal(unet(batch.latents, t, batch.cond.tokens).sample, found)
        unet.disable_adapters()
        assert torch.equal(unet(batch.latents, t, batch.cond.tokens).sample, bare)
    assert not torch.equal(ours["student"], ours["fake"])
    assert not torch.equal(ours["student"], bare)


def test_wearing_puts_back_what_was_on(tiny_sd):
    m, _ = method(tiny_sd)
    with adapters.using(m.base_model.unet, "student"):
        with suppress(RuntimeError), adapters.using(m.base_model.unet, None):
            assert adapters.active_adapter(m.base_model.unet) is None
            raise RuntimeError
        assert adapters.active_adapter(m.base_model.unet) == "student"


@pytest.mark.parametrize(("student", "fake"), [("lora", "lora"), ("full", "lora"), ("lora", "full"), ("full", "full")])
def test_memory_designs_hold_one_to_three_networks_and_a_turn_moves_its_own_player_alone(tiny_sd, student, fake):
    m, base = method(tiny_sd, student=student, fake=fake, gan_weight=1e-3)
    nets = {id(role.net) for role in (m.teacher, m.student, m.fake)}
    assert len(nets) == 1 + (student == "full") + (fake == "full")
    mine = {k: {id(p) for p in net} for k, net in trainees(m).items()}
    assert not mine["student"] & mine["fake"]
    optimizers = {k: torch.optim.SGD(net, lr=0.1) for k, net in trainees(m).items()}
    copies = lambda: {k: [p.detach().clone() for p in net] for k, net in trainees(m).items()}
    frozen = [p for p in base.unet.parameters() if not p.requires_grad]
    stock = [p.detach().clone() for p in frozen]
    batch = batch_for(base)
    (turn,) = play(m, batch, 0)
    for who, terms in turn.items():
        sum(terms.values()).backward(inputs=trained(m, who))
    for who in turn:
        before = copies()
        optimizers[who].step()
        for k, old in before.items():
            same = [torch.equal(a, b) for a, b in zip(old, trainees(m)[k], strict=True)]
            assert all(same) if k != who else not all(same)
    assert all(torch.equal(a, b) for a, b in zip(stock, frozen, strict=True))


def lora_of(base, path, rank, skip=()):
    """A random LoRA for every adapted layer of a base, saved."""
    g, modules = torch.Generator().manual_seed(2), {}
    names = {name: key for key, name in apply.names(base.unet).items()}
    for name, p in base.unet.named_parameters():
        layer = name.removesuffix(".weight")
        if layer.endswith(adapters.TARGETS) and layer in names and not layer.endswith(skip):
            up = 0.05 * torch.randn(len(p), rank, *[1] * (p.ndim - 2), generator=g)
            modules[names[layer]] = Factors(torch.randn(rank, *p.shape[1:], generator=g), up)
    lora.save(lora.Lora(modules), path, dtype=torch.float32)
    return lora.load(path)


@pytest.mark.parametrize(("student", "rank"), [("lora", 4), ("lora", 6), ("full", 4)])
def test_a_student_may_start_from_a_few_step_lora(tiny_sd, tmp_path, student, rank):
    """Exactly where its adapter has the rank, and the others start at the base."""
    base = checkpoint.load(str(tiny_sd))
    start = lora_of(base, tmp_path / "start.safetensors", 4)
    apply.fold(base.unet, [(start, 1.0)])
    m, fresh = method(tiny_sd, student=student, lora_rank=rank, init=str(tmp_path / "start.safetensors"))
    batch, t = batch_for(fresh), torch.tensor(700)
    folded = Denoiser(base.unet, base.schedule(), base.prediction_type)
    with torch.no_grad():
        wanted, bare = folded(batch.latents, t, batch.cond).eps, m.teacher(batch.latents, t, batch.cond).eps
        torch.testing.assert_close(m.student(batch.latents, t, batch.cond).eps, wanted, atol=2e-4, rtol=1e-3)
        assert torch.equal(m.fake(batch.latents, t, batch.cond).eps, bare)
    assert (wanted - bare).abs().max() > 0.01


def test_a_start_of_higher_rank_is_met_as_nearly_as_the_adapter_can(tiny_sd, tmp_path):
    start = lora_of(checkpoint.load(str(tiny_sd)), tmp_path / "start.safetensors", 6)
    m, base = method(tiny_sd, lora_rank=4, init=str(tmp_path / "start.safetensors"))
    found = adapters.factors(base.unet, 8)
    for key, update in list(start.modules.items())[::20]:
        wanted = update.delta().flatten(1)
        s = torch.linalg.svdvals(wanted)
        assert (found[key].delta().flatten(1) - wanted).norm() == pytest.approx(s[4:].norm().item(), rel=0.02, abs=1e-4)


def test_a_start_that_does_not_fit_is_named(tiny_sd, tiny_sdxl, tmp_path):
    path = str(tmp_path / "start.safetensors")
    lora_of(checkpoint.load(str(tiny_sd)), path, 4)
    with pytest.raises(UsageError, match=r"start\.safetensors: \d+ of its layers have no adapter here"):
        method(tiny_sd, lora_layers="attention", init=path)
    with pytest.raises(UsageError, match=r"start\.safetensors"):
        method(tiny_sdxl, init=path)


@pytest.mark.parametrize(("cls", "config"), [(DMD, Config), (TDM, TDMConfig), (SiD, SiDConfig), (Lightning, LightningConfig)])
def test_a_start_that_does_not_fit_is_named_before_data_is_made(cls, config, tiny_sd, tiny_sdxl, tiny_v, tmp_path):
    path, base = str(tmp_path / "start.safetensors"), checkpoint.load(str(tiny_sd))
    start = lora_of(checkpoint.load(str(tiny_sd)), path, 4)
    cls.check_base(config(init=path), base)
    if "lora_layers" in {f.name for f in fields(config)}:
        with pytest.raises(UsageError, match=r"start\.safetensors: \d+ of its layers have no adapter here"):
            cls.check_base(config(init=path, lora_layers="attention"), base)
    with pytest.raises(InputRefused, match=r"start\.safetensors: only \d+ of \d+ modules fit this model"):
        cls.check_base(config(init=path), checkpoint.load(str(tiny_sdxl)))
    lora.save(replace(start, metadata=Recipe(prediction_type="sample").to_metadata()), path)
    for other in (base, checkpoint.load(str(tiny_v))):
        with pytest.raises(
            InputRefused, match=r"start\.safetensors: with it a network predicts x0, but the base predicts (the noise|v)"
        ):
            cls.check_base(config(init=path), other)
    lora.save(replace(start, metadata=Recipe(prediction_type="flow").to_metadata()), path)
    with pytest.raises(InputRefused, match="predicts flow, but"):
        cls.check_base(config(init=path), base)
    assert "unet" not in vars(base)  # no weights were read


@pytest.mark.parametrize(("cls", "config"), [(DMD, Config), (Lightning, LightningConfig)])
def test_modules_for_text_encoders_are_left_out_of_a_start_and_told(cls, config, tiny_sd, tmp_path, capsys):
    path, base = str(tmp_path / "start.safetensors"), checkpoint.load(str(tiny_sd))
    start = lora_of(checkpoint.load(str(tiny_sd)), path, 4)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1": Factors(torch.ones(4, 32), torch.ones(64, 4))}
    lora.save(replace(start, modules=start.modules | text), path)
    cls.check_base(config(init=path), base)
    assert "its 1 modules for text encoders are not used" in capsys.readouterr().err
    cls(base, config(init=path, lora_rank=4, **({"lambda_reg": 0.0} if cls is DMD else {})))
    assert any(p.abs().max() > 0 for name, p in base.unet.named_parameters() if "lora_B.student" in name)
    lora.save(replace(start, modules=text), path)
    with pytest.raises(InputRefused, match=r"`init=.*start\.safetensors`: changes text encoders alone"):
        cls.check_base(config(init=path), base)


def test_a_student_that_trains_whole_may_start_from_any_layer(tiny_sd, tmp_path):
    path, base = str(tmp_path / "start.safetensors"), checkpoint.load(str(tiny_sd))
    start = lora_of(base, path, 4)
    key, place = next((k, p) for k, p in apply.places(base.shapes("unet"), "lora_unet_").items() if p.name == "conv_in.weight")
    start.modules[key] = Factors(torch.ones(1, *place.shape[1:]), torch.ones(place.shape[0], 1, 1, 1))
    lora.save(start, path)
    DMD.check_base(Config(init=path, student="full", fake="full"), base)
    with pytest.raises(UsageError, match="1 of its layers have no adapter here"):
        DMD.check_base(Config(init=path), base)


def test_the_fake_score_is_trained_r_times_for_each_update_of_the_student(tiny_sd):
    m, base = method(tiny_sd, fake_steps_per_gen=5)
    turns = [set(next(play(m, batch_for(base), step))) for step in range(12)]
    assert turns == [{"student", "fake"} if step % 5 == 0 else {"fake"} for step in range(12)]
    assert sum("fake" in t for t in turns[:10]) == 5 * sum("student" in t for t in turns[:10])


def test_the_student_learns_from_the_fake_score_as_it_was_before_this_step(tiny_sd):
    """Both losses exist before either update: as published, and one forward pass of the fake score serves both."""
    m, base = method(tiny_sd)
    disturb(m)
    calls, real = [], m.fake.forward
    m.fake.forward = lambda *a: (calls.append(1), real(*a))[1]
    (turn,) = play(m, batch_for(base), 0)
    assert len(calls) == 1
    assert set(turn) == {"student", "fake"}


def test_fitted_guidance_is_the_least_squares_denoiser_of_the_samples(tiny_sd):
    """Where samples lie at u + w (c - u) it is that w, whatever w is at each noise level; and it follows w between them."""
    m, base = method(tiny_sd, score_guidance="fitted")
    m.prepare(batch_for(base, n=20))
    assert m.guidance.shape == (1000,)
    assert m.guidance.isfinite().all()

    class Exact(Denoiser):
        """c and u one apart over a scale that falls with t, so that samples at 1.7 are fitted by w = 1 + 0.7 t / 999."""

        def __init__(self, schedule):
            torch.nn.Module.__init__(self)
            self.schedule = schedule

        def forward(self, x_t, t, cond):
            scale = 1.7 / (1 + 0.7 * t.float() / 999)
            x0 = scale * cond.tokens[:, :1, :1, None].expand_as(x_t)
            return Prediction(x0, x0)

    ones = torch.ones(20, 1, 1)
    samples = Batch(torch.full((20, 4, 2, 2), 1.7), Cond(ones), Cond(0 * ones))
    expected = 1 + 0.7 * torch.arange(1000) / 999
    found = fitted_guidance(Exact(m.schedule), samples)
    torch.testing.assert_close(found[20:980], expected[20:980], atol=1e-4, rtol=0)
    assert found[0] == pytest.approx(expected[20].item(), abs=1e-3)
    assert found[999] == pytest.approx(expected[980].item(), abs=1e-3)


def test_the_real_score_is_guided_by_the_fitted_value_of_its_level(tiny_sd):
    m, base = method(tiny_sd)
    batch = batch_for(base)
    seen = m.noised(batch.latents, 0.02, 0.98)
    fake = m.fake(seen.x_t, seen.t, batch.cond)
    m.guidance = torch.linspace(1, 2, 1000)
    g = m.gradient(seen, m.real_score(seen, batch), fake)
    for i, t in enumerate(seen.t.tolist()):
        m.guidance = 1 + t / 999
        row = Batch(batch.latents[i : i + 1], batch.cond[i : i + 1], batch.uncond[i : i + 1])
        seen_row = Noised(*(v[i : i + 1] for v in seen))
        one = m.gradient(seen_row, m.real_score(seen_row, row), Prediction(*(v[i : i + 1] for v in fake)))
        torch.testing.assert_close(g[i : i + 1], one, atol=1e-4, rtol=1e-3)


# ---- steps of the student


@pytest.mark.parametrize(("n", "expected"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_backward_simulation_visits_its_own_timesteps_alone(tiny_sd, monkeypatch, n, expected):
    m, base = method(tiny_sd, num_steps=n)
    assert m.timesteps.tolist() == expected == list(m.recipe.timesteps)
    seen, real = [], m.student.forward
    monkeypatch.setattr(m.student, "forward", lambda x, t, c: (seen.append(t.unique().tolist()), real(x, t, c))[1])
    steps = {m._step_index(step): step for step in range(100)}  # one for each of the student's
    assert set(steps) == set(range(n))
    for k, step in steps.items():
        seen.clear()
        next(play(m, batch_for(base), step))
        assert seen == [[t] for t in expected[: k + 1]]


def test_every_process_takes_the_same_step_of_the_student(tiny_sd):
    """It depends on seed and step alone, not on the process' own random state."""
    m, _ = method(tiny_sd, num_steps=4)
    ks = []
    for rank in range(2):
        torch.manual_seed(rank)
        ks.append([m._step_index(step) for step in range(30)])
    assert ks[0] == ks[1]


def test_simulation_is_the_lcm_sampler_of_diffusers_up_to_that_step():
    """From a perfect-denoiser world: x_{t_k} = alpha x0 + sigma eps with x0 from the step before."""
    schedule = NoiseSchedule.from_config(SD)
    generator = lambda x, t: Prediction(0.5 * x, x)
    noise, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 749, 499, 249])
    torch.manual_seed(1)
    found = simulate(generator, noise, schedule, timesteps, 2)
    torch.manual_seed(1)
    x = schedule.add_noise(0.5 * noise, torch.randn_like(noise), torch.tensor(749))
    x = schedule.add_noise(0.5 * x, torch.randn_like(noise), torch.tensor(499))
    torch.testing.assert_close(found, x)
    assert torch.equal(simulate(generator, noise, schedule, timesteps, 0), noise)


def test_regression_rows_start_from_their_pairs_noise_and_the_others_from_fresh(tiny_sd):
    m, base = method(tiny_sd, lambda_reg=0.25, batch_size=4)
    batch = batch_for(base)
    entered(m)
    x = m.start(batch, 0, m.paired(4, now(m)))
    assert torch.equal(x[:2], batch.noise[:2])
    assert not torch.equal(x[2:], batch.noise[2:])
    assert set(next(play(m, batch, 0))["student"]) == {"matching", "regression"}


def test_regression_alone_first_then_without_it(tiny_sd):
    """DMD2's start of SDXL in one step."""
    m, base = method(tiny_sd, recipe="dmd2", t_gen=399, reg_steps=3, fake_steps_per_gen=2)
    assert m.timesteps.tolist() == [399]
    assert [(phase.name, phase.steps, phase.exports) for phase in m.phases()] == [("regress", 3, False), ("match", 997, True)]
    turns = []
    for step in range(6):
        if step in {0, 3}:
            entered(m, "match" if step else "regress")
        turns.append({who: set(terms) for who, terms in next(play(m, batch_for(base), step)).items()})
    assert turns[:3] == [{"student": {"regression"}}] * 3
    assert turns[3] == {"student": {"matching"}, "fake": {"denoising"}}
    assert turns[4] == {"fake": {"denoising"}}


def test_regression_that_leaves_no_step_to_match_is_refused():
    with pytest.raises(UsageError, match="`reg_steps=400`: leaves none of the `steps=400`"):
        Config(steps=400, reg_steps=400)


def test_v_prediction_with_zero_terminal_snr_starts_from_pure_noise(tiny_v):
    m, base = method(tiny_v)
    m.schedule = NoiseSchedule.from_config({**SD, "rescale_betas_zero_snr": True})
    m.student.schedule = m.schedule
    x = m.student(torch.randn(2, 4, 8, 8), m.timesteps[0], batch_for(base, 2).cond).x0
    assert x.isfinite().all()


# ---- the discriminator


@pytest.mark.parametrize(("side", "convolutions"), [(1, 2), (2, 2), (4, 2), (8, 3), (16, 4), (32, 5)])
def test_heads_end_in_one_logit_whatever_the_side(side, convolutions):
    """SD1.5's 8 x 8: 4x4/2, 4x4/4, 1x1; SDXL's 32 x 32: three halvings (DMD2's published heads)."""
    head = Head(32, side)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in head.layers) == convolutions
    assert head(torch.randn(3, 32, side, side)).shape == (3, 1)
    if side >= 4:
        assert head(torch.randn(3, 32, 2 * side, 2 * side)).shape[1] >= 1


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_gan_gradients_stay_with_their_player(tiny_sd, features):
    m, base = method(tiny_sd, gan_weight=1e-3, gan_features=features)
    batch = batch_for(base)
    (turn,) = play(m, batch, 0)
    grads = torch.autograd.grad(turn["student"]["gan"], trained(m, "student"), allow_unused=True)
    assert sum(g.abs().sum() for g in grads if g is not None) > 0
    fakes = trained(m, "fake")
    grads = torch.autograd.grad(turn["fake"]["gan"], fakes, allow_unused=True)
    n_head = len(list(m.head.parameters()))
    assert all(g is not None for g in grads[-n_head:])
    reached = sum(g.abs().sum() for g in grads[:-n_head] if g is not None)
    assert reached > 0 if features == "fake" else reached == 0
    assert {"d_fake", "d_real"} <= set(m.logged())


def test_the_discriminator_stops_the_network_at_its_bottleneck(tiny_sd, tmp_path):
    base = checkpoint.load(str(tiny_sd))
    role, batch = Denoiser(base.unet, base.schedule(), base.prediction_type), batch_for(checkpoint.load(str(tiny_sd)))
    calls, kept = [], []
    base.unet.up_blocks[0].register_forward_hook(lambda *a: calls.append(1))
    handle = base.unet.mid_block.register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        role(batch.latents, torch.tensor(500), batch.cond)
        handle.remove()
        feature = role.bottleneck(batch.latents, torch.tensor(500), batch.cond)
    assert len(calls) == 1
    assert torch.equal(feature, kept[0])
    assert not base.unet.mid_block._forward_hooks


def test_a_network_without_mid_block_is_tapped_after_its_last_down_block(tmp_path):
    from conftest import build

    base = checkpoint.load(str(build(tmp_path / "bk", "bk-tiny", "epsilon")))
    batch = batch_for(base)
    role = Denoiser(base.unet, base.schedule(), base.prediction_type)
    assert role.bottleneck(batch.latents, torch.tensor(500), batch.cond).shape[1] == base.unet_config["block_out_channels"][-1]
    DMD(base, Config(lora_rank=4, lambda_reg=0.0, gan_weight=1e-3))


# ---- configuration


def test_what_is_wanted_of_the_data():
    assert DMD.needs(Config()) == "pairs"
    assert DMD.needs(Config(lambda_reg=0.0)) == "prompts"
    assert DMD.needs(Config(lambda_reg=0.0, gan_weight=1e-3)) == "latents"
    assert DMD.needs(Config(lambda_reg=0.0, reg_steps=5)) == "pairs"


def test_a_part_of_the_timesteps_that_ends_before_it_begins_is_refused():
    with pytest.raises(UsageError, match="`t_min=0.9`"):
        Config(t_min=0.9, t_max=0.5)


@pytest.mark.parametrize(
    ("given", "timesteps"),
    [
        (dict(num_steps=4), [999, 749, 499, 249]),
        (dict(num_steps=3), [999, 666, 332]),
        (dict(num_steps=4, t_gen=749), [749, 561, 374, 187]),
        (dict(num_steps=2, t_gen=399), [399, 199]),
    ],
)
def test_steps_are_even_below_the_first(tiny_sd, given, timesteps):
    assert method(tiny_sd, **given)[0].timesteps.tolist() == timesteps


def test_regression_of_several_steps_is_at_the_first(tiny_sd):
    """Only there does a pair's noise lead to the teacher's picture."""
    m, base = method(tiny_sd, lambda_reg=0.25, num_steps=4)
    first = {m._step_index(step): step for step in range(40)}
    assert set(first) == {0, 1, 2, 3}
    for k, step in first.items():
        terms = set(next(play(m, batch_for(base), step))["student"])
        assert terms == ({"matching", "regression"} if k == 0 else {"matching"})


@pytest.mark.parametrize("family", ["emoji", "sd15", "sd21", "sdxl"])
def test_recipes_are_rows_over_their_family(family):
    from fastdiff.runtime.config import resolve

    for recipe in ("dmd", "dmd2"):
        config = resolve(Config, {"recipe": recipe}, presets=PRESETS, family_of=lambda values: family, environ={})
        assert config.recipe == recipe
        assert (config.num_steps, config.lambda_reg > 0) == ((1, True) if recipe == "dmd" else (4, False))
    assert resolve(Config, {}, presets=PRESETS, family_of=lambda values: family, environ={}).recipe == (
        "dmd2" if family == "sdxl" else "dmd"
    )


@pytest.mark.parametrize(("t_gen", "num_steps", "least"), [(0, 1, 1), (6, 4, 7)])
def test_t_gen_without_room_for_the_steps_is_refused(t_gen, num_steps, least):
    """The last step would be at timestep 0, where an LCM step leaves its input as it is."""
    with pytest.raises(UsageError, match=f"`t_gen={t_gen}`: must be at least {least}"):
        Config(t_gen=t_gen, num_steps=num_steps)
    assert timesteps_from(least, num_steps)[-1] == 1
    Config(t_gen=least, num_steps=num_steps)


@pytest.mark.parametrize("words", ["dmd --t-gen 1000", "sid --t-first 1000", "sdxs --t-gen 1000"])
def test_a_timestep_above_the_last_is_refused_before_anything_is_loaded(words, capsys):
    assert cli.main([*words.split(), "--dry-run"]) == 2
    assert "at most 999" in capsys.readouterr().err


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6, 8, 12, 16, 32])
def test_the_gan_head_fits_every_feature_map(side):
    """Also sides that are no power of two: SD2.1 at 768 px has 12 x 12 features."""
    assert Head(8, side)(torch.zeros(2, 8, side, side)).shape == (2, 1)
