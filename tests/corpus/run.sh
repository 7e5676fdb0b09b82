#!/usr/bin/env bash
# The whole corpus of exported models, judged from outside: real files, the command line, ONNX Runtime, nothing else of vitrim.
#
#     tests/corpus/run.sh [arguments of judge.py, such as --only 'vit_*' --stages inspect,slice -v]
#
# CORPUS: the folder with judge.py and corpus.tar.xz; the default is shared/corpus beside the checkout.
# PYTHON: a Python with numpy, onnx and onnxruntime; the default is the one that .ci/run makes.
# VITRIM: the binary; the default is the debug build, which is brought up to date first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

corpus=$(realpath -m "${CORPUS:-../shared/corpus}")
python=${PYTHON:-$PWD/target/ci/venv/bin/python}
unpacked=$PWD/target/ci/corpus

[[ -f $corpus/judge.py ]] || { echo "error: $corpus: no judge.py there; say where with CORPUS=DIR" >&2; exit 2; }
if [[ -z ${VITRIM:-} ]]; then
    cargo build
    VITRIM=$PWD/target/debug/vitrim
fi

# Unpacked once per archive; a half-unpacked folder is never mistaken for a whole one.
stamp=$(sha256sum "$corpus/corpus.tar.xz" | cut -d' ' -f1)
if [[ $(cat "$unpacked/stamp" 2>/dev/null) != "$stamp" ]]; then
    rm -rf "$unpacked"
    PYTHONDONTWRITEBYTECODE=1 "$python" "$corpus/unpack.py" "$corpus/corpus.tar.xz" "$unpacked"
    echo "$stamp" > "$unpacked/stamp"
fi
PYTHONDONTWRITEBYTECODE=1 "$python" "$corpus/judge.py" "$unpacked" --vitrim "$VITRIM" "$@"
