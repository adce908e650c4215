"""Distribution matching distillation (DMD) without checkpoints: with any two denoisers, in pixels or on the plane.

    python examples/dmd_pixel.py plane     a 2-D Gaussian mixture with its exact score; a minute
    python examples/dmd_pixel.py emoji     16 px pictures by class: a teacher, its students, and a table of them; minutes

`emoji` is the paper's pixel setting in miniature: not CIFAR-10, not ImageNet-64. Ten emoji, each on nine backgrounds, are the
real pictures; the class is the condition, so each class has nine. The teacher has EDM's preconditioning, loss and sampler. The
judge is the network that ships with fastdiff, so a Frechet distance here compares rows of this table only. "teacher" as a
reference is 2,000 many-step samples of other noise. The best undistilled sampling is chosen on 500 noises of its own, by Frechet
distance to the real pictures, among 17 start levels in one call, and Euler and re-noising over 33 pairs of levels in two. The
script prints 95 % bands of 2,000 samples (one seed; about 11 minutes of one core of an AMD EPYC, added up from its parts);
"pictures" is the effective number of real pictures drawn:

| 2,000 samples | calls | Frechet to real | to teacher | recognised | coverage | diversity | pictures of 90 |
|---|---|---|---|---|---|---|---|
| teacher, Heun, 18 levels | 35 | 0.23 [0.17, 0.30] | 0.09 [0.04, 0.16] | 1.00 | .966 | 3.68 | 85 |
| teacher, from the last level | 1 | 24.5 [24.1, 24.9] | 23.6 [23.2, 24.0] | 1.00 | .001 | 3.19 | 29 |
| teacher, best undistilled | 1 | 5.90 [5.72, 6.07] | 5.05 [4.89, 5.21] | 1.00 | .033 | 3.33 | 50 |
| teacher, best undistilled | 2 | 1.92 [1.81, 2.05] | 1.44 [1.35, 1.55] | 1.00 | .265 | 3.51 | 69 |
| DMD with regression, 400 steps | 1 | 1.72 [1.58, 1.84] | 1.30 [1.18, 1.42] | 1.00 | .086 | 4.44 | 85 |
| DMD without regression, 400 steps | 1 | 2.48 [2.29, 2.67] | 2.07 [1.90, 2.24] | 1.00 | .063 | 4.61 | 78 |

One step of either student is far ahead of the best undistilled call. Regression helps, as in the paper. Coverage says what the
distance does not: the students' pictures are noisier than two undistilled calls (and their diversity, above that of the real
pictures, is noise of the backgrounds). Without regression the student keeps its nine backgrounds; it does not collapse here.

DMD only needs a model that returns a `Prediction` (x0, eps) for (x_t, t). `match` is Algorithm 1 of the paper for any such pair
of models; with `fastdiff.diffusion.losses.score_difference` you can use it for a model of your own.
"""

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data import emoji
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.samplers import jump
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction
from fastdiff.quality import emoji as judge
from fastdiff.quality.distances import BOOTSTRAPS, Moments, Statistic, band, frechet, inside
from fastdiff.sampling.sheet import Sheet, in_calls

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
        return self.schedule.predict(out, x, t, "epsilon")

    def loss(self, p: Prediction, seen: Noised) -> Tensor:
        """The loss of Ho 2020."""
        return losses.denoising(self.schedule, "epsilon", p, seen.x, seen.eps, seen.t)


Score = Callable[..., Prediction]  # (x_t, t, *condition)
Pairs = tuple[Tensor, Tensor, Tensor]  # start noise, label, x0


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
            loss = fake.loss(fake(seen.x_t, seen.t, *cond), seen)
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
    """A class-conditional denoiser of pixels (B, 3, 16, 16) with EDM's preconditioning (Karras 2022, table 1).

    The network sees blocks of 2 x 2 px as 12 channels at 8 x 8, which halves its time.
    """

    def __init__(self, schedule: NoiseSchedule, classes: int, sigma_data: float, widths: tuple[int, int] = (64, 96)) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.schedule, self.sigma_data = schedule, sigma_data
        self.net = UNet2DModel(
            sample_size=8, in_channels=12, out_channels=12, block_out_channels=widths, layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=classes, attention_head_dim=16,
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Prediction:
        _, sigma = self.schedule.coefficients(t, x_t)
        both = (sigma**2 + self.sigma_data**2).sqrt()
        out = self.net(F.pixel_unshuffle(x_t / both, 2), 250 * sigma.flatten().log(), label).sample
        x0 = (self.sigma_data / both) ** 2 * x_t + sigma * self.sigma_data / both * F.pixel_shuffle(out, 2)
        return self.schedule.predict(x0, x_t, t, "sample")

    def loss(self, p: Prediction, seen: Noised) -> Tensor:
        """EDM's lambda(sigma) |D(x0 + sigma eps) - x0|^2, whose gradient is about as large at every noise level."""
        _, sigma = self.schedule.coefficients(seen.t, seen.x)
        return losses.squared(p.x0, seen.x, (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2)


class OneStep(nn.Module):
    """A generator: a denoiser called once at the last noise level. Start noise and x0 are (B, 3, 16, 16)."""

    def __init__(self, denoiser: Pixels) -> None:
        super().__init__()
        self.denoiser, self.last = denoiser, len(denoiser.schedule) - 1

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        t = torch.full((len(z),), self.last)
        return self.denoiser(self.denoiser.schedule.sigma[self.last] * z, t, label).x0


def pictures(classes: int) -> Tensor:
    """Some emoji of the embedded set, spread over its groups, on every background: (classes, 9, 3, 16, 16) in [-1, 1]."""
    every, colours = torch.arange(classes) * (len(emoji.pictures()) // classes), range(len(emoji.BACKGROUNDS))
    drawn = [F.avg_pool2d(emoji.compose(every, torch.full_like(every, c)), 4) for c in colours]
    return torch.stack(drawn, 1)


def train_teacher(schedule: NoiseSchedule, data: Tensor, steps: int, batch: int, **network: Any) -> Pixels:
    """Train a teacher on data (classes, 9, 3, 16, 16) by the loss of EDM, with log-normal sigma (Karras 2022, table 1)."""
    teacher = Pixels(schedule, len(data), data.std().item(), **network)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        label = torch.randint(len(data), (batch,))
        x0, eps = data[label, torch.randint(data.shape[1], (batch,))], torch.randn(batch, 3, 16, 16)
        t = torch.searchsorted(schedule.sigma, torch.exp(1.6 * torch.randn(batch) - 0.6)).clamp(max=len(schedule) - 1)
        seen = Noised(x0, eps, t, schedule.add_noise(x0, eps, t))
        optimizer.zero_grad()
        teacher.loss(teacher(seen.x_t, t, label), seen).backward()
        optimizer.step()
        rate.step()
    return teacher.eval().requires_grad_(False)


def train_student(teacher: Pixels, pairs: Pairs | None, steps: int, batch: int, lr: float = 2e-4, seed: int = 0) -> OneStep:
    """Distil a one-step student by DMD, with the regression loss on the teacher's (noise, label, picture) pairs, if any."""
    torch.manual_seed(seed)  # one for each student, so that a row does not depend on the rows before it
    student, fake = OneStep(deepcopy(teacher)).requires_grad_(True), deepcopy(teacher).requires_grad_(True)

    def regression() -> Tensor:
        z, label, x0 = pairs
        i = torch.randint(len(z), (batch,))
        return 0.5 * losses.squared(student(z[i], label[i]), x0[i])  # L2, as in the paper's appendix I

    classes = teacher.net.config.num_class_embeds
    draw = lambda: (torch.randn(batch, 3, 16, 16), torch.randint(classes, (batch,)))
    how = dict(steps=steps, lr=lr, fake_steps=1, regression=regression if pairs else None)
    match(teacher.schedule, teacher, student, fake, draw, **how)
    return student.eval().requires_grad_(False)


@dataclass(frozen=True)
class Way:
    """A way to sample the teacher: noise levels in descending order, and what happens between two calls.

    "heun" makes a second call at each level but the last; "euler" goes there straight; "renoise" adds fresh noise to x0.
    `further` moves the last x0 on by that part of its difference from the one before, as DPM++ 2M does.
    """

    levels: tuple[int, ...]
    kind: Literal["heun", "euler", "renoise"] = "euler"
    further: float = 0.0

    @property
    def calls(self) -> int:
        return 2 * len(self.levels) - 1 if self.kind == "heun" else len(self.levels)

    def __str__(self) -> str:
        further = f", further {self.further:g}" if self.further else ""
        return f"{self.kind} {' '.join(map(str, self.levels))}{further}"


@torch.no_grad()
def walk(teacher: Pixels, z: Tensor, label: Tensor, way: Way) -> Tensor:
    """Sample the teacher: start noise z (B, 3, 16, 16) -> x0."""
    schedule, levels, before = teacher.schedule, torch.tensor(way.levels), None
    sigma, g = schedule.sigma, torch.Generator().manual_seed(len(z))
    x = sigma[levels[0]] * z
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        p = before = teacher(x, t.expand(len(x)), label)
        if way.kind == "renoise":
            x = schedule.add_noise(p.x0, torch.randn(x.shape, generator=g), s)
            continue
        straight = jump(schedule, p, s)
        if way.kind == "heun":  # the slope dx / dsigma is eps: the mean of both ends' (Karras 2022, algorithm 1)
            ahead = teacher(straight, s.expand(len(x)), label)
            x = x + (sigma[s] - sigma[t]) * (p.eps + ahead.eps) / 2
        else:
            x = straight
    x0 = teacher(x, levels[-1].expand(len(x)), label).x0
    return x0 if before is None else x0 + way.further * (x0 - before.x0)


def noise(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Start noise (n, 3, 16, 16) of a seed, and labels (n,) that go through the classes."""
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % classes


# ---- how good the pictures are


class Yardstick:
    """Judges 16 px pictures as the network that ships with fastdiff sees them, enlarged to its 64 px.

    There are two references: the real pictures (classes, 9, 3, 16, 16), and many-step samples of the teacher of other noise.
    """

    def __init__(self, data: Tensor, samples: Tensor, draws: int = BOOTSTRAPS) -> None:
        self.draws = draws
        self.real = judge.embed(data.flatten(0, 1))  # the network enlarges the pictures itself
        self.label = torch.arange(len(data)).repeat_interleave(data.shape[1])
        self.moments = Moments.of(self.real)
        self.teacher = judge.embed(samples)
        self.teacher_moments = Moments.of(self.teacher)

    def figures(self, images: Tensor, label: Tensor) -> dict[str, tuple[float, list[float]]]:
        """{column: (figure, 95 % band)} of images (N, 3, 16, 16) of classes (N,)."""
        x = judge.embed(images.clamp(-1, 1))
        nearest = torch.cdist(x, self.real).argmin(1)  # (N,) the number of a real picture
        right = (self.label[nearest] == label).float()
        apart = judge.diversity(x, judge.Prompts(label, torch.full_like(label, -1), torch.ones_like(label, dtype=torch.bool)))
        balls = inside(x, self.teacher).float()  # (M, N)

        def covered(_: Tensor, i: Tensor) -> float:
            return (balls @ torch.bincount(i, minlength=len(x)).float() > 0).float().mean().item()

        def drawn(_: Tensor, i: Tensor) -> float:
            share = torch.bincount(nearest[i], minlength=len(self.real)) / len(i)
            return torch.special.entr(share).sum().exp().item()

        columns: dict[str, Statistic] = {
            "Frechet to real": lambda x, i: frechet(x[i], self.moments),
            "Frechet to teacher": lambda x, i: frechet(x[i], self.teacher_moments),
            "recognised": lambda _, i: right[i].mean().item(),
            "coverage": covered,
            "diversity": lambda _, i: apart[i].nanmean().item(),
            f"pictures of {len(self.real)}": drawn,
        }
        return {name: (of(x, torch.arange(len(x))), band(x, of, self.draws)) for name, of in columns.items()}

    def frechet(self, images: Tensor) -> float:
        """The Frechet distance to the real pictures."""
        return frechet(judge.embed(images.clamp(-1, 1)), self.moments)


def best_ways(teacher: Pixels, yardstick: Yardstick, z: Tensor, label: Tensor) -> list[Way]:
    """The ways to sample in one and in two calls with the least Frechet distance to the real pictures, on this noise."""
    distance = cache(lambda way: yardstick.frechet(walk(teacher, z, label, way)))
    levels = [len(teacher.schedule) - 1, *(len(teacher.schedule) * k // 20 for k in range(19, 3, -1))]
    one = min((Way((t,)) for t in levels), key=distance)
    pairs = [(t, s) for t in levels[:12:2] for s in levels[2::2] if s < t]
    two = min((Way(pair, kind) for pair in pairs for kind in ("euler", "renoise")), key=distance)
    return [one, min((replace(two, further=part) for part in (-0.3, -0.15, 0.0, 0.15, 0.3, 0.6)), key=distance)]


def table(rows: dict[str, dict[str, tuple[float, list[float]]]]) -> str:
    """A Markdown table of rows with figures and bands."""
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, figures in rows.items():
        cells = [f"{value:.3g} ({low:.3g} to {high:.3g})" for value, (low, high) in figures.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def emoji_rows(
    teacher_steps: int = 2500, steps: int = 400, *, classes: int = 10, samples: int = 2000, batch: int = 32, seed: int = 0,
    draws: int = BOOTSTRAPS, **network: Any,
) -> tuple[dict[str, dict[str, tuple[float, list[float]]]], dict[str, Tensor]]:  # fmt: skip
    """Train and judge: the figures of every row, and their pictures (samples, 3, 16, 16), all of the same noise."""
    torch.manual_seed(seed)
    schedule, data = NoiseSchedule.karras(1000, 0.002, 80.0), pictures(classes)
    teacher = train_teacher(schedule, data, teacher_steps, batch, **network)
    many = Way(tuple(schedule.grid(18).tolist()), "heun")
    pairs_of = noise(samples // 2, classes, seed=1)
    pairs = (*pairs_of, walk(teacher, *pairs_of, many))
    yardstick = Yardstick(data, walk(teacher, *noise(samples, classes, seed=2), many), draws)
    one, two = best_ways(teacher, yardstick, *noise(samples // 4, classes, seed=3))
    z, label = noise(samples, classes, seed=4)
    made = {f"teacher, {way}, calls: {way.calls}": walk(teacher, z, label, way) for way in (many, Way((999,)), one, two)}
    for name, given in {"with": pairs, "without": None}.items():
        made[f"DMD {name} regression, calls: 1"] = train_student(teacher, given, steps, batch, seed=seed)(z, label)
    return {name: yardstick.figures(images, label) for name, images in made.items()}, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["plane", "emoji"])
    parser.add_argument("--teacher-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, help="default: 1500 on the plane, 400 on pictures")
    parser.add_argument("--samples", type=int, default=2000, help="pictures of each row of the table")
    parser.add_argument("--output", type=Path, default=Path("runs/dmd-pixel.png"), help="the sheet of pictures")
    args = parser.parse_args()
    if args.what == "plane":
        mixture, samples = plane(args.steps or 1500)
        mean, covariance = mixture.moments()
        print("mean", mean.tolist(), "student's", samples.mean(0).tolist())
        print("covariance", covariance.tolist(), "student's", samples.T.cov().tolist())
        return
    rows, made = emoji_rows(args.teacher_steps, args.steps or 400, samples=args.samples)
    print(table(rows))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    chosen = torch.tensor([10 * k + c for c in range(6) for k in range(2)])  # two of each of six classes
    names = [emoji.pictures()[c * (len(emoji.pictures()) // 10)].name for c in range(6) for _ in range(2)]
    heads = [name.rpartition(", calls: ")[::2] for name in made]
    labels = [in_calls(name.split(" 999 ")[0], int(calls)) for name, calls in heads]
    columns = [(label, images[chosen].clamp(-1, 1)) for label, images in zip(labels, made.values(), strict=True)]
    Sheet.of_columns(columns, names).save(args.output)
    print(args.output)
    print(f"{time.process_time() / 60:.1f} minutes of one CPU core")


if __name__ == "__main__":
    main()
