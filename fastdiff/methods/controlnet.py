"""A ControlNet for a small or a one-step UNet, from one of the base (Song et al. 2024, SDXS, sections 3.1 and 3.2).

    multi-step  teacher: the base with its ControlNet       student: the small UNet, frozen, with a small ControlNet that trains
        out  = |student - teacher|^2                                      in what the networks put out
        feat = sum over up blocks |f_student - f_teacher|^2 / var         a ControlNet changes no encoder, so decoders alone
    one step    x = G(z, t_gen; control of y),  y the teacher's sample from z: noise, picture and control are a triple
        loss = along(g) + lambda FM, as in `sdxs`, with the base's ControlNet on both scores, frozen
        --redraw: part of z is drawn anew, so that the control and not the noise must say where things are

Control pictures are taken out of the teacher's own decoded samples by a library's extractor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data import control
from fastdiff.data.batch import Batch, Encoded
from fastdiff.data.open import Wants
from fastdiff.diffusion import losses
from fastdiff.lora import adapters
from fastdiff.methods.shared import segmented
from fastdiff.methods.shared.segmented import Segmented, SegmentedConfig, phases
from fastdiff.models import controlnet, unet
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime import console
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import Result, UsageError
from fastdiff.sampling.pictures import contact_sheet, uint8
from fastdiff.sampling.sampler import DEFAULTS, Sampler, Settings
from fastdiff.training.card import write_controlnet_card
from fastdiff.training.method import Phase, Turn
from fastdiff.training.previews import vae_of
from fastdiff.training.run import Run
from fastdiff.training.session import data_of, open_session

CARD = dict(segmented.CARD, match_steps=0)
PRESETS = {
    "emoji": dict(segmented.EMOJI, controlnet="emoji", lr=5e-4, steps=300, match_steps=0),
    "sd15": dict(**CARD, guidance=7.5),
    "sd21": dict(**CARD, guidance=7.5),
    "sdxl": dict(CARD, batch_size=1, grad_accum=32, guidance=7.5),
}
EXAMPLES = """fastdiff distill-controlnet --init runs/prune-emoji/model
fastdiff distill-controlnet --base sd21 --controlnet owner/canny --init runs/prune-sd21/model --prompts prompts.txt
fastdiff distill-controlnet --base sd21 --controlnet owner/canny --init runs/sdxs-sd21/model --one-step"""


@dataclass
class Config(SegmentedConfig):
    PANEL: ClassVar[str] = "ControlNet"

    controlnet: Annotated[str | None, "ControlNet of the base: a diffusers folder, a hub id, or emoji"] = None
    control: Annotated[str, "what takes control pictures out of pictures: canny, or MODULE:FUNCTION"] = "canny"
    one_step: Annotated[bool, "for an --init that draws in one step; its UNet stays as it is"] = False
    lambda_feat: Annotated[float, "several steps: weight of the decoders' features; 0 = none", Range(0)] = 1.0
    redraw: Annotated[float, "one step: share of the noise that is drawn anew", Range(0, 1)] = 0.0
    proof: Annotated[int, "items kept out of training for the closing figures, at most a quarter", Range(1, 2000)] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every:
            raise UsageError("--eval-every: has no use for a ControlNet", "--preview-every shows how it gets on")
        if self.buckets:
            raise UsageError("--buckets: has no use for a ControlNet here", "control pictures are squares of --resolution")
        if self.one_step and not self.init:
            raise UsageError("--one-step: needs the checkpoint that draws in one step", "give it as --init")
        if self.one_step and self.match_steps > self.steps:
            raise UsageError(f"--match-steps {self.match_steps}: more than --steps {self.steps}")
        if self.redraw and not self.one_step:
            raise UsageError(f"--redraw {self.redraw:g}: is of --one-step", "several steps start from noised pictures")
        if not self.controlnet:
            raise UsageError("--controlnet: which one of the base?", "a diffusers folder or a hub id")

    @property
    def wants(self) -> Wants:
        return "pairs" if self.one_step else "latents"

    def start(self, base: Checkpoint) -> Checkpoint:
        first = super().start(base)
        if self.one_step and first.recipe.num_steps != 1:
            raise UsageError(f"--one-step: {self.init} does not draw in one step", "`fastdiff sdxs` makes one that does")
        return first


class DistilControlNet(Segmented):
    """Teacher and online model with the base's ControlNet, another UNet with a small one; players: student, fake (one step)."""

    def __init__(self, base: Checkpoint, config: Config) -> None:
        self.controlnet = controlnet.load(config.controlnet, base.unet_config)
        super().__init__(base, config)
        self.parent, first = checkpoint.fingerprint(base.unet), config.start(base)
        self.recipe = first.recipe
        net, small = first.unet.requires_grad_(False), controlnet.inheriting(self.controlnet, first.unet_config)
        if config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
            small.enable_gradient_checkpointing()
        kind = self.recipe.predicts(first.prediction_type)
        self.student = Denoiser(net, self.schedule, kind, controlnet=small)
        self.players: dict[str, nn.Module] = {"student": small}
        self.compared = [pair for pair in unet.feature_pairs(base.unet.config, first.unet_config) if pair[0].startswith("up_")]
        if config.one_step:
            self.fake, self.fake_params = self.trained("fake", self.copied() if config.fake == "full" else None)
            self.rates = {"fake": config.fake_lr or config.lr}
            self.watch(first)
            self.phases = phases(match=config.match_steps, distill=config.steps - config.match_steps)

    def enter(self, part: Phase) -> None:
        self.part = part
        if part.name == "distill":
            self.players["fake"] = nn.ParameterList(self.fake_params)

    def losses(self, batch: Batch, step: int) -> Iterator[Turn]:
        """Section 3.2 for one step, section 3.1 for several."""
        if self.config.one_step:
            pairs = self.pairs(batch)
            yield self.turn(self.made(batch, pairs, self.config.redraw), batch, step, pairs)
            return
        t = torch.randint(len(self.schedule), (len(batch.latents),), device=batch.latents.device)
        x_t = self.schedule.add_noise(batch.latents, torch.randn_like(batch.latents), t)
        mine, its = zip(*self.compared, strict=True)
        with torch.no_grad(), self.teacher.tap(its) as goals:
            goal = self.teacher(x_t, t, batch.cond)
        with self.student.tap(mine) as features:
            p = self.student(x_t, t, batch.cond)
        terms = {"out": losses.squared(*(self.schedule.output(q, t, self.student.kind) for q in (p, goal)))}
        if self.config.lambda_feat:
            terms["feat"] = self.config.lambda_feat * losses.features([features[k] for k in mine], [goals[k] for k in its])
        yield {"student": terms}

    def updated(self, step: int) -> None: ...

    def export(self, run: Run) -> None:
        """The folder `controlnet`: stock ControlNetModel."""
        write.network_to_folder(self.student.controlnet, run.folder / "controlnet")
        run.wrote(run.folder / "controlnet")

    def settings(self, who: Denoiser) -> Settings:
        """How teacher or student are sampled."""
        usual = DEFAULTS[self.base_model.family]
        return usual if who is self.teacher or not self.recipe.scheduler else Settings.of(self.recipe, usual)


class Rows:
    """Items that were kept out of training: their texts, seeds and control pictures."""

    def __init__(self, base: Checkpoint, vae: nn.Module, kept: Encoded, config: Config, device: torch.device) -> None:
        self.base, self.vae, self.device, self.config = base, vae, device, config
        self.how, self.controls, self.uncond = control.extractor(config.control), kept.controls, kept.uncond
        self.cond = kept.texts[kept.captions[:, 0]]
        self.px = config.resolution or base.resolution_px

    def draw(self, method: DistilControlNet, who: Denoiser, controls: Tensor | None, n: int | None = None) -> Tensor:
        """Pictures (N, 3, H, W) on the CPU, item i from seed i."""
        cond = self.cond[:n]
        if controls is not None:
            cond = cond.with_control((controls[:n].float() / 255).expand(-1, 3, -1, -1))
        sampler, seeds = Sampler.of_networks(self.base, who, self.vae, device=self.device), list(range(len(cond)))
        return sampler.pixels(cond, self.uncond, seeds, method.settings(who), resolution_px=self.px, batch=8)

    def agreement(self, pictures: Tensor, controls: Tensor) -> float:
        """Mean F1 of the pictures' edges and the control's."""
        return control.agreement(control.extract(uint8(pictures), self.how), controls).mean().item()

    def sheet(self, method: DistilControlNet) -> Any:
        """Control | teacher | student, six of them."""
        shown = (self.controls[:6].float() / 127.5 - 1).expand(-1, 3, -1, -1)
        drawn = [self.draw(method, who, self.controls, 6) for who in (method.teacher, method.student)]
        return contact_sheet([shown, *drawn], scale=max(1, 128 // self.px))

    def figures(self, method: DistilControlNet) -> dict[str, Any]:
        """How well the control is kept, and whether it does anything: off, and with another item's."""
        others = self.controls.roll(1, 0)
        teacher = self.draw(method, method.teacher, self.controls)
        on, off, other = (self.draw(method, method.student, c) for c in (self.controls, None, others))
        found = {
            "edges_teacher": self.agreement(teacher, self.controls),
            "edges_student": self.agreement(on, self.controls),
            "edges_student_off": self.agreement(off, self.controls),
            "edges_other_control": self.agreement(other, others),
            "change_off": (on - off).abs().mean().item(),
            "change_other_control": (on - other).abs().mean().item(),
        }
        return {"items": len(on), **found, "edges_kept": found["edges_student"] / max(found["edges_teacher"], 1e-9)}


METHOD = DistilControlNet


def run(config: Config) -> Result:
    """The `distill-controlnet` command."""
    how = control.extractor(config.control)  # what cannot work is told before anything is sampled
    base = config.open_base()
    controlnet.load(config.controlnet, base.unet_config)
    config.start(base)
    session = open_session("distill-controlnet", config)
    base, run, device = session.base, session.run, session.accelerator.device
    with console.timed("data_s"):
        data = data_of(base, config, device)
        base.vae.to(device)
        control.of_samples(base.vae, data, how)
        data, kept = data.split(config.proof)
        vae = vae_of(base, config)
        base.release("text_encoders", "tokenizers", "vae")
    base.unet.to(device)
    method = DistilControlNet(base, config)
    rows = Rows(base, vae, kept, config, device)
    trainer = session.fit(method, data, lambda: rows.sheet(method))
    if not session.accelerator.is_main_process:
        return Result()
    with console.timed("proof_s"):
        made = controlnet.load(str(run.folder / "controlnet"), method.student.net.config)
        method.student.controlnet = made.to(device)
        metrics = {"steps": trainer.step, **rows.figures(method)}
    table = [[k, f"{v:.4g}"] for k, v in metrics.items()]
    console.table(
        f"edges of the control and of {metrics['items']} pictures (F1), and what the control changes", ["figure", "value"], table
    )
    write_controlnet_card(run, base, config, method.settings(method.student), metrics)
    where = f"--base {config.init or config.base} --controlnet {run.folder / 'controlnet'}"
    return Result(
        run.outputs,
        metrics,
        f'fastdiff sample {where} --control-image picture.png --control {config.control} --prompt "red apple"',
    )
