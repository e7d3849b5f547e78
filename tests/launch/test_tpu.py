"""Launches on Cloud TPU, beside a fake gcloud: every command line that runs is in `golden/`."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.cloud import BASE, GOLDEN, ROOT, TRAIN, FakeCloud, check_golden


@pytest.fixture
def cloud(tmp_path):
    return FakeCloud(tmp_path / "cloud")


@pytest.mark.smoke
def test_a_run_from_nothing_to_its_end(cloud):
    assert cloud.up("run", "--spot", "--delete-when-done", "--env=JAX_TRACEBACK_FILTERING=off") == 0
    check_golden("run.txt", cloud.transcript())
    command = cloud.file("command.sh").read_text()
    check_golden("command.sh", command)
    uploaded = {file.name for file in cloud.file(".").iterdir() if file.is_file()}
    assert {"constraints.txt", "tpu_startup.sh", "launch.json", "emollama_jax-1.0-py3-none-any.whl"} <= uploaded


def test_preempted_three_times_it_is_created_again_and_ends(cloud):
    at_random = random.Random(22)
    cloud.change(preempt_at=[at_random.randint(first, first + 3) for first in (4, 10, 15)])
    assert cloud.up("run", "--retries=3") == 0
    check_golden("preempted.txt", cloud.transcript())
    spells = json.loads(cloud.file("spells.json").read_text())
    assert [round(seconds / 900) for seconds in spells.values()] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_creation_that_is_refused_for_quota_is_tried_again(cloud):
    cloud.change(refused=[1, 3])
    assert cloud.up("up") == 1
    cloud.change(refused=[1, 3], preempt_at=[6])
    assert cloud.up("run") == 0
    check_golden("quota.txt", cloud.transcript())


@pytest.mark.slow
def test_a_worker_that_cannot_be_reached_is_tried_again_then_all_is_created_again(cloud):
    cloud.change(stall_at=9, ssh_fails=2)
    assert cloud.up("run", "--stall-minutes=0") == 0
    check_golden("ssh.txt", cloud.transcript())


def test_an_installation_is_no_stall(cloud):
    cloud.change(installs_for=3)
    assert cloud.up("run", "--stall-minutes=0") == 0
    said = cloud.transcript()
    assert "4 of 4 installing" in said and "STALLED" not in said


def test_a_network_that_is_gone_for_a_while_costs_nothing(cloud):
    cloud.change(looks_fail=list(range(5, 12)))
    assert cloud.up("run") == 0
    said = cloud.transcript()
    assert "Unable to find the server" in said and "delete" not in said


@pytest.mark.slow
def test_a_worker_that_stays_out_of_reach_costs_the_slices(cloud):
    cloud.change(stall_at=9, ssh_fails=3)
    assert cloud.up("run", "--stall-minutes=0") == 0
    check_golden("unreachable.txt", cloud.transcript())


@pytest.mark.slow
def test_slices_that_failed_are_created_again(cloud):
    cloud.change(fail_at=[4])
    assert cloud.up("run") == 0
    check_golden("failed.txt", cloud.transcript())


def test_a_cloud_that_has_none_for_us_ends_the_watch(cloud):
    cloud.change(fail_at=[4], refused=[2, 3, 4])
    assert cloud.up("run", "--retries=2") == 1
    check_golden("given_up.txt", cloud.transcript())


def test_what_needs_a_person_ends_the_watch_and_the_run(cloud):
    cloud.change(end_at=[5, "4"])
    assert cloud.up("run") == 4
    check_golden("person.txt", cloud.transcript())


def test_names_that_are_taken_and_verbs_that_find_nothing(cloud):
    assert cloud.up("up") == 0
    assert cloud.up("up") == 2
    assert cloud.run("run", "--type=v6e-16", cloud.wheel, *TRAIN) == 2
    assert cloud.run("status") == 0
    assert [cloud.run("down"), cloud.run("down")] == [0, 0]
    assert cloud.run("watch") == 1
    assert cloud.run("logs") == 1
    check_golden("taken.txt", cloud.transcript())


@pytest.mark.slow
def test_a_command_on_slices_that_are_there(cloud):
    cloud.change(existing="ACTIVE")
    assert cloud.up("run") == 0
    cloud.file("logs").mkdir()
    cloud.file("logs/process-0.log").write_text("step 20/20\n")
    for words in (["logs"], ["ssh", "--", "uptime"], ["stop"], ["status"], ["watch"]):
        cloud.run(*words)
    check_golden("again.txt", cloud.transcript())


def test_an_interrupted_watch_leaves_the_run(cloud):
    cloud.change(pace=0)
    assert cloud.up("up") == 0
    process = cloud.start("watch", *BASE[:-1], "--poll=0.2")
    for _ in range(100):
        if "ACTIVE" in cloud.transcript():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    said = cloud.transcript().splitlines()
    assert said[-1] == "tpu.py: interrupted; the run goes on, and `watch --name=stage1` looks on"
    assert "delete" not in "".join(said)
    assert cloud.file("spells.json").exists()


@pytest.mark.parametrize(
    "kind", ["v5e-16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("v6e-16", "v5p-16"))]
)
@pytest.mark.parametrize("slices", [1, 2])
def test_dry_runs_print_what_would_run(cloud, kind, slices):
    options = ["--dry-run", f"--type={kind}", f"--slices={slices}", "--project=mine"]
    private = ["--network=mine", "--service-account=a@b.c", "--internal-ips", "--reserved"]
    assert cloud.run("run", *options, *(private if slices == 2 else ["--spot"]), *TRAIN) == 0
    for words in (["status"], ["logs", "--process=3"], ["ssh"], ["ssh", "--", "uptime"], ["stop"], ["down"]):
        verb, *command = words
        assert cloud.run(verb, *options, *command) == 0
    text = cloud.transcript()
    assert "$" not in text  # gcloud did not run
    check_golden(f"dry_{kind}_{slices}.txt", text)


def test_configuration_files_travel(cloud, tmp_path):
    (tmp_path / "configs").mkdir()
    for name in ("configs/mine.py", "other.py"):
        (tmp_path / name).write_text("def get_config(): ...\n")
    (cloud.folder / "bucket/mine").mkdir(parents=True)
    (cloud.folder / "bucket/mine/far.py").write_text("def get_config(): ...\n")
    for given, there in (
        (["--config=gs://mine/far.py"], ["--config=/opt/emollama/job/far.py"]),
        (["--config", "mine"], ["--config", "/opt/emollama/job/mine.py"]),
        (["--config=other.py"], ["--config=/opt/emollama/job/other.py"]),
        (["--config=stage1_merr"], ["--config=stage1_merr"]),
    ):
        command = ["--type=v5e-16", cloud.wheel, "--", "emollama", "train", *given]
        assert cloud.run("up", *command, cwd=tmp_path) == 0
        assert cloud.file("command.sh").read_text().splitlines()[-1] == f"exec emollama train {' '.join(there)}"
        if there[-1].endswith(".py"):
            assert cloud.file(there[-1].rpartition("/")[2]).exists()
        cloud.run("down")
    assert cloud.run("up", "--type=v5e-16", cloud.wheel, "--", "emollama", "train", "--config=no.py") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--type=v5e-17", *TRAIN], "v5e comes in 4, 8, 16, 32"),
        (["--type=v9-16", *TRAIN], "v9-16: no such slice"),
        (["--type=v5e-16"], "up needs --type and a command"),
        (["--type=v5e-16", "--wheel=no.whl", *TRAIN], "--wheel no.whl: no such file"),
        (["--type=v5e-16", "--env=3", *TRAIN], "write NAME=VALUE"),
        (["--type=v5e-16", "--bucket=mine", *TRAIN], "write gs://BUCKET"),
        (["--type=v5e-16", "--name=A_b", *TRAIN], "up to 40 of a-z, 0-9 and -"),
    ],
)
def test_wrong_arguments_are_one_line(cloud, arguments, said):
    assert cloud.run("up", *arguments) == 2
    assert said in cloud.transcript()
    assert "Traceback" not in cloud.transcript()


def test_without_gcloud(tmp_path):
    command = [sys.executable, str(ROOT / "launch/tpu.py"), "down", *BASE]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "tpu.py: error: gcloud is not installed, or not on the PATH\n"


@pytest.mark.slow  # a start of gcloud for all lines, and its grammar of all commands
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud here, whose linter reads the transcripts")
def test_gcloud_takes_every_line_that_was_printed(tmp_path):
    lines = {line.removeprefix("$ ") for file in GOLDEN.glob("*.txt") for line in file.read_text().splitlines()}
    lines = sorted(line for line in lines if line.startswith("gcloud "))
    assert len(lines) > 30
    (tmp_path / "lines.json").write_text(json.dumps([{"command_string": line} for line in lines]))
    command = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/lines.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert [(line["command_string"], line["error_message"]) for line in found if not line["success"]] == []
    assert len(found) == len(lines)


def test_the_startup_script_passes_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    scripts = sorted(file for file in (ROOT / "launch").iterdir() if file.suffix in (".sh", ".sbatch"))
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
