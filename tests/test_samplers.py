"""Every sampler against its diffusers scheduler, and on problems with a known answer."""

import diffusers
import pytest
import torch

from fastdiff.diffusion.samplers import SOLVERS, Grid, jump
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
KINDS = ("epsilon", "v_prediction", "sample")


def network(x, t):
    """A smooth stand-in: any function of (x, t) will do, both sides call the same."""
    return 0.3 * torch.tanh(x) + 0.1 * torch.sin(x * 2 + t / 500)


def ours(name, kind, n, spacing, *, t=None, final_index=0, eta=0.0, steps_offset=1, noises=()):
    schedule = NoiseSchedule.from_config(SD)
    t = schedule.grid(n, spacing, steps_offset) if t is None else t
    grid = Grid(schedule, t, final_index, start_scale=spacing in {"trailing", "linspace"}, eta=eta)
    queue = iter(noises)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoise = lambda x, t: schedule.predict(network(x, t), x, t, kind)  # noqa: E731
    return SOLVERS[name].run(denoise, x, grid, lambda: next(queue))


def theirs(scheduler, n, **step):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(model_input, t), t, x, **step).prev_sample
    return x


def close(a, b, size=1.0):
    """1e-6 of the largest number either side computes with."""
    torch.testing.assert_close(a, b, atol=1e-6 * max(size, b.abs().max().item()), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("n", [1, 4, 7, 25])
def test_ddim(kind, spacing, n):
    for to_one in (False, True):
        scheduler = diffusers.DDIMScheduler(
            **SD, prediction_type=kind, timestep_spacing=spacing, steps_offset=1, clip_sample=False, set_alpha_to_one=to_one
        )
        close(ours("ddim", kind, n, spacing, final_index=None if to_one else 0), theirs(scheduler, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_euler(kind, spacing):
    for n in (1, 4, 25):
        scheduler = diffusers.EulerDiscreteScheduler(**SD, prediction_type=kind, timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(n)  # init_noise_sigma follows the spacing
        # its state is x / alpha, init_noise_sigma (14.6) times ours at the start, and rounds in that size
        close(ours("euler", kind, n, spacing), theirs(scheduler, n), size=float(scheduler.init_noise_sigma))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_dpmpp_2m(kind, spacing):
    for n in (1, 2, 4, 10):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SD, prediction_type=kind, timestep_spacing=spacing, steps_offset=1, final_sigmas_type="zero"
        )
        scheduler.set_timesteps(n)  # its "leading" divides by n + 1, unlike every other scheduler's: compare on its own grid
        close(ours("dpm++", kind, n, spacing, t=scheduler.timesteps), theirs(scheduler, n))


class Noises:
    """Hands the same fresh noises to a scheduler that draws its own."""

    def __init__(self, monkeypatch, module, count):
        g = torch.Generator().manual_seed(9)
        self.values = [torch.randn(2, 4, 8, 8, generator=g) for _ in range(count)]
        queue = iter(self.values)
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(queue))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_lcm(kind, n, monkeypatch):
    import diffusers.schedulers.scheduling_lcm as module

    noises = Noises(monkeypatch, module, n)
    scheduler = diffusers.LCMScheduler(**SD, prediction_type=kind)
    close(ours("lcm", kind, n, "lcm", noises=noises.values), theirs(scheduler, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4, 10])
def test_dpmpp_2m_sde(kind, n, monkeypatch):
    import diffusers.schedulers.scheduling_dpmsolver_multistep as module

    noises = Noises(monkeypatch, module, n)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD, prediction_type=kind, timestep_spacing="trailing", final_sigmas_type="zero", algorithm_type="sde-dpmsolver++"
    )
    close(ours("dpm++sde", kind, n, "trailing", noises=noises.values), theirs(scheduler, n))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 4])
def test_tcd(eta, n, monkeypatch):
    import diffusers.schedulers.scheduling_tcd as module

    noises = Noises(monkeypatch, module, n)
    scheduler = diffusers.TCDScheduler(**SD, prediction_type="epsilon", set_alpha_to_one=False)
    close(ours("tcd", "epsilon", n, "lcm", eta=eta, noises=noises.values), theirs(scheduler, n, eta=eta))


def gaussian(schedule, mean, std):
    """The exact denoiser of data N(mean, std^2): E[x0 | x_t] in closed form."""

    def denoise(x, t):
        alpha, sigma = schedule.coefficients(torch.as_tensor(t), x)
        variance = alpha**2 * std**2 + sigma**2
        x0 = mean + alpha * std**2 / variance * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def ode_solution(schedule, mean, std, x, t, s):
    """The probability-flow ODE keeps (x_t - alpha_t m) / sqrt(alpha_t^2 std^2 + sigma_t^2) constant for Gaussian data."""
    (a, b), (c, d) = ([v.double() for v in schedule.coefficients(torch.as_tensor(i), x)] for i in (t, s))
    return c * mean + (x.double() - a * mean) * ((c**2 * std**2 + d**2) / (a**2 * std**2 + b**2)).sqrt()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2)])
def test_samplers_converge_to_the_gaussian_ode(name, order):
    """Started exactly on the ODE at t = 999 and stopped at t = 199, so that no end condition blurs the order."""
    schedule = NoiseSchedule.from_config(SD)
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    denoise, errors = gaussian(schedule, 0.7, 0.5), []
    for n in (40, 80):
        t = torch.arange(n + 1) * (-800 // n) + 999
        seen = []
        SOLVERS[name].run(lambda x, t, seen=seen: (seen.append(x), denoise(x, t))[1], x, Grid(schedule, t, 0), None)
        errors.append((seen[n] - ode_solution(schedule, 0.7, 0.5, x, 999, 199)).abs().max().item())
    assert errors[0] < {1: 0.1, 2: 0.02}[order]
    assert errors[1] < errors[0] / {1: 1.7, 2: 3.2}[order]


def test_ddim_step_lands_on_the_ode_solution_to_second_order():
    schedule = NoiseSchedule.from_config(SD)
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    denoise = gaussian(schedule, 0.7, 0.5)
    errors = []
    for skip in (40, 20, 10):
        x_s = jump(schedule, denoise(x, 519), 519 - skip)
        errors.append((x_s - ode_solution(schedule, 0.7, 0.5, x, 519, 519 - skip)).abs().max().item())
    assert errors[0] < 4e-3
    assert errors[1] < errors[0] / 3.3
    assert errors[2] < errors[1] / 3.3
