#!/usr/bin/env bash
# Resolve requirements/*.in into complete, version-exact locks: `make lock`. Needs network; looks at metadata only.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
.venv/bin/python -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9

compile() {  # markers that hold on every machine the project supports are noise
  "$tools/bin/uv" pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --no-header "$@" |
    sed -E "s/ and platform_machine == 'x86_64' and sys_platform == 'linux'//; s/ ; python_full_version < '3.13'$//"
}
compile --override requirements/cpu.overrides requirements/cpu.in >requirements/cpu.lock
compile --override requirements/cuda.overrides requirements/cuda.in >requirements/cuda.lock
