"""The other side of `bench`: the same work done with stock libraries, through their own public calls."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.diffusion.losses import pseudo_huber
from fastdiff.diffusion.schedule import Prediction
from fastdiff.lora.adapters import TARGETS
from fastdiff.models import text
from fastdiff.models.denoiser import Cond
from fastdiff.sampling import assemble
from fastdiff.sampling.sampler import SeededNoise, with_size
from fastdiff.sampling.settings import Settings

# One picture, written as in the libraries' documentation. Arguments: folder, steps, guidance, seed, output.
FIRST_PICTURE = """
import sys, torch
from diffusers import AutoPipelineForText2Image
folder, steps, guidance, seed, output = sys.argv[1:]
pipe = AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=torch.float32)
seed = torch.Generator().manual_seed(int(seed))
pipe("a red apple", num_inference_steps=int(steps), guidance_scale=float(guidance), generator=seed).images[0].save(output)
"""
# Bake a LoRA into a checkpoint. Arguments: folder, LoRA, target.
BAKE = """
import sys, torch
from diffusers import AutoPipelineForText2Image
source, lora, target = sys.argv[1:]
pipe = AutoPipelineForText2Image.from_pretrained(source, torch_dtype=torch.float32)
pipe.load_lora_weights(lora)
pipe.fuse_lora()
pipe.unload_lora_weights()
pipe.save_pretrained(target)
"""


class Pipeline:
    """A stock diffusers pipeline of the same networks. `compiled` follows the recipe of diffusers' documentation on speed."""

    def __init__(
        self,
        base: Checkpoint,
        settings: Settings,
        px: int,
        *,
        device: torch.device | str,
        compiled: bool = False,
        vae: Any = None,
    ) -> None:
        self.pipe = base.pipeline().to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if vae is not None:
            self.pipe.vae = vae.to(device)
        self.pipe.vae.to(self.pipe.unet.dtype)
        for encoder in (self.pipe.components.get(part) for part in ("text_encoder", "text_encoder_2")):
            if encoder is not None:
                encoder.to(self.pipe.unet.dtype)
        self.pipe.scheduler = assemble.stock_scheduler(
            "ddim", base.scheduler_config, spacing="trailing", kind=base.prediction_type
        )
        self.settings, self.px, self.device = settings, px, device
        if compiled:
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)
            self.pipe.fuse_qkv_projections()
            self.pipe.unet = torch.compile(self.pipe.unet, mode="max-autotune", fullgraph=True)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, mode="max-autotune", fullgraph=True)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, output: str = "pil", **inputs: Any) -> Any:
        side = self.px // self.pipe.vae_scale_factor
        noise = SeededNoise(seeds, (self.pipe.unet.config.in_channels, side, side), self.device)()
        inputs = inputs or {"prompt": list(prompts)}
        return self.pipe(
            **inputs, num_inference_steps=self.settings.num_steps, guidance_scale=self.settings.guidance, height=self.px,
            width=self.px, latents=noise.to(self.pipe.unet.dtype), output_type=output,
        ).images  # fmt: skip


class OpenVino:
    """UNet and decoder converted and compiled as OpenVINO's documentation shows, and called by a plain loop.

    The prompts (B, L, D) are encoded already and each step is one call, so the time holds no overhead of a pipeline.
    """

    def __init__(self, base: Checkpoint, settings: Settings, px: int, cond: Cond, *, vae: nn.Module) -> None:
        import openvino

        self.scheduler = assemble.stock_scheduler("ddim", base.scheduler_config, spacing="trailing", kind=base.prediction_type)
        self.scheduler.set_timesteps(settings.num_steps)
        self.tokens, side = cond.tokens.numpy(), px // 2 ** (len(vae.config.block_out_channels) - 1)
        self.shape, how = (base.unet_config["in_channels"], side, side), {"PERFORMANCE_HINT": "LATENCY"}
        how |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        x, t = torch.zeros(len(cond), *self.shape), torch.tensor([1])

        def compiled(part: nn.Module, *example: Tensor) -> Any:
            shapes = [tuple(v.shape) for v in example]
            model = openvino.convert_model(part, example_input=example, input=shapes)
            return openvino.compile_model(model, "CPU", how)

        start = time.perf_counter()
        self.unet, self.decoder = compiled(Answer(base.unet), x, t, cond.tokens), compiled(Pixels(vae), x)
        self.start_s = time.perf_counter() - start

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, output: str = "pil", **inputs: Any) -> Any:
        from PIL import Image

        x = SeededNoise(seeds, self.shape, "cpu")()
        for t in self.scheduler.timesteps:
            out = torch.from_numpy(self.unet([x.numpy(), t[None].numpy(), self.tokens])[0])
            x = self.scheduler.step(out, t, x).prev_sample
        if output == "latent":
            return x
        pixels = torch.from_numpy(self.decoder([x.numpy()])[0])
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(p) for p in pixels.numpy()]


class Answer(nn.Module):
    """A UNet that returns its output (B, C, h, w) as a plain tensor, for tracing."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.net(x, t, tokens, return_dict=False)[0]


class Pixels(nn.Module):
    """A VAE decoder of scaled latents (B, C, h, w), as the stock pipelines call it: pixels (B, 3, H, W) in [-1, 1]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]


class NullUNet(nn.Module):
    """Returns zeros at once, so that only the time of the host's code remains."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, torch.float32, torch.device("cpu")
        self.add_embedding = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (torch.zeros_like(x),)


class OfficialStep:
    """A step of LCM-LoRA distillation laid out like diffusers' training scripts.

    One UNet, whose adapter is switched on and off. Every step encodes its pictures and prompts, and calls the teacher with and
    then without the prompt. Gradient checkpointing is on, as in the documented commands, and the optimiser is plain AdamW.
    """

    def __init__(self, base: Checkpoint, config: Any, prompts: Sequence[str], *, device: torch.device | str) -> None:
        from peft import LoraConfig

        self.base, self.config, self.prompts, self.device = base, config, list(prompts), device
        self.unet = base.unet.to(device).train()
        self.vae = base.vae.to(device)
        for encoder in base.text_encoders:
            encoder.to(device)
        targets = list(TARGETS)
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets))
        self.unet.enable_gradient_checkpointing()
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.lr)
        self.schedule = base.schedule().to(device)
        self.grid = self.schedule.ddim_grid(config.grid_steps).to(device)
        self.uncond = self.encode([""]).expand(len(self.prompts))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """Prompts through the text encoders."""
        cond = text.encode(self.base, prompts, device=self.device)
        cond = with_size(cond, self.base.resolution_px) if self.base.family.size_conditioned else cond
        return cond.map(lambda v: v.to(self.device))

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]."""
        return self.vae.encode(pixels.to(self.device)).latent_dist.sample() * self.vae.config.scaling_factor

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x0 and eps of x (B, C, h, w) at timesteps t (B,)."""
        added_cond = {} if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        out = self.unet(x, t, encoder_hidden_states=cond.tokens, added_cond_kwargs=added_cond).sample
        return self.schedule.predict(out, x, t, self.base.prediction_type)

    def consistency(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The consistency function c_skip x + c_out x0 (Song 2023)."""
        c_skip, c_out = self.schedule.boundary(t, x)
        return c_skip * x + c_out * self.predict(x, t, cond).x0

    def loss(self, x0: Tensor, cond: Cond) -> Tensor:
        """The consistency loss of latents x0 (B, C, h, w): one guided DDIM step of the teacher, then pseudo-Huber."""
        n = len(x0)
        index = torch.randint(len(self.grid), (n,), device=x0.device)
        w = torch.empty(n, device=x0.device).uniform_(self.config.guidance_min, self.config.guidance_max)
        eps = torch.randn_like(x0)
        below = index - self.config.skip
        t, u = self.grid[index], torch.where(below >= 0, self.grid[below.clamp(min=0)], 0)
        x_t = self.schedule.add_noise(x0, eps, t)
        online = self.consistency(x_t, t, cond)
        with torch.no_grad():
            self.unet.disable_adapters()
            with_prompt, without_prompt = (self.predict(x_t, t, c) for c in (cond, self.uncond))  # one after the other
            self.unet.enable_adapters()
            guided = with_prompt.guide(without_prompt, w)
            target = self.consistency(self.schedule.add_noise(guided.x0, guided.eps, u), u, cond)
        return pseudo_huber(online, target, self.config.huber_c)

    def step(self, pixels: Tensor) -> float:
        """One optimiser step on pixels (B, 3, H, W); returns the loss."""
        x0, cond = self.latents(pixels), self.encode(self.prompts)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=x0.is_cuda):
            loss = self.loss(x0, cond)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
