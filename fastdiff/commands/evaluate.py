"""The `evaluate` command: how good few-step models are, judged on pictures against their teacher, and never by a loss."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from fastdiff.checkpoints import checkpoint, tensors
from fastdiff.checkpoints.checkpoint import BaseConfig
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.models import perceptual
from fastdiff.models.remap import is_pruned
from fastdiff.quality import emoji as judge
from fastdiff.quality import metrics, networks, report, retention
from fastdiff.quality.distances import gap_closed
from fastdiff.quality.drift import REFERENCE_SEED
from fastdiff.quality.metrics import FIGURES, JUDGING, Against, Lens, Shown, measured
from fastdiff.quality.samples import Gallery
from fastdiff.runtime import console
from fastdiff.runtime.config import Range
from fastdiff.runtime.console import fmt
from fastdiff.runtime.disk import write_atomic
from fastdiff.runtime.errors import Result, UsageError
from fastdiff.sampling.assemble import Assembled, assemble, is_lora, load_loras, pick_device, pick_dtype
from fastdiff.sampling.sampler import DEFAULTS, Settings

EXAMPLES = """fastdiff evaluate --lora lcm.safetensors
fastdiff evaluate --student lcm.safetensors --student runs/dmd-emoji/dmd.safetensors --num-images 2000
fastdiff evaluate --base sdxl --lora lcm.safetensors --num-steps 1,2,4,8 --prompts prompts.txt --reference teacher:25
fastdiff evaluate --base sdxl --lora fast.safetensors --protocol coco10k-lightning --reference val2014 --prompts coco.txt
fastdiff evaluate --lora lcm.safetensors --with-lora style.safetensors"""

RESUMES = True  # every row is stored as soon as it was drawn: the same command goes on

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
PRESETS = {f"{family}:{name}": row for family in ("sd15", "sd21", "sdxl") for name, row in PROTOCOLS.items()}
# FID and KID; FID of the centre; CLIP score and CMMD; distances to the teacher's picture, and between seeds.
GROUPS = ("fid", "patch", "clip", "lpips")


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

    def teacher_settings(self, family: str) -> Settings:
        usual = DEFAULTS[family]
        steps = self.teacher_steps or (int(self.reference.partition(":")[2] or 25) if not self.reference_folder else 25)
        return replace(
            usual, num_steps=steps, guidance=usual.guidance if self.teacher_guidance is None else self.teacher_guidance
        )


# ---- what is sampled

FAST = dict(folded=True, identified=True)  # drawn with and nothing else, and kept by content
Opener = Callable[[Sequence[str], str | None], Assembled]  # (further LoRAs, ControlNet): opened when its turn comes


@dataclass
class Model:
    """Something that is judged."""

    name: str
    open: Opener
    ladder: list[Settings]


def name_of(spec: str) -> str:
    path = Path(spec)
    return path.parent.name if path.stem in {"model", "pytorch_lora_weights"} and path.parent.name else path.stem


def lora_on_base(config: Config, specs: Sequence[str], dtype: torch.dtype, device: torch.device) -> Opener:
    def opened(more: Sequence[str], guide: str | None) -> Assembled:
        base = config.open_base(dtype)
        worn = load_loras(base, [*specs, *more], remap=bool(more) and is_pruned(base), allow_pickle=config.allow_pickle)
        return assemble(base, worn, vae=config.vae, controlnet=guide, device=device, **FAST)

    return opened


def whole(config: Config, ref: str, dtype: torch.dtype, device: torch.device) -> Opener:
    def opened(more: Sequence[str], guide: str | None) -> Assembled:
        base = checkpoint.load(ref, dtype=dtype, allow_pickle=config.allow_pickle)
        worn = load_loras(base, more, remap=bool(more) and is_pruned(base), allow_pickle=config.allow_pickle)
        made = assemble(base, worn, vae=config.vae, controlnet=guide, device=device, **FAST)
        made.recipe = base.recipe  # a style's header does not say how its wearer is sampled
        return made

    return opened


def students(config: Config, family: str, dtype: torch.dtype, device: torch.device) -> list[Model]:
    """What was asked to be judged; nothing heavy is read yet. UsageError where one is of another family."""
    found: list[Model] = []
    for specs in [[spec] for spec in config.student] + ([config.lora] if config.lora else []):
        path = specs[0].partition("=")[0]
        if is_lora(path):
            recipe = Recipe.from_metadata(tensors.open_file(path).metadata)
            its, opener = recipe.family or family, lora_on_base(config, specs, dtype, device)
        elif config.lora:
            raise UsageError(f"--lora {path}: no LoRA file", "a checkpoint is given with --student")
        else:
            base = checkpoint.load(path, allow_pickle=config.allow_pickle)
            recipe, its, opener = base.recipe, base.family, whole(config, path, dtype, device)
        if its != family:
            raise UsageError(
                f"{'--lora' if config.lora else '--student'} {path}: of {its}, but --base is {family}", "give its base"
            )
        name, alike = name_of(path), sum(m.name.split(" #")[0] == name_of(path) for m in found)
        own = (recipe.num_steps,) if recipe.fixed and recipe.num_steps else (1, 2, 4, 8)
        ladder = [Settings.of(recipe, DEFAULTS[family], num_steps=n) for n in config.steps or own]
        found.append(Model(f"{name} #{alike + 1}" if alike else name, opener, ladder))
    return found


def ways(family: str, calls: int) -> list[Settings]:
    """How a teacher is sampled in so many network calls, guided and not: by the best stock solver, measured on `emoji`."""
    usual = DEFAULTS[family]
    found = [replace(usual, scheduler="ddim" if calls == 1 else "dpm++", num_steps=calls, guidance=1.0, spacing="trailing")]
    if calls > 1 and usual.guided:
        found.append(replace(usual, scheduler="dpm++", num_steps=calls // 2, spacing="trailing"))
    if family == "emoji":
        table = judge.Reference().table
        best = {index: table["rows"][index] for key, index in table["best"].items() if key.endswith(f".{calls}")}
        known = [Settings(row["solver"], row["num_steps"], row["guidance"], row["spacing"]) for row in best.values()]
        found = known + [way for way in found if way.guided not in {k.guided for k in known}]
    return found


# ---- what it is judged by


def open_lenses(config: Config, family: str, lines: list[str], resolution_px: int, device: torch.device) -> list[Lens]:
    """Those that were asked for; of `auto` those whose weights can be had, with a word on the others."""
    found: list[Lens] = [metrics.Embedded(lines, styles=bool(config.with_lora))] if family == "emoji" else []
    asked = config.asked or ([] if family == "emoji" else list(GROUPS))
    try:
        if {"fid", "patch"} & set(asked):
            net = networks.Inception(config.inception_weights)
            found += [metrics.Whole(net, device, config.fid_px)] if "fid" in asked else []
            found += [metrics.Centre(net, device)] if "patch" in asked and resolution_px > networks.PATCH_PX else []
    except UsageError as error:
        left_out(config, "fid", error)
    try:
        if "clip" in asked:
            found.append(metrics.ClipScore(networks.Clip(config.clip), device, lines))
            if config.clip != networks.CLIP and not config.protocol:
                console.info(f"--clip {config.clip}: CMMD is published with {networks.CLIP}")
    except UsageError as error:
        left_out(config, "clip", error)
    return found


def open_distance(config: Config, family: str) -> nn.Module | None:
    """Between two pictures: LPIPS, or on `emoji` the embedded network."""
    if config.asked and "lpips" not in config.asked and family != "emoji":
        return None
    try:
        return perceptual.open_distance(family, config.lpips_weights)
    except UsageError as error:
        left_out(config, "lpips", error)
        return None


def left_out(config: Config, name: str, error: UsageError) -> None:
    """What was asked for by name must be had; what `auto` would have measured too is left out with a warning."""
    if config.asked:
        raise error
    console.warn(f"{name} is not measured: {error}; {error.hint}")


def reference_of(config: Config, gallery: Gallery, made: Assembled, shown: Shown) -> Against:
    """The folder's pictures, or the teacher's of other seeds; for `emoji` its statistics are shipped."""
    if path := config.reference_folder:
        return Against(gallery.of_folder(path), shown)
    usual = made.sampler.base.family == "emoji" and shown.settings == DEFAULTS["emoji"] and not config.prompts
    told = {"embedded": judge.Reference().moments} if usual else {}
    if len(gallery.lenses) <= len(told):
        return Against({}, shown, told)
    other = gallery.show("reference", made, shown.settings, offset=REFERENCE_SEED)
    return Against(other.seen, shown, told)


def prompts_of(config: Config, family: str) -> list[str]:
    """One a picture, in turn; for `emoji` the judged list, which its closing tables use."""
    if family == "emoji" and not config.prompts:
        return judge.Prompts.judged(config.num_images).captions
    lines = read_prompts(Path(config.prompts)) if config.prompts else default_prompts(family)
    if config.protocol and len(lines) < config.num_images:
        console.warn(f"--protocol {config.protocol}: {config.num_images} prompts, but {config.prompts} has {len(lines)}")
    return [lines[i % len(lines)] for i in range(config.num_images)]


# ---- the table


def row_of(row: Shown, against: Against) -> dict[str, Any]:
    s = row.settings
    told = dict(model=row.model, solver=s.scheduler, spacing=s.spacing, num_steps=s.num_steps, guidance=s.guidance)
    return {**told, "calls": row.calls, **measured(row, against)}


def gaps(row: Shown, teachers: Sequence[Shown], against: Against) -> dict[str, Any]:
    """{figure: how much of the way from the teacher in as many calls to the teacher's many steps}, with its band."""
    equal, best = [t for t in teachers if t.calls == row.calls], against.teacher
    found = {}
    for figure in (f for f in FIGURES if f.name in JUDGING and f.known(row, against) and equal):
        metric = lambda r, i, f=figure: f.of(r, i, against)
        every = torch.arange(len(row))
        undistilled = (max if figure.better == "higher" else min)(equal, key=lambda t, m=metric: m(t, every))
        found[figure.name] = gap_closed(row, undistilled, best, metric, draws=figure.draws(len(row)))
    return found


def run(config: Config) -> Result:
    """The `evaluate` command."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    base = config.open_base(dtype)
    family, px = base.family, config.resolution or base.resolution_px
    judged, lines = students(config, family, dtype, device), prompts_of(config, family)
    output = Path(config.output or f"runs/evaluate-{Path(config.base).stem or config.base}")
    with console.timed("load_s"):
        looking, distance = open_lenses(config, family, lines, px, device), open_distance(config, family)
    if not looking and distance is None:
        console.warn("only drift is measured: no network that judges pictures is at hand")
    saved = output / "images" if config.save_images else None
    gallery = Gallery(lines, config.seed, px, looking, distance, device, config.batch_size, saved)
    guided = config.teacher_settings(family)
    made = assemble(base, device=device, **FAST)
    best = gallery.show("teacher", made, guided)
    against = reference_of(config, gallery, made, best)
    speed = {id(best): gallery.latency_ms(made, guided)}
    teachers: list[Shown] = []
    for calls in sorted({settings.calls for model in judged for settings in model.ladder}) if config.baseline else []:
        for settings in ways(family, calls):
            teachers.append(gallery.show("teacher", made, settings, beside=best))
            speed[id(teachers[-1])] = gallery.latency_ms(made, settings)
    del made, base  # before the next network is opened
    rows: list[Shown] = []
    for model in judged:
        made = model.open([], None)
        for settings in model.ladder:
            rows.append(gallery.show(model.name, made, settings, beside=best))
            speed[id(rows[-1])] = gallery.latency_ms(made, settings)
        del made
    order = [best, *sorted([*teachers, *rows], key=lambda row: row.calls)]
    with console.timed("figures_s"):
        table = [row_of(row, against) for row in order]
        closed = {f"{row.model} {row.settings.num_steps}": gaps(row, teachers, against) for row in rows}
    metrics: dict[str, Any] = {"samples": len(gallery), "reference": config.reference, "rows": table, "gap_closed": closed}
    teacher_model = Model("teacher", lora_on_base(replace(config, vae=None), [], dtype, device), [guided])
    if config.with_lora:
        metrics["style"] = retention.style(gallery, config.with_lora, teacher_model, judged, best, rows)
    if config.with_controlnet:
        nets = (config.with_controlnet, config.student_controlnet or config.with_controlnet)
        metrics["control"] = retention.controlled(gallery, nets, config.control, teacher_model, judged, rows)
    latency = [speed[id(row)] for row in order]
    console.state.timings |= {f"latency_ms/{row.title}": ms for row, ms in zip(order, latency, strict=True)}
    shown(metrics, latency)
    write_atomic(output / "metrics.json", json.dumps(console.jsonable(metrics), indent=2) + "\n")
    sheet = report.write(
        output, title=f"{config.base} and its students", metrics=metrics, rows=order, latency_ms=latency, lines=lines
    )
    return Result([output / "report.html", output / "metrics.json", sheet], metrics)


def shown(metrics: dict[str, Any], latency_ms: Sequence[float]) -> None:
    """The table on stderr: every figure with half the width of its band."""
    present = [f for f in FIGURES if any(f.name in row for row in metrics["rows"])]

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        low, high = row["band"].get(name, (row[name], row[name]))
        return fmt(row[name]) + (f" ±{(high - low) / 2:.2g}" if high > low else "")

    columns = ["model", "solver", "steps", "guidance", "calls", *(f.label for f in present), "ms"]
    lines = [
        [row["model"], row["solver"], *(fmt(row[k]) for k in ("num_steps", "guidance", "calls"))]
        + [cell(row, f.name) for f in present]
        + [f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"]
        for row, ms in zip(metrics["rows"], latency_ms, strict=True)
    ]
    console.table(f"{metrics['samples']} pictures a row; ± half of the 95 % band", columns, lines)
