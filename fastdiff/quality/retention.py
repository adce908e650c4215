"""How much of a style LoRA, or of a ControlNet's control, survives in a few-step student. N pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.data import control, emoji
from fastdiff.quality.distances import Moments, band, frechet, gap_closed
from fastdiff.quality.drift import REFERENCE_SEED
from fastdiff.quality.metrics import Shown
from fastdiff.quality.samples import Gallery
from fastdiff.runtime import console

IMAGES = 240  # of a row that wears something
FEATURES = ("embedded", "inception", "clip")  # the first that is there tells how far two sets of pictures are apart


def style(
    gallery: Gallery, loras: Sequence[str], teacher: Any, students: Sequence[Any], plain: Shown, rows: Sequence[Shown]
) -> dict[str, Any]:
    """{student and steps: figures} of students that wear `loras`, against the teacher that wears them.

    `kept`: (F(S) - F(S + L)) / F(S), F the Frechet distance to the pictures of the teacher that wears the style: 1 where the
    student with it draws as the teacher with it, 0 where it changes nothing. On `emoji` also `moved`: how far the distance to
    that drawing style went, as a part of the teacher's way.
    """
    n, made = min(len(gallery), IMAGES), teacher.open(loras, None)
    wearing = gallery.show("teacher", made, teacher.ladder[0], n=n)
    del made
    found: dict[str, Any] = {"loras": list(loras), "samples": n}
    name = next((f for f in FEATURES if f in wearing.seen), None)
    if name is None:
        console.warn("--with-lora: no network that judges pictures is at hand; nothing tells how much of the style is left")
        return found
    target = Moments.of(wearing.seen[name])
    away = lambda row, i: frechet(row.seen[name][i], target)
    found["teacher"] = styles_of(wearing, n) | {"plain": styles_of(plain, n)}
    for model in students:
        made = model.open(loras, None)
        for settings in model.ladder:
            before = next(r for r in rows if (r.model, r.settings) == (model.name, settings))
            after = gallery.show(model.name, made, settings, n=n)
            gap = gap_closed(after, before, wearing, away)
            told = {"kept": gap["gap_closed"], "low": gap["low"], "high": gap["high"], **styles_of(after, n)}
            told |= {"plain": styles_of(before, n), "away": gap["student"], "away_plain": gap["teacher"]}
            if "style" in after.seen:
                told["moved"] = moved(plain, wearing, before, after, n)
            found[f"{model.name} {settings.num_steps}"] = told
        del made
    return found


def styles_of(row: Shown, n: int) -> dict[str, Any]:
    """Mean distance to each drawing style of `emoji`, and the share that is nearest to it."""
    if "style" not in row.seen:
        return {}
    d = row.seen["style"][:n]
    d = d[~d.isnan().any(1)]
    share = torch.nn.functional.one_hot(d.argmin(1), d.shape[1]).float().mean(0)
    return {s: {"distance": a, "nearest": b} for s, a, b in zip(emoji.STYLES, d.mean(0).tolist(), share.tolist(), strict=True)}


def moved(plain: Shown, wearing: Shown, before: Shown, after: Shown, n: int) -> float:
    """The student's way towards the style that the teacher moved to, over the teacher's own way."""
    t0, t1, s0, s1 = (row.seen["style"][:n].nanmean(0) for row in (plain, wearing, before, after))
    k = (t0 - t1).argmax()
    return ((s0 - s1)[k] / (t0 - t1)[k]).item()


def controlled(
    gallery: Gallery, nets: tuple[str, str], how: str, teacher: Any, students: Sequence[Any], rows: Sequence[Shown]
) -> dict[str, Any]:
    """{student and steps: figures}: how well pictures obey a control, students (net 2) against the teacher (net 1).

    Controls are taken out of the teacher's own pictures of other seeds. `agreement` is the F1 of their edges with the drawn
    ones' (canny), or 1 less the mean difference; `off` without control; `kept` the student's over the teacher's.
    """
    extractor, guided = control.extractor(how), teacher.ladder[0]
    made = teacher.open([], nets[0])
    n = min(len(gallery), IMAGES, gallery.paired)
    asked = gallery.show("teacher", made, guided, offset=REFERENCE_SEED, n=n)
    controls = control.extract(asked.kept[:n], extractor)

    def agreement(row: Shown) -> Tensor:
        drawn = control.extract(row.kept[:n], extractor)
        if how == "canny":
            return control.agreement(drawn, controls)
        return 1 - (drawn.float() - controls.float()).abs().mean((1, 2, 3)) / 255

    def told(row: Shown) -> dict[str, Any]:
        f = agreement(row)
        return {"agreement": f.mean().item(), "band": band(f, lambda x, i: x[i].mean().item())}

    obeying = gallery.show("teacher", made, guided, n=n, controls=controls)
    del made
    found: dict[str, Any] = {"controlnet": nets[0], "samples": n, "teacher": told(obeying)}
    for model in students:
        made = model.open([], nets[1])
        for settings in model.ladder:
            before = next(r for r in rows if (r.model, r.settings) == (model.name, settings))
            after = told(gallery.show(model.name, made, settings, n=n, controls=controls))
            after |= {"off": agreement(before).mean().item(), "kept": after["agreement"] / found["teacher"]["agreement"]}
            found[f"{model.name} {settings.num_steps}"] = after
        del made
    return found
