"""The `evaluate` command: how good few-step models are, judged on pictures against their teacher, and never by a loss."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from fastdiff.checkpoints import checkpoint, tensors
from fastdiff.checkpoints.checkpoint import BaseConfig
from fastdiff.checkpoints.family import FAMILIES, Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.prompts import read_prompts
from fastdiff.models.remap import is_pruned
from fastdiff.quality import networks, retention
from fastdiff.quality.evaluation import Evaluation, Model, known_moments, ladder_of, prompts_of
from fastdiff.quality.features import GROUPS, ClipFeatures, open_distance, open_extractors
from fastdiff.runtime import console
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.config import Range
from fastdiff.runtime.disk import write_atomic
from fastdiff.runtime.errors import Result, UsageError
from fastdiff.sampling.assemble import is_lora, pick_device, pick_dtype
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

EXAMPLES = """fastdiff evaluate --lora lcm.safetensors
fastdiff evaluate --student lcm.safetensors --student runs/dmd-emoji/dmd.safetensors --num-images 2000
fastdiff evaluate --base sdxl --lora lcm.safetensors --num-steps 1,2,4,8 --prompts prompts.txt --reference teacher:25
fastdiff evaluate --base sdxl --lora fast.safetensors --protocol coco10k-lightning --reference val2014 --prompts coco.txt
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
PRESETS = {f"{family}:{name}": row for family, of in FAMILIES.items() if of.published for name, row in PROTOCOLS.items()}


@dataclass
class Config(BaseConfig):
    VARIANT: ClassVar[str] = "protocol"

    student: Annotated[list[str], "a LoRA, a checkpoint folder or a file that is judged; repeat it for more"] = field(
        default_factory=list
    )
    lora: Annotated[list[str], "FILE[=WEIGHT]: the student is the base with these; repeat it for more"] = field(
        default_factory=list
    )
    vae: Annotated[str | None, "VAE of the students, as a tiny decoder; default: their own"] = None
    num_steps: Annotated[str | None, "steps of the students, as 1,2,4,8; default: their recipe's, or these"] = None
    reference: Annotated[str, "teacher:STEPS, or a folder of pictures: what distributions are compared with"] = "teacher:25"
    baseline: Annotated[bool, "also judge the teacher in as many network calls as each student"] = True
    prompts: Annotated[str | None, "a file of prompts, one a line; default: those that ship with the family"] = None
    num_images: Annotated[int, "pictures a row, of the prompts in turn", Range(2)] = 500
    metrics: Annotated[str, "auto, or of fid, patch, clip, lpips: those that need a network besides the base"] = "auto"
    protocol: Annotated[Literal["coco30k-dmd", "coco10k-lightning", "coco5k-sdxs"] | None, "of a paper: sets what it says"] = None
    fid_px: Annotated[int | None, "pictures are resized to this before FID, by Lanczos; default: not", Range(8)] = None
    inception_weights: Annotated[str | None, "torch-fidelity's Inception-v3 file; default: downloaded (91 MB)"] = None
    clip: Annotated[str, "open_clip's MODEL:TAG, downloaded, or MODEL:FILE; CMMD is defined for the default's"] = networks.CLIP
    lpips_weights: Annotated[str | None, "torchvision's VGG-16 file, or embedded; default: downloaded (528 MB)"] = None
    with_lora: Annotated[list[str], "FILE[=WEIGHT]: how much of this style the student keeps; repeat it for more"] = field(
        default_factory=list
    )
    with_controlnet: Annotated[str | None, "how much of this ControlNet's control the student keeps"] = None
    student_controlnet: Annotated[str | None, "the student's own ControlNet, where it has one"] = None
    control: Annotated[str, "takes controls out of the teacher's pictures: canny, or MODULE:FUNCTION"] = "canny"
    teacher_steps: Annotated[int | None, "of the teacher where the reference is a folder; default 25", Range(1)] = None
    teacher_guidance: Annotated[float | None, "u + w (c - u); default: the family's own", Range(0)] = None
    resolution: Annotated[int | None, "pixels a side; default: the family's own", Range(8, multiple_of=8)] = None
    batch_size: Annotated[int | None, "pictures at once; default: as many as a modest card takes", Range(1)] = None
    seed: Annotated[int, "of the first picture", Range(0, 2**31)] = 0
    save_images: Annotated[bool, "keep every picture, in images/ROW/"] = False
    output: Annotated[str | None, "a folder; default runs/evaluate-<base>"] = field(default=None, metadata={"flags": ["-o"]})
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to sample"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA, else fp32"] = "auto"

    def __post_init__(self) -> None:
        if self.student and self.lora:
            raise UsageError("--student and --lora: two ways to say what is judged", "give LoRAs to --student, or --lora alone")
        if self.student_controlnet and not self.with_controlnet:
            raise UsageError("--student-controlnet: nothing to compare it with", "give --with-controlnet, the base's, too")
        if self.protocol and (self.reference_folder is None or not self.prompts):
            raise UsageError(
                f"--protocol {self.protocol}: is measured against COCO's pictures and prompts",
                "give --reference FOLDER and --prompts FILE",
            )
        unknown = set(self.asked) - set(GROUPS)
        if unknown:
            raise UsageError(f"--metrics {self.metrics}: {sorted(unknown)[0]!r} is not one of auto, {', '.join(GROUPS)}")
        _ = self.steps, self.reference_folder

    @property
    def asked(self) -> list[str]:
        return [] if self.metrics == "auto" else [name.strip() for name in self.metrics.split(",") if name.strip()]

    @property
    def steps(self) -> tuple[int, ...] | None:
        if self.num_steps is None:
            return None
        try:
            found = tuple(int(n) for n in self.num_steps.split(","))
        except ValueError:
            found = ()
        if not found or min(found) < 1:
            raise UsageError(f"--num-steps {self.num_steps}: whole numbers with commas, as 1,2,4,8")
        return found

    @property
    def reference_folder(self) -> Path | None:
        kind, _, steps = self.reference.partition(":")
        if kind == "teacher" and (not steps or (steps.isdecimal() and int(steps))):
            return None
        path = Path(self.reference).expanduser()
        if not path.is_dir():
            raise UsageError(f"--reference {self.reference}: neither teacher:STEPS nor a folder of pictures")
        return path

    def teacher_settings(self, family: Family) -> Settings:
        usual = Settings.usual(family)
        steps = self.teacher_steps or (int(self.reference.partition(":")[2] or 25) if not self.reference_folder else 25)
        return replace(
            usual, num_steps=steps, guidance=usual.guidance if self.teacher_guidance is None else self.teacher_guidance
        )


# ---- what is sampled

FAST = dict(compile="off", identified=True)  # kept by content
Opener = Callable[[Sequence[str], str | None], Sampler]  # (further LoRAs, ControlNet): opened when its turn comes


def name_of(spec: str) -> str:
    path = Path(spec)
    return path.parent.name if path.stem in {"model", "pytorch_lora_weights"} and path.parent.name else path.stem


def lora_on_base(config: Config, specs: Sequence[str], dtype: torch.dtype, device: torch.device) -> Opener:
    def opened(more: Sequence[str], guide: str | None) -> Sampler:
        base = config.open_base(dtype)
        how = dict(remap=bool(more) and is_pruned(base), allow_pickle=config.allow_pickle)
        return Sampler(base, loras=[*specs, *more], vae=config.vae, controlnet=guide, device=device, **how, **FAST)

    return opened


def whole(config: Config, ref: str, dtype: torch.dtype, device: torch.device) -> Opener:
    def opened(more: Sequence[str], guide: str | None) -> Sampler:
        base = checkpoint.load(ref, dtype=dtype, allow_pickle=config.allow_pickle)
        how = dict(remap=bool(more) and is_pruned(base), allow_pickle=config.allow_pickle)
        made = Sampler(base, loras=list(more), vae=config.vae, controlnet=guide, device=device, **how, **FAST)
        made.recipe = base.recipe  # a style's header does not say how its wearer is sampled
        return made

    return opened


def students(config: Config, family: Family, dtype: torch.dtype, device: torch.device) -> list[Model]:
    """What was asked to be judged; nothing heavy is read yet. UsageError where one is of another family."""
    models: list[Model] = []
    for specs in [[spec] for spec in config.student] + ([config.lora] if config.lora else []):
        path = specs[0].partition("=")[0]
        if is_lora(path):
            recipe = Recipe.from_metadata(tensors.open_file(path).metadata)
            own_family, opener = recipe.family or family.name, lora_on_base(config, specs, dtype, device)
        elif config.lora:
            raise UsageError(f"--lora {path}: no LoRA file", "a checkpoint is given with --student")
        else:
            base = checkpoint.load(path, allow_pickle=config.allow_pickle)
            recipe, own_family, opener = base.recipe, base.family.name, whole(config, path, dtype, device)
        if not family.has_name(own_family):
            flag = "--lora" if config.lora else "--student"
            raise UsageError(f"{flag} {path}: of {own_family}, but --base is {family}", "give its base")
        name, alike = name_of(path), sum(m.name.split(" #")[0] == name_of(path) for m in models)
        ladder = ladder_of(recipe, family, config.steps)
        models.append(Model(f"{name} #{alike + 1}" if alike else name, opener, ladder))
    return models


def open_evaluation(config: Config, family: Family, resolution_px: int, device: torch.device, save_to: Path | None) -> Evaluation:
    """The prompts, and what their pictures are judged by."""
    lines = prompts_of(family, config.prompts, config.num_images)
    if config.protocol and (there := len(read_prompts(Path(config.prompts)))) < config.num_images:
        console.warn(f"--protocol {config.protocol}: {config.num_images} prompts, but {config.prompts} has {there}")
    with console.timed("load_s"):
        extractors = open_extractors(
            family,
            lines,
            resolution_px=resolution_px,
            device=device,
            asked=config.asked,
            styles=bool(config.with_lora),
            fid_px=config.fid_px,
            inception_weights=config.inception_weights,
            clip=config.clip,
        )
        distance = open_distance(family, asked=config.asked, lpips_weights=config.lpips_weights)
    if config.clip != networks.CLIP and not config.protocol and any(isinstance(e, ClipFeatures) for e in extractors):
        console.info(f"--clip {config.clip}: CMMD is published with {networks.CLIP}")
    if not extractors and distance is None:
        console.warn("only drift is measured: no network that judges pictures is at hand")
    return Evaluation(
        lines,
        extractors,
        distance,
        resolution_px=resolution_px,
        device=device,
        first_seed=config.seed,
        batch=config.batch_size,
        save_to=save_to,
    )


def run(config: Config) -> Result:
    """The `evaluate` command."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    base = config.open_base(dtype)
    family, models = base.family, students(config, base.family, dtype, device)
    output = Path(config.output or f"runs/evaluate-{Path(config.base).stem or config.base}")
    saved = output / "images" if config.save_images else None
    evaluation = open_evaluation(config, family, config.resolution or base.resolution_px, device, saved)
    guided = config.teacher_settings(family)
    teacher = Model("teacher", lora_on_base(replace(config, vae=None), [], dtype, device), [guided])
    report = evaluation.compare(
        teacher,
        models,
        reference=config.reference_folder or config.reference,
        moments=known_moments(family, guided, config.prompts),
        baseline=config.baseline,
    )
    metrics = report.metrics | {"reference": config.reference}
    if config.with_lora:
        metrics["style"] = retention.style(evaluation, config.with_lora, teacher, models)
    if config.with_controlnet:
        nets = (config.with_controlnet, config.student_controlnet or config.with_controlnet)
        metrics["control"] = retention.controlled(evaluation, nets, config.control, teacher, models)
    report.metrics = metrics
    latency = zip(report.drawn, report.latency_ms, strict=True)
    console.state.timings |= {f"latency_ms/{row.title}": ms for row, ms in latency}
    report.show()
    write_atomic(output / "metrics.json", json.dumps(console.jsonable(metrics), indent=2) + "\n")
    sheet = report.save(output, f"{config.base} and its students")
    return Result([output / "report.html", output / "metrics.json", sheet], metrics)


# Every row is stored as soon as it was drawn: the same command goes on.
COMMAND = Runnable(Config, run, PRESETS, examples=EXAMPLES, resumes=True)
