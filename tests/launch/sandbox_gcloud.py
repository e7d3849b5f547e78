"""gcloud for a made-up cloud of two hosts on this machine: `storage` is the real one's, the rest starts and ends hosts.

$SANDBOX is a folder with `cloud.json`: the hosts' environments, the variables and the path of the real gcloud. A file
`lost` beside it says that the slices were taken away.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.launch.hosts import Host, load  # noqa: E402

FOLDER = Path(os.environ["SANDBOX"])


def main() -> int:
    cloud, words = load(FOLDER), sys.argv[1:]
    hosts = [Host(FOLDER / "hosts", name) for name in cloud["hosts"]]
    there, lost = FOLDER / "there", FOLDER / "lost"
    if words[0] == "storage":
        done = subprocess.run(
            [cloud["gcloud"], *words], capture_output=True, text=True, env=os.environ | cloud["storage"]
        )
        gone = "'NoneType' object has no attribute 'items'" in done.stderr  # the bucket server's answer to a removal
        print(done.stdout, end="")
        print(done.stderr, end="", file=sys.stderr)
        return 0 if gone else done.returncode
    verb = words[3]
    if verb == "create":
        there.touch()
        startup = next(word for word in words if word.startswith("--metadata-from-file=")).rpartition("=")[2]
        (FOLDER / "startup").write_text(Path(startup).read_text())
        for host, environment in zip(hosts, cloud["hosts"].values(), strict=True):
            host.boot(environment)
        return 0
    if not there.exists():
        print("ERROR: (gcloud) NOT_FOUND: was not found.", file=sys.stderr)
        return 1
    if verb == "describe":
        print(json.dumps({"state": {"state": "SUSPENDED" if lost.exists() else "ACTIVE"}}))
    elif verb == "delete":
        for host in hosts:
            host.end()
        there.unlink()
        lost.unlink(missing_ok=True)
    elif verb == "ssh":
        command = next(word for word in words if word.startswith("--command=")).partition("=")[2]
        with ThreadPoolExecutor(len(hosts)) as pool:
            ended = list(pool.map(lambda host: host.run(command), hosts))
        print("".join(done.stdout for done in ended), end="")
        print("".join(done.stderr for done in ended), end="", file=sys.stderr)
        return max(done.returncode for done in ended)
    return 0


if __name__ == "__main__":
    sys.exit(main())
