"""Every training command at its smallest, on the tiny checkpoint: what it does is told in tests, not how well."""

COMMON = (
    "--resolution 64 --teacher-steps 2 --batch-size 2 --grad-accum 1 --device cpu --prompts prompts.txt --ema 0.5"
    " --warmup 0 --lr 5e-5 --lr-schedule constant --eval-every 0 --keep last --patience 0"
)
LIGHTNING = "--stages 4:2 --no-lora-only --lora-rank 4 --adversarial-lr 5e-5 --full-lr 5e-5 --d-warmup 0 --gan plain"
CONTROL = "--controlnet {controlnet} --init {pruned}"
COMMANDS = {  # every player trains, in every phase
    "train-lcm-lora": "--lora-rank 4 --num-steps 2 --guidance-min 3 --guidance-max 3",
    "dmd": "--recipe dmd2 --lora-rank 4 --num-steps 2 --gan-weight 1e-3 --fake-steps-per-gen 2 --lambda-reg 0",
    "sid": "--lora-rank 4 --num-steps 2 --fake-steps-per-gen 2 --fake-guidance 2",
    "tdm": "--lora-rank 4 --fake-steps-per-gen 2",
    "lightning": f"{LIGHTNING} --phases cond,uncond,full",
    "sdxs": "--lora-rank 4 --match-steps 3 --gan-steps 3",
    "prune": "--layout bk-tiny",
    "distill-vae": "--width 8 --d-width 8 --encoder --lpips-weights embedded",
    "distill-controlnet": CONTROL,
}
WHOLE = {  # all weights of a network train: what --shard splits
    "train-lcm-lora": "--full --num-steps 2 --guidance-min 3 --guidance-max 3 --gradient-checkpointing --preview-every 5",
    "dmd": "--recipe dmd2 --student full --fake full --gan-weight 1e-3 --fake-steps-per-gen 2 --lambda-reg 0"
    " --eval-every 3 --keep best",
    "lightning": f"{LIGHTNING} --phases cond,full",
    "sdxs": "--fake full --match-steps 2 --gan-steps 0",
    "prune": "--layout bk-tiny",
    "distill-vae": "--width 8 --d-width 8 --encoder --lpips-weights embedded",
    "distill-controlnet": CONTROL,
}


def few_teacher_steps(usual):
    """`Settings.usual` with 4 steps of a tiny checkpoint's teacher for 25: contact sheets would take most of a run's time."""
    from dataclasses import replace

    return lambda family: usual(family) if family.ships_weights else replace(usual(family), num_steps=4)


def arguments(command, base, controlnet, pruned, table=COMMANDS):
    """The command line, without --output and --steps; its folder must hold prompts.txt."""
    own = table[command].format(controlnet=controlnet, pruned=pruned)
    pairs = [] if command in {"sid", "tdm"} else ["--pairs", "8"]  # those train on prompts alone
    return [command, "--base", str(base), *COMMON.split(), *pairs, *own.split()]
