"""The options that every training command takes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fastdiff.options.base import BaseConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from fastdiff.checkpoints.checkpoint import Checkpoint


@dataclass
class TrainConfig(BaseConfig):
    """What every training command takes."""

    PANEL: ClassVar[str] = "Training"
    ESSENTIALS: ClassVar[tuple[str, ...]] = (
        "base",
        "data",
        "prompts",
        "output",
        "steps",
        "batch_size",
        "max_time",
        "resolution",
    )

    data: Annotated[str | None, "emoji, emoji:STYLE, teacher, a folder of images and captions, wds:SHARDS or hf:ID[:SPLIT]"] = (
        None
    )
    max_images: Annotated[
        int | None, "images that are encoded at most; default: all of a folder, 10000 of wds: and hf:", Range(1)
    ] = None
    buckets: Annotated[bool, "keep the shape of pictures: sizes of SDXL's list, about --resolution squared each"] = False
    random_crops: Annotated[int, "encode so many crops of each picture, at random places; 0 = one at the centre", Range(0)] = 0
    flip: Annotated[bool, "encode pictures mirrored, too"] = False
    prompts: Annotated[str | None, "prompts for --data teacher, one a line"] = None
    pairs: Annotated[int, "pairs of noise and latents that --data teacher samples", Range(1)] = 256
    teacher_steps: Annotated[int | None, "sampling steps of each; default: the family's", Range(1, 1000)] = None
    teacher_guidance: Annotated[float | None, "guidance of each; default: --guidance, or the family's", Range(1)] = None
    output: Annotated[str | None, "run folder"] = field(default=None, metadata={"flags": ["-o"]})
    steps: Annotated[int, "optimiser steps", Range(1)] = 1000
    max_time: Annotated[str | None, "train no longer than this: 90s, 25m, 2h; fewer steps where they would not fit"] = None
    batch_size: Annotated[int, "images a step and device", Range(1)] = 12
    grad_accum: Annotated[int, "micro-batches an optimiser step", Range(1)] = 1
    lr: Annotated[float, "learning rate", Range(above=0)] = 1e-4
    lr_schedule: Annotated[Literal["constant", "cosine"], "after the warm-up"] = "constant"
    warmup: Annotated[int, "steps of linear learning rate warm-up", Range(0)] = 0
    weight_decay: Annotated[float, "AdamW weight decay", Range(0)] = 0.0
    max_grad_norm: Annotated[float, "gradient clipping", Range(above=0)] = 1.0
    ema: Annotated[float, "decay of the averaged weights that are exported; 0 = none", Range(0, below=1)] = 0.0
    empty_prompts: Annotated[float, "share of items trained with an empty prompt", Range(0, 1)] = 0.0
    resolution: Annotated[int | None, "pixels a side; default: the family's own", Range(8, multiple_of=8)] = None
    seed: Annotated[int, "of everything random", Range(0, 2**31 - 1)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to train"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA, else fp32"] = "auto"
    shard: Annotated[bool, "split networks that train whole over all processes (FSDP2)"] = False
    gradient_checkpointing: Annotated[bool, "less memory, a third more time"] = False
    resume: Annotated[str, "auto (go on from the run folder's state), never, or another run folder"] = "auto"
    save_every: Annotated[int, "steps between resumable states", Range(1)] = 200
    keep_states: Annotated[int, "resumable states that are kept, the newest", Range(1)] = 2
    max_bad_steps: Annotated[int, "skipped steps in a row that end the run: loss or gradient not finite", Range(1)] = 10
    preview_every: Annotated[int, "steps between contact sheets; 0 = only at the end", Range(0)] = 0
    eval_every: Annotated[int, "steps between measurements of the student; its best weights go to best/; 0 = never", Range(0)] = 0
    keep: Annotated[Literal["last", "best"], "which weights are exported; best: of the best measurement (--eval-every)"] = "last"
    patience: Annotated[int, "stop after so many measurements without a better one; 0 = never", Range(0)] = 0
    tracker: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], "besides metrics.jsonl"] = "none"

    # What a method without these options answers. They have no annotation, so they are no options here.
    lora_rank, lora_alpha, lora_layers = 0, 0.0, "all"
    guidance = None
    vae = None
    proof = 0

    def open_student(self, dtype: "torch.dtype | None" = None) -> "Checkpoint":
        """The checkpoint that an exported LoRA is of: the base, unless a method trains another network."""
        return self.open_base(dtype)


def seconds(field_name: str, text: str | None) -> float | None:
    """90s, 25m, 2h or plain seconds."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in "smh" else (text, "s")
    try:
        duration_s = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        duration_s = 0.0
    if not duration_s > 0:
        raise UsageError(f"`{field_name}={text}`: not a duration", "write 90s, 25m or 2h")
    return duration_s
