"""POST /v1/chat/completions, asked by OpenAI's own client: what an engine answers, whole or in pieces."""

import base64
import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from emollama_jax.text.prompts import Turn, emotion_question
from tests.serve.test_emotions import data_url, still, tone  # noqa: F401

WHY, SURE = "[reason] Why?", "Are you sure?"


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def clip_part(path, kind="video/mp4"):
    return {"type": "video_url", "video_url": {"url": data_url(path, kind)}}


def user(*content):
    parts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    return {"role": "user", "content": parts}


def chat(client, *messages, **options):
    return client.chat.completions.create(model="emollama", messages=list(messages), **options)


def test_a_whole_answer_is_the_engines(client, engine, videos):
    reply = chat(client, user(clip_part(videos[0]), WHY))
    expected = engine.ask(videos[0], WHY)
    choice = reply.choices[0]
    assert choice.message.content == expected.answer and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and reply.usage.completion_tokens == 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 24
    assert reply.model_extra["emollama"]["clip"] == expected.clip_info
    assert [model.id for model in client.models.list()] == ["emollama"]
    assert client.models.retrieve("emollama").id == "emollama"


def test_a_stream_is_the_answer_in_pieces(client, engine, videos):
    with chat(client, user(WHY, clip_part(videos[0])), stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == engine.ask(videos[0], WHY).answer and len(pieces) > 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 24 and len({chunk.id for chunk in chunks}) == 1


def test_turns_are_a_conversation(client, engine, videos):
    expected = engine.ask(videos[0], SURE, history=[Turn(WHY, "Because.")]).answer
    messages = [user(clip_part(videos[0]), WHY), {"role": "assistant", "content": "Because."}, user(SURE)]
    assert chat(client, *messages).choices[0].message.content == expected
    later = [user(WHY), {"role": "assistant", "content": "Because."}, user(clip_part(videos[0]), SURE)]
    assert chat(client, *later).choices[0].message.content == expected
    with_system = [{"role": "system", "content": "Be brief."}, user(clip_part(videos[0]), WHY)]
    assert chat(client, *with_system).choices[0].message.content == engine.ask(videos[0], f"Be brief. {WHY}").answer


@pytest.mark.parametrize("name", ["structured_outputs", "guided_choice"])
def test_a_choice_is_scored_as_labels_are(client, engine, videos, name):
    labels = engine.config.prompt.labels
    body = {name: {"choice": labels} if name == "structured_outputs" else list(labels)}
    expected = engine.label(videos[1])
    question = emotion_question(labels, engine.config.prompt.emotion_question)
    for asked in ("", question, f"[emotion] {question}"):
        reply = chat(client, user(clip_part(videos[1]), asked), extra_body=body, logprobs=True, top_logprobs=3)
        choice = reply.choices[0]
        assert choice.message.content == expected.label and choice.finish_reason == "stop"
        found = reply.model_extra["emollama"]["probabilities"]
        assert found == pytest.approx(expected.probabilities, abs=2e-6)
        top = choice.logprobs.content[0].top_logprobs
        assert [one.token for one in top] == list(expected.probabilities)[:3]
        assert math.exp(top[0].logprob) == pytest.approx(expected.probabilities[expected.label], abs=2e-6)


def test_a_choice_of_other_words_streams_after_earlier_turns(client, engine, videos):
    messages = [user(clip_part(videos[1]), WHY), {"role": "assistant", "content": "Hm."}, user("Is it so: {labels}?")]
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    whole = chat(client, *messages, extra_body=body)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, *messages, extra_body=body, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content in ("yes", "no")
    alone = chat(client, user(clip_part(videos[1]), "Is it so: {labels}?"), extra_body=body)
    first, second = (reply.model_extra["emollama"]["probabilities"]["yes"] for reply in (whole, alone))
    assert abs(first - second) > 1e-6
    with pytest.raises(openai.BadRequestError, match=r"asked under \[emotion\], not \[reason\]"):
        chat(client, user(clip_part(videos[1]), WHY), extra_body=body)


def test_log_probabilities_are_those_of_the_tokens(client, engine, videos):
    reply = chat(client, user(clip_part(videos[0]), WHY), logprobs=True, top_logprobs=4, max_tokens=6)
    content = reply.choices[0].logprobs.content
    assert len(content) == 6 and all(len(one.top_logprobs) == 4 for one in content)
    for one in content:  # the answer is greedy
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob) and one.logprob < 0
        assert [x.logprob for x in one.top_logprobs] == sorted((x.logprob for x in one.top_logprobs), reverse=True)
    assert "".join(one.token for one in content).strip() == reply.choices[0].message.content
    stream = chat(client, user(clip_part(videos[0]), WHY), logprobs=True, top_logprobs=4, max_tokens=6, stream=True)
    streamed = [e for chunk in stream if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [(e.token, e.logprob) for e in streamed] == [(e.token, e.logprob) for e in content]


def test_sampling_is_that_of_its_seed(client, videos):
    ask = lambda seed: chat(client, user(clip_part(videos[0]), WHY), temperature=1.5, top_p=0.9, seed=seed)
    one, same, other = (ask(seed).choices[0].message.content for seed in (7, 7, 8))
    assert one == same != other
    negative = ask(-1).choices[0].message.content
    assert negative == ask(2**32 - 1).choices[0].message.content


def test_an_answer_ends_before_a_stop_string(client, engine, videos):
    whole = engine.ask(videos[0], WHY).answer
    stop = whole[10:13]
    found = chat(client, user(clip_part(videos[0]), WHY), stop=["@@@", stop]).choices[0]
    assert found.message.content == whole[: whole.index(stop)].rstrip() and found.finish_reason == "stop"
    stream = chat(client, user(clip_part(videos[0]), WHY), stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == found.message.content


def test_sounds_and_pictures_are_clips_too(client, videos, tone, still):  # noqa: F811
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(tone.read_bytes()).decode(), "format": "wav"},
    }
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(still).decode()}"}}
    by_url = {"type": "audio_url", "audio_url": {"url": data_url(tone, "audio/wav")}}
    seen = lambda *parts: chat(client, user(*parts, WHY)).model_extra["emollama"]["clip"]
    assert seen(sound) == seen(by_url) and seen(sound)["frames"] == 0
    assert "sound_seconds" not in seen(picture)
    both = seen(picture, sound)
    assert both["frames"] == 1 and both["sound_seconds"] == 1.0
    with pytest.raises(openai.BadRequestError, match="one clip a request"):
        seen(clip_part(videos[0]), picture)
    with pytest.raises(openai.BadRequestError, match="content of the kind image"):
        seen({"type": "audio_url", "audio_url": picture["image_url"]})


def test_what_cannot_be_done_is_said(client, videos):
    clip = clip_part(videos[0])
    for error, match, messages, options in (
        (openai.NotFoundError, "this server has 'emollama'", [user(clip, WHY)], {"model": "gpt"}),
        (openai.BadRequestError, "no clip: send", [user(WHY)], {}),
        (openai.BadRequestError, "no question", [user(clip)], {}),
        (openai.BadRequestError, "n: Input should be 1", [user(clip, WHY)], {"n": 2}),
        (openai.BadRequestError, "frequency_penalty", [user(clip, WHY)], {"frequency_penalty": 1.0}),
        (openai.BadRequestError, "tools: Extra inputs", [user(clip, WHY)], {"extra_body": {"tools": []}}),
        (openai.BadRequestError, "top_logprobs goes with logprobs", [user(clip, WHY)], {"top_logprobs": 2}),
        (openai.BadRequestError, "max_tokens 100000", [user(clip, WHY)], {"max_tokens": 100000}),
        (openai.BadRequestError, "the last message", [user(clip, WHY), {"role": "assistant", "content": "x"}], {}),
        (openai.BadRequestError, "the first message", [{"role": "assistant", "content": "x"}, user(clip)], {}),
        (openai.UnprocessableEntityError, "shorten the subtitle", [user(clip, "so " * 300)], {}),
        (openai.UnprocessableEntityError, "shorten the subtitle", [user(clip, "so " * 300)], {"stream": True}),
    ):
        with pytest.raises(error, match=match):
            client.chat.completions.create(**{"model": "emollama", "messages": messages, **options})


@pytest.mark.slow
def test_a_stream_that_is_left_frees_its_slot(running, videos, engine):
    """And a whole answer that nobody waits for any more; others are not harmed."""
    expected = engine.ask(videos[0], WHY).answer
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        stream = chat(client, user(clip_part(videos[0]), WHY), stream=True, max_tokens=200)
        next(iter(stream))
        stream.response.close()
        with contextlib.suppress(openai.APITimeoutError):
            chat(client.with_options(timeout=0.05), user(clip_part(videos[1]), WHY), max_tokens=200)
        with ThreadPoolExecutor(6) as pool:
            found = pool.map(lambda _: chat(client, user(clip_part(videos[0]), WHY)), range(6))
            assert {reply.choices[0].message.content for reply in found} == {expected}
    looks = 200
    while (running.service.scheduler._unfinished or running.service._in_flight) and (looks := looks - 1):
        time.sleep(0.05)
    assert not running.service.scheduler._unfinished and running.service._in_flight == 0
    assert not running.service.scheduler._batcher.busy
