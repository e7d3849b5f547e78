"""A server that has warmed up compiles nothing for what it is asked then."""

import asyncio
import random

import pytest

from emollama_jax.serve.jobs import Generation
from emollama_jax.serve.server import warm_up
from emollama_jax.serve.service import AskSettings, Service
from emollama_jax.serve.settings import ServeSettings
from emollama_jax.serve.uploads import MediaFile
from emollama_jax.text.prompts import Turn
from tests.compilations import compilations
from tests.serve.test_emotions import tone  # noqa: F401

WHY = "[reason] Why?"


@pytest.fixture(scope="module")
def service(engine):
    service = Service(engine, ServeSettings(slots=8))
    service.usual_asks.append(AskSettings(orders=3))
    service.scheduler.start()
    yield service
    service.close()


async def ask_all(service, videos, sound) -> list:
    """Sixty requests: labels, answers, both, follow-ups, long and short, sounds alone, and some that are given up."""
    rng, asking = random.Random(0), []
    modalities = AskSettings(modalities="AT")

    async def ask(path, kind: str, number: int):
        await asyncio.sleep(rng.random())
        media = MediaFile(path, kind, f"{path.name} {number % 7}", path.name)  # encoded anew for each digest
        parts = (media, None) if kind == "video" else (None, media)
        clip = await service.open_clip(*parts, subtitle="so " * rng.randrange(25))
        engine = service.engine_for(modalities if kind == "audio" else rng.choice(service.usual_asks))
        generate = service.generate_config(
            max_new_tokens=rng.choice((1, 9, 24, 100)), temperature=rng.choice((0.0, 1.0))
        )
        generation = Generation(question=WHY, generate=generate, logprobs=rng.random() < 0.3)
        history = (Turn(WHY, "Because."),) * rng.randrange(3)
        scores = rng.random() < 0.5
        answer = service.answer(clip, engine, scores_labels=scores, history=history, generation=generation)
        return await asyncio.wait_for(answer, 0.2 if number % 10 == 9 else 120)

    for number in range(60):
        path, kind = (sound, "audio") if number % 5 == 4 else (rng.choice(videos), "video")
        asking.append(ask(path, kind, number))
    return await asyncio.gather(*asking, return_exceptions=True)


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up(service, videos, tone):  # noqa: F811
    lines = []
    with compilations() as beforehand:
        asyncio.run(warm_up(service, lines.append))
    assert len(beforehand) > 30 and lines[0].startswith("warm after")
    with compilations() as meanwhile:
        found = asyncio.run(ask_all(service, videos, tone))
    given_up = [one for one in found if isinstance(one, TimeoutError)]
    assert len(given_up) <= 6 and not [one for one in found if isinstance(one, Exception) and one not in given_up]
    assert not meanwhile


def test_a_program_that_cannot_be_compiled_waits_for_its_request(service, videos, monkeypatch, caplog):
    """As where a device cannot hold the longest answers; and a request need not wait for the others."""
    calls = [lambda: None, lambda: 1 / 0, lambda: None]
    monkeypatch.setattr("emollama_jax.serve.scheduler.programs", lambda *given: iter(calls))
    asyncio.run(service.compile())
    assert "not compiled beforehand: division by zero" in caplog.text
    assert service.scheduler.is_alive
