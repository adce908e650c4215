"""Measure a few real training steps of a method on this machine, in a separate process."""

import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.cost.footprint import condition
from fastdiff.data.batch import Encoded
from fastdiff.models import autoencoder
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.train import TrainConfig
from fastdiff.runtime import console
from fastdiff.sampling.sampler import at_once, drawing
from fastdiff.training.method import Method
from fastdiff.training.run import Run
from fastdiff.training.scene import open_vae
from fastdiff.training.session import load_base, open_accelerator
from fastdiff.training.trainer import Trainer, tensors_in

PREVIEWED = 4  # pictures of a contact sheet


@dataclass(frozen=True)
class Measured:
    """What a probe measured."""

    peak_bytes: int  # of device memory; on the CPU, of the whole process
    phases: dict[str, tuple[int, float]]  # {phase: (number of steps, seconds a step)}
    call_s: float  # one picture through the base's network, without gradients
    picture_s: float  # one picture through the VAE's encoder; 0 where no pictures are read
    state_bytes: int  # size of a state that a run can resume from
    trained_bytes: int  # of the student's own parameters

    @property
    def training_s(self) -> float:
        """Seconds of all phases together."""
        return sum(steps * seconds for steps, seconds in self.phases.values())


def measure(method: type[Method], config: TrainConfig, *, pictures: bool) -> Measured | None:
    """Probe a method in a new process. None if it ran out of memory. `pictures`: also time the VAE's encoder."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(steps, method, config, pictures).result()
        except BrokenProcessPool:  # the kernel kills a process that takes too much memory
            console.warn("the probe's process was killed, most likely because it took more memory than there is")
            return None


def steps(method: type[Method], config: TrainConfig, pictures: bool) -> Measured | None:
    """The function that the new process runs: a probe in a temporary folder. None if it ran out of memory."""
    console.quiet_libraries(offline=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return probed(method, config, pictures, Path(folder))
    except (torch.OutOfMemoryError, MemoryError):
        return None


def probed(method_class: type[Method], config: TrainConfig, pictures: bool, folder: Path) -> Measured:
    """Enter every phase of the method and time some of its steps on random latents."""
    run = Run(folder)
    accelerator = open_accelerator(replace(config, tracker="none"), run)
    base, device = load_base(config, accelerator), accelerator.device
    torch.manual_seed(config.seed)
    picture_s = encoding_s(base, config, device) if pictures else 0.0
    base.unet.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call_s = calling_s(base, config, device)
    method = method_class(base, config)
    trainer = Trainer(method, latents(base, config, control=method.controlnet is not None), run, config, accelerator)
    phases = {}
    for index in range(len(trainer.phases)):
        if index:
            trainer.leave()
            trainer.enter(index)
        phases[trainer.phase.name or "all"] = trainer.lengths[index], stepping_s(trainer, method_class.cycle(config))
    preview(base, config, device)
    states = [player.state_dict() for player in trainer.players.values()]
    extra = [part.state_dict() for part in method.state().values()]
    student = next(iter(trainer.players.values()))
    return Measured(
        peak_bytes(device),
        phases,
        call_s,
        picture_s,
        sum(tensor.nbytes for tensor in tensors_in([states, extra])),
        sum(p.nbytes for p in student.params),
    )


def stepping_s(trainer: Trainer, length: int) -> float:
    """Seconds of a step at the end of the current phase: the mean of `length` steps, after which the method's work repeats."""
    go_to_end(trainer, length)
    trainer.train_step()  # the first step is slow: it allocates memory and chooses kernels
    began = clock(trainer.device)
    for _ in range(length):
        trainer.train_step()
        trainer.step += 1
    return (clock(trainer.device) - began) / length


def go_to_end(trainer: Trainer, length: int) -> None:
    """Set a trainer to the last `length` steps of its phase, when every loss that starts later in the phase is active."""
    last = trainer.end - length
    trainer.step = max(trainer.start, last - last % length)


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, after the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.no_grad()
def calling_s(base: Checkpoint, config: TrainConfig, device: torch.device) -> float:
    """Seconds per picture of one network call on a full batch, as the teacher's sampling uses it."""
    side = (config.resolution or base.resolution_px) // base.pixels_per_latent
    n = at_once(side)
    net, cond = Denoiser(base.unet, base.schedule(), base.prediction_type), condition(base, n, device)
    x, t = torch.randn(n, base.unet_config["in_channels"], side, side, device=device), torch.tensor(500, device=device)
    if net.guidance_embedded:
        cond = cond.with_guidance(torch.ones(n, device=device))
    net.to(device)(x, t, cond)
    began = clock(device)
    net(x, t, cond)
    return (clock(device) - began) / n


@torch.no_grad()
def preview(base: Checkpoint, config: TrainConfig, device: torch.device) -> None:
    """Decode pictures while the training state is in memory, as a contact sheet does: the peak that it adds."""
    side = (config.resolution or base.resolution_px) // base.pixels_per_latent
    z = torch.randn(PREVIEWED, base.unet_config["in_channels"], side, side, device=device)
    autoencoder.decode(drawing(base, open_vae(base, config.vae, allow_pickle=config.allow_pickle), device), z)


@torch.no_grad()
def encoding_s(base: Checkpoint, config: TrainConfig, device: torch.device) -> float:
    """Seconds of encoding one picture with the VAE."""
    px = config.resolution or base.resolution_px
    vae, pixels = base.vae.to(device), torch.zeros(1, 3, px, px, device=device)
    vae.encode(pixels)
    began = clock(device)
    vae.encode(pixels)
    took = clock(device) - began
    base.release("vae")
    return took


def latents(base: Checkpoint, config: TrainConfig, *, control: bool) -> Encoded:
    """Four random items with the shapes of the real data, enough to build a method and take steps."""
    px = config.resolution or base.resolution_px
    side, channels, n = px // base.pixels_per_latent, base.unet_config["in_channels"], 4
    noise, texts = torch.randn(n, channels, side, side), condition(base, n)
    return Encoded(
        moments=torch.cat([torch.randn(n, channels, side, side), torch.zeros(n, channels, side, side)], 1),
        texts=replace(texts, time_ids=None),
        captions=torch.arange(n)[:, None],
        weights=torch.ones(1),
        uncond=condition(base, 1),
        time_ids=texts.time_ids,
        noise=noise,
        controls=torch.zeros(n, 1, px, px, dtype=torch.uint8) if control else None,
    )


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: reserved on CUDA, allocated by the driver on MPS, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
