"""The `bench` command: compares the speed of fastdiff with that of stock libraries on the same work.

The two ways take turns in one process. Before it prints a ratio, the command checks that both give the same result.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import lora
from fastdiff.checkpoints import locate, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.cost import measure, stock
from fastdiff.data.batch import Batch
from fastdiff.lora.adapters import TARGETS
from fastdiff.lora.kinds import Factors
from fastdiff.methods import lcm
from fastdiff.models import autoencoder, text, unet
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.fast.unet import FoldedUNet
from fastdiff.options.bench import EXAMPLES, Config
from fastdiff.runtime import console
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import GateFailed, Result, UsageError
from fastdiff.sampling import openvino
from fastdiff.sampling.assemble import pick_device, pick_dtype
from fastdiff.sampling.compiling import WORTH_COMPILING
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.sampler import Sampler, with_size
from fastdiff.sampling.settings import Settings
from fastdiff.training.method import Now

PROMPT = "a red apple"
# Results count as equal up to this difference in fp32, and from this cosine on in half precision.
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.999, torch.float16: 0.999}


def run(config: Config) -> Result:
    """The `bench` command."""
    if (config.layout or config.widths) and not config.random_weights:
        raise UsageError("--layout and --widths change the network's shape, so no weights fit it", "add --random-weights")
    device = pick_device(config.device)
    if "openvino" in {config.compile, config.against}:
        openvino.check(device, config.precision)
    metrics = {"sample": sample, "train": train, "merge": merge}[config.work](config, device)
    metrics |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"}
    for name, value in metrics.items():
        console.info(f"{name}: {format_value(value)}")
    result = Result(metrics=metrics)
    if config.assert_ratio and metrics["ratio"] < config.assert_ratio:
        message = f"bench {config.work}: {metrics['ratio']:.2f}x the speed of the stock way, less than {config.assert_ratio:g}x"
        raise GateFailed(message, "", result=result)
    return result


def format_value(value: Any) -> str:
    """A figure as text: four significant digits of a float, a dict as JSON."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else str(value)


# ---- what is measured


def opened(config: Config, device: torch.device, *, unet_alone: bool = False) -> Checkpoint:
    """The base, or with `random_weights` a network of its shape with random weights on the device.

    `unet_alone` then leaves out the VAE and the text encoders.
    """
    dtype = pick_dtype(config.precision, device)
    if not config.random_weights:
        return config.open_base(dtype)
    family = locate.family_of(config.base)
    base = Checkpoint(config.base, family.home, family, dtype)
    shape = base.unet_config
    if config.layout:
        shape = unet.student_config(shape, config.layout, family)
    if config.widths:
        shape = with_widths(shape, config.widths)
    base = base.shaped("unet", shape)
    torch.manual_seed(0)
    with torch.device(device):
        base.__dict__["unet"] = made("unet", shape).to(dtype)
        if not unet_alone:
            base.__dict__["vae"] = made("vae", base.config_of("vae"))
            base.__dict__["text_encoders"] = [made(part, base.config_of(part), base.index[part][1]) for part in base.text_parts]
    return base


def made(part: str, config: dict[str, Any], kind: str = "") -> nn.Module:
    """One network of a checkpoint with random weights; `kind` is the class of a text encoder."""
    if part.startswith("text_encoder"):
        import transformers

        cls = getattr(transformers, kind)  # the class that model_index.json names
        return cls(cls.config_class.from_dict(config)).eval().requires_grad_(False)
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(config).eval().requires_grad_(False)


def with_widths(shape: dict[str, Any], text: str) -> dict[str, Any]:
    """A UNet config with the channels that `text` lists, as 96,192,384, and attention heads of 32 channels.

    UsageError where `text` is not one multiple of 32 per resolution.
    """
    try:
        widths = [int(w) for w in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--widths {text}: not whole numbers separated by commas", "as 96,192,384") from error
    if len(widths) != unet.stages(shape) or any(w < 1 or w % 32 for w in widths):
        raise UsageError(f"--widths {text}: needs {unet.stages(shape)} multiples of 32, one for each resolution")
    return {**shape, "block_out_channels": widths, "attention_head_dim": [w // 32 for w in widths], "num_attention_heads": None}


def nearness(name: str, ours: Tensor, stock: Tensor, dtype: torch.dtype) -> float:
    """How near the results of the two ways are: the largest difference relative to the size, or in half precision the cosine.

    GateFailed where they differ by more than NEAR allows.
    """
    a, b = ours.float().flatten().cpu(), stock.float().flatten().cpu()
    if dtype == torch.float32:
        value = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
        same = value <= NEAR[dtype]
    else:
        value = torch.cosine_similarity(a, b, dim=0).item()
        same = value >= NEAR[dtype]
    if not same:
        raise GateFailed(f"bench: the {name} of the two ways differ ({value:.2g}), so no ratio is given")
    return value


def compared(seconds: dict[str, list[float]], work: float) -> dict[str, Any]:
    """The medians of both ways and their ratio. `work` is the number of pictures or samples per call."""
    ours, stock = (statistics.median(seconds[name]) for name in ("ours", "stock"))
    return {"ratio": stock / ours, "ours_ms": 1e3 * ours, "stock_ms": 1e3 * stock, "ours_per_s": work / ours,
            "stock_per_s": work / stock, "calls": len(seconds["ours"])}  # fmt: skip


def peaks(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Peak MiB of each way on the GPU."""
    peaks_mib = {}
    for name, way in ways.items():
        torch.cuda.reset_peak_memory_stats()
        way()
        torch.cuda.synchronize()
        peaks_mib[f"{name}_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks_mib


# ---- pictures


def sample(config: Config, device: torch.device) -> dict[str, Any]:
    """Measure from prompt to picture, a batch at once. The stock pipeline encodes prompts in every call, fastdiff caches them."""
    from PIL import Image

    base, n = opened(config, device), config.batch_size or 1
    px, settings = config.resolution or base.resolution_px, Settings("ddim", config.num_steps, config.guidance, "trailing")
    tiny = autoencoder.tiny(64, (3,) * (len(base.config_of("vae")["block_out_channels"]) - 1) + (1,))
    tiny = tiny.to(device, base.dtype).eval().requires_grad_(False)
    encode = text.Prompts(base, device=device)
    cond, uncond, seeds = encode([PROMPT] * n), encode.unconditional(), list(range(n))
    how = dict(device=device, vae=tiny if config.decoder == "tiny" else None)
    sampler = Sampler(base, compile=config.compile, **how)
    samplers = {"ours": sampler}
    if config.against == "openvino" and config.compile != "openvino":  # a third way: fastdiff with OpenVINO
        samplers["openvino"] = Sampler(base, compile="openvino", **how)
    pipe = stock_of(config, base, settings, px, cond, device, tiny if config.stock_decoder == "tiny" else None)
    side = px // autoencoder.factor(sampler.vae)
    embeds = {"prompt_embeds": cond.tokens, "pooled_prompt_embeds": cond.pooled} if config.stock_embeds or config.null else {}
    embeds = {k: v.to(device, base.dtype) for k, v in embeds.items() if v is not None}
    if config.null:
        nulled(sampler, pipe, px)
    draw = lambda s: lambda: [Image.fromarray(p.numpy()) for p in next(s.stream_batches([(cond, uncond, seeds)], settings, px))]
    ours = {name: draw(s) for name, s in samplers.items()}
    first = {name: times[0] for name, times in measure.interleaved(ours, 1, device=device, warmup=0).items()}
    if not config.null:
        walk, same = sampler.walk(cond, uncond, seeds, settings, (side, side), px), pipe([PROMPT] * n, seeds, output="latent")
        parity = [nearness("latents", s.engine.latents(walk), same, base.dtype) for s in samplers.values()]
    if sampler.engine.backend is not None and config.compile == "auto":
        for _ in range(WORTH_COMPILING):
            ours["ours"]()
        for captured in sampler.engine.captured.values():
            if captured.thread is not None:  # without memory for a graph nothing is compiled
                captured.thread.join()
    most = measure.ceiling(device, base.dtype)
    ways = ours | {"stock": lambda: pipe([PROMPT] * n, seeds, **embeds)}
    times = measure.interleaved(ways, config.calls, device=device)
    metrics = compared(times, n)
    if "openvino" in times:
        third = compared({**times, "ours": times["openvino"]}, n)
        metrics |= {"openvino_ratio": third["ratio"], "openvino_ms": third["ours_ms"]}
        metrics |= {"openvino_first_ms": 1e3 * first["openvino"], "stock_start_ms": 1e3 * pipe.start_s}
    if not config.null:
        most = measure.ceiling(device, base.dtype, least=most)
        # Operations in a CUDA graph or in OpenVINO cannot be counted, so the same work is done once in plain PyTorch.
        plain = Engine(sampler.denoiser, lambda latents: autoencoder.decode(sampler.vae, latents), device)
        counted, worst = measure.cost(lambda: plain.bytes(walk)), max if base.dtype == torch.float32 else min
        metrics |= {"parity": worst(parity), "gflop": counted.flops / 1e9,
                  "of_limit": 1e3 * counted.limit_s(most) / metrics["ours_ms"],
                  "ceiling_tflops": most.flops / 1e12, "ceiling_gb_s": most.bytes / 1e9}  # fmt: skip
    metrics |= {"folded": isinstance(sampler.denoiser.net, FoldedUNet)}
    metrics |= {"first_ms": 1e3 * first["ours"], "num_steps": config.num_steps, "batch_size": n, "resolution": px}
    metrics |= peaks({"ours": ways["ours"], "stock": ways["stock"]}) if device.type == "cuda" else {}
    return metrics | ({} if config.random_weights or config.null or not config.rounds else cold(config, base))


def stock_of(
    config: Config, base: Checkpoint, settings: Settings, px: int, cond: Cond, device: torch.device, vae: nn.Module | None
) -> Any:
    """The stock side of the comparison. `vae` replaces the base's own. UsageError where OpenVINO cannot do this work."""
    if config.against != "openvino":
        return stock.Pipeline(base, settings, px, device=device, compiled=config.against == "compiled", vae=vae)
    if config.null or settings.guided or base.family.size_conditioned:
        raise UsageError("--against openvino: needs one call per step of an SD1.5 or SD2.1 network", "drop --null and --guidance")
    return stock.OpenVino(base, settings, px, cond, vae=vae or base.vae)


def nulled(sampler: Sampler, pipe: stock.Pipeline, px: int) -> None:
    """Give both sides networks that do nothing, so that only the code around them is timed."""
    null = stock.NullUNet(pipe.pipe.unet.config)
    pipe.pipe.unet = null
    pictures = lambda z: torch.zeros(len(z), 3, px, px, device=z.device)
    pipe.pipe.vae.decode = lambda z, **_: (pictures(z),)
    old = sampler.denoiser
    sampler.denoiser = Denoiser(null, old.schedule, old.kind)
    sampler.engine = type(sampler.engine)(sampler.denoiser, pictures, sampler.device)


def cold(config: Config, base: Checkpoint) -> dict[str, Any]:
    """Measure from a new process to a picture on disk: `fastdiff sample` against the script in the libraries' documentation.

    {} where the base is not a folder.
    """
    if not base.path.is_dir():
        return {}
    with tempfile.TemporaryDirectory() as name:
        numbers = [str(config.num_steps), str(config.guidance)]
        flags = ["--num-steps", numbers[0], "--guidance", numbers[1], "--device", config.device, "--precision", "fp32"]
        ours = [sys.executable, "-m", "fastdiff", "sample", "--base", str(base.path), "--prompt", PROMPT, *flags]
        script = Path(name) / "first.py"
        script.write_text(stock.FIRST_PICTURE)
        theirs = [sys.executable, str(script), str(base.path), *numbers, "0", f"{name}/stock.png"]
        runs = measure.processes({"ours": [*ours, "-o", f"{name}/ours.png"], "stock": theirs}, config.rounds)
    return {"cold": {k: asdict(v) for k, v in runs.items()}, "cold_ratio": runs["ours"].wall_s / runs["stock"].wall_s,
            "cold_cpu_ratio": runs["ours"].cpu_s / runs["stock"].cpu_s}  # fmt: skip


# ---- training steps


class OurStep:
    """A training step of `train-lcm-lora` on cached latents and prompts."""

    def __init__(self, base: Checkpoint, config: lcm.Config, batch: Batch, device: torch.device) -> None:
        base.unet.to(device)
        self.method, self.batch, self.config = lcm.LCM(base, config), batch.to(device), config
        self.method.schedule.to(device)
        self.phase = self.method.phases()[0]
        self.trained = self.method.players(self.phase)["student"].params
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.lr, fused=True)

    def loss(self) -> Tensor:
        (turn,) = self.method.losses(self.batch, Now(0, self.phase, 0, 0.0))
        return sum(turn["student"].values())

    def step(self) -> None:
        with torch.autocast(self.batch.latents.device.type, torch.bfloat16, enabled=self.batch.latents.is_cuda):
            loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


def step_of(which: str, config: Config, device: torch.device) -> tuple[Any, Callable[[], Any], lcm.Config]:
    """One of the two ways to train ("ours" or "stock"), the function that does a step of it, and the training config.

    Ours gets latents and prompts that are encoded already, as its cache gives them.
    """
    base = opened(config, device, unet_alone=which == "ours")
    row = lcm.PRESETS[base.family.name]
    names = {k: row[k] for k in ("lora_rank", "lora_alpha", "lr", "guidance_min", "guidance_max", "skip") if k in row}
    n = config.batch_size or row["batch_size"]
    lcm_config = lcm.Config(**names, batch_size=n, gradient_checkpointing=row.get("gradient_checkpointing", False))
    px = config.resolution or base.resolution_px
    pixels = torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    side = px // base.pixels_per_latent
    if which == "stock":
        way = stock.OfficialStep(base, lcm_config, [PROMPT] * n, device=device)
        return way, lambda: way.step(pixels), lcm_config
    g, tokens = torch.Generator().manual_seed(1), base.config_of("text_encoder")["max_position_embeddings"]
    latents = torch.randn(n, base.unet_config["in_channels"], side, side, generator=g)
    cond, uncond = (Cond(torch.randn(n, tokens, base.unet_config["cross_attention_dim"], generator=g)) for _ in range(2))
    if base.family.size_conditioned:
        width = base.config_of("text_encoder_2")["projection_dim"]
        cond, uncond = (with_size(replace(c, pooled=torch.randn(n, width, generator=g)), px) for c in (cond, uncond))
    way = OurStep(base, lcm_config, Batch(latents, cond, uncond), device)
    return way, way.step, lcm_config


def train(config: Config, device: torch.device) -> dict[str, Any]:
    """Measure LCM-LoRA training steps, against steps laid out as in diffusers' scripts.

    Ours uses cached latents and prompts, and one teacher pass per step.
    """
    ours, our_step, lcm_config = step_of("ours", config, device)
    theirs, stock_step, _ = step_of("stock", config, device)
    losses = []
    for way in ("ours", "stock"):
        torch.manual_seed(0)
        batch = ours.batch
        theirs.uncond = batch.uncond
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # as both steps compute it
            losses.append(ours.loss() if way == "ours" else theirs.loss(batch.latents, batch.cond))
    near = (losses[0] / losses[1]).detach()  # losses are small numbers, so their ratio is compared with 1
    parity = nearness("losses", near, torch.ones_like(near), torch.float32 if device.type == "cpu" else torch.bfloat16)
    del losses
    seconds = measure.interleaved({"ours": our_step, "stock": stock_step}, config.calls, device=device)
    metrics = compared(seconds, lcm_config.batch_size)
    if device.type == "cuda":
        return metrics | {"parity": parity} | peaks({"ours": our_step, "stock": stock_step})
    ways = {way: [sys.executable, "-c", PEAK, way, json.dumps(asdict(config))] for way in ("ours", "stock")}
    used = measure.processes(ways, 1)
    metrics |= {f"{way}_peak_mib": used[way].peak_mib for way in used}
    return metrics | {"parity": parity, "peak_ratio": used["ours"].peak_mib / used["stock"].peak_mib}


PEAK = """
import json, sys, torch
from fastdiff.commands import bench
config = bench.Config(**json.loads(sys.argv[2]))
_, step, _ = bench.step_of(sys.argv[1], config, torch.device("cpu"))
for _ in range(3):
    step()
"""


# ---- a LoRA into a checkpoint


def merge(config: Config, device: torch.device) -> dict[str, Any]:
    """Measure `merge-lora --base` against load, fuse and save in diffusers, each in a process of its own."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = opened(config, torch.device("cpu"))
        source = base.path
        if config.random_weights:
            source = folder / "base"
            write.to_folder(base, source)
        if not source.is_dir():
            raise UsageError(f"--base {config.base}: bench merge needs a diffusers folder", "give one, or add --random-weights")
        style = folder / "lora.safetensors"
        lora.save(random_lora(base), style)
        (folder / "bake.py").write_text(stock.BAKE)
        ours = [sys.executable, "-m", "fastdiff", "merge-lora", "--accel", str(style), "--base", str(source)]
        ways = {
            "ours": [*ours, "--precision", "fp32", "--output", str(folder / "ours")],
            "stock": [sys.executable, str(folder / "bake.py"), str(source), str(style), str(folder / "stock")],
        }
        used = measure.processes(ways, max(1, config.rounds))
        file = "unet/diffusion_pytorch_model.safetensors"
        a, b = (load_file(folder / way / file) for way in ways)
        parity = max(nearness(key, a[key], value, torch.float32) for key, value in b.items())
    wall, peak = (vars(used["stock"])[k] / vars(used["ours"])[k] for k in ("wall_s", "peak_mib"))
    runs = {way: asdict(run) for way, run in used.items()}
    return {"ratio": wall, "parity": parity, "runs": runs, "peak_ratio": 1 / peak, "rounds": max(1, config.rounds)}


def random_lora(base: Checkpoint, rank: int = 16) -> lora.Lora:
    """A LoRA with random weights on the usual target layers of the base's UNet."""
    g, modules = torch.Generator().manual_seed(0), {}
    for name, shape in base.shapes("unet").items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(TARGETS):
            small = lambda *size: torch.randn(*size, generator=g) * 0.02
            down, up = small(rank, *shape[1:]), small(shape[0], rank, *[1] * (len(shape) - 2))
            modules[f"lora_unet_{module.replace('.', '_')}"] = Factors(down, up)
    return lora.Lora(modules, Recipe(family=base.family.name).to_metadata())


COMMAND = Runnable(Config, run, examples=EXAMPLES)
