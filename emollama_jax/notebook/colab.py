"""What Colab has beside Jupyter: the user's Drive and secrets, uploads, and the camera of the browser."""

import base64
import importlib
import os
from pathlib import Path
from types import ModuleType

from emollama_jax.errors import UserError

DRIVE = "emollama"  # the folder in the user's Drive
RECORD = """
(async () => {
  const stream = await navigator.mediaDevices.getUserMedia({video: {width: 640, height: 480}, audio: true});
  const preview = document.createElement('video');
  preview.srcObject = stream; preview.muted = true; preview.width = 320;
  document.body.appendChild(preview);
  await preview.play();
  const recorder = new MediaRecorder(stream), parts = [];
  recorder.ondataavailable = event => parts.push(event.data);
  recorder.start();
  await new Promise(done => setTimeout(done, SECONDS * 1000));
  await new Promise(done => { recorder.onstop = done; recorder.stop(); });
  stream.getTracks().forEach(track => track.stop());
  preview.remove();
  const reader = new FileReader();
  await new Promise(done => { reader.onload = done; reader.readAsDataURL(new Blob(parts, {type: 'video/webm'})); });
  return reader.result;
})()
"""


def mount_drive(at: str | Path = "drive") -> Path:
    """Mount the user's Drive, after asking for leave, and return the folder `emollama` in it, which is made.

    Raises:
        UserError: this is not Colab.
    """
    place = Path(at).resolve()
    _colab("drive").mount(str(place))
    folder = place / "MyDrive" / DRIVE
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def use_secret(name: str) -> bool:
    """Put one of the user's secrets into the environment, where commands find it; return whether it is there.

    Elsewhere than on Colab it is in the environment already, or not there.
    """
    try:
        userdata = _colab("userdata")
    except UserError:
        return bool(os.environ.get(name))
    try:
        value = userdata.get(name)
    except Exception as error:  # no such secret, or this notebook may not read it
        if type(error).__name__ not in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
            raise
        return bool(os.environ.get(name))
    os.environ[name] = value
    return bool(value)


def upload(folder: str | Path = "clips") -> Path:
    """Ask for one file of the user's computer, and return where it lies now.

    Raises:
        UserError: none was chosen, or this is not Colab.
    """
    chosen = _colab("files").upload()
    if not chosen:
        raise UserError("no file was chosen; run the cell again")
    name, content = next(iter(chosen.items()))
    return _write(Path(folder) / Path(name).name, content)


def record(seconds: float = 5.0, folder: str | Path = "clips") -> Path:
    """Record the browser's camera and microphone, and return the file (WebM).

    Raises:
        UserError: the browser gave no recording, or this is not Colab.
    """
    answer = _colab("output").eval_js(RECORD.replace("SECONDS", f"{seconds:g}"))
    head, comma, content = str(answer or "").partition(",")
    if not (head.startswith("data:video/") and comma and content):
        raise UserError("no recording; allow the page the camera and the microphone, and run the cell again")
    return _write(Path(folder) / "camera.webm", base64.b64decode(content))


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _colab(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"google.colab.{module}")
    except ImportError:
        raise UserError("this is not Colab; give the path of a file instead") from None
