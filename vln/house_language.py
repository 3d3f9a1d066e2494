"""English for the houses: which way to go, told by what is really seen on the way.

A speaker looks along every step of a path for something that tells this way from the others, and then
chooses among several ways to say it. Listeners get text, never the choice behind it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vln.geometry import HEADING_STEP, NUM_HEADINGS, Camera
from vln.house_features import concept_strengths
from vln.house_plans import COLOURS, NOUNS, ROOM_KINDS, House
from vln.world import World

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DIALOGUE_TOKENS = ("<NAV>", "<ORA>", "<TAR>")

SYNONYMS = {
    "sofa": ("sofa", "couch"),
    "rug": ("rug", "carpet"),
    "painting": ("painting", "picture"),
    "television": ("television", "tv"),
    "bookshelf": ("bookshelf", "bookcase"),
    "bathtub": ("bathtub", "tub"),
    "stove": ("stove", "oven"),
    "cabinet": ("cabinet", "cupboard"),
    "trunk": ("trunk", "chest"),
    "candle": ("candle", "candlestick"),
    "bicycle": ("bicycle", "bike"),
    "lounge": ("lounge", "living room"),
    "hallway": ("hallway", "corridor"),
    "bathroom": ("bathroom", "washroom"),
    "office": ("office", "study room"),
    "upstairs": ("stairs up", "steps up"),
    "downstairs": ("stairs down", "steps down"),
    "purple": ("purple", "violet"),
    "brown": ("brown", "wooden"),
}
"""Words for the nouns and colours that have several."""

_AHEAD = (
    "{go} towards the {thing}", "{go} to the {thing}", "{go} in the direction of the {thing}",
    "head for the {thing}", "keep the {thing} in front of you", "follow the way that leads to the {thing}",
    "aim for the {thing}",
)  # fmt: skip
_TURNED = (
    "turn {side} towards the {thing}", "go {side} at the {thing}", "make a {side} and {go} to the {thing}",
    "take the way with the {thing} on your {side}",
)  # fmt: skip
_INTO = ("{go} into the {thing}", "enter the {thing}", "step into the {thing}")
_STAIRS = {
    "upstairs": ("{go} up the stairs", "climb the stairs", "take the steps up"),
    "downstairs": ("{go} down the stairs", "descend the stairs", "take the steps down"),
}
_ON = ("keep going", "carry on past it", "{go} straight on", "continue")
_BARE = {
    "left": ("turn left", "take a left"),
    "right": ("turn right", "take a right"),
    "around": ("turn around", "go back the other way"),
    "straight": ("{go} straight", "{go} forward"),
}
_STOP = (
    "stop next to the {thing}", "stop by the {thing}", "wait near the {thing}", "wait beside the {thing}",
    "you are there when you stand at the {thing}",
)  # fmt: skip
_STOP_BARE = ("stop there", "wait there")
_GO = ("go", "walk", "head", "move")
_THEN = ("then ", "", "", "next ", "after that ")
_FIND = ("find the {thing} in the {room}", "where is the {thing} of the {room}",
         "look for the {thing} in the {room}", "get to the {thing} in the {room}")  # fmt: skip
_ASK = (
    "which way should i go now", "where do i go next", "should i go on from here",
    "i am near the {thing} , what now", "i see the {thing} , which way",
)  # fmt: skip
_LEAST_SHOWN = 0.2
"""How strongly a view must show what is said to lie there."""


_LEAST_CONTRAST = 0.1
"""By how much the way ahead must show it more strongly than every other way does."""


_FORESIGHT, _CARE = 0.5, 10.0
"""Weight of what a word would say at the other steps; how strictly the best thing is preferred."""


class Mention(NamedTuple):
    """A thing named in an instruction, and the step of the path at whose start it is seen."""

    step: int
    thing: int
    words: str


class Instruction(NamedTuple):
    """Text, and what it names."""

    text: str
    mentions: tuple[Mention, ...]


class Speaker:
    """Tells the way through one house.

    Args:
        house: the house.
    """

    def __init__(self, house: House) -> None:
        self.house = house
        world = World([house.graph])
        self._table = world.candidates(Camera())
        self._shown = concept_strengths(house)
        self._contrasts: dict[tuple[int, int, int], np.ndarray] = {}
        self._ahead: dict[tuple[int, int], np.ndarray] = {}
        self._last: tuple[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = ((), [])
        self._slots = [
            {int(target): place for place, target in enumerate(row[:count])}
            for row, count in zip(self._table.viewpoint, self._table.num_candidates, strict=True)
        ]

    def arrival(self, source: int, target: int) -> int:
        """View that an agent looks along when it has walked from one viewpoint to a neighbour."""
        return int(self._table.point_id[source, self._slots[source][target]])

    def describe(
        self, path: Sequence[int], heading: float, random: np.random.Generator, *, stop: bool = True
    ) -> Instruction:
        """An instruction for a path.

        Args:
            path: viewpoints, at least two.
            heading: at the start, radians.
            random: source of choices and phrasing.
            stop: say where to stop.
        """
        clauses: list[str] = []
        mentions: list[Mention] = []
        view, last = None, -1
        ways = self._landmarks(tuple(path))
        for step, (here, there) in enumerate(itertools.pairwise(path)):
            side = self.side(here, there, heading if view is None else (view % NUM_HEADINGS) * HEADING_STEP)
            view = self.arrival(here, there)
            things, share = ways[step]
            thing = int(things[np.searchsorted(share, random.uniform())]) if len(things) else -1
            if thing == last and thing >= 0:
                if random.uniform() < 0.3:
                    clauses.append(_pick(random, _ON))
                continue
            if thing < 0:
                clauses.append(_pick(random, _BARE[side]))
                continue
            last = thing
            words = self._name(thing, random)
            mentions.append(Mention(step, thing, words))
            clauses.append(_pick(random, self._phrases(thing, side, random)).replace("{side}", side)
                           .replace("{thing}", words))  # fmt: skip
        if stop:
            clauses.append(self._stop(path, random, mentions))
        joined = " . ".join(
            (_pick(random, _THEN) if number else "") + text for number, text in enumerate(clauses)
        )
        return Instruction(_with_go(joined, random) + " .", tuple(mentions))

    def find(self, thing: int, room: int, random: np.random.Generator) -> str:
        """Request to find a thing."""
        kind = _word(self.house.rooms[room].kind, random)
        return (
            _pick(random, _FIND).replace("{thing}", self._name(thing, random)).replace("{room}", kind) + " ."
        )

    def ask(self, viewpoint: int, random: np.random.Generator) -> str:
        """Question of a navigator that stands somewhere."""
        near = self.nearest_landmarks(viewpoint)
        phrase = _pick(random, _ASK if len(near) else _ASK[:3])
        return phrase.replace("{thing}", self._name(int(near[0]), random) if len(near) else "") + " ?"

    def nearest_landmarks(self, viewpoint: int, *, within_m: float = 3.0) -> np.ndarray:
        """Landmarks visible from a viewpoint within a distance, the nearest first, int64 ``[n]``."""
        seen = np.flatnonzero(self.house.visible[viewpoint] & (self.house.colours >= 0))
        offset = self.house.positions[seen, :2] - self.house.graph.positions[viewpoint, :2]
        apart = np.hypot(offset[:, 0], offset[:, 1])
        order = np.argsort(apart, kind="stable")
        return seen[order][apart[order] < within_m]

    def side(self, here: int, there: int, heading: float) -> str:
        """Where a neighbour lies for someone with that heading: straight, left, right or around."""
        slot = self._slots[here][there]
        turn = math.degrees(math.remainder(self._table.heading[here, slot] - heading, 2 * math.pi))
        if abs(turn) < 35:
            return "straight"
        return "around" if abs(turn) > 140 else "right" if turn > 0 else "left"

    def _contrast(self, here: int, there: int, came_from: int) -> np.ndarray:
        """How much better the way ahead shows each concept than any other way does, ``[NUM_CONCEPTS]``."""
        key = (here, there, came_from)
        if key not in self._contrasts:
            views = {
                target: int(self._table.point_id[here, slot]) for target, slot in self._slots[here].items()
            }
            ahead = self._shown[here, views[there]]
            others = [view for target, view in views.items() if target not in (there, came_from)]
            self._contrasts[key] = ahead - self._shown[here, others].max(axis=0) if others else ahead
        return self._contrasts[key]

    def _landmarks(self, path: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For every step, the things in the view of the way ahead that tell it from the others, and their
        shares among what is said of it, summed up.

        What points a wrong way elsewhere on the path is said less.
        """
        if self._last[0] == path:
            return self._last[1]
        steps = list(zip(path, path[1:], (-1, *path), strict=False))
        contrasts = np.array([self._contrast(*step) for step in steps])
        astray = np.minimum(contrasts, 0).sum(axis=0)
        found = []
        for (here, there, _), contrast in zip(steps, contrasts, strict=True):
            value = contrast + np.where(contrast > 0, _FORESIGHT * astray, 0)
            key = (here, there)
            if key not in self._ahead:
                seen = np.flatnonzero(self.house.visible[here])
                self._ahead[key] = seen[
                    self._shown_alone(here, seen, self.arrival(here, there)) > _LEAST_SHOWN
                ]
            seen = self._ahead[key]
            colours = self.house.colours[seen]
            score = value[self.house.nouns[seen]] + 0.5 * value[len(NOUNS) + np.maximum(colours, 0)] * (
                colours >= 0
            )
            plain = contrast[self.house.nouns[seen]] + 0.5 * contrast[len(NOUNS) + colours] * (colours >= 0)
            good = plain > _LEAST_CONTRAST
            weight = np.exp(_CARE * (score[good] - score[good].max(initial=-np.inf)))
            share = np.cumsum(weight) / weight.sum()
            share[-1:] = 1.0
            found.append((seen[good], share))
        self._last = path, found
        return found

    def _shown_alone(self, here: int, things: np.ndarray, view: int) -> np.ndarray:
        """Strength of single things in a view, ``[n]``."""
        offset = self.house.positions[things] - self.house.graph.positions[here]
        heading = np.arctan2(offset[:, 0], offset[:, 1])
        beside = np.remainder(heading - view % NUM_HEADINGS * HEADING_STEP + np.pi, 2 * np.pi) - np.pi
        return np.exp(-(beside**2) / (2 * math.radians(16) ** 2)) * (
            np.hypot(offset[:, 0], offset[:, 1]) > 0.3
        )

    def _phrases(self, thing: int, side: str, random: np.random.Generator) -> Sequence[str]:
        noun = NOUNS[self.house.nouns[thing]]
        if noun in _STAIRS:
            return _STAIRS[noun]
        if noun in ROOM_KINDS and random.uniform() < 0.8:
            return _INTO
        return _TURNED if side in ("left", "right") and random.uniform() < 0.3 else _AHEAD

    def _name(self, thing: int, random: np.random.Generator) -> str:
        noun, colour = _word(NOUNS[self.house.nouns[thing]], random), int(self.house.colours[thing])
        return noun if colour < 0 else f"{_word(COLOURS[colour], random)} {noun}"

    def _stop(self, path: Sequence[int], random: np.random.Generator, mentions: list[Mention]) -> str:
        near = self.nearest_landmarks(path[-1])[:2]
        if not len(near):
            return _pick(random, _STOP_BARE)
        thing = int(random.choice(near))
        words = self._name(thing, random)
        mentions.append(Mention(len(path) - 1, thing, words))
        return _pick(random, _STOP).replace("{thing}", words)


def _pick(random: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(random.integers(len(texts)))]


def _word(name: str, random: np.random.Generator) -> str:
    return _pick(random, SYNONYMS.get(name, (name,)))


def _with_go(text: str, random: np.random.Generator) -> str:
    parts = text.split("{go}")
    return parts[0] + "".join(_pick(random, _GO) + part for part in parts[1:])


def vocabulary() -> list[str]:
    """Every word that a speaker can use, sorted."""
    texts = [
        *_AHEAD,
        *_TURNED,
        *_INTO,
        *_ON,
        *_STOP,
        *_STOP_BARE,
        *_GO,
        *_THEN,
        *_FIND,
        *_ASK,
        *NOUNS,
        *COLOURS,
    ]
    for several in (*_STAIRS.values(), *_BARE.values(), *SYNONYMS.values()):
        texts += several
    words = {word for text in texts for word in text.split() if "{" not in word}
    return sorted(words | {".", ",", "?", "straight", "around", "left", "right"})


def word_tokenizer() -> Any:
    """Tokeniser of the houses' words: "[CLS] ... [SEP]", lower case, one id a word, the rest unknown.

    Returns:
        A ``transformers.PreTrainedTokenizerFast``; ``save_pretrained`` and ``AutoTokenizer`` work offline.

    Raises:
        ImportError: ``transformers`` is not there.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError("the tokeniser of the houses needs: pip install 'transformers>=5.17'") from error
    entries = [*SPECIAL_TOKENS, *DIALOGUE_TOKENS, *vocabulary()]
    ids = {word: number for number, word in enumerate(entries)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        additional_special_tokens=list(DIALOGUE_TOKENS),
        model_max_length=512,
    )
