"""Measures how much of a style LoRA, or of a ControlNet's control, survives in a few-step student. N pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.data import control, emoji
from fastdiff.quality.distances import Moments, band, frechet, gap_closed
from fastdiff.quality.evaluation import Evaluation, Model
from fastdiff.quality.metrics import Row
from fastdiff.runtime import console, rng
from fastdiff.sampling.settings import Settings

IMAGES = 240  # pictures per row with a LoRA or a ControlNet, at most
FEATURES = ("embedded", "inception", "clip")  # the first one that is available measures the distance of two sets of pictures


def style(evaluation: Evaluation, loras: Sequence[str], teacher: Model, students: Sequence[Model]) -> dict[str, Any]:
    """{student and steps: figures}: how much of the style of `loras` each student shows, compared with the teacher.

    `kept` is (F(S) - F(S + L)) / F(S), with F the Frechet distance to the pictures of the teacher with the LoRAs: 1 where the
    student with them draws as the teacher with them, 0 where they change nothing. On `emoji` there is also `moved`: how far the
    LoRAs move the student towards the drawing style, divided by how far they move the teacher.
    """
    samples, plain = evaluation.samples, evaluation.teacher
    n, made = min(len(samples), IMAGES), teacher.open(loras, None)
    wearing = samples.row("teacher", made, teacher.ladder[0], identity=made.identity, n=n)
    del made
    metrics: dict[str, Any] = {"loras": list(loras), "samples": n}
    name = next((f for f in FEATURES if f in wearing.features), None)
    if name is None:
        console.warn("`with_lora`: no network that judges pictures is available, so the rest of the style is not measured")
        return metrics
    target = Moments.of(wearing.features[name])
    away = lambda row, i: frechet(row.features[name][i], target)
    metrics["teacher"] = styles_of(wearing, n) | {"plain": styles_of(plain, n)}
    for model in students:
        made = model.open(loras, None)
        for settings in model.ladder:
            before = evaluation.row_of(model.name, settings)
            after = samples.row(model.name, made, settings, identity=made.identity, n=n)
            gap = gap_closed(after, before, wearing, away)
            figures = {"kept": gap["gap_closed"], "low": gap["low"], "high": gap["high"], **styles_of(after, n)}
            figures |= {"plain": styles_of(before, n), "away": gap["student"], "away_plain": gap["teacher"]}
            if "style" in after.features:
                figures["moved"] = moved(plain, wearing, before, after, n)
            metrics[f"{model.name} {settings.num_steps}"] = figures
        del made
    return metrics


def styles_of(row: Row, n: int) -> dict[str, Any]:
    """{style: mean distance of the first n pictures to it, and the share nearest to it}, for the drawing styles of `emoji`.

    {} where the row has no such distances.
    """
    if "style" not in row.features:
        return {}
    d = row.features["style"][:n]
    d = d[~d.isnan().any(1)]
    share = torch.nn.functional.one_hot(d.argmin(1), d.shape[1]).float().mean(0)
    return {s: {"distance": a, "nearest": b} for s, a, b in zip(emoji.STYLES, d.mean(0).tolist(), share.tolist(), strict=True)}


def moved(plain: Row, wearing: Row, before: Row, after: Row, n: int) -> float:
    """How far the LoRAs move the student towards the style that they move the teacher to most, over the teacher's distance."""
    t0, t1, s0, s1 = (row.features["style"][:n].nanmean(0) for row in (plain, wearing, before, after))
    k = (t0 - t1).argmax()
    return ((s0 - s1)[k] / (t0 - t1)[k]).item()


def controlled(
    evaluation: Evaluation, nets: tuple[str, str], how: str, teacher: Model, students: Sequence[Model]
) -> dict[str, Any]:
    """{student and steps: figures}: how well pictures follow a control picture, students compared with the teacher.

    `nets` are the ControlNets of the teacher and of the students. The control pictures are extracted from the teacher's own
    pictures of other seeds. `agreement` is the F1 score of drawn and given edges (canny), or 1 minus the mean difference; `off`
    is the same without a ControlNet, and `kept` the student's agreement over the teacher's.
    """
    samples, extractor, guided = evaluation.samples, control.extractor(how), teacher.ladder[0]
    made = teacher.open([], nets[0])
    n = min(len(samples), IMAGES, samples.paired)
    source = samples.row("teacher", made, guided, identity=made.identity, block=rng.REFERENCE, n=n)
    controls = control.extract(source.pictures[:n], extractor)

    def agreement(row: Row) -> Tensor:
        drawn = control.extract(row.pictures[:n], extractor)
        if how == "canny":
            return control.agreement(drawn, controls)
        return 1 - (drawn.float() - controls.float()).abs().mean((1, 2, 3)) / 255

    def figures_of(made: Any, model: str, settings: Settings) -> dict[str, Any]:
        drawn = samples.row(model, made, settings, identity=made.identity, n=n, controls=controls)
        f = agreement(drawn)
        return {"agreement": f.mean().item(), "band": band(f, lambda x, i: x[i].mean().item())}

    obeying = figures_of(made, "teacher", guided)
    del made
    metrics: dict[str, Any] = {"controlnet": nets[0], "samples": n, "teacher": obeying}
    for model in students:
        made = model.open([], nets[1])
        for settings in model.ladder:
            off = agreement(evaluation.row_of(model.name, settings)).mean().item()
            figures = figures_of(made, model.name, settings)
            figures |= {"off": off, "kept": figures["agreement"] / obeying["agreement"]}
            metrics[f"{model.name} {settings.num_steps}"] = figures
        del made
    return metrics
