"""Convert pixels to scaled latents and back through a VAE, a few pictures at a time, in a precision that does not overflow.

B batch, C channels, H W pixels, h w latent.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import component, configs, vae_file
from fastdiff.models.fast.decoder import Decoder
from fastdiff.runtime.errors import InputRefused, as_field, quoted

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
# Pixels that pass through a VAE at once. A picture of 1024 px takes 3 GiB in fp32 (1.25 in the fast decoder in bf16), and 0.75 in
# a tiny VAE.
PIXELS_AT_ONCE, TINY_PIXELS_AT_ONCE = 2**20, 2**21
MOST_AT_ONCE = 16  # pictures, however small they are, unless the caller wants another number


def load(
    ref: str,
    *,
    latent_channels: int = 4,
    option: str = "vae",
    like: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> nn.Module:
    """Load a VAE from a diffusers folder, a hub id or a single file, in fp32 and frozen. A whole checkpoint gives its `vae` part.

    A single file has the layout of LDM, of diffusers or of TAESD; `like` is the config of the base's VAE, which tells what such
    a file does not: the scaling of latents. Raises UsageError if `ref` is not found, and InputRefused if it is not a VAE or its
    latents do not have `latent_channels` channels. Error messages call the input by the field name `option`.
    """
    path = component.locate(ref, option, "VAE", files=True, allow_pickle=allow_pickle)
    if path.is_file():
        if vae_file.config_beside(path) is None:
            stored = vae_file.read(path, ref, option, like=like or {}, allow_pickle=allow_pickle)
            refuse_other_latents(stored.config, latent_channels, option, ref)
            return network(stored, as_field(option, ref))
        path = path.parent
    folder = path / "vae" if (path / "model_index.json").exists() else path
    config = component.config_of(folder, option, ref, CLASSES)
    vae = component.load(folder, option, ref, config, allow_pickle=allow_pickle)
    refuse_other_latents(vae.config, latent_channels, option, ref)
    return vae


def refuse_other_latents(config: Mapping[str, Any], wanted: int, option: str, ref: str) -> None:
    """Raise InputRefused for a VAE whose latents do not have the `wanted` number of channels."""
    if (own := config["latent_channels"]) != wanted:
        raise InputRefused(f"{as_field(option, ref)}: this VAE has {own} latent channels, the base has {wanted}")


def network(stored: vae_file.VaeFile, where: str) -> nn.Module:
    """Build the network of a VAE that was read from a file, in fp32 and frozen; messages call the file `where`.

    InputRefused for layers or values that it cannot have. Values on the meta device are not known, and stay there.
    """
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        kind = getattr(diffusers, stored.config["_class_name"])  # one of CLASSES
        with configs.building(where):
            net = kind.from_config(stored.config)
    state = {name: tensor.to(torch.float32).contiguous() for name, tensor in stored.state.items()}
    if bad := next((name for name, tensor in state.items() if not (tensor.is_meta or bool(tensor.isfinite().all()))), None):
        raise InputRefused(f"{where}: NaN or infinite values ({bad})")
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        problem = quoted(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise InputRefused(f"{where}: its layers are not those of {kind.__name__} ({problem[:200]})") from error
    return net.eval().requires_grad_(False)


def factor(vae: nn.Module | Decoder) -> int:
    """Return how many pixels one latent position spans on each side: 8 for Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def at_once(vae: nn.Module | Decoder, pixels: int, most: int = MOST_AT_ONCE) -> int:
    """Return how many pictures of that many pixels (H times W), at most `most`, pass through a VAE at once: 1 of 1024 px."""
    return max(1, min(most, (TINY_PIXELS_AT_ONCE if is_tiny(vae) else PIXELS_AT_ONCE) // pixels))


def is_tiny(vae: nn.Module | Decoder) -> bool:
    """Whether a VAE is a tiny one, TAESD's kind."""
    return getattr(vae.config, "act_fn", "silu") == "relu"  # the name is not in every VAE's config


def decoding(dtype: torch.dtype) -> torch.dtype:
    """Return the decoder's dtype: bf16 for bf16, which has the range of fp32; else fp32, since SDXL's overflows in fp16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def without_fp16(device: torch.device) -> Any:
    """Return a context without autocast where autocast computes in fp16, in which SDXL's VAE overflows."""
    fp16 = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return torch.autocast(device.type, enabled=False) if fp16 else nullcontext()


def decoder_copy(vae: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a diffusers VAE that only decodes, in another dtype. The copy is frozen and has no encoder."""
    copy = deepcopy(vae, {id(vae.encoder): nn.Identity()})
    for part in copy.children():
        part.to(dtype)
    return copy.requires_grad_(False)


@torch.no_grad()
def encode_moments(vae: nn.Module, pixels: Tensor, *, most: int = MOST_AT_ONCE) -> Tensor:
    """Encode pixels (B, 3, H, W) in [-1, 1] to the mean and standard deviation of their scaled latents: (B, 2 C, h, w), fp32."""
    moments = []
    for part in pixels.split(at_once(vae, pixels[0, 0].numel(), most)):
        if is_tiny(vae):  # it encodes to one latent, not to a distribution
            mean = mean_latents(vae, part)
            moments.append(torch.cat([mean, torch.zeros_like(mean)], 1))
            continue
        posterior = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.std], 1).float() * vae.config.scaling_factor)
    return torch.cat(moments)


def draw(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw latents (B, C, h, w) from the normal distributions whose mean and deviation `encode_moments` returned."""
    mean, std = moments.chunk(2, 1)
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)


def pixels(vae: nn.Module | Decoder, latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) to pixels (B, 3, H, W), fp32, not clamped. Gradients flow through a torch VAE."""
    if isinstance(vae, Decoder):
        return vae(latents)
    return vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample.float()


@torch.no_grad()
def decode(vae: nn.Module | Decoder, latents: Tensor, *, most: int = MOST_AT_ONCE) -> Tensor:
    """Decode scaled latents (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1], as many at a time as `at_once` allows.

    There are no gradients, and autocast to fp16 is off.
    """
    n = at_once(vae, latents[0, 0].numel() * factor(vae) ** 2, most)
    with without_fp16(latents.device):
        return torch.cat([pixels(vae, z).clamp(-1, 1) for z in latents.split(n)])


def tiny(width: int, decoder_blocks: tuple[int, ...], latent_channels: int = 4) -> nn.Module:
    """Build a diffusers AutoencoderTiny (TAESD) with random weights: residual blocks and upsampling, no attention or norms.

    Its latents are already scaled (scaling_factor 1) and its pixels lie in [-1, 1]. Train it through `encode` and `decode`:
    `forward` rounds latents to bytes, which stops gradients. Leave gradient checkpointing off: with it, the encoder does not
    convert the range of its pixels.
    """
    from diffusers import AutoencoderTiny

    widths, stages = (width,) * len(decoder_blocks), len(decoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, *(3,) * (stages - 1)),
        num_decoder_blocks=decoder_blocks,
        latent_channels=latent_channels,
        scaling_factor=1.0,
        force_upcast=False,
    )


@torch.no_grad()
def target_latents(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Encode pixels like `mean_latents`, as a target to learn: no gradients, and autocast to fp16 is off."""
    with without_fp16(pixels.device):
        return torch.cat([mean_latents(vae, part) for part in pixels.split(at_once(vae, pixels[0, 0].numel()))])


def mean_latents(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, H, W) to the mean of their scaled latents (B, C, h, w), fp32; gradients flow through."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

    answer = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = answer.latents if isinstance(answer, AutoencoderTinyOutput) else answer.latent_dist.mean
    return latents.float() * vae.config.scaling_factor
