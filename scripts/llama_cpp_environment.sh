#!/usr/bin/env bash
# An environment of its own for llama.cpp, from a package that ships it built (xllamacpp), and its GGUF tools.
#
#   scripts/llama_cpp_environment.sh [FOLDER]      default: ${XDG_CACHE_HOME:-~/.cache}/optinfer/llama_cpp
#
# Under a minute and 150 MB. Prints the path of its python on the last line. Doing it twice changes nothing.
set -euo pipefail
folder="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/optinfer/llama_cpp}"
python="$folder/bin/python"

if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -m venv "$folder" >&2
fi
if ! "$python" -c "import xllamacpp, gguf" 2>/dev/null; then
    "$python" -m pip install --quiet --only-binary :all: "xllamacpp==${XLLAMACPP_VERSION:-2026.10.11549}" gguf numpy >&2
fi
"$python" -c "import xllamacpp" >&2
echo "$python"
