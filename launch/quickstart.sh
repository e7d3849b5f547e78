#!/usr/bin/env bash
# Makes .venv and tries everything once: emollama quickstart, whose arguments this takes (--out FOLDER, --seed N).
# PYTHON names the interpreter of .venv (default: python3).
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

install "$python" .venv -e '.[quickstart]'
emollama=$PWD/.venv/bin/emollama
cd "$here"
exec "$emollama" quickstart "$@"
