"""The description of the API is valid, and requests made up from it give no defect."""

import os
import re
import subprocess
import sys

import pytest

from tests.serve.conftest import serving


def test_the_description_is_valid_and_names_every_route(running):
    validator = pytest.importorskip("openapi_spec_validator")
    described = running.client.get("/openapi.json").json()
    validator.validate(described)
    ours = {"/v1/emotions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}"}
    assert set(described["paths"]) == ours | {"/health", "/ready", "/metrics", "/version"}
    asked = described["paths"]["/v1/emotions"]["post"]
    assert set(asked["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"400", "401", "413", "415", "422", "429", "503", "504"} < set(asked["responses"])


def test_the_page_of_the_description_needs_nothing_from_elsewhere(running):
    """Every route and field is on it, and no script."""
    described, page = running.client.get("/openapi.json").json(), running.client.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    links = re.findall(r"""(?:src|href|url\()=?["']?([^"'>)]+)""", page.text)
    assert links == ["openapi.json"] and "<script" not in page.text
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in page.text
            for content in route.get("requestBody", {}).get("content", {}).values():
                assert all(f"<code>{name}</code>" in page.text for name in content["schema"]["properties"])


@pytest.mark.slow
def test_requests_made_up_from_the_description_give_no_defect(engine, tmp_path):
    """By schemathesis, a few hundred of them; replies have to be as they are described, too."""
    pytest.importorskip("schemathesis", reason="no schemathesis: pip install 'emollama_jax[test]'")
    with serving(engine, max_upload_mb=1, slots=2) as server:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", checks]
        command += ["--max-examples", "25", "--generation-deterministic", "--request-timeout", "30", "--no-color"]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
        print(done.stdout[-4000:], done.stderr[-1000:])
        assert done.returncode == 0
        assert server.client.get("/ready").status_code == 200
        assert not server.service.scheduler._unfinished
