"""Trajectory distribution matching (Luo et al. 2025, TDM): a few deterministic steps, from prompts alone.

    trajectory   x_K = sigma z;   x_{k-1} = DDIM step of student(x_k, t_k) to t_{k-1}, ...       the student's own, no gradient
    one step     p = student(x_k, t_k)                         with gradient; the batch holds every k about as often
    on           x_tau = (x_{t_{k-1}} of p) diffused on to tau from max(t_{k-1}, 20) to below t_k - 10
    real, fake   teacher(x_tau, tau; c, empty; w)  guided,     fake_score(x_tau, tau; c)  not guided
    g            = (fake.x0 - real.x0) / mean|p.x0 - real.x0|                                   diffusion/dmd_gradient.py
    student:     dL/dx = g / numel,    x = p.x0, or the point x_{t_{k-1}} / alpha_{t_{k-1}} of p
    fake score:  min(SNR, 5) (fake.x0 - p.x0)^2, times the D-th root of the importance weight of x_tau, of D elements

Distribution matching asks that the student's pictures look like the teacher's at every noise level. Here each of K steps answers
for the noise levels that it crosses, and for those alone. No pictures are needed, and the student is sampled by a common
deterministic scheduler. Teacher, student and fake score are one network with two adapters.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch, moved
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.samplers import jump
from fastdiff.diffusion.schedule import Prediction, per_sample
from fastdiff.methods.shared.from_prompts import FromPrompts
from fastdiff.options.tdm import EXAMPLES, PRESETS, Config
from fastdiff.options.tdm import Config as Options
from fastdiff.training.method import Load, Now, Turn, equation

LOWEST = 20  # timestep below which no scores are compared, as in DMD
MAX_SNR = 5.0  # of the fake score's loss
GAP = 10  # least distance in timesteps from the student's own input


def step_counts(config: Options) -> tuple[int, ...]:
    """Return the numbers of sampling steps that are trained: `num_steps`, or with `any_steps` 1, 2, 4, ... up to it."""
    return tuple(2**i for i in range(config.num_steps.bit_length())) if config.any_steps else (config.num_steps,)


class TDM(FromPrompts):
    """Trajectory distribution matching."""

    config: Options

    name, Config, presets, examples = "tdm", Config, PRESETS, EXAMPLES
    _betas, _alone = (0.0, 0.95), "follow"  # betas: as in the authors' script

    def __init__(self, base: Checkpoint, config: Options) -> None:
        super().__init__(base, config)
        if config.noise_guidance is not None:
            self.guidance = torch.linspace(config.guidance, config.noise_guidance, len(self.schedule))
        self.recipe = replace(
            self.recipe,
            scheduler="euler",
            spacing="trailing",
            num_steps=config.num_steps,
            guidance=1.0,
            step_counts=step_counts(config) if config.any_steps else None,
        )

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        often, counts = 1 / config.fake_steps_per_gen, step_counts(config)
        walk = sum((count - 1) / 2 for count in counts) / len(counts)
        follow = config.follows / config.steps
        teacher = sum(-(-config.follow_steps // count) for count in counts) / len(counts)  # its steps in one of the student's
        grad, free = 1 + often, 2 * often + (1 - often)
        return Load(lora=2, graph=2, grad=follow + (1 - follow) * grad, free=follow * 2 * teacher + (1 - follow) * free + walk)

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Train student and fake score on the same step of the student, each with the other's old weights.

        The fake score is called once: its prediction is used in g and in its own loss.
        """
        grid = self._grid()
        x_t, t, end = self.start(batch, grid)
        if now.phase.name == "follow":
            goal = self.teacher_walk(x_t, t, end, batch, -(-self.config.follow_steps // len(grid)))
            yield {"student": {"follow": losses.squared(jump(self.schedule, self.student(x_t, t, batch.cond), end), goal)}}
            return
        if self.config.random_ends:
            end = end + (torch.rand(len(t), device=t.device) * (t - 2 * GAP - end).clamp(min=0)).long()
        student_trains = self._student_trains(now)
        with torch.set_grad_enabled(student_trains):
            p = self.student(x_t, t, batch.cond)
        noise = torch.randn_like(x_t)
        seen = self.further(p, t, end, noise)
        real = self.real_score(seen, batch) if student_trains else None
        fake = self.fake(seen.x_t, seen.t, batch.cond)
        players: Turn = {"fake": {"denoising": self.fake_loss(seen, fake, noise)}}
        if real is not None:
            players["student"] = {"matching": self.matching(p, seen, real, fake, end)}
        yield players

    def _steps_alone(self) -> int:
        return self.config.follows

    def _grid(self) -> Tensor:
        """Return the timesteps (K,) of the student's calls; with `any_steps` their number K is drawn anew."""
        counts = step_counts(self.config)
        return self.schedule.grid(counts[int(torch.randint(len(counts), ())) if self.config.any_steps else 0], "trailing")

    @equation("TDM, the student's trajectory")
    @torch.no_grad()
    def start(self, batch: Batch, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Walk along the student's trajectory over the timesteps `grid` (K,), each row of the batch up to one of its steps.

        Returns x_t (B, C, h, w), its timesteps t (B,), and the timesteps (B,) where these steps end: -1 is the clean latent.
        Steps are shared out evenly over the batch, from a random one on. The rows are sorted by the length of their walk, so
        that a part of the batch is a slice and nothing waits for the device.
        """
        noise, first = torch.randn_like(batch.latents), int(torch.randint(len(grid), ()))
        step = sorted(((first + row) % len(grid) for row in range(len(noise))), reverse=True)
        x = self.schedule.coefficients(grid[0], noise)[1] * noise  # by sigma, as EulerDiscreteScheduler starts
        at = moved(torch.cat([grid, torch.tensor([-1])]), x.device)
        for k in range(step[0]):
            n = sum(s > k for s in step)  # rows that go further
            x = torch.cat([jump(self.schedule, self.student(x[:n], at[k], batch.cond[:n]), at[k + 1]), x[n:]])
        rows = moved(torch.tensor(step), x.device)
        return x, at[rows], at[rows + 1]

    @equation("SDXL-Lightning, section 2.3")
    @torch.no_grad()
    def teacher_walk(self, x: Tensor, t: Tensor, end: Tensor, batch: Batch, count: int) -> Tensor:
        """Take `count` DDIM steps of the guided teacher from x (B, C, h, w) at t to `end`, both (B,)."""
        for left in range(count - 1, -1, -1):
            s = end + ((t - end) * left).div(left + 1, rounding_mode="floor")
            x, t = jump(self.schedule, self.teacher.guided(x, t, batch.cond, batch.uncond, self._guidance_at(t)), s), s
        return x

    @equation("TDM, diffusing on inside of a segment")
    def further(self, p: Prediction, t: Tensor, end: Tensor, noise: Tensor) -> Noised:
        """Move along predictions `p` to where the steps from t to `end` (both (B,)) end, and diffuse on to a random level.

        `noise` is (B, C, h, w). The level is below t, or with `match=above` below T, and no less than `end` and 20.
        """
        p = Prediction(p.x0.detach(), p.eps.detach())
        total, level = len(self.schedule), torch.rand(len(t), device=t.device)
        low = end.clamp(min=LOWEST)
        high = torch.maximum((t if self.config.match == "segment" else torch.full_like(t, total)) - GAP, low + 1)
        return losses.diffused_on(self.schedule, p, end, (low + level * (high - low)).long(), noise)

    @equation("TDM, the student's loss")
    def matching(self, p: Prediction, seen: Noised, real: Prediction, fake: Prediction, end: Tensor) -> Tensor:
        """Compute the student's loss, whose gradient moves its prediction `p` along the difference of the scores.

        With `moved=point` it moves the point of the trajectory at `end`, x0 + (sigma / alpha) eps in units of x0, as the chain
        rule has it: x0 of a step that ends at high noise is only part of the way there. With `moved=x0` it moves x0 (the paper).
        """
        g = self.gradient(seen, real, fake)
        x = p.x0
        if self.config.moved == "point":
            x = x + per_sample(self.schedule.noise_scale(end), x) * p.eps
        if self.config.distance == "squared":
            return losses.along(x, g)
        difference = fake.x0.detach() - real.x0
        mean = lambda v: v.abs().flatten(1).mean(1)
        weight = mean(g) / mean(difference).clamp(min=1e-12)  # what the weighting makes of the difference, for each sample
        return losses.pseudo_huber(x, (x - difference).detach(), weight=per_sample(weight, x))

    @equation("TDM, the fake score's loss")
    def fake_loss(self, seen: Noised, fake: Prediction, noise: Tensor) -> Tensor:
        """Compute the fake score's loss: the squared error of x0, with weight min(SNR, 5).

        The importance weight corrects that the whole noise in x_t, `seen.eps`, is not drawn from a normal distribution: it is
        that of the trajectory and the fresh `noise` together. As published it has means in place of sums over the elements, which
        is the D-th root of the ratio of densities. On large latents it is near 1.
        """
        weight = self.schedule.snr(seen.t).clamp(max=MAX_SNR)
        if self.config.importance_weights:
            ratio = ((noise.square() - seen.eps.square()).flatten(1).mean(1) / 2).exp()
            self.log(importance=ratio.mean())
            weight = weight * ratio
        return losses.squared(fake.x0, seen.x, per_sample(weight, seen.x))
