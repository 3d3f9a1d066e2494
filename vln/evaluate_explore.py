"""Pre-exploration: an agent learns in the scans of a split before it walks there (Tan et al., 2019, Sec. 5).

Paths are sampled in the scans, a speaker describes them, and a copy of the agent learns to follow what it
said. No item of the split is needed for that, and none is given to what stands here: only its scans are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fq.run import CONFIG, write_atomically
from vln.agent_folder import BEST, TOKENIZER, WEIGHTS, Loaded, load_agent
from vln.augment_config import AugmentConfig
from vln.augment_paths import PathSource, SampledPath
from vln.augment_shards import Job, describe
from vln.evaluate_config import EvaluateConfig
from vln.houses import connectivity
from vln.navgraph import SUFFIX
from vln.places import new_folder
from vln.speaker_folder import TrainedSpeaker, fingerprint
from vln.surroundings import Surroundings
from vln.train import parse, train
from vln.train_config import PAPER, AgentConfig, ItemsConfig, LearnConfig, Training, WalkRunConfig

SPLIT, DATA, RUN = "explored", "data", "run"
"""Name of the sampled items as a split; what is in the folder of an exploration: their data, and the run."""

_IDENTITY = "identity.json"
_EVALUATIONS = 5
"""In one exploration, on its own paths; the agent that then walks is the best of them."""
_EVAL_ITEMS = 200


def explore(
    config: EvaluateConfig, loaded: Loaded, surroundings: Surroundings, trained: TrainedSpeaker,
    tokenizer: Any, folder: Path,
) -> Loaded:  # fmt: skip
    """Let a copy of an agent learn in the scans at hand; an interrupted exploration goes on where it was.

    Args:
        config: of the evaluation; of its split and items nothing is read.
        loaded: the agent, of R2R.
        surroundings: scans to explore, and their features.
        trained: speaker, on the device of the surroundings.
        tokenizer: of the agent.
        folder: made if need be: ``data`` gets graphs, tokeniser and the items that were made up, ``run`` is
            one of ``vln.train``.

    Returns:
        The agent that learnt.

    Raises:
        FileExistsError: the folder has an exploration of other options.
        ValueError: no path of the scans can be sampled, or the agent's run is damaged.
    """
    setting, source = config.setting, PathSource(surroundings.world.graphs)
    if not len(source):
        raise ValueError(
            f"none of {len(surroundings.world.graphs)} scans has a path of 5 m and 4 to 6 edges: there is "
            "nothing to explore"
        )
    paths = source.sample(min(setting.explore_paths, len(source)), seed=0)
    learn = lessons(loaded, rate=setting.explore_lr)
    identity = {
        "agent": hashlib.sha256((loaded.folder / WEIGHTS).read_bytes()).hexdigest(),
        "speaker": fingerprint(trained),
        "features": _features(config),
        "paths": hashlib.sha256(json.dumps(paths).encode()).hexdigest(),
        "steps": setting.explore,
        "learn": asdict(learn),
    }
    folder.mkdir(exist_ok=True)
    if (folder / DATA).exists():
        _require_same(folder, identity)
    else:
        with new_folder(folder / DATA) as partial:
            _write_data(partial, config, surroundings, trained, paths)
            tokenizer.save_pretrained(partial / TOKENIZER)
            write_atomically(partial / _IDENTITY, json.dumps(identity, indent=1) + "\n")
    return load_agent(train(_training(config, loaded, learn, folder)))


def lessons(loaded: Loaded, *, rate: float = 0.0) -> LearnConfig:
    """How an agent learns in an exploration: by imitation alone, otherwise as it last learnt in its own run.

    Args:
        loaded: an agent; of one without a run, as a converted one, the paper's settings are taken.
        rate: learning rate instead of that of the run's last stage, if above 0.

    Raises:
        ValueError: the configuration of the run is damaged, or of another version.
    """
    run = loaded.folder.parent
    is_run = loaded.folder.name == BEST and (run / CONFIG).is_file()
    learn = parse(["--config", str(run)]).learn if is_run else PAPER.learn
    rate = rate or (learn.lr if learn.tune == "none" else learn.tune_lr)
    return replace(learn, reinforce=False, imitation_weight=1.0, tune_from=0, lr=rate, tune_lr=rate)


def _training(config: EvaluateConfig, loaded: Loaded, learn: LearnConfig, folder: Path) -> Training:
    reading, steps = loaded.reading, config.setting.explore
    return Training(
        preset=SPLIT,
        items=ItemsConfig(
            data=str((folder / DATA).absolute()),
            split=SPLIT,
            val_splits=(SPLIT,),
            features=_features(config),
            max_tokens=reading.max_tokens,
            num_instructions=reading.num_instructions,
            follow=reading.follow,
            deaf=reading.deaf,
        ),
        model=AgentConfig(agent=str(loaded.folder.absolute())),
        learn=learn,
        run=WalkRunConfig(
            steps=steps,
            out=str(folder / RUN),
            log_every=max(1, min(50, steps // 20)),
            eval_every=-(-steps // _EVALUATIONS),
            eval_items=_EVAL_ITEMS,
            eval_batch_size=config.agent.batch_size,
            eval_max_steps=loaded.max_steps or learn.max_steps,
            checkpoint_every=-(-steps // _EVALUATIONS),
            select=f"{SPLIT}/spl",
            maps=0,
        ),
    )


def _write_data(
    folder: Path, config: EvaluateConfig, surroundings: Surroundings, trained: TrainedSpeaker,
    paths: list[SampledPath],
) -> None:  # fmt: skip
    """Graphs of the scans, and described paths in the form of R2R."""
    (folder / "connectivity").mkdir()
    for scan_id, graph in surroundings.world.graphs.items():
        text = json.dumps(connectivity(graph))
        (folder / "connectivity" / f"{scan_id}{SUFFIX}").write_text(text, encoding="utf-8")
    # What the speaker finds likeliest, as in EnvDrop's back-translation.
    said = AugmentConfig(speaker=config.setting.speaker, out="", num_instructions=1, temperature=0.0)
    job = Job(paths, 1, surroundings.world, surroundings.features, trained, {}, 0.0)
    shards = range(-(-len(paths) // said.shard_size))
    rows = [row for number in shards for row in describe(said, job, number, surroundings.device).rows]
    text = json.dumps(rows, ensure_ascii=False)
    (folder / f"R2R_{SPLIT}.json").write_text(text + "\n", encoding="utf-8")


def _features(config: EvaluateConfig) -> str:
    """Where the features are, for a run whose data are elsewhere."""
    name = config.agent.features
    if name.startswith("random:"):
        return name
    inside = Path(config.data) / name
    return str((inside if inside.exists() else Path(name)).absolute())


def _require_same(folder: Path, identity: dict[str, Any]) -> None:
    file = folder / DATA / _IDENTITY
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in identity.items() if stored.get(name) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is missing or damaged: delete {folder} ({error})") from error
    if other:
        raise FileExistsError(
            f"{folder} holds an exploration of another kind ({', '.join(other)} differ): delete it, or name "
            "another --submission-out"
        )
