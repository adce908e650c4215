"""How often a student draws each picture of a group, compared with the teacher, for prompts that name only a group.

    python examples/emoji/frequencies.py runs/dmd-emoji/dmd.safetensors:1 lightning-4step.safetensors:4

Each argument is a few-step LoRA of `emoji` and a number of steps. The judge tells which real picture is nearest to each of the
4,000 pictures of the closing tables. A figure is the share of a row's pictures that would have to change until every picture of a
group is drawn as often as the teacher draws it (total variation distance). The teacher's own row, drawn from other noise, shows
how large that share is by chance.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data import emoji, held_out
from fastdiff.quality import emoji as judge
from fastdiff.quality.evaluation import Evaluation
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

N = judge.JUDGED


def parts(prompts: judge.Prompts) -> dict[str, Tensor]:
    """Return the rows of group prompts: of held-out groups, of new pairings of group and background, and of trained ones."""
    unseen = torch.tensor([held_out.names_held_out(line) for line in prompts.captions])
    whole = torch.tensor([emoji.pictures()[picture].group in held_out.GROUPS for picture in prompts.picture.tolist()])
    chosen = {"held-out groups": unseen & whole, "new pairings": unseen & ~whole, "seen": ~unseen}
    return {name: (rows & prompts.coarse).nonzero().flatten() for name, rows in chosen.items()}


def distance(drawn: Tensor, wanted: Tensor, group: Tensor) -> float:
    """Return the total variation distance of picture numbers (N,) from those of the teacher (N,), of the same groups (N,)."""
    changed = 0.0
    for g in group.unique():
        of = [torch.bincount(pictures[group == g], minlength=len(emoji.pictures())) for pictures in (drawn, wanted)]
        changed += (of[0] - of[1]).abs().sum().item() / 2
    return changed / len(drawn)


def file_and_steps(argument: str) -> tuple[str, int]:
    """Read FILE:STEPS. Raises ArgumentTypeError if the file is not there or the number of steps is not above 0."""
    file, _, steps = argument.rpartition(":")
    if not Path(file).is_file() or not steps.isdecimal() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{argument}: write FILE:STEPS with a LoRA that exists, as dmd.safetensors:1")
    return file, int(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", metavar="FILE:STEPS", type=file_and_steps)
    students = parser.parse_args().students
    shipped, prompts = judge.shipped(), judge.Prompts.judged(N)
    rows = {"teacher, 50 calls": shipped.teacher}
    rows |= {f"undistilled, {calls} calls": shipped.best(calls, "frechet") for calls in shipped.calls}
    if students:
        evaluation = Evaluation.shipped(checkpoint.load("emoji"), N, device="cpu")
        for file, steps in students:
            sampler = Sampler("emoji", loras=[file], device="cpu", compile="off")
            settings = Settings.of(sampler.recipe, Settings.usual(SHIPPED), num_steps=steps)
            rows[f"{file}, {settings.calls} calls"] = evaluation.row(file, sampler, settings)
    wanted, group, chosen = judge.nearest(shipped.reference["embedded"][:N]), judge.groups()[prompts.picture], parts(prompts)
    print(f"| | {' | '.join(f'{name} ({len(part)} pictures)' for name, part in chosen.items())} |\n|" + " --- |" * 4)
    for name, row in rows.items():
        drawn = judge.nearest(row.features["embedded"][:N])
        figures = [f"{100 * distance(drawn[part], wanted[part], group[part]):.0f} %" for part in chosen.values()]
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
