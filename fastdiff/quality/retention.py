"""How much of a style LoRA, or of a ControlNet's control, survives in a few-step student. N pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.data import control, emoji
from fastdiff.quality.distances import Moments, band, frechet, gap_closed
from fastdiff.quality.drift import REFERENCE_SEED
from fastdiff.quality.evaluation import Evaluation, Model
from fastdiff.quality.metrics import Row
from fastdiff.runtime import console
from fastdiff.sampling.settings import Settings

IMAGES = 240  # of a row that wears something
FEATURES = ("embedded", "inception", "clip")  # the first that is there tells how far two sets of pictures are apart


def style(evaluation: Evaluation, loras: Sequence[str], teacher: Model, students: Sequence[Model]) -> dict[str, Any]:
    """{student and steps: figures} of students that wear `loras`, against the teacher that wears them.

    `kept`: (F(S) - F(S + L)) / F(S), F the Frechet distance to the pictures of the teacher that wears the style: 1 where the
    student with it draws as the teacher with it, 0 where it changes nothing. On `emoji` also `moved`: how far the distance to
    that drawing style went, as a part of the teacher's way.
    """
    samples, plain = evaluation.samples, evaluation.teacher
    n, made = min(len(samples), IMAGES), teacher.open(loras, None)
    wearing = samples.row("teacher", made, teacher.ladder[0], identity=made.identity, n=n)
    del made
    metrics: dict[str, Any] = {"loras": list(loras), "samples": n}
    name = next((f for f in FEATURES if f in wearing.features), None)
    if name is None:
        console.warn("`with_lora`: no network that judges pictures is at hand; nothing tells how much of the style is left")
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
    """Mean distance to each drawing style of `emoji`, and the share that is nearest to it."""
    if "style" not in row.features:
        return {}
    d = row.features["style"][:n]
    d = d[~d.isnan().any(1)]
    share = torch.nn.functional.one_hot(d.argmin(1), d.shape[1]).float().mean(0)
    return {s: {"distance": a, "nearest": b} for s, a, b in zip(emoji.STYLES, d.mean(0).tolist(), share.tolist(), strict=True)}


def moved(plain: Row, wearing: Row, before: Row, after: Row, n: int) -> float:
    """The student's way towards the style that the teacher moved to, over the teacher's own way."""
    t0, t1, s0, s1 = (row.features["style"][:n].nanmean(0) for row in (plain, wearing, before, after))
    k = (t0 - t1).argmax()
    return ((s0 - s1)[k] / (t0 - t1)[k]).item()


def controlled(
    evaluation: Evaluation, nets: tuple[str, str], how: str, teacher: Model, students: Sequence[Model]
) -> dict[str, Any]:
    """{student and steps: figures}: how well pictures obey a control, students (net 2) against the teacher (net 1).

    Controls are taken out of the teacher's own pictures of other seeds. `agreement` is the F1 of their edges with the drawn
    ones' (canny), or 1 less the mean difference; `off` without control; `kept` the student's over the teacher's.
    """
    samples, extractor, guided = evaluation.samples, control.extractor(how), teacher.ladder[0]
    made = teacher.open([], nets[0])
    n = min(len(samples), IMAGES, samples.paired)
    source = samples.row("teacher", made, guided, identity=made.identity, offset=REFERENCE_SEED, n=n)
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
