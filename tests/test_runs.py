"""Runs survive: killed at any instant, stopped, on a full disk, on bad steps; what comes after is what would have come."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import toy

from fastdiff import cli
from fastdiff.runtime import processes, rng, stop
from fastdiff.runtime.disk import HashedFile
from fastdiff.runtime.errors import DoesNotFit, Failed, InputRefused, Stopped, UsageError
from fastdiff.training import resume
from fastdiff.training import states as states
from fastdiff.training.method import Phase
from fastdiff.training.run import Run
from fastdiff.training.states import States

ROOT = Path(__file__).parent.parent


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{k: v for k, v in row.items() if k not in {"time", "elapsed_s"}} for row in rows(folder)]


def script(*args, timeout=500, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **env}
    done = subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- states


def saved(folder, step, **more):
    return States(folder).save({"step": step, "x": torch.full((1000,), float(step)), **more}, 2, command="toy", config={})


def test_states_are_numbered_kept_and_never_overwritten(tmp_path):
    for step in (1, 2, 10, 10, 10, 9):
        saved(tmp_path, step)
    assert [p.name for p in States(tmp_path).paths()] == ["000010-1", "000010-2"]
    assert States(tmp_path).newest().name == "000010-2"
    assert not list(tmp_path.glob(".*"))
    manifest = json.loads((tmp_path / "000010-1" / "manifest.json").read_text())
    assert (manifest["step"], manifest["command"], list(manifest["files"])) == (10, "toy", ["state.pt"])


@pytest.mark.parametrize("harm", ["flip", "truncate", "no state", "no manifest", "torn manifest"])
def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(harm, tmp_path, capsys):
    saved(tmp_path, 1), saved(tmp_path, 2)
    file, manifest = tmp_path / "000002" / "state.pt", tmp_path / "000002" / "manifest.json"
    data = file.read_bytes()
    change = {
        "flip": lambda: file.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "truncate": lambda: file.write_bytes(data[:100]),
        "no state": file.unlink,
        "no manifest": manifest.unlink,
        "torn manifest": lambda: manifest.write_text(manifest.read_text()[:20]),
    }
    change[harm]()
    found = States(tmp_path)
    assert found.load(found.newest())["step"] == 1
    err = capsys.readouterr().err
    assert "000002" in err
    assert "the state before it is taken" in err
    found.save({"step": 2}, 2, command="toy", config={})  # the damaged one goes when there is a better one
    assert [p.name for p in found.paths()] == ["000001", "000002-1"]


def test_damaged_states_alone_are_refused_and_so_is_an_old_layout(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "000001" / "state.pt").write_bytes(b"x")
    with pytest.raises(InputRefused, match="no state in it is whole"):
        States(tmp_path).newest()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputRefused, match="earlier fastdiff"):
        States(tmp_path).newest()
    assert States(tmp_path / "none").newest() is None


CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


def test_killed_at_every_call_that_changes_the_disk_no_state_is_lost(tmp_path):
    """The process dies before the nth such call of a save, for every n until a save gets through."""
    folder = tmp_path / "state"
    saved(folder, 1), saved(folder, 2)

    def dying(n):
        left = [n]

        def before(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, before(getattr(os, name)))
        saved(folder, 3 + n)

    for n in range(100):
        known = States(folder).newest()
        code = toy.child(lambda n=n: dying(n)).wait()
        found = States(folder)
        state = found.load(found.newest())
        assert state["step"] >= int(known.name), n
        assert (state["x"] == state["step"]).all()
        assert not found.superseded, "a killed save looks like a damaged state"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert n > 8
    assert state["step"] == 3 + n


def test_killed_at_random_instants_a_run_goes_on_and_ends_as_if_nothing_had_been(tmp_path):
    told = eval(script(ROOT / "tests" / "toy.py", tmp_path, 4))
    assert [code for code, _ in told] == [-signal.SIGKILL] * 4
    assert [step for _, step in told] == sorted({step for _, step in told}), "one of them lost what the one before had"


@pytest.mark.slow
def test_killed_at_thirty_random_instants(tmp_path):
    told = eval(script(ROOT / "tests" / "toy.py", tmp_path, 30))
    assert len(told) == 30
    assert sum(code == -signal.SIGKILL for code, _ in told) > 25
    print(told)


def after(number, names, folder, *places):
    """tests/killed.py on these commands with that signal: what it tells of each."""
    out = script(ROOT / "tests" / "killed.py", folder, *places, *(f"{name}:{number.name}" for name in names), timeout=1500)
    told = {row["command"]: row for row in map(json.loads, out.splitlines())}
    assert list(told) == list(names)
    return told


def ended_as_if_nothing_had_been(row):
    assert not row["differ"]  # files, log, and of all players weights, averages and moments
    assert row["files"] > 0
    assert row["rows"] > 1
    assert row["averaged"] == 1


def test_a_command_killed_with_9_goes_on_and_ends_bit_by_bit_the_same(tiny_sd, tmp_path):
    """In processes of its own; one here, all in a slow test."""
    (row,) = after(signal.SIGKILL, ["train-lcm-lora"], tmp_path, tiny_sd, "none", "none").values()
    assert (row["codes"], row["at"]) == ([0, -signal.SIGKILL, 0], ["000005"])
    ended_as_if_nothing_had_been(row)


@pytest.fixture(scope="module")
def all_killed(tiny_sd, tiny_controlnet, tiny_pruned, tmp_path_factory):
    return after(signal.SIGKILL, tiny.COMMANDS, tmp_path_factory.mktemp("killed"), tiny_sd, tiny_controlnet, tiny_pruned)


@pytest.fixture(scope="module")
def all_stopped(tiny_sd, tiny_controlnet, tiny_pruned, tmp_path_factory):
    return after(signal.SIGTERM, tiny.COMMANDS, tmp_path_factory.mktemp("stopped"), tiny_sd, tiny_controlnet, tiny_pruned)


TRAINING = cli.PLANNED


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINING)
def test_every_command_killed_with_9_goes_on_and_ends_bit_by_bit_the_same(command, all_killed):
    row = all_killed[command]
    assert (row["codes"], row["at"]) == ([0, -signal.SIGKILL, 0], ["000005"])
    ended_as_if_nothing_had_been(row)


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINING)
def test_every_command_ends_soon_after_sigterm_with_75_and_goes_on(command, all_stopped):
    row = all_stopped[command]
    assert (row["codes"], row["at"]) == ([0, 75, 0], ["000005", "000008"])
    assert row["late_s"] < 2
    ended_as_if_nothing_had_been(row)


def test_a_state_holds_every_generator_and_the_data_position(tmp_path):
    trainer = toy.trainer_of(tmp_path, steps=3)
    trainer.fit()
    expected = random.random(), np.random.rand(), torch.rand(1)
    again = toy.trainer_of(tmp_path, steps=3)
    assert toy.go_on(again) == 3
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert again.data.position == 3
    assert set(rng.state_dict()) >= {"python", "numpy", "torch"}


def test_a_torn_log_line_and_rows_after_the_state_go(tmp_path):
    whole = toy.trainer_of(tmp_path / "whole", steps=30, save_every=8)
    whole.fit()
    first = toy.trainer_of(tmp_path / "parts", steps=17, save_every=8)
    first.run.states.save, real = lambda *a, **k: first.step == 17 or real(*a, **k), first.run.states.save
    first.fit()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    second = toy.trainer_of(tmp_path / "parts", steps=30, save_every=8)
    assert toy.go_on(second) == 16
    second.fit()
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


# ---- the disk


def test_a_full_disk_leaves_the_old_state_and_names_the_path(tmp_path, monkeypatch):
    trainer = toy.trainer_of(tmp_path, steps=9, save_every=4)
    real, written = HashedFile.write, [0]

    def full(self, data):
        written[0] += trainer.step == 8
        if trainer.step == 8 and written[0] > 3:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return real(self, data)

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(DoesNotFit, match=r"\.000008.*: no space left on device") as told:
        trainer.fit()
    assert told.value.exit_code == 4
    assert told.value.hint == f"the last good state is {tmp_path / 'state' / '000004'}"
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["000004"]
    monkeypatch.undo()
    again = toy.trainer_of(tmp_path, steps=9)
    assert toy.go_on(again) == 4


def test_a_log_that_cannot_be_written_names_itself(tmp_path, monkeypatch):
    run = Run(tmp_path, "toy")
    real = Path.open

    def full(self, mode="r", *args, **kwargs):
        if mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DoesNotFit, match=r"metrics\.jsonl: no space left"):
        run.log({"step": 1})


# ---- changed options


def test_another_config_is_refused_with_its_keys(tmp_path):
    toy.trainer_of(tmp_path, steps=3).fit()
    find = lambda **changes: resume.find(Run(tmp_path, "toy"), toy.Config(**{**values, **changes}))
    values = {"steps": 3, "batch_size": 4, "device": "cpu", "ema": 0.9, "lr": 1e-2, "save_every": 1}
    assert find(steps=9, save_every=5, keep_states=1, max_bad_steps=3)["step"] == 3
    with pytest.raises(UsageError) as told:
        find(lr=1e-3, batch_size=8)
    assert "begun with `batch_size=4` (now 8), `lr=0.01` (now 0.001)" in str(told.value)
    assert f"`resume={tmp_path}`" in told.value.hint
    assert find(lr=1e-3, resume=str(tmp_path))["step"] == 3  # asked for
    assert find(lr=1e-3, resume="never") is None
    with pytest.raises(UsageError, match="is a run of toy"):
        resume.find(Run(tmp_path, "dmd"), toy.Config(**values))
    with pytest.raises(UsageError, match="no state in that run folder"):
        find(resume=str(tmp_path / "none"))


def test_a_state_of_other_networks_is_refused(tmp_path):
    toy.trainer_of(tmp_path, steps=2).fit()
    with pytest.raises(InputRefused, match="does not fit this run .student: 4 parameters"):
        toy.go_on(toy.trainer_of(tmp_path, steps=2, width=8))
    other = toy.trainer_of(tmp_path, steps=2)
    other.method.parent = "another"
    with pytest.raises(InputRefused, match="another base"):
        toy.go_on(other)


def test_begun_anew_the_old_states_go_with_the_first_new_one(tmp_path):
    toy.trainer_of(tmp_path, steps=12).fit()
    trainer = toy.trainer_of(tmp_path, steps=3, save_every=2, resume="never")
    assert resume.find(trainer.run, trainer.config) is None
    trainer.train_step()
    assert trainer.run.load_state()["step"] == 12  # until then nothing is lost
    trainer.run.states.superseded |= set(trainer.run.states.paths())
    trainer.fit()
    assert [p.name for p in trainer.run.states.paths()] == ["000002", "000003"]


def test_torchrun_starting_again_resumes_even_a_run_begun_with_never(tmp_path, monkeypatch):
    toy.trainer_of(tmp_path, steps=2).fit()
    again = toy.trainer_of(tmp_path, steps=2, resume="never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume.find(again.run, again.config)["step"] == 2


# ---- bad steps


def test_one_bad_step_is_skipped_told_with_its_items_and_the_run_ends_well(tmp_path, capsys):
    trainer = toy.trainer_of(tmp_path, bad={(5, "student"): math.nan}, steps=12)
    before = {}
    real = trainer.train_step

    def step():
        if trainer.step == 5:
            before.update(toy.result(trainer))
        row = real()
        if trainer.step == 5:
            after = toy.result(trainer)
            assert toy.same(before["players"]["student"], after["players"]["student"])
            assert toy.same(before["ema"], after["ema"])
            assert not toy.same(before["players"]["judge"], after["players"]["judge"])
        return row

    trainer.train_step = step
    trainer.fit()
    assert before
    items = trainer.method.seen[5]
    (row,) = [row for row in rows(tmp_path) if "skipped" in row]
    assert (row["step"], row["skipped"], row["items"]) == (5, {"student": "loss"}, items)
    assert f"step 5: loss of student not finite; skipped; items {' '.join(items)}" in capsys.readouterr().err
    assert all(p.isfinite().all() for player in trainer.players.values() for p in player.params)


def test_a_gradient_that_is_not_finite_is_found_too(tmp_path, capsys):
    trainer = toy.trainer_of(tmp_path, steps=3)
    trainer.method.student[0].weight.register_hook(lambda g: g * math.inf)
    trainer.config.max_bad_steps = 3
    with pytest.raises(Failed, match="3 bad steps of student in a row"):
        trainer.fit()
    assert "gradient of student not finite" in capsys.readouterr().err


@pytest.mark.parametrize("who", ["student", "judge"])
def test_bad_for_ever_ends_with_exit_1_and_the_last_good_state_named(who, tmp_path):
    """Although the other player does well at every step."""
    trainer = toy.trainer_of(tmp_path, bad={(k, who): math.nan for k in range(4, 99)}, steps=50, save_every=3, max_bad_steps=4)
    with pytest.raises(Failed, match=f"step 7: 4 bad steps of {who} in a row") as told:
        trainer.fit()
    assert told.value.exit_code == 1
    assert f"the last good state is {tmp_path / 'state' / '000006'}" in told.value.hint
    again = toy.trainer_of(tmp_path, steps=9)
    assert toy.go_on(again) == 6
    again.fit()


def test_bad_steps_between_good_ones_do_not_add_up(tmp_path):
    bad = {(k, "student"): math.nan for k in range(30) if k % 3}
    trainer = toy.trainer_of(tmp_path, bad=bad, steps=30, save_every=99, max_bad_steps=3)
    trainer.fit()
    assert sum("skipped" in row for row in rows(tmp_path)) == 20


# ---- stops


def interrupted(trainer, at, number=signal.SIGTERM):
    """The signal arrives in the middle of that step."""
    real = trainer.train_step

    def step():
        if trainer.step == at:
            os.kill(os.getpid(), number)
        return real()

    trainer.train_step = step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(number, code, tmp_path):
    whole = toy.trainer_of(tmp_path / "whole", save_every=99)
    whole.fit()
    first = toy.trainer_of(tmp_path / "parts", save_every=99)
    interrupted(first, 6, number)
    with pytest.raises(Stopped, match="stopped at step 7 of 12") as told:
        first.fit()
    assert told.value.exit_code == code
    assert told.value.result.next_command == f"fastdiff toy --config {tmp_path / 'parts' / 'config.toml'}"
    assert [p.name for p in first.run.states.paths()] == ["000007"]
    second = toy.trainer_of(tmp_path / "parts", save_every=99)
    toy.go_on(second)
    second.fit()
    assert toy.same(toy.result(whole), toy.result(second))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_a_stop_in_a_preview_or_measurement_ends_it_and_the_resumed_run_makes_it_again(tmp_path):
    def watched(folder, when=None):
        made, units = [], []
        trainer = toy.trainer_of(folder, steps=6, preview_every=2, eval_every=3, save_every=99, keep="best")

        def work(what):
            for k in range(100):
                units.append((what, trainer.step, k))
                if units[-1] == when:
                    os.kill(os.getpid(), signal.SIGTERM)
                stop.check()
            made.append((what, trainer.step))
            return {"score": 1.0 / trainer.step}

        trainer.preview, trainer.measure = lambda step: work("preview"), lambda: work("measure")
        return trainer, made, units

    whole, expected, _ = watched(tmp_path / "whole")
    whole.fit()
    assert expected == [("preview", 2), ("measure", 3), ("preview", 4), ("preview", 6), ("measure", 6)]
    for what, step in (("preview", 4), ("measure", 3), ("measure", 6)):
        folder = tmp_path / f"{what}{step}"
        first, made, units = watched(folder, (what, step, 50))
        with pytest.raises(Stopped, match=f"stopped at step {step}"):
            first.fit()
        assert units[-1] == (what, step, 50)  # nothing more is done after the signal
        second, more, _ = watched(folder)
        assert toy.go_on(second) == step
        second.fit()
        assert list(dict.fromkeys(made + more)) == expected  # a preview before the measurement is drawn again too
        assert timeless(folder) == timeless(tmp_path / "whole")
        assert second.best["step"] == whole.best["step"] == 6


def test_the_best_of_every_phase_is_told_also_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.Toy, "_phases", [Phase("a", 3), Phase("b", 3)])
    scores = iter([0.5, 0.2, 0.9, 0.8, 0.7, 0.75])
    expected = {"a": {"step": 2, "score": 0.2}, "b": {"step": 5, "score": 0.7}}
    trainer = toy.trainer_of(tmp_path, steps=6, eval_every=1, save_every=99, keep="best")
    trainer.measure = lambda: {"score": next(scores)}
    interrupted(trainer, 3)
    with pytest.raises(Stopped):
        trainer.fit()
    second = toy.trainer_of(tmp_path, steps=6, eval_every=1, save_every=99, keep="best")
    assert toy.go_on(second) == 4
    second.measure = trainer.measure
    second.fit()
    assert second.kept == expected


def test_a_stop_while_the_weights_are_written_is_made_up_for(tmp_path):
    first = toy.trainer_of(tmp_path, steps=3, save_every=99)
    first.finished = lambda phase: (os.kill(os.getpid(), signal.SIGTERM), stop.check())
    with pytest.raises(Stopped, match="stopped at step 3 of 3"):
        first.fit()
    second, done = toy.trainer_of(tmp_path, steps=3), []
    assert toy.go_on(second) == 3
    second.finished = lambda phase: done.append(phase)
    second.fit()
    assert len(done) == 1


def test_a_second_ctrl_c_stops_at_once_but_not_the_echo_of_the_first(monkeypatch):
    clock = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr(stop, "time", clock)

    def pressed_twice():
        with stop.watching("fastdiff toy"):
            os.kill(os.getpid(), signal.SIGINT)
            clock.now_s += stop.StopRequest.GAP_S - 0.01
            os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what the terminal has sent already
            assert stop.request.exit_code == 130
            clock.now_s += 0.02
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not stopped")

    with pytest.raises(Stopped, match="interrupted") as told:
        pressed_twice()
    assert (told.value.exit_code, told.value.result.next_command) == (130, "fastdiff toy")


def test_the_command_to_go_on_names_its_launcher(monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    assert processes.launched("fastdiff dmd") == "torchrun --nproc-per-node=8 -m fastdiff dmd"
    monkeypatch.setenv("WORLD_SIZE", "16")
    place = "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node0:29400"
    assert processes.launched("fastdiff dmd") == f"torchrun {place} --nproc-per-node=8 -m fastdiff dmd"


def test_nobody_watching_a_signal_is_the_programs_own():
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop.watching():
        with stop.watching():
            assert signal.getsignal(signal.SIGTERM) != handlers[0]
        assert signal.getsignal(signal.SIGTERM) != handlers[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    stop.check()


def test_a_stop_is_asked_of_the_work_that_was_watched_and_of_no_later_one():
    with stop.watching():
        stop.request.note(signal.SIGTERM, None)
        with pytest.raises(Stopped):
            stop.check()
    stop.check()


def signals_at(monkeypatch, call, when=lambda: True):
    """SIGTERM at that network call of those for which `when` holds; counts these as `before` and all that follow as `after`."""
    from fastdiff.sampling.engine import Caller

    real, calls = Caller.__call__, SimpleNamespace(before=0, after=0)

    def answer(*args, **kwargs):
        if calls.before == call:
            calls.after += 1
        elif when():
            calls.before += 1
            if calls.before == call:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(Caller, "__call__", answer)
    return calls


QUICK = "--resolution 64 --pairs 2 --teacher-steps 6 --lora-rank 2 --batch-size 2 --grad-accum 1 --device cpu --num-steps 2"


def test_sigterm_in_caching_is_75_at_once_and_the_same_command_goes_on(fastdiff, tiny_sd, tmp_path, monkeypatch):
    args = f"train-lcm-lora --base {tiny_sd} -o run --steps 1 --prompts prompts.txt {QUICK} --resume never".split()
    calls = signals_at(monkeypatch, 3)
    code, told = fastdiff(*args)
    assert (code, told["ok"], told["error"]["kind"]) == (75, False, "stopped")
    assert (calls.before, calls.after) == (3, 0)
    assert told["next_command"] == f"fastdiff {' '.join(args)}"
    assert told["next_command"] in told["error"]["hint"]
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert fastdiff(*args)[0] == 0


def test_sigterm_in_a_preview_of_a_real_run(fastdiff, tiny_sd, tmp_path, monkeypatch):
    from fastdiff.training import previews

    drawing = []
    real = previews.Preview.sheet
    monkeypatch.setattr(previews.Preview, "sheet", lambda *a: (drawing.append(1), real(*a), drawing.clear())[1])
    args = f"train-lcm-lora --base {tiny_sd} -o run --steps 3 --prompts prompts.txt --preview-every 1 {QUICK}".split()
    calls = signals_at(monkeypatch, 5, lambda: bool(drawing))
    code, told = fastdiff(*args)
    assert (code, calls.before, calls.after) == (75, 5, 0)
    assert told["error"]["message"] == "stopped at step 1 of 3; the state is in run/state"
    assert told["next_command"] == "fastdiff train-lcm-lora --config run/config.toml"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    code, told = fastdiff(*told["next_command"].split()[1:])
    assert (code, told["metrics"]["steps"]) == (0, 3)
    assert sorted(p.name for p in (tmp_path / "run" / "previews").iterdir()) == [
        "000001.png", "000002.png", "000003.png", "final.png",
    ]  # fmt: skip


def test_sigterm_in_an_evaluation_is_75_at_once_and_names_the_command(fastdiff, monkeypatch):
    calls = signals_at(monkeypatch, 3)
    args = ["evaluate", "--student", "emoji", "--num-steps", "2", "--reference", "teacher:2", "--num-images", "8"]
    code, told = fastdiff(*args)
    assert (code, told["error"]["kind"], calls.before, calls.after) == (75, "stopped", 3, 0)
    assert told["next_command"] == f"fastdiff {' '.join(args)}"


def test_too_little_room_is_exit_4_before_the_first_step(fastdiff, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdiff.runtime.disk.free_bytes", lambda folder: 2**20)
    args = f"train-lcm-lora --base {tiny_sd} -o run --steps 1 --prompts prompts.txt {QUICK} --lora-rank 64"
    code, told = fastdiff(*args.split())
    assert (code, told["error"]["kind"]) == (4, "capacity")
    assert "--output run: its disk has 0.00 GiB free" in told["error"]["message"]
    assert not (tmp_path / "run").exists()
