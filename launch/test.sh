#!/usr/bin/env bash
# Runs the whole test suite in .venv, which it makes and keeps up to date. Extra arguments go to pytest:
#   bash launch/test.sh tests/test_config.py -k flags
# Without arguments, and where a Python 3.12 is found, the smoke tests then run once more in .venv-3.12 with the newest
# JAX and transformers. PYTHON names the interpreter of .venv (default: python3).
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

status=0
install "$python" .venv -e '.[test]'
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@" || status=$?

python312=$(find_python312)
if [ $# -gt 0 ]; then
  echo "launch/test.sh: no smoke run on Python 3.12: it is made only when the whole suite is run"
elif [[ "$(version .venv/bin/python)" == 3.12.* ]]; then
  echo "launch/test.sh: no smoke run on Python 3.12: the whole suite has just run there"
elif [ -z "$python312" ]; then
  echo "launch/test.sh: no smoke run on Python 3.12: no python3.12 on the PATH or under ~/.pyenv/versions"
else
  install "$python312" .venv-3.12 -e '.[judge]' pytest "transformers<6"
  .venv-3.12/bin/python -m pytest -m smoke || status=$?
fi
exit "$status"
