"""The options that every training command takes."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from fastdiff.options.text import TextConfig
from fastdiff.runtime import picture_file
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from fastdiff.checkpoints.checkpoint import Checkpoint


@dataclass
class TrainConfig(TextConfig):
    """The options of every training command."""

    PANEL: ClassVar[str] = "Training"
    ESSENTIALS: ClassVar[str] = "base data prompts output steps batch_size max_time resolution"

    data: Annotated[str | None, "emoji, emoji:STYLE, teacher, a folder of images and captions, wds:SHARDS or hf:ID[:SPLIT]"] = (
        None
    )
    max_images: Annotated[
        int | None, "encode at most this many images; default: all of a folder, 10000 of wds: and hf:", Range(1)
    ] = None
    caption_column: Annotated[
        str | None, "column or JSON key of the captions in tables and data sets; default: text, caption or prompt"
    ] = None
    min_size: Annotated[int, "leave out pictures whose short side has fewer pixels; 0 = none", Range(0)] = 0
    background: Annotated[str, "colour behind transparent parts of pictures: a name, or #rrggbb"] = "white"
    buckets: Annotated[bool, "keep the aspect ratio of pictures: train at SDXL's sizes of about --resolution squared pixels"] = (
        False
    )
    random_crops: Annotated[int, "crops of each picture, at random places; 0 = one crop at the centre", Range(0)] = 0
    flip: Annotated[bool, "also train on the mirrored pictures"] = False
    prompts: Annotated[str | None, "file of prompts for --data teacher, one a line; default: prompts that ship with fastdiff"] = (
        None
    )
    pairs: Annotated[int, "how many pictures the teacher samples for --data teacher, each kept with its noise", Range(1)] = 256
    teacher_steps: Annotated[
        int | None,
        "sampling steps of each teacher picture, for training or to measure with; default: as the family is usually sampled",
        Range(1, 1000),
    ] = None
    teacher_guidance: Annotated[
        float | None, "guidance of each teacher picture; default: --guidance, else as the family is usually sampled", Range(1)
    ] = None
    teacher_scheduler: Annotated[
        Literal["ddim", "euler", "dpm++", "dpm++sde", "lcm", "tcd"] | None,
        "sampler of each teacher picture; default: the recipe's of a few-step --base, else as the family is usually sampled",
    ] = None
    guidance_rescale: Annotated[
        float, "phi of Lin et al. 2024 wherever the teacher is guided; 0 = off, 0.7 for a zero-SNR base", Range(0, 1)
    ] = 0.0
    output: Annotated[str | None, "folder of the run; default runs/<command>-<base>"] = field(
        default=None, metadata={"flags": ["-o"]}
    )
    steps: Annotated[int, "optimiser steps", Range(1)] = 1000
    max_time: Annotated[str | None, "train at most this long: 90s, 25m, 2h; --steps is lowered to fit"] = None
    batch_size: Annotated[int, "images per step and device", Range(1)] = 12
    grad_accum: Annotated[int, "micro-batches per optimiser step", Range(1)] = 1
    lr: Annotated[float, "learning rate", Range(above=0)] = 1e-4
    lr_schedule: Annotated[Literal["constant", "cosine"], "course of the learning rate after the warm-up"] = "constant"
    warmup: Annotated[int, "steps of linear learning rate warm-up", Range(0)] = 0
    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "adafactor", "muon"],
        "adamw8bit: its moments in a quarter of the memory, needs bitsandbytes; adafactor: means of rows and columns in their "
        "place, no momentum; muon: half the moments, orthogonal updates, for networks that start at random, as a tiny decoder; "
        "all take the --lr of adamw",
    ] = "adamw"
    weight_decay: Annotated[float, "decoupled weight decay, as AdamW's", Range(0)] = 0.0
    max_grad_norm: Annotated[float, "gradients of a larger norm are scaled down to it", Range(above=0)] = 1.0
    ema: Annotated[float, "decay of the averaged weights (EMA), which are exported; 0 = no averaging", Range(0, below=1)] = 0.0
    empty_prompts: Annotated[float, "share of items trained with an empty prompt", Range(0, 1)] = 0.0
    mix_prompts: Annotated[
        float,
        "share of items whose prompt is moved by the difference of two other prompts; keeps more of what the prompts do not name",
        Range(0, 1),
    ] = 0.0
    resolution: Annotated[int | None, "width and height in pixels; default: the size of the base", Range(8, multiple_of=8)] = None
    seed: Annotated[int, "seed of all random numbers", Range(0, 2**31 - 1)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to train"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA (fp16 before Ampere), else fp32"] = "auto"
    shard: Annotated[bool, "split fully trained networks over all processes (FSDP2)"] = False
    quantize_base: Annotated[
        Literal["none", "fp8", "int8"],
        "keep the frozen UNet under a LoRA in 8 bits: half of its memory, somewhat slower; int8 is nearer to the exact weights",
    ] = "none"
    offload: Annotated[
        bool,
        "keep optimiser states and averages in CPU memory between updates, and the VAE between pictures; an update then waits "
        "for copies, about 0.1 s a GiB on PCIe 4",
    ] = False
    gradient_checkpointing: Annotated[bool, "recompute activations: less memory, a third more time"] = False
    resume: Annotated[str, "auto: continue from the state in the run folder; never: begin anew; or another run folder"] = "auto"
    save_every: Annotated[int, "steps between two saved states", Range(1)] = 200
    keep_states: Annotated[int, "how many of the newest states are kept", Range(1)] = 2
    max_bad_steps: Annotated[int, "end the run after this many steps in a row whose loss or gradient is not finite", Range(1)] = (
        10
    )
    preview_every: Annotated[int, "steps between two contact sheets; 0 = one at the end", Range(0)] = 0
    eval_every: Annotated[
        int, "steps between two measurements of the student, whose best weights are kept in best/; 0 = never", Range(0)
    ] = 0
    keep: Annotated[Literal["last", "best"], "which weights are exported; best: those that measured best (--eval-every)"] = "last"
    patience: Annotated[int, "stop after this many measurements without improvement; 0 = never", Range(0)] = 0
    tracker: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], "also log to this, besides metrics.jsonl"] = "none"

    # Values for methods that lack these options. Without an annotation they are no options themselves.
    lora_rank, lora_alpha, lora_layers = 0, 0.0, "all"
    guidance, vae = cast("float | None", None), cast("str | None", None)
    proof = 0

    def __post_init__(self) -> None:
        seconds("max_time", self.max_time)
        if self.background != "white":  # else Pillow need not be loaded
            picture_file.colour(self.background)
        if not self.eval_every and (self.keep == "best" or self.patience):
            option = "`keep=best`" if self.keep == "best" else f"`patience={self.patience}`"
            none = " and ".join(
                f"`{name}`" for name in (["keep=last"] if self.keep == "best" else []) + (["patience=0"] if self.patience else [])
            )
            raise UsageError(f"{option}: nothing is measured", f"give `eval_every` too, or {none}")
        if self.quantize_base != "none" and (whole := self.trains_whole):
            raise UsageError(
                f"`quantize_base={self.quantize_base}`: is for LoRAs on a frozen network, but {whole} trains all weights",
                "leave `quantize_base` out",
            )
        if self.shard and self.offload:
            raise UsageError("`offload`: cannot move what `shard` splits", "use one of the two")
        if self.shard and self.optimizer != "adamw":
            raise UsageError(f"`optimizer={self.optimizer}`: does not train what `shard` splits", "use `optimizer=adamw`")

    @property
    def trains_whole(self) -> str | None:
        """What makes all weights of a network of the base train, for a message; None where only adapters and heads train."""
        return None

    def open_student(self, dtype: "torch.dtype | None" = None) -> "Checkpoint":
        """The checkpoint that an exported LoRA belongs to: the base, unless a method trains another network."""
        return self.open_base(dtype)


def seconds(field_name: str, text: str | None) -> float | None:
    """Seconds of a duration like 90s, 25m, 2h or 90; None for None. UsageError for another text."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in "smh" else (text, "s")
    try:
        duration_s = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        duration_s = 0.0
    if not 0 < duration_s < math.inf:
        raise UsageError(f"`{field_name}={text}`: not a duration", "write 90s, 25m or 2h")
    return duration_s
