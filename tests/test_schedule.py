"""The schedule against diffusers' schedulers and against closed forms."""

import diffusers
import pytest
import torch

from fastdiff.diffusion.schedule import NoiseSchedule, Prediction

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize(
    "config", [SD, {**SD, "beta_schedule": "linear"}, {**SD, "rescale_betas_zero_snr": True}, {"trained_betas": [0.1] * 20}]
)
def test_alphas_equal_diffusers(config):
    ours = NoiseSchedule.from_config(config)
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(ours.alpha, theirs.sqrt(), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.sigma, (1 - theirs).sqrt(), atol=1e-6, rtol=0)
    assert ours.zero_terminal_snr == config.get("rescale_betas_zero_snr", False)


def test_add_noise_and_velocity_equal_diffusers():
    schedule, theirs = NoiseSchedule.from_config(SD), diffusers.DDPMScheduler(**SD)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=g)
    t = torch.tensor([0, 19, 500, 999])
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), atol=1e-6, rtol=0)
    v = schedule.output(Prediction(x0, eps), t, "v_prediction")
    torch.testing.assert_close(v, theirs.get_velocity(x0, eps, t), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_inverts_add_noise(kind):
    schedule = NoiseSchedule.from_config(SD).double()
    schedule.alpha, schedule.sigma = schedule.alpha.float(), schedule.sigma.float()
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=g)
    t = torch.tensor([0, 400, 999])
    out = {"epsilon": eps, "v_prediction": schedule.output(Prediction(x0, eps), t, "v_prediction"), "sample": x0}[kind]
    p = schedule.predict(out, schedule.add_noise(x0, eps, t), t, kind)
    torch.testing.assert_close(p.x0, x0, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(p.eps, eps, atol=3e-5, rtol=1e-5)


def test_guidance_keeps_the_two_coordinates_consistent():
    schedule = NoiseSchedule.from_config(SD)
    g = torch.Generator().manual_seed(2)
    x_t, a, b = torch.randn(3, 5, 4, 8, 8, generator=g)
    t, w = torch.tensor([19, 259, 499, 759, 999]), torch.tensor([0.0, 1.0, 3.0, 7.5, 15.0])
    guided = schedule.predict(a, x_t, t, "epsilon").guide(schedule.predict(b, x_t, t, "epsilon"), w)
    torch.testing.assert_close(guided, schedule.predict(guided.eps, x_t, t, "epsilon"), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(guided.eps[1], a[1])  # w = 1 is the conditional network
    torch.testing.assert_close(guided.eps[0], b[0])  # w = 0 the unconditional one


@pytest.mark.parametrize("n", [1, 2, 4, 8, 25, 50])
def test_grids_equal_diffusers(n):
    schedule = NoiseSchedule.from_config(SD)
    for spacing in ("trailing", "leading", "linspace"):
        theirs = diffusers.DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=1)
        theirs.set_timesteps(n)
        assert schedule.grid(n, spacing, 1).tolist() == theirs.timesteps.tolist(), spacing
    for cls in (diffusers.LCMScheduler, diffusers.TCDScheduler):
        theirs = cls(**SD)
        theirs.set_timesteps(n)
        assert schedule.grid(n, "lcm").tolist() == theirs.timesteps.tolist()


def test_known_lcm_timesteps():
    schedule = NoiseSchedule.from_config(SD)
    assert schedule.grid(4, "lcm").tolist() == [999, 759, 499, 259]
    assert schedule.grid(8, "lcm").tolist() == [999, 879, 759, 639, 499, 379, 259, 139]
    assert schedule.ddim_grid(50)[[0, 1, -1]].tolist() == [19, 39, 999]


def test_boundary_equals_lcm_scheduler():
    schedule, theirs = NoiseSchedule.from_config(SD), diffusers.LCMScheduler(**SD)
    x = torch.zeros(1, 4, 8, 8)
    for t in (0, 1, 19, 999):
        expected = theirs.get_scalings_for_boundary_condition_discrete(torch.tensor(t))
        found = schedule.boundary(torch.tensor(t), x)
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-7, rtol=0)
    assert [v.item() for v in schedule.boundary(torch.tensor(0), x)] == [1.0, 0.0]


def test_schedule_stays_fp32():
    schedule = NoiseSchedule.from_config(SD)
    p = schedule.predict(torch.randn(1, 4, 8, 8).bfloat16(), torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor(999), "epsilon")
    assert schedule.alpha.dtype == p.x0.dtype == p.eps.dtype == torch.float32


def test_what_is_not_supported_is_named():
    schedule = NoiseSchedule.from_config(SD)
    with pytest.raises(ValueError, match="EDM and flow"):
        NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ValueError, match="EDM and flow"):
        NoiseSchedule.from_config({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5})
    with pytest.raises(ValueError, match="beta_schedule 'cosine'"):
        NoiseSchedule.from_config({"beta_schedule": "cosine"})
    with pytest.raises(ValueError, match="`num_steps` must be at most 50"):
        schedule.grid(60, "lcm")
    with pytest.raises(ValueError, match="`num_steps` must be between"):
        schedule.grid(0)
    with pytest.raises(ValueError, match="prediction type 'flow'"):
        schedule.predict(torch.zeros(1), torch.zeros(1), torch.tensor(0), "flow")


def test_prediction_guide_broadcasts_per_sample():
    c = Prediction(torch.ones(2, 4, 2, 2), torch.ones(2, 4, 2, 2))
    u = Prediction(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    assert c.guide(u, torch.tensor([2.0, 5.0])).x0[:, 0, 0, 0].tolist() == [2.0, 5.0]


def test_karras_levels_are_those_of_the_scheduler_and_leave_the_signal_alone():
    """EulerDiscreteScheduler's use_karras_sigmas between the same ends; x_t = x0 + sigma eps."""
    schedule = NoiseSchedule.karras(40, 0.02, 80.0)
    theirs = diffusers.EDMEulerScheduler(sigma_min=0.02, sigma_max=80.0, sigma_schedule="karras")
    theirs.set_timesteps(40)
    torch.testing.assert_close(schedule.sigma.flip(0), theirs.sigmas[:-1].float(), rtol=1e-4, atol=1e-5)
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 39])
    x_t = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(x_t, x0 + schedule.sigma[t].reshape(2, 1, 1, 1) * eps)
    torch.testing.assert_close(schedule.predict(x0, x_t, t, "sample").eps, eps, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_output_inverts_predict(kind):
    schedule = NoiseSchedule.from_config(SD)
    out, x_t = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 400, 900])
    torch.testing.assert_close(schedule.output(schedule.predict(out, x_t, t, kind), t, kind), out, atol=1e-4, rtol=1e-4)


def test_output_of_an_unknown_kind_is_refused():
    schedule = NoiseSchedule.from_config(SD)
    with pytest.raises(ValueError, match="prediction type 'flow'"):
        schedule.output(Prediction(torch.zeros(1, 1), torch.zeros(1, 1)), torch.tensor([1]), "flow")
