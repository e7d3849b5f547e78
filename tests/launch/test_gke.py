"""JobSets of GKE: as files, against Kubernetes' schema, and the envelope against JobSet's documented fields."""

import re
import subprocess
import sys

import pytest

from tests.launch.cloud import ROOT, check_golden

yaml = pytest.importorskip("yaml")
TRAIN = ["--", "emollama", "train", "--config", "stage1_v5e_16", '--config.data.train=("gs://mine/data:train",)']
ALL = ["--namespace=ml", "--queue=tpus", "--service-account=runner", "--spot", "--bucket=gs://mine", "--env=A=on"]

# The fields of jobset.x-k8s.io/v1alpha2 that are used here, and what they may hold.
ENVELOPE = {
    "apiVersion": lambda x: x == "jobset.x-k8s.io/v1alpha2",
    "kind": lambda x: x == "JobSet",
    "metadata": {"name": str, "namespace": str, "labels": dict, "annotations": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": lambda x: re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:-]{0,126}[A-Za-z0-9_])?", x),
                    "action": lambda x: x in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                    "onJobFailureReasons": [
                        lambda x: x in ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy")
                    ],
                    "onJobFailureMessagePatterns": [lambda x: re.compile(x)],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": dict, "metadata": dict}}],
    },
}


def gke(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch/gke.py"), "--name=stage1", "--image=repo/emollama:1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def check_fields(value, allowed, where="") -> None:
    if isinstance(allowed, dict):
        assert set(value) <= set(allowed), where
        for name, item in value.items():
            check_fields(item, allowed[name], f"{where}.{name}")
    elif isinstance(allowed, list):
        for item in value:
            check_fields(item, allowed[0], f"{where}[]")
    elif isinstance(allowed, type):
        assert isinstance(value, allowed), where
    else:
        assert allowed(value), where


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("kind", ["v5e-16", "v6e-16", "v5p-16"])
def test_job_sets(kind, slices):
    done = gke(f"--type={kind}", f"--slices={slices}", *(ALL if slices == 2 else []), *TRAIN)
    assert done.returncode == 0, done.stderr
    (job_set,) = yaml.safe_load_all(done.stdout)
    check_fields(job_set, ENVELOPE)
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    vms = {"v5e-16": 4, "v6e-16": 4, "v5p-16": 2}[kind]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (slices, vms, vms)
    check_golden(f"gke_{kind}_{slices}.yaml", done.stdout)


def test_the_inner_job_and_the_configuration_are_kubernetes_own(tmp_path):
    validate = pytest.importorskip("kubernetes_validate").validate
    (tmp_path / "mine.py").write_text('"""A config.\n\n  indented: "quoted" \\n"""\n\n\ndef get_config(): ...\n')
    train = ["--", "emollama", "train", "--config=mine.py"]
    done = gke("--type=v5e-16", *ALL, *train, cwd=tmp_path)
    config, job_set = yaml.safe_load_all(done.stdout)
    spec = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    for manifest in (config, job):
        validate(manifest, "1.33", strict=True)
    assert config["data"] == {"mine.py": (tmp_path / "mine.py").read_text()}
    container = spec["template"]["spec"]["containers"][0]
    arguments = "--config=/etc/emollama/mine.py --pod"
    assert container["command"][-1] == f"emollama doctor {arguments} && exec emollama train {arguments}"
    assert {"name": "A", "value": "on"} in container["env"]
    with pytest.raises(Exception, match="paralellism"):
        validate(job | {"spec": spec | {"paralellism": 1}}, "1.33", strict=True)


def test_which_ends_of_a_pod_restart_what():
    """As Kubernetes words the message of a Job that failed by a rule, JobSet's first rule that matches decides."""
    (job_set,) = yaml.safe_load_all(gke("--type=v5e-16", *TRAIN).stdout)
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    rules = job_set["spec"]["failurePolicy"]["rules"]

    def action(code: int, disrupted: bool = False) -> str:
        for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
            by_code = "onExitCodes" in rule and code in rule["onExitCodes"]["values"]
            if by_code or ("onPodConditions" in rule and disrupted):
                message = (
                    f"Container emollama for pod x failed with exit code {code} matching FailJob rule at index {i}"
                )
                reason = "PodFailurePolicy"
                break
        else:
            message, reason = "Job has reached the specified backoff limit", "BackoffLimitExceeded"
        for rule in rules:
            patterns = rule["onJobFailureMessagePatterns"]
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    assert {action(code) for code in (1, 2, 4)} == {"FailJobSet"}
    assert {action(code) for code in (3, 134, 137, 139)} == {"RestartJobSet"}
    assert action(75) == action(137, disrupted=True) == action(1, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--type=v5e-17", *TRAIN], "v5e comes in"),
        (["--type=v5e-16"], "give a command after --"),
        (["--type=v5e-16", "--env=x", *TRAIN], "--env x: write NAME=VALUE"),
        (["--type=v5e-16", "--", "emollama", "train", "--config=no.py"], "--config no.py: no such file"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said):
    done = gke(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
