#!/usr/bin/env bash
# Character model of Shakespeare, two LSTM layers of 512 units, bfloat16: the customary split, the first nine tenths of
# the text for training, the last for validation. Reports nats per character on the whole validation text.
#   runs/tinyshakespeare.sh [TEXT [RUN [OPTIONS of elman train lm]]]
# TEXT is the file input.txt of github.com/karpathy/char-rnn, data/tinyshakespeare (1,115,394 characters).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/install")
text=${1:-$root/../shared/data/tinyshakespeare/input.txt}
run=${2:-$root/runs/out/tinyshakespeare}
shift $(($# < 2 ? $# : 2))

[[ -f $text ]] || { echo "$text: no such file; pass the path of tinyshakespeare's input.txt" >&2; exit 2; }
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
"$python" - "$text" "$parts" <<'PY'
import sys
from pathlib import Path

text = Path(sys.argv[1]).read_text(encoding="utf-8")
cut = int(len(text) * 0.9)
Path(sys.argv[2], "train.txt").write_text(text[:cut], encoding="utf-8")
Path(sys.argv[2], "valid.txt").write_text(text[cut:], encoding="utf-8")
PY

"$python" -m elman train lm "$parts/train.txt" --valid "$parts/valid.txt" --out "$run" --overwrite \
  --cell lstm --layers 2 --hidden 512 --batch 32 --window 128 --tokens char --precision bf16 --seed 1 \
  --set model.dropout_input=0.2 --set model.dropout_between=0.5 --set model.dropout_output=0.5 \
  --lr 3e-3 --epochs 12 --validate-every 490 "$@"
"$python" -m elman evaluate "$run" "$parts/valid.txt" --json
