"""Compare a training step with all roles on one network to a step with one network per role: seconds, parameters, peak memory.

    python examples/memory.py                                       # dmd on the embedded checkpoint, on the CPU
    python examples/memory.py --method lightning --family sdxl --device cuda      # full size, random weights; also sd15, sd21

The other way is the published layout with whole networks; frozen ones are in half precision on a GPU. For `dmd` these are
teacher, fake score and student, without regression. For `lightning` they are teacher, student with its LoRA, and discriminator,
in the conditional phase from 8 to 4 steps. Both ways take the same step on the same batch. They take turns, each in its own
process; medians over the rounds and their ratios are printed.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.lora import adapters
from fastdiff.methods import dmd, lightning
from fastdiff.models.denoiser import Cond, Denoiser, trainable_copy
from fastdiff.training.method import Now

GUIDANCE = 3.0


def checkpoint(family: str, device: str) -> Checkpoint:
    """The embedded checkpoint, or a full-size UNet with random weights."""
    if FAMILIES[family].ships_weights:
        return Checkpoint(family, FAMILIES[family].home, FAMILIES[family])
    from diffusers import UNet2DConditionModel

    base = Checkpoint(family, FAMILIES[family].home, FAMILIES[family])
    with torch.device(device):
        net = UNet2DConditionModel.from_config(base.unet_config)
    base.__dict__["unet"] = net.to(torch.bfloat16 if device == "cuda" else torch.float32).eval().requires_grad_(False)
    return base


def batch_of(base: Checkpoint, n: int, device: str) -> Batch:
    """A batch of n random latents (n, 4, h, w) and prompts (n, L, D)."""
    config, sdxl = base.unet_config, base.family.size_conditioned
    side, tokens = base.resolution_px // 8, 16 if base.family.ships_weights else 77
    make = lambda *shape: torch.randn(n, *shape, device=device)
    cond, uncond = (
        Cond(make(tokens, config["cross_attention_dim"]), make(1280) if sdxl else None, make(6) if sdxl else None)
        for _ in range(2)
    )
    return Batch(make(4, side, side), cond, uncond)


class OneNetwork:
    """fastdiff's own `dmd`, with the preset of its family."""

    def __init__(self, base: Checkpoint, n: int) -> None:
        row = {
            **dmd.PRESETS[base.family.name],
            **dmd.PRESETS.get(f"{base.family}:{dmd.PRESETS[base.family.name].get('recipe', 'dmd')}", {}),
        }
        names = {k: row[k] for k in ("lora_rank", "lora_alpha", "lora_layers", "gradient_checkpointing", "lr") if k in row}
        self.method = dmd.DMD(base, dmd.Config(**names, batch_size=n, lambda_reg=0.0, guidance=GUIDANCE))
        self.schedule = self.method.schedule
        self.networks = [self.method.teacher.net, self.method.student.net, self.method.fake.net]
        (self.phase,) = self.method.phases()
        self.players = {k: one.params for k, one in self.method.players(self.phase).items()}
        if names.get("gradient_checkpointing"):
            self.method.student.net.train()

    def turns(self, batch: Batch):
        (turn,) = self.method.losses(batch, Now(0, self.phase, 0, 0.0))
        while turn:
            who, terms = turn.popitem()
            yield who, sum(terms.values())


class ThreeNetworks:
    """Algorithm 1 of DMD (Yin 2024) as published: student, fake score and teacher are separate networks."""

    def __init__(self, base: Checkpoint, n: int) -> None:
        self.schedule, kind = base.schedule(), base.prediction_type
        nets = [trainable_copy(base.unet), trainable_copy(base.unet), base.unet]
        if not base.family.ships_weights:
            for net in nets[:2]:
                net.enable_gradient_checkpointing()
        self.student, self.fake, self.teacher = (Denoiser(net, self.schedule, kind) for net in nets)
        self.networks = nets
        self.players = {"student": list(nets[0].parameters()), "fake": list(nets[1].parameters())}

    def turns(self, batch: Batch):
        n, device = len(batch.latents), batch.latents.device
        last = torch.tensor(len(self.schedule) - 1, device=device)
        x = self.student(torch.randn_like(batch.latents), last, batch.cond).x0
        t, eps = torch.randint(20, 981, (n,), device=device), torch.randn_like(x)
        seen = Noised(x.detach(), eps, t, self.schedule.add_noise(x.detach(), eps, t))
        with torch.no_grad():
            fake = self.fake(seen.x_t, t, batch.cond)
            real = self.teacher.guided(seen.x_t, t, batch.cond, batch.uncond, GUIDANCE)
        yield "student", losses.along(x, losses.score_difference(self.schedule, seen, real, fake))
        t, eps = torch.randint(1000, (n,), device=device), torch.randn_like(x)
        p = self.fake(self.schedule.add_noise(seen.x, eps, t), t, batch.cond)
        yield "fake", losses.denoising(self.schedule, self.fake.kind, p, seen.x, eps, t)


class LightningOnOne:
    """A conditional phase of fastdiff's `lightning`: teacher, student and discriminator share one network and its adapters."""

    discriminator = "lora"

    def __init__(self, base: Checkpoint, n: int) -> None:
        row = lightning.PRESETS[base.family.name]
        names = {k: row[k] for k in ("lora_rank", "lora_alpha", "gradient_checkpointing", "lr", "gan") if k in row}
        options = dict(
            stages="8:4", phases="cond", lora_only=True, d_warmup=0, discriminator=self.discriminator, batch_size=n, steps=9
        )
        self.method = lightning.Lightning(base, lightning.Config(**names, **options, guidance=1.0))
        self.phase = self.method.phases()[0]
        self.players = {k: one.params for k, one in self.method.players(self.phase).items()}
        self.schedule = self.method.schedule
        self.networks = [self.method.student.net, self.method.discriminator]
        if names.get("gradient_checkpointing"):
            base.unet.train()

    def turns(self, batch: Batch):
        for turn in self.method.losses(batch, Now(0, self.phase, 0, 0.0)):
            while turn:
                who, terms = turn.popitem()
                yield who, sum(terms.values())


class LightningOnThree(LightningOnOne):
    """The same phase with separate networks: a frozen teacher, and a discriminator whose whole encoder trains."""

    discriminator = "full"

    def __init__(self, base: Checkpoint, n: int) -> None:
        super().__init__(base, n)
        teacher = adapters.plain(base.unet).to(base.unet.dtype).eval().requires_grad_(False)
        _, steps, guidance = self.method.source
        self.method.source = (Denoiser(teacher, self.schedule, base.prediction_type), steps, guidance)
        self.networks.append(teacher)


WAYS = {
    "dmd": {"ours": OneNetwork, "three": ThreeNetworks},
    "lightning": {"ours": LightningOnOne, "three": LightningOnThree},
}


def measure(method: str, way: str, family: str, device: str, n: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, bytes of all parameters, and peak bytes of memory."""
    torch.manual_seed(0)
    base = checkpoint(family, device)
    base.unet.to(device)
    made = WAYS[method][way](base, n)
    made.schedule.to(device)
    optimizers = {k: torch.optim.AdamW(ps, lr=1e-5, fused=True) for k, ps in made.players.items()}
    batch, times = batch_of(base, n, device), []
    for _ in range(steps + 2):
        started = time.perf_counter()
        turns = made.turns(batch)
        while True:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                who, loss = next(turns, (None, None))
            if who is None:
                break
            loss.backward(inputs=made.players[who])
            del loss
            nn.utils.clip_grad_norm_(made.players[who], 10.0)
            optimizers[who].step()
            optimizers[who].zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    unique = {id(p): p.numel() * p.element_size() for net in made.networks for p in net.parameters()}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(times[2:]), "parameters": sum(unique.values()), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=list(WAYS), default="dmd")
    parser.add_argument("--family", choices=list(FAMILIES), default="emoji")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=None, help="default: 24 for emoji, else 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=["ours", "three"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    n = args.batch or (24 if FAMILIES[args.family].ships_weights else 1)
    torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(measure(args.method, args.way, args.family, args.device, n, args.steps)))
        return
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "three": []}
    for _ in range(args.rounds):
        for way, rows in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{way}: exit {done.returncode} (out of memory?)")
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {way: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for way, rows in runs.items() if rows}
    for way, row in medians.items():
        speed = f"{row['seconds']:.3f} s a step, {n / row['seconds']:.2f} samples/s"
        print(f"{way:5s}  {speed}, parameters {row['parameters'] / 2**20:.1f} MiB, peak {row['peak'] / 2**30:.2f} GiB")
    if len(medians) == 2:
        ratios = {k: medians["ours"][k] / medians["three"][k] for k in medians["ours"]}
        print("ours / three: " + ", ".join(f"{k} {r:.2f}x" for k, r in ratios.items()))


if __name__ == "__main__":
    main()
