"""The rows of run.py: what each one runs, how long it may take, and what a rehearsal changes about it.

Groups: a `emoji` runs whole on the card; b SDXL and SD1.5 train within the memory of small cards; c pictures by the CUDA graph
and training steps, against diffusers; d long proofs on `emoji`, and what else takes memory. Beside all of them run the tests that
need a card and the rows whose networks the compiler takes minutes for.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One process. `words` are a fastdiff command, unless `program` says that they are a program's."""

    name: str
    group: str  # BESIDE = from the start to the end, beside the groups
    words: str  # OUT stands for the folder of the results, in a program PYTHON and ROOT for the interpreter and the repository
    limit_s: float
    tiny: str = ""  # further words in a rehearsal
    after: str = ""  # the row whose files it needs
    how: str = ""  # what row.py changes about the command: "steps", "graph"
    memory_gib: float = 0  # what the process may take of the card; 0 = all
    exit_code: int = 0
    cpu_exit_code: int | None = None  # where a rehearsal ends otherwise
    stop_after_rows: int = 0  # send SIGTERM when metrics.jsonl has so many lines
    no_device: bool = False  # the command has no --device
    program: bool = False
    wanted: dict[str, float] = {}  # goals: {figure: the least value}


# A step of a rehearsal takes about a second. Later options win, so these follow a row's own.
SHORT = "--steps 20 --save-every 10"
SHORTEST = "--steps 2 --batch-size 2 --eval-every 0 --preview-every 0"


BESIDE = ""


def emoji(name: str, words: str, limit_s: float = 75, tiny: str = "", *, pairs: bool = True, **more: Any) -> Row:
    """A training command on the embedded checkpoint, 20 steps long, with its folder after the row's name.

    `pairs`: whether it has the option; methods that train on prompts alone do not.
    """
    folder, few, fewest = name.replace(" ", "-"), " --pairs 16" * pairs, " --pairs 4" * pairs
    return Row(f"emoji {name}", "a", f"{words} {SHORT}{few} -o OUT/{folder}", limit_s, f"{SHORTEST}{fewest} {tiny}", **more)


def tests(name: str, chosen: str) -> Row:
    """A part of the tests that need a card; the parts together are all of them."""
    return Row(
        f"gpu tests, {name}", BESIDE, f"PYTHON -m pytest -q -m gpu -p no:cacheprovider ROOT/tests/test_gpu.py -k '{chosen}'", 400,
        program=True,
    )  # fmt: skip


def steps(name: str, words: str, memory_gib: float, group: str = "b", limit_s: float = 150) -> Row:
    """Steps of a method on a published base with random weights, and a contact sheet, in so much memory."""
    words = f"{words} --grad-accum 1 --prompts OUT/prompts.txt -o OUT/steps"
    return Row(f"{name} in {memory_gib:g} GiB", group, words, limit_s, how="steps", memory_gib=memory_gib)


def bench(name: str, words: str, group: str = "c", limit_s: float = 105, tiny: str = "", **more: Any) -> Row:
    """A comparison with diffusers, with random weights."""
    words = f"bench {words} --random-weights --rounds 0 --precision bf16"
    tiny = f"--precision fp32 --resolution 64 --calls 1 {tiny}"
    return Row(name, group, words, limit_s, tiny, **more)


SDXS = "--base sd21 --layout sdxs-512 --num-steps 1 --decoder tiny --stock-decoder tiny --resolution 512"
DMD2 = "dmd --base sdxl --recipe dmd2 --eval-every 0 --keep last --patience 0"
TDM = "tdm --base sdxl --eval-every 0 --keep last --patience 0"
SMALL = "--quantize-base int8 --optimizer adafactor --offload"  # an option that this version lacks is a failed row
OFF, AUTO, MAX = "--compile off --calls 10", "--compile auto --calls 10", "--compile max --against compiled --calls 10"
UNCOMPILED = "--compile off --against eager"  # a CPU's compiler takes minutes
# fmt: off
ROWS = [
    tests("steps", "learn"),
    tests("gradients", "point"),
    tests("pictures", "graphs or auto or resumed"),
    tests("memory", "memory or plan or evaluate"),
    bench("sdxs-512 compiled", f"sample {SDXS} {AUTO}", BESIDE, 420, UNCOMPILED),
    bench("sd15 4 steps compiled, against compiled diffusers", f"sample --base sd15 {MAX}", BESIDE, 420, UNCOMPILED,
          wanted={"ratio": 1.15}),
    bench("sdxl 4 steps compiled", f"sample --base sdxl {AUTO}", BESIDE, 420, UNCOMPILED),

    emoji("lcm", "train-lcm-lora --proof 48 --eval-every 10 --preview-every 10", 90, "--proof 8"),
    emoji("lcm full", "train-lcm-lora --full --proof 0"),
    emoji("dmd", "dmd --proof 0"),
    emoji("dmd2", "dmd --recipe dmd2 --num-steps 4 --proof 0"),
    emoji("tdm", "tdm --proof 0", pairs=False),
    emoji("sid", "sid --proof 0", pairs=False, after="emoji tdm"),
    emoji("lightning", "lightning --stages 8:4 --proof 0", 90, "--stages 8:4 --phases cond,full --steps 4"),
    emoji("prune", "prune --layout bk-tiny --proof 0"),
    emoji("vae fp16", "distill-vae --encoder --precision fp16", 75, "--precision fp32"),
    Row("emoji killed", "a", "train-lcm-lora --steps 4000 --save-every 10 --proof 0 -o OUT/killed", 75, "--batch-size 1",
        exit_code=75, stop_after_rows=2),
    Row("exit 2, a wrong option", "a", "train-lcm-lora --steps 0 -o OUT/nothing", 60, exit_code=2),
    Row("exit 2, a missing file", "a", "sample --prompt apple --lora OUT/nowhere.safetensors -o OUT/nothing", 60, exit_code=2),
    Row("exit 3, a damaged file", "a", "sample --prompt apple --lora OUT/prompts.txt -o OUT/nothing", 60, exit_code=3),
    emoji("exit 4, too little memory", "train-lcm-lora --batch-size 256 --proof 0", memory_gib=0.25, exit_code=4,
          cpu_exit_code=0),
    Row("emoji evaluate", "a", "evaluate --student OUT/lcm/lcm.safetensors --num-images 48 -o OUT/report", 60,
        "--num-images 8", after="emoji lcm"),
    Row("emoji sample", "a", "sample --prompt apple --lora OUT/lcm/lcm.safetensors --num-images 40 -o OUT/pictures", 50,
        "--num-images 2", after="emoji lcm"),
    emoji("sdxs", "sdxs --init OUT/prune/model --match-steps 8 --gan-steps 4 --proof 0", 75, "--match-steps 1 --gan-steps 1",
          after="emoji prune"),
    emoji("controlnet", "distill-controlnet --init OUT/prune/model --controlnet emoji", after="emoji prune"),
    Row("emoji resumed", "a", "train-lcm-lora --steps 4000 --max-time 10s --save-every 10 --proof 0 -o OUT/killed", 75,
        "--batch-size 1 --max-time 3s", after="emoji killed"),

    steps("sdxl lcm", "train-lcm-lora --base sdxl", 12),
    steps("sdxl lightning", "lightning --base sdxl --stages 8:4 --phases cond --d-warmup 0", 16),
    steps("sdxl dmd2", DMD2, 24),
    steps("sdxl tdm", TDM, 12),
    steps("sd15 dmd", "dmd --base sd15 --lpips-weights embedded --eval-every 0 --keep last --patience 0", 12),
    steps("sdxl lcm, 8-bit base", f"train-lcm-lora --base sdxl {SMALL}", 8),

    bench("sdxs-512, batch 1", f"sample {SDXS} {OFF}", how="graph", wanted={"ratio": 5, "ours_per_s": 350}),
    bench("sdxs-512, batch 8", f"sample {SDXS} {OFF} --batch-size 8", how="graph", wanted={"ours_per_s": 650, "of_limit": 0.5}),
    bench("sd15 4 steps", f"sample --base sd15 {OFF}", how="graph", wanted={"ratio": 3}),
    bench("sdxl 4 steps", f"sample --base sdxl {OFF}", how="graph", wanted={"ratio": 1.8}),
    bench("train sd15 against the official step", "train --base sd15 --batch-size 4 --calls 5"),
    bench("train sdxl against the official step", "train --base sdxl --batch-size 1 --calls 3", wanted={"ratio": 2}),

    Row("emoji long lcm", "d", "train-lcm-lora --max-time 20s --steps 1500 --batch-size 32 --ema 0.99 --weighting inverse-step"
        " --warmup 50 --proof 300 --eval-every 0 -o OUT/long-lcm", 60, f"{SHORTEST} --proof 8"),
    Row("emoji long dmd", "d", "dmd --max-time 15s --steps 1200 --pairs 1080 --lora-layers all --lora-rank 32 --lora-alpha 32"
        " --lr 5e-4 --warmup 50 --proof 300 --eval-every 0 -o OUT/long-dmd", 60, f"{SHORTEST} --pairs 4 --proof 8"),
    Row("emoji long lightning", "d", "lightning --max-time 20s --steps 1100 --lora-only --proof 300 --eval-every 0"
        " -o OUT/long-lightning", 60, "--stages 8:4 --phases cond --steps 2 --batch-size 2 --proof 8"),
    steps("sdxl dmd2, 8-bit base", f"{DMD2} {SMALL}", 12, "d", 60),
    Row("dmd sd15, one network against three", "d", "PYTHON ROOT/examples/memory.py --family sd15 --device cuda --batch 8"
        " --steps 3 --rounds 1", 60, "--family emoji --device cpu --batch 2 --steps 1", program=True),
]
# fmt: on
