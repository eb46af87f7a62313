#!/usr/bin/env bash
# An environment of its own for llm-compressor: it pins other versions of transformers and compressed-tensors.
#
#   scripts/llmcompressor_environment.sh [FOLDER]      default: ${XDG_CACHE_HOME:-~/.cache}/optinfer/llmcompressor
#
# Prints the path of its python on the last line, for OPTINFER_LLMCOMPRESSOR_PYTHON. Doing it twice changes nothing.
set -euo pipefail
folder="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/optinfer/llmcompressor}"
version="${LLMCOMPRESSOR_VERSION:-0.14.0.1}"
python="$folder/bin/python"

if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -m venv "$folder" >&2
fi
if ! "$python" -c "import importlib.metadata as m; assert m.version('llmcompressor') == '$version'" 2>/dev/null; then
    "$python" -m pip install --quiet "torch==${TORCH_VERSION:-2.13.0}" >&2
    "$python" -m pip install --quiet "llmcompressor==$version" >&2
fi
"$python" -c "import llmcompressor" >&2
echo "$python"
