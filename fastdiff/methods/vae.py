"""A tiny decoder (and encoder) for any VAE (Song et al. 2024, SDXS, section 3.1; TAESD's architecture and latents).

z ~ samples of the diffusion model, scaled      target = KL decoder(z)      G(z) = tiny decoder
l1      = | down8(G(z)) - down8(target) |       at an eighth, so that the discriminator alone rules texture     eq. 5
gan     = -log sigmoid D(G(z));     D loses softplus(-D(target)) + softplus(D(G(z)))                            eq. 5
pixel   = | G(z) - target |                     option, 0 in the paper
lpips   = LPIPS(G(z), target)                   option
encoder = | E(target) - KL encoder(target) |^2  option, a player of its own
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoints import locate, vae_file, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.data.batch import Batch, Data
from fastdiff.diffusion import losses
from fastdiff.methods.shared.decoded import Decoded, decode_once
from fastdiff.models import autoencoder, perceptual
from fastdiff.models.discriminator import PatchDiscriminator
from fastdiff.options.vae import EXAMPLES, PRESETS, Config, stages
from fastdiff.options.vae import Config as Options
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError
from fastdiff.training.base_code import load_expression, openers, words_for
from fastdiff.training.card import Usage, code_of
from fastdiff.training.method import Method, Now, Phase, Trains, Turn
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene

if TYPE_CHECKING:
    from diffusers.models import AutoencoderTiny

OFF = "`lambda_lpips=0`"  # the option that switches LPIPS off, for error messages


class Autoencoder(nn.Module):
    """Holds the student's network as `net`, as a Denoiser holds a UNet."""

    net: "AutoencoderTiny"

    def __init__(self, net: "AutoencoderTiny") -> None:
        super().__init__()
        self.net = net


class TinyVAE(Method):
    """Distils a VAE into a tiny one. Players: `decoder`, and by option its `discriminator` and `encoder`."""

    name, Config, presets, examples = "distill-vae", Config, PRESETS, EXAMPLES
    keeps = ("vae",)
    writes_checkpoint = False

    def __init__(self, base: Checkpoint, config: Options) -> None:
        from diffusers.models import AutoencoderTiny

        super().__init__(base, config)
        self.teacher, self.distance = base.vae, distance_of(config, base.family)
        channels = base.config_of("vae")["latent_channels"]
        if autoencoder.factor(base.vae) != 8:
            raise UsageError(f"`base={base.ref}`: its VAE has {autoencoder.factor(base.vae)} px a latent; tiny ones have 8")
        net = autoencoder.tiny(config.width, stages(config), channels)
        assert isinstance(net, AutoencoderTiny)
        self.held = Autoencoder(net)
        self.discriminator: PatchDiscriminator | None = None
        if config.lambda_gan:
            self.discriminator = PatchDiscriminator(config.d_width, channels if config.cond_disc else 0)
        if not config.encoder:
            # The encoder stays untrained, so its last layer is set to zero: it encodes to zeros instead of noise.
            for p in self.student.encoder.layers[-1].parameters():
                nn.init.zeros_(p)

    @property
    def student(self) -> "AutoencoderTiny":
        """The network that trains and is exported."""
        return self.held.net

    @classmethod
    def check(cls, config: Options) -> Options:
        """Find the weights of LPIPS now, so that missing ones are an error before anything is sampled."""
        if config.lambda_lpips or config.lpips_weights:
            perceptual.locate(locate.family_of(config.base, allow_pickle=config.allow_pickle), config.lpips_weights, off=OFF)
        return config

    @classmethod
    def exhibit(cls, scene: Scene, config: Options) -> Decoded:
        return Decoded(scene, config)

    @classmethod
    def arrange(cls, scene: Scene, data: Data, exhibit: Decoded, config: Options) -> Data:
        """Hold out items for the closing figures, and decode the others once."""
        data, exhibit.held_out = data.split(config.proof)
        scene.base.release("unet", "text_encoders", "tokenizers")
        decode_once(scene.base, data, scene.device)
        return data

    def players(self, phase: Phase) -> dict[str, Trains]:
        whole = lambda net, **how: Trains(list(net.parameters()), net=net, **how)
        players = {"decoder": whole(self.student.decoder, averaged=True)}
        if self.discriminator is not None:
            players["discriminator"] = whole(self.discriminator, lr=self.config.d_lr)
        return players | ({"encoder": whole(self.student.encoder)} if self.config.encoder else {})

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.held, *filter(None, (self.discriminator, self.distance))]

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Compute the discriminator's loss, then the decoder's against it (SDXS, equation 5) together with the encoder's."""
        (z, target), step, judge = self._window(batch), now.step, self.discriminator
        if judge is not None and 2 * step >= self.config.gan_from:
            with torch.no_grad():
                fake = self.student.decode(z).sample
            d_real, d_fake = judge(target, z), judge(fake, z)
            self.log(d_real=d_real.detach().sigmoid().mean(), d_fake=d_fake.detach().sigmoid().mean())
            yield {"discriminator": {"gan": losses.gan_real(d_real) + losses.gan_fake(d_fake)}}
        picture = self.student.decode(z).sample
        terms = {"l1": (down8(picture) - down8(target)).abs().mean()}
        if judge is not None and step >= self.config.gan_from:
            terms["gan"] = self.config.lambda_gan * losses.gan_real(judge(picture, z))
        if self.config.lambda_pixel:
            terms["pixel"] = self.config.lambda_pixel * (picture - target).abs().mean()
        if self.config.lambda_lpips:
            assert self.distance is not None
            terms["lpips"] = self.config.lambda_lpips * self.distance(picture, target).mean()
        turn = {"decoder": terms}
        if self.config.encoder:
            wanted = autoencoder.target_latents(self.teacher, target)
            turn["encoder"] = {"latents": losses.squared(autoencoder.mean_latents(self.student, target), wanted)}
        yield turn

    @torch.no_grad()
    def _window(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Crop all latents to one random window, (B, C, h, w), and return it with the VAE's picture of it, (B, 3, 8 h, 8 w).

        The picture is cut out of the batch's decoded pictures, if it has them.
        """
        z = batch.latents
        h, w = (min(self.config.crop // 8, side) for side in z.shape[-2:])
        y, x = (int(torch.randint(side - n + 1, ())) for side, n in zip(z.shape[-2:], (h, w), strict=True))
        part = z[..., y : y + h, x : x + w]
        if batch.pixels is None:
            return part, autoencoder.decode(self.teacher, part)
        return part, batch.pixels[..., 8 * y : 8 * (y + h), 8 * x : 8 * (x + w)]

    def export(self, run: Run) -> None:
        """Write the folder `tiny-vae`, an AutoencoderTiny that stock diffusers loads."""
        folder = run.folder / "tiny-vae"
        write.network_to_folder(self.student, folder)
        run.wrote(folder)

    def usage(self, weights: Path, base: Checkpoint) -> Usage:
        opening = [
            f"pipe = {load_expression(base, weights.parent)}",
            f'pipe.vae = AutoencoderTiny.from_pretrained("{weights.name}")',
        ]
        return Usage(
            title=f"tiny-vae: a small decoder for {base.ref}",
            tags="vae, AutoencoderTiny",
            sampling="",
            code=code_of(weights, base, base.recipe, opening=opening, imports=["AutoencoderTiny", *openers(base)]),
            picture="the VAE's own picture, this decoder's, four times their difference",
            method="L1 at an eighth of the size and a discriminator, against the VAE's own pictures (SDXS)",
            elsewhere=self._elsewhere(weights, base),
            rows={"latents": f"those of {base.ref}, scaled; also of every checkpoint that shares its VAE"},
        )

    def _elsewhere(self, weights: Path, base: Checkpoint) -> list[str]:
        """Say how other programs read the decoder: those that do know TAESD's shape alone."""
        net, taesd = self.student, base.family.taesd
        if reason := vae_file.unlike_taesd(dict(net.config), vae_file.shapes_of(net.state_dict())):
            return [f"ComfyUI, A1111, Forge, stable-diffusion.cpp: they read only networks of TAESD's shape, and {reason}."]
        opened = shlex.join(words_for(base, weights.parent))
        command = f"fastdiff export {opened} --vae {weights.name} --format taesd -o vae_approx"
        return [
            f"ComfyUI: `{command}` writes `{taesd}_decoder.safetensors` and `{taesd}_encoder.safetensors`; put both into"
            f" `models/vae_approx`, and choose `{taesd}` in the node Load VAE.",
            f"stable-diffusion.cpp: `--taesd {weights.name}/diffusion_pytorch_model.safetensors`.",
        ]

    def sample_options(self, weights: Path, base: Checkpoint) -> dict[str, str | bool]:
        return {"base": base.ref, **base.opening, "vae": str(weights)}


def down8(pixels: Tensor) -> Tensor:
    """Average pixels (B, 3, H, W) over squares of 8 x 8: (B, 3, H / 8, W / 8)."""
    return F.avg_pool2d(pixels, 8)


def distance_of(config: Config, family: Family) -> nn.Module | None:
    """Open LPIPS, or for `emoji` the distance that ships with it.

    Where the weights are missing: UsageError if the options ask for them, otherwise a warning and None, for then only the
    closing figures lack LPIPS.
    """
    try:
        return perceptual.open_distance(family, config.lpips_weights, off=OFF)
    except UsageError:
        if config.lambda_lpips or config.lpips_weights:
            raise
        console.warn("no LPIPS among the closing figures: VGG-16's weights are not on this machine (`lpips_weights`)")
        return None
