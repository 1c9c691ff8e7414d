"""Answers do not depend on who else is served, on what was kept of earlier requests, or on who failed beside them."""

from __future__ import annotations

import queue
import random
import threading
import time
from dataclasses import replace

import pytest
import torch

import composed
import test_contract
from composed import picture, stir
from isthmus.serving.answers import Broken, Done, Failed, Full, Late, Piece, Stopping, TooLong
from isthmus.serving.engine import Engine, Sizes
from isthmus.serving.sampling import Sampler, Settings
from isthmus.speakers.local import Local
from isthmus.types import ConfigError, Grounding, Turn
from test_contract import SMALL_QUERIES
from tiny import DECODERS

JOINTS = {
    "llava": ("llama", "llava", {}),
    "rule": ("llama", "ee_mllm", {}),
    "shared positions": ("qwen2", "cogvlm", {}),
    "aside": ("llama", "flamingo", {"latents": 5, "depth": 1, "heads": 2, "head_width": 8}),
    "windows": ("gemma3_text", "llava", {}),
    "context": ("llama", "instructblip", {**SMALL_QUERIES, "vocabulary": 320}),
}
"""One joint for each way in which rows could disturb each other; the slow test below tries all."""


def conversations() -> list[list[Turn]]:
    """Nine of different lengths, with no, one and two pictures."""
    said = [
        "hi",
        "what is it?",
        "tell me at length what you see, and then what you do not see",
        "a",
        "is it on the left",
    ]
    found = [[Turn.say("user", text)] for text in said[:3]]
    found += [[Turn.say("user", picture(number), text)] for number, text in enumerate(said)]
    found.append([Turn.say("user", picture(7), "and", picture(8), "do they differ?")])
    return found


def solo(model, turns, tokens=12) -> list[int]:
    """Token ids of transformers' own greedy generation, alone."""
    local = Local(model, max_new_tokens=tokens)
    batch = local._prompt([composed.Sample(tuple(turns))])
    ids = model.generate(batch, **local.decode)[0, batch.input_ids_BT.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)


class Heard:
    """Collects what is told of one request."""

    def __init__(self):
        self.events = queue.SimpleQueue()
        self.texts, self.ids, self.done = {}, {}, {}

    def wait(self, answers=1):
        while len(self.done) < answers:
            event = self.events.get(timeout=120)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Piece):
                self.texts[event.index] = self.texts.get(event.index, "") + event.text
                self.ids[event.index] = [*self.ids.get(event.index, []), *(c.token for c in event.chosen)]
            if isinstance(event, Done):
                self.done[event.index] = event
        return self


def ask(engine, turns, **settings) -> Heard:
    heard = Heard()
    engine.submit(engine.prepare(turns), Settings(**{"max_tokens": 12} | settings), heard.events.put)
    return heard


@pytest.fixture(scope="module")
def llava():
    return stir(composed.model("llama"))


@pytest.mark.parametrize("name", JOINTS)
def test_together_as_alone(name):
    together_as_alone(stir(composed.model(*JOINTS[name])))


@pytest.mark.slow
@pytest.mark.parametrize("joint", sorted(test_contract.JOINTS))
def test_every_joint_together_as_alone(joint):
    family = next((each for each in test_contract.JOINTS[joint].families if each in DECODERS), None)
    if family is None:
        pytest.skip("no decoder-only LLM carries this joint")
    together_as_alone(test_contract.grown(joint, family))


def together_as_alone(model):
    asked = conversations() * 2
    lengths = [random.Random(number).randint(1, 16) for number in range(len(asked))]
    expected = [solo(model, turns, 16)[:tokens] for turns, tokens in zip(asked, lengths)]
    random.Random(0).shuffle(order := list(range(len(asked))))
    engine = Engine(model, Sizes(batch=5, queue=100, chunk=13))
    heard = {number: ask(engine, asked[number], max_tokens=lengths[number]) for number in order}
    with engine:
        for number, each in heard.items():
            ended = each.wait().done[0]
            ids = expected[number]
            assert each.ids.get(0, []) == (ids[:-1] if ended.reason == "stop" else ids), number
            assert ended.tokens == len(ids)
        assert engine.counts.steps < sum(map(len, expected)) / 2  # they were decoded together
        assert engine.pictures.hits + engine.prefixes.hits > 0 and settled(engine)


def test_a_question_about_a_region_goes_its_own_way_among_others():
    """LION has an adapter for each kind; what is kept of one kind is no beginning of the other."""
    model = test_contract.grown("lion", "llama")
    asked = [[Turn.say("user", picture(0), "where is it?", *points)] for points in ((), (Grounding(),))] * 3
    expected = [solo(model, turns) for turns in asked]
    assert expected[0] != expected[1]
    engine = Engine(model, Sizes(batch=4, queue=100, chunk=13))
    with engine:
        for heard, ids in zip([ask(engine, turns) for turns in asked], expected):
            ended = heard.wait().done[0]
            assert heard.ids.get(0, []) == (ids[:-1] if ended.reason == "stop" else ids)


def settled(engine) -> bool:
    """Whether nothing is left of any request, soon."""
    until = time.monotonic() + 30
    while engine.busy and time.monotonic() < until:
        time.sleep(0.005)
    return not engine.busy and len(engine.pool) == 0


# ---------------------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize("name", JOINTS)
def test_a_second_turn_reads_only_what_is_new(name):
    family, aligner, options = JOINTS[name]
    model = stir(composed.model(family, aligner, options))
    first = [Turn.say("user", "look: ", picture(1), "what is it?")]
    with Engine(model) as engine:
        said = engine.answer(first, Settings(max_tokens=6))[0]
        assert (engine.prefixes.hits, engine.pictures.misses) == (0, 1)
        second = [*first, Turn.say("assistant", said), Turn.say("user", "and ", picture(2), " here?")]
        heard = ask(engine, second).wait()
        assert engine.prefixes.hits == 1 and (engine.pictures.hits, engine.pictures.misses) == (0, 2)
        known, whole = heard.done[0].reused, len(engine.prepare(second).ids)
        assert len(engine.prepare(first).ids) - 2 <= known < whole
        expected = solo(model, second)
        assert heard.ids.get(0, []) == [i for i in expected if i not in engine.ends]
        assert heard.done[0].tokens == len(expected)
    bare = Sizes(prefix_bytes=0, picture_bytes=0)
    with Engine(model, bare) as engine:
        again = [ask(engine, second).wait() for _ in range(2)]
        assert [each.ids for each in again] == [heard.ids] * 2 and not engine.prefixes.rows
        assert engine.pictures.misses == 4 and not engine.pictures.bytes


def test_another_picture_or_another_question_of_it_is_not_taken_for_the_same():
    for joint, same in (("rule", True), ("context", False)):
        model = stir(composed.model(*JOINTS[joint]))
        with Engine(model) as engine:
            prompts = [
                engine.prepare([Turn.say("user", picture(seen), text)])
                for seen, text in ((1, "what?"), (1, "where?"), (2, "what?"))
            ]
            start, end = prompts[0].spans[0]
            a, b, c = (prompt.symbols for prompt in prompts)
            assert (a[:end] == b[:end]) is same and a[:end] != c[:end] and a[:start] == c[:start]


def test_pictures_of_the_same_bytes_in_another_shape_differ(llava):
    from PIL import Image as Pillow

    from isthmus.types import Image

    raw = bytes(range(96)) * 2
    with Engine(llava) as engine:
        keys = {
            engine.prepare([Turn.say("user", Image(Pillow.frombytes("RGB", size, raw)))]).seen[0].key
            for size in ((8, 8), (4, 16), (16, 4))
        }
    assert len(keys) == 3


def test_what_is_kept_stays_below_its_bound(llava):
    row_bytes = 2 * 3 * 2 * 8 * 4  # keys and values of three layers, two heads of eight, in float32
    with Engine(llava, Sizes(prefix_bytes=100 * row_bytes, picture_bytes=3 * 17 * 32 * 4)) as engine:
        for number in range(8):
            engine.answer([Turn.say("user", picture(number), f"{number}")], Settings(max_tokens=2))
            assert engine.prefixes.bytes <= engine.prefixes.limit and engine.pictures.bytes <= engine.pictures.limit
        held = sum(row.bytes for row in engine.prefixes.rows.values())
        assert held == engine.prefixes.bytes == sum(map(len, engine.prefixes.rows)) * row_bytes > 0


# ---------------------------------------------------------------------------------------------- drawing lots


def test_a_seed_gives_the_same_answer_in_any_company(llava):
    turns = [Turn.say("user", picture(1), "what is it?")]
    wish = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "n": 2}
    with Engine(llava, Sizes(batch=6)) as engine:
        alone = ask(engine, turns, **wish).wait(2)
        others = [ask(engine, each, temperature=1.5, seed=number) for number, each in enumerate(conversations())]
        beside = ask(engine, turns, **wish).wait(2)
        other = ask(engine, turns, **wish | {"seed": 8}).wait(2)
        assert [each.wait() for each in others]
    assert alone.ids == beside.ids and alone.ids[0] != alone.ids[1]
    assert other.ids[0] == alone.ids[1]  # the second answer draws with the next seed


def test_logprobs_are_those_of_a_full_forward(llava):
    turns = [Turn.say("user", picture(1), "what is it?")]
    with Engine(llava) as engine:
        events = queue.SimpleQueue()
        engine.submit(engine.prepare(turns), Settings(max_tokens=5, logprobs=3, temperature=0.0), events.put)
        chosen = []
        while not isinstance(event := events.get(timeout=10), Done):
            chosen += event.chosen
    batch = llava.processor.prompts([composed.Sample(tuple(turns))])
    ids = llava.generate(batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    images = batch.media["image"]
    with torch.no_grad():
        at = torch.stack([images.row_N, images.at_N], 1)
        logits = llava(input_ids=ids, pixel_values=images.pixels, image_at=at).logits[0]
    expected = logits[batch.input_ids_BT.shape[1] - 1 : -1].log_softmax(-1)
    for token, row in zip(chosen, expected):
        assert token.logprob == pytest.approx(float(row.max()), abs=1e-4) and token.token == int(row.argmax())
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()


def test_penalties_keep_a_token_from_coming_again(llava):
    turns = [Turn.say("user", "hi")]
    with Engine(llava) as engine:
        ids = ask(engine, turns, max_tokens=20, presence_penalty=2.0, frequency_penalty=2.0).wait().ids[0]
        free = ask(engine, turns, max_tokens=20).wait().ids[0]
    assert len(set(ids)) > len(set(free))


# ---------------------------------------------------------------------------------------------- leaving and failing


def slowed(engine, seconds=0.01):
    """Let every step take a while, so that something can happen meanwhile."""
    right = engine.pool.step
    engine.pool.step = lambda ids: (time.sleep(seconds), right(ids))[1]


def held(engine) -> threading.Event:
    """Let no step happen until the event is set."""
    right, go_on = engine.pool.step, threading.Event()
    engine.pool.step = lambda ids: (go_on.wait(60), right(ids))[1]
    return go_on


def test_a_cancelled_answer_leaves_before_the_next_step(llava):
    expected = solo(llava, conversations()[0], 40)
    engine = Engine(llava, Sizes(batch=2))
    stays, goes = ask(engine, conversations()[0], max_tokens=40), Heard()
    job = engine.submit(engine.prepare(conversations()[1]), Settings(max_tokens=400), goes.events.put)
    right, rows = engine.pool.step, []

    def step(ids):
        rows.append(len(ids))
        if len(rows) == 5:
            job.cancel()
        return right(ids)

    engine.pool.step = step
    with engine:
        assert stays.wait().ids[0] == [i for i in expected if i not in engine.ends]
        assert rows[1:5] == [2] * 4 and set(rows[5:]) == {1}
        assert engine.counts.cancelled == 1 and settled(engine)


def test_a_full_queue_refuses_and_serves_on(llava):
    with Engine(llava, Sizes(batch=1, queue=2)) as engine:
        go_on = held(engine)
        first = ask(engine, conversations()[0], max_tokens=5)
        while not engine.running:
            time.sleep(0.001)
        waiting = [ask(engine, conversations()[1]) for _ in range(2)]
        with pytest.raises(Full):
            ask(engine, conversations()[2])
        go_on.set()
        assert first.wait() and all(each.wait() for each in waiting) and settled(engine)
        assert ask(engine, conversations()[2]).wait()


def test_a_deadline_ends_what_runs_and_what_waits(llava):
    with Engine(llava, Sizes(batch=1)) as engine:
        slowed(engine, 0.03)
        asked = [ask(engine, conversations()[0], max_tokens=400, deadline=0.2) for _ in range(2)]
        for each in asked:
            with pytest.raises(Late):
                each.wait()
        assert engine.counts.failed == 2 and settled(engine)


def test_a_request_that_fails_takes_nobody_with_it(llava, monkeypatch):
    expected = solo(llava, conversations()[0], 30)
    with Engine(llava, Sizes(batch=4)) as engine:
        slowed(engine)
        stays = ask(engine, conversations()[0], max_tokens=30)
        bad = engine.prepare([Turn.say("user", picture(5), "poison")])
        bad = replace(bad, seen=(replace(bad.seen[0], pixels=torch.zeros(1)),))  # the encoder stumbles over it
        worse = Heard()
        engine.submit(bad, Settings(), worse.events.put)
        with pytest.raises(Broken):
            worse.wait()
        deaf = engine.submit(engine.prepare(conversations()[1]), Settings(), lambda event: 1 / 0)
        assert stays.wait().ids[0] == [i for i in expected if i not in engine.ends]
        assert settled(engine) and deaf.cancelled
        right, calls = engine.pool.step, []

        def fails_once(ids):
            calls.append(ids)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return right(ids)

        monkeypatch.setattr(engine.pool, "step", fails_once)
        with pytest.raises(Broken):
            ask(engine, conversations()[0], max_tokens=30).wait()
        assert ask(engine, conversations()[0], max_tokens=30).wait().ids[0] == stays.ids[0] and engine.alive


@pytest.mark.parametrize("wish", [{"top_p": 7e-160, "temperature": 0.7}, {"temperature": 5e-324}])
def test_the_smallest_numbers_leave_the_likeliest_token(wish):
    logits_V = torch.tensor([1.0, 30.0, -2.0])
    assert {Sampler(Settings(**wish)).choose(logits_V, [0]).token for _ in range(5)} == {1}


def test_logits_that_are_not_numbers_fail_their_own_answer_alone(llava):
    engine = Engine(llava, Sizes(batch=2))
    right = engine.pool.step

    def poisoned(ids):
        logits = right(ids).clone()
        logits[1:] = torch.nan
        return logits

    engine.pool.step = poisoned
    stays = ask(engine, conversations()[0], max_tokens=20)
    fails = ask(engine, conversations()[1], max_tokens=20)
    with engine:
        with pytest.raises(Broken):
            fails.wait()
        assert stays.wait().ids[0] == [i for i in solo(llava, conversations()[0], 20) if i not in engine.ends]


def test_a_prompt_that_leaves_no_room_is_refused_and_answers_are_cut_to_the_room(llava):
    turns = [Turn.say("user", picture(1), "what is it?")]
    length = len(Engine(llava).prepare(turns).ids)
    with Engine(llava, Sizes(context=length)) as engine, pytest.raises(TooLong, match=f"{length} tokens, of which 16"):
        engine.prepare(turns)
    with Engine(llava, Sizes(context=length + 3)) as engine:
        ended = ask(engine, turns, max_tokens=100).wait().done[0]
    assert (ended.reason, ended.tokens) == ("length", 3)


def test_closing_fails_what_waits_and_ends_the_thread(llava):
    engine = Engine(llava, Sizes(batch=1)).start()
    slowed(engine, 0.02)
    asked = [ask(engine, conversations()[0], max_tokens=400) for _ in range(3)]
    engine.close()
    for each in asked:
        with pytest.raises(Stopping):
            each.wait()
    with pytest.raises(Stopping):
        ask(engine, conversations()[0])
    with pytest.raises(Stopping):
        engine.call(lambda: 1)
    assert not any(thread.name == "isthmus-engine" and thread.is_alive() for thread in threading.enumerate())


def test_a_row_that_cannot_leave_ends_no_thread(llava, monkeypatch):
    """A cancelled row leaves between two steps; moving another into its place may be out of memory."""
    engine = Engine(llava, Sizes(batch=2))
    go_on, right, left = held(engine), engine.pool.leave, []

    def fails_once(slot):
        left.append(slot)
        if len(left) == 1:
            raise RuntimeError("out of memory")
        right(slot)

    monkeypatch.setattr(engine.pool, "leave", fails_once)
    goes = engine.submit(engine.prepare(conversations()[1]), Settings(max_tokens=400), lambda event: None)
    stays = ask(engine, conversations()[0], max_tokens=400)
    with engine:
        while engine.running < 2:
            time.sleep(0.001)
        goes.cancel()
        go_on.set()
        with pytest.raises(Broken):
            stays.wait()
        assert ask(engine, conversations()[0]).wait() and engine.alive and settled(engine)


def test_rows_that_were_half_moved_for_a_newcomer_are_not_decoded(llava, monkeypatch):
    """A longer prompt moves the rows that run, layer by layer; one of these moves may be out of memory."""
    short, long = conversations()[0], [Turn.say("user", *(picture(n) for n in range(3)), "what are these?")]
    expected = solo(llava, short, 30)
    engine = Engine(llava, Sizes(batch=2))
    go_on = held(engine)
    with engine:
        stays = ask(engine, short, max_tokens=400)
        while engine.running < 1:
            time.sleep(0.001)
        layer = engine.pool.layers[-1]
        monkeypatch.setattr(layer, "shift", lambda *_: 1 / 0)
        comes = ask(engine, long, max_tokens=30)
        go_on.set()
        for each in (stays, comes):
            with pytest.raises(Broken):
                each.wait()
        again = ask(engine, short, max_tokens=30).wait()
        assert again.ids[0] == [i for i in expected if i not in engine.ends] and engine.alive and settled(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_leaves_nobody_waiting(llava, monkeypatch):
    engine = Engine(llava, Sizes(batch=1))

    def ends(ids):
        raise SystemExit

    monkeypatch.setattr(engine.pool, "step", ends)
    asked = [ask(engine, conversations()[0]) for _ in range(2)]
    with engine:
        for each in asked:
            with pytest.raises(Stopping):
                each.wait()
        with pytest.raises(Stopping):
            ask(engine, conversations()[0])
        assert not engine.alive


def test_an_encoder_decoder_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="t5"):
        Engine(composed.model("flan-t5"))


def test_other_work_runs_between_steps(llava):
    with Engine(llava) as engine:
        assert engine.call(lambda: threading.current_thread().name).result(60) == "isthmus-engine"
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 / 0).result(60)
        assert engine.answer(conversations()[0])
    engine = Engine(llava, Sizes(queue=2))
    asked = [engine.call(lambda: 1), engine.call(lambda: 2)]
    with pytest.raises(Full):
        engine.call(lambda: 3)
    asked[0].cancel()
    with engine:
        assert asked[1].result(60) == 2 and engine.call(lambda: 3).result(60) == 3 and asked[0].cancelled()


def recorded(engine) -> list[str]:
    """What the engine does from now on, in order, as others write into it too."""
    right, done = engine.pool.step, []
    engine.pool.step = lambda ids: (done.append("step"), right(ids))[1]
    return done


def test_a_flood_of_other_work_lets_the_running_answers_go_on(llava):
    """Each task that ends asks for the next one, as clients do that wait for their answer."""
    expected, engine = solo(llava, conversations()[0], 40), Engine(llava, Sizes(batch=2))
    done, over = recorded(engine), threading.Event()

    def again(_=None):
        if not over.is_set():
            engine.call(lambda: done.append("task")).add_done_callback(again)

    stays, goes = ask(engine, conversations()[0], max_tokens=40), Heard()
    job = engine.submit(engine.prepare(conversations()[1]), Settings(max_tokens=400), goes.events.put)
    for _ in range(4):
        again()
    with engine:
        try:
            assert stays.wait().ids[0] == [i for i in expected if i not in engine.ends]
            job.cancel()
            assert settled(engine) and engine.counts.cancelled == 1
        finally:
            over.set()
    steps = [place for place, what in enumerate(done) if what == "step"]
    assert len(steps) >= 39 and all(second - first == 2 for first, second in zip(steps, steps[1:39]))


def test_work_that_nobody_did_fails_as_the_engine_ends(llava):
    engine = Engine(llava, Sizes(batch=1))
    begun, go_on = threading.Event(), threading.Event()
    first, second = engine.call(lambda: (begun.set(), go_on.wait(60))), engine.call(lambda: 2)
    closing = threading.Thread(target=engine.close)
    with engine:
        assert begun.wait(60)
        closing.start()
        until = time.monotonic() + 30
        while engine._inbox.empty() and time.monotonic() < until:
            time.sleep(0.001)
        go_on.set()
        assert first.result(60)
        with pytest.raises(Stopping):
            second.result(60)
        closing.join()


def test_new_pictures_are_looked_at_a_chunk_at_a_time(llava):
    """Sixteen vectors each of the tiny encoder and a chunk of twenty: two pictures, then the others' next token."""
    many = [Turn.say("user", *(picture(number) for number in range(6)), "what are these?")]
    expected, engine = solo(llava, many), Engine(llava, Sizes(batch=3, chunk=20))
    done, look = recorded(engine), engine.pictures.look
    engine.pictures.look = lambda seen: (done.append("picture"), look(seen))[1]
    stays = ask(engine, conversations()[0], max_tokens=100)
    comes = [ask(engine, many), ask(engine, [Turn.say("user", picture(9), "and this?")])]
    with engine:
        assert comes[0].wait().ids[0] == [i for i in expected if i not in engine.ends]
        assert comes[1].wait() and stays.wait()
    turns = " ".join(done).split("step")
    assert max(turn.count("picture") for turn in turns) == 2 and sum(turn.count("picture") for turn in turns) == 7
