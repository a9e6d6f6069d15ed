# Makes .venv in the project's folder, with all that tests and examples need. To be sourced by
# the scripts beside it, with the project as working folder; afterwards .venv/bin/python runs.
# Installs only when .venv is missing, or pyproject.toml or constraints.txt has changed.
# PYTHON=/path/to/python3.12 chooses another interpreter.

EXTRAS="torch,inference,vision,cli,dev"

_is_usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the first Python that will do; 3.11 comes first, as constraints.txt was tested with it.
_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if _is_usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "Need Python 3.11 or newer; found ${PYTHON:-$(python3 --version 2>&1 || true)}." >&2
    echo "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or set PYTHON." >&2
    return 1
}

_make_venv() {
    local python
    python=$(_find_python) || return 1
    echo "Making .venv with $python" >&2
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "$python cannot make an environment." >&2
        echo "Debian, Ubuntu: apt-get install $(basename "$(readlink -f "$python")")-venv" >&2
        return 1
    fi
}

# What the installation depends on, as one line.
_fingerprint() {
    .venv/bin/python - "$EXTRAS" "$PWD" <<'PYTHON'
import hashlib, pathlib, sys
files = b"".join(pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
print(sys.version.split()[0], *sys.argv[1:], hashlib.sha256(files).hexdigest())
PYTHON
}

ensure_venv() {
    if ! _is_usable .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        _make_venv || return 1
    fi
    local stamp=.venv/.bigdl-installed wanted
    wanted=$(_fingerprint)
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
        echo "Installing bigdl-next[$EXTRAS] into .venv (several GB the first time)" >&2
        rm -f "$stamp"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 10 \
            --editable ".[$EXTRAS]" --constraint constraints.txt || return 1
        echo "$wanted" >"$stamp"
    fi
    if ! command -v "${CXX:-g++}" >/dev/null && ! command -v clang++ >/dev/null; then
        echo "No C++ compiler: torch.compile will be refused, all else works." >&2
        echo "Debian, Ubuntu: apt-get install g++" >&2
    fi
}
