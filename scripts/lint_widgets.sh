#!/usr/bin/env bash
# Read over the JavaScript and CSS of the widgets with Biome, in the version of package-lock.json; skipped, by name, without it.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v npm >/dev/null; then
    echo "widgets: not linted, npm is not installed"
    exit 0
fi
if ! cmp --silent package-lock.json node_modules/.linted-with; then
    if ! npm ci --loglevel=error --no-audit --no-fund >/dev/null; then
        echo "widgets: not linted, npm could not install the linter"
        exit 0
    fi
    cp package-lock.json node_modules/.linted-with
fi
node_modules/.bin/biome lint --error-on-warnings
