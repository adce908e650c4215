"""Distils the base's ControlNet into one for a small or a one-step UNet (Song et al. 2024, SDXS, sections 3.1 and 3.2).

    multi-step  teacher: the base with its ControlNet       student: the small UNet, frozen, with a small ControlNet that trains
        out  = |student - teacher|^2                                      of the networks' own outputs
        feat = sum over up blocks |f_student - f_teacher|^2 / var         a ControlNet changes no encoder, so decoders alone
    one step    x = G(z, t_gen; control of y),  y the teacher's sample from z: noise, picture and control are a triple
        loss = along(g) + lambda FM, as in `sdxs`, with the base's ControlNet on both scores, frozen
        `redraw` draws a part of z anew, so that the student must learn from the control, not from the noise, where things are

Control pictures are extracted from the teacher's own decoded samples, by OpenCV's Canny or a function of the user's.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fastdiff.checkpoints import write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data import control
from fastdiff.data.batch import Batch, Data, Encoded
from fastdiff.data.open import Needs
from fastdiff.diffusion import losses
from fastdiff.lora import adapters
from fastdiff.methods.shared.edges import Edges
from fastdiff.methods.shared.segmented import Segmented
from fastdiff.models import controlnet, unet
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.controlnet import EXAMPLES, PRESETS, Config
from fastdiff.options.controlnet import Config as Options
from fastdiff.runtime import console
from fastdiff.sampling.sampler import drawing
from fastdiff.training.base_code import load_expression, openers
from fastdiff.training.card import Usage, code_of
from fastdiff.training.method import Load, Now, Phase, Trains, Turn, planned, relative_size
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene


class DistilControlNet(Segmented):
    """ControlNet distillation. Teacher and online model use the base's ControlNet; the student's UNet has a small one.

    Players: `student`, which is the small ControlNet, and with `one_step` in phase `distill` also `fake`, the online model.
    """

    config: Options

    name, Config, presets, examples = "distill-controlnet", Config, PRESETS, EXAMPLES
    writes_checkpoint = False

    def __init__(self, base: Checkpoint, config: Options) -> None:
        from diffusers.models import ControlNetModel

        assert config.controlnet is not None, "refused by the config"
        self.controlnet = controlnet.load(config.controlnet, base.unet_config)
        super().__init__(base, config)
        first = config.start(base)
        self.recipe = first.recipe
        net, small = first.unet.requires_grad_(False), controlnet.inheriting(self.controlnet, first.unet_config)
        if config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
            assert isinstance(small, ControlNetModel)
            small.enable_gradient_checkpointing()
        kind = self.recipe.predicts(first.prediction_type)
        self.student = Denoiser(net, self.schedule, kind, controlnet=small)
        pairs = unet.feature_pairs(base.unet.config, first.unet_config)  # type: ignore[arg-type]  # diffusers' config is a dict
        self.compared = [pair for pair in pairs if pair[0].startswith("up_")]
        if config.one_step:
            self.fake_net = self.copied() if config.fake == "full" else None
            self.fake, self.fake_params = self.trained("fake", self.fake_net)
            self._open_matching(first)

    @classmethod
    def check(cls, config: Options) -> Options:
        """Check the extractor, the ControlNet and `init` now, so that wrong ones fail before anything is sampled."""
        control.extractor(config.control)
        if not config.init:
            console.warn("without `init` the student is a copy of its teacher, and has nothing to learn")
        base = config.open_base()
        assert config.controlnet is not None, "refused by the config"
        controlnet.load(config.controlnet, base.unet_config)
        config.start(base)
        return config

    @classmethod
    def needs(cls, config: Options) -> Needs:
        return "pairs" if config.one_step else "latents"

    @classmethod
    def exhibit(cls, scene: Scene, config: Options) -> Edges:
        return Edges(scene, config)

    @classmethod
    def arrange(cls, scene: Scene, data: Data, exhibit: Edges, config: Options) -> Data:
        """Extract a control picture from every item, and hold out items for the closing figures."""
        assert isinstance(data, Encoded), "`buckets` is refused by the config"
        vae = drawing(scene.base, scene.base.vae, scene.device)
        control.of_samples(vae, data, exhibit.how)
        if exhibit.unseen is None:
            data, held_out = data.split(config.proof)
        else:
            held_out = exhibit.unseen
            control.of_samples(vae, held_out, exhibit.how)
        exhibit.keep(held_out)
        return data

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        """Return the cost of a step: a ControlNet is 0.4 of a UNet, and with `init` the student's UNet is a second one."""
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
        """Compute the losses of section 3.2 for a one-step student, or of section 3.1 for several steps."""
        if self.config.one_step:
            pairs = self.paired(len(batch.latents), now)
            yield self.turn(self.generated(batch, pairs, self.config.redraw), batch, now, pairs)
            return
        t = torch.randint(len(self.schedule), (len(batch.latents),), device=batch.latents.device)
        x_t = self.schedule.add_noise(batch.latents, torch.randn_like(batch.latents), t)
        student_names, teacher_names = [s for s, _ in self.compared], [t for _, t in self.compared]
        with torch.no_grad(), self.teacher.tap(teacher_names) as teacher_features:
            goal = self.teacher(x_t, t, batch.cond)
        with self.student.tap(student_names) as features:
            p = self.student(x_t, t, batch.cond)
        terms = {"out": losses.squared(*(self.schedule.output(q, t, self.student.kind) for q in (p, goal)))}
        if self.config.lambda_feat:
            both = [features[k] for k in student_names], [teacher_features[k] for k in teacher_names]
            terms["feat"] = self.config.lambda_feat * losses.features(*both)
        yield {"student": terms}

    def export(self, run: Run) -> None:
        """Write the folder `controlnet`, a ControlNetModel that stock diffusers loads."""
        write.network_to_folder(self.student.controlnet, run.folder / "controlnet")
        run.wrote(run.folder / "controlnet")

    def usage(self, weights: Path, base: Checkpoint) -> Usage:
        of, settings = self.config.open_student(), self.settings()
        kind, side = of.family.controlnet_pipeline, of.resolution_px
        opening = [
            f'control = diffusers.utils.load_image("control.png").resize(({side}, {side}))  # {self.config.control} of a picture',
            'controlnet = ControlNetModel.from_pretrained("controlnet")',
            f"pipe = {load_expression(of, weights.parent, kind, ', controlnet=controlnet')}",
        ]
        classes = ["ControlNetModel", *openers(of, kind)]
        code = code_of(
            weights, of, self.recipe, opening=opening, imports=classes, modules=["diffusers"], arguments=", image=control"
        )
        return Usage(
            title=f"controlnet: {self.config.control} for {of.ref}",
            tags="controlnet",
            sampling=f"{settings.scheduler}, steps: {settings.num_steps}, guidance {settings.guidance}",
            code=code,
            picture="control, the base with its ControlNet, this one",
            method=f"distilled from {self.config.controlnet} (SDXS)",
            licence="that of the base model and of the ControlNet that it was distilled from",
        )

    def sample_options(self, weights: Path, base: Checkpoint) -> dict[str, str | bool]:
        of = self.config.open_student()
        return {
            "base": of.ref,
            **of.opening,
            "controlnet": str(weights),
            "control_image": "picture.png",
            "control": self.config.control,
        }
