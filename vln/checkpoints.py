"""Checkpoints of others to ours and back: released Prevalent folders, BERT, LXMERT, agents' snapshots.

Files are read without running anything in them: tensors, plain values and collections alone are unpickled.
Sizes come from the tensors; a name that is missing or unknown is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import BertModel

from vln.model import Prevalent, PrevalentConfig, PrevalentPretraining

State = dict[str, Tensor]

WEIGHTS = "pytorch_model.bin"

_TIED = "mlmhead.predictions.decoder.weight"
_WORDS = "bert.embeddings.word_embeddings.weight"
_VIEWS = "bert.vision_encoder.visn_fc.weight"

_ATTENTION = (
    ("self.query", "query"),
    ("self.key", "key"),
    ("self.value", "value"),
    ("output.dense", "output"),
    ("output.LayerNorm", "norm"),
)
_FIXED = (
    ("bert.embeddings.word_embeddings", "embeddings.words"),
    ("bert.embeddings.position_embeddings", "embeddings.positions"),
    ("bert.embeddings.token_type_embeddings", "embeddings.token_types"),
    ("bert.embeddings.LayerNorm", "embeddings.norm"),
    ("bert.vision_encoder.visn_fc", "view_projection"),
    ("bert.vision_encoder.visn_layer_norm", "view_norm"),
    ("bert.pooler.dense", "pooler"),
)
_HEADS = (
    ("next_action.linear", "action_head"),
    ("mlmhead.predictions.transform.dense", "mlm_head.transform"),
    ("mlmhead.predictions.transform.LayerNorm", "mlm_head.norm"),
    ("mlmhead.predictions", "mlm_head"),  # its bias
)


def _feed_forward(intermediate: str, output: str, ours: str) -> list[tuple[str, str]]:
    return [
        (f"{intermediate}.dense", f"{ours}.expand"),
        (f"{output}.dense", f"{ours}.contract"),
        (f"{output}.LayerNorm", f"{ours}.norm"),
    ]


_TEXT_LAYER = [
    *((f"attention.{theirs}", f"attention.{ours}") for theirs, ours in _ATTENTION),
    *_feed_forward("intermediate", "output", "feed_forward"),
]
_CROSS_LAYER = [
    *(
        (f"visual_attention.{theirs.replace('self', 'att')}", f"cross_attention.{ours}")
        for theirs, ours in _ATTENTION
    ),
    *(
        (f"{side}_self_att.{theirs}", f"{name}_attention.{ours}")
        for side, name in (("lang", "text"), ("visn", "view"))
        for theirs, ours in _ATTENTION
    ),
    *_feed_forward("lang_inter", "lang_output", "text_feed_forward"),
    *_feed_forward("visn_inter", "visn_output", "view_feed_forward"),
]


def released_names(model: Prevalent) -> dict[str, str]:
    """Our names of all tensors to the released ones, in the order of our state.

    The tied decoder of the masked words, which the released files repeat, is not among them.
    """
    modules = [*_FIXED, *_HEADS]
    for number in range(model.config.num_text_layers):
        modules += [(f"bert.lalayer.{number}.{a}", f"text_layers.{number}.{b}") for a, b in _TEXT_LAYER]
    for number in range(model.config.num_cross_layers):
        modules += [(f"bert.addlayer.{number}.{a}", f"cross_layers.{number}.{b}") for a, b in _CROSS_LAYER]
    theirs = {ours: name for name, ours in modules}
    return {key: f"{theirs[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in model.state_dict()}


# ---- pre-training model


def to_released(model: Prevalent) -> State:
    """Weights under the released names, with the copy of the word embeddings that the files hold.

    Args:
        model: with or without its heads; without, only the names below ``bert.``.

    Returns:
        CPU tensors, not copied.
    """
    state = model.state_dict()
    found = {theirs: state[ours].detach().cpu() for ours, theirs in released_names(model).items()}
    if isinstance(model, PrevalentPretraining):
        found[_TIED] = found[_WORDS]
    return found


def load_released(model: Prevalent, state: Mapping[str, Tensor]) -> None:
    """Put weights under released names into a model of that size.

    Args:
        model: with or without its heads.
        state: the set of names must be the model's exactly.

    Raises:
        ValueError: a name is missing or unknown, a shape is another, or the tied copy differs from the word
            embeddings.
    """
    names, theirs = released_names(model), dict(state)
    if _TIED in theirs and isinstance(model, PrevalentPretraining):
        if not torch.equal(theirs.pop(_TIED), state[_WORDS]):
            raise ValueError(f"{_TIED} and {_WORDS} differ but the original ties them: the file is damaged")
    own = model.state_dict()
    check_names(theirs, {released: own[ours] for ours, released in names.items()}, "the released checkpoint")
    model.load_state_dict({ours: theirs[released] for ours, released in names.items()}, strict=True)


def check_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Refuse a state whose names or shapes are not those expected.

    Raises:
        ValueError: they are not; up to five of each kind are named.
    """
    wrong = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(
            f"{key} {list(state[key].shape)} instead of {list(expected[key].shape)}"
            for key in state.keys() & expected.keys()
            if state[key].shape != expected[key].shape
        ),
    }
    if any(wrong.values()):
        found = "; ".join(f"{name}: {', '.join(keys[:5])}" for name, keys in wrong.items() if keys)
        raise ValueError(f"{what} does not fit the model ({found})")


def infer_config(
    state: Mapping[str, Tensor], *, num_attention_heads: int, angle_size: int = 128, **options: Any
) -> PrevalentConfig:
    """Sizes of a released model from its tensors.

    Args:
        state: names below ``bert.`` at least.
        num_attention_heads: no tensor shows it.
        angle_size: of the views' width, the part that is orientation; no tensor shows it either.
        **options: of `PrevalentConfig`, as ``orientation``.

    Raises:
        ValueError: these are not the weights of a Prevalent model.
    """
    try:
        words, project = state[_WORDS], state[_VIEWS]
        sizes: dict[str, Any] = {
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "intermediate_size": state["bert.addlayer.0.lang_inter.dense.weight"].shape[0],
            "max_position_embeddings": state["bert.embeddings.position_embeddings.weight"].shape[0],
            "type_vocab_size": state["bert.embeddings.token_type_embeddings.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(f"the checkpoint lacks {error}: a Prevalent model was expected") from error
    if not 0 <= angle_size < project.shape[1]:
        raise ValueError(f"angle_size is {angle_size} but the views have {project.shape[1]} numbers in all")
    if "next_action.linear.weight" in state:
        sizes["num_actions"] = state["next_action.linear.weight"].shape[0]
    return PrevalentConfig(
        **sizes,
        num_text_layers=_count(state, "bert.lalayer"),
        num_cross_layers=_count(state, "bert.addlayer"),
        feature_size=project.shape[1] - angle_size,
        angle_size=angle_size,
        num_attention_heads=num_attention_heads,
        **options,
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    found = {int(match[1]) for key in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
    return max(found, default=-1) + 1


def from_released(folder: str | Path, *, angle_size: int = 128) -> PrevalentPretraining:
    """A released pre-training folder (config.json, pytorch_model.bin) as ours, in eval mode.

    Its actions are candidate ranks and its orientation is in blocks.

    Args:
        folder: of the checkpoint.
        angle_size: numbers of orientation behind a view's features.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds more than plain values, or the weights are others.
    """
    folder = Path(folder)
    config, state = _read_json(folder / "config.json"), read_tensors(folder / WEIGHTS)
    if "num_attention_heads" not in config:
        raise ValueError(f"{folder / 'config.json'} lacks num_attention_heads: it is no released model's")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r} but the released models use 'gelu'")
    ours = infer_config(
        state,
        num_attention_heads=config["num_attention_heads"],
        angle_size=angle_size,
        hidden_dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
        initializer_range=config.get("initializer_range", 0.02),
        train_text=config.get("update_lang_bert", True),
        train_cross=config.get("update_add_layer", True),
    )
    model = PrevalentPretraining(ours)
    load_released(model, state)
    return model.eval()


def save_released(model: PrevalentPretraining, folder: str | Path) -> None:
    """Write the released layout, which HAMT and VLN-BERT read too.

    That code gives the model plain features and orientation in blocks; a model of another form is written so
    that it computes the same from those.

    Args:
        model: whose actions are candidate ranks: the released code knows no other.
        folder: made if need be.

    Raises:
        ValueError: its actions are others.
    """
    config, folder = model.config, Path(folder)
    if config.action_target != "candidate_rank":
        raise ValueError(
            f"the model's actions are {config.action_target!r} but the released layout knows candidate ranks "
            "alone: train with action_target='candidate_rank' to export"
        )
    theirs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_text_layers,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_eps,
        "img_feature_dim": config.view_size,
        "img_feature_type": "",
        "update_lang_bert": config.train_text,
        "update_add_layer": config.train_cross,
        "la_layers": config.num_text_layers,
        "vl_layers": config.num_cross_layers,
        "action_space": config.num_actions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = to_released(model)
    state[_VIEWS] = _for_plain_views(state[_VIEWS], config)
    _replace(folder / WEIGHTS, lambda partial: torch.save(state, partial))
    text = json.dumps(theirs, indent=2, sort_keys=True) + "\n"
    _replace(folder / "config.json", lambda partial: partial.write_text(text, encoding="utf-8"))


def _for_plain_views(weight: Tensor, config: PrevalentConfig) -> Tensor:
    """Projection ``[H, D]`` of views for features that are not scaled and orientation in blocks."""
    features, angles = weight.split([config.feature_size, config.angle_size], dim=1)
    if config.feature_scale != 1:
        features = features * config.feature_scale
    if config.orientation == "interleaved":
        angles = rearrange(angles, "h (copies four) -> h (four copies)", four=4)
    return torch.cat([features, angles], dim=1)


# ---- a start from other models


def initialise_from_bert(model: Prevalent, bert: BertModel | str | Path) -> list[str]:
    """Give embeddings, pooler and text layers the weights of BERT; its first layers, if it has more.

    The original built its model without them.

    Args:
        model: of BERT's width; all else keeps its weights.
        bert: the model, or a folder or Hub name of one.

    Returns:
        Names of our tensors that were set.

    Raises:
        ValueError: it is too small, or of another width or vocabulary.
    """
    if not isinstance(bert, BertModel):
        bert = BertModel.from_pretrained(str(bert))
    have, want = bert.config.num_hidden_layers, model.config.num_text_layers
    if have < want:
        raise ValueError(f"this BERT has {have} layers but the model {want} over the text: take another")
    return _initialise(model, bert.state_dict(), "")


def initialise_from_lxmert(model: Prevalent, source: str | Path | Mapping[str, Tensor]) -> list[str]:
    """Give embeddings, pooler, text and cross layers the weights of LXMERT.

    Its own layers of the picture have no counterpart, and the projection of its views has another width:
    ours keeps its weights.

    Args:
        model: of LXMERT's width, with at most as many layers of each kind.
        source: file of tensors, as of the LXMERT authors or of transformers; or the tensors.

    Returns:
        Names of our tensors that were set.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or a layer or shape that does not fit.
    """
    state = dict(source) if isinstance(source, Mapping) else read_tensors(Path(source))
    state = {re.sub(r"^(module\.)?((lxmert|bert)\.)?", "", key): value for key, value in state.items()}
    if not any(key.startswith("encoder.x_layers.") for key in state):
        raise ValueError("the source has no encoder.x_layers: an LXMERT model was expected")
    return _initialise(model, state, "encoder.x_layers.")


def _initialise(model: Prevalent, state: Mapping[str, Tensor], cross: str) -> list[str]:
    """Copy what the released names, seen as BERT's or LXMERT's, have in ``state``; all must be there."""
    own, chosen, missing = model.state_dict(), {}, []
    for ours, released in released_names(model).items():
        theirs = released.removeprefix("bert.").replace("lalayer.", "encoder.layer.")
        if theirs.startswith("addlayer."):
            if not cross:
                continue
            theirs = theirs.replace("addlayer.", cross)
        if not theirs.startswith(("embeddings.", "encoder.", "pooler.")):
            continue
        if theirs in state and state[theirs].shape == own[ours].shape:
            chosen[ours] = state[theirs]
        else:
            found = list(state[theirs].shape) if theirs in state else "missing"
            missing.append(f"{theirs} is {found}, not {list(own[ours].shape)}")
    if missing:
        raise ValueError(f"the weights do not fit: {'; '.join(missing[:3])}; {len(missing)} in all")
    model.load_state_dict({**own, **chosen}, strict=True)
    return list(chosen)


# ---- files


def read_tensors(path: Path) -> State:
    """Tensors by name of a ``.safetensors`` or PyTorch file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds more than plain values, or something else than tensors by name.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give the file of a checkpoint")
        return load_file(path)
    state = read_plain(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__} but tensors by name were expected")
    return dict(state)


def read_plain(path: Path) -> Any:
    """Content of a PyTorch file of tensors, plain values and collections.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or making it would need to run code from it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: copy it from the released archive")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways, all meaning the same to the caller
        raise ValueError(
            f"{path} is damaged or holds pickled objects, which are not loaded because they could run code "
            f"({type(error).__name__}): save its tensors alone, or download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the sizes of the model stand there, copy it too")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__} but an object was expected")
    return found


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, and put it there in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
