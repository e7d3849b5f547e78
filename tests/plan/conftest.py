"""Plans are of what is compiled for devices: there programs are optimised, and none is kept."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def real_compilation():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR"):
            patch.delenv(name, raising=False)
        yield
