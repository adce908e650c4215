"""Cuts blocks out of a checkpoint's UNet, by a layout or by measurement, in memory or streamed from file to file."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdiff.checkpoints import configs, tensors, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Weights
from fastdiff.checkpoints.tensors import Entry
from fastdiff.data.prompts import default_prompts
from fastdiff.models import controlnet, text, unet
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.runtime import console, rng, stop
from fastdiff.runtime.errors import Result, UsageError
from fastdiff.sampling.sampler import Sampler, with_size
from fastdiff.sampling.settings import Settings

PROBES = 8  # prompts whose samples the error of a cut network is measured on
LEVELS = (99, 299, 499, 699, 899)  # timesteps to which these samples are noised
ROUNDS = 5  # timed calls of a network, after one that is not timed


def layout_of(base: Checkpoint, layout: str) -> dict[str, Any]:
    """Return the UNet config of a layout, given by name or as a JSON file, and print which layers start as other ones."""
    config = unet.student_config(base.unet_config, layout, base.family)
    rows = [[mine, source] for mine, source in unet.inherited_layers(base.unet_config, config).items() if mine != source]
    if rows:
        console.table("layers that start as another one of the base's; the others keep their name", ["pruned", "base"], rows)
    return config


def title(base: Checkpoint, net: nn.Module, layout: str) -> str:
    """Return the title of the model card: the base, the layout, and how many parameters are left."""
    left = sum(p.numel() for p in net.parameters())
    before = sum(math.prod(shape) for shape in base.shapes("unet").values())
    return f"{base.ref}, pruned to {Path(layout).stem}: {left / 1e6:.1f} of {before / 1e6:.1f} million parameters"


# ---- from file to file


def pruned(base: Checkpoint, config: Mapping[str, Any]) -> tuple[Checkpoint, Weights]:
    """Return the checkpoint with a UNet of that config, and the UNet's weights, each read from the base when it is used."""
    shapes = unet.shapes_of(unet.unet_of(config))
    names = unet.inherited(base.unet_config, config, base.shapes("unet"), shapes)
    source = base.weights("unet")
    readers: dict[str, Callable[[], torch.Tensor]] = {mine: partial(source.__getitem__, old) for mine, old in names.items()}
    return base.shaped("unet", dict(config)), Weights(readers, shapes, {mine: source.dtypes[old] for mine, old in names.items()})


def cut(base: Checkpoint, config: Mapping[str, Any], folder: Path) -> Result:
    """Write the pruned checkpoint as a diffusers folder, tensor by tensor, so that the network is never whole in memory."""
    small, weights = pruned(base, config)
    with console.timed("write_s"):
        recipe = Recipe(method="prune", family=base.family.name, clip_skip=base.stated_clip_skip)
        write.to_folder(small, folder, changed={"unet": weights}, recipe=recipe)
    return Result([folder], figures(base.unet_config, config))


def figures(parent: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """Count parameters and multiply-adds (in units of 1e9) of base and pruned UNet, for one call on one picture.

    The picture has the size that the network was trained on.
    """
    metrics = {}
    for name, config in (("base", parent), ("pruned", student)):
        net = unet.unet_of(config)
        metrics[name] = {"parameters": sum(p.numel() for p in net.parameters()), "gmac": round(macs(net) / 1e9, 3)}
    return metrics


def macs(net: nn.Module) -> int:
    """Count the multiply-adds of one call of a network on the meta device, with torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call(net, probe_of(net, "meta"))
    return counter.get_total_flops() // 2


class Probe(NamedTuple):
    """An input of a UNet."""

    x_t: torch.Tensor  # (1, C, h, w)
    t: torch.Tensor  # (1,)
    cond: Cond  # one row


def probe_of(net: nn.Module, device: torch.device | str) -> Probe:
    """Make an input of all zeros, for one picture of the size that the network was trained on."""
    config: Mapping[str, Any] = net.config  # type: ignore[assignment]  # every diffusers network has one; nn.Module's stub has not
    size = config["sample_size"] or 64
    side = size if isinstance(size, int) else size[0]
    cond = Cond(torch.zeros(1, 77, config["cross_attention_dim"], device=device))
    if config["addition_embed_type"] == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        cond = replace(cond, pooled=torch.zeros(1, pooled, device=device), time_ids=torch.zeros(1, 6, device=device))
    return Probe(
        torch.zeros(1, config["in_channels"], side, side, device=device), torch.zeros(1, dtype=torch.int64, device=device), cond
    )


@torch.no_grad()
def call(net: nn.Module, probe: Probe) -> torch.Tensor:
    """Call a UNet and return its own output, (1, C, h, w), whatever it predicts."""
    cond, dtype, extra = probe.cond, next(net.parameters()).dtype, {}
    if cond.pooled is not None and cond.time_ids is not None:
        extra["added_cond_kwargs"] = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids.to(dtype)}
    return net(probe.x_t.to(dtype), probe.t, cond.tokens.to(dtype), return_dict=False, **extra)[0]


def cut_controlnet(source: Path, config: Mapping[str, Any], folder: Path) -> None:
    """Cut a ControlNet of the base for a pruned UNet of that config, and write it as a diffusers folder.

    UsageError or InputRefused where it cannot be cut.
    """
    smaller, rows = smaller_controlnet(source, config)
    tensors.write(folder / "diffusion_pytorch_model.safetensors", rows, {"format": "pt"})
    write.write_json(folder / "config.json", smaller)


def smaller_controlnet(source: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Entry]]:
    """Return config and tensors of a ControlNet that is cut for a UNet of that config; tensors are read when written.

    UsageError where `source` is no ControlNet folder. UsageError or InputRefused where it cannot be cut in this way.
    """
    path = source / "config.json"
    if not path.is_file():
        raise UsageError(f"`controlnet={source}`: not a diffusers folder of a ControlNet (config.json is missing)")
    parent = configs.read(path)
    configs.check(parent, configs.UNET, path, ("block_out_channels",))
    smaller = controlnet.student_config(parent, config)
    shapes = unet.shapes_of(unet.unet_of(smaller, "ControlNetModel"))
    files = [tensors.open_file(path) for path in sorted(source.glob("*.safetensors"))]
    stored = {name: file for file in files for name in file}
    whole = {name: file.layouts[name].shape for name, file in stored.items()}
    names = controlnet.inherited(parent, smaller, whole, shapes)
    rows = [
        Entry(mine, stored[old].layouts[old].dtype, shapes[mine], partial(stored[old].__getitem__, old))
        for mine, old in names.items()
    ]
    return smaller, rows


# ---- by measurement


def candidates(config: Mapping[str, Any]) -> Iterator[tuple[str, unet.Edit]]:
    """List every single cut that can be made to a UNet, as (what goes, the edit of its config)."""
    layers, attention, depth = unet.each(config, "layers_per_block"), unet.attended(config), unet.depths(config)
    for i in range(unet.stages(config)):
        if layers[i] > 1:
            yield f"a layer of resolution {i}", unet.with_layers(layers[i] - 1, i)
        if attention[i]:
            yield f"attention at resolution {i}", unet.without_attention(i)
        if attention[i] and isinstance(depth[i], int) and depth[i] > 1:
            shallower = [d - -(-d // 3) if j == i else d for j, d in enumerate(depth)]
            yield f"a third of the transformers of resolution {i}", unet.with_depths(shallower)
    if config.get("mid_block_type") == "UNetMidBlock2DCrossAttn":
        yield "attention in the middle", unet.plain_middle
    if config.get("mid_block_type"):
        yield "the middle", unet.without_middle
    if unet.stages(config) > 2:
        yield "the innermost resolution", unet.without_innermost


def choose(base: Checkpoint, target: float, device: torch.device | str) -> dict[str, Any]:
    """Choose a UNet config that is `target` times as fast as the base on this device.

    It is cut step by step, each time where the error grows least per second saved. The error is that of the cut network before
    training: its squared distance to the base's output, on the base's own samples at five noise levels, divided by the variance
    of that output. UsageError where even the smallest network is too slow.
    """
    whole, dtype = base.unet.to(device), next(base.unet.parameters()).dtype
    probes = probes_of(base, device)
    goals = [call(whole, probe) for probe in probes]
    spread = torch.cat(goals).float().var()
    config = dict(base.unet_config)
    start_s = now_s = latency_s(whole, device)
    error = 0.0
    while now_s > start_s / target:
        tried = []
        for name, edit in candidates(config):
            stop.check()
            try:
                smaller = edit(config)
                net = unet.inheriting(whole, smaller).to(device, dtype).eval()
            except UsageError:
                continue  # some combinations of cuts cannot be built
            took_s = latency_s(net, device)
            wrong = [(call(net, p).float() - goal.float()).square().mean() for p, goal in zip(probes, goals, strict=True)]
            tried.append((took_s, (torch.stack(wrong).mean() / spread).item(), name, smaller))
        faster = [row for row in tried if row[0] < 0.99 * now_s]
        if not faster:
            message = f"`target_speed={target:g}x`: with all that can be cut, the network is {start_s / now_s:.2g}x as fast"
            raise UsageError(message, "ask for less")
        took_s, wrong_now, name, config = min(faster, key=lambda row: max(row[1] - error, 1e-6) / (now_s - row[0]))
        console.info(f"without {name}: {start_s / took_s:.2f}x as fast, error {wrong_now:.3f} before training")
        now_s, error = took_s, wrong_now
    return config


def probes_of(base: Checkpoint, device: torch.device | str) -> list[Probe]:
    """Draw samples of the base for a few prompts, each noised to one of five levels."""
    prompts = default_prompts(base.family)[:PROBES]
    cond, uncond = text.encode(base, prompts, device=device), text.unconditional(base, device=device)
    if base.family.size_conditioned:
        cond, uncond = (with_size(c, base.resolution_px) for c in (cond, uncond))
    schedule, side = base.schedule(), base.resolution_px // base.pixels_per_latent
    sampler = Sampler.of_networks(base, Denoiser(base.unet, schedule, base.prediction_type), base.vae, device=device)
    quick = Settings.of_base(base) if base.recipe.few_steps else replace(Settings.usual(base.family), num_steps=10)
    probes = []
    generator = torch.Generator().manual_seed(rng.VALIDATION(0))
    for i in range(len(prompts)):
        x0 = sampler.latents(cond[i : i + 1], uncond, [rng.VALIDATION(i)], quick, (side, side))
        eps, t = torch.randn(x0.shape, generator=generator).to(device), torch.tensor([LEVELS[i % len(LEVELS)]], device=device)
        probes.append(Probe(schedule.add_noise(x0, eps, t), t, cond[i : i + 1].map(lambda v: v.to(device))))
    return probes


def latency_s(net: nn.Module, device: torch.device | str) -> float:
    """Measure the duration in seconds of a call on one picture: the median of a few."""
    probe, times = probe_of(net, device), []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        call(net, probe)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first call warms up and is not counted
