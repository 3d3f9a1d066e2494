"""Items in their published formats: read, held against graphs, joined, and turned into token ids."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from navigation_cases import graph_of, house
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vln.checks import instruction_counts, validate
from vln.data import read_cvdn, read_hanna, read_hanna_routes, read_ndh, read_r2r, read_r4r, read_rxr
from vln.instructions import add_markers, dialogue_text, encode_instructions
from vln.items import NDHItem, R2RItem, Turn
from vln.joined import join_paths, write_r2r
from vln.navgraph import load_graphs

DATA = Path(__file__).parents[2] / "shared" / "data" / "vln"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the licensed items and graphs are not here")

SHED = graph_of([(0, 0, 0), (0, 2, 0), (0, 5, 0)], [(0, 1), (1, 2)], scan_id="shed")
GRAPHS = {"house": house(), "shed": SHED}

R2R = {"path_id": 4, "scan": "shed", "heading": 1.0, "path": ["shed-0", "shed-1", "shed-2"], "distance": 5.0,
       "instructions": ["Go.", "Walk."]}  # fmt: skip
RXR = {"path_id": 7, "split": "train", "scan": "shed", "heading": 0.5, "path": ["shed-0", "shed-1"],
       "instruction_id": 31, "annotator": 9, "language": "te-IN", "instruction": "నడవండి", "timed_instruction":
       [{"word": "నడవండి", "start_time": 0.1, "end_time": 0.9}, {"word": "."}]}  # fmt: skip
TURNS = [{"nav_idx": 0, "role": "navigator", "message": "Left?"},
         {"nav_idx": 0, "role": "oracle", "message": "No."},
         {"nav_idx": 2, "role": "navigator", "message": "Here?"},
         {"nav_idx": 2, "role": "oracle", "message": "Yes."}]  # fmt: skip
CVDN = {"idx": 3, "scan": "shed", "target": "rake", "end_panos": ["shed-2"], "start_pano":
        {"pano": "shed-0", "heading": 0.1, "elevation": 17.5}, "nav_steps": ["shed-0", "shed-1", "shed-2"],
        "planner_nav_steps": ["shed-0", "shed-1"], "dialog_history": TURNS, "nav_camera": [{"message": []}],
        "stop_history": [{"nav_idx": 2}], "navigator_game_quality": 4, "ratings": {"oracle": 5},
        "problem": False}  # fmt: skip
NDH = {"inst_idx": 11, "game_idx": 3, "scan": "shed", "target": "rake", "end_panos": ["shed-2"], "start_pano":
       {"pano": "shed-1", "heading": 0.1, "elevation": 17.5}, "nav_history": ["shed-0", "shed-1"],
       "player_path": ["shed-1", "shed-2"], "planner_path": ["shed-1", "shed-2"], "nav_camera": [],
       "dialog_history": TURNS}  # fmt: skip
HANNA = {"path_id": "t", "scan": "shed", "heading": 0.0, "paths": [["shed-0", "shed-1"], ["shed-0"]],
         "instructions": ["Find a rake."]}  # fmt: skip
ROUTE = {"path_id": "r", "path": ["shed-1", "shed-2"], "instruction": "Straight on.", "view_id": 12,
         "split": "val"}  # fmt: skip


def written(tmp_path, name, content):
    path = tmp_path / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


# ---- reading


@pytest.mark.parametrize("name", ["rxr_train_guide.jsonl", "rxr_train_guide.jsonl.gz"])
def test_rxr_lines_are_read(tmp_path, name):
    rows = [RXR, RXR | {"instruction_id": 32, "annotator": None, "timed_instruction": None}]
    path = written(tmp_path, name, "\n".join(json.dumps(row) for row in rows) + "\n")
    items = read_rxr(tmp_path, "train", graphs=GRAPHS)
    assert items == read_rxr(path)
    assert (items[0].language, items[0].instruction, items[0].annotator) == ("te-IN", "నడవండి", 9)
    assert items[0].timed_words[0][1:] == (0.1, 0.9) and items[0].timed_words[1] == (".", None, None)
    assert items[1].instruction_ids == ("32",) and items[1].timed_words == ()
    assert instruction_counts(items) == {1: 2}


def test_a_broken_line_of_rxr_is_named(tmp_path):
    path = written(tmp_path, "a.jsonl", json.dumps(RXR) + "\n" + json.dumps(RXR)[:40])
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 is not valid JSON, perhaps cut short"):
        read_rxr(path)


def test_dialogues_are_read(tmp_path):
    (tmp_path / "cvdn").mkdir()
    written(tmp_path / "cvdn", "train.json", [CVDN])
    game = read_cvdn(tmp_path, "train", graphs=GRAPHS)[0]
    assert (game.start, game.target, game.nav_steps[-1], game.problem) == ("shed-0", "rake", "shed-2", False)
    assert game.turns[3] == Turn("oracle", "Yes.", 2) and len(game.stop_history) == len(game.nav_camera) == 1
    assert game.ratings == {"navigator_game_quality": 4.0, "oracle": 5.0}


def test_ndh_items_are_read_with_what_was_said(tmp_path):
    item = read_ndh(written(tmp_path, "n.json", [NDH]), graphs=GRAPHS)[0]
    assert (item.target, item.nav_history) == ("rake", ("shed-0", "shed-1"))
    assert [turn.message for turn in item.turns] == ["Left?", "No.", "Here?", "Yes."]
    bare = {
        key: value for key, value in NDH.items() if key not in ("end_panos", "player_path", "planner_path")
    }
    assert read_ndh(written(tmp_path, "n.json", [bare]))[0].trusted_path == ()


def test_routes_are_read_from_a_file_or_an_archive(tmp_path):
    path = written(tmp_path, "routes.json", {"shed": [ROUTE], "house": []})
    (route,) = read_hanna_routes(path, graphs=GRAPHS)
    assert (route.scan_id, route.view_id, route.path, route.split) == (
        "shed",
        12,
        ("shed-1", "shed-2"),
        "val",
    )
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "hanna.tar.gz", "w:gz") as archive:
        archive.add(path, "hanna/routes.json")
    assert read_hanna_routes(tmp_path / "data") == [route]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (
            read_r2r,
            R2R | {"path": "shed-0"},
            r"item 0 is not as expected: path is shed-0, expected a list of t",
        ),
        (read_r2r, R2R | {"path": []}, "path is empty, expected at least the start"),
        (read_r2r, R2R | {"heading": float("nan")}, "heading is nan, expected a finite angle"),
        (read_ndh, NDH | {"dialog_history": [TURNS[0] | {"role": "cook"}]}, "role is 'cook', expected navig"),
        (read_cvdn, {key: CVDN[key] for key in CVDN if key != "target"}, "item 0 lacks the field 'target'"),
        (read_hanna, HANNA | {"paths": [[]]}, "paths are empty"),
        (read_rxr, {key: RXR[key] for key in RXR if key != "language"}, "item 0 lacks the field 'language'"),
    ],
)
def test_an_odd_field_is_named_with_file_and_item(tmp_path, read, row, message):
    path = written(tmp_path, "odd.json", [row])
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_odd_routes_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected an object with a list of routes for each scan"):
        read_hanna_routes(written(tmp_path, "routes.json", [ROUTE]))
    with pytest.raises(ValueError, match="view_id is 36, expected 0 to 35"):
        read_hanna_routes(written(tmp_path, "routes.json", {"shed": [ROUTE | {"view_id": 36}]}))
    with pytest.raises(FileNotFoundError, match="is a folder: name the file of the items in it, or a split"):
        read_r2r(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no R4R_train\.json: looked for"):
        read_r4r(tmp_path, "train")


# ---- held against the graphs


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_r2r, R2R | {"scan": "attic"}, "item 4: scan attic is unknown: there are graphs of 2 scans"),
        (read_r2r, R2R | {"path": ["shed-0", "house-3"]},
         r"item 4: path\[1\]: viewpoint house-3 is of scan house, not of shed"),
        (read_r2r, R2R | {"path": ["shed-0", "shed-9"]}, "item 4: .*: scan shed has no viewpoint shed-9"),
        (read_r2r, R2R | {"path": ["shed-0", "shed-2"]},
         "item 4: path has a gap at step 1: one cannot walk from shed-0 to shed-2"),
        (read_r2r, R2R | {"scan": "house", "path": ["house-8"]},
         r"item 4: path\[0\]: viewpoint house-8 of scan house is excluded"),
        (read_ndh, NDH | {"planner_path": ["shed-2"]},
         "item 11: planner_path begins at shed-2, expected the start shed-1"),
        (read_ndh, NDH | {"end_panos": ["house-0"]}, r"end_panos\[0\]: viewpoint house-0 is of scan house"),
        (read_cvdn, CVDN | {"nav_steps": ["shed-0", "shed-2"]}, "item 3: nav_steps has a gap at step 1"),
        (read_hanna, HANNA | {"paths": [["shed-0"], ["shed-1"]]},
         r"item t: paths\[1\] begins at shed-1, expected the start shed-0"),
    ],
)  # fmt: skip
def test_what_the_graphs_refuse_is_named_with_file_and_item(tmp_path, read, row, message):
    path = written(tmp_path, "bad.json", [row])
    with pytest.raises(ValueError, match=message) as caught:
        read(path, graphs=GRAPHS)
    assert str(caught.value).startswith(str(path))
    read(path)  # without graphs nothing can be said against it


def test_the_first_fault_is_raised_and_the_others_are_counted(tmp_path):
    path = written(tmp_path, "bad.json", [R2R, R2R | {"path_id": 5, "scan": "a"}, R2R | {"scan": "b"}])
    with pytest.raises(ValueError, match=r"item 5: scan a is unknown.*and 1 more items have faults"):
        read_r2r(path, graphs=GRAPHS)


def test_another_length_than_stated_is_a_warning_and_the_item_is_kept(tmp_path):
    path = written(tmp_path, "r.json", [R2R, R2R | {"path_id": 8, "path": ["shed-1", "shed-2"]}])
    expected = r"r\.json: item 8: 5\.00 m are stated but its path is 3\.00 m on the graph"
    with pytest.warns(UserWarning, match=expected):
        items = read_r2r(path, graphs=GRAPHS)
    assert len(items) == 2
    (finding,) = validate(items, GRAPHS, origin="x")
    assert (finding.kind, finding.serious, finding.item_id) == ("distance", False, 8)
    near = items[0]._replace(distance=5.01)
    assert validate([near], GRAPHS) == [] and validate([near._replace(distance=5.02)], GRAPHS) != []


@real_data
def test_path_4554_without_its_first_viewpoint_has_a_warning(tmp_path):
    items = read_r2r(DATA, "val_seen")
    graphs = load_graphs(DATA, sorted({item.scan_id for item in items}))
    assert validate(items, graphs) == []
    assert instruction_counts(items) == {3: 339, 4: 1}
    (item,) = (item for item in items if item.path_id == 4554)
    cut = tmp_path / "R2R_val_seen.json"
    write_r2r(cut, [other._replace(path=other.path[1:]) if other is item else other for other in items])
    with pytest.warns(UserWarning, match=r"R2R_val_seen\.json: item 4554: 13\.38 m are stated.*11\.42 m"):
        read_r2r(cut, graphs=graphs)


@real_data
def test_the_real_items_have_no_faults_and_the_counts_that_are_published():
    graphs = load_graphs(DATA)
    train, unseen = read_r2r(DATA, "train", graphs=graphs), read_r2r(DATA, "val_unseen", graphs=graphs)
    assert instruction_counts(train) == {3: 4661, 4: 14} and instruction_counts(unseen) == {3: 783}
    assert len(read_r2r(DATA, "test", graphs=graphs)) == 1391
    seen, ndh = read_ndh(DATA, "val_seen", graphs=graphs), read_ndh(DATA, "val_unseen", graphs=graphs)
    assert [sum(not item.turns for item in some) for some in (seen, ndh)] == [83, 218]
    assert [max(len(item.turns) for item in some) for some in (seen, ndh)] == [18, 18]
    trusted = [sum(item.planner_path[-1] in item.player_path[1:] for item in some) for some in (seen, ndh)]
    assert trusted == [213, 544]


# ---- R4R


def test_paths_are_joined_where_one_begins_near_the_end_of_the_other(tmp_path):
    second = R2RItem(5, "shed", 2.0, ("shed-1", "shed-0"), ("Back.",), 2.0)
    first = R2RItem(4, "shed", 1.0, ("shed-0", "shed-1", "shed-2"), ("Go.", "Walk."), 5.0)
    joined = list(join_paths([first, second], GRAPHS))
    assert [item.path_id for item in joined] == ["4_5", "5_4"]  # 3 m exactly, and no way at all, between them
    assert joined[0].path == ("shed-0", "shed-1", "shed-2", "shed-1", "shed-0")
    assert joined[0].instructions == ("Go. Back.", "Walk. Back.") and joined[0].instruction_ids[1] == "4_5_1"
    assert (joined[0].heading, joined[0].distance, joined[1].distance) == (1.0, 10.0, 7.0)
    assert next(join_paths([first, second], GRAPHS, join_distance_m=2.9)).path_id == "5_4"
    write_r2r(tmp_path / "R4R_x.json", joined)
    assert read_r4r(tmp_path, "x", graphs=GRAPHS) == joined
    assert [path.name for path in tmp_path.iterdir()] == ["R4R_x.json"]


def test_what_cannot_be_joined_is_named(tmp_path):
    item = R2RItem(4, "attic", 1.0, ("a",), ("Go.",), None)
    with pytest.raises(ValueError, match="no graph of scan attic"):
        list(join_paths([item], GRAPHS))
    with pytest.raises(ValueError, match="item 4 has its start alone: a test split cannot be joined"):
        list(join_paths([item._replace(scan_id="shed")], GRAPHS))
    with pytest.raises(OSError):
        write_r2r(tmp_path / "nowhere" / "a.json", [])


@real_data
def test_r4r_from_the_real_items():
    items = read_r2r(DATA, "val_seen")
    graphs = load_graphs(DATA, sorted({item.scan_id for item in items}))
    joined = list(join_paths(items, graphs))
    assert (len(joined), sum(len(item.instructions) for item in joined)) == (115, 1035)
    assert validate(joined, graphs) == []


# ---- words


def word_tokenizer(*, pad="[PAD]"):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<", ">", "ora", "tar", *"abcdefgh"]
    model = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=pad, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def dialogue(*messages, target="h"):
    roles = ("navigator", "oracle")
    turns = tuple(Turn(roles[at % 2], message, at) for at, message in enumerate(messages))
    return NDHItem(11, "shed", "shed-0", 0.0, (), (), (), target, turns)


def words_of(encoded, tokenizer, row=0):
    return " ".join(tokenizer.convert_ids_to_tokens(encoded.token_ids[row][encoded.mask[row]].tolist()))


def test_the_five_histories():
    said = dialogue("a?", "b", "c?", "d")
    texts = {name: dialogue_text(said, name) for name in ("none", "target", "oracle_ans", "all")}
    assert texts == {
        "none": "",
        "target": "<TAR> h",
        "oracle_ans": "<ORA> d <TAR> h",
        "all": "<NAV> a? <ORA> b <NAV> c? <ORA> d <TAR> h",
    }
    assert dialogue_text(said) == dialogue_text(said, "nav_q_oracle_ans") == "<NAV> c? <ORA> d <TAR> h"
    assert dialogue_text(dialogue(), "all") == dialogue_text(dialogue()) == "<TAR> h"
    assert dialogue_text(dialogue("b")) == "<ORA> b <TAR> h"
    with pytest.raises(ValueError, match="history is 'last', expected one of none, target"):
        dialogue_text(said, "last")


def test_instructions_are_padded_and_belong_to_their_items():
    items = [
        R2RItem(4, "shed", 0.0, ("s",), ("a b c", "a"), None),
        R2RItem(9, "shed", 0.0, ("s",), ("b",), None),
    ]
    tokenizer = word_tokenizer()
    encoded = encode_instructions(items, tokenizer)
    assert encoded.names == ("4_0", "4_1", "9_0") and encoded.item.tolist() == [0, 0, 1]
    assert encoded.token_ids.tolist() == [[2, 8, 9, 10, 3], [2, 8, 3, 0, 0], [2, 9, 3, 0, 0]]
    assert encoded.mask.sum(axis=1).tolist() == [5, 3, 3]


def test_a_long_instruction_loses_its_end_and_keeps_the_separator():
    tokenizer = word_tokenizer()
    item = R2RItem(4, "shed", 0.0, ("s",), ("a b c d e f",), None)
    assert words_of(encode_instructions([item], tokenizer, max_tokens=5), tokenizer) == "[CLS] a b c [SEP]"
    item = item._replace(instructions=("a " * 100,))
    assert encode_instructions([item], tokenizer).token_ids.shape == (1, 80)


def test_a_long_dialogue_loses_its_beginning_and_keeps_the_first_token():
    tokenizer = word_tokenizer()
    assert add_markers(tokenizer) == 3 and len(tokenizer) == 19
    said = dialogue("a b c", "d e")
    encoded = encode_instructions([said], tokenizer, max_tokens=7)
    assert words_of(encoded, tokenizer) == "[CLS] <ORA> d e <TAR> h [SEP]" and encoded.names == (11,)
    assert words_of(encode_instructions([said], tokenizer, max_tokens=4), tokenizer) == "[CLS] <TAR> h [SEP]"
    assert encode_instructions([dialogue(*["a"] * 400)], tokenizer, history="all").token_ids.shape == (1, 300)
    assert words_of(encode_instructions([said], tokenizer, history="none"), tokenizer) == "[CLS] [SEP]"


def test_released_markers_leave_their_brackets_outside():
    tokenizer = word_tokenizer()
    assert add_markers(tokenizer, released=True) == 3
    encoded = encode_instructions([dialogue("a", "b")], tokenizer)
    assert words_of(encoded, tokenizer) == "[CLS] <NAV> a < ORA > b < TAR > h [SEP]"


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12).map(" ".join), min_size=1, max_size=4),
    st.integers(3, 12),
)
def test_no_text_is_longer_than_asked_for_and_all_open_and_close(texts, limit):
    item = R2RItem(4, "shed", 0.0, ("s",), tuple(texts), None)
    encoded = encode_instructions([item], TOKENIZER, max_tokens=limit)
    lengths = encoded.mask.sum(axis=1)
    assert lengths.max() == encoded.token_ids.shape[1] <= limit
    assert (encoded.token_ids[:, 0] == 2).all()
    assert [int(row[n - 1]) for row, n in zip(encoded.token_ids, lengths, strict=True)] == [3] * len(texts)


TOKENIZER = word_tokenizer()


def test_what_cannot_be_encoded_is_named():
    with pytest.raises(ValueError, match="there are no items to encode"):
        encode_instructions([], TOKENIZER)
    with pytest.raises(ValueError, match="max_tokens is 2: give at least 3"):
        encode_instructions([dialogue()], TOKENIZER, max_tokens=2)
    with pytest.raises(ValueError, match="the tokenizer does not know the markers <NAV> <ORA> <TAR>"):
        encode_instructions([dialogue()], TOKENIZER)
    with pytest.raises(ValueError, match=r"no padding token: set tokenizer\.pad_token"):
        encode_instructions([R2RItem(4, "s", 0.0, ("s",), ("a",), None)], word_tokenizer(pad=None))
