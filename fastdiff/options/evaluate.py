"""The options of `evaluate`, and the published protocols."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from fastdiff.checkpoints.family import FAMILIES, SHIPPED
from fastdiff.options.teacher_row import read_teacher_row
from fastdiff.options.text import TextConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError, as_field

METRIC_NETWORKS = ("fid", "patch", "clip", "lpips")  # metrics that need a network besides the base
CLIP = "ViT-L-14-336-quickgelu:openai"  # the network that CMMD is defined with (Jayasumana 2024, section 4)
EXAMPLES = """fastdiff evaluate --lora lcm.safetensors
fastdiff evaluate --student lcm.safetensors --student runs/dmd-emoji/dmd.safetensors --num-images 2000
fastdiff evaluate --base sdxl --lora lcm.safetensors --num-steps 1,2,4,8 --prompts prompts.txt --reference teacher:25
fastdiff evaluate --base sdxl --lora fast.safetensors --protocol coco10k-lightning --reference val2014 --prompts coco.txt
fastdiff evaluate --lora lcm.safetensors --num-steps 4 --teacher-row "scheduler=dpm++ steps=3 guidance=1,3,1"
fastdiff evaluate --lora lcm.safetensors --with-lora style.safetensors"""
# Published protocols: (DMD, appendix D) 30,000 prompts of COCO-2014 val, 512 px reduced to 256 by Lanczos, FID against all its
# pictures, OpenCLIP-bigG; (SDXL-Lightning, section 5) its first 10,000 prompts, guidance 6, FID at 299 px whole and of a 299 px
# centre patch; (SDXS, section 4) 5,000 prompts of COCO-2017 val at 512 px, guidance 7.5.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "coco30k-dmd": dict(num_images=30_000, resolution=512, fid_px=256, teacher_guidance=3.0, metrics="fid,clip",
                        clip="ViT-bigG-14:laion2b_s39b_b160k"),
    "coco10k-lightning": dict(num_images=10_000, resolution=1024, fid_px=299, teacher_guidance=6.0, teacher_steps=32,
                              metrics="fid,patch,clip"),
    "coco5k-sdxs": dict(num_images=5_000, resolution=512, teacher_guidance=7.5, metrics="fid,clip"),
}  # fmt: skip
# Half of the shipped prompts of `emoji` are ones that no student was trained on, and each half is judged by itself.
PRESETS = {SHIPPED.name: dict(num_images=1000)} | {
    f"{family}:{name}": row for family, of in FAMILIES.items() if of.published for name, row in PROTOCOLS.items()
}


@dataclass
class Config(TextConfig):
    ESSENTIALS: ClassVar[str] = "base lora student num_steps reference prompts num_images metrics output with_lora"
    VARIANT: ClassVar[str] = "protocol"

    student: Annotated[list[str], "model to judge: a LoRA, a checkpoint folder, a file or a hub id; repeatable"] = field(
        default_factory=list
    )
    lora: Annotated[list[str], "judge the base with this LoRA, FILE[=WEIGHT], a file or hub id; repeatable"] = field(
        default_factory=list
    )
    vae: Annotated[str | None, "VAE of the students, a folder, hub id or file; default: their own"] = None
    num_steps: Annotated[
        str | None, "sampling steps of the students, as 1,2,4,8; default: those of their recipe, else 1,2,4,8"
    ] = None
    reference: Annotated[str, "what distributions are compared with: teacher:STEPS, or a folder of pictures"] = "teacher:25"
    baseline: Annotated[bool, "also judge the teacher at as many network calls as each student"] = True
    teacher_row: Annotated[
        list[str], 'another row of the undistilled teacher, as "scheduler=dpm++ steps=5 guidance=1,3,3,3,1"; repeatable'
    ] = field(default_factory=list)
    prompts: Annotated[str | None, "a file of prompts, one a line; default: those that ship with the family"] = None
    num_images: Annotated[int, "pictures per row of the table; prompts take turns (1000 for emoji)", Range(2)] = 500
    metrics: Annotated[str, "auto, or some of fid, patch, clip, lpips: metrics that need a network of their own"] = "auto"
    protocol: Annotated[Literal["coco30k-dmd", "coco10k-lightning", "coco5k-sdxs"] | None, "settings of a published protocol"] = (
        None
    )
    fid_px: Annotated[
        int | None, "side in pixels that pictures are resized to before FID (Lanczos); default: no resizing", Range(8)
    ] = None
    inception_weights: Annotated[str | None, "torch-fidelity's Inception-v3 file; default: downloaded (91 MB)"] = None
    clip: Annotated[str, "open_clip's MODEL:TAG, downloaded, or MODEL:FILE; CMMD is defined for the default's"] = CLIP
    lpips_weights: Annotated[str | None, "torchvision's VGG-16 file, or embedded; default: downloaded (528 MB)"] = None
    with_lora: Annotated[
        list[str], "style LoRA as FILE[=WEIGHT]: measure how much of the style the student keeps; repeatable"
    ] = field(default_factory=list)
    with_controlnet: Annotated[str | None, "ControlNet of the base: measure how much of its control the student keeps"] = None
    student_controlnet: Annotated[str | None, "ControlNet of the student, if it has its own"] = None
    control: Annotated[str, "extractor for control pictures: canny, or MODULE:FUNCTION"] = "canny"
    teacher_steps: Annotated[
        int | None, "sampling steps of the teacher; default: those of --reference teacher:STEPS, else 25", Range(1)
    ] = None
    teacher_guidance: Annotated[
        float | None, "guidance w of the teacher, u + w (c - u); default: as the family is usually sampled", Range(0)
    ] = None
    teacher_scheduler: Annotated[
        Literal["ddim", "euler", "dpm++", "dpm++sde", "lcm", "tcd"] | None,
        "sampler of the teacher; default: the recipe's of a few-step --base, else as the family is usually sampled",
    ] = None
    guidance_rescale: Annotated[
        float, "phi of Lin et al. 2024 where the teacher is guided; 0 = off, 0.7 for a zero-SNR base", Range(0, 1)
    ] = 0.0
    resolution: Annotated[int | None, "width and height in pixels; default: the size of the base", Range(8, multiple_of=8)] = None
    batch_size: Annotated[int | None, "pictures at once; default: fits a small card", Range(1)] = None
    seed: Annotated[int, "seed of the first picture", Range(0, 2**31)] = 0
    save_images: Annotated[bool, "keep every picture, in images/ROW/"] = False
    output: Annotated[str | None, "a folder; default runs/evaluate-<base>"] = field(default=None, metadata={"flags": ["-o"]})
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to sample"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA (fp16 before Ampere), else fp32"] = "auto"

    def __post_init__(self) -> None:
        if self.student and self.lora:
            raise UsageError("`student` and `lora`: two ways to say what is judged", "give LoRAs as `student`, or `lora` alone")
        if self.student_controlnet and not self.with_controlnet:
            raise UsageError(
                "`student_controlnet`: nothing to compare it with", "give `with_controlnet`, the ControlNet of the base, too"
            )
        if self.protocol and (self.reference_folder is None or not self.prompts):
            raise UsageError(
                f"{as_field('protocol', self.protocol)}: is measured against COCO's pictures and prompts",
                "give a folder as `reference` and a file as `prompts`",
            )
        unknown = set(self.asked) - set(METRIC_NETWORKS)
        if unknown:
            raise UsageError(
                f"{as_field('metrics', self.metrics)}: {sorted(unknown)[0]!r} is not one of auto, {', '.join(METRIC_NETWORKS)}"
            )
        _ = self.steps, self.reference_folder, [read_teacher_row(row) for row in self.teacher_row]

    @property
    def asked(self) -> list[str]:
        return [] if self.metrics == "auto" else [name.strip() for name in self.metrics.split(",") if name.strip()]

    @property
    def steps(self) -> tuple[int, ...] | None:
        if self.num_steps is None:
            return None
        try:
            numbers = tuple(int(n) for n in self.num_steps.split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1:
            raise UsageError(f"{as_field('num_steps', self.num_steps)}: whole numbers with commas, as 1,2,4,8")
        return numbers

    @property
    def reference_folder(self) -> Path | None:
        kind, _, steps = self.reference.partition(":")
        if kind == "teacher" and (not steps or (steps.isdecimal() and int(steps))):
            return None
        path = Path(self.reference).expanduser()
        if not path.is_dir():
            raise UsageError(f"{as_field('reference', self.reference)}: neither teacher:STEPS nor a folder of pictures")
        return path
