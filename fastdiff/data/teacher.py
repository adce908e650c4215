"""Training without images: the teacher's samples for prompts with their start noise, made once and cached by content."""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint, fingerprint
from fastdiff.data import emoji, held_out
from fastdiff.data.batch import Encoded
from fastdiff.data.images import hash_of
from fastdiff.data.store import Rows, Share
from fastdiff.models import autoencoder, prompt, text
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.fast.unet import unet_of
from fastdiff.runtime import console, disk, rng, stop
from fastdiff.runtime.disk import cache_folder
from fastdiff.runtime.errors import InputRefused, Stopped
from fastdiff.sampling.sampler import Sampler, SeededNoise, at_once, with_size
from fastdiff.sampling.settings import Settings


def encode(
    base: Checkpoint,
    prompts: list[str],
    resolution_px: int,
    settings: Settings,
    *,
    pairs: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Encoded:
    """Make a data set of `pairs` teacher samples, with their start noise, for the prompts in turn.

    With `pairs=0` it holds the prompts alone and its latents are NaN. Samples that are not finite, and those of the embedded
    checkpoint that show what is held out, are not used. Raises InputRefused if no sample is left, and DoesNotFit if the disk is
    too small. Afterwards the text encoders are released.
    """
    used = prompts[:pairs] if pairs else prompts  # text encoders are slow, and lists of prompts long
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(used))}
    row = torch.tensor([unique[prompt] for prompt in used])
    text.tell(base, list(unique), "`prompts`")
    texts, uncond = texts_of(text.rows(base, list(unique), device=device)), text.unconditional(base, device=device)
    nets = tuple(fingerprint(net) for net in base.text_encoders)
    rules = (nets, base.zeros_for_empty_prompt, *reading(base, list(unique), texts))
    base.release("text_encoders", "tokenizers")
    if base.family.size_conditioned:
        texts, uncond = (with_size(c, resolution_px) for c in (texts, uncond))
    side = resolution_px // autoencoder.factor(base.vae)
    shape = (base.unet_config["in_channels"], side, side)
    noise = None
    if not pairs:
        of = row
        moments = torch.full((1, 2 * shape[0], side, side), float("nan")).expand(len(of), -1, -1, -1)
    else:
        of = row[torch.arange(pairs) % len(row)]
        shards = Shards(base, settings, prompts, texts, uncond, seed, resolution_px, device, rows=row, rules=rules)
        noise, latents = shards.first(pairs)
        lines = [prompts[i % len(prompts)] for i in range(pairs)]
        good = finite(latents, lines)
        if base.family.judge_ships:
            good = trainable(base, latents, lines, good, device)
        noise, latents, of = noise[good], latents[good], of[good]
        moments = torch.cat([latents, torch.zeros_like(latents)], 1)  # samples have no posterior: the deviation is 0
    sizes = None if texts.time_ids is None else texts.time_ids[of]
    names = list(unique)
    items = [names[i] for i in of.tolist()]
    identity = hash_of(used)
    return Encoded(moments, texts, of[:, None], torch.ones(1), uncond, sizes, noise=noise, names=items, identity=identity)


def texts_of(rows: list[Cond]) -> Cond:
    """One Cond of prompts, a row each. Where their lengths differ, each keeps its own, so that one long prompt costs no more."""
    if len({row.tokens.shape for row in rows}) < 2:
        return Cond.cat(rows)
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return Cond(cast("Tensor", Rows([row.tokens[0] for row in rows])), torch.cat(pooled) if pooled else None)


def reading(base: Checkpoint, prompts: list[str], texts: Cond) -> tuple[Any, ...]:
    """The rules by which these prompts are read, for the name of a cache; empty where they are words in one window."""
    words_only = all((read := prompt.parse(line)).plain and read.parts[0].text == " ".join(line.split()) for line in prompts)
    one_window = not isinstance(texts.tokens, Rows) and texts.tokens.shape[1] == base.tokenizers[0].model_max_length
    if words_only and one_window and not base.skipped_layers:
        return ()
    return prompt.RULES, base.max_tokens, base.skipped_layers


def finite(latents: Tensor, prompts: list[str]) -> Tensor:
    """Return the indices (N',) of the finite samples and warn of the others. Raises InputRefused if there are none."""
    good = latents.flatten(1).isfinite().all(1)
    bad = [prompts[i] for i in (~good).nonzero().flatten().tolist()]
    if len(bad) == len(prompts):
        raise InputRefused("`data=teacher`: no sample is finite", "half precision may overflow: use `precision=fp32`")
    if bad:
        console.warn(f"`data=teacher`: {len(bad)} of {len(prompts)} samples are not finite and left out; the first: {bad[0]}")
    return good.nonzero().flatten()


def trainable(base: Checkpoint, latents: Tensor, prompts: list[str], rows: Tensor, device: torch.device | str) -> Tensor:
    """Return those of the sample numbers `rows` (N,) that do not happen to show what is held out.

    "red apple" names no background, so the teacher may draw one on which fruits are held out.
    """
    before = next(base.vae.parameters()).device
    vae, allowed = base.vae.to(device), list[bool]()
    for part in rows.split(256):
        pixels = autoencoder.decode(vae, latents[part].to(device).float()).cpu()
        backgrounds = emoji.background_of(pixels).tolist()
        allowed += [held_out.may_train(prompts[i], b) for i, b in zip(part.tolist(), backgrounds, strict=True)]
    vae.to(before)
    trained = rows[torch.tensor(allowed)]
    if not len(trained):
        raise InputRefused("`data=teacher`: every sample shows what is held out for judging", "give other `prompts`")
    if len(trained) < len(rows):
        console.info(f"{len(rows) - len(trained)} of {len(rows)} samples of the teacher show what is held out: not used")
    return trained


class Shards:
    """Teacher samples on disk, SIZE per file. Sample i always has prompt i mod M and the noise of pair i of the run's seed.

    So a larger number of pairs extends the cache, an interrupted run continues after its last file, and each process makes its
    share. A file holds `noise` and `latents` (fp16); its header holds the prompts, settings and hash of the network.
    """

    SIZE = 64

    def __init__(
        self,
        base: Checkpoint,
        settings: Settings,
        prompts: list[str],
        texts: Cond,
        uncond: Cond,
        seed: int,
        resolution_px: int,
        device: torch.device | str = "cpu",
        *,
        rows: Tensor | None = None,  # of `texts`, one for each prompt; None: they are in the order of the prompts
        rules: tuple[Any, ...] = (),
    ) -> None:
        self.base, self.device, self.texts = base, device, texts
        self.rows = torch.arange(len(prompts)) if rows is None else rows
        self.settings, self.prompts, self.uncond = settings, prompts, uncond
        self.start = rng.first_pair(seed)  # in rng.PAIRS
        side = resolution_px // autoencoder.factor(base.vae)
        self.shape = (base.unet_config["in_channels"], side, side)
        self.parent = fingerprint(base.unet)
        content = (self.parent, prompts, resolution_px, rng.PAIRS(self.start), settings)
        # The same weights draw otherwise by another type of prediction or another schedule, which the user may have named since.
        kind, zero_snr = base.prediction_type, base.schedule().zero_terminal_snr
        unusual = kind != base.family.prediction_type or zero_snr
        key = repr((*content, *((kind, zero_snr) if unusual else ()), *rules))
        self.folder = cache_folder() / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler for missing samples, with a network of its own, apart from the one that will be trained."""
        net = unet_of(self.base, device=self.device)
        denoiser = Denoiser(net, self.base.schedule(), self.base.prediction_type)
        return Sampler.of_networks(self.base, denoiser, self.base.vae, device=self.device)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """Return noise and latents (n, C, h, w) of the first n samples, fp16; draw those that are not in the cache.

        Raises DoesNotFit if the disk is too small, and Stopped after a stop signal.
        """
        share = Share(self.folder)
        wanted = {k: min(self.SIZE, n - k * self.SIZE) for k in range(-(-n // self.SIZE))}
        missing = [k for k, rows in wanted.items() if len(self.read(k)["noise"]) < rows]
        mine = [k for k in missing if share.mine(k)]
        if missing:
            size = 2 * 2 * math.prod(self.shape) * sum(wanted[k] for k in missing)
            hint = "set FASTDIFF_CACHE to another folder, or use fewer `pairs`"
            disk.require(self.folder, size, f"{n} samples of the teacher", hint)
            console.info(f"sampling the teacher takes about {disk.format_size(size)} in {self.folder.parent}")
        if mine:
            with suppress(Stopped), console.progress(sum(wanted[k] for k in mine), "sampling the teacher") as bar:
                for k in mine:
                    self.extend(k, wanted[k])
                    bar.update(wanted[k])
        stop.meet()  # if one process was stopped, all stop here
        parts = [self.read(k) for k in wanted]
        noise, latents = (torch.cat([part[name] for part in parts])[:n] for name in ("noise", "latents"))
        return noise, latents

    def path(self, k: int) -> Path:
        """Return the file of shard k."""
        return self.folder / f"{k:06d}.safetensors"

    def read(self, k: int) -> dict[str, Tensor]:
        """Read a shard; it has no rows if the file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path(k))
        except FileNotFoundError:
            pass
        except SafetensorError:
            console.warn(f"{self.path(k)}: the file is damaged; its samples are drawn again")
        empty = torch.empty(0, *self.shape, dtype=torch.float16)
        return {"noise": empty, "latents": empty}

    def extend(self, k: int, rows: int) -> None:
        """Draw the missing samples of shard k, up to `rows` samples, and write its file completely or not at all."""
        from safetensors.torch import save_file

        there = self.read(k)
        index = torch.arange(k * self.SIZE + len(there["noise"]), k * self.SIZE + rows)
        of, n = self.rows[index % len(self.rows)], at_once(self.shape[1])
        seeds = [rng.PAIRS(self.start + i) for i in index.tolist()]
        latents = [
            self.sampler.latents(self.texts[of[i : i + n]], self.uncond, seeds[i : i + n], self.settings, self.shape[1:]).cpu()
            for i in range(0, len(seeds), n)
        ]
        added = {"noise": SeededNoise(seeds, self.shape, "cpu")(), "latents": torch.cat(latents)}
        header = {
            "base": self.parent,
            "settings": json.dumps(asdict(self.settings)),
            "first_seed": str(rng.PAIRS(self.start + k * self.SIZE)),
            "prompts": json.dumps([self.prompts[i % len(self.prompts)] for i in range(k * self.SIZE, k * self.SIZE + rows)]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        staged = self.path(k).with_suffix(f".{os.getpid()}.tmp")
        save_file({name: torch.cat([there[name], z.half()]) for name, z in added.items()}, staged, header)
        staged.replace(self.path(k))
