"""The engine thread: one bad clip harms no other, and what nobody waits for is dropped."""

import asyncio
import shutil

import pytest

from emollama_jax.serve.errors import ApiError
from emollama_jax.serve.jobs import Generation
from emollama_jax.serve.service import AskSettings, Service
from emollama_jax.serve.settings import ServeSettings
from emollama_jax.serve.uploads import MediaFile


@pytest.fixture
def service(engine):
    service = Service(engine, ServeSettings(warmup=False, slots=2))
    service.scheduler.start()
    yield service
    service.close()


async def opened(service, path, **options):
    return await service.open_clip(MediaFile(path, "video", path.name, path.name), **options)


def test_a_clip_that_cannot_be_encoded_harms_no_other(service, engine, videos, tmp_path, monkeypatch):
    """Four are encoded together, and each alone where that fails."""
    videos = [*videos, shutil.copy(videos[0], tmp_path / "another.mp4")]
    real, calls = service._videos.encode, []

    def encode(items, reads):
        calls.append([item.name for item in items])
        if videos[1].name in calls[-1]:
            raise ValueError("no such shape")
        return real(items, reads)

    monkeypatch.setattr(service._videos, "encode", encode)

    async def ask():
        clips = await asyncio.gather(*(opened(service, path) for path in videos))
        asked = (service.label(clip, engine) for clip in clips)
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, *others = asyncio.run(ask())
    assert first.label and all(other.label for other in others) and len(calls[0]) == 4
    assert isinstance(second, ApiError) and second.status == 500 and "ValueError: no such shape" in second.message
    assert service.scheduler.is_alive


def test_errors_that_no_request_explains_end_the_engine(service, engine, videos, monkeypatch):
    def fails(items, reads):
        raise ValueError("the device is lost")

    monkeypatch.setattr(service._videos, "encode", fails)

    async def ask() -> list[int]:
        statuses = []
        for _ in range(4):
            try:
                await service.label(await opened(service, videos[0]), engine)
            except ApiError as error:
                statuses.append(error.status)
        return statuses

    assert asyncio.run(ask()) == [500, 500, 503, 503]
    assert not service.scheduler.is_alive and service.unready == "the engine has stopped"


def test_one_clip_that_several_ask_about_is_encoded_once(service, engine, videos, monkeypatch):
    real, items_seen = service._videos.encode, []
    monkeypatch.setattr(service._videos, "encode", lambda items, reads: items_seen.extend(items) or real(items, reads))
    settings = (AskSettings(), AskSettings(("calm", "tense")), AskSettings(modalities="AT"), AskSettings(orders=2))

    async def ask():
        clip = await opened(service, videos[0])
        return await asyncio.gather(*(service.label(clip, service.engine_for(one)) for one in settings))

    found = asyncio.run(ask())
    assert len(items_seen) == 1
    assert set(found[1].probabilities) == {"calm", "tense"} and found[2].probabilities != found[0].probabilities
    assert found[0].probabilities == pytest.approx(engine.label(videos[0]).probabilities, abs=2e-6)
    assert len(found[3].label_by_order) == 2


def test_an_answer_that_nobody_waits_for_frees_its_slot(service, engine, videos):
    async def ask():
        clip = await opened(service, videos[0])
        long = Generation(question="[reason] Why?", generate=service.generate_config(max_new_tokens=200))
        task = asyncio.ensure_future(service.answer(clip, engine, scores_labels=False, generation=long))
        await asyncio.sleep(0)
        while not service.scheduler._running:
            await asyncio.sleep(0.01)
        task.cancel()
        while service.scheduler._running or service.scheduler._batcher.busy:
            await asyncio.sleep(0.01)
        short = Generation(question="[reason] Why?")
        return await service.answer(clip, engine, scores_labels=False, generation=short)

    assert asyncio.run(ask()).answer == engine.ask(videos[0], "[reason] Why?").answer


def test_settings_that_cannot_be_are_refused(service):
    for asked, said in (
        (AskSettings(("a, b", "c")), "reads as several labels"),
        (AskSettings(("same", "Same")), "each once"),
        (AskSettings(orders=99), "99 label orders"),
        (AskSettings(modalities="VV"), "modalities"),
    ):
        with pytest.raises(ApiError, match=said) as caught:
            service.engine_for(asked)
        assert caught.value.status == 400
