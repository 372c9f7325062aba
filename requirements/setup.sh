#!/usr/bin/env bash
# Make .venv from a complete lock and install the project into it, editable. Does nothing if that was done already.
#   LOCK=cpu|cuda      which lock; the Makefile takes cuda where an NVIDIA driver is, else cpu
#   PYTHON=python3.12  which Python (3.11 or 3.12)
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 1; }

lock=${LOCK:-cpu}
file=requirements/$lock.lock
[ -f "$file" ] || fail "LOCK=$lock is neither cpu nor cuda"

stamp=.venv/.installed
want=$(sha256sum "$file" pyproject.toml requirements/setup.sh | sha256sum | cut -c1-64)
if [ -x .venv/bin/montessori ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi

[ "$(uname -sm)" = "Linux x86_64" ] || fail "needs Linux on x86_64, this is $(uname -sm)"
command -v g++ >/dev/null || fail "needs a C++ compiler for what PyTorch and vLLM compile: install g++ (Debian, Ubuntu: apt-get install g++)"
is_supported() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }
python=
for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
  if is_supported "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "needs Python 3.11 or 3.12 with venv${PYTHON:+, which $PYTHON is not}: install one, or name it with PYTHON=..."

if [ -f .venv/.lock ] && [ "$(cat .venv/.lock)" != "$lock" ]; then
  echo "setup: .venv has the packages of LOCK=$(cat .venv/.lock), which do not mix with those of $lock: made anew"
  rm -rf .venv
fi
echo "setup: $lock packages with $("$python" -V) into .venv (a few minutes, once)"
[ -x .venv/bin/python ] && is_supported .venv/bin/python || { rm -rf .venv; "$python" -m venv .venv; }
rm -f "$stamp"
echo "$lock" >.venv/.lock
# Complete locks, so no dependency is looked up. The sdists (DeepSpeed, rouge-score) build with the packages installed
# first; DeepSpeed's operators are not used.
pip() { DS_BUILD_OPS=0 .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation "$@"; }
pinned() { grep -E "^$1==" "$file"; }
pip "$(pinned setuptools)"
if [ "$lock" = cpu ]; then
  # PyTorch's own index has the CPU build; where it cannot be reached, pip takes what it finds elsewhere.
  pip "$(pinned torch)" --extra-index-url https://download.pytorch.org/whl/cpu 2> >(grep -v 'Retrying' >&2)
fi
pip -r "$file"
pip -e .
echo "$want" >"$stamp"
