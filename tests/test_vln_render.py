"""Maps of scans and episodes, and the page of a run."""

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from navigation_cases import graph_of, graphs, house, write_connectivity
from PIL import Image

from vln import render, sheet
from vln.items import HannaTask, NDHItem, RxRItem, Turn
from vln.maps import Episode, draw_episode, draw_scan, find_floors
from vln.navgraph import load_graphs
from vln.plans import read_plans

DATA = Path(__file__).parents[2] / "shared" / "data" / "vln"
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "vln" / "r2r_val_seen_agent.json.gz"


def tower():
    """Three storeys of two rooms each, with stairs of one landing between them."""
    heights = [0.0, 0.1, 1.5, 3.0, 3.1, 4.5, 6.0, 6.1]
    positions = [(3.0 * (number % 2), number, height) for number, height in enumerate(heights)]
    return graph_of(positions, [(n, n + 1) for n in range(7)], scan_id="tower")


def street():
    """Too long for one map."""
    return graph_of([(4.0 * number, number % 3, 1.5) for number in range(30)],
                    [(n, n + 1) for n in range(29)], scan_id="street")  # fmt: skip


def episode(graph, *path, **fields):
    names = [graph.viewpoint_ids[number] for number in path]
    given = {"start": names[0], "goals": (names[-1],), "reference": tuple(names), "success_radius": 3.0}
    return Episode(graph.scan_id, "4_0", **given | fields)


def pixels(drawn, tmp_path):
    drawn.save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == drawn.size
        return np.array(image.convert("RGB")).astype(int)


def words(drawn):
    return [text.get_text() for text in drawn.figure.texts]


# ---- floors


def test_floors_are_where_viewpoints_bunch_and_stairs_go_to_the_nearer():
    floors = find_floors(tower())
    assert floors[[0, 1]].tolist() == [0, 0] and floors[[3, 4]].tolist() == [1, 1]
    assert floors[[6, 7]].tolist() == [2, 2] and set(floors.tolist()) == {0, 1, 2}
    assert (np.diff(floors) >= 0).all()


def test_a_sunken_room_is_no_floor_of_its_own():
    flat = graph_of([(n, 0, 0.9 * (n == 4)) for n in range(9)], [])
    assert find_floors(flat).tolist() == [0] * 9


@settings(max_examples=50, deadline=None)
@given(graphs(both_ways=True))
def test_every_viewpoint_has_a_floor_and_higher_ones_no_lower(graph):
    floors = find_floors(graph)
    order = np.argsort(graph.positions[:, 2], kind="stable")
    assert floors.shape == (len(graph.viewpoint_ids),) and floors.min() >= 0
    assert (np.diff(floors[order]) >= 0).all()


# ---- pictures


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs(both_ways=True), st.sampled_from([0.1, 1.0, 20.0]), st.data())
def test_start_and_goal_of_any_episode_are_inside_the_picture(graph, size, data):
    graph = graph_of(graph.positions * [size, size, 1], graph.edges.tolist())
    spots = st.integers(0, len(graph.viewpoint_ids) - 1)
    path, walked = data.draw(st.lists(spots, min_size=1, max_size=5)), data.draw(st.lists(spots, max_size=5))
    names = tuple(graph.viewpoint_ids[number] for number in walked)
    drawn = draw_episode(graph, episode(graph, *path, predicted=names, heading=1.0, text="Go. " * 60))
    assert len(drawn.marks["start"]) == len(drawn.marks["goal"]) == 1
    assert len(drawn.marks["end"]) == bool(walked)
    width, height = drawn.size
    frames = [axes.get_window_extent() for axes in drawn.figure.axes]
    for x, y in drawn.marks["start"] + drawn.marks["goal"] + drawn.marks["end"]:
        assert 0 < x < width and 0 < y < height
        assert any(f.x0 <= x <= f.x1 and f.y0 <= height - y <= f.y1 for f in frames)


def test_a_long_corridor_has_room_for_two_marks_beside_each_other():
    graph = graph_of([(0, 0, 0), (0, 80, 0)], [])
    drawn = draw_episode(graph, episode(graph, 1, predicted=graph.viewpoint_ids, heading=1.0, text="Go."))
    (x, y), frame = drawn.marks["end"][0], drawn.figure.axes[0].get_window_extent()
    assert frame.x0 + 10 < x < frame.x1 - 10 and frame.y0 < drawn.size[1] - y < frame.y1
    assert abs(x - drawn.marks["start"][0][0]) > 10


def test_marks_are_drawn_where_they_are_said_to_be(tmp_path):
    graph = house()
    seen = episode(graph, 0, 1, 2, predicted=("house-0", "house-3", "house-3"))
    drawn = draw_episode(graph, seen)
    image = pixels(drawn, tmp_path)

    def around(kind, x=0, y=0):
        (column, row) = drawn.marks[kind][0]
        return image[round(row) + y - 7 : round(row) + y + 8, round(column) + x - 7 : round(column) + x + 8]

    assert (around("start") < 60).all(axis=2).any() and (around("start") > 250).all(axis=2).any()
    yellow = (around("goal")[:, :, 0] > 200) & (around("goal")[:, :, 2] < 120)
    red = (around("end")[:, :, 0] > 110) & (around("end")[:, :, 1] < 60)
    assert yellow.sum() > 20 and red.sum() > 20
    assert (image[2:5, -5:] == 255).all()
    # The goal lies right of and above the start, as x and y grow.
    (start,), (goal,) = drawn.marks["start"], drawn.marks["goal"]
    assert goal[0] > start[0] and goal[1] < start[1]


def test_paths_differ_in_grey_too(tmp_path):
    graph = graph_of([(0, 0, 0), (6, 0, 0), (0, 4, 0), (6, 4, 0)], [(0, 1), (2, 3), (0, 2)])
    seen = episode(graph, 0, 1, predicted=("house-0", "house-2", "house-3"))
    drawn = draw_episode(graph, seen)
    grey = pixels(drawn, tmp_path) @ np.array([0.299, 0.587, 0.114])
    (start,), (goal,), (end,) = (drawn.marks[kind] for kind in ("start", "goal", "end"))
    columns = slice(round(start[0]) + 30, round(goal[0]) - 30)
    band = grey[round(start[1]) - 8 : round(start[1]) + 9, columns]
    dashes = grey[round(end[1]) - 8 : round(end[1]) + 9, columns]
    assert 150 < np.median(band[8]) < 220 and (band[[3, 13]] < 150).any()  # a pale band with a dark rim
    dark = dashes[8] < 90
    assert 0.4 < dark.mean() < 0.95 and np.abs(np.diff(dark.astype(int))).sum() > 10  # broken and dark


def test_only_the_floors_of_the_episode_are_shown(tmp_path):
    graph = tower()
    labels = words(draw_episode(graph, episode(graph, 0, 1)))
    assert "floor 1 of 3" in labels and not any("floor 2" in label for label in labels)
    labels = words(draw_episode(graph, episode(graph, 0, 1, 2, 3)))
    assert "floor 1 of 3" in labels and any(re.match(r"floor 2 of 3, \d\.\d m above it", x) for x in labels)
    assert len(draw_scan(graph).figure.axes) == 3
    assert "tower: 8 viewpoints, 7 edges" in words(draw_scan(graph))


def test_a_large_place_is_drawn_around_the_paths_with_an_overview():
    graph = street()
    near, whole = draw_episode(graph, episode(graph, 3, 4, 5)), draw_scan(graph)
    assert len(near.figure.axes) == 2 and "where it is" in words(near)
    assert np.ptp(near.figure.axes[0].get_xlim()) < 20 < 100 < np.ptp(whole.figure.axes[0].get_xlim())
    everywhere = draw_episode(graph, episode(graph, *range(30)))
    assert len(everywhere.figure.axes) == 1


def test_instruction_and_scores_are_below_the_map_and_every_letter_is_kept():
    graph = house()
    text = "Pay $5 and $6_a^b at the door. " * 30
    drawn = draw_episode(graph, episode(graph, 0, 1, text=text, note="NE 1.00"))
    lines = words(drawn)
    assert "NE 1.00" in lines and " ".join(lines[lines.index("NE 1.00") + 1 :]).split() == text.split()
    taller = drawn.size[1] - draw_episode(graph, episode(graph, 0, 1)).size[1]
    assert taller > 7 * 0.19 * sheet.DPI
    dialogue = words(draw_episode(graph, episode(graph, 0, 1, text="<NAV> left?\n\n<ORA> yes")))
    assert dialogue[-3:] == ["<NAV> left?", "", "<ORA> yes"]


def test_a_script_without_letters_in_the_font_is_named_and_single_ones_replaced(tmp_path):
    graph = house()
    telugu = draw_episode(graph, episode(graph, 0, 1, text="నడవండి మెట్లు"))
    assert words(telugu)[-1] == "(a script that the font of maps lacks; the page has the text)"
    telugu.save(tmp_path / "telugu.png")  # a missing letter would be a warning
    mixed = draw_episode(graph, episode(graph, 0, 1, text="Turn left at the నsign."))
    assert words(mixed)[-1] == "Turn left at the ?sign."


def test_a_stop_at_the_start_does_not_hide_it():
    graph = house()
    drawn = draw_episode(graph, episode(graph, 0, 1, predicted=("house-0", "house-0")))
    assert math.dist(drawn.marks["start"][0], drawn.marks["end"][0]) > 15
    wide = street()
    for node in (0, 29):
        drawn = draw_episode(wide, episode(wide, node, 15, predicted=(f"street-{node}",)))
        (x, y), frame = drawn.marks["end"][0], drawn.figure.axes[0].get_window_extent()
        assert frame.x0 <= x <= frame.x1 and frame.y0 <= drawn.size[1] - y <= frame.y1


def test_what_cannot_be_drawn_is_named(tmp_path):
    graph = house()
    with pytest.raises(ValueError, match="episode 4_0 is in scan tower, the graph of house"):
        draw_episode(graph, episode(tower(), 0, 1))
    with pytest.raises(ValueError, match="scan house has no viewpoint house-77"):
        draw_episode(graph, episode(graph, 0, 1, predicted=("house-77",)))
    with pytest.raises(OSError):
        draw_scan(graph).save(tmp_path / "nowhere" / "map.png")
    assert list(tmp_path.iterdir()) == []


# ---- rooms

PLAN = {
    "scan": "house",
    "rooms": [{"kind": "bedroom", "floor": 0, "x0": -1.0, "y0": -1.0, "x1": 3.0, "y1": 3.0},
              {"kind": "office", "floor": 0, "x0": 3.0, "y0": -1.0, "x1": 10.0, "y1": 10.0},
              {"kind": "loft", "floor": 1, "x0": 3.0, "y0": 0.0, "x1": 8.0, "y1": 4.0}],
    "doorways": [{"first": 0, "second": 1, "x": 3.0, "y": 2.2, "across_x": True, "width": 0.9}],
    "landmarks": [{"noun": "vase", "colour": "red", "position": [0.5, 0.0, 0.7]},
                  {"noun": "drum", "colour": "blue", "position": [0.52, 0.0, 0.7]},
                  {"noun": "sofa", "colour": "white", "position": [0.51, 0.02, 0.7]},
                  {"noun": "clock", "colour": "plaid", "position": [9.0, 8.0, 2.0]},
                  {"noun": "bed", "colour": "green", "position": [6.0, 2.0, 3.3]}],
}  # fmt: skip


def labels(drawn, panel=0):
    return [text.get_text() for text in drawn.figure.axes[panel].texts]


def plan_of(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "plans.json").write_text(json.dumps([PLAN | changes]))
    return read_plans(folder)["house"]


def test_rooms_and_what_stands_near_the_path_are_named(tmp_path):
    plan = plan_of(tmp_path)
    assert plan.num_floors == 2 and plan.doorways[0].upright and plan.landmarks[0].name == "red vase"
    drawn = draw_episode(house(), episode(house(), 0, 1), plan=plan)
    things = {"red vase", "blue drum", "white sofa"}
    assert {"bedroom", "office"} <= set(labels(drawn)) and "loft" not in labels(drawn)
    assert 0 < len(things & set(labels(drawn))) < 3  # there is no room for all of them
    for thing in things:
        named = draw_episode(house(), episode(house(), 0, 1, text=f"Pass the {thing} ."), plan=plan)
        bold = [text.get_text() for text in named.figure.axes[0].texts if text.get_weight() == "bold"]
        assert bold == [thing, "S"]
    climbing = draw_episode(house(), episode(house(), 4, 5, 6), plan=plan)
    assert "green bed" in labels(climbing, 1) and "plaid clock" not in labels(climbing)
    drawn.save(tmp_path / "map.png")


def test_a_plan_with_other_floors_than_the_graph_is_left_out(tmp_path):
    flat = plan_of(tmp_path, rooms=PLAN["rooms"][:2])
    for plan in (flat, None):
        assert "bedroom" not in labels(draw_scan(house(), plan=plan))
    assert "bedroom" in labels(draw_scan(house(), plan=plan_of(tmp_path)))


def test_plans_are_looked_for_and_faults_named(tmp_path):
    assert read_plans(tmp_path / "nowhere") == {}
    with pytest.raises(ValueError, match=r"plans\.json: house 0 lacks the field 'kind'"):
        plan_of(tmp_path, rooms=[{"floor": 0}])
    with pytest.raises(ValueError, match="house 0 is not as expected: it has no rooms"):
        plan_of(tmp_path, rooms=[], doorways=[])
    (tmp_path / "plans.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plans\.json holds a JSON dict, expected a list of houses"):
        read_plans(tmp_path)


# ---- items to episodes


def test_what_is_drawn_of_each_task():
    turns = (Turn("navigator", "Left?", 0), Turn("oracle", "Yes.", 0))
    said = NDHItem(3, "house", "house-0", 0.5, ("house-5", "house-6"), ("house-0", "house-1"), ("house-0",),
                   "sofa", turns)  # fmt: skip
    ((name, drawn),) = render.episodes_of(said)
    assert (name, drawn.goals, drawn.reference) == (3, ("house-5", "house-6"), ("house-0", "house-1"))
    assert drawn.text.splitlines() == ["<NAV> Left?", "<ORA> Yes.", "<TAR> sofa"] and not drawn.success_radius
    task = HannaTask(
        "t", "house", 0.0, (("house-0", "house-1"), ("house-0",), ("house-1",)), ("find", "seek")
    )
    names, drawn = zip(*render.episodes_of(task), strict=True)
    assert names == ("t_0", "t_1") and drawn[1].goals == ("house-1", "house-0") and drawn[1].text == "seek"
    assert drawn[0].success_radius == 2.0
    spoken = RxRItem(31, 7, "house", 0.0, ("house-0",), "en-IN", "Walk.", None, ())
    ((name, drawn),) = render.episodes_of(spoken)
    assert name == "31" and drawn.goals == drawn.reference == () and drawn.success_radius is None


# ---- the command

R2R = [
    {"path_id": 4, "scan": "house", "heading": 1.0, "path": ["house-0", "house-1", "house-2"],
     "distance": 3.83, "instructions": ["go <b>there</b>", "walk"]},
    {"path_id": 9, "scan": "house", "heading": 0.0, "path": ["house-2", "house-4", "house-5"],
     "distance": 3.83, "instructions": ["stop"]},
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    write_connectivity(folder / "connectivity", house(), tower())
    (folder / "R2R_val_seen.json").write_text(json.dumps(R2R))
    return folder


def submission(tmp_path, **paths):
    rows = [{"instr_id": name.removeprefix("i"), "trajectory": [[f"house-{n}", 0, 0] for n in path]}
            for name, path in paths.items()]  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    return str(tmp_path / "mine.json")


def test_a_run_becomes_pictures_and_a_page_with_scores(tmp_path, data, capsys):
    mine = submission(tmp_path, i4_0=(0, 1, 2), i4_1=(0, 3), i9_0=(2,))
    out = tmp_path / "maps"
    arguments = [
        "episodes",
        "--submission",
        mine,
        "--data",
        str(data),
        "--split",
        "val_seen",
        "--out",
        str(out),
    ]
    render.main([*arguments, "--order", "worst", "--limit", "2"])
    assert capsys.readouterr().out == f"written to {out / 'index.html'}\n"
    page = (out / "index.html").read_text()
    pictures = re.findall(r'<img src="(.*?)"', page)
    assert pictures == ["0001_9_0.png", "0002_4_1.png"]
    assert sorted(path.name for path in out.iterdir()) == [*pictures, "index.html"]
    assert "2 of 3 episodes" in page and page.count("<tr>") == 1 + 1 + 1 + 2
    cells = re.search(r">9_0</a></td>(.*?)</tr>", page)[1]
    assert re.findall(r"<td>(.*?)</td>", cells)[:4] == ["0.00", "3.83", "0.00", "0.00"]
    render.main([*arguments, "--ids", "4_0"])
    page = (out / "index.html").read_text()
    assert "go &lt;b&gt;there&lt;/b&gt;" in page and "<b>there" not in page


def test_a_split_is_drawn_without_a_submission(tmp_path, data):
    out = tmp_path / "maps"
    render.main(["episodes", "--data", str(data), "--split", "val_seen", "--out", str(out), "--limit", "1"])
    page = (out / "index.html").read_text()
    assert (out / "0001_4_0.png").is_file() and "<table>" not in page and "1 of 3 episodes" in page


def test_the_command_draws_the_rooms_of_generated_houses(tmp_path, data):
    arguments = ["episodes", "--data", str(data), "--split", "val_seen", "--ids", "4_0", "--out"]
    render.main([*arguments, str(tmp_path / "bare")])
    plan_of(data)
    render.main([*arguments, str(tmp_path / "rooms")])
    sizes = [(tmp_path / name / "0001_4_0.png").stat().st_size for name in ("bare", "rooms")]
    assert sizes[0] != sizes[1]


def test_scans_are_drawn(tmp_path, data, capsys):
    render.main(["scan", "tower", "--graphs", str(data), "--out", str(tmp_path / "maps")])
    with Image.open(tmp_path / "maps" / "tower.png") as image:
        assert image.size[0] == 1100
    assert capsys.readouterr().out.endswith("tower.png\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "attic"], r"no attic_connectivity\.json: scan attic cannot be loaded"),
        (["scan"], "no scan is named"),
        (["episodes", "--ids", "7_0"], "no episode is called 7_0: there are 3, such as 4_0"),
        (["episodes", "--split", "train"], r"no R2R_train\.json: looked for"),
        (["episodes", "--submission", "absent.json"], r"absent\.json does not exist"),
    ],
)
def test_what_cannot_be_rendered_is_named(tmp_path, data, arguments, message):
    place = "--graphs" if arguments[0] == "scan" else "--data"
    given = [*arguments, place, str(data), "--out", str(tmp_path / "maps")]
    given += ["--split", "val_seen"] if arguments[0] == "episodes" and "--split" not in arguments else []
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        render.main(given)


def test_options_that_contradict_each_other_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="limit is 0: give at least 1"):
        render.EpisodesConfig(out="maps", limit=0)
    with pytest.raises(ValueError, match="order is best but there is no submission to score"):
        render.EpisodesConfig(out="maps", order="best")
    (data / "R2R_test.json").write_text(json.dumps([row | {"path": row["path"][:1]} for row in TEST]))
    mine = submission(tmp_path, i4_0=(0,), i4_1=(0,), i9_0=(2,))
    config = render.EpisodesConfig(out="maps", order="best", submission=mine, data=str(data), split="test")
    with pytest.raises(ValueError, match="order is best but the items have no goals to score by"):
        render.render_episodes(config)
    (data / "R2R_none.json").write_text("[]")
    with pytest.raises(ValueError, match="there are no episodes in"):
        render.render_episodes(render.EpisodesConfig(out="maps", data=str(data), split="none"))


TEST = [{key: value for key, value in row.items() if key != "distance"} for row in R2R]


@pytest.mark.skipif(not (DATA.is_dir() and GOLDEN.is_file()), reason="the licensed graphs are not here")
def test_the_published_agent_on_the_largest_scan(tmp_path):
    stored = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    (tmp_path / "agent.json").write_text(json.dumps(stored["predictions"]))
    largest = "B6ByNegPMKs"
    floors = find_floors(load_graphs(DATA, [largest])[largest])
    assert floors.max() == 0  # a wide building of one storey, with ramps
    page = render.render_episodes(render.EpisodesConfig(
        out=str(tmp_path / "maps"), submission=str(tmp_path / "agent.json"), data=str(DATA), split="val_seen",
        ids=("6997_0",)))  # fmt: skip
    assert ">9.08</td>" in page.read_text()
