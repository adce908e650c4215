"""Latent consistency distillation (LCM-LoRA) without the Trainer: your own loop, as in a notebook.

python examples/loop.py --steps 300 --output lcm.safetensors
"""

import argparse

import torch

import fastdiff as fd


def distil(base, steps: int, path: str, *, rank: int = 16, batch_size: int = 8, guidance: float = 3.0) -> str:
    """Train an LCM-LoRA (Luo 2023) on the base's own data and save it at `path`; returns the path."""
    data, generator = fd.open_data(base), torch.Generator().manual_seed(0)
    trained = fd.lora.attach(base.unet, rank, rank, "student")
    teacher, student = base.denoiser(), base.denoiser("student")  # the same network with the adapter off and on
    schedule, grid = teacher.schedule, teacher.schedule.ddim_grid(50)
    optimizer, average = torch.optim.AdamW(trained, lr=1e-3), fd.EMA(trained, 0.95)

    def consistency(x, t, cond):
        c_skip, c_out = schedule.boundary(t, x)
        return c_skip * x + c_out * student(x, t, cond).x0

    for _ in range(steps):
        batch = data.batch(batch_size, generator)
        i = torch.randint(5, len(grid), (batch_size,))
        t, u = grid[i], grid[i - 5]
        x_t = schedule.add_noise(batch.latents, torch.randn_like(batch.latents), t)
        with torch.no_grad():
            p = teacher.guided(x_t, t, batch.cond, batch.uncond, guidance)
            target = consistency(schedule.add_noise(p.x0, p.eps, u), u, batch.cond)  # a DDIM step, then the student
        fd.losses.pseudo_huber(consistency(x_t, t, batch.cond), target).backward()
        optimizer.step(), optimizer.zero_grad(), average.update()
    with average.swapped():
        recipe = fd.Recipe(method="lcm", family=base.family.name, scheduler="lcm", num_steps=4, guidance=1.0)
        return str(fd.lora.save_adapter(student, path, recipe=recipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="emoji")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", default="lcm.safetensors")
    args = parser.parse_args()
    torch.manual_seed(0)
    path = distil(fd.load(args.base), args.steps, args.output)
    fd.Sampler(args.base, loras={path: 1.0})(["red apple on blue", "a panda"], seeds=range(4)).save("loop.png")


if __name__ == "__main__":
    main()
