"""Settings of the evaluation. The docstrings of the fields are the help text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class WalkConfig:
    """How an agent walks; for runs alone.

    Raises:
        ValueError: a number is outside its range.
    """

    features: str = "features"
    """Store of view features, a folder there or below data; random:WIDTH gives each view a fixed random
    vector."""
    tokenizer: str = ""
    """Tokeniser, a folder there or below data; that of the run when empty."""
    batch_size: int = 100
    """Episodes walked together; the scores do not depend on it."""
    max_steps: int = 0
    """Longest walk; 0 takes that by which the run chose its agent, and 35 for a converted one."""
    avoid_loops: bool = False
    """Take no viewpoint again (R2R, NDH)."""
    turns: bool = False
    """Write the poses between viewpoints too, as the originals do; they count in steps, nDTW and CLS."""
    submission_out: str = ""
    """Submission to write; when empty RUN/SPLIT.json, with .DATASET before .json if that is not r2r, and
    .SETTING if that is search or pre-explored; what is learnt for the latter goes into a folder beside it."""
    device: str = "cpu"
    """Such as cpu or cuda."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_steps < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and max_steps {self.max_steps}: give at least 1 "
                "and at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class SettingConfig:
    """More than a single greedy walk; for runs of R2R alone. Scores of greedy, search and pre-explored walks
    must not be compared with each other.

    Raises:
        ValueError: a number is outside its range, or options do not go together.
    """

    search: int = 0
    """Explore for each instruction until so many routes are finished, then walk the one that agent and
    speaker like best; 40 as the originals. All of it counts as walked: SPL comes near 0. 0 walks greedily."""
    max_expansions: int = 300
    """Viewpoints looked at in one search."""
    speaker: str = ""
    """Run of vln.speaker, or its folder: ranks the routes of --search, describes the paths of --explore."""
    speaker_weight: float | None = None
    """Of the speaker beside the agent when routes are ranked, from 0 to 1; 0.5 by default."""
    explore: int = 0
    """Let a copy of the agent learn for so many steps in the scans of the split before it walks greedily, on
    what the speaker says of paths sampled there; nothing else of the split is used. It learns as in its own
    run, by imitation alone, on the device that accelerate finds."""
    explore_paths: int = 1000
    """Paths to sample for that, or as many as there are; filtered as those of R2R."""
    explore_lr: float = 0.0
    """Learning rate of that; 0 takes the last of the agent's run."""

    def __post_init__(self) -> None:
        least = {"search": 0, "max_expansions": 1, "explore": 0, "explore_paths": 1, "explore_lr": 0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {bound}")
        if self.speaker_weight is not None and not 0 <= self.speaker_weight <= 1:
            raise ValueError(f"speaker_weight is {self.speaker_weight}: give a share from 0 to 1")
        if self.search and self.explore:
            raise ValueError(
                f"search is {self.search} and explore {self.explore}: these are two settings, give one"
            )
        usual = {each.name: each.default for each in fields(self)}
        needs = {"search": ("max_expansions", "speaker_weight"), "explore": ("explore_paths", "explore_lr")}
        for name, other in ((name, other) for other, names in needs.items() for name in names):
            if getattr(self, name) != usual[name] and not getattr(self, other):
                raise ValueError(f"{name} is {getattr(self, name)}, which does nothing without --{other}")
        if self.speaker_weight is not None and not self.speaker:
            raise ValueError(f"speaker_weight is {self.speaker_weight} but nobody ranks: give --speaker")
        if self.explore and not self.speaker:
            raise ValueError(f"explore is {self.explore} but nobody describes the paths: give --speaker")
        if self.speaker and not self.search and not self.explore:
            raise ValueError(
                f"the speaker {self.speaker} has nothing to do in a greedy walk: give --search or --explore"
            )

    @property
    def name(self) -> str:
        """What scores must be named with."""
        if self.explore:
            return "pre-explored"
        return "search" if self.search else "greedy"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Check a submission for what a leaderboard would refuse, and score it if the split has goals.

    Raises:
        ValueError: options do not go together.
    """

    submission: Annotated[str, tyro.conf.Positional]
    """JSON file, whose rows tell the task: R2R, NDH or HANNA; or a run of vln.train, whose best agent then
    walks the split first."""
    split: str = "val_unseen"
    """Split of the items; with the R2R test split, which has no goals, the submission is checked alone."""
    data: str = "data/vln"
    """Folder with items and graphs, unpacked or in archives: r2r/, ndh/, hanna/, connectivity/."""
    dataset: Literal["r2r", "r4r", "rxr"] | None = None
    """Whose items an agent for R2R walks, or a submission of that form is for; when left out those that the
    agent learned, and R2R's for a submission from elsewhere. For R4R the way as annotated, not the shortest
    one, is the length in SPL."""
    items: str = ""
    """JSON file of the items instead."""
    graphs: str = ""
    """Folder or archive of the connectivity files instead."""
    deduplicate: bool = False
    """Leave consecutive repeats of a viewpoint out of nDTW, SDTW and CLS (R2R)."""
    lenient: bool = False
    """Score as the first evaluators do: ignore unknown ids, take the first of doubled ones, charge gaps as
    walked."""
    out: str = ""
    """JSON to write; SUBMISSION.scores.json when empty."""
    agent: tyro.conf.OmitArgPrefixes[WalkConfig] = field(default_factory=WalkConfig)
    setting: tyro.conf.OmitArgPrefixes[SettingConfig] = field(default_factory=SettingConfig)

    def __post_init__(self) -> None:
        if self.setting.search and (self.agent.avoid_loops or self.agent.turns):
            raise ValueError("--avoid-loops and --turns are for single walks: leave them out with --search")
