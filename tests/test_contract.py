"""What a method may say, what it is refused for, and what the trainer alone decides."""

import ast
import random
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from torch import nn

from fastdiff.runtime import rng
from fastdiff.runtime.errors import Failed, UsageError
from fastdiff.training import trainer as trainer_module
from fastdiff.training.method import Method, Phase, Trains, equation
from fastdiff.training.run import Run
from fastdiff.training.session import train, written_weights

METHODS = Path(__file__).parent.parent / "fastdiff" / "methods"


# ---- names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("extra_state", ""),
        ("states", "did you mean state"),
        ("prepared", "did you mean prepare"),
        ("player", "did you mean players"),
    ],
)
def test_a_public_name_that_is_no_part_of_a_method_is_refused_when_the_class_is_read(name, hint):
    with pytest.raises(TypeError, match=rf"Misspelt\.{name}: no part of a method.*{hint}"):
        type("Misspelt", (Method,), {name: lambda self: {}})


def test_own_functions_are_equations_or_private_and_a_subclass_may_override_them():
    class Own(Method):
        @equation("A paper, equation 1")
        def distance(self, a, b):
            """How far."""

        def _helper(self): ...

    class Further(Own):
        def distance(self, a, b): ...

    assert Own.distance.__doc__ == "How far. [A paper, equation 1]"


def test_what_a_method_lacks_is_named_before_anything_is_loaded():
    class Unfinished(Method):
        def players(self, phase):
            return {}

    with pytest.raises(TypeError, match="Unfinished: does not define losses, name"):
        train(Unfinished, None)


@pytest.mark.parametrize("name", ["student", "recipe"])
def test_a_role_that_was_never_made_is_named(name, tmp_path):
    class Without(toy.Toy):
        def players(self, phase):
            both = super().players(phase)
            vars(self).pop(name, None)
            return both

        if name == "recipe":
            recipe = property(lambda self: (_ for _ in ()).throw(AttributeError("recipe")))

        def networks(self):
            return [self.student]

    with pytest.raises(TypeError, match=f"Without: {name} not set"):
        toy.trainer_of(tmp_path, method=Without)


def test_a_loss_of_nobody_who_trains_is_named(tmp_path):
    class Stray(toy.Toy):
        def losses(self, batch, now):
            yield {"studnet": {"x": self.student(batch.latents).square().mean()}}

    with pytest.raises(TypeError, match="Stray.losses yields 'studnet', but what trains now is student, judge"):
        toy.trainer_of(tmp_path, method=Stray).train_step()


def test_micro_batches_that_yield_for_others_are_refused(tmp_path):
    """Else the step would end before its update, without a word."""

    class Moody(toy.Toy):
        def losses(self, batch, now):
            self.noise.append(1)
            if len(self.noise) % 2:
                yield {"student": {"x": self.student(batch.latents).square().mean()}}

    with pytest.raises(TypeError, match="Moody.losses yields other players for one micro-batch"):
        toy.trainer_of(tmp_path, method=Moody, grad_accum=2).train_step()


def test_a_time_budget_is_paced_by_whole_cycles_without_the_first_step(tmp_path, monkeypatch):
    """The first step takes 20 s, and of the others each tenth takes 11 s and the rest 1 s: 2 s on average."""

    class Uneven(toy.Toy):
        _phases = [Phase("", 1000)]

        @classmethod
        def cycle(cls, config):
            return 10

    trainer, clock = toy.trainer_of(tmp_path, method=Uneven, steps=1000, max_time="220s"), [0.0]
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: clock[0])

    def step():
        clock[0] += 20.0 if trainer.step == 0 else 11.0 if trainer.step % 10 == 0 else 1.0
        return {"step": trainer.step, "loss": 0.0}

    trainer.train_step = step
    trainer.fit()
    assert trainer.lengths == [101]
    assert trainer.elapsed_s == 220


def test_phases_without_steps_are_refused(tmp_path):
    class Hasty(toy.Toy):
        _phases = [Phase("a", 1), Phase("b", 0)]

    with pytest.raises(UsageError, match="`steps=1`: too few for 2 phases"):
        toy.trainer_of(tmp_path, method=Hasty, steps=1)


def test_no_method_yields_inside_a_with():
    """Autocast and no_grad would leak out of the generator."""
    files = [*METHODS.rglob("*.py"), *(METHODS.parents[1] / "examples" / "methods").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            manager = any(isinstance(d, ast.Name) and d.id == "contextmanager" for d in getattr(node, "decorator_list", []))
            if isinstance(node, ast.FunctionDef) and not manager:
                blocks = [inner for inner in ast.walk(node) if isinstance(inner, ast.With)]
                leaks = [w for w in blocks for y in ast.walk(w) if isinstance(y, ast.Yield | ast.YieldFrom)]
                assert not leaks, f"{path.name}:{leaks[0].lineno}"


# ---- progress


def test_phases_and_what_a_step_is_told_cannot_be_changed(tmp_path):
    trainer = toy.trainer_of(tmp_path)
    for value, name in ((trainer.phase, "steps"), (trainer.now, "fraction"), (Trains([]), "lr")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 7)


def test_a_time_budget_shortens_a_schedule_without_a_jump(tmp_path):
    """fraction goes on from where it was to 1 at the new end."""
    trainer = toy.trainer_of(tmp_path, steps=101)
    fractions = []
    for step in range(51):
        trainer.step = step
        if step == 20:
            trainer.shorten(51)
        fractions.append(trainer.now.fraction)
    steps = np.diff(fractions)
    assert fractions[:21] == [step / 100 for step in range(21)]
    assert fractions[-1] == pytest.approx(1)
    np.testing.assert_allclose(steps[:20], 0.01)
    np.testing.assert_allclose(steps[20:], 0.8 / 30)
    assert trainer.phase.steps == 101  # the plan stays


def test_a_resumed_schedule_goes_on_as_it_was_also_with_another_length(tmp_path):
    first = toy.trainer_of(tmp_path, steps=41, save_every=99)
    first.shorten(31)
    for _ in range(10):
        first.train_step()
        first.step += 1
    first.save()
    same = toy.trainer_of(tmp_path, steps=41)
    toy.go_on(same)
    assert same.now.fraction == pytest.approx(first.now.fraction)
    longer = toy.trainer_of(tmp_path, steps=61)
    toy.go_on(longer)
    assert longer.now.fraction == pytest.approx(first.now.fraction)
    longer.step = 60
    assert longer.now.fraction == pytest.approx(1)


# ---- random numbers


def test_numbers_of_a_micro_batch_do_not_depend_on_how_many_there_are(tmp_path):
    """Python's, NumPy's and torch's, in both turns of each micro-batch."""

    class Drawing(toy.Toy):
        def losses(self, batch, now):
            for who, net in (("judge", self.judge), ("student", self.student)):
                self.seen.append((who, batch.items, torch.rand(2).tolist(), random.random(), np.random.rand()))
                yield {who: {"x": net(batch.latents).square().mean()}}

    drawn = {}
    for n in (1, 2, 4):
        trainer = toy.trainer_of(tmp_path / str(n), grad_accum=n, batch_size=2)
        trainer.method.__class__ = Drawing
        trainer.train_step()
        turns = trainer.method.seen
        drawn[n] = [[turns[turn * n + part] for turn in range(2)] for part in range(n)]  # by micro-batch, its turns
    assert drawn[1] == drawn[2][:1] == drawn[4][:1]
    assert drawn[2] == drawn[4][:2]
    numbers = [number for part in drawn[4] for _, _, row, *others in part for number in (*row, *others)]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_any_seed_that_the_option_takes_seeds_the_generators(seed):
    made = rng.seed_for(seed, 7, 10**6)
    assert 0 <= made < 2**63  # what the generators of the CPU and of CUDA take
    torch.Generator().manual_seed(made)
    rng.reseed(made)
    rng.streams(rng.seed_for(seed, 7, 10**6), 3)


# ---- what is averaged, split and kept


def test_what_a_run_made_is_its_last_weights_or_its_own_network(tmp_path):
    run = Run(tmp_path, "toy")
    run.wrote(tmp_path / "previews" / "final.png")
    with pytest.raises(Failed, match="recorded no output"):
        written_weights(run)
    run.wrote(tmp_path / "tiny-vae")
    assert written_weights(run) == tmp_path / "tiny-vae"
    run.wrote(tmp_path / "a.safetensors")
    run.wrote(tmp_path / "b.safetensors")
    assert written_weights(run) == tmp_path / "b.safetensors"


def test_a_player_without_a_rate_has_the_configs(tmp_path):
    class Rates(toy.Toy):
        def players(self, phase):
            return {
                k: Trains(v.params, lr, (0.5, 0.9))
                for (k, v), lr in zip(super().players(phase).items(), (0.3, None), strict=True)
            }

    trainer = toy.trainer_of(tmp_path, method=Rates, lr=0.02)
    assert {k: p.optimizer.param_groups[0]["lr"] for k, p in trainer.players.items()} == {"student": 0.3, "judge": 0.02}
    assert trainer.players["judge"].optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert all(player.ema is None for player in trainer.players.values())  # nobody asked for an average


def test_phases_have_players_of_their_own(tmp_path):
    class Phased(toy.Toy):
        _phases = [Phase("a", 2, exports=False), Phase("b", 3)]

        def players(self, phase):
            both = super().players(phase)
            return both if phase.name == "b" else {"student": both["student"]}

        def losses(self, batch, now):
            self.noise.append((now.phase.name, now.step, now.done, now.fraction))
            yield {"student": {"x": self.student(batch.latents).square().mean()}}

    trainer = toy.trainer_of(tmp_path, method=Phased)
    trainer.fit()
    assert trainer.method.noise == [("a", 0, 0, 0.0), ("a", 1, 1, 1.0), ("b", 2, 0, 0.0), ("b", 3, 1, 0.5), ("b", 4, 2, 1.0)]
    assert isinstance(trainer.method.student, nn.Module)
