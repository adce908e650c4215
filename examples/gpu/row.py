"""One row of run.py: a fastdiff command in this process, with what a measurement changes about it.

    python examples/gpu/row.py '{"memory_gib": 12, "how": "steps"}' train-lcm-lora --base sdxl --json

`how` is "" (the command as it is), "steps" (its training steps on random latents and weights, and one contact sheet, instead of
the whole run) or "graph" (pictures come from the CUDA graph alone, nothing is compiled). `tiny` gives every published base a
small network of the same kind, for rehearsals on the CPU. Figures go to the file that GPU_ROW names as soon as they are known.
Rows that run side by side load together but measure one after the other: the file that GPU_LOCK names is their turnstile.
"""

import fcntl
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
ON_CARD = torch.cuda.is_available()
# Components of a rehearsal: widths that the layers divide; blocks and inputs are those of the published network.
TINY_TEXT = dict(hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2, num_attention_heads=4)
TINY_UNET, TINY_VAE, TINY_LATENT = (32, 64, 64, 64), (32, 32, 32, 32), 8
WARM = 2  # steps before the timed ones
TIMED = 5  # steps that are timed at least


def tell(**figures: Any) -> None:
    """Add figures to what is known of this row."""
    file = Path(os.environ["GPU_ROW"])
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | figures))


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other row measures, and keep the card for this row inside the block."""
    with open(os.environ["GPU_LOCK"], "w") as turnstile:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        yield


def machine() -> str:
    """What the figures belong to, in a line."""
    from importlib.metadata import version

    card = f"CPU, {os.cpu_count()} cores"
    if ON_CARD:
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return f"{card}, {libraries}, Python {platform.python_version()}"


# ---- memory


def cap(memory_gib: float) -> None:
    """Let this process take so much of the card; 0 lifts the limit. Peaks count from here."""
    if ON_CARD:
        torch.cuda.empty_cache()
        whole = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * GIB / whole) if memory_gib else 1.0)
        torch.cuda.reset_peak_memory_stats()


def peaks(of: str = "") -> dict[str, float]:
    """The peaks of the allocator since `cap`, in GiB."""
    if not ON_CARD:
        return {}
    taken = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    return {f"{of}{name}_gib": round(value / GIB, 2) for name, value in taken.items()}


# ---- training steps


class Flops(TorchDispatchMode):
    """Counts the FLOP of products, convolutions and attentions in the block: also of backward passes and recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.count += count(*args, **(kwargs or {}), out_val=out)
        return out


def stepping(trainer: Any, cycle: int) -> dict[str, float]:
    """Steps at the end of the current phase, where every loss is active: seconds of one, its FLOP, and the last loss.

    After `cycle` steps the method's work repeats, so whole cycles are counted and timed.
    """
    from fastdiff.cost.measure import synchronize

    def walk(steps: int) -> dict[str, float]:
        first, row = trainer.end - cycle - trainer.end % cycle, {}
        for i in range(steps):
            trainer.step = max(trainer.start, first + i % cycle)
            row = trainer.train_step()
        return row

    walk(WARM)  # allocates memory and chooses kernels
    with Flops() as counted:
        walk(cycle)
    steps = cycle * -(-TIMED // cycle)
    synchronize(trainer.device)
    began = time.perf_counter()
    row = walk(steps)
    synchronize(trainer.device)
    return {"s_per_step": (time.perf_counter() - began) / steps, "tflop": counted.count / cycle / 1e12, "loss": row["loss"]}


def stepped(memory_gib: float, method_class: Any, config: Any) -> Any:
    """Take steps of every phase of a method, and draw a contact sheet. Stands in for `fastdiff.training.session.train`."""
    from fastdiff.checkpoints import checkpoint
    from fastdiff.commands import bench
    from fastdiff.cost import measure, probe
    from fastdiff.runtime.errors import DoesNotFit, Result
    from fastdiff.sampling.settings import Settings
    from fastdiff.training.run import Run
    from fastdiff.training.scene import Scene
    from fastdiff.training.session import DTYPES, Trained, open_accelerator
    from fastdiff.training.trainer import Trainer

    config, usual = method_class.check(config), Settings.usual
    run = Run(Path(tempfile.mkdtemp()), method_class.name)
    accelerator = open_accelerator(config, run)
    device, dtype = accelerator.device, DTYPES[accelerator.mixed_precision]
    precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    base = bench.opened(bench.Config(work="sample", base=config.base, random_weights=True, precision=precision), device)
    checkpoint.fingerprint = lambda net: "0" * 64  # to hash random weights takes longer than the steps
    Settings.usual = lambda family: replace(usual(family), num_steps=4)  # the sheet's peak is that of any number of steps
    exhibit = method_class.exhibit(Scene.of(config, base, device), config)
    data = probe.latents(base, config, control=False)
    base.release("text_encoders", "tokenizers")
    if vars(config).get("offload"):  # as a run does, which sets the VAE aside between pictures
        base.vae.cpu()
    lacked: list[str] = []

    def within(what: str, work: Any) -> None:
        """Do the work under the cap; where that is too little, say so and do it without."""
        try:
            work()
        except torch.OutOfMemoryError:
            lacked.append(what)
        if what in lacked:  # no longer in the except block, whose traceback holds the tensors of the failed step
            tell(lacked=lacked)
            cap(0)
            work()
        tell(**peaks(f"{what}_"))

    def steps() -> None:
        for index in range(trainer.index, len(trainer.phases)):
            if trainer.index < index:
                trainer.leave()
                trainer.enter(index)
            found = stepping(trainer, method_class.cycle(config))
            found |= {"share": 1e12 * found["tflop"] / found["s_per_step"] / most.flops, "batch": config.batch_size}
            name = f"{trainer.phase.name}." if trainer.phase.name else ""
            tell(**{f"{name}{key}": float(f"{value:.4g}") for key, value in found.items()})

    def sheet() -> None:
        with trainer.averaged():
            exhibit.sheet(method)

    with alone():
        most = measure.ceiling(device, dtype)
        tell(peak_tflops=round(most.flops / 1e12, 1))
        cap(memory_gib)
        method = method_class(base, config)
        trainer = Trainer(method, data, run, config, accelerator)
        within("steps", steps)
        within("sheet", sheet)
    if lacked:
        raise DoesNotFit(f"{memory_gib:g} GiB are too little for {' and '.join(lacked)}")
    return Trained(Result(), run, run.folder, {})


# ---- pictures


def graph_alone() -> None:
    """Let the engine capture every walk, and compile nothing; on the CPU, where there is no graph, run its function as it is."""
    from fastdiff.sampling import engine

    assert callable(engine.backend_of)
    engine.backend_of = lambda device, compile: engine.Cuda() if torch.device(device).type == "cuda" else engine.Plain()


def in_turn() -> None:
    """Let `bench` time only while no other row measures, and allow for random networks, which multiply rounding."""
    from fastdiff.commands import bench
    from fastdiff.cost import measure

    timed = measure.interleaved

    def interleaved(ways: Any, calls: int, *, warmup: int = 2, **more: Any) -> Any:
        if not warmup:  # the first picture: the compiler may take minutes for it
            return timed(ways, calls, warmup=0, **more)
        for way in ways.values():  # so that the compiler has done its work before this row keeps the others waiting
            way()
        with alone():
            return timed(ways, calls, warmup=warmup, **more)

    measure.interleaved = interleaved
    bench.NEAR.update({torch.bfloat16: 0.9, torch.float16: 0.9})


# ---- rehearsal


def shrunk(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """A published config with small widths, and the same blocks and inputs."""
    if part.startswith("text_encoder"):
        return config | TINY_TEXT
    levels = len(config["block_out_channels"])
    if part == "vae":
        return config | dict(block_out_channels=TINY_VAE[:levels], layers_per_block=1)
    sized = config.get("addition_time_embed_dim")
    small = dict(block_out_channels=TINY_UNET[:levels], attention_head_dim=4, sample_size=TINY_LATENT)
    small["cross_attention_dim"] = TINY_TEXT["hidden_size"] * (2 if sized else 1)
    if sized:
        small |= dict(transformer_layers_per_block=(1, 1, 2), addition_time_embed_dim=8)
        small["projection_class_embeddings_input_dim"] = 6 * 8 + TINY_TEXT["projection_dim"]
    return config | small


def rehearse() -> None:
    """Give published bases small networks, and measure no memory in further processes, which would open the whole ones."""
    from fastdiff.checkpoints.checkpoint import Checkpoint
    from fastdiff.cost import measure

    published = Checkpoint.config_of
    small = lambda base, part: published(base, part) if base.family.ships_weights else shrunk(part, published(base, part))
    Checkpoint.config_of = small
    measure.processes = lambda ways, rounds: dict.fromkeys(ways, measure.Process(1.0, 1.0, 1.0))


def main(how: dict[str, Any], words: list[str]) -> int:
    """Run the command under these changes, and write what it took."""
    from fastdiff.cli import main as fastdiff

    if how.get("tiny"):
        rehearse()
    if how.get("how") == "steps":
        from fastdiff.training import session

        session.train = lambda method, config: stepped(how.get("memory_gib", 0), method, config)
    else:
        cap(how.get("memory_gib", 0))
    if how.get("how") == "graph":
        graph_alone()
    if words[0] == "bench":
        in_turn()
    code = fastdiff(words)
    tell(machine=machine(), **peaks())
    return code


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1]), sys.argv[2:]))
