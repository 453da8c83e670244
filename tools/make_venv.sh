#!/bin/sh
# Makes the virtual environment $1 with the first Python 3.11 or 3.12 that works (or the one named in $PYTHON).
set -eu
venv=$1
right='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$right" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
for python in ${PYTHON:-python3.11 python3.12 python3 python}; do
    if ! "$python" -c "$right" >/dev/null 2>&1; then
        continue
    fi
    if "$python" -m venv --clear "$venv" 2>/dev/null; then
        echo "made $venv with $("$python" --version)"
        exit 0
    fi
    echo "$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
done
echo "pixrl needs Python 3.11 or 3.12, and none of these is one: ${PYTHON:-python3.11 python3.12 python3 python}." >&2
echo "Install one (https://www.python.org/downloads), or name it: make setup PYTHON=/path/to/python3.11" >&2
exit 1
