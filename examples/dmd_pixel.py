"""Distribution matching distillation (DMD) without checkpoints: with any two denoisers, in pixels or on the plane.

    python examples/dmd_pixel.py plane     a 2-D Gaussian mixture with its exact score; a minute
    python examples/dmd_pixel.py emoji     class-conditional 16 px pictures over EDM's noise levels: teacher, student; minutes

DMD only needs a model that returns a `Prediction` (x0, eps) for (x_t, t). `match` is Algorithm 1 of the paper for any such pair
of models; with `fastdiff.diffusion.losses.score_difference` you can use it for a model of your own.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.data import emoji
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.samplers import jump
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction
from fastdiff.sampling.sheet import Sheet

STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


# ---- the plane


class Mixture:
    """A mixture of K 2-D Gaussians with equal spread, and its exact denoiser E[x0 | x_t]. x_t (B, 2), t (B,)."""

    def __init__(self, means: Tensor, weights: Tensor, spread: float, schedule: NoiseSchedule) -> None:
        self.means, self.weights, self.spread, self.schedule = means, weights, spread, schedule

    def sample(self, n: int) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True)
        return self.means[which] + self.spread * torch.randn(n, 2)

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = self.schedule.coefficients(t, x_t)
        variance = alpha**2 * self.spread**2 + sigma**2  # of x_t given its Gaussian, (B, 1)
        apart = x_t[:, None] - alpha[..., None] * self.means  # (B, K, 2)
        share = (self.weights.log() - apart.square().sum(2) / (2 * variance)).softmax(1)  # (B, K)
        each = self.means + (alpha * self.spread**2 / variance)[..., None] * apart
        x0 = (share[..., None] * each).sum(1)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The exact mean (2,) and covariance (2, 2) of the mixture."""
        mean = self.weights @ self.means
        apart = self.means - mean
        return mean, (self.weights[:, None] * apart).T @ apart + self.spread**2 * torch.eye(2)


class Plane(nn.Module):
    """A small network on points (B, 2). With a schedule it is an epsilon denoiser, without one a generator."""

    kind = "epsilon"

    def __init__(self, schedule: NoiseSchedule | None = None, width: int = 128) -> None:
        super().__init__()
        self.schedule, ins = schedule, 2 if schedule is None else 2 + 16
        self.layers = nn.Sequential(
            nn.Linear(ins, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor | Prediction:
        if t is None:
            return x + self.layers(x)
        angle = t[:, None] / len(self.schedule) * torch.pi * 2 ** torch.arange(8)
        out = self.layers(torch.cat([x, angle.sin(), angle.cos()], 1))
        return self.schedule.predict(out, x, t, self.kind)


Score = Callable[..., Prediction]  # (x_t, t, *condition)


def match(
    schedule: NoiseSchedule,
    real: Score,
    generator: nn.Module,
    fake: nn.Module | None,
    draw: Callable[[], tuple[Tensor, ...]],
    *,
    steps: int,
    lr: float,
    fake_steps: int = 3,
    regression: Callable[[], Tensor] | None = None,
) -> None:
    """Train the generator to draw from the distribution that `real` denoises, by Algorithm 1 of DMD (Yin 2024).

    `fake` learns the generator's own score. `draw()` returns start noise and the condition, if any; `regression()` is an
    additional loss of the generator.
    """
    students = torch.optim.AdamW(generator.parameters(), lr=lr, betas=(0.5, 0.99))
    critics = torch.optim.AdamW(fake.parameters(), lr=2 * lr, betas=(0.5, 0.99)) if fake else None
    decay = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in (students, critics) if o]

    def noised(x: Tensor) -> Noised:
        t, eps = torch.randint(len(schedule) // 50, len(schedule) * 49 // 50 + 1, (len(x),)), torch.randn_like(x)
        return Noised(x, eps, t, schedule.add_noise(x, eps, t))

    for _ in range(steps):
        for _ in range(fake_steps if critics else 0):
            z, *cond = draw()
            with torch.no_grad():
                seen = noised(generator(z, *cond))
            loss = losses.denoising(schedule, fake.kind, fake(seen.x_t, seen.t, *cond), seen.x, seen.eps, seen.t)
            critics.zero_grad()
            loss.backward()
            critics.step()
        z, *cond = draw()
        x = generator(z, *cond)
        seen = noised(x.detach())
        with torch.no_grad():
            # Without a fake score the sample itself takes its place. That seeks modes, and the generator collapses.
            fake_prediction = fake(seen.x_t, seen.t, *cond) if fake else Prediction(seen.x, seen.eps)
            g = losses.score_difference(schedule, seen, real(seen.x_t, seen.t, *cond), fake_prediction)
        students.zero_grad()
        (losses.along(x, g) + (regression() if regression else 0)).backward()
        students.step()
        for rate in decay:
            rate.step()


def plane(steps: int = 1500, batch: int = 512, *, with_fake: bool = True, seed: int = 0) -> tuple[Mixture, Tensor]:
    """Match a generator to a mixture; returns the mixture and 20,000 one-step samples (20000, 2) of the generator."""
    torch.manual_seed(seed)
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    means = torch.tensor([[1.2, 0.3], [-0.6, 1.0], [-0.3, -0.9]])
    mixture = Mixture(means, torch.tensor([0.5, 0.3, 0.2]), 0.25, schedule)
    generator, fake = Plane(), Plane(schedule) if with_fake else None
    match(schedule, mixture, generator, fake, lambda: (torch.randn(batch, 2),), steps=steps, lr=1e-3)
    with torch.no_grad():
        return mixture, generator(torch.randn(20_000, 2))


# ---- pictures


class Pixels(nn.Module):
    """A class-conditional denoiser of pixels (B, 3, 16, 16) with EDM's preconditioning (Karras 2022, table 1)."""

    kind = "sample"

    def __init__(self, schedule: NoiseSchedule, classes: int, sigma_data: float) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.schedule, self.sigma_data = schedule, sigma_data
        self.net = UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=classes, attention_head_dim=16,
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Prediction:
        _, sigma = self.schedule.coefficients(t, x_t)
        both = (sigma**2 + self.sigma_data**2).sqrt()
        out = self.net(x_t / both, 250 * sigma.flatten().log(), label).sample
        x0 = (self.sigma_data / both) ** 2 * x_t + sigma * self.sigma_data / both * out
        return self.schedule.predict(x0, x_t, t, self.kind)


class OneStep(nn.Module):
    """A generator: a denoiser called once at the last noise level. Start noise and x0 are (B, 3, 16, 16)."""

    def __init__(self, denoiser: Pixels) -> None:
        super().__init__()
        self.denoiser, self.last = denoiser, len(denoiser.schedule) - 1

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        t = torch.full((len(z),), self.last)
        return self.denoiser(self.denoiser.schedule.sigma[self.last] * z, t, label).x0


def pictures(classes: int) -> Tensor:
    """The first `classes` emoji of the embedded set on every background: (classes, 9, 3, 16, 16)."""
    every, colours = torch.arange(classes), range(len(emoji.BACKGROUNDS))
    drawn = [nn.functional.avg_pool2d(emoji.compose(every, torch.full_like(every, c)), 4) for c in colours]
    return torch.stack(drawn, 1)


def train_teacher(schedule: NoiseSchedule, data: Tensor, steps: int, batch: int) -> Pixels:
    """Train a teacher on data (classes, 9, 3, 16, 16) by the loss of EDM (Karras 2022, table 1).

    E lambda(sigma) |D(x0 + sigma eps) - x0|^2, with log-normal sigma.
    """
    teacher = Pixels(schedule, len(data), data.std().item())
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        label = torch.randint(len(data), (batch,))
        x0, eps = data[label, torch.randint(data.shape[1], (batch,))], torch.randn(batch, 3, 16, 16)
        t = torch.searchsorted(schedule.sigma, torch.exp(1.6 * torch.randn(batch) - 0.6)).clamp(max=len(schedule) - 1)
        p = teacher(schedule.add_noise(x0, eps, t), t, label)
        sigma = schedule.sigma[t].reshape(-1, 1, 1, 1)
        weight = (sigma**2 + teacher.sigma_data**2) / (sigma * teacher.sigma_data) ** 2
        optimizer.zero_grad()
        losses.squared(p.x0, x0, weight).backward()
        optimizer.step()
        rate.step()
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def walk(teacher: Pixels, z: Tensor, label: Tensor, num_steps: int) -> Tensor:
    """Sample the teacher by Euler's method over `num_steps` noise levels: noise z (B, 3, 16, 16) -> x0."""
    schedule, grid = teacher.schedule, teacher.schedule.grid(num_steps, "trailing")
    x = schedule.sigma[grid[0]] * z
    for t, s in zip(grid, [*grid[1:], None], strict=True):
        x = jump(schedule, teacher(x, t.expand(len(x)), label), s)
    return x


def emoji_columns(teacher_steps: int, steps: int, batch: int = 32, classes: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Pictures (classes, 3, 16, 16) of the teacher in 18 steps and in one, and of the student in one, from the same noise."""
    torch.manual_seed(seed)
    schedule = NoiseSchedule.karras(1000, 0.002, 80.0)
    teacher = train_teacher(schedule, pictures(classes), teacher_steps, batch)
    student, fake = OneStep(deepcopy(teacher)).requires_grad_(True), deepcopy(teacher).requires_grad_(True)
    noise, label = torch.randn(64 * classes, 3, 16, 16), torch.arange(64 * classes) % classes
    targets = walk(teacher, noise, label, 18)

    def regression() -> Tensor:
        i = torch.randint(len(targets), (batch,))
        return 0.5 * losses.squared(student(noise[i], label[i]), targets[i])  # L2, as in the paper's appendix I

    draw = lambda: (torch.randn(batch, 3, 16, 16), torch.randint(classes, (batch,)))
    match(schedule, teacher, student, fake, draw, steps=steps, lr=2e-4, fake_steps=1, regression=regression)
    z, label = torch.randn(classes, 3, 16, 16), torch.arange(classes)
    with torch.no_grad():
        made = {f"teacher, {n} steps": walk(teacher, z, label, n) for n in (18, 1)}
        return {**made, "student, 1 step": student(z, label)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["plane", "emoji"])
    parser.add_argument("--teacher-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, help="default: 1500 on the plane, 400 on pictures")
    parser.add_argument("--output", type=Path, default=Path("runs/dmd-pixel.png"))
    args = parser.parse_args()
    if args.what == "plane":
        mixture, samples = plane(args.steps or 1500)
        mean, covariance = mixture.moments()
        print("mean", mean.tolist(), "student's", samples.mean(0).tolist())
        print("covariance", covariance.tolist(), "student's", samples.T.cov().tolist())
        return
    columns = emoji_columns(args.teacher_steps, args.steps or 400)
    goal = columns["teacher, 18 steps"]
    for name, images in columns.items():
        apart = (images - goal).square().mean()
        print(f"{name}: spread {images.std():.3f}, squared distance to the teacher's 18 steps {apart:.4f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Sheet.of_columns([(name.replace(", ", "\n"), images[:12].clamp(-1, 1)) for name, images in columns.items()]).save(args.output)
    print(args.output, "columns:", " | ".join(columns))


if __name__ == "__main__":
    main()
