"""Hosts of a made-up cloud: systemd containers on this machine, each with its own metadata, that boot as TPU machines.

Their file system is this machine's with a layer of their own; they share its network, and are told apart by addresses
of the loopback. `$SANDBOX` is a folder with `cloud.json`; `sandbox_gcloud.py` starts and ends them.
"""

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

STARTUP = "/etc/systemd/system/google-startup-scripts.service"
UNIT = """[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/bash -c 'curl -sSf -H "Metadata-Flavor: Google" \
http://$GCE_METADATA_HOST/computeMetadata/v1/instance/attributes/startup-script >/run/startup && bash /run/startup'
"""
SUDO = """#!/bin/bash
while [[ $1 == *=* ]]; do export "$1"; shift; done
exec "$@"
"""


def why_not() -> str:
    """Why there can be no such hosts here; "" where there can."""
    if os.geteuid() != 0:
        return "hosts in containers need root"
    missing = [name for name in ("systemd-nspawn", "nsenter", "gcloud", "curl") if not shutil.which(name)]
    return f"no {', '.join(missing)} here (Debian's systemd-container, Google's SDK)" if missing else ""


class Metadata:
    """A metadata server for one host, on the loopback."""

    def __init__(self, attributes: dict[str, str]):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
                value = attributes.get(name) if self.headers.get("Metadata-Flavor") == "Google" else None
                self.send_response(200 if value is not None else 404)
                self.send_header("Metadata-Flavor", "Google")
                self.end_headers()
                self.wfile.write((value or "").encode())

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Host:
    """One host, in a folder."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder / name, name
        self._pid = self.folder / "pid"

    def boot(self, environment: dict[str, str]) -> None:
        """Starts it anew, with an empty layer."""
        root = self.folder / "root"
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True)
        layers = f"lowerdir=/,upperdir={self.folder}/upper,workdir={self.folder}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)], check=True)
        (root / STARTUP[1:]).write_text(UNIT)
        (root / "usr/local/bin/sudo").write_text(SUDO)
        (root / "usr/local/bin/sudo").chmod(0o755)
        settings = " ".join(f'"{name}={value}"' for name, value in environment.items())
        conf = root / "etc/systemd/system.conf.d/cloud.conf"
        conf.parent.mkdir(parents=True, exist_ok=True)
        conf.write_text(f"[Manager]\nDefaultEnvironment={settings}\n")
        for old in ("opt/emollama", "var/log/emollama.log"):
            assert not (root / old).exists()
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--resolv-conf=off", "--boot"]
        command += [f"--directory={root}", f"--machine={self.name}", f"systemd.unit={Path(STARTUP).name}"]
        with (self.folder / "console").open("wb") as console:
            streams = {"stdin": subprocess.DEVNULL, "stdout": console, "stderr": console}
            on_disk = os.environ | {"SYSTEMD_NSPAWN_TMPFS_TMP": "0"}  # /tmp, as on a TPU machine
            process = subprocess.Popen(command, env=on_disk, start_new_session=True, **streams)
        self._pid.write_text(str(process.pid))

    @property
    def is_up(self) -> bool:
        return self._init() is not None

    def run(self, command: str) -> subprocess.CompletedProcess:
        """Runs a shell command in it."""
        init = self._init()
        if init is None:
            return subprocess.CompletedProcess(command, 255, "", f"{self.name} is not up")
        enter = ["nsenter", f"--target={init}", "--mount", "--uts", "--ipc", "--pid", "--", "/bin/bash", "-c", command]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        conf = (self.folder / "root/etc/systemd/system.conf.d/cloud.conf").read_text()
        for pair in conf.split("DefaultEnvironment=")[1].strip().strip('"').split('" "'):
            name, _, value = pair.partition("=")
            environment[name] = value
        return subprocess.run(enter, env=environment, capture_output=True, text=True, timeout=900)

    def signal_run(self, number: signal.Signals) -> None:
        """Sends a signal to the process of the unit `emollama`, which runs."""
        pid = self._main_pid()
        assert pid > 1, f"the run on {self.name} has no process"
        os.kill(pid, number)

    def _main_pid(self) -> int:
        """The process of the unit `emollama`, as it is numbered here; 0 where it does not run."""
        inside = self.run("systemctl show --property=MainPID --value emollama").stdout.strip()
        init = self._init()
        if not inside.isdecimal() or inside == "0" or init is None:
            return 0
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError, IndexError):
                text = status.read_text()
                numbers = text.split("NSpid:")[1].splitlines()[0].split()
                same = os.readlink(status.parent / "ns/pid") == os.readlink(f"/proc/{init}/ns/pid")
                if same and numbers[-1] == inside:
                    return int(numbers[0])
        return 0

    def end(self) -> None:
        """Takes it away at once, as a machine is."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            init = self._init()
            os.kill(init or int(self._pid.read_text()), signal.SIGKILL)
        for _ in range(100):
            if self._init() is None:
                break
            time.sleep(0.1)
        time.sleep(0.5)
        subprocess.run(["umount", "--lazy", str(self.folder / "root")], capture_output=True)

    def _init(self) -> int | None:
        """Its first process."""
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            nspawn = int(self._pid.read_text())
            children = Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split()
            return int(children[0])
        return None


def load(folder: Path) -> dict:
    return json.loads((folder / "cloud.json").read_text())
