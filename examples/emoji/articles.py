"""Last training step of the embedded text encoder: make "a red apple" draw the same picture as "red apple".

    python examples/emoji/articles.py [--steps 900] [--out fastdiff/assets/emoji]

The captions have no articles, so `a` or `an` in front of them spoiled the picture. This script trains only the embeddings of
these two tokens: the UNet's output for a caption with its article should equal its output without. Texts without these tokens
are encoded exactly as before. Names that contain the token `a` (zebra, pizza) are kept by the same loss. It takes minutes on
one CPU core.
"""

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastdiff.checkpoints import checkpoint, locate, tensors
from fastdiff.data import emoji

LR, BATCH, KEPT = 5e-3, 16, 4  # KEPT: items of a batch whose names contain the token `a`, without an article


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--out", type=Path, default=locate.EMOJI)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = checkpoint.load("emoji")
    (tokenizer,), (encoder,), schedule = base.tokenizers, base.text_encoders, base.schedule()
    key = next(name for name, _ in encoder.named_parameters() if name.endswith("token_embedding.weight"))
    table = dict(encoder.named_parameters())[key].detach()
    ids = torch.tensor([tokenizer(word).input_ids[1] for word in ("a", "an")])
    rows = torch.nn.Parameter(table[ids].clone())
    held = [p.name for p in emoji.pictures() if ids[0] in tokenizer(p.name).input_ids]

    def states(prompts: list[str], trained: bool) -> torch.Tensor:
        padded = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        weight = table.index_put((ids,), rows) if trained else table
        return torch.func.functional_call(encoder, {key: weight}, (padded,)).last_hidden_state

    n, k = len(emoji.pictures()), len(emoji.BACKGROUNDS)
    data = emoji.encode(base, *emoji.all_images())  # the checkpoint itself was trained on all: nothing is held out
    generator, drawn = torch.Generator().manual_seed(0), random.Random(0)
    optimizer = torch.optim.Adam([rows], lr=LR)
    for step in range(args.steps):
        item = torch.randint(n * k, (BATCH,), generator=generator)
        kind = torch.multinomial(data.weights, BATCH, replacement=True, generator=generator)
        plain = [
            emoji.caption(i // k, None if c % 2 else i % k, coarse=c > 1)
            for i, c in zip(item.tolist(), kind.tolist(), strict=True)
        ]
        plain[:KEPT] = [f"{drawn.choice(held)} on {drawn.choice(list(emoji.BACKGROUNDS))}" for _ in range(KEPT)]
        said = plain[:KEPT] + [("an " if c[0] in "aeiou" else "a ") + c for c in plain[KEPT:]]
        z = data.moments[item].chunk(2, 1)[0]
        t = torch.randint(200, 1000, (BATCH,), generator=generator)  # at lower t the noisy picture says more than the caption
        x_t = schedule.add_noise(z, torch.randn(z.shape, generator=generator), t)
        with torch.no_grad():
            wanted = base.unet(x_t, t, states(plain, False)).sample
        loss = (base.unet(x_t, t, states(said, True)).sample - wanted).square().mean()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / args.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: {loss.item():.5f}", flush=True)
    path = args.out / "text_encoder" / "model.safetensors"
    stored = load_file(path)
    name = next(x for x in stored if x.endswith("token_embedding.weight"))
    stored[name][ids] = rows.detach().to(stored[name].dtype)
    tensors.write(path, tensors.entries(stored), {"format": "pt"})


if __name__ == "__main__":
    main()
