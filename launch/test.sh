#!/usr/bin/env bash
# Runs the tests in .venv, which it makes and keeps up to date:
#   bash launch/test.sh                                # all but the slow ones
#   bash launch/test.sh --all                          # all of them, then the smoke tests with Python 3.12
#   bash launch/test.sh tests/test_config.py -k flags  # arguments go to pytest
# The smoke tests run in .venv-3.12 with the newest JAX and transformers, where a Python 3.12 is found. The last line of
# a run says what was left out, and why. PYTHON names the interpreter of .venv (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

# The first interpreter that really runs 3.12: a pyenv shim may stand on the PATH without one behind it.
find_python312() {
  local candidate
  for candidate in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
    case "$(version "$candidate")" in 3.12.*) echo "$candidate" && return ;; esac
  done
}

parallel=(-n logical --maxprocesses 4 --dist worksteal)
install "$python" .venv -e '.[test]'
if [ $# -eq 0 ]; then
  exec .venv/bin/python -m pytest "${parallel[@]}" -m "not slow"
elif [ "$*" != --all ]; then
  exec .venv/bin/python -m pytest "${parallel[@]}" "$@"
fi

status=0
.venv/bin/python -m pytest "${parallel[@]}" || status=$?
python312=$(find_python312)
if [[ "$(version .venv/bin/python)" == 3.12.* ]]; then
  echo "launch/test.sh: no smoke run on Python 3.12: the whole suite has just run there"
elif [ -z "$python312" ]; then
  echo "launch/test.sh: no smoke run on Python 3.12: no python3.12 on the PATH or under ~/.pyenv/versions"
else
  install "$python312" .venv-3.12 -e '.[judge]' pytest pytest-xdist "transformers<6"
  .venv-3.12/bin/python -m pytest "${parallel[@]}" -m smoke || status=$?
fi
exit "$status"
