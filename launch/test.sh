#!/usr/bin/env bash
# Runs the tests in .venv, which it makes and keeps up to date:
#   bash launch/test.sh                                # all but the slow ones
#   bash launch/test.sh --all                          # all of them, then the smoke tests with newer Pythons
#   bash launch/test.sh tests/test_config.py -k flags  # arguments go to pytest
# The smoke tests run on Python 3.12 and 3.13, each in its .venv-VERSION with the newest JAX and transformers, where it is
# found. The last line of a run says what was left out, and why. PYTHON names the interpreter of .venv (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

# find_python VERSION: the first interpreter that really runs it: a pyenv shim may stand on the PATH without one behind it.
find_python() {
  local candidate
  for candidate in "python$1" "$HOME/.pyenv/versions/$1"*/bin/"python$1"; do
    case "$(version "$candidate")" in "$1".*) echo "$candidate" && return ;; esac
  done
}

# One process more than there are cores, as many tests wait for processes that they start, and four at most, for memory.
cores=$(getconf _NPROCESSORS_ONLN)
parallel=(-n "$((cores < 4 ? cores + 1 : 4))" --dist worksteal)
install "$python" .venv -e '.[test]'
if [ $# -eq 0 ]; then
  exec .venv/bin/python -m pytest "${parallel[@]}" -m "not slow"
elif [ "$*" != --all ]; then
  exec .venv/bin/python -m pytest "${parallel[@]}" "$@"
fi

install_smoke() { install "$1" ".venv-$2" -e '.[judge]' pytest pytest-xdist "transformers<6"; }

# Beside the tests, as it mostly waits for the package index. Where it fails, it is tried again below.
for newer in 3.12 3.13; do
  found=$(find_python "$newer")
  if [ -n "$found" ] && [[ "$(version .venv/bin/python)" != "$newer".* ]]; then install_smoke "$found" "$newer"; fi
done >/dev/null 2>&1 &

status=0
.venv/bin/python -m pytest "${parallel[@]}" || status=$?
wait
for newer in 3.12 3.13; do
  found=$(find_python "$newer")
  if [[ "$(version .venv/bin/python)" == "$newer".* ]]; then
    echo "launch/test.sh: no smoke run on Python $newer: the whole suite has just run there"
  elif [ -z "$found" ]; then
    echo "launch/test.sh: no smoke run on Python $newer: no python$newer on the PATH or under ~/.pyenv/versions"
  else
    install_smoke "$found" "$newer"
    # A third process would take longer to begin than it saves.
    ".venv-$newer/bin/python" -m pytest "${parallel[@]}" -n 2 -m smoke || status=$?
  fi
done
exit "$status"
