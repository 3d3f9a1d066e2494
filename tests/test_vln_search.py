"""State-factored search: it finds the likeliest routes, walks what it explores, and lets a speaker choose."""

import numpy as np
import pytest
import torch
from tiny_agents import NDHFollower, episodes, surroundings, tiny_agent

from vln.agent import rollout
from vln.data import R2RItem
from vln.follower import Follower
from vln.search import search_prediction, speaker_rank, state_factored_search
from vln.speaker_folder import TrainedSpeaker
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_words import Words
from vln.submission import Submission, find_faults
from vln.surroundings import Surroundings
from vln.walks import Walk, path_batch, roll_walks

PLACE = surroundings(("a",))

pytestmark = pytest.mark.usefixtures("one_thread")


def one(seed=3):
    whole = episodes(PLACE.world, 1, seed=seed)
    return whole._replace(start=whole.start % 20, waypoints=whole.waypoints % 20)


@pytest.mark.parametrize("kind", [Follower, NDHFollower])
def test_routes_have_the_follower_log_probs(kind):
    """Of each route the summed log-prob of a teacher that walks it."""
    agent, episode = tiny_agent(kind), one()
    found = state_factored_search(agent, PLACE, episode, num_routes=5, max_steps=6)
    assert len(found.routes) == 5 and len({route.viewpoints[-1] for route in found.routes}) == 5
    for route in found.routes:
        points = np.array([route.viewpoints[1:] or route.viewpoints])
        if len(set(route.viewpoints)) < len(route.viewpoints):
            continue  # waypoints passed twice would be met at once
        with torch.no_grad():
            walked = rollout(agent, PLACE, episode._replace(waypoints=points), feedback="teacher",
                             max_steps=9, imitate=True)  # fmt: skip
        assert -float(walked.imitation.sum()) == pytest.approx(route.log_prob, abs=1e-3)
    totals = [route.log_prob for route in found.routes]
    assert totals == sorted(totals, reverse=True)
    assert found.chosen == int(np.argmax([route.mean_log_prob for route in found.routes]))


def test_everything_walked_is_on_the_graph_and_ends_with_the_chosen_route():
    agent, episode = tiny_agent(), one()
    found = state_factored_search(agent, PLACE, episode, num_routes=6, max_steps=6)
    route = found.routes[found.chosen].viewpoints
    assert found.walked[0] == route[0] == episode.start[0] and found.walked[-len(route) :] == route
    row = search_prediction(found, "0_0", PLACE, start_heading=0.7)
    assert row.trajectory[0].heading == 0.7
    item = R2RItem(0, "a", 0.0, (PLACE.world.viewpoint_ids[episode.start[0]],), ("go",), None)
    assert find_faults(Submission("r2r", [row], []), [item], PLACE.world.graphs) == []
    assert len(row.trajectory) > len(route)
    few = state_factored_search(agent, PLACE, episode, max_expansions=1)
    assert few.num_expansions == 1 and len(few.routes) <= 1


def test_a_state_is_a_viewpoint_and_an_action():
    """Every viewpoint is looked at from once for each neighbour it can be entered from, and at the start."""
    found = state_factored_search(tiny_agent(), PLACE, one(), num_routes=99, max_expansions=999, max_steps=99)
    graph = PLACE.world.graph("a")
    assert found.num_expansions == len(graph.edges) + 1
    assert {route.viewpoints[-1] for route in found.routes} == set(range(len(graph.viewpoint_ids)))
    assert len(found.routes) == len(graph.viewpoint_ids)


def test_a_speaker_chooses_among_the_routes():
    agent, episode = tiny_agent(), one()
    plain = state_factored_search(agent, PLACE, episode, num_routes=6, max_steps=6)
    last = plain.routes[-1].viewpoints

    def rank(routes):
        return [float(route == last) for route in routes]

    told = state_factored_search(agent, PLACE, episode, num_routes=6, max_steps=6, rank=rank,
                                 speaker_weight=1.0)  # fmt: skip
    assert told.routes == plain.routes and told.routes[told.chosen].viewpoints == last
    deaf = state_factored_search(agent, PLACE, episode, num_routes=6, max_steps=6, rank=rank,
                                 speaker_weight=0.0)  # fmt: skip
    assert deaf.chosen == plain.chosen


def trained(orientation="blocks", **changes):
    torch.manual_seed(0)
    words = Words(
        ("<PAD>", "<UNK>", "<EOS>", *"turn left right walk past the sofa and stop".split(), "<BOS>")
    )
    sizes = {"view_size": 14, "angle_size": 8, "hidden_size": 8, "word_size": 4}
    config = SpeakerConfig(vocab_size=len(words), **(sizes | changes))
    return TrainedSpeaker(Speaker(config), words, orientation)


@pytest.mark.parametrize("packed", [True, False])
def test_a_rank_is_the_speakers_mean_log_prob_of_a_word(packed):
    rank = speaker_rank(trained(packed=packed), ["walk past the zebra"], PLACE, start_heading=0.3)
    routes = [(0, 1, 2), (0, 5), (7, 8, 9, 4)]
    together, alone = rank(routes), [rank([route])[0] for route in routes]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 3
    assert all(-5 < value < -1 for value in together)  # near -log 13 before training
    several = speaker_rank(trained(packed=packed), ["walk past the zebra", "stop"], PLACE, start_heading=0.3)
    second = speaker_rank(trained(packed=packed), ["stop"], PLACE, start_heading=0.3)
    expected = [(one + two) / 2 for one, two in zip(together, second(routes), strict=True)]
    assert several(routes) == pytest.approx(expected, abs=1e-5)


def test_a_speaker_sees_views_as_it_was_trained_with_whatever_the_agent_wants():
    """Its own layout and size of the orientation, and features without the agent's scale."""
    route, found = [(0, 1, 2, 7)], {}
    for layout in ("blocks", "interleaved"):
        speaker = trained(layout)
        table = roll_walks(PLACE.world, [walk_of(route[0])], shortest=False)
        batch = path_batch(table, [0], PLACE.world, PLACE.features, angle_size=8, orientation=layout)
        words = torch.from_numpy(speaker.words.encode(["turn left"], max_words=3))
        with torch.no_grad():
            loss, count = speaker.speaker.eval()(*batch, words)
        found[layout] = float(-loss / count)
        for scale, other in ((1.0, "blocks"), (10.0, "interleaved")):
            agents = Surroundings(PLACE.world, PLACE.features, angle_size=4, orientation=other,
                                  feature_scale=scale)  # fmt: skip
            rank = speaker_rank(speaker, ["turn left"], agents, start_heading=0.3)
            assert rank(route) == pytest.approx([found[layout]], abs=1e-6)
    assert abs(found["blocks"] - found["interleaved"]) > 1e-4


def walk_of(route):
    names = PLACE.world.viewpoint_ids
    return Walk("a", tuple(names[place] for place in route), 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_routes": 0}, "num_routes 0"), ({"speaker_weight": 2.0}, r"speaker_weight 2\.0")],
)
def test_odd_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        state_factored_search(tiny_agent(), PLACE, one(), **options)
    with pytest.raises(ValueError, match="one episode at a time, not 3"):
        state_factored_search(tiny_agent(), PLACE, episodes(PLACE.world, 3))
