"""The metrics judge only after they have ordered a known ladder rightly."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.functional import adjust_saturation, gaussian_blur

from fastdiff import quality
from fastdiff.checkpoints import checkpoint
from fastdiff.data import emoji
from fastdiff.models import autoencoder
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.feature_net import FeatureNet
from fastdiff.quality import emoji as judge
from fastdiff.quality.distances import Moments, frechet, gap_closed, inside
from fastdiff.quality.drift import Drift
from fastdiff.quality.emoji import Prompts, Shipped, embed, recognised, shipped
from fastdiff.quality.metrics import METRICS, Against, Row, measured
from fastdiff.sampling.settings import Settings


@pytest.fixture(scope="module")
def reference():
    return Shipped()


@pytest.fixture(scope="module")
def teacher_pixels(reference):
    """The teacher's guided 25-step pictures of the first judged prompts."""
    return autoencoder.decode(checkpoint.load("emoji").vae, reference.latents[:500])


@pytest.fixture(scope="module")
def ladders(reference):
    """Of each network its features of the ladder's rows, the moments of the reference and what its recognition needs."""
    stored = load_file(judge.REFERENCE / "teacher.safetensors")
    rungs = range(len(reference.ladder))
    losses = Moments(stored["losses.mean"].double(), stored["losses.cov"].double())
    return {
        "judge": ([row.features["embedded"] for row in reference.ladder], Moments.of(reference.reference["embedded"]), None),
        "losses": ([stored[f"ladder.losses.{i}"].float() for i in rungs], losses, FeatureNet.embedded()),
    }


def test_frechet_of_gaussians_in_closed_form():
    d = 4
    eye = torch.eye(d, dtype=torch.float64)
    x = torch.randn(50, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0 and covariance 1, exactly
    far = Moments(torch.full((d,), 2.0, dtype=torch.float64), 9 * eye)
    assert frechet(x, far) == pytest.approx(4 * d + d * (1 + 9 - 2 * 3))
    assert frechet(3 * x + 2, far) == pytest.approx(0, abs=1e-9)


def test_the_recogniser_knows_every_real_picture():
    every = torch.arange(240)
    for colour in (0, 4, 7):
        features = embed(emoji.compose(every, torch.full_like(every, colour)))
        for coarse in (False, True):
            prompts = Prompts(every, torch.full_like(every, colour), torch.full_like(every, coarse, dtype=torch.bool))
            assert recognised(features, prompts).mean() > 0.99


@pytest.mark.parametrize("network", ["judge", "losses"])
def test_fewer_calls_are_worse_in_every_judging_metric(network, ladders):
    """The ladder of the teacher's own sampler: 25, 8, 4 and 3 guided steps, then 2 and 1 unguided."""
    features, moments, net = ladders[network]
    distance = [frechet(x, moments) for x in features]
    assert distance[1:] == sorted(distance[1:])
    assert distance[0] < distance[2]  # 600 pictures do not tell 16 calls from 50; the script's 2,000 do:
    figures = [entry[network]["frechet"] for entry in shipped().table["ladder"]]
    assert figures == sorted(figures)
    retrieval = [recognised(x, Prompts.judged(len(x)), net).mean().item() for x in features]
    assert all(better > worse - 0.015 for better, worse in pairwise(retrieval))  # 16 calls are the 25-step quality already
    assert retrieval[0] > retrieval[3] > retrieval[5]


def test_the_two_networks_have_nothing_in_common():
    """Neither architecture nor weights; and no evaluation opens the one that losses look through."""
    losses, net = FeatureNet.embedded(), judge.judge_net()
    assert not {tuple(p.shape) for p in losses.parameters() if p.ndim > 1} & {tuple(p.shape) for p in net.parameters()}
    assert not any("feature_net" in path.read_text() for path in Path(quality.__file__).parent.glob("*.py"))


def test_the_best_undistilled_rows_get_better_with_every_call(reference):
    unseen = judge.parts(reference.lines)[judge.UNSEEN]
    of = lambda row: measured(row.part(unseen), Against({"embedded": reference.reference["embedded"][unseen]}, row), bands=False)
    rows = [{m: of(reference.best(calls, m))[m] for m in ("frechet", "retrieval")} for calls in (1, 2, 4, 8)]
    rows.append({m: of(reference.teacher)[m] for m in ("frechet", "retrieval")})
    distance, retrieval = ([row[m] for row in rows] for m in ("frechet", "retrieval"))
    assert distance == sorted(distance, reverse=True)
    assert retrieval == sorted(retrieval)


# ---- collapse


def test_a_collapsed_student_is_told_by_coverage_while_recognition_is_high(reference):
    """One picture a prompt, whatever the noise: each is as good as the teacher's own."""
    unseen = judge.parts(reference.lines)[judge.UNSEEN]
    lines = [reference.lines[i] for i in unseen.tolist()]
    first = torch.tensor([lines.index(line) for line in lines])
    teacher = reference.teacher.part(unseen)
    against = Against({"embedded": reference.reference["embedded"][unseen]}, teacher)
    embedded = teacher.features["embedded"][first]
    prompts = Prompts.of(lines)
    features = {"embedded": embedded, "hits": recognised(embedded, prompts), "diversity": judge.diversity(embedded, prompts)}
    healthy, collapsed = (measured(row, against) for row in (teacher, Row("collapsed", Settings(), features, len(lines))))
    assert collapsed["retrieval"] > healthy["retrieval"] - 0.03
    assert healthy["coverage"] > 0.9
    assert collapsed["coverage"] < 0.8 * healthy["coverage"]
    assert collapsed["band"]["coverage"][1] < healthy["band"]["coverage"][0]
    assert collapsed["diversity"] < 0.01 * healthy["diversity"]


def test_coverage_and_density_count_neighbours_as_published():
    """Naeem 2020, equations 5 and 6, against loops over the pictures."""
    g = torch.Generator().manual_seed(0)
    real, drawn = torch.randn(40, 3, generator=g), torch.randn(40, 3, generator=g) + 0.5
    row = Row("x", Settings(), {"embedded": drawn}, 40)
    against = Against({"embedded": real}, row)
    apart = lambda a, b: (a - b).square().sum().sqrt().item()
    radius = [sorted(apart(x, y) for j, y in enumerate(real) if j != i)[4] for i, x in enumerate(real)]
    held = [[apart(x, y) < r for y in drawn] for x, r in zip(real, radius, strict=True)]
    assert inside(drawn, real).tolist() == held
    figures = measured(row, against)
    assert figures["coverage"] == pytest.approx(sum(map(any, held)) / 40)
    assert figures["density"] == pytest.approx(sum(map(sum, held)) / 40 / 5)
    part = torch.arange(10)
    by_name = {metric.name: metric for metric in METRICS}
    assert by_name["coverage"].of(row, part, against) == pytest.approx(sum(any(h[:10]) for h in held) / 40)


def test_diversity_is_how_far_two_pictures_of_a_group_prompt_are_apart():
    prompts = Prompts.of(["fruit", "red apple", "fruit", "fruit", "bug on red", "red apple"])
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    apart = judge.diversity(features, prompts)
    assert apart[[1, 4, 5]].isnan().all()  # a named picture is nearly one image, and a group with one picture has no pair
    pairs = [(features[i] - features[j]).square().sum() for i, j in ((0, 2), (0, 3), (2, 3))]
    assert apart[[0, 2, 3]].square().mean().item() == pytest.approx((sum(pairs) / 3).item(), rel=1e-5)


@pytest.mark.parametrize("spoil", ["blurred", "over-saturated"])
def test_spoiled_pictures_are_worse_in_every_judging_metric(spoil, teacher_pixels, reference):
    unit = teacher_pixels / 2 + 0.5
    bad = [gaussian_blur(unit, 11, s) if spoil == "blurred" else adjust_saturation(unit, s) for s in ((1.5, 3.0))]
    prompts = Prompts.judged(500)
    features = [embed(teacher_pixels), *(embed(x * 2 - 1) for x in bad)]
    moments = Moments.of(reference.reference["embedded"])
    distance = [frechet(f, moments) for f in features]
    assert distance == sorted(distance)
    near = [(f - features[0]).norm(dim=1).mean().item() for f in features[1:]]
    assert 0 < near[0] < near[1]
    hits = [recognised(f, prompts).mean().item() for f in features]
    assert hits[2] <= hits[0]


def test_gap_closed_and_its_band():
    g = torch.Generator().manual_seed(0)

    def row(rate):
        return Row("x", Settings(), {"hits": (torch.rand(2000, generator=g) < rate).float()}, 2000)

    rate = lambda r, i: r.features["hits"][i].mean().item()
    found = gap_closed(row(0.8), row(0.5), row(0.9), rate, "higher")
    assert found["gap_closed"] == pytest.approx(0.75, abs=0.08)
    assert found["low"] < 0.75 < found["high"]
    assert found["gain_low"] > 0.2
    worse = gap_closed(row(0.4), row(0.5), row(0.9), rate, "higher")
    assert worse["gap_closed"] < 0
    assert worse["gain_high"] < 0
    # Where the undistilled row beats the teacher's many steps, a better student is ahead all the same.
    assert gap_closed(row(0.99), row(0.95), row(0.9), rate, "higher")["verdict"] == "ahead"


def test_the_shipped_teacher_is_good(reference, teacher_pixels):
    """Recognised at 25 guided steps at least 0.8 times as often as its own VAE's reconstructions; backgrounds right."""
    prompts = Prompts.judged(500)
    base = checkpoint.load("emoji")
    colours = torch.where(prompts.background >= 0, prompts.background, torch.arange(500) % 9)
    real = emoji.compose(prompts.picture, colours)
    rebuilt = autoencoder.decode(base.vae, autoencoder.encode_moments(base.vae, real).chunk(2, 1)[0])
    ceiling = recognised(embed(rebuilt), prompts).mean()
    found = recognised(embed(teacher_pixels), prompts)
    assert found.mean() >= 0.8 * ceiling
    assert found[~prompts.coarse].mean() >= 0.8 * ceiling
    assert judge.backgrounds(teacher_pixels, prompts).nanmean() >= 0.95


# ---- drift


def test_drift_is_nothing_against_oneself_and_tells_what_is_off(tiny_sd):
    base = checkpoint.load(str(tiny_sd))
    settings = Settings("ddim", 2, 1.0)
    denoiser = Denoiser(base.unet, base.schedule(), base.prediction_type)

    class Louder(torch.nn.Module):
        """The same pictures with twice the contrast, shifted."""

        def __init__(self, net):
            super().__init__()
            self.net, self.schedule, self.guidance_embedded = net.net, net.schedule, False
            self.inner = net

        def forward(self, x, t, cond):
            p = self.inner(x, t, cond)
            return p._replace(x0=2 * p.x0 + 1) if int(t) == 499 else p

    drift = Drift(base, ["a cat", "a dog", "a"], 64, "cpu")
    same = drift.measure((denoiser, settings), (denoiser, settings))
    assert same["drift"] == 0
    assert (same["contrast"], same["saturation"], same["sharpness"]) == (1, 1, 1)
    louder = drift.measure((denoiser, settings), (Louder(denoiser), settings))
    mean, square = drift.teacher.mean(0)[:8].chunk(2)
    assert louder["drift_mean"] == pytest.approx(((mean + 1) / (square - mean**2).sqrt()).abs().mean().item(), rel=0.02)
    assert louder["drift_spread"] == pytest.approx(math.log(2), rel=0.02)
    ratios = [louder[k] for k in ("contrast", "saturation", "sharpness")]
    assert louder["drift"] == pytest.approx(louder["drift_mean"] + louder["drift_spread"] + sum(abs(math.log(r)) for r in ratios))


def test_over_guided_and_one_step_pictures_drift_and_a_better_solver_does_not():
    """On the embedded checkpoint: thrice the guidance is too sharp."""
    base = checkpoint.load("emoji")
    denoiser = Denoiser(base.unet, base.schedule(), base.prediction_type)
    drift = Drift(base, ["panda on yellow", "red apple on blue", "rocket on purple", "fruit"] * 8, 64, "cpu")
    teacher = (denoiser, Settings("ddim", 8, 3.0))
    more, fewer = (drift.measure(teacher, (denoiser, s)) for s in (Settings("ddim", 8, 9.0), Settings("ddim", 1, 1.0)))
    close = drift.measure(teacher, (denoiser, Settings("ddim", 12, 3.0)))
    assert close["drift"] < 0.3 * min(more["drift"], fewer["drift"])
    assert more["drift_spread"] > 5 * close["drift_spread"]
    assert more["sharpness"] > 1.05
