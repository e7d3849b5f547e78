# shellcheck shell=bash
# Sourced by the scripts beside it, from the root of the repository: makes virtual environments and keeps them up to date.

version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || true; }

# install PYTHON VENV REQUIREMENT...: does nothing when the interpreter, the place and the requirements are as last time.
install() {
  local python=$1 venv=$2 file stamp
  shift 2
  file="$venv/installed-$(cksum <<<"$*" | cut -d' ' -f1)"
  stamp="$(version "$python") $PWD $* $(cat setup.py pyproject.toml constraints.txt | cksum)"
  if [ "$(cat "$file" 2>/dev/null)" = "$stamp" ]; then return; fi
  if [ "$(version "$venv/bin/python")" != "$(version "$python")" ]; then rm -rf "$venv"; fi
  echo "$0: installing into $venv"
  rm -f "$file"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt "$@"
  # On all processors, as pip does not; some packages have files that no or another Python reads.
  "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
  echo "$stamp" >"$file"
}

# The interpreter of .venv: $PYTHON, or python3.
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "$0: $python does not run or is older than Python 3.11; install 3.11 or newer," \
    "or name one: PYTHON=/path/to/python3.11 bash $0" >&2
  exit 1
fi
