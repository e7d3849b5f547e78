"""The list of a folder's files by which damage is seen: `files.json`, with each file's size and SHA-256.

It is written last, so a folder without it is not finished. Sizes are compared whenever the folder is used; digests are
compared of the files that are read, once for a file (`io/checksums.py`).
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from emollama_jax.io.checksums import file_digest
from emollama_jax.io.paths import as_path, sizes_below

FILES = "files.json"
THREADS = 4  # that hash files


def write_file_list(folder: epath.PathLike) -> None:
    """Seals a finished folder: writes `files.json`."""
    folder = as_path(folder)
    found = {name: [size, file_digest(folder / name)] for name, size in sizes_below(folder).items() if name != FILES}
    (folder / FILES).write_text(json.dumps(found, indent=1, sort_keys=True))


def find_damage(
    folder: epath.PathLike, is_read: Callable[[str], bool] = lambda name: True, *, anew: bool = False
) -> str | None:
    """Says in words what is wrong with a sealed folder; None if nothing is. Files that are not listed are passed over.

    Args:
        is_read: whether a file, or a subfolder with all that is in it, is to be read: its content is compared, that of
            all others by size alone. Default: everything.
        anew: read every byte again, whatever is known of the files.
    """
    folder = as_path(folder)
    try:
        expected = {name: (int(size), str(digest)) for name, (size, digest) in _read_list(folder).items()}
    except FileNotFoundError:
        return f"not finished (no {FILES})"
    except (ValueError, TypeError, AttributeError):
        return f"damaged ({FILES} is cut short)"
    sizes = sizes_below(folder)
    for name, (size, _) in expected.items():
        if name not in sizes:
            return f"damaged (no {name})"
        if sizes[name] != size:
            return f"damaged ({name} is not what was written)"
    read = [name for name in expected if is_read(name.partition("/")[0])]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: file_digest(folder / name, anew=anew), read)
        wrong = [name for name, digest in zip(read, digests, strict=True) if digest != expected[name][1]]
    return f"damaged ({wrong[0]} is not what was written)" if wrong else None


def _read_list(folder: epath.Path) -> dict:
    return json.loads((folder / FILES).read_text())
