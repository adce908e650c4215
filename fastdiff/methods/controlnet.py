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
from pathlib import Path

import torch
from torch import nn

from fastdiff.checkpoints import write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data import control
from fastdiff.data.batch import Batch, Data
from fastdiff.data.open import Needs
from fastdiff.diffusion import losses
from fastdiff.lora import adapters
from fastdiff.methods.shared.edges import Edges
from fastdiff.methods.shared.segmented import Segmented, planned
from fastdiff.models import controlnet, unet
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.controlnet import EXAMPLES, PRESETS, Config
from fastdiff.training.card import Usage, load_expression
from fastdiff.training.method import Load, Now, Phase, Trains, Turn, relative_size
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene


class DistilControlNet(Segmented):
    """Teacher and online model with the base's ControlNet, another UNet with a small one; players: student, fake (one step)."""

    name, Config, presets, examples = "distill-controlnet", Config, PRESETS, EXAMPLES
    writes_checkpoint = False

    def __init__(self, base: Checkpoint, config: Config) -> None:
        self.controlnet = controlnet.load(config.controlnet, base.unet_config)
        super().__init__(base, config)
        first = config.start(base)
        self.recipe = first.recipe
        net, small = first.unet.requires_grad_(False), controlnet.inheriting(self.controlnet, first.unet_config)
        if config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
            small.enable_gradient_checkpointing()
        kind = self.recipe.predicts(first.prediction_type)
        self.student = Denoiser(net, self.schedule, kind, controlnet=small)
        self.compared = [pair for pair in unet.feature_pairs(base.unet.config, first.unet_config) if pair[0].startswith("up_")]
        if config.one_step:
            self.fake_net = self.copied() if config.fake == "full" else None
            self.fake, self.fake_params = self.trained("fake", self.fake_net)
            self._open_matching(first)

    @classmethod
    def check(cls, config: Config) -> Config:
        """What cannot work is refused before anything is sampled."""
        control.extractor(config.control)
        base = config.open_base()
        controlnet.load(config.controlnet, base.unet_config)
        config.start(base)
        return config

    @classmethod
    def needs(cls, config: Config) -> Needs:
        return "pairs" if config.one_step else "latents"

    @classmethod
    def exhibit(cls, scene: Scene, config: Config) -> Edges:
        return Edges(scene, config)

    @classmethod
    def arrange(cls, scene: Scene, data: Data, exhibit: Edges, config: Config) -> Data:
        """Control pictures are taken out of the items' own; some items are held out."""
        control.of_samples(scene.base.vae.to(scene.device), data, exhibit.how)
        data, held_out = data.split(config.proof)
        exhibit.keep(held_out)
        return data

    @classmethod
    def load(cls, config: Config, base: Checkpoint) -> Load:
        """The encoder again, with its two small networks; teacher and student are two UNets where there is an `init`."""
        student = relative_size(base, config.open_student().unet_config) if config.init else 0.0
        return Load(0.4, config.one_step + 0.0, 1.4 + student, (student or 1) + 0.4, (student or 1) + 0.4, 1.4)

    def phases(self) -> list[Phase]:
        config = self.config
        if not config.one_step:
            return [Phase("", config.steps)]
        return planned(match=config.match_steps, distill=config.steps - config.match_steps)

    def players(self, phase: Phase) -> dict[str, Trains]:
        small = self.student.controlnet
        players = {"student": Trains(list(small.parameters()), averaged=True, net=small)}
        if phase.name == "distill":
            players["fake"] = Trains(self.fake_params, self.config.fake_lr, net=self.fake_net)
        return players

    def networks(self) -> list[nn.Module]:
        return super().networks() if self.config.one_step else [self.teacher, self.student]

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Section 3.2 for one step, section 3.1 for several."""
        if self.config.one_step:
            pairs = self._pairs(batch, now)
            yield self.turn(self.generated(batch, pairs, self.config.redraw), batch, now, pairs)
            return
        t = torch.randint(len(self.schedule), (len(batch.latents),), device=batch.latents.device)
        x_t = self.schedule.add_noise(batch.latents, torch.randn_like(batch.latents), t)
        mine, teachers = zip(*self.compared, strict=True)
        with torch.no_grad(), self.teacher.tap(teachers) as goals:
            goal = self.teacher(x_t, t, batch.cond)
        with self.student.tap(mine) as features:
            p = self.student(x_t, t, batch.cond)
        terms = {"out": losses.squared(*(self.schedule.output(q, t, self.student.kind) for q in (p, goal)))}
        if self.config.lambda_feat:
            terms["feat"] = self.config.lambda_feat * losses.features([features[k] for k in mine], [goals[k] for k in teachers])
        yield {"student": terms}

    def export(self, run: Run) -> None:
        """The folder `controlnet`: stock ControlNetModel."""
        write.network_to_folder(self.student.controlnet, run.folder / "controlnet")
        run.wrote(run.folder / "controlnet")

    def usage(self, weights: Path, base: Checkpoint) -> Usage:
        of, settings = self.config.open_student(), self.settings()
        kind = of.family.controlnet_pipeline
        return Usage(
            title=f"controlnet: {self.config.control} for {of.ref}",
            tags="controlnet",
            sampling=f"{settings.scheduler}, steps: {settings.num_steps}, guidance {settings.guidance}",
            imports=f"ControlNetModel, {kind}",
            code='controlnet = ControlNetModel.from_pretrained("controlnet")\n'
            f"pipe = {load_expression(of, kind, ', controlnet=controlnet')}",
            picture="control, the base with its ControlNet, this one",
            method=f"distilled from {self.config.controlnet} (SDXS)",
            licence="that of the base model and of the ControlNet that it was distilled from",
        )

    def sample_options(self, weights: Path, base: Checkpoint) -> dict[str, str]:
        return {
            "base": self.config.init or self.config.base,
            "controlnet": str(weights),
            "control_image": "picture.png",
            "control": self.config.control,
        }
