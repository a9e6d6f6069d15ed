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

# Spark needs Java 17 or 21. Installed where that may be done, else it is said what to do.
_ensure_java() {
    local java="${JAVA_HOME:+$JAVA_HOME/bin/}java" version
    version=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -1) || true
    [[ "$version" == 17 || "$version" == 21 ]] && return
    if [[ -z "$version" && "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        echo "Installing openjdk-17-jre-headless, for Spark" >&2
        apt-get update -qq && apt-get install -y -qq openjdk-17-jre-headless >/dev/null && return
    fi
    echo "Java 17 or 21 is needed for Spark's tests, found: ${version:-none}. They will be skipped." >&2
    echo "Debian, Ubuntu: apt-get install openjdk-17-jre-headless; or set JAVA_HOME." >&2
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
    _ensure_java
    if ! command -v "${CXX:-g++}" >/dev/null && ! command -v clang++ >/dev/null; then
        echo "No C++ compiler: torch.compile will be refused, all else works." >&2
        echo "Debian, Ubuntu: apt-get install g++" >&2
    fi
}
