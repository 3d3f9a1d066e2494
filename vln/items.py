"""Items of the tasks as typed tuples: R2R and RxR paths, dialogues, NDH items, HANNA tasks and routes."""

from __future__ import annotations

from typing import Any, NamedTuple


class R2RItem(NamedTuple):
    """A path with its instructions (Anderson et al., 2018); test items have its first viewpoint alone."""

    path_id: int | str
    scan_id: str
    heading: float
    """At the start, radians."""
    path: tuple[str, ...]
    """Viewpoint ids."""
    instructions: tuple[str, ...]
    distance: float | None
    """Length as stated, metres to two decimals; ``None`` in the test split."""

    @property
    def instruction_ids(self) -> tuple[str, ...]:
        """What a submission calls each instruction."""
        return tuple(f"{self.path_id}_{number}" for number in range(len(self.instructions)))


class TimedWord(NamedTuple):
    """A word of a spoken instruction; times are ``None`` where the recogniser found none."""

    word: str
    start_s: float | None
    end_s: float | None


class RxRItem(NamedTuple):
    """One spoken instruction for a path (Ku et al., 2020); test items have its first viewpoint alone."""

    instruction_id: int | str
    path_id: int | str | None
    scan_id: str
    heading: float
    """At the start, radians."""
    path: tuple[str, ...]
    """Viewpoint ids."""
    language: str
    """Such as ``en-US``, ``hi-IN``, ``te-IN``."""
    instruction: str
    annotator: int | str | None
    timed_words: tuple[TimedWord, ...]

    @property
    def distance(self) -> None:
        """Not stated, unlike R2R's."""
        return None

    @property
    def instructions(self) -> tuple[str, ...]:
        """The one instruction, as other items have several."""
        return (self.instruction,)

    @property
    def instruction_ids(self) -> tuple[str, ...]:
        """What a submission calls it."""
        return (str(self.instruction_id),)


class Turn(NamedTuple):
    """One message of a dialogue."""

    role: str
    """``navigator`` asks, ``oracle`` answers."""
    message: str
    nav_idx: int
    """How many navigation steps came before it."""


class Dialogue(NamedTuple):
    """A whole game of two people, one walking and one who knows the way (CVDN, Thomason et al., 2019)."""

    idx: int
    scan_id: str
    target: str
    """Name of the object looked for."""
    start: str
    """Viewpoint id."""
    heading: float
    """At the start, radians."""
    end_panos: tuple[str, ...]
    """Viewpoint ids of the goal region."""
    nav_steps: tuple[str, ...]
    """Viewpoint ids as walked."""
    planner_nav_steps: tuple[str, ...]
    turns: tuple[Turn, ...]
    nav_camera: Any
    """Camera poses while walking, as the file has them."""
    stop_history: tuple[Any, ...]
    """Where the navigator guessed to be at the goal, as the file has it."""
    ratings: dict[str, float]
    """What the players thought of each other: every field whose name ends in ``quality``, or ``ratings``."""
    problem: bool
    """Whether a player reported one."""


class NDHItem(NamedTuple):
    """A dialogue so far, and where it led (CVDN, Thomason et al., 2019); test items have no ends or paths."""

    inst_idx: int
    scan_id: str
    start: str
    """Viewpoint id."""
    heading: float
    """At the start, radians."""
    end_panos: tuple[str, ...]
    """Viewpoint ids of the goal region."""
    planner_path: tuple[str, ...]
    player_path: tuple[str, ...]
    target: str = ""
    """Name of the object looked for."""
    turns: tuple[Turn, ...] = ()
    """The dialogue so far, oldest first."""
    nav_history: tuple[str, ...] = ()
    """Viewpoint ids walked before the start."""

    @property
    def trusted_path(self) -> tuple[str, ...]:
        """The player's path if it passes the planner's last viewpoint after its start, else the planner's."""
        trusted = bool(self.planner_path) and self.planner_path[-1] in self.player_path[1:]
        return self.player_path if trusted else self.planner_path


class HannaTask(NamedTuple):
    """An object to find, with a path to each viewpoint that counts as finding it (Nguyen & Daumé, 2019)."""

    path_id: int | str
    scan_id: str
    heading: float
    """At the start, radians."""
    paths: tuple[tuple[str, ...], ...]
    """Viewpoint ids; all begin at the start."""
    instructions: tuple[str, ...]

    @property
    def instruction_ids(self) -> tuple[str, ...]:
        """What a submission calls each instruction."""
        return tuple(f"{self.path_id}_{number}" for number in range(len(self.instructions)))


class HannaRoute(NamedTuple):
    """A route that the assistant ANNA knows, with the words for it (Nguyen & Daumé, 2019)."""

    path_id: int | str
    scan_id: str
    path: tuple[str, ...]
    """Viewpoint ids."""
    instruction: str
    view_id: int
    """View of 36 that one faces on entering the route."""
    split: str
    """Such as ``train_seen`` or ``val``."""


Item = R2RItem | RxRItem | Dialogue | NDHItem | HannaTask | HannaRoute


def item_id(item: Item) -> int | str:
    """What an item is called in its file."""
    if isinstance(item, NDHItem):
        return item.inst_idx
    if isinstance(item, Dialogue):
        return item.idx
    return item.instruction_id if isinstance(item, RxRItem) else item.path_id
