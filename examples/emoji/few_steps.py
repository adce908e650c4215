"""Draw unseen prompts by the teacher, by the best undistilled sampler, and by few-step students: one labelled picture.

    python examples/emoji/few_steps.py TDM=tdm.safetensors:4 TDM=tdm-2.safetensors:2 TDM=tdm-1.safetensors:1 --out few-steps.png

Each argument is a name, a few-step LoRA of `emoji` and a number of steps. All columns start from the same noise.
"""

import argparse
from pathlib import Path

from fastdiff.checkpoints.family import SHIPPED
from fastdiff.quality import emoji as judge
from fastdiff.runtime import rng
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import Sheet, in_calls

SHOWN = (0, 4, 8, 12, 2, 6)  # of the judged prompts: four named ones and two of groups, all of them unseen
UNDISTILLED_CALLS, SIDE_PX = 4, 64


def student(argument: str) -> tuple[str, str, int]:
    """Read NAME=FILE:STEPS. Raises ArgumentTypeError if the file is not there or the number of steps is not above 0."""
    name, _, rest = argument.partition("=")
    file, _, steps = rest.rpartition(":")
    if not name or not Path(file).is_file() or not steps.isdecimal() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{argument}: write NAME=FILE:STEPS with a LoRA that exists, as TDM=tdm.safetensors:4")
    return name, file, int(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", metavar="NAME=FILE:STEPS", type=student)
    parser.add_argument("--out", type=Path, default=Path("few-steps.png"))
    args = parser.parse_args()
    every = judge.Prompts.judged(max(SHOWN) + 1).captions
    lines, seeds = [every[i] for i in SHOWN], [rng.USERS(i) for i in SHOWN]
    base, columns = Sampler("emoji", device="cpu", compile="off"), []

    def draw(name: str, sampler: Sampler, settings: Settings) -> None:
        cond, uncond = sampler.conds(lines)
        columns.append((in_calls(name, settings.calls), sampler.pixels(cond, uncond, seeds, settings, resolution_px=SIDE_PX)))

    draw("teacher", base, judge.shipped().teacher.settings)
    draw("undistilled", base, judge.shipped().best(UNDISTILLED_CALLS, "frechet").settings)
    for name, file, steps in args.students:
        sampler = Sampler("emoji", loras=[file], device="cpu", compile="off")
        draw(name, sampler, Settings.of(sampler.recipe, Settings.usual(SHIPPED), num_steps=steps))
    Sheet.of_columns(columns, lines).save(args.out)


if __name__ == "__main__":
    main()
