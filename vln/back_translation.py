"""Back-translation: a speaker tells sampled paths anew at every step of an agent's training.

The paths are seen through the environment dropout of that step, by speaker and agent alike, so that each step
has walks, words and an environment of its own (Tan et al., 2019, Sec. 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vln.agent import Episodes
from vln.agent_data import Reading, make_split
from vln.augment_paths import PathSource, SampledPath
from vln.augment_shards import walks_of_paths
from vln.data import R2RItem
from vln.navgraph import NavGraph
from vln.speaker_folder import TrainedSpeaker
from vln.walks import PanoramaFeatures, path_batch, roll_walks
from vln.world import World

MAX_WORDS = 120
"""Longest text, EOS included."""


class Masked:
    """Features with some channels off.

    Args:
        features: of viewpoints.
        keep: factor of each channel, float32 ``[F]``.
    """

    def __init__(self, features: PanoramaFeatures, keep: NDArray[np.float32]) -> None:
        self._features, self._keep = features, keep

    @property
    def width(self) -> int:
        """F."""
        return self._features.width

    def gather(self, scan_ids: Sequence[str], viewpoint_ids: Sequence[str]) -> Any:
        """Features of viewpoints, float32 ``[B, 36, F]``."""
        return self._features.gather(scan_ids, viewpoint_ids) * self._keep


class BackTranslation:
    """Episodes of sampled paths, with words of a speaker.

    Args:
        trained: the speaker, put into eval mode.
        paths: sampled.
        world: with their scans.
        features: of its viewpoints, those that the speaker was trained with.
        tokenizer: of the agent.
        reading: how the agent reads.
        first: number of the first path, on which draws of its episodes hang.
    """

    def __init__(
        self, trained: TrainedSpeaker, paths: Sequence[SampledPath], world: World,
        features: PanoramaFeatures, tokenizer: Any, *, reading: Reading, first: int,
    ) -> None:  # fmt: skip
        self._trained, self._paths, self._world, self._features = trained, paths, world, features
        self._tokenizer, self._reading, self._first = tokenizer, reading, first
        self._device = torch.device("cpu")
        self._table = roll_walks(world, walks_of_paths(paths, 1), shortest=False)
        trained.speaker.eval()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def scan_ids(self) -> frozenset[str]:
        """Scans of the paths."""
        return frozenset(path.scan_id for path in self._paths)

    def to(self, device: Any) -> None:
        """Let the speaker compute on a device."""
        self._device = torch.device(device)
        self._trained.speaker.to(self._device)

    def texts(self, rows: np.ndarray, keep: NDArray[np.float32] | None) -> list[str]:
        """What the speaker finds likeliest for some paths.

        Args:
            rows: their numbers, int64 ``[B]``.
            keep: factors of the features, see `vln.surroundings.environment_mask`.
        """
        speaker = self._trained.speaker
        features = self._features if keep is None else Masked(self._features, keep)
        batch = path_batch(
            self._table, rows, self._world, features, angle_size=speaker.config.angle_size,
            orientation=self._trained.orientation,
        )  # fmt: skip
        said = speaker.speak(
            *(part.to(self._device) for part in (batch.actions, batch.panoramas, batch.lengths)),
            max_words=MAX_WORDS, features_dropped=keep is not None,
        )  # fmt: skip
        return [self._trained.words.decode(ids) for ids in said.tolist()]

    def episodes(self, rows: np.ndarray, keep: NDArray[np.float32] | None) -> Episodes:
        """Some paths as episodes to walk.

        Args:
            rows: their numbers, int64 ``[B]``.
            keep: factors of the features.
        """
        texts = self.texts(rows, keep)
        items = [
            R2RItem(int(row), path.scan_id, path.heading, path.path, (text,), path.distance_m)
            for row, path, text in zip(rows, (self._paths[row] for row in rows), texts, strict=True)
        ]
        made = make_split("told", items, self._world, self._tokenizer, self._reading)
        return made.episodes._replace(number=rows.astype(np.int64) + self._first)


def sample_paths(
    graphs: dict[str, NavGraph], known: Sequence[R2RItem], count: int, *, seed: int
) -> list[SampledPath]:
    """Paths to describe, none between ends that some item has.

    Args:
        graphs: of the scans that may be sampled.
        known: items of all splits.
        count: paths; 0 for all that pass R2R's filter.
        seed: of their choice.

    Raises:
        ValueError: there are not so many.
    """
    source = PathSource(graphs, taken={(item.scan_id, item.path[0], item.path[-1]) for item in known})
    if not len(source):
        raise ValueError(
            f"no path of {len(graphs)} training scans passes R2R's filter: there is nothing for --speaker "
            "to describe"
        )
    return source.sample(count or len(source), seed=seed)
