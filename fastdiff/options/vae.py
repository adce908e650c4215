"""The options of `distill-vae`, and their presets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from fastdiff.checkpoints.family import Presets
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

# TAESD: Adam 3e-4, batches of 16. SDXS names no weights: ours.
# fmt: off
CARD = dict(lr=3e-4, lr_schedule="cosine", warmup=100, ema=0.999, batch_size=8, steps=30_000, pairs=1024, data="teacher")
PRESETS = Presets(
    # Its own decoder costs 1/68 of SD's a pixel. A fifteenth of that has 12 channels and draws blots; a third to a quarter does
    # not (examples/emoji/README.md). The last options serve those who set `lambda_gan`.
    emoji=dict(
        data="teacher", pairs=2160, teacher_steps=8, width=24, blocks="4,4,2,0", optimizer="muon", lr=7e-3, lr_schedule="cosine",
        warmup=20, ema=0.99, batch_size=32, steps=1500, lambda_pixel=1.0, lambda_lpips=0.2, lambda_gan=0.0, gan_from=200,
        cond_disc=True, d_width=16, d_lr=1e-3,
    ),
    sd15=CARD,
    sd21=CARD,
    sdxl=CARD,
)
# fmt: on
EXAMPLES = """fastdiff distill-vae
fastdiff distill-vae --base sdxl --prompts prompts.txt --encoder
fastdiff sample --base sdxl --vae runs/distill-vae-sdxl/tiny-vae --prompt "a red apple\""""


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Tiny decoder"
    ESSENTIALS: ClassVar[str] = "base data prompts output encoder width steps crop batch_size max_time"

    width: Annotated[int, "channels of every layer; 64 is TAESD's", Range(4)] = 64
    blocks: Annotated[str, "residual blocks at each of the four resolutions, from latent to picture"] = "3,3,3,1"
    encoder: Annotated[bool, "train an encoder too, for image-to-image"] = False
    lambda_gan: Annotated[float, "weight of the discriminator; 0 = none", Range(0)] = 0.1
    lambda_pixel: Annotated[float, "weight of the distance at full resolution; SDXS 0", Range(0)] = 0.0
    lambda_lpips: Annotated[float, "weight of the perceptual distance; SDXS 0", Range(0)] = 0.0
    lpips_weights: Annotated[str | None, "torchvision's VGG-16 file, or embedded; default: the model zoo's"] = None
    cond_disc: Annotated[bool, "the discriminator also sees the latents"] = False
    d_width: Annotated[int, "channels of the discriminator's first layer", Range(8)] = 64
    d_lr: Annotated[float | None, "learning rate of the discriminator; default the decoder's", Range(above=0)] = None
    gan_from: Annotated[
        int, "step from which the discriminator acts on the decoder; it trains from half of that on", Range(0)
    ] = 0
    crop: Annotated[int, "side of the training crops in pixels", Range(16, multiple_of=8)] = 256
    proof: Annotated[int, "pictures kept out of training for the closing figures, at most a quarter of all", Range(1, 2000)] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        stages(self)
        if self.eval_every or self.gradient_checkpointing:
            option = "eval_every" if self.eval_every else "gradient_checkpointing"
            raise UsageError(f"`{option}`: has no use for a decoder", "`preview_every` shows how it gets on; `crop` saves memory")

    @property
    def trains_whole(self) -> str | None:
        return "a tiny decoder"


def stages(config: Config) -> tuple[int, ...]:
    try:
        numbers = tuple(int(n) for n in config.blocks.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or min(numbers) < 0:
        raise UsageError(f"`blocks={config.blocks}`: not four numbers, one of each resolution", "as in 3,3,3,1")
    return numbers
