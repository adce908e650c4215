"""Compare `fastdiff merge-lora` with stock diffusers at baking a LoRA into a single-file SDXL: time and peak memory.

    python examples/bake_speed.py --file sdxl.safetensors --lora lora.safetensors [--rounds 3]

Without --file and --lora it makes a full-size checkpoint and a rank-64 LoRA with random weights. The two ways take turns, each
in its own process; medians and their ratios are printed. Two times are measured: until the result is on the disk, and until the
process ends. A result has 7 GB, so a slow disk dominates both times; TMPDIR=/dev/shm avoids the disk. The stock way is
from_single_file, load_lora_weights, fuse_lora and save_pretrained, all in fp16. Needs 16 GB of disk.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastdiff import lora
from fastdiff.checkpoints import write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Weights
from fastdiff.lora.adapters import TARGETS
from fastdiff.lora.kinds import Factors

STOCK = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
source, lora, target, config = sys.argv[1:]
pipe = StableDiffusionXLPipeline.from_single_file(source, config=config, local_files_only=True, torch_dtype=torch.float16)
pipe.load_lora_weights(lora)
pipe.fuse_lora()
pipe.unload_lora_weights()
pipe.save_pretrained(target)
"""
POOL = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()


def random(shape: tuple[int, ...], offset: int) -> torch.Tensor:
    """A random fp16 tensor cut from POOL, which is faster than drawing 7 GB of numbers. `offset` says where to start."""
    n = torch.Size(shape).numel()
    start = offset * 7919 % (len(POOL) // 2)
    piece = POOL[start:].repeat(-(-n // (len(POOL) - start)))[:n]
    return piece.reshape(shape)


def full_size(family: str, folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint file and a rank-64 LoRA of the family's real sizes, with random weights; returns both paths."""
    base = Checkpoint(family, FAMILIES[family].home, FAMILIES[family])
    parts = {}
    for part in base.parts:
        shapes = base.shapes(part)
        readers = {name: (lambda s=shape, i=i: random(s, i)) for i, (name, shape) in enumerate(shapes.items())}
        parts[part] = Weights(readers, shapes, dict.fromkeys(shapes, torch.float16))
    write.to_file(base, folder / f"{family}.safetensors", changed=parts)
    modules = {}
    for i, (name, shape) in enumerate(base.shapes("unet").items()):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(TARGETS):
            ones = [1] * (len(shape) - 2)
            down, up = random((64, *shape[1:]), i).float(), random((shape[0], 64, *ones), i + 1).float() * 0.01
            modules[f"lora_unet_{module.replace('.', '_')}"] = Factors(down, up)
    lora.save(lora.Lora(modules, Recipe(family=family).to_metadata()), folder / f"{family}-lora.safetensors")
    return folder / f"{family}.safetensors", folder / f"{family}-lora.safetensors"


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds until the result is on disk, seconds of the process, and its peak memory in GiB.

    A new watcher process measures each command, because the peak of a process's children never goes down again.
    """
    watch = """
import json, os, resource, subprocess, sys, time
os.sync()
start = time.time()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
process = time.time() - start
os.sync()
print(json.dumps([time.time() - start, process, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20]))
"""
    done = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, style = (args.file, args.lora) if args.file and args.lora else full_size("sdxl", folder)
        config = folder / "config"
        base = Checkpoint("sdxl", FAMILIES["sdxl"].home, FAMILIES["sdxl"])
        for part in ("scheduler", "unet", "vae", "text_encoder", "text_encoder_2"):
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            write.write_json(config / part / file, json.loads((base.path / part / file).read_text()))
        for part in ("tokenizer", "tokenizer_2"):
            write.write_tokenizer(base.path / part, config / part)
        write.write_json(config / "model_index.json", base.index)
        (folder / "stock.py").write_text(STOCK)
        ours = [sys.executable, "-m", "fastdiff", "merge-lora", "--accel", str(style), "--base", str(source)]
        ways = {
            "fastdiff merge-lora --base, to one file": [*ours, "--output", str(folder / "ours.safetensors")],
            "stock diffusers, to a folder": [
                sys.executable, str(folder / "stock.py"), str(source), str(style), str(folder / "stock"), str(config)
            ],
        }  # fmt: skip
        results: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, command in ways.items():
                results[way].append(measured(command))
                shutil.rmtree(folder / "stock", ignore_errors=True)
                (folder / "ours.safetensors").unlink(missing_ok=True)
                on_disk, process, peak = results[way][-1]
                print(f"{way}: {on_disk:.1f} s until on disk, {process:.1f} s of process, {peak:.2f} GiB", flush=True)
        rows = {way: [statistics.median(column) for column in zip(*runs, strict=True)] for way, runs in results.items()}
        print(f"medians of {args.rounds}")
        for what, ours_is, stock_is in zip(("s until on disk", "s of process", "GiB at peak"), *rows.values(), strict=True):
            print(f"{what}: {ours_is:.2f} / {stock_is:.2f} = {ours_is / stock_is:.2f}")


if __name__ == "__main__":
    main()
