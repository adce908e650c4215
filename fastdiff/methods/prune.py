"""Removes blocks of a UNet and distils what is left (BK-SDM, Kim et al. 2023; the first step of SDXS, Song et al. 2024).

    student  a UNet of fewer blocks, each of its layers a copy of one of the teacher's            models/unet.py
    x_t    = alpha_t x0 + sigma_t eps,  t uniform
    out    = |student(x_t, t, c) - teacher(x_t, t, c)|^2              of the networks' own outputs     BK-SDM eq. 2
    feat   = sum over blocks |f_student - f_teacher|^2 / var(f_teacher)     [ours: / var; raw = BK-SDM eq. 3]
    task   = |student - eps|^2     the denoising loss                              BK-SDM eq. 1; SDXS has none
    loss   = out + lambda_feat feat + lambda_task task

A pruned checkpoint is sampled and trained like its parent: it can be the `base` of any command.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.lora import adapters
from fastdiff.methods.shared import cutting
from fastdiff.models import unet
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.prune import EXAMPLES, PRESETS, Config, speed
from fastdiff.options.prune import Config as Options
from fastdiff.runtime.disk import write_atomic
from fastdiff.runtime.errors import Result
from fastdiff.sampling.assemble import pick_device
from fastdiff.training.card import Usage, usage_like_base
from fastdiff.training.method import Load, Method, Now, Phase, Trains, Turn, relative_size
from fastdiff.training.run import Run
from fastdiff.training.session import default_folder


class Prune(Method):
    """Pruning with distillation. The one player is `student`, a smaller UNet that trains as a whole."""

    name, Config, presets, examples = "prune", Config, PRESETS, EXAMPLES
    baseline = "student"  # closing figures show what training recovers of the cut network's loss

    def __init__(self, base: Checkpoint, config: Options) -> None:
        super().__init__(base, config)
        self.layout = layout = cutting.layout_of(base, config.layout)
        net = unet.inheriting(base.unet, layout)
        if config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        self.student = Denoiser(net, self.schedule, base.prediction_type)
        self.feature_pairs = unet.feature_pairs(base.unet.config, layout) if config.lambda_feat else []  # type: ignore[arg-type]  # diffusers' is a dict
        self.recipe = Recipe(
            method=self.name, family=base.family.name, clip_skip=base.stated_clip_skip
        )  # no sampling settings: it is sampled like its parent

    @classmethod
    def check(cls, config: Options) -> Options:
        """Choose the layout for `auto`, and check that UNet and ControlNets can be cut to it, before anything trains."""
        if config.auto:
            config = chosen(config)
        if config.steps:
            base = config.open_base()
            layout = unet.student_config(base.unet_config, config.layout, base.family)
            for source in config.controlnet:
                cutting.smaller_controlnet(Path(source), layout)
        return config

    @classmethod
    def shortcut(cls, config: Options) -> Result | None:
        """Only cut, without training, for `steps=0`."""
        return None if config.steps else cut(config)

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        student = relative_size(base, unet.student_config(base.unet_config, config.layout, base.family))
        return Load(full=student, graph=student, grad=student, free=1)

    def facts(self) -> dict[str, Any]:
        return cutting.figures(self.base_model.unet_config, self.layout)

    def usage(self, weights: Path, base: Checkpoint) -> Usage:
        title = cutting.title(base, self.student.net, self.config.layout)
        return usage_like_base(weights, base, title, "pruned", "base, cut and not trained, trained")

    def players(self, phase: Phase) -> dict[str, Trains]:
        net = self.student.net
        return {"student": Trains(list(net.parameters()), averaged=True, net=net)}

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Compute the losses on output and features, and with `lambda_task` the denoising loss (BK-SDM, equation 4)."""
        t = torch.randint(len(self.schedule), (len(batch.latents),), device=batch.latents.device)
        eps = torch.randn_like(batch.latents)
        x_t = self.schedule.add_noise(batch.latents, eps, t)
        student_names, teacher_names = [s for s, _ in self.feature_pairs], [t for _, t in self.feature_pairs]
        with torch.no_grad(), self.teacher.tap(teacher_names) as teacher_features:
            goal = self.teacher(x_t, t, batch.cond)
        with self.student.tap(student_names) as features:
            p = self.student(x_t, t, batch.cond)
        outputs = [self.schedule.output(q, t, self.student.kind) for q in (p, goal)]
        terms = {"out": losses.squared(*outputs)}
        if self.feature_pairs:
            both = [features[k] for k in student_names], [teacher_features[k] for k in teacher_names]
            terms["feat"] = self.config.lambda_feat * losses.features(*both, normalised=self.config.feat_norm == "variance")
        if self.config.lambda_task:
            terms["task"] = self.config.lambda_task * losses.denoising(self.schedule, self.student.kind, p, batch.latents, eps, t)
        yield {"student": terms}

    def export(self, run: Run) -> None:
        """Write the folder `model`, which stock diffusers loads, and the ControlNets that were given, cut to the layout."""
        self.save_student(run)
        for path in cut_controlnets(self.config, self.layout, run.folder):
            run.wrote(path)


def cut(config: Config) -> Result:
    """Cut the base to the layout from file to file, without training."""
    base, folder = config.open_base(), Path(config.output or default_folder("prune", config))
    layout = cutting.layout_of(base, config.layout)
    result = cutting.cut(base, layout, folder / "model")
    result.outputs += cut_controlnets(config, layout, folder)
    return result


def cut_controlnets(config: Config, layout: dict[str, Any], folder: Path) -> list[Path]:
    """Cut the ControlNets of the config to the layout, and return the folders that were written."""
    paths = []
    for source in map(Path, config.controlnet):
        paths.append(folder / f"controlnet-{source.name}")
        cutting.cut_controlnet(source, layout, paths[-1])
    return paths


def chosen(config: Config) -> Config:
    """Choose the layout for `auto` by measurement, and return the config with it.

    The layout is kept in the run folder as auto.json, so that a resumed run takes the same one.
    """
    path = Path(config.output or default_folder("prune", config)) / "auto.json"
    if not path.exists() or config.resume == "never":
        layout = cutting.choose(config.open_base(), speed(config.target_speed), pick_device(config.device))
        write_atomic(path, json.dumps(layout, indent=2) + "\n")
    return replace(config, auto=False, layout=str(path))
