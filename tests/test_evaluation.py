"""One way to judge: the closing table, `eval_every`, the `evaluate` command and `fastdiff.evaluate` have the same figures."""

from pathlib import Path

import pytest
import torch

import fastdiff as fd
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.models.denoiser import Denoiser
from fastdiff.quality import emoji as judge
from fastdiff.quality import metrics, samples
from fastdiff.quality.distances import Moments, frechet
from fastdiff.quality.evaluation import Evaluation, evaluate
from fastdiff.quality.metrics import Metric
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling import sheet
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Latency and diversity of a few pictures."""
    monkeypatch.setattr(samples, "TIMED_S", 0)
    monkeypatch.setattr(samples, "TIMED", (1, 1))
    monkeypatch.setattr(samples, "DIVERSE", (2, 2))


@pytest.fixture
def untrained():
    base = checkpoint.load("emoji")
    return Sampler.of_networks(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae)


def test_a_closing_row_has_the_figures_of_its_pictures(untrained):
    """Picture i of seed i, as bytes; what bytes change is small. Nothing of the teacher is drawn. Unseen prompts come first."""
    n, settings, shipped = 200, Settings("ddim", 4, 1.0), judge.shipped()
    evaluation = Evaluation.shipped(untrained.base, n, device="cpu")
    figures = evaluation.figures(evaluation.row("student", untrained, settings))
    prompts, (cond, uncond) = judge.Prompts.judged(n), evaluation.samples.encode(untrained.base)
    floats = untrained.pixels(cond, uncond, range(n), settings, resolution_px=64)
    pixels = uint8(floats).float() / 127.5 - 1
    features, every = judge.embed(pixels), shipped.reference["embedded"]
    teacher = shipped.teacher.features["embedded"]
    for start, part in ((0, figures), (1, figures["seen"])):
        of = slice(start, None, 2)
        hits = judge.recognised(features, prompts)[of]
        assert part["retrieval"] == pytest.approx(hits.mean().item(), abs=1e-4)
        assert part["background"] == pytest.approx(judge.backgrounds(pixels, prompts)[of].nanmean().item(), abs=1e-4)
        assert part["frechet"] == pytest.approx(frechet(features[of], Moments.of(every[of])), rel=1e-3)
        assert part["frechet"] == pytest.approx(frechet(judge.embed(floats)[of], Moments.of(every[of])), rel=1e-2)
        assert part["same_noise"] == pytest.approx((features - teacher[:n])[of].norm(dim=1).mean().item(), rel=1e-3)
        names = {"retrieval", "background", "frechet", "same_noise", "drift", "coverage", "density", "diversity"}
        # Two of 200 seen pictures may not have a group prompt in common: then nothing is known of their diversity.
        assert names - ({"diversity"} if start else set()) <= set(part["band"]) <= names
    row = evaluation.figures(evaluation.teacher)
    assert (row["model"], row["calls"]) == ("teacher", 50)
    assert row["frechet"] == pytest.approx(frechet(teacher[:n:2], Moments.of(every[::2])))


def test_the_teacher_of_the_closing_table_is_shipped_in_every_number_of_calls(untrained):
    n = 160
    evaluation = Evaluation.shipped(untrained.base, n, device="cpu")
    student = evaluation.row("student", untrained, Settings("ddim", 2, 1.0))
    gaps = evaluation.gaps(student, 2)
    assert set(gaps) == {"retrieval", "frechet"}
    first = judge.shipped().best(2, "frechet").part(torch.arange(n))
    for name, gap in gaps.items():
        best = judge.shipped().best(2, name).part(torch.arange(n))
        assert gap["teacher"] == pytest.approx(evaluation.figures(best)[name])
        assert gap["low"] <= gap["gap_closed"] <= gap["high"]
        assert gap["verdict"] in {"ahead", "behind", "no clear difference"}
    seen = evaluation.gaps(student, 2, judge.SEEN)["frechet"]
    assert seen["teacher"] == pytest.approx(evaluation.figures(first)["seen"]["frechet"])
    assert seen["student"] != gaps["frechet"]["student"]
    assert not evaluation.gaps(student, 3)  # nothing is shipped for three; who asks takes the nearest below
    assert [judge.shipped().nearest(calls) for calls in (1, 2, 3, 7, 8, 20)] == [1, 2, 2, 4, 8, 8]
    worse = evaluation.row("before", untrained, Settings("ddim", 1, 1.0))
    recovered = evaluation.recovered(worse, student)["frechet"]
    assert set(recovered) == {"recovered", "low", "high", "before", "student", "teacher"}


def test_a_metric_is_one_entry(fastdiff, tmp_path, monkeypatch):
    """In the closing table of a training run, in the table, JSON and page of `evaluate`, and with a band in each."""
    light = Metric("light", "mean light", "departures", lambda row, i, against: row.features["departures"][i, -1].mean().item(),
                   "higher", judges=True)  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, light])
    tables = []
    monkeypatch.setattr(console, "table", lambda title, columns, rows, **how: tables.append((columns, rows)))
    code, trained = fastdiff(
        *("train-lcm-lora", "--data", "teacher", "--pairs", 2, "--teacher-steps", 1, "--steps", 1, "--batch-size", 2),
        *("--proof", 4, "-o", "run", "--prompts", "prompts.txt"),
    )
    assert code == 0, trained
    code, told = fastdiff("evaluate", "--lora", "run/lcm.safetensors", "--num-steps", 1, "--num-images", 4)
    assert code == 0, told
    rows = [row for row in trained["metrics"]["rows"] if row["model"] == "student"]
    mine = [row for row in told["metrics"]["rows"] if row["model"] == "lcm"]
    closing, evaluated = rows[0], mine[0]  # of one step
    assert (closing["calls"], len(rows), len(mine)) == (evaluated["calls"], 4, 1)
    for name in ("retrieval", "background", "frechet", "same_noise", "drift", "light"):
        assert closing[name] == pytest.approx(evaluated[name], rel=2e-2, abs=2e-2)
        assert len(closing["band"][name]) == len(evaluated["band"][name]) == 2
    assert "light" in told["metrics"]["gap_closed"]["lcm 1"]
    verdicts = [cells for columns, cells in tables if "model" not in columns]
    assert [line[1] for line in verdicts[0][:2]] == ["recognised", "Frechet"]
    assert verdicts[0][0][-1] in {"ahead", "behind", "no clear difference"}
    tables = [(columns, cells) for columns, cells in tables if "model" in columns]
    assert all("mean light" in columns for columns, _ in tables)
    assert len(tables) == 2
    assert all(any("±" in cell for line in cells for cell in line) for _, cells in tables)
    page = (tmp_path / told["outputs"][0]["path"]).read_text()
    assert "<th>mean light" in page
    assert "mean light (higher is better)" in page
    assert sum("Frechet, coverage and density need at least 600 pictures" in w for w in told["warnings"]) == 1


def test_evaluate_for_users_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    console.reset(quiet=True)
    base = checkpoint.load("emoji")
    fast = Sampler(checkpoint.load("emoji"), device="cpu", compile="off", identified=True)
    assert fd.evaluate is evaluate
    rows = ["scheduler=dpm++ steps=3 guidance=1,3,1", Settings("ddim", 1, 1.0, timesteps=(749,))]
    report = fd.evaluate(fast, teacher=base, num_steps=[1, 2], num_images=6, teacher_steps=3, teacher_rows=rows * 2)
    once = [row["calls"] for row in report.rows if row["step_guidance"] == [1, 3, 1] or row["timesteps"] == [749]]
    assert once == [1, 4]
    assert "1, 3, 1" in report.table
    assert "1 at 749" in report.table
    undistilled = [row for row in report.rows if (row["model"], row["calls"]) == ("teacher", 4)]
    assert len(undistilled) > 1
    gap = report.metrics["gap_closed"]["student 2"]
    assert gap["frechet"]["teacher"] == min(row["frechet"] for row in undistilled)
    assert gap["retrieval"]["teacher"] == max(row["retrieval"] for row in undistilled)
    ways = [(row["model"], row["num_steps"]) for row in report.rows if row["model"] == "student"]
    assert ways == [("student", 1), ("student", 2)]
    assert report.rows is report.metrics["rows"]
    assert set(report.metrics) == {"samples", "reference", "rows", "gap_closed", "seen"}
    assert set(report.metrics["seen"]["gap_closed"]) == {"student 1", "student 2"}
    assert all(row["seen"].keys() >= {"retrieval", "frechet", "coverage", "band"} for row in report.rows)
    assert report.table.splitlines()[2].split()[:5] == ["model", "solver", "steps", "guidance", "calls"]
    assert len(report.table.splitlines()) == 3 + len(report.rows)
    few = [w for w in console.state.warnings if "`num_images=6`" in w]
    assert len(few) == 1
    assert report.save(tmp_path, "mine") == [tmp_path / "contact.png"]
    monkeypatch.setattr(sheet, "LEAST_PX", 16)
    monkeypatch.setattr(sheet, "MOST_PX", 32)
    assert report.save(tmp_path, "large") == [tmp_path / "contact.png", tmp_path / "contact-full.png"]
    assert 'href="contact-full.png"' in (tmp_path / "report.html").read_text()
    alone = fd.evaluate(fast, teacher=base, num_steps=1, num_images=2, teacher_steps=1, prompts=["fox on red"], baseline=False)
    assert [row["model"] for row in alone.rows] == ["teacher", "student"]
    assert alone.metrics["gap_closed"] == {"student 1": {}}


def test_few_pictures_are_no_matter_without_a_distance_of_distributions(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    console.reset(quiet=True)
    base = checkpoint.load(str(tiny_sd))
    assembled = Sampler(checkpoint.load(str(tiny_sd)), device="cpu", compile="off")
    report = evaluate(assembled, teacher=base, num_steps=1, prompts=["a cat"], num_images=2, teacher_steps=1, baseline=False)
    assert not any("num_images" in w for w in console.state.warnings)
    assert {"drift"} <= report.rows[1].keys()


def test_student_and_teacher_are_of_one_family(tiny_sd):
    fast = Sampler(checkpoint.load(str(tiny_sd)), device="cpu", compile="off")
    with pytest.raises(UsageError, match="of sd15, but the teacher is of emoji"):
        evaluate(fast, teacher=checkpoint.load("emoji"))
    with pytest.raises(UsageError, match="teacher_row=steps=3 guidance=1,3"):
        evaluate(fast, teacher=fast.base, teacher_rows=["steps=3 guidance=1,3"])
    with pytest.raises(UsageError, match="num_images=1"):
        evaluate(fast, teacher=fast.base, num_images=1)


def test_what_eval_every_measures_is_the_closing_row_of_fewer_pictures(untrained, monkeypatch):
    from fastdiff.training import previews
    from fastdiff.training.scene import Scene

    monkeypatch.setattr(previews.Measured, "JUDGED", 30)
    scene = Scene(untrained.base, torch.device("cpu"), 64, ["fox on red"], Settings("ddim", 2, 3.0), 0)

    class Trained:
        student = teacher = untrained.denoiser
        recipe = Recipe()
        settings = staticmethod(lambda num_steps: Settings("ddim", num_steps or 1, 1.0))

    found = previews.Measured(scene).measure(Trained())
    evaluation = Evaluation.validating(untrained.base, 30, device="cpu")
    row = evaluation.figures(evaluation.row("student", untrained, Settings("ddim", 1, 1.0)))
    teacher = evaluation.figures(evaluation.teacher)
    assert (found["frechet"], found["retrieval"]) == (row["frechet"], row["retrieval"])
    assert found["score"] == pytest.approx(found["drift"] + row["frechet"] / teacher["frechet"] - 1)


@pytest.mark.slow
def test_the_script_of_the_shipped_rows(tmp_path, monkeypatch):
    """A table and tensors that `Shipped` reads."""
    import importlib.util
    import json
    import sys

    path = Path(__file__).parent.parent / "examples" / "emoji" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "USUAL", [Settings("ddim", calls, 1.0, "trailing") for calls in (1, 2, 4, 8)])
    way = script.described(Settings("euler", 3, 3.0, timesteps=(999, 666, 333), step_guidance=(1.0, 3.0, 1.0)))
    (tmp_path / "winners.json").write_text(json.dumps({"4": {"retrieval": {"settings": way}}}))
    into = ["--out", str(tmp_path / "made"), "--work", str(tmp_path / "work"), "--winners", str(tmp_path / "winners.json")]
    monkeypatch.setattr(sys, "argv", ["reference.py", "--samples", "24", *into])
    script.main()
    made = judge.Shipped(tmp_path / "made")
    assert made.calls == [1, 2, 4, 8]
    assert made.latents.shape == (24, 4, 8, 8)
    assert made.teacher.calls == 50
    assert len(made.ladder) == 6
    assert {row.calls for row in made.rows[1:]} == {1, 2, 4, 8}
    assert all(row.features["hits"].shape == (24,) for row in made.rows)
