"""A method outside of a trainer: its phases entered by hand, its losses at any step."""

import torch

from fastdiff.training.method import Now


def phases_of(method):
    """{name: (phase, first step)}."""
    found, start = {}, 0
    for phase in method.phases():
        found[phase.name] = phase, start
        start += phase.steps
    return found


def entered(method, name=None):
    """The method in that phase, or in its first one."""
    found = phases_of(method)
    method.current = found[name if name is not None else next(iter(found))]
    method.played = method.players(method.current[0])
    return method


def now(method, step=0):
    """What the trainer would tell it at a step of the run."""
    phase, start = method.current
    return Now(step, phase, step - start, (step - start) / max(1, phase.steps - 1))


def play(method, batch, step=0):
    """Its losses at a step; a method that was not entered is in its first phase."""
    if "current" not in vars(method):
        entered(method)
    return method.losses(batch, now(method, step))


def trained(method, who):
    """What that player trains."""
    if "current" not in vars(method):
        entered(method)
    return method.played[who].params


def moves_everybody(method, batch):
    """Each player gets gradients from its losses: finite ones, and not all zero."""
    (turn,) = play(method, batch)
    for who, terms in turn.items():
        grads = torch.autograd.grad(sum(terms.values()), trained(method, who), retain_graph=True)
        assert all(g.isfinite().all() for g in grads)
        assert sum(g.norm() for g in grads) > 0


def trainees(method):
    """{player: parameters}."""
    if "current" not in vars(method):
        entered(method)
    return {who: one.params for who, one in method.played.items()}
