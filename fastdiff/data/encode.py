"""Encode once: pictures and captions through the VAE and the text encoders, kept by content and shared by all methods.

A picture's latents are found again by the hash of its bytes, what was cut out of it, and the VAE; a caption's states by its
words and the text encoders. What is there is not encoded again, whatever data set, method or run it was made for.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint, fingerprint
from fastdiff.data.batch import Buckets, Data, Encoded
from fastdiff.data.images import Framing, Refused, Sample, decode, hash_of, reasons
from fastdiff.data.store import Share, Store, Stored
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Cond
from fastdiff.runtime import console, disk, stop
from fastdiff.runtime.disk import cache_folder, write_atomic
from fastdiff.runtime.errors import InputRefused, Stopped, as_field
from fastdiff.sampling.sampler import at_once

SIZE = 64  # pictures or captions a file
NAMED = 5  # refused samples that are named one by one
HOPELESS, HOPELESS_S = 256, 20.0  # refused samples, or seconds, without a good one: the data set is of no use


class Source(Protocol):
    """Where samples come from, in an order that does not change."""

    spec: str

    @property
    def count(self) -> int | None: ...  # None: not known before all have been read
    def identity(self) -> str | None: ...  # of all that it would give; None: nobody can tell without reading it
    def samples(self) -> Iterator[Sample]: ...


@dataclass
class Listing:
    """What a source gave: (name, hash of the picture's bytes, caption) of each sample, and (name, reason) of those refused."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, name: str, why: str) -> None:
        self.refused.append((name, why))
        if len(self.refused) <= NAMED:
            console.warn(f"{name}: {why}; skipped")

    def write(self, path: Path) -> None:
        write_atomic(path, json.dumps({"rows": self.rows, "refused": self.refused}))

    @classmethod
    def read(cls, path: Path) -> "Listing | None":
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            return cls(*([tuple(row) for row in told[name]] for name in ("rows", "refused")))
        except (OSError, ValueError, KeyError):
            return None


def encode(
    base: Checkpoint,
    source: Source,
    framing: Framing,
    *,
    most: int | None = None,
    device: torch.device | str = "cpu",
) -> Data:
    """The first `most` usable samples of a source; those that cannot be used are named, counted and left out.

    InputRefused where none can be used, DoesNotFit where the disk is too small. Afterwards the text encoders are gone and the
    VAE is on the CPU.
    """
    share = Share(cache_folder())
    captions = Captions(base, share, device)
    pictures = Pictures(base, framing, captions, share, device)
    listing = pictures.listed(source, most)
    not_finite = captions.encode(dict.fromkeys(caption for _, _, caption in listing.rows))
    base.release("text_encoders", "tokenizers")
    base.vae.to("cpu")
    for name, _, caption in listing.rows:
        if caption in not_finite:
            listing.refuse(name, "text embedding not finite")
    listing.rows = [row for row in listing.rows if row[2] not in not_finite]
    if not listing.rows:
        raise hopeless(source, listing)
    if listing.refused:
        name, why = listing.refused[0]
        total = len(listing.rows) + len(listing.refused)
        console.warn(
            f"{as_field('data', source.spec)}: {len(listing.refused)} of {total} images skipped: {reasons(listing.refused)}; "
            f"the first: {name}: {why}" + (f"; all of them: {pictures.index}" if len(listing.refused) > NAMED else "")
        )
    return pictures.encoded(listing.rows)


def hopeless(source: Source, listing: Listing) -> InputRefused:
    name, why = listing.refused[0] if listing.refused else ("it", "gives no samples")
    return InputRefused(
        f"{as_field('data', source.spec)}: none of {len(listing.refused)} images can be used: {reasons(listing.refused)}; "
        f"the first: {name}: {why}"
    )


class Captions:
    """Text states by caption."""

    def __init__(self, base: Checkpoint, share: Share, device: torch.device | str) -> None:
        self.base, self.share, self.device = base, share, device
        nets = [fingerprint(net) for net in base.text_encoders]
        rule = (nets, base.family.name, [tokenizer.model_max_length for tokenizer in base.tokenizers])
        self.store = Store(cache_folder() / f"texts-{hash_of(*rule)[:16]}")
        if self.encode([""]):
            raise InputRefused(f"{as_field('base', base.ref)}: its text encoder answers NaN or infinity to an empty prompt")

    @staticmethod
    def key(caption: str) -> str:
        return hash_of(caption)

    def encode(self, captions: Iterable[str]) -> set[str]:
        """Encode those that are not there; returns the ones whose states are not finite."""
        wanted = [caption for caption in captions if self.key(caption) not in self.store]
        mine = [caption for caption in wanted if self.share.mine(int(self.key(caption), 16))]
        with suppress(Stopped), console.progress(len(mine), "encoding captions") as bar:
            for i in range(0, len(mine), SIZE):
                stop.check()
                part = mine[i : i + SIZE]
                found = text.encode(self.base, part, device=self.device).map(Tensor.half)
                rows = zip(part, rows_of(found), strict=True)
                self.store.put({self.key(caption): parts for caption, parts in rows if finite(parts)})
                bar.update(len(part))
        stop.meet()  # a stop of one process is one of all
        self.store.scan()
        return {caption for caption in wanted if self.key(caption) not in self.store}

    def bytes_each(self) -> int:
        return sum(self.store.get(self.key(""), part).nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("tokens", "pooled") if self.base.family.size_conditioned else ("tokens",)

    def stored(self, captions: list[str]) -> Cond:
        """The states of captions, as rows that are read when they are indexed."""
        return Cond(**{part: Stored(self.store, part, [self.key(c) for c in captions]) for part in self.parts})

    def unconditional(self) -> Cond:
        """One row: of the empty prompt, or zeros where SDXL's pipeline uses zeros."""
        cond = self.stored([""])[:]
        return cond.map(torch.zeros_like) if self.base.zeros_for_empty_prompt else cond


class Pictures:
    """Latents by picture and cut."""

    def __init__(self, base: Checkpoint, framing: Framing, captions: Captions, share: Share, device: torch.device | str) -> None:
        self.base, self.framing, self.captions, self.share, self.device = base, framing, captions, share, device
        self.store = Store(cache_folder() / f"latents-{hash_of(fingerprint(base.vae), base.vae.config.scaling_factor)[:16]}")

    def there(self, digest: str) -> bool:
        return all(key in self.store for key in self.framing.keys(digest))

    def listed(self, source: Source, most: int | None) -> Listing:
        """What the source holds, all of it encoded; without reading anything where that was done before."""
        identity = source.identity()
        self.index = self.store.folder / "sets" / f"{hash_of(identity, source.spec, most, self.framing)}.json"
        found = Listing.read(self.index) if identity else None
        if self.share.all(found is not None and all(self.there(digest) for _, digest, _ in found.rows)):
            console.info(f"{len(found.rows)} images of {source.spec}, encoded before; without {self.index} they are read again")
            return found
        listing = Reading(self, source, most).read()
        if self.share.rank == 0:
            listing.write(self.index)
        return listing

    def bytes_each(self) -> int:
        """Of one item's latents."""
        side = self.framing.resolution_px // autoencoder.factor(self.base.vae)
        return 2 * 2 * self.base.vae.config.latent_channels * side**2

    def announce(self, source: Source, samples: int, known: bool) -> None:
        """Tell how much will be written, and refuse what does not fit."""
        size = samples * (self.bytes_each() * len(self.framing.cuts) + self.captions.bytes_each())
        told = f"{samples} images of {source.spec} to encode" if known else f"up to {samples} images of {source.spec} to encode"
        room = f"{disk.format_size(disk.free_bytes(self.store.folder))} are free"
        console.info(f"{told}: about {disk.format_size(size)} in {self.store.folder.parent}; {room}")
        hint = "FASTDIFF_CACHE names another folder; `max_images` takes fewer"
        disk.require(self.store.folder, size, f"{samples} encoded images", hint)

    def encode(self, samples: list[tuple[Sample, str]]) -> list[tuple[str, str]]:
        """Encode samples with their hashes into one file; returns (name, reason) of those that cannot be used."""
        refused, items = [], []  # of these: place in `samples`, key, pixels, size
        with ThreadPoolExecutor() as pool:
            for i, found in enumerate(pool.map(lambda pair: self.cut(*pair), samples)):
                sample, digest = samples[i]
                if isinstance(found, Refused):
                    refused.append((sample.name, str(found)))
                    continue
                keys = zip(self.framing.keys(digest), found, strict=True)
                items += [(i, key, *item) for key, item in keys if key not in self.store]
        moments = self.moments({key: pixels for _, key, pixels, _ in items})
        bad = {i for i, key, _, _ in items if not moments[key].isfinite().all()}
        sizes = {key: size for i, key, _, size in items if i not in bad}
        self.store.put({key: {"moments": moments[key]} for key in sizes}, sizes)
        return refused + [(samples[i][0].name, "latents not finite") for i in sorted(bad)]

    def moments(self, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pixels (3, H, W) uint8 by key -> moments (2 C, h, w) fp16, those of one size together."""
        vae, found = self.base.vae.to(self.device), {}
        for shape in {pixels.shape for pixels in pictures.values()}:
            keys = [key for key, pixels in pictures.items() if pixels.shape == shape]
            n = at_once(max(shape[1:]) // autoencoder.factor(vae))
            for i in range(0, len(keys), n):
                part = keys[i : i + n]
                pixels = torch.stack([pictures[key] for key in part]) / 127.5 - 1
                rows = autoencoder.encode_moments(vae, pixels, chunk=n).half().cpu()
                found |= {key: row.clone() for key, row in zip(part, rows, strict=True)}
        return found

    def cut(self, sample: Sample, digest: str) -> list[tuple[Tensor, list[int]]] | Refused:
        try:
            return self.framing.cut(decode(sample.data), digest)
        except Refused as error:
            return error

    def encoded(self, rows: list[tuple[str, str, str]]) -> Data:
        """The data set of listed samples: one group of each size, the largest first."""
        texts = list(dict.fromkeys(caption for _, _, caption in rows))
        place, cond, uncond = {c: i for i, c in enumerate(texts)}, self.captions.stored(texts), self.captions.unconditional()
        groups: dict[tuple[int, int], list[tuple[str, str, int]]] = {}
        for name, digest, caption in rows:
            for key in self.framing.keys(digest):
                groups.setdefault(tuple(self.store.notes[key][4:]), []).append((key, name, place[caption]))
        sizes = sorted(groups, key=lambda size: (-len(groups[size]), size))
        made = []
        for keys, names, captions in (zip(*groups[size], strict=True) for size in sizes):
            ids = torch.tensor([self.store.notes[key] for key in keys], dtype=torch.float32)
            made.append(
                Encoded(
                    moments=Stored(self.store, "moments", list(keys)),
                    texts=cond,
                    captions=torch.tensor(captions)[:, None],
                    weights=torch.ones(1),
                    uncond=uncond,
                    time_ids=ids if self.base.family.size_conditioned else None,
                    names=list(names),
                    views=len(self.framing.cuts),
                )
            )
        return made[0] if len(made) == 1 else Buckets(made)


class Reading:
    """One pass over a source: every process lists all of it and encodes its own share."""

    def __init__(self, pictures: Pictures, source: Source, most: int | None) -> None:
        self.pictures, self.source, self.most, self.share = pictures, source, most, pictures.share
        self.listing, self.usable = Listing(), 0
        self.waiting: list[tuple[Sample, str]] = []
        self.started = time.monotonic()
        self.patient = source.count is not None  # files at hand are soon looked through

    def read(self) -> Listing:
        with suppress(Stopped):
            self.look()
        stop.meet()
        return self.settled()

    def look(self) -> None:
        count, samples, total = self.source.count, self.hashed(), None
        if count is not None:  # can be read twice: hashed first, so that it is known how many are missing
            with console.progress(min(count, self.most or count), "reading images") as bar:
                pairs = [(bar.update(1), (sample.forget(), digest))[1] for sample, digest in samples]
            samples = iter(pairs)
            missing = total = len({digest for _, digest in pairs if not self.pictures.there(digest)})
        else:  # what is in the cache may be of other data sets: then the disk fills up later, and the run can go on
            missing = max(0, (self.most or 0) - len(self.pictures.store) // len(self.pictures.framing.cuts))
        if missing:
            self.pictures.announce(self.source, missing, known=count is not None)
        self.patient = False
        with console.progress(total, "encoding images") as bar:
            for part in self.missing(samples):
                self.waiting.append(part)
                if len(self.waiting) >= SIZE or self.late():
                    bar.update(self.flush())
            bar.update(self.flush())

    def missing(self, samples: Iterable[tuple[Sample, str]]) -> Iterator[tuple[Sample, str]]:
        """List all samples, and give those that are this process's to encode."""
        seen: set[str] = set()
        for sample, digest in samples:
            self.listing.rows.append((sample.name, digest, sample.caption or ""))
            if self.pictures.there(digest):
                self.usable += 1
            elif digest not in seen and self.share.mine(int(digest, 16)):
                seen.add(digest)
                yield sample, digest

    def hashed(self) -> Iterator[tuple[Sample, str]]:
        """Samples that have a picture and a caption, with the hash of the picture's bytes."""
        found = 0
        for sample in self.source.samples():
            stop.check()
            if found == self.most:
                console.info(f"{as_field('data', self.source.spec)}: the first {found} images (`max_images`)")
                return
            why, data = sample.problem, b""
            if not why:
                try:
                    data = sample.data
                except OSError as error:
                    why = f"not readable ({error.strerror or error})"
            if not why and not data:
                why = "0 bytes"
            if why:
                self.refuse(sample.name, why)
                continue
            found += 1
            yield sample, hashlib.sha256(data).hexdigest()

    def late(self) -> bool:
        """Whether nothing good has come for so long that it is time to look."""
        return not self.usable and time.monotonic() - self.started > HOPELESS_S / 2

    def refuse(self, name: str, why: str) -> None:
        """Note it; where nothing good has come for too long, end here and not after hours."""
        self.listing.refuse(name, why)
        waited = time.monotonic() - self.started > HOPELESS_S
        if self.usable or self.patient or not (waited or len(self.listing.refused) >= HOPELESS):
            return
        if self.waiting:
            self.flush()
        else:
            raise hopeless(self.source, self.listing)

    def flush(self) -> int:
        """Encode what waits; returns how many those are."""
        samples, self.waiting = self.waiting, []
        if samples:
            refused = self.pictures.encode(samples)
            self.usable += len(samples) - len(refused)
            for row in refused:
                self.refuse(*row)
        return len(samples)

    def settled(self) -> Listing:
        """All processes agree on what is there, and on what is not and why."""
        refused = list(dict.fromkeys(self.share.gather(self.listing.refused)))
        self.share.wait()
        self.pictures.store.scan()
        told = {name for name, _ in refused}
        rows = [row for row in self.listing.rows if self.pictures.there(row[1])]
        gone = [row[0] for row in self.listing.rows if not self.pictures.there(row[1])]
        refused += [(name, "a copy of an image that was skipped") for name in gone if name not in told]
        if not rows:
            raise hopeless(self.source, Listing(rows, refused))
        return Listing(rows, refused)


def rows_of(cond: Cond) -> Iterator[dict[str, Tensor]]:
    """Each row's tensors by name."""
    for i in range(len(cond)):
        row = {"tokens": cond.tokens[i].clone()}
        yield row if cond.pooled is None else row | {"pooled": cond.pooled[i].clone()}


def finite(parts: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in parts.values())
