"""A world with exact scores: a mixture of Gaussians on the plane, and methods that are trained there by their own losses."""

import importlib.util
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction
from fastdiff.models.denoiser import Cond

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
EXAMPLE = Path(__file__).parent.parent / "examples" / "dmd_pixel.py"


class Net(nn.Module):
    """A small v-prediction network of points (B, 2), called as a Denoiser is."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.kind = schedule, "v_prediction"
        widths = (18, 128, 128, 128)
        hidden = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(128, 2))

    def forward(self, x, t, cond=None):
        t = t.expand(len(x))
        angle = t[:, None] / len(self.schedule) * torch.pi * 2 ** torch.arange(8)
        return self.schedule.predict(self.layers(torch.cat([x, angle.sin(), angle.cos()], 1)), x, t, self.kind)

    def guided(self, x, t, cond, uncond, w):
        assert w == 1, "the world knows no conditions, so nothing to guide by"
        return self(x, t)


class World:
    """The mixture, and a network that has learned its scores: a pretrained student."""

    def __init__(self):
        spec = importlib.util.spec_from_file_location("dmd_pixel", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        self.schedule = NoiseSchedule.from_config(SD)
        means, weights = torch.tensor([[1.2, 0.3], [-0.6, 1.0], [-0.3, -0.9]]), torch.tensor([0.5, 0.3, 0.2])
        self.mixture, self.net = module.Mixture(means, weights, 0.25, self.schedule), Net(self.schedule)
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        for _ in range(1500):
            x0, t = self.mixture.sample(512), torch.randint(1000, (512,))
            x_t = self.schedule.add_noise(x0, torch.randn_like(x0), t)
            goal = self.schedule.output(self.mixture(x_t, t), t, self.net.kind)
            optimizer.zero_grad()
            losses.squared(self.schedule.output(self.net(x_t, t), t, self.net.kind), goal).backward()
            optimizer.step()

    def errors(self, samples):
        """The largest error of mean and covariance of samples (N, 2), as a part of the mixture's standard deviations."""
        mean, covariance = self.mixture.moments()
        scale = covariance.diagonal().sqrt()
        apart = (samples.T.cov() - covariance).abs() / torch.outer(scale, scale)
        return max(((samples.mean(0) - mean).abs() / scale).max().item(), apart.max().item())

    def spread(self, samples):
        """The variance of samples (N, 2), as a part of the mixture's."""
        return (samples.T.cov().trace() / self.mixture.moments()[1].trace()).item()

    def train(self, cls, config, steps, rate=1e-3, betas=(0.0, 0.95), *, with_fake=True, **attributes):
        """Train a student by the method's own losses; returns it. Without a fake score the sample itself takes its place."""

        def exactly(x, t, cond, uncond, w):
            assert w == 1
            return self.mixture(x, t)

        torch.manual_seed(0)
        m = cls.__new__(cls)
        vars(m).update(config=config, schedule=self.schedule, guidance=1.0, _figures={}, **attributes)
        m.student, m.fake = deepcopy(self.net), deepcopy(self.net)
        m.teacher = SimpleNamespace(guided=exactly)
        if not with_fake:
            further, latest = m.further, []
            m.further = lambda *a: (latest.clear(), latest.append(further(*a)), latest[0])[2]
            m.fake = lambda x_t, t, cond: Prediction(latest[0].x, latest[0].eps)
        cond = Cond(torch.zeros(512, 1, 1))
        batch = Batch(torch.full((512, 2), torch.nan), cond, cond)
        nets = {"student": m.student} | ({"fake": m.fake} if with_fake else {})
        optimizers = {who: torch.optim.AdamW(net.parameters(), rate, betas) for who, net in nets.items()}
        for step in range(steps):
            for turn in m.losses(batch, SimpleNamespace(step=step, done=step, phase=SimpleNamespace(name=""))):
                for who, optimizer in optimizers.items():
                    optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
                    params = list(nets[who].parameters())
                    grads = torch.autograd.grad(sum(turn[who].values()), params, retain_graph=True)
                    for p, grad in zip(params, grads, strict=True):
                        p.grad = grad
                for optimizer in optimizers.values():
                    optimizer.step()
        return m.student
