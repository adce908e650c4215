"""What ships with the embedded checkpoint to judge its students: prompts, a judging network and the teacher's rows.

`examples/emoji/reference.py` makes the teacher's rows at every number of network calls and the features of its guided 25-step
samples. So a closing table has to sample only the student.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoints.locate import EMOJI
from fastdiff.data import emoji, held_out
from fastdiff.models.judge_net import JudgeNet
from fastdiff.quality.metrics import Features, Row
from fastdiff.sampling.settings import Settings

REFERENCE = EMOJI / "reference"


UNSEEN, SEEN = "unseen", "seen"  # prompts that no student was trained on, and prompts that students are trained on
JUDGED = 4000  # pictures of each shipped row, half of unseen prompts


@dataclass(frozen=True)
class Prompts:
    """The judged prompts: prompt i asks for picture[i] on background[i] (-1: any), or where coarse[i] for any of its group.

    The group prompts are the hard test. The name of a picture describes nearly one image, which a network can look up in one
    call; "fruit" describes many, and the average that one call gives looks like none of them.
    """

    picture: Tensor  # (N,)
    background: Tensor  # (N,)
    coarse: Tensor  # (N,) bool

    @classmethod
    def judged(cls, n: int) -> "Prompts":
        """The first n prompts of one fixed list: an unseen and a seen one in turn, each by name and by group in turn.

        There are more pictures than prompts: each prompt comes again with other noise, group prompts most often.
        """
        unseen = [listed(held_out.JUDGED, coarse, seed) for coarse, seed in ((False, 1), (True, 2))]
        trained = [listed(held_out.TRAINED, coarse, seed) for coarse, seed in ((False, 3), (True, 4))]
        lists = [unseen[0], trained[0], unseen[1], trained[1]]  # of picture 0, 1, 2 and 3, and again from picture 4 on
        return cls.of([lists[i % 4][i // 4 % len(lists[i % 4])] for i in range(n)])

    @classmethod
    def of(cls, lines: Sequence[str]) -> "Prompts":
        """The prompts that captions stand for. ValueError where one is not a caption that the teacher was trained on."""
        if unknown := [line for line in lines if not cls.known([line])]:
            raise ValueError(f"{unknown[0]!r} is not a caption of the embedded data set")
        picture, background, coarse = zip(*(known_captions()[emoji.plain(line)] for line in lines), strict=True)
        return cls(torch.tensor(picture), torch.tensor(background), torch.tensor(coarse))

    @classmethod
    def known(cls, lines: Sequence[str]) -> bool:
        """Whether all lines are captions that the teacher was trained on."""
        return all(emoji.plain(line) in known_captions() for line in lines)

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.picture[rows], self.background[rows], self.coarse[rows])

    @cached_property
    def captions(self) -> list[str]:
        """The prompts as text."""
        rows = zip(self.picture.tolist(), self.background.tolist(), self.coarse.tolist(), strict=True)
        return [emoji.caption(p, None if b < 0 else b, c) for p, b, c in rows]

    def __len__(self) -> int:
        return len(self.picture)


@cache
def known_captions() -> dict[str, tuple[int, int, bool]]:
    """{caption: (picture, background or -1, whether it names a group)} of all captions that the teacher was trained on.

    A group's picture is the first one of the group.
    """
    captions: dict[str, tuple[int, int, bool]] = {}
    for coarse in (False, True):
        for p in range(len(emoji.pictures())):
            for b in range(-1, len(emoji.BACKGROUNDS)):
                captions.setdefault(emoji.caption(p, None if b < 0 else b, coarse), (p, b, coarse))
    return captions


def listed(which: int, coarse: bool, seed: int) -> list[str]:
    """All captions of one part, by name or by group, in a fixed random order.

    With a background they are the captions of the part's images; without one, those of no trained image, or of trained ones.
    """
    part, lines = held_out.part(), dict[str, None]()
    for p, b in (part == which).nonzero().tolist():
        lines |= dict.fromkeys([emoji.caption(p, b, coarse), emoji.caption(p, None, coarse)])
    part_of = held_out.captions()
    right = [line for line in lines if part_of.get(line, held_out.TRAINED) == which]
    return [right[i] for i in torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))]


def parts(lines: Sequence[str]) -> dict[str, Tensor]:
    """{"unseen": indices, "seen": indices} of the prompts that no student was trained on, and of the others.

    All prompts are in one part where there are fewer than two of either, or where one is no caption of the data set.
    """
    if not Prompts.known(lines):
        return {"": torch.arange(len(lines))}
    unseen = torch.tensor([emoji.plain(line) in held_out.captions() for line in lines])
    split = {UNSEEN: unseen.nonzero().flatten(), SEEN: (~unseen).nonzero().flatten()}
    if min(map(len, split.values())) < 2:
        return {UNSEEN if unseen.all() else SEEN if not unseen.any() else "": torch.arange(len(lines))}
    return split


Network = Callable[[Tensor], Tensor]  # pixels (N, 3, H, W) in [-1, 1] -> embeddings (N, D)


@cache
def judge_net() -> JudgeNet:
    """The network that judges, opened once."""
    return JudgeNet.embedded()


@cache
def prototypes(net: Network | None = None) -> Tensor:
    """The mean embedding of every real picture over all backgrounds, normalised: (pictures, D)."""
    every = torch.arange(len(emoji.pictures()))
    columns = [embed(emoji.compose(every, torch.full_like(every, c)), net) for c in range(len(emoji.BACKGROUNDS))]
    return F.normalize(torch.stack(columns).mean(0), dim=1)


@torch.no_grad()
def embed(pixels: Tensor, net: Network | None = None) -> Tensor:
    """Embeddings (N, D) of pixels (N, 3, H, W): normalised, times sqrt(D) so that each coordinate's variance is about 1.

    `net` is another network than the judge: the one of the losses, which must order known pictures as the judge does.
    """
    features = torch.cat([F.normalize((net or judge_net())(part.cpu()), dim=1) for part in pixels.split(250)])
    return features * features.shape[1] ** 0.5


@cache
def groups() -> Tensor:
    """The index of each picture's group: (pictures,)."""
    names = sorted({p.group for p in emoji.pictures()})
    return torch.tensor([names.index(p.group) for p in emoji.pictures()])


def nearest(features: Tensor, net: Network | None = None) -> Tensor:
    """The number (N,) of the real picture that is nearest to each embedding (N, D)."""
    return (F.normalize(features, dim=1) @ prototypes(net).T).argmax(1)


def recognised(features: Tensor, prompts: Prompts, net: Network | None = None) -> Tensor:
    """Whether each embedding (N, D) is nearest to the real picture that its prompt names: (N,) of 0 and 1.

    For a group prompt any picture of the group counts.
    """
    picture = nearest(features, net)
    in_group = groups()[picture] == groups()[prompts.picture]
    return torch.where(prompts.coarse, in_group, picture == prompts.picture).float()


def diversity(features: Tensor, prompts: Prompts) -> Tensor:
    """How far each picture (N, D) is from the other pictures of its group prompt: (N,), NaN for the other prompts.

    It is the distance to their mean, scaled so that its mean square is that of the distance of two pictures of one prompt.
    """
    apart = torch.full((len(features),), torch.nan)
    keys = prompts.picture * (len(emoji.BACKGROUNDS) + 1) + prompts.background + 1
    for key in keys[prompts.coarse].unique():
        rows = ((keys == key) & prompts.coarse).nonzero().flatten()
        if (m := len(rows)) > 1:
            others = (features[rows].sum(0) - features[rows]) / (m - 1)
            apart[rows] = (features[rows] - others).norm(dim=1) * (2 * (m - 1) / m) ** 0.5
    return apart


def backgrounds(pixels: Tensor, prompts: Prompts) -> Tensor:
    """Whether the corners of each picture have the background of its prompt: (N,) of 0 and 1, NaN where it names none."""
    right = (emoji.background_of(pixels) == prompts.background).float()
    return torch.where(prompts.background >= 0, right, torch.nan)


@torch.no_grad()
def style_distances(pixels: Tensor, picture: Tensor) -> Tensor:
    """Distances (N, styles) of images (N, 3, H, W) to their emoji `picture` (N,), drawn in each style, as the judge sees them."""
    background, features = emoji.background_of(pixels), embed(pixels)
    drawn = [embed(emoji.compose(picture, background, style)) for style in emoji.STYLES]
    return torch.stack([(features - x).norm(dim=1) for x in drawn], 1)


@cache
def pictures_by_name() -> dict[str, int]:
    """{name: picture number}."""
    return {emoji.caption(p, None): p for p in range(len(emoji.pictures()))}


def named_pictures(prompts: Sequence[str]) -> Tensor:
    """The index (N,) of the picture that each prompt names ("a red apple on blue"), or -1."""
    return torch.tensor([pictures_by_name().get(emoji.subject_and_background(prompt)[0], -1) for prompt in prompts])


def style_distance(pixels: Tensor, prompts: Sequence[str]) -> dict[str, Any] | None:
    """How near images (N, 3, H, W) are to each drawing style: {style: {"distance", "nearest"}}.

    `distance` is the mean distance to the same emoji in that style, `nearest` the share of images that are nearest to
    it. Only prompts that name a picture ("a red apple on blue") count; None where no prompt does.
    """
    picture = named_pictures(prompts)
    if not (picture >= 0).any():
        return None
    distances = style_distances(pixels[picture >= 0], picture[picture >= 0])
    share = F.one_hot(distances.argmin(1), distances.shape[1]).float().mean(0)
    figures = zip(emoji.STYLES, distances.mean(0).tolist(), share.tolist(), strict=True)
    return {style: {"distance": distance, "nearest": nearest} for style, distance, nearest in figures}


class Shipped:
    """The shipped teacher: features of its guided 25-step samples of other seeds, its rows, and its first pictures as latents.

    Every row has the first `JUDGED` judged prompts.
    """

    def __init__(self, folder: Path = REFERENCE) -> None:
        from safetensors.torch import load_file

        tensors = {k: v.float() for k, v in load_file(folder / "teacher.safetensors").items()}
        self.table = json.loads((folder / "teacher.json").read_text())
        self.reference: Features = {"embedded": tensors["reference"]}
        self.lines = Prompts.judged(len(tensors["reference"])).captions  # the prompts of every row and of the reference
        self.latents = tensors["latents"]  # (K, C, h, w), of the first seeds
        teacher = self.table["rows"][0]
        first = {"embedded": tensors["features.0"], "departures": tensors["departures"], "background": tensors["background.0"]}
        self.teacher = row_of(teacher, first)
        others = zip(self.table["rows"][1:], range(1, len(self.table["rows"])), strict=True)
        stored = lambda i: {"embedded": tensors[f"features.{i}"], "background": tensors[f"background.{i}"]}
        self.rows = [self.teacher, *(row_of(entry, stored(i), self.teacher) for entry, i in others)]
        self.ladder = [row_of(entry, {"embedded": tensors[f"ladder.{i}"]}) for i, entry in enumerate(self.table["ladder"])]
        self.calls = sorted({int(key.split(".")[1]) for key in self.table["best"]})  # 1, 2, 4, 8

    def first(self, index: int, n: int) -> Row:
        """Row `index` of the table, of its first n pictures alone: also what compares pictures with each other."""
        stored = ("embedded", "background", "departures")
        features = {k: v[:n] for k, v in self.rows[index].features.items() if k in stored}
        return row_of(self.table["rows"][index], features, self.teacher if index else None)

    def best(self, calls: int, metric: str) -> Row:
        """The undistilled teacher's best row by `metric` in `calls` network calls."""
        return self.rows[self.table["best"][f"{metric}.{calls}"]]

    def undistilled(self, calls: int) -> dict[str, Settings]:
        """{metric: the teacher's best stock settings by it} in exactly `calls` network calls; {} where none is shipped."""
        best = {key.split(".")[0]: index for key, index in self.table["best"].items() if key.endswith(f".{calls}")}
        return {metric: self.rows[index].settings for metric, index in best.items()}

    def nearest(self, calls: int) -> int:
        """The largest number of network calls with shipped rows that is not above `calls`; at least the smallest number."""
        return max(c for c in self.calls if c <= max(calls, self.calls[0]))


@cache
def shipped() -> Shipped:
    """The shipped teacher, read once."""
    return Shipped()


def settings_of(entry: dict[str, Any]) -> Settings:
    """The sampling settings of an entry of teacher.json."""
    timesteps, step_guidance = (tuple(entry[k]) if entry.get(k) else None for k in ("timesteps", "step_guidance"))
    way = Settings(entry["solver"], entry["num_steps"], entry["guidance"], entry["spacing"])
    return replace(way, eta=entry["eta"], timesteps=timesteps, step_guidance=step_guidance)


def row_of(entry: dict[str, Any], features: Features, teacher: Row | None = None) -> Row:
    """A row of the teacher from an entry of teacher.json and its stored features, compared with `teacher` of the same noise."""
    embedded = features["embedded"]
    prompts = Prompts.judged(len(embedded))
    hits = {"hits": recognised(embedded, prompts), "diversity": diversity(embedded, prompts)}
    if teacher is not None:
        hits["same_noise"] = (embedded - teacher.features["embedded"][: len(embedded)]).norm(dim=1)
    return Row("teacher", settings_of(entry), features | hits, len(embedded))
