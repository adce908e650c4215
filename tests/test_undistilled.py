"""The search of the best undistilled sampling (examples/emoji/undistilled.py): costs, pictures, prompts and resuming."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.data import emoji, held_out
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime import rng
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

FOLDER = Path(__file__).parent.parent / "examples/emoji"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # where `python examples/emoji/undistilled.py` looks for the other scripts
        yield importlib.import_module("undistilled")
    for name in ("undistilled", "stock"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def bench(script, tmp_path_factory):
    return script.Bench(tmp_path_factory.mktemp("undistilled"), "random", 4)


@pytest.mark.parametrize("calls", [1, 2, 4, 8])
def test_every_setting_of_the_sweep_costs_what_it_says(script, bench, calls, monkeypatch):
    """The network is called as often as the row says, counted where it is called."""
    counted = []

    def step(x, folded, k):
        counted.append(len(x))
        return torch.zeros_like(x)

    monkeypatch.setattr(bench.net, "step", step, raising=False)
    kinds = {(s.scheduler, s.guidance): s for s in [*script.sweep(calls), *script.well_known(calls)]}
    for s in kinds.values():
        counted.clear()
        bench.latents(s, slice(0, 1))
        assert len(counted) == s.calls == calls, s.line


@pytest.mark.parametrize(("steps", "w"), [(2, 3.0), (3, 1.0)])
def test_the_loop_draws_the_pictures_of_sample(script, bench, steps, w):
    """Stock DDIM gives the latents of fastdiff's own sampler, so a row can be drawn by either."""
    sampler = Sampler.of_networks(
        bench.base, Denoiser(bench.net, bench.base.schedule(), bench.base.prediction_type), bench.base.vae
    )
    seeds = [rng.SEARCH(i) for i in range(4)]
    expected = sampler.latents(bench.cond, bench.uncond, seeds, Settings("ddim", steps, w, "trailing"), (8, 8))
    s = script.setting("DDIMScheduler", {"timestep_spacing": "trailing"}, (w,) * steps)
    torch.testing.assert_close(bench.latents(s, slice(0, 4)), expected, atol=2e-4, rtol=1e-3)


STOCK = [
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, (1, 3, 1), (899, 600, 333)),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, (2, 1, 3), None),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, (1, 2), (999, 500)),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}, (1, 1, 3), None),
    ("LCMScheduler", {}, (2, 1), (799, 399)),
    ("UniPCMultistepScheduler", {"timestep_spacing": "leading"}, (1, 1, 1), None),
]


@pytest.mark.parametrize("row", STOCK, ids=lambda row: f"{row[0]}-{row[2]}")
def test_a_stock_pipeline_draws_the_same_pictures_in_as_many_calls(script, bench, row, monkeypatch):
    stock = sys.modules["stock"]
    s = script.setting(*row)
    noise = script.SeededNoise([rng.SEARCH(i) for i in range(2)], script.LATENT, "cpu")
    latents, pipe, rows = noise(), bench.base.pipeline(), []
    pipe.set_progress_bar_config(disable=True)
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *args, **kwargs: (rows.append(len(x)), forward(x, *args, **kwargs))[1])
    lines = script.searched_prompts(2)
    drawn = stock.piped(pipe, s, lines, latents=latents, generator=noise.generators, output_type="latent").images
    torch.testing.assert_close(drawn, bench.latents(s, slice(0, 2)), atol=5e-4, rtol=2e-3)
    assert sum(rows) == 2 * s.calls


def test_pictures_do_not_depend_on_their_place_in_a_batch(script, bench):
    s = script.setting("LCMScheduler", {}, (1, 2), (799, 399))
    both = bench.latents(s, slice(0, 4))
    torch.testing.assert_close(bench.latents(s, slice(2, 4)), both[2:], atol=1e-4, rtol=1e-3)


def test_the_prompts_are_kept_for_the_search(script):
    lines = script.searched_prompts(100)
    part_of, names = held_out.captions(), {p.group for p in emoji.pictures()}
    assert {part_of[line] for line in lines} == {held_out.SEARCHED}
    assert sum(line.split(" on ")[0] in names for line in lines) >= 50


def test_changes_of_one_coordinate_keep_the_cost(script):
    s = script.setting(script.EULER, {}, (1, 3, 1), (999, 666, 333))
    changed = [new for move in script.moves(s, 50, coarse=True) if (new := move(s)) not in (None, s)]
    assert len(changed) == len(set(changed)) > 15
    assert {new.calls for new in changed} == {4}
    assert script.shifted(s, 1, 400) is None, "timesteps must descend"


def test_no_figure_is_computed_twice(script, bench, monkeypatch):
    s = script.setting(script.EULER, {"timestep_spacing": "leading"}, (1,), (749,))
    first = script.Search(bench, (2, 3, 4))
    figures = [first.figures(s, level) for level in (0, 2, 1)]  # the second stage after the last one, as in a run that goes on
    monkeypatch.setattr(bench, "features", lambda *args: pytest.fail("drawn again"))
    again = script.Search(bench, (2, 3, 4))
    assert [again.figures(s, level) for level in (0, 2, 1)] == figures
    assert [row["n"] for row in figures] == [2, 4, 3]
    assert again.winner(1, "frechet") == s
