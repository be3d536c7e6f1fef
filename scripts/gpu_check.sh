#!/usr/bin/env bash
# Check and time the kernels on a machine with an NVIDIA GPU: correctness first, then timing, short tables last.
#
#     scripts/gpu_check.sh FOLDER [quick]
#
# JSON and logs go to FOLDER. Wheels in .carry*/ are installed, and .tar.xz archives of installed packages unpacked, to a
# folder of their own first (a machine without network).
# quick: fewer cases and shapes, for a minute of GPU. GDN_CP_COMMIT names the commit where there is no repository.
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_check.sh FOLDER [quick]}
mode=${2:-full}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

site=$(mktemp -d)
shopt -s nullglob
wheels=(.carry*/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${wheels[@]}" ||
    exit 3
fi
for archive in .carry*/*.tar.xz; do
  tar -C "$site" -xf "$archive" || exit 3
done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

failed=()
step() { # step NAME COMMAND...: run, keep the log, remember a failure, go on
  local name=$1 started=$SECONDS
  shift
  "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
  echo "$name: $((SECONDS - started)) s"
}

jobs=$(nproc)
[ "$jobs" -gt 16 ] && jobs=16
check=(--jobs "$jobs")
chunk=(--jobs "$jobs")
if [ "$mode" = quick ]; then
  check+=(--no-million --no-fla --only "states")
  chunk+=(--heads 16 32 --tokens 8192 --others)
fi
step doctor "$python" -m gdn_cp.doctor
step tests "$python" -m pytest tests/gpu -q -x -p no:cacheprovider
step check "$python" scripts/check_kernels.py --output "$out/check.json" "${check[@]}"
step chunk "$python" scripts/bench_kernels.py chunk --output "$out/chunk.json" "${chunk[@]}"
step decode "$python" scripts/bench_kernels.py decode --output "$out/decode.json"
step gate "$python" scripts/bench_kernels.py gate --output "$out/gate.json"
jobs_of_ranks=()
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -ge 2 ]; then
  ranks=2
  [ "$gpus" -ge 4 ] && ranks=4
  torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks")
  layer=()
  [ "$mode" = quick ] && layer=(--cases 16k-one 64k-17mixed --a2a-sizes "$ranks" --repeats 5)
  step ranks "$python" -m pytest tests -q -m multi_gpu -p no:cacheprovider
  step exchange "${torchrun[@]}" scripts/bench_exchange.py --output "$out/exchange.json"
  step layer "${torchrun[@]}" scripts/bench_layer.py --output "$out/layer.json" "${layer[@]}"
  jobs_of_ranks=(ranks exchange layer)
fi

for name in "${jobs_of_ranks[@]}" tests check gate decode chunk; do
  echo "== $name"
  tail -n 45 "$out/$name.log"
done
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
