"""How often a training step waits for the device: every read of a value that the device computed is such a wait."""

import traceback

import pytest
import torch
from conftest import build
from test_autocast import CASES, METHODS, folders, trainer_of  # noqa: F401  (folders is a fixture)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.training import method, trainer
from fastdiff.training.method import read

STEPS = [(name, next(iter(CASES.get(name, {"": {}})))) for name in METHODS]
STEPS += [("train-lcm-lora", "full"), ("lightning", "heads"), ("dmd", "dmd2"), ("distill-controlnet", "one-step")]


class Reads(TorchDispatchMode):
    """Counts reads of values that come from the networks or the batch; the CPU's own draws are no wait for a device."""

    def __init__(self, device_tensors):
        super().__init__()
        self.known, self.places = WeakTensorKeyDictionary(), []
        for tensor in device_tensors:
            self.known[tensor] = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = any(tensor in self.known for tensor in flat)
        if ours and function is torch.ops.aten._local_scalar_dense.default:
            self.places.append("".join(traceback.format_stack()[-6:-1]))
        result = function(*args, **kwargs)
        if ours:
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.known[tensor] = True
        return result


def counted(trainer_, monkeypatch):
    """(reads by `read`, other reads, player updates) of one step."""
    by_read, updates = [], []
    real, update = read, trainer_.update
    for module in (trainer, method):
        monkeypatch.setattr(module, "read", lambda figures: (by_read.append(len(figures)), real(figures))[1])
    monkeypatch.setattr(trainer_, "update", lambda *args: (updates.append(1), update(*args))[1])
    batches = []
    draw = trainer_.draw

    def drawn(n):
        found, streams = draw(n)
        for batch in found:
            values = [batch.latents, batch.noise, batch.pixels, *vars(batch.cond).values(), *vars(batch.uncond).values()]
            batches.extend(v for v in values if isinstance(v, torch.Tensor))
        for value in batches:
            mode.known[value] = True
        return found, streams

    monkeypatch.setattr(trainer_, "draw", drawn)
    nets = trainer_.method.networks()
    mode = Reads([t for net in nets for t in (*net.parameters(), *net.buffers())])
    with mode:
        trainer_.train_step()
    return len(by_read), mode.places, len(updates)


@pytest.fixture(scope="module")
def small(folders, tmp_path_factory):  # noqa: F811
    """The same with a network of a third of the layers: how often a step reads does not depend on them."""
    return dict(folders, base=str(build(tmp_path_factory.mktemp("small") / "sd", "bk-tiny", "epsilon")))


@pytest.mark.parametrize(("name", "case"), STEPS)
def test_a_step_reads_its_figures_once_a_turn(name, case, folders, small, tmp_path, monkeypatch):  # noqa: F811
    cut = name in {"prune", "distill-controlnet"}  # what cannot be cut once more
    one = trainer_of(name, case, folders if cut else small, "fp32", tmp_path, resolution=64)
    for index in range(len(one.phases)):
        if index:
            one.enter(index)
        one.step = one.start
        together, single, updates = counted(one, monkeypatch)
        monkeypatch.undo()
        assert single == []
        assert 1 <= together <= updates


def test_reads_do_not_grow_with_micro_batches_or_losses(folders, tmp_path, monkeypatch):  # noqa: F811
    one = trainer_of("distill-vae", "encoder", folders, "fp32", tmp_path, grad_accum=3)
    assert counted(one, monkeypatch) == (2, [], 3)  # turns, and players
